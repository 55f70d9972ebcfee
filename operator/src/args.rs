//! Command line and environment.

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

/// Moves the running processes of pods to other nodes: the part that talks to the Kubernetes API.
#[derive(Debug, Parser)]
#[command(name = "operator", version)]
pub struct Args {
    /// What to do. Absent: run the operator.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Settings of the operator.
    #[command(flatten)]
    pub run: Run,
}

/// What else the program does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Ends all migrations and undoes what the agents installed on the nodes; run before `helm uninstall`.
    Uninstall {
        /// Give up after so many seconds.
        #[arg(long, default_value_t = 240)]
        timeout_seconds: u64,
    },
}

/// Settings of the operator.
#[derive(Clone, Debug, ClapArgs)]
pub struct Run {
    /// Namespace of the release: leases, CA.
    #[arg(long, env = "POD_NAMESPACE", default_value = "peregrine-system", global = true)]
    pub namespace: String,
    /// Name of this replica.
    #[arg(long, env = "POD_NAME", global = true)]
    pub name: Option<String>,
    /// Port of /healthz, /readyz and /metrics.
    #[arg(long, env = "PEREGRINE_ADMIN_PORT", default_value_t = crds::names::PORT_ADMIN)]
    pub admin_port: u16,
    /// Most moves at once in the cluster.
    #[arg(long, env = "PEREGRINE_MAX_MOVES", default_value_t = 5)]
    pub max_moves: usize,
    /// Most moves at once from one node, where its MigrationNode does not say otherwise.
    #[arg(long, env = "PEREGRINE_MAX_OUTBOUND", default_value_t = 1)]
    pub max_outbound: usize,
    /// Most moves at once to one node, where its MigrationNode does not say otherwise.
    #[arg(long, env = "PEREGRINE_MAX_INBOUND", default_value_t = 2)]
    pub max_inbound: usize,
    /// Form of the log.
    #[arg(long, env = "PEREGRINE_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text, global = true)]
    pub log_format: LogFormat,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}
