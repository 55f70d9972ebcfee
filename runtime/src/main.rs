//! `peregrine-runc`: one program, told apart by the name under which it is called.

use std::process::ExitCode;

fn main() -> ExitCode {
    runtime::run::run(std::env::args_os().collect())
}
