//! Memory of the own process, with what programs do to theirs. For programs that test what becomes of it when they are moved.

#![expect(unsafe_code, reason = "mappings and plain memory access")]

use std::io;

use nix::errno::Errno;

/// Bytes of a page here; on larger pages several of these are one.
pub const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

/// A private anonymous mapping, or what is left of one.
#[derive(Debug)]
pub struct Memory {
    at: usize,
    pages: usize,
}

/// What is said about memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Drop it: zeros from now on.
    DontNeed,
    /// It may be dropped, until it is written again.
    Free,
    /// Huge pages.
    Huge,
    /// A child gets zeros.
    WipeOnFork,
}

impl Memory {
    /// New pages, at this address where it is not 0 and nothing is there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn map(address: usize, pages: usize) -> io::Result<Self> {
        let fixed = if address == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
        // SAFETY: nothing that exists is replaced.
        let at = unsafe {
            libc::mmap(
                std::ptr::with_exposed_provenance_mut(address),
                pages * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | fixed,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            at: at.expose_provenance(),
            pages,
        })
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> usize {
        self.at
    }

    /// Its pages.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages
    }

    fn word(&self, page: usize, word: usize) -> *mut u64 {
        assert!(page < self.pages && word < WORDS, "outside of the mapping");
        std::ptr::with_exposed_provenance_mut(self.at + page * PAGE + word * 8)
    }

    /// Reads a word of a page.
    #[must_use]
    pub fn read(&self, page: usize, word: usize) -> u64 {
        // SAFETY: inside of our mapping, aligned; all values are valid.
        unsafe { self.word(page, word).read_volatile() }
    }

    /// Writes a word of a page.
    pub fn write(&mut self, page: usize, word: usize, value: u64) {
        // SAFETY: inside of our mapping, aligned, borrowed alone.
        unsafe { self.word(page, word).write_volatile(value) }
    }

    fn range(&self, page: usize, pages: usize) -> *mut libc::c_void {
        assert!(
            pages > 0 && page.checked_add(pages).is_some_and(|end| end <= self.pages),
            "outside of the mapping"
        );
        std::ptr::with_exposed_provenance_mut(self.at + page * PAGE)
    }

    /// Says something about pages.
    ///
    /// # Errors
    /// The kernel's.
    pub fn advise(&mut self, page: usize, pages: usize, advice: Advice) -> io::Result<()> {
        let advice = match advice {
            Advice::DontNeed => libc::MADV_DONTNEED,
            Advice::Free => libc::MADV_FREE,
            Advice::Huge => libc::MADV_HUGEPAGE,
            Advice::WipeOnFork => libc::MADV_WIPEONFORK,
        };
        // SAFETY: pages of our own that nobody else refers to.
        let result = unsafe { libc::madvise(self.range(page, pages), pages * PAGE, advice) };
        Ok(Errno::result(result).map(drop)?)
    }

    /// Cuts off the pages from `page` on: they are a mapping of their own.
    #[must_use]
    pub fn split_off(&mut self, page: usize) -> Self {
        let page = page.min(self.pages);
        let rest = Self {
            at: self.at + page * PAGE,
            pages: self.pages - page,
        };
        self.pages = page;
        rest
    }

    /// Moves the pages to another address, where nothing may be; nothing of them stays.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remap(&mut self, address: usize) -> io::Result<()> {
        // Taken first, so that nothing else of this process can be replaced.
        let place = Self::map(address, self.pages)?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let len = self.pages * PAGE;
        // SAFETY: from our mapping onto one of ours that nobody has seen.
        let at = unsafe { libc::mremap(self.range(0, self.pages), len, len, flags, place.range(0, place.pages)) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let gone = std::mem::replace(self, place);
        std::mem::forget(gone);
        Ok(())
    }

    /// Takes write permission away, or gives it back.
    ///
    /// # Errors
    /// The kernel's.
    pub fn protect(&mut self, page: usize, pages: usize, writable: bool) -> io::Result<()> {
        let protection = if writable {
            libc::PROT_READ | libc::PROT_WRITE
        } else {
            libc::PROT_READ
        };
        // SAFETY: pages of our own; whoever writes them meanwhile is killed, which is what was asked for.
        let result = unsafe { libc::mprotect(self.range(page, pages), pages * PAGE, protection) };
        Ok(Errno::result(result).map(drop)?)
    }

    /// Lets the kernel write: `bytes` of a file or socket into the start of a page.
    ///
    /// # Errors
    /// The kernel's.
    pub fn fill_from(&mut self, page: usize, from: std::os::fd::BorrowedFd<'_>) -> io::Result<usize> {
        use std::os::fd::AsRawFd as _;
        // SAFETY: a page of our own, borrowed alone.
        let n = unsafe { libc::read(from.as_raw_fd(), self.range(page, 1), PAGE) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.pages > 0 {
            // SAFETY: our mapping, which nobody refers to any more.
            unsafe { libc::munmap(self.range(0, self.pages), self.pages * PAGE) };
        }
    }
}

/// A child that runs `work` and ends with the status that it returns, 101 where it panics.
///
/// # Errors
/// The kernel's.
pub fn fork(work: impl FnOnce() -> i32) -> io::Result<i32> {
    // SAFETY: by glibc's fork; what is used of other threads' state is the caller's matter, as in every program that forks.
    let pid = unsafe { libc::fork() };
    match pid {
        0 => {
            let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(101);
            // SAFETY: ends the child.
            unsafe { libc::_exit(status) }
        }
        pid if pid > 0 => Ok(pid),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_keep_what_is_written_until_they_are_dropped() {
        let mut memory = Memory::map(0, 4).unwrap();
        memory.write(1, 7, 9);
        memory.write(2, 0, 8);
        let mut rest = memory.split_off(2);
        let address = rest.address() + (1 << 30);
        rest.remap(address).unwrap();
        assert_eq!((memory.read(1, 7), rest.read(0, 0), rest.address()), (9, 8, address));
        memory.advise(0, 2, Advice::DontNeed).unwrap();
        assert_eq!(memory.read(1, 7), 0);
        assert!(Memory::map(address, 1).is_err(), "something is there");
    }
}
