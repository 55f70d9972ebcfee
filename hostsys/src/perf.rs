//! A held perf event: with one alive on the machine, the kernel need not patch itself when CRIU sets its first hardware
//! breakpoint, which otherwise costs 10 to 16 ms of the freeze in a dump and in a restore.

#![expect(unsafe_code, reason = "raw system calls: this crate is where they live")]

use std::{
    io,
    os::fd::{FromRawFd as _, OwnedFd},
};

/// Opens an event that counts nothing. Held as long as the descriptor is open.
///
/// # Errors
/// The kernel refuses (no CAP_PERFMON, or built without): then CRIU is a little slower.
pub fn hold() -> io::Result<OwnedFd> {
    const PERF_TYPE_SOFTWARE: u32 = 1;
    const PERF_COUNT_SW_DUMMY: u64 = 9;
    const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
    // struct perf_event_attr: type, size, config; all else zero (PERF_ATTR_SIZE_VER0 is 64 bytes).
    let mut attr = [0u8; 64];
    attr[..4].copy_from_slice(&PERF_TYPE_SOFTWARE.to_ne_bytes());
    attr[4..8].copy_from_slice(&64u32.to_ne_bytes());
    attr[8..16].copy_from_slice(&PERF_COUNT_SW_DUMMY.to_ne_bytes());
    // SAFETY: `attr` outlives the call and has the size that it names. This process, any processor, no group.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            attr.as_ptr(),
            0,
            -1,
            -1,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    let fd = i32::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    #[test]
    fn an_event_is_held_or_it_is_said_why_not() {
        match super::hold() {
            Ok(_) => {}
            Err(error) => eprintln!("skipped: {error}"),
        }
    }
}
