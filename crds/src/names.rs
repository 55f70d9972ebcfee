//! Every literal name that two programs, or a program and a user, share.

/// API group.
pub const GROUP: &str = "peregrine.dev";
/// API version.
pub const VERSION: &str = "v1alpha1";

/// RuntimeClass and containerd handler of target pods.
pub const RUNTIME_CLASS: &str = "peregrine";

/// Label on a target pod: name of its migration. The operator's and the agents' watches select by it.
pub const LABEL_MIGRATION: &str = "peregrine.dev/migration";
/// Value of [`LABEL_MIGRATION`] for a migration of this name. Names may have 253 characters, label values 63: a longer name
/// is cut (the owner reference, not the label, says whose target a pod is).
#[must_use]
pub fn migration_label(migration: &str) -> &str {
    if migration.len() <= 63 {
        return migration;
    }
    crate::condition::cut(migration, 63).trim_end_matches(['-', '.', '_'])
}
/// Annotation on a target pod: uid of its migration. Passed to the runtime (`pod_annotations`); the wrapper takes a pod
/// that carries it for a target, which never starts without a hand-off. It is never trusted to name a path or a migration.
pub const ANNOTATION_TARGET_OF: &str = "peregrine.dev/target-of";
/// Annotation on a moved pod: the name under which the workload was first created. New names are made from it, so that
/// they do not grow with the number of moves.
pub const ANNOTATION_ORIGINAL_NAME: &str = "peregrine.dev/original-name";
/// Annotation on a target pod until the commit: the user's labels as JSON, which it gets then, also if the source pod's object
/// is gone by that time.
pub const ANNOTATION_LABELS: &str = "peregrine.dev/labels";
/// Prefix of the pod annotations that containerd hands to the wrapper.
pub const POD_ANNOTATIONS: &str = "peregrine.dev/*";

/// Label on nodes whose agent is ready and compatible; value `true`.
pub const LABEL_NODE_READY: &str = "peregrine.dev/ready";

/// Finalizer on a migration while its target pod must not be collected with it.
pub const FINALIZER: &str = "peregrine.dev/migration";

/// Field manager of the operator.
pub const MANAGER_OPERATOR: &str = "peregrine-operator";
/// Field manager of an agent for the source half of a status.
pub const MANAGER_SOURCE: &str = "peregrine-source-agent";
/// Field manager of an agent for the target half of a status.
pub const MANAGER_TARGET: &str = "peregrine-target-agent";
/// Field manager of an agent for its MigrationNode.
pub const MANAGER_NODE: &str = "peregrine-node-agent";
/// Field manager of the one patch that changes the decision.
pub const MANAGER_DECISION: &str = "peregrine-decision";

/// Service account of the agents.
pub const SERVICE_ACCOUNT_AGENT: &str = "node-agent";
/// Service account of the operator.
pub const SERVICE_ACCOUNT_OPERATOR: &str = "operator";

/// Service account of the job that runs before `helm uninstall`.
pub const SERVICE_ACCOUNT_UNINSTALL: &str = "peregrine-uninstall";

/// ConfigMap in the release namespace; its key [`UNINSTALL_KEY`] asks every agent to undo its installation.
pub const CONFIG_MAP_UNINSTALL: &str = "peregrine-uninstall";
/// Key of [`CONFIG_MAP_UNINSTALL`]: when it was asked for. Absent: normal work.
pub const UNINSTALL_KEY: &str = "requested";

/// Signer of the agents' certificates (CertificateSigningRequest `spec.signerName`).
pub const SIGNER: &str = "peregrine.dev/node-agent";
/// ConfigMap in the release namespace that holds our CA certificate (key `ca.crt`); agents trust only it.
pub const CONFIG_MAP_CA: &str = "peregrine-ca";
/// Secret in the release namespace that holds our CA key pair (keys `tls.crt`, `tls.key`); only the operator reads it.
pub const SECRET_CA: &str = "peregrine-ca";
/// DNS name in the certificate of the agent of `node`: the identity that its peers check.
#[must_use]
pub fn agent_dns_name(node: &str) -> String {
    format!("{node}.node-agent.peregrine.dev")
}

/// Default TCP port on which agents listen for their peers (host network).
pub const PORT_AGENT: u16 = 9632;
/// Default TCP port of `/healthz`, `/readyz` and `/metrics` of each process.
pub const PORT_ADMIN: u16 = 9633;

/// Lease of the operator's leader, in the release namespace.
pub const LEASE_LEADER: &str = "peregrine-operator";
