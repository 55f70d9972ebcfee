//! What a pod's network namespace holds beyond what the runtime makes.

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::path::Path;

use hostsys::sock_diag;

/// A network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// Interfaces.
    pub interfaces: Vec<String>,
    /// nftables tables.
    pub nft_tables: Vec<String>,
    /// Tables of the old iptables.
    pub ip_tables: Vec<String>,
}

/// Reads it, through a process in it.
#[must_use]
pub fn read(pid: i32, namespace: &Path, unreadable: &mut Vec<String>) -> Network {
    let folder = format!("/proc/{pid}/net");
    let text = |name: &str| fs::read_to_string(Path::new(&folder).join(name));
    let interfaces = text("dev").map(|t| parse_interfaces(&t)).unwrap_or_else(|e| {
        unreadable.push(format!("the pod's network interfaces cannot be read: {e}"));
        Vec::new()
    });
    let tables = File::open(namespace)
        .map_err(|e| e.to_string())
        .and_then(|file| sock_diag::nft_tables(file.as_fd()).map_err(|e| crate::error::chain(&e)));
    let nft_tables = tables.unwrap_or_else(|e| {
        unreadable.push(format!(
            "the nftables of the pod's network namespace cannot be read: {e}"
        ));
        Vec::new()
    });
    // A kernel without the old iptables has no such files.
    let ip_tables = ["ip_tables_names", "ip6_tables_names"]
        .into_iter()
        .flat_map(|file| {
            let family = if file.starts_with("ip6") {
                "ip6tables"
            } else {
                "iptables"
            };
            let names = text(file).unwrap_or_default();
            names.lines().map(|name| format!("{family} {name}")).collect::<Vec<_>>()
        })
        .collect();
    Network {
        interfaces,
        nft_tables,
        ip_tables,
    }
}

/// Reads `/proc/PID/net/dev`.
fn parse_interfaces(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_read() {
        let text = "Inter-|   Receive                                                |  Transmit\n face |bytes    packets\n    lo: 0 0\n  eth0: 1 2\n";
        assert_eq!(parse_interfaces(text), ["lo", "eth0"]);
    }
}
