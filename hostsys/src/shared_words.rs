//! Memory that processes share which were split from one another: words that any of them reads and writes at any time, and that
//! stay when one of them is killed.

#![expect(unsafe_code, reason = "a shared mapping, seen as atomics")]

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering},
};

/// So many words, zero at first. Memory is used only for those that were written.
#[derive(Debug)]
pub struct SharedWords {
    words: &'static [AtomicU64],
}

impl SharedWords {
    /// Maps them. They stay until the last process that has them ends.
    ///
    /// # Errors
    /// No address space.
    pub fn new(count: usize) -> io::Result<Self> {
        let bytes = count.max(1) * size_of::<AtomicU64>();
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing of ours.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the mapping is page-aligned, has so many bytes, is zero (a valid atomic), is never unmapped, and is only ever
        // seen through atomics.
        let words = unsafe { std::slice::from_raw_parts(at.cast::<AtomicU64>(), count) };
        Ok(Self { words })
    }

    /// Words `at..at + count`.
    #[must_use]
    pub fn slice(&self, at: usize, count: usize) -> Option<&'static [AtomicU64]> {
        self.words.get(at..at.checked_add(count)?)
    }

    /// Reads one; what is not there is zero.
    #[must_use]
    pub fn get(&self, at: usize) -> u64 {
        self.words.get(at).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Writes one; what is not there is not written.
    pub fn set(&self, at: usize, value: u64) {
        if let Some(word) = self.words.get(at) {
            word.store(value, Ordering::Release);
        }
    }

    /// Adds to one.
    pub fn add(&self, at: usize, value: u64) {
        if let Some(word) = self.words.get(at) {
            word.fetch_add(value, Ordering::AcqRel);
        }
    }
}
