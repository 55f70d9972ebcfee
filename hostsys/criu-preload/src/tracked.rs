//! Leaves memory out of CRIU's images that the agent copies itself: areas that its userfaultfd tracks.
//!
//! CRIU asks the kernel which pages a process has by the ioctl `PAGEMAP_SCAN`. Where the agent says so by an environment
//! variable, that question gets one more condition: only pages of areas that are not tracked. The kernel then skips such
//! areas as a whole, so the question does not even take the time to walk through them. Other questions (for guard pages) are
//! asked as they came, and so is one that is not understood.

use core::ffi::{c_char, c_int, c_long, c_ulong, c_void};

use crate::raw;

/// Set by the agent for a dump of tracked processes.
const VARIABLE: &core::ffi::CStr = c"PEREGRINE_SKIP_TRACKED";
const PAGEMAP_SCAN: u32 = 0xc060_6610;
const WPALLOWED: u64 = 1 << 0;
const PRESENT: u64 = 1 << 3;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

unsafe extern "C" {
    fn getenv(name: *const c_char) -> *mut c_char;
}

/// Makes the call, with the condition where it belongs; the result as the kernel returns it.
///
/// # Safety
/// As for ioctl(2).
pub(crate) unsafe fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_long {
    let plain = |argument: *mut c_void| {
        // SAFETY: passed on exactly as the caller gave it, or with a struct of ours of the same layout.
        unsafe { raw::call(raw::IOCTL, [fd.into(), request as c_long, argument as c_long, 0, 0, 0]) }
    };
    // SAFETY: the name ends in NUL. CRIU does not change its environment while it asks.
    if request as u32 != PAGEMAP_SCAN || argument.is_null() || unsafe { getenv(VARIABLE.as_ptr()) }.is_null() {
        return plain(argument);
    }
    let theirs = argument.cast::<ScanArg>();
    // SAFETY: the caller gave a `struct pm_scan_arg`, whose first member is its size; the kernel reads it too.
    let asked = unsafe { theirs.read_unaligned() };
    let Some(mut ours) = without_tracked(asked) else {
        return plain(argument);
    };
    let result = plain((&raw mut ours).cast());
    if result >= 0 {
        // SAFETY: as above. All else that the kernel writes is in the caller's own list of regions.
        unsafe { (&raw mut (*theirs).walk_end).write_unaligned(ours.walk_end) };
    }
    result
}

/// The same question, for pages of areas that are not tracked; none where it is not about pages.
fn without_tracked(asked: ScanArg) -> Option<ScanArg> {
    let knows = asked.size == size_of::<ScanArg>() as u64;
    let about_pages = asked.flags == 0 && asked.return_mask & PRESENT != 0;
    let about_areas = (asked.category_mask | asked.category_inverted | asked.category_anyof_mask) & WPALLOWED != 0;
    (knows && about_pages && !about_areas).then(|| ScanArg {
        category_inverted: asked.category_inverted | WPALLOWED,
        category_mask: asked.category_mask | WPALLOWED,
        ..asked
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_questions_for_pages_get_the_condition() {
        let pages = ScanArg {
            size: 96,
            category_mask: 0x24,
            category_inverted: 0x24,
            category_anyof_mask: 0x18,
            return_mask: 0x98,
            ..ScanArg::default()
        };
        let ours = without_tracked(pages).unwrap();
        assert_eq!((ours.category_mask, ours.category_inverted), (0x25, 0x25));
        assert_eq!((ours.category_anyof_mask, ours.return_mask), (0x18, 0x98));
        let guards = ScanArg {
            category_mask: 1 << 8,
            return_mask: 1 << 8,
            ..pages
        };
        assert_eq!(without_tracked(guards), None);
        assert_eq!(without_tracked(ScanArg { size: 104, ..pages }), None);
        assert_eq!(without_tracked(ScanArg { flags: 1, ..pages }), None);
        assert_eq!(without_tracked(ScanArg { category_mask: 1, ..pages }), None);
    }

    #[test]
    fn a_question_is_answered_as_without_us() {
        use std::os::fd::AsRawFd as _;
        let Ok(map) = std::fs::File::open("/proc/self/pagemap") else { return };
        let memory = std::vec![1u8; 1 << 20];
        let start = (memory.as_ptr() as u64).next_multiple_of(4096);
        let mut regions = [[0u64; 3]; 16];
        let mut arg = ScanArg {
            size: 96,
            start,
            end: start + (64 << 12),
            vec: regions.as_mut_ptr() as u64,
            vec_len: 16,
            category_anyof_mask: 0x18,
            return_mask: 0x18,
            ..ScanArg::default()
        };
        // SAFETY: the test's own struct and list.
        let count = unsafe { ioctl(map.as_raw_fd(), PAGEMAP_SCAN.into(), (&raw mut arg).cast()) };
        if count == -25 {
            return; // ENOTTY: the kernel does not know the question.
        }
        assert!(count >= 1, "{count}");
        assert_eq!((regions[0][0], arg.walk_end), (start, start + (64 << 12)));
    }
}
