//! Is the restored tree held? Asked of the kernel, not of those who did it.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use hostsys::cgroup::{self, Cgroup};
use hostsys::namespace::{self, Kind, Namespace};

use super::End;

/// The hold has waited already; this covers the kernel's notification only.
const FROZEN: Duration = Duration::from_secs(1);

/// Why it is not held.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// runc wrote no pid.
    #[error("runc restore named no first process")]
    NoPid,
    /// The first process has ended.
    #[error("the restored first process ended at once")]
    Ended,
    /// Not frozen.
    #[error("the restored processes were not held")]
    Running(#[source] cgroup::Error),
    /// The cgroup cannot be read.
    #[error("the restored processes cannot be listed")]
    Cgroup(#[source] cgroup::Error),
    /// The processes cannot be looked at.
    #[error("the restored processes cannot be looked at")]
    Look(#[source] namespace::Error),
    /// A process is elsewhere.
    #[error("process {0} was restored outside of the container's cgroup and is not held")]
    Elsewhere(i32),
}

/// The pid of the first process, if everything restored is frozen in the container's cgroup.
pub(super) fn verify(container: &Cgroup, pid_file: &Path, ended: &HashMap<i32, End>) -> Result<i32, Error> {
    let pid = fs::read_to_string(pid_file)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .ok_or(Error::NoPid)?;
    if ended.contains_key(&pid) {
        return Err(Error::Ended);
    }
    container.wait_frozen(FROZEN).map_err(Error::Running)?;
    let members = container.all_processes().map_err(Error::Cgroup)?;
    if !members.contains(&pid) {
        return Err(Error::Elsewhere(pid));
    }
    // With a pid namespace of its own, whoever is in it was restored.
    let inside = namespace_of(pid).map_err(Error::Look)?;
    let own = i32::try_from(std::process::id()).map_err(|_| Error::NoPid)?;
    if inside != namespace_of(own).map_err(Error::Look)? {
        for other in all_processes() {
            // One that has ended meanwhile is nowhere.
            if !members.contains(&other) && namespace_of(other).is_ok_and(|theirs| theirs == inside) {
                return Err(Error::Elsewhere(other));
            }
        }
    }
    Ok(pid)
}

fn namespace_of(pid: i32) -> Result<u64, namespace::Error> {
    Namespace::of_process(pid, Kind::Pid)?.inode()
}

fn all_processes() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}
