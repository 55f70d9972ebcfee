//! One cgroup of the v2 hierarchy: freeze and wait, thaw, kill and wait, list, move.
//!
//! Only the core files are used (`cgroup.freeze`, `cgroup.kill`, `cgroup.events`, `cgroup.procs`): they work without any
//! controller, also where v1 holds the controllers. The kernel announces a change of `cgroup.events` by `POLLPRI`, so a
//! waiter wakes within microseconds; it polls the level with a deadline all the same, never an edge.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// What failed, on which cgroup.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no cgroup2 mount.
    #[error("no cgroup v2 hierarchy is mounted on this node")]
    NoMount,
    /// A process is in no cgroup of the v2 hierarchy that can be seen from here.
    #[error("process {0} is in no visible cgroup of the v2 hierarchy")]
    NoCgroup(i32),
    /// A file could not be read or written.
    #[error("failed to {doing} {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The state was not reached in time.
    #[error("cgroup {} was not {state} within {waited:?}", path.display())]
    Deadline {
        /// The cgroup.
        path: PathBuf,
        /// What was waited for.
        state: &'static str,
        /// For how long.
        waited: Duration,
    },
}

/// A folder of the v2 hierarchy. Dropping it does nothing to the cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
}

/// The mount point of the v2 hierarchy in this mount namespace.
///
/// # Errors
/// [`Error::NoMount`], or the mount table could not be read.
pub fn mount_point() -> Result<PathBuf, Error> {
    let path = Path::new("/proc/self/mountinfo");
    let table = fs::read_to_string(path).map_err(io_error("read", path))?;
    find_mount(&table).ok_or(Error::NoMount)
}

/// The best cgroup2 mount of a mount table: one of the whole visible hierarchy is better than a bind mount of a part.
fn find_mount(table: &str) -> Option<PathBuf> {
    let mounts = table.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        right.starts_with("cgroup2 ").then_some(())?;
        let mut fields = left.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        Some((root, unescape(point)))
    });
    let mut mounts: Vec<_> = mounts.collect();
    mounts.sort_by_key(|(root, point)| (*root != "/", point.len()));
    mounts.into_iter().next().map(|(_, point)| PathBuf::from(point))
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (from, to)| text.replace(from, to))
}

impl Cgroup {
    /// The cgroup in which a process is.
    ///
    /// # Errors
    /// The process is gone, or its cgroup is outside of what is mounted here.
    pub fn of_process(pid: i32) -> Result<Self, Error> {
        let file = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let text = fs::read_to_string(&file).map_err(io_error("read", &file))?;
        let inside = unified_path(&text).ok_or(Error::NoCgroup(pid))?;
        Ok(Self::at(mount_point()?.join(inside.trim_start_matches('/'))))
    }

    /// The cgroup at an absolute path, which need not exist.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Its absolute path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it exists.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.path.join("cgroup.procs").exists()
    }

    /// Creates it and its missing parents; an existing one is kept.
    ///
    /// # Errors
    /// The folder could not be made.
    pub fn create(&self) -> Result<(), Error> {
        fs::create_dir_all(&self.path).map_err(io_error("create", &self.path))
    }

    /// Asks for the freeze and returns at once: several cgroups can be frozen together, then awaited.
    ///
    /// # Errors
    /// The request could not be written.
    pub fn begin_freeze(&self) -> Result<(), Error> {
        self.write("cgroup.freeze", "1")
    }

    /// Waits until every task in it is frozen.
    ///
    /// # Errors
    /// [`Error::Deadline`]: the freeze stays requested; thaw it or go on waiting.
    pub fn wait_frozen(&self, within: Duration) -> Result<(), Error> {
        self.wait("frozen", "frozen", true, within)
    }

    /// [`Self::begin_freeze`] and [`Self::wait_frozen`].
    ///
    /// # Errors
    /// As these.
    pub fn freeze(&self, within: Duration) -> Result<(), Error> {
        self.begin_freeze()?;
        self.wait_frozen(within)
    }

    /// Lets it run again. The kernel acts at once, so nothing is waited for.
    ///
    /// # Errors
    /// The request could not be written.
    pub fn thaw(&self) -> Result<(), Error> {
        self.write("cgroup.freeze", "0")
    }

    /// Whether every task in it is frozen now.
    ///
    /// # Errors
    /// `cgroup.events` could not be read.
    pub fn is_frozen(&self) -> Result<bool, Error> {
        self.event("frozen")
    }

    /// Whether the freeze of this very cgroup (not of a parent) has been asked for.
    ///
    /// # Errors
    /// `cgroup.freeze` could not be read.
    pub fn is_freeze_requested(&self) -> Result<bool, Error> {
        Ok(self.read("cgroup.freeze")?.trim() == "1")
    }

    /// Whether a live process is in it or below it (zombies do not count).
    ///
    /// # Errors
    /// `cgroup.events` could not be read.
    pub fn is_populated(&self) -> Result<bool, Error> {
        self.event("populated")
    }

    /// Kills everything in it and below it, frozen or not, and waits until it is empty. A cgroup that does not exist is
    /// already empty.
    ///
    /// # Errors
    /// The request could not be written, or [`Error::Deadline`].
    pub fn kill(&self, within: Duration) -> Result<(), Error> {
        match self.write("cgroup.kill", "1") {
            Err(Error::Io { source, .. }) if is_gone(&source) && !self.exists() => return Ok(()),
            result => result?,
        }
        self.wait_empty(within)
    }

    /// Waits until no live process is in it or below it.
    ///
    /// # Errors
    /// [`Error::Deadline`].
    pub fn wait_empty(&self, within: Duration) -> Result<(), Error> {
        match self.wait("populated", "empty", false, within) {
            Err(Error::Io { source, .. }) if is_gone(&source) && !self.exists() => Ok(()),
            result => result,
        }
    }

    /// The processes directly in it.
    ///
    /// # Errors
    /// `cgroup.procs` could not be read.
    pub fn processes(&self) -> Result<Vec<i32>, Error> {
        // A process outside of the reader's pid namespace is shown as 0.
        let text = self.read("cgroup.procs")?;
        Ok(text
            .lines()
            .filter_map(|line| line.parse().ok())
            .filter(|pid| *pid > 0)
            .collect())
    }

    /// The processes in it and in all cgroups below it.
    ///
    /// # Errors
    /// A folder could not be read.
    pub fn all_processes(&self) -> Result<Vec<i32>, Error> {
        let mut all = self.processes()?;
        for child in self.children()? {
            match child.all_processes() {
                Ok(more) => all.extend(more),
                Err(Error::Io { source, .. }) if is_gone(&source) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    /// The cgroups directly below it.
    ///
    /// # Errors
    /// The folder could not be read.
    pub fn children(&self) -> Result<Vec<Self>, Error> {
        let mut children = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(io_error("list", &self.path))? {
            let entry = entry.map_err(io_error("list", &self.path))?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                children.push(Self::at(entry.path()));
            }
        }
        Ok(children)
    }

    /// Moves a whole process into it; 0 is the caller.
    ///
    /// # Errors
    /// The process is gone, or the cgroup refuses it.
    pub fn add(&self, pid: i32) -> Result<(), Error> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// Removes it and all empty cgroups below it; an absent one is no error. The kernel says "busy" for a moment after the
    /// last process was reaped, hence the deadline.
    ///
    /// # Errors
    /// It still holds processes after the deadline.
    pub fn remove(&self, within: Duration) -> Result<(), Error> {
        let end = Instant::now() + within;
        loop {
            match remove_tree(&self.path) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(source) => {
                    return Err(Error::Io {
                        doing: "remove",
                        path: self.path.clone(),
                        source,
                    });
                }
            }
        }
    }

    fn wait(&self, key: &str, state: &'static str, wanted: bool, within: Duration) -> Result<(), Error> {
        let path = self.path.join("cgroup.events");
        let mut file = File::open(&path).map_err(io_error("open", &path))?;
        let end = Instant::now() + within;
        loop {
            let mut text = String::new();
            file.seek(SeekFrom::Start(0))
                .and_then(|_| file.read_to_string(&mut text))
                .map_err(io_error("read", &path))?;
            if flag(&text, key) == Some(wanted) {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Deadline {
                    path: self.path.clone(),
                    state,
                    waited: within,
                });
            }
            // Re-read at least every 50 ms: a missed notification then costs time, never the outcome.
            let wait = left.min(Duration::from_millis(50)).as_millis().max(1);
            let timeout = PollTimeout::from(u8::try_from(wait).unwrap_or(u8::MAX));
            // An interrupted poll is as good as a timeout.
            let _ = poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)], timeout);
        }
    }

    fn event(&self, key: &str) -> Result<bool, Error> {
        Ok(flag(&self.read("cgroup.events")?, key) == Some(true))
    }

    fn read(&self, name: &str) -> Result<String, Error> {
        let path = self.path.join(name);
        fs::read_to_string(&path).map_err(io_error("read", &path))
    }

    fn write(&self, name: &str, value: &str) -> Result<(), Error> {
        let path = self.path.join(name);
        // Without create: in a folder that is no cgroup this must fail.
        let mut file = File::options()
            .write(true)
            .open(&path)
            .map_err(io_error("open", &path))?;
        file.write_all(value.as_bytes()).map_err(io_error("write", &path))
    }
}

/// A cgroup that is removed meanwhile answers ENOENT when it is opened and ENODEV when it was open.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ENODEV)
}

fn remove_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

/// The path in the v2 hierarchy, from the text of /proc/PID/cgroup.
fn unified_path(text: &str) -> Option<&str> {
    text.lines()
        .find_map(|line| line.strip_prefix("0::"))
        .filter(|path| !path.starts_with("/.."))
}

/// One `key 0|1` of `cgroup.events`.
fn flag(text: &str, key: &str) -> Option<bool> {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))
        .map(|value| value.trim() == "1")
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Io { doing, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_hierarchy_is_preferred_to_a_bind_mount_of_a_part() {
        let table = "30 25 0:26 /pod /var/x rw - cgroup2 cgroup2 rw\n\
                     31 25 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw\n\
                     32 25 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        assert_eq!(find_mount(table), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(find_mount("1 2 0:3 / / rw - ext4 /dev/a rw\n"), None);
        assert_eq!(unescape("/a\\040b\\134c"), "/a b\\c");
    }

    #[test]
    fn cgroups_outside_of_the_namespace_are_refused() {
        assert_eq!(unified_path("9:name=systemd:/x\n0::/pod/c1\n"), Some("/pod/c1"));
        assert_eq!(unified_path("0::/../other\n"), None);
        assert_eq!(unified_path("4:memory:/\n"), None);
    }

    #[test]
    fn flags_are_whole_words() {
        let text = "populated 1\nfrozen 0\n";
        assert_eq!(flag(text, "populated"), Some(true));
        assert_eq!(flag(text, "frozen"), Some(false));
        assert_eq!(flag(text, "froz"), None);
    }
}
