//! The operator: watches migrations, decides, acts through the Kubernetes API. It has no rights on any host.
//!
//! | module | holds |
//! |---|---|
//! | [`decide`] | what is to be done: pure functions over what was observed |
#![forbid(unsafe_code)]

pub mod decide;
