//! Status of a migration. One writer per part: the operator, the source's agent ([`SourceStatus`] but for the three
//! identifying fields, conditions [`cond::SOURCE`]), the target's agent ([`TargetStatus`] likewise, [`cond::TARGET`]).
//! [`Decision`] alone has several writers and changes only by compare-and-swap.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Connections, StrategyType};

/// Types of conditions.
pub mod cond {
    /// The spec is understood and the pod was found. Operator.
    pub const ACCEPTED: &str = "Accepted";
    /// The checks passed and the limits allow it: agents may act. Operator.
    pub const ADMITTED: &str = "Admitted";
    /// Sandbox, volumes and shepherds of the target pod stand. Target's agent.
    pub const TARGET_READY: &str = "TargetReady";
    /// All images are on the target. Source's agent.
    pub const MEMORY_SYNCED: &str = "MemorySynced";
    /// Every container is restored on the target and held. Target's agent.
    pub const RESTORED: &str = "Restored";
    /// The decision is Committed. Operator.
    pub const COMMITTED: &str = "Committed";
    /// The released source is gone from its node; or the source runs again after an abort (status `False`). Source's agent.
    pub const SOURCE_RELEASED: &str = "SourceReleased";
    /// Nothing on the source node is needed any more. Operator.
    pub const RESIDUAL_FREE: &str = "ResidualFree";
    /// The end result. Operator.
    pub const SUCCEEDED: &str = "Succeeded";
    /// Settled, whichever way: nothing will change any more. Operator.
    pub const FINISHED: &str = "Finished";
    /// Something is waited for longer than usual; the message says what. Operator.
    pub const STALLED: &str = "Stalled";

    /// Written by the source's agent only.
    pub const SOURCE: &[&str] = &[MEMORY_SYNCED, SOURCE_RELEASED];
    /// Written by the target's agent only.
    pub const TARGET: &[&str] = &[TARGET_READY, RESTORED];
}

/// What has happened so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProcessMigrationStatus {
    /// Generation of the spec that the operator has seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// For display only; conditions and the decision say what is so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// Where the processes are right now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_on: Option<ActiveOn>,
    /// Number of the attempt; raised before an agent is told. Reports of older attempts are dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
    /// When the operator first saw the object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When it was settled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// The point of no return.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision: Option<Decision>,
    /// Settings as resolved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effective: Option<Effective>,
    /// Whether the pod can be moved: every check, each refusal with its remedy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eligibility: Option<Eligibility>,
    /// The source half.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceStatus>,
    /// The target half.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<TargetStatus>,
    /// How far the copy is. Written by the source's agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Figures of a committed move. Written by the operator from both halves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<MigrationResult>,
    /// What still depends on the source node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub residual_dependencies: Vec<ResidualDependency>,
    /// See [`cond`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// For display only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Being checked.
    #[default]
    Pending,
    /// Waiting for its turn.
    Queued,
    /// The target pod is being made.
    Preparing,
    /// Memory is being copied while the pod runs.
    Copying,
    /// The pod is frozen and being dumped.
    Freezing,
    /// The pod is being rebuilt on the target.
    Restoring,
    /// The decision is being taken.
    Committing,
    /// The target runs; the source is being ended.
    Finalizing,
    /// The pod runs on the target.
    Succeeded,
    /// The attempt failed before the commit; the source runs.
    RolledBack,
    /// The user gave up before the commit; the source runs.
    Canceled,
    /// Refused before anything was touched, or lost with its node.
    Failed,
}

impl Phase {
    /// As it stands in the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Pending => "Pending",
            Phase::Queued => "Queued",
            Phase::Preparing => "Preparing",
            Phase::Copying => "Copying",
            Phase::Freezing => "Freezing",
            Phase::Restoring => "Restoring",
            Phase::Committing => "Committing",
            Phase::Finalizing => "Finalizing",
            Phase::Succeeded => "Succeeded",
            Phase::RolledBack => "RolledBack",
            Phase::Canceled => "Canceled",
            Phase::Failed => "Failed",
        }
    }

    /// Whether nothing will change any more.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(
            self,
            Phase::Succeeded | Phase::RolledBack | Phase::Canceled | Phase::Failed
        )
    }
}

/// Where the processes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ActiveOn {
    /// On the source node.
    Source,
    /// On the target node.
    Target,
    /// Nowhere: the pod was deleted.
    None,
}

/// The point of no return: `Undecided` once to `Committed` or `Aborted`, by compare-and-swap.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("oldSelf.value == 'Undecided' || self.value == oldSelf.value", "a decision is final"))]
pub struct Decision {
    /// The value.
    pub value: DecisionValue,
    /// Who decided: `Operator`, `Source` or `Target`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<Party>,
    /// Why it was aborted: a [`crate::Reason`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// One sentence that names the cause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// When.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<Time>,
}

/// Value of the decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DecisionValue {
    /// Both ways are open.
    Undecided,
    /// The target runs, the source never again.
    Committed,
    /// The source runs, the target never.
    Aborted,
}

/// Who wrote something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Party {
    /// The operator.
    Operator,
    /// The source's agent.
    Source,
    /// The target's agent.
    Target,
}

/// Settings as resolved from the spec (and later from policies).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Effective {
    /// Strategy in force.
    pub strategy: StrategyType,
    /// Connections in force.
    pub connections: Connections,
    /// Longest freeze in milliseconds: the least of the spec's and what the pod's probes allow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_freeze_milliseconds: Option<u32>,
}

/// Result of all checks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Eligibility {
    /// Whether the pod can be moved as asked.
    pub eligible: bool,
    /// Every check.
    #[serde(default)]
    pub checks: Vec<Check>,
    /// Nodes that could take the pod (before the scheduler's own rules).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub candidate_nodes: Vec<String>,
    /// Predicted freeze in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_freeze_milliseconds: Option<u32>,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// What was looked at, for example `volumes`, `sockets`.
    pub name: String,
    /// The verdict.
    pub verdict: Verdict,
    /// The container it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// The node whose agent looked, or that was compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// A [`crate::Reason`] where the verdict is not `Passed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// One sentence that names the thing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// What the user can do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// Verdict of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Verdict {
    /// Nothing in the way.
    Passed,
    /// Allowed; something will be lost or different.
    Warning,
    /// Not possible.
    Refused,
}

/// The source half. `nodeName`, `podName`, `podUid` are the operator's, all else the source's agent's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SourceStatus {
    /// The source node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// The source pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_name: Option<String>,
    /// Its uid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
    /// Attempt for which `checks` was written; the preflight is complete when it equals `status.attempt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checked_attempt: Option<u32>,
    /// What the agent found in the pod's processes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<Check>,
    /// Memory of the pod's processes to be moved, in bytes, at the time of the preflight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<i64>,
    /// Freeze predicted by the preflight, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_freeze_milliseconds: Option<u32>,
    /// The step that the agent is in, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// Freeze until all images were written, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dump_milliseconds: Option<u32>,
    /// Freeze until the target had everything, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sent_milliseconds: Option<u32>,
    /// Freeze until the target was known to run (or the source to run again), in milliseconds, by the source's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_milliseconds: Option<u32>,
    /// Bytes sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_sent: Option<i64>,
    /// Connections that were closed because they could not be kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections_closed: Option<u32>,
    /// Why the agent's part failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

/// The target half. `nodeName`, `podName`, `podUid` are the operator's, all else the target's agent's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TargetStatus {
    /// The target node, once the scheduler has chosen it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// The target pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_name: Option<String>,
    /// Its uid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
    /// The step that the agent is in, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    /// From the announcement of the freeze until the processes were thawed, in milliseconds, by the target's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_milliseconds: Option<u32>,
    /// From the announcement of the freeze until everything had arrived, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub received_milliseconds: Option<u32>,
    /// Restore of all containers, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore_milliseconds: Option<u32>,
    /// The write of the decision, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit_milliseconds: Option<u32>,
    /// How far the memory is put in place, which happens while the pod runs already. Absent where it was all there before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filling: Option<Filling>,
    /// True when nothing of the target is left on the node after an abort.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destroyed: Option<bool>,
    /// Why the agent's part failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

/// How far the memory of a pod that runs already is put in place. It comes from the target node itself: the source is not needed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Filling {
    /// Bytes that were to be put in place.
    #[serde(default)]
    pub total_bytes: i64,
    /// Bytes that are not in place yet.
    #[serde(default)]
    pub remaining_bytes: i64,
    /// Pages that the pod has waited for.
    #[serde(default)]
    pub page_faults: i64,
    /// The longest that it waited for one, in microseconds.
    #[serde(default)]
    pub longest_fault_microseconds: i64,
    /// How often the program that does it was killed and started again.
    #[serde(default)]
    pub restarts: i64,
    /// From the end of the restore until all was in place, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub milliseconds: Option<i64>,
}

/// A failure of an agent's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Failure {
    /// A [`crate::Reason`].
    pub reason: String,
    /// One sentence that names the cause.
    pub message: String,
}

/// How far the copy is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// Round of the pre-copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round: Option<u32>,
    /// Bytes sent so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transferred_bytes: Option<i64>,
    /// Bytes still to be sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remaining_bytes: Option<i64>,
    /// Bytes per second that the pod writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_bytes_per_second: Option<i64>,
    /// Bytes per second that are sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer_bytes_per_second: Option<i64>,
    /// Predicted freeze in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_freeze_milliseconds: Option<u32>,
    /// When the move is expected to be complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_completion_time: Option<Time>,
}

/// Figures of a committed move.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MigrationResult {
    /// No instruction of the workload ran for this long, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_milliseconds: Option<u32>,
    /// Part of it: dump on the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dump_milliseconds: Option<u32>,
    /// Part of it: what of the copy was not hidden behind the dump.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer_milliseconds: Option<u32>,
    /// Part of it: restore on the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore_milliseconds: Option<u32>,
    /// Part of it: the write of the decision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit_milliseconds: Option<u32>,
    /// From the creation of the object until it was settled, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_milliseconds: Option<i64>,
    /// Bytes sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<i64>,
    /// Rounds of the pre-copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rounds: Option<u32>,
    /// Connections that were kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections_preserved: Option<u32>,
    /// Connections that were closed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections_closed: Option<u32>,
    /// Whether processes moved with their memory. `false` for strategy `Cold`: never a live move.
    #[serde(default)]
    pub live: bool,
}

/// Something that still depends on the source node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ResidualDependency {
    /// `Pages`, `Connections`, `Volume` or `Logs`.
    pub kind: String,
    /// The node that is still needed.
    pub node: String,
    /// What for.
    pub detail: String,
    /// Since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
}
