//! An agent: `node_agent::decide::{assignment, recover}` themselves; around them a model of its watch, its journal and
//! ledger, the writer of its half and its decisions, with the rules of node-agent/src/session.rs, session/ledger.rs,
//! session/publish.rs and session/hand_over.rs.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use crds::condition::{self, Status};
use crds::process_migration::{DecisionValue, Failure, Party, cond};
use crds::{ProcessMigration, Reason};
use node_agent::decide::assignment::{self, Known};
use node_agent::decide::recover::{Plan, plan};
use node_agent::decide::step::{Role, Step};
use node_agent::journal::{Record, Start};
use operator::decide::pod;
use protocol::migrate::FromTarget;
use protocol::migrate::message::Offer;
use protocol::migrate::target::Output;

use super::clock::Owner;
use super::cluster::{Cluster, NAMESPACE, NODES};
use super::fault::Broken;
use super::ledger::Ledger;
use super::server::{Half, Refused, Server};
use super::wire::TargetEnd;
use super::{source, target};

/// For one request.
pub(crate) const REQUEST: u64 = 5_000;
/// Between two requests while a decision is not known.
const RETRY: u64 = 300;

/// What an agent knows: it is gone when the agent is.
#[derive(Default)]
pub(crate) struct Memory {
    handles: BTreeMap<(String, Role), Rc<Handle>>,
    preflights: BTreeSet<(String, u32)>,
    /// The listener works.
    listening: bool,
}

#[derive(Clone, Default)]
pub(crate) struct Seen {
    pub(crate) migration: Option<Arc<ProcessMigration>>,
    pub(crate) gone: bool,
}

#[derive(Default)]
struct Handle {
    seen: RefCell<Seen>,
    changes: Cell<u64>,
    publisher: RefCell<Option<Rc<Publisher>>>,
    inbound: RefCell<VecDeque<(TargetEnd, Offer)>>,
    /// The session's task has ended.
    over: Cell<bool>,
}

/// Why a part failed.
pub(crate) type Failed = Failure;

pub(crate) fn failed(reason: Reason, message: impl Into<String>) -> Failed {
    Failure {
        reason: reason.as_str().to_owned(),
        message: message.into(),
    }
}

/// A final decision.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Decided {
    Committed,
    Aborted(Failed),
}

pub(crate) fn decided_in(migration: &ProcessMigration) -> Option<Decided> {
    match assignment::decision(migration) {
        Known::Committed => Some(Decided::Committed),
        Known::Aborted { reason, message } => Some(Decided::Aborted(Failure { reason, message })),
        Known::Undecided | Known::Unopened => None,
    }
}

// ---- the agent's life

pub(crate) async fn run(c: Cluster, n: usize) {
    let journals: Vec<(String, Role)> = c.nodes[n].borrow().journals.keys().cloned().collect();
    for (uid, role) in journals {
        c.clock.sleep(1).await;
        resume(&c, n, &uid, role);
    }
    c.agents[n].borrow_mut().listening = true;
    c.clock.spawn(Owner::Agent(n), heartbeat(c.clone(), n));
    c.clock.spawn(Owner::Agent(n), sweep(c.clone(), n));
    let (list, mut position) = loop {
        let list = c
            .call(REQUEST, |s| {
                (s.migrations.values().cloned().collect::<Vec<_>>(), s.history.len())
            })
            .await;
        if let Some(list) = list {
            break list;
        }
        c.clock.sleep(1_000).await;
    };
    for migration in &list {
        attend(&c, n, migration);
    }
    // A list leaves out what is gone.
    let present: BTreeSet<_> = list.iter().filter_map(|m| m.metadata.uid.clone()).collect();
    let handles: Vec<_> = c.agents[n]
        .borrow()
        .handles
        .iter()
        .map(|(k, h)| (k.0.clone(), h.clone()))
        .collect();
    for (uid, handle) in handles {
        if !present.contains(&uid) {
            handle.seen.borrow_mut().gone = true;
            handle.changes.set(handle.changes.get() + 1);
        }
    }
    loop {
        c.clock
            .until(|| (c.server.borrow().history.len() > position && !c.is_api_down()).then_some(()))
            .await;
        c.clock.sleep(c.watch_delay()).await;
        let (name, now) = c.server.borrow().history[position].clone();
        position += 1;
        match now {
            Some(migration) => attend(&c, n, &migration),
            None => {
                let memory = c.agents[n].borrow();
                for handle in memory.handles.values() {
                    let mut seen = handle.seen.borrow_mut();
                    if seen
                        .migration
                        .as_ref()
                        .is_some_and(|m| m.metadata.name.as_deref() == Some(&name))
                    {
                        seen.gone = true;
                        handle.changes.set(handle.changes.get() + 1);
                    }
                }
            }
        }
    }
}

async fn heartbeat(c: Cluster, n: usize) {
    loop {
        let at = c.clock.now();
        c.call(REQUEST, move |s| s.leases.insert(n, at)).await;
        c.clock.sleep(10_000).await;
    }
}

async fn sweep(c: Cluster, n: usize) {
    loop {
        let here = c.call(REQUEST, move |s| {
            let here = s.pods.values().filter(|p| pod::node(p) == Some(NODES[n]));
            here.map(|p| pod::uid(p).to_owned()).collect::<BTreeSet<_>>()
        });
        if let Some(alive) = here.await
            && c.agents[n].borrow().handles.is_empty()
        {
            let mut node = c.nodes[n].borrow_mut();
            node.moved_away.retain(|uid| alive.contains(uid));
            node.committed.retain(|uid| alive.contains(uid));
            node.events += 1;
        }
        c.clock.sleep(300_000).await;
    }
}

fn attend(c: &Cluster, n: usize, migration: &Arc<ProcessMigration>) {
    observe(c, n, migration);
    let key = (
        migration.metadata.uid.clone().unwrap(),
        migration.status.as_ref().and_then(|s| s.attempt).unwrap_or(0),
    );
    if assignment::needs_preflight(migration, NODES[n]) && c.agents[n].borrow_mut().preflights.insert(key.clone()) {
        let (c2, migration) = (c.clone(), migration.clone());
        c.clock.spawn(Owner::Agent(n), async move {
            c2.clock.sleep(c2.clock.between(30, 300)).await;
            observe(&c2, n, &migration);
            let handle = c2.agents[n].borrow().handles.get(&(key.0, Role::Source)).cloned();
            let publisher = handle.and_then(|h| h.publisher.borrow().clone());
            if let Some(publisher) = publisher {
                publisher.change(|half| {
                    half.source.memory_bytes = Some(1_000_000);
                    half.source.predicted_freeze_milliseconds = Some(100);
                    half.source.checked_attempt = Some(key.1);
                });
            }
        });
    }
}

fn observe(c: &Cluster, n: usize, migration: &Arc<ProcessMigration>) {
    let Some(role) = assignment::role(migration, NODES[n]) else {
        return;
    };
    let key = (migration.metadata.uid.clone().unwrap(), role);
    let handle = c.agents[n].borrow().handles.get(&key).cloned();
    if let Some(handle) = handle {
        start_publisher(c, n, &handle, migration, role);
        *handle.seen.borrow_mut() = Seen {
            migration: Some(migration.clone()),
            gone: false,
        };
        handle.changes.set(handle.changes.get() + 1);
        return;
    }
    if !assignment::is_finished(migration) {
        begin_task(
            c,
            n,
            migration.metadata.name.clone().unwrap(),
            key,
            None,
            Some(migration.clone()),
        );
    }
}

fn resume(c: &Cluster, n: usize, uid: &str, role: Role) {
    let key = (uid.to_owned(), role);
    let records = c.nodes[n].borrow().journals[&key].clone();
    let plan = plan(&records);
    let (Some(Record::Start(start)), true) = (records.into_iter().next(), plan != Plan::Nothing) else {
        c.nodes[n].borrow_mut().journals.remove(&key);
        return;
    };
    c.say(format!("agent {}: recovers as {}: {plan:?}", NODES[n], role.as_str()));
    begin_task(c, n, start.name.clone(), key, Some((start, plan)), None);
}

fn begin_task(
    c: &Cluster,
    n: usize,
    name: String,
    key: (String, Role),
    recovered: Option<(Start, Plan)>,
    migration: Option<Arc<ProcessMigration>>,
) {
    let handle: Rc<Handle> = Rc::default();
    if let Some(migration) = &migration {
        start_publisher(c, n, &handle, migration, key.1);
    }
    *handle.seen.borrow_mut() = Seen { migration, gone: false };
    c.agents[n].borrow_mut().handles.insert(key.clone(), handle.clone());
    let task = Task {
        c: c.clone(),
        n,
        name,
        uid: key.0.clone(),
        role: key.1,
        handle: handle.clone(),
        seen: Cell::new(0),
    };
    let c2 = c.clone();
    c.clock.spawn(Owner::Agent(n), async move {
        match key.1 {
            Role::Source => source::run(task, recovered).await,
            Role::Target => target::run(task, recovered).await,
        }
        handle.over.set(true);
        c2.agents[n].borrow_mut().handles.remove(&key);
    });
}

/// A peer connects: the offer is read, then it is the session's.
pub(crate) fn accept(c: &Cluster, n: usize, link: TargetEnd) {
    let c2 = c.clone();
    c.clock.spawn(Owner::Agent(n), async move {
        let Some(Ok((Output::Offer(offer), _))) = c2.clock.timeout(10_000, link.hear()).await else {
            return;
        };
        let handle = c2.agents[n]
            .borrow()
            .handles
            .get(&(offer.uid.clone(), Role::Target))
            .cloned();
        match handle.filter(|h| !h.over.get()) {
            Some(handle) => handle.inbound.borrow_mut().push_back((link, offer)),
            None => {
                let why = failed(Reason::PeerRefused, "this node has no such migration");
                let _ = link.send(&FromTarget::Refuse {
                    reason: why.reason,
                    message: why.message,
                });
                c2.clock.timeout(2_000, link.lost()).await;
            }
        }
    });
}

pub(crate) fn is_listening(c: &Cluster, n: usize) -> bool {
    c.nodes[n].borrow().agent_up && c.agents[n].borrow().listening
}

// ---- the writer of a half

pub(crate) struct Publisher {
    wanted: RefCell<Half>,
    written: RefCell<Half>,
    gone: Cell<bool>,
}

impl Publisher {
    pub(crate) fn change(&self, change: impl FnOnce(&mut Half)) {
        change(&mut self.wanted.borrow_mut());
    }
}

fn stored(migration: &ProcessMigration, role: Role) -> Half {
    let status = migration.status.clone().unwrap_or_default();
    let types = match role {
        Role::Source => cond::SOURCE,
        Role::Target => cond::TARGET,
    };
    let own = status.conditions.into_iter();
    let mut half = Half {
        conditions: own.filter(|c| types.contains(&c.type_.as_str())).collect(),
        ..Half::default()
    };
    match role {
        Role::Source => {
            half.source = status.source.unwrap_or_default();
            (half.source.node_name, half.source.pod_name, half.source.pod_uid) = (None, None, None);
        }
        Role::Target => {
            half.target = status.target.unwrap_or_default();
            (half.target.node_name, half.target.pod_name, half.target.pod_uid) = (None, None, None);
        }
    }
    half
}

fn start_publisher(c: &Cluster, n: usize, handle: &Handle, migration: &ProcessMigration, role: Role) {
    let mut slot = handle.publisher.borrow_mut();
    if slot.is_some() {
        return;
    }
    let half = stored(migration, role);
    let publisher = Rc::new(Publisher {
        wanted: RefCell::new(half.clone()),
        written: RefCell::new(half),
        gone: Cell::new(false),
    });
    *slot = Some(publisher.clone());
    let (name, uid) = (
        migration.metadata.name.clone().unwrap(),
        migration.metadata.uid.clone().unwrap(),
    );
    let weak = Rc::downgrade(&publisher);
    let c2 = c.clone();
    c.clock.spawn(Owner::Agent(n), async move {
        loop {
            let next = c2.clock.until(|| match weak.upgrade() {
                None => Some(None),
                Some(p) => {
                    let wanted = p.wanted.borrow().clone();
                    (wanted != *p.written.borrow()).then_some(Some(wanted))
                }
            });
            let Some(half) = next.await else { return };
            let (name, uid, sent) = (name.clone(), uid.clone(), half.clone());
            match c2.call(10_000, move |s| s.apply_half(&name, &uid, role, &sent)).await {
                Some(Ok(())) => {
                    if let Some(p) = weak.upgrade() {
                        *p.written.borrow_mut() = half;
                    }
                    c2.clock.sleep(50).await;
                }
                Some(Err(Refused::NotFound | Refused::Conflict)) => {
                    if let Some(p) = weak.upgrade() {
                        p.gone.set(true);
                    }
                    return;
                }
                None => c2.clock.sleep(1_000).await,
            }
        }
    });
}

// ---- a session's task

pub(crate) struct Task {
    pub(crate) c: Cluster,
    pub(crate) n: usize,
    name: String,
    pub(crate) uid: String,
    role: Role,
    handle: Rc<Handle>,
    seen: Cell<u64>,
}

impl Task {
    pub(crate) fn seen(&self) -> Seen {
        self.handle.seen.borrow().clone()
    }

    /// The object as the API server has it: what a watch delivers may be from before the end of an earlier session.
    pub(crate) async fn fresh(&self, seen: Arc<ProcessMigration>) -> Option<Arc<ProcessMigration>> {
        if self.c.rule == Broken::BeginsUnasked {
            return Some(seen);
        }
        let (name, uid) = (self.name.clone(), self.uid.clone());
        loop {
            let (name, uid) = (name.clone(), uid.clone());
            match self.c.call(REQUEST, move |s| s.migration(&name, &uid)).await {
                Some(found) => return found,
                None => self.c.clock.sleep(1_000).await,
            }
        }
    }

    pub(crate) async fn changed(&self) {
        let now = self
            .c
            .clock
            .until(|| Some(self.handle.changes.get()).filter(|n| *n != self.seen.get()))
            .await;
        self.seen.set(now);
    }

    pub(crate) fn publish(&self, change: impl FnOnce(&mut Half)) {
        if let Some(p) = &*self.handle.publisher.borrow() {
            p.change(change);
        }
    }

    pub(crate) fn condition(&self, type_: &str, status: Status, reason: Reason, message: &str) {
        let now = self.c.time();
        self.publish(|half| {
            let new = condition::build(&half.conditions, type_, status, reason, message, None, now);
            half.conditions.retain(|c| c.type_ != type_);
            half.conditions.push(new);
        });
    }

    /// Waits until all of this half is stored, or cannot be any more.
    pub(crate) async fn stored(&self) {
        let publisher = self.handle.publisher.borrow().clone();
        if let Some(p) = publisher {
            self.c
                .clock
                .until(|| (p.gone.get() || *p.written.borrow() == *p.wanted.borrow()).then_some(()))
                .await;
        }
    }

    pub(crate) async fn wait_until_seen(&self) {
        let seen = || {
            let seen = self.handle.seen.borrow();
            (seen.migration.is_some() || seen.gone).then_some(())
        };
        self.c.clock.timeout(20_000, self.c.clock.until(seen)).await;
    }

    pub(crate) async fn inbound(&self) -> (TargetEnd, Offer) {
        self.c
            .clock
            .until(|| self.handle.inbound.borrow_mut().pop_front())
            .await
    }

    pub(crate) async fn pod_exists(&self, name: &str, uid: &str) -> Option<bool> {
        let (name, uid) = (name.to_owned(), uid.to_owned());
        self.c
            .call(REQUEST, move |s| s.pods.get(&name).is_some_and(|p| pod::uid(p) == uid))
            .await
    }

    pub(crate) fn ledger(&self) -> Ledger {
        Ledger::new(&self.c, self.n, (self.uid.clone(), self.role))
    }

    pub(crate) fn start(&self, attempt: u32, pod_name: String, pod_uid: String) -> Start {
        Start {
            version: 1,
            role: self.role,
            namespace: NAMESPACE.to_owned(),
            name: self.name.clone(),
            uid: self.uid.clone(),
            attempt,
            pod_uid,
            pod_name,
            boot_id: self.c.nodes[self.n].borrow().boot.to_string(),
        }
    }

    pub(crate) fn publish_failure(&self, why: &Failed) {
        let failure = Some(why.clone());
        let role = self.role;
        self.publish(|half| match role {
            Role::Source => half.source.failure = failure,
            Role::Target => half.target.failure = failure,
        });
    }

    pub(crate) fn say_step(&self, step: Step) {
        let role = self.role;
        self.publish(|half| match role {
            Role::Source => half.source.step = Some(step.name().to_owned()),
            Role::Target => half.target.step = Some(step.name().to_owned()),
        });
    }

    /// Lets the decision of the object stop the forward steps.
    pub(crate) fn follow_decision(&self, ledger: &Ledger) {
        let (handle, stop, c) = (self.handle.clone(), ledger.stop.clone(), self.c.clone());
        self.c.clock.spawn(Owner::Agent(self.n), async move {
            let why = c.clock.until(|| {
                let seen = handle.seen.borrow();
                if handle.over.get() || stop.borrow().is_some() {
                    return Some(None);
                }
                match seen.migration.as_deref().and_then(decided_in) {
                    Some(Decided::Aborted(why)) => Some(Some(why)),
                    Some(Decided::Committed) | None if seen.gone => {
                        Some(Some(failed(Reason::CanceledByUser, "the migration was deleted")))
                    }
                    Some(Decided::Committed) | None => None,
                }
            });
            if let Some(why) = why.await {
                stop.borrow_mut().get_or_insert(why);
            }
        });
    }

    pub(crate) fn decisions(&self, start: &Start) -> Decisions {
        let seen = self.seen();
        let target = seen.migration.as_ref().and_then(|m| m.status.as_ref()?.target.clone());
        let target = target.and_then(|t| Some((t.pod_name?, t.pod_uid?)));
        Decisions {
            c: self.c.clone(),
            name: self.name.clone(),
            uid: self.uid.clone(),
            target: target
                .or_else(|| (start.role == Role::Target).then(|| (start.pod_name.clone(), start.pod_uid.clone()))),
        }
    }

    pub(crate) async fn end(&self, ledger: &Ledger) {
        self.stored().await;
        ledger.record(Record::Settled).await;
        self.c.nodes[self.n].borrow_mut().journals.remove(&ledger.key);
        self.c.say(format!(
            "agent {}: the {}'s part has ended",
            NODES[self.n],
            self.role.as_str()
        ));
    }
}

// ---- the decision

#[derive(Clone)]
pub(crate) struct Decisions {
    c: Cluster,
    name: String,
    uid: String,
    target: Option<(String, String)>,
}

impl Decisions {
    /// One look. `None`: undecided, or not known.
    pub(crate) async fn look(&self) -> Option<Decided> {
        let (name, uid) = (self.name.clone(), self.uid.clone());
        match self.c.call(REQUEST, move |s| s.migration(&name, &uid)).await? {
            Some(migration) => decided_in(&migration),
            None => self.without_object().await,
        }
    }

    async fn without_object(&self) -> Option<Decided> {
        let gone = Decided::Aborted(failed(
            Reason::CanceledByUser,
            "the migration was deleted before it was decided",
        ));
        let Some((name, uid)) = self.target.clone() else {
            return Some(gone);
        };
        let found = self
            .c
            .call(REQUEST, move |s| {
                s.pods.get(&name).filter(|p| pod::uid(p) == uid).cloned()
            })
            .await?;
        let Some(found) = found else { return Some(gone) };
        let ours = found
            .metadata
            .owner_references
            .iter()
            .flatten()
            .any(|o| o.uid == self.uid);
        (!ours).then_some(Decided::Committed)
    }

    pub(crate) async fn abort(&self, by: Party, why: &Failed) -> Decided {
        loop {
            self.swap(DecisionValue::Aborted, by, why).await;
            if let Some(decided) = self.look().await {
                return decided;
            }
            if self.c.rule == Broken::UnknownIsAborted {
                return Decided::Aborted(why.clone());
            }
            self.c.clock.sleep(RETRY).await;
        }
    }

    /// THE POINT OF NO RETURN.
    pub(crate) async fn commit(&self) -> Decided {
        let why = failed(Reason::AllContainersHeld, "");
        loop {
            if self.swap(DecisionValue::Committed, Party::Target, &why).await {
                return Decided::Committed;
            }
            if let Some(decided) = self.look().await {
                return decided;
            }
            if self.c.rule == Broken::UnknownIsCommitted {
                return Decided::Committed;
            }
            self.c.clock.sleep(RETRY).await;
        }
    }

    async fn swap(&self, value: DecisionValue, by: Party, why: &Failed) -> bool {
        let (name, uid, why, at) = (self.name.clone(), self.uid.clone(), why.clone(), self.c.time());
        let message = "every container is restored and held";
        let restored = (value == DecisionValue::Committed).then(|| {
            condition::build(
                &[],
                cond::RESTORED,
                Status::True,
                Reason::AllContainersHeld,
                message,
                None,
                at,
            )
        });
        let c = self.c.clone();
        let written = self.c.call(REQUEST, move |s: &mut Server| {
            let done = s.decide((&name, &uid), value, by, &why, restored, at).is_ok();
            if done {
                c.say(format!("decided: {value:?} by {by:?}: {} {}", why.reason, why.message));
            }
            done
        });
        written.await == Some(true)
    }
}
