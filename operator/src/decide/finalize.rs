//! After the commit: the target pod becomes the user's, the source's object goes. Nothing here can bring the source back.

use crds::Reason;
use crds::condition::{Status, find, is_true};
use crds::process_migration::{ActiveOn, MigrationResult, Phase, ProcessMigrationStatus, ResidualDependency, cond};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::draft::Draft;
use super::effect::{Decision, HandOver};
use super::settle::deletion;
use super::wait::Wait;
use super::world::{NodeView, Observed, World};
use super::{pod, target_pod, wait};

/// Decides about a migration whose decision is Committed.
#[must_use]
pub fn decide(world: &World) -> Decision {
    let mut draft = Draft::new(world);
    draft.view.phase = Some(Phase::Finalizing);
    draft.view.set(
        cond::COMMITTED,
        Status::True,
        Reason::DecisionCommitted,
        "the target's processes run; the source's never run again",
    );
    let since = committed_at(&draft);
    let over = since + world.settle_timeout();
    let handed_over = hand_over(&mut draft);
    // Without grace the kubelet ends the frozen processes after 2.1 s (with a grace of 1 s after 2.3 to 3.8 s, measured), and
    // with its object gone at once nothing on the node, not even after a reboot, would start this pod again.
    let source_gone = end_source(&mut draft, since, Some(0));
    let released = is_true(&draft.status.conditions, cond::SOURCE_RELEASED);
    let source_node = draft.status.source.as_ref().and_then(|s| s.node_name.clone());
    let source_down = source_node.as_deref().is_none_or(|n| is_down(world, n));
    draft.active_on(place(world, &draft.status));

    let target = Target::of(world, &draft.status);
    let waits = match () {
        () if !handed_over => Some((Reason::WaitingForReady, "the target pod to be relabelled".to_owned())),
        () if !source_gone => Some((Reason::WaitingForSourceEnd, "the source pod to go".to_owned())),
        () if !released && !source_down => Some((
            Reason::WaitingForSourceEnd,
            format!(
                "the node-agent of node {} to say that the source has ended",
                source_node.as_deref().unwrap_or("?")
            ),
        )),
        () if target == Target::Starting => Some((Reason::WaitingForReady, "the moved pod to become Ready".to_owned())),
        () => None,
    };
    residual(&mut draft, source_gone, released, source_node.as_deref());
    // Only what the user would miss holds the end up for ever: without the hand-over a deleted migration takes the pod along.
    let late = world.now >= over;
    // A source that could not even be looked at may still have its object: behind the end nobody would delete it any more.
    let unseen = world.source_pod == Observed::Unknown;
    if let Some((reason, what)) = waits
        && (!late || !handed_over || unseen)
    {
        let wait = Wait {
            reason,
            message: format!("committed; waiting for {what}"),
            since,
        };
        draft.wait(&wait, over);
        if late {
            draft.wake_at(world.now + super::draft::PATIENCE);
        }
        return draft.done();
    }
    finish(&mut draft, target);
    draft.done()
}

/// What became of the target pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Ready,
    Starting,
    Ended,
    Deleted,
    LostWithNode,
}

impl Target {
    fn of(world: &World, status: &ProcessMigrationStatus) -> Target {
        let recorded = status.target.as_ref().and_then(|t| t.pod_uid.as_deref());
        match &world.target_pod {
            Observed::Absent => Target::Deleted,
            Observed::Present(p) if recorded.is_some_and(|uid| uid != pod::uid(p)) => Target::Deleted,
            Observed::Present(p) if pod::has_ended(p) => Target::Ended,
            Observed::Present(p) if pod::is_ready(p) => Target::Ready,
            Observed::Present(p) if pod::node(p).is_some_and(|n| is_down(world, n)) => Target::LostWithNode,
            Observed::Present(p) if pod::is_deleting(p) => Target::Deleted,
            Observed::Present(_) | Observed::Unknown => Target::Starting,
        }
    }
}

fn place(world: &World, status: &ProcessMigrationStatus) -> ActiveOn {
    match Target::of(world, status) {
        Target::Ready | Target::Starting => ActiveOn::Target,
        Target::Ended | Target::Deleted | Target::LostWithNode => ActiveOn::None,
    }
}

fn is_down(world: &World, node: &str) -> bool {
    world.node(node).is_none_or(NodeView::is_down)
}

/// When the decision was taken.
fn committed_at(draft: &Draft<'_>) -> Timestamp {
    draft
        .status
        .decision
        .as_ref()
        .and_then(|d| d.time.as_ref())
        .map(|t| t.0)
        .or_else(|| wait::transition(&draft.status, cond::COMMITTED))
        .map_or(draft.world.now, |t| t.min(draft.world.now))
}

/// Gives the target pod its user's labels and owners in place of ours. True: nothing is left to do.
pub fn hand_over(draft: &mut Draft<'_>) -> bool {
    let world = draft.world;
    let target = match &world.target_pod {
        Observed::Absent => return true,
        Observed::Unknown => {
            draft.wake_at(world.now + jiff::SignedDuration::from_secs(1));
            return false;
        }
        Observed::Present(target) => target,
    };
    let recorded = draft.status.target.as_ref().and_then(|t| t.pod_uid.as_deref());
    if recorded.is_some_and(|uid| uid != pod::uid(target)) {
        return true;
    }
    let ours = target
        .metadata
        .owner_references
        .iter()
        .flatten()
        .any(|o| o.uid == world.uid());
    if !ours {
        // The reference goes in the same patch as the labels come.
        return true;
    }
    // The source's object may be gone already (its user deleted it after the commit): the target kept a copy of its labels.
    let source = source_of(world, &draft.status);
    let mut owners: Vec<_> = target
        .metadata
        .owner_references
        .iter()
        .flatten()
        .filter(|o| o.uid != world.uid())
        .cloned()
        .collect();
    owners.extend(
        source
            .iter()
            .flat_map(|s| s.metadata.owner_references.iter().flatten())
            .cloned(),
    );
    draft.effects.hand_over = Some(HandOver {
        name: pod::name(target).to_owned(),
        uid: pod::uid(target).to_owned(),
        resource_version: target.metadata.resource_version.clone().unwrap_or_default(),
        labels: source.map_or_else(|| target_pod::kept_labels(target), target_pod::user_labels),
        owners,
    });
    false
}

fn source_of<'a>(world: &'a World, status: &ProcessMigrationStatus) -> Option<&'a Pod> {
    let accepted = status.source.as_ref().and_then(|s| s.pod_uid.as_deref())?;
    world.source_pod.present().filter(|p| pod::uid(p) == accepted)
}

/// Deletes the source pod's object; its processes stay frozen until the kubelet kills them. True: it is gone.
pub fn end_source(draft: &mut Draft<'_>, since: Timestamp, grace: Option<u32>) -> bool {
    let world = draft.world;
    if world.source_pod == Observed::Unknown {
        draft.wake_at(world.now + jiff::SignedDuration::from_secs(1));
        return false;
    }
    let Some(source) = source_of(world, &draft.status) else {
        return true;
    };
    if draft.effects.hand_over.is_some() {
        // Its labels are still needed: they live nowhere else.
        return false;
    }
    draft.effects.delete_source = deletion(world, source, since, grace);
    false
}

fn residual(draft: &mut Draft<'_>, source_gone: bool, released: bool, node: Option<&str>) {
    if source_gone && released {
        draft.view.residual_dependencies.clear();
        draft.view.set(
            cond::RESIDUAL_FREE,
            Status::True,
            Reason::NothingLeft,
            "nothing on the source's node is needed any more",
        );
        return;
    }
    draft.view.set(
        cond::RESIDUAL_FREE,
        Status::False,
        Reason::WaitingForSourceEnd,
        "the source has not ended yet",
    );
    let node = node.unwrap_or("?").to_owned();
    if draft.view.residual_dependencies.is_empty() {
        draft.view.residual_dependencies = vec![ResidualDependency {
            kind: "Processes".to_owned(),
            node,
            detail: "the released source stays frozen there until its kubelet ends it".to_owned(),
            since: Some(Time(draft.world.now)),
        }];
    }
}

fn finish(draft: &mut Draft<'_>, target: Target) {
    let status = draft.status.clone();
    let half = status.target.clone().unwrap_or_default();
    let name = half.pod_name.as_deref().unwrap_or("?").to_owned();
    let node = half.node_name.as_deref().unwrap_or("?").to_owned();
    draft.view.result = Some(result(draft.world, &status));
    if target == Target::LostWithNode {
        let message = format!("the processes ran on node {node}, which went down before pod {name} was Ready");
        draft.view.finish(Phase::Failed, false, Reason::TargetLost, &message);
        return;
    }
    let mut message = format!("the processes run in pod {name} on node {node}");
    match target {
        Target::Starting => message.push_str("; the pod is not Ready yet"),
        Target::Ended => message = format!("the processes moved to pod {name} on node {node} and ended there"),
        Target::Deleted => {
            message = format!("the processes moved to pod {name} on node {node}, which was deleted since")
        }
        Target::Ready | Target::LostWithNode => {}
    }
    if find(&draft.view.conditions, cond::RESIDUAL_FREE).is_some_and(|c| c.status != "True") {
        message.push_str("; the source's node has not confirmed the end of the source");
    }
    draft.view.finish(Phase::Succeeded, true, Reason::Migrated, &message);
}

/// The figures, from both halves.
fn result(world: &World, status: &ProcessMigrationStatus) -> MigrationResult {
    let source = status.source.clone().unwrap_or_default();
    let target = status.target.clone().unwrap_or_default();
    let arrived = source.sent_milliseconds.or(target.received_milliseconds);
    let transfer = arrived
        .zip(source.dump_milliseconds)
        .map(|(all, dump)| all.saturating_sub(dump));
    MigrationResult {
        freeze_milliseconds: target.frozen_milliseconds.or(source.frozen_milliseconds),
        dump_milliseconds: source.dump_milliseconds,
        transfer_milliseconds: transfer,
        restore_milliseconds: target.restore_milliseconds,
        commit_milliseconds: target.commit_milliseconds,
        total_milliseconds: Some(total(world)),
        bytes: source.bytes_sent,
        rounds: status.progress.as_ref().and_then(|p| p.round),
        connections_preserved: None,
        connections_closed: source.connections_closed,
        live: true,
    }
}

/// From the first sight of the object until now.
#[must_use]
pub fn total(world: &World) -> i64 {
    let begun = world.first_seen.or_else(|| wait::start(world)).unwrap_or(world.now);
    i64::try_from(world.now.duration_since(begun).as_millis())
        .unwrap_or(i64::MAX)
        .max(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::fixture::{Cluster, Step, wakes_at};
    use super::super::world::Observed;

    /// Found by the simulation: an API server that gave no answers until the end of the wait left the source's pod behind.
    #[test]
    fn a_source_pod_that_could_not_be_read_is_not_left_behind() {
        for cold in [false, true] {
            let mut cluster = if cold {
                let mut cluster = Cluster::new(json!({"strategy": {"type": "Cold"}}));
                cluster.settle();
                cluster.bind("b");
                cluster.settle();
                cluster.target_pod_runs(true);
                cluster
            } else {
                let mut cluster = Cluster::new(json!({}));
                cluster.until(Step::Sent);
                assert!(cluster.commit());
                cluster
            };
            let source = cluster.world.source_pod.clone();
            if cold {
                // The commit of a cold move needs the pod.
                let decision = super::super::decide(&cluster.world);
                cluster.change_status(|s| decision.view.write_into(s));
            }
            cluster.world.source_pod = Observed::Unknown;
            cluster.settle();
            cluster.pass_time(1_000);
            let decision = cluster.settle();
            assert!(!cluster.is_finished(), "cold: {cold}");
            assert!(
                wakes_at(&decision).is_some_and(|at| at > cluster.world.now),
                "cold: {cold}"
            );
            // As soon as it can be read it goes.
            cluster.world.source_pod = source;
            cluster.settle();
            assert!(!matches!(&cluster.world.source_pod, Observed::Present(p) if !super::pod::is_deleting(p)));
        }
    }
}
