//! Descriptors sent over UNIX sockets.

#![expect(unsafe_code, reason = "a received descriptor is a number until it is owned")]

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Receives bytes, and a descriptor where one comes with them; further ones are closed.
///
/// # Errors
/// The socket's; 0 bytes are the other side's end.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = nix::cmsg_space!([i32; 4]);
    let mut slices = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: the kernel has just put these into our table; nobody else owns them.
            received.extend(
                numbers
                    .into_iter()
                    .map(|number| unsafe { OwnedFd::from_raw_fd(number) }),
            );
        }
    }
    Ok((message.bytes, received.into_iter().next()))
}

/// Sends bytes with a descriptor.
///
/// # Errors
/// The socket's.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
    let numbers = [fd.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&numbers)];
    let slices = [IoSlice::new(bytes)];
    Ok(sendmsg::<()>(
        socket.as_raw_fd(),
        &slices,
        &rights,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::Write as _,
        os::{fd::AsFd as _, unix::net::UnixStream},
    };

    #[test]
    fn a_descriptor_arrives_open_and_bytes_without_one_do_too() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let (c, mut d) = UnixStream::pair().unwrap();
        a.write_all(b"pid.").unwrap();
        send(a.as_fd(), b"x", c.as_fd()).unwrap();
        drop(c);
        let mut buffer = [0; 4];
        let (n, none) = receive(b.as_fd(), &mut buffer).unwrap();
        assert!(n == 4 && none.is_none() && &buffer == b"pid.");
        let (n, fd) = receive(b.as_fd(), &mut buffer[..1]).unwrap();
        assert_eq!(n, 1);
        let mut c = UnixStream::from(fd.unwrap());
        c.write_all(b"hello").unwrap();
        let mut said = [0; 5];
        std::io::Read::read_exact(&mut d, &mut said).unwrap();
        assert_eq!(&said, b"hello");
        drop(a);
        assert_eq!(receive(b.as_fd(), &mut buffer).unwrap().0, 0);
    }
}
