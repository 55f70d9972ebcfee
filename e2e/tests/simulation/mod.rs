//! A move in virtual time: the operator and two agents, everything that can go wrong between them, the invariants of
//! design.md after every event, then a second move without faults.
//!
//! Real: `operator::decide` (all of it), `node_agent::decide::{assignment, recover, step}`, the records of the journal and
//! which of them outlive a reboot, both machines of `protocol::migrate` with real messages, the wrapper's verdict on
//! `create` (`runtime::verdict::of_create`).
//!
//! Modelled, because it is woven into I/O: the operator's pass (`operator.rs`), the sessions (`source.rs`, `target.rs`:
//! the same steps in the same order, failure path and recovery of node-agent/src/session; `agent.rs`: ledger, decisions,
//! publisher, watch), the API server, kubelets, scheduler, hosts, network, power.
//!
//! The model is ahead of the code where the code breaks a rule that a run has shown to be needed ([`fault::Broken`]):
//! `BeginsUnasked` and `OnlyShepherdMarks` are how node-agent/src/session does it at the time of writing.
//!
//! Not in it: several containers, `Cold`, a migration whose finalizer is taken away by force behind the commit, source pods
//! whose runtime is not the wrapper, damaged journals, disks that fail.

#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, reason = "a test")]

mod agent;
mod clock;
mod cluster;
pub(crate) mod fault;
mod ledger;
mod operator;
mod server;
mod source;
mod target;
mod wire;

use ::operator::decide::pod;
use crds::ProcessMigration;
use crds::process_migration::{DecisionValue, Phase};
use serde_json::json;

use cluster::{Cluster, NAMESPACE, NODES};
use fault::{Broken, Fault};
use server::Server;

/// Half an hour: all deadlines of one move are over.
const LIMIT: u64 = 1_800_000;

/// How a run went.
pub(crate) struct Report {
    /// Phase of the first move; none where its object is gone.
    pub(crate) phase: Option<Phase>,
    pub(crate) decision: Option<DecisionValue>,
    /// Faults whose moment never came.
    pub(crate) not_struck: Vec<Fault>,
}

/// Moves a pod with faults, then once more without. `Err`: which invariant broke, and what happened until then.
pub(crate) fn run(seed: u64, noise: u64, faults: &[Fault]) -> Result<Report, String> {
    run_breaking(Broken::None, seed, noise, faults)
}

/// The same with a rule broken.
pub(crate) fn run_breaking(rule: Broken, seed: u64, noise: u64, faults: &[Fault]) -> Result<Report, String> {
    let c = Cluster::new(seed, noise, faults, rule);
    attempt(&c, faults)
        .map_err(|broken| format!("{broken}\nseed {seed}, noise {noise}, faults {faults:?}\n{}", c.story()))
}

fn attempt(c: &Cluster, faults: &[Fault]) -> Result<Report, String> {
    c.run_pod("web-0", 0);
    let first = pod::uid(&c.server.borrow().pods["web-0"]).to_owned();
    // Both agents have been there for a while.
    let now = c.clock.now();
    for n in 0..NODES.len() {
        c.server.borrow_mut().leases.insert(n, now);
    }
    migrate(c, "move-1", "web-0");
    let last = faults.iter().filter_map(|f| match f.at {
        fault::Trigger::Time(at) => Some(at),
        fault::Trigger::Step(..) => None,
    });
    settle(c, "the first move", last.max().unwrap_or(0))?;
    let (phase, decision) = {
        let server = c.server.borrow();
        let status = server.migrations.get("move-1").and_then(|m| m.status.clone());
        (
            status.and_then(|s| s.phase),
            server.decisions.get("move-1-uid").copied(),
        )
    };
    let not_struck = c.not_struck();
    let survivor = one_copy(c, &first, decision)?;
    nothing_left(c)?;
    c.heal();
    c.say("---- the second move, without faults");
    // Whom the user deleted is created anew.
    let name = survivor.unwrap_or_else(|| {
        c.run_pod("web-0", 0);
        "web-0".to_owned()
    });
    let now = c.clock.now();
    for n in 0..NODES.len() {
        c.server.borrow_mut().leases.insert(n, now);
    }
    let (before, lineage) = only_process(c)?.ok_or("I6: nothing runs before the second move")?;
    migrate(c, "move-2", &name);
    settle(c, "the second move", c.clock.now())?;
    let phase_2 = c.server.borrow().migrations["move-2"]
        .status
        .as_ref()
        .and_then(|s| s.phase);
    if phase_2 != Some(Phase::Succeeded) {
        return Err(format!("I6: the second move ended {phase_2:?}"));
    }
    let (after, moved) = only_process(c)?.ok_or("I2: nothing runs after the second move")?;
    if after == before || lineage != moved {
        return Err(format!(
            "I6: the second move left node {before} with {lineage}, and now {after} has {moved}"
        ));
    }
    nothing_left(c)?;
    Ok(Report {
        phase,
        decision,
        not_struck,
    })
}

fn migrate(c: &Cluster, name: &str, of: &str) {
    let migration: ProcessMigration = serde_json::from_value(json!({
        "apiVersion": "peregrine.dev/v1alpha1", "kind": "ProcessMigration",
        "metadata": {"name": name, "namespace": NAMESPACE, "uid": format!("{name}-uid"), "generation": 1},
        "spec": {"podRef": {"name": of}},
    }))
    .unwrap();
    c.server.borrow_mut().create_migration(migration);
}

/// Until every migration is settled, every session has ended and every kubelet has done its work.
fn settle(c: &Cluster, what: &str, not_before: u64) -> Result<(), String> {
    let limit = c.clock.now().max(not_before) + LIMIT;
    let done = || c.clock.now() >= not_before && is_quiet(c);
    if c.clock.run(limit, done, || c.check()) {
        return Ok(());
    }
    match c.violation.borrow().clone() {
        Some(broken) => Err(broken),
        None => {
            let server = c.server.borrow();
            let statuses: Vec<_> = server
                .migrations
                .values()
                .map(|m| serde_json::to_string(&m.status))
                .collect();
            let journals: Vec<_> = c.nodes.iter().map(|n| n.borrow().journals.clone()).collect();
            let pods: Vec<_> = server
                .pods
                .values()
                .map(|p| serde_json::to_string(&(&p.metadata, &p.status)))
                .collect();
            Err(format!(
                "I5: {what} is not settled\n{statuses:#?}\n{journals:#?}\n{pods:#?}"
            ))
        }
    }
}

fn is_quiet(c: &Cluster) -> bool {
    let server = c.server.borrow();
    let settled = server.migrations.values().all(|m| {
        let held = m.metadata.finalizers.as_ref().is_some_and(|f| !f.is_empty());
        Server::is_finished(m) && !held
    });
    let agents = c.nodes.iter().all(|n| {
        let node = n.borrow();
        node.up && node.agent_up && node.journals.is_empty()
    });
    let waits = server.pods.values().any(|p| {
        let held = pod::node(p).and_then(|n| NODES.iter().position(|name| *name == n));
        let runs = held.is_some_and(|n| {
            c.nodes[n]
                .borrow()
                .processes
                .get(pod::uid(p))
                .is_some_and(|process| process.running_since.is_some())
        });
        pod::is_deleting(p) || !runs
    });
    // A pod that can never run again is not waited for: it is the invariant's to say so.
    settled && agents && (!waits || c.clock.now() > patience(&server))
}

/// When a pod that does not come up counts as one that never will.
fn patience(server: &Server) -> u64 {
    let ended = server
        .migrations
        .values()
        .filter_map(|m| m.status.as_ref()?.completion_time.as_ref().map(|t| t.0));
    let last = ended.max().map_or(0, |t| t.as_millisecond() - 1_800_000_000_000);
    u64::try_from(last).unwrap_or(0) + 400_000
}

/// The node of the only process that runs, and its lineage.
fn only_process(c: &Cluster) -> Result<Option<(usize, u64)>, String> {
    let mut found = Vec::new();
    for (n, node) in c.nodes.iter().enumerate() {
        for (uid, process) in &node.borrow().processes {
            match process.running_since {
                Some(_) => found.push((n, process.lineage)),
                None => return Err(format!("I5: {uid} stays frozen on node {}", NODES[n])),
            }
        }
    }
    match found.len() {
        0 => Ok(None),
        1 => Ok(found.pop()),
        _ => Err(format!("I1: two copies run: {found:?}")),
    }
}

/// I2 and I3: the copy that the decision names runs, with its memory. Returns the name of its pod, if the user did not
/// delete it.
fn one_copy(c: &Cluster, first: &str, decision: Option<DecisionValue>) -> Result<Option<String>, String> {
    let running = only_process(c)?;
    let server = c.server.borrow();
    let committed = decision == Some(DecisionValue::Committed);
    let survivor = server.pods.values().find(|p| (pod::uid(p) == first) != committed);
    let lost = c.lost_with_node.borrow();
    match (survivor, running) {
        (Some(survivor), Some((_, lineage))) => {
            let uid = pod::uid(survivor);
            // A node that loses power loses memory; nothing else may.
            if lineage != 1 && !lost.contains(uid) && !lost.contains(first) {
                return Err(format!("I3: {uid} runs, but it began from nothing"));
            }
            if committed && survivor.metadata.labels.as_ref().and_then(|l| l.get("app")).is_none() {
                return Err(format!("I2: {uid} has not got its labels"));
            }
            Ok(Some(pod::name(survivor).to_owned()))
        }
        (Some(survivor), None) => Err(format!("I2: nothing runs, although pod {} exists", pod::name(survivor))),
        (None, Some(found)) => Err(format!("I2: {found:?} runs without its pod")),
        (None, None) if server.deleted_by_user.is_empty() => {
            Err("I2: no copy is left, and nobody deleted it".to_owned())
        }
        (None, None) => Ok(None),
    }
}

/// I5.
fn nothing_left(c: &Cluster) -> Result<(), String> {
    let server = c.server.borrow();
    if server.pods.len() > 1 {
        return Err(format!(
            "I5: pods are left: {:?}",
            server.pods.keys().collect::<Vec<_>>()
        ));
    }
    for migration in server.migrations.values() {
        let finalizers = migration.metadata.finalizers.as_ref().is_some_and(|f| !f.is_empty());
        if finalizers {
            return Err(format!("I5: a finalizer is left on {:?}", migration.metadata.name));
        }
    }
    for (n, node) in c.nodes.iter().enumerate() {
        let node = node.borrow();
        let moved_away: Vec<_> = node
            .moved_away
            .iter()
            .filter(|uid| server.pods.values().any(|p| pod::uid(p) == uid.as_str()))
            .collect();
        let left = (
            &node.rooms,
            &node.hand_offs,
            &node.held_packets,
            &node.dumps,
            &moved_away,
        );
        let shepherds = node
            .shepherds
            .iter()
            .any(|uid| !server.pods.values().any(|p| pod::uid(p) == uid));
        let none = node.rooms.is_empty()
            && node.hand_offs.is_empty()
            && node.held_packets.is_empty()
            && node.dumps.is_empty()
            && moved_away.is_empty()
            && !shepherds;
        if !none {
            return Err(format!(
                "I5: left on node {}: {left:?}, shepherds {:?}",
                NODES[n], node.shepherds
            ));
        }
    }
    Ok(())
}
