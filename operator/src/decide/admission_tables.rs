//! Tables of what happens before a migration is admitted: refusals, candidates, limits.

use crds::condition::{find, is_true};
use crds::process_migration::{DecisionValue, Phase, StrategyType, cond};
use serde_json::{Value, json};

use super::Observed;
use super::fixture::{Cluster, Step, running_pod};
use super::world::{Heartbeat, Other};

fn refused(mut cluster: Cluster) -> (String, String) {
    cluster.settle();
    if !cluster.is_finished() {
        cluster.source_checks(json!([]));
        cluster.settle();
    }
    let (phase, reason, message) = cluster.finished();
    assert_eq!(phase, Phase::Failed, "{message}");
    assert_eq!(cluster.world.target_pod, Observed::Absent);
    assert!(is_true(&cluster.status().conditions, cond::FINISHED));
    assert!(cluster.world.migration.metadata.finalizers.is_none());
    (reason, message)
}

#[test]
fn each_refusal_has_its_reason() {
    let with_pod = |patch: Value| {
        let mut cluster = Cluster::new(json!({}));
        cluster.world.source_pod = Observed::Present(running_pod(patch));
        cluster
    };
    let with_spec = |spec: Value| Cluster::new(spec);
    let with_node = |name: &str, f: &dyn Fn(&mut super::NodeView)| {
        let mut cluster = Cluster::new(json!({"target": {"nodeName": "b"}}));
        cluster.node(name, f);
        cluster
    };
    let absent = {
        let mut cluster = Cluster::new(json!({}));
        cluster.world.source_pod = Observed::Absent;
        cluster
    };
    let busy = {
        let mut cluster = Cluster::new(json!({}));
        cluster.world.others = vec![other("first", "web-0")];
        cluster
    };
    let is_target = {
        let mut cluster = Cluster::new(json!({}));
        let mut first = other("first", "other-pod");
        first.target_pod = Some("web-0".to_owned());
        cluster.world.others = vec![first];
        cluster
    };
    let owner = json!({"metadata": {"ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "rs", "uid": "u", "controller": true}]}});
    let table: Vec<(Cluster, &str, &str)> = vec![
        (absent, "PodNotFound", "web-0"),
        (with_spec(json!({"podRef": {"uid": "other"}})), "PodReplaced", "pod-uid"),
        (
            with_pod(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})),
            "PodTerminating",
            "web-0",
        ),
        (
            with_pod(json!({"status": {"phase": "Pending"}})),
            "PodNotRunning",
            "Pending",
        ),
        (
            with_pod(json!({"status": {"phase": "Succeeded"}})),
            "PodNotRunning",
            "Succeeded",
        ),
        (
            with_pod(
                json!({"status": {"containerStatuses": [{"name": "app", "image": "", "imageID": "", "ready": false,
            "restartCount": 1, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}}),
            ),
            "PodNotRunning",
            "container app",
        ),
        (with_pod(owner), "OwnerNotSupported", "ReplicaSet/rs"),
        (
            with_spec(json!({"strategy": {"type": "PostCopy"}})),
            "StrategyNotAvailable",
            "PostCopy",
        ),
        (
            with_spec(json!({"strategy": {"type": "Hybrid"}})),
            "StrategyNotAvailable",
            "Hybrid",
        ),
        (busy, "AlreadyMigrating", "shop/first"),
        (is_target, "AlreadyMigrating", "target of migration shop/first"),
        (
            with_node("a", &|n| n.migration_node = None),
            "NodeNotReady",
            "node a has no MigrationNode",
        ),
        (
            with_node("a", &|n| n.heartbeat = Heartbeat::Stale),
            "NodeNotReady",
            "heartbeats",
        ),
        (
            with_node("b", &|n| n.heartbeat = Heartbeat::Missing),
            "NoTargetNode",
            "never sent",
        ),
        (with_node("b", &|n| n.cordoned = true), "NoTargetNode", "cordoned"),
        (with_node("b", &|n| n.ready = false), "NoTargetNode", "not Ready"),
        (
            with_node("b", &|n| n.migration_node.as_mut().unwrap().0.schedulable = false),
            "NoTargetNode",
            "closed",
        ),
        (
            with_node("b", &|n| n.migration_node.as_mut().unwrap().0.max_inbound = Some(0)),
            "NoTargetNode",
            "maxInbound",
        ),
        (
            with_node("b", &|n| {
                n.migration_node.as_mut().unwrap().1.architecture = Some("aarch64".into())
            }),
            "NodesIncompatible",
            "aarch64",
        ),
        (
            with_node("b", &|n| {
                n.migration_node.as_mut().unwrap().1.checkpoint_limit_bytes = Some(1)
            }),
            "NoTargetNode",
            "1000000",
        ),
        (
            with_spec(json!({"target": {"nodeName": "a"}})),
            "TargetIsSource",
            "node a",
        ),
        (
            with_spec(json!({"target": {"nodeName": "z"}})),
            "NoTargetNode",
            "no node z",
        ),
        (
            with_spec(json!({"target": {"nodeSelector": {"zone": "nowhere"}}})),
            "NoTargetNode",
            "spec.target",
        ),
        (
            with_pod(json!({"spec": {"nodeSelector": {"zone": "zone-a"}}})),
            "NoTargetNode",
            "zone=zone-a",
        ),
        (
            with_spec(json!({"maxFreezeMilliseconds": 50})),
            "FreezeTooLong",
            "100 ms",
        ),
        (
            with_pod(json!({"spec": {"hostNetwork": true}})),
            "PodNotMigratable",
            "hostNetwork",
        ),
        (
            with_pod(json!({"spec": {"hostPID": true}})),
            "PodNotMigratable",
            "hostPID",
        ),
        (
            with_pod(json!({"spec": {"volumes": [{"name": "v", "hostPath": {"path": "/x"}}]}})),
            "PodNotMigratable",
            "/x",
        ),
        (
            with_pod(json!({"spec": {"volumes": [{"name": "v", "emptyDir": {}}]}})),
            "PodNotMigratable",
            "emptyDir",
        ),
        (
            with_pod(json!({"spec": {"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]}})),
            "PodNotMigratable",
            "claim c",
        ),
        (
            with_pod(json!({"spec": {"runtimeClassName": "gvisor"}})),
            "PodNotMigratable",
            "gvisor",
        ),
        (
            with_pod(json!({"spec": {"initContainers": [{"name": "side", "restartPolicy": "Always"}]}})),
            "PodNotMigratable",
            "sidecar",
        ),
        (
            with_pod(json!({"spec": {"containers": [{"name": "app", "tty": true}]}})),
            "PodNotMigratable",
            "terminal",
        ),
        (
            with_pod(json!({"spec": {"containers": [{"name": "app", "securityContext": {"privileged": true}}]}})),
            "PodNotMigratable",
            "privileged",
        ),
        (
            with_pod(
                json!({"spec": {"containers": [{"name": "app", "resources": {"limits": {"nvidia.com/gpu": "1"}}}]}}),
            ),
            "PodNotMigratable",
            "nvidia.com/gpu",
        ),
        (
            with_pod(
                json!({"spec": {"containers": [{"name": "app", "resources": {"limits": {"hugepages-2Mi": "1"}}}]}}),
            ),
            "PodNotMigratable",
            "hugepages-2Mi",
        ),
        (
            with_pod(json!({"metadata": {"finalizers": ["x/y"]}})),
            "PodNotMigratable",
            "x/y",
        ),
        (
            with_pod(
                json!({"status": {"ephemeralContainerStatuses": [{"name": "debug", "image": "", "imageID": "", "ready": true,
            "restartCount": 0, "state": {"running": {}}}]}}),
            ),
            "PodNotMigratable",
            "debug",
        ),
    ];
    for (cluster, reason, word) in table {
        let (is, message) = refused(cluster);
        assert_eq!(is, reason, "{message}");
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

fn other(name: &str, pod: &str) -> Other {
    Other {
        name: format!("shop/{name}"),
        namespace: "shop".to_owned(),
        uid: format!("uid-{name}"),
        pod: pod.to_owned(),
        target_pod: None,
        accepted: true,
        admitted: false,
        source_node: None,
        target_nodes: [].into(),
        deadline: None,
        queued: false,
    }
}

#[test]
fn a_refusal_names_all_reasons_at_once() {
    let mut cluster = Cluster::new(json!({"maxFreezeMilliseconds": 50}));
    cluster.world.source_pod = Observed::Present(running_pod(json!({"spec": {"hostIPC": true,
        "volumes": [{"name": "v", "hostPath": {"path": "/x"}}]}})));
    cluster.settle();
    cluster.source_checks(json!([
        {"name": "sockets", "verdict": "Refused", "reason": "SocketNotSupported", "message": "a packet socket"},
        {"name": "namespaces", "verdict": "Refused", "reason": "HostNamespace", "message": "the pod uses the node's IPC namespace"},
        {"name": "files", "verdict": "Warning", "reason": "WillBeLost", "message": "not a refusal"},
    ]));
    cluster.settle();
    let (_, _, message) = cluster.finished();
    for part in ["/x", "packet socket", "IPC namespace", "100 ms"] {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
    assert!(!message.contains("hostIPC"), "the same thing stands twice: {message}");
    assert!(!message.contains("not a refusal"));
    let eligibility = cluster.status().eligibility.unwrap();
    assert!(!eligibility.eligible);
    assert!(
        eligibility
            .checks
            .iter()
            .any(|c| c.message.as_deref() == Some("not a refusal"))
    );
    // Nothing can be committed any more.
    assert_eq!(cluster.status().decision.unwrap().value, DecisionValue::Aborted);
}

#[test]
fn where_writes_cannot_be_noted_the_memory_is_copied_in_the_freeze_and_the_report_says_why() {
    let strategy_with = |features: &[&str], spec: Value| {
        let mut cluster = Cluster::new(spec);
        let features: Vec<String> = features.iter().map(|f| (*f).to_owned()).collect();
        cluster.node("a", |node: &mut super::NodeView| {
            let status = node.migration_node.as_mut().map(|(_, status)| status);
            status.unwrap().kernel.as_mut().unwrap().features.clone_from(&features);
        });
        cluster.until(Step::Admitted);
        let status = cluster.status();
        let checks = status.eligibility.unwrap().checks;
        let said = checks
            .into_iter()
            .find(|c| c.name == "strategy")
            .map(|c| c.message.unwrap());
        (status.effective.unwrap().strategy, said)
    };
    let both = ["pagemap-scan", "userfaultfd-wp-async"];
    assert_eq!(strategy_with(&both, json!({})), (StrategyType::PreCopy, None));
    let (strategy, said) = strategy_with(&both[..1], json!({}));
    assert_eq!(strategy, StrategyType::StopAndCopy);
    assert!(said.is_some_and(|s| s.contains("node a lacks userfaultfd-wp-async")));
    let asked = json!({"strategy": {"type": "StopAndCopy"}});
    assert_eq!(strategy_with(&[], asked), (StrategyType::StopAndCopy, None));
}

#[test]
fn what_can_be_shared_by_two_nodes_is_not_refused() {
    let mut cluster = Cluster::new(json!({}));
    cluster.world.source_pod = Observed::Present(running_pod(json!({"spec": {"volumes": [
        {"name": "a", "configMap": {"name": "c"}}, {"name": "b", "secret": {"secretName": "s"}},
        {"name": "c", "projected": {"sources": []}}, {"name": "d", "downwardAPI": {}},
        {"name": "e", "nfs": {"server": "s", "path": "/"}}, {"name": "f", "persistentVolumeClaim": {"claimName": "shared"}}]}})));
    cluster.world.claims = [("shared".to_owned(), Observed::Present(vec!["ReadWriteMany".to_owned()]))].into();
    cluster.until(Step::Admitted);
    assert!(is_true(&cluster.status().conditions, cond::ADMITTED));
}

#[test]
fn a_dry_run_reports_and_opens_no_decision() {
    let mut cluster = Cluster::new(json!({"dryRun": true}));
    cluster.settle();
    cluster.source_checks(json!([]));
    cluster.settle();
    let (phase, reason, message) = cluster.finished();
    assert_eq!((phase, reason.as_str()), (Phase::Succeeded, "DryRunComplete"));
    assert!(message.contains("100 ms"), "{message}");
    assert!(cluster.status().decision.is_none());
    assert_eq!(cluster.world.target_pod, Observed::Absent);

    let mut refused = Cluster::new(json!({"dryRun": true}));
    refused.refuses_pods = true;
    refused.settle();
    refused.source_checks(json!([]));
    refused.settle();
    let (phase, reason, message) = refused.finished();
    assert_eq!((phase, reason.as_str()), (Phase::Failed, "TargetRefused"));
    assert!(message.contains("quota"));
}

#[test]
fn limits_put_a_migration_into_the_queue() {
    let active = |name: &str, from: &str, to: &[&str]| Other {
        admitted: true,
        source_node: Some(from.to_owned()),
        target_nodes: to.iter().map(|s| (*s).to_owned()).collect(),
        ..other(name, name)
    };
    let full: Vec<Other> = (0..5).map(|i| active(&format!("o{i}"), "x", &["y"])).collect();
    let earlier = Other {
        queued: true,
        deadline: Some(super::fixture::start()),
        source_node: Some("x".to_owned()),
        ..other("earlier", "e")
    };
    let mut almost = full[..4].to_vec();
    almost.push(earlier);
    almost
        .iter_mut()
        .take(4)
        .for_each(|o| o.source_node = Some("z".to_owned()));
    let table: Vec<(Vec<Other>, Option<&str>)> = vec![
        (vec![], None),
        (full, Some("5 of 5")),
        (vec![active("o", "a", &["x"])], Some("from node a")),
        (
            vec![active("o1", "x", &["b", "c"]), active("o2", "y", &["b", "c"])],
            Some("b, c"),
        ),
        (vec![active("o1", "x", &["b"]), active("o2", "y", &["b"])], None),
        (almost, Some("earlier deadline")),
    ];
    for (others, waits) in table {
        let mut cluster = Cluster::new(json!({}));
        cluster.world.others = others.clone();
        cluster.until(Step::Admitted);
        let status = cluster.status();
        let admitted = find(&status.conditions, cond::ADMITTED).unwrap();
        match waits {
            None => assert_eq!(admitted.status, "True", "{}", admitted.message),
            Some(word) => {
                assert_eq!(status.phase, Some(Phase::Queued), "{others:?}");
                assert!(admitted.message.contains(word), "{}", admitted.message);
                assert_eq!(cluster.world.target_pod, Observed::Absent);
                cluster.world.others.clear();
                cluster.settle();
                assert!(is_true(&cluster.status().conditions, cond::ADMITTED));
            }
        }
    }
    // A full node is left out while others are open.
    let mut cluster = Cluster::new(json!({}));
    cluster.world.others = vec![active("o1", "x", &["b"]), active("o2", "y", &["b"])];
    cluster.until(Step::Admitted);
    assert_eq!(cluster.status().eligibility.unwrap().candidate_nodes, ["c"]);
}

#[test]
fn a_node_sets_its_own_limits() {
    let mut cluster = Cluster::new(json!({"target": {"nodeName": "b"}}));
    cluster.node("b", |n| n.migration_node.as_mut().unwrap().0.max_inbound = Some(1));
    cluster.world.others = vec![Other {
        admitted: true,
        target_nodes: ["b".to_owned()].into(),
        ..other("o", "o")
    }];
    cluster.until(Step::Admitted);
    assert_eq!(cluster.status().phase, Some(Phase::Queued));
}

#[test]
fn a_probe_bounds_the_freeze_and_a_tcp_probe_does_not() {
    let with = |probe: Value| running_pod(json!({"spec": {"containers": [{"name": "app", "livenessProbe": probe}]}}));
    let http = with(json!({"httpGet": {"port": 80}, "periodSeconds": 2, "failureThreshold": 3}));
    assert_eq!(super::eligibility::longest_freeze(&http), Some(6000));
    let tcp = with(json!({"tcpSocket": {"port": 80}, "periodSeconds": 1, "failureThreshold": 1}));
    assert_eq!(super::eligibility::longest_freeze(&tcp), None);
    let defaults = with(json!({"exec": {"command": ["true"]}}));
    assert_eq!(super::eligibility::longest_freeze(&defaults), Some(30_000));
}

#[test]
fn nodes_are_compared_by_what_their_agents_found() {
    let mut cluster = Cluster::new(json!({}));
    cluster.node("a", |n| {
        n.migration_node.as_mut().unwrap().1.cpu.as_mut().unwrap().features = vec!["avx512f".into()]
    });
    cluster.node("b", |n| {
        n.migration_node.as_mut().unwrap().1.cpu.as_mut().unwrap().features = vec!["avx512f".into()]
    });
    cluster.until(Step::Admitted);
    let eligibility = cluster.status().eligibility.unwrap();
    assert_eq!(eligibility.candidate_nodes, ["b"]);
    let excluded = eligibility
        .checks
        .iter()
        .find(|c| c.node.as_deref() == Some("c"))
        .unwrap();
    assert!(excluded.message.as_ref().unwrap().contains("avx512f"));
}

#[test]
fn one_that_waits_for_its_turn_waits_for_a_node_that_is_away_too() {
    let mut cluster = Cluster::new(json!({"target": {"nodeName": "b"}}));
    cluster.world.others = vec![Other {
        admitted: true,
        source_node: Some("a".to_owned()),
        ..other("o", "o")
    }];
    cluster.until(Step::Admitted);
    assert_eq!(cluster.status().phase, Some(Phase::Queued));
    cluster.world.others.clear();
    cluster.node("b", |n| n.heartbeat = Heartbeat::Stale);
    cluster.settle();
    assert_eq!(cluster.status().phase, Some(Phase::Queued));
    let status = cluster.status();
    assert!(
        find(&status.conditions, cond::ADMITTED)
            .unwrap()
            .message
            .contains("heartbeats")
    );
    cluster.node("b", |n| n.heartbeat = Heartbeat::Fresh);
    cluster.settle();
    assert!(is_true(&cluster.status().conditions, cond::ADMITTED));
}

#[test]
fn a_refusal_that_comes_before_the_decision_was_opened_opens_none() {
    let mut cluster = Cluster::new(json!({"target": {"nodeName": "a"}}));
    cluster.round();
    assert!(cluster.status().attempt.is_some() && cluster.status().decision.is_none());
    cluster.source_checks(json!([]));
    let decision = cluster.round();
    assert!(decision.guarded);
    assert_eq!(cluster.finished().1, "TargetIsSource");
    cluster.settle();
    assert!(cluster.status().decision.is_none());
}
