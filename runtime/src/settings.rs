//! The installer's settings.

use std::path::{Path, PathBuf};

use protocol::hand_off::{RUNTIME_CONFIG, RuntimeConfig};

/// Why they could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("failed to read {RUNTIME_CONFIG}: reinstall Peregrine's node agent on this node")]
    Read(#[source] std::io::Error),
    /// Its content.
    #[error("{RUNTIME_CONFIG} is not valid: reinstall Peregrine's node agent on this node")]
    Parse(#[source] serde_json::Error),
}

/// Reads them. An absent file means the usual places: the handler may outlive its settings for a moment while it is
/// uninstalled, and pods that run must still be stopped then.
///
/// # Errors
/// See [`Error`].
pub fn read() -> Result<RuntimeConfig, Error> {
    match std::fs::read(RUNTIME_CONFIG) {
        Ok(text) => serde_json::from_slice(&text).map_err(Error::Parse),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(RuntimeConfig {
            oci_runtime: usual("runc"),
            criu: usual("criu"),
            ..RuntimeConfig::default()
        }),
        Err(error) => Err(Error::Read(error)),
    }
}

fn usual(program: &str) -> String {
    [
        "/usr/sbin",
        "/usr/bin",
        "/usr/local/sbin",
        "/usr/local/bin",
        "/sbin",
        "/bin",
    ]
    .iter()
    .map(|folder| Path::new(folder).join(program))
    .find(|path| path.exists())
    .unwrap_or_else(|| PathBuf::from("/usr/sbin").join(program))
    .display()
    .to_string()
}
