//! Every process of the cluster is in a cgroup below `peregrine-e2e`: that is how it is found and ended, whoever started it and died.
//!
//! Only version 2 has `cgroup.kill`, and no controllers are handed down: nodes look the same on every machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// The root of all our cgroups.
const NAME: &str = "peregrine-e2e";
/// Where cgroup v2 is mounted if the machine has it nowhere.
const OWN_MOUNT: &str = "/run/peregrine-e2e/cgroup";
/// How long killed processes may take to be gone.
const GONE: Duration = Duration::from_secs(20);

/// The folder of all our cgroups, in the machine's cgroup v2 mount, which is made if there is none.
///
/// # Errors
/// If cgroup v2 is not mounted and cannot be.
pub(crate) fn base() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    if let Some(mount) = mounted(&mounts) {
        return Ok(mount.join(NAME));
    }
    fs::create_dir_all(OWN_MOUNT).with_context(|| format!("cannot make the folder {OWN_MOUNT}"))?;
    nix::mount::mount(
        Some("cgroup2"),
        OWN_MOUNT,
        Some("cgroup2"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )
    .context("cgroup v2 is not mounted on this machine and cannot be: boot a kernel with cgroup v2")?;
    Ok(Path::new(OWN_MOUNT).join(NAME))
}

/// The folder of all our cgroups, if it is there.
pub(crate) fn existing() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    Some(mounted(&mounts)?.join(NAME)).filter(|path| path.exists())
}

/// Removes the folder of all our cgroups if it is empty.
pub(crate) fn tidy() {
    if let Some(base) = existing() {
        fs::remove_dir(base).ok();
    }
}

/// Unmounts what [`base`] may have mounted.
pub(crate) fn unmount() {
    nix::mount::umount(OWN_MOUNT).ok();
    fs::remove_dir(OWN_MOUNT).ok();
    fs::remove_dir("/run/peregrine-e2e").ok();
}

/// The first mount of cgroup v2 in `/proc/self/mounts`.
fn mounted(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, at, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(at))
    })
}

/// A cgroup of ours.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    /// The one of that name below ours.
    pub(crate) fn named(name: &str) -> Result<Self> {
        Ok(Self(base()?.join(name)))
    }

    /// All of ours.
    pub(crate) fn all() -> Result<Self> {
        Ok(Self(base()?))
    }

    pub(crate) fn exists(&self) -> bool {
        self.0.exists()
    }

    pub(crate) fn create(&self) -> Result<()> {
        fs::create_dir_all(&self.0).with_context(|| format!("cannot make the cgroup {}", self.0.display()))
    }

    /// Moves the calling process into it.
    pub(crate) fn enter(&self) -> Result<()> {
        fs::write(self.0.join("cgroup.procs"), "0")
            .with_context(|| format!("cannot enter the cgroup {}", self.0.display()))
    }

    /// Processes directly in it.
    pub(crate) fn processes(&self) -> Vec<u32> {
        fs::read_to_string(self.0.join("cgroup.procs"))
            .unwrap_or_default()
            .lines()
            .filter_map(|line| line.parse().ok())
            .collect()
    }

    /// Whether any process is in it or below.
    pub(crate) fn populated(&self) -> bool {
        fs::read_to_string(self.0.join("cgroup.events"))
            .unwrap_or_default()
            .lines()
            .any(|line| line == "populated 1")
    }

    /// Kills all in it and below, waits until they are gone and removes it.
    pub(crate) fn destroy(&self) -> Result<()> {
        if !self.exists() {
            return Ok(());
        }
        let deadline = Instant::now() + GONE;
        loop {
            // Written each time: a process may have been moved in while the others were killed.
            if self.populated() {
                fs::write(self.0.join("cgroup.kill"), "1")
                    .with_context(|| format!("cannot kill the cgroup {}", self.0.display()))?;
                // A frozen cgroup dies as well: the kernel thaws what it kills in version 2.
            } else if remove(&self.0).is_ok() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!(
                    "the cgroup {} is not empty {} s after its processes were killed",
                    self.0.display(),
                    GONE.as_secs()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Removes a cgroup and those below it, deepest first.
fn remove(cgroup: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(cgroup)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_two_is_found_wherever_it_is() {
        let hybrid = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mounted(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(
            mounted("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"),
            Some("/sys/fs/cgroup".into())
        );
        assert_eq!(mounted("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"), None);
    }
}
