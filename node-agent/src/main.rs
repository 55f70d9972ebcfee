//! `node-agent`: see the crate's library.

use std::process::ExitCode;

use clap::Parser as _;
use node_agent::args::Args;

fn main() -> ExitCode {
    node_agent::start(&Args::parse())
}
