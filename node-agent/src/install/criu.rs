//! CRIU on the node: the node's own, or that of our image; and whether it needs the preload for limits.

use std::path::{Path, PathBuf};

use super::{Error, LIBEXEC, LIMITS, OWN_CRIU, WRAPPER, containerd, files};
use crate::host::Host;

/// CRIU in our image, static, for nodes that have none.
const IN_IMAGE: &str = "/criu-static";

/// The node's CRIU.
#[must_use]
pub fn of_the_node() -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    containerd::find_program("criu", &path)
}

/// The CRIU to use: the node's, else our image's, copied to the node. None: there is none.
///
/// # Errors
/// [`Error::File`], [`Error::Image`].
pub fn install(host: &Host) -> Result<Option<PathBuf>, Error> {
    let found = match of_the_node() {
        Some(found) => Some(found),
        None if host.image_has(IN_IMAGE) => {
            super::copy_from_image(host, IN_IMAGE, OWN_CRIU)?;
            Some(PathBuf::from(OWN_CRIU))
        }
        None => None,
    };
    // runc looks for `criu` by name: what it finds first is the wrapper, which becomes the real one.
    let name = Path::new(LIBEXEC).join("criu");
    if std::fs::read_link(&name).ok().as_deref() != Some(Path::new(WRAPPER)) {
        files::remove(&name)?;
        std::fs::create_dir_all(LIBEXEC)
            .and_then(|()| std::os::unix::fs::symlink(WRAPPER, &name))
            .map_err(|e| files::Error("link", name, e))?;
    }
    Ok(found)
}

/// The library to preload, where it is needed and there is one: CRIU asks for the limits of processes of other users with
/// prlimit(2), for which the kernel demands CAP_SYS_RESOURCE. Some machines withhold it even from root.
#[must_use]
pub fn limits_preload() -> Option<PathBuf> {
    (!may_ask_for_limits() && Path::new(LIMITS).is_file()).then(|| LIMITS.into())
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
