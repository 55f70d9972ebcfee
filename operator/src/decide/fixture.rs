//! A small cluster in memory for tests of decisions: what an API server, agents, scheduler and kubelets would make of them.

use std::sync::Arc;

use crds::condition::find;
use crds::process_migration::{Decision as Decided, DecisionValue, Failure, Party, cond};
use crds::{MigrationNodeSpec, MigrationNodeStatus, ProcessMigration, ProcessMigrationStatus};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use serde_json::{Value, json};

use super::world::{Heartbeat, Learned};
use super::{Decision, Effects, FinalizerChange, Limits, NodeView, Observed, Stage, Wake, World, decide, pod, stage};

/// The time at which every test begins.
pub(crate) fn start() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

/// A running pod on node a.
pub(crate) fn running_pod(patch: Value) -> Pod {
    let mut pod = json!({
        "metadata": {"name": "web-0", "namespace": "shop", "uid": "pod-uid", "resourceVersion": "1",
            "labels": {"app": "web"}, "annotations": {"note": "kept"}, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"nodeName": "a", "containers": [{"name": "app", "image": "docker.io/peregrine/workload:dev"}]},
        "status": {"phase": "Running",
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"name": "app", "image": "docker.io/peregrine/workload:dev", "imageID": "sha256:00",
                "ready": true, "restartCount": 0, "state": {"running": {}}}]},
    });
    merge(&mut pod, patch);
    serde_json::from_value(pod).unwrap()
}

/// A migration of that pod.
pub(crate) fn migration(spec: Value) -> ProcessMigration {
    let mut object = json!({
        "apiVersion": "peregrine.dev/v1alpha1", "kind": "ProcessMigration",
        "metadata": {"name": "move", "namespace": "shop", "uid": "move-uid", "resourceVersion": "1", "generation": 1,
            "creationTimestamp": "2027-01-15T08:00:00Z"},
        "spec": {"podRef": {"name": "web-0"}},
    });
    merge(&mut object, json!({"spec": spec}));
    serde_json::from_value(object).unwrap()
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

fn condition(type_: &str, status: &str, now: Timestamp) -> Condition {
    Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: "Accepted".to_owned(),
        message: String::new(),
        observed_generation: None,
        last_transition_time: Time(now),
    }
}

/// A node with a ready, compatible agent.
pub(crate) fn node(name: &str) -> NodeView {
    NodeView {
        name: name.to_owned(),
        exists: true,
        ready: true,
        cordoned: false,
        labels: [("zone".to_owned(), format!("zone-{name}"))].into(),
        migration_node: Some((
            MigrationNodeSpec {
                schedulable: true,
                max_inbound: None,
                max_outbound: None,
            },
            MigrationNodeStatus {
                architecture: Some("x86_64".to_owned()),
                cpu: Some(crds::migration_node::CpuStatus::default()),
                kernel: Some(crds::migration_node::KernelStatus {
                    features: vec!["pagemap-scan".to_owned(), "userfaultfd-wp-async".to_owned()],
                    ..Default::default()
                }),
                protocol_versions: vec![1],
                checkpoint_limit_bytes: Some(1_000_000_000),
                conditions: vec![
                    condition(crds::migration_node::cond::READY, "True", start()),
                    condition(crds::migration_node::cond::COMPATIBLE, "True", start()),
                ],
                ..Default::default()
            },
        )),
        heartbeat: Heartbeat::Fresh,
    }
}

/// A cluster of nodes a, b, c with one migration in it.
#[derive(Clone, Debug)]
pub(crate) struct Cluster {
    pub(crate) world: World,
    /// The API refuses target pods.
    pub(crate) refuses_pods: bool,
    /// The migration object is gone.
    pub(crate) gone: bool,
    /// Every effect that was applied, with the stage in which it was decided.
    pub(crate) log: Vec<(Stage, Effects)>,
    versions: u64,
}

impl Cluster {
    pub(crate) fn new(spec: Value) -> Cluster {
        Cluster {
            world: World {
                now: start(),
                migration: Arc::new(migration(spec)),
                source_pod: Observed::Present(running_pod(json!({}))),
                target_pod: Observed::Absent,
                nodes: Arc::new(vec![node("a"), node("b"), node("c")]),
                claims: [].into(),
                others: vec![],
                limits: Limits::default(),
                last_change: None,
                first_seen: Some(start()),
                learned: Learned::default(),
            },
            refuses_pods: false,
            gone: false,
            log: vec![],
            versions: 10,
        }
    }

    pub(crate) fn status(&self) -> ProcessMigrationStatus {
        self.world.status()
    }

    pub(crate) fn change(&mut self, f: impl FnOnce(&mut ProcessMigration)) {
        let mut migration = (*self.world.migration).clone();
        f(&mut migration);
        self.versions += 1;
        migration.metadata.resource_version = Some(self.versions.to_string());
        self.world.migration = Arc::new(migration);
    }

    pub(crate) fn change_status(&mut self, f: impl FnOnce(&mut ProcessMigrationStatus)) {
        self.change(|m| f(m.status.get_or_insert_default()));
    }

    pub(crate) fn node(&mut self, name: &str, f: impl FnOnce(&mut NodeView)) {
        let mut nodes = (*self.world.nodes).clone();
        f(nodes.iter_mut().find(|n| n.name == name).unwrap());
        self.world.nodes = Arc::new(nodes);
    }

    pub(crate) fn pass_time(&mut self, seconds: i64) {
        self.world.now += SignedDuration::from_secs(seconds);
    }

    /// Decides and applies until nothing is left to do. Panics where that does not end.
    pub(crate) fn settle(&mut self) -> Decision {
        self.world.learned = Learned::default();
        for _ in 0..16 {
            let decision = decide(&self.world);
            if self.gone {
                return decision;
            }
            let done = self.apply(&decision);
            if !done {
                return decision;
            }
        }
        panic!(
            "no end of passes: {:#?}",
            self.log.iter().rev().take(3).collect::<Vec<_>>()
        );
    }

    /// One round of a pass.
    pub(crate) fn round(&mut self) -> Decision {
        let decision = decide(&self.world);
        self.apply(&decision);
        decision
    }

    /// Applies one decision. True: something was done.
    fn apply(&mut self, decision: &Decision) -> bool {
        let stage = stage::of(&self.world);
        let mut done = !decision.effects.is_empty();
        if done {
            self.log.push((stage, decision.effects.clone()));
        }
        let Effects {
            finalizer,
            open_decision,
            abort,
            try_target,
            create_target,
            hand_over,
            delete_source,
            delete_target,
            delete_migration,
        } = decision.effects.clone();
        match finalizer {
            Some(FinalizerChange::Add) => {
                self.change(|m| m.metadata.finalizers = Some(vec![crds::names::FINALIZER.to_owned()]));
            }
            Some(FinalizerChange::Remove) => {
                self.change(|m| m.metadata.finalizers = None);
                self.gone |= self.world.is_deleting();
            }
            None => {}
        }
        if open_decision {
            assert!(self.status().decision.is_none(), "a decision was opened twice");
            self.change_status(|s| {
                s.decision = Some(Decided {
                    value: DecisionValue::Undecided,
                    by: None,
                    reason: None,
                    message: None,
                    time: None,
                });
            });
        }
        if let Some(cause) = abort {
            self.decide_as(
                DecisionValue::Aborted,
                Party::Operator,
                cause.reason.as_str(),
                &cause.message,
            );
        }
        if let Some(pod) = try_target {
            self.world.learned.dry_run = Some(if self.refuses_pods {
                Err("exceeded quota".to_owned())
            } else {
                Ok(pod)
            });
        }
        if let Some(mut pod) = create_target {
            if self.refuses_pods {
                self.world.learned.create_refused = Some("exceeded quota".to_owned());
            } else {
                assert_eq!(self.world.target_pod, Observed::Absent, "the target was created twice");
                self.versions += 1;
                pod.metadata.uid = Some(format!("target-uid-{}", self.versions));
                pod.metadata.resource_version = Some(self.versions.to_string());
                pod.metadata.creation_timestamp = Some(Time(self.world.now));
                pod.status = Some(serde_json::from_value(json!({"phase": "Pending"})).unwrap());
                self.world.target_pod = Observed::Present(*pod);
            }
        }
        if let Some(to) = hand_over
            && let Observed::Present(target) = &mut self.world.target_pod
        {
            assert_eq!(target.metadata.uid.as_deref(), Some(to.uid.as_str()));
            target.metadata.labels.get_or_insert_default().extend(to.labels);
            target.metadata.owner_references = Some(to.owners);
        }
        for (victim, is_source) in [(delete_source, true), (delete_target, false)] {
            let Some(victim) = victim else { continue };
            let now = self.world.now;
            let slot = if is_source {
                &mut self.world.source_pod
            } else {
                &mut self.world.target_pod
            };
            let Observed::Present(pod) = slot else { continue };
            assert_eq!(pod::uid(pod), victim.uid, "another pod would be deleted");
            if victim.grace == Some(0) {
                *slot = Observed::Absent;
            } else {
                assert!(!pod::is_deleting(pod), "deleted twice");
                pod.metadata.deletion_timestamp = Some(Time(now));
                pod.metadata.deletion_grace_period_seconds = Some(i64::from(victim.grace.unwrap_or(30)));
            }
        }
        if delete_migration {
            self.gone = true;
        }
        let old = super::View::stored(&self.status(), self.world.migration.metadata.generation, self.world.now);
        if decision.view != old && !self.gone {
            self.change_status(|s| decision.view.write_into(s));
            done = true;
        }
        done && !self.gone
    }

    /// Compare-and-swap of the decision. False: it was decided before.
    pub(crate) fn decide_as(&mut self, value: DecisionValue, by: Party, reason: &str, message: &str) -> bool {
        let undecided = self
            .status()
            .decision
            .is_some_and(|d| d.value == DecisionValue::Undecided);
        if !undecided {
            return false;
        }
        let now = self.world.now;
        self.change_status(|s| {
            s.decision = Some(Decided {
                value,
                by: Some(by),
                reason: Some(reason.to_owned()),
                message: Some(message.to_owned()),
                time: Some(Time(now)),
            });
        });
        true
    }

    // What agents, scheduler and kubelets do. Each is legal at any time; where it makes no sense nothing happens.

    pub(crate) fn agent_sets(&mut self, type_: &str, status: &str) {
        let now = self.world.now;
        self.change_status(|s| {
            if find(&s.conditions, type_).is_some_and(|c| c.status == status) {
                return;
            }
            s.conditions.retain(|c| c.type_ != type_);
            s.conditions.push(condition(type_, status, now));
        });
        self.world.last_change = Some(now);
    }

    pub(crate) fn source_checks(&mut self, checks: Value) {
        if self.status().attempt.is_none() {
            return;
        }
        self.change_status(|s| {
            let half = s.source.get_or_insert_default();
            half.checked_attempt = s.attempt;
            half.memory_bytes = Some(1_000_000);
            half.predicted_freeze_milliseconds = Some(100);
            half.checks = serde_json::from_value(checks).unwrap();
        });
        self.world.last_change = Some(self.world.now);
    }

    pub(crate) fn bind(&mut self, name: &str) {
        let now = self.world.now;
        if let Observed::Present(target) = &mut self.world.target_pod
            && pod::node(target).is_none()
            && !pod::is_deleting(target)
        {
            target.spec.as_mut().unwrap().node_name = Some(name.to_owned());
            target.status = Some(
                serde_json::from_value(json!({"phase": "Pending", "conditions": [{"type": "PodScheduled",
                    "status": "True", "lastTransitionTime": Time(now)}]}))
                .unwrap(),
            );
        }
    }

    pub(crate) fn target_pod_runs(&mut self, ready: bool) {
        if let Observed::Present(target) = &mut self.world.target_pod
            && pod::node(target).is_some()
        {
            target.status = running_pod(json!({})).status;
            if !ready {
                target.status.as_mut().unwrap().conditions = None;
            }
        }
    }

    pub(crate) fn target_is_ready(&mut self) {
        if self.world.target_pod.present().and_then(pod::node).is_some() {
            self.target_pod_runs(true);
            self.change_status(|s| s.target.get_or_insert_default().step = Some("prepared".to_owned()));
            self.agent_sets(cond::TARGET_READY, "True");
        }
    }

    pub(crate) fn source_freezes(&mut self) {
        let ready = crds::condition::is_true(&self.status().conditions, cond::TARGET_READY);
        let undecided = self
            .status()
            .decision
            .is_some_and(|d| d.value == DecisionValue::Undecided);
        if ready && undecided {
            self.change_status(|s| s.source.get_or_insert_default().step = Some("frozen".to_owned()));
            self.world.last_change = Some(self.world.now);
        }
    }

    pub(crate) fn source_sent(&mut self) {
        if self.status().source.is_some_and(|s| s.step.is_some()) {
            self.agent_sets(cond::MEMORY_SYNCED, "True");
        }
    }

    /// The target's agent commits, if it holds everything.
    pub(crate) fn commit(&mut self) -> bool {
        if !crds::condition::is_true(&self.status().conditions, cond::MEMORY_SYNCED)
            || !crds::condition::is_true(&self.status().conditions, cond::ADMITTED)
            || !self.decide_as(DecisionValue::Committed, Party::Target, "AllContainersHeld", "")
        {
            return false;
        }
        self.agent_sets(cond::RESTORED, "True");
        true
    }

    /// The agents do what a decision asks of them.
    pub(crate) fn agents_conclude(&mut self) {
        let status = self.status();
        match status.decision.map(|d| d.value) {
            Some(DecisionValue::Aborted) => {
                if status.source.is_some_and(|s| s.step.is_some()) {
                    self.agent_sets(cond::SOURCE_RELEASED, "False");
                }
                if status.target.is_some_and(|t| t.step.is_some()) {
                    self.change_status(|s| s.target.get_or_insert_default().destroyed = Some(true));
                }
            }
            Some(DecisionValue::Committed) => {
                if self.world.source_pod == Observed::Absent {
                    self.agent_sets(cond::SOURCE_RELEASED, "True");
                }
            }
            Some(DecisionValue::Undecided) | None => {}
        }
    }

    pub(crate) fn source_fails(&mut self) {
        self.change_status(|s| {
            s.source.get_or_insert_default().failure = Some(Failure {
                reason: "CheckpointFailed".to_owned(),
                message: "CRIU cannot dump an io_uring".to_owned(),
            });
        });
    }

    /// Kubelets end what is being deleted.
    pub(crate) fn kubelets_end(&mut self) {
        for slot in [&mut self.world.source_pod, &mut self.world.target_pod] {
            if slot.present().is_some_and(pod::is_deleting) {
                *slot = Observed::Absent;
            }
        }
    }

    pub(crate) fn user_deletes_source(&mut self) {
        let now = self.world.now;
        if let Observed::Present(source) = &mut self.world.source_pod
            && !pod::is_deleting(source)
        {
            source.metadata.deletion_timestamp = Some(Time(now));
            source.metadata.deletion_grace_period_seconds = Some(30);
        }
    }

    pub(crate) fn user_deletes_target(&mut self) {
        let now = self.world.now;
        if let Observed::Present(target) = &mut self.world.target_pod
            && !pod::is_deleting(target)
        {
            target.metadata.deletion_timestamp = Some(Time(now));
            target.metadata.deletion_grace_period_seconds = Some(30);
        }
    }

    pub(crate) fn user_deletes_migration(&mut self) {
        if self.world.migration.metadata.finalizers.is_none() {
            self.gone = true;
            return;
        }
        let now = self.world.now;
        self.change(|m| {
            m.metadata
                .deletion_timestamp
                .get_or_insert(Time(now))
                .clone_from(&Time(now))
        });
    }

    pub(crate) fn user_cancels(&mut self) {
        self.change(|m| m.spec.desired_state = crds::process_migration::DesiredState::Canceled);
    }

    pub(crate) fn lose_node(&mut self, name: &str) {
        self.node(name, |n| {
            n.heartbeat = Heartbeat::Stale;
            n.ready = false;
        });
    }

    pub(crate) fn restart_operator(&mut self) {
        self.world.last_change = None;
        self.world.first_seen = None;
    }

    /// Up to the freeze.
    pub(crate) fn until(&mut self, step: Step) -> &mut Self {
        for next in Step::ALL {
            self.settle();
            match next {
                Step::Accepted => {}
                Step::Admitted => self.source_checks(json!([])),
                Step::Placed => self.bind("b"),
                Step::TargetReady => self.target_is_ready(),
                Step::Frozen => self.source_freezes(),
                Step::Sent => self.source_sent(),
                Step::Committed => assert!(self.commit()),
            }
            self.settle();
            if next == step {
                return self;
            }
        }
        self
    }

    pub(crate) fn is_finished(&self) -> bool {
        stage::of(&self.world) == Stage::Finished
    }

    pub(crate) fn finished(&self) -> (crds::process_migration::Phase, String, String) {
        let status = self.status();
        let finished = find(&status.conditions, cond::FINISHED)
            .unwrap_or_else(|| panic!("not finished: {:#?}", status.conditions));
        (status.phase.unwrap(), finished.reason.clone(), finished.message.clone())
    }
}

/// How far a move is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Accepted,
    Admitted,
    Placed,
    TargetReady,
    Frozen,
    Sent,
    Committed,
}

impl Step {
    pub(crate) const ALL: [Step; 7] = [
        Step::Accepted,
        Step::Admitted,
        Step::Placed,
        Step::TargetReady,
        Step::Frozen,
        Step::Sent,
        Step::Committed,
    ];
    pub(crate) const BEFORE_COMMIT: [Step; 6] = [
        Step::Accepted,
        Step::Admitted,
        Step::Placed,
        Step::TargetReady,
        Step::Frozen,
        Step::Sent,
    ];
}

/// When a decision wakes.
pub(crate) fn wakes_at(decision: &Decision) -> Option<Timestamp> {
    match decision.wake {
        Wake::AwaitChange => None,
        Wake::At(at) => Some(at),
    }
}
