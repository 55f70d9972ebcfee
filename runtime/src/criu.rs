//! Stands before CRIU in PATH (`<libexec>/criu`): runc finds CRIU by name only and has no option for its environment.
//!
//! It becomes the node's CRIU with the same arguments, and preloads the limits library where the installer says so. Options
//! that runc does not know reach CRIU by `CRIU_CONFIG_FILE`, which the caller sets and which passes through runc; the node's
//! own /etc/criu is never written.

use std::ffi::OsString;
use std::path::Path;

use hostsys::program;
use protocol::hand_off::{CRIU_PRELOAD, RuntimeConfig, SKIP_TRACKED};

/// Becomes CRIU. Returns only when that failed.
#[must_use]
pub fn become_criu(settings: &RuntimeConfig, arguments: &[OsString]) -> program::Error {
    program::replace_by(Path::new(&settings.criu), arguments, &environment(settings))
}

fn environment(settings: &RuntimeConfig) -> Vec<(OsString, OsString)> {
    // Of a dump that leaves tracked memory out: without the library it would dump everything, for nothing.
    let skips = std::env::var_os(SKIP_TRACKED).is_some();
    preload(settings, skips)
        .map(|library| ("LD_PRELOAD".into(), library.into()))
        .into_iter()
        .collect()
}

fn preload(settings: &RuntimeConfig, skips_tracked: bool) -> Option<&str> {
    let limits = settings.limits_preload.as_deref();
    limits.or(skips_tracked.then_some(CRIU_PRELOAD))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_loaded_where_one_of_its_two_uses_is_wanted() {
        let with = |limits: Option<&str>, skips| {
            let settings = RuntimeConfig {
                limits_preload: limits.map(Into::into),
                ..RuntimeConfig::default()
            };
            preload(&settings, skips).map(str::to_owned)
        };
        assert_eq!(with(None, false), None);
        assert_eq!(with(Some("/l.so"), false).as_deref(), Some("/l.so"));
        assert_eq!(with(Some("/l.so"), true).as_deref(), Some("/l.so"));
        assert_eq!(with(None, true).as_deref(), Some(CRIU_PRELOAD));
    }
}
