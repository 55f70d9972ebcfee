//! Who may start now, within the limits of the cluster and of each node.

use jiff::Timestamp;

use super::world::{NodeView, Other, World};

/// Whether there is room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It may start, to one of these nodes.
    Now(Vec<String>),
    /// It waits; what for, in one sentence.
    Wait(String),
}

/// Whether the migration may start now from `source` to one of `candidates`. Its own deadline orders it among the others
/// that wait.
#[must_use]
pub fn turn(world: &World, source: &str, candidates: &[String], deadline: Option<Timestamp>) -> Turn {
    let active: Vec<&Other> = world.others.iter().filter(|o| o.admitted).collect();
    if active.len() >= world.limits.cluster {
        return Turn::Wait(format!(
            "waiting for its turn: {} of {} moves are under way in the cluster",
            active.len(),
            world.limits.cluster
        ));
    }
    let out = active
        .iter()
        .filter(|o| o.source_node.as_deref() == Some(source))
        .count();
    let most_out = limit(world.node(source), |s| s.max_outbound, world.limits.outbound);
    if out >= most_out {
        return Turn::Wait(format!(
            "waiting for its turn: {out} of {most_out} moves from node {source} are under way"
        ));
    }
    let open: Vec<String> = candidates
        .iter()
        .filter(|n| has_room(world, &active, n))
        .cloned()
        .collect();
    if open.is_empty() {
        return Turn::Wait(format!(
            "waiting for its turn: node {} has as many moves to it as it takes",
            candidates.join(", ")
        ));
    }
    // Slots of the cluster go to the earliest deadline. One that waits for a slot of a node holds nobody up.
    let free = world.limits.cluster - active.len();
    let me = (deadline, world.uid());
    let ahead = world
        .others
        .iter()
        .filter(|o| o.queued && (o.deadline, o.uid.as_str()) < me)
        .filter(|o| could_start(world, &active, o))
        .count();
    if ahead >= free {
        return Turn::Wait(format!(
            "waiting for its turn: {ahead} migrations with an earlier deadline are ahead"
        ));
    }
    Turn::Now(open)
}

fn could_start(world: &World, active: &[&Other], other: &Other) -> bool {
    other.source_node.as_deref().is_none_or(|source| {
        let out = active
            .iter()
            .filter(|o| o.source_node.as_deref() == Some(source))
            .count();
        out < limit(world.node(source), |s| s.max_outbound, world.limits.outbound)
    })
}

fn has_room(world: &World, active: &[&Other], node: &str) -> bool {
    // One that the scheduler has not placed counts for each of its candidates: for the fraction of a second until it has.
    let inbound = active.iter().filter(|o| o.target_nodes.contains(node)).count();
    inbound < limit(world.node(node), |s| s.max_inbound, world.limits.inbound)
}

fn limit(node: Option<&NodeView>, of: impl Fn(&crds::MigrationNodeSpec) -> Option<u32>, default: usize) -> usize {
    node.and_then(|n| n.migration_node.as_ref())
        .and_then(|(spec, _)| of(spec))
        .map_or(default, |n| usize::try_from(n).unwrap_or(default))
}
