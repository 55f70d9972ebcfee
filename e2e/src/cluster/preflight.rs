//! What a cluster needs of the machine, checked before anything on it is touched. Each lack is one sentence that says what to change.

use std::fs;
use std::net::{TcpStream, ToSocketAddrs as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::parts::{Parts, Versions};

/// The oldest kernel with all that nodes and CRIU need (time namespaces that `setns` enters, `cgroup.kill`, `clone3` with chosen ids).
const KERNEL: (u32, u32) = (5, 14);
/// Bytes that must be free to make the parts: tree 0.7 GB, Go's caches 3 GB, programs 0.2 GB, nodes' disks.
const ROOM: u64 = 5 << 30;
/// How long a server may take to answer.
const CONNECT: Duration = Duration::from_secs(10);

/// Only root may make namespaces, mounts and cgroups.
///
/// # Errors
/// If this process is not root's.
pub(super) fn root() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the cluster needs root (it makes namespaces, mounts and cgroups): run it as root, for example with sudo -E"
    );
    Ok(())
}

/// Checks kernel, file system and, if parts are missing, network.
///
/// # Errors
/// The first thing that is missing, with its remedy.
pub(super) fn check(home: &Path) -> Result<()> {
    ensure!(
        cfg!(target_os = "linux"),
        "the cluster runs on Linux only: use a Linux machine"
    );
    root()?;
    let release = nix::sys::utsname::uname()
        .context("cannot ask for the kernel's version")?
        .release()
        .to_string_lossy()
        .into_owned();
    kernel(&release)?;
    let filesystems = fs::read_to_string("/proc/filesystems").context("cannot read /proc/filesystems")?;
    for (name, what) in [("overlay", "overlayfs"), ("cgroup2", "cgroup v2")] {
        ensure!(
            has_filesystem(&filesystems, name) || load_module(name),
            "this kernel lacks {what}: boot a kernel that has it"
        );
    }
    for (namespace, what) in [
        ("time", "time namespaces"),
        ("cgroup", "cgroup namespaces"),
        ("net", "network namespaces"),
    ] {
        ensure!(
            Path::new("/proc/self/ns").join(namespace).exists(),
            "this kernel lacks {what}: boot a kernel that has them"
        );
    }
    upper_layer(home)?;
    let missing = Parts::expected(home)?.missing();
    if !missing.is_empty() {
        room(home)?;
        network(&missing)?;
    }
    Ok(())
}

fn kernel(release: &str) -> Result<()> {
    let mut numbers = release
        .split(|char: char| !char.is_ascii_digit())
        .map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    ensure!(
        version >= KERNEL,
        "this kernel is {release}, and the cluster needs {}.{} or newer: boot a newer kernel",
        KERNEL.0,
        KERNEL.1
    );
    Ok(())
}

fn has_filesystem(list: &str, name: &str) -> bool {
    list.lines().any(|line| line.split_whitespace().last() == Some(name))
}

fn load_module(name: &str) -> bool {
    std::process::Command::new("modprobe")
        .arg(name)
        .status()
        .is_ok_and(|status| status.success())
}

/// The nodes' disks are upper layers of overlays: that needs a file system which is none itself, and has room.
fn upper_layer(home: &Path) -> Result<()> {
    let existing = existing(home);
    let stat = nix::sys::statfs::statfs(existing)
        .with_context(|| format!("cannot ask for the file system of {}", existing.display()))?;
    let kind = stat.filesystem_type();
    if kind == nix::sys::statfs::OVERLAYFS_SUPER_MAGIC || kind == nix::sys::statfs::NFS_SUPER_MAGIC {
        bail!(
            "{} is on an overlay or network file system, which cannot hold the nodes' disks: set PEREGRINE_HOME to a folder on a local disk",
            existing.display()
        );
    }
    Ok(())
}

/// Whether there is room for parts, their downloads and the disks of a few nodes.
fn room(home: &Path) -> Result<()> {
    let folder = existing(home);
    let stat = nix::sys::statfs::statfs(folder)
        .with_context(|| format!("cannot ask for the file system of {}", folder.display()))?;
    let free = stat
        .blocks_available()
        .saturating_mul(u64::try_from(stat.block_size()).unwrap_or(0));
    ensure!(
        free >= ROOM,
        "{} has {} GB of room, and the cluster's parts need {}: make room, or set PEREGRINE_HOME to a folder with more",
        folder.display(),
        free >> 30,
        ROOM >> 30
    );
    Ok(())
}

/// The nearest folder that is there.
fn existing(path: &Path) -> &Path {
    path.ancestors()
        .find(|folder| folder.exists())
        .unwrap_or(Path::new("/"))
}

/// Whether the places that parts come from can be reached.
fn network(missing: &[&str]) -> Result<()> {
    // Behind a proxy only the tools themselves can tell.
    if ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "GOPROXY"]
        .iter()
        .any(|name| std::env::var_os(name).is_some())
    {
        return Ok(());
    }
    let versions = Versions::load()?;
    let host = versions.debian.mirror.split('/').nth(2).unwrap_or_default().to_owned();
    let reach = || -> std::io::Result<()> {
        let mut last = std::io::Error::other("it has no address");
        for address in (host.as_str(), 80).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, CONNECT) {
                Ok(_) => return Ok(()),
                Err(error) => last = error,
            }
        }
        Err(last)
    };
    reach().with_context(|| {
        format!("{} must be fetched, and {host} cannot be reached: connect this machine to the network, or set http_proxy and https_proxy", missing.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_by_number() {
        for (release, fit) in [
            ("6.18.44-fc-v595", true),
            ("5.14.0-503.el9", true),
            ("5.10.0-30-amd64", false),
            ("4.19.0", false),
            ("10.0", true),
            ("junk", false),
        ] {
            assert_eq!(kernel(release).is_ok(), fit, "{release}");
        }
        assert!(kernel("5.4.0-1").unwrap_err().to_string().contains("5.14 or newer"));
    }

    #[test]
    fn file_systems_are_found_by_whole_name() {
        let list = "nodev\tsysfs\nnodev\toverlay\n\text4\nnodev\tcgroup2\n";
        assert!(has_filesystem(list, "overlay") && has_filesystem(list, "ext4"));
        assert!(!has_filesystem(list, "over") && !has_filesystem(list, "nodev"));
    }
}
