//! A command inside a member: in all namespaces of a node, or in the network namespace of a place that has the host's file system.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode, ExitStatus};

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;

use super::cgroup::Cgroup;
use super::init::PATH;
use super::machine::Machine;
use super::netns;
use super::topology::Member;

/// Status of a command that cannot be started, as shells have it.
const NOT_FOUND: u8 = 127;

/// Runs a command in the member with this process's own input and output; returns its exit code.
///
/// # Errors
/// If the member is not running or cannot be entered.
pub(super) fn run(member: Member, argv: &[String]) -> Result<ExitCode> {
    let name = member.name();
    // Whoever is in a member dies with it.
    let cgroup = Cgroup::named(&name)?;
    match member {
        Member::ControlPlane | Member::Outside => {
            let netns = netns::path(&member.netns());
            let netns = File::open(&netns).with_context(|| format!("{name} is not there: is the cluster up?"))?;
            cgroup.create()?;
            cgroup.enter()?;
            setns(&netns, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter the network of {name}"))?;
        }
        Member::Node(_) => {
            let init = Machine::named(&name)?
                .init()
                .with_context(|| format!("{name} is not running: `cluster node start {name}` starts it"))?;
            // All are opened before the first is entered: `/proc` is another one afterwards.
            // The mount namespace comes last, for the same reason.
            let namespaces = ["cgroup", "ipc", "uts", "net", "pid", "time", "mnt"]
                .into_iter()
                .map(|kind| {
                    File::open(format!("/proc/{init}/ns/{kind}"))
                        .with_context(|| format!("cannot open the {kind} namespace of {name}"))
                })
                .collect::<Result<Vec<_>>>()?;
            cgroup.enter()?;
            for namespace in &namespaces {
                setns(namespace, CloneFlags::empty()).with_context(|| format!("cannot enter a namespace of {name}"))?;
            }
            std::env::set_current_dir("/").context("cannot enter the node's root")?;
        }
    }
    // Only a child is in the PID namespace. Our own program in between ties the command's life to ours: were this process killed, as by a
    // test's deadline, the command would otherwise live on in the node.
    let mut child = Command::new("/proc/self/exe");
    child.args(["internal", "exec", "--"]).args(argv);
    if matches!(member, Member::Node(_)) {
        child.env("PATH", PATH).env("HOME", "/root");
    }
    Ok(code(child.status().context("cannot start a program in the member")?))
}

/// Becomes a command that dies with the parent.
pub(super) fn exec(argv: &[String]) -> ExitCode {
    let Some((program, args)) = argv.split_first() else {
        return ExitCode::from(NOT_FOUND);
    };
    if let Err(error) = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL) {
        eprintln!("cannot tie {program} to its caller: {error}");
    }
    let error = Command::new(program).args(args).exec();
    eprintln!("cannot run {program}: {error}");
    ExitCode::from(NOT_FOUND)
}

/// The exit code of an ended command, 128 and the signal's number if a signal ended it.
pub(super) fn code(status: ExitStatus) -> ExitCode {
    use std::os::unix::process::ExitStatusExt as _;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
