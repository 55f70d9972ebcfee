//! Run by CRIU as its action script while `runc restore` is under way; leaves the restored tree frozen.
//!
//! CRIU calls it at each of its stages. Two matter:
//! - `post-restore`: all processes exist, none has run. CRIU gives up where the script fails here, so everything that the
//!   hold needs is tried here.
//! - `pre-resume`: the last stage before CRIU lets go. It *ignores* a failure here, so a hold that fails kills the container
//!   itself. CRIU and this script are in the container's cgroup (runc puts CRIU there) and would freeze with it: they are moved
//!   out first. CRIU then detaches from processes that are already frozen: none executes an instruction of the user's.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hostsys::cgroup::{self, Cgroup};

use crate::folder::{self, Folder, Start};

/// Processes that are stopped by ptrace freeze within microseconds.
const FREEZE: Duration = Duration::from_secs(5);
const KILL: Duration = Duration::from_secs(10);

/// Why the tree is not held. It is dead then.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder of the shepherd.
    #[error("failed to read what to hold")]
    Folder(#[from] folder::Error),
    /// A cgroup.
    #[error("failed to hold the restored processes")]
    Cgroup(#[from] cgroup::Error),
    /// CRIU did not say which process is the first.
    #[error("CRIU names no first process")]
    NoFirst,
    /// The first process is elsewhere.
    #[error("the restored first process {0} is not in the container's cgroup")]
    Elsewhere(i32),
}

/// Acts on the stage that CRIU names in the environment. `name` is the path under which it was called: the folder tells whose
/// hold it is.
///
/// # Errors
/// See [`Error`].
pub fn act(name: &OsStr, stage: Option<&OsStr>) -> Result<(), Error> {
    let folder = Folder::at(Path::new(name).parent().map(PathBuf::from).unwrap_or_default());
    match stage.and_then(OsStr::to_str) {
        Some("post-restore") => prepare(&folder.read_start()?),
        Some("pre-resume") => {
            // Read before anything else can fail: without it the container is not even known.
            let start = folder.read_start()?;
            hold(&start).inspect_err(|_| {
                // What cannot be held must not live. The shepherd kills as well, but later.
                let _ = Cgroup::at(&start.report.cgroup).kill(KILL);
            })
        }
        _ => Ok(()),
    }
}

fn first_process() -> Result<i32, Error> {
    std::env::var("CRTOOLS_INIT_PID")
        .ok()
        .and_then(|pid| pid.parse().ok())
        .ok_or(Error::NoFirst)
}

/// Tries all that [`hold`] needs.
fn prepare(start: &Start) -> Result<(), Error> {
    let container = Cgroup::at(&start.report.cgroup);
    container.is_frozen()?;
    // Thawing what is not frozen changes nothing, but shows that the freezer can be written.
    container.thaw()?;
    let first = first_process()?;
    if !container.processes()?.contains(&first) {
        return Err(Error::Elsewhere(first));
    }
    move_out(start, &container)
}

fn hold(start: &Start) -> Result<(), Error> {
    let container = Cgroup::at(&start.report.cgroup);
    move_out(start, &container)?;
    container.freeze(FREEZE)?;
    let first = first_process()?;
    if !container.processes()?.contains(&first) {
        return Err(Error::Elsewhere(first));
    }
    Ok(())
}

/// Moves CRIU, this script and all their children out of the container's cgroup. The restored first process is CRIU's
/// *sibling* (runc asks for it), so none of the restored is a child of CRIU.
fn move_out(start: &Start, container: &Cgroup) -> Result<(), Error> {
    let shepherd = Cgroup::at(start.shepherd_cgroup());
    let criu = nix::unistd::getppid().as_raw();
    shepherd.add(0)?;
    for pid in container.processes()? {
        if is_or_descends_from(pid, criu) {
            shepherd.add(pid)?;
        }
    }
    Ok(())
}

fn is_or_descends_from(pid: i32, ancestor: i32) -> bool {
    let mut pid = pid;
    // A chain longer than this is no chain of helpers.
    for _ in 0..64 {
        if pid == ancestor {
            return true;
        }
        match parent(pid) {
            Some(next) if next > 1 => pid = next,
            Some(_) | None => return false,
        }
    }
    false
}

fn parent(pid: i32) -> Option<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("PPid:"))?
        .trim()
        .parse()
        .ok()
}
