//! What one machine of the cluster is made of: written by `up`, read by the machine's own init.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A machine: a root file system, folders that outlast its death, and services.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct MachineSpec {
    /// Its host name, cgroup, and network namespace (with the prefix).
    pub(super) name: String,
    /// This program, as the host knows it.
    pub(super) program: PathBuf,
    /// Shared lower layer of the root.
    pub(super) tree: PathBuf,
    /// The machine's disk.
    pub(super) disk: PathBuf,
    /// Seconds that its clocks since boot are ahead of the host's.
    pub(super) clock_offset: Option<u64>,
    /// Folders of the host, in the machine.
    pub(super) binds: Vec<Bind>,
    /// Services in the order of their start.
    pub(super) services: Vec<Service>,
}

/// A folder of the host at a place in the machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Bind {
    pub(super) from: PathBuf,
    /// In the machine.
    pub(super) to: PathBuf,
    pub(super) read_only: bool,
}

/// A program that init starts, and starts again whenever it ends.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Service {
    pub(super) name: String,
    /// What must be there before it is started.
    pub(super) after: Vec<Condition>,
    /// Commands that must succeed before each start.
    pub(super) before: Vec<Vec<String>>,
    pub(super) argv: Vec<String>,
}

/// A level that can be waited for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Condition {
    /// Somebody accepts on this Unix socket.
    Socket(PathBuf),
    /// Somebody accepts at this TCP address.
    Tcp(String),
}

impl MachineSpec {
    /// The root of the overlay, on the disk.
    pub(super) fn root(&self) -> PathBuf {
        self.disk.join("root")
    }

    /// The writable layer of the root.
    pub(super) fn upper(&self) -> PathBuf {
        self.disk.join("upper")
    }

    /// Its `/var/log`.
    pub(super) fn logs(&self) -> PathBuf {
        self.disk.join("log")
    }
}

/// Where init listens for orders, in the machine.
pub(super) const CONTROL_SOCKET: &str = "/run/peregrine-e2e.sock";
