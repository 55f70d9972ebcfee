//! etcd, API server, controller manager, scheduler and a kube-proxy, as one machine: its kube-proxy is how webhooks behind Services are reached.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::machine_spec::{Condition, Service};
use super::topology::{API_PORT, CONTROL_PLANE, Member, POD_NETWORK, SERVICE_NETWORK};

/// Where a machine has the folder with the Kubernetes components.
pub(super) const KUBE: &str = "/usr/local/lib/kube";
/// Where a machine has the files that are written for it.
pub(super) const CONFIG: &str = "/etc/kubernetes";
/// The API server's service, for orders to stop and start it.
pub(super) const API_SERVER: &str = "kube-apiserver";
const ETCD: &str = "127.0.0.1:2379";

/// The address of the API server on the cluster's network.
pub(super) fn api_address() -> SocketAddr {
    SocketAddr::from((Member::ControlPlane.address(), API_PORT))
}

/// The same as a URL.
pub(super) fn api_url() -> String {
    format!("https://{}", api_address())
}

/// A flag with a file of the configuration folder.
fn file(flag: &str, name: &str) -> String {
    format!("--{flag}={CONFIG}/{name}")
}

/// All services of the control plane.
pub(super) fn services() -> Vec<Service> {
    let service = |name: &str, after: Vec<Condition>, argv: Vec<String>| Service {
        name: name.to_owned(),
        after,
        before: Vec::new(),
        argv,
    };
    let with_api = || vec![Condition::Tcp(api_address().to_string())];
    vec![
        service("etcd", Vec::new(), etcd()),
        service(API_SERVER, vec![Condition::Tcp(ETCD.to_owned())], api_server()),
        service("kube-controller-manager", with_api(), controller_manager()),
        service("kube-scheduler", with_api(), scheduler()),
        service("kube-proxy", with_api(), proxy()),
    ]
}

fn etcd() -> Vec<String> {
    let peer = "http://127.0.0.1:2380";
    let client = format!("http://{ETCD}");
    vec![
        "/usr/bin/etcd".to_owned(),
        "--name=default".to_owned(),
        "--data-dir=/var/lib/etcd".to_owned(),
        // The machine's loss is never survived by this cluster: nothing is gained by waiting for the disk.
        "--unsafe-no-fsync".to_owned(),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
    ]
}

fn api_server() -> Vec<String> {
    let address = Member::ControlPlane.address();
    vec![
        format!("{KUBE}/{API_SERVER}"),
        format!("--etcd-servers=http://{ETCD}"),
        format!("--bind-address={address}"),
        format!("--advertise-address={address}"),
        format!("--secure-port={API_PORT}"),
        format!("--service-cluster-ip-range={SERVICE_NETWORK}"),
        file("tls-cert-file", "apiserver.crt"),
        file("tls-private-key-file", "apiserver.key"),
        file("client-ca-file", "ca.crt"),
        file("kubelet-certificate-authority", "ca.crt"),
        file("kubelet-client-certificate", "apiserver-kubelet-client.crt"),
        file("kubelet-client-key", "apiserver-kubelet-client.key"),
        // Nodes' names are in no DNS.
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--allow-privileged=true".to_owned(),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
        file("service-account-key-file", "sa.pub"),
        file("service-account-signing-key-file", "sa.key"),
        file("requestheader-client-ca-file", "front-proxy-ca.crt"),
        "--requestheader-allowed-names=front-proxy-client".to_owned(),
        "--requestheader-extra-headers-prefix=X-Remote-Extra-".to_owned(),
        "--requestheader-group-headers=X-Remote-Group".to_owned(),
        "--requestheader-username-headers=X-Remote-User".to_owned(),
        file("proxy-client-cert-file", "front-proxy-client.crt"),
        file("proxy-client-key-file", "front-proxy-client.key"),
        // There is only this one: no lease to tell others about it.
        "--endpoint-reconciler-type=master-count".to_owned(),
        "--profiling=false".to_owned(),
    ]
}

fn controller_manager() -> Vec<String> {
    let kubeconfig = "controller-manager.kubeconfig";
    vec![
        format!("{KUBE}/kube-controller-manager"),
        file("kubeconfig", kubeconfig),
        file("authentication-kubeconfig", kubeconfig),
        file("authorization-kubeconfig", kubeconfig),
        file("client-ca-file", "ca.crt"),
        file("root-ca-file", "ca.crt"),
        file("cluster-signing-cert-file", "ca.crt"),
        file("cluster-signing-key-file", "ca.key"),
        file("service-account-private-key-file", "sa.key"),
        "--use-service-account-credentials=true".to_owned(),
        "--controllers=*,bootstrap-signer-controller,token-cleaner-controller".to_owned(),
        "--allocate-node-cidrs=false".to_owned(),
        format!("--cluster-cidr={POD_NETWORK}"),
        format!("--service-cluster-ip-range={SERVICE_NETWORK}"),
        "--bind-address=127.0.0.1".to_owned(),
        // The only one: it starts at once, also after it was killed.
        "--leader-elect=false".to_owned(),
        "--profiling=false".to_owned(),
    ]
}

fn scheduler() -> Vec<String> {
    let kubeconfig = "scheduler.kubeconfig";
    vec![
        format!("{KUBE}/kube-scheduler"),
        file("kubeconfig", kubeconfig),
        file("authentication-kubeconfig", kubeconfig),
        file("authorization-kubeconfig", kubeconfig),
        "--bind-address=127.0.0.1".to_owned(),
        "--leader-elect=false".to_owned(),
        "--profiling=false".to_owned(),
    ]
}

/// kube-proxy's command line, for nodes as well.
pub(super) fn proxy() -> Vec<String> {
    vec![format!("{KUBE}/kube-proxy"), file("config", "proxy.json")]
}

/// kube-proxy's configuration.
pub(super) fn proxy_config(name: &str) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "hostnameOverride": name,
        "clientConnection": {"kubeconfig": format!("{CONFIG}/proxy.kubeconfig")},
        "clusterCIDR": POD_NETWORK,
        "bindAddress": "0.0.0.0",
        "metricsBindAddress": "127.0.0.1:10249",
        // The limit of tracked connections is the whole kernel's: not ours to change.
        "conntrack": {"maxPerCore": 0, "min": 0},
        // A client sees the new endpoints of a Service quickly.
        "nftables": {"minSyncPeriod": "0.1s"},
    })
}

/// Files of the PKI that the control plane reads.
pub(super) fn files() -> Vec<&'static str> {
    vec![
        "ca.crt",
        "ca.key",
        "sa.key",
        "sa.pub",
        "apiserver.crt",
        "apiserver.key",
        "apiserver-kubelet-client.crt",
        "apiserver-kubelet-client.key",
        "front-proxy-ca.crt",
        "front-proxy-client.crt",
        "front-proxy-client.key",
    ]
}

/// Users of the control plane's own programs, by the name of their kubeconfig.
pub(super) const USERS: [&str; 3] = ["controller-manager", "scheduler", "proxy"];

/// Folders of the control plane that outlast its machine's death.
pub(super) fn disks() -> Vec<(&'static str, PathBuf)> {
    vec![("log", "/var/log".into()), ("etcd", "/var/lib/etcd".into())]
}

/// The control plane's name, for those who need it as a host name.
pub(super) fn name() -> &'static str {
    CONTROL_PLANE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_that_is_named_is_provided() {
        let kubeconfigs: Vec<String> = USERS.iter().map(|user| format!("{user}.kubeconfig")).collect();
        for service in services() {
            for argument in &service.argv {
                if let Some((_, name)) = argument.split_once(&format!("={CONFIG}/")) {
                    assert!(
                        files().contains(&name)
                            || kubeconfigs.iter().any(|config| config == name)
                            || name == "proxy.json",
                        "{argument} of {}",
                        service.name
                    );
                }
            }
        }
    }

    #[test]
    fn nodes_have_the_rights_of_nodes_only() {
        let argv = api_server();
        assert!(
            argv.contains(&"--authorization-mode=Node,RBAC".to_owned())
                && argv.contains(&"--enable-admission-plugins=NodeRestriction".to_owned())
        );
        assert!(
            !argv
                .iter()
                .any(|argument| argument.contains("token-auth-file") || argument.contains("AlwaysAllow"))
        );
    }
}
