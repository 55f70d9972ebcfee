//! Agent -> wrapper and shepherd, on one node.
//!
//! ```text
//! agent              wrapper (`create`)            shepherd (stands for the container)
//!   hand-off file  ->  reads it once, removes it
//!                      starts the shepherd      ->  listens on `sock`, writes `shepherd.json`
//!   <- shepherd.json ------------------------------ state Waiting
//!   Restore ------------------------------------->  `runc restore --detach`, held by the freezer
//!   <---------------------------------------------- Held | Failed
//!   (commit) thaws the container's cgroup itself
//!   Abort --------------------------------------->  kills the container's cgroup, exits 125
//! ```
//!
//! The hand-off is written from what the API says, never from a checkpoint. It names the pod by uid and is used once.

use serde::{Deserialize, Serialize};

use crate::sealed;

/// Folder of the hand-offs: `HAND_OFF_DIR/<pod uid>/<container>/hand-off.json`, mode 0700.
pub const HAND_OFF_DIR: &str = "/run/peregrine/hand-off";
/// Name of the file in it.
pub const HAND_OFF_FILE: &str = "hand-off.json";
/// Folder of the shepherds: `SHEPHERD_DIR/<container id>/`, mode 0700.
pub const SHEPHERD_DIR: &str = "/run/peregrine/shepherd";
/// [`ShepherdReport`], sealed.
pub const SHEPHERD_FILE: &str = "shepherd.json";
/// UNIX stream socket of a shepherd: one JSON [`Request`] a line, one [`State`] a line in return.
pub const SHEPHERD_SOCKET: &str = "sock";
/// UNIX stream socket beside the script `park`, on which the agent listens: what CRIU asks before it touches a pod.
pub const PARK_SOCKET: &str = "park.sock";
/// Name of that script, a link to the wrapper.
pub const PARK: &str = "park";
/// The byte that lets CRIU go on.
pub const PARK_GO: u8 = b'g';
/// `HAND_OFF_DIR/<pod uid>/<container>/used`: the hand-off was used; written by the wrapper, which refuses another one.
pub const HAND_OFF_USED: &str = "used";
/// `HAND_OFF_DIR/<pod uid>/aborted` (empty): written by the agent on an abort; a `create` that still waits fails at once.
pub const HAND_OFF_ABORTED: &str = "aborted";
/// `COMMITTED_DIR/<pod uid>` (empty): the migration into this pod was committed. Written by a shepherd that is told
/// [`Request::Committed`]; it outlives a reboot. From then on the pod is an ordinary one: when its container ends or its
/// node reboots, the kubelet starts it anew, and the wrapper lets it. Removed by the agent when the pod object is gone.
pub const COMMITTED_DIR: &str = "/var/lib/peregrine/committed";
/// Annotation on a target pod: uid of its migration (the same literal as in the API's vocabulary).
pub const ANNOTATION_TARGET_OF: &str = "peregrine.dev/target-of";
/// `MOVED_AWAY_DIR/<pod uid>`: processes of this pod were moved to another node; the wrapper refuses to start it again.
pub const MOVED_AWAY_DIR: &str = "/var/lib/peregrine/moved-away";
/// Settings of the wrapper, written by the agent's installer: JSON of [`RuntimeConfig`].
pub const RUNTIME_CONFIG: &str = "/opt/peregrine/etc/runtime.json";
/// The library that is preloaded into CRIU where it is needed.
pub const CRIU_PRELOAD: &str = "/opt/peregrine/lib/limits.so";
/// Set in the environment of a dump whose tracked memory the agent copies itself; heard by that library.
pub const SKIP_TRACKED: &str = "PEREGRINE_SKIP_TRACKED";
/// Longest line on a shepherd's socket, in bytes.
pub const MAX_LINE: usize = 64 * 1024;
/// Largest hand-off or report, in bytes.
pub const MAX_FILE: usize = 64 * 1024;

const MAGIC_HAND_OFF: &str = "peregrine-hand-off";
const MAGIC_REPORT: &str = "peregrine-shepherd";
const VERSION: u32 = 1;

/// Permission to start this container as a target, once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandOff {
    /// Uid of the target pod.
    pub pod_uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub pod_name: String,
    /// Name of the container in the pod's spec.
    pub container: String,
    /// Uid of the migration; equals the pod's annotation `peregrine.dev/target-of`.
    pub migration_uid: String,
    /// Attempt of the migration.
    pub attempt: u32,
}

impl HandOff {
    /// As a file.
    ///
    /// # Errors
    /// None in practice: the type has only strings and numbers.
    pub fn seal(&self) -> Result<Vec<u8>, sealed::Error> {
        sealed::seal(MAGIC_HAND_OFF, VERSION, self)
    }

    /// From a file.
    ///
    /// # Errors
    /// See [`sealed::Error`].
    pub fn open(bytes: &[u8]) -> Result<Self, sealed::Error> {
        sealed::open(MAGIC_HAND_OFF, VERSION, MAX_FILE, bytes)
    }
}

/// What the agent needs to know of a container whose shepherd stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShepherdReport {
    /// The hand-off that was used.
    pub hand_off: HandOff,
    /// The container's id, as containerd and runc know it.
    pub container_id: String,
    /// Pid of the shepherd in the node's pid namespace.
    pub shepherd_pid: i32,
    /// The bundle.
    pub bundle: String,
    /// Absolute path of the root filesystem's mount (the merged overlay).
    pub rootfs: String,
    /// Absolute path of the container's cgroup in the v2 hierarchy (created on restore, empty until then).
    pub cgroup: String,
    /// Path of the sandbox's network namespace.
    pub network_namespace: String,
    /// Folder on the node that is mounted as /dev/shm, where the container has one.
    pub shm: Option<String>,
}

impl ShepherdReport {
    /// As a file.
    ///
    /// # Errors
    /// None in practice: the type has only strings and numbers.
    pub fn seal(&self) -> Result<Vec<u8>, sealed::Error> {
        sealed::seal(MAGIC_REPORT, VERSION, self)
    }

    /// From a file.
    ///
    /// # Errors
    /// See [`sealed::Error`].
    pub fn open(bytes: &[u8]) -> Result<Self, sealed::Error> {
        sealed::open(MAGIC_REPORT, VERSION, MAX_FILE, bytes)
    }
}

/// Agent -> shepherd. Idempotent: a repeated request is answered with the present state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Says the present state.
    Status,
    /// Restores the container from the images and holds it by the freezer. Answered when it is held or has failed.
    Restore {
        /// Folder with CRIU's images.
        images: String,
        /// Folder for CRIU's log and statistics.
        work: String,
        /// Memory comes from a pager that listens in `work`, while the container runs already.
        #[serde(default)]
        lazy: bool,
    },
    /// Ends everything of this container, restored or not. Refused (answered with the state) once the agent has
    /// declared it [`Request::Committed`].
    Abort,
    /// The decision is Committed: from now on the shepherd only stands for the restored process.
    Committed,
}

/// Shepherd -> agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case", deny_unknown_fields)]
pub enum State {
    /// Nothing restored yet.
    Waiting,
    /// A restore is under way.
    Restoring,
    /// Every process of the container exists and is frozen; none has run.
    Held {
        /// Pid of the restored first process in the node's pid namespace.
        pid: i32,
    },
    /// The agent has said that it was committed.
    Committed {
        /// Pid of the restored first process in the node's pid namespace.
        pid: i32,
    },
    /// The restore failed; nothing of the container runs. The shepherd waits for `Abort`.
    Failed {
        /// One sentence: CRIU's first error, or what runc said.
        message: String,
    },
    /// It has ended, or ends now.
    Ended,
}

/// Settings of the wrapper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RuntimeConfig {
    /// The OCI runtime below: the node's default (`/usr/sbin/runc`, or what containerd's default handler names).
    pub oci_runtime: String,
    /// Folder that is put first in PATH for `runc checkpoint` and `runc restore`: its `criu` is ours.
    pub libexec: String,
    /// Seconds for which `create` of a target waits for its hand-off.
    pub hand_off_timeout_seconds: u32,
    /// The CRIU to use, absolute.
    pub criu: String,
    /// The loader that starts it, absolute, with CRIU's libraries beside it. Absent: the node's own CRIU, which the node's
    /// loader starts.
    pub criu_loader: Option<String>,
    /// Library that is preloaded into CRIU: it answers for the limits of other users' processes where CRIU may not ask for
    /// them (no CAP_SYS_RESOURCE), and saves a walk through the connection tracking. Absolute; absent where there is none.
    pub preload: Option<String>,
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        Self {
            oci_runtime: "/usr/sbin/runc".into(),
            libexec: "/opt/peregrine/libexec".into(),
            hand_off_timeout_seconds: 60,
            criu: "/usr/sbin/criu".into(),
            criu_loader: None,
            preload: None,
        }
    }
}

impl RuntimeConfig {
    /// Program and first arguments that start CRIU. The folder of libraries is an argument and not in the environment, where
    /// the node's own programs that CRIU starts (`tar`) would find it too.
    #[must_use]
    pub fn criu_command(&self) -> (&str, Vec<&str>) {
        match self.criu_loader.as_deref() {
            None => (&self.criu, vec![]),
            Some(loader) => {
                let libraries = loader.rsplit_once('/').map_or("", |(folder, _)| folder);
                (loader, vec!["--library-path", libraries, &self.criu])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hand_off_survives_its_file_and_a_foreign_one_is_refused() {
        let hand_off = HandOff {
            pod_uid: "u".into(),
            namespace: "n".into(),
            pod_name: "p".into(),
            container: "c".into(),
            migration_uid: "m".into(),
            attempt: 1,
        };
        let file = hand_off.seal().unwrap();
        assert_eq!(HandOff::open(&file).unwrap(), hand_off);
        assert!(ShepherdReport::open(&file).is_err());
    }

    #[test]
    fn a_criu_with_a_loader_is_started_by_it() {
        let node = RuntimeConfig::default();
        assert_eq!(node.criu_command(), ("/usr/sbin/criu", vec![]));
        let own = RuntimeConfig {
            criu: "/o/criu".into(),
            criu_loader: Some("/o/loader".into()),
            ..node
        };
        assert_eq!(
            own.criu_command(),
            ("/o/loader", vec!["--library-path", "/o", "/o/criu"])
        );
    }
}
