//! The undo of the installation, and what stands against it.
//!
//! A pod that was moved lives under our handler: its containerd-shim calls the wrapper for `kill`, `delete` and `exec`
//! until the pod is gone, and it knows the wrapper's path from when it started, whatever the configuration says by then.
//! So while such a container exists, the handler may go (no *new* container can use it) but the wrapper stays, and the
//! report says so.

use std::fs;
use std::path::{Path, PathBuf};

use protocol::hand_off::{HAND_OFF_DIR, SHEPHERD_DIR};

use super::record::Record;
use super::{PREFIX, WRAPPER, containerd, files};
use crate::pod_on_node;

/// Our folder of state on the node's disk.
const STATE: &str = "/var/lib/peregrine";
/// Our folder that ends with the machine.
const RUN: &str = "/run/peregrine";
/// Journals of sessions; an open one is a migration under way.
const JOURNAL: &str = "/var/lib/peregrine/journal";

/// How an undo ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Undone {
    /// Nothing of ours is left on the node.
    Completely,
    /// The wrapper stays until these containers are gone.
    WrapperStays(Vec<String>),
}

impl Undone {
    /// One sentence.
    #[must_use]
    pub fn message(&self) -> String {
        match self {
            Self::Completely => "everything was removed from the node; containerd runs without our handler".to_owned(),
            Self::WrapperStays(containers) => format!(
                "the handler was removed; {WRAPPER} stays until the pods that were moved here are gone (containers {}): their \
                 containerd-shim calls it to stop them. Remove {PREFIX} afterwards",
                containers.join(", ")
            ),
        }
    }
}

/// Why the undo has to wait.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A migration.
    #[error("a migration is under way on this node ({0}): the uninstall waits for its end")]
    UnderWay(String),
    /// A file.
    #[error(transparent)]
    File(#[from] files::Error),
    /// containerd.
    #[error(transparent)]
    Containerd(#[from] containerd::Error),
}

/// Undoes the installation. With nothing installed it has nothing to do and succeeds.
///
/// # Errors
/// See [`Error`]; [`Error::UnderWay`] means: later.
pub async fn undo() -> Result<Undone, Error> {
    if let Some(what) = session_under_way().or_else(target_under_way) {
        return Err(Error::UnderWay(what));
    }
    if let Some(mut record) = Record::read()? {
        let changed = record.undo()?;
        let pending = changed || record.restarted_for.is_some();
        if pending {
            // The record stays until the restart has succeeded: a crash in between must not forget it.
            let found = containerd::find()?;
            let dump = found.dump()?;
            found.restart(&dump.socket(), false).await?;
            record.restarted_for = None;
            record.write()?;
        }
        Record::remove()?;
    }
    let users = containers_of_the_wrapper(Path::new(pod_on_node::BUNDLES));
    files::remove_all(Path::new(STATE))?;
    if users.is_empty() {
        files::remove_all(Path::new(RUN))?;
        files::remove_all(Path::new(PREFIX))?;
        return Ok(Undone::Completely);
    }
    Ok(Undone::WrapperStays(users))
}

/// A hand-off that waits, or a shepherd that stands for a container that is not restored yet.
#[must_use]
pub fn target_under_way() -> Option<String> {
    let waiting = entries(Path::new(HAND_OFF_DIR));
    waiting
        .first()
        .map(|pod| format!("pod {} is being moved here", name_of(pod)))
}

/// A journal that is not finished. The sessions remove theirs when nothing is left to do.
fn session_under_way() -> Option<String> {
    let open = entries(Path::new(JOURNAL));
    open.iter()
        .find(|file| file.extension().is_some_and(|e| e == "jsonl"))
        .map(|file| name_of(file))
}

/// Ids of the containers whose runtime is our wrapper: containerd's shim keeps the options of its handler in the bundle.
fn containers_of_the_wrapper(bundles: &Path) -> Vec<String> {
    let mut ids: Vec<String> = entries(bundles)
        .into_iter()
        .filter(|bundle| {
            // `options.json` holds {"binary_name": "…"}; `runtime` of older shims holds the name alone.
            ["options.json", "runtime"].iter().any(|file| {
                fs::read(bundle.join(file)).is_ok_and(|text| String::from_utf8_lossy(&text).contains(WRAPPER))
            })
        })
        .map(|bundle| name_of(&bundle))
        .chain(
            entries(Path::new(SHEPHERD_DIR))
                .iter()
                .map(|shepherd| name_of(shepherd)),
        )
        .collect();
    ids.sort();
    ids.dedup();
    ids
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).map_or_else(
        |_| Vec::new(),
        |list| list.flatten().map(|entry| entry.path()).collect(),
    )
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_under_the_wrapper_are_found_by_their_bundle() {
        let folder = std::env::temp_dir().join(format!("peregrine-undo-{}", std::process::id()));
        files::write(
            &folder.join("ours/options.json"),
            format!("{{\"binary_name\":\"{WRAPPER}\"}}").as_bytes(),
            0o600,
        )
        .unwrap();
        files::write(
            &folder.join("theirs/options.json"),
            b"{\"binary_name\":\"/usr/sbin/runc\"}",
            0o600,
        )
        .unwrap();
        let found = containers_of_the_wrapper(&folder);
        assert!(
            found.contains(&"ours".to_owned()) && !found.contains(&"theirs".to_owned()),
            "{found:?}"
        );
        files::remove_all(&folder).unwrap();
    }

    #[test]
    fn what_stays_is_named() {
        assert!(Undone::WrapperStays(vec!["abc".into()]).message().contains("abc"));
    }
}
