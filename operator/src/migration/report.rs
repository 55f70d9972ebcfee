//! Writes the operator's part of the status, when it says something new, and tells people by events, log and metrics.

use std::sync::Arc;

use crds::condition::{find, is_true};
use crds::names::MANAGER_OPERATOR;
use crds::process_migration::{DecisionValue, Phase, ProcessMigrationStatus, cond};
use crds::{ProcessMigration, Reason};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::{Api, Patch, PatchParams};
use kube::{Resource, ResourceExt};
use serde_json::json;

use crate::context::Context;
use crate::decide::{View, World};
use crate::error::{Class, Error, classify};
use crate::events::Notice;

/// What was written.
#[derive(Debug)]
pub enum Written {
    /// Nothing: it already says so.
    Nothing,
    /// The status; the object as it is now.
    Status(Arc<ProcessMigration>),
    /// The migration is not as it was read.
    Raced,
}

/// Writes the view.
pub async fn report(
    ctx: &Context,
    world: &World,
    newest: &ProcessMigration,
    view: View,
    guarded: bool,
) -> Result<Written, Error> {
    let old = View::stored(&world.status(), world.migration.metadata.generation, world.now);
    if view == old {
        return Ok(Written::Nothing);
    }
    let mut metadata = json!({
        "name": world.name(),
        "namespace": world.migration.namespace(),
        "uid": world.migration.uid(),
    });
    if guarded {
        metadata["resourceVersion"] = json!(newest.metadata.resource_version);
    }
    let body = json!({
        "apiVersion": ProcessMigration::api_version(&()),
        "kind": ProcessMigration::kind(&()),
        "metadata": metadata,
        "status": view,
    });
    let api: Api<ProcessMigration> =
        Api::namespaced(ctx.client.clone(), &world.migration.namespace().unwrap_or_default());
    let params = PatchParams::apply(MANAGER_OPERATOR).force();
    match api.patch_status(world.name(), &params, &Patch::Apply(body)).await {
        Ok(written) => {
            let written = Arc::new(written);
            ctx.wrote(written.clone());
            announce(ctx, world, &old, &view);
            Ok(Written::Status(written))
        }
        Err(error) => match classify(&error) {
            Class::Conflict | Class::NotFound => Ok(Written::Raced),
            Class::Refused | Class::Transient => Err(Error::Report {
                migration: super::name(&world.migration),
                source: error,
            }),
        },
    }
}

/// Tells people what is new.
fn announce(ctx: &Context, world: &World, old: &View, new: &View) {
    let finished = is_true(&new.conditions, cond::FINISHED) && !is_true(&old.conditions, cond::FINISHED);
    for notice in notices(world, old, new) {
        let text = notice.note.as_str();
        let (migration, uid, reason) = (super::name(&world.migration), world.uid(), notice.reason.as_str());
        if notice.warning {
            tracing::warn!(migration, uid, reason, "{text}");
        } else {
            tracing::info!(migration, uid, reason, "{text}");
        }
        ctx.events.publish(notice);
    }
    if finished || old.target.node_name != new.target.node_name || old.phase != new.phase {
        // A slot may have become free.
        ctx.kick.notify_one();
    }
    if finished {
        measure(ctx, world, new);
    }
}

fn measure(ctx: &Context, world: &World, view: &View) {
    let phase = view.phase.unwrap_or_default().as_str();
    let reason = find(&view.conditions, cond::FINISHED).map_or("", |c| c.reason.as_str());
    let strategy = world.migration.spec.strategy.type_.as_str();
    ctx.metrics.count(
        "peregrine_migrations_total",
        &[("result", phase), ("reason", reason), ("strategy", strategy)],
    );
    let Some(result) = &view.result else { return };
    for (part, value) in [
        ("total", result.freeze_milliseconds),
        ("dump", result.dump_milliseconds),
        ("transfer", result.transfer_milliseconds),
        ("restore", result.restore_milliseconds),
        ("commit", result.commit_milliseconds),
    ] {
        if let Some(value) = value {
            ctx.metrics
                .observe("peregrine_freeze_seconds", &[("part", part)], f64::from(value) / 1000.0);
        }
    }
}

/// What is worth telling: each change of phase, an abort, the beginning of a stall, the end.
#[must_use]
pub fn notices(world: &World, old: &View, new: &View) -> Vec<Notice> {
    let mut notices = Vec::new();
    let about = about(world, new);
    let tell = |warning: bool, reason: &str, note: String| Notice {
        about: about.clone(),
        warning,
        reason: reason.to_owned(),
        note,
    };
    let newly = |type_: &str, status: &str| {
        let now = find(&new.conditions, type_).filter(|c| c.status == status)?;
        let before = find(&old.conditions, type_);
        before
            .is_none_or(|b| b.status != status || b.reason != now.reason)
            .then_some(now)
    };
    if let Some(stalled) = newly(cond::STALLED, "True") {
        notices.push(tell(true, &stalled.reason, stalled.message.clone()));
    }
    if let Some(finished) = newly(cond::FINISHED, "True") {
        let succeeded = is_true(&new.conditions, cond::SUCCEEDED);
        let canceled = new.phase == Some(Phase::Canceled);
        let mut note = finished.message.clone();
        if let Some(freeze) = new.result.as_ref().and_then(|r| r.freeze_milliseconds) {
            note = format!("{note} (freeze {freeze} ms)");
        }
        let remedy = Reason::from_name(&finished.reason).map_or("", Reason::remedy);
        if !succeeded && !remedy.is_empty() {
            note = format!("{note}. {remedy}");
        }
        notices.push(tell(!succeeded && !canceled, &finished.reason, note));
        return notices;
    }
    if let Some(given_up) = newly(cond::COMMITTED, "False") {
        notices.push(tell(
            given_up.reason != Reason::CanceledByUser.as_str(),
            &given_up.reason,
            format!("aborted: {}", given_up.message),
        ));
    }
    if let (Some(phase), true) = (new.phase, new.phase != old.phase) {
        notices.push(tell(false, phase.as_str(), sentence(world, new, phase)));
    }
    notices
}

fn sentence(world: &World, view: &View, phase: Phase) -> String {
    let pod = &world.migration.spec.pod_ref.name;
    let from = view.source.node_name.as_deref().unwrap_or("?");
    let to = view.target.node_name.as_deref().unwrap_or("?");
    match phase {
        Phase::Pending => format!("pod {pod} on node {from} is being checked"),
        Phase::Queued => {
            find(&view.conditions, cond::ADMITTED).map_or_else(|| "waiting".to_owned(), |c| c.message.clone())
        }
        Phase::Preparing => format!("a target pod for pod {pod} is being prepared"),
        Phase::Copying => format!("memory is being copied from node {from} to node {to}"),
        Phase::Freezing => format!("pod {pod} is frozen and sent from node {from} to node {to}"),
        Phase::Restoring => format!("the processes are being restored on node {to}"),
        Phase::Committing => "the decision is being taken".to_owned(),
        Phase::Finalizing if world.is_cold() => {
            format!("the new pod is Ready on node {to}; the old one is being ended")
        }
        Phase::Finalizing => format!("committed: the processes run on node {to}; the source is being ended"),
        Phase::Succeeded | Phase::RolledBack | Phase::Canceled | Phase::Failed => "finished".to_owned(),
    }
}

/// The migration, its source pod, and from the commit on its target pod.
fn about(world: &World, view: &View) -> Vec<ObjectReference> {
    let migration = &world.migration;
    let mut about = vec![migration.object_ref(&())];
    let pod = |name: &Option<String>, uid: &Option<String>| ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        name: name.clone(),
        namespace: migration.namespace(),
        uid: uid.clone(),
        ..Default::default()
    };
    if view.source.pod_name.is_some() {
        about.push(pod(&view.source.pod_name, &view.source.pod_uid));
    }
    let status: ProcessMigrationStatus = world.status();
    let committed = status.decision.is_some_and(|d| d.value == DecisionValue::Committed)
        || is_true(&view.conditions, cond::COMMITTED);
    if committed && view.target.pod_name.is_some() {
        about.push(pod(&view.target.pod_name, &view.target.pod_uid));
    }
    about
}
