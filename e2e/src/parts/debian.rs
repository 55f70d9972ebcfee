//! The root file system of the nodes: a minimal Debian with what a node runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use super::cache::{self, Cache};
use super::versions::{Verdict, Versions, compare};
use super::workshop;
use crate::progress;

/// Raised when the way a tree is made changes, so that old trees are not taken for new ones.
const RECIPE: &str = "2";

/// The keyring that debootstrap checks the suite's signature with.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What the nodes' tree is made from.
pub(super) fn key(versions: &Versions) -> String {
    let debian = &versions.debian;
    cache::key(&[
        RECIPE,
        &debian.suite,
        &debian.mirror,
        &debian.include.join(","),
        std::env::consts::ARCH,
    ])
}

/// Makes a tree of the suite with these packages, unless it is there.
pub(super) fn ensure(cache: &Cache, versions: &Versions, key: &str, name: &str, include: &[String]) -> Result<PathBuf> {
    cache.ensure(name, key, |dir| {
        let log = cache.log(&format!("debootstrap-{name}"))?;
        install_debootstrap(cache)?;
        let script = script(versions)?;
        let debian = &versions.debian;
        progress::step(
            &format!("Debian {} tree, about 1 minute ({})", debian.suite, log.display()),
            || {
                let mut command = Command::new("debootstrap");
                command
                    .env("LC_ALL", "C")
                    .arg("--variant=minbase")
                    .arg(format!("--include={}", include.join(",")))
                    .arg(&debian.suite)
                    .arg(dir)
                    .arg(&debian.mirror)
                    .arg(script);
                workshop::run(&command, &log)
            },
        )?;
        // Downloaded packages are half of the tree's size, and nothing in it installs any later.
        let archives = dir.join("var/cache/apt/archives");
        for entry in fs::read_dir(&archives)
            .with_context(|| format!("cannot list {}", archives.display()))?
            .flatten()
        {
            if entry.path().extension().is_some_and(|extension| extension == "deb") {
                fs::remove_file(entry.path()).with_context(|| format!("cannot remove {}", entry.path().display()))?;
            }
        }
        // Services of the packages must not be taken for the host's: an empty machine-id, no name, no resolver.
        for (file, text) in [
            ("etc/machine-id", ""),
            ("etc/hostname", "node\n"),
            ("etc/resolv.conf", ""),
        ] {
            let path = dir.join(file);
            fs::remove_file(&path).ok();
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    })
}

/// Compares what is installed with what was verified; an unfit version is an error, a newer one a warning.
pub(super) fn check(versions: &Versions, tree: &Path) -> Result<()> {
    let status = tree.join("var/lib/dpkg/status");
    let status = fs::read_to_string(&status).with_context(|| format!("cannot read {}", status.display()))?;
    let (mut unfit, mut newer) = (Vec::new(), Vec::new());
    for (package, verified) in &versions.debian.verified {
        let Some(installed) = version_of(&status, package) else {
            unfit.push(format!("{package} is not installed"));
            continue;
        };
        match compare(installed, verified) {
            Verdict::Verified => {}
            Verdict::Newer => newer.push(format!("{package} {installed} (verified: {verified})")),
            Verdict::Unfit => unfit.push(format!(
                "{package} {installed} (needed: {verified} or a newer one of the same major version)"
            )),
        }
    }
    if !newer.is_empty() {
        progress::say(&format!(
            "warning: the Debian tree has newer versions than those verified: {}",
            newer.join(", ")
        ));
    }
    ensure!(
        unfit.is_empty(),
        "the Debian tree {} has versions that are not known to work: {}; if the suite moved on, verify them and record them in e2e/versions.toml, else remove the tree",
        tree.display(),
        unfit.join(", ")
    );
    Ok(())
}

/// The installed version of a package, from dpkg's list.
fn version_of<'a>(status: &'a str, package: &str) -> Option<&'a str> {
    status
        .split("\n\n")
        .find(|entry| {
            entry
                .lines()
                .any(|line| line.strip_prefix("Package: ") == Some(package))
        })
        .and_then(|entry| entry.lines().find_map(|line| line.strip_prefix("Version: ")))
}

/// Installs debootstrap with the host's package manager where it is missing.
fn install_debootstrap(cache: &Cache) -> Result<()> {
    if which("debootstrap").is_some() && Path::new(KEYRING).exists() {
        return Ok(());
    }
    if which("apt-get").is_none() {
        bail!(
            "debootstrap and Debian's keyring ({KEYRING}) are needed and apt-get is not there to install them: install the packages debootstrap and debian-archive-keyring"
        );
    }
    let log = cache.log("apt")?;
    progress::step(&format!("apt-get install debootstrap ({})", log.display()), || {
        // A mirror may lag behind the validity of its own release file; signatures are still checked.
        let apt = || {
            let mut apt = Command::new("apt-get");
            apt.env("DEBIAN_FRONTEND", "noninteractive")
                .args(["-o", "Acquire::Check-Valid-Until=false", "-y", "-q"]);
            apt
        };
        // Fails if one of many sources is unreachable, which need not matter.
        workshop::run(apt().arg("update"), &log).ok();
        workshop::run(
            apt().args([
                "install",
                "--no-install-recommends",
                "debootstrap",
                "debian-archive-keyring",
            ]),
            &log,
        )
    })
}

/// debootstrap's script for the suite: named as an argument, so that nothing is written into the host's `/usr/share`.
fn script(versions: &Versions) -> Result<PathBuf> {
    let folder = Path::new("/usr/share/debootstrap/scripts");
    versions
        .debian
        .scripts
        .iter()
        .map(|name| folder.join(name))
        .find(|path| path.exists())
        .with_context(|| {
            format!(
                "this debootstrap has none of the scripts {} in {}: install a newer debootstrap",
                versions.debian.scripts.join(", "),
                folder.display()
            )
        })
}

/// The path of a program of the host.
pub(super) fn which(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/go/bin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Package: runc\nStatus: install ok installed\nVersion: 1.3.6+ds1-1\n\nPackage: runc-doc\nVersion: 9\n\nPackage: criu\nVersion: 4.2.1-1\n";

    #[test]
    fn versions_are_found_by_the_whole_name() {
        assert_eq!(version_of(STATUS, "runc"), Some("1.3.6+ds1-1"));
        assert_eq!(version_of(STATUS, "criu"), Some("4.2.1-1"));
        assert_eq!(version_of(STATUS, "run"), None);
    }
}
