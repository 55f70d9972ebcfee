//! The preflight of a source pod: finds it, takes the inventory, lets `decide::preflight` judge.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crds::process_migration::{Check, Connections, StrategyType, Verdict};
use crds::{ProcessMigration, Reason};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

use crate::decide::assignment::{self, PreflightReport};
use crate::decide::preflight::{Question, Report, judge};
use crate::metrics::Metrics;
use crate::{inventory, pager, pod_on_node};

/// What is refused is looked at again so often, because much of it is over in a moment: a connection that is just being
/// accepted, a directory watch that is just being made, a process that is just being started.
const LOOKS: u32 = 3;
/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(150);
/// Longest wait for the API.
const CALL: Duration = Duration::from_secs(10);
/// Preflights at once: each reads all of /proc of a pod.
const AT_ONCE: usize = 2;

/// Runs preflights, each once.
pub struct Preflights {
    client: Client,
    node: String,
    limit: watch::Receiver<u64>,
    metrics: Arc<Metrics>,
    room: Semaphore,
    /// Migrations and attempts that were looked at, or are being.
    begun: Mutex<HashSet<(String, u32)>>,
}

impl Preflights {
    /// For the pods of `node`.
    #[must_use]
    pub fn new(client: Client, node: String, limit: watch::Receiver<u64>, metrics: Arc<Metrics>) -> Self {
        Self {
            client,
            node,
            limit,
            metrics,
            room: Semaphore::new(AT_ONCE),
            begun: Mutex::default(),
        }
    }

    /// Whether this attempt is to be looked at now; says yes once.
    #[must_use]
    pub fn begin(&self, migration: &ProcessMigration) -> bool {
        let (Some(uid), Some(attempt)) = (
            migration.metadata.uid.clone(),
            migration.status.as_ref().and_then(|s| s.attempt),
        ) else {
            return false;
        };
        self.begun
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert((uid, attempt))
    }

    /// Forgets a migration that is gone.
    pub fn forget(&self, uid: &str) {
        self.begun
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|(of, _)| of != uid);
    }

    /// Looks at the pod. What cannot be looked at is refused; there is always a report.
    pub async fn run(&self, migration: &ProcessMigration) -> PreflightReport {
        let begun = Instant::now();
        // Never closed.
        let _room = self.room.acquire().await;
        let report = match self.look(migration).await {
            Ok(report) => {
                self.count(&report, begun);
                let predicted = match assignment::strategy(migration) {
                    StrategyType::PreCopy => report.predicted_freeze_after_copy_milliseconds,
                    StrategyType::Cold | StrategyType::StopAndCopy | StrategyType::PostCopy | StrategyType::Hybrid => {
                        report.predicted_freeze_milliseconds
                    }
                };
                PreflightReport {
                    checks: report.checks,
                    memory_bytes: Some(report.memory_bytes),
                    predicted_freeze_milliseconds: Some(predicted),
                }
            }
            Err((reason, message)) => PreflightReport {
                checks: vec![Check {
                    name: "inventory".to_owned(),
                    verdict: Verdict::Refused,
                    container: None,
                    node: Some(self.node.clone()),
                    reason: Some(reason.as_str().to_owned()),
                    message: Some(crds::condition::cut(&message, crds::condition::MAX_MESSAGE).to_owned()),
                    remedy: Some(reason.remedy().to_owned()).filter(|r| !r.is_empty()),
                }],
                memory_bytes: None,
                predicted_freeze_milliseconds: None,
            },
        };
        let refusals = report.checks.iter().filter(|c| c.verdict == Verdict::Refused).count();
        tracing::info!(
            migration = migration.metadata.name,
            namespace = migration.metadata.namespace,
            refusals,
            memory_bytes = report.memory_bytes,
            elapsed_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            "preflight"
        );
        report
    }

    fn count(&self, report: &Report, begun: Instant) {
        let refused = report.refusals().next().is_some();
        let result = if refused { "refused" } else { "passed" };
        self.metrics.preflights.get_or_create(&vec![("result", result)]).inc();
        for refusal in report.refusals() {
            if let Some(reason) = Reason::ALL.iter().find(|r| r.as_str() == refusal) {
                self.metrics
                    .refusals
                    .get_or_create(&vec![("reason", reason.as_str())])
                    .inc();
            }
        }
        self.metrics.preflight_seconds.observe(begun.elapsed().as_secs_f64());
    }

    async fn look(&self, migration: &ProcessMigration) -> Result<Report, (Reason, String)> {
        let pod = self.pod(migration).await?;
        let mut looks = 1;
        loop {
            let report = self.look_once(&pod, migration.spec.connections).await?;
            if looks == LOOKS || report.refusals().next().is_none() {
                return Ok(report);
            }
            looks += 1;
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn look_once(&self, pod: &Pod, connections: Connections) -> Result<Report, (Reason, String)> {
        let pod = pod.clone();
        let node = self.node.clone();
        let checkpoint_limit_bytes = *self.limit.borrow();
        let looked = tokio::task::spawn_blocking(move || {
            let uid = pod.metadata.uid.clone().unwrap_or_default();
            let on_node = pod_on_node::find(&uid).map_err(|e| (Reason::Unknown, crate::error::chain(&e)))?;
            let cgroups: Vec<_> = on_node.containers.iter().map(|c| c.cgroup.clone()).collect();
            if pager::fills(&cgroups) {
                // A dump would lack the pages that are not in place yet.
                return Err((
                    Reason::AlreadyMigrating,
                    "the pod's memory is still being put in place after its last move".to_owned(),
                ));
            }
            let inventory = inventory::take(&pod, &on_node);
            Ok(judge(Question {
                inventory: &inventory,
                connections,
                node: &node,
                checkpoint_limit_bytes,
            }))
        });
        looked
            .await
            .unwrap_or_else(|e| Err((Reason::Unknown, format!("the preflight ended early: {e}"))))
    }

    /// The pod, as the API has it: the one that the operator resolved, on this node.
    async fn pod(&self, migration: &ProcessMigration) -> Result<Pod, (Reason, String)> {
        let source = migration.status.as_ref().and_then(|s| s.source.as_ref());
        let (Some(name), Some(uid)) = (
            source.and_then(|s| s.pod_name.as_deref()),
            source.and_then(|s| s.pod_uid.as_deref()),
        ) else {
            return Err((
                Reason::PodNotFound,
                "the migration does not name its pod yet".to_owned(),
            ));
        };
        let namespace = migration.metadata.namespace.clone().unwrap_or_default();
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &namespace);
        let mut tries = 0;
        let pod = loop {
            let error = match timeout(CALL, pods.get_opt(name)).await {
                Ok(Ok(pod)) => break pod,
                Ok(Err(error)) => crate::error::chain(&error),
                Err(_) => "the API server did not answer".to_owned(),
            };
            tries += 1;
            if tries == LOOKS {
                return Err((Reason::Unknown, format!("pod {name} could not be read: {error}")));
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        };
        let pod = pod.ok_or_else(|| (Reason::PodNotFound, format!("there is no pod {name}")))?;
        if pod.metadata.uid.as_deref() != Some(uid) {
            return Err((
                Reason::PodReplaced,
                format!("pod {name} is another than the one of the migration"),
            ));
        }
        let on = pod.spec.as_ref().and_then(|s| s.node_name.as_deref());
        if on != Some(self.node.as_str()) {
            return Err((
                Reason::Unknown,
                format!(
                    "pod {name} is on node {} and not on {}",
                    on.unwrap_or("none"),
                    self.node
                ),
            ));
        }
        Ok(pod)
    }
}
