//! The command line: thin verbs over the library. Names, order of arguments and exit codes are a contract for programs outside.

use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};

use super::{Cluster, Machine, Member, Options, control_plane, enter, forward, init, state};
use crate::parts;

/// `cargo xtask cluster …`
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Bring the cluster up, or find it running
    Up {
        /// How many worker nodes
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=i64::from(super::MAX_NODES)))]
        nodes: u8,
    },
    /// Remove everything of the cluster
    Down,
    /// Say what runs and what does not
    Status,
    /// Run kubectl with the cluster's kubeconfig
    Kubectl(Argv),
    /// Run helm with the cluster's kubeconfig
    Helm(Argv),
    /// Print the path of that helm, which is built if it is missing; needs no cluster
    HelmPath,
    /// Run a command in a node, in the control plane's network (cp) or outside the cluster (out)
    Exec {
        /// node-a, node-b, …, cp or out
        node: String,
        /// The command
        #[command(flatten)]
        argv: Argv,
    },
    /// Import an image archive into all nodes
    Load {
        /// An OCI or Docker archive
        archive: PathBuf,
    },
    /// Print the path of a kubeconfig that works on this machine
    Kubeconfig,
    /// Print the log of a component
    Logs {
        /// etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kube-proxy, kubelet, containerd, init or forwarder
        component: String,
        /// The node, for what runs on all of them; all if it is not said
        node: Option<String>,
    },
    /// Crash, start or reboot a node
    Node {
        /// What happens to it
        fault: Power,
        /// node-a, node-b, …
        node: String,
    },
    /// Cut or heal the network between two members
    Net {
        /// What happens to it
        fault: Cable,
        /// node-a, node-b, …, cp or out
        one: String,
        /// The same
        other: String,
    },
    /// Stop or start the API server
    Apiserver {
        /// What happens to it
        order: Order,
    },
}

/// A command with its arguments.
#[derive(Args, Debug)]
pub struct Argv {
    /// Everything after --
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    argv: Vec<String>,
}

/// What can happen to a node.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Power {
    /// Loss of power
    Crash,
    /// Power on
    Start,
    /// One after the other
    Reboot,
}

/// What can happen to the network.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Cable {
    /// All packets are dropped
    Cut,
    /// As before
    Heal,
}

/// What can happen to the API server.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Order {
    /// Kill it and keep it from coming back
    Stop,
    /// Start it and wait until it is ready
    Start,
}

/// Does what a person asked for; the exit code is that of the command that was run.
///
/// # Errors
/// As the library's call behind the verb.
pub fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Up { nodes } => drop(Cluster::up(&Options { nodes })?),
        Verb::Down => Cluster::down()?,
        Verb::Status => return status(),
        Verb::Kubectl(Argv { argv }) => {
            return Err(Cluster::running()?.kubectl().args(argv).exec()).context("cannot run kubectl");
        }
        Verb::Helm(Argv { argv }) => {
            return Err(Cluster::running()?.helm().args(argv).exec()).context("cannot run helm");
        }
        Verb::HelmPath => say(&format!("{}\n", parts::Parts::ensure_helm(&parts::home()?)?.display()))?,
        Verb::Exec {
            node,
            argv: Argv { argv },
        } => {
            let member = Cluster::running()?.member(&node)?;
            return enter::run(member, &argv);
        }
        Verb::Load { archive } => Cluster::running()?.load(&archive)?,
        Verb::Kubeconfig => say(&format!("{}\n", Cluster::running()?.kubeconfig_path().display()))?,
        Verb::Logs { component, node } => logs(&component, node.as_deref())?,
        Verb::Node { fault, node } => {
            let cluster = Cluster::running()?;
            let node = cluster.node(&node)?;
            match fault {
                Power::Crash => cluster.node_crash(node)?,
                Power::Start => cluster.node_start(node)?,
                Power::Reboot => cluster.node_reboot(node)?,
            }
        }
        Verb::Net { fault, one, other } => {
            let cluster = Cluster::running()?;
            let (one, other) = (cluster.member(&one)?, cluster.member(&other)?);
            match fault {
                Cable::Cut => cluster.net_cut(one, other)?,
                Cable::Heal => cluster.net_heal(one, other)?,
            }
        }
        Verb::Apiserver { order: Order::Stop } => Cluster::running()?.apiserver_stop()?,
        Verb::Apiserver { order: Order::Start } => Cluster::running()?.apiserver_start()?,
    }
    Ok(ExitCode::SUCCESS)
}

/// What runs, one line each; the exit code is 0 only if all of it does.
fn status() -> Result<ExitCode> {
    let cluster = Cluster::running()?;
    let mut all = true;
    let mut text = String::new();
    for member in std::iter::once(Member::ControlPlane).chain(cluster.nodes()) {
        let machine = Machine::named(&member.name())?;
        let services = match machine.init() {
            Some(init) => {
                let list = machine.order("list").unwrap_or_else(|error| format!("{error:#}\n"));
                let (running, other): (Vec<&str>, Vec<&str>) =
                    list.lines().partition(|line| line.ends_with(" running"));
                all &= other.is_empty();
                let running: Vec<&str> = running.iter().filter_map(|line| line.split(' ').next()).collect();
                format!(
                    "up, pid {init}: {}{}",
                    running.join(" "),
                    other.iter().map(|line| format!("; {line}")).collect::<String>()
                )
            }
            None => {
                all = false;
                "off".to_owned()
            }
        };
        text.push_str(&format!(
            "{:<8} {:<12} {services}\n",
            member.name(),
            member.address().to_string()
        ));
    }
    text.push_str(&format!("kubeconfig {}\n", cluster.kubeconfig_path().display()));
    say(&text)?;
    Ok(if all { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn logs(component: &str, node: Option<&str>) -> Result<()> {
    let home = parts::home()?;
    let cluster = Cluster::running()?;
    let component = match component {
        "apiserver" => control_plane::API_SERVER,
        "controller-manager" => "kube-controller-manager",
        "scheduler" => "kube-scheduler",
        other => other,
    };
    if component == forward::NAME {
        return print(&state::folder(&home).join("forwarder.log"));
    }
    let members = match node {
        Some(name) => vec![cluster.member(name)?],
        None => std::iter::once(Member::ControlPlane).chain(cluster.nodes()).collect(),
    };
    let found: Vec<(Member, PathBuf)> = members
        .into_iter()
        .map(|member| (member, cluster.log_folder(member).join(format!("{component}.log"))))
        .filter(|(_, path)| path.is_file())
        .collect();
    if found.is_empty() || component.contains('/') {
        bail!(
            "there is no log of {component}{}: see `cluster logs --help` for the names",
            node.map(|node| format!(" on {node}")).unwrap_or_default()
        );
    }
    let many = found.len() > 1;
    for (member, path) in found {
        if many {
            say(&format!("==> {component} on {} <==\n", member.name()))?;
        }
        print(&path)?;
    }
    Ok(())
}

fn print(path: &std::path::Path) -> Result<()> {
    let mut file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    match io::copy(&mut file, &mut io::stdout().lock()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).with_context(|| format!("cannot print {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// To stdout; a reader that had enough is no error.
fn say(text: &str) -> Result<()> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).context("cannot write to stdout"),
        _ => Ok(()),
    }
}

/// What this program does when it calls itself.
///
/// # Errors
/// As the role it is called for.
pub fn internal(argv: &[String]) -> Result<ExitCode> {
    let words: Vec<&str> = argv.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["spawn", spec] => init::spawn(spec.as_ref())?,
        ["init", spec] => init::run(spec.as_ref())?,
        ["forward", port] => forward::run(port.parse().context("a port is a number")?)?,
        ["workshop", "--", ..] => return parts::workshop::become_command(&argv[2..]),
        ["exec", "--", ..] => return Ok(enter::exec(&argv[2..])),
        _ => bail!("this program calls itself with other words than {}", words.join(" ")),
    }
    Ok(ExitCode::SUCCESS)
}
