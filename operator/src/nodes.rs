//! Every node as decisions see it: Node, MigrationNode and its agent's heartbeat in one view; and the label that says
//! whether a node can take part.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crds::MigrationNode;
use crds::names::LABEL_NODE_READY;
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::reflector::{Store, reflector, store};
use kube::runtime::watcher::{self, watcher};
use kube::{Client, ResourceExt};
use serde_json::json;
use tokio::sync::Notify;

use crate::context::Context;
use crate::decide::eligibility::agent_trouble;
use crate::decide::world::{Heartbeat, NodeView};
use crate::error::{Class, chain, classify};

/// A heartbeat's patience where the lease does not say.
const DEFAULT_LEASE: Duration = Duration::from_secs(40);

/// In this time an agent that lives renews at least once.
const ONE_RENEWAL: Duration = Duration::from_secs(15);

/// Every node.
pub struct Nodes {
    nodes: Store<Node>,
    migration_nodes: Store<MigrationNode>,
    heartbeats: Mutex<HashMap<String, Beat>>,
    view: RwLock<Arc<Vec<NodeView>>>,
    changed: Arc<Notify>,
    leases: Option<Api<Lease>>,
    leases_listed: AtomicBool,
    nodes_listed: AtomicBool,
    migration_nodes_listed: AtomicBool,
    /// The first lists are in the view.
    viewed: AtomicBool,
}

impl std::fmt::Debug for Nodes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nodes")
            .field("view", &self.view)
            .finish_non_exhaustive()
    }
}

/// A heartbeat as seen here. The agent's clock is not asked after the first sight: only that the renewal changes.
#[derive(Clone, Debug)]
struct Beat {
    renewed: Option<Timestamp>,
    seen: Instant,
    patience: Duration,
}

impl Nodes {
    /// Starts the watches.
    #[must_use]
    pub fn start(client: Client, namespace: &str) -> Arc<Nodes> {
        let (nodes, node_writer) = store::<Node>();
        let (migration_nodes, migration_node_writer) = store::<MigrationNode>();
        let this = Arc::new(Nodes {
            nodes,
            migration_nodes,
            heartbeats: Mutex::default(),
            view: RwLock::default(),
            changed: Arc::new(Notify::new()),
            leases: Some(Api::namespaced(client.clone(), namespace)),
            leases_listed: AtomicBool::new(false),
            nodes_listed: AtomicBool::new(false),
            migration_nodes_listed: AtomicBool::new(false),
            viewed: AtomicBool::new(false),
        });
        let watched = watcher(Api::<Node>::all(client.clone()), watcher::Config::default())
            .modify(|node| {
                node.metadata.managed_fields = None;
                node.metadata.annotations = None;
                if let Some(status) = &mut node.status {
                    status.images = None;
                }
            })
            .default_backoff();
        let me = this.clone();
        tokio::spawn(reflector(node_writer, watched).for_each(move |event| {
            me.noted(&event, &me.nodes_listed);
            futures::future::ready(())
        }));
        let watched = watcher(Api::<MigrationNode>::all(client.clone()), watcher::Config::default())
            .modify(|node| node.metadata.managed_fields = None)
            .default_backoff();
        let me = this.clone();
        tokio::spawn(reflector(migration_node_writer, watched).for_each(move |event| {
            me.noted(&event, &me.migration_nodes_listed);
            futures::future::ready(())
        }));
        let leases = watcher(
            Api::<Lease>::namespaced(client, namespace),
            watcher::Config::default().labels("app.kubernetes.io/component=node-agent"),
        )
        .default_backoff();
        let me = this.clone();
        tokio::spawn(leases.for_each(move |event| {
            me.heartbeat(&event);
            me.noted(&event, &me.leases_listed);
            futures::future::ready(())
        }));
        this
    }

    /// The nodes as of now.
    #[must_use]
    pub fn view(&self) -> Arc<Vec<NodeView>> {
        self.view.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the first lists are in the view. Until then every node looks as if it had been removed.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.viewed.load(Ordering::Acquire)
    }

    /// Takes into the view what the watches know, once all have listed. True: something has changed.
    fn look(&self) -> bool {
        if !self.are_listed() {
            return false;
        }
        let changed = self.refresh();
        !self.viewed.swap(true, Ordering::AcqRel) || changed
    }

    fn are_listed(&self) -> bool {
        [&self.leases_listed, &self.nodes_listed, &self.migration_nodes_listed]
            .iter()
            .all(|flag| flag.load(Ordering::Acquire))
    }

    /// While the API cannot be reached the agents cannot renew either. Nobody is lost for that: patience begins anew.
    pub fn excuse(&self) {
        let now = Instant::now();
        for beat in self.beats().values_mut() {
            // Who was silent before the trouble began stays so.
            if beat.seen.elapsed() < beat.patience {
                beat.seen = now;
            }
        }
    }

    fn noted<K>(&self, event: &Result<watcher::Event<K>, watcher::Error>, listed: &AtomicBool) {
        match event {
            Ok(watcher::Event::InitDone) => {
                listed.store(true, Ordering::Release);
                self.changed.notify_one();
            }
            Ok(watcher::Event::Apply(_) | watcher::Event::Delete(_)) => self.changed.notify_one(),
            Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => {}
            Err(error) => {
                tracing::warn!(error = %chain(error), "a watch failed; it begins again");
                self.excuse();
            }
        }
    }

    fn heartbeat(&self, event: &Result<watcher::Event<Lease>, watcher::Error>) {
        match event {
            Ok(watcher::Event::Apply(lease) | watcher::Event::InitApply(lease)) => {
                let spec = lease.spec.clone().unwrap_or_default();
                let renewed = spec.renew_time.map(|t| t.0);
                let patience = spec
                    .lease_duration_seconds
                    .and_then(|s| u64::try_from(s).ok())
                    .map_or(DEFAULT_LEASE, Duration::from_secs);
                let name = lease.name_any();
                let mut beats = self.beats();
                match beats.get_mut(&name) {
                    Some(beat) if beat.renewed == renewed => beat.patience = patience,
                    Some(beat) => {
                        *beat = Beat {
                            renewed,
                            seen: Instant::now(),
                            patience,
                        }
                    }
                    None => {
                        // At first sight only the agent's own clock tells how old the renewal is.
                        let age = renewed
                            .map(|t| Timestamp::now().duration_since(t))
                            .and_then(|age| Duration::try_from(age).ok())
                            .unwrap_or_default();
                        let seen = Instant::now().checked_sub(age).unwrap_or_else(Instant::now);
                        beats.insert(
                            name,
                            Beat {
                                renewed,
                                seen,
                                patience,
                            },
                        );
                    }
                }
            }
            Ok(watcher::Event::Delete(lease)) => {
                self.beats().remove(&lease.name_any());
            }
            Ok(watcher::Event::InitDone) => {
                // All silent at once: it was the API server that was away, together with us. They get time for one renewal.
                let now = Instant::now();
                let mut beats = self.beats();
                if beats.values().all(|b| b.seen.elapsed() >= b.patience) {
                    for beat in beats.values_mut() {
                        let spent = beat.patience.saturating_sub(ONE_RENEWAL);
                        beat.seen = now.checked_sub(spent).unwrap_or(now);
                    }
                }
            }
            Ok(watcher::Event::Init) | Err(_) => {}
        }
    }

    fn beats(&self) -> std::sync::MutexGuard<'_, HashMap<String, Beat>> {
        self.heartbeats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows all changes for ever: wakes the migrations that may be concerned, and labels the nodes.
    pub async fn run(self: Arc<Self>, ctx: Arc<Context>) {
        let mut leading = ctx.leading.clone();
        loop {
            self.ask_about_the_silent().await;
            if self.look() {
                ctx.kick.notify_one();
            }
            let all_labelled = if ctx.leads() && self.is_synced() {
                self.label(&ctx).await
            } else {
                true
            };
            ctx.forget_the_gone(Timestamp::now());
            let next = if all_labelled {
                self.next_expiry()
            } else {
                Duration::from_secs(2)
            };
            tokio::select! {
                () = self.changed.notified() => {}
                changed = leading.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                () = tokio::time::sleep(next) => {}
            }
        }
    }

    /// A watch whose connection died without a word looks like silence. Before an agent counts as silent its lease is read;
    /// what cannot be read is not silent either.
    async fn ask_about_the_silent(&self) {
        let Some(leases) = &self.leases else { return };
        let view = self.view();
        let was_fresh = |name: &str| view.iter().any(|n| n.name == name && n.heartbeat == Heartbeat::Fresh);
        let silent: Vec<String> = self
            .beats()
            .iter()
            .filter(|(name, beat)| beat.seen.elapsed() >= beat.patience && was_fresh(name))
            .map(|(name, _)| name.clone())
            .collect();
        for name in silent {
            match tokio::time::timeout(Duration::from_secs(3), leases.get_opt(&name)).await {
                Ok(Ok(Some(lease))) => self.heartbeat(&Ok(watcher::Event::Apply(lease))),
                Ok(Ok(None)) => {}
                Ok(Err(_)) | Err(_) => {
                    if let Some(beat) = self.beats().get_mut(&name) {
                        beat.seen = Instant::now();
                    }
                }
            }
        }
    }

    /// Puts the view together. True: something that decisions look at is different.
    fn refresh(&self) -> bool {
        let nodes: HashMap<String, Arc<Node>> = self.nodes.state().into_iter().map(|n| (n.name_any(), n)).collect();
        let migration_nodes: HashMap<String, Arc<MigrationNode>> = self
            .migration_nodes
            .state()
            .into_iter()
            .map(|n| (n.name_any(), n))
            .collect();
        let names: BTreeSet<&String> = nodes.keys().chain(migration_nodes.keys()).collect();
        let beats = self.beats().clone();
        let view: Vec<NodeView> = names
            .into_iter()
            .map(|name| {
                let node = nodes.get(name);
                NodeView {
                    name: name.clone(),
                    exists: node.is_some(),
                    ready: node.is_some_and(|n| is_ready(n)),
                    cordoned: node.is_some_and(|n| n.spec.as_ref().and_then(|s| s.unschedulable) == Some(true)),
                    labels: node.and_then(|n| n.metadata.labels.clone()).unwrap_or_default(),
                    migration_node: migration_nodes.get(name).map(|m| {
                        let mut status = m.status.clone().unwrap_or_default();
                        // When a probe was made decides nothing, and must not wake everybody.
                        status.probe_time = None;
                        (m.spec.clone(), status)
                    }),
                    heartbeat: match beats.get(name) {
                        None => Heartbeat::Missing,
                        Some(beat) if beat.seen.elapsed() < beat.patience => Heartbeat::Fresh,
                        Some(_) => Heartbeat::Stale,
                    },
                }
            })
            .collect();
        let mut current = self.view.write().unwrap_or_else(PoisonError::into_inner);
        if **current == view {
            return false;
        }
        for node in &view {
            let before = current.iter().find(|n| n.name == node.name).map(|n| n.heartbeat);
            if before != Some(node.heartbeat) && node.heartbeat == Heartbeat::Stale {
                tracing::warn!(node = %node.name, "the node-agent sends no heartbeats any more");
            }
        }
        *current = Arc::new(view);
        true
    }

    fn next_expiry(&self) -> Duration {
        let longest = Duration::from_secs(30);
        self.beats()
            .values()
            .filter_map(|b| b.patience.checked_sub(b.seen.elapsed()))
            .min()
            .map_or(longest, |d| (d + Duration::from_millis(50)).min(longest))
    }

    /// Sets the label on nodes where it is not right. True: all are right now.
    async fn label(&self, ctx: &Context) -> bool {
        let mut all = true;
        let api: Api<Node> = Api::all(ctx.client.clone());
        for (name, wanted) in labels_to_set(&self.view()) {
            let patch = json!({"metadata": {"labels": {LABEL_NODE_READY: wanted}}});
            match api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await {
                Ok(_) => tracing::info!(node = %name, ready = wanted.unwrap_or("-"), "labelled the node"),
                Err(error) if classify(&error) == Class::NotFound => {}
                Err(error) => {
                    tracing::warn!(node = %name, error = %chain(&error), "failed to label the node");
                    all = false;
                }
            }
        }
        all
    }
}

/// Which nodes' labels are not right, and what they should be.
fn labels_to_set(view: &[NodeView]) -> BTreeMap<String, Option<&'static str>> {
    view.iter()
        .filter(|n| n.exists)
        .filter_map(|node| {
            let wanted = node
                .migration_node
                .as_ref()
                .map(|_| if agent_trouble(node).is_none() { "true" } else { "false" });
            (node.labels.get(LABEL_NODE_READY).map(String::as_str) != wanted).then(|| (node.name.clone(), wanted))
        })
        .collect()
}

fn is_ready(node: &Node) -> bool {
    node.status
        .as_ref()
        .and_then(|s| s.conditions.as_ref())
        .is_some_and(|c| c.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes() -> Nodes {
        let (nodes, _) = store::<Node>();
        let (migration_nodes, mut writer) = store::<MigrationNode>();
        for name in ["a", "b"] {
            let node = serde_json::from_value(json!({"metadata": {"name": name}, "spec": {}})).unwrap();
            writer.apply_watcher_event(&watcher::Event::Apply(node));
        }
        Nodes {
            nodes,
            migration_nodes,
            heartbeats: Mutex::default(),
            view: RwLock::default(),
            changed: Arc::new(Notify::new()),
            leases: None,
            leases_listed: AtomicBool::new(false),
            nodes_listed: AtomicBool::new(false),
            migration_nodes_listed: AtomicBool::new(false),
            viewed: AtomicBool::new(false),
        }
    }

    fn lease(name: &str, age: i64) -> Lease {
        let renewed = Timestamp::now() - jiff::SignedDuration::from_secs(age);
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"leaseDurationSeconds": 40,
            "renewTime": k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime(renewed)}}))
        .unwrap()
    }

    fn beat(nodes: &Nodes, name: &str) -> Heartbeat {
        nodes.refresh();
        nodes.view().iter().find(|n| n.name == name).unwrap().heartbeat
    }

    #[test]
    fn nodes_are_known_when_the_last_list_is_in_the_view() {
        let nodes = nodes();
        for listed in [&nodes.nodes_listed, &nodes.migration_nodes_listed, &nodes.leases_listed] {
            assert!(!nodes.look() && !nodes.is_synced());
            listed.store(true, Ordering::Release);
        }
        assert!(!nodes.is_synced() && nodes.view().is_empty());
        assert!(nodes.look() && nodes.is_synced() && nodes.view().len() == 2);
        assert!(!nodes.look());
    }

    #[test]
    fn a_heartbeat_goes_stale_and_comes_back() {
        let nodes = nodes();
        assert_eq!(beat(&nodes, "a"), Heartbeat::Missing);
        nodes.heartbeat(&Ok(watcher::Event::InitApply(lease("a", 5))));
        nodes.heartbeat(&Ok(watcher::Event::InitApply(lease("b", 60))));
        nodes.heartbeat(&Ok(watcher::Event::InitDone));
        assert_eq!(beat(&nodes, "a"), Heartbeat::Fresh);
        assert_eq!(beat(&nodes, "b"), Heartbeat::Stale);
        nodes.excuse();
        assert_eq!(beat(&nodes, "b"), Heartbeat::Stale, "it was silent before");
        // Any renewal counts, whatever the agent's clock says.
        nodes.heartbeat(&Ok(watcher::Event::Apply(lease("b", 50))));
        assert_eq!(beat(&nodes, "b"), Heartbeat::Fresh);
        nodes.heartbeat(&Ok(watcher::Event::Delete(lease("b", 50))));
        assert_eq!(beat(&nodes, "b"), Heartbeat::Missing);
    }

    #[test]
    fn all_silent_at_once_is_the_api_servers_fault() {
        let nodes = nodes();
        for name in ["a", "b"] {
            nodes.heartbeat(&Ok(watcher::Event::InitApply(lease(name, 300))));
        }
        assert_eq!(beat(&nodes, "a"), Heartbeat::Stale);
        nodes.heartbeat(&Ok(watcher::Event::InitDone));
        assert_eq!(beat(&nodes, "a"), Heartbeat::Fresh);
        assert!(nodes.next_expiry() <= ONE_RENEWAL + Duration::from_millis(100));
    }

    #[test]
    fn a_label_says_whether_a_node_can_take_part() {
        let ready = crate::decide::NodeView {
            name: "n".to_owned(),
            exists: true,
            ready: true,
            cordoned: false,
            labels: BTreeMap::new(),
            migration_node: None,
            heartbeat: Heartbeat::Fresh,
        };
        let condition = |type_: &str| {
            crds::condition::build(
                &[],
                type_,
                crds::condition::Status::True,
                crds::Reason::Accepted,
                "",
                None,
                Timestamp::now(),
            )
        };
        let agent = (
            crds::MigrationNodeSpec::default(),
            crds::MigrationNodeStatus {
                conditions: vec![condition("Ready"), condition("Compatible")],
                ..Default::default()
            },
        );
        let label = |labels: &[(&str, &str)]| labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let with_agent = NodeView {
            migration_node: Some(agent),
            ..ready.clone()
        };
        let silent = NodeView {
            heartbeat: Heartbeat::Stale,
            ..with_agent.clone()
        };
        let table: Vec<(NodeView, Option<Option<&str>>)> = vec![
            (ready.clone(), None),
            (
                NodeView {
                    labels: label(&[(LABEL_NODE_READY, "true")]),
                    ..ready
                },
                Some(None),
            ),
            (with_agent.clone(), Some(Some("true"))),
            (
                NodeView {
                    labels: label(&[(LABEL_NODE_READY, "true")]),
                    ..with_agent.clone()
                },
                None,
            ),
            (silent, Some(Some("false"))),
            (
                NodeView {
                    exists: false,
                    ..with_agent
                },
                None,
            ),
        ];
        for (node, wanted) in table {
            let set = labels_to_set(std::slice::from_ref(&node));
            assert_eq!(set.get("n").copied(), wanted, "{node:?}");
        }
    }
}
