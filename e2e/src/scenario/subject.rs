//! A workload as a scenario sees it: its pod, wherever it is, and its oracle.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::core::v1::{Pod, Service};
use serde::Deserialize;
use serde_json::{Value, json};

use super::stage::{NAMESPACE, Stage, output};
use crate::witness::Life;

/// How long a pod may take to be Ready.
const READY: Duration = Duration::from_secs(60);
/// How long counters may take to go on.
const TICK: Duration = Duration::from_secs(20);
/// Port of the first container's HTTP server; the others follow.
const PORT: u16 = 8080;

/// What a workload is to be.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Its name; pods of it have the label `app` with this value.
    pub name: String,
    /// The node to start on.
    pub node: Option<String>,
    /// Memory of each container, in MiB.
    pub mib: u32,
    /// Containers.
    pub containers: u16,
    /// Uid it runs as; none is root.
    pub user: Option<u32>,
    /// Merged into the pod's spec.
    pub spec: Value,
    /// More arguments of each container.
    pub args: Vec<String>,
}

impl Plan {
    /// One container of 64 MiB, as root.
    #[must_use]
    pub fn small(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            node: None,
            mib: 64,
            containers: 1,
            user: None,
            spec: json!({}),
            args: Vec::new(),
        }
    }

    /// The pod.
    #[must_use]
    pub fn pod(&self, image: &str, witness: Option<&str>) -> Value {
        let containers: Vec<Value> = (0..self.containers)
            .map(|index| {
                let (name, port) = (container_name(index), PORT + index);
                let mut args = vec!["run".to_owned()];
                for (flag, value) in [("--name", self.name.clone()), ("--container", name.clone()), ("--mib", self.mib.to_string()), ("--http", port.to_string())] {
                    args.extend([flag.to_owned(), value]);
                }
                if let Some(witness) = witness {
                    args.extend(["--witness".to_owned(), witness.to_owned()]);
                }
                args.extend(self.args.iter().cloned());
                json!({
                    "name": name, "image": image, "imagePullPolicy": "IfNotPresent", "args": args,
                    "ports": [{"containerPort": port}],
                    "readinessProbe": {"httpGet": {"path": "/healthz", "port": port}, "periodSeconds": 1, "timeoutSeconds": 2, "failureThreshold": 5},
                })
            })
            .collect();
        let mut spec = json!({"containers": containers, "terminationGracePeriodSeconds": 2, "automountServiceAccountToken": false});
        if let Some(node) = &self.node {
            // By a preference and not by nodeName: the pod may run on other nodes as well, and has passed the scheduler.
            spec["affinity"] = json!({"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 100, "preference": {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}}]}});
        }
        if let Some(user) = self.user {
            spec["securityContext"] = json!({"runAsUser": user, "runAsGroup": user, "runAsNonRoot": true});
        }
        merge(&mut spec, &self.spec);
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": self.name, "namespace": NAMESPACE, "labels": {"app": self.name}}, "spec": spec})
    }
}

fn container_name(index: u16) -> String {
    if index == 0 {
        "main".to_owned()
    } else {
        format!("side-{index}")
    }
}

/// Merges objects; all else is replaced.
fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (name, value) in from {
                merge(into.entry(name.clone()).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}

/// What a container's program says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct State {
    /// Random, in memory only.
    pub token: String,
    /// Uid it runs as.
    pub uid: u32,
    /// Milliseconds since its start, by its own monotonic clock.
    pub uptime_ms: u64,
    /// The main counter.
    pub counter: u64,
    /// Everything else that ticks.
    pub counters: BTreeMap<String, u64>,
    /// Words of its memory that were wrong.
    pub bad_words: u64,
    /// What must not have happened.
    pub faults: Vec<String>,
}

/// A workload that runs.
#[derive(Debug)]
pub struct Subject {
    /// Its name.
    pub name: String,
    /// Its present pod.
    pub pod: String,
    containers: u16,
    known: Vec<State>,
    /// When it was asked for, by the witness's clock.
    born_ms: u64,
}

impl Subject {
    /// Starts it and waits until it is Ready and ticks.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(stage: &Stage, plan: &Plan) -> Result<Self> {
        let pod = plan.pod(&stage.images().workload.name(), stage.witness_address().as_deref());
        let born_ms = stage.witnessed(&plan.name)?.map_or(0, |(now, _)| now);
        // A new namespace gets its service account a moment later.
        stage.wait("the pod to be accepted", READY, || stage.create::<Pod>(pod.clone()))?;
        let mut subject = Self {
            name: plan.name.clone(),
            pod: plan.name.clone(),
            containers: plan.containers,
            known: Vec::new(),
            born_ms,
        };
        subject.wait_ready(stage)?;
        subject.known = subject.states(stage)?;
        subject.check(stage)?;
        Ok(subject)
    }

    /// The pod object.
    ///
    /// # Errors
    /// If it is not there.
    pub fn object(&self, stage: &Stage) -> Result<Pod> {
        stage
            .find::<Pod>(NAMESPACE, &self.pod)?
            .with_context(|| format!("there is no pod {}", self.pod))
    }

    /// The node it is on.
    ///
    /// # Errors
    /// If there is no such pod, or it has no node.
    pub fn node(&self, stage: &Stage) -> Result<String> {
        self.object(stage)?
            .spec
            .and_then(|spec| spec.node_name)
            .with_context(|| format!("the pod {} has no node", self.pod))
    }

    /// Waits until the kubelet says that it is Ready.
    ///
    /// # Errors
    /// If it does not become Ready in time.
    pub fn wait_ready(&self, stage: &Stage) -> Result<()> {
        stage.wait(&format!("the pod {} to be Ready", self.pod), READY, || {
            let status = self.object(stage)?.status.unwrap_or_default();
            let ready = status
                .conditions
                .iter()
                .flatten()
                .any(|condition| condition.type_ == "Ready" && condition.status == "True");
            ensure!(
                ready,
                "phase {}, containers {:?}",
                status.phase.unwrap_or_default(),
                status
                    .container_statuses
                    .iter()
                    .flatten()
                    .map(|c| &c.state)
                    .collect::<Vec<_>>()
            );
            Ok(())
        })
    }

    fn ask<T: serde::de::DeserializeOwned>(&self, stage: &Stage, index: u16, what: &str) -> Result<T> {
        let folder = format!(
            "/api/v1/namespaces/{NAMESPACE}/pods/{}:{}/proxy",
            self.pod,
            PORT + index
        );
        stage
            .get_path(&folder, what)?
            .with_context(|| format!("the pod {} does not serve /{what}", self.pod))
    }

    /// What its containers say.
    ///
    /// # Errors
    /// If one does not answer.
    pub fn states(&self, stage: &Stage) -> Result<Vec<State>> {
        (0..self.containers)
            .map(|index| self.ask(stage, index, "state"))
            .collect()
    }

    /// The oracle, asked twice: it is the same process as ever, everything it holds is right, and everything in it goes on.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&mut self, stage: &Stage) -> Result<()> {
        let first = stage.wait(&format!("{} to answer", self.pod), TICK, || self.states(stage))?;
        for (before, now) in self.known.iter().zip(&first) {
            same(before, now)?;
        }
        let second = stage.wait(&format!("everything in {} to go on", self.pod), TICK, || {
            let second = self.states(stage)?;
            for (before, now) in first.iter().zip(&second) {
                same(before, now)?;
                if let Some(still) = stands_still(before, now) {
                    bail!("{still} stands still at {:?}", before.counters.get(still));
                }
            }
            Ok(second)
        })?;
        for index in 0..self.containers {
            let answer: Value = self.ask(stage, index, "verify")?;
            ensure!(
                answer["bad_words"] == 0,
                "{} of container {index} has wrong memory: {answer}",
                self.pod
            );
        }
        self.known = second;
        Ok(())
    }

    /// What users see of a pod works: logs, exec, and a new connection through its Service if it has one.
    ///
    /// # Errors
    /// What does not.
    pub fn check_access(&self, stage: &Stage) -> Result<()> {
        let marker = self.known.first().map(|state| state.token.clone()).unwrap_or_default();
        stage.wait("the log to go on", TICK, || {
            let mut logs = stage.kubectl();
            logs.args(["logs", "-n", NAMESPACE, &self.pod, "-c", "main", "--tail=3"]);
            let text = output(logs, "kubectl logs")?;
            ensure!(text.contains(&marker), "the last lines are {text:?}");
            Ok(())
        })?;
        let mut exec = stage.kubectl();
        exec.args([
            "exec",
            "-n",
            NAMESPACE,
            &self.pod,
            "-c",
            "main",
            "--",
            "/workload",
            "fetch",
            "http://127.0.0.1:8080/state",
        ]);
        let text = output(exec, "kubectl exec")?;
        ensure!(text.contains(&marker), "kubectl exec reached another process: {text}");
        self.wait_ready(stage)
    }

    /// Gives it a Service.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn add_service(&self, stage: &Stage) -> Result<String> {
        let service: Service = stage.create(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": self.name, "namespace": NAMESPACE, "labels": {"app": self.name}},
            "spec": {"selector": {"app": self.name}, "ports": [{"port": 8080, "targetPort": 8080}]},
        }))?;
        service
            .spec
            .and_then(|spec| spec.cluster_ip)
            .context("the Service has no address")
    }

    /// A new connection to its Service, from another pod, reaches this very process.
    ///
    /// # Errors
    /// If it does not.
    pub fn check_service(&self, stage: &Stage, address: &str, client: &Subject) -> Result<()> {
        let marker = self.known.first().map(|state| state.token.clone()).unwrap_or_default();
        stage.wait("the Service to reach the pod", TICK, || {
            let mut exec = stage.kubectl();
            exec.args([
                "exec",
                "-n",
                NAMESPACE,
                &client.pod,
                "-c",
                "main",
                "--",
                "/workload",
                "fetch",
                &format!("http://{address}:8080/state"),
            ]);
            let text = output(exec, "a connection to the Service")?;
            ensure!(text.contains(&marker), "the Service reached another process: {text}");
            Ok(())
        })
    }

    /// Its lives, as the witness saw them; not those of an earlier workload of the same name.
    ///
    /// # Errors
    /// If the witness does not answer.
    pub fn lives(&self, stage: &Stage) -> Result<Option<Vec<Life>>> {
        Ok(stage
            .witnessed(&self.name)?
            .map(|(_, lives)| lives.into_iter().filter(|life| life.last_ms >= self.born_ms).collect()))
    }

    /// What was last known of its first container.
    #[must_use]
    pub fn known(&self) -> &[State] {
        &self.known
    }

    /// Ends it, whatever its state.
    ///
    /// # Errors
    /// If the API server refuses.
    pub fn remove(&self, stage: &Stage) -> Result<()> {
        for pod in stage.list::<Pod>(NAMESPACE, &format!("app={}", self.name))? {
            if let Some(name) = pod.metadata.name {
                stage.delete::<Pod>(&name, Some(1))?;
            }
        }
        stage.delete::<Service>(&self.name, None)
    }
}

fn same(before: &State, now: &State) -> Result<()> {
    ensure!(
        before.token == now.token,
        "the process was restarted: its token was {} and is {}",
        before.token,
        now.token
    );
    ensure!(now.faults.is_empty(), "the workload saw: {}", now.faults.join("; "));
    ensure!(now.bad_words == 0, "{} words of its memory are wrong", now.bad_words);
    ensure!(
        before.uid == now.uid,
        "it ran as {} and runs as {}",
        before.uid,
        now.uid
    );
    ensure!(
        before.counter <= now.counter,
        "the counter went back from {} to {}",
        before.counter,
        now.counter
    );
    ensure!(
        before.uptime_ms <= now.uptime_ms,
        "its clock went back from {} to {} ms",
        before.uptime_ms,
        now.uptime_ms
    );
    for (name, beats) in &before.counters {
        let beats_now = now.counters.get(name).copied().unwrap_or(0);
        ensure!(
            *beats <= beats_now,
            "the counter of {name} went back from {beats} to {beats_now}"
        );
    }
    Ok(())
}

/// The first of the counters that has not gone on.
fn stands_still<'a>(before: &'a State, now: &State) -> Option<&'a str> {
    if now.counter == before.counter {
        return Some("counter");
    }
    before
        .counters
        .iter()
        .find(|(name, beats)| now.counters.get(*name) <= Some(*beats))
        .map(|(name, _)| name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(token: &str, counter: u64, timerfd: u64) -> State {
        State {
            token: token.into(),
            uid: 0,
            uptime_ms: 1,
            counter,
            counters: BTreeMap::from([("timerfd".to_owned(), timerfd)]),
            bad_words: 0,
            faults: Vec::new(),
        }
    }

    #[test]
    fn a_restart_a_step_back_and_a_fault_are_not_the_same() {
        assert!(same(&state("t", 1, 1), &state("t", 1, 1)).is_ok());
        for (other, words) in [
            (state("u", 9, 9), "restarted"),
            (state("t", 0, 1), "went back"),
            (state("t", 1, 0), "timerfd"),
        ] {
            assert!(same(&state("t", 1, 1), &other).unwrap_err().to_string().contains(words));
        }
        let faulty = State {
            faults: vec!["poll: EINTR".into()],
            ..state("t", 2, 2)
        };
        assert!(
            same(&state("t", 1, 1), &faulty)
                .unwrap_err()
                .to_string()
                .contains("EINTR")
        );
    }

    #[test]
    fn a_timer_that_stopped_is_found() {
        assert_eq!(stands_still(&state("t", 1, 1), &state("t", 2, 1)), Some("timerfd"));
        assert_eq!(stands_still(&state("t", 1, 1), &state("t", 1, 2)), Some("counter"));
        assert_eq!(stands_still(&state("t", 1, 1), &state("t", 2, 2)), None);
    }

    #[test]
    fn a_plan_becomes_a_pod() {
        let pod = Plan {
            containers: 2,
            user: Some(1000),
            spec: json!({"hostNetwork": true}),
            ..Plan::small("w")
        }
        .pod("image", Some("1.2.3.4:5"));
        assert_eq!(pod["spec"]["containers"][1]["name"], "side-1");
        assert_eq!(pod["spec"]["hostNetwork"], true);
        assert_eq!(pod["spec"]["securityContext"]["runAsUser"], 1000);
        assert!(
            pod["spec"]["containers"][0]["args"]
                .as_array()
                .unwrap()
                .contains(&json!("1.2.3.4:5"))
        );
    }
}
