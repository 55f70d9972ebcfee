//! What a migration waits for, since when, and when something last went on.

use crds::Reason;
use crds::condition::{find, is_true};
use crds::process_migration::{ProcessMigrationStatus, cond};
use jiff::Timestamp;

use super::pod;
use super::world::World;

/// A wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    /// What for.
    pub reason: Reason,
    /// What for, in one sentence.
    pub message: String,
    /// Since when.
    pub since: Timestamp,
}

/// When something about the migration last went on. The times in the API outlive the operator but have seconds only and say
/// nothing of a copy that grows; what this process saw completes them.
#[must_use]
pub fn last_progress(world: &World) -> Timestamp {
    let status = world.status();
    let conditions = status
        .conditions
        .iter()
        // A complaint about a wait is no progress.
        .filter(|c| c.type_ != cond::STALLED)
        .map(|c| c.last_transition_time.0);
    let target = world
        .target_pod
        .present()
        .filter(|p| pod::is_controlled_by(p, world.uid()))
        .and_then(pod::last_change);
    conditions
        .chain(target)
        .chain(world.last_change)
        .chain(start(world))
        .max()
        .unwrap_or(world.now)
        .min(world.now)
}

/// When the migration was first seen.
#[must_use]
pub fn start(world: &World) -> Option<Timestamp> {
    world.status().start_time.map(|t| t.0)
}

/// When the whole attempt must have been decided.
#[must_use]
pub fn active_deadline(world: &World) -> Timestamp {
    start(world).unwrap_or(world.now) + world.active_deadline()
}

/// When a condition got its present status.
#[must_use]
pub fn transition(status: &ProcessMigrationStatus, type_: &str) -> Option<Timestamp> {
    find(&status.conditions, type_).map(|c| c.last_transition_time.0)
}

/// What an admitted migration waits for.
#[must_use]
pub fn of_moving(world: &World) -> Wait {
    let since = last_progress(world);
    let status = world.status();
    let wait = |reason, message: String| Wait { reason, message, since };
    let Some(target) = world.target_pod.present() else {
        return wait(
            Reason::WaitingForTarget,
            "waiting for the target pod to be created".to_owned(),
        );
    };
    let name = pod::name(target);
    let Some(node) = pod::node(target) else {
        return wait(
            Reason::WaitingForScheduler,
            match pod::unschedulable(target) {
                Some(why) => format!("waiting for the scheduler to place pod {name}: {why}"),
                None => format!("waiting for the scheduler to place pod {name}"),
            },
        );
    };
    if world.is_cold() {
        return wait(
            Reason::WaitingForReady,
            match pod::trouble(target) {
                Some(trouble) => format!("waiting for pod {name} on node {node} to become Ready: {trouble}"),
                None => format!("waiting for pod {name} on node {node} to become Ready"),
            },
        );
    }
    if !is_true(&status.conditions, cond::TARGET_READY) {
        return wait(
            Reason::WaitingForTarget,
            match pod::trouble(target) {
                Some(trouble) => format!("waiting for pod {name} to come up on node {node}: {trouble}"),
                None => format!("waiting for pod {name} to come up on node {node}"),
            },
        );
    }
    let source_node = status
        .source
        .as_ref()
        .and_then(|s| s.node_name.as_deref())
        .unwrap_or("?");
    let target_step = status.target.as_ref().and_then(|t| t.step.as_deref());
    if target_step == Some(super::moving::COMMIT_STEP) {
        return wait(
            Reason::DecisionUnknown,
            format!("the processes are held on node {node}; waiting for its node-agent to learn the decision"),
        );
    }
    if is_true(&status.conditions, cond::MEMORY_SYNCED) {
        return wait(
            Reason::WaitingForRestore,
            match target_step {
                Some(step) => {
                    format!("waiting for node {node} to restore the processes and to take the decision (step {step})")
                }
                None => format!("waiting for node {node} to restore the processes and to take the decision"),
            },
        );
    }
    let step = status.source.as_ref().and_then(|s| s.step.as_deref());
    wait(
        Reason::WaitingForRestore,
        match step {
            Some(step) => format!("waiting for node {source_node} to send the processes to node {node} (step {step})"),
            None => format!("waiting for the node-agent of node {source_node} to begin"),
        },
    )
}
