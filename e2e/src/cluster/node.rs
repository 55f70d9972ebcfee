//! A worker: containerd, kubelet and kube-proxy on a machine, and their configuration.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::control_plane::{self, CONFIG, KUBE};
use super::machine_spec::{Condition, Service};
use super::topology::{DNS_SERVICE, Member};

/// The sandbox image, of our own.
pub(super) const PAUSE_IMAGE: &str = "docker.io/local/pause:1";
/// Where a node has images that it imports at its start.
pub(super) const IMAGES: &str = "/usr/local/lib/peregrine-e2e";
/// The runtime that containerd calls.
pub(super) const NODE_RUNC: &str = "/usr/local/sbin/node-runc";
const SOCKET: &str = "/run/containerd/containerd.sock";

/// Folders of a node that outlast its machine's death. An overlay cannot be the upper layer of another, so containerd needs a plain one.
pub(super) fn disks() -> Vec<(&'static str, PathBuf)> {
    vec![
        ("log", "/var/log".into()),
        ("containerd", "/var/lib/containerd".into()),
        ("kubelet", "/var/lib/kubelet".into()),
        ("peregrine", "/var/lib/peregrine".into()),
    ]
}

/// All services of a node.
pub(super) fn services(node: Member) -> Vec<Service> {
    let import: Vec<String> = [
        "/usr/bin/ctr",
        "-n",
        "k8s.io",
        "images",
        "import",
        &format!("{IMAGES}/pause.tar"),
    ]
    .map(str::to_owned)
    .into();
    vec![
        Service {
            name: "containerd".to_owned(),
            after: Vec::new(),
            before: Vec::new(),
            argv: vec!["/usr/bin/containerd".to_owned()],
        },
        Service {
            name: "kubelet".to_owned(),
            after: vec![
                Condition::Socket(SOCKET.into()),
                Condition::Tcp(control_plane::api_address().to_string()),
            ],
            before: vec![import],
            argv: kubelet(node),
        },
        Service {
            name: "kube-proxy".to_owned(),
            after: vec![Condition::Tcp(control_plane::api_address().to_string())],
            before: Vec::new(),
            argv: control_plane::proxy(),
        },
    ]
}

fn kubelet(node: Member) -> Vec<String> {
    vec![
        format!("{KUBE}/kubelet"),
        format!("--config={CONFIG}/kubelet.json"),
        format!("--kubeconfig={CONFIG}/kubelet.kubeconfig"),
        format!("--hostname-override={}", node.name()),
        format!("--node-ip={}", node.address()),
        "--v=2".to_owned(),
    ]
}

/// kubelet's configuration for a node whose cgroup has no controllers.
pub(super) fn kubelet_config() -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": false}, "webhook": {"enabled": true}, "x509": {"clientCAFile": format!("{CONFIG}/ca.crt")}},
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": format!("{CONFIG}/serving.crt"),
        "tlsPrivateKeyFile": format!("{CONFIG}/serving.key"),
        "containerRuntimeEndpoint": format!("unix://{SOCKET}"),
        "clusterDNS": [DNS_SERVICE.to_string()],
        "clusterDomain": "cluster.local",
        "registerNode": true,
        // Scenarios kill programs again and again: each comes back after a second, and not after 10, 20, 40, …
        "crashLoopBackOff": {"maxContainerRestartPeriod": "1s"},
        "readOnlyPort": 0,
        // No controllers: no tree of cgroups per class of service, nothing to enforce in it.
        "cgroupDriver": "cgroupfs",
        "cgroupsPerQOS": false,
        "enforceNodeAllocatable": [],
        "failSwapOn": false,
        "localStorageCapacityIsolation": false,
        "oomScoreAdj": 0,
        // Errors that come from not owning the machine's kernel are no reason to end.
        "featureGates": {"KubeletInUserNamespace": true},
        // All nodes share one disk: its fill level says nothing about a node.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {"nodefs.available": "1%", "nodefs.inodesFree": "1%", "imagefs.available": "1%", "imagefs.inodesFree": "1%", "memory.available": "64Mi"},
    })
}

/// containerd's configuration: stock, but for what a node without cgroup controllers needs. Drop-ins in `conf.d` are how a runtime is added.
pub(super) fn containerd_config() -> String {
    format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
imports = ["/etc/containerd/conf.d/*.toml"]

[grpc]
  address = "{SOCKET}"

[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{PAUSE_IMAGE}"

[plugins."io.containerd.cri.v1.runtime"]
  disable_cgroup = true
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        BinaryName = "{NODE_RUNC}"
        SystemdCgroup = false
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "/etc/cni/net.d"
"#
    )
}

/// The pods' network of a node: routed, not translated, so that a pod's address is seen everywhere.
pub(super) fn cni_config(pod_network: &str) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "peregrine-e2e",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "ipMasq": false,
                // A pod reaches itself through its own Service.
                "hairpinMode": true,
                "ipam": {"type": "host-local", "ranges": [[{"subnet": pod_network}]], "routes": [{"dst": "0.0.0.0/0"}]},
            },
            {"type": "portmap", "backend": "nftables", "capabilities": {"portMappings": true}},
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_installer_can_drop_in_a_runtime() {
        let config: toml::Table = containerd_config().parse().unwrap();
        assert_eq!(config["imports"][0].as_str(), Some("/etc/containerd/conf.d/*.toml"));
        let runtime = &config["plugins"]["io.containerd.cri.v1.runtime"]["containerd"];
        assert_eq!(
            runtime["runtimes"]["runc"]["options"]["BinaryName"].as_str(),
            Some(NODE_RUNC)
        );
        assert_eq!(runtime["default_runtime_name"].as_str(), Some("runc"));
    }

    #[test]
    fn kubelet_asks_who_calls_it() {
        let config = kubelet_config();
        assert_eq!(config["authentication"]["anonymous"]["enabled"], false);
        assert_eq!(config["authorization"]["mode"], "Webhook");
    }

    #[test]
    fn what_must_outlast_a_reboot_is_on_disk() {
        let places: Vec<PathBuf> = disks().into_iter().map(|(_, place)| place).collect();
        for place in [
            "/var/lib/containerd",
            "/var/lib/kubelet",
            "/var/lib/peregrine",
            "/var/log",
        ] {
            assert!(places.contains(&PathBuf::from(place)), "{place}");
        }
    }
}
