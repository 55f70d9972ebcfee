//! The modelled world: nodes with processes, kubelets, scheduler, the way to the API server, and the faults in all of them.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::rc::Rc;

use crds::names::{ANNOTATION_TARGET_OF, RUNTIME_CLASS};
use crds::process_migration::DesiredState;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{ContainerState, ContainerStateRunning, ContainerStateWaiting, ContainerStatus, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use node_agent::decide::step::{Role, Step};
use node_agent::fault::When;
use node_agent::journal::Record;
use operator::decide::pod;
use runtime::verdict::{CreateVerdict, Creation, of_create};
use serde_json::json;

use super::agent::{self, Memory};
use super::clock::{Clock, Owner};
use super::fault::{Action, Broken, Fault, Strike, Trigger, Whose};
use super::server::Server;

/// Names of the nodes.
pub(crate) const NODES: [&str; 2] = ["a", "b"];
pub(crate) const NAMESPACE: &str = "shop";
/// An agent or kubelet that is not heard for so long counts as lost.
const LOST: u64 = 40_000;

/// The processes of a pod. Their memory is how long they have run: it grows only while they do.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Process {
    /// Which start they go back to; moves keep it.
    pub(crate) lineage: u64,
    pub(crate) running_since: Option<u64>,
    pub(crate) ticks: u64,
    /// A dump has interrupted system calls and nobody has repaired them yet.
    pub(crate) interrupted: bool,
}

impl Process {
    pub(crate) fn memory(&self, now: u64) -> u64 {
        self.ticks + self.running_since.map_or(0, |since| now - since)
    }

    pub(crate) fn stop(&mut self, now: u64) {
        self.ticks = self.memory(now);
        self.running_since = None;
    }

    pub(crate) fn go_on(&mut self, now: u64) {
        self.running_since.get_or_insert(now);
    }
}

/// A node. What a reboot takes and what it leaves is in [`Cluster::power_off`].
#[derive(Default)]
pub(crate) struct Node {
    pub(crate) up: bool,
    pub(crate) down_since: u64,
    pub(crate) agent_up: bool,
    pub(crate) boot: u64,
    /// Counts what a kubelet would notice.
    pub(crate) events: u64,
    pub(crate) processes: BTreeMap<String, Process>,
    pub(crate) shepherds: BTreeSet<String>,
    /// Pods whose containers had started before: the kubelet counts restarts.
    started: BTreeSet<String>,
    pub(crate) moved_away: BTreeSet<String>,
    pub(crate) committed: BTreeSet<String>,
    /// By pod; true: it is marked as aborted and fails every `create`.
    pub(crate) hand_offs: BTreeMap<String, bool>,
    /// Memory file systems by migration, with the image: lineage and memory.
    pub(crate) rooms: BTreeMap<String, Option<(u64, u64)>>,
    pub(crate) held_packets: BTreeSet<String>,
    /// Dumps under way, by migration: when they end.
    pub(crate) dumps: BTreeMap<String, u64>,
    pub(crate) journals: BTreeMap<(String, Role), Vec<Record>>,
}

/// What does not work at present: until when.
#[derive(Default)]
struct Trouble {
    api_down: Cell<u64>,
    lost_replies: Cell<u64>,
    cut_since: Cell<u64>,
    cut_until: Cell<u64>,
    late_watches: Cell<(u64, u64)>,
}

pub(crate) struct Parts {
    pub(crate) clock: Clock,
    pub(crate) server: RefCell<Server>,
    pub(crate) nodes: [RefCell<Node>; 2],
    pub(crate) agents: [RefCell<Memory>; 2],
    faults: RefCell<Vec<(Fault, bool)>>,
    /// In a thousand requests, how many go wrong by themselves.
    noise: Cell<u64>,
    pub(crate) rule: Broken,
    trouble: Trouble,
    operator_up: Cell<bool>,
    trace: RefCell<Vec<String>>,
    pub(crate) violation: RefCell<Option<String>>,
    /// The furthest memory that was ever seen of a lineage.
    furthest: RefCell<BTreeMap<u64, u64>>,
    /// Source pods whose node lost power before the commit: their memory is lost with it.
    pub(crate) lost_with_node: RefCell<BTreeSet<String>>,
    lineages: Cell<u64>,
    checked: Cell<(u64, u64, u64, u64)>,
}

#[derive(Clone)]
pub(crate) struct Cluster(Rc<Parts>);

impl Deref for Cluster {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

impl Cluster {
    pub(crate) fn new(seed: u64, noise: u64, faults: &[Fault], rule: Broken) -> Self {
        let node = || {
            RefCell::new(Node {
                up: true,
                ..Node::default()
            })
        };
        let cluster = Cluster(Rc::new(Parts {
            clock: Clock::new(seed),
            server: RefCell::default(),
            nodes: [node(), node()],
            agents: [RefCell::default(), RefCell::default()],
            faults: RefCell::new(faults.iter().map(|f| (*f, false)).collect()),
            noise: Cell::new(noise),
            rule,
            trouble: Trouble::default(),
            operator_up: Cell::new(true),
            trace: RefCell::default(),
            violation: RefCell::default(),
            furthest: RefCell::default(),
            lost_with_node: RefCell::default(),
            lineages: Cell::new(0),
            checked: Cell::new((u64::MAX, 0, 0, 0)),
        }));
        for n in 0..NODES.len() {
            cluster.clock.spawn(Owner::World, kubelet(cluster.clone(), n));
            cluster.start_agent(n);
        }
        cluster.clock.spawn(Owner::World, schedule(cluster.clone()));
        cluster
            .clock
            .spawn(Owner::Operator, super::operator::run(cluster.clone()));
        for fault in faults {
            if let Trigger::Time(at) = fault.at {
                let (c, fault) = (cluster.clone(), *fault);
                cluster.clock.spawn(Owner::World, async move {
                    c.clock.sleep(at).await;
                    c.mark_struck(fault);
                    c.happen(fault.action);
                });
            }
        }
        cluster
    }

    pub(crate) fn time(&self) -> Timestamp {
        let now = i64::try_from(self.clock.now()).unwrap();
        Timestamp::from_second(1_800_000_000).unwrap() + SignedDuration::from_millis(now)
    }

    pub(crate) fn say(&self, text: impl AsRef<str>) {
        self.trace
            .borrow_mut()
            .push(format!("{:>9} {}", self.clock.now(), text.as_ref()));
    }

    pub(crate) fn story(&self) -> String {
        self.trace.borrow().join("\n")
    }

    /// Runs a pod anew, as a user who creates one.
    pub(crate) fn run_pod(&self, name: &str, n: usize) {
        let mut new: Pod = serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"app": "web"}},
            // The wrapper is its runtime: with plain runc nothing keeps a rebooted node's kubelet from a new start.
            "spec": {"nodeName": NODES[n], "runtimeClassName": RUNTIME_CLASS, "restartPolicy": "Always",
                "containers": [{"name": "app", "image": "docker.io/peregrine/workload:dev"}]},
        }))
        .unwrap();
        new.status = Some(status(true, true, 0, None));
        let mut server = self.server.borrow_mut();
        server.create_pod(new, self.time()).unwrap();
        let uid = pod::uid(&server.pods[name]).to_owned();
        drop(server);
        self.start_cold(n, &uid);
    }

    fn start_cold(&self, n: usize, uid: &str) {
        self.lineages.set(self.lineages.get() + 1);
        let process = Process {
            lineage: self.lineages.get(),
            running_since: Some(self.clock.now()),
            ticks: 0,
            interrupted: false,
        };
        self.say(format!("node {}: {uid} starts from nothing", NODES[n]));
        let mut node = self.nodes[n].borrow_mut();
        node.processes.insert(uid.to_owned(), process);
        node.started.insert(uid.to_owned());
        node.events += 1;
    }

    // ---- the way to the API server

    /// One request. `None`: it is not known whether it was done.
    pub(crate) async fn call<T: 'static>(&self, within: u64, op: impl FnOnce(&mut Server) -> T + 'static) -> Option<T> {
        let slot: Rc<RefCell<Option<T>>> = Rc::default();
        let (c, answer) = (self.clone(), slot.clone());
        let mut there = self.clock.between(1, 8);
        let back = self.clock.between(1, 8);
        let (mut arrives, mut returns) = (true, true);
        if self.clock.below(1000) < self.noise.get() {
            match self.clock.below(3) {
                0 => arrives = false,
                1 => returns = false,
                _ => there = self.clock.between(50, 8_000),
            }
        }
        // On its way it does not depend on the life of who sent it.
        self.clock.spawn(Owner::World, async move {
            c.clock.sleep(there).await;
            if !arrives || c.is_api_down() {
                return;
            }
            let result = op(&mut c.server.borrow_mut());
            if c.clock.now() < c.trouble.lost_replies.get() {
                returns = false;
            }
            c.clock.sleep(back).await;
            if returns {
                *answer.borrow_mut() = Some(result);
            }
        });
        if self.is_api_down() {
            self.clock.sleep(10).await;
            return None;
        }
        self.clock
            .timeout(within, self.clock.until(|| slot.borrow_mut().take()))
            .await
    }

    pub(crate) fn is_api_down(&self) -> bool {
        self.clock.now() < self.trouble.api_down.get()
    }

    /// How late a watch delivers.
    pub(crate) fn watch_delay(&self) -> u64 {
        let (until, by) = self.trouble.late_watches.get();
        if self.clock.now() < until {
            self.clock.between(by / 2, by)
        } else {
            self.clock.between(1, 30)
        }
    }

    /// Since when the agents cannot reach each other.
    pub(crate) fn cut_since(&self) -> Option<u64> {
        let until = self.trouble.cut_until.get();
        self.clock.wake_at(until);
        (self.clock.now() < until).then(|| self.trouble.cut_since.get())
    }

    // ---- nodes

    pub(crate) fn is_fresh(&self, lease: Option<u64>) -> bool {
        lease.is_some_and(|at| self.clock.now() - at < LOST)
    }

    pub(crate) fn is_kubelet_ready(&self, n: usize) -> bool {
        let node = self.nodes[n].borrow();
        node.up || self.clock.now() - node.down_since < LOST
    }

    pub(crate) fn start_agent(&self, n: usize) {
        let mut node = self.nodes[n].borrow_mut();
        if !node.up || node.agent_up {
            return;
        }
        node.agent_up = true;
        drop(node);
        self.say(format!("agent {} starts", NODES[n]));
        self.clock.spawn(Owner::Agent(n), agent::run(self.clone(), n));
    }

    fn end_agent(&self, n: usize) {
        self.nodes[n].borrow_mut().agent_up = false;
        self.agents[n].replace(Memory::default());
        self.clock.kill(Owner::Agent(n));
    }

    pub(crate) fn kill_agent(&self, n: usize) {
        if !self.nodes[n].borrow().agent_up {
            return;
        }
        self.say(format!("agent {} is killed", NODES[n]));
        self.end_agent(n);
        let (c, pause) = (self.clone(), self.clock.between(500, 8_000));
        self.clock.spawn(Owner::World, async move {
            c.clock.sleep(pause).await;
            c.start_agent(n);
        });
    }

    fn power_off(&self, n: usize, millis: u64) {
        if !self.nodes[n].borrow().up {
            return;
        }
        self.say(format!("node {} loses power", NODES[n]));
        let mut node = self.nodes[n].borrow_mut();
        node.up = false;
        node.down_since = self.clock.now();
        let lost = std::mem::take(&mut node.processes);
        self.lost_with_node.borrow_mut().extend(lost.into_keys());
        node.shepherds.clear();
        node.hand_offs.clear();
        node.rooms.clear();
        node.held_packets.clear();
        node.dumps.clear();
        for records in node.journals.values_mut() {
            // All before a durable record is durable with it; of the rest any beginning may have reached the disk.
            let durable = records.iter().rposition(Record::outlives_a_reboot).map_or(0, |i| i + 1);
            let rest = (records.len() - durable) as u64;
            records.truncate(durable + usize::try_from(self.clock.below(rest + 1)).unwrap());
        }
        drop(node);
        self.end_agent(n);
        let c = self.clone();
        self.clock.spawn(Owner::World, async move {
            c.clock.sleep(millis).await;
            c.say(format!("node {} is up again", NODES[n]));
            {
                let mut node = c.nodes[n].borrow_mut();
                node.up = true;
                node.boot += 1;
                node.events += 1;
            }
            c.clock.sleep(c.clock.between(500, 5_000)).await;
            c.start_agent(n);
        });
    }

    // ---- faults

    fn mark_struck(&self, fault: Fault) {
        let mut faults = self.faults.borrow_mut();
        if let Some((_, struck)) = faults.iter_mut().find(|(f, struck)| *f == fault && !*struck) {
            *struck = true;
        }
    }

    pub(crate) fn not_struck(&self) -> Vec<Fault> {
        self.faults
            .borrow()
            .iter()
            .filter(|(_, struck)| !struck)
            .map(|(f, _)| *f)
            .collect()
    }

    /// From here on everything works.
    pub(crate) fn heal(&self) {
        self.faults.borrow_mut().clear();
        self.noise.set(0);
        let trouble = &self.trouble;
        for until in [&trouble.api_down, &trouble.lost_replies, &trouble.cut_until] {
            until.set(0);
        }
        trouble.late_watches.set((0, 0));
    }

    /// A step of node `n` is at this point.
    pub(crate) fn strike(&self, n: usize, step: Step, when: When) -> Strike {
        let due: Vec<Fault> = {
            let mut faults = self.faults.borrow_mut();
            let due = faults
                .iter_mut()
                .filter(|(f, struck)| !struck && f.at == Trigger::Step(step, when));
            due.map(|(f, struck)| {
                *struck = true;
                *f
            })
            .collect()
        };
        let mut strike = Strike::None;
        for fault in due {
            match fault.action {
                Action::Fail => strike = Strike::Fail,
                Action::Hang => strike = Strike::Hang,
                Action::Repeat => strike = Strike::Repeat,
                other => {
                    self.say(format!("at {} {when:?}:", step.name()));
                    self.happen(other);
                }
            }
        }
        if self.nodes[n].borrow().agent_up {
            strike
        } else {
            Strike::Die
        }
    }

    fn happen(&self, action: Action) {
        let now = self.clock.now();
        let node = |whose| match whose {
            Whose::Source => 0,
            Whose::Target => 1,
        };
        self.say(format!("{action:?}"));
        match action {
            Action::Fail | Action::Hang | Action::Repeat => {}
            Action::Kill(whose) => self.kill_agent(node(whose)),
            Action::Reboot(whose, millis) => self.power_off(node(whose), millis),
            Action::LoseReplies(millis) => self.trouble.lost_replies.set(now + millis),
            Action::ApiDown(millis) => self.trouble.api_down.set(now + millis),
            Action::Cut(millis) => {
                if now >= self.trouble.cut_until.get() {
                    self.trouble.cut_since.set(now);
                }
                self.trouble.cut_until.set(now + millis);
            }
            Action::LateWatches(by) => self.trouble.late_watches.set((now + 60_000, by)),
            Action::KillOperator => self.kill_operator(),
            Action::Cancel => self.user_changes(|m| m.spec.desired_state = DesiredState::Canceled),
            Action::DeleteMigration => {
                let at = self.time();
                self.user_changes(move |m| {
                    m.metadata.deletion_timestamp.get_or_insert(Time(at));
                });
            }
            Action::ForceDelete => {
                let at = self.time();
                self.user_changes(move |m| {
                    m.metadata.finalizers = None;
                    m.metadata.deletion_timestamp.get_or_insert(Time(at));
                });
            }
            Action::DeletePod => self.user_deletes_pod(true),
            Action::DeleteTarget => self.user_deletes_pod(false),
        }
    }

    fn kill_operator(&self) {
        if !self.operator_up.replace(false) {
            return;
        }
        self.clock.kill(Owner::Operator);
        let (c, pause) = (self.clone(), self.clock.between(500, 15_000));
        self.clock.spawn(Owner::World, async move {
            c.clock.sleep(pause).await;
            c.operator_up.set(true);
            c.say("an operator leads again");
            c.clock.spawn(Owner::Operator, super::operator::run(c.clone()));
        });
    }

    fn user_changes(&self, change: impl Fn(&mut crds::ProcessMigration)) {
        let mut server = self.server.borrow_mut();
        let all: Vec<_> = server.migrations.values().cloned().collect();
        for migration in all.iter().filter(|m| !Server::is_finished(m)) {
            let (name, uid) = (
                migration.metadata.name.clone().unwrap(),
                migration.metadata.uid.clone().unwrap(),
            );
            let _ = server.change(&name, &uid, |m| {
                change(m);
                m.metadata.generation = m.metadata.generation.map(|g| g + 1);
                Ok(())
            });
        }
    }

    fn user_deletes_pod(&self, source: bool) {
        let at = Some(Time(self.time()));
        let mut server = self.server.borrow_mut();
        let found: Vec<(String, String)> = server
            .pods
            .values()
            .filter(|p| (pod::name(p) == "web-0") == source)
            .map(|p| (pod::name(p).to_owned(), pod::uid(p).to_owned()))
            .collect();
        for (name, uid) in found {
            server.deleted_by_user.push(uid);
            server.delete_pod(&name, Some(1), at.clone());
        }
    }

    // ---- invariants that hold at every instant

    /// False: one is broken.
    pub(crate) fn check(&self) -> bool {
        let events = |n: usize| self.nodes[n].borrow().events;
        let state = (self.server.borrow().version, events(0), events(1), self.clock.now());
        if self.checked.replace(state) != state
            && let Some(broken) = self.broken()
        {
            self.say(format!("BROKEN: {broken}"));
            *self.violation.borrow_mut() = Some(broken);
        }
        self.violation.borrow().is_none()
    }

    fn broken(&self) -> Option<String> {
        let now = self.clock.now();
        let server = self.server.borrow();
        if let Some(violation) = &server.violation {
            return Some(violation.clone());
        }
        let mut running = Vec::new();
        for (n, node) in self.nodes.iter().enumerate() {
            for (uid, process) in &node.borrow().processes {
                let mut furthest = self.furthest.borrow_mut();
                let furthest = furthest.entry(process.lineage).or_default();
                let memory = process.memory(now);
                if process.running_since.is_some() {
                    running.push(format!("{uid} on {}", NODES[n]));
                    if let Some(why) = may_not_run(&server, uid) {
                        return Some(why);
                    }
                    if memory < *furthest {
                        return Some(format!("I3: {uid} runs with memory {memory} of {furthest}"));
                    }
                    if process.interrupted {
                        return Some(format!("I3: {uid} runs with system calls interrupted by the dump"));
                    }
                }
                *furthest = memory.max(*furthest);
            }
        }
        (running.len() > 1).then(|| format!("I1: two copies run: {}", running.join(", ")))
    }
}

/// Why the decision forbids that a pod's processes run.
fn may_not_run(server: &Server, uid: &str) -> Option<String> {
    use crds::process_migration::DecisionValue::{Aborted, Committed, Undecided};
    for migration in server.migrations.values() {
        let status = migration.status.as_ref()?;
        let decision = status.decision.as_ref().map(|d| d.value);
        let is_source = status
            .source
            .as_ref()
            .is_some_and(|s| s.pod_uid.as_deref() == Some(uid));
        let is_target = status
            .target
            .as_ref()
            .is_some_and(|t| t.pod_uid.as_deref() == Some(uid));
        if is_source && decision == Some(Committed) {
            return Some(format!("I4: the source {uid} runs after the commit"));
        }
        if is_target && matches!(decision, Some(Undecided | Aborted)) {
            return Some(format!("I1: the target {uid} runs without a commit ({decision:?})"));
        }
    }
    None
}

fn status(running: bool, ready: bool, restarts: i32, waiting: Option<&str>) -> k8s_openapi::api::core::v1::PodStatus {
    let state = ContainerState {
        running: running.then(ContainerStateRunning::default),
        waiting: (!running).then(|| ContainerStateWaiting {
            reason: Some(waiting.unwrap_or("ContainerCreating").to_owned()),
            message: None,
        }),
        ..Default::default()
    };
    let container = ContainerStatus {
        name: "app".to_owned(),
        ready,
        restart_count: restarts,
        state: Some(state),
        ..Default::default()
    };
    let mut status: k8s_openapi::api::core::v1::PodStatus = serde_json::from_value(json!({
        "phase": if running || restarts > 0 { "Running" } else { "Pending" },
        "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
    }))
    .unwrap();
    status.container_statuses = Some(vec![container]);
    status
}

/// One node's kubelet, with the wrapper behind it.
async fn kubelet(c: Cluster, n: usize) {
    let mut seen = (0, 0);
    loop {
        seen = c
            .clock
            .until(|| {
                let now = (c.server.borrow().version, c.nodes[n].borrow().events);
                (now != seen && c.nodes[n].borrow().up && !c.is_api_down()).then_some(now)
            })
            .await;
        c.clock.sleep(c.clock.between(20, 400)).await;
        if c.nodes[n].borrow().up {
            sync_pods(&c, n);
        }
    }
}

fn sync_pods(c: &Cluster, n: usize) {
    let mine: Vec<Pod> = {
        let server = c.server.borrow();
        server
            .pods
            .values()
            .filter(|p| pod::node(p) == Some(NODES[n]))
            .cloned()
            .collect()
    };
    let known: BTreeSet<String> = mine.iter().map(|p| pod::uid(p).to_owned()).collect();
    for of in &mine {
        sync_pod(c, n, of);
    }
    let mut node = c.nodes[n].borrow_mut();
    let before = node.processes.len() + node.shepherds.len() + node.held_packets.len();
    node.processes.retain(|uid, _| known.contains(uid));
    node.shepherds.retain(|uid| known.contains(uid));
    node.started.retain(|uid| known.contains(uid));
    // The network namespace goes with the sandbox.
    node.held_packets.retain(|uid| known.contains(uid));
    if before != node.processes.len() + node.shepherds.len() + node.held_packets.len() {
        node.events += 1;
    }
}

fn sync_pod(c: &Cluster, n: usize, of: &Pod) {
    let (name, uid) = (pod::name(of).to_owned(), pod::uid(of).to_owned());
    if pod::is_deleting(of) {
        let mut node = c.nodes[n].borrow_mut();
        let killed = node.processes.remove(&uid).is_some() | node.shepherds.remove(&uid);
        node.held_packets.remove(&uid);
        if killed {
            node.events += 1;
            drop(node);
            c.say(format!("node {}: {uid} is killed", NODES[n]));
        } else {
            drop(node);
            c.server.borrow_mut().remove_pod(&name, &uid);
            c.say(format!("node {}: {name} {uid} is gone", NODES[n]));
        }
        return;
    }
    let (process, shepherd, started, verdict, hand_off) = {
        let node = c.nodes[n].borrow();
        let annotation = |key: &str| of.metadata.annotations.as_ref().and_then(|a| a.get(key)).cloned();
        let target_of = annotation(ANNOTATION_TARGET_OF);
        let verdict = of_create(Creation {
            role: runtime::spec::Role::Container,
            target_of: target_of.as_deref(),
            moved_away: node.moved_away.contains(&uid),
            committed: node.committed.contains(&uid),
        });
        (
            node.processes.get(&uid).map(|p| p.running_since.is_some()),
            node.shepherds.contains(&uid),
            node.started.contains(&uid),
            verdict,
            node.hand_offs.get(&uid).copied(),
        )
    };
    let was = pod::container_statuses(of).first().map_or(0, |s| s.restart_count);
    let new = match (process, shepherd) {
        (Some(running), _) => status(true, running, was, None),
        (None, true) => status(true, false, was, None),
        (None, false) => {
            let restarts = if started { was.max(1) } else { was };
            match verdict {
                CreateVerdict::PassThrough | CreateVerdict::Sandbox => {
                    c.start_cold(n, &uid);
                    status(true, true, restarts, None)
                }
                CreateVerdict::MovedAway => status(false, false, restarts, Some("RunContainerError")),
                CreateVerdict::Target => match hand_off {
                    Some(false) => {
                        let mut node = c.nodes[n].borrow_mut();
                        node.shepherds.insert(uid.clone());
                        node.started.insert(uid.clone());
                        node.events += 1;
                        status(true, false, restarts, None)
                    }
                    Some(true) => status(false, false, restarts, Some("RunContainerError")),
                    None => status(false, false, restarts, None),
                },
            }
        }
    };
    let _ = c.server.borrow_mut().change_pod(&name, &uid, |p| {
        if let (Some(old), new) = (&mut p.status, new) {
            old.phase = new.phase;
            old.conditions = new.conditions;
            old.container_statuses = new.container_statuses;
        } else {
            p.status = Some(status(false, false, 0, None));
        }
    });
}

/// The scheduler: a pod goes where its affinity says.
async fn schedule(c: Cluster) {
    let mut seen = 0;
    loop {
        seen = c
            .clock
            .until(|| Some(c.server.borrow().version).filter(|v| *v != seen && !c.is_api_down()))
            .await;
        c.clock.sleep(c.clock.between(5, 60)).await;
        let unbound: Vec<Pod> = c
            .server
            .borrow()
            .pods
            .values()
            .filter(|p| pod::node(p).is_none())
            .cloned()
            .collect();
        for of in unbound {
            let Some(node) = wanted(&of).filter(|node| {
                let n = NODES.iter().position(|name| name == node);
                n.is_some_and(|n| c.is_kubelet_ready(n))
            }) else {
                continue;
            };
            let _ = c.server.borrow_mut().change_pod(pod::name(&of), pod::uid(&of), |p| {
                p.spec.as_mut().unwrap().node_name = Some(node);
            });
        }
    }
}

fn wanted(of: &Pod) -> Option<String> {
    let affinity = of.spec.as_ref()?.affinity.as_ref()?.node_affinity.as_ref()?;
    let required = affinity.required_during_scheduling_ignored_during_execution.as_ref()?;
    let field = required.node_selector_terms.first()?.match_fields.as_ref()?.first()?;
    field.values.as_ref()?.first().cloned()
}
