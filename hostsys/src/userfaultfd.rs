//! A userfaultfd of another process, which notes writes (`WP_ASYNC`, Linux 6.7; arm64 6.10) and does nothing else: no fault
//! ever waits for us.
//!
//! It is made by two system calls in one of the process's threads, which is stopped for some 100 µs, and fetched; the
//! process itself does not keep the descriptor, or CRIU could not dump it. All else is done from here: it acts on the
//! address space that the descriptor belongs to. When the last descriptor is closed, by the death of its holder too, the
//! kernel undoes everything and the process runs on.

#![expect(unsafe_code, reason = "ioctls and system calls that nix does not wrap")]

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::fs::FileExt as _,
    },
    time::{Duration, Instant},
};

use nix::errno::Errno;

use crate::{
    namespace::{self, PidFd},
    ptrace::{self, Stopped, find_call_instruction},
};

const UFFD_API: u64 = 0xAA;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const MODE_WP: u64 = 1 << 1;
const USER_MODE_ONLY: i32 = 1;

/// How long one stop of a thread may take.
const STOP: Duration = Duration::from_millis(500);

/// Why a process has no userfaultfd of ours.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It has ended, or cannot be opened.
    #[error("failed to open process {0}")]
    Open(i32, #[source] namespace::Error),
    /// Its memory map could not be read.
    #[error("failed to read {1} of process {0}")]
    Read(i32, &'static str, #[source] io::Error),
    /// It has no vDSO, or one without a system call.
    #[error("process {0} has no system call instruction in its vDSO")]
    NoInstruction(i32),
    /// No thread of it could be stopped, or not brought to make the calls.
    #[error("failed to make system calls in process {0}")]
    Calls(i32, #[source] ptrace::Error),
    /// The kernel refused a userfaultfd to it.
    #[error("process {0} could not make a userfaultfd")]
    Refused(i32, #[source] Errno),
    /// It was made and could not be fetched.
    #[error("failed to fetch the userfaultfd of process {0}")]
    Fetch(i32, #[source] Errno),
    /// The kernel cannot note writes this way.
    #[error("the kernel has no WP_ASYNC")]
    Features(#[source] Errno),
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

/// A userfaultfd of another process.
#[derive(Debug)]
pub struct Userfaultfd {
    fd: OwnedFd,
    stopped_for: Duration,
}

impl Userfaultfd {
    /// Makes one in a running process. A process in a frozen cgroup makes no calls: that is an error after half a second.
    ///
    /// # Errors
    /// See [`Error`]; the process goes on as it was.
    pub fn in_process(pid: i32) -> Result<Self, Error> {
        let process = PidFd::open(pid).map_err(|e| Error::Open(pid, e))?;
        let instruction = instruction(pid)?;
        let started = Instant::now();
        let stopped = stop_any(pid)?;
        let made = stopped.make_calls(instruction, STOP, |call| make_and_fetch(pid, &process, call));
        drop(stopped);
        let stopped_for = started.elapsed();
        let fd = made.map_err(|e| Error::Calls(pid, e))??;
        agree(&fd).map_err(Error::Features)?;
        Ok(Self { fd, stopped_for })
    }

    /// For how long a thread of the process was stopped.
    #[must_use]
    pub fn stopped_for(&self) -> Duration {
        self.stopped_for
    }

    /// Begins to note writes in an area; once more is no error. Nothing is protected by it: see
    /// [`crate::pagemap::Pagemap::held_and_protect`].
    ///
    /// # Errors
    /// EBUSY: another userfaultfd has it. EINVAL: there is no such area (any more). ENOMEM: too many areas, or the address
    /// space is gone: see [`Userfaultfd::is_gone`].
    pub fn register(&self, start: u64, end: u64) -> Result<(), Errno> {
        let mut arg = Register {
            start,
            len: end.saturating_sub(start),
            mode: MODE_WP,
            ioctls: 0,
        };
        // SAFETY: `arg` has the layout of `struct uffdio_register` and outlives the call. A registration for write
        // protection changes nothing that the process could notice.
        let result = unsafe { libc::ioctl(self.fd.as_fd().as_raw_fd(), UFFDIO_REGISTER as _, &raw mut arg) };
        Errno::result(result).map(drop)
    }

    /// All pages of an area that was registered count as written, whatever the page tables say. They may say anything: when
    /// a program moves a mapping (mremap) to where it becomes one with a neighbour, Linux (seen on 6.18) takes both from the
    /// userfaultfd and leaves the marks of the neighbour's pages in place, so that writes to them go unseen.
    ///
    /// # Errors
    /// ENOENT: the area is not registered (any more).
    pub fn forget_marks(&self, start: u64, end: u64) -> Result<(), Errno> {
        let mut arg = WriteProtect {
            start,
            len: end.saturating_sub(start),
            mode: 0,
        };
        // SAFETY: `arg` has the layout of `struct uffdio_writeprotect` and outlives the call. Taking protection away changes
        // nothing that the process could notice.
        let result = unsafe { libc::ioctl(self.fd.as_fd().as_raw_fd(), UFFDIO_WRITEPROTECT as _, &raw mut arg) };
        Errno::result(result).map(drop)
    }

    /// Ends it for an area, whether it was registered or not.
    ///
    /// # Errors
    /// As for [`Userfaultfd::register`].
    pub fn unregister(&self, start: u64, end: u64) -> Result<(), Errno> {
        let mut arg = Range {
            start,
            len: end.saturating_sub(start),
        };
        // SAFETY: `arg` has the layout of `struct uffdio_range` and outlives the call.
        let result = unsafe { libc::ioctl(self.fd.as_fd().as_raw_fd(), UFFDIO_UNREGISTER as _, &raw mut arg) };
        Errno::result(result).map(drop)
    }

    /// Whether the address space is gone: the process has ended, or executes another program.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        // Of no effect: where there is an address space, it mostly has nothing at this address.
        let mut arg = WriteProtect {
            start: 1 << 16,
            len: 1 << 16,
            mode: 0,
        };
        // SAFETY: `arg` has the layout of `struct uffdio_writeprotect` and outlives the call. Were there an area of ours at
        // this address, its pages would count as written, which is always allowed.
        let result = unsafe { libc::ioctl(self.fd.as_fd().as_raw_fd(), UFFDIO_WRITEPROTECT as _, &raw mut arg) };
        Errno::result(result) == Err(Errno::ESRCH)
    }
}

/// Agrees with the kernel on what a new userfaultfd does.
///
/// # Errors
/// EINVAL: this kernel has no `WP_ASYNC`.
pub(crate) fn agree(fd: &OwnedFd) -> Result<(), Errno> {
    let mut api = Api {
        api: UFFD_API,
        features: FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED | FEATURE_PAGEFAULT_FLAG_WP,
        ioctls: 0,
    };
    // SAFETY: `api` has the layout of `struct uffdio_api` and outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API as _, &raw mut api) };
    Errno::result(result).map(drop)
}

/// Any thread will do; the first may have ended while others run.
fn stop_any(pid: i32) -> Result<Stopped, Error> {
    let mut last = match Stopped::stop_without_seccomp(pid, STOP) {
        Ok(stopped) => return Ok(stopped),
        Err(error) => error,
    };
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_err(|e| Error::Read(pid, "the threads", e))?;
    let others = threads
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|tid| *tid != pid);
    for tid in others {
        match Stopped::stop_without_seccomp(tid, STOP) {
            Ok(stopped) => return Ok(stopped),
            Err(error) => last = error,
        }
    }
    Err(Error::Calls(pid, last))
}

type Call<'a> = &'a dyn Fn(u64, [u64; 3]) -> Result<i64, ptrace::Error>;

fn make_and_fetch(pid: i32, process: &PidFd, call: Call<'_>) -> Result<OwnedFd, Error> {
    let made = |extra: i32| -> Result<Result<i64, Errno>, Error> {
        let flags = u64::from((libc::O_CLOEXEC | libc::O_NONBLOCK | extra).cast_unsigned());
        let result = call(libc::SYS_userfaultfd.cast_unsigned(), [flags, 0, 0]).map_err(|e| Error::Calls(pid, e))?;
        Ok(if result < 0 {
            Err(Errno::from_raw(i32::try_from(-result).unwrap_or(0)))
        } else {
            Ok(result)
        })
    };
    let made = match made(0)? {
        // One for faults of user mode is allowed to everybody, and is enough: writes by the kernel are noted all the same.
        Err(Errno::EPERM) => made(USER_MODE_ONLY)?,
        other => other,
    };
    let number = made.map_err(|e| Error::Refused(pid, e))?;
    // SAFETY: integers only; the returned descriptor is owned below.
    let fetched = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_fd().as_raw_fd(), number, 0) };
    let fetched = Errno::result(fetched).map_err(|e| Error::Fetch(pid, e));
    let closed = call(libc::SYS_close.cast_unsigned(), [number.cast_unsigned(), 0, 0]);
    let fd = i32::try_from(fetched?).map_err(|_| Error::Fetch(pid, Errno::EBADF))?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    closed.map_err(|e| Error::Calls(pid, e))?;
    Ok(fd)
}

/// Address of a system call instruction in the process's vDSO.
fn instruction(pid: i32) -> Result<u64, Error> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|e| Error::Read(pid, "the memory map", e))?;
    let (start, end) = maps
        .lines()
        .filter(|l| l.ends_with("[vdso]"))
        .find_map(|l| {
            let (start, end) = l.split_once(' ')?.0.split_once('-')?;
            Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
        })
        .ok_or(Error::NoInstruction(pid))?;
    let length = usize::try_from(end.saturating_sub(start)).unwrap_or(0).min(1 << 20);
    let mut code = vec![0; length];
    let memory = fs::File::open(format!("/proc/{pid}/mem")).map_err(|e| Error::Read(pid, "the memory", e))?;
    memory
        .read_exact_at(&mut code, start)
        .map_err(|e| Error::Read(pid, "the vDSO", e))?;
    let at = find_call_instruction(&code).ok_or(Error::NoInstruction(pid))?;
    Ok(start + at as u64)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader, Write as _},
        process::{Child, Command, Stdio},
    };

    use super::*;
    use crate::pagemap::{Pagemap, TRACKED, WRITTEN};

    /// A shell that writes to its own memory when told to, and sleeps in a system call in between.
    struct Shell(Child);

    impl Shell {
        fn start() -> Self {
            let mut shell = Self(
                Command::new("/bin/sh")
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .spawn()
                    .unwrap(),
            );
            // The parent of a process that executes a program goes on before that has all of its mappings.
            assert_eq!(shell.say("echo up"), "up");
            shell
        }

        fn pid(&self) -> i32 {
            self.0.id().cast_signed()
        }

        fn say(&mut self, line: &str) -> String {
            writeln!(self.0.stdin.as_mut().unwrap(), "{line}").unwrap();
            let mut answer = String::new();
            BufReader::new(self.0.stdout.as_mut().unwrap())
                .read_line(&mut answer)
                .unwrap();
            answer.trim().to_owned()
        }

        fn heap(&self) -> (u64, u64) {
            let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
            let line = maps.lines().find(|l| l.ends_with("[heap]")).unwrap();
            let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            (
                u64::from_str_radix(start, 16).unwrap(),
                u64::from_str_radix(end, 16).unwrap(),
            )
        }
    }

    impl Drop for Shell {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn in_process(pid: i32) -> Option<Userfaultfd> {
        match Userfaultfd::in_process(pid) {
            Ok(made) => Some(made),
            Err(Error::Features(why)) => {
                eprintln!("skipped: the kernel has no WP_ASYNC: {why}");
                None
            }
            Err(error) => panic!("{error:?}"),
        }
    }

    fn pages(found: &[crate::pagemap::Region], flag: u64) -> u64 {
        let with = found.iter().filter(|r| r.flags & flag != 0);
        with.map(|r| (r.end - r.start) / 4096).sum()
    }

    #[test]
    fn writes_of_another_process_are_noted_until_the_descriptor_is_closed() {
        let mut shell = Shell::start();
        assert_eq!(shell.say("x=1; echo $x"), "1");
        let before = fs::read_dir(format!("/proc/{}/fd", shell.pid())).unwrap().count();
        let Some(uffd) = in_process(shell.pid()) else { return };
        eprintln!("stopped for {:?}", uffd.stopped_for());
        // It kept nothing, and is not traced.
        let after = fs::read_dir(format!("/proc/{}/fd", shell.pid())).unwrap().count();
        assert_eq!(before, after);
        let (start, end) = shell.heap();
        uffd.register(start, end).unwrap();
        uffd.register(start, end).unwrap();
        let mut map = Pagemap::of(shell.pid()).unwrap();
        let mut found = Vec::new();
        assert!(map.held_and_protect(start, end, &mut found).unwrap());
        let all = pages(&found, WRITTEN);
        assert!(all > 0 && pages(&found, TRACKED) == all, "{found:?}");
        found.clear();
        assert!(map.held_and_protect(start, end, &mut found).unwrap());
        // It only waits for its standard input.
        assert_eq!(pages(&found, WRITTEN), 0, "{found:?}");
        assert_eq!(pages(&found, TRACKED), all);
        assert_eq!(shell.say("x=12345; echo $x"), "12345");
        found.clear();
        map.held(start, end, &mut found).unwrap();
        let written = pages(&found, WRITTEN);
        assert!(written > 0, "{found:?}");
        // As if we had died: everything counts as written, and the process runs on.
        drop(uffd);
        found.clear();
        map.held(start, end, &mut found).unwrap();
        assert!(
            pages(&found, TRACKED) == 0 && pages(&found, WRITTEN) >= all,
            "{found:?}"
        );
        assert_eq!(shell.say("echo $x"), "12345");
    }

    #[test]
    fn pages_before_one_that_is_not_tracked_count_as_written_although_they_were_protected() {
        let mut shell = Shell::start();
        assert_eq!(shell.say("x=1; echo $x"), "1");
        let Some(uffd) = in_process(shell.pid()) else { return };
        let (start, end) = shell.heap();
        let first = start + 4096;
        uffd.register(start, first).unwrap();
        let mut map = Pagemap::of(shell.pid()).unwrap();
        for _ in 0..2 {
            let mut found = Vec::new();
            assert!(!map.held_and_protect(start, end, &mut found).unwrap());
            assert!(found.iter().any(|r| r.start < first), "{found:?}");
            assert!(found.iter().all(|r| r.flags & WRITTEN != 0), "{found:?}");
        }
    }

    #[test]
    fn an_interrupted_call_goes_on_as_if_nothing_had_happened() {
        let started = Instant::now();
        // A sleep that is continued by a restart block. Interrupted without care it would return EINTR and say so.
        let child = Command::new("/bin/sleep")
            .arg("0.4")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id().cast_signed();
        while fs::read_to_string(format!("/proc/{pid}/syscall"))
            .is_ok_and(|s| !s.starts_with(&format!("{} ", libc::SYS_clock_nanosleep)))
        {
            assert!(started.elapsed() < Duration::from_secs(5));
        }
        let mut count = 0u32;
        while started.elapsed() < Duration::from_millis(300) {
            count += u32::from(in_process(pid).is_some());
        }
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let took = started.elapsed();
        assert!(took >= Duration::from_millis(400), "{took:?}");
        eprintln!("{count} times in {took:?}");
    }

    #[test]
    fn an_area_that_is_not_there_and_a_process_that_is_gone_are_said() {
        let shell = Shell::start();
        let pid = shell.pid();
        let Some(uffd) = in_process(pid) else { return };
        assert!(uffd.register(0x1000, 0x2000).is_err());
        let mut map = Pagemap::of(pid).unwrap();
        assert!(!uffd.is_gone());
        drop(shell);
        assert!(uffd.is_gone());
        assert!(uffd.register(0x1000, 0x2000).is_err());
        assert!(matches!(Userfaultfd::in_process(pid), Err(Error::Open(..))));
        // Nothing is found in the page map of a space that is gone, or it says so.
        let mut found = Vec::new();
        let _ = map.held(0, 1 << 46, &mut found);
        assert!(found.is_empty());
    }
}
