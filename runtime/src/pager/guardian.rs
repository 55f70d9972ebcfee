//! Watches over the pager. Guardian, deputy and pager share one table of descriptors: the userfaultfds stay open until the
//! last of the three has ended, and only then do missing pages become zeros.
//!
//! | killed | what happens |
//! |---|---|
//! | pager | the guardian starts another, which knows all from the board and goes on with what the store still has |
//! | guardian | the deputy becomes the guardian, starts a new deputy and a new pager |
//! | deputy | the guardian starts another |
//! | before all is restored, or more often than makes sense | the pod is killed before the last descriptor is closed |

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hostsys::cgroup::Cgroup;
use hostsys::kin::{self, Entry};
use hostsys::namespace::PidFd;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use protocol::pager::{CONTROL_SOCKET, PLAN_FILE, Plan, RESULT_FILE, Request, Status};
use protocol::store_index::SOCKET;

use super::board::{Board, State, Word};
use super::{Error, Stage, serve};
use crate::complain::sentence;
use crate::folder::Folder;

/// A pager that is killed more often is killed by something that will not end.
const RESTARTS: u64 = 20;
const KILL: Duration = Duration::from_secs(10);
/// Between two tries to kill.
const AGAIN: Duration = Duration::from_millis(100);
/// For the agent to say what it wants once it has connected.
const REQUEST: Duration = Duration::from_secs(2);
/// For the end of the pagers that are killed.
const SWEEP: Duration = Duration::from_secs(30);

/// Stands until all is filled (true) or the pod is dead.
///
/// # Errors
/// It could not begin; nothing was restored then.
pub fn stand(folder: &Folder) -> Result<bool, Error> {
    let stage = Arc::new(prepare(folder)?);
    Ok(guard(&stage, false))
}

fn prepare(folder: &Folder) -> Result<Stage, Error> {
    let path = folder.file(PLAN_FILE);
    let plan = std::fs::read(&path).map_err(|e| Error::File(path, e))?;
    let plan = Plan::open(&plan).map_err(Error::Plan)?;
    // Best effort: without these a pod with thousands of processes, or a node without memory, may lose its pager and so its life.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    if let Ok((_, most)) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE) {
        let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, most, most);
    }
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let bell = nix::sys::eventfd::EventFd::from_flags(
        nix::sys::eventfd::EfdFlags::EFD_CLOEXEC | nix::sys::eventfd::EfdFlags::EFD_NONBLOCK,
    );
    let bell = bell.map_err(|e| Error::Kernel("make an event descriptor", e.into()))?;
    let mut listeners = Vec::new();
    for container in &plan.containers {
        listeners.push(listen(&Path::new(&container.work).join(SOCKET))?);
    }
    // Last: who can connect to it knows that CRIU can too.
    let control = listen(&folder.file(CONTROL_SOCKET))?;
    Ok(Stage {
        board: Board::new().map_err(|e| Error::Kernel("share memory", e))?,
        folder: folder.clone(),
        plan,
        listeners,
        control,
        bell: Entry::of(OwnedFd::from(bell)),
        page: page_size(),
    })
}

fn page_size() -> u32 {
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
    size.and_then(|size| u32::try_from(size).ok()).unwrap_or(4096)
}

fn listen(path: &Path) -> Result<Entry, Error> {
    let failed = |e| Error::File(path.to_owned(), e);
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(Entry::of(listener.into()))
}

/// A process that was split off, watched.
struct Split(Option<PidFd>);

impl Split {
    fn start(work: impl FnOnce() -> i32) -> Self {
        // The handle is opened before anybody can have awaited the child, so it is the child's.
        Self(kin::split(work).ok().and_then(|pid| PidFd::open(pid).ok()))
    }

    fn is_alive(&self) -> bool {
        self.0.as_ref().is_some_and(PidFd::is_alive)
    }

    fn kill(&self) {
        if let Some(handle) = &self.0 {
            let _ = handle.signal(Signal::SIGKILL);
        }
    }
}

/// Whoever looks at the node sees who is who.
fn named<R>(name: &std::ffi::CStr, work: impl FnOnce() -> R) -> R {
    let _ = nix::sys::prctl::set_name(name);
    work()
}

fn start_pager(stage: &Arc<Stage>) -> Split {
    let stage = Arc::clone(stage);
    Split::start(move || match named(c"pgr-pager", || serve::run(&stage)) {
        Ok(()) => 0,
        Err(error) => {
            stage.note(&sentence(&error));
            stage.board.set_state(State::Failed);
            1
        }
    })
}

fn start_deputy(stage: &Arc<Stage>) -> Split {
    let stage = Arc::clone(stage);
    let guardian = nix::unistd::getpid().as_raw();
    Split::start(move || {
        named(c"pgr-deputy", || ());
        if let Ok(handle) = PidFd::open(guardian) {
            while !handle.wait_end(Duration::from_secs(3600)) {}
        }
        // A guardian that ends on purpose ends its deputy before. This one was killed, whatever it was doing.
        i32::from(!guard(&stage, true))
    })
}

/// Guards until all is filled (true) or the pod is dead. `inherited`: the guardian before has died, and of what it had started only
/// the cgroup tells.
fn guard(stage: &Arc<Stage>, inherited: bool) -> bool {
    named(c"pgr-guardian", || ());
    if inherited && let Err(error) = sweep() {
        stage.note(&sentence(&error));
        return kill_pod(stage, "the pager could not be taken over");
    }
    let mut deputy = start_deputy(stage);
    let mut pager = if !inherited {
        start_pager(stage)
    } else {
        match again(stage) {
            Ok(pager) => pager,
            // Also what the guardian before had begun to do, or to say.
            Err(why) => return end(stage, &deputy, why),
        }
    };
    loop {
        let asked = wait(stage, &pager, &deputy);
        while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive) {}
        if !pager.is_alive() {
            match again(stage) {
                Ok(new) => pager = new,
                Err(why) => return end(stage, &deputy, why),
            }
        }
        if !deputy.is_alive() {
            deputy = start_deputy(stage);
        }
        if asked && serve_one(stage) {
            pager.kill();
            return end(stage, &deputy, Some("the move was given up"));
        }
    }
}

/// How the pager ended for good: filled, or a reason to kill the pod.
fn end(stage: &Stage, deputy: &Split, why: Option<&str>) -> bool {
    let filled = match why {
        None => {
            finish(stage, String::new());
            true
        }
        Some(why) => kill_pod(stage, why),
    };
    deputy.kill();
    filled
}

/// A pager behind one that has ended; or that there is no need (`None`), or no way (why) for one.
fn again(stage: &Arc<Stage>) -> Result<Split, Option<&'static str>> {
    let board = &stage.board;
    match board.state() {
        State::Filled => Err(None),
        State::Failed => Err(Some("its memory could not be made complete")),
        State::Killed => Err(Some("it was being killed")),
        State::Waiting => Err(Some("the pager was killed while the pod was being restored")),
        State::Filling if board.get(Word::Overflow) != 0 => {
            Err(Some("the pager was killed after more events than can be remembered"))
        }
        State::Filling if board.get(Word::Restarts) >= RESTARTS => Err(Some("the pager was killed again and again")),
        State::Filling => {
            board.add(Word::Restarts, 1);
            Ok(start_pager(stage))
        }
    }
}

/// Waits until somebody ended, or the agent asks something (true).
fn wait(stage: &Stage, pager: &Split, deputy: &Split) -> bool {
    let mut fds = vec![PollFd::new(stage.control.as_fd(), PollFlags::POLLIN)];
    for split in [pager, deputy] {
        fds.extend(
            split
                .0
                .as_ref()
                .map(|handle| PollFd::new(handle.as_fd(), PollFlags::POLLIN)),
        );
    }
    // The time is for what could not be started: it is tried again.
    let _ = poll(&mut fds, PollTimeout::from(1000u16));
    fds.first().and_then(PollFd::any).unwrap_or(false)
}

/// Answers one connection; true: the pod is to be killed.
fn serve_one(stage: &Stage) -> bool {
    let Some(mut stream) = accept(stage) else {
        return false;
    };
    let mut line = String::new();
    let mut reader = BufReader::new(&stream);
    let request = match reader.read_line(&mut line) {
        Ok(n) if n > 0 => serde_json::from_str::<Request>(&line).ok(),
        _ => None,
    };
    let killed = request == Some(Request::Kill);
    match request {
        Some(Request::Fill) => {
            stage.board.set(Word::Fill, 1);
            stage.ring();
        }
        Some(Request::Kill) => stage.board.set_state(State::Killed),
        Some(Request::Status) | None => {}
    }
    if let Ok(mut answer) = serde_json::to_vec(&stage.board.status()) {
        answer.push(b'\n');
        // One that does not listen to its answer asks again.
        let _ = stream.write_all(&answer);
    }
    killed
}

fn accept(stage: &Stage) -> Option<UnixStream> {
    let listener = stage.control.as_fd().try_clone_to_owned().ok()?;
    let (stream, _) = UnixListener::from(listener).accept().ok()?;
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(REQUEST)).ok()?;
    stream.set_write_timeout(Some(REQUEST)).ok()?;
    Some(stream)
}

/// Ends all that the guardian before has started. Two pagers must never read the same events.
fn sweep() -> Result<(), Error> {
    let own = nix::unistd::getpid().as_raw();
    let failed =
        |e: hostsys::cgroup::Error| Error::Kernel("end what the guardian has started", std::io::Error::other(e));
    let cgroup = Cgroup::of_process(own).map_err(failed)?;
    let deadline = Instant::now() + SWEEP;
    loop {
        let others = cgroup.processes().map_err(failed)?;
        let others: Vec<PidFd> = others
            .into_iter()
            .filter(|pid| *pid != own)
            .filter_map(|pid| PidFd::open(pid).ok())
            .filter(PidFd::is_alive)
            .collect();
        if others.is_empty() {
            return Ok(());
        }
        for other in &others {
            let _ = other.signal(Signal::SIGKILL);
        }
        for other in others {
            if !other.wait_end(deadline.saturating_duration_since(Instant::now())) {
                return Err(Error::Kernel(
                    "end what the guardian has started",
                    std::io::ErrorKind::TimedOut.into(),
                ));
            }
        }
    }
}

/// Kills the pod, however long it takes: as long as it lives, the descriptors stay open.
fn kill_pod(stage: &Stage, why: &str) -> bool {
    stage.board.set_state(State::Killed);
    for container in &stage.plan.containers {
        while let Err(error) = Cgroup::at(&container.cgroup).kill(KILL) {
            stage.note(&sentence(&error));
            std::thread::sleep(AGAIN);
        }
    }
    let said = stage.noted();
    let message = if said.is_empty() {
        why.to_owned()
    } else {
        format!("{why}: {said}")
    };
    finish(stage, message);
    false
}

fn finish(stage: &Stage, message: String) {
    let status = Status {
        message,
        ..stage.board.status()
    };
    let written = status
        .seal()
        .map_err(|e| sentence(&e))
        .and_then(|sealed| stage.folder.write(RESULT_FILE, &sealed).map_err(|e| sentence(&e)));
    if let Err(why) = written {
        super::say(&why);
    }
}
