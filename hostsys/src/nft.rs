//! The packet hold: an nftables table of ours in a pod's network namespace that drops every packet.
//!
//! Dropped, not rejected: the peers of the pod see a pause, no RST and no ICMP error. The table has no rules: two base
//! chains with policy drop. It is made in one batch, so that there is no moment with half of it.
//! `prerouting` at -400 comes before connection tracking, so that nothing is noted of the packets that are dropped.

use nix::sys::socket::{MsgFlags, SockProtocol, recv, send};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use crate::sock_diag::{self, Error, HEADER, NLM_F_ACK, NLMSG_ERROR, message, open_in, word};

/// Name of the table.
pub const HOLD_TABLE: &str = "peregrine-hold";

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NLM_F_CREATE: u16 = 0x400;
/// IPv4 and IPv6.
const NFPROTO_INET: u8 = 1;
const NF_INET_PRE_ROUTING: u32 = 0;
const NF_INET_LOCAL_OUT: u32 = 3;
const NF_DROP: u32 = 0;
const PRIORITY: i32 = -400;
const NLA_F_NESTED: u16 = 0x8000;

/// Drops every packet of a network namespace from now on. A hold that is there already stays.
///
/// # Errors
/// See [`Error`]; nothing was changed.
pub fn hold(namespace: BorrowedFd<'_>) -> Result<(), Error> {
    let socket = open_in(namespace, SockProtocol::NetlinkNetFilter)?;
    batch(
        &socket,
        &[
            (NFT_MSG_NEWTABLE, NLM_F_CREATE, attribute_text(1, HOLD_TABLE)),
            (NFT_MSG_NEWCHAIN, NLM_F_CREATE, chain("in", NF_INET_PRE_ROUTING)),
            (NFT_MSG_NEWCHAIN, NLM_F_CREATE, chain("out", NF_INET_LOCAL_OUT)),
        ],
    )
}

/// Lets packets pass again. No hold is no error.
///
/// # Errors
/// See [`Error`]; the hold stays.
pub fn release(namespace: BorrowedFd<'_>) -> Result<(), Error> {
    let socket = open_in(namespace, SockProtocol::NetlinkNetFilter)?;
    match batch(&socket, &[(NFT_MSG_DELTABLE, 0, attribute_text(1, HOLD_TABLE))]) {
        Err(Error::Refused(libc::ENOENT)) => Ok(()),
        other => other,
    }
}

/// Whether the hold is there.
///
/// # Errors
/// See [`Error`].
pub fn is_held(namespace: BorrowedFd<'_>) -> Result<bool, Error> {
    Ok(sock_diag::nft_tables(namespace)?.iter().any(|t| t == HOLD_TABLE))
}

fn chain(name: &str, hook: u32) -> Vec<u8> {
    let mut hook_body = attribute(1, &hook.to_be_bytes());
    hook_body.extend(attribute(2, &PRIORITY.to_be_bytes()));
    let mut body = attribute_text(1, HOLD_TABLE);
    body.extend(attribute_text(3, name));
    body.extend(attribute(4 | NLA_F_NESTED, &hook_body));
    body.extend(attribute(5, &NF_DROP.to_be_bytes()));
    body.extend(attribute_text(7, "filter"));
    body
}

fn attribute_text(kind: u16, text: &str) -> Vec<u8> {
    let mut value = text.as_bytes().to_vec();
    value.push(0);
    attribute(kind, &value)
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut out = len.to_ne_bytes().to_vec();
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

/// struct nfgenmsg: family, version, resource id (big endian).
fn nfgenmsg(family: u8, resource: u16) -> Vec<u8> {
    let [a, b] = resource.to_be_bytes();
    vec![family, 0, a, b]
}

/// All or nothing: the kernel commits at the end of the batch if no message failed.
fn batch(socket: &OwnedFd, messages: &[(u16, u16, Vec<u8>)]) -> Result<(), Error> {
    let mut out = message(NFNL_MSG_BATCH_BEGIN, 0, &nfgenmsg(0, NFNL_SUBSYS_NFTABLES));
    for (kind, flags, body) in messages {
        let mut content = nfgenmsg(NFPROTO_INET, 0);
        content.extend_from_slice(body);
        out.extend(message(NFNL_SUBSYS_NFTABLES << 8 | kind, flags | NLM_F_ACK, &content));
    }
    out.extend(message(NFNL_MSG_BATCH_END, 0, &nfgenmsg(0, NFNL_SUBSYS_NFTABLES)));
    sock_diag::set_timeout(socket);
    send(socket.as_raw_fd(), &out, MsgFlags::empty()).map_err(Error::Netlink)?;
    let mut buffer = vec![0; 16 * 1024];
    let mut answers = 0;
    let mut first_error = None;
    while answers < messages.len() {
        let n = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(Error::Netlink)?;
        let mut rest = buffer.get(..n).ok_or(Error::Malformed)?;
        while rest.len() >= HEADER {
            let len = word(rest, 0).map(|l| l as usize).ok_or(Error::Malformed)?;
            let body = rest.get(HEADER..len).ok_or(Error::Malformed)?;
            if u16::from_ne_bytes([rest[4], rest[5]]) == NLMSG_ERROR {
                answers += 1;
                match word(body, 0).map(u32::cast_signed) {
                    Some(0) => {}
                    // The first error is the cause. A batch that was refused as a whole has one answer only.
                    Some(errno) => return Err(first_error.unwrap_or(Error::Refused(-errno))),
                    None => first_error = Some(Error::Malformed),
                }
            }
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
    }
    first_error.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, net::UdpSocket, os::fd::AsFd as _, time::Duration};

    /// Needs root: makes a network namespace of its own.
    #[test]
    fn host_packets_are_dropped_while_they_are_held_and_pass_afterwards() {
        std::thread::spawn(|| {
            if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_err() {
                eprintln!("skipped: making a network namespace needs root");
                return;
            }
            // /proc/self is the process; the thread's own namespace is below its task.
            let here = File::open("/proc/thread-self/ns/net").unwrap();
            crate::addresses::loopback_up(here.as_fd()).unwrap();
            let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
            receiver.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            let to = receiver.local_addr().unwrap();
            let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
            let passes = || {
                let _ = sender.send_to(b"x", to);
                receiver.recv(&mut [0; 8]).is_ok()
            };
            assert!(passes());
            assert!(!is_held(here.as_fd()).unwrap());
            release(here.as_fd()).unwrap();
            hold(here.as_fd()).unwrap();
            hold(here.as_fd()).unwrap();
            assert!(is_held(here.as_fd()).unwrap());
            assert!(!passes());
            release(here.as_fd()).unwrap();
            assert!(!is_held(here.as_fd()).unwrap());
            assert!(passes());
        })
        .join()
        .unwrap();
    }
}
