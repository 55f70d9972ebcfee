//! Holds a pod's namespaces: the sandbox container of the test cluster.
//!
//! It does nothing, reaps what is reparented to it where a pod shares its PID namespace, and ends at once when told.

use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

fn main() {
    // Signals are taken synchronously: handlers would need unsafe code, and PID 1 of a namespace ignores what it has no handler for.
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
        signals.add(signal);
    }
    if let Err(error) = signals.thread_block() {
        eprintln!("pause: cannot block signals: {error}");
        std::process::exit(1);
    }
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) => {
                while !matches!(
                    waitpid(None, Some(WaitPidFlag::WNOHANG)),
                    Ok(WaitStatus::StillAlive) | Err(_)
                ) {}
            }
            Ok(_) => return,
            Err(error) => {
                eprintln!("pause: cannot wait for a signal: {error}");
                std::process::exit(1);
            }
        }
    }
}
