//! PID 1 of a machine: mounts, then services, then reaping, until the power goes.
//!
//! ```text
//! spawn (host) ── enters cgroup, network namespace; unshares mount, UTS, IPC, PID, cgroup, time ──> init (PID 1)
//! init: overlay root, pivot_root, /proc /sys /dev /run, then one thread per service: wait for conditions → run → wait for its end → again
//! ```
//! As under systemd, a service that ends is started again, at once the first time: whoever wants containerd to read its configuration again
//! ends it. When init dies the kernel kills everything in its PID namespace, which is what a loss of power looks like from outside.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::setsid;

use super::cgroup::Cgroup;
use super::machine_spec::{CONTROL_SOCKET, MachineSpec};
use super::topology::NETNS_PREFIX;
use super::{machine_root, netns, services};

/// `CLONE_NEWTIME`, which `nix` does not name.
const CLONE_NEWTIME: i32 = 0x80;
/// What init says when the machine is up.
const READY: &str = "ready";
/// Programs of a machine are found here.
pub(super) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

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
    machine_root::make(&spec)?;
    nix::unistd::sethostname(&spec.name).context("cannot set the host name")?;
    fs::remove_file(CONTROL_SOCKET).ok();
    let listener = UnixListener::bind(CONTROL_SOCKET).context("cannot listen for orders")?;
    println!("{READY}");
    services::run(spec.services, listener)
}
