//! All that a decision may see.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crds::process_migration::StrategyType;
use crds::{MigrationNodeSpec, MigrationNodeStatus, ProcessMigration, ProcessMigrationStatus};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;

/// Something that was looked for. What could not be read is not absent.
#[derive(Clone, Debug, PartialEq)]
pub enum Observed<T> {
    /// It does not exist.
    Absent,
    /// It exists.
    Present(T),
    /// It could not be read.
    Unknown,
}

impl<T> Observed<T> {
    /// The value, where it exists.
    pub fn present(&self) -> Option<&T> {
        match self {
            Observed::Present(value) => Some(value),
            Observed::Absent | Observed::Unknown => None,
        }
    }
}

/// What was observed about one migration.
#[derive(Clone, Debug)]
pub struct World {
    /// The time of the observation.
    pub now: Timestamp,
    /// The migration, as read last.
    pub migration: Arc<ProcessMigration>,
    /// The pod of `spec.podRef.name`.
    pub source_pod: Observed<Pod>,
    /// The pod under the target pod's name (which follows from the migration's uid).
    pub target_pod: Observed<Pod>,
    /// Every node of the cluster.
    pub nodes: Arc<Vec<NodeView>>,
    /// Access modes of the claims that the source pod uses.
    pub claims: BTreeMap<String, Observed<Vec<String>>>,
    /// The unfinished migrations but this.
    pub others: Vec<Other>,
    /// Limits of moves at once.
    pub limits: Limits,
    /// When this process last saw an agent's half change. Absent after a restart.
    pub last_change: Option<Timestamp>,
    /// When this process first saw the object, where it was the first to see it: exact, unlike the times in the API.
    pub first_seen: Option<Timestamp>,
    /// What the API said to effects of this pass.
    pub learned: Learned,
}

/// Answers that lie in no object.
#[derive(Clone, Debug, Default)]
pub struct Learned {
    /// The API refused to create the target pod, with this message.
    pub create_refused: Option<String>,
    /// A dry-run create of the target pod: as it would be stored, or the refusal.
    pub dry_run: Option<Result<Box<Pod>, String>>,
}

/// Limits of moves at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// In the cluster.
    pub cluster: usize,
    /// From one node, where its MigrationNode does not say otherwise.
    pub outbound: usize,
    /// To one node, where its MigrationNode does not say otherwise.
    pub inbound: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            cluster: 5,
            outbound: 1,
            inbound: 2,
        }
    }
}

/// Heartbeat of a node's agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heartbeat {
    /// Renewed in time.
    Fresh,
    /// Not renewed in time.
    Stale,
    /// Never seen.
    Missing,
}

/// One node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeView {
    /// Its name.
    pub name: String,
    /// Whether the Node object exists.
    pub exists: bool,
    /// Whether its kubelet says Ready.
    pub ready: bool,
    /// Whether it is cordoned.
    pub cordoned: bool,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its MigrationNode.
    pub migration_node: Option<(MigrationNodeSpec, MigrationNodeStatus)>,
    /// Its agent's heartbeat.
    pub heartbeat: Heartbeat,
}

impl NodeView {
    /// Whether the node, or at least its agent, cannot be counted on any more: the object is gone or the heartbeat ended.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        !self.exists || self.heartbeat != Heartbeat::Fresh
    }

    /// Whether the whole node is down, not only our agent on it.
    #[must_use]
    pub fn is_down(&self) -> bool {
        !self.exists || (self.heartbeat != Heartbeat::Fresh && !self.ready)
    }
}

/// Another unfinished migration.
#[derive(Clone, Debug, PartialEq)]
pub struct Other {
    /// `namespace/name`.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Its uid.
    pub uid: String,
    /// The pod that it moves.
    pub pod: String,
    /// The target pod that it made.
    pub target_pod: Option<String>,
    /// Whether it was accepted: of two for one pod, the first that was goes on.
    pub accepted: bool,
    /// Whether it takes up a slot.
    pub admitted: bool,
    /// Its source node.
    pub source_node: Option<String>,
    /// The node it goes to, or may go to while the scheduler has not chosen.
    pub target_nodes: BTreeSet<String>,
    /// When its time is up: the order of admission.
    pub deadline: Option<Timestamp>,
    /// Whether it waits for a slot.
    pub queued: bool,
}

impl World {
    /// The status as stored.
    #[must_use]
    pub fn status(&self) -> ProcessMigrationStatus {
        self.migration.status.clone().unwrap_or_default()
    }

    /// Uid of the migration.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.migration.metadata.uid.as_deref().unwrap_or_default()
    }

    /// Name of the migration.
    #[must_use]
    pub fn name(&self) -> &str {
        self.migration.metadata.name.as_deref().unwrap_or_default()
    }

    /// Whether it is the cold strategy.
    #[must_use]
    pub fn is_cold(&self) -> bool {
        self.migration.spec.strategy.type_ == StrategyType::Cold
    }

    /// The strategy in force: where the source's kernel cannot note what is written while the pod runs, its memory is copied in
    /// the freeze.
    #[must_use]
    pub fn strategy(&self) -> StrategyType {
        let asked = self.migration.spec.strategy.type_;
        if asked == StrategyType::PreCopy && !super::eligibility::untracked(self).is_empty() {
            StrategyType::StopAndCopy
        } else {
            asked
        }
    }

    /// Whether someone deletes the migration.
    #[must_use]
    pub fn is_deleting(&self) -> bool {
        self.migration.metadata.deletion_timestamp.is_some()
    }

    /// The node of this name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&NodeView> {
        self.nodes.iter().find(|n| n.name == name)
    }

    /// The longest wait without progress.
    #[must_use]
    pub fn progress_timeout(&self) -> SignedDuration {
        SignedDuration::from_secs(i64::from(self.migration.spec.progress_timeout_seconds))
    }

    /// The longest time until the decision.
    #[must_use]
    pub fn active_deadline(&self) -> SignedDuration {
        SignedDuration::from_secs(i64::from(self.migration.spec.active_deadline_seconds))
    }

    /// The longest wait for the end of an abort or of a commit. What remains then is reported, not waited for.
    #[must_use]
    pub fn settle_timeout(&self) -> SignedDuration {
        self.progress_timeout().max(SignedDuration::from_secs(120))
    }
}
