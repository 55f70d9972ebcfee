//! A folder of things that are made once: whole or absent, never half.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

/// `PEREGRINE_HOME/parts` and the logs of what was done to fill it.
#[derive(Debug)]
pub(super) struct Cache {
    parts: PathBuf,
    logs: PathBuf,
}

impl Cache {
    pub(super) fn new(home: &Path) -> Self {
        Self {
            parts: home.join("parts"),
            logs: home.join("logs"),
        }
    }

    /// Where the part of that name and key is or will be.
    pub(super) fn path(&self, name: &str, key: &str) -> PathBuf {
        self.parts.join(format!("{name}-{key}"))
    }

    /// The log of making a part.
    pub(super) fn log(&self, name: &str) -> Result<PathBuf> {
        fs::create_dir_all(&self.logs).with_context(|| format!("cannot make the folder {}", self.logs.display()))?;
        Ok(self.logs.join(format!("{name}.log")))
    }

    /// Fills a new folder by `make` and gives it its name, unless it is there already.
    pub(super) fn ensure(&self, name: &str, key: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let path = self.path(name, key);
        if path.exists() {
            return Ok(path);
        }
        // One name per part: what a killed run left behind is found and replaced (runs are serialised by the cluster's lock).
        let unfinished = self.parts.join(format!(".{name}.unfinished"));
        remove(&unfinished)?;
        fs::create_dir_all(&unfinished).with_context(|| format!("cannot make the folder {}", unfinished.display()))?;
        make(&unfinished)?;
        fs::rename(&unfinished, &path)
            .with_context(|| format!("cannot rename {} to {}", unfinished.display(), path.display()))?;
        Ok(path)
    }

    /// Removes parts that were made from other inputs: each tree is half a gigabyte.
    pub(super) fn sweep(&self, keep: &[PathBuf]) {
        let Ok(entries) = fs::read_dir(&self.parts) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            if !keep.contains(&path) {
                // Tried again next time.
                remove(&path).ok();
            }
        }
    }
}

/// Removes a folder with all that is in it; not being there is fine.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// A short name for these inputs, in this order.
pub(super) fn key(inputs: &[&str]) -> String {
    let mut digest = Sha256::new();
    for input in inputs {
        digest.update(input.len().to_le_bytes());
        digest.update(input);
    }
    digest
        .finalize()
        .iter()
        .take(6)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_inputs_apart() {
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_ne!(key(&["a", "b"]), key(&["ab", ""]));
        assert_ne!(key(&["a", "b"]), key(&["b", "a"]));
        assert_eq!(key(&[]).len(), 12);
    }

    #[test]
    fn a_failed_build_leaves_no_part() {
        let home = std::env::temp_dir().join(format!("pg-cache-{}", std::process::id()));
        let cache = Cache::new(&home);
        assert!(cache.ensure("x", "1", |_| anyhow::bail!("no")).is_err());
        assert!(!cache.path("x", "1").exists());
        let path = cache
            .ensure("x", "1", |dir| Ok(fs::write(dir.join("f"), "1")?))
            .unwrap();
        assert_eq!(fs::read_to_string(path.join("f")).unwrap(), "1");
        assert!(cache.ensure("x", "1", |_| anyhow::bail!("made twice")).is_ok());
        fs::remove_dir_all(home).unwrap();
    }
}
