//! Small questions about pods.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

/// Uid of a pod.
#[must_use]
pub fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

/// Name of a pod.
#[must_use]
pub fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

/// Node of a pod.
#[must_use]
pub fn node(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|n| !n.is_empty())
}

/// Phase of a pod.
#[must_use]
pub fn phase(pod: &Pod) -> &str {
    pod.status
        .as_ref()
        .and_then(|s| s.phase.as_deref())
        .unwrap_or("Unknown")
}

/// Whether it ended for good.
#[must_use]
pub fn has_ended(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// Whether it is being deleted.
#[must_use]
pub fn is_deleting(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Whether it is Ready.
#[must_use]
pub fn is_ready(pod: &Pod) -> bool {
    pod.status
        .as_ref()
        .and_then(|s| s.conditions.as_ref())
        .is_some_and(|c| c.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

/// Its controller, as `Kind/name`.
#[must_use]
pub fn controller(pod: &Pod) -> Option<String> {
    pod.metadata
        .owner_references
        .iter()
        .flatten()
        .find(|o| o.controller == Some(true))
        .map(|o| format!("{}/{}", o.kind, o.name))
}

/// Whether its controller is the object with this uid.
#[must_use]
pub fn is_controlled_by(pod: &Pod, owner_uid: &str) -> bool {
    pod.metadata
        .owner_references
        .iter()
        .flatten()
        .any(|o| o.controller == Some(true) && o.uid == owner_uid)
}

/// Statuses of its containers (not of init containers).
#[must_use]
pub fn container_statuses(pod: &Pod) -> &[ContainerStatus] {
    pod.status
        .as_ref()
        .and_then(|s| s.container_statuses.as_deref())
        .unwrap_or_default()
}

/// Names of containers that do not run.
#[must_use]
pub fn not_running(pod: &Pod) -> Vec<&str> {
    let statuses = container_statuses(pod);
    pod.spec
        .iter()
        .flat_map(|s| &s.containers)
        .filter(|c| {
            !statuses
                .iter()
                .any(|s| s.name == c.name && s.state.as_ref().is_some_and(|s| s.running.is_some()))
        })
        .map(|c| c.name.as_str())
        .collect()
}

/// Why the scheduler has not placed it.
#[must_use]
pub fn unschedulable(pod: &Pod) -> Option<&str> {
    pod.status
        .as_ref()?
        .conditions
        .as_ref()?
        .iter()
        .find(|c| c.type_ == "PodScheduled" && c.status == "False" && c.reason.as_deref() == Some("Unschedulable"))
        .map(|c| c.message.as_deref().unwrap_or("no reason given"))
}

/// What its containers wait for, or died of, in the kubelet's words.
#[must_use]
pub fn trouble(pod: &Pod) -> Option<String> {
    container_statuses(pod).iter().find_map(|status| {
        let state = status.state.as_ref()?;
        if let Some(waiting) = &state.waiting {
            let reason = waiting.reason.as_deref().unwrap_or_default();
            if reason == "ContainerCreating" || reason == "PodInitializing" {
                return None;
            }
            return Some(sentence(&status.name, reason, waiting.message.as_deref()));
        }
        state.terminated.as_ref().map(|ended| {
            let reason = ended.reason.as_deref().unwrap_or("ended");
            let text = format!("{reason}, exit code {}", ended.exit_code);
            sentence(&status.name, &text, ended.message.as_deref())
        })
    })
}

/// Whether a container of it died or could not be started: for a target that waits under its shepherds, that is the end.
#[must_use]
pub fn has_failed_to_start(pod: &Pod) -> bool {
    container_statuses(pod).iter().any(|status| {
        let waiting = status
            .state
            .as_ref()
            .and_then(|s| s.waiting.as_ref())
            .and_then(|w| w.reason.as_deref())
            .unwrap_or_default();
        let died = |state: &Option<k8s_openapi::api::core::v1::ContainerState>| {
            state.as_ref().is_some_and(|s| s.terminated.is_some())
        };
        status.restart_count > 0
            || died(&status.state)
            || died(&status.last_state)
            || matches!(
                waiting,
                "RunContainerError" | "CrashLoopBackOff" | "StartError" | "PostStartHookError"
            )
    })
}

fn sentence(container: &str, reason: &str, message: Option<&str>) -> String {
    match message {
        Some(message) if !message.is_empty() => format!("container {container}: {reason}: {message}"),
        Some(_) | None => format!("container {container}: {reason}"),
    }
}

/// The last time something about it changed, as far as its status says.
#[must_use]
pub fn last_change(pod: &Pod) -> Option<Timestamp> {
    let created = pod.metadata.creation_timestamp.as_ref().map(|t| t.0);
    let conditions = pod
        .status
        .iter()
        .flat_map(|s| s.conditions.iter().flatten())
        .filter_map(|c| c.last_transition_time.as_ref().map(|t| t.0));
    created.into_iter().chain(conditions).max()
}
