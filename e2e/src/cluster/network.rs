//! The cluster's network: a switch in a namespace of its own, a cable to each member, routes for the pods.
//!
//! Nothing of it is in the host's own network namespace.

use std::io::Write as _;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};

use super::netns;
use super::topology::{MAX_NODES, Member, SERVICE_NETWORK, SWITCH};
use crate::parts::Parts;

/// The table of cuts in the switch.
const CUTS: &str = "bridge peregrine_cuts";

/// Makes the switch.
pub(super) fn create_switch(parts: &Parts) -> Result<()> {
    netns::create(SWITCH)?;
    ip(
        parts,
        SWITCH,
        "link set lo up\nlink add name br0 type bridge\nlink set br0 up\n",
    )?;
    // The switch is a switch: its frames are no business of its IP layer.
    netns::within(SWITCH, || {
        for name in ["iptables", "ip6tables", "arptables"] {
            // Absent where bridges cannot call the IP layer at all.
            std::fs::write(format!("/proc/sys/net/bridge/bridge-nf-call-{name}"), "0").ok();
        }
        Ok(())
    })
}

/// Makes a member's namespace and plugs it in.
pub(super) fn plug(parts: &Parts, member: Member) -> Result<()> {
    unplug(parts, member)?;
    let netns = member.netns();
    netns::create(&netns)?;
    ip(parts, SWITCH, &switch_side(member))?;
    netns::within(&netns, || {
        for (name, value) in sysctls(member) {
            std::fs::write(format!("/proc/sys/net/{name}"), value)
                .with_context(|| format!("cannot set net/{name} in {netns}"))?;
        }
        Ok(())
    })?;
    ip(parts, &netns, &member_side(member))
}

/// Takes the cable and the namespace away.
pub(super) fn unplug(parts: &Parts, member: Member) -> Result<()> {
    // With its end in the switch goes the one in the member, even while processes still die in there.
    if netns::exists(SWITCH) && has_link(&member.port()) {
        ip(parts, SWITCH, &format!("link del {}\n", member.port()))?;
    }
    netns::delete(&member.netns())
}

fn has_link(name: &str) -> bool {
    netns::within(SWITCH, || {
        Ok(std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default())
    })
    .is_ok_and(|devices| {
        devices
            .lines()
            .any(|line| line.trim_start().split(':').next() == Some(name))
    })
}

fn switch_side(member: Member) -> String {
    let (port, netns, mac) = (member.port(), member.netns(), member.mac());
    format!(
        "link add name {port} type veth peer name eth0 address {mac} netns {netns}\nlink set {port} master br0 up\n"
    )
}

/// Addresses and routes. Routes to the pods of all nodes there can ever be: a node that joins later changes nobody else.
fn member_side(member: Member) -> String {
    let mut batch = format!(
        "link set lo up\naddr add {}/24 dev eth0\nlink set eth0 up\n",
        member.address()
    );
    for node in (1..=MAX_NODES).map(Member::Node).filter(|node| *node != member) {
        if let Some(network) = node.pod_network() {
            batch.push_str(&format!("route add {network} via {}\n", node.address()));
        }
    }
    batch.push_str(&match member {
        // Packets to a Service need any route before kube-proxy's rules give them their real destination.
        Member::ControlPlane => format!("route add {SERVICE_NETWORK} dev eth0\n"),
        Member::Outside => String::new(),
        Member::Node(_) => format!("route add default via {}\n", Member::ControlPlane.address()),
    });
    batch
}

fn sysctls(member: Member) -> &'static [(&'static str, &'static str)] {
    match member {
        // The control plane answers "unreachable" for what is nowhere, instead of silence.
        Member::Node(_) | Member::ControlPlane => &[("ipv4/ip_forward", "1")],
        Member::Outside => &[],
    }
}

/// Cuts or heals the connection of two members, in both directions, without a word to either.
pub(super) fn set_cut(parts: &Parts, one: Member, other: Member, cut: bool) -> Result<()> {
    if one == other {
        bail!("a cut is between two members, not between {} and itself", one.name());
    }
    for member in [one, other] {
        if !netns::exists(&member.netns()) {
            bail!("{} is not running: there is nothing to cut or heal", member.name());
        }
    }
    nft(parts, &cut_rules(one, other, cut))
}

/// A set of pairs of hardware addresses: the same pair cut twice is cut once, and a heal of what is whole is fine.
fn cut_rules(one: Member, other: Member, cut: bool) -> String {
    let pairs = format!("{{ {} . {}, {} . {} }}", one.mac(), other.mac(), other.mac(), one.mac());
    let add = format!("add element {CUTS} pairs {pairs}\n");
    format!(
        "add table {CUTS}\n\
         add set {CUTS} pairs {{ type ether_addr . ether_addr; }}\n\
         add chain {CUTS} forward {{ type filter hook forward priority 0; }}\n\
         flush chain {CUTS} forward\n\
         add rule {CUTS} forward ether saddr . ether daddr @pairs drop\n\
         {add}{}",
        // Adding before deleting makes the deletion of an absent element no error.
        if cut {
            String::new()
        } else {
            format!("delete element {CUTS} pairs {pairs}\n")
        }
    )
}

/// Whether a machine can have such a network at all: tried in a namespace that goes away with the try.
pub(super) fn probe(parts: &Parts) -> Result<()> {
    let tries = [
        (
            "virtual Ethernet pairs (veth)",
            Program::Ip,
            "link add name pg0 type veth peer name pg1\n",
        ),
        ("bridges", Program::Ip, "link add name pg2 type bridge\n"),
        (
            "nftables for IPv4 with NAT",
            Program::Nft,
            "add table ip t\nadd chain ip t c { type nat hook prerouting priority 0; }\n",
        ),
        (
            "nftables for bridges",
            Program::Nft,
            "add table bridge t\nadd chain bridge t c { type filter hook forward priority 0; }\n",
        ),
    ];
    let bridged = std::path::Path::new("/proc/sys/net/bridge");
    if !bridged.exists() {
        // The answer of a Service to a pod of the same node passes the bridge only: without this its address is not translated back.
        std::process::Command::new("modprobe").arg("br_netfilter").status().ok();
        if !bridged.exists() {
            bail!(
                "this kernel lacks br_netfilter, which Services need on one node: load the module or boot a kernel that has it"
            );
        }
    }
    netns::within_scratch(|| {
        for (what, program, batch) in tries {
            run(parts, program, batch).with_context(|| format!("this kernel lacks {what}, which the nodes' network needs: load the module or boot a kernel that has it"))?;
        }
        Ok(())
    })
}

#[derive(Clone, Copy)]
enum Program {
    Ip,
    Nft,
}

fn ip(parts: &Parts, netns: &str, batch: &str) -> Result<()> {
    netns::within(netns, || run(parts, Program::Ip, batch))
        .with_context(|| format!("cannot set up the network namespace {netns}"))
}

fn nft(parts: &Parts, batch: &str) -> Result<()> {
    netns::within(SWITCH, || run(parts, Program::Nft, batch)).context("cannot change the switch")
}

/// Runs a batch in the calling thread's network namespace.
fn run(parts: &Parts, program: Program, batch: &str) -> Result<()> {
    let mut command = match program {
        Program::Ip => {
            let mut command = parts.tool("ip");
            command.args(["-batch", "-"]);
            command
        }
        Program::Nft => {
            let mut command = parts.tool("nft");
            command.args(["-f", "-"]);
            command
        }
    };
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start a program of the Debian tree")?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that has already failed reads no more: its status says so.
        stdin.write_all(batch.as_bytes()).ok();
    }
    let output = child
        .wait_with_output()
        .context("cannot wait for a program of the Debian tree")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_reaches_all_other_pods_and_not_its_own_by_a_route() {
        let batch = member_side(Member::Node(2));
        assert!(batch.contains("addr add 10.99.0.12/24 dev eth0"));
        assert!(
            batch.contains("route add 10.200.1.0/24 via 10.99.0.11\n")
                && batch.contains("route add 10.200.26.0/24 via 10.99.0.36\n")
        );
        assert!(!batch.contains("10.200.2.0/24"));
        assert!(member_side(Member::Outside).contains("10.200.2.0/24 via 10.99.0.12"));
    }

    #[test]
    fn a_cut_works_both_ways_and_heals_by_the_same_pairs() {
        let (cut, heal) = (
            cut_rules(Member::Node(1), Member::ControlPlane, true),
            cut_rules(Member::Node(1), Member::ControlPlane, false),
        );
        let pairs = "{ 02:50:47:00:00:0b . 02:50:47:00:00:02, 02:50:47:00:00:02 . 02:50:47:00:00:0b }";
        assert!(cut.contains(&format!("add element bridge peregrine_cuts pairs {pairs}")) && !cut.contains("delete"));
        assert!(heal.ends_with(&format!("delete element bridge peregrine_cuts pairs {pairs}\n")));
    }
}
