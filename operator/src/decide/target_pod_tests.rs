//! The target pod, field by field.

use k8s_openapi::api::core::v1::{NodeSelectorTerm, Pod};
use serde_json::{Value, json};

use super::drift;
use super::fixture::{migration, running_pod};
use super::target_pod::{Mode, build, kept_labels, name};

const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

fn live(patch: Value) -> Pod {
    build(
        &running_pod(patch),
        &migration(json!({})),
        &["b".into(), "c".into()],
        Mode::Live,
    )
}

fn terms(pod: &Pod) -> Vec<NodeSelectorTerm> {
    pod.spec
        .as_ref()
        .and_then(|s| s.affinity.as_ref())
        .and_then(|a| a.node_affinity.as_ref())
        .and_then(|n| n.required_during_scheduling_ignored_during_execution.as_ref())
        .map(|r| r.node_selector_terms.clone())
        .unwrap_or_default()
}

fn nodes_of(pod: &Pod) -> Vec<String> {
    terms(pod)
        .iter()
        .map(|t| {
            let field = t.match_fields.as_ref().unwrap().last().unwrap();
            assert_eq!((field.key.as_str(), field.operator.as_str()), ("metadata.name", "In"));
            let values = field.values.clone().unwrap();
            assert_eq!(values.len(), 1, "the API takes exactly one value");
            values[0].clone()
        })
        .collect()
}

#[test]
fn what_belongs_to_the_old_pod_is_left_out() {
    let pod = live(json!({"spec": {
        "schedulingGates": [{"name": "g"}], "ephemeralContainers": [{"name": "debug"}],
        "initContainers": [{"name": "init"}],
        "containers": [{"name": "app", "image": "x", "lifecycle": {"postStart": {"exec": {"command": ["x"]}}}}]}}));
    let spec = pod.spec.unwrap();
    assert_eq!(spec.node_name, None);
    assert_eq!(spec.scheduling_gates, None);
    assert_eq!(spec.ephemeral_containers, None);
    assert_eq!(spec.init_containers, None);
    assert_eq!(spec.containers[0].lifecycle, None);
    assert_eq!(spec.runtime_class_name.as_deref(), Some("peregrine"));
    assert_eq!(spec.containers[0].image_pull_policy.as_deref(), Some("IfNotPresent"));
    assert!(pod.status.is_none());
}

#[test]
fn a_pre_stop_hook_stays() {
    let pod = live(
        json!({"spec": {"containers": [{"name": "app", "image": "x", "lifecycle":
        {"postStart": {"sleep": {"seconds": 1}}, "preStop": {"sleep": {"seconds": 1}}}}]}}),
    );
    let hooks = pod.spec.unwrap().containers[0].lifecycle.clone().unwrap();
    assert!(hooks.post_start.is_none() && hooks.pre_stop.is_some());
}

#[test]
fn labels_wait_for_the_commit_and_annotations_come_along() {
    let pod = live(json!({"metadata": {"annotations": {
        "kubectl.kubernetes.io/last-applied-configuration": "{}", "cni.projectcalico.org/podIP": "10.0.0.1",
        "cni.projectcalico.org/ipAddrs": "[\"10.0.0.1\"]", "peregrine.dev/target-of": "forged"}}}));
    let labels = pod.metadata.labels.clone().unwrap();
    assert_eq!(labels.len(), 1);
    assert_eq!(labels["peregrine.dev/migration"], "move");
    assert_eq!(kept_labels(&pod)["app"], "web");
    let annotations = pod.metadata.annotations.unwrap();
    assert_eq!(annotations["note"], "kept");
    assert_eq!(
        annotations["cni.projectcalico.org/ipAddrs"], "[\"10.0.0.1\"]",
        "a wish of the user"
    );
    assert_eq!(annotations["peregrine.dev/target-of"], "move-uid");
    assert_eq!(annotations["peregrine.dev/original-name"], "web-0");
    assert!(!annotations.contains_key("kubectl.kubernetes.io/last-applied-configuration"));
    assert!(!annotations.contains_key("cni.projectcalico.org/podIP"));
    let owner = &pod.metadata.owner_references.unwrap()[0];
    assert_eq!((owner.uid.as_str(), owner.controller), ("move-uid", Some(true)));
    assert_eq!(owner.block_owner_deletion, Some(false));
}

#[test]
fn the_host_name_stays_when_the_name_changes() {
    let hostname = |patch: Value| live(patch).spec.unwrap().hostname.unwrap();
    assert_eq!(hostname(json!({})), "web-0");
    assert_eq!(hostname(json!({"spec": {"hostname": "own"}})), "own");
    let long = "a".repeat(80);
    assert_eq!(hostname(json!({"metadata": {"name": long}})).len(), 63);
    assert_eq!(
        hostname(json!({"metadata": {"name": format!("{}-b", "a".repeat(62))}})),
        "a".repeat(62)
    );
}

#[test]
fn an_image_is_pinned_only_by_a_digest_that_a_registry_knows() {
    let table = [
        (
            format!("docker.io/library/nginx@{DIGEST}"),
            format!("docker.io/library/nginx@{DIGEST}"),
        ),
        (format!("docker-pullable://nginx@{DIGEST}"), format!("nginx@{DIGEST}")),
        (DIGEST.to_owned(), "docker.io/peregrine/workload:dev".to_owned()),
        (
            "nginx@sha256:short".to_owned(),
            "docker.io/peregrine/workload:dev".to_owned(),
        ),
        (String::new(), "docker.io/peregrine/workload:dev".to_owned()),
    ];
    for (id, image) in table {
        let pod = live(
            json!({"status": {"containerStatuses": [{"name": "app", "image": "", "imageID": id, "ready": true, "restartCount": 0}]}}),
        );
        assert_eq!(
            pod.spec.unwrap().containers[0].image.as_deref(),
            Some(image.as_str()),
            "{id}"
        );
    }
}

#[test]
fn the_pod_may_go_to_the_candidates_and_nowhere_else() {
    assert_eq!(nodes_of(&live(json!({}))), ["b", "c"]);
}

#[test]
fn each_of_the_users_terms_is_narrowed() {
    let ssd = json!({"matchExpressions": [{"key": "disk", "operator": "In", "values": ["ssd"]}]});
    let big = json!({"matchExpressions": [{"key": "size", "operator": "In", "values": ["big"]}]});
    let pod = live(json!({"spec": {"affinity": {"nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [ssd, big]},
        "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "preference": ssd}]},
        "podAntiAffinity": {}}}}));
    assert_eq!(nodes_of(&pod), ["b", "c", "b", "c"]);
    assert!(
        terms(&pod)
            .iter()
            .all(|t| t.match_expressions.as_ref().unwrap().len() == 1)
    );
    let affinity = pod.spec.unwrap().affinity.unwrap();
    assert!(affinity.pod_anti_affinity.is_some());
    let node = affinity.node_affinity.unwrap();
    assert_eq!(
        node.preferred_during_scheduling_ignored_during_execution.unwrap().len(),
        1
    );
}

#[test]
fn a_second_move_forgets_where_the_first_was_allowed_to_go() {
    let ssd = json!({"matchExpressions": [{"key": "disk", "operator": "In", "values": ["ssd"]}]});
    let pinned = json!({"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["c"]}]});
    for (terms_of_user, left) in [
        (json!([]), json!([])),
        (json!([ssd]), json!([ssd])),
        (json!([pinned]), json!([pinned])),
    ] {
        let mut patch = json!({});
        if terms_of_user != json!([]) {
            patch = json!({"spec": {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
                {"nodeSelectorTerms": terms_of_user}}}}});
        }
        let first = live(patch);
        let again = build(&first, &migration(json!({})), &["a".into()], Mode::Live);
        let expected = left.as_array().unwrap().len().max(1);
        assert_eq!(terms(&again).len(), expected, "{left}");
        assert_eq!(nodes_of(&again), vec!["a"; expected]);
        let mut own = terms(&again);
        for term in &mut own {
            term.match_fields.as_mut().unwrap().pop();
            if term.match_fields.as_ref().unwrap().is_empty() {
                term.match_fields = None;
            }
        }
        if left != json!([]) {
            assert_eq!(serde_json::to_value(own).unwrap(), left);
        }
    }
}

#[test]
fn names_do_not_grow_and_follow_from_the_migration() {
    let first = name("web-0", None, "uid-1");
    assert_eq!(first, name("web-0", None, "uid-1"));
    assert_ne!(first, name("web-0", None, "uid-2"));
    let second = name(&first, Some("web-0"), "uid-2");
    assert_eq!(second.len(), first.len());
    assert!(name(&"x".repeat(253), None, "u").len() <= 253);
    assert!(
        name("web-0", Some("../../etc"), "u").starts_with("web-0-"),
        "an annotation is not trusted"
    );
    assert!(!name(&format!("{}.{}", "a".repeat(245), "b".repeat(7)), None, "u").contains(".-"));
}

#[test]
fn cold_starts_as_the_user_would_have() {
    let source = running_pod(
        json!({"spec": {"initContainers": [{"name": "init"}], "containers": [{"name": "app", "image": "x",
        "lifecycle": {"postStart": {"exec": {"command": ["x"]}}}}]}}),
    );
    let pod = build(&source, &migration(json!({})), &["b".into()], Mode::Cold);
    let annotations = pod.metadata.annotations.clone().unwrap();
    assert!(!annotations.contains_key("peregrine.dev/target-of"));
    let spec = pod.spec.as_ref().unwrap();
    assert_eq!(spec.runtime_class_name, None);
    assert_eq!(spec.init_containers.as_ref().unwrap().len(), 1);
    assert!(spec.containers[0].lifecycle.as_ref().unwrap().post_start.is_some());
    assert_eq!(nodes_of(&pod), ["b"]);
}

#[test]
fn drift_is_named_and_what_admission_may_do_is_allowed() {
    let asked = live(json!({"spec": {"volumes": [{"name": "v", "configMap": {"name": "c"}}]}}))
        .spec
        .unwrap();
    let table: Vec<(Value, Vec<&str>)> = vec![
        (json!({}), vec![]),
        (
            json!({"tolerations": [{"key": "x"}], "priority": 5, "overhead": {"cpu": "1"}, "nodeName": "b"}),
            vec![],
        ),
        (json!({"hostNetwork": true}), vec!["hostNetwork"]),
        (
            json!({"containers": [{"image": "other"}]}),
            vec!["containers[app].image"],
        ),
        (json!({"containers": [{"imagePullPolicy": "Always"}]}), vec![]),
        (
            json!({"volumes": [{"configMap": {"name": "d"}}]}),
            vec!["volumes[v].configMap.name"],
        ),
        (json!({"runtimeClassName": "kata"}), vec!["runtimeClassName"]),
    ];
    for (patch, paths) in table {
        let mut stored = serde_json::to_value(&asked).unwrap();
        if let (Some(list), Some(container)) = (stored["containers"].as_array_mut(), patch["containers"].get(0)) {
            super::fixture::merge(&mut list[0], container.clone());
        }
        if let (Some(list), Some(volume)) = (stored["volumes"].as_array_mut(), patch["volumes"].get(0)) {
            super::fixture::merge(&mut list[0], volume.clone());
        }
        let mut rest = patch.clone();
        if let Some(rest) = rest.as_object_mut() {
            rest.remove("containers");
            rest.remove("volumes");
        }
        super::fixture::merge(&mut stored, rest);
        let stored = serde_json::from_value(stored).unwrap();
        assert_eq!(drift::between(&asked, &stored), paths, "{patch}");
    }
}
