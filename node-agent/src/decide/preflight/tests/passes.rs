//! One row for each thing that looks like trouble and is none.

use super::super::*;
use super::samples::*;
use crate::inventory::mappings::MappingKind;
use crate::inventory::sockets::Netlink;
use crate::inventory::{Descriptor, Kind, Process};
use hostsys::sock_diag::UnixSocket;

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
