//! Open files.

use std::collections::BTreeSet;

use crds::Reason;

use super::{Area, Findings};
use crate::inventory::spec::FROM_THE_API;
use crate::inventory::{Container, Inventory, Kind, PodSpecFacts, Process};

/// Unlinked files up to this size are carried in CRIU's images (`ghost-limit`).
const GHOST_LIMIT: u64 = 256 << 20;

/// Devices that exist on every node and hold no state: major, minor.
const PLAIN_DEVICES: [(u64, u64); 6] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0)];

pub(super) fn judge(inventory: &Inventory, findings: &mut Findings) {
    let moved: BTreeSet<i32> = inventory.moved().map(|(_, process)| process.pid).collect();
    for (container, process) in inventory.moved() {
        for descriptor in &process.descriptors {
            let refused = refusal(&descriptor.kind, container, &inventory.spec, &moved);
            if let Some((area, reason, what)) = refused {
                findings.refuse(
                    area,
                    Some(&container.name),
                    reason,
                    format!("{} holds {what} (descriptor {})", process.label(), descriptor.fd),
                );
            }
        }
        working_directory(container, process, &inventory.spec, findings);
    }
    shared_pipes(inventory, findings);
}

fn refusal(
    kind: &Kind,
    container: &Container,
    spec: &PodSpecFacts,
    moved: &BTreeSet<i32>,
) -> Option<(Area, Reason, String)> {
    let descriptor = |reason, what: String| Some((Area::Descriptors, reason, what));
    match kind {
        // Judged with the sockets.
        Kind::Socket { .. } => None,
        Kind::Carried(_) | Kind::Pipe { .. } | Kind::Fifo { .. } => None,
        Kind::Directory { path } => switched(path, spec).map(|volume| of_a_volume(path, volume)),
        Kind::File {
            path,
            deleted,
            links,
            size,
        } => {
            if *deleted && *links == 0 && *size > GHOST_LIMIT {
                return descriptor(
                    Reason::DescriptorNotSupported,
                    format!(
                        "the deleted file {path} of {} MiB; at most {} are carried",
                        size >> 20,
                        GHOST_LIMIT >> 20
                    ),
                );
            }
            switched(path, spec).map(|volume| of_a_volume(path, volume))
        }
        Kind::Device {
            path,
            block,
            major,
            minor,
        } => {
            // Terminals that the container made itself: its /dev/pts is its own.
            let own_terminal = (136..=143).contains(major) || (*major, *minor) == (5, 2);
            if !block && (PLAIN_DEVICES.contains(&(*major, *minor)) || own_terminal) {
                return None;
            }
            Some((
                Area::Devices,
                Reason::DeviceNotSupported,
                format!("the device {path} ({major}:{minor})"),
            ))
        }
        Kind::Inotify { watched_devices } => {
            let on_tmpfs = |device: &u64| {
                container
                    .mounts
                    .iter()
                    .any(|mount| mount.device == *device && mount.kind == "tmpfs")
            };
            if watched_devices.iter().all(on_tmpfs) {
                return None;
            }
            descriptor(
                Reason::InotifyNotSupported,
                "inotify watches on files that are not on tmpfs".to_owned(),
            )
        }
        Kind::Fanotify => descriptor(Reason::FanotifyNotSupported, "a fanotify group".to_owned()),
        Kind::IoUring => descriptor(Reason::IoUringNotSupported, "an io_uring".to_owned()),
        Kind::Userfaultfd => descriptor(Reason::UserfaultfdNotSupported, "a userfaultfd".to_owned()),
        Kind::Memfd { huge: false, .. } => None,
        Kind::Memfd { name, huge: true } => Some((
            Area::Memory,
            Reason::HugetlbNotSupported,
            format!("the memfd {name} of huge pages"),
        )),
        // Of a process that has ended, or that moves along.
        Kind::Pidfd { pid } if *pid == -1 || moved.contains(pid) => None,
        Kind::Pidfd { pid } => descriptor(
            Reason::DescriptorNotSupported,
            format!("a pidfd of process {pid} of the node, which is not moved"),
        ),
        Kind::MessageQueue { name } => Some((
            Area::Ipc,
            Reason::MessageQueueNotSupported,
            format!("the POSIX message queue {name}"),
        )),
        Kind::Namespace { name } => descriptor(Reason::DescriptorNotSupported, format!("the namespace {name}")),
        Kind::Other { name } => descriptor(
            Reason::DescriptorNotSupported,
            format!("{name}, of which it is not known how to carry it"),
        ),
    }
}

/// The volume in which a path goes through a folder that the kubelet names anew at each change (`..2026_01_31_…`). The
/// target's kubelet has made another: the path does not exist there.
pub(super) fn switched<'a>(path: &str, spec: &'a PodSpecFacts) -> Option<&'a str> {
    spec.volumes
        .iter()
        .filter(|volume| FROM_THE_API.contains(&volume.kind))
        .find(|volume| {
            volume.mount_paths.iter().any(|point| {
                path.strip_prefix(point.as_str())
                    .is_some_and(|rest| rest.starts_with("/..2") || rest.starts_with("/..data/"))
            })
        })
        .map(|volume| volume.name.as_str())
}

fn of_a_volume(path: &str, volume: &str) -> (Area, Reason, String) {
    (
        Area::Descriptors,
        Reason::DescriptorNotSupported,
        format!("{path} of volume {volume} open, a path that exists on the source node only"),
    )
}

fn working_directory(container: &Container, process: &Process, spec: &PodSpecFacts, findings: &mut Findings) {
    if let Some(volume) = switched(&process.working_directory, spec) {
        findings.refuse(
            Area::Descriptors,
            Some(&container.name),
            Reason::DescriptorNotSupported,
            format!(
                "{} has {} of volume {volume} as its current directory, a path that exists on the source node only",
                process.label(),
                process.working_directory
            ),
        );
    }
}

/// Each container is dumped on its own: a pipe between two of them (passed over a socket) would be cut.
fn shared_pipes(inventory: &Inventory, findings: &mut Findings) {
    let holders = inventory.holders(|kind| {
        if let Kind::Pipe { inode } = kind {
            Some(*inode)
        } else {
            None
        }
    });
    for containers in holders.values().filter(|containers| containers.len() > 1) {
        let names: Vec<&str> = containers.iter().copied().collect();
        findings.refuse(
            Area::Descriptors,
            None,
            Reason::DescriptorNotSupported,
            format!("a pipe connects the containers {}", names.join(" and ")),
        );
    }
}
