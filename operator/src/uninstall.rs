//! `operator uninstall`, the hook of `helm uninstall`: ends all migrations (what is committed is finished, the rest is
//! canceled), asks the agents to undo their installation and waits until they have, removes what is left in the API.

use std::time::Duration;

use crds::migration_node::cond as node_cond;
use crds::names::{CONFIG_MAP_UNINSTALL, FINALIZER, LABEL_NODE_READY, SIGNER, UNINSTALL_KEY};
use crds::{MigrationNode, ProcessMigration, Reason};
use jiff::Timestamp;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::json;
use tokio::time::Instant;

use crate::args::Run;
use crate::context::is_finished;
use crate::error::{Class, Fatal, chain, classify};

/// How often the progress is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Does it all within the time, or says what was not done.
pub async fn run(args: Run, timeout_seconds: u64) -> Result<(), Fatal> {
    let client = crate::run::client().await?;
    let until = Instant::now() + Duration::from_secs(timeout_seconds);
    // Two thirds of the time for the migrations, so that the nodes are cleaned whatever happens to these.
    let migrations_until = Instant::now() + Duration::from_secs(timeout_seconds * 2 / 3);
    let stuck = end_migrations(&client, migrations_until).await?;
    ask_agents(&client, &args.namespace).await?;
    let installed = await_agents(&client, until).await?;
    clean_up(&client, &args.namespace).await?;
    if stuck.is_empty() && installed.is_empty() {
        tracing::info!("everything is undone");
        return Ok(());
    }
    let mut text = Vec::new();
    if !stuck.is_empty() {
        text.push(format!("migrations that did not end in time: {}", stuck.join(", ")));
    }
    if !installed.is_empty() {
        text.push(format!(
            "nodes whose agent did not undo its installation in time: {} (see its log)",
            installed.join(", ")
        ));
    }
    Err(Fatal::Uninstall(text.join("; ")))
}

fn failed(what: &str, error: &kube::Error) -> Fatal {
    Fatal::Uninstall(format!("failed to {what}: {}", chain(error)))
}

/// Cancels what is not settled and waits until everything is. Returns what is not.
async fn end_migrations(client: &Client, until: Instant) -> Result<Vec<String>, Fatal> {
    let api: Api<ProcessMigration> = Api::all(client.clone());
    loop {
        let all = match api.list(&ListParams::default()).await {
            Ok(list) => list.items,
            // Without the CRD there is nothing to end.
            Err(error) if classify(&error) == Class::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("list the migrations", &error)),
        };
        let mut open = Vec::new();
        for migration in &all {
            if is_finished(migration) {
                release(client, migration).await;
                continue;
            }
            open.push(crate::migration::name(migration));
            if migration.spec.desired_state != crds::process_migration::DesiredState::Canceled {
                cancel(client, migration).await;
            }
        }
        if open.is_empty() || Instant::now() >= until {
            return Ok(open);
        }
        tracing::info!(migrations = %open.join(", "), "waiting for migrations to end");
        tokio::time::sleep(LOOK).await;
    }
}

async fn cancel(client: &Client, migration: &ProcessMigration) {
    let api: Api<ProcessMigration> = Api::namespaced(client.clone(), &migration.namespace().unwrap_or_default());
    let patch = json!({"metadata": {"uid": migration.uid()}, "spec": {"desiredState": "Canceled"}});
    if let Err(error) = api
        .patch(&migration.name_any(), &PatchParams::default(), &Patch::Merge(patch))
        .await
    {
        tracing::warn!(migration = %crate::migration::name(migration), error = %chain(&error), "failed to cancel");
    }
}

/// A settled migration needs no finalizer; the operator may be gone before it can remove it.
async fn release(client: &Client, migration: &ProcessMigration) {
    let mut finalizers = migration.metadata.finalizers.clone().unwrap_or_default();
    if !finalizers.iter().any(|f| f == FINALIZER) {
        return;
    }
    finalizers.retain(|f| f != FINALIZER);
    let api: Api<ProcessMigration> = Api::namespaced(client.clone(), &migration.namespace().unwrap_or_default());
    let patch = json!({"metadata": {
        "resourceVersion": migration.metadata.resource_version,
        "finalizers": finalizers,
    }});
    if let Err(error) = api
        .patch(&migration.name_any(), &PatchParams::default(), &Patch::Merge(patch))
        .await
        && classify(&error) == Class::Transient
    {
        tracing::warn!(
            migration = %crate::migration::name(migration),
            error = %chain(&error),
            "failed to remove the finalizer"
        );
    }
}

async fn ask_agents(client: &Client, namespace: &str) -> Result<(), Fatal> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let data = json!({UNINSTALL_KEY: Timestamp::now().to_string()});
    let patch = Patch::Merge(json!({"data": data}));
    match api.patch(CONFIG_MAP_UNINSTALL, &PatchParams::default(), &patch).await {
        Ok(_) => return Ok(()),
        Err(error) if classify(&error) == Class::NotFound => {}
        Err(error) => return Err(failed("ask the agents to undo their installation", &error)),
    }
    let map = ConfigMap {
        metadata: kube::api::ObjectMeta {
            name: Some(CONFIG_MAP_UNINSTALL.to_owned()),
            ..Default::default()
        },
        data: Some([(UNINSTALL_KEY.to_owned(), Timestamp::now().to_string())].into()),
        ..Default::default()
    };
    api.create(&PostParams::default(), &map)
        .await
        .map(|_| ())
        .map_err(|e| failed("ask the agents to undo their installation", &e))
}

/// Waits until every agent has said that it has undone its installation. Returns the nodes where none has. A node that is
/// down has nobody to say so, and is not waited for.
async fn await_agents(client: &Client, until: Instant) -> Result<Vec<String>, Fatal> {
    let api: Api<MigrationNode> = Api::all(client.clone());
    let nodes: Api<Node> = Api::all(client.clone());
    loop {
        let all = match api.list(&ListParams::default()).await {
            Ok(list) => list.items,
            Err(error) if classify(&error) == Class::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("list the nodes", &error)),
        };
        let mut open = Vec::new();
        for node in &all {
            if !is_undone(node) && is_up(&nodes, &node.name_any()).await {
                open.push(node.name_any());
            }
        }
        if open.is_empty() || Instant::now() >= until {
            return Ok(open);
        }
        tracing::info!(nodes = %open.join(", "), "waiting for agents to undo their installation");
        tokio::time::sleep(LOOK).await;
    }
}

fn is_undone(node: &MigrationNode) -> bool {
    node.status
        .as_ref()
        .and_then(|s| crds::condition::find(&s.conditions, node_cond::READY))
        .is_some_and(|c| c.reason == Reason::Uninstalled.as_str())
}

async fn is_up(nodes: &Api<Node>, name: &str) -> bool {
    match nodes.get_opt(name).await {
        Ok(Some(node)) => node
            .status
            .and_then(|s| s.conditions)
            .is_some_and(|c| c.iter().any(|c| c.type_ == "Ready" && c.status == "True")),
        Ok(None) => false,
        Err(_) => true,
    }
}

async fn clean_up(client: &Client, namespace: &str) -> Result<(), Fatal> {
    let migration_nodes: Api<MigrationNode> = Api::all(client.clone());
    for name in names(&migration_nodes, &ListParams::default()).await {
        delete(&migration_nodes, &name).await;
    }
    let nodes: Api<Node> = Api::all(client.clone());
    for name in names(&nodes, &ListParams::default().labels(LABEL_NODE_READY)).await {
        let patch = json!({"metadata": {"labels": {LABEL_NODE_READY: null}}});
        nodes
            .patch(&name, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .map_err(|e| failed(&format!("remove the label of node {name}"), &e))?;
    }
    let requests: Api<CertificateSigningRequest> = Api::all(client.clone());
    if let Ok(list) = requests.list(&ListParams::default()).await {
        for request in list.items.iter().filter(|r| r.spec.signer_name == SIGNER) {
            delete(&requests, &request.name_any()).await;
        }
    }
    let leases: Api<Lease> = Api::namespaced(client.clone(), namespace);
    let of_agents = ListParams::default().labels("app.kubernetes.io/component=node-agent");
    for name in names(&leases, &of_agents).await {
        delete(&leases, &name).await;
    }
    Ok(())
}

async fn names<K>(api: &Api<K>, params: &ListParams) -> Vec<String>
where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    match api.list(params).await {
        Ok(list) => list.items.iter().map(ResourceExt::name_any).collect(),
        Err(error) => {
            tracing::warn!(error = %chain(&error), "failed to list what is to be removed");
            Vec::new()
        }
    }
}

async fn delete<K>(api: &Api<K>, name: &str)
where
    K: Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    if let Err(error) = api.delete(name, &DeleteParams::default()).await
        && classify(&error) != Class::NotFound
    {
        tracing::warn!(object = name, error = %chain(&error), "failed to remove");
    }
}
