//! Sockets of a pod's network namespace, by inode: state, peer, what waits in them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::Path;

use hostsys::sock_diag::{self, UnixSocket};

/// Sockets, by inode.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sockets {
    /// TCP and UDP.
    pub inet: BTreeMap<u64, InetSocket>,
    /// UNIX.
    pub unix: BTreeMap<u64, UnixSocket>,
    /// Protocol number of netlink sockets.
    pub netlink: BTreeMap<u64, Netlink>,
}

/// A TCP or UDP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InetSocket {
    /// The kernel's number: 1 established, 10 listening, 7 closed, …
    pub state: u8,
    /// Own address.
    pub local: SocketAddr,
    /// The peer's.
    pub remote: SocketAddr,
    /// Bytes that wait to be read; for a listener, connections that wait to be accepted.
    pub receive_queue: u64,
}

/// A netlink socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Netlink {
    /// Protocol number: 0 route, 4 sock_diag, 9 audit, …
    pub protocol: u32,
    /// Bytes that wait to be read.
    pub receive_queue: u64,
}

impl InetSocket {
    /// Whether it listens.
    #[must_use]
    pub fn is_listening(&self) -> bool {
        self.state == 10
    }

    /// Whether it has a peer outside of the pod: neither the loopback nor an address that it has itself.
    #[must_use]
    pub fn is_external(&self) -> bool {
        let remote = self.remote.ip().to_canonical();
        !self.remote.ip().is_unspecified() && !remote.is_loopback() && remote != self.local.ip().to_canonical()
    }
}

/// Reads them, through a process in the namespace.
#[must_use]
pub fn read(pid: i32, namespace: &Path, unreadable: &mut Vec<String>) -> Sockets {
    let mut sockets = Sockets::default();
    for file in ["tcp", "tcp6", "udp", "udp6"] {
        match fs::read_to_string(format!("/proc/{pid}/net/{file}")) {
            Ok(text) => sockets.inet.extend(parse_inet(&text)),
            // No IPv6 here.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && file.ends_with('6') => {}
            Err(e) => unreadable.push(format!("the pod's {file} sockets cannot be read: {e}")),
        }
    }
    match fs::read_to_string(format!("/proc/{pid}/net/netlink")) {
        Ok(text) => sockets.netlink = parse_netlink(&text),
        Err(e) => unreadable.push(format!("the pod's netlink sockets cannot be read: {e}")),
    }
    let unix = File::open(namespace)
        .map_err(|e| e.to_string())
        .and_then(|file| sock_diag::unix_sockets(file.as_fd()).map_err(|e| crate::error::chain(&e)));
    match unix {
        Ok(list) => sockets.unix = list.into_iter().map(|s| (u64::from(s.inode), s)).collect(),
        Err(e) => unreadable.push(format!("the pod's UNIX sockets cannot be read: {e}")),
    }
    sockets
}

/// Reads `/proc/PID/net/tcp` and its like.
fn parse_inet(text: &str) -> BTreeMap<u64, InetSocket> {
    text.lines()
        .skip(1)
        .filter_map(|line| {
            // `sl local remote st tx:rx tr:when retrnsmt uid timeout inode …`
            let words: Vec<&str> = line.split_whitespace().collect();
            let socket = InetSocket {
                local: address(words.get(1)?)?,
                remote: address(words.get(2)?)?,
                state: u8::from_str_radix(words.get(3)?, 16).ok()?,
                receive_queue: u64::from_str_radix(words.get(4)?.split_once(':')?.1, 16).ok()?,
            };
            let inode: u64 = words.get(9)?.parse().ok()?;
            // 0: no process holds it (TIME_WAIT, or not accepted yet).
            (inode != 0).then_some((inode, socket))
        })
        .collect()
}

/// `0100007F:1F90` -> 127.0.0.1:8080. Words are in the machine's byte order.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let words = (0..address.len() / 8)
        .map(|i| {
            Some(
                u32::from_str_radix(address.get(i * 8..i * 8 + 8)?, 16)
                    .ok()?
                    .to_ne_bytes(),
            )
        })
        .collect::<Option<Vec<[u8; 4]>>>()?;
    let ip = match words.as_slice() {
        [word] => IpAddr::V4(Ipv4Addr::from(*word)),
        [_, _, _, _] => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(words.concat()).ok()?)),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// Reads `/proc/PID/net/netlink`.
fn parse_netlink(text: &str) -> BTreeMap<u64, Netlink> {
    text.lines()
        .skip(1)
        .filter_map(|line| {
            // `sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode`
            let words: Vec<&str> = line.split_whitespace().collect();
            let found = Netlink {
                protocol: words.get(1)?.parse().ok()?,
                receive_queue: words.get(4)?.parse().ok()?,
            };
            Some((words.get(9)?.parse().ok()?, found))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tcp_sockets_are_read_in_both_families() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000002 00:00000000 00000000     0        0 4711 1 0 100 0 0 10 0\n\
            1: 0201C80A:9C40 0303C80A:01BB 01 00000000:00000000 02:00000A 00000000     0        0 4712 2 0 20 4 30 10 -1\n\
            2: 0201C80A:9C41 0303C80A:01BB 06 00000000:00000000 03:00000A 00000000     0        0 0 3 0\n";
        let sockets = parse_inet(text);
        assert_eq!(sockets.len(), 2);
        let listener = &sockets[&4711];
        assert!(listener.is_listening() && !listener.is_external());
        assert_eq!(
            (listener.local, listener.receive_queue),
            ("127.0.0.1:8080".parse().unwrap(), 2)
        );
        let connection = &sockets[&4712];
        assert!(connection.is_external());
        assert_eq!(connection.remote, "10.200.3.3:443".parse().unwrap());
        let six =
            "h\n0: 0000000000000000FFFF00000100007F:1F90 0000000000000000FFFF00000100007F:8001 01 0:0 0:0 0 0 0 99 1\n";
        assert!(!parse_inet(six)[&99].is_external(), "mapped loopback");
    }

    #[test]
    fn a_connection_to_the_own_address_is_internal() {
        let own = InetSocket {
            state: 1,
            local: "10.0.0.1:1".parse().unwrap(),
            remote: "10.0.0.1:2".parse().unwrap(),
            receive_queue: 0,
        };
        assert!(!own.is_external());
    }

    #[test]
    fn netlink_sockets_are_read() {
        let text = "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n\
            0000000000000000 9   0          00000000 12       0        0     2        0        77\n";
        assert_eq!(
            parse_netlink(text)[&77],
            Netlink {
                protocol: 9,
                receive_queue: 12
            }
        );
    }
}
