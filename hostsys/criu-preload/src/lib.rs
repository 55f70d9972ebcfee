//! Preloaded into CRIU, for three things that it cannot do by itself.
//!
//! The first: on machines where CRIU lacks CAP_SYS_RESOURCE, its question for another user's limits is answered. The second:
//! memory that the agent tracks and copies itself is left out of the images, see [`tracked`]. The third: it is spared a long
//! walk through the kernel's connection tracking, see [`conntrack`].
//!
//! CRIU asks for limits by `syscall(SYS_prlimit64, pid, resource, NULL, &old)`. Without the capability the kernel answers EPERM for a
//! process of another uid, so no container that runs as an ordinary user could be dumped. `/proc/PID/limits` says the same to
//! root without it. Only that one refused question is answered from there; every other call is made as it came, and whatever
//! is not understood stays EPERM.
//!
//! No standard library: its own locks and random numbers go through `syscall`, which is replaced here. Calls are made by the
//! instruction, so nothing of libc is needed but the place of `errno`.
//!
//! Licence: MIT (it is loaded into a GPL-2.0 program).

#![cfg_attr(not(test), no_std)]

use core::ffi::{c_int, c_long, c_ulong, c_void};

mod conntrack;
mod limits;
mod raw;
mod tracked;

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Nothing here panics; if it did, CRIU's call must not go on.
    loop {
        core::hint::spin_loop();
    }
}

unsafe extern "C" {
    fn __errno_location() -> *mut c_int;
}

const EPERM: c_long = 1;

/// Stands for libc's `syscall`. The caller passes up to six arguments; the rest is whatever the registers hold, as in libc.
///
/// # Safety
/// As for the system call that is asked for.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn syscall(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    // SAFETY: passed on exactly as the caller gave it.
    let mut result = unsafe { raw::call(number, [a, b, c, d, e, f]) };
    if number == raw::PRLIMIT64
        && result == -EPERM
        && c == 0
        && d != 0
        && let Some((soft, hard)) = limits::read(a, b)
    {
        let old = d as *mut c_void as *mut u64;
        // SAFETY: the caller gave a place for a `struct rlimit64`, two u64, which the kernel would have filled.
        unsafe {
            old.write_unaligned(soft);
            old.add(1).write_unaligned(hard);
        }
        result = 0;
    }
    as_libc(result)
}

/// Stands for libc's `ioctl`. Its third argument is optional there; here it is whatever the register holds, as in libc.
///
/// # Safety
/// As for ioctl(2).
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    // SAFETY: passed on as the caller gave it.
    as_libc(unsafe { tracked::ioctl(fd, request, argument) }) as c_int
}

/// The kernel's result in libc's form.
fn as_libc(result: c_long) -> c_long {
    if (-4095..0).contains(&result) {
        // SAFETY: libc's own place of errno for this thread.
        unsafe { *__errno_location() = -result as c_int };
        return -1;
    }
    result
}

/// `struct msghdr`, as far as it is looked at.
#[repr(C)]
struct Message {
    name: *const c_void,
    name_len: u32,
    parts: *const Part,
    count: usize,
}

/// `struct iovec`.
#[repr(C)]
struct Part {
    start: *mut c_void,
    len: usize,
}

/// Stands for libc's `sendmsg`.
///
/// # Safety
/// As for the system call.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn sendmsg(socket: c_int, message: *const c_void, flags: c_int) -> c_long {
    // SAFETY: the caller gives a `struct msghdr`, or the kernel would refuse.
    if let Some(message) = unsafe { message.cast::<Message>().as_ref() }
        && message.count == 1
        // SAFETY: it has one part.
        && let Some(part) = unsafe { message.parts.as_ref() }
        && part.len == conntrack::LEN as usize
        && part.start.cast::<conntrack::Header>().is_aligned()
        // SAFETY: a part of this length holds a header of 16 bytes, which is the caller's own request.
        && let Some(header) = unsafe { part.start.cast::<conntrack::Header>().as_mut() }
    {
        conntrack::ask_for_nothing(header);
    }
    let arguments = [c_long::from(socket), message as c_long, c_long::from(flags), 0, 0, 0];
    // SAFETY: as the caller gave it.
    as_libc(unsafe { raw::call(raw::SENDMSG, arguments) })
}
