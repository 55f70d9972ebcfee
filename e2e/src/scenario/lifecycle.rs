//! The release comes, goes and changes; moves under way end with one copy, nodes end as they were.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use crds::ProcessMigration;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::api::Api;
use serde_json::json;

use super::Scenario;
use super::moves::{Move, SETTLED, follow, is_settled, is_true, move_to, phase, story};
use super::stage::{NAMESPACE, RELEASE_NAMESPACE, Stage};
use super::subject::{Plan, Subject};
use super::{install, runner};
use crate::invariants;

pub(super) fn scenarios() -> Vec<Scenario> {
    let long = |name: &str, play| {
        Scenario {
            limit: Duration::from_secs(420),
            ..Scenario::new(name, play)
        }
        .own_cluster()
    };
    vec![
        long(
            "an_upgrade_of_the_agents_with_a_move_under_way_leaves_one_copy",
            upgrade,
        ),
        long("an_uninstall_with_a_move_under_way_leaves_one_copy", uninstall_busy),
        long("an_uninstall_while_idle_leaves_the_nodes_as_they_were", uninstall_idle),
    ]
}

/// The agents are replaced, node after node, while a pod is on its way.
fn upgrade(stage: &Stage, _: &str) -> Result<()> {
    let mut subject = Subject::start(
        stage,
        &Plan {
            mib: 512,
            ..Plan::small("upgrade")
        },
    )?;
    let migration = Move::create(stage, &subject.pod, None, &json!({}))?;
    migration.wait(stage, "begun", SETTLED, |migration| {
        phase(migration).is_some_and(|phase| phase.as_str() != "Pending")
    })?;
    let mut values = install::with_faults();
    // Any change of the pod template is an upgrade to the DaemonSet.
    values.extend([
        r#"agent.extraEnv[1].name="PEREGRINE_E2E_GENERATION""#.to_owned(),
        format!(r#"agent.extraEnv[1].value="{}""#, std::process::id()),
    ]);
    install::install(stage, &values)?;
    let settled = migration.settled(stage)?;
    if is_true(&settled, "Committed") {
        follow(&mut subject, &settled)?;
    }
    subject.check(stage)?;
    invariants::one_life(stage, &subject)?;
    invariants::exactly_one(stage, &subject)?;
    invariants::nothing_left(stage)?;
    move_to(stage, &mut subject, None)?;
    invariants::one_life(stage, &subject)?;
    subject.remove(stage)
}

/// What the installation put on a node, a line each. /var/lib/peregrine itself is a disk of our machines.
const INSTALLED: &str = r"
for f in /opt/peregrine /var/lib/peregrine /run/peregrine; do [ -e $f ] && find $f -type f; done
grep -rl peregrine /etc/containerd 2>/dev/null
awk '$2 ~ /^\/(run|opt|var\/lib)\/peregrine\// ' /proc/self/mounts
true";

fn uninstall_idle(stage: &Stage, _: &str) -> Result<()> {
    // A moved pod keeps the wrapper on its node: without one, all has to go.
    runner::sweep(stage)?;
    let mut subject = Subject::start(stage, &Plan::small("idle"))?;
    install::uninstall(stage)?;
    gone(stage)?;
    for node in stage.nodes() {
        let left = stage.on_node(node, INSTALLED)?;
        ensure!(
            left.trim().is_empty(),
            "{node} still has {}",
            left.trim().replace('\n', ", ")
        );
    }
    subject.check(stage)?;
    install::install(stage, &install::with_faults())?;
    move_to(stage, &mut subject, None)?;
    invariants::one_life(stage, &subject)?;
    subject.remove(stage)
}

/// The release has no objects left but what it is meant to keep.
fn gone(stage: &Stage) -> Result<()> {
    stage.wait("the release to be gone", Duration::from_secs(60), || {
        let pods: Vec<String> = stage
            .list::<Pod>(RELEASE_NAMESPACE, "")?
            .into_iter()
            .filter_map(|pod| pod.metadata.name)
            .collect();
        ensure!(pods.is_empty(), "there are {}", pods.join(", "));
        let class = stage.block(Api::<RuntimeClass>::all(stage.client()).get_opt(crds::names::RUNTIME_CLASS))?;
        ensure!(class.is_none(), "the RuntimeClass is still there");
        Ok(())
    })
}

fn uninstall_busy(stage: &Stage, _: &str) -> Result<()> {
    let mut subject = Subject::start(
        stage,
        &Plan {
            mib: 512,
            ..Plan::small("busy")
        },
    )?;
    let migration = Move::create(stage, &subject.pod, None, &json!({}))?;
    migration.wait(stage, "begun", SETTLED, |migration| {
        phase(migration).is_some_and(|phase| phase.as_str() != "Pending")
    })?;
    install::uninstall(stage)?;
    gone(stage)?;
    // CRDs are kept, and with them the story; without them, the pod that is there tells it.
    match stage.find::<ProcessMigration>(NAMESPACE, &migration.name)? {
        Some(object) if is_settled(&object) => {
            if is_true(&object, "Committed") {
                follow(&mut subject, &object)?;
            }
        }
        Some(object) => bail!("the migration was left unsettled: {}", story(&object)),
        None => {
            let pods = stage.list::<Pod>(NAMESPACE, &format!("app={}", subject.name))?;
            subject.pod = pods
                .first()
                .and_then(|pod| pod.metadata.name.clone())
                .context("the pod is lost")?;
        }
    }
    subject.check(stage)?;
    invariants::one_life(stage, &subject)?;
    invariants::exactly_one(stage, &subject)?;
    install::install(stage, &install::with_faults())?;
    subject.check(stage)?;
    invariants::nothing_left(stage)?;
    move_to(stage, &mut subject, None)?;
    invariants::one_life(stage, &subject)?;
    subject.remove(stage)
}
