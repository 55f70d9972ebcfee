//! From the first sight of a migration to its admission or refusal.

use crds::Reason;
use crds::condition::Status;
use crds::process_migration::{ActiveOn, Check, Connections, Effective, Eligibility, Phase, cond};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::draft::Draft;
use super::effect::{Cause, Decision, FinalizerChange};
use super::queue::{self, Turn};
use super::target_pod::{self, Mode};
use super::view::PodIdentity;
use super::wait::{self, Wait};
use super::world::{Observed, World};
use super::{abort, candidates, drift, eligibility, pod};

/// Accepts a new migration, or refuses it for what can be said at once.
#[must_use]
pub fn accept(world: &World) -> Decision {
    let mut draft = Draft::new(world);
    if world.is_deleting() {
        // Nothing was promised and nothing was touched.
        draft.release();
        return draft.done();
    }
    if let Some(cause) = abort::canceled(world) {
        draft.view.start_time = Some(Time(world.now));
        draft.refuse(&cause);
        return draft.done();
    }
    if world.source_pod == Observed::Unknown {
        return draft.unknown();
    }
    draft.view.start_time.get_or_insert(Time(world.now));
    if let Some(source) = world.source_pod.present() {
        draft.view.source = PodIdentity {
            node_name: pod::node(source).map(str::to_owned),
            pod_name: Some(pod::name(source).to_owned()),
            pod_uid: Some(pod::uid(source).to_owned()),
        };
        draft.active_on(ActiveOn::Source);
    }
    let mut checks = eligibility::at_once(world);
    if checks.iter().any(eligibility::stops) {
        // What the spec tells without an agent belongs into the same answer.
        if let Some(source) = world.source_pod.present()
            && !world.is_cold()
        {
            checks.extend(eligibility::of_spec(world, source));
        }
        let cause = refusal(&checks);
        // The agents of the node find migrations by it: a refused one is none of their business.
        draft.view.source.node_name = None;
        draft.view.eligibility = Some(Eligibility {
            eligible: false,
            checks,
            ..Default::default()
        });
        draft
            .view
            .set(cond::ACCEPTED, Status::False, cause.reason, &cause.message);
        draft.refuse(&cause);
        return draft.done();
    }
    if !draft.is_held() {
        draft.effects.finalizer = Some(FinalizerChange::Add);
    }
    draft.view.attempt = Some(1);
    draft.view.phase = Some(Phase::Pending);
    let probes = world.source_pod.present().and_then(eligibility::longest_freeze);
    draft.view.effective = Some(Effective {
        strategy: world.strategy(),
        connections: world.migration.spec.connections,
        max_freeze_milliseconds: [world.migration.spec.max_freeze_milliseconds, probes]
            .into_iter()
            .flatten()
            .min(),
    });
    let found = format!("pod {} was found", world.migration.spec.pod_ref.name);
    draft.view.set(cond::ACCEPTED, Status::True, Reason::Accepted, &found);
    draft.wake_at(world.now + super::draft::PATIENCE);
    draft.done()
}

/// Waits for the agent's preflight, merges all checks, waits for a slot.
#[must_use]
pub fn check(world: &World) -> Decision {
    let mut draft = Draft::new(world);
    if let Some(cause) = abort::canceled(world)
        .or_else(|| abort::source_pod(world))
        .or_else(|| abort::agent_failure(world))
        .or_else(|| abort::lost_node(world))
    {
        draft.active_on(abort::place_before_commit(world));
        draft.give_up(cause);
        return draft.done();
    }
    let Some(source) = world.source_pod.present() else {
        return draft.unknown();
    };
    let spec = &world.migration.spec;
    // Nobody can act on a dry run or a cold move, so there is nothing to decide.
    let decides = !spec.dry_run && !world.is_cold();
    if decides && draft.status.decision.is_none() {
        draft.effects.open_decision = true;
    }
    let half = draft.status.source.clone().unwrap_or_default();
    let wait = Wait {
        reason: Reason::WaitingForSourceAgent,
        message: format!(
            "waiting for the node-agent of node {} to check the pod",
            half.node_name.as_deref().unwrap_or("?")
        ),
        since: wait::start(world).unwrap_or(world.now),
    };
    if !world.is_cold() && half.checked_attempt != draft.status.attempt {
        match abort::deadline(world, &wait) {
            Some(cause) => draft.give_up(cause),
            None => draft.wait(&wait, deadline(world, &wait)),
        }
        return draft.done();
    }
    let limit = draft.view.effective.as_ref().and_then(|e| e.max_freeze_milliseconds);
    let (eligibility, cause) = verdict(world, source, limit);
    draft.view.eligibility = Some(eligibility.clone());
    // One that waits for its turn was eligible. A node that is away for a moment, because its agent is being replaced, is
    // one more thing to wait for.
    let was_queued = draft.status.phase == Some(Phase::Queued);
    let away = cause
        .as_ref()
        .filter(|c| was_queued && is_about_nodes(c.reason))
        .cloned();
    if let (Some(cause), None) = (cause, &away) {
        draft.give_up(cause);
        return draft.done();
    }
    if spec.dry_run {
        return rehearse(draft, source, &eligibility);
    }
    let my_deadline = wait::active_deadline(world);
    let from = half.node_name.as_deref().unwrap_or_default();
    let turn = match away {
        Some(cause) => Turn::Wait(format!("waiting for its turn: {}", cause.message)),
        None => queue::turn(world, from, &eligibility.candidate_nodes, Some(my_deadline)),
    };
    match turn {
        Turn::Wait(message) => {
            draft.view.phase = Some(Phase::Queued);
            draft
                .view
                .set(cond::ADMITTED, Status::False, Reason::WaitingForSlot, &message);
            if world.now >= my_deadline {
                draft.give_up(Cause::new(
                    Reason::DeadlineExceeded,
                    format!("not committed within {} s: {message}", spec.active_deadline_seconds),
                ));
                return draft.done();
            }
            let since = wait::transition(&draft.status, cond::ADMITTED).unwrap_or(world.now);
            let wait = Wait {
                reason: Reason::WaitingForSlot,
                message,
                since,
            };
            draft.wait(&wait, my_deadline);
        }
        Turn::Now(open) => {
            draft.view.eligibility = Some(Eligibility {
                candidate_nodes: open,
                ..eligibility
            });
            draft.view.phase = Some(Phase::Preparing);
            draft.view.unset(cond::STALLED);
            draft
                .view
                .set(cond::ADMITTED, Status::True, Reason::Eligible, "all checks passed");
        }
    }
    draft.done()
}

fn deadline(world: &World, wait: &Wait) -> Timestamp {
    (wait.since + world.progress_timeout()).min(wait::active_deadline(world))
}

/// All checks, and why they refuse.
fn verdict(world: &World, source: &Pod, limit: Option<u32>) -> (Eligibility, Option<Cause>) {
    let half = world.status().source.unwrap_or_default();
    let mut checks = if world.is_cold() {
        Vec::new()
    } else {
        let mut checks = eligibility::merge(eligibility::of_spec(world, source), &half.checks);
        checks.extend(eligibility::freeze(limit, &half));
        checks.extend(eligibility::tracking(world, source));
        checks
    };
    let found = candidates::find(world, source, half.memory_bytes);
    checks.extend(found.checks);
    let cause = checks.iter().any(eligibility::stops).then(|| refusal(&checks));
    let eligibility = Eligibility {
        eligible: cause.is_none(),
        checks,
        candidate_nodes: found.nodes,
        predicted_freeze_milliseconds: half.predicted_freeze_milliseconds,
    };
    (eligibility, cause)
}

/// The reason of a refusal: the only one there is, or that the pod as such cannot be moved; the message has them all.
fn refusal(checks: &[Check]) -> Cause {
    let reasons: Vec<Reason> = checks
        .iter()
        .filter(|c| eligibility::stops(c))
        .filter_map(|c| c.reason.as_deref())
        .map(|r| Reason::from_name(r).unwrap_or(Reason::PodNotMigratable))
        .collect();
    // Reasons that say what to ask for differently come first; what the pod's processes hold is one reason in common.
    let reason = reasons
        .iter()
        .copied()
        .find(|r| is_top_level(*r))
        .unwrap_or(Reason::PodNotMigratable);
    Cause::new(reason, eligibility::sentence(checks))
}

/// Whether a refusal is about the nodes alone, which come and go.
fn is_about_nodes(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::NodeNotReady | Reason::NoTargetNode | Reason::NodesIncompatible
    )
}

/// Whether a refusal stands for itself, rather than for something that the pod holds.
fn is_top_level(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::PodNotFound
            | Reason::PodReplaced
            | Reason::PodTerminating
            | Reason::PodNotRunning
            | Reason::OwnerNotSupported
            | Reason::StrategyNotAvailable
            | Reason::AlreadyMigrating
            | Reason::NodeNotReady
            | Reason::NoTargetNode
            | Reason::TargetIsSource
            | Reason::NodesIncompatible
            | Reason::FreezeTooLong
            | Reason::TargetRefused
            | Reason::TargetSpecDrift
    )
}

/// The end of a dry run: the target pod is shown to the API server, which stores nothing.
fn rehearse(mut draft: Draft<'_>, source: &Pod, eligibility: &Eligibility) -> Decision {
    let world = draft.world;
    let mode = if world.is_cold() { Mode::Cold } else { Mode::Live };
    let target = target_pod::build(source, &world.migration, &eligibility.candidate_nodes, mode);
    let refusal = match &world.learned.dry_run {
        None => {
            draft.effects.try_target = Some(Box::new(target));
            draft.wake_at(world.now + super::draft::PATIENCE);
            return draft.done();
        }
        Some(Err(message)) => Some(Cause::new(
            Reason::TargetRefused,
            format!("the API refuses the target pod: {message}"),
        )),
        Some(Ok(stored)) => drifted(&target, stored),
    };
    match refusal {
        Some(cause) => {
            let mut checks = eligibility.checks.clone();
            checks.push(eligibility::refused("targetPod", cause.reason, cause.message.clone()));
            draft.view.eligibility = Some(Eligibility {
                eligible: false,
                checks,
                ..eligibility.clone()
            });
            draft.refuse(&cause);
        }
        None => {
            let message = summary(eligibility, world.migration.spec.connections);
            draft
                .view
                .set(cond::ADMITTED, Status::False, Reason::DryRunComplete, &message);
            draft
                .view
                .finish(Phase::Succeeded, true, Reason::DryRunComplete, &message);
        }
    }
    draft.done()
}

fn summary(eligibility: &Eligibility, connections: Connections) -> String {
    let freeze = eligibility
        .predicted_freeze_milliseconds
        .map_or_else(String::new, |ms| format!(", predicted freeze {ms} ms"));
    let warnings = eligibility
        .checks
        .iter()
        .filter(|c| c.verdict == crds::process_migration::Verdict::Warning)
        .count();
    let warnings = match warnings {
        0 => String::new(),
        n => format!(", {n} warnings"),
    };
    format!(
        "the pod can be moved to {}{freeze}{warnings} (connections: {connections:?}); nothing was moved",
        eligibility.candidate_nodes.join(" or ")
    )
}

/// What the API server changed in the target pod.
#[must_use]
pub fn drifted(asked: &Pod, stored: &Pod) -> Option<Cause> {
    let paths = drift::between(asked.spec.as_ref()?, stored.spec.as_ref()?);
    (!paths.is_empty()).then(|| {
        Cause::new(
            Reason::TargetSpecDrift,
            format!(
                "the target pod was changed on its way into the cluster: {}",
                paths.join(", ")
            ),
        )
    })
}
