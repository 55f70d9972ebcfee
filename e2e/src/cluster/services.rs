//! Services of a machine: kept running, reaped, and stopped or started by order.

use std::collections::HashSet;
use std::fs::OpenOptions;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use super::init::PATH;
use super::machine_spec::{Condition, Service};

/// First wait before a service that ended is started again; doubles up to [`RESTART_MAX`] while it keeps ending early.
const RESTART_MIN: Duration = Duration::from_millis(50);
const RESTART_MAX: Duration = Duration::from_secs(1);
/// A service that ran this long has not ended early.
const RAN_WELL: Duration = Duration::from_secs(5);
/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(20);

/// Runs services, for ever.
///
/// # Errors
/// Never: a machine without its services is still a machine.
pub(super) fn run(services: Vec<Service>, listener: UnixListener) -> Result<()> {
    let services: Vec<Arc<Running>> = services
        .into_iter()
        .map(|service| Arc::new(Running::new(service)))
        .collect();
    let mine = Arc::new(Mutex::new(HashSet::new()));
    for service in &services {
        let (service, mine) = (Arc::clone(service), Arc::clone(&mine));
        std::thread::spawn(move || service.keep(&mine));
    }
    std::thread::spawn(move || obey(&listener, &services));
    reap(&mine)
}

/// Processes whose end their own thread waits for: all others are reaped by [`reap`].
type Mine = Mutex<HashSet<i32>>;

struct Running {
    service: Service,
    wanted: AtomicBool,
    /// 0 while it does not run.
    pid: AtomicU32,
}

impl Running {
    fn new(service: Service) -> Self {
        Self {
            service,
            wanted: AtomicBool::new(true),
            pid: AtomicU32::new(0),
        }
    }

    /// Keeps the service running, for ever.
    fn keep(&self, mine: &Mine) {
        let mut pause = RESTART_MIN;
        loop {
            while !self.wanted.load(Ordering::SeqCst) || !self.service.after.iter().all(Condition::holds) {
                std::thread::sleep(POLL);
            }
            let began = Instant::now();
            let outcome = self.run_once(mine);
            let line = match outcome {
                Ok(status) => format!("{} ended: {status}", self.service.name),
                Err(error) => format!("{} cannot run: {error:#}", self.service.name),
            };
            eprintln!("init: {line}");
            pause = if began.elapsed() >= RAN_WELL {
                RESTART_MIN
            } else {
                (pause * 2).min(RESTART_MAX)
            };
            std::thread::sleep(pause);
        }
    }

    fn run_once(&self, mine: &Mine) -> Result<String> {
        for argv in &self.service.before {
            let mut child = self.start(argv, mine, false)?;
            let status = wait(&mut child, mine)?;
            if !status.success() {
                bail!("{} failed: {status}", argv.join(" "));
            }
        }
        let mut child = self.start(&self.service.argv, mine, true)?;
        let status = wait(&mut child, mine);
        self.pid.store(0, Ordering::SeqCst);
        Ok(status?.to_string())
    }

    fn start(&self, argv: &[String], mine: &Mine, main: bool) -> Result<Child> {
        let (program, args) = argv.split_first().context("a service without a program")?;
        let log = format!("/var/log/{}.log", self.service.name);
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot open {log}"))?;
        let errors = log.try_clone().context("cannot share the log")?;
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .env("PATH", PATH)
            .env("HOME", "/root")
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .current_dir("/");
        // Its own group: a service that signals its group must not reach init.
        command.process_group(0);
        // Held while it starts: were it to end at once, the reaper would not know whose it is.
        let mut mine = mine.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn().with_context(|| format!("cannot start {program}"))?;
        mine.insert(child.id().cast_signed());
        if main {
            self.pid.store(child.id(), Ordering::SeqCst);
        }
        Ok(child)
    }

    fn stop(&self) {
        self.wanted.store(false, Ordering::SeqCst);
        // Stored by its thread right after the start: a stop in between is seen by the next one.
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            match self.pid.load(Ordering::SeqCst) {
                0 => break,
                // Just ended: what is wanted.
                pid => kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap_or(()),
            }
            std::thread::sleep(POLL);
        }
    }
}

fn wait(child: &mut Child, mine: &Mine) -> Result<std::process::ExitStatus> {
    let status = child.wait().context("cannot wait for a service");
    mine.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .remove(&child.id().cast_signed());
    status
}

impl Condition {
    fn holds(&self) -> bool {
        match self {
            Self::Socket(path) => UnixStream::connect(path).is_ok(),
            Self::Tcp(address) => address
                .parse()
                .is_ok_and(|address| std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()),
        }
    }
}

/// Reaps what was reparented to PID 1, for ever.
fn reap(mine: &Mine) -> Result<()> {
    loop {
        // Looked at first and taken only if it is nobody's: a service's thread must find its own child.
        let ended = match waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) => pid,
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(_) => {
                std::thread::sleep(POLL);
                continue;
            }
        };
        let known = mine
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&ended.as_raw());
        if known {
            std::thread::sleep(Duration::from_millis(2));
        } else {
            waitpid(ended, Some(WaitPidFlag::WNOHANG)).ok();
        }
    }
}

/// Answers `stop NAME`, `start NAME` and `list`, one order a connection.
fn obey(listener: &UnixListener, services: &[Arc<Running>]) {
    for stream in listener.incoming().flatten() {
        let mut order = String::new();
        if BufReader::new(&stream).take(256).read_line(&mut order).is_err() {
            continue;
        }
        let answer = answer(order.trim(), services);
        let mut stream = stream;
        stream.write_all(answer.as_bytes()).ok();
    }
}

fn answer(order: &str, services: &[Arc<Running>]) -> String {
    let find = |name: &str| services.iter().find(|running| running.service.name == name);
    match order.split_once(' ') {
        Some(("stop", name)) if let Some(running) = find(name) => {
            running.stop();
            "ok\n".to_owned()
        }
        Some(("start", name)) if let Some(running) = find(name) => {
            running.wanted.store(true, Ordering::SeqCst);
            "ok\n".to_owned()
        }
        Some((_, name)) => format!("no service {name}\n"),
        None => services
            .iter()
            .map(|running| {
                let state = match (
                    running.wanted.load(Ordering::SeqCst),
                    running.pid.load(Ordering::SeqCst),
                ) {
                    (false, _) => "stopped",
                    (true, 0) => "starting",
                    (true, _) => "running",
                };
                format!("{} {state}\n", running.service.name)
            })
            .collect(),
    }
}
