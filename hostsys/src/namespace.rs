//! Namespaces as file descriptors, and processes as handles that cannot be recycled.

#![expect(unsafe_code, reason = "raw system calls: this crate is where they live")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::Signal;

/// What failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A namespace or process could not be opened.
    #[error("failed to open {what}")]
    Open {
        /// Path, or process.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel refused to enter.
    #[error("failed to enter {what}")]
    Enter {
        /// Which namespace.
        what: String,
        /// Why.
        #[source]
        source: Errno,
    },
    /// A signal could not be sent.
    #[error("failed to send {signal} to process {pid}")]
    Signal {
        /// The process.
        pid: i32,
        /// The signal.
        signal: Signal,
        /// Why.
        #[source]
        source: Errno,
    },
    /// The thread that ran inside the namespaces panicked.
    #[error("the work inside the namespaces panicked")]
    Panicked,
}

/// Kinds of namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Mounts.
    Mount,
    /// Network.
    Network,
    /// Host name.
    Uts,
    /// System V objects and POSIX message queues.
    Ipc,
    /// Process ids.
    Pid,
    /// Cgroup root.
    Cgroup,
    /// Clock offsets.
    Time,
    /// Users.
    User,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Mount,
        Self::Network,
        Self::Uts,
        Self::Ipc,
        Self::Pid,
        Self::Cgroup,
        Self::Time,
        Self::User,
    ];

    /// Name under /proc/PID/ns.
    #[must_use]
    pub fn file(self) -> &'static str {
        match self {
            Self::Mount => "mnt",
            Self::Network => "net",
            Self::Uts => "uts",
            Self::Ipc => "ipc",
            Self::Pid => "pid",
            Self::Cgroup => "cgroup",
            Self::Time => "time",
            Self::User => "user",
        }
    }

    fn flag(self) -> CloneFlags {
        match self {
            Self::Mount => CloneFlags::CLONE_NEWNS,
            Self::Network => CloneFlags::CLONE_NEWNET,
            Self::Uts => CloneFlags::CLONE_NEWUTS,
            Self::Ipc => CloneFlags::CLONE_NEWIPC,
            Self::Pid => CloneFlags::CLONE_NEWPID,
            Self::Cgroup => CloneFlags::CLONE_NEWCGROUP,
            // nix has no name for it.
            Self::Time => CloneFlags::from_bits_retain(nix::libc::CLONE_NEWTIME),
            Self::User => CloneFlags::CLONE_NEWUSER,
        }
    }
}

/// An open namespace.
#[derive(Debug)]
pub struct Namespace {
    kind: Kind,
    what: String,
    file: File,
}

impl Namespace {
    /// The namespace of a process.
    ///
    /// # Errors
    /// The process is gone or may not be looked at.
    pub fn of_process(pid: i32, kind: Kind) -> Result<Self, Error> {
        Self::at(Path::new(&format!("/proc/{pid}/ns/{}", kind.file())), kind)
    }

    /// A namespace that is bound to a path, as CNI plugins leave it. The kernel checks the kind when it is entered.
    ///
    /// # Errors
    /// The path could not be opened.
    pub fn at(path: &Path, kind: Kind) -> Result<Self, Error> {
        let what = format!("the {} namespace {}", kind.file(), path.display());
        match File::open(path) {
            Ok(file) => Ok(Self { kind, what, file }),
            Err(source) => Err(Error::Open { what, source }),
        }
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its identity: equal numbers are the same namespace.
    ///
    /// # Errors
    /// The descriptor could not be looked at.
    pub fn inode(&self) -> Result<u64, Error> {
        self.file
            .metadata()
            .map(|meta| meta.ino())
            .map_err(|source| Error::Open {
                what: self.what.clone(),
                source,
            })
    }

    /// Moves the calling *thread* into it. For mounts the thread must not share its file system attributes:
    /// [`within`] sees to that.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn enter(&self) -> Result<(), Error> {
        setns(self.file.as_fd(), self.kind.flag()).map_err(|source| Error::Enter {
            what: self.what.clone(),
            source,
        })
    }
}

/// Runs `work` in a thread of its own that has entered the namespaces, in the order given; the caller stays where it is.
///
/// # Errors
/// A namespace could not be entered.
pub fn within<R: Send>(namespaces: &[Namespace], work: impl FnOnce() -> R + Send) -> Result<R, Error> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if namespaces.iter().any(|n| n.kind == Kind::Mount) {
                // setns into a mount namespace refuses a thread that shares root and working directory with others.
                unshare(CloneFlags::CLONE_FS).map_err(|source| Error::Enter {
                    what: "a mount namespace".into(),
                    source,
                })?;
            }
            for namespace in namespaces {
                namespace.enter()?;
            }
            Ok(work())
        });
        thread.join().unwrap_or(Err(Error::Panicked))
    })
}

/// A process that cannot be confused with a later one of the same number.
#[derive(Debug)]
pub struct PidFd {
    pid: i32,
    fd: OwnedFd,
}

impl PidFd {
    /// Opens a process.
    ///
    /// # Errors
    /// It does not exist.
    pub fn open(pid: i32) -> Result<Self, Error> {
        // SAFETY: the call takes two integers and returns a new descriptor or -1.
        let fd = unsafe { nix::libc::syscall(nix::libc::SYS_pidfd_open, pid, 0) };
        let fd = RawFd::try_from(fd)
            .ok()
            .filter(|fd| *fd >= 0)
            .ok_or_else(|| Error::Open {
                what: format!("process {pid}"),
                source: io::Error::last_os_error(),
            })?;
        // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { pid, fd })
    }

    /// The number under which it was opened.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends a signal; a process that has ended is no error.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn signal(&self, signal: Signal) -> Result<(), Error> {
        // SAFETY: integers and a null pointer, which asks for the siginfo that kill(2) would make.
        let result = unsafe {
            nix::libc::syscall(
                nix::libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                signal as i32,
                std::ptr::null::<nix::libc::siginfo_t>(),
                0,
            )
        };
        match Errno::result(result) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(source) => Err(Error::Signal {
                pid: self.pid,
                signal,
                source,
            }),
        }
    }

    /// Waits until it has ended (it may still be a zombie); false when it still runs after `within`.
    #[must_use]
    pub fn wait_end(&self, within: Duration) -> bool {
        let end = Instant::now() + within;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left.min(Duration::from_secs(30))).unwrap_or(PollTimeout::ZERO);
            match poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(n) if n > 0 => return true,
                Ok(_) | Err(_) if left.is_zero() => return false,
                Ok(_) | Err(_) => {}
            }
        }
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !self.wait_end(Duration::ZERO)
    }

    /// Moves the calling thread into several of its namespaces in one step (for mounts see [`Namespace::enter`]).
    ///
    /// # Errors
    /// The kernel refused; then none was entered.
    pub fn enter(&self, kinds: &[Kind]) -> Result<(), Error> {
        let flags = kinds
            .iter()
            .fold(CloneFlags::empty(), |flags, kind| flags | kind.flag());
        setns(self.fd.as_fd(), flags).map_err(|source| Error::Enter {
            what: format!("namespaces of process {}", self.pid),
            source,
        })
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Path of a namespace of a process.
#[must_use]
pub fn path(pid: i32, kind: Kind) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/ns/{}", kind.file()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_its_own_namespace_and_the_same_as_its_parent() {
        let me = i32::try_from(std::process::id()).unwrap();
        let mine = Namespace::of_process(me, Kind::Network).unwrap();
        let again = Namespace::at(&path(me, Kind::Network), Kind::Network).unwrap();
        assert_eq!(mine.inode().unwrap(), again.inode().unwrap());
        assert_ne!(
            mine.inode().unwrap(),
            Namespace::of_process(me, Kind::Mount).unwrap().inode().unwrap()
        );
    }

    #[test]
    fn a_handle_sees_the_end() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let handle = PidFd::open(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(handle.is_alive());
        handle.signal(Signal::SIGKILL).unwrap();
        assert!(handle.wait_end(Duration::from_secs(5)));
        child.wait().unwrap();
        handle.signal(Signal::SIGKILL).unwrap();
    }
}
