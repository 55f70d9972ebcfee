//! `/proc/PID/limits`: a header, then a line for each resource: name in 26 columns, soft limit, hard limit, unit.

use core::ffi::c_long;

use crate::raw;

/// Names by the number of the resource (`RLIMIT_CPU` is 0).
const NAMES: [&[u8]; 16] = [
    b"Max cpu time",
    b"Max file size",
    b"Max data size",
    b"Max stack size",
    b"Max core file size",
    b"Max resident set",
    b"Max processes",
    b"Max open files",
    b"Max locked memory",
    b"Max address space",
    b"Max file locks",
    b"Max pending signals",
    b"Max msgqueue size",
    b"Max nice priority",
    b"Max realtime priority",
    b"Max realtime timeout",
];

/// Soft and hard limit of a process; none where the file does not say it.
pub(crate) fn read(pid: c_long, resource: c_long) -> Option<(u64, u64)> {
    let mut path = [0_u8; 48];
    write_path(&mut path, u32::try_from(pid).ok()?)?;
    let mut text = [0_u8; 4096];
    let length = read_file(&path, &mut text)?;
    find(text.get(..length)?, usize::try_from(resource).ok()?)
}

/// `/proc/<pid>/limits` with a NUL at the end; pid 0 is the caller.
fn write_path(path: &mut [u8; 48], pid: u32) -> Option<()> {
    let mut digits = [0_u8; 10];
    let mut at = digits.len();
    let mut rest = pid;
    while rest > 0 {
        at -= 1;
        *digits.get_mut(at)? = b'0' + u8::try_from(rest % 10).ok()?;
        rest /= 10;
    }
    let who: &[u8] = if pid == 0 { b"self" } else { digits.get(at..)? };
    let mut to = 0;
    for part in [b"/proc/".as_slice(), who, b"/limits\0"] {
        for byte in part {
            *path.get_mut(to)? = *byte;
            to += 1;
        }
    }
    Some(())
}

fn read_file(path: &[u8; 48], text: &mut [u8]) -> Option<usize> {
    const AT_FDCWD: c_long = -100;
    const O_CLOEXEC: c_long = 0o2_000_000;
    // SAFETY: the path ends in NUL and lives until the call returns.
    let fd = unsafe { raw::call(raw::OPENAT, [AT_FDCWD, path.as_ptr() as c_long, O_CLOEXEC, 0, 0, 0]) };
    if fd < 0 {
        return None;
    }
    let mut length = 0;
    let complete = loop {
        let Some(room) = text.get_mut(length..).filter(|room| !room.is_empty()) else {
            break false;
        };
        // SAFETY: the buffer and its length; it lives until the call returns.
        let got = unsafe {
            raw::call(
                raw::READ,
                [fd, room.as_mut_ptr() as c_long, room.len() as c_long, 0, 0, 0],
            )
        };
        match usize::try_from(got) {
            Ok(0) => break true,
            Ok(got) => length += got,
            Err(_) => break false,
        }
    };
    // SAFETY: our own descriptor.
    unsafe { raw::call(raw::CLOSE, [fd, 0, 0, 0, 0, 0]) };
    complete.then_some(length)
}

/// The limits of a resource in the file's text.
fn find(text: &[u8], resource: usize) -> Option<(u64, u64)> {
    let name = NAMES.get(resource)?;
    let values = text.split(|b| *b == b'\n').find_map(|line| {
        let (column, values) = line.split_at_checked(26)?;
        (column.trim_ascii_end() == *name).then_some(values)
    })?;
    let mut values = values.split(|b| *b == b' ').filter(|word| !word.is_empty());
    Some((number(values.next()?)?, number(values.next()?)?))
}

fn number(word: &[u8]) -> Option<u64> {
    if word == b"unlimited" {
        return Some(u64::MAX);
    }
    word.iter().try_fold(0_u64, |value, digit| {
        let digit = digit.checked_sub(b'0').filter(|d| *d < 10)?;
        value.checked_mul(10)?.checked_add(digit.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_of_a_process_is_what_the_kernel_says() {
        let text = std::fs::read("/proc/self/limits").unwrap();
        for resource in 0..NAMES.len() {
            let mut kernel = [0_u64; 2];
            let arguments = [0, resource as c_long, 0, kernel.as_mut_ptr() as c_long, 0, 0];
            // SAFETY: a place for two u64.
            assert_eq!(unsafe { raw::call(raw::PRLIMIT64, arguments) }, 0);
            assert_eq!(
                find(&text, resource),
                Some((kernel[0], kernel[1])),
                "resource {resource}"
            );
            assert_eq!(read(0, resource as c_long), Some((kernel[0], kernel[1])));
            assert_eq!(
                read(std::process::id().into(), resource as c_long),
                Some((kernel[0], kernel[1]))
            );
        }
    }

    #[test]
    fn what_is_not_understood_has_no_answer() {
        assert_eq!(find(b"Max cpu time              x                    1\n", 0), None);
        assert_eq!(find(b"", 3), None);
        assert_eq!(find(b"Max cpu time              99999999999999999999 1\n", 0), None);
        assert_eq!(read(0, 16), None);
        assert_eq!(read(0, -1), None);
        assert_eq!(read(-1, 0), None);
        assert_eq!(read(c_long::from(i32::MAX), 0), None);
    }
}
