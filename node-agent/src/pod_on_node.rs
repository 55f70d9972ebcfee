//! Finds the sandbox and the containers of a pod on this node: containerd's bundles name the pod (annotations that the
//! CRI plugin writes), runc's state names the first process and the cgroup.
//!
//! Both are files that root alone writes. Nothing here asks containerd: the same answer is needed while containerd is
//! down, after a restart of the agent and within a freeze.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::Value;

/// Bundles of all tasks of containerd's namespace of Kubernetes.
pub const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task/k8s.io";
/// runc's state of the same containers; the value of `runc --root`.
pub const RUNC_ROOT: &str = "/run/containerd/runc/k8s.io";

/// Why a pod could not be looked up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be read.
    #[error("failed to read {0}")]
    Read(PathBuf, #[source] io::Error),
    /// A file is not what containerd or runc write.
    #[error("{0} is not the JSON that was expected: {1}")]
    Content(PathBuf, String),
    /// No sandbox of this pod runs here.
    #[error("pod {0} has no running sandbox on this node")]
    NoSandbox(String),
    /// Two sandboxes of this pod run here.
    #[error("pod {0} has more than one running sandbox on this node")]
    TwoSandboxes(String),
}

/// A pod as it runs on this node.
#[derive(Clone, Debug, PartialEq)]
pub struct PodOnNode {
    /// Uid of the pod.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Id of the sandbox container.
    pub sandbox_id: String,
    /// Pid of the sandbox's process.
    pub sandbox_pid: i32,
    /// The pod's network namespace, as a path that can be opened. A pod of the host's network has `/proc/1/ns/net`'s.
    pub network_namespace: PathBuf,
    /// The running containers, sorted by name. Containers that have ended are left out.
    pub containers: Vec<ContainerOnNode>,
}

/// A running container of it.
#[derive(Clone, Debug, PartialEq)]
pub struct ContainerOnNode {
    /// Name in the pod's spec.
    pub name: String,
    /// Id, as containerd and runc know it.
    pub id: String,
    /// The bundle.
    pub bundle: PathBuf,
    /// `config.json` of the bundle.
    pub config: Value,
    /// Pid of its first process in the node's pid namespace.
    pub init_pid: i32,
    /// Absolute path of its cgroup in the v2 hierarchy.
    pub cgroup: PathBuf,
    /// Mount of its root filesystem (the merged overlay).
    pub rootfs: PathBuf,
    /// Upper layer of that overlay; absent where the root filesystem is not an overlay.
    pub upper: Option<PathBuf>,
    /// Folder on the node that is mounted as /dev/shm, where it has one (all containers of a pod share the sandbox's).
    pub shm: Option<PathBuf>,
}

impl ContainerOnNode {
    /// All processes of the container, also those that `kubectl exec` started: every pid in its cgroup and below.
    ///
    /// # Errors
    /// Where the cgroup cannot be read; a cgroup that is gone has no processes.
    pub fn pids(&self) -> Result<Vec<i32>, Error> {
        let mut pids = Vec::new();
        collect_pids(&self.cgroup, &mut pids)?;
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }
}

/// Adds the processes of a cgroup and of all below it.
///
/// # Errors
/// Where a cgroup cannot be read; one that is gone has no processes.
pub fn collect_pids(cgroup: &Path, pids: &mut Vec<i32>) -> Result<(), Error> {
    let procs = cgroup.join("cgroup.procs");
    let text = match fs::read_to_string(&procs) {
        Ok(text) => text,
        Err(e) if gone(&e) => return Ok(()),
        Err(e) => return Err(Error::Read(procs, e)),
    };
    pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()));
    let entries = match fs::read_dir(cgroup) {
        Ok(entries) => entries,
        Err(e) if gone(&e) => return Ok(()),
        Err(e) => return Err(Error::Read(cgroup.to_owned(), e)),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            collect_pids(&entry.path(), pids)?;
        }
    }
    Ok(())
}

/// A cgroup that is removed while it is read answers ENOENT or ENODEV.
fn gone(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(nix::libc::ENODEV)
}

/// Looks the pod up. Blocking: call it off the async threads.
///
/// # Errors
/// See [`Error`].
pub fn find(pod_uid: &str) -> Result<PodOnNode, Error> {
    find_in(Path::new(BUNDLES), Path::new(RUNC_ROOT), pod_uid)
}

/// Ids of all containers (not sandboxes) of a pod that have a bundle here, running or not.
///
/// # Errors
/// See [`Error`].
pub fn bundles_of(pod_uid: &str) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    for bundle in bundles(Path::new(BUNDLES))? {
        if let Some(config) = read_json(&bundle.join("config.json"))?
            && annotation(&config, "io.kubernetes.cri.sandbox-uid") == Some(pod_uid)
        {
            found.push(bundle);
        }
    }
    Ok(found)
}

fn find_in(bundles_dir: &Path, runc_root: &Path, pod_uid: &str) -> Result<PodOnNode, Error> {
    let mut sandboxes = Vec::new();
    let mut containers = Vec::new();
    for bundle in bundles(bundles_dir)? {
        let Some(config) = read_json(&bundle.join("config.json"))? else {
            continue;
        };
        if annotation(&config, "io.kubernetes.cri.sandbox-uid") != Some(pod_uid) {
            continue;
        }
        let Some(id) = bundle.file_name().and_then(|n| n.to_str()).map(str::to_owned) else {
            continue;
        };
        // A container that was created and not yet started, or that has ended and is not yet deleted, has no live process.
        let Some(state) = read_json(&runc_root.join(&id).join("state.json"))? else {
            continue;
        };
        let Some(pid) = live_init(&state) else { continue };
        if annotation(&config, "io.kubernetes.cri.container-type") == Some("sandbox") {
            sandboxes.push((id, pid, config));
        } else if let Some(name) = annotation(&config, "io.kubernetes.cri.container-name").map(str::to_owned) {
            let rootfs = bundle.join("rootfs");
            containers.push(ContainerOnNode {
                name,
                cgroup: cgroup_of(&state, pid)?,
                upper: None,
                shm: shm_of(&config),
                init_pid: pid,
                id,
                bundle,
                config,
                rootfs,
            });
        }
    }
    let (sandbox_id, sandbox_pid, config) = sandboxes.pop().ok_or_else(|| Error::NoSandbox(pod_uid.to_owned()))?;
    if !sandboxes.is_empty() {
        return Err(Error::TwoSandboxes(pod_uid.to_owned()));
    }
    let mounts = PathBuf::from("/proc/self/mountinfo");
    let text = fs::read_to_string(&mounts).map_err(|e| Error::Read(mounts, e))?;
    for c in &mut containers {
        c.upper = upper_of(&text, &c.rootfs);
    }
    containers.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(PodOnNode {
        uid: pod_uid.to_owned(),
        namespace: annotation(&config, "io.kubernetes.cri.sandbox-namespace")
            .unwrap_or_default()
            .to_owned(),
        name: annotation(&config, "io.kubernetes.cri.sandbox-name")
            .unwrap_or_default()
            .to_owned(),
        sandbox_id,
        sandbox_pid,
        network_namespace: PathBuf::from(format!("/proc/{sandbox_pid}/ns/net")),
        containers,
    })
}

fn bundles(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::Read(dir.to_owned(), e)),
    };
    Ok(entries.flatten().map(|e| e.path()).collect())
}

/// `None` where the file does not exist (any more).
fn read_json(path: &Path) -> Result<Option<Value>, Error> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| Error::Content(path.to_owned(), e.to_string())),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(Error::Read(path.to_owned(), e)),
    }
}

fn annotation<'a>(config: &'a Value, key: &str) -> Option<&'a str> {
    config.get("annotations")?.get(key)?.as_str()
}

/// The first process, if it is alive and the one that runc started: a pid alone may have been given to another.
fn live_init(state: &Value) -> Option<i32> {
    let pid = i32::try_from(state.get("init_process_pid")?.as_i64()?).ok()?;
    let started = state.get("init_process_start")?.as_u64()?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, may hold spaces and parentheses; the state is the third, the start time the 22nd.
    let rest = stat.rsplit_once(") ")?.1;
    let mut fields = rest.split(' ');
    let state = fields.next()?;
    let start: u64 = fields.nth(18)?.parse().ok()?;
    (start == started && state != "Z" && state != "X").then_some(pid)
}

fn cgroup_of(state: &Value, pid: i32) -> Result<PathBuf, Error> {
    if let Some(path) = state
        .get("cgroup_paths")
        .and_then(|p| p.get(""))
        .and_then(Value::as_str)
        && Path::new(path).is_dir()
    {
        return Ok(PathBuf::from(path));
    }
    let file = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let text = fs::read_to_string(&file).map_err(|e| Error::Read(file.clone(), e))?;
    let path = text
        .lines()
        .find_map(|l| l.strip_prefix("0::"))
        .ok_or_else(|| Error::Content(file, "no cgroup of the v2 hierarchy".into()))?;
    Ok(PathBuf::from(format!("/sys/fs/cgroup{path}")))
}

fn shm_of(config: &Value) -> Option<PathBuf> {
    config
        .get("mounts")?
        .as_array()?
        .iter()
        .find(|m| m.get("destination").and_then(Value::as_str) == Some("/dev/shm"))?
        .get("source")?
        .as_str()
        .filter(|s| s.starts_with('/'))
        .map(PathBuf::from)
}

/// Upper layer of the overlay that is mounted at `mount_point`. The last line wins: later mounts cover earlier ones.
fn upper_of(mountinfo: &str, mount_point: &Path) -> Option<PathBuf> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let (head, tail) = line.split_once(" - ")?;
            let point = head.split(' ').nth(4)?;
            let mut tail = tail.split(' ');
            let kind = tail.next()?;
            let options = tail.nth(1)?;
            (kind == "overlay" && Path::new(&unescape(point)) == mount_point).then_some(options)
        })
        .next_back()?
        .split(',')
        .find_map(|o| o.strip_prefix("upperdir="))
        .map(|p| PathBuf::from(unescape(p)))
}

/// The kernel writes blanks, tabs, line ends and backslashes as three octal digits.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let digits = rest.get(at + 1..at + 4).and_then(|d| u8::from_str_radix(d, 8).ok());
        match digits {
            Some(byte) => {
                out.push(char::from(byte));
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_upper_layer_is_that_of_the_last_overlay_at_the_mount_point() {
        let text = "\
30 1 0:5 / /a rw - overlay overlay rw,lowerdir=/l,upperdir=/old,workdir=/w\n\
31 1 0:5 / /a rw shared:1 - overlay overlay rw,lowerdir=/l,upperdir=/new\\040one,workdir=/w\n\
32 1 0:5 / /a/b rw - tmpfs tmpfs rw\n";
        assert_eq!(upper_of(text, Path::new("/a")), Some(PathBuf::from("/new one")));
        assert_eq!(upper_of(text, Path::new("/a/b")), None);
    }

    #[test]
    fn a_process_is_found_by_its_start_time_and_not_by_its_pid_alone() {
        let pid = std::process::id();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let start: u64 = stat
            .rsplit_once(") ")
            .unwrap()
            .1
            .split(' ')
            .nth(19)
            .unwrap()
            .parse()
            .unwrap();
        let state = serde_json::json!({"init_process_pid": pid, "init_process_start": start});
        assert_eq!(live_init(&state), i32::try_from(pid).ok());
        let other = serde_json::json!({"init_process_pid": pid, "init_process_start": start + 1});
        assert_eq!(live_init(&other), None);
    }

    #[test]
    fn a_pod_is_found_by_the_uid_in_its_bundles() {
        let dir = std::env::temp_dir().join(format!("pod-on-node-{}", std::process::id()));
        let (bundles, runc) = (dir.join("b"), dir.join("r"));
        let pid = std::process::id();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let start: u64 = stat
            .rsplit_once(") ")
            .unwrap()
            .1
            .split(' ')
            .nth(19)
            .unwrap()
            .parse()
            .unwrap();
        for (id, kind, uid) in [
            ("s", "sandbox", "u"),
            ("c", "container", "u"),
            ("x", "container", "other"),
        ] {
            fs::create_dir_all(bundles.join(id)).unwrap();
            fs::create_dir_all(runc.join(id)).unwrap();
            let config = serde_json::json!({"annotations": {
                "io.kubernetes.cri.sandbox-uid": uid, "io.kubernetes.cri.container-type": kind,
                "io.kubernetes.cri.container-name": "main", "io.kubernetes.cri.sandbox-name": "web-0"},
                "mounts": [{"destination": "/dev/shm", "source": "/run/shm-of-pod"}]});
            fs::write(bundles.join(id).join("config.json"), config.to_string()).unwrap();
            let state =
                serde_json::json!({"init_process_pid": pid, "init_process_start": start, "cgroup_paths": {"": "/sys"}});
            fs::write(runc.join(id).join("state.json"), state.to_string()).unwrap();
        }
        let pod = find_in(&bundles, &runc, "u").unwrap();
        assert_eq!((pod.sandbox_id.as_str(), pod.name.as_str()), ("s", "web-0"));
        assert_eq!(pod.containers.len(), 1);
        assert_eq!(pod.containers[0].shm.as_deref(), Some(Path::new("/run/shm-of-pod")));
        assert!(matches!(find_in(&bundles, &runc, "nobody"), Err(Error::NoSandbox(_))));
        fs::remove_dir_all(dir).unwrap();
    }
}
