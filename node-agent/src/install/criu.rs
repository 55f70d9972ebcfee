//! CRIU on the node: the node's own, or that of our image; and whether it needs the preload for limits.
//!
//! Our image's comes with its libraries and their loader (`node-agent/criu-bundle.sh` makes the folder), so that it runs on
//! any node. It lies in a folder that is named after its content: an upgrade of the agent never changes a library below a
//! CRIU that runs, and what the wrapper reads names one whole set or the other.

use std::path::{Path, PathBuf};

use hostsys::program::Program;
use protocol::hand_off::{RUNTIME_CONFIG, RuntimeConfig};
use sha2::{Digest as _, Sha256};

use super::{Error, LIBEXEC, LIMITS, PREFIX, WRAPPER, containerd, files, undo};
use crate::host::Host;
use crate::probe;

/// CRIU in our image, with all that it needs.
const IN_IMAGE: &str = "/criu";
/// CRIU and its loader in that folder.
const PROGRAM: &str = "criu";
const LOADER: &str = "loader";

/// A CRIU and how it is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Criu {
    /// CRIU itself.
    pub path: PathBuf,
    /// The loader that starts it, where it came from our image.
    pub loader: Option<PathBuf>,
}

impl Criu {
    /// As the wrapper reads it.
    #[must_use]
    pub fn settings(&self) -> RuntimeConfig {
        RuntimeConfig {
            criu: self.path.display().to_string(),
            criu_loader: self.loader.as_ref().map(|path| path.display().to_string()),
            ..RuntimeConfig::default()
        }
    }

    /// A call of it.
    #[must_use]
    pub fn program(&self) -> Program {
        let settings = self.settings();
        let (program, first) = settings.criu_command();
        Program::new(program).args(first)
    }
}

/// The node's CRIU.
fn of_the_node() -> Option<Criu> {
    let path = std::env::var("PATH").unwrap_or_default();
    let path = containerd::find_program("criu", &path)?;
    Some(Criu { path, loader: None })
}

/// The CRIU that an installation would find or has put in place.
#[must_use]
pub fn in_place() -> Option<Criu> {
    let installed = || {
        let config: RuntimeConfig = serde_json::from_slice(&std::fs::read(RUNTIME_CONFIG).ok()?).ok()?;
        let criu = Criu {
            path: config.criu.into(),
            loader: Some(config.criu_loader?.into()),
        };
        criu.path.is_file().then_some(criu)
    };
    installed().or_else(of_the_node)
}

/// The CRIU to use: the node's where it is new enough, else our image's, copied to the node. None: there is none.
///
/// # Errors
/// [`Error::File`], [`Error::Image`].
pub fn install(host: &Host) -> Result<Option<Criu>, Error> {
    let mut found = of_the_node();
    let usable = found.as_ref().is_some_and(|criu| !probe::criu::is_too_old(criu));
    if !usable && host.image_has(IN_IMAGE) {
        found = Some(copy_from_image(host)?);
    }
    // runc looks for `criu` by name, and CRIU for `tar`: what they find first is the wrapper, which becomes the real one.
    for name in ["criu", "tar"] {
        let name = Path::new(LIBEXEC).join(name);
        if std::fs::read_link(&name).ok().as_deref() != Some(Path::new(WRAPPER)) {
            files::remove(&name)?;
            std::fs::create_dir_all(LIBEXEC)
                .and_then(|()| std::os::unix::fs::symlink(WRAPPER, &name))
                .map_err(|e| files::Error("link", name, e))?;
        }
    }
    Ok(found)
}

fn folder() -> PathBuf {
    Path::new(PREFIX).join("criu")
}

/// Puts our image's CRIU on the node.
fn copy_from_image(host: &Host) -> Result<Criu, Error> {
    let missing = |e| Error::Image(IN_IMAGE.to_owned(), e);
    let mut names: Vec<String> = std::fs::read_dir(host.in_image(IN_IMAGE))
        .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
        .map_err(missing)?
        .into_iter()
        .filter(|entry| entry.path().is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    // Each in its turn: together they are 14 MB, more than the agent should ever need.
    let read = |name: &String| std::fs::read(host.in_image(&format!("{IN_IMAGE}/{name}"))).map_err(missing);
    let mut digest = Sha256::new();
    for name in &names {
        digest.update(name);
        digest.update(Sha256::digest(read(name)?));
    }
    let digest = protocol::sealed::hex(&digest.finalize());
    let folder = folder().join(digest.get(..12).unwrap_or(&digest));
    for name in &names {
        if files::write_if_different(&folder.join(name), &read(name)?, 0o755)? && name == PROGRAM {
            tracing::info!(folder = %folder.display(), "installed CRIU from the agent's image: the node has none that can be used");
        }
    }
    Ok(Criu {
        path: folder.join(PROGRAM),
        loader: Some(folder.join(LOADER)),
    })
}

/// Removes earlier copies, once nothing on the node can be about to start one.
///
/// # Errors
/// [`Error::File`].
pub(super) fn remove_others(used: Option<&Criu>) -> Result<(), Error> {
    if undo::target_under_way().is_some() || undo::session_under_way().is_some() {
        return Ok(());
    }
    let used = used.and_then(|criu| criu.path.parent());
    for copy in undo::entries(&folder()) {
        if Some(copy.as_path()) != used {
            files::remove_all(&copy)?;
        }
    }
    Ok(())
}

/// The library that is preloaded into CRIU, where the image has brought it.
#[must_use]
pub fn preload() -> Option<PathBuf> {
    Path::new(LIMITS).is_file().then(|| LIMITS.into())
}

/// The same, where CRIU cannot do without: CRIU asks for the limits of processes of other users with
/// prlimit(2), for which the kernel demands CAP_SYS_RESOURCE. Some machines withhold it even from root.
#[must_use]
pub fn limits_preload() -> Option<PathBuf> {
    preload().filter(|_| !may_ask_for_limits())
}

/// Whether this machine gives us CAP_SYS_RESOURCE.
#[must_use]
pub fn may_ask_for_limits() -> bool {
    has_sys_resource(&std::fs::read_to_string("/proc/self/status").unwrap_or_default())
}

fn has_sys_resource(status: &str) -> bool {
    const CAP_SYS_RESOURCE: u32 = 24;
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & (1 << CAP_SYS_RESOURCE) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_capability_is_bit_24() {
        assert!(has_sys_resource("Name:\tx\nCapEff:\t000001ffffffffff\n"));
        assert!(!has_sys_resource("CapEff:\t000001fffeffffff\n"));
        assert!(!has_sys_resource(""));
    }
}
