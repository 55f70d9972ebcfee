//! One row for each thing that cannot be moved, and for what looks like it and can.

use std::collections::{BTreeMap, BTreeSet};

use hostsys::sock_diag::UnixSocket;

use super::*;
use crate::inventory::mappings::MappingKind;
use crate::inventory::sockets::Netlink;
use crate::inventory::spec::{ContainerFacts, VolumeFacts};
use crate::inventory::{
    Container, Descriptor, InetSocket, Kind, Lock, Mapping, Memory, Mount, Network, PodSpecFacts, Process,
};

fn process(pid: i32) -> Process {
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

fn container(name: &str, first: i32) -> Container {
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

fn mount(point: &str, kind: &str, device: u64) -> Mount {
    Mount {
        point: point.into(),
        kind: kind.into(),
        device,
        source: "x".into(),
    }
}

/// A pod of one container and one process that can be moved.
fn pod() -> Inventory {
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

fn asked(inventory: &Inventory, connections: Connections) -> Report {
    judge(Question {
        inventory,
        connections,
        node: "node-a",
        checkpoint_limit_bytes: 1 << 30,
    })
}

fn with(change: impl FnOnce(&mut Inventory)) -> Inventory {
    let mut inventory = pod();
    change(&mut inventory);
    inventory
}

fn first(inventory: &mut Inventory) -> &mut Process {
    &mut inventory.containers[0].processes[0]
}

fn holds(kind: Kind) -> Inventory {
    with(|i| first(i).descriptors.push(Descriptor { fd: 7, kind }))
}

fn socket(protocol: &str) -> Kind {
    Kind::Socket {
        inode: 9,
        protocol: protocol.into(),
    }
}

fn other(name: &str) -> Kind {
    Kind::Other { name: name.into() }
}

fn inet(state: u8, remote: &str, waiting: u64) -> InetSocket {
    InetSocket {
        state,
        local: "10.0.0.1:80".parse().unwrap(),
        remote: remote.parse().unwrap(),
        receive_queue: waiting,
    }
}

fn unix_socket(peer: Option<u32>, state: u8, waiting: u32) -> UnixSocket {
    UnixSocket {
        inode: 9,
        peer,
        kind: 1,
        state,
        receive_queue: waiting,
    }
}

fn with_unix(socket_: UnixSocket) -> Inventory {
    let mut inventory = holds(socket("UNIX-STREAM"));
    inventory.sockets.unix.insert(9, socket_);
    inventory
}

fn file(path: &str, deleted: bool, links: u64, size: u64) -> Kind {
    Kind::File {
        path: path.into(),
        deleted,
        links,
        size,
    }
}

fn device(path: &str, block: bool, major: u64, minor: u64) -> Kind {
    Kind::Device {
        path: path.into(),
        block,
        major,
        minor,
    }
}

fn mapped(name: &str, kind: MappingKind) -> Inventory {
    with(|i| {
        first(i).mappings.push(Mapping {
            name: name.into(),
            kind,
        })
    })
}

fn volume(kind: &'static str) -> Inventory {
    with(|i| {
        i.spec.volumes.push(VolumeFacts {
            name: "data".into(),
            kind,
            mount_paths: vec!["/data".into()],
        })
    })
}

fn lock(kind: &str, mandatory: bool) -> Inventory {
    with(|i| {
        first(i).locks.push(Lock {
            pid: 101,
            kind: kind.into(),
            mandatory,
            inode: 5,
        })
    })
}

fn two_containers(change: impl FnOnce(&mut Process, &mut Process)) -> Inventory {
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

#[test]
fn each_thing_that_cannot_be_moved_is_refused_by_name() {
    use Reason as R;
    let table: Vec<(&str, Inventory, Reason, &str)> = vec![
        // the pod
        (
            "host network",
            with(|i| i.spec.host_namespaces.push("hostNetwork")),
            R::HostNamespace,
            "hostNetwork",
        ),
        (
            "host ipc",
            with(|i| i.spec.host_namespaces.push("hostIPC")),
            R::HostNamespace,
            "hostIPC",
        ),
        (
            "shared processes",
            with(|i| i.spec.shares_processes = true),
            R::SharedProcessNamespace,
            "shareProcessNamespace",
        ),
        (
            "user namespace",
            with(|i| i.spec.own_users = true),
            R::UserNamespaceNotSupported,
            "hostUsers",
        ),
        (
            "ephemeral container",
            with(|i| i.spec.ephemeral.push("debugger".into())),
            R::EphemeralContainer,
            "debugger",
        ),
        (
            "sidecar",
            with(|i| i.spec.sidecars.push("mesh".into())),
            R::PodNotMigratable,
            "mesh",
        ),
        (
            "resource claim",
            with(|i| i.spec.claims.push("gpu-claim".into())),
            R::DeviceNotSupported,
            "gpu-claim",
        ),
        (
            "tty",
            with(|i| i.spec.containers[0].tty = true),
            R::TtyNotSupported,
            "main",
        ),
        (
            "privileged",
            with(|i| i.spec.containers[0].privileged = true),
            R::PrivilegedContainer,
            "main",
        ),
        (
            "device plugin",
            with(|i| i.spec.containers[0].devices.push("example.com/gpu".into())),
            R::DeviceNotSupported,
            "example.com/gpu",
        ),
        (
            "runtime's device",
            with(|i| i.containers[0].devices.push("/dev/fuse".into())),
            R::DeviceNotSupported,
            "/dev/fuse",
        ),
        (
            "block volume",
            with(|i| i.spec.containers[0].block_volumes.push("raw".into())),
            R::VolumeNotSupported,
            "raw",
        ),
        (
            "container that does not run",
            with(|i| i.containers.clear()),
            R::PodNotRunning,
            "main",
        ),
        (
            "emptyDir",
            volume("emptyDir"),
            R::VolumeNotSupported,
            "data is emptyDir",
        ),
        (
            "hostPath",
            volume("hostPath"),
            R::VolumeNotSupported,
            "data is hostPath",
        ),
        ("csi volume", volume("csi"), R::VolumeNotSupported, "data is csi"),
        (
            "unknown volume",
            volume("of an unknown kind"),
            R::VolumeNotSupported,
            "unknown kind",
        ),
        (
            "mount",
            with(|i| i.containers[0].mounts.push(mount("/mnt/x", "ext4", 3))),
            R::MountNotSupported,
            "/mnt/x",
        ),
        (
            "message queue",
            with(|i| i.message_queues.push("/jobs".into())),
            R::MessageQueueNotSupported,
            "/jobs",
        ),
        (
            "interface",
            with(|i| i.network.interfaces.push("wg0".into())),
            R::NetworkStateNotSupported,
            "wg0",
        ),
        (
            "nft table",
            with(|i| i.network.nft_tables.push("mesh".into())),
            R::NetworkStateNotSupported,
            "mesh",
        ),
        (
            "iptables",
            with(|i| i.network.ip_tables.push("iptables nat".into())),
            R::NetworkStateNotSupported,
            "iptables nat",
        ),
        // processes
        (
            "tracer",
            with(|i| first(i).tracer = Some(4)),
            R::TracedProcess,
            "process 1 (app) is traced by process 4",
        ),
        (
            "uninterruptible",
            with(|i| first(i).state = 'D'),
            R::ProcessState,
            "uninterruptible",
        ),
        (
            "leader that ended",
            with(|i| {
                first(i).state = 'Z';
                first(i).threads = 3;
            }),
            R::ProcessState,
            "first thread",
        ),
        (
            "first process that ended",
            with(|i| first(i).state = 'Z'),
            R::PodNotRunning,
            "has ended",
        ),
        (
            "unknown state",
            with(|i| first(i).state = 'P'),
            R::ProcessState,
            "state P",
        ),
        (
            "32 bits",
            with(|i| first(i).is_32_bit = true),
            R::ProcessState,
            "32-bit",
        ),
        (
            "own namespaces",
            with(|i| {
                let mut child = process(102);
                child.namespaces.insert("net", 77);
                child.namespaces.insert("pid_for_children", 78);
                i.containers[0].processes.push(child);
            }),
            R::NestedNamespace,
            "(net, pid)",
        ),
        ("lease", lock("LEASE", false), R::LockNotSupported, "a lease"),
        ("delegation", lock("DELEG", false), R::LockNotSupported, "delegation"),
        ("mandatory lock", lock("POSIX", true), R::LockNotSupported, "mandatory"),
        ("unknown lock", lock("NEWLCK", false), R::LockNotSupported, "NEWLCK"),
        // descriptors
        (
            "block device",
            holds(device("/dev/sda", true, 8, 0)),
            R::DeviceNotSupported,
            "/dev/sda",
        ),
        (
            "kvm",
            holds(device("/dev/kvm", false, 10, 232)),
            R::DeviceNotSupported,
            "/dev/kvm (10:232)",
        ),
        (
            "tun",
            holds(device("/dev/net/tun", false, 10, 200)),
            R::DeviceNotSupported,
            "/dev/net/tun",
        ),
        (
            "console",
            holds(device("/dev/console", false, 5, 1)),
            R::DeviceNotSupported,
            "/dev/console",
        ),
        (
            "inotify on overlay",
            holds(Kind::Inotify {
                watched_devices: vec![54, 52],
            }),
            R::InotifyNotSupported,
            "inotify",
        ),
        ("fanotify", holds(Kind::Fanotify), R::FanotifyNotSupported, "fanotify"),
        (
            "io_uring",
            holds(Kind::IoUring),
            R::IoUringNotSupported,
            "process 1 (app) holds an io_uring (descriptor 7)",
        ),
        (
            "io_uring, mapped",
            mapped("anon_inode:[io_uring]", MappingKind::Other),
            R::IoUringNotSupported,
            "rings",
        ),
        (
            "userfaultfd",
            holds(Kind::Userfaultfd),
            R::UserfaultfdNotSupported,
            "userfaultfd",
        ),
        (
            "huge memfd",
            holds(Kind::Memfd {
                name: "heap".into(),
                huge: true,
            }),
            R::HugetlbNotSupported,
            "heap",
        ),
        (
            "foreign pidfd",
            holds(Kind::Pidfd { pid: 999 }),
            R::DescriptorNotSupported,
            "process 999",
        ),
        (
            "open queue",
            holds(Kind::MessageQueue { name: "/q".into() }),
            R::MessageQueueNotSupported,
            "/q",
        ),
        (
            "namespace",
            holds(Kind::Namespace { name: "net:[5]".into() }),
            R::DescriptorNotSupported,
            "net:[5]",
        ),
        (
            "bpf",
            holds(other("anon_inode:bpf-map")),
            R::DescriptorNotSupported,
            "bpf-map",
        ),
        (
            "perf",
            holds(other("anon_inode:[perf_event]")),
            R::DescriptorNotSupported,
            "perf_event",
        ),
        (
            "anything new",
            holds(other("anon_inode:[tomorrow]")),
            R::DescriptorNotSupported,
            "tomorrow",
        ),
        (
            "huge ghost",
            holds(file("/tmp/x", true, 0, 1 << 30)),
            R::DescriptorNotSupported,
            "/tmp/x of 1024 MiB",
        ),
        (
            "file of a switched folder",
            holds(file("/etc/conf/..2026_01_01/a", false, 1, 1)),
            R::DescriptorNotSupported,
            "conf",
        ),
        (
            "directory of one",
            holds(Kind::Directory {
                path: "/etc/conf/..2026_01_01".into(),
            }),
            R::DescriptorNotSupported,
            "conf",
        ),
        (
            "current directory",
            with(|i| first(i).working_directory = "/etc/conf/..2026_01_01".into()),
            R::DescriptorNotSupported,
            "current directory",
        ),
        (
            "pipe between containers",
            two_containers(|a, b| {
                for process in [a, b] {
                    process.descriptors.push(Descriptor {
                        fd: 3,
                        kind: Kind::Pipe { inode: 5 },
                    });
                }
            }),
            R::DescriptorNotSupported,
            "main and side",
        ),
        // sockets
        ("mptcp", holds(socket("MPTCP")), R::MptcpNotSupported, "multipath"),
        (
            "packet",
            holds(socket("PACKET")),
            R::SocketNotSupported,
            "a PACKET socket",
        ),
        ("raw", holds(socket("RAW")), R::SocketNotSupported, "a RAW socket"),
        ("ping", holds(socket("PING")), R::SocketNotSupported, "a PING socket"),
        ("sctp", holds(socket("SCTP")), R::SocketNotSupported, "a SCTP socket"),
        ("vsock", holds(socket("AF_VSOCK")), R::SocketNotSupported, "AF_VSOCK"),
        ("alg", holds(socket("ALG")), R::SocketNotSupported, "ALG"),
        ("xdp", holds(socket("XDP")), R::SocketNotSupported, "XDP"),
        (
            "a socket without a name",
            holds(socket("")),
            R::SocketNotSupported,
            "socket",
        ),
        (
            "netlink audit",
            {
                let mut i = holds(socket("NETLINK"));
                i.sockets.netlink.insert(
                    9,
                    Netlink {
                        protocol: 9,
                        receive_queue: 0,
                    },
                );
                i
            },
            R::SocketNotSupported,
            "audit",
        ),
        (
            "netlink unread",
            {
                let mut i = holds(socket("NETLINK"));
                i.sockets.netlink.insert(
                    9,
                    Netlink {
                        protocol: 0,
                        receive_queue: 8,
                    },
                );
                i
            },
            R::SocketNotSupported,
            "does not read",
        ),
        (
            "netlink elsewhere",
            holds(socket("NETLINK")),
            R::SocketNotSupported,
            "another network namespace",
        ),
        (
            "unix elsewhere",
            holds(socket("UNIX")),
            R::SocketNotSupported,
            "another network namespace",
        ),
        (
            "accept queue",
            {
                let mut i = holds(socket("TCP"));
                i.sockets.inet.insert(9, inet(10, "0.0.0.0:0", 2));
                i
            },
            R::SocketNotSupported,
            "2 connections that it does not accept",
        ),
        (
            "unix accept queue",
            with_unix(unix_socket(None, 10, 1)),
            R::SocketNotSupported,
            "does not accept",
        ),
        (
            "unix peer outside",
            with_unix(unix_socket(Some(77), 1, 0)),
            R::SocketNotSupported,
            "no process of its container",
        ),
        (
            "unix peer in another container",
            {
                let mut i = two_containers(|a, b| {
                    a.descriptors.push(Descriptor {
                        fd: 3,
                        kind: Kind::Socket {
                            inode: 9,
                            protocol: "UNIX".into(),
                        },
                    });
                    b.descriptors.push(Descriptor {
                        fd: 3,
                        kind: Kind::Socket {
                            inode: 10,
                            protocol: "UNIX".into(),
                        },
                    });
                });
                i.sockets.unix.insert(9, unix_socket(Some(10), 1, 0));
                i.sockets.unix.insert(
                    10,
                    UnixSocket {
                        inode: 10,
                        ..unix_socket(Some(9), 1, 0)
                    },
                );
                i
            },
            R::SocketNotSupported,
            "another container",
        ),
        (
            "socket in two containers",
            two_containers(|a, b| {
                for process in [a, b] {
                    process.descriptors.push(Descriptor {
                        fd: 3,
                        kind: Kind::Socket {
                            inode: 9,
                            protocol: "TCP".into(),
                        },
                    });
                }
            }),
            R::SocketNotSupported,
            "another container of the pod holds too",
        ),
        // memory
        (
            "huge pages",
            mapped("/anon_hugepage (deleted)", MappingKind::Huge),
            R::HugetlbNotSupported,
            "huge pages",
        ),
        (
            "huge pages, counted",
            with(|i| first(i).memory.huge = 1),
            R::HugetlbNotSupported,
            "huge pages",
        ),
        (
            "device mapping",
            mapped("/dev/mem", MappingKind::Device),
            R::DeviceNotSupported,
            "/dev/mem",
        ),
        (
            "packet ring",
            mapped("socket:[5]", MappingKind::Other),
            R::Unknown,
            "socket:[5]",
        ),
        (
            "mapped switched file",
            mapped("/etc/conf/..2026/x", MappingKind::File),
            R::DescriptorNotSupported,
            "mapped",
        ),
        (
            "too much memory",
            with(|i| first(i).memory.anonymous = 2 << 30),
            R::NotEnoughMemory,
            "2048 MiB",
        ),
        (
            "System V in a second container",
            two_containers(|_, b| {
                b.mappings.push(Mapping {
                    name: "/SYSV0 (deleted)".into(),
                    kind: MappingKind::SystemV,
                })
            }),
            R::SharedMemoryNotSupported,
            "side",
        ),
        (
            "what cannot be read",
            with(|i| i.unreadable.push("process 5: its status cannot be read".into())),
            R::Unknown,
            "process 5",
        ),
    ];
    for (name, inventory, reason, word) in table {
        let report = asked(&inventory, Connections::BestEffort);
        let refused: Vec<_> = report.checks.iter().filter(|c| c.verdict == Verdict::Refused).collect();
        let check = refused.iter().find(|c| c.reason.as_deref() == Some(reason.as_str()));
        let Some(check) = check else {
            panic!("{name}: no refusal {reason}, but {refused:?}")
        };
        assert!(
            check.message.as_ref().unwrap().contains(word),
            "{name}: {word:?} is not in {check:?}"
        );
        if reason != Reason::PodNotRunning {
            assert!(check.remedy.is_some(), "{name}: no remedy");
        }
        assert_eq!(check.node.as_deref(), Some("node-a"));
    }
}

#[test]
fn what_can_be_moved_passes() {
    let own_pair = {
        let mut i = with_unix(unix_socket(Some(10), 1, 5));
        first(&mut i).descriptors.push(Descriptor {
            fd: 8,
            kind: Kind::Socket {
                inode: 10,
                protocol: "UNIX-STREAM".into(),
            },
        });
        i.sockets.unix.insert(
            10,
            UnixSocket {
                inode: 10,
                ..unix_socket(Some(9), 1, 0)
            },
        );
        i
    };
    let mut route = holds(socket("NETLINK"));
    route.sockets.netlink.insert(
        9,
        Netlink {
            protocol: 0,
            receive_queue: 0,
        },
    );
    let mut loopback = holds(socket("TCP"));
    loopback.sockets.inet.insert(9, inet(1, "127.0.0.1:99", 0));
    let table: Vec<(&str, Inventory)> = vec![
        ("a plain pod", pod()),
        ("a shared claim", volume("persistentVolumeClaim")),
        ("nfs", volume("nfs")),
        ("null", holds(device("/dev/null", false, 1, 3))),
        ("own terminal", holds(device("/dev/pts/0", false, 136, 0))),
        ("own multiplexer", holds(device("/dev/ptmx", false, 5, 2))),
        ("epoll", holds(Kind::Carried("epoll"))),
        (
            "memfd",
            holds(Kind::Memfd {
                name: "x".into(),
                huge: false,
            }),
        ),
        (
            "pidfd of a child",
            with(|i| {
                i.containers[0].processes.push(process(102));
                first(i).descriptors.push(Descriptor {
                    fd: 3,
                    kind: Kind::Pidfd { pid: 102 },
                });
            }),
        ),
        ("pidfd of nobody", holds(Kind::Pidfd { pid: -1 })),
        (
            "inotify without watches",
            holds(Kind::Inotify {
                watched_devices: vec![],
            }),
        ),
        (
            "inotify on tmpfs",
            holds(Kind::Inotify {
                watched_devices: vec![54],
            }),
        ),
        ("small deleted file", holds(file("/tmp/x", true, 0, 1000))),
        ("renamed file", holds(file("/tmp/x", true, 1, 1 << 30))),
        (
            "file of a volume by its plain name",
            holds(file("/etc/conf/plain", false, 1, 1)),
        ),
        ("posix lock", lock("POSIX", false)),
        ("udp", holds(socket("UDPv6"))),
        ("listener", {
            let mut i = holds(socket("TCP"));
            i.sockets.inet.insert(9, inet(10, "0.0.0.0:0", 0));
            i
        }),
        ("loopback connection", loopback),
        ("own pair", own_pair),
        ("closed peer", with_unix(unix_socket(None, 1, 0))),
        ("route monitor", route),
        (
            "System V in the only container",
            mapped("/SYSV0 (deleted)", MappingKind::SystemV),
        ),
        (
            "mapped deleted file",
            mapped("/tmp/x (deleted)", MappingKind::DeletedFile),
        ),
        (
            "zombie child",
            with(|i| {
                i.containers[0].processes.push(Process {
                    state: 'Z',
                    ..process(102)
                })
            }),
        ),
        (
            "stopped child",
            with(|i| {
                i.containers[0].processes.push(Process {
                    state: 'T',
                    ..process(102)
                })
            }),
        ),
        (
            "kernel's fallback tunnel",
            with(|i| i.network.interfaces.push("tunl0".into())),
        ),
        (
            "the CNI's only interface",
            with(|i| i.network.interfaces = vec!["lo".into(), "net1".into()]),
        ),
        (
            "our own table",
            with(|i| i.network.nft_tables.push("peregrine-follow".into())),
        ),
        (
            "cgroup hierarchies",
            with(|i| {
                i.containers[0].expected_mounts.insert("/sys/fs/cgroup".into());
                i.containers[0].mounts.push(mount("/sys/fs/cgroup/cpu", "cgroup", 9));
            }),
        ),
    ];
    for (name, inventory) in table {
        let report = asked(&inventory, Connections::Preserve);
        let bad: Vec<_> = report.checks.iter().filter(|c| c.verdict != Verdict::Passed).collect();
        assert!(bad.is_empty(), "{name}: {bad:?}");
    }
}

#[test]
fn all_refusals_come_at_once_first_and_areas_without_one_pass() {
    let inventory = with(|i| {
        i.spec.containers[0].tty = true;
        for kind in [Kind::IoUring, Kind::Fanotify, Kind::Userfaultfd, socket("MPTCP")] {
            first(i).descriptors.push(Descriptor { fd: 3, kind });
        }
    });
    let report = asked(&inventory, Connections::BestEffort);
    let refusals: BTreeSet<&str> = report.refusals().collect();
    let expected = [
        "TtyNotSupported",
        "IoUringNotSupported",
        "FanotifyNotSupported",
        "UserfaultfdNotSupported",
        "MptcpNotSupported",
    ];
    assert_eq!(refusals, expected.into());
    let first_passed = report.checks.iter().position(|c| c.verdict == Verdict::Passed).unwrap();
    assert_eq!(first_passed, expected.len());
    let names: BTreeSet<&str> = report.checks.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names.len(), Area::ALL.len(), "every area speaks");
}

#[test]
fn a_thousand_of_the_same_are_counted() {
    let inventory = with(|i| {
        for pid in 200..1200 {
            let descriptors = vec![Descriptor {
                fd: pid,
                kind: Kind::IoUring,
            }];
            i.containers[0].processes.push(Process {
                descriptors,
                ..process(pid)
            });
        }
    });
    let report = asked(&inventory, Connections::BestEffort);
    assert_eq!(report.refusals().count(), MAX_ALIKE);
    let counted = report
        .checks
        .iter()
        .filter_map(|c| c.message.as_ref())
        .any(|m| m.ends_with("and 997 more like it"));
    assert!(counted, "{:?}", report.checks);
}

#[test]
fn many_different_things_of_one_reason_are_counted_too() {
    let inventory = with(|i| {
        for letter in 'a'..='z' {
            i.containers[0].mounts.push(mount(&format!("/mnt/{letter}"), "ext4", 3));
        }
    });
    let report = asked(&inventory, Connections::BestEffort);
    assert_eq!(report.refusals().count(), MAX_PER_REASON);
    let counted = report
        .checks
        .iter()
        .filter_map(|c| c.message.as_ref())
        .any(|m| m.ends_with("and 18 more like it"));
    assert!(counted, "{:?}", report.checks);
}

#[test]
fn connections_are_judged_by_what_the_user_wants() {
    let mut inventory = holds(socket("TCP"));
    inventory.sockets.inet.insert(9, inet(1, "192.0.2.1:443", 0));
    for (wish, verdict, reason) in [
        (
            Connections::Preserve,
            Verdict::Refused,
            Reason::ConnectionNotPreservable,
        ),
        (Connections::BestEffort, Verdict::Warning, Reason::WillBeLost),
        (Connections::Close, Verdict::Warning, Reason::WillBeLost),
    ] {
        let report = asked(&inventory, wish);
        let check = report.checks.iter().find(|c| c.name == "connections").unwrap();
        assert_eq!(
            (check.verdict, check.reason.as_deref()),
            (verdict, Some(reason.as_str()))
        );
        assert!(check.message.as_ref().unwrap().contains("192.0.2.1:443"));
    }
}

#[test]
fn exec_sessions_are_told_and_their_files_do_not_count() {
    let inventory = with(|i| {
        let descriptors = vec![Descriptor {
            fd: 3,
            kind: Kind::IoUring,
        }];
        let session = Process {
            in_tree: false,
            name: "sh".into(),
            descriptors,
            ..process(300)
        };
        i.containers[0].processes.push(session);
    });
    let report = asked(&inventory, Connections::BestEffort);
    assert_eq!(report.refusals().count(), 0);
    let check = report.checks.iter().find(|c| c.name == "sessions").unwrap();
    assert_eq!(
        (check.verdict, check.reason.as_deref()),
        (Verdict::Warning, Some("ExecSessionEnds"))
    );
    assert_eq!(report.memory_bytes, 1 << 20, "its memory is not moved either");
}
