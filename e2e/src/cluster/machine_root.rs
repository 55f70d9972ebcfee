//! A machine's root: an overlay of the shared tree, kernel file systems of its own, its disk; nothing in it reaches the host.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::pivot_root;

use super::machine_spec::{Bind, MachineSpec};

/// Names of the protocols that packet filters speak of. The Debian tree has no `netbase`.
const PROTOCOLS: &str = "ip 0 IP\nicmp 1 ICMP\ntcp 6 TCP\nudp 17 UDP\nipv6-icmp 58 IPv6-ICMP\nsctp 132 SCTP\n";

/// Makes the root and moves into it.
pub(super) fn make(spec: &MachineSpec) -> Result<()> {
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
    // Without it nft writes protocol numbers where kube-proxy expects names: its hourly full synchronisation then takes every
    // element of its maps for a stale one and deletes it, and no Service answers any more.
    fs::write(root.join("etc/protocols"), PROTOCOLS).context("cannot write /etc/protocols")?;
    fs::write(root.join("etc/hostname"), format!("{}\n", spec.name)).context("cannot write /etc/hostname")
}
