//! Tables: one situation, one outcome.

use crds::Reason;
use crds::condition::{find, is_true};
use crds::process_migration::{ActiveOn, DecisionValue, Phase, cond};
use serde_json::{Value, json};

use super::fixture::{Cluster, Step, running_pod, wakes_at};
use super::world::{Heartbeat, Other};
use super::{Observed, Stage, pod, stage};

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
            with_spec(json!({"strategy": {"type": "PreCopy"}})),
            "StrategyNotAvailable",
            "PreCopy",
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
fn a_move_goes_through_its_phases() {
    let mut cluster = Cluster::new(json!({}));
    let phases: Vec<(Step, Phase)> = vec![
        (Step::Accepted, Phase::Pending),
        (Step::Admitted, Phase::Preparing),
        (Step::TargetReady, Phase::Preparing),
        (Step::Frozen, Phase::Freezing),
        (Step::Sent, Phase::Restoring),
        (Step::Committed, Phase::Finalizing),
    ];
    for (step, phase) in phases {
        let mut cluster = Cluster::new(json!({}));
        cluster.until(step);
        assert_eq!(cluster.status().phase, Some(phase), "{step:?}");
    }
    cluster.until(Step::Committed);
    cluster.kubelets_end();
    cluster.settle();
    assert!(
        !cluster.is_finished(),
        "the source's agent has not said that it has ended"
    );
    cluster.agents_conclude();
    cluster.settle();
    let (phase, reason, _) = cluster.finished();
    assert_eq!((phase, reason.as_str()), (Phase::Succeeded, "Migrated"));
    let target = cluster.world.target_pod.present().unwrap();
    assert_eq!(target.metadata.labels.as_ref().unwrap()["app"], "web");
    assert!(target.metadata.owner_references.as_ref().unwrap().is_empty());
    let status = cluster.status();
    assert!(is_true(&status.conditions, cond::RESIDUAL_FREE));
    assert_eq!(status.active_on, Some(ActiveOn::Target));
    assert!(status.result.unwrap().live);
}

#[test]
fn cancel_and_deletion_work_at_every_step_before_the_commit_and_at_none_after() {
    for deletes in [false, true] {
        for step in Step::BEFORE_COMMIT {
            let mut cluster = Cluster::new(json!({}));
            cluster.until(step);
            if deletes {
                cluster.user_deletes_migration()
            } else {
                cluster.user_cancels()
            }
            for _ in 0..5 {
                cluster.pass_time(1);
                cluster.settle();
                cluster.kubelets_end();
                cluster.agents_conclude();
            }
            if deletes {
                assert!(cluster.gone, "{step:?}");
            }
            let (phase, reason, _) = cluster.finished();
            assert_eq!(
                (phase, reason.as_str()),
                (Phase::Canceled, "CanceledByUser"),
                "{step:?}"
            );
            assert_eq!(cluster.world.target_pod, Observed::Absent, "{step:?}");
            assert!(cluster.world.source_pod.present().is_some_and(|p| !pod::is_deleting(p)));
            assert!(!cluster.commit());
        }
        let mut cluster = Cluster::new(json!({}));
        cluster.until(Step::Committed);
        if deletes {
            cluster.user_deletes_migration()
        } else {
            cluster.user_cancels()
        }
        for _ in 0..5 {
            cluster.pass_time(1);
            cluster.settle();
            cluster.kubelets_end();
            cluster.agents_conclude();
        }
        assert_eq!(cluster.finished().0, Phase::Succeeded);
        assert!(cluster.world.target_pod.present().is_some_and(|p| !pod::is_deleting(p)));
    }
}

#[test]
fn a_pod_that_its_user_deletes_is_nowhere_before_the_commit_and_on_the_target_after() {
    for step in Step::BEFORE_COMMIT {
        let mut cluster = Cluster::new(json!({}));
        cluster.until(step);
        cluster.user_deletes_source();
        for _ in 0..5 {
            cluster.pass_time(1);
            cluster.settle();
            cluster.agents_conclude();
            cluster.kubelets_end();
        }
        assert_eq!(cluster.finished().1, "PodDeleted", "{step:?}");
        assert_eq!(cluster.status().active_on, Some(ActiveOn::None), "{step:?}");
        assert_eq!(cluster.world.target_pod, Observed::Absent);
    }
    let mut cluster = Cluster::new(json!({}));
    cluster.until(Step::Sent);
    assert!(cluster.commit());
    cluster.world.source_pod = Observed::Absent;
    for _ in 0..3 {
        cluster.settle();
        cluster.agents_conclude();
    }
    assert_eq!(cluster.finished().0, Phase::Succeeded);
    assert_eq!(cluster.status().active_on, Some(ActiveOn::Target));
    let labels = cluster
        .world
        .target_pod
        .present()
        .unwrap()
        .metadata
        .labels
        .clone()
        .unwrap();
    assert_eq!(labels["app"], "web", "the labels of a pod that is gone");
}

#[test]
fn each_loss_before_the_commit_has_its_reason() {
    type Event = fn(&mut Cluster);
    let table: Vec<(Step, Event, &str)> = vec![
        (Step::Placed, |c| c.user_deletes_target(), "TargetLost"),
        (
            Step::TargetReady,
            |c| c.world.target_pod = Observed::Absent,
            "TargetLost",
        ),
        (Step::Frozen, |c| c.source_fails(), "CheckpointFailed"),
        (Step::Frozen, |c| c.lose_node("a"), "SourceNodeLost"),
        (
            Step::Frozen,
            |c| c.node("a", |n| n.heartbeat = Heartbeat::Stale),
            "NodeNotReady",
        ),
        (Step::Sent, |c| c.lose_node("b"), "TargetLost"),
        (Step::Placed, |c| c.node("b", |n| n.exists = false), "TargetLost"),
        (Step::Accepted, |c| c.lose_node("a"), "SourceNodeLost"),
        (
            Step::Placed,
            |c| {
                c.target_pod_runs(true);
                if let Observed::Present(target) = &mut c.world.target_pod {
                    target.status.as_mut().unwrap().container_statuses.as_mut().unwrap()[0].restart_count = 1;
                }
            },
            "TargetLost",
        ),
        (
            Step::TargetReady,
            |c| {
                if let Observed::Present(source) = &mut c.world.source_pod {
                    source.status.as_mut().unwrap().phase = Some("Failed".to_owned());
                }
            },
            "SourceLost",
        ),
        (Step::Admitted, |c| c.bind("z"), "TargetSpecDrift"),
        (Step::Admitted, |c| c.pass_time(61), "Unschedulable"),
        (Step::Placed, |c| c.pass_time(61), "ProgressTimeout"),
        (Step::Sent, |c| c.pass_time(61), "ProgressTimeout"),
        (Step::Accepted, |c| c.pass_time(61), "ProgressTimeout"),
        (
            Step::Frozen,
            |c| {
                c.pass_time(601);
                c.world.last_change = Some(c.world.now);
            },
            "DeadlineExceeded",
        ),
    ];
    for (step, event, reason) in table {
        let mut cluster = Cluster::new(json!({}));
        cluster.until(step);
        event(&mut cluster);
        for _ in 0..5 {
            cluster.pass_time(1);
            cluster.settle();
            cluster.kubelets_end();
            cluster.agents_conclude();
        }
        let (phase, is, message) = cluster.finished();
        assert_eq!(is, reason, "{step:?}: {message}");
        assert!(matches!(phase, Phase::RolledBack | Phase::Failed), "{step:?}");
        assert_eq!(cluster.world.target_pod, Observed::Absent);
        assert_eq!(cluster.status().decision.unwrap().value, DecisionValue::Aborted);
    }
}

#[test]
fn a_lost_source_does_not_keep_a_complete_target_from_committing() {
    let mut cluster = Cluster::new(json!({}));
    cluster.until(Step::Sent);
    cluster.lose_node("a");
    cluster.settle();
    assert_eq!(
        cluster.status().decision.as_ref().unwrap().value,
        DecisionValue::Undecided
    );
    assert!(cluster.commit());
    cluster.settle();
    // Its kubelet will not end the source's pod: the object is removed without it, lest a reboot starts it again.
    assert_eq!(cluster.world.source_pod, Observed::Absent);
    let (phase, _, message) = cluster.finished();
    assert_eq!(phase, Phase::Succeeded, "{message}");
    let status = cluster.status();
    assert_eq!(find(&status.conditions, cond::RESIDUAL_FREE).unwrap().status, "False");
    assert_eq!(status.residual_dependencies[0].node, "a");
}

#[test]
fn a_target_that_goes_down_with_its_node_after_the_commit_is_not_called_a_success() {
    let mut cluster = Cluster::new(json!({}));
    cluster.until(Step::Committed);
    cluster.kubelets_end();
    cluster.agents_conclude();
    cluster.target_pod_runs(false);
    cluster.lose_node("b");
    cluster.settle();
    let (phase, reason, _) = cluster.finished();
    assert_eq!((phase, reason.as_str()), (Phase::Failed, "TargetLost"));
}

#[test]
fn a_moved_pod_that_is_not_ready_is_waited_for_but_not_for_ever() {
    let mut cluster = Cluster::new(json!({}));
    cluster.until(Step::Committed);
    cluster.kubelets_end();
    cluster.agents_conclude();
    cluster.target_pod_runs(false);
    cluster.settle();
    assert!(!cluster.is_finished());
    cluster.pass_time(121);
    cluster.settle();
    let (phase, _, message) = cluster.finished();
    assert_eq!(phase, Phase::Succeeded);
    assert!(message.contains("not Ready yet"), "{message}");
}

#[test]
fn a_source_agent_that_never_answers_after_an_abort_is_reported_and_not_waited_for_for_ever() {
    let mut cluster = Cluster::new(json!({}));
    cluster.until(Step::Frozen);
    cluster.user_cancels();
    cluster.settle();
    cluster.kubelets_end();
    cluster.settle();
    assert!(!cluster.is_finished(), "the pod may still be frozen");
    cluster.pass_time(15);
    cluster.settle();
    let status = cluster.status();
    let stalled = find(&status.conditions, cond::STALLED).unwrap();
    assert_eq!(stalled.reason, Reason::WaitingForRollback.as_str());
    cluster.pass_time(120);
    cluster.settle();
    assert!(cluster.is_finished());
}

#[test]
fn a_wait_is_shown_after_ten_seconds_and_taken_back() {
    let mut cluster = Cluster::new(json!({}));
    cluster.until(Step::Admitted);
    cluster.pass_time(5);
    cluster.settle();
    assert!(find(&cluster.status().conditions, cond::STALLED).is_none());
    cluster.pass_time(6);
    cluster.settle();
    let status = cluster.status();
    let stalled = find(&status.conditions, cond::STALLED).unwrap();
    assert_eq!(stalled.reason, "WaitingForScheduler");
    if let Observed::Present(target) = &mut cluster.world.target_pod {
        target.status = serde_json::from_value(json!({"phase": "Pending", "conditions": [{"type": "PodScheduled",
            "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available: 3 Insufficient cpu."}]}))
        .unwrap();
    }
    cluster.settle();
    let status = cluster.status();
    assert!(
        find(&status.conditions, cond::STALLED)
            .unwrap()
            .message
            .contains("Insufficient cpu")
    );
    cluster.bind("b");
    cluster.settle();
    assert!(find(&cluster.status().conditions, cond::STALLED).is_none());
}

#[test]
fn no_phase_is_without_a_deadline() {
    for step in Step::ALL {
        for spec in [json!({}), json!({"strategy": {"type": "Cold"}})] {
            let mut cluster = Cluster::new(spec.clone());
            let is_cold = spec != json!({});
            if is_cold {
                cluster.settle();
            } else {
                cluster.until(step);
            }
            let decision = cluster.settle();
            assert!(!cluster.is_finished());
            let at = wakes_at(&decision).unwrap_or_else(|| panic!("{step:?} waits for ever"));
            assert!(at > cluster.world.now);
        }
    }
}

#[test]
fn what_cannot_be_read_is_not_absent() {
    for step in Step::ALL {
        let mut cluster = Cluster::new(json!({}));
        cluster.until(step);
        cluster.world.source_pod = Observed::Unknown;
        cluster.world.target_pod = Observed::Unknown;
        let before = cluster.log.len();
        let decision = cluster.settle();
        assert!(!cluster.is_finished(), "{step:?}");
        assert_eq!(cluster.log.len(), before, "{step:?}: {:?}", cluster.log.last());
        assert!(wakes_at(&decision).is_some());
    }
    let mut new = Cluster::new(json!({}));
    new.world.source_pod = Observed::Unknown;
    new.settle();
    assert_eq!(stage::of(&new.world), Stage::New);
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
fn a_foreign_pod_of_the_targets_name_is_left_alone() {
    let mut cluster = Cluster::new(json!({}));
    cluster.settle();
    let name = super::target_pod::name("web-0", None, "move-uid");
    cluster.world.target_pod = Observed::Present(running_pod(json!({"metadata": {"name": name, "uid": "foreign"}})));
    cluster.source_checks(json!([]));
    cluster.settle();
    let (_, reason, message) = cluster.finished();
    assert_eq!(reason, "TargetRefused");
    assert!(message.contains("already exists"), "{message}");
    assert!(
        cluster.world.target_pod.present().is_some(),
        "a foreign pod was deleted"
    );
}

#[test]
fn a_target_pod_that_was_changed_on_its_way_is_given_up() {
    let mut cluster = Cluster::new(json!({}));
    cluster.until(Step::Accepted);
    cluster.source_checks(json!([]));
    // One round: admitted and created; then a webhook's work shows.
    cluster.settle();
    let mut changed = Cluster::new(json!({}));
    changed.until(Step::Accepted);
    changed.source_checks(json!([]));
    let Observed::Present(mut target) = cluster.world.target_pod.clone() else {
        panic!()
    };
    let mut sidecar = target.spec.as_ref().unwrap().containers[0].clone();
    sidecar.name = "istio-proxy".to_owned();
    target.spec.as_mut().unwrap().containers.push(sidecar);
    changed.world.target_pod = Observed::Present(target);
    changed.settle();
    changed.kubelets_end();
    changed.settle();
    let (phase, reason, message) = changed.finished();
    assert_eq!((phase, reason.as_str()), (Phase::RolledBack, "TargetSpecDrift"));
    assert!(message.contains("containers"), "{message}");
    assert_eq!(changed.world.target_pod, Observed::Absent);
}

#[test]
fn cold_keeps_the_old_pod_until_the_new_one_is_ready() {
    let mut cluster = Cluster::new(json!({"strategy": {"type": "Cold"}}));
    cluster.settle();
    cluster.bind("b");
    cluster.target_pod_runs(false);
    cluster.settle();
    assert!(cluster.world.source_pod.present().is_some_and(|p| !pod::is_deleting(p)));
    cluster.target_pod_runs(true);
    cluster.settle();
    assert!(cluster.world.source_pod.present().is_some_and(pod::is_deleting));
    cluster.kubelets_end();
    cluster.settle();
    let (phase, reason, message) = cluster.finished();
    assert_eq!((phase, reason.as_str()), (Phase::Succeeded, "StartedCold"));
    assert!(message.contains("memory of the old pod was not carried"), "{message}");
    let status = cluster.status();
    assert!(!status.result.unwrap().live);
    assert!(status.decision.is_none());
    assert!(cluster.log.iter().all(|(_, e)| e.abort.is_none() && !e.open_decision));
}

#[test]
fn cold_is_given_up_until_the_new_pod_is_ready() {
    type Event = fn(&mut Cluster);
    let table: Vec<(Event, &str, Phase)> = vec![
        (|c| c.user_cancels(), "CanceledByUser", Phase::Canceled),
        (|c| c.user_deletes_migration(), "CanceledByUser", Phase::Canceled),
        (|c| c.user_deletes_source(), "PodDeleted", Phase::RolledBack),
        (|c| c.user_deletes_target(), "TargetLost", Phase::RolledBack),
        (|c| c.pass_time(61), "ProgressTimeout", Phase::RolledBack),
    ];
    for (event, reason, phase) in table {
        let mut cluster = Cluster::new(json!({"strategy": {"type": "Cold"}}));
        cluster.settle();
        cluster.bind("b");
        cluster.target_pod_runs(false);
        cluster.settle();
        event(&mut cluster);
        for _ in 0..3 {
            cluster.settle();
            cluster.kubelets_end();
        }
        let (is_phase, is, _) = cluster.finished();
        assert_eq!((is.as_str(), is_phase), (reason, phase));
        assert_eq!(cluster.world.target_pod, Observed::Absent);
    }
}

#[test]
fn a_finished_migration_is_deleted_after_its_ttl_and_not_before() {
    let mut cluster = Cluster::new(json!({"ttlSecondsAfterFinished": 60}));
    cluster.world.source_pod = Observed::Absent;
    let decision = cluster.settle();
    assert!(cluster.is_finished());
    assert!(!cluster.gone);
    assert_eq!(
        wakes_at(&decision),
        Some(cluster.world.now + jiff::SignedDuration::from_secs(60))
    );
    cluster.pass_time(60);
    cluster.settle();
    assert!(cluster.gone);
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
