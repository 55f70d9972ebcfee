//! A pod that can be moved, and ways to change it.

use std::collections::BTreeMap;

use hostsys::sock_diag::UnixSocket;

use super::super::*;
use crate::inventory::mappings::MappingKind;
use crate::inventory::spec::{ContainerFacts, VolumeFacts};
use crate::inventory::{
    Container, Descriptor, InetSocket, Kind, Lock, Mapping, Memory, Mount, Network, PodSpecFacts, Process,
};

pub(super) fn process(pid: i32) -> Process {
    Process {
        pid,
        inner_pid: pid - 100,
        name: "app".into(),
        in_tree: true,
        is_first: pid == 101,
        state: 'S',
        threads: 1,
        namespaces: BTreeMap::from([("mnt", 1), ("net", 2), ("pid", 3), ("pid_for_children", 3)]),
        in_own_cgroup: true,
        memory: Memory {
            anonymous: 1 << 20,
            ..Memory::default()
        },
        ..Process::default()
    }
}

pub(super) fn container(name: &str, first: i32) -> Container {
    Container {
        name: name.into(),
        processes: vec![Process {
            is_first: true,
            ..process(first)
        }],
        mounts: vec![
            mount("/", "overlay", 52),
            mount("/proc", "proc", 53),
            mount("/dev/shm", "tmpfs", 54),
        ],
        expected_mounts: ["/", "/proc", "/dev/shm"].map(str::to_owned).into(),
        devices: vec![],
    }
}

pub(super) fn mount(point: &str, kind: &str, device: u64) -> Mount {
    Mount {
        point: point.into(),
        kind: kind.into(),
        device,
        source: "x".into(),
    }
}

/// A pod of one container and one process that can be moved.
pub(super) fn pod() -> Inventory {
    Inventory {
        spec: PodSpecFacts {
            containers: vec![ContainerFacts {
                name: "main".into(),
                ..ContainerFacts::default()
            }],
            volumes: vec![VolumeFacts {
                name: "conf".into(),
                kind: "configMap",
                mount_paths: vec!["/etc/conf".into()],
            }],
            ..PodSpecFacts::default()
        },
        containers: vec![container("main", 101)],
        network: Network {
            interfaces: vec!["lo".into(), "eth0".into()],
            ..Network::default()
        },
        ..Inventory::default()
    }
}

pub(super) fn asked(inventory: &Inventory, connections: Connections) -> Report {
    judge(Question {
        inventory,
        connections,
        node: "node-a",
        checkpoint_limit_bytes: 1 << 30,
    })
}

pub(super) fn with(change: impl FnOnce(&mut Inventory)) -> Inventory {
    let mut inventory = pod();
    change(&mut inventory);
    inventory
}

pub(super) fn first(inventory: &mut Inventory) -> &mut Process {
    &mut inventory.containers[0].processes[0]
}

pub(super) fn holds(kind: Kind) -> Inventory {
    with(|i| first(i).descriptors.push(Descriptor { fd: 7, kind }))
}

pub(super) fn socket(protocol: &str) -> Kind {
    Kind::Socket {
        inode: 9,
        protocol: protocol.into(),
    }
}

pub(super) fn other(name: &str) -> Kind {
    Kind::Other { name: name.into() }
}

pub(super) fn inet(state: u8, remote: &str, waiting: u64) -> InetSocket {
    InetSocket {
        state,
        local: "10.0.0.1:80".parse().unwrap(),
        remote: remote.parse().unwrap(),
        receive_queue: waiting,
    }
}

pub(super) fn unix_socket(peer: Option<u32>, state: u8, waiting: u32) -> UnixSocket {
    UnixSocket {
        inode: 9,
        peer,
        kind: 1,
        state,
        receive_queue: waiting,
    }
}

pub(super) fn with_unix(socket_: UnixSocket) -> Inventory {
    let mut inventory = holds(socket("UNIX-STREAM"));
    inventory.sockets.unix.insert(9, socket_);
    inventory
}

pub(super) fn file(path: &str, deleted: bool, links: u64, size: u64) -> Kind {
    Kind::File {
        path: path.into(),
        deleted,
        links,
        size,
    }
}

pub(super) fn device(path: &str, block: bool, major: u64, minor: u64) -> Kind {
    Kind::Device {
        path: path.into(),
        block,
        major,
        minor,
    }
}

pub(super) fn mapped(name: &str, kind: MappingKind) -> Inventory {
    with(|i| {
        first(i).mappings.push(Mapping {
            name: name.into(),
            kind,
        })
    })
}

pub(super) fn volume(kind: &'static str) -> Inventory {
    with(|i| {
        i.spec.volumes.push(VolumeFacts {
            name: "data".into(),
            kind,
            mount_paths: vec!["/data".into()],
        })
    })
}

pub(super) fn lock(kind: &str, mandatory: bool) -> Inventory {
    with(|i| {
        first(i).locks.push(Lock {
            pid: 101,
            kind: kind.into(),
            mandatory,
            inode: 5,
        })
    })
}

pub(super) fn two_containers(change: impl FnOnce(&mut Process, &mut Process)) -> Inventory {
    let mut inventory = pod();
    inventory.spec.containers.push(ContainerFacts {
        name: "side".into(),
        ..ContainerFacts::default()
    });
    inventory.containers.push(container("side", 201));
    let (one, two) = inventory.containers.split_at_mut(1);
    change(&mut one[0].processes[0], &mut two[0].processes[0]);
    inventory
}
