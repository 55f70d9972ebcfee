//! A workload that runs in a process group of its own, and a folder for its store.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use memory::tracker::{Member, Tracker};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

/// A session and process group of its own, as its program makes them; killed in the end.
pub(crate) struct Workload(Child);

impl Workload {
    pub(crate) fn start(program: &str, arguments: &[&str]) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: not root");
            return None;
        }
        let started = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // Of a file that grows CRIU would say that it has changed.
            .stderr(Stdio::null())
            .spawn();
        let mut child = match started {
            Ok(child) => child,
            Err(error) => {
                eprintln!("SKIPPED: {program}: {error}");
                return None;
            }
        };
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line.trim(), "ready");
        Some(Self(child))
    }

    pub(crate) fn writer(seed: u32, forks: bool) -> Option<Self> {
        let script = script("writer.py");
        let seed = seed.to_string();
        let mut arguments = vec![script.as_str(), &seed];
        if forks {
            arguments.push("forks");
        }
        Self::start("python3", &arguments)
    }

    pub(crate) fn mover() -> Option<Self> {
        Self::start("python3", &[&script("mover.py")])
    }

    pub(crate) fn group(&self) -> i32 {
        self.0.id().cast_signed()
    }

    /// Processes of the group that are not zombies, with their states.
    pub(crate) fn processes(&self) -> Vec<(i32, char)> {
        let of = |pid: i32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let mut rest = stat.rsplit_once(") ")?.1.split(' ');
            let state = rest.next()?.chars().next()?;
            let group: i32 = rest.nth(1)?.parse().ok()?;
            (group == self.group() && state != 'Z' && state != 'X').then_some((pid, state))
        };
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
        pids.filter_map(of).collect()
    }

    pub(crate) fn members(&self) -> Vec<Member> {
        let processes = self.processes().into_iter();
        processes.map(|(pid, _)| Member { pid, container: 0 }).collect()
    }

    pub(crate) fn stop(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            killpg(Pid::from_raw(self.group()), Signal::SIGSTOP).unwrap();
            let before = self.processes();
            if before.iter().all(|p| p.1 == 'T') && before == self.processes() {
                return;
            }
            assert!(Instant::now() < deadline, "{before:?}");
        }
    }

    /// Kills all and waits until their pids are free.
    pub(crate) fn end(&self) {
        let _ = killpg(Pid::from_raw(self.group()), Signal::SIGKILL);
        // Ours, unless it was restored: then it is somebody else's.
        let _ = nix::sys::wait::waitpid(Pid::from_raw(self.group()), None);
        let deadline = Instant::now() + Duration::from_secs(20);
        while killpg(Pid::from_raw(self.group()), None).is_ok() {
            assert!(Instant::now() < deadline, "processes are left");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Processor time of the first process, in ticks.
    pub(crate) fn time(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.group())).unwrap();
        let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    pub(crate) fn go_on(&self) {
        killpg(Pid::from_raw(self.group()), Signal::SIGCONT).unwrap();
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        self.end();
    }
}

fn script(name: &str) -> String {
    format!("{}/tests/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A folder in a memory file system.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Self {
        let path = PathBuf::from(format!("/dev/shm/peregrine-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Whether the kernel is too old for all of this.
pub(crate) fn no_wp_async(tracker: &Tracker) -> bool {
    let refused = tracker
        .untracked()
        .values()
        .find(|u| u.to_string().contains("WP_ASYNC"));
    if let Some(why) = refused {
        eprintln!("SKIPPED: {why}");
    }
    refused.is_some()
}
