//! Whether a pod can be moved, as far as the API tells. What its processes hold is the agent's to say; both lists are
//! merged, so that a refusal names all reasons at once.

use crds::Reason;
use crds::process_migration::{Check, SourceStatus, StrategyType, Verdict};
use k8s_openapi::api::core::v1::{Pod, PodSpec, Volume};

use super::pod;
use super::world::{Heartbeat, NodeView, Observed, World};

/// Builds a refusal with the reason's own remedy.
#[must_use]
pub fn refused(name: &str, reason: Reason, message: String) -> Check {
    Check {
        name: name.to_owned(),
        verdict: Verdict::Refused,
        container: None,
        node: None,
        reason: Some(reason.as_str().to_owned()),
        message: Some(message),
        remedy: Some(reason.remedy().to_owned()).filter(|r| !r.is_empty()),
    }
}

fn passed(name: &str, message: String) -> Check {
    Check {
        name: name.to_owned(),
        verdict: Verdict::Passed,
        container: None,
        node: None,
        reason: None,
        message: Some(message),
        remedy: None,
    }
}

/// Whether a check stands in the way. A refusal that names a node only excludes that node.
#[must_use]
pub fn stops(check: &Check) -> bool {
    check.verdict == Verdict::Refused && check.name != super::candidates::CHECK
}

/// What can be said at once: the pod, its owner, the strategy, other migrations, the source's node. Any refusal here ends
/// the migration before an agent is asked.
#[must_use]
pub fn at_once(world: &World) -> Vec<Check> {
    let mut checks = Vec::new();
    checks.extend(strategy(world));
    let spec = &world.migration.spec;
    let source = match &world.source_pod {
        Observed::Present(pod) => pod,
        Observed::Absent | Observed::Unknown => {
            checks.push(refused(
                "pod",
                Reason::PodNotFound,
                format!("there is no pod {} in this namespace", spec.pod_ref.name),
            ));
            return checks;
        }
    };
    checks.extend(identity(world, source));
    checks.extend(owner(source));
    checks.extend(other_migrations(world, source));
    if !world.is_cold() {
        checks.extend(source_node(world, source));
    }
    checks
}

fn strategy(world: &World) -> Option<Check> {
    match world.migration.spec.strategy.type_ {
        StrategyType::Cold | StrategyType::StopAndCopy | StrategyType::PreCopy => None,
        missing @ (StrategyType::PostCopy | StrategyType::Hybrid) => Some(refused(
            "strategy",
            Reason::StrategyNotAvailable,
            format!("strategy {} is not available in this version", missing.as_str()),
        )),
    }
}

/// What the source's kernel must have for memory to be copied while the pod runs.
const TRACKING: [&str; 2] = ["userfaultfd-wp-async", "pagemap-scan"];

/// What the source's kernel lacks of it; nothing where that is not known.
#[must_use]
pub fn untracked(world: &World) -> Vec<&'static str> {
    let node = world
        .source_pod
        .present()
        .and_then(pod::node)
        .and_then(|n| world.node(n));
    let Some((_, status)) = node.and_then(|node| node.migration_node.as_ref()) else {
        return Vec::new();
    };
    let has = |feature: &str| {
        let kernel = status.kernel.as_ref();
        kernel.is_some_and(|kernel| kernel.features.iter().any(|f| f == feature))
    };
    TRACKING.into_iter().filter(|feature| !has(feature)).collect()
}

/// Says so where another strategy takes the place of the one that was asked for.
#[must_use]
pub fn tracking(world: &World, source: &Pod) -> Option<Check> {
    let asked = world.migration.spec.strategy.type_;
    if world.strategy() == asked {
        return None;
    }
    let name = pod::node(source)?;
    Some(Check {
        verdict: Verdict::Warning,
        node: Some(name.to_owned()),
        ..refused(
            "strategy",
            Reason::StrategyNotAvailable,
            format!(
                "{} in place of {}, which needs Linux 6.7 (on arm64 6.10): node {name} lacks {}",
                world.strategy().as_str(),
                asked.as_str(),
                untracked(world).join(" and ")
            ),
        )
    })
}

fn identity(world: &World, source: &Pod) -> Option<Check> {
    let name = pod::name(source);
    if let Some(uid) = &world.migration.spec.pod_ref.uid
        && uid != pod::uid(source)
    {
        return Some(refused(
            "pod",
            Reason::PodReplaced,
            format!("pod {name} has uid {} and not {uid}", pod::uid(source)),
        ));
    }
    if pod::is_deleting(source) {
        return Some(refused(
            "pod",
            Reason::PodTerminating,
            format!("pod {name} is being deleted"),
        ));
    }
    if pod::has_ended(source) {
        return Some(refused(
            "pod",
            Reason::PodNotRunning,
            format!("pod {name} has ended ({})", pod::phase(source)),
        ));
    }
    if world.is_cold() {
        return None;
    }
    if pod::phase(source) != "Running" {
        return Some(refused(
            "pod",
            Reason::PodNotRunning,
            format!("pod {name} is not running ({})", pod::phase(source)),
        ));
    }
    let idle = pod::not_running(source);
    (!idle.is_empty()).then(|| {
        refused(
            "pod",
            Reason::PodNotRunning,
            format!("in pod {name} {} not running", plural("container", &idle)),
        )
    })
}

fn owner(source: &Pod) -> Option<Check> {
    pod::controller(source).map(|owner| {
        refused(
            "owner",
            Reason::OwnerNotSupported,
            format!("pod {} is controlled by {owner}", pod::name(source)),
        )
    })
}

fn other_migrations(world: &World, source: &Pod) -> Vec<Check> {
    let name = pod::name(source);
    world
        .others
        .iter()
        .filter(|o| o.accepted && Some(o.namespace.as_str()) == world.migration.metadata.namespace.as_deref())
        .filter_map(|other| {
            if other.target_pod.as_deref() == Some(name) {
                Some(format!(
                    "pod {name} is the target of migration {}, which is not finished",
                    other.name
                ))
            } else if other.pod == name {
                Some(format!("pod {name} is already being moved by migration {}", other.name))
            } else {
                None
            }
        })
        .map(|message| refused("migration", Reason::AlreadyMigrating, message))
        .collect()
}

fn source_node(world: &World, source: &Pod) -> Option<Check> {
    let name = pod::node(source)?;
    let missing = match world.node(name) {
        Some(node) => agent_trouble(node)?,
        None => format!("node {name} is not known"),
    };
    Some(Check {
        node: Some(name.to_owned()),
        ..refused("node", Reason::NodeNotReady, format!("the source's {missing}"))
    })
}

/// Why the agent of a node cannot take part.
#[must_use]
pub fn agent_trouble(node: &NodeView) -> Option<String> {
    let Some((_, status)) = &node.migration_node else {
        return Some(format!(
            "node {} has no MigrationNode: no node-agent runs there",
            node.name
        ));
    };
    match node.heartbeat {
        Heartbeat::Fresh => {}
        Heartbeat::Stale => {
            return Some(format!(
                "node {} has a node-agent that sends no heartbeats any more",
                node.name
            ));
        }
        Heartbeat::Missing => {
            return Some(format!(
                "node {} has a node-agent that never sent a heartbeat",
                node.name
            ));
        }
    }
    for type_ in [
        crds::migration_node::cond::READY,
        crds::migration_node::cond::COMPATIBLE,
    ] {
        if let Some(text) = condition_trouble(&status.conditions, type_) {
            return Some(format!("node {} is not {type_}: {text}", node.name));
        }
    }
    None
}

fn condition_trouble(
    conditions: &[k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition],
    type_: &str,
) -> Option<String> {
    match crds::condition::find(conditions, type_) {
        Some(c) if c.status == "True" => None,
        Some(c) if c.message.is_empty() => Some(c.reason.clone()),
        Some(c) => Some(c.message.clone()),
        None => Some("its agent has not said so yet".to_owned()),
    }
}

/// What the pod's spec has that cannot be moved live.
#[must_use]
pub fn of_spec(world: &World, source: &Pod) -> Vec<Check> {
    let Some(spec) = &source.spec else {
        return Vec::new();
    };
    let mut checks = Vec::new();
    for (used, what) in [
        (spec.host_network, "hostNetwork"),
        (spec.host_pid, "hostPID"),
        (spec.host_ipc, "hostIPC"),
    ] {
        if used == Some(true) {
            checks.push(refused(
                "namespaces",
                Reason::HostNamespace,
                format!("the pod uses {what}"),
            ));
        }
    }
    if spec.share_process_namespace == Some(true) {
        checks.push(refused(
            "namespaces",
            Reason::PodNotMigratable,
            "the pod shares one process namespace between its containers (shareProcessNamespace)".to_owned(),
        ));
    }
    if let Some(class) = spec.runtime_class_name.as_deref()
        && class != crds::names::RUNTIME_CLASS
    {
        checks.push(refused(
            "runtimeClass",
            Reason::PodNotMigratable,
            format!("the pod runs under runtimeClassName {class}, whose handler cannot be carried"),
        ));
    }
    if spec.resource_claims.as_ref().is_some_and(|c| !c.is_empty()) {
        checks.push(refused(
            "devices",
            Reason::DeviceNotSupported,
            "the pod claims devices (resourceClaims)".to_owned(),
        ));
    }
    if let Some(list) = source.metadata.finalizers.as_ref().filter(|f| !f.is_empty()) {
        checks.push(refused(
            "finalizers",
            Reason::PodNotMigratable,
            format!(
                "the pod has finalizers ({}), which somebody would miss on the moved pod",
                list.join(", ")
            ),
        ));
    }
    checks.extend(containers(spec, source));
    checks.extend(spec.volumes.iter().flatten().filter_map(|v| volume(world, v)));
    checks
}

fn containers(spec: &PodSpec, source: &Pod) -> Vec<Check> {
    let mut checks = Vec::new();
    for container in &spec.containers {
        let of = |check: Check| Check {
            container: Some(container.name.clone()),
            ..check
        };
        if container.tty == Some(true) {
            checks.push(of(refused(
                "terminal",
                Reason::TtyNotSupported,
                format!("container {} has a terminal (tty: true)", container.name),
            )));
        }
        if container
            .security_context
            .as_ref()
            .is_some_and(|s| s.privileged == Some(true))
        {
            checks.push(of(refused(
                "privileges",
                Reason::PrivilegedContainer,
                format!("container {} is privileged", container.name),
            )));
        }
        if container.volume_devices.as_ref().is_some_and(|d| !d.is_empty()) {
            checks.push(of(refused(
                "devices",
                Reason::DeviceNotSupported,
                format!("container {} uses a block device (volumeDevices)", container.name),
            )));
        }
        let limits = container.resources.iter().flat_map(|r| r.limits.iter().flatten());
        for (resource, _) in limits {
            if resource.starts_with("hugepages-") {
                checks.push(of(refused(
                    "memory",
                    Reason::HugetlbNotSupported,
                    format!("container {} uses {resource}", container.name),
                )));
            } else if resource.contains('/') {
                checks.push(of(refused(
                    "devices",
                    Reason::DeviceNotSupported,
                    format!("container {} uses the device {resource}", container.name),
                )));
            }
        }
    }
    for sidecar in spec
        .init_containers
        .iter()
        .flatten()
        .filter(|c| c.restart_policy.as_deref() == Some("Always"))
    {
        checks.push(Check {
            container: Some(sidecar.name.clone()),
            remedy: Some("Make it an ordinary container.".to_owned()),
            ..refused(
                "containers",
                Reason::PodNotMigratable,
                format!(
                    "container {} is a sidecar (an init container with restartPolicy Always)",
                    sidecar.name
                ),
            )
        });
    }
    let ephemeral = source
        .status
        .iter()
        .flat_map(|s| s.ephemeral_container_statuses.iter().flatten());
    for status in ephemeral {
        if status.state.as_ref().is_some_and(|s| s.running.is_some()) {
            checks.push(Check {
                container: Some(status.name.clone()),
                ..refused(
                    "containers",
                    Reason::EphemeralContainer,
                    format!("the ephemeral container {} runs", status.name),
                )
            });
        }
    }
    checks
}

fn volume(world: &World, volume: &Volume) -> Option<Check> {
    let carried = volume.config_map.is_some()
        || volume.secret.is_some()
        || volume.downward_api.is_some()
        || volume.projected.is_some()
        || volume.nfs.is_some()
        || volume.image.is_some();
    if carried {
        return None;
    }
    let no = |message: String| Some(refused("volumes", Reason::VolumeNotSupported, message));
    if let Some(claim) = &volume.persistent_volume_claim {
        let claim = &claim.claim_name;
        return match world.claims.get(claim) {
            Some(Observed::Present(modes)) if modes.iter().any(|m| m == "ReadWriteMany" || m == "ReadOnlyMany") => None,
            Some(Observed::Present(modes)) => no(format!(
                "volume {}: claim {claim} can be used on one node only ({})",
                volume.name,
                modes.join(", ")
            )),
            Some(Observed::Absent) => no(format!("volume {}: there is no claim {claim}", volume.name)),
            Some(Observed::Unknown) | None => no(format!("volume {}: claim {claim} could not be read", volume.name)),
        };
    }
    let kind = if let Some(host_path) = &volume.host_path {
        format!("hostPath {}", host_path.path)
    } else if volume.empty_dir.is_some() {
        "emptyDir".to_owned()
    } else if volume.csi.is_some() {
        "csi".to_owned()
    } else if volume.ephemeral.is_some() {
        "ephemeral".to_owned()
    } else {
        "of its kind".to_owned()
    };
    no(format!(
        "volume {} ({kind}) cannot be carried to another node",
        volume.name
    ))
}

/// The longest freeze that the pod's probes allow, in milliseconds: exec, HTTP and gRPC probes fail while the pod is
/// frozen, TCP probes pass.
#[must_use]
pub fn longest_freeze(source: &Pod) -> Option<u32> {
    source
        .spec
        .iter()
        .flat_map(|s| &s.containers)
        .filter_map(|c| c.liveness_probe.as_ref())
        .filter(|p| p.tcp_socket.is_none())
        .map(|p| {
            let period = u32::try_from(p.period_seconds.unwrap_or(10).max(1)).unwrap_or(10);
            let failures = u32::try_from(p.failure_threshold.unwrap_or(3).max(1)).unwrap_or(3);
            period.saturating_mul(failures).saturating_mul(1000)
        })
        .min()
}

/// Whether the freeze that the agent predicts is allowed.
#[must_use]
pub fn freeze(limit: Option<u32>, half: &SourceStatus) -> Option<Check> {
    let (limit, predicted) = (limit?, half.predicted_freeze_milliseconds?);
    Some(if predicted > limit {
        refused(
            "freeze",
            Reason::FreezeTooLong,
            format!("the freeze is predicted to last {predicted} ms and may last {limit} ms"),
        )
    } else {
        passed("freeze", format!("predicted {predicted} ms of {limit} ms allowed"))
    })
}

/// Merges the agent's checks with ours: what both found stands once, in the agent's words.
#[must_use]
pub fn merge(own: Vec<Check>, agent: &[Check]) -> Vec<Check> {
    let mut checks: Vec<Check> = own
        .into_iter()
        .filter(|o| {
            o.verdict != Verdict::Refused
                || !agent
                    .iter()
                    .any(|a| a.verdict == Verdict::Refused && a.reason == o.reason && a.container == o.container)
        })
        .collect();
    checks.extend(agent.iter().cloned());
    checks
}

/// One sentence with every reason.
#[must_use]
pub fn sentence(checks: &[Check]) -> String {
    checks
        .iter()
        .filter(|c| stops(c))
        .filter_map(|c| c.message.as_deref())
        .collect::<Vec<_>>()
        .join("; ")
}

/// Lists names, with the noun in the right number and "is" or "are".
fn plural(noun: &str, names: &[&str]) -> String {
    if let [one] = names {
        format!("{noun} {one} is")
    } else {
        format!("{noun}s {} are", names.join(", "))
    }
}
