//! One row for each thing that cannot be moved.

use super::super::*;
use super::samples::*;
use crate::inventory::mappings::MappingKind;
use crate::inventory::sockets::Netlink;
use crate::inventory::{Descriptor, Kind, Mapping};
use hostsys::sock_diag::UnixSocket;

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
