//! The test cluster's command line; also the init of its machines, by calling itself.

use std::process::ExitCode;

use clap::Parser;
use e2e::{api_server, bench, cluster, demo, scenario, witness};

/// A real Kubernetes cluster on this machine.
#[derive(Debug, Parser)]
#[command(name = "peregrine-e2e", disable_help_subcommand = true)]
enum Command {
    /// The cluster: up, down, ways in, faults
    #[command(subcommand)]
    Cluster(cluster::Verb),
    /// From nothing to a pod that is seen moving
    Demo(demo::Settings),
    /// The freeze and its parts, beside stock runc
    Bench(bench::Settings),
    /// What must be shown on a real cluster
    Scenarios {
        /// Only those with this in their name; may be repeated
        #[arg(long)]
        only: Vec<String>,
        /// Only say their names
        #[arg(long)]
        list: bool,
        /// On the cluster of KUBECONFIG, without faults of nodes
        #[arg(long)]
        any_cluster: bool,
    },
    /// Talk nonsense to an agent
    #[command(hide = true)]
    Pest {
        /// Where the agent listens
        address: std::net::SocketAddr,
        /// noise, silence, http or flood
        case: String,
    },
    /// Run a command beside an API server and nothing else (KUBECONFIG)
    ApiServer {
        /// Everything after --
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        argv: Vec<String>,
    },
    /// Listen for the beats of workloads
    #[command(hide = true)]
    Witness {
        /// Address for datagrams
        listen: std::net::SocketAddr,
        /// Socket for questions
        socket: std::path::PathBuf,
    },
    /// Roles in which this program calls itself
    #[command(hide = true)]
    Internal {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        argv: Vec<String>,
    },
}

fn main() -> ExitCode {
    // Parsed by hand: what follows is a command of someone else, with `--` and flags of its own.
    let args: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|arg| arg.to_string_lossy().into_owned())
        .collect();
    let result = match args.split_first() {
        Some((word, rest)) if word == "internal" => cluster::internal(rest),
        _ => match Command::parse() {
            Command::Cluster(verb) => cluster::run(verb),
            Command::Demo(settings) => demo::run(settings),
            Command::Bench(settings) => bench::run(&settings),
            Command::Scenarios {
                only,
                list,
                any_cluster,
            } => scenario::run(&scenario::Settings {
                only,
                list,
                any_cluster,
            })
            .map(|outcome| {
                if outcome.failed == 0 {
                    ExitCode::SUCCESS
                } else {
                    ExitCode::FAILURE
                }
            }),
            Command::Pest { address, case } => scenario::pest(address, &case).map(|()| ExitCode::SUCCESS),
            Command::ApiServer { argv } => api_server::run(&argv),
            Command::Witness { listen, socket } => {
                witness::end_with_input();
                witness::run(listen, &socket).map(|()| ExitCode::SUCCESS)
            }
            Command::Internal { argv } => cluster::internal(&argv),
        },
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
