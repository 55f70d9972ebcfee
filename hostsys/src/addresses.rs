//! Addresses of a network namespace by rtnetlink: which it has; another one on its loopback.
//!
//! A restored socket that is bound to the pod's old address needs that address to exist; on the loopback it is answered
//! for inside the pod only.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::BorrowedFd,
};

use nix::sys::socket::SockProtocol;

use crate::sock_diag::{Error, NLM_F_ACK, dump, exchange, message, open_in, word};

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// Without duplicate address detection an IPv6 address can be bound at once.
const IFA_F_NODAD: u8 = 2;
const RT_SCOPE_HOST: u8 = 254;
/// The loopback is the first interface of every network namespace.
const LOOPBACK: u32 = 1;

/// All addresses, with the index of their interface.
///
/// # Errors
/// See [`Error`].
pub fn list(namespace: BorrowedFd<'_>) -> Result<Vec<(IpAddr, u32)>, Error> {
    let socket = open_in(namespace, SockProtocol::NetlinkRoute)?;
    let mut found = Vec::new();
    // struct ifaddrmsg: family (all), prefix length, flags, scope, index
    dump(&socket, RTM_GETADDR, &[0; 8], |body| {
        let index = word(body, 4)?;
        let mut rest = body.get(8..)?;
        let mut address = None;
        while rest.len() >= 4 {
            let len = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
            let kind = u16::from_ne_bytes([rest[2], rest[3]]);
            let value = rest.get(4..len)?;
            // For a point-to-point link IFA_ADDRESS is the peer; IFA_LOCAL, where it is there, is ours.
            if kind == IFA_LOCAL || (kind == IFA_ADDRESS && address.is_none()) {
                address = match value.len() {
                    4 => value.first_chunk::<4>().map(|b| IpAddr::V4(Ipv4Addr::from(*b))),
                    16 => value.first_chunk::<16>().map(|b| IpAddr::V6(Ipv6Addr::from(*b))),
                    _ => None,
                };
            }
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
        if let Some(address) = address {
            found.push((address, index));
        }
        Some(())
    })?;
    Ok(found)
}

/// Adds an address to the loopback; one that is there stays.
///
/// # Errors
/// See [`Error`].
pub fn add_to_loopback(namespace: BorrowedFd<'_>, address: IpAddr) -> Result<(), Error> {
    let socket = open_in(namespace, SockProtocol::NetlinkRoute)?;
    let body = on_loopback(address);
    exchange(
        &socket,
        &message(RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, &body),
        |_| Some(()),
    )
}

/// Removes an address from the loopback; an absent one is no error.
///
/// # Errors
/// See [`Error`].
pub fn remove_from_loopback(namespace: BorrowedFd<'_>, address: IpAddr) -> Result<(), Error> {
    let socket = open_in(namespace, SockProtocol::NetlinkRoute)?;
    match exchange(&socket, &message(RTM_DELADDR, NLM_F_ACK, &on_loopback(address)), |_| {
        Some(())
    }) {
        Err(Error::Refused(libc::EADDRNOTAVAIL)) => Ok(()),
        other => other,
    }
}

/// Switches the loopback on.
///
/// # Errors
/// See [`Error`].
pub fn loopback_up(namespace: BorrowedFd<'_>) -> Result<(), Error> {
    const IFF_UP: u32 = 1;
    let socket = open_in(namespace, SockProtocol::NetlinkRoute)?;
    // struct ifinfomsg: family, pad, type (2), index, flags, change
    let mut body = vec![0, 0, 0, 0];
    for field in [LOOPBACK, IFF_UP, IFF_UP] {
        body.extend_from_slice(&field.to_ne_bytes());
    }
    exchange(&socket, &message(RTM_NEWLINK, NLM_F_ACK, &body), |_| Some(()))
}

fn on_loopback(address: IpAddr) -> Vec<u8> {
    let (family, bytes) = match address {
        IpAddr::V4(a) => (libc::AF_INET as u8, a.octets().to_vec()),
        IpAddr::V6(a) => (libc::AF_INET6 as u8, a.octets().to_vec()),
    };
    let prefix = u8::try_from(bytes.len() * 8).unwrap_or(u8::MAX);
    let mut body = vec![family, prefix, IFA_F_NODAD, RT_SCOPE_HOST];
    body.extend_from_slice(&LOOPBACK.to_ne_bytes());
    for kind in [IFA_ADDRESS, IFA_LOCAL] {
        let len = u16::try_from(4 + bytes.len()).unwrap_or(u16::MAX);
        body.extend_from_slice(&len.to_ne_bytes());
        body.extend_from_slice(&kind.to_ne_bytes());
        body.extend_from_slice(&bytes);
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, net::TcpListener, os::fd::AsFd as _};

    /// Needs root: makes a network namespace of its own.
    #[test]
    fn host_an_old_address_can_be_bound_while_it_is_on_the_loopback() {
        std::thread::spawn(|| {
            if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_err() {
                eprintln!("skipped: making a network namespace needs root");
                return;
            }
            let here = File::open("/proc/thread-self/ns/net").unwrap();
            loopback_up(here.as_fd()).unwrap();
            for text in ["10.200.1.7", "fd00::7"] {
                let address: IpAddr = text.parse().unwrap();
                if address.is_ipv6() && !std::path::Path::new("/proc/net/if_inet6").exists() {
                    continue;
                }
                assert!(TcpListener::bind((address, 0)).is_err());
                add_to_loopback(here.as_fd(), address).unwrap();
                add_to_loopback(here.as_fd(), address).unwrap();
                assert!(list(here.as_fd()).unwrap().contains(&(address, LOOPBACK)));
                assert!(TcpListener::bind((address, 0)).is_ok());
                remove_from_loopback(here.as_fd(), address).unwrap();
                remove_from_loopback(here.as_fd(), address).unwrap();
                assert!(TcpListener::bind((address, 0)).is_err());
            }
        })
        .join()
        .unwrap();
    }
}
