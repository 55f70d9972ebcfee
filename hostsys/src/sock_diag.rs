//! Sockets of a network namespace, asked of the kernel by netlink (`sock_diag(7)`): what `/proc/net` does not tell.

#![expect(unsafe_code, reason = "reading the kernel's fixed-layout answers")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send, socket,
};

pub(crate) const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
pub(crate) const NLM_F_ACK: u16 = 4;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const SOCK_DIAG_BY_FAMILY: u16 = 20;
pub(crate) const SOCK_DESTROY: u16 = 21;
pub(crate) const HEADER: usize = 16;

/// Why the kernel gave no list.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace could not be entered.
    #[error("failed to enter the network namespace")]
    Namespace(#[source] nix::Error),
    /// The socket could not be opened or used.
    #[error("failed to ask the kernel for sockets")]
    Netlink(#[source] nix::Error),
    /// The kernel answered with an error.
    #[error("the kernel refused to list sockets (error {0})")]
    Refused(i32),
    /// An answer that does not have the form it should have.
    #[error("the kernel's answer could not be read")]
    Malformed,
    /// The thread that asks in the other namespace could not run.
    #[error("failed to start a thread for the network namespace")]
    Thread,
}

/// A UNIX socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixSocket {
    /// Inode, as in `socket:[N]`.
    pub inode: u32,
    /// Inode of the other end, where it is connected.
    pub peer: Option<u32>,
    /// `SOCK_STREAM` (1), `SOCK_DGRAM` (2) or `SOCK_SEQPACKET` (5).
    pub kind: u8,
    /// 1 connected, 10 listening, 7 neither.
    pub state: u8,
    /// Bytes that wait to be read; for a listener, connections that wait to be accepted.
    pub receive_queue: u32,
}

impl UnixSocket {
    /// Whether it listens.
    #[must_use]
    pub fn is_listening(&self) -> bool {
        self.state == 10
    }
}

/// All UNIX sockets of a network namespace.
///
/// # Errors
/// See [`Error`].
pub fn unix_sockets(namespace: BorrowedFd<'_>) -> Result<Vec<UnixSocket>, Error> {
    // struct unix_diag_req: family, protocol, pad, states, inode, show, cookie[2]
    const SHOW_PEER: u32 = 0x4;
    const SHOW_RQLEN: u32 = 0x10;
    let mut request = vec![libc::AF_UNIX as u8, 0, 0, 0];
    request.extend_from_slice(&u32::MAX.to_ne_bytes());
    request.extend_from_slice(&0u32.to_ne_bytes());
    request.extend_from_slice(&(SHOW_PEER | SHOW_RQLEN).to_ne_bytes());
    request.extend_from_slice(&[0xff; 8]);
    let socket = open_in(namespace, SockProtocol::NetlinkSockDiag)?;
    let mut sockets = Vec::new();
    dump(&socket, SOCK_DIAG_BY_FAMILY, &request, |body| {
        sockets.push(parse_unix(body)?);
        Some(())
    })?;
    Ok(sockets)
}

/// struct unix_diag_msg: family, type, state, pad, inode, cookie[2]; then attributes.
fn parse_unix(body: &[u8]) -> Option<UnixSocket> {
    const UNIX_DIAG_PEER: u16 = 2;
    const UNIX_DIAG_RQLEN: u16 = 4;
    let mut found = UnixSocket {
        kind: *body.get(1)?,
        state: *body.get(2)?,
        inode: word(body, 4)?,
        peer: None,
        receive_queue: 0,
    };
    let mut rest = body.get(16..)?;
    while rest.len() >= 4 {
        let len = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let kind = u16::from_ne_bytes([rest[2], rest[3]]);
        let value = rest.get(4..len)?;
        match kind {
            UNIX_DIAG_PEER => found.peer = word(value, 0),
            UNIX_DIAG_RQLEN => found.receive_queue = word(value, 0)?,
            _ => {}
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(found)
}

/// Whether the kernel can end connections on request (`INET_DIAG_DESTROY`): asked for one that does not exist.
#[must_use]
pub fn can_destroy() -> bool {
    // struct inet_diag_req_v2: family, protocol, ext, pad, states, then the socket's id (48 bytes)
    let mut request = vec![libc::AF_INET as u8, libc::IPPROTO_TCP as u8, 0, 0];
    request.extend_from_slice(&u32::MAX.to_ne_bytes());
    // Ports 1 and 1 of 127.0.0.1 with itself.
    request.extend_from_slice(&[0, 1, 0, 1, 127, 0, 0, 1]);
    request.extend_from_slice(&[0; 12]);
    request.extend_from_slice(&[127, 0, 0, 1]);
    request.extend_from_slice(&[0; 12]);
    request.extend_from_slice(&[0; 4]);
    request.extend_from_slice(&[0xff; 8]);
    let Ok(socket) = open(SockProtocol::NetlinkSockDiag) else {
        return false;
    };
    // With the feature: "no such socket". Without: EOPNOTSUPP.
    matches!(
        ask(&socket, SOCK_DESTROY, &request),
        Ok(()) | Err(Error::Refused(libc::ENOENT))
    )
}

/// Whether nftables answers.
#[must_use]
pub fn has_nftables() -> bool {
    let Ok(socket) = open(SockProtocol::NetlinkNetFilter) else {
        return false;
    };
    nft_tables_of(&socket).is_ok()
}

/// Names of the nftables tables of a network namespace.
///
/// # Errors
/// See [`Error`].
pub fn nft_tables(namespace: BorrowedFd<'_>) -> Result<Vec<String>, Error> {
    nft_tables_of(&open_in(namespace, SockProtocol::NetlinkNetFilter)?)
}

fn nft_tables_of(socket: &OwnedFd) -> Result<Vec<String>, Error> {
    const NFNL_SUBSYS_NFTABLES: u16 = 10;
    const NFT_MSG_GETTABLE: u16 = 1;
    const NFTA_TABLE_NAME: u16 = 1;
    let mut names = Vec::new();
    // struct nfgenmsg: family (unspecified), version, resource id
    dump(
        socket,
        NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETTABLE,
        &[0, 0, 0, 0],
        |body| {
            let mut rest = body.get(4..)?;
            while rest.len() >= 4 {
                let len = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
                let kind = u16::from_ne_bytes([rest[2], rest[3]]) & 0x3fff;
                let value = rest.get(4..len)?;
                if kind == NFTA_TABLE_NAME {
                    let name = value.split(|b| *b == 0).next().unwrap_or_default();
                    names.push(String::from_utf8_lossy(name).into_owned());
                }
                rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
            }
            Some(())
        },
    )?;
    Ok(names)
}

fn open(protocol: SockProtocol) -> Result<OwnedFd, Error> {
    let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).map_err(Error::Netlink)?;
    connect(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(Error::Netlink)?;
    Ok(fd)
}

/// Opens a netlink socket in another network namespace: a socket stays in the namespace in which it was made, so a thread
/// goes there, opens it and ends.
pub(crate) fn open_in(namespace: BorrowedFd<'_>, protocol: SockProtocol) -> Result<OwnedFd, Error> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .spawn_scoped(scope, || {
                setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).map_err(Error::Namespace)?;
                open(protocol)
            })
            .map_err(|_| Error::Thread)?
            .join()
            .map_err(|_| Error::Thread)?
    })
}

pub(crate) fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(HEADER + body.len());
    out.extend_from_slice(&len.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    out.extend_from_slice(&1u32.to_ne_bytes());
    out.extend_from_slice(&0u32.to_ne_bytes());
    out.extend_from_slice(body);
    out
}

/// Sends one request and reads its acknowledgement.
pub(crate) fn ask(socket: &OwnedFd, kind: u16, body: &[u8]) -> Result<(), Error> {
    exchange(socket, &message(kind, NLM_F_ACK, body), |_| Some(()))
}

/// Sends a request for a list and hands each entry's body to `each`.
pub(crate) fn dump(
    socket: &OwnedFd,
    kind: u16,
    body: &[u8],
    each: impl FnMut(&[u8]) -> Option<()>,
) -> Result<(), Error> {
    exchange(socket, &message(kind, NLM_F_DUMP, body), each)
}

pub(crate) fn exchange(
    socket: &OwnedFd,
    request: &[u8],
    mut each: impl FnMut(&[u8]) -> Option<()>,
) -> Result<(), Error> {
    set_timeout(socket);
    send(socket.as_raw_fd(), request, MsgFlags::empty()).map_err(Error::Netlink)?;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(Error::Netlink)?;
        let mut rest = buffer.get(..n).ok_or(Error::Malformed)?;
        while rest.len() >= HEADER {
            let len = word(rest, 0).map(|l| l as usize).ok_or(Error::Malformed)?;
            let kind = u16::from_ne_bytes([rest[4], rest[5]]);
            let body = rest.get(HEADER..len).ok_or(Error::Malformed)?;
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    return match word(body, 0).map(u32::cast_signed) {
                        Some(0) => Ok(()),
                        Some(errno) => Err(Error::Refused(-errno)),
                        None => Err(Error::Malformed),
                    };
                }
                _ => each(body).ok_or(Error::Malformed)?,
            }
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// The kernel always answers; should it not, nobody waits for ever.
pub(crate) fn set_timeout(socket: &OwnedFd) {
    let limit = libc::timeval { tv_sec: 5, tv_usec: 0 };
    // SAFETY: `limit` is a timeval, of the length that is given.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const limit).cast(),
            size_of::<libc::timeval>() as libc::socklen_t,
        );
    }
}

pub(crate) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn inode(socket: &impl AsRawFd) -> u32 {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap();
        let link = link.to_str().unwrap();
        link["socket:[".len()..link.len() - 1].parse().unwrap()
    }

    #[test]
    fn a_unix_pair_is_listed_with_its_peers() {
        let (a, b) = UnixStream::pair().unwrap();
        let here = std::fs::File::open("/proc/self/ns/net").unwrap();
        let sockets = unix_sockets(here.as_fd()).unwrap();
        let found = sockets.iter().find(|s| s.inode == inode(&a)).unwrap();
        assert_eq!(found.peer, Some(inode(&b)));
        assert_eq!(found.kind, 1);
        assert!(!found.is_listening());
    }

    #[test]
    fn a_listener_tells_how_many_wait() {
        let path = std::env::temp_dir().join(format!("peregrine-diag-{}", std::process::id()));
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let _waits = UnixStream::connect(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let here = std::fs::File::open("/proc/self/ns/net").unwrap();
        let sockets = unix_sockets(here.as_fd()).unwrap();
        let found = sockets.iter().find(|s| s.inode == inode(&listener)).unwrap();
        assert!(found.is_listening());
        assert_eq!(found.receive_queue, 1);
    }
}
