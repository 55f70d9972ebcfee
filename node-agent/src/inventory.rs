//! Everything that a pod's processes hold, as plain data: what `decide::preflight` judges.
//!
//! It is read from `/proc` while the pod runs, so things come and go meanwhile. A process that has ended is left out; what
//! exists and cannot be read is noted in `unreadable`, and what is unreadable is not moved. Nothing here stops or slows a
//! process.

pub mod descriptors;
pub mod locks;
pub mod mappings;
pub mod mounts;
pub mod network;
pub mod processes;
pub mod sockets;
pub mod spec;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use k8s_openapi::api::core::v1::Pod;

use crate::pod_on_node::PodOnNode;

pub use descriptors::{Descriptor, Kind};
pub use locks::Lock;
pub use mappings::{Mapping, Memory};
pub use mounts::Mount;
pub use network::Network;
pub use processes::Process;
pub use sockets::{InetSocket, Sockets};
pub use spec::PodSpecFacts;

/// A pod, with all that its processes hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inventory {
    /// What the pod's spec says.
    pub spec: PodSpecFacts,
    /// The containers that run.
    pub containers: Vec<Container>,
    /// The pod's network namespace.
    pub network: Network,
    /// Sockets of that namespace, by inode.
    pub sockets: Sockets,
    /// Message queues that exist in the pod's IPC namespace.
    pub message_queues: Vec<String>,
    /// What could not be read, one sentence each.
    pub unreadable: Vec<String>,
}

/// A container.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Container {
    /// Its name in the pod's spec.
    pub name: String,
    /// Its processes; those of `kubectl exec` too.
    pub processes: Vec<Process>,
    /// Mounts that its first process sees.
    pub mounts: Vec<Mount>,
    /// Mount points that the runtime's configuration explains.
    pub expected_mounts: BTreeSet<String>,
    /// Devices that the runtime's configuration adds, by path.
    pub devices: Vec<String>,
}

/// Takes the inventory. `pod` is the API's object, `on_node` where it runs.
#[must_use]
pub fn take(pod: &Pod, on_node: &PodOnNode) -> Inventory {
    let mut unreadable = Vec::new();
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_else(|e| {
        unreadable.push(format!("/proc/locks cannot be read: {e}"));
        String::new()
    });
    let locks = locks::parse(&locks);
    let containers: Vec<Container> = on_node
        .containers
        .iter()
        .map(|container| {
            let pids = container.pids().unwrap_or_else(|e| {
                unreadable.push(crate::error::chain(&e));
                Vec::new()
            });
            let parents = processes::parents(&pids);
            let mut found = Vec::new();
            for pid in pids {
                match processes::read(pid, container.init_pid, &parents, &container.cgroup) {
                    Ok(Some(mut process)) => {
                        process.locks = locks.iter().filter(|lock| lock.pid == pid).cloned().collect();
                        found.push(process);
                    }
                    Ok(None) => {}
                    Err(error) => unreadable.push(format!("process {pid}: {error}")),
                }
            }
            let mounts = mounts::of_process(container.init_pid).unwrap_or_else(|e| {
                unreadable.push(format!("mounts of container {}: {e}", container.name));
                Vec::new()
            });
            Container {
                name: container.name.clone(),
                processes: found,
                mounts,
                expected_mounts: mounts::expected(&container.config),
                devices: mounts::devices(&container.config),
            }
        })
        .collect();
    let first = on_node.containers.first().map(|c| c.init_pid);
    let (network, sockets) = match first {
        Some(pid) => (
            network::read(pid, &on_node.network_namespace, &mut unreadable),
            sockets::read(pid, &on_node.network_namespace, &mut unreadable),
        ),
        None => (Network::default(), Sockets::default()),
    };
    Inventory {
        spec: spec::facts(pod),
        message_queues: first.map(message_queues).unwrap_or_default(),
        containers,
        network,
        sockets,
        unreadable,
    }
}

/// Queues that exist, open or not: the pod's IPC namespace is mounted at /dev/mqueue.
fn message_queues(pid: i32) -> Vec<String> {
    let folder = format!("/proc/{pid}/root/dev/mqueue");
    if hostsys::descriptor::file_system(Path::new(&folder)).ok() != Some(hostsys::descriptor::MQUEUE) {
        return Vec::new();
    }
    std::fs::read_dir(folder).map_or_else(
        |_| Vec::new(),
        |list| {
            list.flatten()
                .map(|entry| format!("/{}", entry.file_name().to_string_lossy()))
                .collect()
        },
    )
}

impl Inventory {
    /// All processes that are to be moved, with their container.
    pub fn moved(&self) -> impl Iterator<Item = (&Container, &Process)> {
        self.containers
            .iter()
            .flat_map(|c| c.processes.iter().filter(|p| p.in_tree).map(move |p| (c, p)))
    }

    /// Bytes of memory to move.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.moved().map(|(_, p)| p.memory.to_move()).sum()
    }

    /// Bytes of memory that can only be copied in the freeze: shared and huge pages.
    #[must_use]
    pub fn memory_in_freeze(&self) -> u64 {
        self.moved().map(|(_, p)| p.memory.to_move() - p.memory.anonymous).sum()
    }

    /// Threads to move.
    #[must_use]
    pub fn threads(&self) -> u64 {
        self.moved().map(|(_, p)| u64::from(p.threads)).sum()
    }

    /// In which containers each pipe or socket is held.
    #[must_use]
    pub fn holders(&self, inode_of: impl Fn(&Kind) -> Option<u64>) -> BTreeMap<u64, BTreeSet<&str>> {
        let mut holders: BTreeMap<u64, BTreeSet<&str>> = BTreeMap::new();
        for (container, process) in self.moved() {
            for inode in process.descriptors.iter().filter_map(|d| inode_of(&d.kind)) {
                holders.entry(inode).or_default().insert(&container.name);
            }
        }
        holders
    }
}
