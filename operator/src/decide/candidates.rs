//! Which nodes may take the pod, before the scheduler's own rules.

use crds::Reason;
use crds::process_migration::{Check, TargetRef, Verdict};
use k8s_openapi::api::core::v1::Pod;

use super::eligibility::{agent_trouble, refused};
use super::pod;
use super::world::{NodeView, World};

/// Name of the checks of candidate nodes. A refusal under this name only excludes its node.
pub const CHECK: &str = "targetNode";

/// Most nodes that a target pod's affinity lists: each is one term for each of the pod's own.
const MOST: usize = 500;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Candidates {
    /// Nodes that may take the pod.
    pub nodes: Vec<String>,
    /// One check for each node that was looked at.
    pub checks: Vec<Check>,
    /// Why there is none.
    pub refusal: Option<(Reason, String)>,
}

/// Finds the nodes that may take `source`, which holds `memory` bytes.
#[must_use]
pub fn find(world: &World, source: &Pod, memory: Option<i64>) -> Candidates {
    let from = pod::node(source).unwrap_or_default();
    let target = world.migration.spec.target.as_ref();
    let mut found = Candidates::default();
    let mut worst = Reason::NoTargetNode;
    if let Some(name) = target.and_then(|t| t.node_name.as_deref()) {
        if name == from {
            let message = format!("node {name} is where the pod already runs");
            found
                .checks
                .push(refused("target", Reason::TargetIsSource, message.clone()));
            found.refusal = Some((Reason::TargetIsSource, message));
            return found;
        }
        if world.node(name).is_none_or(|n| !n.exists) {
            let message = format!("there is no node {name}");
            found
                .checks
                .push(refused("target", Reason::NoTargetNode, message.clone()));
            found.refusal = Some((Reason::NoTargetNode, message));
            return found;
        }
    }
    let mut asked: Vec<&NodeView> = world
        .nodes
        .iter()
        .filter(|n| n.exists && n.name != from && is_asked_for(target, n))
        .collect();
    asked.sort_by(|a, b| a.name.cmp(&b.name));
    for node in asked {
        match exclusion(world, source, node, memory) {
            Some((reason, message)) => {
                if worst == Reason::NoTargetNode && reason == Reason::NodesIncompatible {
                    worst = reason;
                }
                found.checks.push(Check {
                    node: Some(node.name.clone()),
                    ..refused(CHECK, reason, message)
                });
            }
            None => {
                if found.nodes.len() < MOST {
                    found.nodes.push(node.name.clone());
                }
                found.checks.push(Check {
                    name: CHECK.to_owned(),
                    verdict: Verdict::Passed,
                    container: None,
                    node: Some(node.name.clone()),
                    reason: None,
                    message: None,
                    remedy: None,
                });
            }
        }
    }
    if found.nodes.is_empty() {
        let why: Vec<&str> = found.checks.iter().filter_map(|c| c.message.as_deref()).collect();
        let message = if why.is_empty() {
            match target {
                Some(_) => "no other node matches spec.target".to_owned(),
                None => "there is no other node".to_owned(),
            }
        } else {
            format!("no node can take the pod: {}", why.join("; "))
        };
        found.checks.push(refused("target", worst, message.clone()));
        found.refusal = Some((worst, message));
    }
    found
}

fn is_asked_for(target: Option<&TargetRef>, node: &NodeView) -> bool {
    let Some(target) = target else { return true };
    if let Some(name) = &target.node_name {
        return *name == node.name;
    }
    target
        .node_selector
        .iter()
        .flatten()
        .all(|(key, value)| node.labels.get(key) == Some(value))
}

fn exclusion(world: &World, source: &Pod, node: &NodeView, memory: Option<i64>) -> Option<(Reason, String)> {
    let name = &node.name;
    if node.cordoned {
        return Some((Reason::NodeNotReady, format!("node {name} is cordoned")));
    }
    if !node.ready {
        return Some((Reason::NodeNotReady, format!("node {name} is not Ready")));
    }
    let selector = source.spec.iter().flat_map(|s| s.node_selector.iter().flatten());
    for (key, value) in selector {
        if node.labels.get(key) != Some(value) {
            return Some((
                Reason::NoTargetNode,
                format!("node {name} lacks the label {key}={value} that the pod asks for"),
            ));
        }
    }
    if world.is_cold() {
        return None;
    }
    if let Some(missing) = agent_trouble(node) {
        return Some((Reason::NodeNotReady, missing));
    }
    let (spec, status) = node.migration_node.as_ref()?;
    if !spec.schedulable {
        return Some((
            Reason::NodeNotReady,
            format!("node {name} is closed to moves (spec.schedulable of its MigrationNode)"),
        ));
    }
    if spec.max_inbound == Some(0) {
        return Some((
            Reason::NodeNotReady,
            format!("node {name} takes no moves (spec.maxInbound of its MigrationNode is 0)"),
        ));
    }
    let Some(source_status) = pod::node(source)
        .and_then(|n| world.node(n))
        .and_then(|n| n.migration_node.as_ref())
        .map(|(_, status)| status)
    else {
        return Some((
            Reason::NodesIncompatible,
            format!("node {name} cannot be compared with the source's, which has no MigrationNode"),
        ));
    };
    let lacks = status.lacks(source_status);
    if !lacks.is_empty() {
        return Some((
            Reason::NodesIncompatible,
            format!("node {name} is not compatible with the source's: {}", lacks.join(", ")),
        ));
    }
    if let (Some(limit), Some(memory)) = (status.checkpoint_limit_bytes, memory)
        && limit < memory
    {
        return Some((
            Reason::NotEnoughMemory,
            format!("node {name} holds checkpoints of at most {limit} bytes and the pod has {memory}"),
        ));
    }
    None
}
