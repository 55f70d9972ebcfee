//! `create` of a migration target: waits for the hand-off, starts the shepherd, returns its pid as the container's.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hostsys::cgroup::{self, Cgroup};
use hostsys::program;
use protocol::hand_off::{HandOff, RuntimeConfig, ShepherdReport};

use crate::argv::Call;
use crate::folder::{self, Folder, Start};
use crate::hand_off;
use crate::spec::Spec;

/// Name under which the wrapper starts itself as a shepherd.
pub const SHEPHERD: &str = "peregrine-shepherd";

const READY: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(2);
const KILL: Duration = Duration::from_secs(10);

/// Why a target is not started. Users read it in `kubectl describe pod`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No valid hand-off.
    #[error(transparent)]
    HandOff(#[from] hand_off::Error),
    /// Something that a target cannot have.
    #[error("container {0} cannot be the target of a migration: {1}")]
    Unfit(String, &'static str),
    /// The call is not as containerd writes it.
    #[error("the call of the runtime {0}")]
    Call(&'static str),
    /// The folder of the shepherd.
    #[error("failed to prepare the shepherd of the container")]
    Folder(#[from] folder::Error),
    /// Its cgroup.
    #[error("failed to prepare the shepherd's cgroup")]
    Cgroup(#[from] cgroup::Error),
    /// It does not start.
    #[error("failed to start the shepherd of the container")]
    Start(#[from] program::Error),
    /// A file of it.
    #[error("failed to write {}", .0.display())]
    File(PathBuf, #[source] std::io::Error),
    /// It is not ready.
    #[error("the shepherd of the container {0}")]
    NotReady(&'static str),
}

/// Starts a shepherd for the container of `call`.
///
/// # Errors
/// See [`Error`]; nothing is left then, except for the mark that the hand-off was used.
pub fn create(call: &Call, spec: &Spec, settings: &RuntimeConfig, migration_uid: &str) -> Result<(), Error> {
    let identity = spec.identity();
    let unfit = |why| Error::Unfit(identity.container.clone(), why);
    if spec.has_terminal() {
        return Err(unfit("it has a terminal (tty: true), which cannot be moved"));
    }
    let id = call.id().ok_or(Error::Call("names no container"))?;
    let pid_file = call
        .option(&["pid-file"])
        .map(PathBuf::from)
        .ok_or(Error::Call("names no --pid-file"))?;
    let bundle = absolute(&call.bundle())?;
    let network = spec
        .network_namespace()
        .ok_or_else(|| unfit("it uses the node's own network (hostNetwork)"))?;
    let cgroup = spec
        .cgroup(call.has_global("systemd-cgroup"))
        .ok_or_else(|| unfit("its cgroup has no fixed place"))?;
    let globals = call
        .globals_without_log()
        .into_iter()
        .map(OsString::into_string)
        .collect::<Result<Vec<_>, _>>();
    let globals = globals.map_err(|_| Error::Call("has an argument that is not UTF-8"))?;
    let cgroup = cgroup::mount_point()?.join(cgroup);

    let folder = Folder::of(id).ok_or(Error::Call("names no valid container id"))?;
    let within = Duration::from_secs(settings.hand_off_timeout_seconds.into());
    let mut made = false;
    let used = hand_off::take(&identity, migration_uid, within, || {
        let failed = |error: folder::Error| hand_off::Error::File(identity.container.clone(), Box::new(error));
        folder.create().map_err(failed)?;
        made = true;
        Ok(folder.clone())
    });
    let start = |hand_off| Start {
        report: report(hand_off, id, &bundle, spec, &cgroup, network),
        globals,
        settings: settings.clone(),
    };
    let started = used.map_err(Error::from).and_then(|hand_off| {
        let start = start(hand_off);
        let result = start_shepherd(&folder, &start).and_then(|pid| write_pid(&pid_file, pid));
        if result.is_err() {
            let cgroup = Cgroup::at(start.shepherd_cgroup());
            // The first error is the one to tell; what remains is removed by containerd's `delete`.
            let _ = cgroup.kill(KILL).and_then(|()| cgroup.remove(KILL));
        }
        result
    });
    if started.is_err() && made {
        let _ = folder.remove();
    }
    started
}

fn report(hand_off: HandOff, id: &str, bundle: &Path, spec: &Spec, cgroup: &Path, network: &Path) -> ShepherdReport {
    let text = |path: &Path| path.display().to_string();
    ShepherdReport {
        hand_off,
        container_id: id.to_owned(),
        shepherd_pid: 0,
        bundle: text(bundle),
        rootfs: text(&spec.rootfs(bundle)),
        cgroup: text(cgroup),
        network_namespace: text(network),
        shm: spec.shm().map(str::to_owned),
    }
}

/// Starts it and returns its pid when its socket and its report stand.
fn start_shepherd(folder: &Folder, start: &Start) -> Result<i32, Error> {
    let own = std::env::current_exe().map_err(|e| Error::File("/proc/self/exe".into(), e))?;
    // CRIU starts the action script by a bare path, without arguments: its name and place say all.
    let hold = folder.file("hold");
    std::os::unix::fs::symlink(&own, &hold).map_err(|e| Error::File(hold.clone(), e))?;
    folder.write("criu.conf", criu_options(&hold).as_bytes())?;
    folder.write_start(start)?;
    let cgroup = Cgroup::at(start.shepherd_cgroup());
    cgroup.create()?;
    let arguments = [folder.path().as_os_str().to_owned()];
    let mut shepherd = program::start_detached(&own, OsStr::new(SHEPHERD), &arguments, cgroup.path(), None)?;
    let end = Instant::now() + READY;
    while !folder.report().exists() {
        if !matches!(shepherd.try_wait(), Ok(None)) {
            return Err(Error::NotReady("ended at once"));
        }
        if Instant::now() >= end {
            return Err(Error::NotReady("is not ready in time"));
        }
        std::thread::sleep(POLL);
    }
    i32::try_from(shepherd.id()).map_err(|_| Error::NotReady("has no valid process id"))
}

/// Options that `runc restore` does not know. The agents of both nodes drop every packet of the pod meanwhile, so CRIU has
/// no network to lock; unlinked files up to this size are carried inside the images.
#[must_use]
pub fn criu_options(hold: &Path) -> String {
    format!(
        "network-lock skip\nghost-limit 256M\nlink-remap\naction-script \"{}\"\n",
        hold.display()
    )
}

fn write_pid(path: &Path, pid: i32) -> Result<(), Error> {
    // containerd reads it after the call has returned, conmon may look earlier: never half of it.
    let new = path.with_extension("peregrine");
    fs::write(&new, pid.to_string())
        .and_then(|()| fs::rename(&new, path))
        .map_err(|source| Error::File(path.to_owned(), source))
}

fn absolute(path: &Path) -> Result<PathBuf, Error> {
    fs::canonicalize(path).map_err(|source| Error::File(path.to_owned(), source))
}
