//! An operator against a real API server, with nodes, kubelets, scheduler and agents played by the test. A namespace and a
//! set of nodes of its own for each scenario.

#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, reason = "a test")]
#![allow(dead_code, reason = "each test file uses its part")]

use std::process::Stdio;
use std::time::{Duration, Instant};

use crds::migration_node::cond as node_cond;
use crds::names;
use crds::process_migration::{DecisionValue, Phase, ProcessMigrationStatus, cond};
use crds::{MigrationNode, ProcessMigration};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use tokio::process::{Child, Command};

/// Longest wait for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A scenario's own part of the cluster.
pub(crate) struct Stage {
    pub(crate) client: Client,
    pub(crate) namespace: String,
    pub(crate) operator: Option<Child>,
    prefix: String,
    kubelet: tokio::task::JoinHandle<()>,
    beats: tokio::task::JoinHandle<()>,
}

/// None: no API server was given, and the caller says that it skips.
pub(crate) async fn stage(name: &str) -> Option<Stage> {
    if std::env::var_os("PEREGRINE_LIVE_API").is_none() {
        eprintln!(
            "skipped: set PEREGRINE_LIVE_API=1 and KUBECONFIG of an API server with our CRDs and without an operator"
        );
        return None;
    }
    let client = Client::try_default().await.expect("KUBECONFIG");
    let suffix = Timestamp::now().as_millisecond() % 10_000_000;
    let namespace = format!("{name}-{suffix}");
    let namespaces: Api<Namespace> = Api::all(client.clone());
    for ns in [namespace.as_str(), "peregrine-system"] {
        let object = serde_json::from_value(json!({"metadata": {"name": ns}})).unwrap();
        match namespaces.create(&PostParams::default(), &object).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => panic!("namespace: {error}"),
        }
    }
    let classes: Api<k8s_openapi::api::node::v1::RuntimeClass> = Api::all(client.clone());
    let class =
        serde_json::from_value(json!({"metadata": {"name": names::RUNTIME_CLASS}, "handler": "peregrine"})).unwrap();
    let _there = classes.create(&PostParams::default(), &class).await;
    // Where the controllers run, pods are refused until the namespace has its service account.
    let stage = Stage {
        kubelet: tokio::spawn(kubelet(client.clone(), namespace.clone())),
        beats: tokio::spawn(async {}),
        prefix: format!("fake-{suffix}"),
        client,
        namespace,
        operator: None,
    };
    Some(stage)
}

/// Ends what is deleted, as a kubelet would.
async fn kubelet(client: Client, namespace: String) {
    let pods: Api<Pod> = Api::namespaced(client, &namespace);
    loop {
        if let Ok(list) = pods.list(&Default::default()).await {
            for pod in list.items {
                if pod.metadata.deletion_timestamp.is_some() && !pod.name_any().starts_with("immortal") {
                    let params = DeleteParams::default().grace_period(0);
                    let _gone = pods.delete(&pod.name_any(), &params).await;
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.kubelet.abort();
        self.beats.abort();
        if let Some(operator) = &mut self.operator {
            let _dead = operator.start_kill();
        }
    }
}

impl Stage {
    pub(crate) fn node(&self, letter: &str) -> String {
        format!("{}-{letter}", self.prefix)
    }

    pub(crate) async fn start_operator(&mut self) {
        let child = Command::new(env!("CARGO_BIN_EXE_operator"))
            .args(["--admin-port", "0", "--namespace", "peregrine-system", "--name", "live"])
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("operator");
        self.operator = Some(child);
    }

    pub(crate) async fn kill_operator(&mut self) {
        if let Some(mut operator) = self.operator.take() {
            operator.kill().await.expect("kill");
        }
    }

    /// Nodes with agents that beat.
    pub(crate) async fn nodes(&mut self, letters: &[&str]) {
        let names: Vec<String> = letters.iter().map(|l| self.node(l)).collect();
        for name in &names {
            self.make_node(name).await;
        }
        let client = self.client.clone();
        self.beats = tokio::spawn(async move {
            loop {
                for name in &names {
                    beat(&client, name).await;
                }
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
        });
    }

    async fn make_node(&self, name: &str) {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let node =
            serde_json::from_value(json!({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}}))
                .unwrap();
        nodes.create(&PostParams::default(), &node).await.expect("node");
        let status = json!({"status": {"conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady",
            "message": "", "lastHeartbeatTime": Timestamp::now(), "lastTransitionTime": Timestamp::now()}]}});
        nodes
            .patch_status(name, &PatchParams::default(), &Patch::Merge(status))
            .await
            .expect("node status");
        let migration_nodes: Api<MigrationNode> = Api::all(self.client.clone());
        let object: MigrationNode = serde_json::from_value(json!({"metadata": {"name": name}, "spec": {}})).unwrap();
        migration_nodes
            .create(&PostParams::default(), &object)
            .await
            .expect("migration node");
        let condition = |type_: &str| {
            json!({"type": type_, "status": "True", "reason": "Accepted", "message": "",
                "lastTransitionTime": Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()})
        };
        let status = json!({"status": {
            "architecture": "x86_64", "cpu": {"model": "fake", "features": ["sse2"]},
            "kernel": {"release": "6", "features": []}, "criu": {"version": "4.2", "path": "/criu"},
            "protocolVersions": [1], "checkpointLimitBytes": 1_000_000_000, "endpoint": "127.0.0.1:1",
            "conditions": [condition(node_cond::READY), condition(node_cond::COMPATIBLE)]}});
        migration_nodes
            .patch_status(name, &PatchParams::default(), &Patch::Merge(status))
            .await
            .expect("migration node status");
        beat(&self.client, name).await;
    }

    pub(crate) fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub(crate) fn migrations(&self) -> Api<ProcessMigration> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// A running pod on a node.
    pub(crate) async fn pod(&self, name: &str, letter: &str, patch: Value) {
        let mut pod = json!({
            "metadata": {"name": name, "labels": {"app": name}, "annotations": {"note": "kept"}},
            "spec": {"nodeName": self.node(letter), "terminationGracePeriodSeconds": 1, "automountServiceAccountToken": false,
                "containers": [{"name": "app", "image": "docker.io/peregrine/workload:dev", "imagePullPolicy": "IfNotPresent"}]},
        });
        merge(&mut pod, patch);
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let begun = Instant::now();
        loop {
            match self.pods().create(&PostParams::default(), &pod).await {
                Ok(_) => break,
                // The service account of a new namespace takes a moment.
                Err(error) if begun.elapsed() < PATIENCE => {
                    eprintln!("pod: {error}");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                Err(error) => panic!("pod: {error}"),
            }
        }
        self.pod_runs(name, true).await;
    }

    pub(crate) async fn pod_runs(&self, name: &str, ready: bool) {
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let status = json!({"status": {"phase": "Running",
            "conditions": [{"type": "Ready", "status": if ready {"True"} else {"False"}, "lastTransitionTime": now}],
            "containerStatuses": [{"name": "app", "image": "docker.io/peregrine/workload:dev", "imageID": "sha256:00",
                "ready": ready, "restartCount": 0, "state": {"running": {"startedAt": now}}}]}});
        self.pods()
            .patch_status(name, &PatchParams::default(), &Patch::Merge(status))
            .await
            .expect("pod status");
    }

    pub(crate) async fn bind(&self, pod: &str, letter: &str) {
        let body = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod},
            "target": {"apiVersion": "v1", "kind": "Node", "name": self.node(letter)}});
        self.pods()
            .create_subresource::<_, Value>("binding", pod, &PostParams::default(), &body)
            .await
            .map(|_| ())
            .expect("binding");
    }

    pub(crate) async fn migrate(&self, name: &str, pod: &str, spec: Value) {
        let mut object = json!({"apiVersion": "peregrine.dev/v1alpha1", "kind": "ProcessMigration",
            "metadata": {"name": name}, "spec": {"podRef": {"name": pod}}});
        merge(&mut object, json!({ "spec": spec }));
        let object: ProcessMigration = serde_json::from_value(object).unwrap();
        self.migrations()
            .create(&PostParams::default(), &object)
            .await
            .expect("migration");
    }

    pub(crate) async fn status(&self, name: &str) -> ProcessMigrationStatus {
        self.migrations()
            .get_opt(name)
            .await
            .expect("get")
            .and_then(|m| m.status)
            .unwrap_or_default()
    }

    /// Waits until the status is so; panics with what it was.
    pub(crate) async fn until(
        &self,
        name: &str,
        what: &str,
        f: impl Fn(&ProcessMigrationStatus) -> bool,
    ) -> ProcessMigrationStatus {
        let begun = Instant::now();
        loop {
            let status = self.status(name).await;
            if f(&status) {
                return status;
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "{name} is not {what}: {}",
                serde_json::to_string_pretty(&status).unwrap()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub(crate) async fn until_gone(&self, pod: &str) {
        let begun = Instant::now();
        while self.pods().get_opt(pod).await.expect("get").is_some() {
            assert!(begun.elapsed() < PATIENCE, "pod {pod} is still there");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The source's agent reports its preflight.
    pub(crate) async fn source_checked(&self, name: &str, checks: Value) {
        self.until(name, "accepted", |s| s.attempt == Some(1)).await;
        let status = json!({"source": {"checkedAttempt": 1, "memoryBytes": 1_000_000,
            "predictedFreezeMilliseconds": 120, "checks": checks}});
        self.apply(name, names::MANAGER_SOURCE, status).await;
    }

    /// Up to an admitted migration with a target pod on a node.
    pub(crate) async fn admitted(&self, name: &str, letter: &str) -> String {
        self.source_checked(name, json!([])).await;
        let status = self
            .until(name, "with a target pod", |s| {
                s.target.as_ref().is_some_and(|t| t.pod_uid.is_some())
            })
            .await;
        let target = status.target.unwrap().pod_name.unwrap();
        self.bind(&target, letter).await;
        self.until(name, "placed", |s| {
            s.target.as_ref().is_some_and(|t| t.node_name.is_some())
        })
        .await;
        target
    }

    pub(crate) async fn target_ready(&self, name: &str, target: &str) {
        self.pod_runs(target, true).await;
        let status = json!({"target": {"step": "prepared"}, "conditions": [condition(cond::TARGET_READY)]});
        self.apply(name, names::MANAGER_TARGET, status).await;
    }

    pub(crate) async fn freezing(&self, name: &str, synced: bool) {
        let mut conditions = vec![];
        if synced {
            conditions.push(condition(cond::MEMORY_SYNCED));
        }
        let status = json!({"source": {"checkedAttempt": 1, "memoryBytes": 1_000_000, "predictedFreezeMilliseconds": 120,
            "step": "frozen", "dumpMilliseconds": 50, "sentMilliseconds": 70, "bytesSent": 5_000_000}, "conditions": conditions});
        self.apply(name, names::MANAGER_SOURCE, status).await;
    }

    /// The target's agent commits, in one patch.
    pub(crate) async fn commit(&self, name: &str) -> Result<(), kube::Error> {
        let migration = self.migrations().get(name).await?;
        let patch = json!([
            {"op": "test", "path": "/metadata/uid", "value": migration.uid()},
            {"op": "test", "path": "/status/decision/value", "value": "Undecided"},
            {"op": "add", "path": "/status/conditions/-", "value": condition(cond::RESTORED)},
            {"op": "replace", "path": "/status/decision", "value":
                {"value": "Committed", "by": "Target", "time": Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()}},
        ]);
        let patch: Patch<()> = Patch::Json(serde_json::from_value(patch).unwrap());
        self.migrations()
            .patch_status(name, &PatchParams::default(), &patch)
            .await
            .map(|_| ())
    }

    pub(crate) async fn source_released(&self, name: &str, released: bool) {
        let mut condition = condition(cond::SOURCE_RELEASED);
        if !released {
            condition["status"] = json!("False");
        }
        let status = json!({"source": {"checkedAttempt": 1, "memoryBytes": 1_000_000, "predictedFreezeMilliseconds": 120,
            "step": "frozen", "frozenMilliseconds": 150, "dumpMilliseconds": 50, "sentMilliseconds": 70, "bytesSent": 5_000_000},
            "conditions": [condition]});
        self.apply(name, names::MANAGER_SOURCE, status).await;
    }

    pub(crate) async fn target_destroyed(&self, name: &str) {
        let status =
            json!({"target": {"step": "prepared", "destroyed": true}, "conditions": [condition(cond::TARGET_READY)]});
        self.apply(name, names::MANAGER_TARGET, status).await;
    }

    pub(crate) async fn apply(&self, name: &str, manager: &str, status: Value) {
        let body = json!({"apiVersion": "peregrine.dev/v1alpha1", "kind": "ProcessMigration",
            "metadata": {"name": name}, "status": status});
        self.migrations()
            .patch_status(name, &PatchParams::apply(manager).force(), &Patch::Apply(body))
            .await
            .expect("apply");
    }

    pub(crate) async fn cancel(&self, name: &str) {
        let patch = json!({"spec": {"desiredState": "Canceled"}});
        self.migrations()
            .patch(name, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .expect("cancel");
    }

    /// Settled, in this phase, for this reason, with nothing of ours left on the object.
    pub(crate) async fn finished(&self, name: &str, phase: Phase, reason: &str) -> ProcessMigrationStatus {
        let status = self
            .until(name, "finished", |s| {
                crds::condition::is_true(&s.conditions, cond::FINISHED)
            })
            .await;
        let finished = crds::condition::find(&status.conditions, cond::FINISHED).unwrap();
        assert_eq!(status.phase, Some(phase), "{}", finished.message);
        assert_eq!(finished.reason, reason, "{}", finished.message);
        assert_ne!(
            status.decision.as_ref().map(|d| d.value),
            Some(DecisionValue::Undecided),
            "a finished migration can still be committed"
        );
        let begun = Instant::now();
        while self
            .migrations()
            .get_opt(name)
            .await
            .expect("get")
            .is_some_and(|m| m.metadata.finalizers.is_some_and(|f| !f.is_empty()))
        {
            assert!(begun.elapsed() < PATIENCE, "the finalizer is still there");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        status
    }
}

async fn beat(client: &Client, name: &str) {
    let leases: Api<Lease> = Api::namespaced(client.clone(), "peregrine-system");
    let body = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/component": "node-agent"}},
        "spec": {"holderIdentity": name, "leaseDurationSeconds": 40,
            "renewTime": Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string()}});
    let _kept = leases
        .patch(name, &PatchParams::apply("beat").force(), &Patch::Apply(body))
        .await
        .map_err(|e| eprintln!("beat: {e}"));
}

pub(crate) fn condition(type_: &str) -> Value {
    json!({"type": type_, "status": "True", "reason": "Accepted", "message": "",
        "lastTransitionTime": Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()})
}

pub(crate) fn merge(into: &mut Value, patch: Value) {
    match (into, patch) {
        (Value::Object(into), Value::Object(patch)) => {
            for (key, value) in patch {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, patch) => *into = patch,
    }
}
