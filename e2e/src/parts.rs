//! The parts of a cluster that are not ours: a Debian tree, the Kubernetes components, helm.
//!
//! Each lies in `PEREGRINE_HOME/parts/<name>-<digest of what it is made from>`. It is made in a temporary folder beside that and renamed when
//! complete: a folder with its final name is whole, whenever its maker was killed.

mod cache;
mod debian;
mod go;
mod versions;
pub(crate) mod workshop;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

pub use versions::Versions;

/// Where everything is that a cluster is made from.
#[derive(Clone, Debug)]
pub struct Parts {
    /// Root file system of the nodes, never written to once made.
    pub tree: PathBuf,
    /// Folder with the Kubernetes components, each by its name.
    pub kube: PathBuf,
    /// The helm program.
    pub helm: PathBuf,
}

impl Parts {
    /// Where the parts are or will be, without making any.
    ///
    /// # Errors
    /// If `versions.toml`, which is part of this program, does not parse.
    pub fn expected(home: &Path) -> Result<Self> {
        let versions = Versions::load()?;
        let cache = cache::Cache::new(home);
        Ok(Self {
            tree: cache.path("debian", &debian::key(&versions)),
            kube: cache.path("kube", &go::kube_key(&versions)),
            helm: cache.path("helm", &go::helm_key(&versions)).join("helm"),
        })
    }

    /// Names of those that are not there yet.
    pub fn missing(&self) -> Vec<&'static str> {
        [
            ("the Debian tree", &self.tree),
            ("the Kubernetes components", &self.kube),
            ("helm", &self.helm),
        ]
        .into_iter()
        .filter(|(_, path)| !path.exists())
        .map(|(name, _)| name)
        .collect()
    }

    /// Makes what is missing.
    ///
    /// # Errors
    /// If a part cannot be had; the message names the part and the log.
    pub fn ensure(home: &Path) -> Result<Self> {
        let parts = Self::expected(home)?;
        let versions = Versions::load()?;
        let cache = cache::Cache::new(home);
        if !parts.missing().is_empty() {
            workshop::clear().context("cannot end an earlier build")?;
        }
        debian::ensure(
            &cache,
            &versions,
            &debian::key(&versions),
            "debian",
            &versions.debian.include,
        )
        .context("cannot make the Debian tree")?;
        debian::check(&versions, &parts.tree)?;
        go::ensure_kube(&cache, &versions).context("cannot build the Kubernetes components")?;
        go::ensure_helm(&cache, &versions).context("cannot build helm")?;
        Ok(parts)
    }

    /// Makes helm alone, if it is missing.
    ///
    /// # Errors
    /// If it cannot be had; the message names the log.
    pub fn ensure_helm(home: &Path) -> Result<PathBuf> {
        let cache = cache::Cache::new(home);
        go::ensure_helm(&cache, &Versions::load()?).context("cannot build helm")?;
        Ok(Self::expected(home)?.helm)
    }

    /// Removes parts that were made from other inputs. Not while a cluster runs, which may be made from them.
    ///
    /// # Errors
    /// As [`Parts::expected`].
    pub fn sweep(home: &Path) -> Result<()> {
        let parts = Self::expected(home)?;
        let helm = parts.helm.parent().map(Path::to_path_buf).unwrap_or_default();
        cache::Cache::new(home).sweep(&[parts.tree, parts.kube, helm]);
        Ok(())
    }

    /// A program of the Debian tree, to be run on the host's file system.
    ///
    /// The tree's own dynamic loader and libraries are used: its programs need a newer C library than the host may have, and `chroot` would hide
    /// the host's files from them.
    pub fn tool(&self, name: &str) -> Command {
        let argv = self.tool_argv(name);
        let mut command = Command::new(&argv[0]);
        command.args(&argv[1..]);
        command
    }

    fn tool_argv(&self, name: &str) -> Vec<OsString> {
        let (loader, libraries) = loader(std::env::consts::ARCH);
        let program = ["usr/sbin", "usr/bin"]
            .iter()
            .map(|folder| self.tree.join(folder).join(name))
            .find(|path| path.exists())
            .unwrap_or_else(|| self.tree.join("usr/bin").join(name));
        vec![
            self.tree.join(loader).into(),
            "--argv0".into(),
            name.into(),
            "--library-path".into(),
            self.tree.join(libraries).into(),
            program.into(),
        ]
    }
}

/// The dynamic loader and the folder of libraries in a Debian tree.
fn loader(arch: &str) -> (&'static str, &'static str) {
    match arch {
        "aarch64" => ("lib/ld-linux-aarch64.so.1", "usr/lib/aarch64-linux-gnu"),
        _ => ("lib64/ld-linux-x86-64.so.2", "usr/lib/x86_64-linux-gnu"),
    }
}

/// `PEREGRINE_HOME`, or `peregrine` in the user's cache folder.
///
/// # Errors
/// If neither `PEREGRINE_HOME`, `XDG_CACHE_HOME` nor `HOME` is set, or the one that counts is not an absolute path.
pub fn home() -> Result<PathBuf> {
    let of = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let home = home_from(of("PEREGRINE_HOME"), of("XDG_CACHE_HOME"), of("HOME"))
        .context("no folder to keep the cluster's parts in: set PEREGRINE_HOME to a folder with 5 GB of room")?;
    anyhow::ensure!(
        home.is_absolute(),
        "PEREGRINE_HOME must be an absolute path, but is {}",
        home.display()
    );
    Ok(home)
}

fn home_from(own: Option<PathBuf>, cache: Option<PathBuf>, user: Option<PathBuf>) -> Option<PathBuf> {
    own.or_else(|| cache.map(|cache| cache.join("peregrine")))
        .or_else(|| user.map(|user| user.join(".cache/peregrine")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_prefers_its_own_variable() {
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(home_from(path("/p"), path("/c"), path("/h")), path("/p"));
        assert_eq!(home_from(None, path("/c"), path("/h")), path("/c/peregrine"));
        assert_eq!(home_from(None, None, path("/h")), path("/h/.cache/peregrine"));
        assert_eq!(home_from(None, None, None), None);
    }

    #[test]
    fn parts_with_other_inputs_lie_elsewhere() {
        let parts = Parts::expected(Path::new("/home")).unwrap();
        assert!(parts.tree.starts_with("/home/parts"));
        assert_ne!(parts.tree.parent().unwrap(), parts.helm.parent().unwrap());
    }
}
