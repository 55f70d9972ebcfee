//! Tables of moves, aborts and ends: one situation, one outcome.

use crds::Reason;
use crds::condition::{find, is_true};
use crds::process_migration::{ActiveOn, DecisionValue, Phase, cond};
use serde_json::json;

use super::fixture::{Cluster, Step, running_pod, wakes_at};
use super::world::Heartbeat;
use super::{Observed, Stage, pod, stage};

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
