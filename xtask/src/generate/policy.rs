//! Admission policies. An agent has the host's rights on one node; if it is taken over, these keep it from the others.
//!
//! A pod's bound token carries the name of its node, so a policy alone can keep an agent to its half of its own node's
//! migrations. Every field of the status that is not named here is the operator's: a new one is closed to agents from
//! the start.

use anyhow::{Context as _, Result};
use crds::names;
use crds::process_migration::cond;

use super::{Generated, NOTICE};

/// Parts of the status that are not the operator's alone; each has an expression of its own below.
const SHARED: &[&str] = &["source", "target", "progress", "conditions", "decision"];

pub(super) fn file() -> Result<Generated> {
    let mut operators = operators_fields()?;
    operators.sort();
    let policies = POLICIES.map(|[name, why, rules]| {
        POLICY
            .replace("@NAME@", name)
            .replace("@WHY@", why)
            .replace("@RULES@", rules)
    });
    let text = FILE
        .replace("@POLICIES@", &policies.join("---\n"))
        .replace("@NOTICE@", NOTICE)
        .replace("@GROUP@", names::GROUP)
        .replace("@AGENT@", names::SERVICE_ACCOUNT_AGENT)
        .replace("@SIGNER@", names::SIGNER)
        .replace("@SOURCE_CONDITIONS@", &quoted(cond::SOURCE))
        .replace("@TARGET_CONDITIONS@", &quoted(cond::TARGET))
        .replace("@RESTORED@", cond::RESTORED)
        .replace(
            "@IDENTITY@",
            &["source", "target"].map(identity_unchanged).join("\n        && "),
        )
        .replace(
            "@OPERATOR@",
            &operators
                .iter()
                .map(|field| unchanged(field))
                .collect::<Vec<_>>()
                .join("\n        && "),
        );
    Ok(Generated {
        path: "charts/peregrine/templates/admission-policies.yaml".to_owned(),
        text,
    })
}

fn operators_fields() -> Result<Vec<String>> {
    let crd = crds::all_crds()
        .into_iter()
        .find(|crd| crd.spec.names.kind == "ProcessMigration");
    let crd = serde_json::to_value(crd).context("failed to read the CRD")?;
    let status = crd
        .pointer("/spec/versions/0/schema/openAPIV3Schema/properties/status/properties")
        .and_then(|properties| properties.as_object())
        .context("the CRD of ProcessMigration has no status")?;
    Ok(status
        .keys()
        .filter(|field| !SHARED.contains(&field.as_str()))
        .cloned()
        .collect())
}

fn unchanged(field: &str) -> String {
    format!("object.?status.{field} == oldObject.?status.{field}")
}

fn identity_unchanged(half: &str) -> String {
    ["nodeName", "podName", "podUid"]
        .map(|field| unchanged(&format!("{half}.{field}")))
        .join("\n        && ")
}

fn quoted(list: &[&str]) -> String {
    list.iter()
        .map(|item| format!("'{item}'"))
        .collect::<Vec<_>>()
        .join(", ")
}

/// What stands before and behind all policies; `@POLICIES@` is where they are.
const FILE: &str = r#"@NOTICE@{{- if .Values.admissionPolicies.enabled }}
{{- $agent := printf "system:serviceaccount:%s:@AGENT@" .Release.Namespace }}
{{- $node := "request.userInfo.?extra[?'authentication.kubernetes.io/node-name'][?0].orValue('')" }}
@POLICIES@{{- end }}
"#;

/// A policy and its binding.
const POLICY: &str = r#"# @WHY@
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata:
  name: @NAME@
  labels:
    {{- include "peregrine.labels" . | nindent 4 }}
spec:
  failurePolicy: Fail
@RULES@---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata:
  name: @NAME@
  labels:
    {{- include "peregrine.labels" . | nindent 4 }}
spec:
  policyName: @NAME@
  validationActions: [Deny]
"#;

/// Name, reason and rules of each policy.
const POLICIES: [[&str; 3]; 4] = [
    [
        "peregrine-agent-migrations",
        "An agent writes its half of its own node's migrations, and nothing else of them.",
        r#"  matchConstraints:
    resourceRules:
      - apiGroups: [@GROUP@]
        apiVersions: ["*"]
        operations: [CREATE, UPDATE, DELETE]
        resources: [processmigrations, processmigrations/status]
  matchConditions:
    - name: agents
      expression: "request.userInfo.username == '{{ $agent }}'"
  variables:
    - name: node
      expression: {{ $node | quote }}
    - name: isSource
      expression: "oldObject != null && variables.node != '' && oldObject.?status.source.nodeName.orValue('') == variables.node"
    - name: isTarget
      expression: "oldObject != null && variables.node != '' && oldObject.?status.target.nodeName.orValue('') == variables.node"
    - name: mine
      expression: "(variables.isSource ? [@SOURCE_CONDITIONS@] : []) + (variables.isTarget ? [@TARGET_CONDITIONS@] : [])"
    - name: newOther
      expression: "object == null ? [] : object.?status.conditions.orValue([]).filter(c, !(c.type in variables.mine))"
    - name: oldOther
      expression: "oldObject == null ? [] : oldObject.?status.conditions.orValue([]).filter(c, !(c.type in variables.mine))"
  validations:
    - expression: "variables.node != ''"
      reason: Forbidden
      message: an agent must use the token of its own pod, which is bound to its node
    - expression: "request.operation == 'UPDATE' && request.?subResource.orValue('') == 'status'"
      reason: Forbidden
      message: an agent may only change the status of a migration
    - expression: "variables.isSource || variables.isTarget"
      reason: Forbidden
      messageExpression: "'node ' + variables.node + ' is neither source nor target of this migration'"
    - expression: "variables.isSource || (object.?status.source == oldObject.?status.source && object.?status.progress == oldObject.?status.progress)"
      reason: Forbidden
      message: status.source and status.progress belong to the agent of the source node
    - expression: "variables.isTarget || object.?status.target == oldObject.?status.target"
      reason: Forbidden
      message: status.target belongs to the agent of the target node
    - expression: >-
        @IDENTITY@
      reason: Forbidden
      message: which nodes and pods take part is for the operator to say
    - expression: >-
        @OPERATOR@
      reason: Forbidden
      message: this part of the status belongs to the operator
    - expression: "variables.newOther == variables.oldOther"
      reason: Forbidden
      messageExpression: "'node ' + variables.node + ' may set only these conditions: ' + variables.mine.join(', ')"
    # Only the target's agent commits; either side aborts in its own name. That a decision is final is a rule of the CRD.
    - expression: >-
        object.?status.decision == oldObject.?status.decision
        || (has(object.status.decision) && (object.status.decision.value == 'Committed'
        ? variables.isTarget && object.status.decision.?by.orValue('') == 'Target'
        : object.status.decision.value == 'Aborted'
        && ((variables.isSource && object.status.decision.?by.orValue('') == 'Source')
        || (variables.isTarget && object.status.decision.?by.orValue('') == 'Target'))))
      reason: Forbidden
      message: only the agent of the target node may commit, and each agent aborts in its own name
"#,
    ],
    [
        "peregrine-agent-nodes",
        "An agent describes its own node only, and does not say whether it may be used: that is for people.",
        r#"  matchConstraints:
    resourceRules:
      - apiGroups: [@GROUP@]
        apiVersions: ["*"]
        operations: [CREATE, UPDATE, DELETE]
        resources: [migrationnodes, migrationnodes/status]
  matchConditions:
    - name: agents
      expression: "request.userInfo.username == '{{ $agent }}'"
  variables:
    - name: node
      expression: {{ $node | quote }}
  validations:
    - expression: "variables.node != '' && request.name == variables.node"
      reason: Forbidden
      messageExpression: "'the agent of node \"' + variables.node + '\" may describe only that node'"
    - expression: "oldObject == null || object == null || object.?spec == oldObject.?spec"
      reason: Forbidden
      message: the spec of a MigrationNode is for people to set
"#,
    ],
    [
        "peregrine-agent-identity",
        "An agent renews the lease of its own node only, and asks only for certificates of our own signer.",
        r#"  matchConstraints:
    resourceRules:
      - apiGroups: [coordination.k8s.io]
        apiVersions: ["*"]
        operations: [CREATE, UPDATE, DELETE]
        resources: [leases]
      - apiGroups: [certificates.k8s.io]
        apiVersions: ["*"]
        operations: [CREATE]
        resources: [certificatesigningrequests]
  matchConditions:
    - name: agents
      expression: "request.userInfo.username == '{{ $agent }}'"
  variables:
    - name: node
      expression: {{ $node | quote }}
  validations:
    - expression: "variables.node != '' && (request.resource.resource != 'leases' || request.name == variables.node)"
      reason: Forbidden
      messageExpression: "'the agent of node \"' + variables.node + '\" may renew only the lease of that name'"
    - expression: "request.resource.resource != 'certificatesigningrequests' || object.spec.signerName == '@SIGNER@'"
      reason: Forbidden
      message: an agent may ask only for certificates of @SIGNER@
"#,
    ],
    [
        "peregrine-who-may-migrate",
        "A move makes a new pod and ends an old one with the operator's rights, so whoever asks for it must have them too.",
        r#"  matchConstraints:
    resourceRules:
      - apiGroups: [@GROUP@]
        apiVersions: ["*"]
        operations: [CREATE]
        resources: [processmigrations]
  variables:
    - name: migrations
      expression: "authorizer.group('@GROUP@').resource('processmigrations').namespace(request.namespace)"
    - name: pods
      expression: "authorizer.group('').resource('pods').namespace(request.namespace)"
  validations:
    - expression: "variables.migrations.check('migrate').allowed()"
      reason: Forbidden
      message: moving pods needs the verb `migrate` on processmigrations.@GROUP@ in this namespace (ClusterRole peregrine-editor)
    - expression: "variables.pods.check('create').allowed() && variables.pods.check('delete').allowed()"
      reason: Forbidden
      message: a move makes a pod and ends one, so it needs the verbs `create` and `delete` on pods in this namespace
    - expression: "!has(object.spec.target) || !has(object.spec.target.nodeName) || variables.migrations.check('pin').allowed()"
      reason: Forbidden
      message: naming the target node needs the verb `pin` on processmigrations.@GROUP@ in this namespace; leave spec.target out to let the scheduler choose
"#,
    ],
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_of_the_status_has_exactly_one_rule() {
        let text = file().unwrap().text;
        let operators = operators_fields().unwrap();
        assert!(operators.len() > 5, "{operators:?}");
        for field in operators {
            assert!(text.contains(&unchanged(&field)), "{field} is open to agents");
        }
    }

    #[test]
    fn no_mark_of_the_template_is_left() {
        assert!(!file().unwrap().text.contains('@'));
    }
}
