//! The calls that are answered for a shepherd, before and around the restore.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use hostsys::cgroup::{self, Cgroup};
use hostsys::namespace::PidFd;
use hostsys::program::{self, Program};
use nix::sys::signal::Signal;
use protocol::hand_off::{COMMITTED_DIR, Request, RuntimeConfig, ShepherdReport, State};

use crate::argv::Call;
use crate::complain::rfc3339;
use crate::folder::{self, Folder, Start};
use crate::hand_off;
use crate::restore;
use crate::verdict::Standing;

const KILL: Duration = Duration::from_secs(10);
/// The shepherd kills what it restores and lets runc forget it before it answers.
const ABORT: Duration = Duration::from_secs(40);

/// Why a call could not be answered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The shepherd's folder.
    #[error("failed to use the shepherd's folder")]
    Folder(#[from] folder::Error),
    /// A cgroup.
    #[error("failed to end what belongs to the container")]
    Cgroup(#[from] cgroup::Error),
    /// The runtime below.
    #[error("the runtime below failed")]
    Below(#[from] program::Error),
    /// Standard output.
    #[error("failed to write the answer")]
    Write(#[from] std::io::Error),
}

/// A container that has a shepherd.
pub struct Shepherded {
    folder: Folder,
    start: Start,
    pid: Option<i32>,
    /// What the verdict needs.
    pub standing: Standing,
}

impl Shepherded {
    /// The shepherd of a container; none where it has none.
    ///
    /// # Errors
    /// Its folder is there, but not readable.
    pub fn of(id: &str) -> Result<Option<Self>, Error> {
        let Some(folder) = Folder::of(id).filter(Folder::exists) else {
            return Ok(None);
        };
        let start = match folder.read_start() {
            Ok(start) => start,
            // `create` was killed before it had written anything: there is no shepherd and no container.
            Err(_) if !folder.file("start.json").exists() => {
                folder.remove()?;
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        let report = std::fs::read(folder.report())
            .ok()
            .and_then(|bytes| ShepherdReport::open(&bytes).ok());
        // The number alone may belong to another process by now; its cgroup tells.
        let pid = report.map(|report| report.shepherd_pid).filter(|pid| {
            Cgroup::at(start.shepherd_cgroup())
                .processes()
                .is_ok_and(|processes| processes.contains(pid))
        });
        let alive = pid.is_some_and(|pid| PidFd::open(pid).is_ok_and(|handle| handle.is_alive()));
        let mark = hand_off::mark(COMMITTED_DIR, &start.report.hand_off.pod_uid);
        let standing = Standing {
            below: folder.is_below(),
            committed: mark.is_some_and(|mark| mark.exists()),
            alive,
        };
        Ok(Some(Self {
            folder,
            start,
            pid,
            standing,
        }))
    }

    /// `start`: only remembered, for `state`.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn started(&self) -> Result<(), Error> {
        Ok(self.folder.write("started", b"")?)
    }

    /// `state`: as runc prints it.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn print_state(&self) -> Result<(), Error> {
        let mut text = serde_json::to_vec_pretty(&self.state_document()).map_err(std::io::Error::from)?;
        text.push(b'\n');
        Ok(std::io::stdout().write_all(&text)?)
    }

    fn state_document(&self) -> serde_json::Value {
        let running = self.standing.alive;
        let status = match (running, self.folder.file("started").exists()) {
            (false, _) => "stopped",
            (true, false) => "created",
            (true, true) => "running",
        };
        let created = std::fs::metadata(self.folder.file("start.json"))
            .and_then(|meta| meta.modified())
            .ok()
            .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok())
            .unwrap_or_default();
        serde_json::json!({
            "ociVersion": "1.2.1",
            "id": self.start.report.container_id,
            "pid": if running { self.pid.unwrap_or(0) } else { 0 },
            "status": status,
            "bundle": self.start.report.bundle,
            "rootfs": self.start.report.rootfs,
            "created": rfc3339(created),
            "owner": "",
        })
    }

    /// `ps`: the shepherd alone.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn print_processes(&self, call: &Call) -> Result<(), Error> {
        let pids: Vec<i32> = self.pid.into_iter().collect();
        let text = if call.option(&["format", "f"]).is_some_and(|format| format == "json") {
            serde_json::Value::from(pids).to_string()
        } else {
            let lines = pids.iter().map(|pid| format!("\n{pid} {}", crate::create::SHEPHERD));
            format!("PID CMD{}", lines.collect::<String>())
        };
        Ok(writeln!(std::io::stdout(), "{text}")?)
    }

    /// `kill` before the restore or after the shepherd's death: ends everything. Which signal was asked for does not matter:
    /// no program of the user's is there to receive it.
    ///
    /// # Errors
    /// Something still lives.
    pub fn end(&self) -> Result<(), Error> {
        if self.standing.alive {
            // The shepherd itself knows best what to end; it answers when it has.
            let asked = ask(&self.folder.socket(), &Request::Abort, ABORT);
            if matches!(asked, Some(State::Committed { .. })) {
                // Committed a moment ago: then it is no longer ours to end, and the caller will call again.
                return Ok(());
            }
            if let Some(handle) = self.pid.and_then(|pid| PidFd::open(pid).ok())
                && !handle.wait_end(KILL)
            {
                // A signal that cannot be sent shows in the cgroup, which is killed next.
                let _ = handle.signal(Signal::SIGKILL);
            }
        }
        // The shepherd first: it must not report the death of the container as the container's own end.
        let shepherd = Cgroup::at(self.start.shepherd_cgroup());
        shepherd.kill(KILL)?;
        Cgroup::at(&self.start.report.cgroup).kill(KILL)?;
        Ok(())
    }

    /// `delete`: ends what lives, lets the runtime below forget the container, removes folder and cgroups.
    ///
    /// # Errors
    /// Something is left; the call can be repeated.
    pub fn delete(&self) -> Result<(), Error> {
        self.end()?;
        restore::forget(&self.folder, &self.start)?;
        self.clean_up()
    }

    /// `delete` while the container runs: the runtime below decides, as for any other (it refuses without --force).
    ///
    /// # Errors
    /// It refuses, or something is left; the call can be repeated.
    pub fn delete_running(&self, call: &Call, settings: &RuntimeConfig) -> Result<(), Error> {
        Program::new(&settings.oci_runtime)
            .args(&call.globals)
            .args(call.verb.as_deref())
            .args(&call.rest)
            .within(ABORT)
            .run()?;
        self.clean_up()
    }

    fn clean_up(&self) -> Result<(), Error> {
        // With --force the first process is dead now, and the shepherd about to end.
        let shepherd = Cgroup::at(self.start.shepherd_cgroup());
        if shepherd.wait_empty(Duration::from_secs(1)).is_err() {
            shepherd.kill(KILL)?;
        }
        shepherd.remove(KILL)?;
        Cgroup::at(&self.start.report.cgroup).remove(KILL)?;
        self.folder.remove()?;
        Ok(())
    }
}

/// One request to a shepherd; none where it does not answer.
fn ask(socket: &Path, request: &Request, within: Duration) -> Option<State> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(within)).ok()?;
    stream.set_write_timeout(Some(within)).ok()?;
    let mut line = serde_json::to_vec(request).ok()?;
    line.push(b'\n');
    stream.write_all(&line).ok()?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).ok()?;
    serde_json::from_str(&answer).ok()
}
