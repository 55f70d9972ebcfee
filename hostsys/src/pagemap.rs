//! Which pages of a process are there and which were written since they were last protected: the ioctl `PAGEMAP_SCAN` on
//! `/proc/PID/pagemap` (Linux 6.7).

#![expect(unsafe_code, reason = "an ioctl that nix does not wrap")]

use std::{fs::File, io, os::fd::AsRawFd as _, path::Path, sync::OnceLock};

use nix::errno::Errno;

/// The page belongs to an area that a userfaultfd tracks with `WP_ASYNC`. A property of the area, not of the page.
pub const TRACKED: u64 = 1 << 0;
/// Written since it was last protected; every page of an area that is not tracked counts as written.
pub const WRITTEN: u64 = 1 << 1;
/// In memory.
pub const PRESENT: u64 = 1 << 3;
/// In swap; also what the kernel notes in the place of a page.
pub const SWAPPED: u64 = 1 << 4;
/// The kernel's page of zeros.
pub const ZERO: u64 = 1 << 5;
/// A guard that a program put there with `MADV_GUARD_INSTALL` (known to Linux 6.15 and later).
pub const GUARD: u64 = 1 << 8;

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
/// Regions that one call may return.
const REGIONS: usize = 8192;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Consecutive pages that have the same flags. `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Address of the first byte.
    pub start: u64,
    /// Address behind the last byte.
    pub end: u64,
    /// Which of the flags they have that were asked for.
    pub flags: u64,
}

/// The page map of an address space; the space itself, not whatever the process has later.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    room: Vec<Region>,
}

impl Pagemap {
    /// Opens that of a process.
    ///
    /// # Errors
    /// It has ended, or may not be looked at.
    pub fn of(pid: i32) -> io::Result<Self> {
        Self::at(Path::new(&format!("/proc/{pid}/pagemap")))
    }

    fn at(path: &Path) -> io::Result<Self> {
        Ok(Self {
            file: File::open(path)?,
            room: Vec::new(),
        })
    }

    /// Adds to `found` all pages from `start` to `end` that hold something: in memory or in swap, neither the kernel's page
    /// of zeros nor a guard. Their flags say [`WRITTEN`] and [`TRACKED`].
    ///
    /// # Errors
    /// ESRCH: the address space is gone.
    pub fn held(&mut self, start: u64, end: u64, found: &mut Vec<Region>) -> io::Result<()> {
        self.scan(0, start, end, found)
    }

    /// As [`Pagemap::held`], and what was written is protected again, each page in the same moment in which it is looked
    /// at: a write that comes later makes it written again. False: something there is not tracked (any more). The kernel
    /// ends with EPERM when it comes to that, and does not say what it has protected until then: all pages are given as
    /// written, or one that was written and is protected now would never be seen again.
    ///
    /// # Errors
    /// ESRCH: the address space is gone.
    pub fn held_and_protect(&mut self, start: u64, end: u64, found: &mut Vec<Region>) -> io::Result<bool> {
        let mut here = Vec::new();
        let scanned = self.scan(PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, start, end, &mut here);
        let tracked = match scanned {
            Ok(()) => true,
            Err(error) if error.raw_os_error() == Some(Errno::EPERM as i32) => {
                here.clear();
                self.held(start, end, &mut here)?;
                here.iter_mut().for_each(|region| region.flags |= WRITTEN);
                false
            }
            Err(error) => return Err(error),
        };
        here.into_iter().for_each(|region| add(found, region));
        Ok(tracked)
    }

    /// Whether the area at an address is tracked.
    ///
    /// # Errors
    /// ESRCH: the address space is gone.
    pub fn is_tracked(&mut self, address: u64) -> io::Result<bool> {
        let page =
            u64::try_from(nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.unwrap_or(4096)).unwrap_or(4096);
        match self.scan(PM_SCAN_CHECK_WPASYNC, address, address + page, &mut Vec::new()) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(Errno::EPERM as i32) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn scan(&mut self, flags: u64, start: u64, end: u64, found: &mut Vec<Region>) -> io::Result<()> {
        let without = ZERO | if knows_guards() { GUARD } else { 0 };
        let arg = ScanArg {
            flags,
            category_inverted: without,
            category_mask: without,
            category_anyof_mask: PRESENT | SWAPPED,
            return_mask: WRITTEN | TRACKED,
            ..ScanArg::default()
        };
        self.run(arg, start, end, found)
    }

    fn run(&mut self, arg: ScanArg, start: u64, end: u64, found: &mut Vec<Region>) -> io::Result<()> {
        self.room.resize(REGIONS, Region::default());
        let mut at = start;
        while at < end {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                start: at,
                end,
                vec: self.room.as_mut_ptr().addr() as u64,
                vec_len: self.room.len() as u64,
                ..arg
            };
            // SAFETY: `arg` has the layout of `struct pm_scan_arg`; `vec` names as many regions as `vec_len` says, of the
            // layout of `struct page_region`; both outlive the call.
            let count = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut arg) };
            match Errno::result(count) {
                Ok(count) => {
                    let count = usize::try_from(count).unwrap_or(0);
                    for region in self.room.get(..count).unwrap_or_default() {
                        add(found, *region);
                    }
                }
                // Also EINTR, which only a deadly signal brings.
                Err(error) => return Err(error.into()),
            }
            if arg.walk_end <= at {
                break;
            }
            at = arg.walk_end;
        }
        Ok(())
    }
}

/// Adds a region, as part of the last one where it continues that.
fn add(found: &mut Vec<Region>, region: Region) {
    match found.last_mut() {
        Some(last) if last.end == region.start && last.flags == region.flags => last.end = region.end,
        _ => found.push(region),
    }
}

/// Whether this kernel tells guards: an unknown flag is an invalid argument.
fn knows_guards() -> bool {
    static KNOWS: OnceLock<bool> = OnceLock::new();
    *KNOWS.get_or_init(|| {
        let arg = ScanArg {
            category_mask: GUARD,
            return_mask: GUARD,
            ..ScanArg::default()
        };
        let own = Pagemap::of(std::process::id().cast_signed());
        own.is_ok_and(|mut own| own.run(arg, 0, 4096, &mut Vec::new()).is_ok())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_that_continue_each_other_are_one() {
        let region = |start, end, flags| Region { start, end, flags };
        let mut found = Vec::new();
        for r in [region(0, 1, 2), region(1, 3, 2), region(3, 4, 0), region(5, 6, 0)] {
            add(&mut found, r);
        }
        assert_eq!(found, [region(0, 3, 2), region(3, 4, 0), region(5, 6, 0)]);
    }

    #[test]
    fn pages_of_our_own_are_found_and_untouched_ones_are_not() {
        let mut memory = vec![0u8; 64 << 12];
        let start = (memory.as_ptr().addr() as u64).next_multiple_of(4096);
        // A large allocation is fresh memory of the kernel: nothing there before the first write.
        let page = usize::try_from(start - memory.as_ptr().addr() as u64).unwrap() + 3 * 4096;
        memory[page] = 1;
        let mut found = Vec::new();
        let mut own = match Pagemap::of(std::process::id().cast_signed()) {
            Ok(own) => own,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        if let Err(error) = own.held(start, start + (32 << 12), &mut found) {
            return eprintln!("skipped: {error}");
        }
        let at = start + (3 << 12);
        assert!(found.iter().any(|r| r.start <= at && at < r.end), "{found:?}");
        assert!(found.iter().all(|r| r.flags & TRACKED == 0), "{found:?}");
        assert_eq!(memory.iter().map(|b| u64::from(*b)).sum::<u64>(), 1);
    }
}
