//! Joining the namespaces of the node's first process, so that every path and address means what it means on the node.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};

/// Why the node's namespaces could not be joined.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be opened.
    #[error("failed to open {0}")]
    Open(PathBuf, #[source] std::io::Error),
    /// A namespace could not be joined.
    #[error("failed to join the {0} namespace of the node's first process (the pod needs hostPID and privileged)")]
    Join(&'static str, #[source] nix::Error),
    /// The working directory could not be changed.
    #[error("failed to change to the node's root directory")]
    Chdir(#[source] nix::Error),
}

/// The namespaces that are joined, mount last: until then `/proc` is that of the container. The pid namespace is the
/// node's already (hostPID), and a process cannot change its own.
const NAMESPACES: [(&str, CloneFlags); 5] = [
    ("cgroup", CloneFlags::CLONE_NEWCGROUP),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("net", CloneFlags::CLONE_NEWNET),
    ("mnt", CloneFlags::CLONE_NEWNS),
];

/// Joins the mount, cgroup, UTS, IPC and network namespaces of process 1 and returns a path below which the root
/// directory of before is still found (`/proc/self/fd/N`, kept open for the life of the process).
///
/// To be called before any thread is started: the kernel refuses to change the mount namespace of a process that shares
/// its root and working directory with another thread.
///
/// # Errors
/// See [`Error`]; some namespaces may have been joined, so the caller should end.
pub fn join_node() -> Result<PathBuf, Error> {
    let open = |path: &Path| File::open(path).map_err(|e| Error::Open(path.to_owned(), e));
    let root = open(Path::new("/"))?;
    // A mount namespace ends with its last user, and all its mounts with it, whoever holds their root: the token's volume
    // would be gone.
    let own_mounts = open(Path::new("/proc/self/ns/mnt"))?;
    let targets = NAMESPACES
        .iter()
        .map(|(name, flag)| {
            let theirs = PathBuf::from(format!("/proc/1/ns/{name}"));
            // Joining one's own namespace is harmless for all but the mount namespace, whose root would change.
            Ok((name, *flag, open(&theirs)?, same_namespace(name)))
        })
        .collect::<Result<Vec<_>, Error>>()?;
    for (name, flag, file, same) in targets {
        if !same {
            setns(file.as_fd(), flag).map_err(|e| Error::Join(name, e))?;
        }
    }
    nix::unistd::chdir("/").map_err(Error::Chdir)?;
    keep_open(own_mounts);
    Ok(PathBuf::from(format!("/proc/self/fd/{}", keep_open(root))))
}

/// Whether this process already is in the node's namespace of this kind.
fn same_namespace(name: &str) -> bool {
    let link = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).ok();
    let own = link("self");
    own.is_some() && own == link("1")
}

fn keep_open(file: File) -> i32 {
    let number = file.as_raw_fd();
    // The path that is handed out stays valid only while the descriptor does; it is meant to live as long as we do.
    let _ = file.into_raw_fd();
    number
}

/// Where a node keeps the programs that we run; the PATH of a container often lacks the `sbin` folders.
const PROGRAMS: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];

/// Appends the node's usual program folders to our PATH, where they are missing. Does nothing in a process that has
/// several threads: one of them might be reading the environment.
pub fn extend_path() {
    if std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count) != 1 {
        return;
    }
    let own = std::env::var("PATH").unwrap_or_default();
    let mut folders: Vec<&str> = own.split(':').filter(|folder| !folder.is_empty()).collect();
    for folder in PROGRAMS {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    let path = folders.join(":");
    #[expect(unsafe_code, reason = "the environment may be changed while nobody else can read it")]
    // SAFETY: this is the only thread, as was just seen, and it reads no variable meanwhile.
    unsafe {
        std::env::set_var("PATH", path);
    }
}
