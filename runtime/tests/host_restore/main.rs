//! The wrapper and its shepherd on real components: runc, CRIU, cgroup v2, a kernel; no Kubernetes.
//!
//! The program plays three parts: outside it looks for what it needs and makes namespaces; inside them (`--inside`) it is the
//! node's first process and plays containerd's shim and the agent; as `/workload` in a container it is its own oracle.
//!
//! Needs root, cgroup v2 and a Debian tree with runc and CRIU: `PEREGRINE_TEST_TREE`, or what the cluster harness has cached.
//! What is missing makes every case a counted skip with its reason.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod agent;
mod cases;
mod container;
mod images;
mod lazy;
mod node;
mod workload;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments[0].ends_with("/workload") {
        workload::run(&arguments[1..]);
    }
    // `cargo test` passes a filter, and flags of the standard harness that mean nothing here.
    let filter = arguments
        .iter()
        .skip(1)
        .find(|a| !a.starts_with("--"))
        .cloned()
        .unwrap_or_default();
    if arguments.iter().any(|a| a == "--list") {
        cases::ALL.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    if arguments.iter().any(|a| a == "--inside") {
        return inside(&filter);
    }
    let chosen = cases::ALL.iter().filter(|(name, _)| name.contains(&filter)).count();
    match node::missing() {
        Some(reason) => {
            for (name, _) in cases::ALL.iter().filter(|(name, _)| name.contains(&filter)) {
                println!("test {name} ... ignored, {reason}");
            }
            println!("\ntest result: ok. 0 passed; 0 failed; {chosen} ignored; 0 measured; 0 filtered out");
            ExitCode::SUCCESS
        }
        None => node::run_inside(&filter),
    }
}

fn inside(filter: &str) -> ExitCode {
    node::set_up();
    let (mut passed, mut failed) = (0, 0);
    println!();
    for (name, case) in cases::ALL.iter().filter(|(name, _)| name.contains(filter)) {
        let begun = std::time::Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| {
            case();
            node::assert_nothing_left();
        }));
        let word = if result.is_ok() { "ok" } else { "FAILED" };
        println!("test {name} ... {word} <{:.3}s>", begun.elapsed().as_secs_f64());
        if result.is_ok() {
            passed += 1;
        } else {
            failed += 1;
            node::clear();
        }
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    let out = cases::ALL.len() - passed - failed;
    println!("\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; {out} filtered out");
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
