//! Leader election by a Lease: all replicas watch, only the leader acts.
//!
//! A leader that cannot renew stops acting [`MARGIN`] before others may take over. Their patience runs from the last renewal
//! that *they* saw, by their own clock, so clocks need not agree. A paused old leader is harmless in any case: every effect
//! carries its precondition.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::sync::watch;

use crate::error::{Class, chain, classify};
use crate::nodes::Nodes;
use crate::stop::Stop;

/// How long a lease lasts without a renewal.
const DURATION: Duration = Duration::from_secs(10);
/// How often the leader renews.
const RENEW: Duration = Duration::from_secs(3);
/// How often the others look.
const LOOK: Duration = Duration::from_secs(2);
/// How long before its end the leader stops acting.
const MARGIN: Duration = Duration::from_secs(3);

/// Takes part in the election.
#[derive(Debug)]
pub struct Election {
    /// The leases of the release namespace.
    pub leases: Api<Lease>,
    /// Who we are.
    pub identity: String,
    /// Owner of the lease, so that an uninstall removes it.
    pub owner: Option<OwnerReference>,
    /// Told when the API cannot be reached: the agents cannot reach it either.
    pub nodes: Arc<Nodes>,
}

/// The renewal of another holder, as this process saw it.
struct Seen {
    holder: String,
    renewed: Option<MicroTime>,
    at: Instant,
}

impl Election {
    /// Runs until `stop`, then releases the lease. `leading` says at any time whether this replica may act.
    pub async fn run(self, leading: watch::Sender<bool>, mut stop: Stop) {
        let mut seen: Option<Seen> = None;
        let mut valid_until: Option<Instant> = None;
        loop {
            let begun = Instant::now();
            match tokio::time::timeout(RENEW, self.attempt(&mut seen)).await {
                Ok(Ok(true)) => {
                    valid_until = Some(begun + DURATION.saturating_sub(MARGIN));
                    if !leading.send_replace(true) {
                        tracing::info!(identity = %self.identity, "leading");
                    }
                }
                Ok(Ok(false)) => {
                    valid_until = None;
                    if leading.send_replace(false) {
                        tracing::warn!(identity = %self.identity, "another replica leads");
                    }
                }
                Ok(Err(error)) => {
                    self.nodes.excuse();
                    tracing::warn!(error = %chain(&error), "failed to renew the leader's lease");
                }
                Err(_) => {
                    self.nodes.excuse();
                    tracing::warn!("the leader's lease could not be renewed in time");
                }
            }
            let next = match valid_until {
                Some(until) if until <= Instant::now() => {
                    valid_until = None;
                    leading.send_replace(false);
                    tracing::warn!(identity = %self.identity, "not leading any more: the lease could not be renewed");
                    LOOK
                }
                Some(until) => RENEW.min(until.saturating_duration_since(Instant::now())),
                None => LOOK,
            };
            tokio::select! {
                () = stop.requested() => break,
                () = tokio::time::sleep(next) => {}
            }
        }
        if leading.send_replace(false) {
            self.release().await;
        }
    }

    /// Takes or renews the lease. True: it is ours.
    async fn attempt(&self, seen: &mut Option<Seen>) -> Result<bool, kube::Error> {
        let Some(lease) = self.leases.get_opt(crds::names::LEASE_LEADER).await? else {
            return self.create().await;
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.clone().unwrap_or_default();
        if holder == self.identity {
            *seen = None;
            return self.take(&lease, false).await;
        }
        let fresh = match seen {
            Some(s) if s.holder == holder && s.renewed == spec.renew_time => s.at.elapsed() < duration(&spec),
            Some(_) | None => {
                *seen = Some(Seen {
                    holder: holder.clone(),
                    renewed: spec.renew_time.clone(),
                    at: Instant::now(),
                });
                true
            }
        };
        if fresh && !holder.is_empty() {
            return Ok(false);
        }
        *seen = None;
        self.take(&lease, true).await
    }

    async fn create(&self) -> Result<bool, kube::Error> {
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(crds::names::LEASE_LEADER.to_owned()),
                owner_references: self.owner.clone().map(|o| vec![o]),
                ..Default::default()
            },
            spec: Some(LeaseSpec {
                lease_transitions: Some(0),
                ..self.spec()
            }),
        };
        match self.leases.create(&PostParams::default(), &lease).await {
            Ok(_) => Ok(true),
            Err(error) if classify(&error) == Class::Conflict => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn take(&self, lease: &Lease, from_another: bool) -> Result<bool, kube::Error> {
        let mut spec = self.spec();
        if from_another {
            let transitions = lease.spec.as_ref().and_then(|s| s.lease_transitions).unwrap_or(0);
            spec.lease_transitions = Some(transitions.saturating_add(1));
        } else {
            spec.acquire_time = None;
        }
        let mut metadata = json!({"resourceVersion": lease.metadata.resource_version});
        if let Some(owner) = &self.owner {
            metadata["ownerReferences"] = json!([owner]);
        }
        self.patch(json!({"metadata": metadata, "spec": spec})).await
    }

    fn spec(&self) -> LeaseSpec {
        let now = Timestamp::now();
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: Some(MicroTime(now)),
            renew_time: Some(MicroTime(now)),
            ..Default::default()
        }
    }

    async fn patch(&self, body: serde_json::Value) -> Result<bool, kube::Error> {
        let patch = Patch::Merge(body);
        match self
            .leases
            .patch(crds::names::LEASE_LEADER, &PatchParams::default(), &patch)
            .await
        {
            Ok(_) => Ok(true),
            Err(error) if matches!(classify(&error), Class::Conflict | Class::NotFound) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Lets another replica take over at once.
    async fn release(&self) {
        let released = tokio::time::timeout(RENEW, async {
            let Some(lease) = self.leases.get_opt(crds::names::LEASE_LEADER).await? else {
                return Ok(true);
            };
            if lease.spec.as_ref().and_then(|s| s.holder_identity.as_deref()) != Some(&self.identity) {
                return Ok(true);
            }
            self.patch(json!({
                "metadata": {"resourceVersion": lease.metadata.resource_version},
                "spec": {"holderIdentity": "", "leaseDurationSeconds": 1},
            }))
            .await
        })
        .await;
        match released {
            Ok(Ok(_)) => tracing::info!("released the leader's lease"),
            Ok(Err(error)) => tracing::warn!(error = %chain(&error), "failed to release the leader's lease"),
            Err(_) => tracing::warn!("failed to release the leader's lease in time"),
        }
    }
}

fn duration(spec: &LeaseSpec) -> Duration {
    spec.lease_duration_seconds
        .and_then(|s| u64::try_from(s).ok())
        .map_or(DURATION, Duration::from_secs)
}
