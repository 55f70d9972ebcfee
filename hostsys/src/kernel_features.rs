//! What the kernel can do, found by trying it on ourselves and never by its version.

#![expect(unsafe_code, reason = "system calls and ioctls that nix does not wrap")]

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::{pagemap::Pagemap, sock_diag, userfaultfd};

/// One feature: the name under which it is published, and whether it worked.
pub type Found = (&'static str, bool);

/// Tries everything. Takes a few milliseconds; opens nothing that it does not close.
#[must_use]
pub fn probe() -> Vec<Found> {
    vec![
        ("userfaultfd-wp-async", userfaultfd_wp_async()),
        ("pagemap-scan", pagemap_scan()),
        ("soft-dirty", soft_dirty()),
        ("tcp-repair", tcp_repair()),
        ("time-namespace", time_namespace()),
        ("inet-diag-destroy", sock_diag::can_destroy()),
        ("nftables", sock_diag::has_nftables()),
        ("pidfd", pidfd()),
    ]
}

fn userfaultfd_wp_async() -> bool {
    // SAFETY: no pointers are passed; the returned descriptor is owned below.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    let Ok(fd) = i32::try_from(fd) else { return false };
    if fd < 0 {
        return false;
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    userfaultfd::agree(&fd).is_ok()
}

fn pagemap_scan() -> bool {
    let Some(page) = Page::new() else { return false };
    page.write();
    let mut found = Vec::new();
    let scanned = Pagemap::of(std::process::id().cast_signed())
        .and_then(|mut map| map.held(page.address(), page.address() + page.len(), &mut found));
    scanned.is_ok() && found.first().is_some_and(|region| region.start == page.address())
}

/// Bit 55 of a pagemap entry: written since the last reset. A kernel without it accepts the reset all the same, so only
/// the bit itself tells.
fn soft_dirty() -> bool {
    let Some(page) = Page::new() else { return false };
    page.write();
    let reset = File::options()
        .write(true)
        .open("/proc/self/clear_refs")
        .and_then(|mut f| f.write_all(b"4"));
    if reset.is_err() || page_flags(&page).is_none_or(|flags| flags & (1 << 55) != 0) {
        return false;
    }
    page.write();
    page_flags(&page).is_some_and(|flags| flags & (1 << 55) != 0)
}

fn page_flags(page: &Page) -> Option<u64> {
    let mut pagemap = File::open("/proc/self/pagemap").ok()?;
    pagemap.seek(SeekFrom::Start(page.address() / page.len() * 8)).ok()?;
    let mut entry = [0; 8];
    pagemap.read_exact(&mut entry).ok()?;
    Some(u64::from_ne_bytes(entry))
}

/// One anonymous page of ours.
struct Page {
    at: *mut u8,
    len: usize,
}

impl Page {
    fn new() -> Option<Page> {
        // SAFETY: sysconf has no preconditions.
        let len = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()?;
        // SAFETY: a new private anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        (at != libc::MAP_FAILED).then_some(Page { at: at.cast(), len })
    }

    fn write(&self) {
        // SAFETY: `at` points to `len` writable bytes that only we use. Volatile, so that the write is made.
        unsafe { self.at.write_volatile(1) }
    }

    fn address(&self) -> u64 {
        self.at.addr() as u64
    }

    fn len(&self) -> u64 {
        self.len as u64
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it any more.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

fn tcp_repair() -> bool {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let Ok(socket) = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None) else {
        return false;
    };
    let on: libc::c_int = 1;
    // SAFETY: `on` is an int, of the length that is given.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        ) == 0
    }
}

const CLONE_NEWTIME: libc::c_int = 0x80;

/// Made in a child, which ends at once: the namespace is that of *future* children, so our own must not change.
fn time_namespace() -> bool {
    // SAFETY: the child calls only unshare and _exit, which are safe after a fork in a program with threads.
    unsafe {
        match libc::fork() {
            0 => libc::_exit(libc::c_int::from(libc::unshare(CLONE_NEWTIME) != 0)),
            child if child > 0 => {
                let mut status = 0;
                while libc::waitpid(child, &raw mut status, 0) < 0 {
                    if *libc::__errno_location() != libc::EINTR {
                        return false;
                    }
                }
                libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
            }
            _ => false,
        }
    }
}

fn pidfd() -> bool {
    // SAFETY: no pointers; the descriptor is owned below.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) };
    match i32::try_from(fd) {
        Ok(fd) if fd >= 0 => {
            // SAFETY: the kernel has just given us this descriptor; nobody else has it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_feature_is_named_once() {
        let found = probe();
        let mut names: Vec<_> = found.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), found.len());
        // Every kernel that runs this has pidfds.
        assert!(found.contains(&("pidfd", true)), "{found:?}");
        eprintln!("{found:?}");
    }
}
