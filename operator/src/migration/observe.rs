//! Reads what a decision may see. What cannot be read is unknown, never absent.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use crds::ProcessMigration;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};
use serde::de::DeserializeOwned;

use crate::context::{Context, is_finished, target_selector};
use crate::decide::world::Learned;
use crate::decide::{Observed, World, pod, target_pod};
use crate::error::{Class, Error, chain, classify};

/// Observes one migration.
pub async fn observe(ctx: &Context, migration: &Arc<ProcessMigration>, learned: Learned) -> World {
    let now = Timestamp::now();
    let memory = ctx.saw(migration, now);
    let mut world = World {
        now,
        migration: migration.clone(),
        source_pod: Observed::Unknown,
        target_pod: Observed::Unknown,
        nodes: ctx.nodes.view(),
        claims: BTreeMap::new(),
        others: Vec::new(),
        limits: ctx.limits,
        last_change: memory.changed,
        first_seen: memory.first_seen,
        learned,
    };
    if is_finished(migration) {
        return world; // nothing but the object itself is looked at
    }
    world.others = ctx.others(world.uid());
    let pods: Api<Pod> = Api::namespaced(ctx.client.clone(), &migration.namespace().unwrap_or_default());
    world.source_pod = get(&pods, &migration.spec.pod_ref.name).await;
    world.target_pod = target(&pods, &world).await;
    if let Some(source) = world.source_pod.present() {
        world.claims = claims(&ctx.client, source).await;
    }
    world
}

/// The target pod: under its recorded name, else under the name that follows from the source, else, where the source is gone
/// and nothing is recorded, the one with our label and owner.
async fn target(pods: &Api<Pod>, world: &World) -> Observed<Pod> {
    let status = world.status();
    if let Some(name) = status.target.as_ref().and_then(|t| t.pod_name.as_deref()) {
        return get(pods, name).await;
    }
    if status.attempt.is_none() {
        return Observed::Absent;
    }
    match &world.source_pod {
        Observed::Unknown => Observed::Unknown,
        Observed::Present(source) => {
            let original = target_pod::original_name(source);
            let name = target_pod::name(pod::name(source), Some(&original), world.uid());
            get(pods, &name).await
        }
        Observed::Absent => {
            let params = ListParams::default().labels(&target_selector(world.name()));
            match pods.list(&params).await {
                Ok(list) => list
                    .items
                    .into_iter()
                    .find(|p| pod::is_controlled_by(p, world.uid()))
                    .map_or(Observed::Absent, Observed::Present),
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "failed to list target pods");
                    Observed::Unknown
                }
            }
        }
    }
}

async fn claims(client: &Client, source: &Pod) -> BTreeMap<String, Observed<Vec<String>>> {
    let api: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), &source.namespace().unwrap_or_default());
    let names = source
        .spec
        .iter()
        .flat_map(|s| s.volumes.iter().flatten())
        .filter_map(|v| v.persistent_volume_claim.as_ref())
        .map(|c| c.claim_name.clone());
    let mut claims = BTreeMap::new();
    for name in names {
        let modes = match get(&api, &name).await {
            Observed::Present(claim) => Observed::Present(claim.spec.and_then(|s| s.access_modes).unwrap_or_default()),
            Observed::Absent => Observed::Absent,
            Observed::Unknown => Observed::Unknown,
        };
        claims.insert(name, modes);
    }
    claims
}

async fn get<K: Clone + DeserializeOwned + Debug>(api: &Api<K>, name: &str) -> Observed<K> {
    match api.get_opt(name).await {
        Ok(Some(object)) => Observed::Present(object),
        Ok(None) => Observed::Absent,
        Err(error) => {
            tracing::warn!(object = name, error = %chain(&error), "failed to read");
            Observed::Unknown
        }
    }
}

/// Reads the migration itself past the watch. None: it is gone.
pub async fn read_again(ctx: &Context, migration: &ProcessMigration) -> Result<Option<Arc<ProcessMigration>>, Error> {
    let api: Api<ProcessMigration> = Api::namespaced(ctx.client.clone(), &migration.namespace().unwrap_or_default());
    match api.get(&migration.name_any()).await {
        Ok(newest) if newest.uid() == migration.uid() => {
            let newest = Arc::new(newest);
            ctx.wrote(newest.clone());
            Ok(Some(newest))
        }
        Ok(_) => Ok(None),
        Err(error) if classify(&error) == Class::NotFound => Ok(None),
        Err(source) => Err(Error::Read {
            migration: super::name(migration),
            source,
        }),
    }
}
