//! TCP and UDP sockets of a network namespace, and the end of one of them (`SOCK_DESTROY`): its owner then reads
//! ECONNABORTED, as after a reset by its peer.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::BorrowedFd,
};

use nix::sys::socket::SockProtocol;

use crate::sock_diag::{Error, NLM_F_ACK, SOCK_DESTROY, SOCK_DIAG_BY_FAMILY, dump, exchange, message, open_in};

/// Transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A TCP or UDP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InetSocket {
    /// Transport.
    pub transport: Transport,
    /// The kernel's number: 1 established, 10 listening, 6 time-wait …
    pub state: u8,
    /// Its own address.
    pub local: SocketAddr,
    /// Its peer's; unspecified where it has none.
    pub peer: SocketAddr,
    family: u8,
    /// struct inet_diag_sockid, as the kernel gave it.
    id: [u8; 48],
}

const TCP_TIME_WAIT: u8 = 6;
const TCP_CLOSE: u8 = 7;
const TCP_LISTEN: u8 = 10;
const TCP_NEW_SYN_RECV: u8 = 12;

impl InetSocket {
    /// Whether it is a TCP connection that an owner holds (in whatever state of its life).
    #[must_use]
    pub fn is_connection(&self) -> bool {
        self.transport == Transport::Tcp
            && !matches!(
                self.state,
                TCP_TIME_WAIT | TCP_CLOSE | TCP_LISTEN | TCP_NEW_SYN_RECV | 0
            )
    }
}

/// All TCP and UDP sockets of a network namespace, IPv4 and IPv6. Time-wait is left out: nobody holds such a socket.
///
/// # Errors
/// See [`Error`].
pub fn sockets(namespace: BorrowedFd<'_>) -> Result<Vec<InetSocket>, Error> {
    let socket = open_in(namespace, SockProtocol::NetlinkSockDiag)?;
    let mut found = Vec::new();
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        for (transport, number) in [
            (Transport::Tcp, libc::IPPROTO_TCP as u8),
            (Transport::Udp, libc::IPPROTO_UDP as u8),
        ] {
            let states: u32 = !(1 << TCP_TIME_WAIT | 1 << TCP_NEW_SYN_RECV);
            let request = request(family, number, states, &[0; 48]);
            let result = dump(&socket, SOCK_DIAG_BY_FAMILY, &request, |body| {
                if let Some(s) = parse(transport, body)? {
                    found.push(s);
                }
                Some(())
            });
            match result {
                // No handler for this family: the kernel has no IPv6, so there are no such sockets.
                Err(Error::Refused(libc::ENOENT)) if family == libc::AF_INET6 as u8 => {}
                other => other?,
            }
        }
    }
    Ok(found)
}

/// Ends a connection. One that has ended meanwhile is no error.
///
/// # Errors
/// See [`Error`]; `EOPNOTSUPP` where the kernel was built without the feature.
pub fn destroy(namespace: BorrowedFd<'_>, victim: &InetSocket) -> Result<(), Error> {
    let socket = open_in(namespace, SockProtocol::NetlinkSockDiag)?;
    let number = match victim.transport {
        Transport::Tcp => libc::IPPROTO_TCP as u8,
        Transport::Udp => libc::IPPROTO_UDP as u8,
    };
    let request = request(victim.family, number, u32::MAX, &victim.id);
    match exchange(&socket, &message(SOCK_DESTROY, NLM_F_ACK, &request), |_| Some(())) {
        Err(Error::Refused(libc::ENOENT)) => Ok(()),
        other => other,
    }
}

/// The connections whose other end is not in the same namespace.
#[must_use]
pub fn outside(sockets: &[InetSocket]) -> Vec<&InetSocket> {
    sockets
        .iter()
        .filter(|s| s.is_connection())
        .filter(|s| {
            !sockets
                .iter()
                .any(|o| o.is_connection() && same(o.local, s.peer) && same(o.peer, s.local))
        })
        .collect()
}

/// An IPv4 address that is written as IPv6 is the same address.
fn same(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port() && a.ip().to_canonical() == b.ip().to_canonical()
}

/// struct inet_diag_req_v2: family, protocol, ext, pad, states, id.
fn request(family: u8, protocol: u8, states: u32, id: &[u8; 48]) -> Vec<u8> {
    let mut out = vec![family, protocol, 0, 0];
    out.extend_from_slice(&states.to_ne_bytes());
    out.extend_from_slice(id);
    out
}

/// struct inet_diag_msg: family, state, timer, retrans; then the id: ports (big endian), addresses (16 bytes each),
/// interface, cookie. Outer `None`: malformed.
fn parse(transport: Transport, body: &[u8]) -> Option<Option<InetSocket>> {
    let family = *body.first()?;
    let state = *body.get(1)?;
    let id: [u8; 48] = body.get(4..52)?.try_into().ok()?;
    let port = |at: usize| Some(u16::from_be_bytes([*id.get(at)?, *id.get(at + 1)?]));
    let address = |at: usize| -> Option<IpAddr> {
        let bytes: [u8; 16] = id.get(at..at + 16)?.try_into().ok()?;
        if i32::from(family) == libc::AF_INET {
            Some(IpAddr::V4(Ipv4Addr::from(*bytes.first_chunk::<4>()?)))
        } else {
            Some(IpAddr::V6(Ipv6Addr::from(bytes)))
        }
    };
    let found = InetSocket {
        transport,
        state,
        local: SocketAddr::new(address(4)?, port(0)?),
        peer: SocketAddr::new(address(20)?, port(2)?),
        family,
        id,
    };
    Some((state != TCP_TIME_WAIT && state != TCP_NEW_SYN_RECV).then_some(found))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs::File,
        io::Read as _,
        net::{TcpListener, TcpStream},
        os::fd::AsFd as _,
    };

    #[test]
    fn host_a_connection_inside_is_told_from_one_outside_and_can_be_ended() {
        let here = File::open("/proc/self/ns/net").unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_server, _) = listener.accept().unwrap();
        let all = sockets(here.as_fd()).unwrap();
        let mine = all.iter().find(|s| s.local == client.local_addr().unwrap()).unwrap();
        assert_eq!(mine.peer, client.peer_addr().unwrap());
        assert!(mine.is_connection());
        assert!(!outside(&all).iter().any(|s| s.local == mine.local));
        let alone = [mine.clone()];
        assert_eq!(outside(&alone).len(), 1);
        assert!(
            all.iter()
                .any(|s| s.local == listener.local_addr().unwrap() && !s.is_connection())
        );
        if !crate::sock_diag::can_destroy() {
            eprintln!("skipped: the kernel was built without INET_DIAG_DESTROY");
            return;
        }
        destroy(here.as_fd(), mine).unwrap();
        assert!(client.read(&mut [0; 1]).is_err());
        destroy(here.as_fd(), mine).unwrap();
    }
}
