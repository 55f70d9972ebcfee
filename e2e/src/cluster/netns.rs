//! Network namespaces with names, as `ip netns` knows them, without the program: it would turn `/run/netns` itself into a mount.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use super::topology::NETNS_PREFIX;

const FOLDER: &str = "/run/netns";

/// Where the namespace's file is.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}

/// Whether there is a namespace of that name: an empty file, left by a killed run, is none.
pub(crate) fn exists(name: &str) -> bool {
    mounted().iter().any(|mounted| mounted == &path(name))
}

/// Makes a namespace; one of that name is replaced.
pub(crate) fn create(name: &str) -> Result<()> {
    delete(name)?;
    fs::create_dir_all(FOLDER).with_context(|| format!("cannot make the folder {FOLDER}"))?;
    let path = path(name);
    File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    in_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
        mount(
            Some("/proc/thread-self/ns/net"),
            &path,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .with_context(|| format!("cannot bind a network namespace to {}", path.display()))
    })
}

/// Removes a name; the namespace goes when nobody is in it any more.
pub(crate) fn delete(name: &str) -> Result<()> {
    let path = path(name);
    if exists(name) {
        umount2(&path, MntFlags::MNT_DETACH).with_context(|| format!("cannot unmount {}", path.display()))?;
    }
    if path.exists() {
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// Names of all namespaces of ours.
pub(crate) fn ours() -> Vec<String> {
    let Ok(entries) = fs::read_dir(FOLDER) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(NETNS_PREFIX))
        .collect();
    names.sort();
    names
}

/// Removes the folder if nobody has a namespace there.
pub(crate) fn tidy() {
    fs::remove_dir(FOLDER).ok();
}

/// Runs `work` in the namespace; child processes started there are in it as well.
///
/// # Errors
/// If there is no such namespace, or what `work` returns.
pub(crate) fn within<T: Send>(name: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let file =
        File::open(path(name)).with_context(|| format!("there is no network namespace {name}: is the cluster up?"))?;
    in_thread(|| {
        setns(&file, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter the network namespace {name}"))?;
        work()
    })
}

/// Runs `work` in a namespace that goes with it.
pub(crate) fn within_scratch<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    in_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
        work()
    })
}

/// A thread of its own: only it changes its namespace, and it ends afterwards.
fn in_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| scope.spawn(work).join())
        .map_err(|_| anyhow!("a thread in another network namespace panicked"))?
}

fn mounted() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .filter(|at| at.starts_with(FOLDER))
        .map(PathBuf::from)
        .collect()
}
