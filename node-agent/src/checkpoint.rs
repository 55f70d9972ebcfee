//! `runc checkpoint` of one frozen container, and the memory file system that its images are written to.
//!
//! - The container is frozen before; `--leave-running` and CRIU's own care for a cgroup that it finds frozen leave it so.
//! - `network-lock skip` is right because we drop every packet of the pod ourselves (see `hostsys::nft`).
//! - It is started before the freeze and parked: CRIU asks a script of ours before it looks at the first process, which saves
//!   the start of runc and of CRIU from the freeze (40 ms of them on two processors).
//! - It runs in a cgroup of its own, outside of the agent's: a kill of the agent or of its pod in the middle of a dump
//!   would kill CRIU and leave its parasite in the workload. A restarted agent waits until that cgroup is empty.

use std::{
    fs, io,
    os::unix::{fs::symlink, net::UnixListener},
    path::{Path, PathBuf},
    time::Duration,
};

use hostsys::{
    cgroup::{self, Cgroup},
    program::Program,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use protocol::{
    criu_errors,
    hand_off::{PARK, PARK_SOCKET, RUNTIME_CONFIG, RuntimeConfig, SKIP_TRACKED},
};

use crate::pod_on_node::RUNC_ROOT;

/// Where all images lie, and only as long as a session needs them.
pub const IMAGES: &str = "/run/peregrine/images";
/// Folder of cgroups in which dumps run.
const DUMPS: &str = "peregrine";
/// CRIU is never killed in the middle: this only ends what would never end.
const NEVER: Duration = Duration::from_secs(24 * 3600);

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A folder or mount.
    #[error("failed to {0} {1}")]
    Folder(&'static str, PathBuf, #[source] io::Error),
    /// A cgroup.
    #[error("failed to prepare the cgroup of the dump")]
    Cgroup(#[source] cgroup::Error),
    /// The dump.
    #[error("container {0} could not be dumped: {1}")]
    Dump(String, String),
}

/// Settings of the wrapper, which the installer wrote; the node's defaults where there are none.
#[must_use]
pub fn runtime_config() -> RuntimeConfig {
    fs::read(RUNTIME_CONFIG)
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default()
}

/// The memory file system of one session.
#[derive(Clone, Debug)]
pub struct Room {
    path: PathBuf,
}

impl Room {
    /// That of a migration; it need not exist.
    #[must_use]
    pub fn of(uid: &str) -> Self {
        Self {
            path: Path::new(IMAGES).join(uid),
        }
    }

    /// Mounts it, bounded: a checkpoint never fills the node's memory beyond what was promised.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn make(&self, bytes: u64) -> Result<(), Error> {
        self.remove()?;
        let folder = |what| move |e: io::Error| Error::Folder(what, PathBuf::from(IMAGES), e);
        fs::create_dir_all(&self.path).map_err(folder("create"))?;
        set_private(Path::new(IMAGES)).map_err(folder("protect"))?;
        let options = format!("size={},mode=0700", bytes.max(1 << 20));
        mount(
            Some("peregrine"),
            &self.path,
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
            Some(options.as_str()),
        )
        .map_err(|e| Error::Folder("mount a memory file system at", self.path.clone(), e.into()))
    }

    /// Folder of a container's images.
    #[must_use]
    pub fn images(&self, container: u32) -> PathBuf {
        self.path.join(container.to_string()).join("images")
    }

    /// Folder of CRIU's and runc's logs.
    #[must_use]
    pub fn work(&self, container: u32) -> PathBuf {
        self.path.join(container.to_string()).join("work")
    }

    /// Folder of a container's page stores.
    #[must_use]
    pub fn store(&self, container: u32) -> PathBuf {
        self.path.join(container.to_string()).join(protocol::store_index::STORE)
    }

    /// Folder of pages that are being received and belong to no process yet.
    #[must_use]
    pub fn pages(&self) -> PathBuf {
        self.path.join("pages")
    }

    /// Makes the folders of a container.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn make_folders(&self, container: u32) -> Result<(), Error> {
        for folder in [self.images(container), self.work(container), self.store(container)] {
            fs::create_dir_all(&folder).map_err(|e| Error::Folder("create", folder, e))?;
        }
        Ok(())
    }

    /// Frees the memory; nothing there is no error.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn remove(&self) -> Result<(), Error> {
        loop {
            match umount2(&self.path, MntFlags::MNT_DETACH) {
                Ok(()) => {}
                // Not a mount point, or not there.
                Err(nix::Error::EINVAL | nix::Error::ENOENT) => break,
                Err(e) => return Err(Error::Folder("unmount", self.path.clone(), e.into())),
            }
        }
        match fs::remove_dir_all(&self.path) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(Error::Folder("remove", self.path.clone(), e)),
        }
    }
}

fn set_private(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
}

/// Bytes of memory that could be used now without swapping.
#[must_use]
pub fn available_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))
        .and_then(|l| l.trim().strip_suffix(" kB"))
        .and_then(|l| l.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib.saturating_mul(1024))
}

/// One dump.
#[derive(Clone, Debug)]
pub struct Dump {
    /// The container's id.
    pub id: String,
    /// Its name, for errors.
    pub name: String,
    /// Folder of the images.
    pub images: PathBuf,
    /// Folder of logs.
    pub work: PathBuf,
    /// The cgroup that it runs in.
    pub cgroup: PathBuf,
    /// Established connections are closed in the image instead of kept.
    pub close_connections: bool,
    /// Memory that is tracked is left out of the images.
    pub skip_tracked: bool,
}

/// The cgroup in which a container's dump runs.
///
/// # Errors
/// There is no v2 hierarchy.
pub fn dump_cgroup(uid: &str, container: usize) -> Result<PathBuf, Error> {
    let root = cgroup::mount_point().map_err(Error::Cgroup)?;
    Ok(root.join(DUMPS).join(format!("dump-{uid}-{container}")))
}

impl Dump {
    /// Makes the place where it is parked. Until somebody accepts on the socket and writes [`protocol::hand_off::PARK_GO`] it touches nothing; when
    /// the socket is closed before, it ends.
    ///
    /// # Errors
    /// [`Error::Folder`].
    pub fn gate(&self, settings: &RuntimeConfig) -> Result<UnixListener, Error> {
        let socket = self.work.join(PARK_SOCKET);
        let script = self.work.join(PARK);
        symlink(Path::new(&settings.libexec).join("criu"), &script)
            .map_err(|e| Error::Folder("link", script.clone(), e))?;
        UnixListener::bind(&socket).map_err(|e| Error::Folder("listen on", socket, e))
    }

    /// Runs it to its end, once its gate is open. Blocking.
    ///
    /// # Errors
    /// [`Error::Dump`] with CRIU's first error in plain words.
    pub fn run(&self, settings: &RuntimeConfig) -> Result<(), Error> {
        let own = Cgroup::at(&self.cgroup);
        own.create().map_err(Error::Cgroup)?;
        let config = self.work.join("criu.conf");
        let script = self.work.join(PARK);
        let mut text = format!(
            "network-lock skip\nghost-limit 256M\nlink-remap\naction-script \"{}\"\n",
            script.display()
        );
        if self.close_connections {
            text.push_str("tcp-close\n");
        }
        fs::write(&config, text).map_err(|e| Error::Folder("write", config.clone(), e))?;
        let path = std::env::var("PATH").unwrap_or_default();
        let log = self.work.join("runc.log");
        let mut program = Program::new(&settings.oci_runtime)
            .args(["--root", RUNC_ROOT, "--log"])
            .arg(&log)
            .args(["--log-format", "json", "checkpoint", "--leave-running", "--image-path"])
            .arg(&self.images)
            .arg("--work-path")
            .arg(&self.work)
            .args(["--ext-unix-sk", "--file-locks", "--manage-cgroups-mode", "ignore"])
            // A flag and not a line of the configuration: runc always says yes or no to it, and then that line does not count.
            .arg("--link-remap")
            // A connection that the program has not accepted yet cannot be dumped. It comes from outside, and the pod has
            // another address afterwards: it ends like the established ones, instead of failing the whole move.
            .arg("--tcp-skip-in-flight")
            .env("PATH", format!("{}:{path}", settings.libexec))
            .env("CRIU_CONFIG_FILE", &config)
            .cgroup(&self.cgroup)
            .within(NEVER);
        if !self.close_connections {
            program = program.arg("--tcp-established");
        }
        if self.skip_tracked {
            program = program.env(SKIP_TRACKED, "1");
        }
        let result = program.arg(&self.id).run();
        // Reaped: the cgroup is empty, or will be when CRIU's helpers have gone.
        if let Err(error) = own.remove(Duration::from_secs(5)) {
            tracing::warn!(%error, "failed to remove the cgroup of a dump");
        }
        result.map(drop).map_err(|error| {
            let why = read_log(&self.work.join("dump.log"))
                .and_then(|l| criu_errors::explain_log(&l))
                .unwrap_or_else(|| crate::error::chain(&error));
            Error::Dump(self.name.clone(), why)
        })
    }
}

fn read_log(path: &Path) -> Option<String> {
    let bytes = fs::read(path).ok()?;
    let start = bytes.get(..bytes.len().min(8 << 20))?;
    Some(String::from_utf8_lossy(start).into_owned())
}

/// Waits until no dump runs in these cgroups any more, then removes them. Blocking. CRIU is not killed: it is in the
/// middle of the workload.
///
/// # Errors
/// It still runs.
pub fn wait_for_dumps(cgroups: &[PathBuf], within: Duration) -> Result<(), cgroup::Error> {
    for path in cgroups {
        let own = Cgroup::at(path);
        if own.exists() {
            own.wait_empty(within)?;
            own.remove(Duration::from_secs(5))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_a_room_is_bounded_and_leaves_nothing() {
        let room = Room::of(&format!("test-{}", std::process::id()));
        if let Err(error) = room.make(2 << 20) {
            eprintln!("skipped: {}", crate::error::chain(&error));
            return;
        }
        room.make_folders(0).unwrap();
        assert!(fs::write(room.images(0).join("x"), vec![0; 1 << 20]).is_ok());
        assert!(fs::write(room.images(0).join("y"), vec![0; 2 << 20]).is_err());
        room.remove().unwrap();
        assert!(!room.path.exists());
        room.remove().unwrap();
    }
}
