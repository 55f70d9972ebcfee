//! What the API server stored as the target pod, against what was asked for. An admission webhook that adds a container
//! or changes a mount makes a pod into which the processes do not fit.

use k8s_openapi::api::core::v1::PodSpec;
use serde_json::Value;

/// Fields of a spec that admission fills in or merges, and that restored processes do not see.
const ALLOWED: &[&str] = &[
    "imagePullSecrets",
    "nodeName",
    "nodeSelector",
    "overhead",
    "preemptionPolicy",
    "priority",
    "schedulerName",
    "schedulingGates",
    "serviceAccount",
    "tolerations",
];

/// Paths at which the stored spec differs. Empty: as asked.
#[must_use]
pub fn between(asked: &PodSpec, stored: &PodSpec) -> Vec<String> {
    let (Ok(Value::Object(asked)), Ok(Value::Object(stored))) =
        (serde_json::to_value(asked), serde_json::to_value(stored))
    else {
        return vec!["the spec cannot be read".to_owned()];
    };
    let mut paths = Vec::new();
    let mut keys: Vec<&String> = asked.keys().chain(stored.keys()).collect();
    keys.sort();
    keys.dedup();
    for key in keys.into_iter().filter(|k| !ALLOWED.contains(&k.as_str())) {
        compare(key, asked.get(key), stored.get(key), &mut paths);
    }
    paths
}

fn compare(path: &str, asked: Option<&Value>, stored: Option<&Value>, paths: &mut Vec<String>) {
    match (asked, stored) {
        (Some(Value::Object(a)), Some(Value::Object(s))) => {
            let mut keys: Vec<&String> = a.keys().chain(s.keys()).collect();
            keys.sort();
            keys.dedup();
            for key in keys {
                if key == "imagePullPolicy" {
                    continue; // AlwaysPullImages changes it; the image stays the same
                }
                compare(&format!("{path}.{key}"), a.get(key), s.get(key), paths);
            }
        }
        (Some(Value::Array(a)), Some(Value::Array(s))) if a.len() == s.len() => {
            for (index, (a, s)) in a.iter().zip(s).enumerate() {
                let label = a
                    .get("name")
                    .and_then(Value::as_str)
                    .map_or_else(|| index.to_string(), str::to_owned);
                compare(&format!("{path}[{label}]"), Some(a), Some(s), paths);
            }
        }
        (a, s) if a == s || (is_empty(a) && is_empty(s)) => {}
        _ => paths.push(path.to_owned()),
    }
}

fn is_empty(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => true,
        Some(Value::Object(o)) => o.is_empty(),
        Some(Value::Array(a)) => a.is_empty(),
        Some(Value::Bool(_) | Value::Number(_) | Value::String(_)) => false,
    }
}
