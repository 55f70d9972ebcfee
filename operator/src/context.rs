//! What all passes share.

use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

use crds::condition::is_true;
use crds::process_migration::{Phase, cond};
use crds::{ProcessMigration, names};
use jiff::{SignedDuration, Timestamp};
use kube::runtime::reflector::Store;
use kube::{Client, ResourceExt};
use tokio::sync::{Notify, watch};

use crate::decide::{Limits, Other};
use crate::events::Events;
use crate::metrics::Metrics;
use crate::nodes::Nodes;

/// What all passes share.
pub struct Context {
    /// The API.
    pub client: Client,
    /// Every migration, as the watch last delivered it.
    pub migrations: Store<ProcessMigration>,
    /// Every node.
    pub nodes: Arc<Nodes>,
    /// Limits of moves at once.
    pub limits: Limits,
    /// Whether this replica may act.
    pub leading: watch::Receiver<bool>,
    /// Wakes every migration: something that concerns more than one has changed.
    pub kick: Arc<Notify>,
    /// Where events go.
    pub events: Events,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// Held while a migration is accepted or admitted, so that two passes cannot both take the last slot.
    pub admission: tokio::sync::Mutex<()>,
    /// What this process knows beyond the API.
    pub memory: Mutex<HashMap<String, Memory>>,
}

/// What this process knows of one migration beyond what the watch has delivered.
#[derive(Clone, Debug)]
pub struct Memory {
    /// The object as our last write returned it: newer than the watch for a few milliseconds.
    pub newest: Option<Arc<ProcessMigration>>,
    /// When it was first seen, if nobody had seen it before.
    pub first_seen: Option<Timestamp>,
    /// When an agent's half last changed, as seen here.
    pub changed: Option<Timestamp>,
    /// When the object was last known to be the newest: a watch delivered another version, or we read or wrote it.
    pub confirmed: Timestamp,
    version: u64,
    halves: u64,
    touched: Timestamp,
}

impl Context {
    /// Whether this replica may act.
    #[must_use]
    pub fn leads(&self) -> bool {
        *self.leading.borrow()
    }

    /// Whether all watches have delivered their first list.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.nodes.is_synced()
    }

    /// The newer of what the watch and our own writes delivered.
    #[must_use]
    pub fn newest(&self, watched: Arc<ProcessMigration>) -> Arc<ProcessMigration> {
        let memory = self.lock();
        match watched
            .uid()
            .and_then(|uid| memory.get(&uid).and_then(|m| m.newest.clone()))
        {
            Some(written) if version(&written) > version(&watched) => written,
            Some(_) | None => watched,
        }
    }

    /// Notes what a write returned.
    pub fn wrote(&self, migration: Arc<ProcessMigration>) {
        let now = Timestamp::now();
        if let Some(uid) = migration.uid() {
            let mut memory = self.lock();
            let entry = memory.entry(uid).or_insert_with(|| Memory::new(now));
            entry.touched = now;
            entry.confirmed = now;
            entry.version = version(&migration);
            entry.newest = Some(migration);
        }
    }

    /// Notes that a migration was looked at, and tells when it was first seen and when an agent last wrote.
    pub fn saw(&self, migration: &ProcessMigration, now: Timestamp) -> Memory {
        let Some(uid) = migration.uid() else {
            return Memory::new(now);
        };
        let halves = fingerprint(migration);
        let mut memory = self.lock();
        let is_new = !memory.contains_key(&uid);
        let entry = memory.entry(uid).or_insert_with(|| Memory::new(now));
        entry.touched = now;
        if entry.version != version(migration) {
            entry.version = version(migration);
            entry.confirmed = now;
        }
        if is_new {
            entry.halves = halves;
            let unseen = migration.status.as_ref().is_none_or(|s| s.start_time.is_none());
            entry.first_seen = unseen.then_some(now);
        } else if entry.halves != halves {
            entry.halves = halves;
            entry.changed = Some(now);
        }
        entry.clone()
    }

    /// Forgets migrations that are gone.
    pub fn forget_the_gone(&self, now: Timestamp) {
        let present: BTreeSet<String> = self.migrations.state().iter().filter_map(|m| m.uid()).collect();
        self.lock()
            .retain(|uid, m| present.contains(uid) || now.duration_since(m.touched) < SignedDuration::from_mins(1));
    }

    /// The unfinished migrations but `me`, with our own writes in.
    #[must_use]
    pub fn others(&self, me: &str) -> Vec<Other> {
        self.migrations
            .state()
            .into_iter()
            .filter(|m| m.metadata.uid.as_deref() != Some(me))
            .map(|m| self.newest(m))
            .filter(|m| !is_finished(m))
            .map(|m| other(&m))
            .collect()
    }

    /// Counts the unfinished migrations by phase, for a scrape.
    pub fn count_phases(&self) {
        let all = self.migrations.state();
        for phase in [
            Phase::Pending,
            Phase::Queued,
            Phase::Preparing,
            Phase::Copying,
            Phase::Freezing,
            Phase::Restoring,
            Phase::Committing,
            Phase::Finalizing,
        ] {
            let count = all
                .iter()
                .filter(|m| !is_finished(m) && m.status.as_ref().and_then(|s| s.phase).unwrap_or_default() == phase)
                .count();
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            self.metrics
                .set("peregrine_migrations", &[("phase", phase.as_str())], f64::from(count));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Memory>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Memory {
    fn new(now: Timestamp) -> Memory {
        Memory {
            newest: None,
            first_seen: None,
            changed: None,
            confirmed: now,
            version: 0,
            halves: 0,
            touched: now,
        }
    }
}

/// Whether a migration is settled.
#[must_use]
pub fn is_finished(migration: &ProcessMigration) -> bool {
    migration
        .status
        .as_ref()
        .is_some_and(|s| is_true(&s.conditions, cond::FINISHED))
}

/// Resource versions of one kind of object can be compared as numbers; what is none counts as oldest.
#[must_use]
pub fn version(migration: &ProcessMigration) -> u64 {
    migration
        .metadata
        .resource_version
        .as_deref()
        .and_then(|v| v.parse().ok())
        .unwrap_or(0)
}

fn fingerprint(migration: &ProcessMigration) -> u64 {
    let mut hasher = DefaultHasher::new();
    if let Some(status) = &migration.status {
        for part in [
            serde_json::to_string(&status.source),
            serde_json::to_string(&status.target),
            serde_json::to_string(&status.progress),
        ]
        .into_iter()
        .flatten()
        {
            part.hash(&mut hasher);
        }
    }
    hasher.finish()
}

fn other(migration: &ProcessMigration) -> Other {
    let status = migration.status.clone().unwrap_or_default();
    let namespace = migration.namespace().unwrap_or_default();
    let target = status.target.clone().unwrap_or_default();
    let target_nodes = match target.node_name {
        Some(node) => BTreeSet::from([node]),
        None => status
            .eligibility
            .iter()
            .flat_map(|e| e.candidate_nodes.iter().cloned())
            .collect(),
    };
    Other {
        name: format!("{namespace}/{}", migration.name_any()),
        namespace,
        uid: migration.uid().unwrap_or_default(),
        pod: migration.spec.pod_ref.name.clone(),
        target_pod: target.pod_name,
        accepted: status.attempt.is_some(),
        admitted: is_true(&status.conditions, cond::ADMITTED),
        source_node: status.source.and_then(|s| s.node_name),
        target_nodes,
        deadline: status
            .start_time
            .map(|t| t.0 + SignedDuration::from_secs(i64::from(migration.spec.active_deadline_seconds))),
        queued: status.phase == Some(Phase::Queued),
    }
}

/// Label selector of the pods that are targets.
#[must_use]
pub fn target_selector(migration: &str) -> String {
    format!("{}={}", names::LABEL_MIGRATION, names::migration_label(migration))
}
