//! Real processes that really hold each thing that cannot be moved: the inventory finds it, the judgement names it.
//!
//! What the kernel of this machine does not have (io_uring switched off, no huge pages, not root) is skipped, by name.

#![expect(unsafe_code, reason = "io_uring, userfaultfd and others have no safe wrapper in nix")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crds::Reason;
use crds::process_migration::{Check, Connections, Verdict};
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use node_agent::decide::preflight::{Question, Report, judge};
use node_agent::inventory::{Container, Inventory, Process, locks, mounts, network, processes, sockets};

fn me() -> i32 {
    i32::try_from(std::process::id()).unwrap()
}

/// Judges a process as if it were the only one of a container whose mounts are all explained.
fn judge_process(pid: i32) -> Report {
    let all_locks = locks::parse(&fs::read_to_string("/proc/locks").unwrap());
    let mut process = processes::read(pid, pid, &BTreeMap::new(), Path::new("/"))
        .unwrap()
        .unwrap();
    process.locks = all_locks.into_iter().filter(|lock| lock.pid == pid).collect();
    judge_processes(vec![process])
}

fn judge_processes(processes: Vec<Process>) -> Report {
    let pid = processes[0].pid;
    let mut unreadable = Vec::new();
    let namespace = PathBuf::from(format!("/proc/{pid}/ns/net"));
    let seen = mounts::of_process(pid).unwrap();
    let inventory = Inventory {
        containers: vec![Container {
            name: "main".into(),
            processes,
            expected_mounts: seen.iter().map(|m| m.point.clone()).collect(),
            mounts: seen,
            devices: Vec::new(),
        }],
        network: network::read(pid, &namespace, &mut unreadable),
        sockets: sockets::read(pid, &namespace, &mut unreadable),
        unreadable,
        ..Inventory::default()
    };
    judge(Question {
        inventory: &inventory,
        connections: Connections::BestEffort,
        node: "here",
        checkpoint_limit_bytes: u64::MAX,
    })
}

fn refusal<'a>(report: &'a Report, reason: Reason, word: &str) -> Option<&'a Check> {
    report.checks.iter().find(|c| {
        c.verdict == Verdict::Refused
            && c.reason.as_deref() == Some(reason.as_str())
            && c.message.as_deref().is_some_and(|m| m.contains(word))
    })
}

#[track_caller]
fn refused(report: &Report, reason: Reason, word: &str) {
    assert!(
        refusal(report, reason, word).is_some(),
        "no refusal {reason} with {word:?} in {:#?}",
        report.checks
    );
}

#[track_caller]
fn we_are_refused(reason: Reason, word: &str) {
    refused(&judge_process(me()), reason, word);
}

/// Says why something was not shown. The gate counts these lines.
fn skip(why: &str) {
    println!("SKIPPED: {why}");
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A child that is ended with the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn child(program: &str, arguments: &[&str]) -> Ended {
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    Ended(child.unwrap())
}

fn pid_of(child: &Ended) -> i32 {
    i32::try_from(child.0.id()).unwrap()
}

/// Waits for a state that another process reaches by itself.
#[track_caller]
fn until(what: &str, mut is: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < Duration::from_secs(10), "{what} did not come to be");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn raw_descriptor(result: libc::c_long) -> Option<OwnedFd> {
    let fd = i32::try_from(result).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just given us this descriptor.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[test]
fn an_io_uring_is_refused_by_name() {
    let mut parameters = [0u8; 120];
    // SAFETY: `struct io_uring_params` has 120 bytes, zeros are valid.
    let ring = raw_descriptor(unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) });
    let Some(_ring) = ring else {
        return skip("io_uring is switched off here");
    };
    we_are_refused(Reason::IoUringNotSupported, "an io_uring");
}

#[test]
fn a_userfaultfd_is_refused_by_name() {
    // SAFETY: no pointers.
    let fd = raw_descriptor(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) });
    let Some(_fd) = fd else {
        return skip("userfaultfd is not allowed here");
    };
    we_are_refused(Reason::UserfaultfdNotSupported, "a userfaultfd");
}

#[test]
fn a_message_queue_is_refused_by_name() {
    use nix::mqueue::{MQ_OFlag, mq_open, mq_unlink};
    let name = format!("/peregrine-test-{}", std::process::id());
    let flags = MQ_OFlag::O_CREAT | MQ_OFlag::O_RDWR;
    let Ok(queue) = mq_open(name.as_str(), flags, nix::sys::stat::Mode::S_IRWXU, None) else {
        return skip("no POSIX message queues here");
    };
    we_are_refused(Reason::MessageQueueNotSupported, &name);
    nix::mqueue::mq_close(queue).unwrap();
    mq_unlink(name.as_str()).unwrap();
}

#[test]
fn inotify_is_refused_unless_it_watches_tmpfs_only() {
    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
    let watch = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
    // procfs is no tmpfs.
    watch.add_watch("/proc/self/status", AddWatchFlags::IN_MODIFY).unwrap();
    we_are_refused(Reason::InotifyNotSupported, "inotify watches");
}

#[test]
fn fanotify_is_refused_by_name() {
    use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags};
    let Ok(_group) = Fanotify::init(InitFlags::FAN_CLASS_NOTIF, EventFFlags::O_RDONLY) else {
        return skip("fanotify is not allowed here");
    };
    we_are_refused(Reason::FanotifyNotSupported, "a fanotify group");
}

#[test]
fn memfds_are_carried_and_those_of_huge_pages_are_not() {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let _plain = memfd_create(c"peregrine-plain", MFdFlags::empty()).unwrap();
    assert!(refusal(&judge_process(me()), Reason::HugetlbNotSupported, "peregrine-plain").is_none());
    let Ok(_huge) = memfd_create(c"peregrine-huge", MFdFlags::MFD_HUGETLB) else {
        return skip("no huge pages here");
    };
    we_are_refused(Reason::HugetlbNotSupported, "peregrine-huge");
}

#[test]
fn a_multipath_socket_is_refused_by_name() {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 262) };
    let Some(_socket) = raw_descriptor(libc::c_long::from(fd)) else {
        return skip("no MPTCP here");
    };
    we_are_refused(Reason::MptcpNotSupported, "a multipath TCP socket");
}

#[test]
fn raw_packet_vsock_and_audit_sockets_are_refused_by_name() {
    let raw = |protocol| socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol);
    match raw(Some(SockProtocol::Icmp)) {
        Ok(_socket) => we_are_refused(Reason::SocketNotSupported, "a RAW socket"),
        Err(_) => skip("raw sockets are not allowed here"),
    }
    match socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None) {
        Ok(_socket) => we_are_refused(Reason::SocketNotSupported, "a PACKET socket"),
        Err(_) => skip("packet sockets are not allowed here"),
    }
    match socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None) {
        Ok(_socket) => we_are_refused(Reason::SocketNotSupported, "VSOCK socket"),
        Err(_) => skip("no vsock here"),
    }
    match socket(AddressFamily::Alg, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None) {
        Ok(_socket) => we_are_refused(Reason::SocketNotSupported, "ALG socket"),
        Err(_) => skip("no sockets of the crypto API here"),
    }
    match socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        Some(SockProtocol::NetlinkAudit),
    ) {
        Ok(socket) => {
            // Only a bound socket is listed with its protocol.
            nix::sys::socket::bind(socket.as_raw_fd(), &nix::sys::socket::NetlinkAddr::new(0, 0)).unwrap();
            we_are_refused(Reason::SocketNotSupported, "audit");
        }
        Err(_) => skip("no audit here"),
    }
}

#[test]
fn a_unix_socket_whose_peer_is_elsewhere_is_refused_and_an_own_pair_is_not() {
    let pair = std::os::unix::net::UnixStream::pair().unwrap();
    let inode = fs::read_link(format!("/proc/self/fd/{}", pair.0.as_raw_fd())).unwrap();
    let number = |report: &Report| {
        let fd = format!("(descriptor {})", pair.0.as_raw_fd());
        refusal(report, Reason::SocketNotSupported, &fd).cloned()
    };
    assert_eq!(number(&judge_process(me())), None, "{inode:?}");
    // A child that holds one end only: the other is ours.
    let stdin = Stdio::from(OwnedFd::from(pair.1.try_clone().unwrap()));
    let child = Ended(
        Command::new("sleep")
            .arg("60")
            .stdin(stdin)
            .stdout(Stdio::null())
            .spawn()
            .unwrap(),
    );
    refused(
        &judge_process(pid_of(&child)),
        Reason::SocketNotSupported,
        "no process of its container",
    );
}

#[test]
fn connections_that_nobody_accepts_are_refused() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let _waits = std::net::TcpStream::connect(address).unwrap();
    until("the connection to wait", || {
        refusal(
            &judge_process(me()),
            Reason::SocketNotSupported,
            &format!("{address} with 1 connections"),
        )
        .is_some()
    });
}

#[test]
fn a_device_is_refused_by_name_and_plain_ones_are_not() {
    let _null = File::open("/dev/null").unwrap();
    let Ok(_device) = File::open("/dev/kmsg") else {
        return skip("/dev/kmsg cannot be opened here");
    };
    let report = judge_process(me());
    refused(&report, Reason::DeviceNotSupported, "/dev/kmsg (1:11)");
    assert!(refusal(&report, Reason::DeviceNotSupported, "/dev/null").is_none());
}

#[test]
fn huge_pages_are_refused_by_name() {
    const SIZE: usize = 2 << 20;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            SIZE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return skip("no huge pages here");
    }
    we_are_refused(Reason::HugetlbNotSupported, "memory of huge pages");
    // SAFETY: the mapping is ours.
    unsafe { libc::munmap(at, SIZE) };
}

#[test]
fn a_namespace_that_is_held_open_is_refused() {
    let _namespace = File::open("/proc/self/ns/net").unwrap();
    we_are_refused(Reason::DescriptorNotSupported, "the namespace net:[");
}

#[test]
fn a_pidfd_of_a_stranger_is_refused() {
    // SAFETY: no pointers.
    let fd = raw_descriptor(unsafe { libc::syscall(libc::SYS_pidfd_open, 1, 0) });
    let Some(_fd) = fd else { return skip("no pidfds here") };
    we_are_refused(Reason::DescriptorNotSupported, "a pidfd of process 1");
}

#[test]
fn a_bpf_map_is_refused() {
    // BPF_MAP_CREATE of an array: type 2, keys of 4 bytes, values of 4, one entry.
    let attributes: [u32; 32] = {
        let mut a = [0; 32];
        a[..4].copy_from_slice(&[2, 4, 4, 1]);
        a
    };
    // SAFETY: `attributes` begins as `union bpf_attr` for this command and is longer than it reads.
    let fd = raw_descriptor(unsafe { libc::syscall(libc::SYS_bpf, 0, attributes.as_ptr(), 72) });
    let Some(_fd) = fd else {
        return skip("bpf is not allowed here");
    };
    we_are_refused(Reason::DescriptorNotSupported, "bpf-map");
}

#[test]
fn a_lease_is_refused_and_plain_locks_are_not() {
    let path = std::env::temp_dir().join(format!("peregrine-lease-{}", std::process::id()));
    fs::write(&path, b"x").unwrap();
    let file = File::open(&path).unwrap();
    let lock = nix::fcntl::Flock::lock(file.try_clone().unwrap(), nix::fcntl::FlockArg::LockShared).unwrap();
    assert!(refusal(&judge_process(me()), Reason::LockNotSupported, "").is_none());
    drop(lock);
    let file = File::open(&path).unwrap();
    // SAFETY: F_SETLEASE takes a number.
    let leased = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) } == 0;
    if leased {
        we_are_refused(Reason::LockNotSupported, "a lease");
    } else {
        skip("no leases on this file system");
    }
    fs::remove_file(&path).unwrap();
}

#[test]
fn a_traced_process_is_refused() {
    let child = child("sleep", &["60"]);
    let pid = nix::unistd::Pid::from_raw(pid_of(&child));
    // A tracer is a thread: this one, for the length of the test.
    if nix::sys::ptrace::seize(pid, nix::sys::ptrace::Options::empty()).is_err() {
        return skip("ptrace is not allowed here");
    }
    refused(
        &judge_process(pid_of(&child)),
        Reason::TracedProcess,
        "is traced by process ",
    );
}

#[test]
fn namespaces_made_inside_are_refused_by_kind() {
    if !is_root() {
        return skip("not root");
    }
    let plain = child("sleep", &["60"]);
    let nested = child("unshare", &["--net", "--ipc", "sleep", "60"]);
    let of = |child: &Ended, first: i32| {
        let parents = BTreeMap::from([(pid_of(child), first)]);
        processes::read(pid_of(child), first, &parents, Path::new("/"))
            .unwrap()
            .unwrap()
    };
    let first = pid_of(&plain);
    until("namespaces of its own", || {
        let own = of(&nested, first).namespaces.get("ipc").copied();
        own.is_some() && own != of(&plain, first).namespaces.get("ipc").copied()
    });
    let report = judge_processes(vec![of(&plain, first), of(&nested, first)]);
    refused(&report, Reason::NestedNamespace, "namespaces of its own (ipc, net)");
}

#[test]
fn what_a_network_namespace_has_beside_its_interface_is_refused() {
    if !is_root() {
        return skip("not root");
    }
    let script = "ip link add extra0 type dummy && ip link add eth0 type dummy && echo done && exec sleep 60";
    let spawned = Command::new("unshare")
        .args(["--net", "sh", "-c", script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = Ended(spawned.unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.0.stdout.take().unwrap()), &mut line).unwrap();
    if line.trim() != "done" {
        return skip("no `ip` or no dummy interfaces here");
    }
    refused(
        &judge_process(pid_of(&child)),
        Reason::NetworkStateNotSupported,
        "the interface extra0",
    );
}

#[test]
fn a_mount_that_nobody_explains_is_refused() {
    let seen = mounts::of_process(me()).unwrap();
    let point = seen.iter().find(|m| m.point != "/").unwrap().point.clone();
    let process = processes::read(me(), me(), &BTreeMap::new(), Path::new("/"))
        .unwrap()
        .unwrap();
    let inventory = Inventory {
        containers: vec![Container {
            name: "main".into(),
            processes: vec![process],
            expected_mounts: seen.iter().map(|m| m.point.clone()).filter(|p| *p != point).collect(),
            mounts: seen,
            devices: Vec::new(),
        }],
        ..Inventory::default()
    };
    let report = judge(Question {
        inventory: &inventory,
        connections: Connections::BestEffort,
        node: "here",
        checkpoint_limit_bytes: u64::MAX,
    });
    refused(&report, Reason::MountNotSupported, &point);
}

#[test]
fn an_ordinary_process_passes() {
    let child = child("sleep", &["60"]);
    until("the program to run", || {
        fs::read_link(format!("/proc/{}/exe", pid_of(&child))).is_ok_and(|exe| !exe.ends_with("host_preflight"))
    });
    let report = judge_process(pid_of(&child));
    // The machine's own network namespace may have rules and interfaces; a pod's would not.
    let refusals: Vec<&Check> = report
        .checks
        .iter()
        .filter(|c| c.verdict == Verdict::Refused && c.name != "network")
        .collect();
    assert!(refusals.is_empty(), "{refusals:#?}");
}
