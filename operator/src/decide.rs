//! What is to be done about a migration: a pure function of what was observed, with `now` inside.
//!
//! ```text
//! (new) --accept--> Checking --admit--> Moving --Committed--> Finalizing --> Succeeded
//!   |                  |   (Queued)       |
//!   refused         refused            Aborted --settle--> RolledBack | Canceled | Failed
//!   v                  v
//! Failed            Aborted --settle--> Failed | Canceled
//! ```
//!
//! The stage is read from the API object alone (`stage.rs`), so that an operator that starts at any point goes on where
//! another ended. Nothing here waits, fails or touches anything: what is to be done leaves as [`Effects`], what is to be
//! seen as [`View`], when to look again as [`Wake`].

#![deny(clippy::disallowed_types, clippy::disallowed_methods)]
#![deny(clippy::wildcard_enum_match_arm)]

pub mod abort;
pub mod candidates;
pub mod checking;
pub mod cold;
pub mod draft;
pub mod drift;
pub mod effect;
pub mod eligibility;
pub mod finalize;
pub mod finished;
pub mod moving;
pub mod pod;
pub mod queue;
pub mod settle;
pub mod stage;
pub mod target_pod;
pub mod view;
pub mod wait;
pub mod world;

pub use effect::{Cause, Decision, DeletePod, Effects, FinalizerChange, HandOver, Wake};
pub use stage::Stage;
pub use view::View;
pub use world::{Limits, NodeView, Observed, Other, World};

/// Decides what is to be done.
#[must_use]
pub fn decide(world: &World) -> Decision {
    match stage::of(world) {
        Stage::Finished => finished::decide(world),
        Stage::New => checking::accept(world),
        Stage::Checking => checking::check(world),
        Stage::Moving => moving::decide(world),
        Stage::Aborted => settle::decide(world),
        Stage::Committed => finalize::decide(world),
        Stage::ColdMoving => cold::moving(world),
        Stage::ColdAborted => cold::settle(world),
        Stage::ColdCommitted => cold::finalize(world),
    }
}

#[cfg(test)]
mod admission_tables;
#[cfg(test)]
mod fixture;
#[cfg(test)]
mod tables;
#[cfg(test)]
mod target_pod_tests;
#[cfg(test)]
mod timelines;
