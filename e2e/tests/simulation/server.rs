//! The API server: objects with versions, compare-and-swap on the decision, server-side apply by parts, owners, finalizers.

use std::collections::BTreeMap;
use std::sync::Arc;

use crds::ProcessMigration;
use crds::condition::is_true;
use crds::process_migration::{Decision, DecisionValue, Failure, Party, ProcessMigrationStatus, cond};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use node_agent::decide::step::Role;
use operator::decide::{View, pod, view};

/// A change of a migration: its name and what it is now.
pub(crate) type Change = (String, Option<Arc<ProcessMigration>>);

/// Why a write was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// It is not there, or not this one.
    NotFound,
    /// It is not as the writer thought.
    Conflict,
}

/// What an agent applies.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Half {
    pub(crate) source: crds::process_migration::SourceStatus,
    pub(crate) target: crds::process_migration::TargetStatus,
    pub(crate) conditions: Vec<Condition>,
}

#[derive(Default)]
pub(crate) struct Server {
    pub(crate) migrations: BTreeMap<String, Arc<ProcessMigration>>,
    pub(crate) pods: BTreeMap<String, Pod>,
    /// When each node's agent was last heard, in milliseconds.
    pub(crate) leases: BTreeMap<usize, u64>,
    pub(crate) history: Vec<Change>,
    /// Every decision ever taken, by uid of the migration: for the invariants.
    pub(crate) decisions: BTreeMap<String, DecisionValue>,
    /// Pods that a person deleted, by uid.
    pub(crate) deleted_by_user: Vec<String>,
    pub(crate) violation: Option<String>,
    pub(crate) version: u64,
}

impl Server {
    fn next(&mut self) -> String {
        self.version += 1;
        self.version.to_string()
    }

    pub(crate) fn migration(&self, name: &str, uid: &str) -> Option<Arc<ProcessMigration>> {
        let found = self.migrations.get(name)?;
        (found.metadata.uid.as_deref() == Some(uid)).then(|| found.clone())
    }

    pub(crate) fn create_migration(&mut self, mut migration: ProcessMigration) {
        migration.metadata.resource_version = Some(self.next());
        let name = migration.metadata.name.clone().unwrap();
        let stored = Arc::new(migration);
        self.history.push((name.clone(), Some(stored.clone())));
        self.migrations.insert(name, stored);
    }

    /// Changes a migration, if it is still this one.
    pub(crate) fn change(
        &mut self,
        name: &str,
        uid: &str,
        change: impl FnOnce(&mut ProcessMigration) -> Result<(), Refused>,
    ) -> Result<Arc<ProcessMigration>, Refused> {
        let stored = self.migration(name, uid).ok_or(Refused::NotFound)?;
        let mut new = (*stored).clone();
        change(&mut new)?;
        if new == *stored {
            return Ok(stored);
        }
        self.rules(&stored, &new);
        new.metadata.resource_version = Some(self.next());
        let freed = new.metadata.finalizers.as_ref().is_none_or(Vec::is_empty);
        let new = Arc::new(new);
        if freed && new.metadata.deletion_timestamp.is_some() {
            self.migrations.remove(name);
            self.history.push((name.to_owned(), None));
            self.collect(uid, new.metadata.deletion_timestamp.clone());
        } else {
            self.migrations.insert(name.to_owned(), new.clone());
            self.history.push((name.to_owned(), Some(new.clone())));
        }
        Ok(new)
    }

    /// The rules of the schema, and what nobody may do.
    fn rules(&mut self, old: &ProcessMigration, new: &ProcessMigration) {
        let value = |m: &ProcessMigration| m.status.as_ref().and_then(|s| s.decision.as_ref()).map(|d| d.value);
        let (before, after) = (value(old), value(new));
        if before == after {
            return;
        }
        let legal = matches!(
            (before, after),
            (None, Some(DecisionValue::Undecided))
                | (
                    Some(DecisionValue::Undecided),
                    Some(DecisionValue::Committed | DecisionValue::Aborted)
                )
        );
        if !legal {
            self.violation = Some(format!("the decision went from {before:?} to {after:?}"));
        }
        if let Some(value) = after {
            self.decisions.insert(new.metadata.uid.clone().unwrap(), value);
        }
    }

    /// Pods of an owner that is gone go too.
    fn collect(&mut self, owner: &str, at: Option<Time>) {
        let owned: Vec<String> = self
            .pods
            .values()
            .filter(|p| owns(p, owner))
            .map(|p| pod::name(p).to_owned())
            .collect();
        for name in owned {
            self.delete_pod(&name, None, at.clone());
        }
    }

    pub(crate) fn change_status(
        &mut self,
        name: &str,
        uid: &str,
        change: impl FnOnce(&mut ProcessMigrationStatus) -> Result<(), Refused>,
    ) -> Result<Arc<ProcessMigration>, Refused> {
        self.change(name, uid, |m| change(m.status.get_or_insert_default()))
    }

    /// Undecided -> a final decision, by compare-and-swap.
    pub(crate) fn decide(
        &mut self,
        (name, uid): (&str, &str),
        value: DecisionValue,
        by: Party,
        why: &Failure,
        restored: Option<Condition>,
        at: Timestamp,
    ) -> Result<Arc<ProcessMigration>, Refused> {
        self.change_status(name, uid, |status| {
            if status.decision.as_ref().map(|d| d.value) != Some(DecisionValue::Undecided) {
                return Err(Refused::Conflict);
            }
            status.conditions.extend(restored);
            status.decision = Some(Decision {
                value,
                by: Some(by),
                reason: Some(why.reason.clone()),
                message: Some(why.message.clone()),
                time: Some(Time(at)),
            });
            Ok(())
        })
    }

    /// An agent's apply of its half.
    pub(crate) fn apply_half(&mut self, name: &str, uid: &str, role: Role, half: &Half) -> Result<(), Refused> {
        self.change_status(name, uid, |status| {
            let types = match role {
                Role::Source => {
                    let old = status.source.take().unwrap_or_default();
                    status.source = Some(crds::process_migration::SourceStatus {
                        node_name: old.node_name,
                        pod_name: old.pod_name,
                        pod_uid: old.pod_uid,
                        ..half.source.clone()
                    });
                    cond::SOURCE
                }
                Role::Target => {
                    let old = status.target.take().unwrap_or_default();
                    status.target = Some(crds::process_migration::TargetStatus {
                        node_name: old.node_name,
                        pod_name: old.pod_name,
                        pod_uid: old.pod_uid,
                        ..half.target.clone()
                    });
                    cond::TARGET
                }
            };
            // `Restored` belongs to the manager of the decision as well, so leaving it out does not remove it.
            let kept = |c: &Condition| !types.contains(&c.type_.as_str()) || c.type_ == cond::RESTORED;
            status
                .conditions
                .retain(|c| kept(c) && !half.conditions.iter().any(|h| h.type_ == c.type_));
            status.conditions.extend(half.conditions.iter().cloned());
            Ok(())
        })
        .map(|_| ())
    }

    /// The operator's apply of its view, over a version if it says so.
    pub(crate) fn apply_view(
        &mut self,
        (name, uid): (&str, &str),
        version: Option<String>,
        new: &View,
    ) -> Result<Arc<ProcessMigration>, Refused> {
        self.change(name, uid, |migration| {
            if version.is_some() && version != migration.metadata.resource_version {
                return Err(Refused::Conflict);
            }
            let status = migration.status.get_or_insert_default();
            status.observed_generation = new.observed_generation;
            status.phase = new.phase;
            status.active_on = new.active_on;
            status.attempt = new.attempt;
            status.start_time.clone_from(&new.start_time);
            status.completion_time.clone_from(&new.completion_time);
            status.effective.clone_from(&new.effective);
            status.eligibility.clone_from(&new.eligibility);
            let source = status.source.get_or_insert_default();
            source.node_name.clone_from(&new.source.node_name);
            source.pod_name.clone_from(&new.source.pod_name);
            source.pod_uid.clone_from(&new.source.pod_uid);
            let target = status.target.get_or_insert_default();
            target.node_name.clone_from(&new.target.node_name);
            target.pod_name.clone_from(&new.target.pod_name);
            target.pod_uid.clone_from(&new.target.pod_uid);
            status.result.clone_from(&new.result);
            status.residual_dependencies.clone_from(&new.residual_dependencies);
            status.conditions.retain(|c| !view::OWN.contains(&c.type_.as_str()));
            status.conditions.extend(new.conditions.iter().cloned());
            Ok(())
        })
    }

    pub(crate) fn create_pod(&mut self, mut new: Pod, at: Timestamp) -> Result<(), Refused> {
        let name = pod::name(&new).to_owned();
        if self.pods.contains_key(&name) {
            return Err(Refused::Conflict);
        }
        let version = self.next();
        new.metadata.uid = Some(format!("pod-{version}"));
        new.metadata.resource_version = Some(version);
        new.metadata.creation_timestamp = Some(Time(at));
        self.pods.insert(name, new);
        Ok(())
    }

    pub(crate) fn change_pod(&mut self, name: &str, uid: &str, change: impl FnOnce(&mut Pod)) -> Result<(), Refused> {
        let version = (self.version + 1).to_string();
        let stored = self
            .pods
            .get_mut(name)
            .filter(|p| pod::uid(p) == uid)
            .ok_or(Refused::NotFound)?;
        let before = stored.clone();
        change(stored);
        if *stored != before {
            stored.metadata.resource_version = Some(version);
            self.version += 1;
        }
        Ok(())
    }

    /// Marks a pod for its kubelet; grace 0, or no node, removes it at once.
    pub(crate) fn delete_pod(&mut self, name: &str, grace: Option<u32>, at: Option<Time>) {
        let Some(stored) = self.pods.get_mut(name) else { return };
        self.version += 1;
        if grace == Some(0) || pod::node(stored).is_none() {
            self.pods.remove(name);
            return;
        }
        stored.metadata.resource_version = Some(self.version.to_string());
        if stored.metadata.deletion_timestamp.is_none() {
            stored.metadata.deletion_timestamp = at;
        }
        stored.metadata.deletion_grace_period_seconds = Some(i64::from(grace.unwrap_or(30)));
    }

    /// A kubelet says that a pod has ended.
    pub(crate) fn remove_pod(&mut self, name: &str, uid: &str) {
        if self.pods.get(name).is_some_and(|p| pod::uid(p) == uid) {
            self.version += 1;
            self.pods.remove(name);
        }
    }

    pub(crate) fn is_finished(migration: &ProcessMigration) -> bool {
        migration
            .status
            .as_ref()
            .is_some_and(|s| is_true(&s.conditions, cond::FINISHED))
    }
}

fn owns(of: &Pod, owner: &str) -> bool {
    of.metadata.owner_references.iter().flatten().any(|o| o.uid == owner)
}
