//! Free memory that is made ready before it is needed.
//!
//! A page that nobody has used for long may have been given back to the hypervisor (free page reporting, a balloon): its first
//! touch then costs ten times as much as a warm page's. Pages that were just touched and freed are what the kernel hands out
//! next. So memory that a freeze will need is taken before, held, and freed when the freeze begins; until then it is also
//! certain to be there.

#![expect(unsafe_code, reason = "raw system calls: this crate is where they live")]

use std::{
    ffi::c_void,
    io,
    num::NonZeroUsize,
    ptr::NonNull,
    time::{Duration, Instant},
};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

/// Touched in pieces of this size, in bytes: between two of them the time is looked at.
const PIECE: usize = 16 << 20;
/// `MADV_POPULATE_WRITE` (kernel 5.14): nix has no name for it.
const MADV_POPULATE_WRITE: i32 = 23;

/// Memory that is held ready; freed when dropped, which takes milliseconds per GiB.
#[derive(Debug)]
pub struct WarmMemory {
    start: NonNull<c_void>,
    len: usize,
    touched: u64,
}

// SAFETY: nobody reads or writes through the pointer; it only names a mapping, which any thread may unmap.
unsafe impl Send for WarmMemory {}
// SAFETY: as above; a shared reference gives nothing but a number.
unsafe impl Sync for WarmMemory {}

impl WarmMemory {
    /// Touches up to `bytes`, as many as are done within the time. Blocking.
    ///
    /// # Errors
    /// The kernel has no room for the mapping, or refuses to fill it.
    pub fn take(bytes: u64, within: Duration) -> io::Result<Self> {
        let wanted = usize::try_from(bytes).unwrap_or(usize::MAX).next_multiple_of(PIECE);
        let len = NonZeroUsize::new(wanted).ok_or_else(|| io::Error::other("nothing to take"))?;
        // SAFETY: a new anonymous mapping, placed by the kernel.
        let start = unsafe {
            mmap_anonymous(
                None,
                len,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
            )
        }?;
        let mut memory = Self {
            start,
            len: wanted,
            touched: 0,
        };
        // Huge pages are touched and freed faster. Without them it works as well.
        // SAFETY: our own mapping, as long as it was made.
        let _ = unsafe { madvise(start, wanted, MmapAdvise::MADV_HUGEPAGE) };
        let begun = Instant::now();
        for offset in (0..wanted).step_by(PIECE) {
            if begun.elapsed() > within {
                break;
            }
            // SAFETY: a part of our own mapping, of which nothing is kept.
            let failed = unsafe { libc::madvise(start.as_ptr().byte_add(offset), PIECE, MADV_POPULATE_WRITE) } != 0;
            if failed {
                return Err(io::Error::last_os_error());
            }
            memory.touched += PIECE as u64;
        }
        Ok(memory)
    }

    /// How many bytes are ready.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.touched
    }
}

impl Drop for WarmMemory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, to which nothing refers any more.
        let _ = unsafe { munmap(self.start, self.len) };
    }
}

/// Gives back to the kernel what the allocator keeps after a lot was in use. Takes milliseconds.
pub fn give_back() {
    // SAFETY: looks at the allocator's own lists only; where there is no glibc it is not called.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resident_kib() -> u64 {
        let text = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().trim().parse().unwrap()
    }

    #[test]
    fn memory_is_there_while_it_is_held_and_no_longer() {
        let before = resident_kib();
        let memory = WarmMemory::take(40 << 20, Duration::from_secs(60)).unwrap();
        assert_eq!(memory.bytes(), 48 << 20, "in whole pieces");
        assert!(resident_kib() >= before + (40 << 10));
        drop(memory);
        assert!(resident_kib() < before + (24 << 10));
    }

    #[test]
    fn it_takes_no_longer_than_allowed() {
        let memory = WarmMemory::take(1 << 40, Duration::ZERO).unwrap();
        assert!(memory.bytes() <= PIECE as u64);
    }

    #[test]
    fn nothing_is_nothing_to_take() {
        assert!(WarmMemory::take(0, Duration::ZERO).is_err());
    }
}
