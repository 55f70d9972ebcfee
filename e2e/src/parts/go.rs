//! Programs built from Go modules: the Kubernetes components and helm.
//!
//! The module proxy's checksums (`go.sum`, the checksum database) are what pins them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::cache::{self, Cache};
use super::debian;
use super::versions::{Versions, at_least};
use super::workshop;
use crate::progress;

const MAIN: &str = include_str!("../../kube/main.go");
const MOD: &str = include_str!("../../kube/go.mod");
const SUM: &str = include_str!("../../kube/go.sum");

/// Names that the one Kubernetes program answers to.
const COMPONENTS: [&str; 5] = [
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
];

pub(super) fn kube_key(versions: &Versions) -> String {
    cache::key(&[MAIN, MOD, SUM, &versions.kubernetes.version, std::env::consts::ARCH])
}

pub(super) fn helm_key(versions: &Versions) -> String {
    cache::key(&[&versions.helm.module, &versions.helm.version, std::env::consts::ARCH])
}

pub(super) fn ensure_kube(cache: &Cache, versions: &Versions) -> Result<PathBuf> {
    cache.ensure("kube", &kube_key(versions), |dir| {
        let log = cache.log("kube")?;
        let toolchain = Toolchain::find(cache, versions)?;
        let source = dir.join("source");
        fs::create_dir(&source).with_context(|| format!("cannot make the folder {}", source.display()))?;
        for (name, text) in [("main.go", MAIN), ("go.mod", MOD), ("go.sum", SUM)] {
            fs::write(source.join(name), text).with_context(|| format!("cannot write {name}"))?;
        }
        let version = &versions.kubernetes.version;
        let what = format!(
            "Kubernetes {version} components from source, about 5 minutes the first time ({})",
            log.display()
        );
        let flags = ldflags(version);
        progress::step(&what, || {
            toolchain.run(
                &source,
                &[
                    "build",
                    "-trimpath",
                    "-mod=readonly",
                    "-ldflags",
                    &flags,
                    "-o",
                    "kube",
                    ".",
                ],
                "kube",
                &dir.join("kube"),
                &log,
            )
        })?;
        fs::remove_dir_all(&source).with_context(|| format!("cannot remove {}", source.display()))?;
        for component in COMPONENTS {
            symlink("kube", dir.join(component)).with_context(|| format!("cannot link {component}"))?;
        }
        Ok(())
    })
}

pub(super) fn ensure_helm(cache: &Cache, versions: &Versions) -> Result<PathBuf> {
    cache.ensure("helm", &helm_key(versions), |dir| {
        let log = cache.log("helm")?;
        let toolchain = Toolchain::find(cache, versions)?;
        let source = dir.join("source");
        fs::create_dir(&source).with_context(|| format!("cannot make the folder {}", source.display()))?;
        let package = format!("{}@{}", versions.helm.module, versions.helm.version);
        progress::step(
            &format!(
                "helm {} from source, about 2 minutes the first time ({})",
                versions.helm.version,
                log.display()
            ),
            || {
                toolchain.run(
                    &source,
                    &["install", "-trimpath", "-ldflags", "-s -w", &package],
                    "helm",
                    &dir.join("helm"),
                    &log,
                )
            },
        )?;
        fs::remove_dir_all(&source).with_context(|| format!("cannot remove {}", source.display()))
    })
}

/// Stripped, and with the version that clients are told: a program built outside the Kubernetes tree says v0.0.0 otherwise.
fn ldflags(version: &str) -> String {
    let mut parts = version.split('.');
    let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let set = |name: &str, value: &str| format!("-X k8s.io/component-base/version.{name}={value}");
    [
        "-s -w".to_owned(),
        set("gitVersion", &format!("v{version}")),
        set("gitMajor", major),
        set("gitMinor", minor),
        set("gitTreeState", "clean"),
    ]
    .join(" ")
}

/// A Go that builds our programs.
enum Toolchain {
    /// The host's.
    Host(PathBuf),
    /// The one of a Debian tree, run by `chroot`.
    Tree(PathBuf),
}

impl Toolchain {
    fn find(cache: &Cache, versions: &Versions) -> Result<Self> {
        if let Some(go) = debian::which("go")
            && let Ok(output) = Command::new(&go)
                .args(["env", "GOVERSION"])
                .env("GOTOOLCHAIN", "local")
                .output()
            && at_least(
                String::from_utf8_lossy(&output.stdout).trim(),
                &versions.go.host_minimum,
            )
        {
            return Ok(Self::Host(go));
        }
        let key = cache::key(&[
            &versions.debian.suite,
            &versions.debian.mirror,
            &versions.go.packages.join(","),
            std::env::consts::ARCH,
        ]);
        Ok(Self::Tree(debian::ensure(
            cache,
            versions,
            &key,
            "go",
            &versions.go.packages,
        )?))
    }

    /// Runs `go` in `source`, then moves the program `name` that it made to `to`.
    fn run(&self, source: &Path, args: &[&str], name: &str, to: &Path, log: &Path) -> Result<()> {
        let made = match self {
            Self::Host(go) => {
                let mut command = Command::new(go);
                command
                    .current_dir(source)
                    .env("CGO_ENABLED", "0")
                    .env("GOFLAGS", "")
                    .env("GOWORK", "off")
                    .env("GOBIN", source)
                    .args(args);
                workshop::run(&command, log)?;
                source.join(name)
            }
            Self::Tree(tree) => {
                let inside = tree.join("build");
                fs::remove_dir_all(&inside).ok();
                fs::create_dir_all(&inside).with_context(|| format!("cannot make the folder {}", inside.display()))?;
                for entry in fs::read_dir(source)
                    .with_context(|| format!("cannot list {}", source.display()))?
                    .flatten()
                {
                    fs::copy(entry.path(), inside.join(entry.file_name()))
                        .with_context(|| format!("cannot copy {}", entry.path().display()))?;
                }
                // Names are resolved as on the host, and whom the host trusts is trusted: a company's proxy signs with an authority of its own.
                for file in ["etc/resolv.conf", "etc/hosts", "etc/ssl/certs/ca-certificates.crt"] {
                    let from = Path::new("/").join(file);
                    if from.exists() {
                        fs::copy(&from, tree.join(file))
                            .with_context(|| format!("cannot copy /{file} into the Go tree"))?;
                    }
                }
                // Go finds itself through /proc. The mount is the workshop's own and goes with it.
                let mut command = Command::new("sh");
                command
                    .args(["-c", r#"mount -t proc proc "$0/proc" && exec chroot "$0" "$@""#])
                    .arg(tree)
                    .args([
                        "/usr/bin/env",
                        "-C",
                        "/build",
                        "HOME=/build",
                        "PATH=/usr/lib/go/bin:/usr/bin:/bin",
                        "CGO_ENABLED=0",
                        "GOWORK=off",
                        "GOBIN=/build",
                    ]);
                command.args(["GOPATH=/go", "GOCACHE=/go/cache", "go"]).args(args);
                workshop::run(&command, log)?;
                inside.join(name)
            }
        };
        // The tree may be on another file system than the part: copied, not renamed.
        fs::copy(&made, to).with_context(|| format!("cannot copy {} to {}", made.display(), to.display()))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_told_the_version() {
        let flags = ldflags("1.36.3");
        assert!(
            flags.contains("gitVersion=v1.36.3") && flags.contains("gitMajor=1 ") && flags.contains("gitMinor=36 ")
        );
    }
}
