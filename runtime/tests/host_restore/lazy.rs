//! Restores whose memory comes from page stores: real CRIU, real runc, the real pager.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use hostsys::cgroup::Cgroup;
use hostsys::program::start_detached;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protocol::hand_off::{Request, State};
use protocol::pager::{self, CONTROL_SOCKET, PLAN_FILE, Phase, Plan, RESULT_FILE, Status};
use protocol::store_index::pages_file;

use crate::agent::{ANNOTATIONS, ask, checkpoint, hand_off, images, write_hand_off};
use crate::cases::end;
use crate::container::{Container, WRAPPER, await_end, eventually};
use crate::images::to_stores;

const MIB: &str = "48";

struct Pager {
    folder: PathBuf,
    cgroup: Cgroup,
    guardian: Child,
}

impl Pager {
    fn start(work: &Path, store: &Path, pod: &Cgroup) -> Self {
        let folder = PathBuf::from("/run/case/pager");
        fs::create_dir_all(&folder).unwrap();
        let cgroup = Cgroup::at("/sys/fs/cgroup/pager");
        cgroup.create().unwrap();
        let plan = Plan {
            containers: vec![pager::Container {
                work: work.display().to_string(),
                store: store.display().to_string(),
                cgroup: pod.path().display().to_string(),
            }],
            threads: 1,
        };
        fs::write(folder.join(PLAN_FILE), plan.seal().unwrap()).unwrap();
        let arguments = [folder.clone().into_os_string()];
        let guardian = start_detached(Path::new(WRAPPER), "pager".as_ref(), &arguments, cgroup.path(), None).unwrap();
        eventually("the pager listens", || folder.join(CONTROL_SOCKET).exists());
        Self {
            folder,
            cgroup,
            guardian,
        }
    }

    fn ask(&self, request: pager::Request) -> Option<Status> {
        let mut stream = UnixStream::connect(self.folder.join(CONTROL_SOCKET)).ok()?;
        stream.write_all(&serde_json::to_vec(&request).unwrap()).ok()?;
        stream.write_all(b"\n").ok()?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).ok()?;
        serde_json::from_str(&line).ok()
    }

    fn who(&self, name: &str) -> Option<i32> {
        let all = self.cgroup.processes().unwrap_or_default();
        // One that is dead and not awaited yet still stands in the list, with its name.
        let lives = |pid: &i32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.contains(&format!("({name})")) && !stat.contains(") Z") && !stat.contains(") X")
        };
        all.into_iter().find(lives)
    }

    /// Kills one once all three stand: all dead at once is another matter.
    fn kill(&self, name: &str) -> bool {
        eventually("guardian, deputy and pager stand, or all is done", || {
            let all = ["pgr-guardian", "pgr-deputy", "pgr-pager"];
            self.folder.join(RESULT_FILE).exists() || all.iter().all(|name| self.who(name).is_some())
        });
        self.who(name)
            .is_some_and(|pid| kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok())
    }

    fn end(mut self) -> Status {
        let until = Instant::now() + Duration::from_secs(120);
        while !self.folder.join(RESULT_FILE).exists() {
            assert!(Instant::now() < until, "the pager does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.cgroup.wait_empty(Duration::from_secs(20)).unwrap();
        self.guardian.wait().unwrap();
        self.cgroup.remove(Duration::from_secs(5)).unwrap();
        // What a killed guardian had started falls to this process.
        while matches!(nix::sys::wait::waitpid(None, Some(nix::sys::wait::WaitPidFlag::WNOHANG)), Ok(s) if s != nix::sys::wait::WaitStatus::StillAlive)
        {
        }
        Status::open(&fs::read(self.folder.join(RESULT_FILE)).unwrap()).unwrap()
    }
}

/// A frozen source, its memory in stores, and a target that is held with its memory missing.
fn held(uid: u32) -> (Container, Container, i32, i32, Pager) {
    let (source, target, shepherd, pager, state) = restored(uid, |_| ());
    let State::Held { pid } = state else {
        let log = fs::read_to_string("/run/case/work/restore.log").unwrap_or_default();
        let tail: Vec<&str> = log.lines().rev().take(40).collect();
        panic!("{state:?}\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
    };
    (source, target, shepherd, pid, pager)
}

fn restored(uid: u32, damage: impl Fn(&Path)) -> (Container, Container, i32, Pager, State) {
    let mut source = Container::new("source", "source", uid, &[]);
    fs::write(source.folder.join("rootfs/data/memory"), MIB).unwrap();
    source.start_workload();
    write_hand_off(&hand_off().seal().unwrap());
    let mut target = Container::new("target", "target", uid, ANNOTATIONS);
    let shepherd = target.create().unwrap();
    target.must(&["start"]);
    checkpoint(&source);
    source.copy_data_to(&target);
    let store = Path::new("/run/case/store");
    let moved = to_stores(&images(), store);
    assert_eq!(moved.len(), 3);
    assert!(moved.values().all(|bytes| *bytes > 40 << 20), "{moved:?}");
    damage(store);
    let work = PathBuf::from("/run/case/work");
    fs::create_dir_all(&work).unwrap();
    let pager = Pager::start(&work, store, &target.cgroup());
    let begun = Instant::now();
    let request = Request::Restore {
        images: images().display().to_string(),
        work: work.display().to_string(),
        lazy: true,
    };
    let state = ask(&target, &request);
    println!(
        "    restored in {:?}: {:?}",
        begun.elapsed(),
        pager.ask(pager::Request::Status)
    );
    (source, target, shepherd, pager, state)
}

fn filled(pager: Pager) -> Status {
    let status = pager.end();
    assert_eq!((status.phase, status.remaining_bytes), (Phase::Filled, 0), "{status:?}");
    for entry in fs::read_dir("/run/case/store").unwrap().flatten() {
        if entry.file_name().to_string_lossy().ends_with(".pages") {
            assert_eq!(
                entry.metadata().unwrap().blocks(),
                0,
                "{:?} was not given back",
                entry.path()
            );
        }
    }
    println!("    {status:?}");
    status
}

fn commit(target: &Container, pid: i32) {
    assert_eq!(ask(target, &Request::Committed), State::Committed { pid });
    target.cgroup().thaw().unwrap();
}

fn runs_and_ends(source: &Container, target: &Container, shepherd: i32) {
    target.await_progress();
    std::thread::sleep(Duration::from_millis(300));
    target.await_progress();
    fs::write(target.folder.join("rootfs/data/end"), "7").unwrap();
    assert_eq!(await_end(shepherd), 7, "the first process has seen nothing wrong");
    end(target);
    end(source);
}

fn readable(pid: i32) -> Vec<(u64, u64, String)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let wanted = maps.lines().filter(|line| {
        let name = line.split_whitespace().nth(5).unwrap_or_default();
        line.split_whitespace().nth(1).unwrap().starts_with('r') && !name.starts_with("[v")
    });
    wanted
        .map(|line| {
            let (range, _) = line.split_once(' ').unwrap();
            let (start, end) = range.split_once('-').unwrap();
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            (number(start), number(end), line.to_owned())
        })
        .collect()
}

/// Compares all memory of two stopped processes; how many bytes differ.
fn differences(one: i32, other: i32) -> usize {
    let (a, b) = (readable(one), readable(other));
    let ranges = |list: &[(u64, u64, String)]| list.iter().map(|v| (v.0, v.1)).collect::<Vec<_>>();
    assert_eq!(ranges(&a), ranges(&b), "mappings");
    let open = |pid| File::open(format!("/proc/{pid}/mem")).unwrap();
    let (one, other) = (open(one), open(other));
    let (mut different, mut compared) = (0, 0u64);
    for (start, end, line) in a {
        for at in (start..end).step_by(4096) {
            let (mut x, mut y) = ([0; 4096], [0; 4096]);
            one.read_exact_at(&mut x, at).unwrap();
            other.read_exact_at(&mut y, at).unwrap();
            compared += 4096;
            if x != y {
                let n = x.iter().zip(&y).filter(|(x, y)| x != y).count();
                println!("    {n} bytes differ at {at:#x} in {line}");
                different += n;
            }
        }
    }
    assert!(compared > 40 << 20);
    different
}

/// A pid in the container's namespace, and outside.
fn inner(cgroup: &Cgroup) -> Vec<(i32, i32)> {
    let pids = cgroup.processes().unwrap();
    let mut all: Vec<(i32, i32)> = pids
        .into_iter()
        .map(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap();
            (line.split_whitespace().last().unwrap().parse().unwrap(), pid)
        })
        .collect();
    all.sort_unstable();
    all
}

pub(crate) fn equal() {
    let (source, target, shepherd, pid, pager) = held(1000);
    // Filled while it is held: nothing of the program has run. (Who reads another process by /proc/PID/mem gets an error for
    // a page that is missing, so that cannot be the one who asks.)
    pager.ask(pager::Request::Fill).unwrap();
    let status = filled(pager);
    assert_eq!(status.restarts, 0);
    let pairs: Vec<_> = inner(&source.cgroup())
        .into_iter()
        .zip(inner(&target.cgroup()))
        .collect();
    assert_eq!(pairs.len(), 3);
    for ((vpid, one), (same, other)) in pairs {
        assert_eq!(vpid, same);
        let different = differences(one, other);
        // The kernel writes the processor's number into each thread's rseq area.
        assert!(different <= 64, "process {vpid}: {different} bytes differ");
    }
    commit(&target, pid);
    runs_and_ends(&source, &target, shepherd);
}

pub(crate) fn running() {
    let (source, target, shepherd, pid, pager) = held(0);
    commit(&target, pid);
    target.await_progress();
    pager.ask(pager::Request::Fill).unwrap();
    filled(pager);
    runs_and_ends(&source, &target, shepherd);
}

pub(crate) fn killed() {
    let (source, target, shepherd, pid, pager) = held(0);
    commit(&target, pid);
    let mut hit = 0;
    for name in [
        "pgr-pager",
        "pgr-guardian",
        "pgr-pager",
        "pgr-deputy",
        "pgr-pager",
        "pgr-guardian",
    ] {
        hit += u32::from(pager.kill(name));
        std::thread::sleep(Duration::from_millis(30));
    }
    let status = filled(pager);
    assert!(hit > 2 && status.restarts > 1, "{status:?}");
    runs_and_ends(&source, &target, shepherd);
}

pub(crate) fn damaged() {
    let (source, target, shepherd, pager, state) = restored(0, |store| {
        let pages = File::options().write(true).open(store.join(pages_file(1))).unwrap();
        pages.set_len(1 << 20).unwrap();
    });
    // The restore itself needs some of these pages.
    assert!(matches!(state, State::Failed { .. }), "{state:?}");
    let status = pager.end();
    assert!(
        status.phase == Phase::Killed && status.message.contains("read page"),
        "{status:?}"
    );
    assert_eq!(ask(&target, &Request::Abort), State::Ended);
    assert_eq!(await_end(shepherd), 125);
    target.must(&["delete"]);
    end(&source);
}
