//! Multipath TCP off in a pod's network namespace, before its programs start.
//!
//! Go since 1.24 listens with Multipath TCP wherever the kernel offers it, and CRIU cannot move such a socket. With
//! `net.mptcp.enabled=0` it takes plain TCP by itself.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use hostsys::namespace::{self, Kind, Namespace};

const SWITCH: &str = "/proc/sys/net/mptcp/enabled";

/// Why it could not be switched off.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace.
    #[error("failed to enter the sandbox's network namespace")]
    Namespace(#[from] namespace::Error),
    /// The switch.
    #[error("failed to write {SWITCH} in the sandbox's network namespace")]
    Write(#[source] std::io::Error),
}

/// Switches it off in the namespace at `path`; never in the node's own. A kernel without it is no error.
///
/// # Errors
/// See [`Error`].
pub fn switch_off(path: &Path) -> Result<(), Error> {
    let sandbox = Namespace::at(path, Kind::Network)?;
    let own = Namespace::at(Path::new("/proc/self/ns/net"), Kind::Network)?;
    if sandbox.inode()? == own.inode()? {
        return Ok(());
    }
    // /proc/sys/net shows the namespace of the thread that opens it.
    let written = namespace::within(&[sandbox], || match File::options().write(true).open(SWITCH) {
        Ok(mut file) => file.write_all(b"0"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    })?;
    written.map_err(Error::Write)
}
