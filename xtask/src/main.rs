//! `cargo xtask`: the gate (`test`), the generators (`generate`) and a short way to the cluster.
//!
//! It compiles in seconds, because everything that needs a cluster lives in `e2e` and is only started from here.

mod gate;
mod generate;
mod repository;
mod style;

use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};

const USAGE: &str = "\
Usage: cargo xtask VERB

  demo [--keep|--down] [--json]      from nothing to a pod that is seen moving
  test [--only NAME]                 everything that must hold before a merge; ends with `N passed, N failed, N skipped`
  bench [--json]                     freeze and its parts, beside stock runc
  cluster up|down|status|kubectl|…   the cluster on this machine (`cargo xtask cluster --help`)
  scenarios [--only NAME]            the scenarios of `test` that need the cluster
  generate [--check]                 CRDs, roles, policies and reference pages from the code
  style                              file sizes, crate rules, words";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<ExitCode> {
    let Some((verb, rest)) = arguments.split_first() else {
        println!("{USAGE}");
        return Ok(ExitCode::from(2));
    };
    let rest: Vec<&str> = rest.iter().map(String::as_str).collect();
    match (verb.as_str(), rest.as_slice()) {
        ("test", []) => gate::run(None),
        ("test", ["--only", name]) => gate::run(Some(name)),
        ("generate", []) => generate::write(),
        ("generate", ["--check"]) => generate::check(),
        ("style", []) => style::run(),
        ("cluster" | "scenarios" | "demo" | "bench", _) => harness(arguments),
        ("help" | "--help" | "-h", _) => {
            println!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        ("test" | "generate" | "style", _) => bail!("`{verb}` does not take {}\n\n{USAGE}", rest.join(" ")),
        _ => bail!("there is no verb `{verb}`\n\n{USAGE}"),
    }
}

/// Builds the harness and becomes it, so that signals and the exit code are its own.
fn harness(arguments: &[String]) -> Result<ExitCode> {
    let root = repository::root();
    // A cluster that is up has been built before: its other verbs print what their command prints, and nothing else.
    let progress = match arguments {
        [verb, what, ..] if verb == "cluster" && what != "up" => repository::Progress::Hidden,
        _ => repository::Progress::Shown,
    };
    repository::build_harness(&root, progress)?;
    let error = repository::harness()?.args(arguments).exec();
    Err(error).context("failed to start the harness")
}
