//! After an abort: the target pod goes, the source is known to run, then it is over.

use crds::Reason;
use crds::condition::{Status, find};
use crds::process_migration::{Phase, ProcessMigrationStatus, cond};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;

use super::draft::Draft;
use super::effect::{Cause, Decision, DeletePod};
use super::wait::Wait;
use super::world::{Observed, World};
use super::{abort, pod};

/// Decides about a migration whose decision is Aborted.
#[must_use]
pub fn decide(world: &World) -> Decision {
    let mut draft = Draft::new(world);
    let cause = cause(&draft.status);
    let since = draft
        .status
        .decision
        .as_ref()
        .and_then(|d| d.time.as_ref())
        .map_or(world.now, |t| t.0.min(world.now));
    let over = since + world.settle_timeout();
    draft
        .view
        .set(cond::COMMITTED, Status::False, cause.reason, &cause.message);
    draft.active_on(abort::place_before_commit(world));
    let target_gone = remove_target(&mut draft, since, Some(1));
    let waits = if !target_gone {
        Some("the target pod to go")
    } else if world.now < over && !source_runs(world, &draft.status) {
        Some("the source's node-agent to say that the pod runs again")
    } else if world.now < over && !target_clean(world, &draft.status) {
        Some("the target's node-agent to say that nothing is left on its node")
    } else {
        None
    };
    if let Some(what) = waits {
        let wait = Wait {
            reason: Reason::WaitingForRollback,
            message: format!("aborted; waiting for {what}"),
            since,
        };
        draft.wait(&wait, over);
        if world.now < since + UNSAID {
            draft.wake_at(since + UNSAID);
        }
        return draft.done();
    }
    let (phase, message) = outcome(world, &draft.status, &cause);
    draft.view.finish(phase, false, cause.reason, &message);
    draft.done()
}

/// The cause that stands in the decision.
#[must_use]
pub fn cause(status: &ProcessMigrationStatus) -> Cause {
    let decision = status.decision.as_ref();
    let reason = decision
        .and_then(|d| d.reason.as_deref())
        .and_then(Reason::from_name)
        .unwrap_or(Reason::StepFailed);
    let message = decision
        .and_then(|d| d.message.clone())
        .unwrap_or_else(|| "aborted without a reason".to_owned());
    Cause::new(reason, message)
}

/// Deletes what is ours under the target's name. True: there is none any more.
pub fn remove_target(draft: &mut Draft<'_>, since: Timestamp, grace: Option<u32>) -> bool {
    let world = draft.world;
    let target = match &world.target_pod {
        Observed::Absent => return true,
        Observed::Unknown => {
            draft.wake_at(world.now + jiff::SignedDuration::from_secs(1));
            return false;
        }
        Observed::Present(target) => target,
    };
    if !is_ours(world, target) {
        return true;
    }
    if draft.view.target.pod_uid.is_none() {
        // Created by an operator that ended before it could say so.
        draft.view.target.pod_uid = Some(pod::uid(target).to_owned());
        draft.view.target.pod_name = Some(pod::name(target).to_owned());
    }
    draft.effects.delete_target = deletion(world, target, since, grace);
    let late = since + world.progress_timeout();
    if late > world.now {
        draft.wake_at(late);
    }
    false
}

fn is_ours(world: &World, target: &Pod) -> bool {
    pod::is_controlled_by(target, world.uid())
}

/// How to delete a pod: once with its grace; without waiting for the kubelet where that is down or does not get it done.
/// Its processes can do no harm then: they wait for a hand-off or a thaw that never comes.
#[must_use]
pub fn deletion(world: &World, victim: &Pod, since: Timestamp, grace: Option<u32>) -> Option<DeletePod> {
    let down = pod::node(victim).is_some_and(|n| world.node(n).is_none_or(super::world::NodeView::is_down));
    let late = world.now >= since + world.progress_timeout();
    let force = pod::is_deleting(victim) && (down || late);
    // A second graceless call for a pod that already has grace 0 would change nothing.
    if pod::is_deleting(victim) && (!force || victim.metadata.deletion_grace_period_seconds == Some(0)) {
        return None;
    }
    Some(DeletePod {
        name: pod::name(victim).to_owned(),
        uid: pod::uid(victim).to_owned(),
        grace: if force { Some(0) } else { grace },
    })
}

/// An agent says what it does a little after it began: it may have frozen the pod when nothing is said yet.
const UNSAID: SignedDuration = SignedDuration::from_secs(3);

/// Whether the source is known to run, or there is nothing that could be waited for.
fn source_runs(world: &World, status: &ProcessMigrationStatus) -> bool {
    let aborted = status.decision.as_ref().and_then(|d| d.time.as_ref());
    let may_have_begun =
        find(&status.conditions, cond::TARGET_READY).is_some() && aborted.is_some_and(|at| world.now < at.0 + UNSAID);
    let touched = may_have_begun
        || status.source.as_ref().is_some_and(|s| s.step.is_some())
        || find(&status.conditions, cond::MEMORY_SYNCED).is_some();
    let said = find(&status.conditions, cond::SOURCE_RELEASED).is_some();
    let node = status.source.as_ref().and_then(|s| s.node_name.as_deref());
    !touched || said || node.is_none_or(|n| is_down(world, n))
}

/// Whether nothing is left on the target's node, or there is nobody to say so.
fn target_clean(world: &World, status: &ProcessMigrationStatus) -> bool {
    let half = status.target.as_ref();
    let touched = half.is_some_and(|t| t.step.is_some()) || find(&status.conditions, cond::TARGET_READY).is_some();
    let node = half.and_then(|t| t.node_name.as_deref());
    !touched || half.is_some_and(|t| t.destroyed == Some(true)) || node.is_none_or(|n| is_down(world, n))
}

fn is_down(world: &World, node: &str) -> bool {
    world.node(node).is_none_or(super::world::NodeView::is_down)
}

fn outcome(world: &World, status: &ProcessMigrationStatus, cause: &Cause) -> (Phase, String) {
    let admitted = crds::condition::is_true(&status.conditions, cond::ADMITTED);
    let source_node = status.source.as_ref().and_then(|s| s.node_name.as_deref());
    let message = cause.message.clone();
    if cause.reason == Reason::CanceledByUser {
        return (Phase::Canceled, message);
    }
    if !admitted {
        return (Phase::Failed, message);
    }
    if let Some(node) = source_node.filter(|n| is_down(world, n)) {
        return (Phase::Failed, format!("{message}; the source's node {node} is down"));
    }
    if !source_runs(world, status) {
        let node = source_node.unwrap_or("?");
        return (
            Phase::Failed,
            format!(
                "{message}; the node-agent of node {node} has not said that the pod runs again, it resumes the pod when it is back"
            ),
        );
    }
    (Phase::RolledBack, message)
}
