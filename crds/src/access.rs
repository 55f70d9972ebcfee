//! API rights of each process, as data: the chart's roles are rendered from it, and tests compare what runs with it.
//!
//! Each process has a *cluster* part (ClusterRole) and a *release* part (Role in the release namespace). What a rule
//! cannot say (an agent may write only its own node's halves) is held by the chart's admission policy.

use k8s_openapi::api::rbac::v1::PolicyRule;

use crate::names;

/// Rights of one process.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rights {
    /// For a ClusterRole.
    pub cluster: Vec<PolicyRule>,
    /// For a Role in the release namespace.
    pub release: Vec<PolicyRule>,
}

fn rule(group: &str, resources: &[&str], verbs: &[&str]) -> PolicyRule {
    PolicyRule {
        api_groups: Some(vec![group.to_owned()]),
        resources: Some(owned(resources)),
        verbs: owned(verbs),
        ..Default::default()
    }
}

fn named(group: &str, resources: &[&str], names: &[&str], verbs: &[&str]) -> PolicyRule {
    PolicyRule {
        resource_names: Some(owned(names)),
        ..rule(group, resources, verbs)
    }
}

fn owned(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

/// Rights of the operator.
#[must_use]
pub fn operator_rules() -> Rights {
    Rights {
        cluster: vec![
            // Finalizers are patched, finished migrations are deleted after their TTL.
            rule(
                names::GROUP,
                &["processmigrations"],
                &["get", "list", "watch", "patch", "delete"],
            ),
            rule(names::GROUP, &["processmigrations/status"], &["get", "patch"]),
            rule(names::GROUP, &["migrationnodes"], &["get", "list", "watch"]),
            // Target pods are created, labelled and disowned; targets of aborted and sources of committed moves are deleted.
            rule("", &["pods"], &["get", "list", "watch", "create", "patch", "delete"]),
            // Access modes tell whether a claim can be used on two nodes.
            rule("", &["persistentvolumeclaims"], &["get"]),
            // The label that says whether a node can take part.
            rule("", &["nodes"], &["get", "list", "watch", "patch"]),
            rule("events.k8s.io", &["events"], &["create", "patch"]),
            rule(
                "certificates.k8s.io",
                &["certificatesigningrequests"],
                &["get", "list", "watch"],
            ),
            rule(
                "certificates.k8s.io",
                &[
                    "certificatesigningrequests/approval",
                    "certificatesigningrequests/status",
                ],
                &["get", "update", "patch"],
            ),
            named(
                "certificates.k8s.io",
                &["signers"],
                &[names::SIGNER],
                &["approve", "sign"],
            ),
        ],
        release: vec![
            // The leader's lease and the agents' heartbeats. `create` cannot be narrowed by name.
            rule("coordination.k8s.io", &["leases"], &["get", "list", "watch", "create"]),
            named(
                "coordination.k8s.io",
                &["leases"],
                &[names::LEASE_LEADER],
                &["update", "patch", "delete"],
            ),
            // Our CA: made once by the leader.
            rule("", &["secrets", "configmaps"], &["create"]),
            named("", &["secrets"], &[names::SECRET_CA], &["get", "patch"]),
            named("", &["configmaps"], &[names::CONFIG_MAP_CA], &["get", "patch"]),
            // Owner of what the operator makes in its namespace, so that an uninstall leaves nothing behind.
            named("apps", &["deployments"], &[names::SERVICE_ACCOUNT_OPERATOR], &["get"]),
        ],
    }
}

/// Rights of a node's agent.
#[must_use]
pub fn agent_rules() -> Rights {
    Rights {
        cluster: vec![
            rule(names::GROUP, &["processmigrations"], &["get", "list", "watch"]),
            rule(names::GROUP, &["processmigrations/status"], &["get", "patch"]),
            rule(
                names::GROUP,
                &["migrationnodes"],
                &["get", "list", "watch", "create", "patch"],
            ),
            rule(names::GROUP, &["migrationnodes/status"], &["get", "patch"]),
            rule("", &["pods"], &["get", "list", "watch"]),
            // Owner reference of the MigrationNode.
            rule("", &["nodes"], &["get"]),
            rule("events.k8s.io", &["events"], &["create", "patch"]),
            rule(
                "certificates.k8s.io",
                &["certificatesigningrequests"],
                &["create", "get", "list", "watch"],
            ),
        ],
        release: vec![
            // Heartbeats: one lease per node, named as the node.
            rule(
                "coordination.k8s.io",
                &["leases"],
                &["get", "create", "update", "patch"],
            ),
            // The CA that agents trust.
            named("", &["configmaps"], &[names::CONFIG_MAP_CA], &["get", "list", "watch"]),
            // The request to undo the installation.
            named(
                "",
                &["configmaps"],
                &[names::CONFIG_MAP_UNINSTALL],
                &["get", "list", "watch"],
            ),
        ],
    }
}

/// Rights of the job that runs before `helm uninstall`. They exist only while it runs.
#[must_use]
pub fn uninstall_rules() -> Rights {
    Rights {
        cluster: vec![
            // Unfinished migrations are canceled, finalizers removed.
            rule(names::GROUP, &["processmigrations"], &["get", "list", "watch", "patch"]),
            rule(names::GROUP, &["migrationnodes"], &["get", "list", "watch", "delete"]),
            // The label that says whether a node can take part is removed.
            rule("", &["nodes"], &["get", "list", "watch", "patch"]),
            rule(
                "certificates.k8s.io",
                &["certificatesigningrequests"],
                &["get", "list", "delete"],
            ),
        ],
        release: vec![
            rule("", &["configmaps"], &["create"]),
            named("", &["configmaps"], &[names::CONFIG_MAP_UNINSTALL], &["get", "patch"]),
            rule("coordination.k8s.io", &["leases"], &["get", "list", "delete"]),
        ],
    }
}

/// Rights of people who move pods (an aggregated or bound ClusterRole).
#[must_use]
pub fn editor_rules() -> Vec<PolicyRule> {
    vec![
        rule(
            names::GROUP,
            &["processmigrations"],
            &["get", "list", "watch", "create", "update", "patch", "delete", "migrate"],
        ),
        rule(names::GROUP, &["migrationnodes"], &["get", "list", "watch"]),
    ]
}

/// The right to name the target node instead of leaving the choice to the scheduler.
#[must_use]
pub fn pin_rules() -> Vec<PolicyRule> {
    vec![rule(names::GROUP, &["processmigrations"], &["pin"])]
}

/// Rights of people who look.
#[must_use]
pub fn viewer_rules() -> Vec<PolicyRule> {
    vec![rule(
        names::GROUP,
        &["processmigrations", "migrationnodes"],
        &["get", "list", "watch"],
    )]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<PolicyRule> {
        [operator_rules(), agent_rules(), uninstall_rules()]
            .into_iter()
            .flat_map(|r| r.cluster.into_iter().chain(r.release))
            .chain(editor_rules())
            .chain(pin_rules())
            .chain(viewer_rules())
            .collect()
    }

    #[test]
    fn no_rule_has_a_wildcard() {
        for rule in all() {
            assert!(!rule.verbs.iter().any(|v| v == "*"));
            assert!(!rule.resources.unwrap_or_default().iter().any(|r| r.contains('*')));
            assert!(!rule.api_groups.unwrap_or_default().iter().any(|g| g == "*"));
        }
    }

    #[test]
    fn agents_can_neither_write_specs_nor_pods_nor_read_secrets() {
        let agent = agent_rules();
        for rule in agent.cluster.iter().chain(&agent.release) {
            let resources = rule.resources.clone().unwrap_or_default();
            let writes = rule
                .verbs
                .iter()
                .any(|v| matches!(v.as_str(), "create" | "update" | "patch" | "delete"));
            assert!(!resources.iter().any(|r| r == "secrets"));
            assert!(
                !writes
                    || !resources
                        .iter()
                        .any(|r| r == "pods" || r == "processmigrations" || r == "nodes")
            );
        }
    }
}
