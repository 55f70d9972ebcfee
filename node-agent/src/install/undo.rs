//! The undo of the installation, and what stands against it.
//!
//! A pod that was moved lives under our handler: its containerd-shim calls the wrapper for `kill`, `delete` and `exec`
//! until the pod is gone, and when one of its containers ends, containerd looks for the handler to start it anew. So
//! while such a pod exists on the node, handler and wrapper stay, containerd is not restarted, and the report says so and
//! names the pods. All else goes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hostsys::cgroup::{self, Cgroup};
use protocol::hand_off::{HAND_OFF_DIR, MOVED_AWAY_DIR};

use super::record::Record;
use super::{PREFIX, WRAPPER, containerd, files};
use crate::pod_on_node;

/// Key and certificate.
const IDENTITY: &str = "/var/lib/peregrine/agent";
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
    /// Handler and wrapper stay until these pods are gone.
    HandlerStays {
        /// `namespace/name` of each.
        pods: Vec<String>,
        /// The handler's file.
        drop_in: PathBuf,
    },
}

impl Undone {
    /// One sentence.
    #[must_use]
    pub fn message(&self) -> String {
        match self {
            Self::Completely => "everything was removed from the node; containerd runs without our handler".to_owned(),
            Self::HandlerStays { pods, drop_in } => format!(
                "{WRAPPER} and its handler stay on the node, because the pods {} were moved here and containerd stops and restarts \
                 their containers by them. When these pods are gone, remove {PREFIX}, {RUN}, {STATE} and {} and restart containerd",
                pods.join(", "),
                drop_in.display()
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
    if let Some(what) = session_under_way().or_else(target_under_way).or_else(released_source) {
        return Err(Error::UnderWay(what));
    }
    let record = Record::read()?;
    let pods = pods_of_the_wrapper(Path::new(pod_on_node::BUNDLES));
    if !pods.is_empty() {
        // The markers of pods that were moved here stay: by them the wrapper lets such a pod's containers start anew.
        files::remove_all(Path::new(IDENTITY))?;
        files::remove_all(Path::new(JOURNAL))?;
        let drop_in = record.map(|r| r.drop_in).unwrap_or_default();
        return Ok(Undone::HandlerStays { pods, drop_in });
    }
    if let Some(mut record) = record {
        let changed = record.undo()?;
        if changed || record.restarted_for.is_some() {
            // The record stays until the restart has succeeded: a crash in between must not forget it.
            let found = containerd::find()?;
            let dump = found.dump()?;
            found.restart(&dump.socket(), false).await?;
            record.restarted_for = None;
            record.write()?;
        }
        Record::remove()?;
    }
    files::remove_all(Path::new(STATE))?;
    unmount_below(RUN);
    remove_cgroup();
    files::remove_all(Path::new(RUN))?;
    files::remove_all(Path::new(PREFIX))?;
    Ok(Undone::Completely)
}

/// Images of an attempt that crashed with its node's agent lie on a mount of ours.
fn unmount_below(folder: &str) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut points: Vec<String> = crate::inventory::mounts::parse(&mounts)
        .into_iter()
        .map(|mount| mount.point)
        .filter(|point| Path::new(point).starts_with(folder))
        .collect();
    // Inner ones first.
    points.sort_by_key(|point| std::cmp::Reverse(point.len()));
    for point in points {
        if let Err(error) = nix::mount::umount2(point.as_str(), nix::mount::MntFlags::MNT_DETACH) {
            tracing::warn!(%error, point, "failed to unmount");
        }
    }
}

/// The cgroup in which dumps run; empty while none does.
fn remove_cgroup() {
    if let Ok(root) = cgroup::mount_point()
        && let Err(error) = Cgroup::at(root.join("peregrine")).remove(Duration::from_secs(2))
    {
        tracing::warn!(
            error = crate::error::chain(&error),
            "failed to remove the cgroup of the dumps"
        );
    }
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
pub(super) fn session_under_way() -> Option<String> {
    let open = entries(Path::new(JOURNAL));
    open.iter()
        .find(|file| file.extension().is_some_and(|e| e == "jsonl"))
        .map(|file| name_of(file))
}

/// A pod that was moved away and is not gone: the wrapper must go on refusing to start it.
fn released_source() -> Option<String> {
    let marks = entries(Path::new(MOVED_AWAY_DIR));
    let still_here = marks.iter().find(|mark| pod_on_node::find(&name_of(mark)).is_ok())?;
    Some(format!(
        "pod {} was moved away and has not ended yet",
        name_of(still_here)
    ))
}

/// Pods whose runtime is our wrapper, as `namespace/name`: containerd's shim keeps the options of its handler in the
/// bundle of each container.
fn pods_of_the_wrapper(bundles: &Path) -> Vec<String> {
    let mut pods: Vec<String> = entries(bundles)
        .into_iter()
        .filter(|bundle| {
            // `options.json` holds {"binary_name": "…"}; `runtime` of older shims holds the name alone.
            ["options.json", "runtime"].iter().any(|file| {
                fs::read(bundle.join(file)).is_ok_and(|text| String::from_utf8_lossy(&text).contains(WRAPPER))
            })
        })
        .map(|bundle| pod_of(&bundle).unwrap_or_else(|| name_of(&bundle)))
        .collect();
    pods.sort();
    pods.dedup();
    pods
}

/// Namespace and name of a bundle's pod, by the annotations of the CRI plugin.
fn pod_of(bundle: &Path) -> Option<String> {
    let config: serde_json::Value = serde_json::from_slice(&fs::read(bundle.join("config.json")).ok()?).ok()?;
    let annotation = |name: &str| config.get("annotations")?.get(name)?.as_str();
    Some(format!(
        "{}/{}",
        annotation("io.kubernetes.cri.sandbox-namespace")?,
        annotation("io.kubernetes.cri.sandbox-name")?
    ))
}

pub(super) fn entries(folder: &Path) -> Vec<PathBuf> {
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
    fn pods_under_the_wrapper_are_found_by_their_bundles() {
        let folder = std::env::temp_dir().join(format!("peregrine-undo-{}", std::process::id()));
        let options = |binary: &str| format!("{{\"binary_name\":\"{binary}\"}}");
        let annotations = r#"{"annotations": {"io.kubernetes.cri.sandbox-namespace": "shop", "io.kubernetes.cri.sandbox-name": "web"}}"#;
        for (container, binary) in [("a", WRAPPER), ("b", WRAPPER), ("c", "/usr/sbin/runc")] {
            files::write(
                &folder.join(container).join("options.json"),
                options(binary).as_bytes(),
                0o600,
            )
            .unwrap();
            files::write(
                &folder.join(container).join("config.json"),
                annotations.as_bytes(),
                0o600,
            )
            .unwrap();
        }
        files::write(&folder.join("d/runtime"), WRAPPER.as_bytes(), 0o600).unwrap();
        assert_eq!(pods_of_the_wrapper(&folder), ["d", "shop/web"]);
        files::remove_all(&folder).unwrap();
    }

    #[test]
    fn what_stays_is_named_with_what_to_do() {
        let message = Undone::HandlerStays {
            pods: vec!["shop/web".into()],
            drop_in: "/etc/containerd/conf.d/peregrine.toml".into(),
        }
        .message();
        assert!(
            message.contains("shop/web") && message.contains("conf.d/peregrine.toml"),
            "{message}"
        );
    }
}
