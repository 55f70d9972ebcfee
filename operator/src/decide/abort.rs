//! Why an attempt must end before the commit. Never asked after it.

use crds::Reason;
use crds::condition::is_true;
use crds::process_migration::{ActiveOn, DesiredState, Failure, cond};

use super::effect::Cause;
use super::pod;
use super::wait::{self, Wait};
use super::world::{NodeView, Observed, World};

/// The user's wish.
#[must_use]
pub fn canceled(world: &World) -> Option<Cause> {
    if world.is_deleting() {
        return Some(Cause::new(
            Reason::CanceledByUser,
            "the migration was deleted before the commit",
        ));
    }
    (world.migration.spec.desired_state == DesiredState::Canceled).then(|| {
        Cause::new(
            Reason::CanceledByUser,
            "canceled by spec.desiredState before the commit",
        )
    })
}

/// What happened to the source pod, if it is not the one that was accepted, alive and well.
#[must_use]
pub fn source_pod(world: &World) -> Option<Cause> {
    let name = &world.migration.spec.pod_ref.name;
    let status = world.status();
    let accepted = status.source.as_ref().and_then(|s| s.pod_uid.as_deref());
    match &world.source_pod {
        Observed::Unknown => None,
        Observed::Absent => Some(Cause::new(
            Reason::PodDeleted,
            format!("pod {name} was deleted before the commit"),
        )),
        Observed::Present(p) if accepted.is_some_and(|uid| uid != pod::uid(p)) => Some(Cause::new(
            Reason::PodDeleted,
            format!("pod {name} was deleted before the commit, and another one has its name"),
        )),
        Observed::Present(p) if pod::is_deleting(p) => Some(Cause::new(
            Reason::PodDeleted,
            format!("pod {name} was deleted before the commit"),
        )),
        Observed::Present(p) if pod::has_ended(p) => Some(Cause::new(
            Reason::SourceLost,
            format!("pod {name} ended before the commit ({})", pod::phase(p)),
        )),
        Observed::Present(_) => None,
    }
}

/// Where the processes are while nothing is committed.
#[must_use]
pub fn place_before_commit(world: &World) -> ActiveOn {
    let status = world.status();
    let accepted = status.source.as_ref().and_then(|s| s.pod_uid.as_deref());
    match &world.source_pod {
        Observed::Absent => ActiveOn::None,
        Observed::Present(p) if accepted.is_some_and(|uid| uid != pod::uid(p)) => ActiveOn::None,
        Observed::Present(p) if pod::has_ended(p) || pod::is_deleting(p) => ActiveOn::None,
        Observed::Present(_) | Observed::Unknown => status.active_on.unwrap_or(ActiveOn::Source),
    }
}

/// An agent says that its part failed.
#[must_use]
pub fn agent_failure(world: &World) -> Option<Cause> {
    let status = world.status();
    let source = status.source.as_ref().and_then(|s| s.failure.as_ref());
    let target = status.target.as_ref().and_then(|t| t.failure.as_ref());
    source.or(target).map(failure)
}

fn failure(failure: &Failure) -> Cause {
    Cause::new(
        Reason::from_name(&failure.reason).unwrap_or(Reason::StepFailed),
        failure.message.clone(),
    )
}

/// What happened to the target pod once it was made.
#[must_use]
pub fn target_pod(world: &World) -> Option<Cause> {
    let status = world.status();
    let half = status.target.as_ref()?;
    let recorded = half.pod_uid.as_deref()?;
    let name = half.pod_name.as_deref().unwrap_or("?");
    let lost = |what: &str| Some(Cause::new(Reason::TargetLost, format!("target pod {name} {what}")));
    match &world.target_pod {
        Observed::Unknown => None,
        Observed::Absent => lost("was deleted before the commit"),
        Observed::Present(p) if pod::uid(p) != recorded || pod::is_deleting(p) => lost("was deleted before the commit"),
        Observed::Present(p) if pod::has_ended(p) => {
            lost(&format!("ended before the commit ({}{})", pod::phase(p), detail(p)))
        }
        // A target of a live move waits under its shepherds: a container that dies or does not start is a failure, and the
        // kubelet's next try would be no better. A cold one may crash and start again, as any pod.
        Observed::Present(p) if !world.is_cold() && pod::has_failed_to_start(p) => lost(&match pod::trouble(p) {
            Some(trouble) => format!("could not be started: {trouble}"),
            None => "lost a container before the commit".to_owned(),
        }),
        Observed::Present(_) => None,
    }
}

fn detail(target: &k8s_openapi::api::core::v1::Pod) -> String {
    let status = target.status.as_ref();
    status
        .and_then(|s| s.message.clone().or_else(|| s.reason.clone()))
        .or_else(|| pod::trouble(target))
        .map_or_else(String::new, |text| format!(": {text}"))
}

/// A node or its agent is gone.
#[must_use]
pub fn lost_node(world: &World) -> Option<Cause> {
    if world.is_cold() {
        return None;
    }
    let status = world.status();
    let source = status.source.as_ref().and_then(|s| s.node_name.as_deref());
    let target = status.target.as_ref().and_then(|t| t.node_name.as_deref());
    if let Some(cause) = target.and_then(|name| gone(world, name, "target", Reason::TargetLost)) {
        return Some(cause);
    }
    // Once everything has arrived the target may commit without the source: that saves the workload. Only the deadlines
    // end that wait.
    if is_true(&status.conditions, cond::MEMORY_SYNCED) {
        return None;
    }
    source.and_then(|name| gone(world, name, "source", Reason::SourceNodeLost))
}

fn gone(world: &World, name: &str, role: &str, when_down: Reason) -> Option<Cause> {
    match world.node(name) {
        None => Some(Cause::new(when_down, format!("the {role}'s node {name} was removed"))),
        Some(node) if node.is_down() => Some(Cause::new(when_down, format!("the {role}'s node {name} is down"))),
        Some(node) if NodeView::is_lost(node) => Some(Cause::new(
            Reason::NodeNotReady,
            format!("the node-agent of the {role}'s node {name} sends no heartbeats any more"),
        )),
        Some(_) => None,
    }
}

/// A deadline is over.
#[must_use]
pub fn deadline(world: &World, wait: &Wait) -> Option<Cause> {
    if world.now >= wait::active_deadline(world) {
        return Some(Cause::new(
            Reason::DeadlineExceeded,
            format!(
                "not committed within {} s: {}",
                world.migration.spec.active_deadline_seconds, wait.message
            ),
        ));
    }
    if world.now >= wait.since + world.progress_timeout() {
        let reason = if wait.reason == Reason::WaitingForScheduler {
            Reason::Unschedulable
        } else {
            Reason::ProgressTimeout
        };
        return Some(Cause::new(
            reason,
            format!(
                "no progress for {} s: {}",
                world.migration.spec.progress_timeout_seconds, wait.message
            ),
        ));
    }
    None
}
