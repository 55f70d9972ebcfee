//! Whole passes against a real API server; nodes, kubelets, scheduler and agents are played by the test.
//! `PEREGRINE_LIVE_API=1 KUBECONFIG=… cargo test -p operator --test reconcile_live -- --test-threads 1`

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test"
)]

mod live;

use std::time::Duration;

use crds::process_migration::{ActiveOn, DecisionValue, Phase, cond};
use kube::ResourceExt;
use kube::api::DeleteParams;
use live::{Stage, stage};
use serde_json::{Value, json};

async fn begin(name: &str) -> Option<Stage> {
    let mut stage = stage(name).await?;
    stage.nodes(&["a", "b"]).await;
    stage.start_operator().await;
    Some(stage)
}

#[tokio::test]
async fn a_pod_moves_and_can_move_again() {
    let Some(stage) = begin("moves").await else { return };
    stage.pod("web", "a", json!({})).await;
    let mut pod = "web".to_owned();
    for (round, to) in [("first", "b"), ("second", "a")] {
        stage.migrate(round, &pod, json!({})).await;
        let target = stage.admitted(round, to).await;
        let made = stage.pods().get(&target).await.unwrap();
        assert!(target.starts_with("web-"), "{target}");
        assert_eq!(target.len(), "web-".len() + 6, "names do not grow");
        assert_eq!(made.labels().get("app"), None, "the user's labels come at the commit");
        assert_eq!(made.annotations().get("note").map(String::as_str), Some("kept"));
        stage.target_ready(round, &target).await;
        stage.freezing(round, true).await;
        stage
            .until(round, "restoring", |s| s.phase == Some(Phase::Restoring))
            .await;
        stage.commit(round).await.unwrap();
        stage.until_gone(&pod).await;
        stage.source_released(round, true).await;
        let status = stage.finished(round, Phase::Succeeded, "Migrated").await;
        assert_eq!(status.active_on, Some(ActiveOn::Target));
        let result = status.result.unwrap();
        assert!(result.live);
        assert_eq!(result.transfer_milliseconds, Some(20));
        assert!(crds::condition::is_true(&status.conditions, cond::RESIDUAL_FREE));
        let moved = stage.pods().get(&target).await.unwrap();
        assert_eq!(moved.labels().get("app").map(String::as_str), Some("web"));
        assert!(moved.owner_references().is_empty());
        pod = target;
    }
}

#[tokio::test]
async fn refusals_name_their_reason() {
    let Some(stage) = begin("refusals").await else { return };
    let owned = json!({"metadata": {"ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "rs",
        "uid": "7c2f0a52-0000-4000-8000-000000000000", "controller": true}]}});
    stage.pod("owned", "a", owned).await;
    stage.pod("free", "a", json!({})).await;
    let host_path = json!({"spec": {"hostNetwork": true, "volumes": [{"name": "d", "hostPath": {"path": "/data"}}, {"name": "e", "emptyDir": {}}]}});
    stage.pod("mounts", "a", host_path).await;
    stage.migrate("absent", "nothing", json!({})).await;
    stage.finished("absent", Phase::Failed, "PodNotFound").await;
    stage.migrate("owner", "owned", json!({})).await;
    let status = stage.finished("owner", Phase::Failed, "OwnerNotSupported").await;
    assert!(status.decision.is_none());
    assert!(format!("{:?}", status.eligibility).contains("ReplicaSet/rs"));
    stage
        .migrate("strategy", "free", json!({"strategy": {"type": "PostCopy"}}))
        .await;
    stage.finished("strategy", Phase::Failed, "StrategyNotAvailable").await;
    stage
        .migrate("uid", "free", json!({"podRef": {"name": "free", "uid": "other"}}))
        .await;
    stage.finished("uid", Phase::Failed, "PodReplaced").await;
    stage.migrate("content", "mounts", json!({})).await;
    stage
        .source_checked(
            "content",
            json!([{"name": "sockets", "verdict": "Refused", "container": "app",
            "reason": "SocketNotSupported", "message": "container app: a packet socket (fd 7)", "remedy": "close it"}]),
        )
        .await;
    let status = stage.finished("content", Phase::Failed, "PodNotMigratable").await;
    let message = &crds::condition::find(&status.conditions, cond::SUCCEEDED)
        .unwrap()
        .message;
    for part in ["hostNetwork", "/data", "emptyDir", "packet socket"] {
        assert!(message.contains(part), "{message}");
    }
    stage
        .migrate("home", "free", json!({"target": {"nodeName": stage.node("a")}}))
        .await;
    stage.source_checked("home", json!([])).await;
    stage.finished("home", Phase::Failed, "TargetIsSource").await;
    stage
        .migrate("long", "free", json!({"maxFreezeMilliseconds": 100}))
        .await;
    stage.source_checked("long", json!([])).await;
    stage.finished("long", Phase::Failed, "FreezeTooLong").await;
    // Two at once: the second is told so.
    stage.migrate("one", "free", json!({})).await;
    stage.until("one", "accepted", |s| s.attempt == Some(1)).await;
    stage.migrate("two", "free", json!({})).await;
    stage.finished("two", Phase::Failed, "AlreadyMigrating").await;
    stage.cancel("one").await;
    stage.finished("one", Phase::Canceled, "CanceledByUser").await;
}

#[tokio::test]
async fn a_dry_run_touches_nothing() {
    let Some(stage) = begin("dry").await else { return };
    stage.pod("web", "a", json!({})).await;
    stage.migrate("dry", "web", json!({"dryRun": true})).await;
    stage.source_checked("dry", json!([])).await;
    let status = stage.finished("dry", Phase::Succeeded, "DryRunComplete").await;
    assert!(status.decision.is_none());
    let eligibility = status.eligibility.unwrap();
    assert!(eligibility.eligible);
    assert_eq!(eligibility.predicted_freeze_milliseconds, Some(120));
    assert!(eligibility.candidate_nodes.contains(&stage.node("b")));
    assert_eq!(stage.pods().list(&Default::default()).await.unwrap().items.len(), 1);
}

#[derive(Clone, Copy, Debug)]
enum Until {
    Checking,
    Preparing,
    Placed,
    TargetReady,
    Freezing,
    Synced,
}

async fn drive(stage: &Stage, name: &str, until: Until) -> Option<String> {
    if matches!(until, Until::Checking) {
        stage.until(name, "accepted", |s| s.attempt == Some(1)).await;
        return None;
    }
    if matches!(until, Until::Preparing) {
        stage.source_checked(name, json!([])).await;
        let status = stage
            .until(name, "with a target", |s| {
                s.target.as_ref().is_some_and(|t| t.pod_uid.is_some())
            })
            .await;
        return status.target.unwrap().pod_name;
    }
    let target = stage.admitted(name, "b").await;
    if matches!(until, Until::Placed) {
        return Some(target);
    }
    stage.target_ready(name, &target).await;
    if !matches!(until, Until::TargetReady) {
        stage.freezing(name, matches!(until, Until::Synced)).await;
    }
    Some(target)
}

/// Both agents do their part of an abort.
async fn agents_settle(stage: &Stage, name: &str, until: Until) {
    stage
        .until(name, "aborted", |s| {
            // Canceled before the decision was even opened: it is over at once.
            crds::condition::is_true(&s.conditions, cond::FINISHED)
                || s.decision.as_ref().is_some_and(|d| d.value == DecisionValue::Aborted)
        })
        .await;
    if matches!(until, Until::Freezing | Until::Synced) {
        stage.source_released(name, false).await;
    }
    if matches!(until, Until::TargetReady | Until::Freezing | Until::Synced) {
        stage.target_destroyed(name).await;
    }
}

const ALL: [Until; 6] = [
    Until::Checking,
    Until::Preparing,
    Until::Placed,
    Until::TargetReady,
    Until::Freezing,
    Until::Synced,
];

#[tokio::test]
async fn cancel_works_in_every_phase_and_the_pod_can_move_afterwards() {
    let Some(stage) = begin("cancel").await else { return };
    stage.pod("web", "a", json!({})).await;
    for until in ALL {
        let name = format!("{until:?}").to_lowercase();
        stage.migrate(&name, "web", json!({})).await;
        let target = drive(&stage, &name, until).await;
        stage.cancel(&name).await;
        agents_settle(&stage, &name, until).await;
        let status = stage.finished(&name, Phase::Canceled, "CanceledByUser").await;
        assert_eq!(status.active_on, Some(ActiveOn::Source));
        if let Some(target) = target {
            stage.until_gone(&target).await;
        }
        assert!(stage.commit(&name).await.is_err(), "an aborted migration was committed");
    }
}

#[tokio::test]
async fn deleting_the_migration_cancels_it_before_the_commit_and_lets_it_finish_after() {
    let Some(stage) = begin("delete").await else { return };
    stage.pod("web", "a", json!({})).await;
    stage.migrate("early", "web", json!({})).await;
    let target = drive(&stage, "early", Until::Synced).await.unwrap();
    stage
        .migrations()
        .delete("early", &DeleteParams::default())
        .await
        .unwrap();
    agents_settle(&stage, "early", Until::Synced).await;
    stage.until_gone(&target).await;
    gone(&stage, "early").await;
    assert!(stage.pods().get_opt("web").await.unwrap().is_some());

    stage.migrate("late", "web", json!({})).await;
    let target = drive(&stage, "late", Until::Synced).await.unwrap();
    stage.commit("late").await.unwrap();
    stage
        .migrations()
        .delete("late", &DeleteParams::default())
        .await
        .unwrap();
    stage.until_gone("web").await;
    stage.source_released("late", true).await;
    gone(&stage, "late").await;
    let moved = stage.pods().get(&target).await.unwrap();
    assert!(moved.owner_references().is_empty());
    assert_eq!(moved.labels().get("app").map(String::as_str), Some("web"));
}

async fn gone(stage: &Stage, name: &str) {
    let begun = std::time::Instant::now();
    while stage.migrations().get_opt(name).await.unwrap().is_some() {
        assert!(begun.elapsed() < live::PATIENCE, "migration {name} is still there");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_pod_deleted_by_its_user_ends_the_attempt_before_the_commit() {
    let Some(stage) = begin("podgone").await else { return };
    for until in ALL {
        let name = format!("{until:?}").to_lowercase();
        let pod = format!("pod-{name}");
        stage.pod(&pod, "a", json!({})).await;
        stage.migrate(&name, &pod, json!({})).await;
        let target = drive(&stage, &name, until).await;
        stage.pods().delete(&pod, &DeleteParams::default()).await.unwrap();
        agents_settle(&stage, &name, until).await;
        let phase = if matches!(until, Until::Checking) {
            Phase::Failed
        } else {
            Phase::RolledBack
        };
        let status = stage.finished(&name, phase, "PodDeleted").await;
        assert_eq!(status.active_on, Some(ActiveOn::None));
        if let Some(target) = target {
            stage.until_gone(&target).await;
        }
    }
    // After the commit the move goes on, and the target gets the labels of a pod that is gone.
    stage.pod("late", "a", json!({})).await;
    stage.migrate("late", "late", json!({})).await;
    let target = drive(&stage, "late", Until::Synced).await.unwrap();
    stage.commit("late").await.unwrap();
    let _raced = stage
        .pods()
        .delete("late", &DeleteParams::default().grace_period(0))
        .await;
    stage.source_released("late", true).await;
    let status = stage.finished("late", Phase::Succeeded, "Migrated").await;
    assert_eq!(status.active_on, Some(ActiveOn::Target));
    let moved = stage.pods().get(&target).await.unwrap();
    assert_eq!(moved.labels().get("app").map(String::as_str), Some("late"));
}

#[tokio::test]
async fn a_target_that_is_lost_and_an_agent_that_fails_roll_back() {
    let Some(stage) = begin("lost").await else { return };
    stage.pod("web", "a", json!({})).await;
    stage.migrate("lost", "web", json!({})).await;
    let target = drive(&stage, "lost", Until::Synced).await.unwrap();
    stage.pods().delete(&target, &DeleteParams::default()).await.unwrap();
    agents_settle(&stage, "lost", Until::Synced).await;
    stage.finished("lost", Phase::RolledBack, "TargetLost").await;

    stage.migrate("failure", "web", json!({})).await;
    drive(&stage, "failure", Until::TargetReady).await;
    let failure = json!({"source": {"checkedAttempt": 1, "step": "dump", "failure":
        {"reason": "CheckpointFailed", "message": "CRIU cannot dump an io_uring"}}});
    stage.apply("failure", crds::names::MANAGER_SOURCE, failure).await;
    agents_settle(&stage, "failure", Until::Synced).await;
    let status = stage.finished("failure", Phase::RolledBack, "CheckpointFailed").await;
    let message = &crds::condition::find(&status.conditions, cond::SUCCEEDED)
        .unwrap()
        .message;
    assert_eq!(message, "CRIU cannot dump an io_uring");
}

#[tokio::test]
async fn a_refused_target_pod_says_why() {
    let Some(stage) = begin("quota").await else { return };
    let quotas: kube::Api<k8s_openapi::api::core::v1::ResourceQuota> =
        kube::Api::namespaced(stage.client.clone(), &stage.namespace);
    stage.pod("web", "a", json!({})).await;
    let quota = serde_json::from_value(json!({"metadata": {"name": "one"}, "spec": {"hard": {"pods": "0"}}})).unwrap();
    quotas.create(&Default::default(), &quota).await.unwrap();
    let status = json!({"status": {"hard": {"pods": "0"}, "used": {"pods": "0"}}});
    quotas
        .patch_status("one", &Default::default(), &kube::api::Patch::Merge(status))
        .await
        .unwrap();
    for (name, spec) in [("dry", json!({"dryRun": true})), ("real", json!({}))] {
        stage.migrate(name, "web", spec).await;
        stage.source_checked(name, json!([])).await;
        let phase = if name == "dry" {
            Phase::Failed
        } else {
            Phase::RolledBack
        };
        let status = stage.finished(name, phase, "TargetRefused").await;
        let message = &crds::condition::find(&status.conditions, cond::SUCCEEDED)
            .unwrap()
            .message;
        assert!(message.contains("quota"), "{message}");
    }
}

#[tokio::test]
async fn cold_starts_anew_and_ends_the_old_pod_after_the_new_is_ready() {
    let Some(stage) = begin("cold").await else { return };
    stage.pod("web", "a", json!({})).await;
    stage
        .migrate("cold", "web", json!({"strategy": {"type": "Cold"}}))
        .await;
    let status = stage
        .until("cold", "with a new pod", |s| {
            s.target.as_ref().is_some_and(|t| t.pod_uid.is_some())
        })
        .await;
    let target = status.target.unwrap().pod_name.unwrap();
    let made = stage.pods().get(&target).await.unwrap();
    assert_eq!(made.spec.as_ref().unwrap().runtime_class_name, None);
    assert!(!made.annotations().contains_key(crds::names::ANNOTATION_TARGET_OF));
    stage.bind(&target, "b").await;
    stage.pod_runs(&target, false).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(
        stage
            .pods()
            .get("web")
            .await
            .unwrap()
            .metadata
            .deletion_timestamp
            .is_none()
    );
    stage.pod_runs(&target, true).await;
    stage.until_gone("web").await;
    let status = stage.finished("cold", Phase::Succeeded, "StartedCold").await;
    assert!(!status.result.unwrap().live);
    let moved = stage.pods().get(&target).await.unwrap();
    assert_eq!(moved.labels().get("app").map(String::as_str), Some("web"));
    assert!(moved.owner_references().is_empty());

    // And canceled in time: the old pod stays.
    stage
        .migrate("no", &target, json!({"strategy": {"type": "Cold"}}))
        .await;
    stage
        .until("no", "with a new pod", |s| {
            s.target.as_ref().is_some_and(|t| t.pod_uid.is_some())
        })
        .await;
    stage.cancel("no").await;
    stage.finished("no", Phase::Canceled, "CanceledByUser").await;
    assert!(
        stage
            .pods()
            .get(&target)
            .await
            .unwrap()
            .metadata
            .deletion_timestamp
            .is_none()
    );
}

#[tokio::test]
async fn an_operator_that_starts_anywhere_goes_on() {
    let Some(mut stage) = begin("restart").await else {
        return;
    };
    stage.pod("web", "a", json!({})).await;
    let mut pod = "web".to_owned();
    for until in ALL {
        let name = format!("{until:?}").to_lowercase();
        stage
            .migrate(&name, &pod, json!({"target": {"nodeName": stage.node("b")}}))
            .await;
        drive(&stage, &name, until).await;
        stage.kill_operator().await;
        stage.start_operator().await;
        let target = match until {
            Until::Checking => stage.admitted(&name, "b").await,
            Until::Preparing => {
                let target = stage.status(&name).await.target.unwrap().pod_name.unwrap();
                stage.bind(&target, "b").await;
                target
            }
            Until::Placed | Until::TargetReady | Until::Freezing | Until::Synced => {
                stage.status(&name).await.target.unwrap().pod_name.unwrap()
            }
        };
        stage
            .until(&name, "placed", |s| {
                s.target.as_ref().is_some_and(|t| t.node_name.is_some())
            })
            .await;
        stage.target_ready(&name, &target).await;
        stage.freezing(&name, true).await;
        stage.kill_operator().await;
        stage.commit(&name).await.unwrap();
        stage.start_operator().await;
        stage.until_gone(&pod).await;
        stage.kill_operator().await;
        stage.source_released(&name, true).await;
        stage.start_operator().await;
        stage.finished(&name, Phase::Succeeded, "Migrated").await;
        pod = target;
        // Back home, by deleting and making it anew.
        stage
            .pods()
            .delete(&pod, &DeleteParams::default().grace_period(0))
            .await
            .unwrap();
        pod = format!("web-{name}");
        stage.pod(&pod, "a", json!({})).await;
    }
}

#[tokio::test]
async fn limits_queue_and_a_free_slot_wakes() {
    let Some(stage) = begin("queue").await else { return };
    for pod in ["one", "two"] {
        stage.pod(pod, "a", json!({})).await;
        stage.migrate(pod, pod, json!({})).await;
        stage.source_checked(pod, json!([])).await;
        stage
            .until(pod, "admitted or queued", |s| {
                s.phase == Some(Phase::Queued) || s.phase == Some(Phase::Preparing)
            })
            .await;
    }
    let queued = stage.until("two", "queued", |s| s.phase == Some(Phase::Queued)).await;
    let admitted = crds::condition::find(&queued.conditions, cond::ADMITTED).unwrap();
    assert_eq!(admitted.reason, "WaitingForSlot");
    stage.cancel("one").await;
    stage.finished("one", Phase::Canceled, "CanceledByUser").await;
    stage
        .until("two", "admitted", |s| s.phase == Some(Phase::Preparing))
        .await;
    stage.cancel("two").await;
    stage.finished("two", Phase::Canceled, "CanceledByUser").await;
}

#[tokio::test]
async fn deadlines_end_what_nobody_answers_and_a_stall_says_what_is_waited_for() {
    let Some(stage) = begin("deadline").await else { return };
    stage.pod("web", "a", json!({})).await;
    stage
        .migrate("agent", "web", json!({"progressTimeoutSeconds": 14}))
        .await;
    let status = stage
        .until("agent", "stalled", |s| {
            crds::condition::is_true(&s.conditions, cond::STALLED)
        })
        .await;
    let stalled = crds::condition::find(&status.conditions, cond::STALLED).unwrap();
    assert_eq!(stalled.reason, "WaitingForSourceAgent");
    let status = stage.finished("agent", Phase::Failed, "ProgressTimeout").await;
    assert!(crds::condition::find(&status.conditions, cond::STALLED).is_none());

    stage
        .migrate("scheduler", "web", json!({"progressTimeoutSeconds": 5}))
        .await;
    stage.source_checked("scheduler", json!([])).await;
    stage.finished("scheduler", Phase::RolledBack, "Unschedulable").await;
}

#[tokio::test]
async fn a_finished_migration_goes_after_its_ttl() {
    let Some(stage) = begin("ttl").await else { return };
    stage
        .migrate("gone", "nothing", json!({"ttlSecondsAfterFinished": 2}))
        .await;
    stage.finished("gone", Phase::Failed, "PodNotFound").await;
    gone(&stage, "gone").await;
}

#[tokio::test]
async fn events_tell_the_story_on_both_objects() {
    let Some(stage) = begin("events").await else { return };
    stage.pod("web", "a", json!({})).await;
    stage.migrate("story", "web", json!({})).await;
    drive(&stage, "story", Until::TargetReady).await;
    stage.cancel("story").await;
    agents_settle(&stage, "story", Until::TargetReady).await;
    stage.finished("story", Phase::Canceled, "CanceledByUser").await;
    let events: kube::Api<k8s_openapi::api::events::v1::Event> =
        kube::Api::namespaced(stage.client.clone(), &stage.namespace);
    for (kind, name) in [("ProcessMigration", "story"), ("Pod", "web")] {
        let begun = std::time::Instant::now();
        loop {
            let reasons: Vec<Value> = events
                .list(&Default::default())
                .await
                .unwrap()
                .items
                .into_iter()
                .filter(|e| {
                    e.regarding
                        .as_ref()
                        .is_some_and(|r| r.kind.as_deref() == Some(kind) && r.name.as_deref() == Some(name))
                })
                .map(|e| json!(e.reason))
                .collect();
            if ["Pending", "Preparing", "CanceledByUser"]
                .iter()
                .all(|r| reasons.contains(&json!(r)))
            {
                break;
            }
            assert!(begun.elapsed() < live::PATIENCE, "{kind}: {reasons:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}
