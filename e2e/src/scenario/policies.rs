//! The chart's admission policies on a real API server: what each agent, and each person, may write and what not.
//!
//! Agents are impersonated with the node that their bound tokens carry, and nothing that they write is stored (dry run).

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use crds::{ProcessMigration, names};
use kube::Resource as _;
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::Request;
use serde_json::{Value, json};

use super::Scenario;
use super::stage::{NAMESPACE, RELEASE_NAMESPACE, Stage};

const TIME: &str = "2026-01-01T00:00:00Z";
const NODE_NAME: &str = "impersonate-extra-authentication.kubernetes.io%2fnode-name";

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("an_agent_writes_only_its_half_of_its_own_nodes_migrations", halves),
        Scenario::new("an_agent_describes_only_its_own_node", own_node),
        Scenario::new("only_who_may_make_pods_may_move_them", people),
    ]
}

fn halves(stage: &Stage, _: &str) -> Result<()> {
    let [source, target, other] = three_nodes(stage)?;
    let name = "policy-halves";
    stage.delete::<ProcessMigration>(name, None)?;
    let migration: ProcessMigration = stage.create(migration(name, json!({})))?;
    stage.wait(
        "the migration of a missing pod to be refused",
        std::time::Duration::from_secs(60),
        || {
            let migration = stage.find::<ProcessMigration>(NAMESPACE, name)?.context("it is gone")?;
            let finished = migration.status.is_some_and(|status| {
                crds::condition::is_true(&status.conditions, crds::process_migration::cond::FINISHED)
            });
            ensure!(finished, "it is not finished");
            Ok(())
        },
    )?;
    // Settled, so that neither operator nor agents touch it: only the policy is asked about it.
    let ready = json!({"status": {
        "source": {"nodeName": source, "podName": "p", "podUid": "u"},
        "target": {"nodeName": target, "podName": "q", "podUid": "v"},
        "decision": {"value": "Undecided"},
    }});
    let path = ProcessMigration::url_path(&(), Some(NAMESPACE));
    let request = Request::new(path.as_str())
        .patch_subresource("status", name, &PatchParams::default(), &Patch::Merge(&ready))
        .context("not a request")?;
    stage
        .block(stage.client().request::<Value>(request))
        .context("cannot prepare the migration")?;
    let uid = migration.metadata.uid.context("a migration without uid")?;

    let (s, t, o) = (Some(source.as_str()), Some(target.as_str()), Some(other.as_str()));
    let status = |status: Value| json!({"status": status});
    let write = |node, change: &Value| patch_status(stage, &path, name, node, &Patch::Merge(change));
    for (what, node, change, word) in [
        (
            "its step by the source",
            s,
            status(json!({"source": {"step": "x"}})),
            None,
        ),
        (
            "progress by the source",
            s,
            status(json!({"progress": {"round": 1}})),
            None,
        ),
        (
            "its step by the target",
            t,
            status(json!({"target": {"step": "x"}})),
            None,
        ),
        (
            "the source half by the target",
            t,
            status(json!({"source": {"step": "x"}})),
            Some("status.source"),
        ),
        (
            "progress by the target",
            t,
            status(json!({"progress": {"round": 1}})),
            Some("status.progress"),
        ),
        (
            "the target half by the source",
            s,
            status(json!({"target": {"step": "x"}})),
            Some("status.target"),
        ),
        (
            "the source's node by the source",
            s,
            status(json!({"source": {"nodeName": other}})),
            Some("operator"),
        ),
        (
            "the phase by the source",
            s,
            status(json!({"phase": "Succeeded"})),
            Some("operator"),
        ),
        (
            "the result by the target",
            t,
            status(json!({"result": {"live": true}})),
            Some("operator"),
        ),
        (
            "anything by another node",
            o,
            status(json!({"source": {"step": "x"}})),
            Some("neither source nor target"),
        ),
        (
            "anything by an unbound token",
            None,
            status(json!({"source": {"step": "x"}})),
            Some("bound to its node"),
        ),
    ] {
        expect(what, word, write(node, &change))?;
    }
    for (what, node, type_, word) in [
        ("MemorySynced by the source", s, "MemorySynced", None),
        ("Restored by the target", t, "Restored", None),
        ("Restored by the source", s, "Restored", Some("only these conditions")),
        (
            "MemorySynced by the target",
            t,
            "MemorySynced",
            Some("only these conditions"),
        ),
        ("Committed by the target", t, "Committed", Some("only these conditions")),
    ] {
        let patch = json!([{"op": "add", "path": "/status/conditions/-", "value": condition(type_)}]);
        expect(what, word, patch_status(stage, &path, name, node, &json_patch(patch)?))?;
    }
    for (what, node, value, by, restored, word) in [
        ("Aborted by the source", s, "Aborted", "Source", false, None),
        ("Aborted by the target", t, "Aborted", "Target", false, None),
        ("Committed by the target", t, "Committed", "Target", true, None),
        (
            "Committed before Restored",
            t,
            "Committed",
            "Target",
            false,
            Some("Restored"),
        ),
        ("Committed by the source", s, "Committed", "Source", false, Some("")),
        (
            "Committed by the source as the target",
            s,
            "Committed",
            "Target",
            false,
            Some(""),
        ),
        (
            "Aborted by the source as the operator",
            s,
            "Aborted",
            "Operator",
            false,
            Some("in its own name"),
        ),
        (
            "Aborted by another node",
            o,
            "Aborted",
            "Source",
            false,
            Some("neither source nor target"),
        ),
    ] {
        let mut patch = vec![
            json!({"op": "test", "path": "/metadata/uid", "value": uid}),
            json!({"op": "test", "path": "/status/decision/value", "value": "Undecided"}),
            json!({"op": "replace", "path": "/status/decision", "value": {"value": value, "by": by, "time": TIME}}),
        ];
        if restored {
            patch.push(json!({"op": "add", "path": "/status/conditions/-", "value": condition("Restored")}));
        }
        expect(
            what,
            word,
            patch_status(stage, &path, name, node, &json_patch(Value::Array(patch))?),
        )?;
    }
    let canceled = json!({"spec": {"desiredState": "Canceled"}});
    expect(
        "the spec by the source",
        Some("cannot patch"),
        patch(stage, &path, name, s, &Patch::Merge(&canceled)),
    )?;
    stage.delete::<ProcessMigration>(name, None)
}

fn own_node(stage: &Stage, _: &str) -> Result<()> {
    let [mine, other, _] = three_nodes(stage)?;
    let me = Some(mine.as_str());
    let nodes = crds::MigrationNode::url_path(&(), None);
    let endpoint = json!({"status": {"endpoint": "192.0.2.1:9632"}});
    let unschedulable = json!({"spec": {"schedulable": false}});
    let leases = format!("/apis/coordination.k8s.io/v1/namespaces/{RELEASE_NAMESPACE}/leases");
    let renewed = json!({"spec": {"leaseDurationSeconds": 40}});
    for (what, result, word) in [
        (
            "its own node",
            patch_status(stage, &nodes, &mine, me, &Patch::Merge(&endpoint)),
            None,
        ),
        (
            "another node",
            patch_status(stage, &nodes, &other, me, &Patch::Merge(&endpoint)),
            Some("only that node"),
        ),
        (
            "whether it may be used",
            patch(stage, &nodes, &mine, me, &Patch::Merge(&unschedulable)),
            Some("for people"),
        ),
        (
            "its own lease",
            patch(stage, &leases, &mine, me, &Patch::Merge(&renewed)),
            None,
        ),
        (
            "another node's lease",
            patch(stage, &leases, &other, me, &Patch::Merge(&renewed)),
            Some("of that name"),
        ),
        (
            "the leader's lease",
            patch(stage, &leases, names::LEASE_LEADER, me, &Patch::Merge(&renewed)),
            Some("of that name"),
        ),
    ] {
        expect(what, word, result)?;
    }
    Ok(())
}

fn people(stage: &Stage, _: &str) -> Result<()> {
    let bind = |user: &str, role: &str, verbs: &[&str]| -> Result<()> {
        let name = format!("policy-{user}-{role}");
        if !verbs.is_empty() {
            stage.apply(&json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
                "metadata": {"name": role, "namespace": NAMESPACE},
                "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": verbs}]}))?;
        }
        let kind = if verbs.is_empty() { "ClusterRole" } else { "Role" };
        stage.apply(
            &json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role},
            "subjects": [{"kind": "User", "name": user, "apiGroup": "rbac.authorization.k8s.io"}]}),
        )
    };
    for (user, role) in [
        ("ann", "peregrine-editor"),
        ("bob", "peregrine-editor"),
        ("cid", "peregrine-editor"),
        ("cid", "peregrine-pin"),
    ] {
        bind(user, role, &[])?;
    }
    for user in ["bob", "cid"] {
        bind(user, "policy-podmaker", &["create", "delete"])?;
    }
    let [node, ..] = three_nodes(stage)?;
    let anywhere = json!({});
    let pinned = json!({"target": {"nodeName": node}});
    let chosen = json!({"target": {"nodeSelector": {"kubernetes.io/os": "linux"}}});
    for (what, user, spec, word) in [
        ("a move by a stranger", "eve", &anywhere, Some("cannot create")),
        (
            "a move by who may not make pods",
            "ann",
            &anywhere,
            Some("verbs `create` and `delete` on pods"),
        ),
        ("a move by who may make pods", "bob", &anywhere, None),
        (
            "a move to a named node without `pin`",
            "bob",
            &pinned,
            Some("verb `pin`"),
        ),
        ("a move to chosen nodes without `pin`", "bob", &chosen, None),
        ("a move to a named node", "cid", &pinned, None),
    ] {
        let path = ProcessMigration::url_path(&(), Some(NAMESPACE));
        let body = serde_json::to_vec(&migration("policy-people", spec.clone())).context("not JSON")?;
        let request = Request::new(path).create(
            &PostParams {
                dry_run: true,
                ..PostParams::default()
            },
            body,
        );
        expect(what, word, send(stage, request.context("not a request")?, user, None))?;
    }
    Ok(())
}

fn migration(name: &str, mut spec: Value) -> Value {
    spec["podRef"] = json!({"name": "no-such-pod"});
    let metadata: BTreeMap<&str, &str> = [("name", name), ("namespace", NAMESPACE)].into();
    json!({"apiVersion": "peregrine.dev/v1alpha1", "kind": "ProcessMigration", "metadata": metadata, "spec": spec})
}

fn condition(type_: &str) -> Value {
    json!({"type": type_, "status": "True", "reason": "Tried", "message": "", "lastTransitionTime": TIME})
}

fn json_patch(patch: Value) -> Result<Patch<Value>> {
    Ok(Patch::Json(serde_json::from_value(patch).context("not a JSON patch")?))
}

fn three_nodes(stage: &Stage) -> Result<[String; 3]> {
    let nodes: Vec<String> = stage.nodes().iter().take(3).cloned().collect();
    <[String; 3]>::try_from(nodes).ok().context("this needs three nodes")
}

/// The outcome must be as told; a refusal must say why.
fn expect(what: &str, refusal: Option<&str>, result: Result<Value>) -> Result<()> {
    match (refusal, result) {
        (None, result) => result.map(drop).with_context(|| format!("{what} was refused")),
        (Some(_), Ok(_)) => anyhow::bail!("{what} was accepted"),
        (Some(word), Err(error)) => {
            let text = format!("{error:#}");
            ensure!(
                text.contains(word),
                "{what} was refused, but not because of `{word}`: {text}"
            );
            Ok(())
        }
    }
}

fn patch_status<T: serde::Serialize + std::fmt::Debug>(
    stage: &Stage,
    path: &str,
    name: &str,
    node: Option<&str>,
    patch: &Patch<T>,
) -> Result<Value> {
    let request = Request::new(path)
        .patch_subresource("status", name, &dry(), patch)
        .context("not a request")?;
    send(stage, request, &agent(), node)
}

fn patch<T: serde::Serialize + std::fmt::Debug>(
    stage: &Stage,
    path: &str,
    name: &str,
    node: Option<&str>,
    patch: &Patch<T>,
) -> Result<Value> {
    let request = Request::new(path).patch(name, &dry(), patch).context("not a request")?;
    send(stage, request, &agent(), node)
}

fn dry() -> PatchParams {
    PatchParams {
        dry_run: true,
        ..PatchParams::default()
    }
}

fn agent() -> String {
    format!(
        "system:serviceaccount:{RELEASE_NAMESPACE}:{}",
        names::SERVICE_ACCOUNT_AGENT
    )
}

/// Sends a request as somebody else.
fn send(stage: &Stage, mut request: http::Request<Vec<u8>>, user: &str, node: Option<&str>) -> Result<Value> {
    let headers = request.headers_mut();
    headers.insert("impersonate-user", user.parse().context("not a user's name")?);
    headers.append(
        "impersonate-group",
        "system:authenticated".parse().context("not a group's name")?,
    );
    if let Some(node) = node {
        headers.insert(NODE_NAME, node.parse().context("not a node's name")?);
    }
    stage.block(stage.client().request::<Value>(request))
}
