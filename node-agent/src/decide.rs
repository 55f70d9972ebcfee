//! Decisions as pure functions over plain data: they cannot wait, and they touch nothing.
#![deny(clippy::wildcard_enum_match_arm)]

pub mod assignment;
pub mod preflight;
pub mod recover;
pub mod step;
