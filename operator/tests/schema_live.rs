//! Every rule of the CRDs, both ways, as a real API server applies it. See `reconcile_live.rs` for how to run it.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test"
)]

mod live;

use kube::ResourceExt;
use kube::api::{Api, Patch, PatchParams, PostParams};
use live::{Stage, condition, stage};
use serde_json::{Value, json};

use crds::{MigrationNode, ProcessMigration};

async fn create(stage: &Stage, name: &str, spec: Value) -> Result<(), String> {
    let object: Value = json!({"apiVersion": "peregrine.dev/v1alpha1", "kind": "ProcessMigration",
        "metadata": {"name": name}, "spec": spec});
    // Past our own types, which could not even hold what is wrong.
    let api: Api<kube::api::DynamicObject> = Api::namespaced_with(
        stage.client.clone(),
        &stage.namespace,
        &kube::api::ApiResource::erase::<ProcessMigration>(&()),
    );
    let object = serde_json::from_value(object).unwrap();
    let params = PostParams::default();
    api.create(&params, &object)
        .await
        .map(|_| ())
        .map_err(|e| e.to_string())
}

async fn patch(stage: &Stage, name: &str, spec: Value) -> Result<(), String> {
    stage
        .migrations()
        .patch(name, &PatchParams::default(), &Patch::Merge(json!({"spec": spec})))
        .await
        .map(|_| ())
        .map_err(|e| e.to_string())
}

async fn status(stage: &Stage, name: &str, operations: Value) -> Result<(), String> {
    let patch: Patch<()> = Patch::Json(serde_json::from_value(operations).unwrap());
    stage
        .migrations()
        .patch_status(name, &PatchParams::default(), &patch)
        .await
        .map(|_| ())
        .map_err(|e| e.to_string())
}

fn refused(result: Result<(), String>, word: &str) {
    let error = result.expect_err(word);
    assert!(error.contains(word), "{word:?} is not in {error:?}");
}

#[tokio::test]
async fn what_may_be_created() {
    let Some(stage) = stage("schema").await else { return };
    let pod = json!({"name": "web"});
    let with = |patch: Value| {
        let mut spec = json!({"podRef": pod});
        live::merge(&mut spec, patch);
        spec
    };
    let good = [
        with(json!({})),
        with(json!({"target": {"nodeName": "b"}})),
        with(json!({"target": {"nodeSelector": {"a": "b"}}})),
        with(
            json!({"strategy": {"type": "Cold"}, "connections": "Close", "maxFreezeMilliseconds": 1, "dryRun": true,
            "ttlSecondsAfterFinished": 0, "progressTimeoutSeconds": 5, "activeDeadlineSeconds": 10, "desiredState": "Canceled"}),
        ),
        with(json!({"podRef": {"uid": "u"}})),
    ];
    for (i, spec) in good.into_iter().enumerate() {
        create(&stage, &format!("good-{i}"), spec).await.unwrap();
    }
    let bad = [
        (json!({}), "podRef"),
        (json!({"podRef": {}}), "name"),
        (json!({"podRef": {"name": ""}}), "podRef.name"),
        (with(json!({"target": {}})), "exactly one of nodeName and nodeSelector"),
        (
            with(json!({"target": {"nodeName": "b", "nodeSelector": {"a": "b"}}})),
            "exactly one of nodeName and nodeSelector",
        ),
        (with(json!({"target": {"nodeSelector": {}}})), "nodeSelector"),
        (with(json!({"strategy": {"type": "Teleport"}})), "Teleport"),
        (with(json!({"connections": "Maybe"})), "Maybe"),
        (with(json!({"maxFreezeMilliseconds": 0})), "maxFreezeMilliseconds"),
        (with(json!({"progressTimeoutSeconds": 1})), "progressTimeoutSeconds"),
        (with(json!({"activeDeadlineSeconds": 1})), "activeDeadlineSeconds"),
        (with(json!({"desiredState": "Gone"})), "Gone"),
    ];
    for (i, (spec, word)) in bad.into_iter().enumerate() {
        refused(create(&stage, &format!("bad-{i}"), spec).await, word);
    }
}

#[tokio::test]
async fn the_spec_is_immutable_but_for_what_may_change() {
    let Some(stage) = stage("immutable").await else { return };
    create(&stage, "bare", json!({"podRef": {"name": "web"}}))
        .await
        .unwrap();
    let full = json!({"podRef": {"name": "web", "uid": "u"}, "target": {"nodeName": "b"}, "strategy": {"type": "Cold"},
        "connections": "Close", "maxFreezeMilliseconds": 5, "progressTimeoutSeconds": 50, "activeDeadlineSeconds": 100,
        "ttlSecondsAfterFinished": 10, "dryRun": true});
    create(&stage, "full", full).await.unwrap();
    for (name, change, word) in [
        ("bare", json!({"podRef": {"name": "other"}}), "podRef is immutable"),
        ("full", json!({"podRef": {"uid": "v"}}), "podRef is immutable"),
        ("full", json!({"podRef": {"uid": null}}), "podRef is immutable"),
        ("bare", json!({"target": {"nodeName": "b"}}), "target is immutable"),
        ("full", json!({"target": {"nodeName": "c"}}), "target is immutable"),
        ("full", json!({"target": null}), "target is immutable"),
        ("bare", json!({"strategy": {"type": "Cold"}}), "strategy is immutable"),
        ("full", json!({"strategy": null}), "strategy is immutable"),
        ("full", json!({"connections": "Preserve"}), "connections is immutable"),
        ("full", json!({"connections": null}), "connections is immutable"),
        (
            "bare",
            json!({"maxFreezeMilliseconds": 5}),
            "maxFreezeMilliseconds is immutable",
        ),
        (
            "full",
            json!({"maxFreezeMilliseconds": null}),
            "maxFreezeMilliseconds is immutable",
        ),
        (
            "bare",
            json!({"progressTimeoutSeconds": 99}),
            "progressTimeoutSeconds is immutable",
        ),
        (
            "full",
            json!({"progressTimeoutSeconds": null}),
            "progressTimeoutSeconds is immutable",
        ),
        (
            "full",
            json!({"activeDeadlineSeconds": 101}),
            "activeDeadlineSeconds is immutable",
        ),
        ("bare", json!({"dryRun": true}), "dryRun is immutable"),
        ("full", json!({"dryRun": null}), "dryRun is immutable"),
    ] {
        refused(patch(&stage, name, change).await, word);
    }
    patch(&stage, "bare", json!({"podRef": {"uid": "u"}})).await.unwrap();
    refused(
        patch(&stage, "bare", json!({"podRef": {"uid": "v"}})).await,
        "podRef is immutable",
    );
    for ttl in [json!(60), json!(5), json!(null)] {
        patch(&stage, "bare", json!({"ttlSecondsAfterFinished": ttl}))
            .await
            .unwrap();
    }
    patch(&stage, "bare", json!({"desiredState": "Canceled"}))
        .await
        .unwrap();
    for back in [json!("Migrated"), json!(null)] {
        refused(
            patch(&stage, "bare", json!({"desiredState": back})).await,
            "desiredState can only go",
        );
    }
    patch(
        &stage,
        "bare",
        json!({"desiredState": "Canceled", "ttlSecondsAfterFinished": 7}),
    )
    .await
    .unwrap();
}

#[tokio::test]
async fn the_decision_is_taken_once() {
    let Some(stage) = stage("decision").await else { return };
    let undecided = json!({"value": "Undecided"});
    let committed = json!({"value": "Committed", "by": "Target"});
    let aborted = json!({"value": "Aborted", "by": "Operator", "reason": "CanceledByUser"});
    let set = |value: &Value| json!([{"op": "add", "path": "/status/decision", "value": value}]);
    for name in ["commits", "aborts", "open"] {
        create(&stage, name, json!({"podRef": {"name": "web"}})).await.unwrap();
        stage
            .apply(
                name,
                "test",
                json!({"attempt": 1, "conditions": [condition("Accepted")]}),
            )
            .await;
        // Committed without ever having been undecided, or without a restored target: never.
        assert!(status(&stage, name, set(&committed)).await.is_err());
        status(&stage, name, set(&undecided)).await.unwrap();
        assert!(status(&stage, name, set(&committed)).await.is_err());
    }
    let remove = json!([{"op": "remove", "path": "/status/decision"}]);
    let remove_status = json!([{"op": "remove", "path": "/status"}]);
    assert!(status(&stage, "open", remove.clone()).await.is_err());

    stage.commit("commits").await.unwrap();
    let again = stage.commit("commits").await.expect_err("a second commit");
    assert!(matches!(again, kube::Error::Api(s) if s.code == 422));
    for back in [&undecided, &aborted] {
        assert!(status(&stage, "commits", set(back)).await.is_err());
    }
    assert!(status(&stage, "commits", remove.clone()).await.is_err());
    assert!(status(&stage, "commits", remove_status.clone()).await.is_err());
    // Conditions may still change, Restored included: what is decided is decided.
    status(
        &stage,
        "commits",
        json!([{"op": "replace", "path": "/status/conditions", "value": [condition("Accepted")]}]),
    )
    .await
    .unwrap();

    status(&stage, "aborts", set(&aborted)).await.unwrap();
    assert!(stage.commit("aborts").await.is_err());
    for back in [&undecided, &committed] {
        assert!(status(&stage, "aborts", set(back)).await.is_err());
    }
    assert!(status(&stage, "aborts", remove).await.is_err());
    assert!(status(&stage, "aborts", remove_status).await.is_err());

    // An apply by any of the three writers that says nothing of the decision leaves it.
    for manager in [
        crds::names::MANAGER_OPERATOR,
        crds::names::MANAGER_SOURCE,
        crds::names::MANAGER_TARGET,
    ] {
        stage.apply("open", manager, json!({"target": {"step": manager}})).await;
        let decision = stage.status("open").await.decision.unwrap();
        assert_eq!(decision.value, crds::process_migration::DecisionValue::Undecided);
    }
    // And the status cannot be written past its subresource.
    let past = json!({"status": {"decision": {"value": "Aborted"}}});
    stage
        .migrations()
        .patch("open", &PatchParams::default(), &Patch::Merge(past))
        .await
        .unwrap();
    let decision = stage.status("open").await.decision.unwrap();
    assert_eq!(decision.value, crds::process_migration::DecisionValue::Undecided);
}

#[tokio::test]
async fn migrations_can_be_selected_by_their_nodes() {
    let Some(stage) = stage("select").await else { return };
    create(&stage, "mine", json!({"podRef": {"name": "web"}}))
        .await
        .unwrap();
    create(&stage, "other", json!({"podRef": {"name": "db"}}))
        .await
        .unwrap();
    let halves = json!({"source": {"nodeName": "a"}, "target": {"nodeName": "b"}});
    stage.apply("mine", crds::names::MANAGER_OPERATOR, halves).await;
    for selector in [
        "status.source.nodeName=a",
        "status.target.nodeName=b",
        "spec.podRef.name=web",
    ] {
        let found = stage
            .migrations()
            .list(&kube::api::ListParams::default().fields(selector))
            .await
            .unwrap();
        let names: Vec<String> = found.items.iter().map(ResourceExt::name_any).collect();
        assert_eq!(names, ["mine"], "{selector}");
    }
}

#[tokio::test]
async fn a_migration_node_is_open_unless_it_says_otherwise() {
    let Some(stage) = stage("mnode").await else { return };
    let api: Api<MigrationNode> = Api::all(stage.client.clone());
    let name = stage.node("x");
    let object = serde_json::from_value(json!({"metadata": {"name": name}, "spec": {}})).unwrap();
    assert!(
        api.create(&PostParams::default(), &object)
            .await
            .unwrap()
            .spec
            .schedulable
    );
    let change = |spec: Value| Patch::Merge(json!({ "spec": spec }));
    let params = PatchParams::default();
    assert!(
        api.patch(&name, &params, &change(json!({"maxInbound": 0, "maxOutbound": 3})))
            .await
            .is_ok()
    );
    assert!(
        api.patch(&name, &params, &change(json!({"maxInbound": -1})))
            .await
            .is_err()
    );
    api.delete(&name, &Default::default()).await.unwrap();
}
