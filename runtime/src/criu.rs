//! Stands before CRIU in PATH (`<libexec>/criu`): runc finds CRIU by name only and has no option for its environment.
//!
//! It becomes the CRIU that the installer chose (the node's, or that of the agent's image) with the same arguments, and preloads the limits library where the installer says so. Options
//! that runc does not know reach CRIU by `CRIU_CONFIG_FILE`, which the caller sets and which passes through runc; the node's
//! own /etc/criu is never written.

use std::ffi::OsString;
use std::path::Path;

use hostsys::program;
use protocol::hand_off::RuntimeConfig;

/// Becomes CRIU. Returns only when that failed.
#[must_use]
pub fn become_criu(settings: &RuntimeConfig, arguments: &[OsString]) -> program::Error {
    let (program, first) = settings.criu_command();
    let all: Vec<OsString> = first
        .into_iter()
        .map(OsString::from)
        .chain(arguments.iter().cloned())
        .collect();
    program::replace_by(Path::new(program), &all, &environment(settings))
}

fn environment(settings: &RuntimeConfig) -> Vec<(OsString, OsString)> {
    settings
        .preload
        .iter()
        .map(|library| ("LD_PRELOAD".into(), library.into()))
        .collect()
}
