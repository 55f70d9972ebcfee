//! Stands before `tar` in the PATH of CRIU (`<libexec>/tar`): the contents of memory file systems are not compressed.
//!
//! CRIU has `tar --gzip` pack and unpack every tmpfs of a container, /dev among them. The two processes more that this takes
//! each time are most of its time there, all of it inside the freeze. What is packed without it is unpacked by this program's
//! own look at the first bytes, so an image of a CRIU that had no such stand-in is understood too.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use hostsys::program;
use protocol::hand_off::RuntimeConfig;

/// How gzip begins.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// Becomes the node's `tar`. Returns only when that failed.
#[must_use]
pub fn become_tar(settings: &RuntimeConfig, arguments: &[OsString]) -> program::Error {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = without(&path, Path::new(&settings.libexec));
    let path = path.unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    let compressed = !arguments.iter().any(|a| a == "--create") && input_is_compressed();
    let arguments = plain(arguments, compressed);
    match find(&path) {
        Some(tar) => program::replace_by(&tar, &arguments, &[("PATH".into(), path)]),
        None => program::replace_by(Path::new("tar"), &arguments, &[("PATH".into(), path)]),
    }
}

/// The arguments, without compression where there is none.
fn plain(arguments: &[OsString], compressed: bool) -> Vec<OsString> {
    arguments
        .iter()
        .filter(|a| compressed || *a != "--gzip")
        .cloned()
        .collect()
}

/// The search path without the folder of this program.
fn without(path: &OsStr, own: &Path) -> Option<OsString> {
    let own = std::fs::canonicalize(own).ok();
    let rest = std::env::split_paths(path).filter(|p| own.is_none() || std::fs::canonicalize(p).ok() != own);
    std::env::join_paths(rest).ok().filter(|rest| !rest.is_empty())
}

fn find(path: &OsStr) -> Option<std::path::PathBuf> {
    std::env::split_paths(path).map(|p| p.join("tar")).find(|p| p.is_file())
}

/// Standard input is an image, in which CRIU stands at the beginning of the archive.
fn input_is_compressed() -> bool {
    let read = || {
        use std::os::fd::AsFd as _;
        let image = File::from(std::io::stdin().as_fd().try_clone_to_owned().ok()?);
        let here = nix::unistd::lseek(&image, 0, nix::unistd::Whence::SeekCur).ok()?;
        let mut first = [0; 2];
        image.read_exact_at(&mut first, u64::try_from(here).ok()?).ok()?;
        Some(first == GZIP)
    };
    // Where it cannot be looked at it is taken for what CRIU says.
    read().unwrap_or(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_compression_is_left_out() {
        let given: Vec<OsString> = ["--extract", "--gzip", "--no-unquote"].map(OsString::from).to_vec();
        assert_eq!(plain(&given, false), ["--extract", "--no-unquote"]);
        assert_eq!(plain(&given, true), given);
    }

    #[test]
    fn it_does_not_find_itself() {
        let folder = std::env::temp_dir().join(format!("peregrine-tar-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = std::env::join_paths([folder.as_path(), Path::new("/bin")]).unwrap();
        assert_eq!(without(&path, &folder).unwrap(), "/bin");
        std::fs::remove_dir_all(folder).unwrap();
    }
}
