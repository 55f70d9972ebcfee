//! The command line. Every flag can come from the environment, as the DaemonSet sets it.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};

/// The node's agent of Peregrine.
#[derive(Clone, Debug, Parser)]
#[command(name = "node-agent", version, about, args_conflicts_with_subcommands = true)]
pub struct Args {
    /// What to do; `run` when absent.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Flags of `run`.
    #[command(flatten)]
    pub run: RunArgs,
}

/// What the program can do.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Installs on the node, publishes its MigrationNode and carries out its part of migrations.
    Run(RunArgs),
    /// Installs on this node and ends: what `run` does first, by hand and without an API server.
    Install(HostArgs),
    /// Undoes the installation on this node.
    Uninstall(HostArgs),
    /// Prints what this node can do as JSON, and changes nothing.
    Probe(HostArgs),
    /// Prints what the preflight finds in the processes of a pod on this node, as JSON, and changes nothing. What the pod's
    /// spec alone tells (volumes, terminals) is left out: it asks no API server.
    Inspect(InspectArgs),
    /// Prints every step of a move as JSON: where tests can inject faults.
    Steps,
}

/// Which pod.
#[derive(Clone, Debug, ClapArgs)]
pub struct InspectArgs {
    /// How the node is reached.
    #[command(flatten)]
    pub host: HostArgs,
    /// Uid of the pod.
    pub pod_uid: String,
}

/// How the node is reached.
#[derive(Clone, Debug, ClapArgs)]
pub struct HostArgs {
    /// Join the namespaces of process 1 (the node's, in a pod with hostPID). Without it the agent works where it stands.
    #[arg(long, env = "HOST_PID")]
    pub host_pid: bool,
    /// Log lines as JSON.
    #[arg(long, env = "LOG_JSON")]
    pub log_json: bool,
}

/// Flags of `run`.
#[derive(Clone, Debug, ClapArgs)]
pub struct RunArgs {
    /// How the node is reached.
    #[command(flatten)]
    pub host: HostArgs,
    /// Name of the node.
    #[arg(long, env = "NODE_NAME", default_value = "")]
    pub node_name: String,
    /// The release namespace: our CA, the leases.
    #[arg(long, env = "POD_NAMESPACE", default_value = "peregrine-system")]
    pub namespace: String,
    /// Address on which peers reach this agent (the node's).
    #[arg(long, env = "HOST_IP")]
    pub advertise_address: Option<IpAddr>,
    /// TCP port for peers.
    #[arg(long, env = "PEER_PORT", default_value_t = crds::names::PORT_AGENT)]
    pub peer_port: u16,
    /// TCP port of /healthz, /readyz and /metrics.
    #[arg(long, env = "ADMIN_PORT", default_value_t = crds::names::PORT_ADMIN)]
    pub admin_port: u16,
    /// Most bytes of checkpoints in this node's memory at once. The least of this and the share of the free memory counts.
    #[arg(long, env = "CHECKPOINT_LIMIT_BYTES")]
    pub checkpoint_limit_bytes: Option<u64>,
    /// Share of the node's available memory that checkpoints may use, in percent.
    #[arg(long, env = "CHECKPOINT_SHARE_PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(1..=90))]
    pub checkpoint_share_percent: u8,
    /// URL of the API server, instead of the pod's environment. For work outside of a pod.
    #[arg(long, env = "PEREGRINE_KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Lets tests make steps fail, hang or crash (PEREGRINE_FAULT). Never set it on a cluster that matters.
    #[arg(long, env = "PEREGRINE_ENABLE_FAULT_INJECTION")]
    pub enable_fault_injection: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Args::command().debug_assert();
    }

    #[test]
    fn run_is_the_default() {
        let args = Args::try_parse_from(["node-agent", "--node-name", "a", "--host-pid"]).unwrap();
        assert!(args.command.is_none());
        assert_eq!(args.run.node_name, "a");
        assert!(args.run.host.host_pid);
        let args = Args::try_parse_from(["node-agent", "run", "--node-name", "b"]).unwrap();
        assert!(matches!(args.command, Some(Command::Run(run)) if run.node_name == "b"));
    }

    #[test]
    fn a_share_above_what_leaves_room_is_refused() {
        assert!(Args::try_parse_from(["node-agent", "--checkpoint-share-percent", "95"]).is_err());
    }
}
