//! The MigrationNode of this node: what was found, and whether the agent is ready; and the heartbeat.
//!
//! ```text
//! installation ┐
//! probe        ├─> status() (pure) ─> server-side apply, when something but the probe's time differs
//! identity     ┘
//! ```

use std::sync::Arc;
use std::time::Duration;

use crds::condition::{self, Status};
use crds::migration_node::{MigrationNode, MigrationNodeStatus, RuntimeStatus, cond};
use crds::{Reason, names};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference, Time};
use kube::api::{ObjectMeta, Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::identity;
use crate::install::Installed;
use crate::metrics::Metrics;
use crate::probe::{self, Probe};

/// Renewal of the lease.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// How long the operator waits for a renewal.
const LEASE_SECONDS: i32 = 40;
/// How long a starting agent collects what it finds before it says that it is not ready: what an earlier agent published
/// still holds, and an agent that is replaced must not look like a node that is lost.
const COLLECT: Duration = Duration::from_secs(15);
/// Longest wait for one call of the API.
const CALL: Duration = Duration::from_secs(10);

/// How far the installation is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Installation {
    /// Not tried yet.
    #[default]
    Pending,
    /// In force.
    Done(Installed),
    /// Why not; it is tried again.
    Failed(String),
    /// An uninstall was asked for and waits.
    Uninstalling(String),
    /// Undone on request.
    Uninstalled(String),
}

/// What does not change while the agent runs.
#[derive(Clone, Debug)]
pub struct About {
    /// Name of the node.
    pub node: String,
    /// The release namespace.
    pub namespace: String,
    /// `address:port` for peers.
    pub endpoint: Option<String>,
    /// Versions of the protocol between agents.
    pub protocol_versions: Vec<u32>,
}

/// What is known now.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// The installation.
    pub installation: Installation,
    /// The probe.
    pub probe: Option<Probe>,
    /// When it was made.
    pub probed_at: Option<Timestamp>,
    /// The certificate.
    pub identity: identity::State,
    /// Most bytes of checkpoints in memory.
    pub checkpoint_limit_bytes: u64,
}

/// Whether every part has spoken once.
fn is_complete(known: &Known) -> bool {
    known.installation != Installation::Pending
        && known.probe.is_some()
        && (known.identity.identity.is_some() || known.identity.problem.is_some())
}

/// Why the agent is not ready, all reasons; empty: it is.
#[must_use]
pub fn not_ready(known: &Known, about: &About) -> Vec<String> {
    let mut why = Vec::new();
    match &known.installation {
        Installation::Done(_) => {}
        Installation::Pending => why.push("the runtime handler is being installed".to_owned()),
        Installation::Failed(error) => why.push(format!("the runtime handler is not installed: {error}")),
        Installation::Uninstalling(wait) => why.push(format!("uninstalling: {wait}")),
        Installation::Uninstalled(how) => why.push(format!("uninstalled: {how}")),
    }
    if known.identity.identity.is_none() {
        let problem = known.identity.problem.as_deref().unwrap_or("it was asked for");
        why.push(format!("no certificate yet: {problem}"));
    }
    if about.endpoint.is_none() {
        why.push("the node's address is not known: set HOST_IP".to_owned());
    }
    why
}

/// The status as it should be.
#[must_use]
pub fn status(known: &Known, about: &About, old: &MigrationNodeStatus, now: Timestamp) -> MigrationNodeStatus {
    let why = not_ready(known, about);
    let (ready, reason, message) = if why.is_empty() {
        (
            Status::True,
            Reason::NodeReady,
            "the agent runs and peers can connect".to_owned(),
        )
    } else {
        let reason = match known.installation {
            Installation::Uninstalled(_) => Reason::Uninstalled,
            _ => Reason::NodeNotReady,
        };
        (Status::False, reason, why.join("; "))
    };
    let missing = known.probe.as_ref().map(|p| p.missing.clone());
    let (compatible, compatible_reason, compatible_message) = match &missing {
        None => (Status::Unknown, Reason::NodeNotReady, "not probed yet".to_owned()),
        Some(missing) if missing.is_empty() => {
            let criu = known.probe.as_ref().and_then(|p| p.criu.as_ref());
            let mut message = "everything that moves need was tried and works".to_owned();
            if criu.is_some_and(|criu| criu.from_agent_image) {
                message.push_str("; the node has no CRIU that can be used, so the agent brought its own");
            }
            if criu.is_some_and(|criu| criu.limits_from_proc) {
                message.push_str("; the machine withholds CAP_SYS_RESOURCE, so CRIU reads limits from /proc");
            }
            (Status::True, Reason::NodeReady, message)
        }
        Some(missing) => (Status::False, Reason::NodeNotReady, missing.join("; ")),
    };
    let build = |type_, status, reason, message: &str| {
        condition::build(&old.conditions, type_, status, reason, message, None, now)
    };
    let installed = match &known.installation {
        Installation::Done(installed) => Some(installed),
        _ => None,
    };
    let probe = known.probe.as_ref();
    MigrationNodeStatus {
        endpoint: about.endpoint.clone(),
        certificate_fingerprint: known.identity.identity.as_ref().map(|i| i.fingerprint.clone()),
        agent_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        protocol_versions: about.protocol_versions.clone(),
        architecture: probe.map(|p| p.architecture.clone()),
        kernel: probe.map(|p| p.kernel.clone()),
        cpu: probe.map(|p| p.cpu.clone()),
        criu: probe.and_then(|p| p.criu.clone()),
        runtime: installed.map(|i| RuntimeStatus {
            name: i.runtime.name.clone(),
            version: i.runtime.version.clone(),
            oci_runtime: match probe.and_then(|p| p.oci_version.as_deref()) {
                Some(version) => format!("{} ({version})", i.oci_runtime.display()),
                None => i.oci_runtime.display().to_string(),
            },
            handler_installed: true,
        }),
        checkpoint_limit_bytes: Some(i64::try_from(published_limit(known, old)).unwrap_or(i64::MAX)),
        probe_time: known.probed_at.map(Time),
        conditions: vec![
            build(cond::READY, ready, reason, &message),
            build(cond::COMPATIBLE, compatible, compatible_reason, &compatible_message),
        ],
    }
}

fn published_limit(known: &Known, old: &MigrationNodeStatus) -> u64 {
    let published = old.checkpoint_limit_bytes.and_then(|b| u64::try_from(b).ok());
    match published {
        Some(published) if !probe::memory::differs(published, known.checkpoint_limit_bytes) => published,
        _ => known.checkpoint_limit_bytes,
    }
}

/// Whether two statuses say the same, times aside.
fn same(a: &MigrationNodeStatus, b: &MigrationNodeStatus) -> bool {
    let without_times = |s: &MigrationNodeStatus| {
        let mut s = s.clone();
        s.probe_time = None;
        let conditions = std::mem::take(&mut s.conditions);
        (s, conditions)
    };
    let ((a, a_conditions), (b, b_conditions)) = (without_times(a), without_times(b));
    a == b
        && a_conditions.len() == b_conditions.len()
        && a_conditions
            .iter()
            .zip(&b_conditions)
            .all(|(a, b)| condition::same(a, b))
}

/// Publishes the MigrationNode whenever what is known has changed. Never returns.
pub async fn publish(client: Client, about: About, mut known: watch::Receiver<Known>, metrics: Arc<Metrics>) {
    let mut published: Option<MigrationNodeStatus> = None;
    let mut failures = 0u32;
    // Past the deadline, or without a sender: published as it is.
    let _ = timeout(COLLECT, known.wait_for(is_complete)).await;
    loop {
        let snapshot = known.borrow_and_update().clone();
        match publish_once(&client, &about, &snapshot, &mut published).await {
            Ok(()) => {
                failures = 0;
                let is = |type_| {
                    published
                        .as_ref()
                        .is_some_and(|s| condition::is_true(&s.conditions, type_))
                };
                metrics.ready.set(i64::from(is(cond::READY)));
                metrics.compatible.set(i64::from(is(cond::COMPATIBLE)));
                if matches!(snapshot.installation, Installation::Uninstalled(_)) {
                    // The last word: the object is deleted next, and must not come back.
                    let back = |k: &Known| !matches!(k.installation, Installation::Uninstalled(_));
                    if known.wait_for(back).await.is_err() {
                        return;
                    }
                    published = None;
                    continue;
                }
                if known.changed().await.is_err() {
                    return;
                }
            }
            Err(error) => {
                failures += 1;
                published = None;
                tracing::warn!(
                    error = crate::error::chain(&error),
                    failures,
                    "failed to publish the MigrationNode"
                );
                tokio::time::sleep(Duration::from_secs(1 << failures.min(4))).await;
            }
        }
    }
}

/// A call of the API failed.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("failed to {0}")]
    Api(&'static str, #[source] Box<kube::Error>),
    #[error("no answer in time to: {0}")]
    Deadline(&'static str),
}

async fn call<T>(what: &'static str, call: impl Future<Output = kube::Result<T>>) -> Result<T, Error> {
    match timeout(CALL, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(Error::Api(what, Box::new(error))),
        Err(_) => Err(Error::Deadline(what)),
    }
}

async fn publish_once(
    client: &Client,
    about: &About,
    known: &Known,
    published: &mut Option<MigrationNodeStatus>,
) -> Result<(), Error> {
    let nodes: Api<MigrationNode> = Api::all(client.clone());
    if published.is_none() {
        let owner = owner(client, about).await?;
        let object = json!({
            "apiVersion": format!("{}/{}", names::GROUP, names::VERSION),
            "kind": "MigrationNode",
            "metadata": {"name": about.node, "ownerReferences": [owner]},
            "spec": {},
        });
        let stored = call(
            "apply the MigrationNode",
            nodes.patch(
                &about.node,
                &PatchParams::apply(names::MANAGER_NODE).force(),
                &Patch::Apply(object),
            ),
        )
        .await?;
        *published = Some(stored.status.unwrap_or_default());
    }
    let old = published.clone().unwrap_or_default();
    let wanted = status(known, about, &old, Timestamp::now());
    if same(&wanted, &old) {
        return Ok(());
    }
    for condition in &wanted.conditions {
        if !condition::find(&old.conditions, &condition.type_).is_some_and(|o| condition::same(o, condition)) {
            tracing::info!(
                condition = condition.type_,
                status = condition.status,
                detail = condition.message,
                "node condition"
            );
        }
    }
    let object = json!({
        "apiVersion": format!("{}/{}", names::GROUP, names::VERSION),
        "kind": "MigrationNode",
        "metadata": {"name": about.node},
        "status": wanted,
    });
    call(
        "apply the MigrationNode's status",
        nodes.patch_status(
            &about.node,
            &PatchParams::apply(names::MANAGER_NODE).force(),
            &Patch::Apply(object),
        ),
    )
    .await?;
    *published = Some(wanted);
    Ok(())
}

/// The Node, as owner: what is ours goes when the node goes.
async fn owner(client: &Client, about: &About) -> Result<OwnerReference, Error> {
    let nodes: Api<Node> = Api::all(client.clone());
    let node = call("read the Node", nodes.get_metadata(&about.node)).await?;
    Ok(OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: about.node.clone(),
        uid: node.metadata.uid.unwrap_or_default(),
        ..Default::default()
    })
}

/// Renews the lease that tells the operator that this agent lives, unless it has uninstalled itself. Never returns.
pub async fn heartbeat(client: Client, about: About, known: watch::Receiver<Known>, metrics: Arc<Metrics>) {
    let leases: Api<Lease> = Api::namespaced(client.clone(), &about.namespace);
    let params = PatchParams::apply(names::MANAGER_NODE).force();
    let mut owned: Option<OwnerReference> = None;
    let mut ticks = tokio::time::interval(HEARTBEAT);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if matches!(known.borrow().installation, Installation::Uninstalled(_)) {
            continue;
        }
        if owned.is_none() {
            owned = owner(&client, &about).await.ok();
        }
        let patch = Patch::Apply(lease(&about, owned.clone(), Timestamp::now()));
        let renewed = call("renew the lease", leases.patch(&about.node, &params, &patch));
        if let Err(error) = renewed.await {
            metrics.heartbeat_failures.inc();
            tracing::warn!(error = crate::error::chain(&error), "failed to renew the lease");
        }
    }
}

fn lease(about: &About, owner: Option<OwnerReference>, now: Timestamp) -> Lease {
    Lease {
        metadata: ObjectMeta {
            name: Some(about.node.clone()),
            namespace: Some(about.namespace.clone()),
            labels: Some(
                [("app.kubernetes.io/component".to_owned(), "node-agent".to_owned())]
                    .into_iter()
                    .collect(),
            ),
            owner_references: owner.map(|o| vec![o]),
            ..Default::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(about.node.clone()),
            lease_duration_seconds: Some(LEASE_SECONDS),
            renew_time: Some(MicroTime(now)),
            ..Default::default()
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crds::migration_node::CriuStatus;

    fn about() -> About {
        About {
            node: "a".into(),
            namespace: "n".into(),
            endpoint: Some("10.0.0.1:9632".into()),
            protocol_versions: vec![1],
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn all_that_is_missing_stands_in_one_message() {
        let known = Known {
            probe: Some(Probe {
                missing: vec![
                    "CRIU is missing: install it".into(),
                    "nftables does not work here: load it".into(),
                ],
                ..Probe::default()
            }),
            ..Known::default()
        };
        let status = status(&known, &about(), &MigrationNodeStatus::default(), at(1));
        let compatible = condition::find(&status.conditions, cond::COMPATIBLE).unwrap();
        assert_eq!(compatible.status, "False");
        assert!(compatible.message.contains("CRIU") && compatible.message.contains("nftables"));
        let ready = condition::find(&status.conditions, cond::READY).unwrap();
        assert!(ready.message.contains("being installed") && ready.message.contains("no certificate"));
    }

    #[test]
    fn a_node_that_uses_the_agents_criu_says_so() {
        let message = |from_agent_image| {
            let known = Known {
                probe: Some(Probe {
                    criu: Some(CriuStatus {
                        from_agent_image,
                        ..CriuStatus::default()
                    }),
                    ..Probe::default()
                }),
                ..Known::default()
            };
            let status = status(&known, &about(), &MigrationNodeStatus::default(), at(1));
            condition::find(&status.conditions, cond::COMPATIBLE)
                .unwrap()
                .message
                .clone()
        };
        assert!(message(true).contains("brought its own"));
        assert!(!message(false).contains("brought its own"));
    }

    #[test]
    fn an_uninstalled_node_says_so_by_its_reason() {
        let known = Known {
            installation: Installation::Uninstalled("clean".into()),
            ..Known::default()
        };
        let status = status(&known, &about(), &MigrationNodeStatus::default(), at(1));
        assert_eq!(
            condition::find(&status.conditions, cond::READY).unwrap().reason,
            "Uninstalled"
        );
    }

    #[test]
    fn nothing_is_written_when_only_times_differ() {
        let mut known = Known {
            checkpoint_limit_bytes: 1000,
            probed_at: Some(at(1)),
            ..Known::default()
        };
        let first = status(&known, &about(), &MigrationNodeStatus::default(), at(1));
        known.probed_at = Some(at(60));
        known.checkpoint_limit_bytes = 1050;
        let second = status(&known, &about(), &first, at(60));
        assert!(same(&first, &second));
        known.checkpoint_limit_bytes = 2000;
        assert!(!same(&first, &status(&known, &about(), &first, at(60))));
    }
}
