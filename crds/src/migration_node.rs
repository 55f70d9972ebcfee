//! `MigrationNode` (cluster, named and owned as its Node): what the node's agent found by probing, not by version numbers.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Types of conditions of a MigrationNode.
pub mod cond {
    /// The agent runs, the runtime handler is installed, peers can connect.
    pub const READY: &str = "Ready";
    /// The node can take part in moves; the message names all that is missing.
    pub const COMPATIBLE: &str = "Compatible";
}

/// What people set.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "peregrine.dev",
    version = "v1alpha1",
    kind = "MigrationNode",
    plural = "migrationnodes",
    shortname = "mnode",
    category = "peregrine",
    status = "MigrationNodeStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name":"Compatible","type":"string","jsonPath":".status.conditions[?(@.type=='Compatible')].status"}"#,
    printcolumn = r#"{"name":"Kernel","type":"string","jsonPath":".status.kernel.release"}"#,
    printcolumn = r#"{"name":"CRIU","type":"string","jsonPath":".status.criu.version"}"#,
    printcolumn = r#"{"name":"CRIU Path","type":"string","jsonPath":".status.criu.path","priority":1}"#,
    printcolumn = r#"{"name":"Runtime","type":"string","jsonPath":".status.runtime.version","priority":1}"#,
    printcolumn = r#"{"name":"Message","type":"string","jsonPath":".status.conditions[?(@.type=='Compatible')].message","priority":1}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct MigrationNodeSpec {
    /// Whether the node may be chosen as a target.
    #[serde(default = "yes")]
    pub schedulable: bool,
    /// Most moves to this node at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub max_inbound: Option<u32>,
    /// Most moves from this node at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub max_outbound: Option<u32>,
}

fn yes() -> bool {
    true
}

/// What the agent found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MigrationNodeStatus {
    /// Address and port on which peers connect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// SHA-256 of the agent's present certificate, hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_fingerprint: Option<String>,
    /// Version of the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_version: Option<String>,
    /// Versions of the protocol between agents that it speaks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub protocol_versions: Vec<u32>,
    /// `x86_64` or `aarch64`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    /// The kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelStatus>,
    /// The processor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuStatus>,
    /// CRIU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub criu: Option<CriuStatus>,
    /// The container runtime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime: Option<RuntimeStatus>,
    /// Most bytes of checkpoints that may lie in memory on this node at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_limit_bytes: Option<i64>,
    /// When the agent last probed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe_time: Option<Time>,
    /// See [`cond`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// The kernel, by trying.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KernelStatus {
    /// `uname -r`.
    #[serde(default)]
    pub release: String,
    /// Features that were tried and work, for example `cgroup-v2-freezer`, `userfaultfd-wp-async`, `pagemap-scan`,
    /// `soft-dirty`, `tcp-repair`, `time-namespace`, `inet-diag-destroy`.
    #[serde(default)]
    pub features: Vec<String>,
}

/// The processor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CpuStatus {
    /// Model name, for people.
    #[serde(default)]
    pub model: String,
    /// Feature flags that user space can see, sorted.
    #[serde(default)]
    pub features: Vec<String>,
    /// Size of the extended state area in bytes (x86): an image of a larger one cannot be restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xsave_bytes: Option<u32>,
}

/// CRIU on the node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CriuStatus {
    /// Version, for example `4.2`.
    #[serde(default)]
    pub version: String,
    /// Path on the node.
    #[serde(default)]
    pub path: String,
    /// Whether the agent brought it in its image, because the node has none or one that is too old.
    #[serde(default)]
    pub from_agent_image: bool,
    /// Whether `prlimit64` is answered from /proc/PID/limits because the machine withholds CAP_SYS_RESOURCE.
    #[serde(default)]
    pub limits_from_proc: bool,
}

/// The container runtime.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RuntimeStatus {
    /// `containerd` or `cri-o`.
    #[serde(default)]
    pub name: String,
    /// Its version.
    #[serde(default)]
    pub version: String,
    /// The OCI runtime below the wrapper.
    #[serde(default)]
    pub oci_runtime: String,
    /// Whether the handler `peregrine` is configured and in force.
    #[serde(default)]
    pub handler_installed: bool,
}

impl MigrationNodeStatus {
    /// What running processes of `source` may use and this node does not have, one sentence each. Empty: compatible.
    #[must_use]
    pub fn lacks(&self, source: &MigrationNodeStatus) -> Vec<String> {
        let mut missing = Vec::new();
        if self.architecture != source.architecture {
            missing.push(format!(
                "the architecture is {} and not {}",
                self.architecture.as_deref().unwrap_or("unknown"),
                source.architecture.as_deref().unwrap_or("unknown")
            ));
            return missing;
        }
        if let (Some(mine), Some(theirs)) = (&self.cpu, &source.cpu) {
            let absent: Vec<&str> = theirs
                .features
                .iter()
                .filter(|f| !mine.features.contains(f))
                .map(String::as_str)
                .collect();
            if !absent.is_empty() {
                missing.push(format!("the processor lacks {}", absent.join(", ")));
            }
            if let (Some(m), Some(t)) = (mine.xsave_bytes, theirs.xsave_bytes)
                && m < t
            {
                missing.push(format!("the processor's extended state is {m} bytes and not {t}"));
            }
        } else {
            missing.push("the processors' features are not known".to_owned());
        }
        if let (Some(mine), Some(theirs)) = (&self.kernel, &source.kernel) {
            let absent: Vec<&str> = theirs
                .features
                .iter()
                .filter(|f| !mine.features.contains(f))
                .map(String::as_str)
                .collect();
            if !absent.is_empty() {
                missing.push(format!("the kernel lacks {}", absent.join(", ")));
            }
        }
        if let (Some(mine), Some(theirs)) = (&self.criu, &source.criu)
            && version_numbers(&mine.version) < version_numbers(&theirs.version)
        {
            missing.push(format!(
                "CRIU is {} and the source's images are of {}; install at least that",
                mine.version, theirs.version
            ));
        }
        if !self
            .protocol_versions
            .iter()
            .any(|v| source.protocol_versions.contains(v))
        {
            missing.push("the agents have no protocol version in common".to_owned());
        }
        missing
    }
}

fn version_numbers(version: &str) -> Vec<u32> {
    version.split('.').map_while(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(features: &[&str], criu: &str) -> MigrationNodeStatus {
        MigrationNodeStatus {
            architecture: Some("x86_64".into()),
            cpu: Some(CpuStatus {
                features: features.iter().map(|f| (*f).into()).collect(),
                ..Default::default()
            }),
            criu: Some(CriuStatus {
                version: criu.into(),
                ..Default::default()
            }),
            protocol_versions: vec![1],
            ..Default::default()
        }
    }

    #[test]
    fn a_missing_cpu_feature_is_named() {
        let lacks = node(&["sse2"], "4.2").lacks(&node(&["sse2", "avx512f"], "4.2"));
        assert_eq!(lacks, ["the processor lacks avx512f"]);
        assert!(
            node(&["sse2", "avx512f"], "4.2")
                .lacks(&node(&["sse2"], "4.2"))
                .is_empty()
        );
    }

    #[test]
    fn an_older_criu_does_not_take_newer_images() {
        assert_eq!(node(&[], "4.9").lacks(&node(&[], "4.10")).len(), 1);
        assert!(node(&[], "4.10").lacks(&node(&[], "4.9")).is_empty());
    }
}
