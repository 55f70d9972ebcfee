//! The point of no return: `status.decision` goes once from Undecided to Committed or Aborted, by compare-and-swap.
//!
//! A lost reply is neither success nor failure: the decision is read again until it is known, and until then both sides
//! stay stopped. Nothing here ever guesses.

use std::time::Duration;

use crds::{
    ProcessMigration, Reason, condition, names,
    process_migration::{Party, cond},
};
use k8s_openapi::{api::core::v1::Pod, jiff::Timestamp};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;

use super::{ledger::Failed, publish::Whose};
use crate::decide::assignment::{Known, decision};

/// For one request.
const DEADLINE: Duration = Duration::from_secs(5);
/// Between two requests while nothing is known.
const RETRY: Duration = Duration::from_millis(300);

/// The decision of one migration.
#[derive(Clone)]
pub(super) struct Decisions {
    client: Client,
    whose: Whose,
    /// Name and uid of the target pod: they tell what became of a migration whose object is gone.
    target_pod: Option<(String, String)>,
    generation: Option<i64>,
}

/// A final decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Decided {
    /// The target runs.
    Committed,
    /// The source runs.
    Aborted(Failed),
}

fn decided(known: Known) -> Option<Decided> {
    match known {
        Known::Committed => Some(Decided::Committed),
        Known::Aborted { reason, message } => Some(Decided::Aborted(Failed { reason, message })),
        Known::Undecided | Known::Unopened => None,
    }
}

/// What an object says, where it is final.
#[must_use]
pub(super) fn decided_in(migration: &ProcessMigration) -> Option<Decided> {
    decided(decision(migration))
}

impl Decisions {
    /// For a migration.
    #[must_use]
    pub(super) fn new(
        client: Client,
        whose: Whose,
        target_pod: Option<(String, String)>,
        generation: Option<i64>,
    ) -> Self {
        Self {
            client,
            whose,
            target_pod,
            generation,
        }
    }

    fn api(&self) -> Api<ProcessMigration> {
        Api::namespaced(self.client.clone(), &self.whose.namespace)
    }

    /// One look. `None`: undecided, or not known.
    pub(super) async fn look(&self) -> Option<Decided> {
        match tokio::time::timeout(DEADLINE, self.api().get_opt(&self.whose.name)).await {
            Ok(Ok(Some(m))) if m.metadata.uid.as_deref() == Some(self.whose.uid.as_str()) => decided_in(&m),
            Ok(Ok(_)) => self.without_object().await,
            Ok(Err(error)) => {
                tracing::warn!(error = crate::error::chain(&error), "failed to read the decision");
                None
            }
            Err(_) => None,
        }
    }

    /// The object is gone, by force: its finalizer keeps it until it is settled. The target pod belongs to the migration
    /// until the commit, and is collected with it; after the commit it belongs to nobody.
    async fn without_object(&self) -> Option<Decided> {
        let gone = || {
            Decided::Aborted(Failed::new(
                Reason::CanceledByUser,
                "the migration was deleted before it was decided",
            ))
        };
        let Some((name, uid)) = &self.target_pod else {
            return Some(gone());
        };
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.whose.namespace);
        let pod = tokio::time::timeout(DEADLINE, pods.get_opt(name)).await.ok()?.ok()?;
        let Some(pod) = pod.filter(|p| p.metadata.uid.as_deref() == Some(uid.as_str())) else {
            return Some(gone());
        };
        let owners = pod.metadata.owner_references.unwrap_or_default();
        let ours = owners.iter().any(|o| o.uid == self.whose.uid);
        (!ours).then_some(Decided::Committed)
    }

    /// Waits until the decision is known to be final.
    pub(super) async fn wait(&self) -> Decided {
        loop {
            if let Some(decided) = self.look().await {
                return decided;
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Aborts, if nobody has decided. Ends when the decision is known, whichever it is.
    pub(super) async fn abort(&self, by: Party, why: &Failed) -> Decided {
        loop {
            let now = Timestamp::now().to_string();
            let message = condition::cut(&why.message, condition::MAX_MESSAGE);
            let patch = json!([
                {"op": "test", "path": "/metadata/uid", "value": self.whose.uid},
                {"op": "test", "path": "/status/decision/value", "value": "Undecided"},
                {"op": "replace", "path": "/status/decision", "value":
                    {"value": "Aborted", "by": by, "reason": why.reason, "message": message, "time": now}},
            ]);
            self.swap(patch).await;
            // Whatever the reply was: what is stored counts.
            if let Some(decided) = self.look().await {
                return decided;
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Commits, if nobody has decided: every container of the target is restored and held. Ends when the decision is known,
    /// whichever it is. THE POINT OF NO RETURN.
    pub(super) async fn commit(&self) -> Decided {
        loop {
            let time = Timestamp::now();
            let restored = condition::build(
                &[],
                cond::RESTORED,
                condition::Status::True,
                Reason::AllContainersHeld,
                "every container is restored and held",
                self.generation,
                time,
            );
            let patch = json!([
                {"op": "test", "path": "/metadata/uid", "value": self.whose.uid},
                {"op": "test", "path": "/status/decision/value", "value": "Undecided"},
                {"op": "add", "path": "/status/conditions/-", "value": restored},
                {"op": "replace", "path": "/status/decision", "value":
                    {"value": "Committed", "by": Party::Target, "time": time.to_string()}},
            ]);
            if self.swap(patch).await {
                return Decided::Committed;
            }
            if let Some(decided) = self.look().await {
                return decided;
            }
            tracing::warn!("the decision is not known: both sides stay stopped");
            tokio::time::sleep(RETRY).await;
        }
    }

    /// True only when the write is known to have succeeded.
    async fn swap(&self, patch: serde_json::Value) -> bool {
        let patch = match serde_json::from_value(patch) {
            Ok(patch) => Patch::Json::<()>(patch),
            Err(error) => {
                tracing::error!(%error, "the patch of the decision is not valid");
                return false;
            }
        };
        let parameters = PatchParams {
            field_manager: Some(names::MANAGER_DECISION.to_owned()),
            ..PatchParams::default()
        };
        let api = self.api();
        let write = api.patch_status(&self.whose.name, &parameters, &patch);
        match tokio::time::timeout(DEADLINE, write).await {
            Ok(Ok(_)) => true,
            Ok(Err(error)) => {
                tracing::info!(error = crate::error::chain(&error), "the decision was not swapped");
                false
            }
            Err(_) => false,
        }
    }
}
