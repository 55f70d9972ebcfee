//! A program that knows whether it has been moved well: everything it holds, it checks.
//!
//! `run` keeps a random token and counters in memory, a pattern over many MiB, an open file, timers of every kind, threads, children,
//! a segment in /dev/shm and a TCP connection to itself; it serves what it found on HTTP and reports to a witness every few milliseconds.
//! `hold` holds something that cannot be moved. `fetch` is a tiny HTTP client for images without one.

mod args;
mod child;
mod fetch;
mod files;
mod hold;
mod http;
mod memory;
mod run;
mod state;
mod timers;

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (verb, rest) = match args.split_first() {
        Some((verb, rest)) => (verb.as_str(), rest),
        None => ("run", &[][..]),
    };
    let result = match verb {
        "run" => args::Settings::parse(rest).and_then(run::run),
        "child" => child::main(),
        "fetch" => fetch::main(rest),
        "hold" => hold::main(rest),
        "true" => Ok(()),
        other => Err(format!("{other:?} is none of run, hold, fetch, true")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("workload: {message}");
            ExitCode::FAILURE
        }
    }
}
