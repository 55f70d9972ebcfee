//! One process: state, tracer, namespaces, and everything it holds.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use super::{Descriptor, Lock, Mapping, Memory, descriptors, mappings};

/// Namespaces of a process that are compared with those of its container's first process.
const NAMESPACES: [&str; 10] = [
    "mnt",
    "pid",
    "pid_for_children",
    "net",
    "ipc",
    "uts",
    "user",
    "cgroup",
    "time",
    "time_for_children",
];

/// A process.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Process {
    /// Pid on the node.
    pub pid: i32,
    /// Pid inside the container, which users know.
    pub inner_pid: i32,
    /// Name.
    pub name: String,
    /// Whether it descends from the container's first process. Others came by `kubectl exec` or `attach`.
    pub in_tree: bool,
    /// Whether it is the container's first process.
    pub is_first: bool,
    /// `R`, `S`, `D`, `T`, `Z`, …
    pub state: char,
    /// Pid of its tracer (or of a thread's), if any.
    pub tracer: Option<i32>,
    /// Number of threads.
    pub threads: u32,
    /// Inodes of its namespaces.
    pub namespaces: BTreeMap<&'static str, u64>,
    /// Whether it is in the container's cgroup itself and not in one below.
    pub in_own_cgroup: bool,
    /// Whether its program is of 32 bits.
    pub is_32_bit: bool,
    /// Open files.
    pub descriptors: Vec<Descriptor>,
    /// Mappings that matter.
    pub mappings: Vec<Mapping>,
    /// Its memory.
    pub memory: Memory,
    /// Locks that it holds.
    pub locks: Vec<Lock>,
    /// Current directory, where it is on a volume that is switched by renaming.
    pub working_directory: String,
}

impl Process {
    /// As it is named in sentences: by what a user sees inside the container.
    #[must_use]
    pub fn label(&self) -> String {
        format!("process {} ({})", self.inner_pid, self.name)
    }
}

/// What `/proc/PID/status` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Status {
    name: String,
    state: char,
    parent: i32,
    tracer: i32,
    threads: u32,
    inner_pid: i32,
}

fn parse_status(text: &str) -> Option<Status> {
    let mut status = Status::default();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim();
        match key {
            "Name" => status.name = value.to_owned(),
            "State" => status.state = value.chars().next()?,
            "PPid" => status.parent = value.parse().ok()?,
            "TracerPid" => status.tracer = value.parse().ok()?,
            "Threads" => status.threads = value.parse().ok()?,
            // Outermost first: the last is the one in its own pid namespace.
            "NSpid" => status.inner_pid = value.split_whitespace().next_back()?.parse().ok()?,
            _ => {}
        }
    }
    (status.state != '\0').then_some(status)
}

/// Parent of each process.
#[must_use]
pub fn parents(pids: &[i32]) -> BTreeMap<i32, i32> {
    pids.iter()
        .filter_map(|pid| {
            let status = parse_status(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)?;
            Some((*pid, status.parent))
        })
        .collect()
}

/// Whether `pid` descends from `first`.
fn descends(pid: i32, first: i32, parents: &BTreeMap<i32, i32>) -> bool {
    let mut at = pid;
    // Each step leads to another process of the list; a loop cannot be longer than it.
    for _ in 0..=parents.len() {
        if at == first {
            return true;
        }
        match parents.get(&at) {
            Some(parent) => at = *parent,
            None => return false,
        }
    }
    false
}

/// Whether an error means that the process is gone.
#[must_use]
pub fn is_gone(error: &io::Error) -> bool {
    // ESRCH is what reads of a /proc file give whose process has ended since the open.
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(3)
}

/// Reads a process. None: it has ended.
///
/// # Errors
/// It exists and something of it cannot be read.
pub fn read(pid: i32, first: i32, parents: &BTreeMap<i32, i32>, cgroup: &Path) -> Result<Option<Process>, String> {
    match read_all(pid, first, parents, cgroup) {
        Ok(process) => Ok(Some(process)),
        Err((_, error)) if is_gone(&error) => Ok(None),
        // A process that is ending has no memory and no descriptors any more: reads of both are refused.
        Err((what, error)) => match state(pid) {
            None | Some('X' | 'Z') => Ok(None),
            Some(_) => Err(format!("{what} cannot be read: {error}")),
        },
    }
}

fn state(pid: i32) -> Option<char> {
    parse_status(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?).map(|s| s.state)
}

fn read_all(
    pid: i32,
    first: i32,
    parents: &BTreeMap<i32, i32>,
    cgroup: &Path,
) -> Result<Process, (&'static str, io::Error)> {
    let folder = format!("/proc/{pid}");
    let folder = Path::new(&folder);
    let text = fs::read_to_string(folder.join("status")).map_err(|e| ("its status", e))?;
    let status = parse_status(&text).ok_or(("its status", io::ErrorKind::InvalidData.into()))?;
    let mut process = Process {
        pid,
        inner_pid: status.inner_pid,
        name: status.name,
        in_tree: descends(pid, first, parents),
        is_first: pid == first,
        state: status.state,
        tracer: tracer(folder, status.tracer),
        threads: status.threads.max(1),
        in_own_cgroup: own_cgroup(folder, cgroup),
        ..Process::default()
    };
    if status.state == 'Z' {
        // What is left of it is its exit status.
        return Ok(process);
    }
    process.state = lasting_state(pid, status.state);
    for name in NAMESPACES {
        match fs::read_link(folder.join("ns").join(name)) {
            Ok(link) => {
                if let Some(inode) = inode_in_brackets(&link.to_string_lossy()) {
                    process.namespaces.insert(name, inode);
                }
            }
            // A kernel without this kind, or nobody has asked for children's yet.
            Err(e) if e.kind() == io::ErrorKind::NotFound && folder.exists() => {}
            Err(e) => return Err(("its namespaces", e)),
        }
    }
    process.is_32_bit = is_32_bit(folder);
    process.working_directory =
        fs::read_link(folder.join("cwd")).map_or_else(|_| String::new(), |p| p.display().to_string());
    process.descriptors = descriptors::read(folder).map_err(|e| ("its open files", e))?;
    let maps = fs::read_to_string(folder.join("maps")).map_err(|e| ("its mappings", e))?;
    process.mappings = mappings::parse(&maps);
    let rollup = fs::read_to_string(folder.join("smaps_rollup")).map_err(|e| ("its memory", e))?;
    process.memory = mappings::parse_rollup(&rollup);
    Ok(process)
}

/// The tracer of the process or of one of its threads: each is traced on its own.
fn tracer(folder: &Path, of_process: i32) -> Option<i32> {
    if of_process != 0 {
        return Some(of_process);
    }
    fs::read_dir(folder.join("task"))
        .ok()?
        .flatten()
        .filter_map(|task| parse_status(&fs::read_to_string(task.path().join("status")).ok()?))
        .map(|status| status.tracer)
        .find(|tracer| *tracer != 0)
}

/// An uninterruptible wait is usually over in a moment (a disk, a vfork): only one that lasts is told.
fn lasting_state(pid: i32, first: char) -> char {
    let mut now = first;
    for _ in 0..10 {
        if now != 'D' {
            return now;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        now = state(pid).unwrap_or('X');
    }
    now
}

fn own_cgroup(folder: &Path, cgroup: &Path) -> bool {
    let text = fs::read_to_string(folder.join("cgroup")).unwrap_or_default();
    let own = text
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap_or_default();
    // The container's cgroup is an absolute path in the file system, the process's one relative to the hierarchy's root.
    let own = own.trim_start_matches('/');
    own.is_empty() || cgroup.ends_with(own)
}

fn inode_in_brackets(link: &str) -> Option<u64> {
    link.split_once('[')?.1.strip_suffix(']')?.parse().ok()
}

fn is_32_bit(folder: &Path) -> bool {
    use std::io::Read as _;
    let mut head = [0; 5];
    fs::File::open(folder.join("exe"))
        .and_then(|mut file| file.read_exact(&mut head))
        .is_ok_and(|()| head == *b"\x7fELF\x01")
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tnginx: worker\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t4711\nPid:\t4711\nPPid:\t4700\nTracerPid:\t99\n\
        FDSize:\t64\nNStgid:\t4711\t7\nNSpid:\t4711\t7\nThreads:\t3\nSigQ:\t0/1\n";

    #[test]
    fn a_status_is_read() {
        let status = parse_status(STATUS).unwrap();
        assert_eq!(status.name, "nginx: worker");
        assert_eq!(
            (
                status.state,
                status.parent,
                status.tracer,
                status.threads,
                status.inner_pid
            ),
            ('S', 4700, 99, 3, 7)
        );
        assert_eq!(parse_status(""), None);
        assert_eq!(parse_status("State:\tS\nPPid:\tx\n"), None);
    }

    #[test]
    fn descent_is_told_apart_from_exec_sessions() {
        // 1 is the shim; 10 the first process, 11 and 12 below it; 20 and 21 came by exec.
        let parents = BTreeMap::from([(10, 1), (11, 10), (12, 11), (20, 1), (21, 20)]);
        let in_tree: Vec<i32> = [10, 11, 12, 20, 21]
            .into_iter()
            .filter(|pid| descends(*pid, 10, &parents))
            .collect();
        assert_eq!(in_tree, [10, 11, 12]);
        // A list read while parents changed may hold a loop.
        assert!(!descends(30, 10, &BTreeMap::from([(30, 31), (31, 30)])));
    }

    #[test]
    fn our_own_process_can_be_read() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let process = read(pid, pid, &BTreeMap::new(), Path::new("/")).unwrap().unwrap();
        assert!(process.in_tree && process.is_first && !process.is_32_bit);
        assert!(process.memory.to_move() > 0);
        assert!(process.namespaces.contains_key("mnt"));
        assert_eq!(read(i32::MAX, 1, &BTreeMap::new(), Path::new("/")), Ok(None));
    }
}
