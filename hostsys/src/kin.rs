//! Processes that share one table of descriptors: what one of them opens or is given, all have at once, and it stays open until
//! the last of them ends. So a descriptor that comes out of a `read` (a fork's userfaultfd) cannot be lost with its reader.

#![expect(unsafe_code, reason = "clone(2) with CLONE_FILES; descriptors by number")]

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, FromRawFd as _, IntoRawFd as _, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
};

/// A place in the shared table. Copies name the same place; nothing closes it but [`Entry::close`] and the end of the last process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry(i32);

impl Entry {
    /// Gives a descriptor to the table.
    #[must_use]
    pub fn of(fd: OwnedFd) -> Self {
        Self(fd.into_raw_fd())
    }

    /// By its number, where there is one open.
    #[must_use]
    pub fn of_number(number: i32) -> Option<Self> {
        // SAFETY: F_GETFD takes no further argument and changes nothing.
        let open = number >= 0 && unsafe { libc::fcntl(number, libc::F_GETFD) } >= 0;
        open.then_some(Self(number))
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> i32 {
        self.0
    }

    /// Closes it for all processes that share the table.
    pub fn close(self) {
        // SAFETY: an entry was opened and given away; the caller says that nobody uses it any more.
        drop(unsafe { OwnedFd::from_raw_fd(self.0) });
    }
}

impl AsFd for Entry {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: an entry is open until it is closed on purpose.
        unsafe { BorrowedFd::borrow_raw(self.0) }
    }
}

/// Splits off a process that shares the table of descriptors and nothing else that changes; it runs `work` and ends with the
/// status that `work` returns (101 where it panics), without destructors. Returns its pid.
///
/// # Errors
/// The caller has several threads (another one's locks would stay held in the child), or the kernel refused.
pub fn split(work: impl FnOnce() -> i32) -> io::Result<i32> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("a process with several threads cannot be split"));
    }
    let flags = libc::c_long::from(libc::CLONE_FILES | libc::SIGCHLD);
    let zero: libc::c_long = 0;
    // SAFETY: without CLONE_VM and without a stack this is fork(2) but for the table; there is one thread, so no lock of ours or
    // of the libc is held by anybody who does not exist in the child.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, zero, zero, zero, zero) };
    match i32::try_from(pid) {
        Ok(0) => {
            let status = catch_unwind(AssertUnwindSafe(work)).unwrap_or(101);
            // SAFETY: ends the process at once; its destructors would close what belongs to all.
            unsafe { libc::_exit(status) }
        }
        Ok(pid) if pid > 0 => Ok(pid),
        Ok(_) | Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_is_not_split() {
        // The test harness has at least one thread besides this one.
        assert!(split(|| 0).is_err());
    }

    #[test]
    fn an_entry_is_open_until_it_is_closed() {
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        let entry = Entry::of(OwnedFd::from(a));
        assert_eq!(Entry::of_number(entry.number()), Some(entry));
        entry.close();
        assert_eq!(Entry::of_number(-1), None);
    }
}
