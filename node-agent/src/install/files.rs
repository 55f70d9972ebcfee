//! Writing files so that a crash leaves the old or the new content, never half of it.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// A file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("failed to {0} {1}")]
pub struct Error(pub &'static str, pub PathBuf, #[source] pub io::Error);

/// Writes `content` with `mode`, where the file does not have both already. Says whether it wrote.
///
/// # Errors
/// See [`Error`].
pub fn write_if_different(path: &Path, content: &[u8], mode: u32) -> Result<bool, Error> {
    if fs::read(path).is_ok_and(|old| old == content)
        && fs::metadata(path).is_ok_and(|m| m.permissions().mode() & 0o7777 == mode)
    {
        return Ok(false);
    }
    write(path, content, mode)?;
    Ok(true)
}

/// Writes `content` with `mode`; folders above are made.
///
/// # Errors
/// See [`Error`].
pub fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), Error> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder).map_err(|e| Error("make the folder", folder.to_owned(), e))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // One writer: the agent of this node. A leftover of a crash is overwritten.
    let new = folder.join(format!(".{name}.peregrine-new"));
    let wrote = (|| {
        let _ = fs::remove_file(&new);
        let mut file = File::options().write(true).create_new(true).mode(mode).open(&new)?;
        // The umask may have taken bits away.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        File::open(folder)?.sync_all()
    })();
    wrote.map_err(|e| {
        let _ = fs::remove_file(&new);
        Error("write", path.to_owned(), e)
    })
}

/// Removes a file; one that is not there is no error. Says whether it was there.
///
/// # Errors
/// See [`Error`].
pub fn remove(path: &Path) -> Result<bool, Error> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error("remove", path.to_owned(), e)),
    }
}

/// Removes a folder and all in it; one that is not there is no error. One that is a mount point (state on a disk of its own)
/// is emptied.
///
/// # Errors
/// See [`Error`].
pub fn remove_all(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::ResourceBusy && is_empty(path) => Ok(()),
        Err(e) => Err(Error("remove", path.to_owned(), e)),
    }
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// Reads a file that may not exist.
///
/// # Errors
/// See [`Error`].
pub fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error("read", path.to_owned(), e)),
    }
}

/// Permission bits of a file, `default` where it does not exist.
#[must_use]
pub fn mode_of(path: &Path, default: u32) -> u32 {
    fs::metadata(path).map_or(default, |m| m.permissions().mode() & 0o7777)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_write_of_the_same_changes_nothing() {
        let folder = std::env::temp_dir().join(format!("peregrine-files-{}", std::process::id()));
        let file = folder.join("a/b");
        assert!(write_if_different(&file, b"x", 0o600).unwrap());
        assert!(!write_if_different(&file, b"x", 0o600).unwrap());
        assert!(write_if_different(&file, b"x", 0o755).unwrap());
        assert_eq!(mode_of(&file, 0), 0o755);
        assert!(remove(&file).unwrap());
        assert!(!remove(&file).unwrap());
        remove_all(&folder).unwrap();
    }
}
