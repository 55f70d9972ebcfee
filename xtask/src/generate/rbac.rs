//! Roles and bindings, from [`crds::access`].

use anyhow::{Context as _, Result};
use crds::access::{self, Rights};
use crds::names;
use k8s_openapi::api::rbac::v1::PolicyRule;

use super::{Generated, NOTICE, indent};

/// Annotations of what exists only while the job before an uninstall runs.
const HOOK: &str = "  annotations:
    helm.sh/hook: pre-delete
    helm.sh/hook-weight: \"-5\"
    helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded,hook-failed
";

pub(super) fn files() -> Result<Vec<Generated>> {
    let lasting = [
        process(names::SERVICE_ACCOUNT_OPERATOR, &access::operator_rules(), "")?,
        process(names::SERVICE_ACCOUNT_AGENT, &access::agent_rules(), "")?,
        person("viewer", Some(("aggregateViewer", "view")), &access::viewer_rules())?,
        person("editor", Some(("aggregateEditor", "edit")), &access::editor_rules())?,
        person("pin", None, &access::pin_rules())?,
    ];
    let hook = process(names::SERVICE_ACCOUNT_UNINSTALL, &access::uninstall_rules(), HOOK)?;
    Ok(vec![
        Generated {
            path: "charts/peregrine/templates/rbac.yaml".to_owned(),
            text: format!("{NOTICE}{}", lasting.concat()),
        },
        Generated {
            path: "charts/peregrine/templates/uninstall-rbac.yaml".to_owned(),
            text: format!("{NOTICE}{{{{- if .Values.uninstall.enabled }}}}\n{hook}{{{{- end }}}}\n"),
        },
    ])
}

/// Service account, roles and bindings of one process.
fn process(account: &str, rights: &Rights, annotations: &str) -> Result<String> {
    let cluster_role = if account.starts_with("peregrine") {
        account.to_owned()
    } else {
        format!("peregrine-{account}")
    };
    let labels = format!(
        "  labels:
    {{{{- include \"peregrine.labels\" . | nindent 4 }}}}
    app.kubernetes.io/component: {account}
{annotations}"
    );
    Ok(format!(
        "---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {account}
  namespace: {{{{ .Release.Namespace }}}}
{labels}\
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: {cluster_role}
{labels}\
rules:
{cluster}\
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: {cluster_role}
{labels}\
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: {cluster_role}
subjects:
  - kind: ServiceAccount
    name: {account}
    namespace: {{{{ .Release.Namespace }}}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: {account}
  namespace: {{{{ .Release.Namespace }}}}
{labels}\
rules:
{release}\
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {account}
  namespace: {{{{ .Release.Namespace }}}}
{labels}\
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {account}
subjects:
  - kind: ServiceAccount
    name: {account}
    namespace: {{{{ .Release.Namespace }}}}
",
        cluster = rules(&rights.cluster)?,
        release = rules(&rights.release)?,
    ))
}

/// A role for people. Where a value of `rbac` says so it becomes part of one of the cluster's own roles.
fn person(name: &str, part_of: Option<(&str, &str)>, rights: &[PolicyRule]) -> Result<String> {
    let aggregate = part_of.map_or_else(String::new, |(value, role)| {
        format!(
            "    {{{{- if .Values.rbac.{value} }}}}
    rbac.authorization.k8s.io/aggregate-to-{role}: \"true\"
    {{{{- end }}}}
"
        )
    });
    Ok(format!(
        "---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: peregrine-{name}
  labels:
    {{{{- include \"peregrine.labels\" . | nindent 4 }}}}
{aggregate}\
rules:
{}",
        rules(rights)?
    ))
}

fn rules(rules: &[PolicyRule]) -> Result<String> {
    let text = serde_yaml::to_string(rules).context("failed to render rights")?;
    Ok(indent(&text, 2))
}
