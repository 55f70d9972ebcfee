//! Names and addresses: who is who on the cluster's network, as pure functions of a node's number.

use std::net::Ipv4Addr;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// Most nodes a cluster can have: one letter each.
pub const MAX_NODES: u8 = 26;
/// The control plane's name.
pub(crate) const CONTROL_PLANE: &str = "cp";
/// The name of the place outside the cluster, on its network.
pub(crate) const OUTSIDE: &str = "out";
/// Where the API server listens.
pub(crate) const API_PORT: u16 = 6443;
/// Cluster IPs of Services.
pub(crate) const SERVICE_NETWORK: &str = "10.96.0.0/16";
/// The API server's own Service.
pub(crate) const API_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// Named to pods as their resolver; nothing listens there.
pub(crate) const DNS_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// All pods' addresses.
pub(crate) const POD_NETWORK: &str = "10.200.0.0/16";
/// Prefix of our network namespaces.
pub(crate) const NETNS_PREFIX: &str = "pg-";
/// The namespace of the switch.
pub(crate) const SWITCH: &str = "pg-sw";

/// Something with an address on the cluster's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Member {
    /// etcd to scheduler.
    ControlPlane,
    /// Not of the cluster: where witnesses and outside clients live.
    Outside,
    /// A worker, from 1.
    Node(u8),
}

impl Member {
    /// The worker with this number, from 1.
    ///
    /// # Errors
    /// If there is no such number.
    pub fn node(index: u8) -> Result<Self> {
        ensure!(
            (1..=MAX_NODES).contains(&index),
            "a cluster has between 1 and {MAX_NODES} nodes"
        );
        Ok(Self::Node(index))
    }

    /// The member a person names: `node-a`, `cp`, `out`.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            CONTROL_PLANE => Some(Self::ControlPlane),
            OUTSIDE => Some(Self::Outside),
            _ => {
                let [letter @ b'a'..=b'z'] = name.strip_prefix("node-")?.as_bytes() else {
                    return None;
                };
                Some(Self::Node(letter - b'a' + 1))
            }
        }
    }

    /// `node-a`, `cp`, `out`.
    pub fn name(self) -> String {
        match self {
            Self::ControlPlane => CONTROL_PLANE.to_owned(),
            Self::Outside => OUTSIDE.to_owned(),
            Self::Node(index) => format!("node-{}", char::from(b'a' + index.saturating_sub(1))),
        }
    }

    /// Its network namespace, as in `/run/netns`.
    pub fn netns(self) -> String {
        format!("{NETNS_PREFIX}{}", self.name())
    }

    /// The end of its cable in the switch.
    pub fn port(self) -> String {
        format!("v-{}", self.name())
    }

    fn number(self) -> u8 {
        match self {
            Self::ControlPlane => 2,
            Self::Outside => 3,
            Self::Node(index) => 10 + index,
        }
    }

    /// Its address.
    pub fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 99, 0, self.number())
    }

    /// Its hardware address: the same after a reboot, so that a cut of the network outlasts it.
    pub fn mac(self) -> String {
        format!("02:50:47:00:00:{:02x}", self.number())
    }

    /// Addresses of its pods, if it is a node.
    pub fn pod_network(self) -> Option<String> {
        match self {
            Self::Node(index) => Some(format!("10.200.{index}.0/24")),
            Self::ControlPlane | Self::Outside => None,
        }
    }

    /// Seconds since this machine's boot, beyond the host's own: nodes are machines that booted at different times.
    pub fn clock_offset(self) -> Option<u64> {
        match self {
            Self::Node(index) => Some(u64::from(index) * 100_000),
            Self::ControlPlane | Self::Outside => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_members_are_one_to_one() {
        let members = (1..=MAX_NODES)
            .map(Member::Node)
            .chain([Member::ControlPlane, Member::Outside]);
        let mut addresses = std::collections::BTreeSet::new();
        for member in members {
            assert_eq!(Member::parse(&member.name()), Some(member));
            assert!(addresses.insert(member.address()));
            // The kernel's limit for an interface's name.
            assert!(member.port().len() < 16);
        }
        for bad in ["", "node-", "node-A", "node-aa", "node-1", "switch"] {
            assert_eq!(Member::parse(bad), None, "{bad}");
        }
        assert!(Member::node(0).is_err() && Member::node(27).is_err());
    }
}
