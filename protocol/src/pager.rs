//! Agent -> pager, on one node: the program that puts a restored pod's memory in place while the pod runs already.
//!
//! ```text
//! agent                    guardian (and its deputy and the pager, see `runtime::pager`)
//!   plan.json           ->   reads it once; binds `lazy-pages.socket` in every work folder, then `sock`
//!   Fill ---------------->   all are held: the bulk may be filled, not only what somebody waits for
//!   Status -------------->   <- Status
//!   Kill ---------------->   kills the pod's cgroups, then ends
//!                            result.json: how it ended
//! ```
//! No `sock` that answers and no `result.json`: all of it was killed, and pages may have become zeros. The pod must be killed.

use serde::{Deserialize, Serialize};

use crate::sealed;

/// Folder of the pagers: `PAGER_DIR/<migration uid>/`, mode 0700.
pub const PAGER_DIR: &str = "/run/peregrine/pager";
/// [`Plan`], sealed.
pub const PLAN_FILE: &str = "plan.json";
/// UNIX stream socket: one JSON [`Request`] a line, one [`Status`] a line in return.
pub const CONTROL_SOCKET: &str = "sock";
/// [`Status`], sealed: how it ended.
pub const RESULT_FILE: &str = "result.json";
/// Largest plan or result, in bytes.
pub const MAX_FILE: usize = 256 * 1024;

const MAGIC_PLAN: &str = "peregrine-pager-plan";
const MAGIC_RESULT: &str = "peregrine-pager-result";
const VERSION: u32 = 1;

/// What a pager is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The containers whose processes it fills.
    pub containers: Vec<Container>,
    /// Threads that fill in the background.
    pub threads: u32,
}

/// One container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Container {
    /// CRIU's work folder.
    pub work: String,
    /// Folder of the page stores.
    pub store: String,
    /// The container's cgroup: killed where its memory cannot be made complete.
    pub cgroup: String,
}

impl Plan {
    /// As a file.
    ///
    /// # Errors
    /// None in practice: the type has only strings and numbers.
    pub fn seal(&self) -> Result<Vec<u8>, sealed::Error> {
        sealed::seal(MAGIC_PLAN, VERSION, self)
    }

    /// From a file.
    ///
    /// # Errors
    /// See [`sealed::Error`].
    pub fn open(bytes: &[u8]) -> Result<Self, sealed::Error> {
        sealed::open(MAGIC_PLAN, VERSION, MAX_FILE, bytes)
    }
}

/// Agent -> guardian. Idempotent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Says the present state.
    Status,
    /// Everything is restored and held: the bulk may be filled.
    Fill,
    /// Kills the pod, then ends.
    Kill,
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Nothing was restored yet, or not all.
    #[default]
    Waiting,
    /// The processes are there; pages are filled as they are asked for, and the bulk once that was allowed.
    Filling,
    /// Every page is in place: nothing of the move is left.
    Filled,
    /// The pod was killed, because it was asked for or because its memory could not be made complete.
    Killed,
}

/// Guardian -> agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// How far it is.
    pub phase: Phase,
    /// Bytes that the stores had.
    pub total_bytes: u64,
    /// Bytes that are not in place yet.
    pub remaining_bytes: u64,
    /// Pages that a thread has waited for.
    pub faults: u64,
    /// The longest that a thread waited after its fault was heard, in microseconds.
    pub longest_fault_microseconds: u64,
    /// Processes that were or are filled, forked ones included.
    pub processes: u64,
    /// How often the pager was killed and started again.
    pub restarts: u64,
    /// From the end of the restore until all was in place, in milliseconds.
    pub fill_milliseconds: u64,
    /// One sentence where it was killed.
    pub message: String,
}

impl Status {
    /// As a file.
    ///
    /// # Errors
    /// None in practice: the type has only strings and numbers.
    pub fn seal(&self) -> Result<Vec<u8>, sealed::Error> {
        sealed::seal(MAGIC_RESULT, VERSION, self)
    }

    /// From a file.
    ///
    /// # Errors
    /// See [`sealed::Error`].
    pub fn open(bytes: &[u8]) -> Result<Self, sealed::Error> {
        sealed::open(MAGIC_RESULT, VERSION, MAX_FILE, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_and_result_survive_their_files_and_are_told_apart() {
        let plan = Plan {
            containers: vec![Container {
                work: "/w".into(),
                store: "/s".into(),
                cgroup: "/c".into(),
            }],
            threads: 2,
        };
        assert_eq!(Plan::open(&plan.seal().unwrap()).unwrap(), plan);
        let status = Status {
            phase: Phase::Filled,
            ..Status::default()
        };
        assert_eq!(Status::open(&status.seal().unwrap()).unwrap(), status);
        assert!(Status::open(&plan.seal().unwrap()).is_err());
    }
}
