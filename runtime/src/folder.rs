//! The files of a shepherd: `SHEPHERD_DIR/<container id>/`, mode 0700.
//!
//! | file | written by | says |
//! |---|---|---|
//! | `start.json` | wrapper | what the shepherd is to do |
//! | `hand-off.json` | (moved here by the wrapper) | the hand-off that was used |
//! | `shepherd.json` | shepherd | for the agent; complete when it exists |
//! | `sock` | shepherd | answers the agent |
//! | `below` | shepherd | it is restored: the runtime below knows the container |
//! | `started` | wrapper | containerd has called `start` |
//! | `criu.conf`, `hold` | wrapper | options for CRIU; the action script |
//! | `pid`, `runc.log` | runc | of the restore |

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use protocol::hand_off::{RuntimeConfig, SHEPHERD_DIR, SHEPHERD_FILE, SHEPHERD_SOCKET, ShepherdReport};
use serde::{Deserialize, Serialize};

/// Suffix of the shepherd's cgroup, beside the container's: runc refuses to restore into one that is not empty.
const CGROUP_SUFFIX: &str = ".shepherd";

/// A file of the folder could not be read, written or understood.
#[derive(Debug, thiserror::Error)]
#[error("failed to {doing} {}", path.display())]
pub struct Error {
    doing: &'static str,
    path: PathBuf,
    #[source]
    source: std::io::Error,
}

/// What a shepherd is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Start {
    /// What it will report, without its pid.
    pub report: ShepherdReport,
    /// Flags for the runtime below, before the verb.
    pub globals: Vec<String>,
    /// The settings at the time of `create`.
    pub settings: RuntimeConfig,
}

impl Start {
    /// Path of the shepherd's cgroup.
    #[must_use]
    pub fn shepherd_cgroup(&self) -> PathBuf {
        PathBuf::from(format!("{}{CGROUP_SUFFIX}", self.report.cgroup))
    }
}

/// The folder of one container.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// The folder of a container; none where the id is none that a runtime accepts.
    #[must_use]
    pub fn of(id: &str) -> Option<Self> {
        is_name(id).then(|| Self {
            path: Path::new(SHEPHERD_DIR).join(id),
        })
    }

    /// A folder by its path.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is there.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.path.exists()
    }

    /// Path of a file in it.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Path of the socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.file(SHEPHERD_SOCKET)
    }

    /// Path of the report.
    #[must_use]
    pub fn report(&self) -> PathBuf {
        self.file(SHEPHERD_FILE)
    }

    /// Makes it; it must not exist.
    ///
    /// # Errors
    /// It exists, or its parent cannot be made.
    pub fn create(&self) -> Result<(), Error> {
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o700);
        builder
            .recursive(true)
            .create(SHEPHERD_DIR)
            .map_err(|source| failed("create", Path::new(SHEPHERD_DIR), source))?;
        builder
            .recursive(false)
            .create(&self.path)
            .map_err(|source| failed("create", &self.path, source))
    }

    /// Removes it with all it holds; an absent one is no error.
    ///
    /// # Errors
    /// Something in it cannot be removed.
    pub fn remove(&self) -> Result<(), Error> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(failed("remove", &self.path, error)),
            _ => Ok(()),
        }
    }

    /// Writes a file so that a reader sees nothing or all of it.
    ///
    /// # Errors
    /// The file system refuses it.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<(), Error> {
        let (new, path) = (self.file(&format!("{name}.new")), self.file(name));
        let written = fs::File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new);
        written
            .and_then(|mut file| file.write_all(content))
            .and_then(|()| fs::rename(&new, &path))
            .map_err(|source| failed("write", &path, source))
    }

    /// Writes what the shepherd is to do.
    ///
    /// # Errors
    /// The file system refuses it.
    pub fn write_start(&self, start: &Start) -> Result<(), Error> {
        let text = serde_json::to_vec(start).map_err(|e| failed("write", &self.file("start.json"), e.into()))?;
        self.write("start.json", &text)
    }

    /// Reads what the shepherd is to do.
    ///
    /// # Errors
    /// It is absent or damaged.
    pub fn read_start(&self) -> Result<Start, Error> {
        self.read("start.json")
    }

    /// Remembers whether the runtime below knows the container.
    ///
    /// # Errors
    /// The file system refuses it.
    pub fn set_below(&self, below: bool) -> Result<(), Error> {
        if below {
            return self.write("below", b"");
        }
        match fs::remove_file(self.file("below")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(failed("remove", &self.file("below"), error))
            }
            _ => Ok(()),
        }
    }

    /// Whether the runtime below knows the container.
    #[must_use]
    pub fn is_below(&self) -> bool {
        self.file("below").exists()
    }

    fn read<T: for<'a> Deserialize<'a>>(&self, name: &str) -> Result<T, Error> {
        let path = self.file(name);
        let text = fs::read(&path).map_err(|source| failed("read", &path, source))?;
        serde_json::from_slice(&text).map_err(|source| failed("parse", &path, source.into()))
    }
}

fn failed(doing: &'static str, path: &Path, source: std::io::Error) -> Error {
    Error {
        doing,
        path: path.to_owned(),
        source,
    }
}

/// Whether a text is one plain name of a file: what runc takes for an id, the API for a uid or a container's name.
#[must_use]
pub fn is_name(text: &str) -> bool {
    (1..=253).contains(&text.len())
        && !text.starts_with('.')
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+-.".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_folder_are_refused() {
        for (text, good) in [
            ("abc-1.2_3", true),
            ("", false),
            ("..", false),
            (".x", false),
            ("a/b", false),
            ("a\0", false),
            ("ä", false),
        ] {
            assert_eq!(is_name(text), good, "{text:?}");
        }
        assert!(!is_name(&"x".repeat(254)));
    }
}
