//! Applies effects, in the order of the fields of [`Effects`]. Each carries its precondition: the API refuses it where the
//! world is not as it was observed, and then the pass looks again.

use std::sync::Arc;

use crds::ProcessMigration;
use crds::names::{ANNOTATION_LABELS, FINALIZER, MANAGER_DECISION, MANAGER_OPERATOR};
use crds::process_migration::{Decision, DecisionValue, Party};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use serde_json::{Value, json};

use crate::context::Context;
use crate::decide::world::Learned;
use crate::decide::{Cause, DeletePod, Effects, FinalizerChange, HandOver, World};
use crate::error::{Class, Error, classify, words};

/// What was applied.
#[derive(Debug, Default)]
pub struct Applied {
    /// Something was done.
    pub done: bool,
    /// The world is not as it was observed.
    pub raced: bool,
    /// The migration was deleted, or let go while being deleted.
    pub gone: bool,
    /// The migration as the last write returned it.
    pub newest: Option<Arc<ProcessMigration>>,
    /// What the answers said that lies in no object.
    pub learned: Learned,
}

/// How one effect ended.
enum Outcome {
    Done,
    Raced,
}

/// Applies effects. An error is one of the transport: whether the effect took place is not known, the next pass observes.
pub async fn act(ctx: &Context, world: &World, effects: Effects) -> Result<Applied, Error> {
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
    let mut applied = Applied {
        learned: world.learned.clone(),
        ..Applied::default()
    };
    let namespace = world.migration.namespace().unwrap_or_default();
    let migrations: Api<ProcessMigration> = Api::namespaced(ctx.client.clone(), &namespace);
    let pods: Api<Pod> = Api::namespaced(ctx.client.clone(), &namespace);
    let io = Io {
        ctx,
        world,
        migrations,
        pods,
    };
    if let Some(change) = finalizer {
        let outcome = io.change_finalizer(change, &mut applied).await?;
        applied.note(&outcome);
        if change == FinalizerChange::Remove && world.is_deleting() && applied.done {
            applied.gone = true;
        }
    }
    if open_decision && applied.may_go_on() {
        let outcome = io.open_decision(&mut applied).await?;
        applied.note(&outcome);
    }
    if let Some(cause) = abort
        && applied.may_go_on()
    {
        let outcome = io.abort(cause, &mut applied).await?;
        applied.note(&outcome);
    }
    if let Some(pod) = try_target
        && applied.may_go_on()
    {
        let outcome = io.try_target(&pod, &mut applied).await?;
        applied.note(&outcome);
    }
    if let Some(pod) = create_target
        && applied.may_go_on()
    {
        let outcome = io.create_target(&pod, &mut applied).await?;
        applied.note(&outcome);
    }
    if let Some(hand_over) = hand_over
        && applied.may_go_on()
    {
        let outcome = io.hand_over(&hand_over).await?;
        applied.note(&outcome);
    }
    for (what, victim) in [("source", delete_source), ("target", delete_target)] {
        if let Some(victim) = victim
            && applied.may_go_on()
        {
            let outcome = io.delete_pod(what, &victim).await?;
            applied.note(&outcome);
        }
    }
    if delete_migration && applied.may_go_on() {
        let outcome = io.delete_migration().await?;
        applied.note(&outcome);
        applied.gone = true;
    }
    Ok(applied)
}

impl Applied {
    fn note(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Done => self.done = true,
            Outcome::Raced => self.raced = true,
        }
    }

    fn may_go_on(&self) -> bool {
        !self.raced && !self.gone
    }
}

struct Io<'a> {
    ctx: &'a Context,
    world: &'a World,
    migrations: Api<ProcessMigration>,
    pods: Api<Pod>,
}

impl Io<'_> {
    async fn change_finalizer(&self, change: FinalizerChange, applied: &mut Applied) -> Result<Outcome, Error> {
        let metadata = &self.world.migration.metadata;
        let mut finalizers = metadata.finalizers.clone().unwrap_or_default();
        finalizers.retain(|f| f != FINALIZER);
        let what = match change {
            FinalizerChange::Add => {
                finalizers.push(FINALIZER.to_owned());
                "add the finalizer"
            }
            FinalizerChange::Remove => "remove the finalizer",
        };
        // A list is replaced as a whole: only over the version that was read.
        let patch = json!({"metadata": {
            "uid": metadata.uid,
            "resourceVersion": metadata.resource_version,
            "finalizers": finalizers,
        }});
        let sent = self
            .migrations
            .patch(self.world.name(), &params(MANAGER_OPERATOR), &Patch::Merge(patch))
            .await;
        self.keep(what, sent, applied)
    }

    async fn open_decision(&self, applied: &mut Applied) -> Result<Outcome, Error> {
        // There is no test for absence: the version stands for it.
        let patch = json!([
            {"op": "test", "path": "/metadata/uid", "value": self.world.uid()},
            {"op": "test", "path": "/metadata/resourceVersion", "value": self.version(applied)},
            {"op": "add", "path": "/status/decision", "value": {"value": DecisionValue::Undecided}},
        ]);
        self.patch_decision("open the decision", patch, applied).await
    }

    async fn abort(&self, cause: Cause, applied: &mut Applied) -> Result<Outcome, Error> {
        let decision = Decision {
            value: DecisionValue::Aborted,
            by: Some(Party::Operator),
            reason: Some(cause.reason.as_str().to_owned()),
            message: Some(crds::condition::cut(&cause.message, crds::condition::MAX_MESSAGE).to_owned()),
            time: Some(Time(Timestamp::now())),
        };
        let patch = json!([
            {"op": "test", "path": "/metadata/uid", "value": self.world.uid()},
            {"op": "test", "path": "/status/decision/value", "value": DecisionValue::Undecided},
            {"op": "replace", "path": "/status/decision", "value": decision},
        ]);
        let outcome = self.patch_decision("abort", patch, applied).await?;
        if matches!(outcome, Outcome::Done) {
            tracing::info!(
                migration = %super::name(&self.world.migration),
                uid = self.world.uid(),
                reason = %cause.reason,
                cause = %cause.message,
                "aborted"
            );
        }
        Ok(outcome)
    }

    async fn patch_decision(&self, what: &str, patch: Value, applied: &mut Applied) -> Result<Outcome, Error> {
        let patch: Patch<()> = Patch::Json(serde_json::from_value(patch).map_err(|source| Error::Effect {
            what: self.say(what),
            source: kube::Error::SerdeError(source),
        })?);
        let sent = self
            .migrations
            .patch_status(self.world.name(), &params(MANAGER_DECISION), &patch)
            .await;
        self.keep(what, sent, applied)
    }

    async fn try_target(&self, pod: &Pod, applied: &mut Applied) -> Result<Outcome, Error> {
        let params = PostParams {
            dry_run: true,
            field_manager: Some(MANAGER_OPERATOR.to_owned()),
        };
        match self.pods.create(&params, pod).await {
            Ok(stored) => applied.learned.dry_run = Some(Ok(Box::new(stored))),
            Err(error) => match classify(&error) {
                Class::Transient => return Err(self.failed("try whether the target pod would be accepted", error)),
                Class::Conflict | Class::NotFound | Class::Refused => {
                    applied.learned.dry_run = Some(Err(words(&error)));
                }
            },
        }
        Ok(Outcome::Done)
    }

    async fn create_target(&self, pod: &Pod, applied: &mut Applied) -> Result<Outcome, Error> {
        let params = PostParams {
            dry_run: false,
            field_manager: Some(MANAGER_OPERATOR.to_owned()),
        };
        match self.pods.create(&params, pod).await {
            Ok(created) => {
                tracing::info!(
                    migration = %super::name(&self.world.migration),
                    uid = self.world.uid(),
                    pod = %created.name_any(),
                    "created the target pod"
                );
                Ok(Outcome::Done)
            }
            Err(error) => match classify(&error) {
                // It is there already, or the quota was changed meanwhile.
                Class::Conflict => Ok(Outcome::Raced),
                Class::Refused | Class::NotFound => {
                    applied.learned.create_refused = Some(words(&error));
                    Ok(Outcome::Done)
                }
                Class::Transient => Err(self.failed("create the target pod", error)),
            },
        }
    }

    async fn hand_over(&self, to: &HandOver) -> Result<Outcome, Error> {
        let patch = json!({"metadata": {
            "uid": to.uid,
            "resourceVersion": to.resource_version,
            "labels": to.labels,
            "annotations": {ANNOTATION_LABELS: null},
            "ownerReferences": to.owners,
        }});
        let sent = self
            .pods
            .patch(&to.name, &params(MANAGER_OPERATOR), &Patch::Merge(patch))
            .await;
        match sent {
            Ok(_) => Ok(Outcome::Done),
            Err(error) => match classify(&error) {
                Class::Conflict | Class::NotFound => Ok(Outcome::Raced),
                Class::Refused | Class::Transient => Err(self.failed("hand the target pod over to its user", error)),
            },
        }
    }

    async fn delete_pod(&self, what: &str, victim: &DeletePod) -> Result<Outcome, Error> {
        let params = DeleteParams {
            grace_period_seconds: victim.grace,
            preconditions: Some(Preconditions {
                uid: Some(victim.uid.clone()),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        match self.pods.delete(&victim.name, &params).await {
            Ok(_) => {
                tracing::info!(
                    migration = %super::name(&self.world.migration),
                    uid = self.world.uid(),
                    pod = %victim.name,
                    role = what,
                    "deleted the pod"
                );
                Ok(Outcome::Done)
            }
            Err(error) => match classify(&error) {
                // Gone, or another of the same name.
                Class::Conflict | Class::NotFound => Ok(Outcome::Raced),
                Class::Refused | Class::Transient => Err(self.failed(&format!("delete the {what} pod"), error)),
            },
        }
    }

    async fn delete_migration(&self) -> Result<Outcome, Error> {
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: self.world.migration.uid(),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        match self.migrations.delete(self.world.name(), &params).await {
            Ok(_) => Ok(Outcome::Done),
            Err(error) => match classify(&error) {
                Class::Conflict | Class::NotFound => Ok(Outcome::Done),
                Class::Refused | Class::Transient => Err(self.failed("delete the migration after its TTL", error)),
            },
        }
    }

    fn keep(
        &self,
        what: &str,
        sent: Result<ProcessMigration, kube::Error>,
        applied: &mut Applied,
    ) -> Result<Outcome, Error> {
        match sent {
            Ok(newest) => {
                let newest = Arc::new(newest);
                self.ctx.wrote(newest.clone());
                applied.newest = Some(newest);
                Ok(Outcome::Done)
            }
            Err(error) => match classify(&error) {
                Class::Conflict | Class::NotFound => Ok(Outcome::Raced),
                Class::Refused | Class::Transient => Err(self.failed(what, error)),
            },
        }
    }

    fn version(&self, applied: &Applied) -> Option<String> {
        applied
            .newest
            .as_ref()
            .unwrap_or(&self.world.migration)
            .metadata
            .resource_version
            .clone()
    }

    fn failed(&self, what: &str, source: kube::Error) -> Error {
        Error::Effect {
            what: self.say(what),
            source,
        }
    }

    fn say(&self, what: &str) -> String {
        format!("{what} (migration {})", super::name(&self.world.migration))
    }
}

fn params(manager: &str) -> PatchParams {
    PatchParams {
        field_manager: Some(manager.to_owned()),
        ..PatchParams::default()
    }
}
