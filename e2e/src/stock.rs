//! The same move by hand with what everybody has: `runc checkpoint`, a copy, `runc restore`. Measured beside ours, in the same run.
//!
//! The container is the same workload in a bundle of its own, outside the kubelet: a kubelet would restart it.

use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::oci_image::{Entry, Image};
use crate::scenario::stage::{Stage, input};
use crate::scenario::subject::State;

/// How long each part of a stock move took, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// `runc checkpoint`.
    pub dump: u64,
    /// Images and root filesystem changes to the other node.
    pub copy: u64,
    /// `runc restore`.
    pub restore: u64,
    /// All of it: the container does not run meanwhile.
    pub freeze: u64,
    /// With the preparation of the bundle on the target.
    pub total: u64,
}

/// Where everything lies on a node: in memory, as ours does.
const FOLDER: &str = "/run/stock";

/// Moves a container of `mib` MiB from one node to another, `containers` times one after the other as runc does it.
///
/// # Errors
/// If a step fails, or what arrives is not what left.
pub fn run(stage: &Stage, from: &str, to: &str, mib: u32, containers: u16) -> Result<Times> {
    let result = attempt(stage, from, to, mib, containers);
    for node in [from, to] {
        // What is left over would be in the way of the next run.
        drop(stage.on_node(node, &format!("{SETUP}\nfor i in 0 1 2 3; do runc --root {FOLDER}/root delete -f stock-$i >/dev/null 2>&1; done; umount {FOLDER}/ns-* {FOLDER} 2>/dev/null; rm -rf {FOLDER}; true")));
    }
    result
}

const SETUP: &str = "export PATH=$PATH:/usr/sbin:/sbin; set -e";

fn attempt(stage: &Stage, from: &str, to: &str, mib: u32, containers: u16) -> Result<Times> {
    prepare(stage, from, mib, containers)?;
    stage.on_node(from, &format!("{SETUP}\nfor i in $(seq 0 {}); do cd {FOLDER}/$i; runc --root {FOLDER}/root --log log run -d stock-$i > /dev/null 2>&1 < /dev/null || {{ cat log >&2; exit 1; }}; done", containers - 1))?;
    let before = ask_all(stage, from, containers)?;

    let began = Instant::now();
    prepare(stage, to, mib, containers)?;
    let frozen = Instant::now();
    // The defaults of everybody's script. The group is left alone, because the nodes of this cluster have no controllers.
    stage.on_node(from, &format!("{SETUP}\nfor i in $(seq 0 {}); do runc --root {FOLDER}/root --log log checkpoint --image-path {FOLDER}/img/$i --work-path {FOLDER}/img/$i --tcp-established --file-locks --manage-cgroups-mode ignore stock-$i || {{ grep Error {FOLDER}/img/$i/dump.log >&2; exit 1; }}; done", containers - 1))?;
    let dumped = Instant::now();
    copy(stage, from, to)?;
    let copied = Instant::now();
    stage.on_node(to, &format!("{SETUP}\nfor i in $(seq 0 {}); do cd {FOLDER}/$i; runc --root {FOLDER}/root --log log restore -d --image-path {FOLDER}/img/$i --work-path {FOLDER}/img/$i --tcp-established --file-locks --manage-cgroups-mode ignore stock-$i > /dev/null 2>&1 < /dev/null || {{ cat log >&2; grep Error {FOLDER}/img/$i/restore.log >&2; exit 1; }}; done", containers - 1))?;
    let restored = Instant::now();

    for (before, after) in before.iter().zip(ask_all(stage, to, containers)?) {
        ensure!(
            before.token == after.token && before.counter <= after.counter,
            "stock runc did not bring the process over"
        );
    }
    let milliseconds =
        |from: Instant, to: Instant| u64::try_from(to.duration_since(from).as_millis()).unwrap_or(u64::MAX);
    Ok(Times {
        dump: milliseconds(frozen, dumped),
        copy: milliseconds(dumped, copied),
        restore: milliseconds(copied, restored),
        freeze: milliseconds(frozen, restored),
        total: milliseconds(began, restored),
    })
}

/// A bundle per container on a node, in a file system in memory.
fn prepare(stage: &Stage, node: &str, mib: u32, containers: u16) -> Result<()> {
    stage.on_node(node, &format!("{SETUP}\nmkdir -p {FOLDER}; mountpoint -q {FOLDER} || mount -t tmpfs -o mode=0700 stock {FOLDER}; mkdir -p {FOLDER}/root; echo network-lock nftables > {FOLDER}/criu.conf\nfor i in $(seq 0 {}); do touch {FOLDER}/ns-$i; unshare --net={FOLDER}/ns-$i ip link set lo up; done", containers - 1))?;
    let cluster = stage.cluster()?;
    let program = crate::parts::home()?.join("images/workload");
    let program = if program.is_file() {
        program
    } else {
        crate::images::program("workload")?
    };
    for index in 0..containers {
        let config = bundle(mib, index).to_string();
        let mut entries = vec![
            Entry::program(&format!("{index}/rootfs/workload"), &program),
            Entry::file(&format!("{index}/config.json"), config),
            Entry::folder(&format!("img/{index}"), 0o755, (0, 0)),
        ];
        for folder in ["proc", "dev", "sys", "tmp"] {
            entries.push(Entry::folder(&format!("{index}/rootfs/{folder}"), 0o1777, (0, 0)));
        }
        let layer = Image {
            name: "stock:1".to_owned(),
            entries,
            ..Image::default()
        }
        .layer()?;
        input(
            cluster.exec(cluster.node(node)?, &["tar", "x", "-C", FOLDER, "-f", "-"])?,
            &layer,
            "tar",
        )?;
    }
    Ok(())
}

/// A plain container: its own namespaces, the network's made beforehand as for a pod, the capabilities of a pod's container.
fn bundle(mib: u32, index: u16) -> serde_json::Value {
    let capabilities = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_FSETID",
        "CAP_KILL",
        "CAP_NET_BIND_SERVICE",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
    ];
    json!({
        "ociVersion": "1.0.2",
        // Debian's nodes have nft and no iptables.
        "annotations": {"org.criu.config": format!("{FOLDER}/criu.conf")},
        "process": {
            "terminal": false, "user": {"uid": 0, "gid": 0}, "cwd": "/", "env": ["PATH=/"],
            "args": ["/workload", "run", "--name", "stock", "--mib", mib.to_string(), "--http", "8080"],
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities}, "noNewPrivileges": true
        },
        "root": {"path": "rootfs"}, "hostname": "stock",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
        ],
        "linux": {
            "cgroupsPath": format!("/stock-{index}"),
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network", "path": format!("{FOLDER}/ns-{index}")}],
        },
    })
}

/// What the containers on a node say of themselves.
fn ask_all(stage: &Stage, node: &str, containers: u16) -> Result<Vec<State>> {
    (0..containers)
        .map(|index| {
            stage.wait("the container to answer", std::time::Duration::from_secs(20), || {
                let text = stage.on_node(node, &format!("{SETUP}\nnsenter --net={FOLDER}/ns-{index} {FOLDER}/{index}/rootfs/workload fetch http://127.0.0.1:8080/state"))?;
                serde_json::from_str(&text).with_context(|| format!("not a state: {text}"))
            })
        })
        .collect()
}

/// Images and changed files, by a pipe between the nodes: faster than any network, which is to the advantage of stock runc.
fn copy(stage: &Stage, from: &str, to: &str) -> Result<()> {
    let cluster = stage.cluster()?;
    let changed = format!("{SETUP}\ncd {FOLDER}; exec tar c img */rootfs/tmp");
    let mut sender = cluster
        .exec(cluster.node(from)?, &["sh", "-c", &changed])?
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the copy")?;
    let pipe = sender.stdout.take().context("the copy has no output")?;
    let status = cluster
        .exec(cluster.node(to)?, &["tar", "x", "-C", FOLDER, "-f", "-"])?
        .stdin(pipe)
        .status()
        .context("cannot receive the copy")?;
    ensure!(
        sender.wait().context("cannot wait for the copy")?.success() && status.success(),
        "the copy failed"
    );
    Ok(())
}
