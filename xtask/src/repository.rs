//! Where things are: the checkout, and the programs that were built from it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

/// The root of the checkout that this program was built from.
pub(crate) fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// A program of this workspace: they all lie in the folder in which this one lies.
fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("failed to find this program's own path")?;
    Ok(own.with_file_name(name))
}

/// Whether cargo says what it is doing; errors are always shown.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Progress {
    /// As usual.
    Shown,
    /// Not a word.
    Hidden,
}

/// Builds `peregrine-e2e` and the programs that it puts on the cluster, in one go: a build of each alone would compile the
/// dependencies again, with other features. Cargo's own progress goes to standard error, where it disturbs no output that is
/// parsed.
pub(crate) fn build_harness(root: &Path, progress: Progress) -> Result<()> {
    let packages = ["e2e", "operator", "node-agent", "runtime"].map(|package| ["--package", package]);
    let status = cargo(root)
        .arg("build")
        .args(packages.as_flattened())
        .arg("--bins")
        .args(matches!(progress, Progress::Hidden).then_some("--quiet"))
        .stdin(Stdio::null())
        .status()
        .context("failed to start cargo")?;
    ensure!(status.success(), "the programs do not build");
    Ok(())
}

/// The cargo that runs us, in the checkout.
pub(crate) fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    clean(&mut command);
    command
}

/// Removes what cargo sets for this program: to build scripts of other packages it would look like a change.
pub(crate) fn clean(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PKG_") || name == "CARGO_MANIFEST_DIR" {
            command.env_remove(name);
        }
    }
}

/// A program of the harness, which [`build_harness`] has just built.
pub(crate) fn harness() -> Result<Command> {
    let mut command = Command::new(program("peregrine-e2e")?);
    clean(&mut command);
    // It need not look again whether its programs are up to date.
    command.env("PEREGRINE_E2E_BUILT", "1");
    Ok(command)
}

/// Why a check is skipped for others than root.
pub(crate) const NEEDS_ROOT: &str = "it needs root";

/// Whether we are root. What cannot be read is no.
pub(crate) fn is_root() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    ids.and_then(|ids| ids.split_whitespace().nth(1)) == Some("0")
}
