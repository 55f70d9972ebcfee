//! The operator: watches migrations, decides, acts through the Kubernetes API. It has no rights on any host.
//!
//! | module | holds |
//! |---|---|
//! | [`decide`] | what is to be done: pure functions over what was observed |
//! | [`migration`] | a pass: observe, decide, act, report |
//! | [`context`] | what all passes share |
//! | [`nodes`] | every node in one view; heartbeats; the ready label |
//! | [`leader`] | the election: all replicas watch, one acts |
//! | [`certificates`], [`csr`] | our CA; who gets a certificate |
//! | [`events`], [`metrics`], [`admin`] | what people and machines see |
//! | [`uninstall`] | the hook of `helm uninstall` |
//! | [`run`], [`args`], [`stop`], [`error`] | the program |

#![forbid(unsafe_code)]
// clippy.toml lists what decisions must not touch; the rest of the program has to. `decide` denies both again.
#![allow(clippy::disallowed_types, clippy::disallowed_methods)]

pub mod admin;
pub mod args;
pub mod certificates;
pub mod context;
pub mod csr;
pub mod decide;
pub mod error;
pub mod events;
pub mod leader;
pub mod metrics;
pub mod migration;
pub mod nodes;
pub mod run;
pub mod stop;
pub mod uninstall;
