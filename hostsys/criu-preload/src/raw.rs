//! System calls by the instruction.

use core::ffi::c_long;

#[cfg(target_arch = "x86_64")]
mod numbers {
    pub(crate) const READ: i64 = 0;
    pub(crate) const CLOSE: i64 = 3;
    pub(crate) const IOCTL: i64 = 16;
    pub(crate) const SENDMSG: i64 = 46;
    pub(crate) const OPENAT: i64 = 257;
    pub(crate) const PRLIMIT64: i64 = 302;
}

#[cfg(target_arch = "aarch64")]
mod numbers {
    pub(crate) const READ: i64 = 63;
    pub(crate) const CLOSE: i64 = 57;
    pub(crate) const IOCTL: i64 = 29;
    pub(crate) const SENDMSG: i64 = 211;
    pub(crate) const OPENAT: i64 = 56;
    pub(crate) const PRLIMIT64: i64 = 261;
}

pub(crate) use numbers::{CLOSE, IOCTL, OPENAT, PRLIMIT64, READ, SENDMSG};

/// Makes a call; errors are negative, as the kernel returns them.
///
/// # Safety
/// As for the call.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn call(number: c_long, arguments: [c_long; 6]) -> c_long {
    let [a, b, c, d, e, f] = arguments;
    let result;
    // SAFETY: the kernel's calling convention; it clobbers rcx and r11 only.
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// Makes a call; errors are negative, as the kernel returns them.
///
/// # Safety
/// As for the call.
#[cfg(target_arch = "aarch64")]
pub(crate) unsafe fn call(number: c_long, arguments: [c_long; 6]) -> c_long {
    let [a, b, c, d, e, f] = arguments;
    let result;
    // SAFETY: the kernel's calling convention; it clobbers x0 only.
    unsafe {
        core::arch::asm!(
            "svc 0",
            in("x8") number, inlateout("x0") a => result,
            in("x1") b, in("x2") c, in("x3") d, in("x4") e, in("x5") f,
            options(nostack),
        );
    }
    result
}
