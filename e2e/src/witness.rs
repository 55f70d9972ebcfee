//! Sees every workload from outside the nodes: two copies at once, a step back, a restart, a pause.
//!
//! Workloads send a datagram for each beat of their main counter ([`Report`]); the [`Ledger`] draws conclusions; the witness serves them as JSON
//! on a UNIX socket. It runs beside the nodes, on their network, so that nothing a migration does to a node can hide a second copy.

mod ledger;
mod report;
mod server;

pub use ledger::{Gap, Ledger, Life};
pub use report::Report;
pub use server::{Answer, ask, end_with_input, run};
