//! `ProcessMigration` (namespaced, `pmig`): one attempt to move one pod.
//!
//! The spec is immutable but for `desiredState` (one-way) and the TTL; a field that may be absent cannot be added or
//! removed either, because a transition rule on a field is not evaluated when the field comes or goes.

#![expect(unreachable_pub, reason = "the derive KubeSchema makes a private twin of each type")]

mod status;

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use status::*;

/// Rule on `spec`: an optional field that never changes.
macro_rules! immutable_optional {
    ($field:literal) => {
        concat!(
            "has(self.",
            $field,
            ") == has(oldSelf.",
            $field,
            ") && (!has(self.",
            $field,
            ") || self.",
            $field,
            " == oldSelf.",
            $field,
            ")"
        )
    };
}

/// What is to be moved, where to and how.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "peregrine.dev",
    version = "v1alpha1",
    kind = "ProcessMigration",
    plural = "processmigrations",
    shortname = "pmig",
    category = "peregrine",
    namespaced,
    status = "ProcessMigrationStatus",
    derive = "PartialEq",
    selectable = ".spec.podRef.name",
    selectable = ".status.source.nodeName",
    selectable = ".status.target.nodeName",
    printcolumn = r#"{"name":"Pod","type":"string","jsonPath":".spec.podRef.name"}"#,
    printcolumn = r#"{"name":"From","type":"string","jsonPath":".status.source.nodeName"}"#,
    printcolumn = r#"{"name":"To","type":"string","jsonPath":".status.target.nodeName"}"#,
    printcolumn = r#"{"name":"Phase","type":"string","jsonPath":".status.phase"}"#,
    printcolumn = r#"{"name":"Active-On","type":"string","jsonPath":".status.activeOn"}"#,
    printcolumn = r#"{"name":"Freeze-ms","type":"integer","jsonPath":".status.result.freezeMilliseconds"}"#,
    printcolumn = r#"{"name":"Moved-Pod","type":"string","priority":1,"jsonPath":".status.target.podName"}"#,
    printcolumn = r#"{"name":"Strategy","type":"string","priority":1,"jsonPath":".spec.strategy.type"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type=='Finished')].reason"}"#,
    printcolumn = r#"{"name":"Message","type":"string","priority":1,"jsonPath":".status.conditions[?(@.type=='Finished')].message"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    validation = Rule::new("!has(oldSelf.status) || !has(oldSelf.status.decision) || (has(self.status) && has(self.status.decision))").message("a decision cannot be removed"),
    validation = Rule::new("!has(self.status) || !has(self.status.decision) || self.status.decision.value != 'Committed' || (has(oldSelf.status) && has(oldSelf.status.decision) && (oldSelf.status.decision.value == 'Committed' || (has(self.status.conditions) && self.status.conditions.exists(c, c.type == 'Restored' && c.status == 'True'))))").message("only an undecided migration whose condition Restored is True can be committed")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = ("self.podRef.name == oldSelf.podRef.name && (!has(oldSelf.podRef.uid) || (has(self.podRef.uid) && self.podRef.uid == oldSelf.podRef.uid))", "podRef is immutable; only uid may be added once"),
    validation = (immutable_optional!("target"), "target is immutable: cancel this migration and create another"),
    validation = (immutable_optional!("strategy"), "strategy is immutable: cancel this migration and create another"),
    validation = (immutable_optional!("connections"), "connections is immutable"),
    validation = (immutable_optional!("maxFreezeMilliseconds"), "maxFreezeMilliseconds is immutable"),
    validation = (immutable_optional!("progressTimeoutSeconds"), "progressTimeoutSeconds is immutable"),
    validation = (immutable_optional!("activeDeadlineSeconds"), "activeDeadlineSeconds is immutable"),
    validation = (immutable_optional!("dryRun"), "dryRun is immutable"),
    validation = ("self.desiredState == oldSelf.desiredState || (oldSelf.desiredState == 'Migrated' && self.desiredState == 'Canceled')", "desiredState can only go from Migrated to Canceled")
)]
pub struct ProcessMigrationSpec {
    /// The pod to move, in the migration's own namespace.
    pub pod_ref: PodRef,
    /// Where to. Absent: the scheduler chooses among the compatible nodes. It may only narrow what the pod itself allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<TargetRef>,
    /// How the memory is moved.
    #[serde(default)]
    pub strategy: Strategy,
    /// What happens to established connections.
    #[serde(default)]
    pub connections: Connections,
    /// Refuse to freeze when the prediction is longer, in milliseconds. Absent: no limit but that of the pod's probes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3_600_000))]
    pub max_freeze_milliseconds: Option<u32>,
    /// Abort when nothing progresses for this long, in seconds.
    #[serde(default = "default_progress_timeout")]
    #[schemars(range(min = 5, max = 86_400))]
    pub progress_timeout_seconds: u32,
    /// Abort when the whole attempt has not committed after this long, in seconds.
    #[serde(default = "default_active_deadline")]
    #[schemars(range(min = 10, max = 604_800))]
    pub active_deadline_seconds: u32,
    /// Delete this object so many seconds after it has finished. Absent: never. May be changed at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub ttl_seconds_after_finished: Option<u32>,
    /// Run every check, write the report, move nothing.
    #[serde(default)]
    pub dry_run: bool,
    /// `Canceled` aborts the attempt; it works until the commit.
    #[serde(default)]
    pub desired_state: DesiredState,
}

fn default_progress_timeout() -> u32 {
    60
}

fn default_active_deadline() -> u32 {
    600
}

/// Names the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PodRef {
    /// Name of the pod.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Uid of the pod: optional, binding once given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    pub uid: Option<String>,
}

/// Narrows the choice of the target node.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.nodeName) != has(self.nodeSelector)", "set exactly one of nodeName and nodeSelector"))]
pub struct TargetRef {
    /// Name of the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub node_name: Option<String>,
    /// Labels that the node must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minProperties" = 1, "maxProperties" = 32))]
    pub node_selector: Option<BTreeMap<String, String>>,
}

/// How the memory is moved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Strategy {
    /// The strategy; each will have its own options beside it.
    #[serde(rename = "type", default)]
    pub type_: StrategyType,
}

/// The strategies. `PostCopy` and `Hybrid` are not available in this version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum StrategyType {
    /// Non-preemptive: a new start on the target; the old one ends only after the new one is Ready. Memory is lost.
    Cold,
    /// Freeze, copy everything, restore, commit.
    StopAndCopy,
    /// Copy memory in rounds while the pod runs, then freeze for the rest. Where the source's kernel cannot note what is written
    /// meanwhile, `StopAndCopy` takes its place.
    #[default]
    PreCopy,
    /// Freeze, move the state without memory, fetch pages afterwards.
    PostCopy,
    /// Rounds first, then fetch what never converges.
    Hybrid,
}

impl StrategyType {
    /// As it stands in the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            StrategyType::Cold => "Cold",
            StrategyType::StopAndCopy => "StopAndCopy",
            StrategyType::PreCopy => "PreCopy",
            StrategyType::PostCopy => "PostCopy",
            StrategyType::Hybrid => "Hybrid",
        }
    }
}

/// What happens to established connections with peers outside the pod. Connections inside the pod and listeners stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Connections {
    /// Refuse to move a pod whose connections cannot be kept.
    Preserve,
    /// Keep what can be kept, close the rest.
    #[default]
    BestEffort,
    /// Close them all; programs see a reset connection.
    Close,
}

/// What the user wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum DesiredState {
    /// Move the pod.
    #[default]
    Migrated,
    /// Give up, as long as nothing is committed.
    Canceled,
}
