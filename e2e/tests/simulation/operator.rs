//! The operator: `operator::decide` itself; around it, in the order and with the rules of operator/src/migration, a model of
//! observe, act and report, whose reads and writes can be late or lost.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use crds::condition::{self, Status};
use crds::names::{ANNOTATION_LABELS, FINALIZER};
use crds::process_migration::{Decision, DecisionValue, Failure, Party};
use crds::{MigrationNodeSpec, MigrationNodeStatus, ProcessMigration, Reason};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use operator::decide::world::{Heartbeat, Learned};
use operator::decide::{
    Effects, FinalizerChange, Limits, NodeView, Observed, View, Wake, World, decide, pod, target_pod,
};

use super::clock::Owner;
use super::cluster::{Cluster, NODES};
use super::server::{Refused, Server};

const REQUEST: u64 = 5_000;

#[derive(Default)]
struct Known {
    newest: Option<Arc<ProcessMigration>>,
    first_seen: Option<Timestamp>,
    changed: Option<Timestamp>,
    halves: String,
    wake: u64,
    /// Versions of the whole cluster that the last pass has seen.
    seen: u64,
}

/// What dies with the process.
#[derive(Default)]
struct Store {
    watched: RefCell<BTreeMap<String, Arc<ProcessMigration>>>,
    known: RefCell<BTreeMap<String, Known>>,
    arrived: Cell<u64>,
}

/// It is not known whether a request was done, or the world is not as it was observed.
enum Stop {
    Unknown,
    Raced,
    Gone,
}

pub(crate) async fn run(c: Cluster) {
    let store: Rc<Store> = Rc::default();
    let listed = loop {
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
    for migration in listed.0 {
        store
            .watched
            .borrow_mut()
            .insert(migration.metadata.name.clone().unwrap(), migration);
    }
    c.clock
        .spawn(Owner::Operator, watch(c.clone(), store.clone(), listed.1));
    loop {
        let name = c.clock.until(|| due(&c, &store)).await;
        let wake = pass(&c, &store, &name).await.unwrap_or(c.clock.now() + 1_000);
        store.known.borrow_mut().entry(name).or_default().wake = wake;
    }
}

async fn watch(c: Cluster, store: Rc<Store>, mut position: usize) {
    loop {
        c.clock
            .until(|| (c.server.borrow().history.len() > position && !c.is_api_down()).then_some(()))
            .await;
        c.clock.sleep(c.watch_delay()).await;
        let (name, now) = c.server.borrow().history[position].clone();
        position += 1;
        match now {
            Some(migration) => store.watched.borrow_mut().insert(name, migration),
            None => store.watched.borrow_mut().remove(&name),
        };
        store.arrived.set(store.arrived.get() + 1);
    }
}

/// A migration whose time has come: something has changed, or its deadline is over.
fn due(c: &Cluster, store: &Store) -> Option<String> {
    let version = c.server.borrow().version + (store.arrived.get() << 32);
    let mut known = store.known.borrow_mut();
    for name in store.watched.borrow().keys() {
        let known = known.entry(name.clone()).or_insert_with(|| Known {
            seen: u64::MAX,
            ..Known::default()
        });
        c.clock.wake_at(known.wake);
        if known.seen != version || (known.wake > 0 && known.wake <= c.clock.now()) {
            known.seen = version;
            known.wake = 0;
            return Some(name.clone());
        }
    }
    None
}

async fn pass(c: &Cluster, store: &Rc<Store>, name: &str) -> Option<u64> {
    let mut learned = Learned::default();
    for _ in 0..16 {
        let Some(migration) = newest(store, name) else {
            return Some(u64::MAX);
        };
        let world = observe(c, store, migration, learned.clone()).await;
        let decision = decide(&world);
        let mut done = false;
        match act(c, store, &world, decision.effects, &mut learned, &mut done).await {
            Ok(()) => {}
            Err(Stop::Unknown) => return None,
            Err(Stop::Gone) => {
                return Some(u64::MAX);
            }
            Err(Stop::Raced) => {
                read_again(c, store, &world).await?;
                continue;
            }
        }
        let old = View::stored(&world.status(), world.migration.metadata.generation, world.now);
        if decision.view != old {
            let (name, uid) = (world.name().to_owned(), world.uid().to_owned());
            let version = decision
                .guarded
                .then(|| newest(store, &name).and_then(|m| m.metadata.resource_version.clone()))
                .flatten();
            let view = decision.view;
            match c
                .call(REQUEST, move |s| s.apply_view((&name, &uid), version, &view))
                .await?
            {
                Ok(written) => wrote(store, written),
                Err(_) => read_again(c, store, &world).await?,
            }
            done = true;
        }
        if !done {
            return Some(match decision.wake {
                Wake::AwaitChange => u64::MAX,
                Wake::At(at) => {
                    let wait = at.duration_since(world.now).as_millis().max(20);
                    c.clock.now() + u64::try_from(wait).unwrap() + 10
                }
            });
        }
    }
    Some(c.clock.now() + 200)
}

fn version(migration: &ProcessMigration) -> u64 {
    migration
        .metadata
        .resource_version
        .as_deref()
        .and_then(|v| v.parse().ok())
        .unwrap_or(0)
}

fn newest(store: &Store, name: &str) -> Option<Arc<ProcessMigration>> {
    let watched = store.watched.borrow().get(name).cloned()?;
    let written = store.known.borrow().get(name).and_then(|k| k.newest.clone());
    match written {
        Some(written) if version(&written) > version(&watched) => Some(written),
        Some(_) | None => Some(watched),
    }
}

fn wrote(store: &Store, migration: Arc<ProcessMigration>) {
    let name = migration.metadata.name.clone().unwrap();
    store.known.borrow_mut().entry(name).or_default().newest = Some(migration);
}

async fn read_again(c: &Cluster, store: &Store, world: &World) -> Option<()> {
    let (name, uid) = (world.name().to_owned(), world.uid().to_owned());
    if let Some(found) = c.call(REQUEST, move |s| s.migration(&name, &uid)).await? {
        wrote(store, found);
    } else {
        store.watched.borrow_mut().remove(world.name());
    }
    Some(())
}

async fn read_pod(c: &Cluster, name: String) -> Observed<k8s_openapi::api::core::v1::Pod> {
    match c.call(REQUEST, move |s| s.pods.get(&name).cloned()).await {
        Some(Some(found)) => Observed::Present(found),
        Some(None) => Observed::Absent,
        None => Observed::Unknown,
    }
}

async fn observe(c: &Cluster, store: &Store, migration: Arc<ProcessMigration>, learned: Learned) -> World {
    let now = c.time();
    let halves = migration
        .status
        .as_ref()
        .map(|s| serde_json::to_string(&(&s.source, &s.target, &s.progress)).unwrap())
        .unwrap_or_default();
    let (last_change, first_seen) = {
        let mut known = store.known.borrow_mut();
        let known = known.entry(migration.metadata.name.clone().unwrap()).or_default();
        if known.halves.is_empty() {
            let unseen = migration.status.as_ref().is_none_or(|s| s.start_time.is_none());
            known.first_seen = unseen.then_some(now);
            known.halves = format!(" {halves}");
        } else if known.halves != format!(" {halves}") {
            known.halves = format!(" {halves}");
            known.changed = Some(now);
        }
        (known.changed, known.first_seen)
    };
    let mut world = World {
        now,
        migration: migration.clone(),
        source_pod: Observed::Unknown,
        target_pod: Observed::Unknown,
        nodes: Arc::new((0..NODES.len()).map(|n| node_view(c, n)).collect()),
        claims: BTreeMap::new(),
        others: Vec::new(),
        limits: Limits::default(),
        last_change,
        first_seen,
        learned,
    };
    if Server::is_finished(&migration) {
        return world;
    }
    world.source_pod = read_pod(c, migration.spec.pod_ref.name.clone()).await;
    let status = world.status();
    let recorded = status.target.as_ref().and_then(|t| t.pod_name.clone());
    world.target_pod = match (recorded, &world.source_pod) {
        (Some(name), _) => read_pod(c, name).await,
        (None, _) if status.attempt.is_none() => Observed::Absent,
        (None, Observed::Unknown) => Observed::Unknown,
        (None, Observed::Present(source)) => {
            let original = target_pod::original_name(source);
            read_pod(c, target_pod::name(pod::name(source), Some(&original), world.uid())).await
        }
        (None, Observed::Absent) => {
            let uid = world.uid().to_owned();
            let list = c
                .call(REQUEST, move |s| {
                    s.pods.values().find(|p| pod::is_controlled_by(p, &uid)).cloned()
                })
                .await;
            list.map_or(Observed::Unknown, |found| {
                found.map_or(Observed::Absent, Observed::Present)
            })
        }
    };
    // Reads take their time, the decision's clock is the observation's.
    world
}

fn node_view(c: &Cluster, n: usize) -> NodeView {
    let lease = c.server.borrow().leases.get(&n).copied();
    let ok = |type_| condition::build(&[], type_, Status::True, Reason::Accepted, "", None, c.time());
    NodeView {
        name: NODES[n].to_owned(),
        exists: true,
        ready: c.is_kubelet_ready(n),
        cordoned: false,
        labels: BTreeMap::new(),
        migration_node: Some((
            MigrationNodeSpec {
                schedulable: true,
                max_inbound: None,
                max_outbound: None,
            },
            MigrationNodeStatus {
                architecture: Some("x86_64".to_owned()),
                cpu: Some(crds::migration_node::CpuStatus::default()),
                protocol_versions: vec![1],
                checkpoint_limit_bytes: Some(1_000_000_000),
                conditions: vec![
                    ok(crds::migration_node::cond::READY),
                    ok(crds::migration_node::cond::COMPATIBLE),
                ],
                ..Default::default()
            },
        )),
        heartbeat: match lease {
            None => Heartbeat::Missing,
            some if c.is_fresh(some) => Heartbeat::Fresh,
            Some(_) => Heartbeat::Stale,
        },
    }
}

fn outcome(store: &Store, result: Option<Result<Arc<ProcessMigration>, Refused>>) -> Result<(), Stop> {
    match result {
        Some(Ok(written)) => {
            wrote(store, written);
            Ok(())
        }
        Some(Err(_)) => Err(Stop::Raced),
        None => Err(Stop::Unknown),
    }
}

async fn act(
    c: &Cluster,
    store: &Store,
    world: &World,
    effects: Effects,
    learned: &mut Learned,
    done: &mut bool,
) -> Result<(), Stop> {
    let Effects {
        finalizer,
        open_decision,
        abort,
        try_target,
        create_target,
        hand_over,
        delete_source,
        delete_target,
        delete_migration,
    } = effects;
    let id = || (world.name().to_owned(), world.uid().to_owned());
    let current = || newest(store, world.name()).and_then(|m| m.metadata.resource_version.clone());
    if let Some(change) = finalizer {
        let (name, uid) = id();
        let version = world.migration.metadata.resource_version.clone();
        let sent = c.call(REQUEST, move |s| {
            s.change(&name, &uid, |m| {
                if m.metadata.resource_version != version {
                    return Err(Refused::Conflict);
                }
                m.metadata.finalizers = match change {
                    FinalizerChange::Add => Some(vec![FINALIZER.to_owned()]),
                    FinalizerChange::Remove => None,
                };
                Ok(())
            })
        });
        outcome(store, sent.await)?;
        *done = true;
        if change == FinalizerChange::Remove && world.is_deleting() {
            return Err(Stop::Gone);
        }
    }
    if open_decision {
        let ((name, uid), version) = (id(), current());
        let sent = c.call(REQUEST, move |s| {
            s.change(&name, &uid, |m| {
                if m.metadata.resource_version != version {
                    return Err(Refused::Conflict);
                }
                m.status.get_or_insert_default().decision = Some(Decision {
                    value: DecisionValue::Undecided,
                    by: None,
                    reason: None,
                    message: None,
                    time: None,
                });
                Ok(())
            })
        });
        outcome(store, sent.await)?;
        *done = true;
    }
    if let Some(cause) = abort {
        let ((name, uid), at) = (id(), c.time());
        c.say(format!(
            "the operator aborts: {} {}",
            cause.reason.as_str(),
            cause.message
        ));
        let why = Failure {
            reason: cause.reason.as_str().to_owned(),
            message: cause.message,
        };
        let sent = c.call(REQUEST, move |s| {
            s.decide((&name, &uid), DecisionValue::Aborted, Party::Operator, &why, None, at)
        });
        outcome(store, sent.await)?;
        *done = true;
    }
    if let Some(target) = try_target {
        learned.dry_run = Some(Ok(target));
        *done = true;
    }
    if let Some(target) = create_target {
        let at = c.time();
        match c.call(REQUEST, move |s| s.create_pod(*target, at)).await {
            Some(Ok(())) => *done = true,
            Some(Err(_)) => return Err(Stop::Raced),
            None => return Err(Stop::Unknown),
        }
    }
    if let Some(to) = hand_over {
        let sent = c.call(REQUEST, move |s| {
            let same = s.pods.get(&to.name).is_some_and(|p| {
                pod::uid(p) == to.uid && p.metadata.resource_version.as_deref() == Some(&to.resource_version)
            });
            if !same {
                return Err(Refused::Conflict);
            }
            s.change_pod(&to.name, &to.uid, |p| {
                p.metadata.labels.get_or_insert_default().extend(to.labels);
                p.metadata.owner_references = Some(to.owners);
                p.metadata.annotations.get_or_insert_default().remove(ANNOTATION_LABELS);
            })
        });
        match sent.await {
            Some(Ok(())) => *done = true,
            Some(Err(_)) => return Err(Stop::Raced),
            None => return Err(Stop::Unknown),
        }
    }
    for victim in [delete_source, delete_target].into_iter().flatten() {
        let at = Some(Time(c.time()));
        c.say(format!(
            "the operator deletes {} with grace {:?}",
            victim.name, victim.grace
        ));
        let sent = c.call(REQUEST, move |s| {
            if s.pods.get(&victim.name).is_none_or(|p| pod::uid(p) != victim.uid) {
                return Err(Refused::NotFound);
            }
            s.delete_pod(&victim.name, victim.grace, at);
            Ok(())
        });
        match sent.await {
            Some(Ok(())) => *done = true,
            Some(Err(_)) => return Err(Stop::Raced),
            None => return Err(Stop::Unknown),
        }
    }
    if delete_migration {
        return Err(Stop::Gone);
    }
    Ok(())
}
