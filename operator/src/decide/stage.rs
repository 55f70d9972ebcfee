//! Where a migration stands, read from the API object alone.

use crds::condition::{is_false, is_true};
use crds::process_migration::{DecisionValue, cond};

use super::world::World;

/// Where a migration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Not accepted yet.
    New,
    /// Accepted; being checked or waiting for its turn.
    Checking,
    /// Admitted; the agents may act.
    Moving,
    /// Decided: the source runs on.
    Aborted,
    /// Decided: the target runs.
    Committed,
    /// Cold: the new pod starts.
    ColdMoving,
    /// Cold: given up before the new pod was Ready.
    ColdAborted,
    /// Cold: the new pod is Ready, the old one ends.
    ColdCommitted,
    /// Settled.
    Finished,
}

/// The stage of a migration.
#[must_use]
pub fn of(world: &World) -> Stage {
    let status = world.status();
    let conditions = &status.conditions;
    if is_true(conditions, cond::FINISHED) {
        return Stage::Finished;
    }
    match status.decision.as_ref().map(|d| d.value) {
        Some(DecisionValue::Committed) => return Stage::Committed,
        Some(DecisionValue::Aborted) => return Stage::Aborted,
        Some(DecisionValue::Undecided) | None => {}
    }
    if world.is_cold() {
        if is_true(conditions, cond::COMMITTED) {
            return Stage::ColdCommitted;
        }
        if is_false(conditions, cond::COMMITTED) {
            return Stage::ColdAborted;
        }
    }
    if status.attempt.is_none() {
        Stage::New
    } else if !is_true(conditions, cond::ADMITTED) {
        Stage::Checking
    } else if world.is_cold() {
        Stage::ColdMoving
    } else {
        Stage::Moving
    }
}
