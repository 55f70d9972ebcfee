//! The operator's part of a status: what it applies, always as a whole, since server-side apply removes what a manager
//! leaves out. Fields and conditions of the agents never stand here.

use crds::Reason;
use crds::condition::{self, Status};
use crds::process_migration::{
    ActiveOn, Effective, Eligibility, MigrationResult, Phase, ProcessMigrationStatus, ResidualDependency, cond,
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use serde::Serialize;

/// Conditions that the operator writes.
pub const OWN: &[&str] = &[
    cond::ACCEPTED,
    cond::ADMITTED,
    cond::COMMITTED,
    cond::RESIDUAL_FREE,
    cond::SUCCEEDED,
    cond::FINISHED,
    cond::STALLED,
];

/// The operator's part of a status.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct View {
    /// Generation of the spec that was looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// For display.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// Where the processes are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub active_on: Option<ActiveOn>,
    /// The attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
    /// When the object was first seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When it was settled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// Settings in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub effective: Option<Effective>,
    /// All checks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eligibility: Option<Eligibility>,
    /// The source pod.
    #[serde(skip_serializing_if = "PodIdentity::is_empty")]
    pub source: PodIdentity,
    /// The target pod.
    #[serde(skip_serializing_if = "PodIdentity::is_empty")]
    pub target: PodIdentity,
    /// Figures.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<MigrationResult>,
    /// What still depends on the source node.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub residual_dependencies: Vec<ResidualDependency>,
    /// Our conditions.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    #[serde(skip)]
    generation: Option<i64>,
    #[serde(skip)]
    now: Timestamp,
}

/// The three fields of a half that are the operator's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodIdentity {
    /// Node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// Pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_name: Option<String>,
    /// Its uid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
}

impl PodIdentity {
    fn is_empty(&self) -> bool {
        *self == PodIdentity::default()
    }
}

impl View {
    /// The operator's part of what is stored.
    #[must_use]
    pub fn stored(status: &ProcessMigrationStatus, generation: Option<i64>, now: Timestamp) -> View {
        View {
            observed_generation: status.observed_generation,
            phase: status.phase,
            active_on: status.active_on,
            attempt: status.attempt,
            start_time: status.start_time.clone(),
            completion_time: status.completion_time.clone(),
            effective: status.effective.clone(),
            eligibility: status.eligibility.clone(),
            source: status
                .source
                .as_ref()
                .map(|s| PodIdentity {
                    node_name: s.node_name.clone(),
                    pod_name: s.pod_name.clone(),
                    pod_uid: s.pod_uid.clone(),
                })
                .unwrap_or_default(),
            target: status
                .target
                .as_ref()
                .map(|t| PodIdentity {
                    node_name: t.node_name.clone(),
                    pod_name: t.pod_name.clone(),
                    pod_uid: t.pod_uid.clone(),
                })
                .unwrap_or_default(),
            result: status.result.clone(),
            residual_dependencies: status.residual_dependencies.clone(),
            conditions: status
                .conditions
                .iter()
                .filter(|c| OWN.contains(&c.type_.as_str()))
                .cloned()
                .collect(),
            generation,
            now,
        }
    }

    /// Sets a condition; its transition time is kept while its status is the same.
    pub fn set(&mut self, type_: &str, status: Status, reason: Reason, message: &str) {
        debug_assert!(OWN.contains(&type_), "{type_} is not the operator's");
        let new = condition::build(
            &self.conditions,
            type_,
            status,
            reason,
            message,
            self.generation,
            self.now,
        );
        match self.conditions.iter_mut().find(|c| c.type_ == type_) {
            Some(old) => {
                if !condition::same(old, &new) {
                    *old = new;
                }
            }
            None => self.conditions.push(new),
        }
    }

    /// Takes a condition back.
    pub fn unset(&mut self, type_: &str) {
        self.conditions.retain(|c| c.type_ != type_);
    }

    /// Notes the generation of the spec that this view is about.
    pub fn observe_generation(&mut self) {
        self.observed_generation = self.generation;
    }

    /// Ends the migration. The conditions that say so come last, in one write with everything else.
    pub fn finish(&mut self, phase: Phase, succeeded: bool, reason: Reason, message: &str) {
        self.phase = Some(phase);
        self.completion_time = Some(Time(self.now));
        self.unset(cond::STALLED);
        self.set(cond::SUCCEEDED, Status::from(succeeded), reason, message);
        self.set(cond::FINISHED, Status::True, reason, message);
    }

    /// What the API server makes of an apply of this view.
    #[cfg(test)]
    pub fn write_into(&self, status: &mut ProcessMigrationStatus) {
        status.observed_generation = self.observed_generation;
        status.phase = self.phase;
        status.active_on = self.active_on;
        status.attempt = self.attempt;
        status.start_time.clone_from(&self.start_time);
        status.completion_time.clone_from(&self.completion_time);
        status.effective.clone_from(&self.effective);
        status.eligibility.clone_from(&self.eligibility);
        let source = status.source.get_or_insert_default();
        source.node_name.clone_from(&self.source.node_name);
        source.pod_name.clone_from(&self.source.pod_name);
        source.pod_uid.clone_from(&self.source.pod_uid);
        let target = status.target.get_or_insert_default();
        target.node_name.clone_from(&self.target.node_name);
        target.pod_name.clone_from(&self.target.pod_name);
        target.pod_uid.clone_from(&self.target.pod_uid);
        status.result.clone_from(&self.result);
        status.residual_dependencies.clone_from(&self.residual_dependencies);
        status.conditions.retain(|c| !OWN.contains(&c.type_.as_str()));
        status.conditions.extend(self.conditions.iter().cloned());
    }
}
