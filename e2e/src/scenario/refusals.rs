//! What cannot be moved is refused before anything is touched, by name and with a remedy; a dry run says the same.

use anyhow::{Context as _, Result, ensure};

use crds::ProcessMigration;
use crds::process_migration::{Check, Phase, Verdict};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::Scenario;
use super::moves::{Move, because, move_to, phase, story};
use super::stage::{NAMESPACE, Stage};
use super::subject::{Plan, Subject};
use crate::invariants;

/// A pod that cannot be moved: what is added to the plan, and the reason that names it.
struct Case {
    name: &'static str,
    spec: fn() -> Value,
    reason: &'static str,
    /// A word that the message must contain: the thing's own name.
    names: &'static str,
}

/// The spec of the first container is replaced as a whole by a merge, so these set what is on the pod, or the whole list.
const CASES: &[Case] = &[
    Case {
        name: "host_network",
        spec: || json!({"hostNetwork": true}),
        reason: "HostNamespace",
        names: "hostNetwork",
    },
    Case {
        name: "host_pid",
        spec: || json!({"hostPID": true}),
        reason: "HostNamespace",
        names: "hostPID",
    },
    Case {
        name: "host_ipc",
        spec: || json!({"hostIPC": true}),
        reason: "HostNamespace",
        names: "hostIPC",
    },
    Case {
        name: "a_terminal",
        spec: || json!({"containers": [{"tty": true, "stdin": true}]}),
        reason: "TtyNotSupported",
        names: "",
    },
    Case {
        name: "a_privileged_container",
        spec: || json!({"containers": [{"securityContext": {"privileged": true}}]}),
        reason: "PrivilegedContainer",
        names: "main",
    },
    Case {
        name: "a_host_path",
        spec: || json!({"volumes": [{"name": "tmp", "hostPath": {"path": "/tmp"}}], "containers": [{"volumeMounts": [{"name": "tmp", "mountPath": "/mnt"}]}]}),
        reason: "VolumeNotSupported",
        names: "tmp",
    },
    Case {
        name: "a_packet_socket",
        spec: || json!({"containers": [{"args": ["hold", "packet-socket"], "readinessProbe": null}]}),
        reason: "SocketNotSupported",
        names: "",
    },
    Case {
        name: "a_vsock",
        spec: || json!({"containers": [{"args": ["hold", "vsock"], "readinessProbe": null}]}),
        reason: "SocketNotSupported",
        names: "",
    },
    Case {
        name: "a_nested_namespace",
        spec: || json!({"containers": [{"args": ["hold", "nested-namespace"], "readinessProbe": null}]}),
        reason: "NestedNamespace",
        names: "",
    },
];

pub(super) fn scenarios() -> Vec<Scenario> {
    let mut all: Vec<Scenario> = CASES
        .iter()
        .map(|case| Scenario::new(format!("a_pod_with_{}_is_refused_by_name", case.name), unmovable).case(case.name))
        .collect();
    all.push(Scenario::new("a_dry_run_reports_and_moves_nothing", dry_run));
    all.push(Scenario::new("a_missing_pod_is_refused", missing_pod));
    all.push(Scenario::new("a_pod_of_a_deployment_is_refused_with_its_owner", owned));
    all.push(Scenario::new("a_strategy_of_the_future_is_refused", strategy));
    all.push(Scenario::new("the_pods_own_node_is_refused_as_target", own_node));
    all.push(Scenario::new("an_unknown_target_node_is_refused", unknown_node));
    all.push(Scenario::new("a_second_migration_of_a_pod_is_refused", second));
    all.push(Scenario::new("rules_of_the_api_hold", api_rules));
    all
}

/// The pod of a case: containers of the case are merged into those of the plan.
fn start(stage: &Stage, case: &Case) -> Result<Pod> {
    let name = format!("refused-{}", case.name.replace('_', "-"));
    let mut pod = Plan {
        mib: 1,
        ..Plan::small(&name)
    }
    .pod(&stage.images().workload.name(), None);
    let mut spec = (case.spec)();
    let container = spec.as_object_mut().and_then(|spec| spec.remove("containers"));
    for (key, value) in spec.as_object().into_iter().flatten() {
        pod["spec"][key] = value.clone();
    }
    for (key, value) in container.iter().flat_map(|list| list[0].as_object()).flatten() {
        pod["spec"]["containers"][0][key] = value.clone();
    }
    let pod: Pod = stage.wait("the pod to be accepted", std::time::Duration::from_secs(20), || {
        stage.create::<Pod>(pod.clone())
    })?;
    let name = pod.metadata.name.clone().unwrap_or_default();
    stage.wait("the pod to run", std::time::Duration::from_secs(40), || {
        let pod = stage.find::<Pod>(NAMESPACE, &name)?.context("it is gone")?;
        let running = pod
            .status
            .as_ref()
            .and_then(|status| status.container_statuses.as_ref())
            .is_some_and(|all| all.iter().all(|one| one.started == Some(true)));
        ensure!(running, "{:?}", pod.status.and_then(|status| status.container_statuses));
        Ok(pod)
    })
}

/// Refused: nothing was begun, and the refusal is a report.
fn refused(migration: &ProcessMigration, reason: &str, names: &str) -> Result<()> {
    ensure!(phase(migration) == Some(Phase::Failed), "{}", story(migration));
    let status = migration.status.as_ref().context("no status")?;
    ensure!(
        status
            .decision
            .as_ref()
            .is_none_or(|decision| decision.value != crds::process_migration::DecisionValue::Committed),
        "a refused migration was committed"
    );
    let told = because(migration, "Succeeded");
    let checks: Vec<&Check> = status
        .eligibility
        .iter()
        .flat_map(|eligibility| &eligibility.checks)
        .filter(|check| check.verdict == Verdict::Refused)
        .collect();
    let check = checks.iter().find(|check| check.reason.as_deref() == Some(reason));
    ensure!(
        told.0 == reason || check.is_some(),
        "refused for another reason than {reason}: {}; checks {checks:?}",
        story(migration)
    );
    let message = check.and_then(|check| check.message.clone()).unwrap_or(told.1.clone());
    ensure!(
        message.contains(names),
        "the refusal does not name {names:?}: {message:?}"
    );
    if let Some(check) = check {
        ensure!(
            check.remedy.as_ref().is_some_and(|remedy| !remedy.is_empty()),
            "the refusal has no remedy: {check:?}"
        );
    }
    Ok(())
}

fn unmovable(stage: &Stage, case: &str) -> Result<()> {
    let case = CASES.iter().find(|one| one.name == case).context("no such case")?;
    let pod = start(stage, case)?;
    let name = pod.metadata.name.clone().unwrap_or_default();
    for dry_run in [true, false] {
        let migration = Move::create(stage, &name, None, &json!({"dryRun": dry_run}))?.settled(stage)?;
        refused(&migration, case.reason, case.names)?;
        ensure!(
            because(&migration, "Succeeded").1.len() > 20,
            "the reason is no sentence: {}",
            story(&migration)
        );
    }
    let now = stage.find::<Pod>(NAMESPACE, &name)?.context("the pod is gone")?;
    ensure!(now.metadata.uid == pod.metadata.uid, "the pod was replaced");
    let restarts: i32 = now
        .status
        .iter()
        .flat_map(|status| status.container_statuses.iter().flatten())
        .map(|one| one.restart_count)
        .sum();
    ensure!(restarts == 0, "the pod was restarted");
    invariants::nothing_left(stage)?;
    stage.delete::<Pod>(&name, Some(0))
}

fn dry_run(stage: &Stage, _: &str) -> Result<()> {
    let mut subject = Subject::start(stage, &Plan::small("dry-run"))?;
    let migration = Move::create(stage, &subject.pod, None, &json!({"dryRun": true}))?.settled(stage)?;
    ensure!(
        because(&migration, "Succeeded").0 == "DryRunComplete",
        "{}",
        story(&migration)
    );
    let eligibility = migration
        .status
        .as_ref()
        .and_then(|status| status.eligibility.clone())
        .context("a dry run without a report")?;
    ensure!(
        eligibility.eligible && !eligibility.checks.is_empty(),
        "{eligibility:?}"
    );
    ensure!(
        eligibility
            .predicted_freeze_milliseconds
            .is_some_and(|freeze| freeze > 0),
        "a dry run predicts the freeze: {eligibility:?}"
    );
    ensure!(
        eligibility.candidate_nodes.len() == stage.nodes().len() - 1,
        "candidates: {:?}",
        eligibility.candidate_nodes
    );
    invariants::exactly_one(stage, &subject)?;
    invariants::nothing_left(stage)?;
    subject.check(stage)?;
    move_to(stage, &mut subject, None)?;
    subject.remove(stage)
}

fn missing_pod(stage: &Stage, _: &str) -> Result<()> {
    let migration = Move::create(stage, "nobody", None, &json!({}))?.settled(stage)?;
    refused(&migration, "PodNotFound", "nobody")
}

fn owned(stage: &Stage, _: &str) -> Result<()> {
    let pod = Plan {
        mib: 1,
        ..Plan::small("owned")
    }
    .pod(&stage.images().workload.name(), None);
    stage.create::<Deployment>(json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "owned", "namespace": NAMESPACE},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "owned"}}, "template": {"metadata": {"labels": {"app": "owned"}}, "spec": pod["spec"]}},
    }))?;
    let name = stage.wait("the Deployment's pod", std::time::Duration::from_secs(40), || {
        let pods = stage.list::<Pod>(NAMESPACE, "app=owned")?;
        let pod = pods.first().context("there is none")?;
        ensure!(
            pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Running"),
            "it does not run"
        );
        pod.metadata.name.clone().context("it has no name")
    })?;
    let migration = Move::create(stage, &name, None, &json!({}))?.settled(stage)?;
    let result = refused(&migration, "OwnerNotSupported", "owned");
    stage.delete::<Deployment>("owned", None)?;
    result
}

fn strategy(stage: &Stage, _: &str) -> Result<()> {
    let subject = Subject::start(stage, &Plan::small("strategy"))?;
    for strategy in ["PostCopy", "Hybrid"] {
        let migration =
            Move::create(stage, &subject.pod, None, &json!({"strategy": {"type": strategy}}))?.settled(stage)?;
        refused(&migration, "StrategyNotAvailable", strategy)?;
    }
    subject.remove(stage)
}

fn own_node(stage: &Stage, _: &str) -> Result<()> {
    let subject = Subject::start(stage, &Plan::small("own-node"))?;
    let node = subject.node(stage)?;
    let migration = Move::create(stage, &subject.pod, Some(&node), &json!({}))?.settled(stage)?;
    refused(&migration, "TargetIsSource", &node)?;
    subject.remove(stage)
}

fn unknown_node(stage: &Stage, _: &str) -> Result<()> {
    let mut subject = Subject::start(stage, &Plan::small("unknown-node"))?;
    let migration = Move::create(stage, &subject.pod, Some("node-nowhere"), &json!({}))?.settled(stage)?;
    refused(&migration, "NoTargetNode", "node-nowhere")?;
    move_to(stage, &mut subject, None)?;
    subject.remove(stage)
}

fn second(stage: &Stage, _: &str) -> Result<()> {
    let mut subject = Subject::start(stage, &Plan::small("second"))?;
    let first = Move::create(stage, &subject.pod, None, &json!({}))?;
    let second = Move::create(stage, &subject.pod, None, &json!({}))?;
    let second = second.settled(stage)?;
    let first = first.settled(stage)?;
    // Which of the two came first is the operator's to say.
    let (moved, not) = if phase(&first) == Some(Phase::Succeeded) {
        (first, second)
    } else {
        (second, first)
    };
    super::moves::succeeded(&moved)?;
    ensure!(
        ["AlreadyMigrating", "PodNotFound", "PodTerminating"].contains(&because(&not, "Succeeded").0.as_str()),
        "{}",
        story(&not)
    );
    super::moves::follow(&mut subject, &moved)?;
    subject.check(stage)?;
    invariants::one_life(stage, &subject)?;
    invariants::exactly_one(stage, &subject)?;
    subject.remove(stage)
}

fn api_rules(stage: &Stage, _: &str) -> Result<()> {
    let migration = Move::create(stage, "nobody", None, &json!({}))?;
    migration.settled(stage)?;
    for (change, words) in [
        (json!({"spec": {"podRef": {"name": "other"}}}), "podRef is immutable"),
        (json!({"spec": {"dryRun": true}}), "immutable"),
        (json!({"spec": {"target": {"nodeName": "x"}}}), "immutable"),
    ] {
        let error = stage
            .merge::<ProcessMigration>(&migration.name, &change)
            .err()
            .with_context(|| format!("{change} was accepted"))?;
        ensure!(
            format!("{error:#}").contains(words),
            "{change} is refused without saying why: {error:#}"
        );
    }
    migration.cancel(stage)?;
    let back = stage.merge::<ProcessMigration>(&migration.name, &json!({"spec": {"desiredState": "Migrated"}}));
    ensure!(back.is_err(), "desiredState went back");
    stage.merge::<ProcessMigration>(&migration.name, &json!({"spec": {"ttlSecondsAfterFinished": 1}}))?;
    stage.wait(
        "the migration to be deleted after its time",
        std::time::Duration::from_secs(30),
        || {
            ensure!(
                stage.find::<ProcessMigration>(NAMESPACE, &migration.name)?.is_none(),
                "it is still there"
            );
            Ok(())
        },
    )
}
