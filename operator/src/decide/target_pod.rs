//! The target pod: a copy of the source's spec as the API has it, never of anything that lies in a checkpoint.
//!
//! | left out | why |
//! |---|---|
//! | `nodeName` | the scheduler chooses; a set one bypasses ReadWriteOncePod |
//! | init containers, postStart hooks | they already ran (not for `Cold`, which starts anew) |
//! | ephemeral containers, scheduling gates | they belong to the old pod |
//! | the user's labels | set at the commit: Services, budgets and owners read them |

use std::collections::BTreeMap;

use crds::ProcessMigration;
use crds::names::{
    ANNOTATION_LABELS, ANNOTATION_ORIGINAL_NAME, ANNOTATION_TARGET_OF, GROUP, LABEL_MIGRATION, RUNTIME_CLASS,
    migration_label,
};
use k8s_openapi::api::core::v1::{
    Affinity, Container, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Resource;
use sha2::{Digest, Sha256};

use super::pod;

/// How the pod gets there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// With its memory.
    Live,
    /// As a new start.
    Cold,
}

const NODE_NAME_FIELD: &str = "metadata.name";

/// Annotations that describe the old pod and would lie about the new one.
const STATUS_LIKE: &[&str] = &[
    "kubectl.kubernetes.io/last-applied-configuration",
    "cni.projectcalico.org/containerID",
    "cni.projectcalico.org/podIP",
    "cni.projectcalico.org/podIPs",
    "k8s.v1.cni.cncf.io/network-status",
    "k8s.v1.cni.cncf.io/networks-status",
    "k8s.ovn.org/pod-networks",
    "kubernetes.io/config.hash",
    "kubernetes.io/config.seen",
    "kubernetes.io/config.source",
];

/// Name of the target pod: from the name under which the workload was first created and the migration's uid, so that a
/// repeated create finds the first, and names do not grow with the number of moves.
#[must_use]
pub fn name(source_name: &str, original: Option<&str>, migration_uid: &str) -> String {
    let original = original.filter(|o| is_pod_name(o)).unwrap_or(source_name);
    let digest = Sha256::digest(migration_uid.as_bytes());
    // No vowels and no digits that look like letters: names that nobody has to be ashamed of, as Kubernetes does it.
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let suffix: String = digest
        .iter()
        .take(6)
        .map(|b| char::from(ALPHABET[usize::from(*b) % ALPHABET.len()]))
        .collect();
    let stem = crds::condition::cut(original, 253 - 1 - suffix.len()).trim_end_matches(['-', '.']);
    format!("{stem}-{suffix}")
}

/// The name under which the workload of `source` was first created.
#[must_use]
pub fn original_name(source: &Pod) -> String {
    source
        .metadata
        .annotations
        .as_ref()
        .and_then(|a| a.get(ANNOTATION_ORIGINAL_NAME))
        .filter(|n| is_pod_name(n))
        .cloned()
        .unwrap_or_else(|| pod::name(source).to_owned())
}

/// The labels of a pod but for ours.
#[must_use]
pub fn user_labels(source: &Pod) -> BTreeMap<String, String> {
    source
        .metadata
        .labels
        .iter()
        .flatten()
        .filter(|(key, _)| key.as_str() != LABEL_MIGRATION)
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// The user's labels as the target pod keeps them until the commit.
#[must_use]
pub fn kept_labels(target: &Pod) -> BTreeMap<String, String> {
    target
        .metadata
        .annotations
        .as_ref()
        .and_then(|a| a.get(ANNOTATION_LABELS))
        .and_then(|json| serde_json::from_str(json).ok())
        .unwrap_or_default()
}

fn is_pod_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 253
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.')
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.ends_with(|c: char| c.is_ascii_alphanumeric())
}

/// Builds the target pod.
#[must_use]
pub fn build(source: &Pod, migration: &ProcessMigration, candidates: &[String], mode: Mode) -> Pod {
    let uid = migration.metadata.uid.clone().unwrap_or_default();
    let migration_name = migration.metadata.name.clone().unwrap_or_default();
    let original = original_name(source);
    let mut annotations: BTreeMap<String, String> = source
        .metadata
        .annotations
        .iter()
        .flatten()
        .filter(|(key, _)| !STATUS_LIKE.contains(&key.as_str()) && !key.starts_with(&format!("{GROUP}/")))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    annotations.insert(ANNOTATION_ORIGINAL_NAME.to_owned(), original.clone());
    annotations.insert(
        ANNOTATION_LABELS.to_owned(),
        serde_json::to_string(&user_labels(source)).unwrap_or_default(),
    );
    if mode == Mode::Live {
        annotations.insert(ANNOTATION_TARGET_OF.to_owned(), uid.clone());
    }
    Pod {
        metadata: ObjectMeta {
            name: Some(name(pod::name(source), Some(&original), &uid)),
            namespace: source.metadata.namespace.clone(),
            labels: Some(BTreeMap::from([(
                LABEL_MIGRATION.to_owned(),
                migration_label(&migration_name).to_owned(),
            )])),
            annotations: Some(annotations),
            owner_references: Some(vec![OwnerReference {
                api_version: ProcessMigration::api_version(&()).into_owned(),
                kind: ProcessMigration::kind(&()).into_owned(),
                name: migration_name,
                uid,
                controller: Some(true),
                block_owner_deletion: Some(false),
            }]),
            ..Default::default()
        },
        spec: source.spec.as_ref().map(|s| spec(s, source, candidates, mode)),
        status: None,
    }
}

fn spec(of: &PodSpec, source: &Pod, candidates: &[String], mode: Mode) -> PodSpec {
    let mut spec = of.clone();
    let moved = was_moved(source);
    spec.node_name = None;
    spec.scheduling_gates = None;
    spec.ephemeral_containers = None;
    if spec.hostname.as_deref().is_none_or(str::is_empty) {
        spec.hostname = Some(hostname(pod::name(source)));
    }
    spec.affinity = affinity(spec.affinity.take(), candidates, moved);
    if mode == Mode::Cold {
        return spec;
    }
    spec.runtime_class_name = Some(RUNTIME_CLASS.to_owned());
    spec.init_containers = None;
    for container in &mut spec.containers {
        pin(container, source);
        container.image_pull_policy = Some("IfNotPresent".to_owned());
        if let Some(hooks) = &mut container.lifecycle {
            hooks.post_start = None;
            if hooks.pre_stop.is_none() && hooks.stop_signal.is_none() {
                container.lifecycle = None;
            }
        }
    }
    spec
}

/// The kubelet cuts a pod's name to 63 characters and trims what a host name must not end with.
fn hostname(pod_name: &str) -> String {
    // A dot is legal in a pod's name but not in spec.hostname.
    crds::condition::cut(pod_name, 63)
        .trim_end_matches(['-', '.'])
        .replace('.', "-")
}

/// Pins the image to what runs, where the runtime knows it by a digest that a registry would know too. An image that was
/// imported from a file has only the digest of its configuration, under which nothing can be pulled.
fn pin(container: &mut Container, source: &Pod) {
    let status = pod::container_statuses(source)
        .iter()
        .find(|s| s.name == container.name);
    let Some(id) = status.map(|s| s.image_id.as_str()) else {
        return;
    };
    let id = id.split_once("://").map_or(id, |(_, rest)| rest);
    if let Some((repository, digest)) = id.split_once('@')
        && !repository.is_empty()
        && is_digest(digest)
    {
        container.image = Some(id.to_owned());
    }
}

fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

fn was_moved(source: &Pod) -> bool {
    source
        .metadata
        .annotations
        .as_ref()
        .is_some_and(|a| a.contains_key(ANNOTATION_ORIGINAL_NAME))
}

/// Adds "on one of the candidates" to a pod's affinity. The terms of a node selector are ORed and a `matchFields`
/// requirement takes exactly one value, so each of the user's terms is repeated for each candidate, ours as its last
/// requirement. Of a moved pod that last requirement is taken off first: it was ours.
fn affinity(of: Option<Affinity>, candidates: &[String], moved: bool) -> Option<Affinity> {
    let mut affinity = of.unwrap_or_default();
    let mut node_affinity = affinity.node_affinity.take().unwrap_or_default();
    let mut own: Vec<NodeSelectorTerm> = node_affinity
        .required_during_scheduling_ignored_during_execution
        .take()
        .map(|required| required.node_selector_terms)
        .unwrap_or_default();
    if moved {
        let mut stripped: Vec<NodeSelectorTerm> = Vec::new();
        for term in own.into_iter().filter_map(strip) {
            if !stripped.contains(&term) {
                stripped.push(term);
            }
        }
        own = stripped;
    }
    if own.is_empty() {
        own.push(NodeSelectorTerm::default());
    }
    let terms = own
        .iter()
        .flat_map(|term| candidates.iter().map(move |node| on(term.clone(), node)))
        .collect();
    node_affinity.required_during_scheduling_ignored_during_execution = Some(NodeSelector {
        node_selector_terms: terms,
    });
    affinity.node_affinity = Some(NodeAffinity { ..node_affinity });
    Some(affinity)
}

fn on(mut term: NodeSelectorTerm, node: &str) -> NodeSelectorTerm {
    term.match_fields.get_or_insert_default().push(NodeSelectorRequirement {
        key: NODE_NAME_FIELD.to_owned(),
        operator: "In".to_owned(),
        values: Some(vec![node.to_owned()]),
    });
    term
}

/// Takes our requirement off a term. None: the term was ours alone.
fn strip(mut term: NodeSelectorTerm) -> Option<NodeSelectorTerm> {
    if let Some(fields) = &mut term.match_fields
        && fields
            .last()
            .is_some_and(|f| f.key == NODE_NAME_FIELD && f.operator == "In")
    {
        fields.pop();
        if fields.is_empty() {
            term.match_fields = None;
        }
    }
    (term != NodeSelectorTerm::default()).then_some(term)
}
