//! Runs the operator: watches on every replica, passes and duties on the leader, an orderly end.

use std::sync::Arc;
use std::time::Duration;

use crds::ProcessMigration;
use futures::StreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::runtime::controller::{Config, Controller};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher;
use kube::{Api, Client, Resource, ResourceExt};
use tokio::sync::{Notify, watch};

use crate::args::Run;
use crate::context::{Context, is_finished};
use crate::decide::Limits;
use crate::error::{Class, Fatal, chain, classify};
use crate::events::Events;
use crate::leader::Election;
use crate::metrics::Metrics;
use crate::nodes::Nodes;
use crate::stop::Stop;
use crate::{admin, csr, migration};

/// Runs until a signal.
pub async fn run(args: Run) -> Result<(), Fatal> {
    let mut stop = Stop::on_signals()?;
    let listener = admin::bind(args.admin_port).await?;
    let client = client().await?;
    let name = args
        .name
        .clone()
        .unwrap_or_else(|| format!("operator-{}", std::process::id()));
    let (leading, leads) = watch::channel(false);
    let nodes = Nodes::start(client.clone(), &args.namespace);

    let controller = Controller::new(Api::<ProcessMigration>::all(client.clone()), watcher::Config::default());
    let migrations = controller.store();
    let ctx = Arc::new(Context {
        client: client.clone(),
        migrations: migrations.clone(),
        nodes: nodes.clone(),
        limits: Limits {
            cluster: args.max_moves,
            outbound: args.max_outbound,
            inbound: args.max_inbound,
        },
        leading: leads.clone(),
        kick: Arc::new(Notify::new()),
        events: Events::start(client.clone(), name.clone()),
        metrics: Arc::new(Metrics::default()),
        admission: tokio::sync::Mutex::new(()),
        memory: std::sync::Mutex::default(),
    });
    let passes = controller
        .with_config(Config::default().concurrency(16))
        .watches(
            Api::<Pod>::all(client.clone()),
            watcher::Config::default(),
            move |pod| concerned(&migrations, &pod),
        )
        .reconcile_all_on(kicks(ctx.kick.clone()))
        .run(migration::reconcile, migration::after_error, ctx.clone())
        .for_each(|result| {
            if let Err(error) = result {
                // Objects that went away while queued, and watches that begin again.
                tracing::debug!(error = %chain(&error), "the controller reports");
            }
            futures::future::ready(())
        });

    let owner = owner(&client, &args.namespace).await;
    let election = Election {
        leases: Api::namespaced(client.clone(), &args.namespace),
        identity: name,
        owner: owner.clone(),
        nodes: nodes.clone(),
    };
    // The election outlives the passes: it releases the lease when nothing acts any more.
    let (end_election, election_ends) = Stop::new();
    let election = tokio::spawn(election.run(leading, election_ends));
    tokio::spawn(admin::serve(listener, ctx.clone()));
    let duties = tokio::spawn(duties(ctx.clone(), args.namespace.clone(), owner));
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "started");

    let result = tokio::select! {
        () = stop.requested() => Ok(()),
        () = passes => Err(Fatal::Ended("controller")),
        () = nodes.run(ctx.clone()) => Err(Fatal::Ended("watch of the nodes")),
    };
    duties.abort();
    end_election.send_replace(true);
    if tokio::time::timeout(Duration::from_secs(5), election).await.is_err() {
        tracing::warn!("the election did not end in time");
    }
    result
}

/// A client for the API of this cluster.
pub async fn client() -> Result<Client, Fatal> {
    let mut config = kube::Config::infer()
        .await
        .map_err(|e| Fatal::Config(kube::Error::InferConfig(e)))?;
    // A watch is ended by the server after 290 s. One that says nothing for longer is dead.
    config.read_timeout = Some(Duration::from_secs(295));
    Client::try_from(config).map_err(Fatal::Config)
}

/// What only the leader does besides passes: certificates, and waking everything when it begins to lead.
async fn duties(ctx: Arc<Context>, namespace: String, owner: Option<OwnerReference>) {
    let mut leading = ctx.leading.clone();
    loop {
        if leading.wait_for(|leads| *leads).await.is_err() {
            return;
        }
        ctx.metrics.set("peregrine_leader", &[], 1.0);
        ctx.kick.notify_one();
        tokio::select! {
            () = csr::run(ctx.client.clone(), &namespace, owner.clone()) => {}
            _ = leading.wait_for(|leads| !*leads) => {}
        }
        ctx.metrics.set("peregrine_leader", &[], 0.0);
    }
}

fn kicks(kick: Arc<Notify>) -> impl futures::Stream<Item = ()> + Send + 'static {
    futures::stream::unfold(kick, |kick| async move {
        kick.notified().await;
        Some(((), kick))
    })
}

/// The unfinished migrations that a pod concerns: as its source, or as its target.
fn concerned(migrations: &Store<ProcessMigration>, pod: &Pod) -> Vec<ObjectRef<ProcessMigration>> {
    let (name, namespace) = (pod.name_any(), pod.namespace());
    let owners: Vec<&str> = pod
        .metadata
        .owner_references
        .iter()
        .flatten()
        .map(|o| o.uid.as_str())
        .collect();
    migrations
        .state_filter(|m| {
            m.metadata.namespace == namespace
                && !is_finished(m)
                && (m.spec.pod_ref.name == name
                    || m.metadata.uid.as_deref().is_some_and(|uid| owners.contains(&uid))
                    || m.status
                        .as_ref()
                        .and_then(|s| s.target.as_ref())
                        .and_then(|t| t.pod_name.as_deref())
                        == Some(&name))
        })
        .iter()
        .map(|m| ObjectRef::from_obj(m.as_ref()))
        .collect()
}

/// The Deployment that we are part of owns what we make in its namespace. Outside a cluster there is none.
async fn owner(client: &Client, namespace: &str) -> Option<OwnerReference> {
    let api: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    match api.get(crds::names::SERVICE_ACCOUNT_OPERATOR).await {
        Ok(deployment) => deployment.owner_ref(&()),
        Err(error) if classify(&error) == Class::NotFound => None,
        Err(error) => {
            tracing::warn!(error = %chain(&error), "failed to read our own Deployment; what we make has no owner");
            None
        }
    }
}
