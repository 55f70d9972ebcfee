//! Runs one program to its end: argv, environment, working directory, cgroup, deadline; its output is bounded and part of
//! every error.

#![expect(unsafe_code, reason = "raw system calls: this crate is where they live")]

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::namespace::PidFd;

/// For how long the output is still read when the program has ended but a child of its own holds the stream open.
const GRANDCHILDREN: Duration = Duration::from_millis(300);

/// Why a program gave no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be started.
    #[error("failed to start {program}")]
    Start {
        /// Its name.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ended, and not well.
    #[error("{program} failed ({status}){}", quoted(output))]
    Failed {
        /// Its name and arguments.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it wrote.
        output: String,
    },
    /// It did not end in time and was killed, with all its process group.
    #[error("{program} did not end within {within:?} and was killed{}", quoted(output))]
    Deadline {
        /// Its name and arguments.
        program: String,
        /// The deadline.
        within: Duration,
        /// The end of what it wrote.
        output: String,
    },
    /// Its end could not be awaited.
    #[error("failed to wait for {program}")]
    Wait {
        /// Its name.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// What the program wrote, where it ran.
    #[must_use]
    pub fn output(&self) -> &str {
        match self {
            Self::Failed { output, .. } | Self::Deadline { output, .. } => output,
            Self::Start { .. } | Self::Wait { .. } => "",
        }
    }
}

fn quoted(output: &str) -> String {
    let output = output.trim();
    if output.is_empty() {
        String::new()
    } else {
        format!(": {output}")
    }
}

/// What a program left.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// The last bytes of its standard output, at most the limit.
    pub stdout: Vec<u8>,
    /// The last bytes of its standard error, at most the limit.
    pub stderr: Vec<u8>,
    /// How long it took.
    pub elapsed: Duration,
}

/// A program to run.
#[derive(Debug)]
pub struct Program {
    program: OsString,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    clear_environment: bool,
    folder: Option<PathBuf>,
    cgroup: Option<PathBuf>,
    within: Duration,
    limit: usize,
    input: Vec<u8>,
    inherit: bool,
}

impl Program {
    /// A program by path or by name in PATH. Deadline 60 s, 64 KiB of output, no input, unless said otherwise.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            arguments: Vec::new(),
            environment: Vec::new(),
            clear_environment: false,
            folder: None,
            cgroup: None,
            within: Duration::from_secs(60),
            limit: 64 * 1024,
            input: Vec::new(),
            inherit: false,
        }
    }

    /// One more argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// More arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments
            .extend(arguments.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// One more variable of the environment.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Nothing of the caller's environment.
    #[must_use]
    pub fn clear_env(mut self) -> Self {
        self.clear_environment = true;
        self
    }

    /// Working directory.
    #[must_use]
    pub fn folder(mut self, folder: impl AsRef<Path>) -> Self {
        self.folder = Some(folder.as_ref().to_owned());
        self
    }

    /// It runs in this cgroup (a folder of the v2 hierarchy), from before its first instruction: so it outlives a kill of
    /// the caller's cgroup, and is not frozen with it.
    #[must_use]
    pub fn cgroup(mut self, cgroup: impl AsRef<Path>) -> Self {
        self.cgroup = Some(cgroup.as_ref().to_owned());
        self
    }

    /// It is killed after this time, with its process group.
    #[must_use]
    pub fn within(mut self, within: Duration) -> Self {
        self.within = within;
        self
    }

    /// How many bytes of each stream are kept (the last ones).
    #[must_use]
    pub fn limit(mut self, bytes: usize) -> Self {
        self.limit = bytes;
        self
    }

    /// What it reads from standard input.
    #[must_use]
    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    /// It gets the caller's own standard streams, and nothing is captured: `runc restore` hands them to the container.
    #[must_use]
    pub fn inherit_streams(mut self) -> Self {
        self.inherit = true;
        self
    }

    /// Runs it and demands success.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn run(&self) -> Result<Output, Error> {
        let output = self.output()?;
        if output.status.success() {
            return Ok(output);
        }
        Err(Error::Failed {
            program: self.line(),
            status: output.status,
            output: said(&output.stdout, &output.stderr),
        })
    }

    /// Runs it; any exit status is a result.
    ///
    /// # Errors
    /// It could not be started or awaited, or it was killed at the deadline.
    pub fn output(&self) -> Result<Output, Error> {
        let begun = Instant::now();
        let mut child = self.start()?;
        let stdout = child.stdout.take().map(|stream| keep_end(stream, self.limit));
        let stderr = child.stderr.take().map(|stream| keep_end(stream, self.limit));
        if let Some(mut stdin) = child.stdin.take() {
            let input = self.input.clone();
            // In a thread: a program that writes before it has read all must not stand still. It may also end early.
            std::thread::spawn(move || {
                let _ = stdin.write_all(&input);
            });
        }
        let status = self.wait(&mut child, begun);
        // A grandchild that lives on may hold the pipes open: it gets a moment, not for ever.
        let (stdout, stderr) = (collect(stdout), collect(stderr));
        match status? {
            Some(status) => Ok(Output {
                status,
                stdout,
                stderr,
                elapsed: begun.elapsed(),
            }),
            None => Err(Error::Deadline {
                program: self.line(),
                within: self.within,
                output: said(&stdout, &stderr),
            }),
        }
    }

    fn start(&self) -> Result<Child, Error> {
        let error = |source| Error::Start {
            program: self.program.to_string_lossy().into_owned(),
            source,
        };
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        if self.clear_environment {
            command.env_clear();
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        // A group of its own, so that the deadline reaches its children.
        command.process_group(0);
        if self.inherit {
            command
                .stdin(Stdio::inherit())
                .stdout(Stdio::inherit())
                .stderr(Stdio::inherit());
        } else {
            command.stdin(if self.input.is_empty() {
                Stdio::null()
            } else {
                Stdio::piped()
            });
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        if let Some(cgroup) = &self.cgroup {
            join_cgroup(&mut command, cgroup).map_err(error)?;
        }
        command.spawn().map_err(error)
    }

    fn wait(&self, child: &mut Child, begun: Instant) -> Result<Option<ExitStatus>, Error> {
        let error = |source| Error::Wait {
            program: self.program.to_string_lossy().into_owned(),
            source,
        };
        let pid = i32::try_from(child.id()).map_err(|_| error(io::ErrorKind::InvalidData.into()))?;
        let ended = match PidFd::open(pid) {
            Ok(handle) => handle.wait_end(self.within.saturating_sub(begun.elapsed())),
            // Not reaped yet, so it exists; a kernel without pidfd waits without deadline.
            Err(_) => true,
        };
        if ended {
            return child.wait().map(Some).map_err(error);
        }
        // The group may have lost its leader only if it has ended meanwhile: then there is nothing to kill.
        let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        child.wait().map_err(error)?;
        Ok(None)
    }

    fn line(&self) -> String {
        let mut line = self.program.to_string_lossy().into_owned();
        for argument in &self.arguments {
            line.push(' ');
            line.push_str(&argument.to_string_lossy());
        }
        line
    }
}

/// Lets a command start inside a cgroup: the descriptor is opened here, the child only writes to it.
///
/// # Errors
/// The cgroup does not exist.
pub fn join_cgroup(command: &mut Command, cgroup: &Path) -> io::Result<()> {
    let procs = File::options().write(true).open(cgroup.join("cgroup.procs"))?;
    // SAFETY: between fork and exec only write(2) is called, which is async-signal-safe, on a descriptor that the closure
    // owns; errors are made from errno without allocating.
    unsafe {
        command.pre_exec(move || {
            let written = nix::libc::write(procs.as_raw_fd(), b"0".as_ptr().cast(), 1);
            if written == 1 {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        });
    }
    Ok(())
}

/// Becomes another program: it keeps pid, streams and descriptors of the caller. Returns only when that failed.
#[must_use]
pub fn replace_by(program: &Path, arguments: &[OsString], environment: &[(OsString, OsString)]) -> Error {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .envs(environment.iter().map(|(name, value)| (name, value)));
    Error::Start {
        program: program.display().to_string(),
        source: command.exec(),
    }
}

/// Starts a program that outlives the caller: leader of a session of its own, in a cgroup of its own, with what it says in
/// `log`, or else the caller's three standard streams, and no other descriptor. A container runtime does not notice the end of a
/// container while somebody has its standard streams: it would not start a killed caller again. It is not awaited here.
///
/// # Errors
/// It could not be started.
pub fn start_detached(
    program: &Path,
    name: &OsStr,
    arguments: &[OsString],
    cgroup: &Path,
    log: Option<&File>,
) -> Result<Child, Error> {
    let error = |source| Error::Start {
        program: program.display().to_string(),
        source,
    };
    let mut command = Command::new(program);
    command.arg0(name).args(arguments).current_dir("/");
    if let Some(log) = log {
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(error)?)
            .stderr(log.try_clone().map_err(error)?);
    }
    join_cgroup(&mut command, cgroup).map_err(error)?;
    // SAFETY: between fork and exec only setsid(2) and close_range(2) are called, which are async-signal-safe. The range is
    // marked, not closed: the standard library reports a failed exec through a descriptor of its own.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            let marked = nix::libc::syscall(
                nix::libc::SYS_close_range,
                3,
                nix::libc::c_uint::MAX,
                nix::libc::CLOSE_RANGE_CLOEXEC,
            );
            if marked == 0 {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        });
    }
    command.spawn().map_err(error)
}

/// Starts a program with the caller's standard streams in a process group of its own; its end is seen by `waitpid`.
///
/// # Errors
/// It could not be started.
pub fn start_in_group(
    program: &Path,
    arguments: &[OsString],
    environment: &[(OsString, OsString)],
) -> Result<i32, Error> {
    let error = |source| Error::Start {
        program: program.display().to_string(),
        source,
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .envs(environment.iter().map(|(name, value)| (name, value)));
    let child = command.process_group(0).spawn().map_err(error)?;
    i32::try_from(child.id()).map_err(|_| error(io::ErrorKind::InvalidData.into()))
}

/// Lets the processor come to a process before others, as `nice` with a negative number does.
///
/// # Errors
/// There is no such process, or no CAP_SYS_NICE.
pub fn prefer(pid: i32) -> io::Result<()> {
    const NICE: i32 = -15;
    let who = u32::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: takes numbers only.
    match unsafe { nix::libc::setpriority(nix::libc::PRIO_PROCESS, who, NICE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Ends the calling process as if by this signal, so that its parent sees the same status; no core is written.
pub fn end_by_signal(signal: i32) -> ! {
    let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
    // SAFETY: the default action takes no handler of ours; the mask is a local that outlives its use.
    unsafe {
        nix::libc::signal(signal, nix::libc::SIG_DFL);
        let mut mask = std::mem::zeroed::<nix::libc::sigset_t>();
        nix::libc::sigemptyset(&raw mut mask);
        nix::libc::sigaddset(&raw mut mask, signal);
        nix::libc::sigprocmask(nix::libc::SIG_UNBLOCK, &raw const mask, std::ptr::null_mut());
        nix::libc::raise(signal);
    }
    // Not a signal that ends a process: what a shell would say.
    std::process::exit(128 + signal)
}

/// A stream that is being read to its end.
struct Reading {
    kept: Arc<Mutex<Vec<u8>>>,
    ended: Receiver<()>,
}

/// Reads all, keeps the last `limit` bytes.
fn keep_end(mut stream: impl Read + Send + 'static, limit: usize) -> Reading {
    let kept = Arc::new(Mutex::new(Vec::new()));
    let (end, ended) = sync_channel(1);
    let to = Arc::clone(&kept);
    std::thread::spawn(move || {
        let mut buffer = [0_u8; 8192];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    let mut kept = to.lock().unwrap_or_else(PoisonError::into_inner);
                    kept.extend_from_slice(buffer.get(..n).unwrap_or_default());
                    if kept.len() > limit * 2 {
                        let surplus = kept.len() - limit;
                        kept.drain(..surplus);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        // Nobody listens any more when the program has ended long ago.
        let _ = end.send(());
    });
    Reading { kept, ended }
}

fn collect(reading: Option<Reading>) -> Vec<u8> {
    let Some(reading) = reading else { return Vec::new() };
    // An error is a timeout or the end of the thread: what has arrived counts in each case.
    let _ = reading.ended.recv_timeout(GRANDCHILDREN);
    std::mem::take(&mut *reading.kept.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Standard error, or standard output where there is none.
fn said(stdout: &[u8], stderr: &[u8]) -> String {
    let stream = if stderr.iter().all(u8::is_ascii_whitespace) {
        stdout
    } else {
        stderr
    };
    String::from_utf8_lossy(stream).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_a_process_is_preferred_where_we_may() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let result = prefer(pid);
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        // Behind the name in brackets: state is the first field, nice the seventeenth.
        let nice: i32 = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .nth(16)
            .unwrap()
            .parse()
            .unwrap();
        match result {
            Ok(()) => assert_eq!(nice, -15),
            Err(error) => eprintln!("skipped: {error}"),
        }
        assert!(prefer(-1).is_err());
    }

    #[test]
    fn output_and_status_come_back() {
        let output = Program::new("sh")
            .args(["-c", "cat; echo err >&2; exit 3"])
            .input("in")
            .output()
            .unwrap();
        assert_eq!(
            (output.status.code(), &output.stdout[..], &output.stderr[..]),
            (Some(3), &b"in"[..], &b"err\n"[..])
        );
    }

    #[test]
    fn an_error_carries_what_the_program_said() {
        let error = Program::new("sh")
            .args(["-c", "echo bad >&2; exit 1"])
            .run()
            .unwrap_err();
        assert!(error.to_string().ends_with("(exit status: 1): bad"), "{error}");
        assert!(matches!(Program::new("/nonexistent").run(), Err(Error::Start { .. })));
    }

    #[test]
    fn the_deadline_kills_the_whole_group() {
        let begun = Instant::now();
        let result = Program::new("sh")
            .args(["-c", "echo x; sleep 60 & sleep 60"])
            .within(Duration::from_millis(200))
            .run();
        assert!(
            matches!(result, Err(Error::Deadline { ref output, .. }) if output == "x"),
            "{result:?}"
        );
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_grandchild_that_keeps_the_stream_does_not_hold_the_caller() {
        let begun = Instant::now();
        let output = Program::new("sh")
            .args(["-c", "echo x; setsid sleep 5 &"])
            .run()
            .unwrap();
        assert_eq!(output.stdout, b"x\n");
        assert!(begun.elapsed() < Duration::from_secs(4));
    }

    #[test]
    fn only_the_end_of_a_long_output_is_kept() {
        let output = Program::new("sh")
            .args(["-c", "seq 1 100000"])
            .limit(100)
            .run()
            .unwrap();
        assert!(output.stdout.len() <= 200 && output.stdout.ends_with(b"100000\n"));
    }
}
