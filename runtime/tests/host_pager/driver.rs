//! Stores, pagers, programs, and who kills whom.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hostsys::cgroup::{self, Cgroup};
use hostsys::own_memory::PAGE;
use hostsys::program::{join_cgroup, start_detached};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protocol::pager::{CONTROL_SOCKET, Container, PLAN_FILE, Phase, Plan, RESULT_FILE, Request, Status};
use protocol::store_index::{StoreIndex, index_file, pages_file};

use crate::program::{BASE, HOLE_EACH, stored};

const DEADLINE: Duration = Duration::from_secs(120);

pub(crate) fn missing() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root");
    }
    if hostsys::missing_pages::open().is_err() {
        return Some("needs userfaultfd");
    }
    cgroup::mount_point().is_err().then_some("needs a cgroup v2 mount")
}

/// A pager with its folders, and the cgroups of pods.
struct Ground {
    folder: PathBuf,
    own: Cgroup,
    pods: Vec<Cgroup>,
    guardian: Option<Child>,
}

impl Ground {
    fn new(containers: usize) -> Self {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("pgr-{}-{n}", std::process::id());
        let folder = Path::new("/tmp").join(&name);
        fs::create_dir(&folder).unwrap();
        mount(Some("t"), &folder, Some("tmpfs"), MsFlags::empty(), Some("size=2G")).unwrap();
        let group = |suffix: String| {
            let group = Cgroup::at(cgroup::mount_point().unwrap().join(format!("{name}{suffix}")));
            group.create().unwrap();
            group
        };
        let ground = Self {
            own: group("-pager".into()),
            pods: (0..containers).map(|i| group(format!("-pod{i}"))).collect(),
            folder,
            guardian: None,
        };
        for i in 0..containers {
            fs::create_dir_all(ground.work(i)).unwrap();
            fs::create_dir_all(ground.store(i)).unwrap();
        }
        ground
    }

    fn work(&self, i: usize) -> PathBuf {
        self.folder.join(format!("{i}/work"))
    }

    fn store(&self, i: usize) -> PathBuf {
        self.folder.join(format!("{i}/store"))
    }

    /// A store for a process with so many pages.
    fn fill_store(&self, i: usize, vpid: u32, pages: usize) {
        let file = File::create(self.store(i).join(pages_file(vpid))).unwrap();
        let mut runs = Vec::new();
        for page in 0..pages {
            if page % HOLE_EACH == 0 {
                continue;
            }
            let bytes: Vec<u8> = (0..PAGE / 8)
                .flat_map(|word| stored(page, word).to_le_bytes())
                .collect();
            let at = (BASE + page * PAGE) as u64;
            file.write_all_at(&bytes, at).unwrap();
            runs.push(at..at + PAGE as u64);
        }
        let hot = vec![runs[runs.len() / 2].clone()];
        let end = (BASE + pages * PAGE) as u64;
        let index = StoreIndex {
            page_size: 4096,
            areas: std::iter::once(BASE as u64..end).collect(),
            runs,
            hot,
        };
        fs::write(self.store(i).join(index_file(vpid)), index.encode()).unwrap();
    }

    fn start(&mut self) {
        let containers = self.pods.iter().enumerate().map(|(i, pod)| Container {
            work: self.work(i).display().to_string(),
            store: self.store(i).display().to_string(),
            cgroup: pod.path().display().to_string(),
        });
        let plan = Plan {
            containers: containers.collect(),
            threads: 2,
        };
        fs::write(self.folder.join(PLAN_FILE), plan.seal().unwrap()).unwrap();
        let program = Path::new(env!("CARGO_BIN_EXE_peregrine-runc"));
        let arguments = [self.folder.clone().into_os_string()];
        let child = start_detached(program, "pager".as_ref(), &arguments, self.own.path(), None).unwrap();
        self.guardian = Some(child);
        until("the control socket", || self.folder.join(CONTROL_SOCKET).exists());
    }

    fn program(&self, i: usize, arguments: &[&str]) -> Child {
        let mut command = Command::new("/proc/self/exe");
        command.arg("--program").arg(self.work(i)).args(arguments);
        command.stdout(Stdio::piped());
        join_cgroup(&mut command, self.pods[i].path()).unwrap();
        command.spawn().unwrap()
    }

    fn ask(&self, request: Request) -> Option<Status> {
        let mut stream = UnixStream::connect(self.folder.join(CONTROL_SOCKET)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut line = serde_json::to_vec(&request).unwrap();
        line.push(b'\n');
        stream.write_all(&line).ok()?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).ok()?;
        serde_json::from_str(&answer).ok()
    }

    fn result(&self) -> Status {
        until("the result", || self.folder.join(RESULT_FILE).exists());
        let status = Status::open(&fs::read(self.folder.join(RESULT_FILE)).unwrap()).unwrap();
        self.own.wait_empty(Duration::from_secs(20)).unwrap();
        status
    }

    /// The process that has this name.
    fn who(&self, name: &str) -> Option<Pid> {
        let all = self.own.processes().unwrap_or_default();
        // One that is dead and not awaited yet still stands in the list, with its name.
        let lives = |pid: &i32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.contains(&format!("({name})")) && !stat.contains(") Z") && !stat.contains(") X")
        };
        let found = all.into_iter().find(lives);
        found.map(Pid::from_raw)
    }

    fn kill(&self, name: &str) -> bool {
        self.who(name).is_some_and(|pid| kill(pid, Signal::SIGKILL).is_ok())
    }

    fn kept_bytes(&self, i: usize, vpid: u32) -> u64 {
        fs::metadata(self.store(i).join(pages_file(vpid))).unwrap().blocks() * 512
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        for group in self.pods.iter().chain([&self.own]) {
            let _ = group.kill(Duration::from_secs(10));
            let _ = group.remove(Duration::from_secs(10));
        }
        if let Some(child) = &mut self.guardian {
            let _ = child.wait();
        }
        let _ = umount2(&self.folder, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.folder);
    }
}

fn until(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !is() {
        assert!(Instant::now() < end, "waited for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn ready(child: &mut Child) {
    let mut byte = [0];
    // One byte is enough: it is written last.
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
}

fn succeeded(child: Child) {
    succeeded_or_not(child).unwrap();
}

fn succeeded_or_not(mut child: Child) -> Result<(), String> {
    let mut said = String::new();
    std::io::Read::read_to_string(child.stdout.as_mut().unwrap(), &mut said).unwrap();
    let status = child.wait().unwrap();
    status
        .success()
        .then_some(())
        .ok_or(format!("the program failed: {status}; {said}"))
}

fn killed(mut child: Child) {
    use std::os::unix::process::ExitStatusExt as _;
    assert_eq!(child.wait().unwrap().signal(), Some(Signal::SIGKILL as i32));
}

/// One program with so many pages, of which the pager is asked to fill all.
fn one(pages: usize, seed: usize, time: usize, meanwhile: impl Fn(&Ground)) -> Status {
    let mut ground = Ground::new(1);
    ground.fill_store(0, 42, pages);
    ground.start();
    let (pages, seed, time) = (pages.to_string(), seed.to_string(), time.to_string());
    let mut child = ground.program(0, &["42", &pages, &seed, &time]);
    ready(&mut child);
    until("all processes", || {
        ground.ask(Request::Status).unwrap().phase != Phase::Waiting
    });
    meanwhile(&ground);
    let code = succeeded_or_not(child);
    let status = ground.result();
    assert!(code.is_ok(), "{code:?} {status:?}");
    assert_eq!((status.phase, status.remaining_bytes), (Phase::Filled, 0), "{status:?}");
    assert_eq!(ground.kept_bytes(0, 42), 0, "the store was not given back: {status:?}");
    status
}

fn fill(ground: &Ground) {
    ground.ask(Request::Fill).unwrap();
}

pub(crate) fn all_pages_arrive() {
    let mut ground = Ground::new(1);
    ground.fill_store(0, 42, 32768);
    ground.start();
    let before = ground.kept_bytes(0, 42);
    let mut child = ground.program(0, &["42", "32768", "1", "300"]);
    ready(&mut child);
    until("all processes", || {
        ground.ask(Request::Status).unwrap().phase == Phase::Filling
    });
    fill(&ground);
    succeeded(child);
    let status = ground.result();
    assert_eq!(
        (status.phase, status.total_bytes, status.processes > 0),
        (Phase::Filled, before, true)
    );
    assert_eq!(ground.kept_bytes(0, 42), 0);
    println!("    {status:?}");
}

pub(crate) fn memory_operations() {
    for seed in 1..6 {
        let status = one(8192, seed * 7919, 400, fill);
        assert!(status.faults > 0 && status.restarts == 0, "{status:?}");
    }
    // Without anybody who allows the bulk: what is asked for comes, and the rest in the end.
    one(4096, 77, 500, |_| ());
}

pub(crate) fn killed_pager() {
    let status = one(65536, 99, 1500, |ground| {
        fill(ground);
        for _ in 0..3 {
            let n = ground.ask(Request::Status).unwrap().restarts;
            if !ground.kill("pgr-pager") {
                break;
            }
            until("another pager", || {
                ground.ask(Request::Status).is_none_or(|s| s.restarts > n)
            });
        }
    });
    assert!(status.restarts > 0, "{status:?}");
}

pub(crate) fn killed_guardian() {
    let status = one(65536, 5, 1500, |ground| {
        fill(ground);
        let before = ground.who("pgr-guardian").unwrap();
        assert!(ground.kill("pgr-guardian"));
        until("another guardian", || {
            ground.folder.join(RESULT_FILE).exists() || ground.who("pgr-guardian").is_some_and(|pid| pid != before)
        });
    });
    assert!(status.restarts > 0, "{status:?}");
}

pub(crate) fn killed_deputy() {
    one(65536, 6, 1000, |ground| {
        until("a deputy", || ground.who("pgr-deputy").is_some());
        let before = ground.who("pgr-deputy").unwrap();
        assert!(ground.kill("pgr-deputy"));
        until("another deputy", || {
            ground.who("pgr-deputy").is_some_and(|pid| pid != before)
        });
        fill(ground);
    });
}

pub(crate) fn killed_in_turn() {
    for seed in 0..4 {
        let status = one(32768, 1000 + seed, 2500, |ground| {
            // Without Fill only faults and what the program does: this lasts as long as the program, or a second.
            for round in 0..12 {
                // Two of three may be missing at a time, never all: what is killed last is replaced before the next.
                let all = ["pgr-pager", "pgr-guardian", "pgr-deputy"];
                until("all three", || {
                    ground.folder.join(RESULT_FILE).exists() || all.iter().all(|name| ground.who(name).is_some())
                });
                let name = ["pgr-pager", "pgr-guardian", "pgr-pager", "pgr-deputy"][round % 4];
                ground.kill(name);
                std::thread::sleep(Duration::from_millis(7 + 13 * (seed as u64 % 3) + round as u64));
            }
        });
        assert!(status.restarts >= 3, "{status:?}");
        println!("    {status:?}");
    }
}

pub(crate) fn killed_at_once() {
    let status = one(65536, 3, 1500, |ground| {
        fill(ground);
        let (pager, guardian) = (ground.who("pgr-pager"), ground.who("pgr-guardian"));
        for pid in [pager, guardian].into_iter().flatten() {
            let _ = kill(pid, Signal::SIGKILL);
        }
    });
    assert!(status.restarts > 0, "{status:?}");
}

pub(crate) fn killed_early() {
    for name in ["pgr-pager", "pgr-guardian"] {
        let mut ground = Ground::new(1);
        ground.fill_store(0, 42, 1024);
        ground.start();
        let mut child = ground.program(0, &["42", "1024", "1", "1", "unfinished"]);
        ready(&mut child);
        assert_eq!(ground.ask(Request::Status).unwrap().phase, Phase::Waiting);
        assert!(ground.kill(name));
        killed(child);
        let status = ground.result();
        assert!(
            status.phase == Phase::Killed && status.message.contains("restored"),
            "{status:?}"
        );
    }
}

pub(crate) fn short_store() {
    let mut ground = Ground::new(1);
    ground.fill_store(0, 42, 4096);
    let pages = File::options()
        .write(true)
        .open(ground.store(0).join(pages_file(42)))
        .unwrap();
    pages.set_len((BASE + 2000 * PAGE) as u64).unwrap();
    ground.start();
    let mut child = ground.program(0, &["42", "4096", "1", "60000"]);
    ready(&mut child);
    fill(&ground);
    killed(child);
    let status = ground.result();
    assert!(
        status.phase == Phase::Killed && status.message.contains("failed to read page"),
        "{status:?}"
    );
}

pub(crate) fn given_up() {
    let mut ground = Ground::new(1);
    ground.fill_store(0, 42, 32768);
    ground.start();
    let mut child = ground.program(0, &["42", "32768", "1", "60000"]);
    ready(&mut child);
    until("all processes", || {
        ground.ask(Request::Status).unwrap().phase != Phase::Waiting
    });
    assert_eq!(ground.ask(Request::Kill).unwrap().phase, Phase::Killed);
    killed(child);
    assert_eq!(ground.result().phase, Phase::Killed);
}

pub(crate) fn several() {
    let mut ground = Ground::new(2);
    for (container, vpid) in [(0, 1), (0, 2), (1, 1)] {
        ground.fill_store(container, vpid, 4096);
    }
    ground.start();
    let mut first = ground.program(0, &["1", "4096", "11", "400"]);
    ready(&mut first);
    assert_eq!(
        ground.ask(Request::Status).unwrap().phase,
        Phase::Waiting,
        "the second container is missing"
    );
    let mut third = ground.program(1, &["1", "4096", "13", "400"]);
    ready(&mut third);
    until("all processes", || {
        ground.ask(Request::Status).unwrap().phase == Phase::Filling
    });
    fill(&ground);
    succeeded(first);
    succeeded(third);
    let status = ground.result();
    assert_eq!(status.phase, Phase::Filled);
    assert_eq!((ground.kept_bytes(0, 1), ground.kept_bytes(1, 1)), (0, 0));
    assert!(ground.kept_bytes(0, 2) > 0, "nobody has come for this one");
}
