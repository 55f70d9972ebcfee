//! What the wrapper reads from a bundle's config.json. The kubelet and containerd wrote it; the annotations that are
//! compared here come from the CRI request, not from the pod's author, except for the one of the migration.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use protocol::hand_off::ANNOTATION_TARGET_OF;
use serde::Deserialize;

/// A config.json is refused beyond this size.
const MAX_CONFIG: u64 = 16 * 1024 * 1024;

/// Why a bundle could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("failed to read {}", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
    /// Its content.
    #[error("{} is no OCI configuration", .0.display())]
    Parse(PathBuf, #[source] serde_json::Error),
    /// Its size.
    #[error("{} is larger than {MAX_CONFIG} bytes", .0.display())]
    TooLarge(PathBuf),
}

/// The part of config.json that matters here.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub struct Spec {
    annotations: BTreeMap<String, String>,
    process: Process,
    root: Root,
    mounts: Vec<Mount>,
    linux: Linux,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default)]
struct Process {
    terminal: bool,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default)]
struct Root {
    path: String,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default)]
struct Mount {
    destination: String,
    source: String,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default, rename_all = "camelCase")]
struct Linux {
    cgroups_path: String,
    namespaces: Vec<Namespace>,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default)]
struct Namespace {
    r#type: String,
    path: String,
}

/// What a container is to Kubernetes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The pod's sandbox.
    Sandbox,
    /// A container in it.
    Container,
    /// Not made by a kubelet.
    Other,
}

/// Whose container it is, from the CRI request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The pod's uid.
    pub pod_uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub pod_name: String,
    /// The container's name in the pod's spec; empty for a sandbox.
    pub container: String,
}

impl Spec {
    /// Reads a bundle's configuration.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn read(bundle: &Path) -> Result<Self, Error> {
        let path = bundle.join("config.json");
        let file = File::open(&path).map_err(|source| Error::Read(path.clone(), source))?;
        let mut text = Vec::new();
        file.take(MAX_CONFIG + 1)
            .read_to_end(&mut text)
            .map_err(|source| Error::Read(path.clone(), source))?;
        if text.len() as u64 > MAX_CONFIG {
            return Err(Error::TooLarge(path));
        }
        serde_json::from_slice(&text).map_err(|source| Error::Parse(path, source))
    }

    /// Sandbox or container, by containerd's annotation or CRI-O's.
    #[must_use]
    pub fn role(&self) -> Role {
        match self.annotation("io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType") {
            Some("sandbox") => Role::Sandbox,
            Some("container") => Role::Container,
            Some(_) | None => Role::Other,
        }
    }

    /// Whose container it is.
    #[must_use]
    pub fn identity(&self) -> Identity {
        let text = |containerd, crio| self.annotation(containerd, crio).unwrap_or_default().to_owned();
        Identity {
            pod_uid: text("io.kubernetes.cri.sandbox-uid", "io.kubernetes.pod.uid"),
            namespace: text("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace"),
            pod_name: text("io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name"),
            container: text("io.kubernetes.cri.container-name", "io.kubernetes.container.name"),
        }
    }

    /// The uid of the migration whose target the pod says to be.
    #[must_use]
    pub fn target_of(&self) -> Option<&str> {
        self.annotations.get(ANNOTATION_TARGET_OF).map(String::as_str)
    }

    /// Whether the container has a terminal of its own.
    #[must_use]
    pub fn has_terminal(&self) -> bool {
        self.process.terminal
    }

    /// The root file system's mount.
    #[must_use]
    pub fn rootfs(&self, bundle: &Path) -> PathBuf {
        bundle.join(&self.root.path)
    }

    /// What is mounted as /dev/shm from the node.
    #[must_use]
    pub fn shm(&self) -> Option<&str> {
        let mount = self.mounts.iter().find(|mount| mount.destination == "/dev/shm")?;
        // A tmpfs of the container's own has no folder on the node.
        Some(mount.source.as_str()).filter(|source| source.starts_with('/'))
    }

    /// The network namespace that the container shares; none where it has the node's or a fresh one.
    #[must_use]
    pub fn network_namespace(&self) -> Option<&Path> {
        let namespace = self
            .linux
            .namespaces
            .iter()
            .find(|namespace| namespace.r#type == "network")?;
        Some(Path::new(&namespace.path)).filter(|path| path.is_absolute())
    }

    /// The container's cgroup below the mount of the v2 hierarchy; none where the configuration leaves it to the runtime.
    #[must_use]
    pub fn cgroup(&self, systemd: bool) -> Option<PathBuf> {
        let path = &self.linux.cgroups_path;
        if systemd {
            systemd_cgroup(path)
        } else {
            Some(PathBuf::from(path.strip_prefix('/')?)).filter(|p| is_plain(p))
        }
    }

    fn annotation(&self, containerd: &str, crio: &str) -> Option<&str> {
        self.annotations
            .get(containerd)
            .or_else(|| self.annotations.get(crio))
            .map(String::as_str)
    }
}

fn is_plain(path: &Path) -> bool {
    path.components().next().is_some()
        && path
            .components()
            .all(|part| matches!(part, std::path::Component::Normal(_)))
}

/// `kubepods-burstable-podX.slice:cri-containerd:ID` is `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podX.slice/
/// cri-containerd-ID.scope`: each dash in a slice's name is a level.
fn systemd_cgroup(path: &str) -> Option<PathBuf> {
    let mut parts = path.splitn(3, ':');
    let (slice, prefix, name) = (parts.next()?, parts.next()?, parts.next()?);
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(".slice").filter(|stem| !stem.is_empty())?;
    let mut folder = PathBuf::new();
    if stem != "-" {
        let mut so_far = String::new();
        for part in stem.split('-') {
            if part.is_empty() {
                return None;
            }
            if !so_far.is_empty() {
                so_far.push('-');
            }
            so_far.push_str(part);
            folder.push(format!("{so_far}.slice"));
        }
    }
    // runc makes a scope of the unit unless its name says otherwise.
    let unit = match (prefix, name.ends_with(".slice")) {
        (_, true) => name.to_owned(),
        ("", false) => format!("{name}.scope"),
        (prefix, false) => format!("{prefix}-{name}.scope"),
    };
    let is_one_name = !unit.contains('/');
    folder.push(unit);
    Some(folder).filter(|path| is_one_name && is_plain(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Spec {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn cgroup_paths_of_both_drivers() {
        for (path, systemd, expected) in [
            ("/kubepods/pod1/abc", false, Some("kubepods/pod1/abc")),
            ("/a/../../b", false, None),
            ("", false, None),
            ("/", false, None),
            ("relative", false, None),
            (
                "kubepods-burstable-pod1.slice:cri-containerd:abc",
                true,
                Some("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope"),
            ),
            (":runc:x", true, Some("system.slice/runc-x.scope")),
            ("-.slice::x", true, Some("x.scope")),
            ("a--b.slice:c:d", true, None),
            ("/kubepods/pod1", true, None),
            ("a.slice:c:../d", true, None),
        ] {
            let spec = spec(&format!(r#"{{"linux":{{"cgroupsPath":"{path}"}}}}"#));
            assert_eq!(spec.cgroup(systemd), expected.map(PathBuf::from), "{path}");
        }
    }

    #[test]
    fn a_container_of_containerd_is_understood() {
        let spec = spec(
            r#"{"ociVersion":"1.2.1","process":{"terminal":false,"user":{"uid":0}},"root":{"path":"rootfs"},
            "mounts":[{"destination":"/proc","type":"proc","source":"proc"},{"destination":"/dev/shm","source":"/run/x/shm"}],
            "annotations":{"io.kubernetes.cri.container-type":"container","io.kubernetes.cri.container-name":"c",
              "io.kubernetes.cri.sandbox-uid":"u","io.kubernetes.cri.sandbox-namespace":"n","io.kubernetes.cri.sandbox-name":"p",
              "peregrine.dev/target-of":"m"},
            "linux":{"namespaces":[{"type":"pid"},{"type":"network","path":"/var/run/netns/x"}]}}"#,
        );
        assert_eq!(spec.role(), Role::Container);
        assert_eq!(spec.target_of(), Some("m"));
        assert_eq!(spec.shm(), Some("/run/x/shm"));
        assert_eq!(spec.network_namespace(), Some(Path::new("/var/run/netns/x")));
        assert_eq!(spec.rootfs(Path::new("/b")), Path::new("/b/rootfs"));
        let identity = spec.identity();
        assert_eq!(
            (
                &*identity.pod_uid,
                &*identity.namespace,
                &*identity.pod_name,
                &*identity.container
            ),
            ("u", "n", "p", "c")
        );
    }
}
