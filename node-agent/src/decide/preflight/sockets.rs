//! Sockets, by protocol, state and peer.

use std::collections::{BTreeMap, BTreeSet};

use crds::Reason;
use crds::process_migration::Connections;

use super::{Area, Findings};
use crate::inventory::sockets::Netlink;
use crate::inventory::{Inventory, Kind};

/// Netlink protocols that CRIU carries: route, user, sock_diag, kobject events. Their sockets hold no state but
/// subscriptions.
const NETLINK: [u32; 4] = [0, 2, 4, 15];

pub(super) fn judge(inventory: &Inventory, connections: Connections, findings: &mut Findings) {
    let holders = inventory.holders(socket_inode);
    let mut seen = BTreeSet::new();
    let mut external: BTreeMap<String, usize> = BTreeMap::new();
    for (container, process) in inventory.moved() {
        for descriptor in &process.descriptors {
            let Kind::Socket { inode, protocol } = &descriptor.kind else {
                continue;
            };
            if !seen.insert(*inode) {
                continue;
            }
            let refused = refusal(inventory, *inode, protocol, &holders);
            if let Some((reason, what)) = refused {
                findings.refuse(
                    Area::Sockets,
                    Some(&container.name),
                    reason,
                    format!("{} holds {what} (descriptor {})", process.label(), descriptor.fd),
                );
            }
            if let Some(socket) = inventory.sockets.inet.get(inode)
                && protocol.starts_with("TCP")
                && !socket.is_listening()
                && socket.is_external()
            {
                *external
                    .entry(format!("{} of {}", socket.remote, process.label()))
                    .or_default() += 1;
            }
        }
    }
    if !external.is_empty() {
        let number: usize = external.values().sum();
        let some: Vec<&str> = external.keys().take(5).map(String::as_str).collect();
        let text = format!(
            "{number} connections with peers outside of the pod: {}",
            some.join(", ")
        );
        match connections {
            Connections::Preserve => findings.refuse(
                Area::Connections,
                None,
                Reason::ConnectionNotPreservable,
                format!("the pod gets a new address and cannot keep {text}"),
            ),
            Connections::BestEffort | Connections::Close => findings.warn(
                Area::Connections,
                None,
                Reason::WillBeLost,
                format!("the move closes {text}"),
            ),
        }
    }
}

fn socket_inode(kind: &Kind) -> Option<u64> {
    if let Kind::Socket { inode, .. } = kind {
        Some(*inode)
    } else {
        None
    }
}

fn refusal(
    inventory: &Inventory,
    inode: u64,
    protocol: &str,
    holders: &BTreeMap<u64, BTreeSet<&str>>,
) -> Option<(Reason, String)> {
    let not_supported = |what: String| Some((Reason::SocketNotSupported, what));
    if holders.get(&inode).is_some_and(|containers| containers.len() > 1) {
        return not_supported(format!(
            "a {protocol} socket that another container of the pod holds too"
        ));
    }
    match protocol {
        "TCP" | "TCPv6" => match inventory.sockets.inet.get(&inode) {
            Some(socket) if socket.is_listening() && socket.receive_queue > 0 => not_supported(format!(
                "a listening socket on {} with {} connections that it does not accept",
                socket.local, socket.receive_queue
            )),
            _ => None,
        },
        "UDP" | "UDPv6" | "UDP-Lite" | "UDPLITEv6" => None,
        "MPTCP" | "MPTCPv6" => Some((Reason::MptcpNotSupported, "a multipath TCP socket".to_owned())),
        "NETLINK" => match inventory.sockets.netlink.get(&inode) {
            Some(Netlink { protocol, .. }) if !NETLINK.contains(protocol) => not_supported(format!(
                "a netlink socket of protocol {protocol} ({})",
                netlink_name(*protocol)
            )),
            Some(Netlink { receive_queue, .. }) if *receive_queue > 0 => {
                not_supported("a netlink socket with messages that it does not read".to_owned())
            }
            Some(_) => None,
            None => not_supported("a netlink socket that is not bound, or of another network namespace".to_owned()),
        },
        _ if protocol.starts_with("UNIX") => unix(inventory, inode, holders),
        _ => not_supported(format!("a {protocol} socket")),
    }
}

fn netlink_name(protocol: u32) -> &'static str {
    match protocol {
        6 => "xfrm",
        9 => "audit",
        11 => "connector",
        12 => "netfilter",
        16 => "generic",
        _ => "unknown",
    }
}

fn unix(inventory: &Inventory, inode: u64, holders: &BTreeMap<u64, BTreeSet<&str>>) -> Option<(Reason, String)> {
    let not_supported = |what: &str| Some((Reason::SocketNotSupported, what.to_owned()));
    let Some(socket) = inventory.sockets.unix.get(&inode) else {
        return not_supported("a UNIX socket of another network namespace");
    };
    if socket.is_listening() {
        return (socket.receive_queue > 0).then(|| {
            (
                Reason::SocketNotSupported,
                format!(
                    "a listening UNIX socket with {} connections that it does not accept",
                    socket.receive_queue
                ),
            )
        });
    }
    let peer = u64::from(socket.peer.filter(|peer| *peer != 0)?);
    match (holders.get(&inode), holders.get(&peer)) {
        (Some(mine), Some(theirs)) if mine == theirs => None,
        (_, Some(_)) => not_supported("a UNIX socket that is connected with another container of the pod"),
        // The other end waits in the queue of a listener until it is accepted, or is in flight over another socket.
        (_, None) => not_supported("a UNIX socket whose other end no process of its container holds"),
    }
}
