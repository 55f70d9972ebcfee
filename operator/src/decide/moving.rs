//! An admitted migration, until the decision.

use crds::Reason;
use crds::condition::is_true;
use crds::process_migration::{Phase, ProcessMigrationStatus, cond};
use k8s_openapi::api::core::v1::Pod;

use super::draft::Draft;
use super::effect::{Cause, Decision};
use super::target_pod::{self, Mode};
use super::view::PodIdentity;
use super::world::{Observed, World};
use super::{abort, checking, pod, wait};

/// Decides about a live migration between admission and decision.
#[must_use]
pub fn decide(world: &World) -> Decision {
    let mut draft = Draft::new(world);
    if draft.status.decision.is_none() {
        // It was opened before the admission. Should somebody have got rid of it (schema rules forbid that), nothing can
        // be committed until there is one again.
        draft.effects.open_decision = true;
    }
    draft.view.phase = Some(phase(&draft.status));
    draft.active_on(abort::place_before_commit(world));
    let waits = wait::of_moving(world);
    let cause = abort::canceled(world)
        .or_else(|| abort::source_pod(world))
        .or_else(|| abort::agent_failure(world))
        .or_else(|| abort::target_pod(world))
        .or_else(|| abort::lost_node(world))
        .or_else(|| refused_target(world))
        .or_else(|| abort::deadline(world, &waits));
    if let Some(cause) = cause {
        draft.give_up(cause);
        return draft.done();
    }
    if let Err(cause) = make_target(&mut draft, Mode::Live) {
        draft.give_up(cause);
        return draft.done();
    }
    let deadline = (waits.since + world.progress_timeout()).min(wait::active_deadline(world));
    draft.wait(&waits, deadline);
    draft.done()
}

/// The API refused the target pod.
#[must_use]
pub fn refused_target(world: &World) -> Option<Cause> {
    world.learned.create_refused.as_ref().map(|message| {
        Cause::new(
            Reason::TargetRefused,
            format!("the API refuses the target pod: {message}"),
        )
    })
}

/// Creates the target pod, or takes it up: only a pod of our making, as it was asked for, on a node that was allowed.
pub fn make_target(draft: &mut Draft<'_>, mode: Mode) -> Result<(), Cause> {
    let world = draft.world;
    let recorded = draft.view.target.pod_uid.is_some();
    match (&world.target_pod, world.source_pod.present()) {
        (Observed::Absent, Some(source)) if !recorded => {
            draft.effects.create_target = Some(Box::new(built(draft, source, mode)));
            Ok(())
        }
        (Observed::Present(target), _) if !pod::is_controlled_by(target, world.uid()) && !recorded => Err(Cause::new(
            Reason::TargetRefused,
            format!("pod {} already exists and is not ours", pod::name(target)),
        )),
        (Observed::Present(target), source) => {
            if !recorded {
                if let Some(cause) = source.and_then(|s| checking::drifted(&built(draft, s, mode), target)) {
                    // Remembered, so that the end of the attempt finds and deletes it.
                    take_up(draft, target);
                    return Err(cause);
                }
                take_up(draft, target);
            }
            placed(draft, target)
        }
        (Observed::Absent | Observed::Unknown, _) => Ok(()),
    }
}

fn take_up(draft: &mut Draft<'_>, target: &Pod) {
    draft.view.target = PodIdentity {
        node_name: None,
        pod_name: Some(pod::name(target).to_owned()),
        pod_uid: Some(pod::uid(target).to_owned()),
    };
}

fn built(draft: &Draft<'_>, source: &Pod, mode: Mode) -> Pod {
    let candidates = draft
        .view
        .eligibility
        .as_ref()
        .map(|e| e.candidate_nodes.clone())
        .unwrap_or_default();
    target_pod::build(source, &draft.world.migration, &candidates, mode)
}

fn placed(draft: &mut Draft<'_>, target: &Pod) -> Result<(), Cause> {
    let Some(node) = pod::node(target) else {
        // The scheduler would make room by ending other pods. Moving one pod is not worth another's life.
        let nominated = target.status.as_ref().and_then(|s| s.nominated_node_name.as_deref());
        if let (Some(node), Some(_)) = (nominated, pod::unschedulable(target)) {
            return Err(Cause::new(
                Reason::Unschedulable,
                format!("node {node} would take the pod only in the place of others"),
            ));
        }
        return Ok(());
    };
    let allowed = draft
        .view
        .eligibility
        .as_ref()
        .is_some_and(|e| e.candidate_nodes.iter().any(|n| n == node));
    if !allowed {
        return Err(Cause::new(
            Reason::TargetSpecDrift,
            format!("the target pod was bound to node {node}, which is not one of its candidates"),
        ));
    }
    if draft.view.target.node_name.as_deref() != Some(node) {
        draft.view.target.node_name = Some(node.to_owned());
    }
    Ok(())
}

/// Steps of the source's agent before the pod is frozen.
const BEFORE_FREEZE: &[&str] = &["source.reserve", "source.connect"];
/// The step of the target's agent in which it takes the decision.
pub const COMMIT_STEP: &str = "target.commit";

/// The phase that people see, from what the agents have reported.
#[must_use]
pub fn phase(status: &ProcessMigrationStatus) -> Phase {
    let source_step = status.source.as_ref().and_then(|s| s.step.as_deref());
    let target_step = status.target.as_ref().and_then(|t| t.step.as_deref());
    if is_true(&status.conditions, cond::RESTORED) || target_step == Some(COMMIT_STEP) {
        Phase::Committing
    } else if is_true(&status.conditions, cond::MEMORY_SYNCED) {
        Phase::Restoring
    } else if is_true(&status.conditions, cond::TARGET_READY)
        && source_step.is_some_and(|step| !BEFORE_FREEZE.contains(&step))
    {
        Phase::Freezing
    } else {
        Phase::Preparing
    }
}
