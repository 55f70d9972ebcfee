//! Missing pages of other processes: what a userfaultfd says, and how its pages are put in place.
//!
//! - An operation is refused with EAGAIN while the address space is changing, which is from the moment that a fork, mremap,
//!   munmap or madvise has begun until its event was read here. So who reads events in their order, and puts no page between
//!   reading an event and heeding it, never puts a page where it does not belong any more.
//! - A thread whose page turns out to be there already (EEXIST) or whose mapping is gone (ENOENT) is not woken by itself.
//! - When the last descriptor is closed, pages that are still missing silently become zeros.

#![expect(unsafe_code, reason = "userfaultfd(2) and its ioctls: nix does not wrap them")]

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use nix::errno::Errno;

use crate::kin::Entry;
use crate::shared_words::SharedWords;

/// `u64` words of one message.
pub const MESSAGE_WORDS: usize = 4;

const UFFD_API: u64 = 0xAA;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const REGISTER_MISSING: u64 = 1;
/// FORK, REMAP, REMOVE, UNMAP: those that CRIU asks for.
const EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;

/// What a userfaultfd has said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// A thread waits for the page at this address.
    Fault {
        /// The address, not rounded.
        address: u64,
    },
    /// The process has forked; the child's missing pages are asked for through this descriptor.
    Fork {
        /// New in the table of the process that read the message.
        child: i32,
    },
    /// Memory has moved.
    Remap {
        /// From here.
        from: u64,
        /// To here.
        to: u64,
        /// So many bytes.
        len: u64,
    },
    /// Memory is about to be dropped (madvise); the mapping stays.
    Remove {
        /// First byte.
        start: u64,
        /// Behind the last byte.
        end: u64,
    },
    /// Memory was unmapped.
    Unmap {
        /// First byte.
        start: u64,
        /// Behind the last byte.
        end: u64,
    },
    /// None, or one that was not asked for.
    Unknown(u8),
}

impl Message {
    /// From the words in which the kernel has written it.
    #[must_use]
    pub fn of(words: [u64; MESSAGE_WORDS]) -> Self {
        let [head, a, b, c] = words;
        match head.to_ne_bytes()[0] {
            0x12 => Self::Fault { address: b },
            0x13 => {
                let [w, x, y, z, ..] = a.to_ne_bytes();
                Self::Fork {
                    child: i32::from_ne_bytes([w, x, y, z]),
                }
            }
            0x14 => Self::Remap { from: a, to: b, len: c },
            0x15 => Self::Remove { start: a, end: b },
            0x16 => Self::Unmap { start: a, end: b },
            other => Self::Unknown(other),
        }
    }
}

/// Reads messages that are there into words `at..` (zeroed before, so that those of a reader that dies are found), at most `most`.
/// A descriptor that comes with a fork enters the table of the calling process in the same step.
///
/// # Errors
/// EAGAIN where there is none.
pub fn read(fd: BorrowedFd<'_>, into: &SharedWords, at: usize, most: usize) -> io::Result<usize> {
    let words = into
        .slice(at, most * MESSAGE_WORDS)
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    for word in words {
        word.store(0, std::sync::atomic::Ordering::Relaxed);
    }
    let bytes = most * MESSAGE_WORDS * size_of::<u64>();
    // SAFETY: `words` are so many bytes of atomics, which may be written behind our back; the kernel keeps no reference.
    let n = unsafe { libc::read(fd.as_raw_fd(), words.as_ptr().cast_mut().cast(), bytes) };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    Ok(n / (MESSAGE_WORDS * size_of::<u64>()))
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Zero {
    start: u64,
    len: u64,
    mode: u64,
    zeroed: i64,
}

/// Puts whole pages in place and wakes who waits for them. How many bytes were put, and why not the rest.
pub fn copy(fd: BorrowedFd<'_>, address: u64, pages: &[u8]) -> (usize, Option<Errno>) {
    let mut argument = Copy {
        dst: address,
        src: pages.as_ptr().addr() as u64,
        len: pages.len() as u64,
        mode: 0,
        copied: 0,
    };
    // SAFETY: `argument` has the layout of `struct uffdio_copy`, `pages` is readable for `len` bytes, both outlive the call. The
    // kernel writes only to pages that do not exist yet.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_COPY as _, &raw mut argument) };
    if result == 0 {
        return (pages.len(), None);
    }
    let errno = Errno::last();
    // Where the whole was refused `copied` is -errno.
    (usize::try_from(argument.copied).unwrap_or(0), Some(errno))
}

/// Puts one page (or several) of zeros in place and wakes who waits for them.
///
/// # Errors
/// As [`copy`].
pub fn zero(fd: BorrowedFd<'_>, address: u64, len: u64) -> Result<(), Errno> {
    let mut argument = Zero {
        start: address,
        len,
        mode: 0,
        zeroed: 0,
    };
    // SAFETY: `argument` has the layout of `struct uffdio_zeropage` and outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_ZEROPAGE as _, &raw mut argument) };
    Errno::result(result).map(drop)
}

/// Lets those who wait for these pages try again.
///
/// # Errors
/// The range is no range of a process.
pub fn wake(fd: BorrowedFd<'_>, address: u64, len: u64) -> Result<(), Errno> {
    let mut argument = [address, len];
    // SAFETY: `argument` has the layout of `struct uffdio_range` and outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_WAKE as _, argument.as_mut_ptr()) };
    Errno::result(result).map(drop)
}

/// Whether a change of the address space is under way whose event was not read yet. The kernel looks at this before it looks
/// at the range, and there is no page at address 0.
#[must_use]
pub fn is_changing(fd: BorrowedFd<'_>) -> bool {
    zero(fd, 0, 4096) == Err(Errno::EAGAIN)
}

/// A userfaultfd of the calling process that says all that CRIU's say.
///
/// # Errors
/// The kernel has none, or does not let us.
pub fn open() -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed; the returned descriptor is owned below.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    let fd = i32::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut argument = [UFFD_API, EVENTS, 0];
    // SAFETY: `argument` has the layout of `struct uffdio_api` and outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API as _, argument.as_mut_ptr()) };
    Errno::result(result)?;
    Ok(fd)
}

/// Has missing pages of a mapping of the process that [`open`]ed it asked for.
///
/// # Errors
/// It is no such mapping.
pub fn register(fd: BorrowedFd<'_>, address: u64, len: u64) -> io::Result<()> {
    let mut argument = [address, len, REGISTER_MISSING, 0];
    // SAFETY: `argument` has the layout of `struct uffdio_register` and outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER as _, argument.as_mut_ptr()) };
    Errno::result(result)?;
    Ok(())
}

/// The descriptor of a [`Message::Fork`].
#[must_use]
pub fn child(number: i32) -> Option<Entry> {
    Entry::of_number(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        os::fd::AsFd as _,
        time::{Duration, Instant},
    };

    const PAGE: usize = 4096;

    struct Memory(usize);

    impl Memory {
        fn pages(n: usize) -> Self {
            // SAFETY: a new anonymous mapping.
            let at = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    n * PAGE,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
            assert_ne!(at, libc::MAP_FAILED);
            Self(at.addr())
        }

        fn byte(&self, page: usize) -> u8 {
            let at = std::ptr::with_exposed_provenance::<u8>(self.0 + page * PAGE);
            // SAFETY: inside a mapping that is never unmapped.
            unsafe { at.read_volatile() }
        }
    }

    fn next(fd: BorrowedFd<'_>, words: &SharedWords) -> Message {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            match read(fd, words, 0, 1) {
                Ok(1) => {
                    let all: Vec<u64> = (0..MESSAGE_WORDS).map(|i| words.get(i)).collect();
                    return Message::of(all.try_into().unwrap());
                }
                Ok(n) => panic!("{n} messages"),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    assert!(Instant::now() < end, "no message");
                    std::thread::yield_now();
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn host_missing_pages_are_asked_for_and_events_come_in_their_order() {
        let fd = match open() {
            Ok(fd) => fd,
            Err(error) => {
                eprintln!("skipped: no userfaultfd: {error}");
                return;
            }
        };
        let memory = Memory::pages(8);
        let base = memory.0 as u64;
        register(fd.as_fd(), base, 8 * PAGE as u64).unwrap();
        let words = SharedWords::new(64).unwrap();
        assert!(!is_changing(fd.as_fd()));
        assert_eq!(copy(fd.as_fd(), base, &[7; PAGE]), (PAGE, None));
        assert_eq!(copy(fd.as_fd(), base, &[8; 2 * PAGE]), (0, Some(Errno::EEXIST)));
        assert_eq!(memory.byte(0), 7);
        // The part before a page that is there is put.
        assert_eq!(copy(fd.as_fd(), base + 3 * PAGE as u64, &[3; PAGE]), (PAGE, None));
        assert_eq!(copy(fd.as_fd(), base + 2 * PAGE as u64, &[2; 2 * PAGE]).0, PAGE);

        std::thread::scope(|scope| {
            let reader = scope.spawn(|| (memory.byte(1), memory.byte(4)));
            assert_eq!(
                next(fd.as_fd(), &words),
                Message::Fault {
                    address: base + PAGE as u64
                }
            );
            copy(fd.as_fd(), base + PAGE as u64, &[1; PAGE]);
            assert!(matches!(next(fd.as_fd(), &words), Message::Fault { .. }));
            zero(fd.as_fd(), base + 4 * PAGE as u64, PAGE as u64).unwrap();
            assert_eq!(reader.join().unwrap(), (1, 0));
        });
        assert_eq!(zero(fd.as_fd(), base, PAGE as u64), Err(Errno::EEXIST));

        std::thread::scope(|scope| {
            let dropper = scope.spawn(|| {
                let at = std::ptr::with_exposed_provenance_mut(memory.0 + PAGE);
                // SAFETY: pages of our own mapping.
                unsafe { libc::madvise(at, 2 * PAGE, libc::MADV_DONTNEED) }
            });
            let end = Instant::now() + Duration::from_secs(10);
            while !is_changing(fd.as_fd()) {
                assert!(Instant::now() < end);
            }
            // Nothing can be put before the event was read.
            assert_eq!(
                copy(fd.as_fd(), base + 6 * PAGE as u64, &[6; PAGE]).1,
                Some(Errno::EAGAIN)
            );
            let (start, end) = (base + PAGE as u64, base + 3 * PAGE as u64);
            assert_eq!(next(fd.as_fd(), &words), Message::Remove { start, end });
            assert_eq!(dropper.join().unwrap(), 0);
        });
        assert!(!is_changing(fd.as_fd()));

        std::thread::scope(|scope| {
            let forker = scope.spawn(|| {
                // SAFETY: the child only reads memory and ends.
                let pid = unsafe { libc::fork() };
                if pid == 0 {
                    // SAFETY: ends the child.
                    unsafe { libc::_exit(i32::from(memory.byte(0)) * 10 + i32::from(memory.byte(7))) }
                }
                let mut status = 0;
                // SAFETY: a child of ours, and a place for its status.
                unsafe { libc::waitpid(pid, &raw mut status, 0) };
                libc::WEXITSTATUS(status)
            });
            let Message::Fork { child: number } = next(fd.as_fd(), &words) else {
                panic!("no fork")
            };
            let of_child = child(number).unwrap();
            // Page 0 came with the page tables, page 7 is still missing and is asked for through the child's own descriptor.
            let address = base + 7 * PAGE as u64;
            assert_eq!(next(of_child.as_fd(), &words), Message::Fault { address });
            assert_eq!(copy(of_child.as_fd(), address, &[5; PAGE]), (PAGE, None));
            assert_eq!(forker.join().unwrap(), 75);
            // There is nobody left to put pages for.
            let gone = copy(of_child.as_fd(), address, &[5; PAGE]).1;
            assert!(matches!(gone, Some(Errno::ESRCH | Errno::ENOENT)), "{gone:?}");
            of_child.close();
        });
    }

    #[test]
    fn the_kernel_s_messages_are_read() {
        let word = |b: u8| u64::from_ne_bytes([b, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(
            Message::of([word(0x12), 1, 0x1234, 0]),
            Message::Fault { address: 0x1234 }
        );
        assert_eq!(
            Message::of([word(0x14), 1, 2, 3]),
            Message::Remap { from: 1, to: 2, len: 3 }
        );
        assert_eq!(Message::of([word(0x15), 1, 2, 3]), Message::Remove { start: 1, end: 2 });
        assert_eq!(Message::of([word(0x16), 1, 2, 3]), Message::Unmap { start: 1, end: 2 });
        assert_eq!(Message::of([0; 4]), Message::Unknown(0));
    }
}
