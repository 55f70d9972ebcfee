//! Long builds by other people's programs, so that nothing of them outlives a killed `up`.
//!
//! They run in a cgroup of ours, where the next `up` or `down` finds and ends them, and in a mount namespace of their own: what debootstrap mounts
//! into its tree goes with it, and is never in the way of removing the tree.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::cluster;

/// The cgroup of builds.
const NAME: &str = "workshop";

/// Ends builds of a run that was killed, and background processes of one that was not.
pub(super) fn clear() -> Result<()> {
    cluster::cgroup::Cgroup::named(NAME)?.destroy()?;
    cluster::cgroup::tidy();
    Ok(())
}

/// Runs a command there with its output in a log; a failure shows the log's end.
pub(super) fn run(command: &Command, log: &Path) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot open the log {}", log.display()))?;
    let errors = file
        .try_clone()
        .with_context(|| format!("cannot open the log {}", log.display()))?;
    let mut inside = Command::new(cluster::program("peregrine-e2e")?);
    inside
        .args(["internal", "workshop", "--"])
        .arg(command.get_program())
        .args(command.get_args());
    for (variable, value) in command.get_envs() {
        match value {
            Some(value) => inside.env(variable, value),
            None => inside.env_remove(variable),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        inside.current_dir(folder);
    }
    let status = inside
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(errors)
        .status()
        .with_context(|| format!("cannot start {name}"));
    clear()?;
    let status = status?;
    if !status.success() {
        let text = std::fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        bail!(
            "{name} failed ({status}); the end of {}:\n{}",
            log.display(),
            lines[lines.len().saturating_sub(12)..].join("\n")
        );
    }
    Ok(())
}

/// What the process in between does: moves in, then becomes the command.
///
/// # Errors
/// If it cannot move in, or the command cannot be started.
pub(crate) fn become_command(argv: &[String]) -> Result<ExitCode> {
    let (program, args) = argv.split_first().context("a build without a command")?;
    let cgroup = cluster::cgroup::Cgroup::named(NAME)?;
    cgroup.create()?;
    cgroup.enter()?;
    unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .context("cannot make the mounts private")?;
    Err(Command::new(program).args(args).exec()).with_context(|| format!("cannot start {program}"))
}
