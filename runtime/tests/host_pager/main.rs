//! The pager on a real kernel, without CRIU: programs whose pages come from a store while they fork, move, drop and write
//! their memory, and while pager, guardian and deputy are killed. Each program is its own oracle.
//!
//! This program plays the driver and, as `--program`, the pod. Needs root, userfaultfd and cgroup v2.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod driver;
mod program;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

type Case = (&'static str, fn());

const ALL: &[Case] = &[
    ("all_pages_arrive_and_the_store_is_given_back", driver::all_pages_arrive),
    ("memory_operations_while_it_is_filled", driver::memory_operations),
    ("a_killed_pager_goes_on", driver::killed_pager),
    ("a_killed_guardian_is_replaced", driver::killed_guardian),
    ("a_killed_deputy_is_replaced", driver::killed_deputy),
    ("all_are_killed_in_turn_while_memory_is_changed", driver::killed_in_turn),
    ("pager_and_guardian_killed_at_once", driver::killed_at_once),
    (
        "killed_before_the_restore_has_finished_kills_the_pod",
        driver::killed_early,
    ),
    ("a_store_that_lies_kills_the_pod", driver::short_store),
    ("given_up_kills_the_pod", driver::given_up),
    ("several_processes_of_two_containers", driver::several),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.get(1).is_some_and(|a| a == "--program") {
        return program::run(&arguments[2..]);
    }
    let filter = arguments
        .iter()
        .skip(1)
        .find(|a| !a.starts_with("--"))
        .cloned()
        .unwrap_or_default();
    let chosen: Vec<&Case> = ALL.iter().filter(|(name, _)| name.contains(&filter)).collect();
    if arguments.iter().any(|a| a == "--list") {
        chosen.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    if let Some(why) = driver::missing() {
        for (name, _) in &chosen {
            println!("test {name} ... ignored, {why}");
        }
        println!(
            "\ntest result: ok. 0 passed; 0 failed; {} ignored; 0 measured; 0 filtered out",
            chosen.len()
        );
        return ExitCode::SUCCESS;
    }
    let mut failed = 0;
    for (name, case) in &chosen {
        let begun = std::time::Instant::now();
        let ok = catch_unwind(AssertUnwindSafe(case)).is_ok();
        let word = if ok { "ok" } else { "FAILED" };
        println!("test {name} ... {word} <{:.3}s>", begun.elapsed().as_secs_f64());
        failed += usize::from(!ok);
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {word}. {} passed; {failed} failed; 0 ignored; 0 measured; {} filtered out",
        chosen.len() - failed,
        ALL.len() - chosen.len()
    );
    ExitCode::from(u8::from(failed != 0))
}
