//! What the pod's spec and its namespaces say: volumes, terminals, privileges, mounts, network.

use crds::Reason;

use super::{Area, Findings};
use crate::inventory::spec::{FROM_THE_API, SHARED, VolumeFacts};
use crate::inventory::{Inventory, PodSpecFacts};

/// Interfaces that the kernel makes in every network namespace once a module is loaded.
const FALLBACK_INTERFACES: [&str; 10] = [
    "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0", "ip6tnl1",
];

pub(super) fn judge(inventory: &Inventory, findings: &mut Findings) {
    let spec = &inventory.spec;
    namespaces(spec, findings);
    containers(inventory, findings);
    for volume in &spec.volumes {
        if let Some(message) = volume_refusal(volume) {
            findings.refuse(Area::Volumes, None, Reason::VolumeNotSupported, message);
        }
    }
    mounts(inventory, findings);
    network(inventory, findings);
    for name in &inventory.message_queues {
        findings.refuse(
            Area::Ipc,
            None,
            Reason::MessageQueueNotSupported,
            format!("the pod has the POSIX message queue {name}"),
        );
    }
}

fn namespaces(spec: &PodSpecFacts, findings: &mut Findings) {
    for name in &spec.host_namespaces {
        findings.refuse(
            Area::Pod,
            None,
            Reason::HostNamespace,
            format!("the pod has {name}: true, so its processes live in a namespace of their node"),
        );
    }
    if spec.shares_processes {
        findings.refuse(
            Area::Pod,
            None,
            Reason::SharedProcessNamespace,
            "the pod has shareProcessNamespace: true; its containers cannot be taken apart to be moved".to_owned(),
        );
    }
    if spec.own_users {
        findings.refuse(
            Area::Pod,
            None,
            Reason::UserNamespaceNotSupported,
            "the pod has hostUsers: false, and the target's user ids would be others".to_owned(),
        );
    }
    for name in &spec.ephemeral {
        findings.refuse(
            Area::Pod,
            None,
            Reason::EphemeralContainer,
            format!("the pod has the ephemeral container {name}"),
        );
    }
    for name in &spec.sidecars {
        findings.refuse(
            Area::Pod,
            Some(name),
            Reason::PodNotMigratable,
            format!(
                "{name} is an init container that goes on running (restartPolicy: Always), which cannot be moved yet"
            ),
        );
    }
    for name in &spec.claims {
        findings.refuse(
            Area::Devices,
            None,
            Reason::DeviceNotSupported,
            format!("the pod has the resource claim {name}: its devices belong to the node"),
        );
    }
}

fn containers(inventory: &Inventory, findings: &mut Findings) {
    for container in &inventory.spec.containers {
        let name = Some(container.name.as_str());
        if !inventory.containers.iter().any(|c| c.name == container.name) {
            findings.refuse(
                Area::Pod,
                name,
                Reason::PodNotRunning,
                format!("container {} does not run", container.name),
            );
        }
        if container.tty {
            findings.refuse(
                Area::Pod,
                name,
                Reason::TtyNotSupported,
                format!(
                    "container {} has tty: true; its terminal is held by the node's runtime",
                    container.name
                ),
            );
        } else if container.stdin {
            findings.warn(
                Area::Sessions,
                name,
                Reason::ExecSessionEnds,
                format!(
                    "container {} has stdin: true; a session of kubectl attach ends with the move",
                    container.name
                ),
            );
        }
        if container.privileged {
            findings.refuse(
                Area::Pod,
                name,
                Reason::PrivilegedContainer,
                format!("container {} is privileged", container.name),
            );
        }
        for device in &container.devices {
            findings.refuse(
                Area::Devices,
                name,
                Reason::DeviceNotSupported,
                format!("container {} has the device {device} of its node", container.name),
            );
        }
        for volume in &container.block_volumes {
            findings.refuse(
                Area::Volumes,
                name,
                Reason::VolumeNotSupported,
                format!("container {} uses volume {volume} as a block device", container.name),
            );
        }
    }
    for container in &inventory.containers {
        // Privileged containers have all devices of the node: said once is enough.
        let privileged = inventory
            .spec
            .containers
            .iter()
            .any(|c| c.name == container.name && c.privileged);
        for device in container.devices.iter().filter(|_| !privileged) {
            findings.refuse(
                Area::Devices,
                Some(&container.name),
                Reason::DeviceNotSupported,
                format!("the runtime gave container {} the device {device}", container.name),
            );
        }
    }
}

fn volume_refusal(volume: &VolumeFacts) -> Option<String> {
    let (name, kind) = (&volume.name, volume.kind);
    if FROM_THE_API.contains(&kind) || SHARED.contains(&kind) {
        return None;
    }
    let why = match kind {
        "emptyDir" => "its content is on the source node and is not carried along yet",
        "hostPath" => "it is a folder of the source node",
        _ => "this kind of volume is not handed over from node to node",
    };
    Some(format!("volume {name} is {kind}: {why}"))
}

fn mounts(inventory: &Inventory, findings: &mut Findings) {
    for container in &inventory.containers {
        for mount in &container.mounts {
            if is_expected(&mount.point, &container.expected_mounts) {
                continue;
            }
            findings.refuse(
                Area::Mounts,
                Some(&container.name),
                Reason::MountNotSupported,
                format!(
                    "{} ({} of {}) is mounted in container {} and was not by Kubernetes",
                    mount.point, mount.kind, mount.source, container.name
                ),
            );
        }
    }
}

/// Whether the configuration explains a mount: by name, or as one of the cgroup hierarchies that runc mounts below
/// /sys/fs/cgroup on machines that have several.
fn is_expected(point: &str, expected: &std::collections::BTreeSet<String>) -> bool {
    expected.contains(point)
        || (point.starts_with("/sys/fs/cgroup/") && expected.contains("/sys/fs/cgroup"))
        // Where a masked path is a file, runc mounts /dev/null over it, where a folder, an empty tmpfs: both by its name.
        || point.trim_end_matches('/').is_empty()
}

fn network(inventory: &Inventory, findings: &mut Findings) {
    let network = &inventory.network;
    let own: Vec<&String> = network
        .interfaces
        .iter()
        .filter(|name| *name != "lo" && !FALLBACK_INTERFACES.contains(&name.as_str()))
        .collect();
    // The CNI's interface is eth0; a single one under another name is the CNI's too.
    for name in own.iter().filter(|name| **name != "eth0" && own.len() > 1) {
        findings.refuse(
            Area::Network,
            None,
            Reason::NetworkStateNotSupported,
            format!("the pod's network namespace has the interface {name} beside eth0 and lo"),
        );
    }
    for table in &network.nft_tables {
        // What we make ourselves for moved connections.
        if !table.starts_with("peregrine") {
            findings.refuse(
                Area::Network,
                None,
                Reason::NetworkStateNotSupported,
                format!("the pod's network namespace has the nftables table {table}"),
            );
        }
    }
    for table in &network.ip_tables {
        findings.refuse(
            Area::Network,
            None,
            Reason::NetworkStateNotSupported,
            format!("the pod's network namespace has rules of {table}"),
        );
    }
}
