//! The installation on the node: the wrapper, CRIU's surroundings, the runtime handler; and its exact undo.
//!
//! ```text
//! /opt/peregrine/bin/peregrine-runc    the wrapper, from our image
//! /opt/peregrine/lib/limits.so         preload for CRIU on machines that withhold CAP_SYS_RESOURCE
//! /opt/peregrine/criu/<digest>/        CRIU of our image with its libraries, where the node has none
//! /opt/peregrine/libexec/criu          the wrapper under another name: what runc finds as `criu`
//! /opt/peregrine/libexec/tar           the same: what CRIU finds as `tar`
//! /opt/peregrine/etc/runtime.json      settings of the wrapper
//! /opt/peregrine/etc/installed.json    what was changed elsewhere, for the undo
//! <folder that containerd imports>/peregrine.toml
//! ```
//! Every step is idempotent and every write atomic; containerd is restarted only when what it reads has changed since the
//! last restart that succeeded. When it fails: nothing else of the node has changed, the MigrationNode says why, and it is
//! tried again.

pub mod containerd;
pub mod containerd_config;
pub mod cri;
pub mod criu;
pub mod files;
pub mod keep;
pub mod record;
pub mod undo;

use std::path::{Path, PathBuf};

use protocol::hand_off::{RUNTIME_CONFIG, RuntimeConfig};
use sha2::{Digest as _, Sha256};

use self::containerd::Containerd;
use self::record::{MainFile, Record};
use crate::host::Host;

/// Everything that stays on the node's disk and is ours.
pub const PREFIX: &str = "/opt/peregrine";
/// The wrapper.
pub const WRAPPER: &str = "/opt/peregrine/bin/peregrine-runc";
/// The preload for CRIU.
pub const LIMITS: &str = "/opt/peregrine/lib/limits.so";
/// Folder that is put first in PATH for checkpoints and restores.
pub const LIBEXEC: &str = "/opt/peregrine/libexec";
/// How long `create` of a target waits for its hand-off. Longer than an agent's restart, shorter than the kubelet's two
/// minutes, after which a pod with restartPolicy Never is failed for good.
const HAND_OFF_TIMEOUT_SECONDS: u32 = 60;

/// Why the installation did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Our image lacks a program.
    #[error("the agent's image has no {0}")]
    Image(String, #[source] std::io::Error),
    /// A file could not be written.
    #[error(transparent)]
    File(#[from] files::Error),
    /// containerd.
    #[error(transparent)]
    Containerd(#[from] containerd::Error),
    /// No runc.
    #[error("the OCI runtime below the wrapper was not found on the node: install runc")]
    NoOciRuntime,
    /// The configuration with our file is not the one without, plus our handler.
    #[error("containerd does not take {0} as an addition to its configuration; nothing was changed")]
    NotTaken(PathBuf),
    /// Something is under way that a restart of containerd would disturb.
    #[error("containerd must be restarted, but {0}; it is tried again")]
    Busy(String),
    /// A task of ours ended early.
    #[error("the installation was interrupted")]
    Interrupted,
}

/// What was installed, for the MigrationNode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    /// Name and version of the runtime.
    pub runtime: cri::RuntimeVersion,
    /// The OCI runtime below the wrapper.
    pub oci_runtime: PathBuf,
    /// CRIU, where there is one.
    pub criu: Option<criu::Criu>,
    /// The CRI socket.
    pub socket: PathBuf,
    /// Whether containerd was restarted for it just now.
    pub restarted: bool,
}

/// Installs everything, or finds it installed.
///
/// # Errors
/// See [`Error`].
pub async fn install(host: &Host) -> Result<Installed, Error> {
    let host = host.clone();
    let plan = tokio::task::spawn_blocking(move || prepare(&host))
        .await
        .map_err(|_| Error::Interrupted)??;
    let listed = cri::handlers(&plan.socket).await.unwrap_or_default();
    let in_force = plan.restarted_for.as_deref() == Some(&plan.digest)
        && (listed.is_empty() || listed.iter().any(|h| h == crds::names::RUNTIME_CLASS));
    if !in_force {
        if let Some(reason) = undo::target_under_way() {
            return Err(Error::Busy(reason));
        }
        tracing::info!(config = %plan.containerd.config.display(), "restarting containerd once for the new handler");
        plan.containerd.restart(&plan.socket, true).await?;
        let mut record = Record::read()?.unwrap_or_default();
        record.restarted_for = Some(plan.digest.clone());
        record.write()?;
    }
    let runtime = cri::version(&plan.socket).await.unwrap_or_else(|error| {
        tracing::warn!(%error, "containerd's version is not known");
        cri::RuntimeVersion {
            name: "containerd".into(),
            version: String::new(),
        }
    });
    Ok(Installed {
        runtime,
        oci_runtime: plan.oci_runtime,
        criu: plan.criu,
        socket: plan.socket,
        restarted: !in_force,
    })
}

/// What has to be in force after the files are in place.
struct Plan {
    containerd: Containerd,
    socket: PathBuf,
    oci_runtime: PathBuf,
    criu: Option<criu::Criu>,
    /// Of what containerd reads: changes when a restart is needed.
    digest: String,
    restarted_for: Option<String>,
}

/// Puts all files in place.
fn prepare(host: &Host) -> Result<Plan, Error> {
    let containerd = containerd::find()?;
    let before = containerd.dump()?;
    let oci_runtime = containerd.oci_runtime(&before)?.ok_or(Error::NoOciRuntime)?;
    copy_from_image(host, "/peregrine-runc", WRAPPER)?;
    if host.image_has("/limits.so") {
        copy_from_image(host, "/limits.so", LIMITS)?;
    }
    let criu = criu::install(host)?;
    write_runtime_config(&oci_runtime, criu.as_ref())?;
    criu::remove_others(criu.as_ref())?;
    let drop_in = write_handler(&containerd, &before)?;
    let record = Record::read()?.unwrap_or_default();
    let text = files::read_optional(&drop_in)?.unwrap_or_default();
    Ok(Plan {
        socket: before.socket(),
        digest: protocol::sealed::hex(&Sha256::digest(text)),
        restarted_for: record.restarted_for,
        containerd,
        oci_runtime,
        criu,
    })
}

fn copy_from_image(host: &Host, from: &str, to: &str) -> Result<(), Error> {
    let content = std::fs::read(host.in_image(from)).map_err(|e| Error::Image(from.to_owned(), e))?;
    if files::write_if_different(Path::new(to), &content, 0o755)? {
        tracing::info!(file = to, bytes = content.len(), "installed");
    }
    Ok(())
}

fn write_runtime_config(oci_runtime: &Path, criu: Option<&criu::Criu>) -> Result<(), Error> {
    let text = |path: &Path| path.display().to_string();
    let config = RuntimeConfig {
        oci_runtime: text(oci_runtime),
        libexec: LIBEXEC.to_owned(),
        hand_off_timeout_seconds: HAND_OFF_TIMEOUT_SECONDS,
        preload: criu::preload().as_deref().map(text),
        // A node without CRIU has no targets; the default's name is for the error text.
        ..criu.map(criu::Criu::settings).unwrap_or_default()
    };
    let text = serde_json::to_vec_pretty(&config).map_err(|_| Error::Interrupted)?;
    files::write_if_different(Path::new(RUNTIME_CONFIG), &text, 0o644)?;
    Ok(())
}

/// Writes the handler's file, and the main file where it must import it; both are taken back when containerd does not
/// read them as an addition. Returns the handler's file.
fn write_handler(containerd: &Containerd, before: &containerd_config::Dump) -> Result<PathBuf, Error> {
    let recorded = Record::read()?;
    if let Some(record) = &recorded
        && record.drop_in.exists()
        && before.is_installed(WRAPPER).map_err(containerd::Error::from)?
    {
        return Ok(record.drop_in.clone());
    }
    // The file that a symbolic link names is what must keep its place.
    let main = std::fs::canonicalize(&containerd.config).unwrap_or_else(|_| containerd.config.clone());
    let text = files::read_optional(&main)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let placement =
        containerd_config::place(&main, text.as_deref(), before.version()).map_err(containerd::Error::from)?;
    let folder = placement
        .drop_in
        .parent()
        .unwrap_or(Path::new("/etc/containerd"))
        .to_owned();
    let record = Record {
        config: main.clone(),
        drop_in: placement.drop_in.clone(),
        made_folder: (!folder.exists())
            .then_some(folder)
            .or(recorded.as_ref().and_then(|r| r.made_folder.clone())),
        main: match &placement.main {
            Some(edited) => MainFile::Edited {
                original: text.clone(),
                edited: edited.clone(),
            },
            None => recorded.map_or(MainFile::Untouched, |r| r.main),
        },
        restarted_for: None,
    };
    // First what is needed to undo, then the change.
    record.write()?;
    for whole in [false, true] {
        let drop_in = before.drop_in(WRAPPER, whole).map_err(containerd::Error::from)?;
        files::write(&placement.drop_in, drop_in.as_bytes(), 0o644)?;
        if let Some(edited) = &placement.main {
            files::write(&main, edited.as_bytes(), files::mode_of(&main, 0o644))?;
        }
        let taken = match containerd.dump() {
            Ok(after) => {
                after.is_installed(WRAPPER).map_err(containerd::Error::from)? && after.others() == before.others()
            }
            Err(error) => {
                tracing::warn!(%error, "containerd does not read its configuration with our file");
                false
            }
        };
        if taken {
            tracing::info!(drop_in = %placement.drop_in.display(), whole, "runtime handler configured");
            return Ok(placement.drop_in);
        }
    }
    record.undo()?;
    Record::remove()?;
    Err(Error::NotTaken(placement.drop_in))
}
