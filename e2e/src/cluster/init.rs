//! PID 1 of a machine: mounts, then services, then reaping, until the power goes.
//!
//! ```text
//! spawn (host) ── enters cgroup, network namespace; unshares mount, UTS, IPC, PID, cgroup, time ──> init (PID 1)
//! init: overlay root, pivot_root, /proc /sys /dev /run, then one thread per service: wait for conditions → run → wait for its end → again
//! ```
//! As under systemd, a service that ends is started again, at once the first time: whoever wants containerd to read its configuration again
//! ends it. When init dies the kernel kills everything in its PID namespace, which is what a loss of power looks like from outside.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Pid, pivot_root, setsid};

use super::cgroup::Cgroup;
use super::machine_spec::{Bind, CONTROL_SOCKET, Condition, MachineSpec, Service};
use super::netns;
use super::topology::NETNS_PREFIX;

/// `CLONE_NEWTIME`, which `nix` does not name.
const CLONE_NEWTIME: i32 = 0x80;
/// What init says when the machine is up.
const READY: &str = "ready";
/// Programs of a machine are found here.
pub(super) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// First wait before a service that ended is started again; doubles up to [`RESTART_MAX`] while it keeps ending early.
const RESTART_MIN: Duration = Duration::from_millis(50);
const RESTART_MAX: Duration = Duration::from_secs(1);
/// A service that ran this long has not ended early.
const RAN_WELL: Duration = Duration::from_secs(5);
/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(20);

/// Starts a machine; returns when its mounts stand and its services are being started.
///
/// # Errors
/// If a namespace, a mount or the program cannot be had.
pub(super) fn spawn(spec_file: &Path) -> Result<()> {
    let spec = read_spec(spec_file)?;
    Cgroup::named(&spec.name)?.enter()?;
    // No signal of the terminal, and no file of whoever called `up`, reaches the machine.
    setsid().ok();
    close_inherited();
    let netns = netns::path(&format!("{NETNS_PREFIX}{}", spec.name));
    let netns = File::open(&netns).with_context(|| format!("cannot open {}", netns.display()))?;
    setns(&netns, CloneFlags::CLONE_NEWNET).context("cannot enter the machine's network namespace")?;
    let mut flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWCGROUP;
    if spec.clock_offset.is_some() {
        flags |= CloneFlags::from_bits_retain(CLONE_NEWTIME);
    }
    unshare(flags).context("cannot make the machine's namespaces")?;
    if let Some(offset) = spec.clock_offset {
        fs::write(
            "/proc/self/timens_offsets",
            format!("monotonic {offset} 0\nboottime {offset} 0\n"),
        )
        .context("cannot set the machine's clocks")?;
    }
    let mut child = Command::new(&spec.program)
        .args(["internal", "init"])
        .arg(spec_file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", spec.program.display()))?;
    let mut said = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout)
            .read_line(&mut said)
            .context("cannot hear from the machine's init")?;
    }
    if said.trim() != READY {
        child.wait().ok();
        let log = fs::read_to_string(spec.logs().join("init.log")).unwrap_or_default();
        bail!(
            "the machine {} did not start: {}",
            spec.name,
            log.lines().last().unwrap_or("its init said nothing")
        );
    }
    Ok(())
}

/// Closes what a careless parent left open; Rust marks its own files itself.
fn close_inherited() {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else {
        return;
    };
    let open: Vec<i32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse().ok()))
        .collect();
    for descriptor in open.into_iter().filter(|descriptor| *descriptor > 2) {
        // The listing's own descriptor is gone by now: that one fails.
        nix::unistd::close(descriptor).ok();
    }
}

fn read_spec(file: &Path) -> Result<MachineSpec> {
    let text = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("cannot parse {}", file.display()))
}

/// What PID 1 does; returns only with an error, before any service runs.
///
/// # Errors
/// If a mount cannot be made.
pub(super) fn run(spec_file: &Path) -> Result<()> {
    let spec = read_spec(spec_file)?;
    make_root(&spec)?;
    nix::unistd::sethostname(&spec.name).context("cannot set the host name")?;
    fs::remove_file(CONTROL_SOCKET).ok();
    let listener = UnixListener::bind(CONTROL_SOCKET).context("cannot listen for orders")?;
    println!("{READY}");
    let services: Vec<Arc<Running>> = spec
        .services
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

// ---- mounts -----------------------------------------------------------------------------------------------------------------------------

fn make_root(spec: &MachineSpec) -> Result<()> {
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .context("cannot make the mounts private")?;
    let root = spec.root();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        spec.tree.display(),
        spec.upper().display(),
        spec.disk.join("work").display()
    );
    new_mount("overlay", &root, MsFlags::empty(), Some(&options))?;
    new_mount(
        "proc",
        &root.join("proc"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        None,
    )?;
    new_mount(
        "sysfs",
        &root.join("sys"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        None,
    )?;
    new_mount(
        "cgroup2",
        &root.join("sys/fs/cgroup"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        None,
    )?;
    // Where a real machine has it; absent on some kernels.
    mount(
        Some("bpf"),
        &root.join("sys/fs/bpf"),
        Some("bpf"),
        MsFlags::empty(),
        None::<&str>,
    )
    .ok();
    new_mount(
        "tmpfs",
        &root.join("run"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=755"),
    )?;
    new_mount(
        "tmpfs",
        &root.join("tmp"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=1777"),
    )?;
    make_dev(&root.join("dev"))?;
    for bind in &spec.binds {
        bind_mount(bind, &root)?;
    }
    protect_host(&root, spec)?;
    let old = root.join("mnt");
    pivot_root(&root, &old).context("cannot change the root")?;
    std::env::set_current_dir("/").context("cannot enter the new root")?;
    umount2("/mnt", MntFlags::MNT_DETACH).context("cannot leave the old root")?;
    // Kubernetes wants mounts to propagate into its containers, as systemd sets it up.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SHARED,
        None::<&str>,
    )
    .context("cannot make the mounts shared")
}

fn new_mount(kind: &str, at: &Path, flags: MsFlags, options: Option<&str>) -> Result<()> {
    fs::create_dir_all(at).with_context(|| format!("cannot make the folder {}", at.display()))?;
    mount(Some(kind), at, Some(kind), flags, options)
        .with_context(|| format!("cannot mount {kind} on {}", at.display()))
}

fn bind_mount(bind: &Bind, root: &Path) -> Result<()> {
    let to = root.join(bind.to.strip_prefix("/").unwrap_or(&bind.to));
    fs::create_dir_all(&to).with_context(|| format!("cannot make the folder {}", to.display()))?;
    mount(Some(&bind.from), &to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("cannot bind {} to {}", bind.from.display(), to.display()))?;
    if bind.read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, &to, None::<&str>, flags, None::<&str>)
            .with_context(|| format!("cannot make {} read-only", to.display()))?;
    }
    Ok(())
}

/// A `/dev` of the machine's own: folders and sockets that are made in it must not appear in the host's.
fn make_dev(dev: &Path) -> Result<()> {
    new_mount("tmpfs", dev, MsFlags::MS_NOSUID, Some("mode=755"))?;
    let nodes: [(&str, u64, u64, u32); 10] = [
        ("null", 1, 3, 0o666),
        ("zero", 1, 5, 0o666),
        ("full", 1, 7, 0o666),
        ("random", 1, 8, 0o666),
        ("urandom", 1, 9, 0o666),
        ("kmsg", 1, 11, 0o644),
        ("tty", 5, 0, 0o666),
        ("console", 5, 1, 0o600),
        ("fuse", 10, 229, 0o666),
        ("net/tun", 10, 200, 0o666),
    ];
    fs::create_dir_all(dev.join("net")).context("cannot make /dev/net")?;
    for (name, major, minor, mode) in nodes {
        let path = dev.join(name);
        mknod(
            &path,
            SFlag::S_IFCHR,
            Mode::from_bits_truncate(mode),
            makedev(major, minor),
        )
        .with_context(|| format!("cannot make the device {name}"))?;
        // mknod's mode passes through the umask.
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode))
            .with_context(|| format!("cannot open the device {name} to others"))?;
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
        ("core", "/proc/kcore"),
    ] {
        std::os::unix::fs::symlink(target, dev.join(name)).with_context(|| format!("cannot link /dev/{name}"))?;
    }
    new_mount(
        "devpts",
        &dev.join("pts"),
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        Some("newinstance,ptmxmode=0666,mode=620"),
    )?;
    new_mount(
        "tmpfs",
        &dev.join("shm"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=1777"),
    )?;
    new_mount(
        "mqueue",
        &dev.join("mqueue"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        None,
    )
}

/// What a machine would change for all others, or would have in common with them though real ones do not.
fn protect_host(root: &Path, spec: &MachineSpec) -> Result<()> {
    // kubelet tunes these, and they are the whole kernel's: it gets files of its own to write to. (It ends if they cannot be written.)
    let own = root.join("run/sysctl");
    fs::create_dir(&own).context("cannot make a folder for the machine's own settings")?;
    for name in [
        "vm/overcommit_memory",
        "vm/panic_on_oom",
        "kernel/panic",
        "kernel/panic_on_oops",
        "kernel/keys/root_maxkeys",
        "kernel/keys/root_maxbytes",
    ] {
        let path = root.join("proc/sys").join(name);
        if let Ok(value) = fs::read(&path) {
            let file = own.join(name.replace('/', "."));
            fs::write(&file, value).with_context(|| format!("cannot write {}", file.display()))?;
            mount(Some(&file), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .with_context(|| format!("cannot protect {name}"))?;
        }
    }
    // A machine has a boot id of its own, another one after each boot.
    let boot_id = root.join("run/boot_id");
    let fresh = fs::read_to_string("/proc/sys/kernel/random/uuid").context("cannot make a boot id")?;
    fs::write(&boot_id, fresh).context("cannot write the boot id")?;
    let target = root.join("proc/sys/kernel/random/boot_id");
    mount(Some(&boot_id), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>).context("cannot set the boot id")?;
    let hosts = format!("127.0.0.1 localhost\n127.0.1.1 {}\n", spec.name);
    fs::write(root.join("etc/hosts"), hosts).context("cannot write /etc/hosts")?;
    fs::write(root.join("etc/hostname"), format!("{}\n", spec.name)).context("cannot write /etc/hostname")
}

// ---- services ---------------------------------------------------------------------------------------------------------------------------

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

// ---- orders -----------------------------------------------------------------------------------------------------------------------------

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
