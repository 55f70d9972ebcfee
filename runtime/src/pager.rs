//! Puts a restored pod's memory in place while the pod runs already: the target's side of `criu restore --lazy-pages`.
//!
//! ```text
//! agent ── starts it detached, in a cgroup of its own ──> guardian ─┬─ deputy
//! CRIU ── pid + userfaultfd (lazy-pages.socket) ──────────────────> └─ pager ── one thread hears, others fill
//! store: `<vpid>.pages`, offset = address; every page is given back as it is put in place
//! ```
//! It outlives the agent. Nothing but the store, which is complete, is needed to end its work.
//!
//! | module | holds |
//! |---|---|
//! | [`pending`], [`holders`], [`book`] | pure: what is missing where, and what nobody needs any more |
//! | [`board`] | what the processes share and what outlives each of them |
//! | [`space`] | one address space: putting pages, heeding events |
//! | [`serve`] | the pager's threads |
//! | [`guardian`] | starts it again, or kills the pod |

pub mod board;
pub mod book;
pub mod guardian;
pub mod holders;
pub mod pending;
pub mod serve;
pub mod space;

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use hostsys::kin::Entry;
use nix::errno::Errno;
use protocol::pager::Plan;
use protocol::{sealed, store_index};

use crate::complain::sentence;
use crate::folder::Folder;

/// The name under which it is called; its argument is its folder.
pub const NAME: &str = "pager";
/// What went wrong, for the result.
const NOTE: &str = "error";

/// What it cannot get past.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The plan.
    #[error("failed to read the plan")]
    Plan(#[source] sealed::Error),
    /// A file or socket.
    #[error("failed to open {}", .0.display())]
    File(PathBuf, #[source] io::Error),
    /// The kernel.
    #[error("failed to {0}")]
    Kernel(&'static str, #[source] io::Error),
    /// The index of a store.
    #[error("a page store cannot be used")]
    Index(#[source] store_index::Error),
    /// A page of a store.
    #[error("failed to read page {0:#x} of a store")]
    Store(u64, #[source] io::Error),
    /// The kernel's messages.
    #[error("failed to read what the kernel says about missing pages")]
    Read(#[source] io::Error),
    /// A page that the kernel does not take.
    #[error("page {0:#x} could not be put in place")]
    Refused(u64, #[source] Errno),
    /// CRIU said a pid only.
    #[error("CRIU sent no descriptor for process {0}")]
    NoDescriptor(u32),
    /// The restore failed, or was killed.
    #[error("CRIU ended before everything was restored")]
    RestoreEnded,
    /// Never asked for.
    #[error("the kernel says something unknown ({0:#x}) about missing pages")]
    Unknown(u8),
    /// A descriptor or record that must be there is not.
    #[error("what the pager before this one has noted does not fit together")]
    Lost,
}

/// What all three processes have from the beginning.
#[derive(Debug)]
pub struct Stage {
    /// What they share.
    pub board: board::Board,
    /// Its folder.
    pub folder: Folder,
    /// What is to be done.
    pub plan: Plan,
    /// For CRIU, one for each container.
    pub listeners: Vec<Entry>,
    /// For the agent.
    pub control: Entry,
    /// Wakes the pager.
    pub bell: Entry,
    /// Bytes of a page.
    pub page: u32,
}

impl Stage {
    /// Wakes the pager, who looks at the board then.
    pub fn ring(&self) {
        let _ = nix::unistd::write(self.bell, &1u64.to_ne_bytes());
    }

    /// Keeps what went wrong; the first counts.
    pub fn note(&self, message: &str) {
        say(message);
        if self.noted().is_empty() {
            let _ = self.folder.write(NOTE, message.as_bytes());
        }
    }

    /// What went wrong first.
    #[must_use]
    pub fn noted(&self) -> String {
        std::fs::read_to_string(self.folder.file(NOTE)).unwrap_or_default()
    }
}

/// Standard error is the agent's, who may be dead: that is no reason to end.
fn say(message: &str) {
    let _ = writeln!(io::stderr(), "peregrine pager: {message}");
}

/// The program.
#[must_use]
pub fn run(arguments: &[OsString]) -> ExitCode {
    let Some(folder) = arguments.first() else {
        say("no folder is named");
        return ExitCode::FAILURE;
    };
    match guardian::stand(&Folder::at(folder.into())) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&sentence(&error));
            ExitCode::FAILURE
        }
    }
}
