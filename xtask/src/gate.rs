//! `cargo xtask test`: everything that must hold before a merge.
//!
//! One line per check with its time, the output of what failed, and as the very last line `N passed, N failed, N skipped`.
//! The order lets everything compile once: the lints share their results with the documentation, the tests theirs with the
//! programs that the cluster runs.

mod cargo;
mod chart;
mod scenarios;
mod tally;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::{generate, repository, style};
use tally::{Outcome, Tally};

/// A check of the gate.
struct Check {
    name: &'static str,
    /// Prints nothing while it runs but lines about its parts; an error is a failure.
    run: fn(&Path, &mut Tally) -> Result<Outcome>,
}

const CHECKS: &[Check] = &[
    Check {
        name: "format",
        run: |root, _| cargo::format(root),
    },
    Check {
        name: "generate",
        run: |root, _| Ok(Outcome::of(generate::drift(root)?)),
    },
    Check {
        name: "style",
        run: |root, _| Ok(Outcome::of(style::complaints(root)?)),
    },
    Check {
        name: "clippy",
        run: |root, _| cargo::clippy(root),
    },
    Check {
        name: "doc",
        run: |root, _| cargo::doc(root),
    },
    // Before the others: it makes the parts that some of them use.
    Check {
        name: "api",
        run: cargo::live,
    },
    Check {
        name: "tests",
        run: cargo::tests,
    },
    Check {
        name: "chart",
        run: |root, _| chart::run(root),
    },
    Check {
        name: "scenarios",
        run: |root, tally| scenarios::run(root, None, tally),
    },
];

/// Runs all checks, or the one of this name; a name that is no check is taken for a scenario's.
pub(crate) fn run(only: Option<&str>) -> Result<ExitCode> {
    let root = repository::root();
    cargo::components(&root)?;
    let mut tally = Tally::default();
    let started = Instant::now();
    match only {
        None => CHECKS.iter().for_each(|check| one(check, &root, &mut tally)),
        Some(name) => match CHECKS.iter().find(|check| check.name == name) {
            Some(check) => one(check, &root, &mut tally),
            None => {
                let before = tally.total();
                tally.timed(name, |tally| scenarios::run(&root, Some(name), tally));
                if tally.total() == before {
                    let names: Vec<&str> = CHECKS.iter().map(|check| check.name).collect();
                    bail!(
                        "there is no check and no scenario `{name}`; the checks are {}",
                        names.join(", ")
                    );
                }
            }
        },
    }
    println!("\nafter {}", tally::duration(started.elapsed()));
    tally.print_failures();
    println!("{}", tally.summary());
    Ok(if tally.failed() == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn one(check: &Check, root: &Path, tally: &mut Tally) {
    tally.timed(check.name, |tally| (check.run)(root, tally));
}
