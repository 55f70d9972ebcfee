//! Strategy `Cold`: a new start on another node; the old pod ends only after the new one is Ready. No agent takes part and
//! the operator alone decides, so condition `Committed` holds the decision, written only over the status it was made from.

use crds::Reason;
use crds::condition::{Status, find};
use crds::process_migration::{ActiveOn, MigrationResult, Phase, cond};

use super::draft::Draft;
use super::effect::{Cause, Decision};
use super::finalize::{end_source, hand_over, total};
use super::moving::{make_target, refused_target};
use super::settle::remove_target;
use super::target_pod::Mode;
use super::wait::{self, Wait};
use super::world::{Observed, World};
use super::{abort, pod};

/// Decides while the new pod starts.
#[must_use]
pub fn moving(world: &World) -> Decision {
    let mut draft = Draft::new(world);
    draft.view.phase = Some(Phase::Preparing);
    draft.active_on(abort::place_before_commit(world));
    let waits = wait::of_moving(world);
    let cause = abort::canceled(world)
        .or_else(|| abort::source_pod(world))
        .or_else(|| abort::target_pod(world))
        .or_else(|| refused_target(world));
    if let Some(cause) = cause {
        give_up(&mut draft, &cause);
        return draft.done();
    }
    if let Err(cause) = make_target(&mut draft, Mode::Cold) {
        give_up(&mut draft, &cause);
        return draft.done();
    }
    let recorded = draft.status.target.as_ref().and_then(|t| t.pod_uid.as_deref());
    if let Some(target) = world.target_pod.present()
        && recorded == Some(pod::uid(target))
        && pod::is_ready(target)
        && world.source_pod.present().is_some()
    {
        draft.guard();
        draft.view.phase = Some(Phase::Finalizing);
        draft.view.unset(cond::STALLED);
        draft.active_on(ActiveOn::Target);
        let message = format!("pod {} is Ready; the old pod ends", pod::name(target));
        draft
            .view
            .set(cond::COMMITTED, Status::True, Reason::StartedCold, &message);
        draft.wake_at(world.now + super::draft::PATIENCE);
        return draft.done();
    }
    if let Some(cause) = abort::deadline(world, &waits) {
        give_up(&mut draft, &cause);
        return draft.done();
    }
    let deadline = (waits.since + world.progress_timeout()).min(wait::active_deadline(world));
    draft.wait(&waits, deadline);
    draft.done()
}

fn give_up(draft: &mut Draft<'_>, cause: &Cause) {
    draft.guard();
    draft
        .view
        .set(cond::COMMITTED, Status::False, cause.reason, &cause.message);
    draft.wake_at(draft.world.now + super::draft::PATIENCE);
}

/// Decides after the attempt was given up: the new pod goes.
#[must_use]
pub fn settle(world: &World) -> Decision {
    let mut draft = Draft::new(world);
    let given_up = find(&draft.status.conditions, cond::COMMITTED).cloned();
    let (reason, message, since) = given_up.map_or_else(
        || (Reason::StepFailed, "given up".to_owned(), world.now),
        |c| {
            (
                Reason::from_name(&c.reason).unwrap_or(Reason::StepFailed),
                c.message,
                c.last_transition_time.0.min(world.now),
            )
        },
    );
    draft.active_on(abort::place_before_commit(world));
    // Nobody relied on it yet: no reason for a long grace.
    if !remove_target(&mut draft, since, Some(1)) {
        let wait = Wait {
            reason: Reason::WaitingForRollback,
            message: "aborted; waiting for the new pod to go".to_owned(),
            since,
        };
        draft.wait(&wait, since + world.settle_timeout());
        return draft.done();
    }
    let phase = if reason == Reason::CanceledByUser {
        Phase::Canceled
    } else {
        Phase::RolledBack
    };
    draft.view.finish(phase, false, reason, &message);
    draft.done()
}

/// Decides after the new pod became Ready: labels are swapped, the old pod ends with its own grace.
#[must_use]
pub fn finalize(world: &World) -> Decision {
    let mut draft = Draft::new(world);
    draft.view.phase = Some(Phase::Finalizing);
    draft.active_on(match &world.target_pod {
        Observed::Absent => ActiveOn::None,
        Observed::Present(p) if pod::has_ended(p) => ActiveOn::None,
        Observed::Present(_) | Observed::Unknown => ActiveOn::Target,
    });
    let since = wait::transition(&draft.status, cond::COMMITTED).map_or(world.now, |t| t.min(world.now));
    let grace = world
        .source_pod
        .present()
        .and_then(|p| p.spec.as_ref())
        .and_then(|s| s.termination_grace_period_seconds)
        .unwrap_or(30)
        .clamp(0, 86_400);
    let over = since + world.settle_timeout() + jiff::SignedDuration::from_secs(grace);
    let handed_over = hand_over(&mut draft);
    let source_gone = end_source(&mut draft, since + jiff::SignedDuration::from_secs(grace), None);
    let waits = if !handed_over {
        Some("the new pod to be relabelled")
    } else if !source_gone && (world.now < over || world.source_pod == Observed::Unknown) {
        // One that could not even be looked at may not have been deleted yet, and behind the end nobody would.
        Some("the old pod to end")
    } else {
        None
    };
    if let Some(what) = waits {
        let wait = Wait {
            reason: Reason::WaitingForSourceEnd,
            message: format!("the new pod is Ready; waiting for {what}"),
            since: since + jiff::SignedDuration::from_secs(grace),
        };
        draft.wait(&wait, over.max(world.now + super::draft::PATIENCE));
        return draft.done();
    }
    let half = draft.status.target.clone().unwrap_or_default();
    draft.view.result = Some(MigrationResult {
        total_milliseconds: Some(total(world)),
        live: false,
        ..Default::default()
    });
    if source_gone {
        draft.view.set(
            cond::RESIDUAL_FREE,
            Status::True,
            Reason::NothingLeft,
            "nothing on the source's node is needed any more",
        );
    }
    let mut message = format!(
        "started anew as pod {} on node {}; the memory of the old pod was not carried",
        half.pod_name.as_deref().unwrap_or("?"),
        half.node_name.as_deref().unwrap_or("?")
    );
    if !source_gone {
        message.push_str("; the old pod has not ended yet");
    }
    draft.view.finish(Phase::Succeeded, true, Reason::StartedCold, &message);
    draft.done()
}
