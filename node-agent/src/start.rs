//! From the command line to the work: the node's namespaces first, while there is one thread; then everything else.

use std::process::ExitCode;

use crds::process_migration::Connections;
use k8s_openapi::api::core::v1::Pod;
use tracing_subscriber::EnvFilter;

use crate::args::{Args, Command, HostArgs};
use crate::decide::preflight::{Question, judge};
use crate::decide::step::Step;
use crate::error::chain;
use crate::host::Host;
use crate::install::undo::undo;
use crate::{install, inventory, pod_on_node, probe, run};

/// Does what the command line says.
#[must_use]
pub fn start(args: &Args) -> ExitCode {
    let command = args.command.clone().unwrap_or(Command::Run(args.run.clone()));
    let host_args = match &command {
        Command::Steps => return print_steps(),
        Command::Run(run) => &run.host,
        Command::Install(host) | Command::Uninstall(host) | Command::Probe(host) => host,
        Command::Inspect(inspect) => &inspect.host,
    };
    log(host_args);
    let host = match Host::enter(host_args.host_pid) {
        Ok(host) => host,
        Err(error) => return failed(&error),
    };
    // Two threads: the work is waiting, and what takes time runs in programs of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(128)
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error),
    };
    match command {
        Command::Run(args) => match runtime.block_on(run::run(args, host)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&error),
        },
        Command::Install(_) => match runtime.block_on(install::install(&host)) {
            Ok(installed) => {
                println!(
                    "installed beside {} {}, restarted: {}",
                    installed.runtime.name, installed.runtime.version, installed.restarted
                );
                ExitCode::SUCCESS
            }
            Err(error) => failed(&error),
        },
        Command::Uninstall(_) => match runtime.block_on(undo()) {
            Ok(undone) => {
                println!("{}", undone.message());
                ExitCode::SUCCESS
            }
            Err(error) => failed(&error),
        },
        Command::Probe(_) => print_probe(),
        Command::Inspect(inspect) => print_inspection(&inspect.pod_uid),
        Command::Steps => print_steps(),
    }
}

/// Every step of both roles: name, role, what undoes it.
fn print_steps() -> ExitCode {
    let steps: Vec<serde_json::Value> = Step::ALL
        .iter()
        .map(|step| {
            serde_json::json!({
                "step": step.name(),
                "role": step.role().as_str(),
                "undoneBy": step.undo_of().map(Step::name),
                "afterCommit": step.is_after_commit(),
                "deadlineSeconds": step.deadline().as_secs(),
            })
        })
        .collect();
    println!("{}", serde_json::Value::from(steps));
    ExitCode::SUCCESS
}

fn failed(error: &(dyn std::error::Error + 'static)) -> ExitCode {
    let text = chain(error);
    tracing::error!(error = text, "ended");
    ExitCode::FAILURE
}

fn log(args: &HostArgs) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if args.log_json {
        builder.json().init();
    } else {
        builder.with_ansi(false).init();
    }
}

/// The report of a pod's processes; fails when something stands against moving them.
fn print_inspection(uid: &str) -> ExitCode {
    let on_node = match pod_on_node::find(uid) {
        Ok(on_node) => on_node,
        Err(error) => return failed(&error),
    };
    let inventory = inventory::take(&Pod::default(), &on_node);
    let report = judge(Question {
        inventory: &inventory,
        connections: Connections::BestEffort,
        node: "",
        checkpoint_limit_bytes: u64::MAX,
    });
    let text = serde_json::json!({
        "pod": format!("{}/{}", on_node.namespace, on_node.name),
        "checks": report.checks,
        "memoryBytes": report.memory_bytes,
        "predictedFreezeMilliseconds": report.predicted_freeze_milliseconds,
    });
    println!("{text:#}");
    if report.refusals().next().is_none() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// One JSON object; fails when something that moves need is missing.
fn print_probe() -> ExitCode {
    let containerd = install::containerd::find();
    let oci = containerd
        .and_then(|c| c.dump().and_then(|dump| c.oci_runtime(&dump)))
        .ok()
        .flatten();
    let probe = probe::everything(oci.as_deref(), install::criu::in_place().as_ref());
    let text = serde_json::json!({
        "architecture": probe.architecture,
        "kernel": probe.kernel,
        "cpu": probe.cpu,
        "criu": probe.criu,
        "ociRuntime": probe.oci_version,
        "missing": probe.missing,
    });
    println!("{text:#}");
    if probe.missing.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
