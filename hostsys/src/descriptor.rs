//! What an open file is, asked of the kernel by its path below `/proc/PID/fd`.

#![expect(unsafe_code, reason = "getxattr and statfs by path; nix wraps only one of them")]

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// `f_type` of POSIX message queues.
pub const MQUEUE: i64 = 0x1980_0202;
/// `f_type` of hugetlbfs.
pub const HUGETLBFS: i64 = 0x9584_58f6;
/// `f_type` of memfd_secret.
pub const SECRETMEM: i64 = 0x5345_434d;
/// `f_type` of overlayfs.
pub const OVERLAYFS: i64 = 0x794c_7630;
/// `f_type` of procfs.
pub const PROCFS: i64 = 0x9fa0;

/// Name of the protocol of a socket, as the kernel calls it: `TCP`, `TCPv6`, `MPTCP`, `UNIX`, `NETLINK`, …
///
/// # Errors
/// It is no socket, or is gone.
pub fn socket_protocol(path: &Path) -> io::Result<String> {
    let path = c_string(path)?;
    let mut name = [0u8; 64];
    // SAFETY: both strings end with NUL, the buffer has the length that is given.
    let n = unsafe {
        libc::getxattr(
            path.as_ptr(),
            c"system.sockprotoname".as_ptr(),
            name.as_mut_ptr().cast(),
            name.len(),
        )
    };
    let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
    let name = name.get(..n).unwrap_or_default();
    let name = name.split(|b| *b == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(name).into_owned())
}

/// Type of the file system (`f_type` of statfs(2)) on which an open file lies.
///
/// # Errors
/// It is gone.
pub fn file_system(path: &Path) -> io::Result<i64> {
    let path = c_string(path)?;
    // SAFETY: a statfs is plain numbers, for which zeros are valid.
    let mut found = unsafe { std::mem::zeroed::<libc::statfs>() };
    // SAFETY: the path ends with NUL, `found` is a statfs.
    if unsafe { libc::statfs(path.as_ptr(), &raw mut found) } != 0 {
        return Err(io::Error::last_os_error());
    }
    #[expect(clippy::allow_attributes, reason = "its type differs between architectures")]
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    Ok(found.f_type as i64)
}

fn c_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn sockets_tell_their_protocol() {
        let of = |fd: i32| socket_protocol(Path::new(&format!("/proc/self/fd/{fd}")));
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(of(tcp.as_raw_fd()).unwrap(), "TCP");
        let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(of(unix.as_raw_fd()).unwrap().starts_with("UNIX"));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(of(file.as_raw_fd()).is_err());
        assert_eq!(file_system(Path::new("/proc/self")).unwrap(), PROCFS);
    }
}
