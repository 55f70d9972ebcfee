//! This node's half of the status, by server-side apply. One task writes it: sessions only change what it is to be, and go
//! on; inside a freeze nobody waits for the API server.
//!
//! An apply removes what it leaves out, so every write holds the whole half: what is stored is the start, also after a
//! restart of the agent. Nothing is written when nothing differs.
//!
//! While the pod is frozen a write comes once a second at most: each one costs the API server, the operator and both agents
//! processor time, which a small node needs for the freeze itself.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crds::{
    ProcessMigration, Reason,
    condition::{self, Status},
    names,
    process_migration::{Progress, SourceStatus, TargetStatus, cond},
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::decide::step::Role;

/// Between two writes; a change that comes sooner waits.
const PACE: Duration = Duration::from_millis(50);
/// The same, while the pod is frozen.
const QUIET: Duration = Duration::from_secs(1);
/// After a write that failed.
const RETRY: Duration = Duration::from_secs(1);
/// For one write.
const DEADLINE: Duration = Duration::from_secs(10);

/// What this node says of a migration.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Half {
    /// As source; the three identifying fields are the operator's and stay empty.
    pub source: SourceStatus,
    /// As target, likewise.
    pub target: TargetStatus,
    /// As source.
    pub progress: Option<Progress>,
    /// Of its own types only.
    pub conditions: Vec<Condition>,
}

impl Half {
    /// What is stored of this role.
    #[must_use]
    pub(super) fn stored(migration: &ProcessMigration, role: Role) -> Self {
        let Some(status) = &migration.status else {
            return Self::default();
        };
        let types = match role {
            Role::Source => cond::SOURCE,
            Role::Target => cond::TARGET,
        };
        let mut half = Self {
            conditions: status
                .conditions
                .iter()
                .filter(|c| types.contains(&c.type_.as_str()))
                .cloned()
                .collect(),
            ..Self::default()
        };
        match role {
            Role::Source => {
                half.source = SourceStatus {
                    node_name: None,
                    pod_name: None,
                    pod_uid: None,
                    ..status.source.clone().unwrap_or_default()
                };
                half.progress = status.progress.clone();
            }
            Role::Target => {
                half.target = TargetStatus {
                    node_name: None,
                    pod_name: None,
                    pod_uid: None,
                    ..status.target.clone().unwrap_or_default()
                };
            }
        }
        half
    }

    /// Sets a condition of this role.
    pub(super) fn set(&mut self, type_: &str, status: Status, reason: Reason, message: &str, generation: Option<i64>) {
        let now = k8s_openapi::jiff::Timestamp::now();
        let new = condition::build(&self.conditions, type_, status, reason, message, generation, now);
        match self.conditions.iter_mut().find(|c| c.type_ == type_) {
            Some(old) if condition::same(old, &new) => {}
            Some(old) => *old = new,
            None => self.conditions.push(new),
        }
    }

    fn status(&self, role: Role) -> Value {
        let mut status = json!({ "conditions": self.conditions });
        match role {
            Role::Source => {
                status["source"] = json!(self.source);
                if let Some(progress) = &self.progress {
                    status["progress"] = json!(progress);
                }
            }
            Role::Target => status["target"] = json!(self.target),
        }
        status
    }
}

/// Whose status it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Whose {
    /// Namespace of the migration.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

/// The writer of one half.
#[derive(Clone, Debug)]
pub(super) struct Publisher {
    wanted: Arc<watch::Sender<Half>>,
    written: watch::Receiver<Outcome>,
    /// Since when the pod is frozen.
    quiet: Arc<watch::Sender<Option<Instant>>>,
    /// Generation of the spec that this half answers.
    generation: Option<i64>,
}

/// What became of the writes.
#[derive(Clone, Debug, Default, PartialEq)]
struct Outcome {
    /// The last half that is stored.
    half: Option<Half>,
    /// The object is gone: nothing can be stored any more.
    gone: bool,
}

impl Publisher {
    /// Starts the writer; it ends when the last handle is gone.
    #[must_use]
    pub(super) fn start(client: &Client, whose: Whose, role: Role, start: Half, generation: Option<i64>) -> Self {
        let (outcome, written) = watch::channel(Outcome {
            half: Some(start.clone()),
            gone: false,
        });
        let (wanted, changes) = watch::channel(start);
        let api: Api<ProcessMigration> = Api::namespaced(client.clone(), &whose.namespace);
        let (quiet, quiet_since) = watch::channel(None);
        tokio::spawn(write_changes(api, whose, role, changes, quiet_since, outcome));
        Self {
            wanted: Arc::new(wanted),
            written,
            quiet: Arc::new(quiet),
            generation,
        }
    }

    /// Changes what the half is to be; the write follows by itself.
    pub(super) fn change(&self, change: impl FnOnce(&mut Half)) {
        self.wanted.send_if_modified(|half| {
            let before = half.clone();
            change(half);
            before != *half
        });
    }

    /// The pod is frozen from now on, or no longer.
    pub(super) fn quiet(&self, on: bool) {
        self.quiet.send_replace(on.then(Instant::now));
    }

    /// Sets a condition.
    pub(super) fn condition(&self, type_: &str, status: Status, reason: Reason, message: &str) {
        self.change(|half| half.set(type_, status, reason, message, self.generation));
    }

    /// Waits until everything that was changed so far is stored. False: the object is gone.
    pub(super) async fn stored(&self) -> bool {
        let wanted = self.wanted.borrow().clone();
        let mut written = self.written.clone();
        match written.wait_for(|o| o.gone || o.half.as_ref() == Some(&wanted)).await {
            Ok(outcome) => !outcome.gone,
            Err(_) => false,
        }
    }
}

async fn write_changes(
    api: Api<ProcessMigration>,
    whose: Whose,
    role: Role,
    mut changes: watch::Receiver<Half>,
    mut quiet: watch::Receiver<Option<Instant>>,
    outcome: watch::Sender<Outcome>,
) {
    let manager = match role {
        Role::Source => names::MANAGER_SOURCE,
        Role::Target => names::MANAGER_TARGET,
    };
    let parameters = PatchParams::apply(manager).force();
    let (mut last, mut over) = (None, false);
    loop {
        let half = changes.borrow_and_update().clone();
        let differs = outcome.borrow().half.as_ref() != Some(&half);
        if differs {
            let since = *quiet.borrow_and_update();
            if let Some(since) = since
                && !over
            {
                let left = (last.max(Some(since)).unwrap_or(since) + QUIET).saturating_duration_since(Instant::now());
                if !left.is_zero() {
                    tokio::select! {
                        () = tokio::time::sleep(left) => {}
                        // Where nobody is left to say so, it is over as well.
                        ended = quiet.wait_for(Option::is_none) => over = ended.is_err(),
                    }
                    continue;
                }
            }
            last = Some(Instant::now());
            let body = json!({
                "apiVersion": format!("{}/{}", names::GROUP, names::VERSION),
                "kind": "ProcessMigration",
                // The uid is a precondition: another object of the same name is not ours.
                "metadata": {"name": whose.name, "namespace": whose.namespace, "uid": whose.uid},
                "status": half.status(role),
            });
            let patch = Patch::Apply(body);
            let write = api.patch_status(&whose.name, &parameters, &patch);
            match tokio::time::timeout(DEADLINE, write).await {
                Ok(Ok(_)) => {
                    outcome.send_modify(|o| o.half = Some(half));
                    tokio::time::sleep(PACE).await;
                }
                Ok(Err(kube::Error::Api(status))) if status.code == 404 => {
                    outcome.send_modify(|o| o.gone = true);
                    return;
                }
                // A conflict on the uid: the object was replaced.
                Ok(Err(kube::Error::Api(status))) if status.code == 409 => {
                    tracing::info!(
                        message = status.message,
                        "the migration was replaced: its status is not ours"
                    );
                    outcome.send_modify(|o| o.gone = true);
                    return;
                }
                Ok(Err(error)) => {
                    tracing::warn!(
                        error = crate::error::chain(&error),
                        "failed to write the status; trying again"
                    );
                    tokio::time::sleep(RETRY).await;
                }
                Err(_) => {
                    tracing::warn!("the status could not be written within {DEADLINE:?}; trying again");
                }
            }
            continue;
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crds::process_migration::{ProcessMigrationSpec, ProcessMigrationStatus};

    #[test]
    fn a_half_holds_only_its_own_fields() {
        let spec: ProcessMigrationSpec = serde_json::from_value(json!({"podRef": {"name": "p"}})).unwrap();
        let mut m = ProcessMigration::new("m", spec);
        let condition = |t: &str| {
            condition::build(
                &[],
                t,
                Status::True,
                Reason::Eligible,
                "",
                None,
                k8s_openapi::jiff::Timestamp::UNIX_EPOCH,
            )
        };
        m.status = Some(ProcessMigrationStatus {
            source: Some(SourceStatus {
                node_name: Some("a".into()),
                pod_name: Some("p".into()),
                pod_uid: Some("u".into()),
                checked_attempt: Some(1),
                memory_bytes: Some(7),
                ..SourceStatus::default()
            }),
            conditions: vec![
                condition(cond::ADMITTED),
                condition(cond::MEMORY_SYNCED),
                condition(cond::RESTORED),
            ],
            ..ProcessMigrationStatus::default()
        });
        let half = Half::stored(&m, Role::Source);
        let status = half.status(Role::Source);
        assert_eq!(status["source"], json!({"checkedAttempt": 1, "memoryBytes": 7}));
        assert_eq!(status["conditions"].as_array().unwrap().len(), 1);
        assert!(status.get("target").is_none());
        let target = Half::stored(&m, Role::Target).status(Role::Target);
        assert_eq!(target["conditions"][0]["type"], "Restored");
        assert!(target.get("source").is_none() && target.get("progress").is_none());
    }

    #[test]
    fn a_condition_that_says_the_same_changes_nothing() {
        let mut half = Half::default();
        half.set(cond::RESTORED, Status::True, Reason::AllContainersHeld, "x", Some(1));
        let before = half.clone();
        half.set(cond::RESTORED, Status::True, Reason::AllContainersHeld, "x", Some(1));
        assert_eq!(half, before);
    }
}
