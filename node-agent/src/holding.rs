//! Holding a pod on its source: freeze, packets, what its threads were doing; and all of that taken back.
//!
//! Everything here blocks and is idempotent: a restarted agent does it again from the journal.

use std::{
    fs, io,
    net::IpAddr,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    time::Duration,
};

use hostsys::{
    cgroup::{self, Cgroup},
    inet_diag::{self, InetSocket},
    nft, ptrace, sock_diag,
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use protocol::migrate::message::ThreadFacts;

use crate::{
    cure,
    journal::FrozenThread,
    pod_on_node::{self, ContainerOnNode},
};

/// Every task stops within milliseconds, or it is in a wait that cannot be interrupted.
const FREEZE: Duration = Duration::from_secs(5);
/// A thread that is frozen stops for a tracer at once.
const STOP: Duration = Duration::from_secs(2);
/// The kernel's default slack of a timer.
const DEFAULT_SLACK: u64 = 50_000;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The freezer.
    #[error("failed to freeze or thaw the pod")]
    Cgroup(#[source] cgroup::Error),
    /// Packets or sockets.
    #[error("failed to {0} in the pod's network namespace")]
    Network(&'static str, #[source] sock_diag::Error),
    /// The network namespace.
    #[error("failed to open network namespace {0}")]
    Namespace(PathBuf, #[source] io::Error),
    /// The processes of the pod.
    #[error(transparent)]
    Pod(#[from] pod_on_node::Error),
    /// A thread.
    #[error("failed to let an interrupted system call begin again")]
    Thread(#[source] ptrace::Error),
}

/// Freezes all containers together.
///
/// # Errors
/// [`Error::Cgroup`]; some may be frozen then.
pub fn freeze(cgroups: &[PathBuf]) -> Result<(), Error> {
    let all: Vec<Cgroup> = cgroups.iter().map(Cgroup::at).collect();
    for one in &all {
        one.begin_freeze().map_err(Error::Cgroup)?;
    }
    for one in &all {
        one.wait_frozen(FREEZE).map_err(Error::Cgroup)?;
    }
    Ok(())
}

/// Lets all containers run; a cgroup that is gone needs nothing.
///
/// # Errors
/// [`Error::Cgroup`] of the first that failed; the others were thawed.
pub fn thaw(cgroups: &[PathBuf]) -> Result<(), Error> {
    let mut first = Ok(());
    for path in cgroups {
        let one = Cgroup::at(path);
        if one.exists()
            && let Err(error) = one.thaw()
            && one.exists()
            && first.is_ok()
        {
            first = Err(Error::Cgroup(error));
        }
    }
    first
}

fn open(namespace: &Path) -> Result<fs::File, Error> {
    fs::File::open(namespace).map_err(|e| Error::Namespace(namespace.to_owned(), e))
}

/// Drops every packet of the pod.
///
/// # Errors
/// See [`Error`].
pub fn hold_packets(namespace: &Path) -> Result<(), Error> {
    nft::hold(open(namespace)?.as_fd()).map_err(|e| Error::Network("hold packets", e))
}

/// Lets packets pass; a namespace that is gone needs nothing.
///
/// # Errors
/// See [`Error`].
pub fn release_packets(namespace: &Path) -> Result<(), Error> {
    match open(namespace) {
        Err(Error::Namespace(_, e)) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(file) => nft::release(file.as_fd()).map_err(|e| Error::Network("release packets", e)),
    }
}

/// All TCP and UDP sockets of the pod.
///
/// # Errors
/// See [`Error`].
pub fn sockets(namespace: &Path) -> Result<Vec<InetSocket>, Error> {
    inet_diag::sockets(open(namespace)?.as_fd()).map_err(|e| Error::Network("list sockets", e))
}

/// Addresses to which a socket is bound, wildcards and loopback aside: they have to exist where it is rebuilt.
#[must_use]
pub fn bound_addresses(sockets: &[InetSocket]) -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> = sockets
        .iter()
        .map(|s| s.local.ip().to_canonical())
        .filter(|a| !a.is_unspecified() && !a.is_loopback() && !a.is_multicast() && !is_link_local(*a))
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(a) => (a.segments()[0] & 0xffc0) == 0xfe80,
    }
}

/// Threads of a process; a process that ends meanwhile has none.
fn threads(pid: i32) -> Vec<i32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect()
}

struct Status {
    vtid: u32,
    pending: bool,
}

/// Id in the innermost pid namespace; whether a signal that is not blocked waits.
fn status(tid: i32) -> Option<Status> {
    let text = fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    let field = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
    let mask = |name: &str| field(name).and_then(|v| u64::from_str_radix(v, 16).ok()).unwrap_or(0);
    let vtid = field("NSpid:")?.split_whitespace().next_back()?.parse().ok()?;
    let waiting = (mask("SigPnd:") | mask("ShdPnd:")) & !mask("SigBlk:");
    Some(Status {
        vtid,
        pending: waiting != 0,
    })
}

/// What the threads of frozen containers were doing. Read between freeze and dump: afterwards CRIU has been there.
///
/// # Errors
/// A cgroup cannot be read.
pub fn capture(containers: &[ContainerOnNode]) -> Result<Vec<FrozenThread>, Error> {
    let mut found = Vec::new();
    for (container, place) in containers.iter().zip(0u32..) {
        for pid in container.pids()? {
            for tid in threads(pid) {
                let Some(status) = status(tid) else { continue };
                found.push(FrozenThread {
                    container: place,
                    tid,
                    vtid: status.vtid,
                    call: call(tid),
                    pending: status.pending,
                });
            }
        }
    }
    Ok(found)
}

/// `/proc/TID/syscall`: number, six arguments, stack pointer, address behind the call; `running` or -1 where it is in none.
fn call(tid: i32) -> Option<(u64, u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{tid}/syscall")).ok()?;
    let mut words = text.split_whitespace();
    let number: u64 = words.next()?.parse().ok()?;
    let hex = |w: Option<&str>| u64::from_str_radix(w?.strip_prefix("0x")?, 16).ok();
    let first = hex(words.next())?;
    let next = hex(words.nth(6))?;
    Some((number, first, next))
}

/// Lets system calls that were interrupted by freeze and dump begin again, on a source that goes on. The containers are
/// still frozen. Says how many calls were put right; a thread that is gone is none.
///
/// # Errors
/// [`Error::Thread`] of the first that failed; the others were put right.
pub fn repair(threads: &[FrozenThread]) -> Result<usize, Error> {
    let mut count = 0;
    let mut first = None;
    for thread in threads {
        let Some((number, argument, next)) = thread.call else {
            continue;
        };
        if thread.pending || !cure::AGAIN.contains(&number) {
            continue;
        }
        // The number may belong to another thread by now.
        if status(thread.tid).is_none_or(|s| s.vtid != thread.vtid) {
            continue;
        }
        match repair_one(thread.tid, number, argument, next) {
            Ok(true) => count += 1,
            Ok(false) | Err(ptrace::Error::Ended(_)) => {}
            Err(error) => first = first.or(Some(error)),
        }
    }
    first.map_or(Ok(count), |e| Err(Error::Thread(e)))
}

fn repair_one(tid: i32, number: u64, argument: u64, next: u64) -> Result<bool, ptrace::Error> {
    let stopped = ptrace::Stopped::stop(tid, STOP)?;
    let registers = stopped.registers()?;
    let interrupted = matches!(registers.result, cure::EINTR | cure::RESTART_BLOCK);
    if !interrupted || registers.next != next {
        return Ok(false);
    }
    stopped.call_again(number, argument)?;
    Ok(true)
}

/// Threads with a timer slack or an affinity of their own, which CRIU does not carry.
///
/// # Errors
/// A cgroup cannot be read.
pub fn own_attributes(containers: &[ContainerOnNode]) -> Result<Vec<ThreadFacts>, Error> {
    let all = online();
    let mut found = Vec::new();
    for (container, place) in containers.iter().zip(0u32..) {
        for pid in container.pids()? {
            for tid in threads(pid) {
                let slack = fs::read_to_string(format!("/proc/{tid}/timerslack_ns"))
                    .ok()
                    .and_then(|t| t.trim().parse::<u64>().ok())
                    .filter(|s| *s != DEFAULT_SLACK);
                let processors = affinity(tid).filter(|p| *p != all).unwrap_or_default();
                if slack.is_none() && processors.is_empty() {
                    continue;
                }
                if let Some(status) = status(tid) {
                    found.push(ThreadFacts {
                        container: place,
                        tid: status.vtid,
                        slack,
                        processors,
                    });
                }
            }
        }
    }
    found.truncate(protocol::limits::THREADS);
    Ok(found)
}

fn affinity(tid: i32) -> Option<Vec<u32>> {
    let set = sched_getaffinity(Pid::from_raw(tid)).ok()?;
    let count = u32::try_from(CpuSet::count()).ok()?;
    Some(
        (0..count)
            .filter(|n| usize::try_from(*n).is_ok_and(|n| set.is_set(n).unwrap_or(false)))
            .collect(),
    )
}

/// Processors that are switched on: `0-3,6`.
fn online() -> Vec<u32> {
    let text = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    text.trim()
        .split(',')
        .filter_map(|part| {
            let (from, to) = part.split_once('-').unwrap_or((part, part));
            Some(from.parse::<u32>().ok()?..=to.parse::<u32>().ok()?)
        })
        .flatten()
        .collect()
}

/// Sets on the restored threads what CRIU does not. `cgroups`: one for each container of the manifest.
///
/// # Errors
/// A cgroup cannot be read. An attribute that cannot be set is logged: the program runs without it.
pub fn set_attributes(cgroups: &[PathBuf], facts: &[ThreadFacts]) -> Result<(), Error> {
    for (cgroup, place) in cgroups.iter().zip(0u32..) {
        let wanted: Vec<&ThreadFacts> = facts.iter().filter(|f| f.container == place).collect();
        if wanted.is_empty() {
            continue;
        }
        let mut pids = Vec::new();
        pod_on_node::collect_pids(cgroup, &mut pids)?;
        for tid in pids.into_iter().flat_map(threads) {
            let Some(vtid) = status(tid).map(|s| s.vtid) else {
                continue;
            };
            for fact in wanted.iter().filter(|f| f.tid == vtid) {
                set_attribute(tid, fact);
            }
        }
    }
    Ok(())
}

fn set_attribute(tid: i32, fact: &ThreadFacts) {
    if let Some(slack) = fact.slack
        && let Err(error) = fs::write(format!("/proc/{tid}/timerslack_ns"), slack.to_string())
    {
        tracing::warn!(tid, slack, %error, "failed to set the timer slack of a restored thread");
    }
    let mut set = CpuSet::new();
    let mut any = false;
    for processor in &fact.processors {
        any |= usize::try_from(*processor).is_ok_and(|p| set.set(p).is_ok());
    }
    if any && let Err(error) = sched_setaffinity(Pid::from_raw(tid), &set) {
        tracing::warn!(tid, %error, "failed to set the affinity of a restored thread");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn what_a_sleeping_thread_is_in_can_be_seen() {
        let mut child = Command::new("/bin/sleep")
            .arg("1000")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let pid = child.id().cast_signed();
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        let seen = loop {
            match call(pid) {
                Some((n, _, next)) if cure::AGAIN.contains(&n) => break next,
                _ if std::time::Instant::now() > deadline => break 0,
                _ => std::thread::yield_now(),
            }
        };
        assert_ne!(seen, 0);
        let status = status(pid).unwrap();
        assert!(!status.pending);
        // It is interrupted and begins again: it goes on sleeping.
        let thread = FrozenThread {
            container: 0,
            tid: pid,
            vtid: status.vtid,
            call: call(pid),
            pending: false,
        };
        assert_eq!(repair(std::slice::from_ref(&thread)).unwrap(), 1);
        assert!(child.try_wait().unwrap().is_none());
        // One for which a signal waits keeps its EINTR.
        let pending = FrozenThread {
            pending: true,
            ..thread
        };
        assert_eq!(repair(&[pending]).unwrap(), 0);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn attributes_of_ones_own_are_found() {
        let all = online();
        assert!(!all.is_empty());
        let mine = affinity(0).unwrap();
        assert!(mine.iter().all(|p| all.contains(p)));
    }
}
