//! What the installation changed outside of its own folder: written before the change, read for the undo.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::files;

/// The record's file.
const FILE: &str = "/opt/peregrine/etc/installed.json";

/// What was changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// containerd's main configuration file.
    pub config: PathBuf,
    /// Our file beside it.
    pub drop_in: PathBuf,
    /// The folder of our file, where it did not exist before.
    pub made_folder: Option<PathBuf>,
    /// What became of the main file.
    pub main: MainFile,
    /// Digest of the configuration for which containerd was last restarted with success.
    pub restarted_for: Option<String>,
}

/// What became of the main configuration file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum MainFile {
    /// Nothing.
    #[default]
    Untouched,
    /// It imports our file now.
    Edited {
        /// What was there; nothing: there was no file.
        original: Option<String>,
        /// What we wrote.
        edited: String,
    },
}

impl Record {
    /// Reads it; None where nothing is installed. A record that cannot be read counts as none: the files themselves are
    /// compared anyway.
    ///
    /// # Errors
    /// See [`files::Error`].
    pub fn read() -> Result<Option<Self>, files::Error> {
        let Some(bytes) = files::read_optional(Path::new(FILE))? else {
            return Ok(None);
        };
        match serde_json::from_slice(&bytes) {
            Ok(record) => Ok(Some(record)),
            Err(error) => {
                tracing::warn!(%error, file = FILE, "the record of the installation cannot be read");
                Ok(None)
            }
        }
    }

    /// Writes it.
    ///
    /// # Errors
    /// See [`files::Error`].
    pub fn write(&self) -> Result<(), files::Error> {
        let text = serde_json::to_vec_pretty(self)
            .map_err(|e| files::Error("write", FILE.into(), std::io::Error::other(e)))?;
        files::write_if_different(Path::new(FILE), &text, 0o600)?;
        Ok(())
    }

    /// Removes it.
    ///
    /// # Errors
    /// See [`files::Error`].
    pub fn remove() -> Result<(), files::Error> {
        files::remove(Path::new(FILE))?;
        Ok(())
    }

    /// Puts the configuration back: exactly what was there where nobody has changed the file since, else without our line.
    /// Says whether anything changed.
    ///
    /// # Errors
    /// See [`files::Error`].
    pub fn undo(&self) -> Result<bool, files::Error> {
        let mut changed = false;
        if let MainFile::Edited { original, edited } = &self.main {
            let present = files::read_optional(&self.config)?;
            let mode = files::mode_of(&self.config, 0o644);
            match (present, original) {
                (Some(present), Some(original)) if present == edited.as_bytes() => {
                    files::write(&self.config, original.as_bytes(), mode)?;
                    changed = true;
                }
                (Some(present), None) if present == edited.as_bytes() => {
                    changed |= files::remove(&self.config)?;
                }
                (Some(present), _) => {
                    let text = String::from_utf8_lossy(&present);
                    let without = without_import(&text, &self.drop_in);
                    if without != text {
                        files::write(&self.config, without.as_bytes(), mode)?;
                        changed = true;
                    }
                }
                (None, _) => {}
            }
        }
        if !self.drop_in.as_os_str().is_empty() {
            changed |= files::remove(&self.drop_in)?;
        }
        if let Some(folder) = &self.made_folder {
            // Somebody else's file in it keeps it.
            let _ = std::fs::remove_dir(folder);
        }
        Ok(changed)
    }
}

/// The text without our entry: the whole line where it is ours alone, else the entry in the list.
fn without_import(text: &str, drop_in: &Path) -> String {
    let entry = format!("{:?}", drop_in.display().to_string());
    let mut out = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        if line.contains(&entry) && line.contains("# added by Peregrine") {
            continue;
        }
        let line = line.replace(&format!(", {entry}"), "");
        out.push_str(&line.replace(&entry, ""));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::install::containerd_config::place;

    #[test]
    fn the_undo_of_a_file_that_somebody_has_changed_since_takes_out_our_line_only() {
        let main = Path::new("/etc/containerd/config.toml");
        for before in [
            "version = 3\n",
            "imports = ['x.toml'] # y\nversion = 3\n",
            "imports = []\n",
        ] {
            let placed = place(main, Some(before), 3).unwrap();
            let changed = format!("{}\n[grpc]\nuid = 1\n", placed.main.unwrap());
            let undone = without_import(&changed, &placed.drop_in);
            assert_eq!(undone, format!("{before}\n[grpc]\nuid = 1\n"));
        }
    }

    #[test]
    fn the_undo_restores_every_byte() {
        let folder = std::env::temp_dir().join(format!("peregrine-record-{}", std::process::id()));
        let main = folder.join("config.toml");
        for original in [Some("# mine\nversion = 3\n".to_owned()), None] {
            let placed = place(&main, original.as_deref(), 3).unwrap();
            files::write(&main, placed.main.as_deref().unwrap().as_bytes(), 0o640).unwrap();
            files::write(&placed.drop_in, b"x", 0o644).unwrap();
            let record = Record {
                config: main.clone(),
                made_folder: placed.drop_in.parent().map(Path::to_owned),
                drop_in: placed.drop_in.clone(),
                main: MainFile::Edited {
                    original: original.clone(),
                    edited: placed.main.unwrap(),
                },
                restarted_for: None,
            };
            assert!(record.undo().unwrap());
            let now = files::read_optional(&main)
                .unwrap()
                .map(|b| String::from_utf8(b).unwrap());
            assert_eq!(now, original);
            assert!(!placed.drop_in.exists() && !folder.join("conf.d").exists());
            if original.is_some() {
                assert_eq!(files::mode_of(&main, 0), 0o640);
            }
            assert!(!record.undo().unwrap(), "a second undo has nothing to do");
        }
        files::remove_all(&folder).unwrap();
    }
}
