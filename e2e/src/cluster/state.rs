//! What a cluster is remembered by: its size, its port, what it is made from. Whether it runs is never written down.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::pki::{Pki, write_private};
use super::{forward, pause_image};
use crate::parts::Parts;
use crate::progress;

/// The file in the cluster's folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct State {
    /// How many workers there are.
    pub(super) nodes: u8,
    /// The API server's port on loopback.
    pub(super) port: u16,
    /// All of it came up once: what does not run now was stopped on purpose or died, and is not half made.
    pub(super) complete: bool,
    tree: PathBuf,
    kube: PathBuf,
    helm: PathBuf,
}

/// The folder of the running cluster.
pub(super) fn folder(home: &Path) -> PathBuf {
    home.join("cluster")
}

/// Serialises all that changes the cluster as a whole; waits for whoever has it.
pub(super) fn lock(home: &Path) -> Result<Flock<File>> {
    fs::create_dir_all(home).with_context(|| format!("cannot make the folder {}", home.display()))?;
    let path = home.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, _)) => {
            progress::say("waiting for another `cluster up` or `cluster down`");
            Flock::lock(file, FlockArg::LockExclusive)
                .map_err(|(_, error)| error)
                .with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

impl State {
    /// The state, if there is one; what a killed run wrote half is none.
    pub(super) fn load(home: &Path) -> Result<Option<Self>> {
        let path = folder(home).join("state.json");
        match fs::read(&path) {
            Ok(text) => Ok(serde_json::from_slice(&text).ok()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// A new cluster without nodes: its folder, certificates, admin's kubeconfig and sandbox image.
    pub(super) fn create(home: &Path, parts: &Parts) -> Result<Self> {
        let folder = folder(home);
        fs::create_dir_all(folder.join("images"))
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
        let state = Self {
            nodes: 0,
            port: forward::free_port()?,
            complete: false,
            tree: parts.tree.clone(),
            kube: parts.kube.clone(),
            helm: parts.helm.clone(),
        };
        state.save(home)?;
        let pki = Pki::new(folder.join("pki"));
        pki.create()?;
        let kubeconfig = pki.kubeconfig("admin", &format!("https://127.0.0.1:{}", state.port))?;
        write_private(&folder.join("admin.kubeconfig"), &kubeconfig)?;
        pause_image()?.write(&folder.join("images/pause.tar"))?;
        Ok(state)
    }

    /// What the cluster is made from.
    pub(super) fn parts(&self) -> Parts {
        Parts {
            tree: self.tree.clone(),
            kube: self.kube.clone(),
            helm: self.helm.clone(),
        }
    }

    /// Writes the state, whole or not at all.
    pub(super) fn save(&self, home: &Path) -> Result<()> {
        let path = folder(home).join("state.json");
        let new = path.with_extension("new");
        write_private(&new, &serde_json::to_string_pretty(self)?)?;
        fs::rename(&new, &path).with_context(|| format!("cannot replace {}", path.display()))
    }
}

/// Removes the cluster's folder, disks of the nodes included.
pub(super) fn remove(home: &Path) -> Result<()> {
    let folder = folder(home);
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}
