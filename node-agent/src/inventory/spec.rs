//! What a pod's spec says about moving it.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Pod, Volume};

/// Facts of a pod's spec.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSpecFacts {
    /// `hostNetwork`, `hostPID`, `hostIPC`: those that are set.
    pub host_namespaces: Vec<&'static str>,
    /// `shareProcessNamespace: true`.
    pub shares_processes: bool,
    /// `hostUsers: false`.
    pub own_users: bool,
    /// Names of ephemeral containers that run; one that has ended stays in the spec for ever and does no harm.
    pub ephemeral: Vec<String>,
    /// Containers.
    pub containers: Vec<ContainerFacts>,
    /// Init containers that go on running.
    pub sidecars: Vec<String>,
    /// Volumes that a container mounts.
    pub volumes: Vec<VolumeFacts>,
    /// Whether devices are claimed from drivers.
    pub claims: Vec<String>,
}

/// Facts of a container's spec.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerFacts {
    /// Its name.
    pub name: String,
    /// `tty: true`.
    pub tty: bool,
    /// `stdin: true`.
    pub stdin: bool,
    /// Privileged.
    pub privileged: bool,
    /// Devices of device plugins, by resource name.
    pub devices: Vec<String>,
    /// Block volumes.
    pub block_volumes: Vec<String>,
}

/// A volume that a container mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeFacts {
    /// Its name.
    pub name: String,
    /// Its kind, as the field of the API is called.
    pub kind: &'static str,
    /// Where it is mounted.
    pub mount_paths: Vec<String>,
}

/// Kinds of volumes that both nodes can have at once. Of claims only those are let through by the operator, which reads
/// their access modes.
pub const SHARED: [&str; 3] = ["persistentVolumeClaim", "nfs", "image"];
/// Kinds of volumes whose content the kubelet makes from the API: the target's kubelet makes the same.
pub const FROM_THE_API: [&str; 4] = ["configMap", "secret", "downwardAPI", "projected"];

/// Reads the facts.
#[must_use]
pub fn facts(pod: &Pod) -> PodSpecFacts {
    let Some(spec) = &pod.spec else {
        return PodSpecFacts::default();
    };
    let all = || {
        spec.containers.iter().chain(
            spec.init_containers
                .iter()
                .flatten()
                .filter(|c| is_sidecar(c.restart_policy.as_deref())),
        )
    };
    let mounted: BTreeSet<&str> = all()
        .flat_map(|c| c.volume_mounts.iter().flatten())
        .map(|m| m.name.as_str())
        .chain(
            all()
                .flat_map(|c| c.volume_devices.iter().flatten())
                .map(|d| d.name.as_str()),
        )
        .collect();
    let volumes = spec
        .volumes
        .iter()
        .flatten()
        .filter(|volume| mounted.contains(volume.name.as_str()))
        .map(|volume| VolumeFacts {
            name: volume.name.clone(),
            kind: kind(volume),
            mount_paths: all()
                .flat_map(|c| c.volume_mounts.iter().flatten())
                .filter(|m| m.name == volume.name)
                .map(|m| m.mount_path.trim_end_matches('/').to_owned())
                .collect(),
        })
        .collect();
    PodSpecFacts {
        host_namespaces: [
            ("hostNetwork", spec.host_network),
            ("hostPID", spec.host_pid),
            ("hostIPC", spec.host_ipc),
        ]
        .into_iter()
        .filter(|(_, set)| *set == Some(true))
        .map(|(name, _)| name)
        .collect(),
        shares_processes: spec.share_process_namespace == Some(true),
        own_users: spec.host_users == Some(false),
        ephemeral: pod
            .status
            .iter()
            .flat_map(|s| s.ephemeral_container_statuses.iter().flatten())
            .filter(|c| c.state.as_ref().is_some_and(|s| s.running.is_some()))
            .map(|c| c.name.clone())
            .collect(),
        containers: spec
            .containers
            .iter()
            .map(|c| ContainerFacts {
                name: c.name.clone(),
                tty: c.tty == Some(true),
                stdin: c.stdin == Some(true),
                privileged: c.security_context.as_ref().and_then(|s| s.privileged) == Some(true),
                devices: c
                    .resources
                    .iter()
                    .flat_map(|r| r.limits.iter().flatten())
                    .map(|(name, _)| name.clone())
                    // Extended resources have a domain; `hugepages-2Mi`, `cpu`, `memory` do not.
                    .filter(|name| name.contains('/') && !name.starts_with("kubernetes.io/"))
                    .collect(),
                block_volumes: c.volume_devices.iter().flatten().map(|d| d.name.clone()).collect(),
            })
            .collect(),
        sidecars: spec
            .init_containers
            .iter()
            .flatten()
            .filter(|c| is_sidecar(c.restart_policy.as_deref()))
            .map(|c| c.name.clone())
            .collect(),
        volumes,
        claims: spec.resource_claims.iter().flatten().map(|c| c.name.clone()).collect(),
    }
}

fn is_sidecar(restart_policy: Option<&str>) -> bool {
    restart_policy == Some("Always")
}

fn kind(volume: &Volume) -> &'static str {
    [
        (volume.config_map.is_some(), "configMap"),
        (volume.secret.is_some(), "secret"),
        (volume.downward_api.is_some(), "downwardAPI"),
        (volume.projected.is_some(), "projected"),
        (volume.empty_dir.is_some(), "emptyDir"),
        (volume.host_path.is_some(), "hostPath"),
        (volume.persistent_volume_claim.is_some(), "persistentVolumeClaim"),
        (volume.ephemeral.is_some(), "ephemeral"),
        (volume.nfs.is_some(), "nfs"),
        (volume.csi.is_some(), "csi"),
        (volume.image.is_some(), "image"),
        (volume.iscsi.is_some(), "iscsi"),
        (volume.fc.is_some(), "fc"),
    ]
    .into_iter()
    .find(|(is, _)| *is)
    .map_or("of an unknown kind", |(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn facts_are_read_from_a_spec() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p"},
            "status": {"ephemeralContainerStatuses": [
                {"name": "debug", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": {"running": {}}},
                {"name": "over", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": {"terminated": {"exitCode": 0}}},
            ]},
            "spec": {
                "hostPID": true, "hostIPC": false, "shareProcessNamespace": true, "hostUsers": false,
                "ephemeralContainers": [{"name": "debug"}, {"name": "over"}],
                "initContainers": [{"name": "once"}, {"name": "mesh", "restartPolicy": "Always"}],
                "containers": [{
                    "name": "main", "tty": true, "securityContext": {"privileged": true},
                    "resources": {"limits": {"cpu": "1", "example.com/gpu": "1", "hugepages-2Mi": "4Mi"}},
                    "volumeMounts": [{"name": "data", "mountPath": "/data/"}, {"name": "config", "mountPath": "/etc/x"}],
                }],
                "volumes": [
                    {"name": "data", "emptyDir": {}}, {"name": "config", "configMap": {"name": "c"}}, {"name": "unused", "hostPath": {"path": "/"}},
                ],
            },
        }))
        .unwrap();
        let facts = facts(&pod);
        assert_eq!(facts.host_namespaces, ["hostPID"]);
        assert!(facts.shares_processes && facts.own_users);
        assert_eq!(
            (facts.ephemeral.as_slice(), facts.sidecars.as_slice()),
            (["debug".to_owned()].as_slice(), ["mesh".to_owned()].as_slice())
        );
        let main = &facts.containers[0];
        assert!(main.tty && main.privileged && !main.stdin);
        assert_eq!(main.devices, ["example.com/gpu"]);
        let kinds: Vec<_> = facts.volumes.iter().map(|v| (v.name.as_str(), v.kind)).collect();
        assert_eq!(kinds, [("data", "emptyDir"), ("config", "configMap")]);
        assert_eq!(facts.volumes[0].mount_paths, ["/data"]);
    }
}
