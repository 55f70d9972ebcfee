//! Stands for a container until and after its restore: holds its standard streams, is the subreaper to which the restored
//! first process falls, ends as that process ends.
//!
//! ```text
//! Waiting ── Restore ──> Restoring ──> Held{pid} ── Committed ──> Committed{pid} ──> (ends with the process's status)
//!    │                       │  └───> Failed{message}   │
//!    └────────────── Abort, SIGTERM ────────────────────┘──> Ended (everything killed, status 125)
//! ```
//!
//! One thread, one `poll`: the socket, its clients, and a signalfd for SIGCHLD and SIGTERM. A `Restore` is answered when it has
//! ended; meanwhile `Status` and `Abort` are served. The agent may die and come back at any time: the state stays here.

mod client;
mod held;

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hostsys::cgroup::{self, Cgroup};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use protocol::hand_off::{COMMITTED_DIR, Request, State};

use crate::folder::{self, Folder, Start};
use crate::restore;
use client::Client;

/// Exit status of a shepherd whose container never ran.
pub const ABORTED: i32 = 125;
/// A restore that takes longer is ended. The agent's own deadline is shorter.
const RESTORE: Duration = Duration::from_secs(600);
const KILL: Duration = Duration::from_secs(10);
/// So many agents do not exist.
const MAX_CLIENTS: usize = 8;

/// Why it cannot stand.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its folder.
    #[error("failed to use the shepherd's folder")]
    Folder(#[from] folder::Error),
    /// The kernel.
    #[error("failed to {0}")]
    Kernel(&'static str, #[source] io::Error),
    /// The report.
    #[error("failed to write the report")]
    Report(#[from] protocol::sealed::Error),
    /// A cgroup.
    #[error("failed to use the container's cgroup")]
    Cgroup(#[from] cgroup::Error),
}

/// How it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With this exit status.
    Status(i32),
    /// By this signal.
    Signal(i32),
}

/// A restore that is under way.
struct Restore {
    runc: i32,
    work: String,
    end: Instant,
}

struct Shepherd {
    folder: Folder,
    start: Start,
    listener: UnixListener,
    signals: SignalFd,
    clients: Vec<Client>,
    state: State,
    restore: Option<Restore>,
    /// Children that ended while a restore was under way: the restored first process may be among them.
    ended: HashMap<i32, End>,
}

/// Stands until the container ends.
///
/// # Errors
/// It could not begin; later failures are states.
pub fn stand(folder: Folder) -> Result<End, Error> {
    let mut shepherd = Shepherd::begin(folder)?;
    loop {
        match shepherd.turn() {
            Ok(None) => {}
            Ok(Some(end)) => return Ok(end),
            Err(error) => {
                // What cannot be watched over before the commit must not live on.
                if !matches!(shepherd.state, State::Committed { .. }) {
                    shepherd.kill_restore();
                    shepherd.kill_container();
                }
                return Err(error);
            }
        }
    }
}

fn kernel(doing: &'static str) -> impl FnOnce(Errno) -> Error {
    move |errno| Error::Kernel(doing, errno.into())
}

impl Shepherd {
    fn begin(folder: Folder) -> Result<Self, Error> {
        let start = folder.read_start()?;
        nix::sys::prctl::set_child_subreaper(true).map_err(kernel("become a subreaper"))?;
        // Blocked here and read from a descriptor; programs that it starts get a clean mask from the standard library.
        let mut mask = SigSet::empty();
        for signal in [
            Signal::SIGCHLD,
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGHUP,
            Signal::SIGQUIT,
        ] {
            mask.add(signal);
        }
        mask.thread_block().map_err(kernel("block signals"))?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(kernel("receive signals"))?;
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(folder.socket()).map_err(|e| Error::Kernel("make the socket", e))?;
        listener
            .set_nonblocking(true)
            .map_err(|e| Error::Kernel("make the socket", e))?;
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
        let mut report = start.report.clone();
        report.shepherd_pid = nix::unistd::getpid().as_raw();
        folder.write(protocol::hand_off::SHEPHERD_FILE, &report.seal()?)?;
        Ok(Self {
            folder,
            start,
            listener,
            signals,
            clients: Vec::new(),
            state: State::Waiting,
            restore: None,
            ended: HashMap::new(),
        })
    }

    fn container(&self) -> Cgroup {
        Cgroup::at(&self.start.report.cgroup)
    }

    /// Waits for something and deals with it.
    fn turn(&mut self) -> Result<Option<End>, Error> {
        let (listening, signalled, readable) = self.wait()?;
        if signalled && let Some(end) = self.signals()? {
            return Ok(Some(end));
        }
        let expired = self
            .restore
            .as_ref()
            .is_some_and(|restore| Instant::now() >= restore.end);
        if expired {
            self.fail(format!("the restore did not end within {RESTORE:?}"));
        }
        if listening {
            self.accept();
        }
        let mut requests = Vec::new();
        for (index, client) in self.clients.iter_mut().enumerate() {
            if readable.get(index) == Some(&true) {
                requests.extend(client.read().into_iter().map(|request| (index, request)));
            }
        }
        for (index, request) in requests {
            let end = self.serve(index, request);
            if end.is_some() {
                return Ok(end);
            }
        }
        self.clients.retain(Client::is_open);
        Ok(None)
    }

    fn wait(&self) -> Result<(bool, bool, Vec<bool>), Error> {
        let mut fds = vec![
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(
            self.clients
                .iter()
                .map(|client| PollFd::new(client.as_fd(), PollFlags::POLLIN)),
        );
        let timeout = match &self.restore {
            None => PollTimeout::NONE,
            Some(restore) => {
                let left = restore.end.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                PollTimeout::try_from(left.min(Duration::from_secs(60))).unwrap_or(PollTimeout::ZERO)
            }
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(kernel("wait for requests")(errno)),
        }
        let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(false));
        let (listening, signalled) = (ready.next() == Some(true), ready.next() == Some(true));
        Ok((listening, signalled, ready.collect()))
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            let Some(client) = Client::of(stream) else { continue };
            if self.clients.len() >= MAX_CLIENTS {
                // Dead ones linger until they are read: the oldest that awaits nothing makes room.
                let oldest = self
                    .clients
                    .iter()
                    .position(|client| !client.wants_restore)
                    .unwrap_or(0);
                self.clients.remove(oldest);
            }
            self.clients.push(client);
        }
    }

    fn signals(&mut self) -> Result<Option<End>, Error> {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            let is_child = i32::try_from(signal.ssi_signo) == Ok(Signal::SIGCHLD as i32);
            // After the commit nobody ends the container by its shepherd: signals for the container go by runc.
            if !is_child && !matches!(self.state, State::Committed { .. }) {
                return Ok(Some(self.abort()));
            }
        }
        self.reap()
    }

    /// Takes the status of every child that has ended.
    fn reap(&mut self) -> Result<Option<End>, Error> {
        loop {
            let (pid, end) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, status)) => (pid.as_raw(), End::Status(status)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid.as_raw(), End::Signal(signal as i32)),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(None),
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(errno) => return Err(kernel("wait for children")(errno)),
            };
            match (&self.state, &self.restore) {
                (State::Held { pid: first } | State::Committed { pid: first }, _) if *first == pid => {
                    return Ok(Some(self.container_ended(end)));
                }
                (_, Some(restore)) if restore.runc == pid => self.restored(end),
                (_, Some(_)) => drop(self.ended.insert(pid, end)),
                (_, None) => {}
            }
        }
    }

    /// The restored first process has ended: so does the container, and the shepherd with its status.
    fn container_ended(&mut self, end: End) -> End {
        // With a pid namespace of its own nothing is left; else containerd kills the rest, but before the commit it is ours.
        if matches!(self.state, State::Held { .. }) {
            self.kill_container();
        }
        self.state = State::Ended;
        self.answer_all();
        end
    }

    fn serve(&mut self, index: usize, request: Option<Request>) -> Option<End> {
        match (request, &self.state) {
            // A restore is answered when it has ended; one that fails at once has been answered with the others.
            (Some(Request::Restore { images, work, lazy }), State::Waiting) => {
                self.restore(&images, &work, lazy);
                return None;
            }
            (Some(Request::Restore { .. }), State::Restoring) => return None,
            (Some(Request::Committed), State::Held { pid }) => {
                let pid = *pid;
                // The mark comes first: without it the pod could never be restarted after a reboot. It can be repeated.
                if self.mark_committed().is_ok() {
                    self.state = State::Committed { pid };
                }
            }
            (Some(Request::Abort), State::Committed { .. }) => {}
            (Some(Request::Abort), _) => return Some(self.abort()),
            // Not understood, or no longer of effect: the present state is an answer in any case.
            (None | Some(Request::Status | Request::Restore { .. } | Request::Committed), _) => {}
        }
        if let Some(client) = self.clients.get_mut(index) {
            client.answer(&self.state);
        }
        None
    }

    fn restore(&mut self, images: &str, work: &str, lazy: bool) {
        self.state = State::Restoring;
        if !Path::new(images).is_absolute() || !Path::new(work).is_absolute() {
            return self.fail("the agent named no absolute folder for the images".into());
        }
        match restore::start(&self.folder, &self.start, images, work, lazy) {
            Ok(runc) => {
                let end = Instant::now() + RESTORE;
                self.restore = Some(Restore {
                    runc,
                    work: work.to_owned(),
                    end,
                });
            }
            Err(error) => self.fail(crate::complain::sentence(&error)),
        }
    }

    /// `runc restore` has ended: held, or failed.
    fn restored(&mut self, end: End) {
        let Some(restore) = self.restore.take() else { return };
        if end != End::Status(0) {
            return self.fail(restore::why(&self.folder, &restore.work));
        }
        let pid = match held::verify(&self.container(), &self.folder.file("pid"), &self.ended) {
            Ok(pid) => pid,
            Err(error) => return self.fail(crate::complain::sentence(&error)),
        };
        if let Err(error) = self.folder.set_below(true) {
            return self.fail(crate::complain::sentence(&error));
        }
        self.ended.clear();
        self.state = State::Held { pid };
        self.answer_all();
    }

    /// Nothing of the container may live when `Failed` is told.
    fn fail(&mut self, message: String) {
        self.kill_restore();
        self.kill_container();
        // What runc remembers would make containerd's `delete` fail later; it may have remembered nothing.
        let _ = restore::forget(&self.folder, &self.start);
        self.ended.clear();
        self.state = State::Failed { message };
        self.answer_all();
    }

    /// Ends everything of this container.
    fn abort(&mut self) -> End {
        self.kill_restore();
        self.kill_container();
        if matches!(self.state, State::Restoring | State::Held { .. })
            && restore::forget(&self.folder, &self.start).is_ok()
        {
            // If it stays marked, the runtime below is asked once more by `delete`.
            let _ = self.folder.set_below(false);
        }
        // Their parent is about to end: whoever inherits them need not know them.
        while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive) {}
        self.state = State::Ended;
        self.answer_all();
        End::Status(ABORTED)
    }

    /// Ends a restore that is under way. CRIU lives in the container's cgroup until the hold moves it out: killing that
    /// cgroup lets runc fail by itself and clean up. Only a runc that does not is killed.
    fn kill_restore(&mut self) {
        let Some(restore) = self.restore.take() else { return };
        let end = Instant::now() + KILL;
        let runc = Pid::from_raw(restore.runc);
        loop {
            self.kill_container();
            match waitpid(runc, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                Ok(WaitStatus::StillAlive) => {
                    let _ = killpg(runc, Signal::SIGKILL);
                    let _ = waitpid(runc, None);
                    break;
                }
                _ => break,
            }
        }
        self.kill_container();
    }

    fn kill_container(&self) {
        if let Err(error) = self.container().kill(KILL) {
            // Nobody else can do better; `delete` and the agent's abort try again.
            let _ = self
                .folder
                .write("kill-error", crate::complain::sentence(&error).as_bytes());
        }
    }

    fn answer_all(&mut self) {
        for client in &mut self.clients {
            if client.wants_restore || self.state == State::Ended {
                client.answer(&self.state);
            }
        }
    }

    fn mark_committed(&self) -> io::Result<()> {
        let path = crate::hand_off::mark(COMMITTED_DIR, &self.start.report.hand_off.pod_uid)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let folder = PathBuf::from(COMMITTED_DIR);
        std::fs::create_dir_all(&folder)?;
        std::fs::File::create(path)?.sync_all()?;
        // The name itself must outlive a loss of power.
        std::fs::File::open(folder)?.sync_all()
    }
}
