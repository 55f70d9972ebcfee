//! Peregrine on the cluster, by helm as a user does it.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use crds::MigrationNode;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use kube::api::{Api, ListParams};

use super::stage::{RELEASE_NAMESPACE, Stage, output};
use crate::images;

/// Name of the release.
pub const RELEASE: &str = "peregrine";
/// How long the release may take to be at work: agents restart their node's container runtime once.
const AT_WORK: Duration = Duration::from_secs(120);

/// Values with which agents obey the faults of scenarios.
#[must_use]
pub fn with_faults() -> Vec<String> {
    vec![
        r#"agent.extraEnv[0].name="PEREGRINE_ENABLE_FAULT_INJECTION""#.to_owned(),
        r#"agent.extraEnv[0].value="true""#.to_owned(),
        // Scenarios that play side by side do not wait for each other's turn.
        "limits.moves=32".to_owned(),
        "limits.outbound=16".to_owned(),
        "limits.inbound=16".to_owned(),
    ]
}

/// Installs the chart, or upgrades it, and waits until every node can take part in moves. `values` are `--set-json` arguments of helm.
///
/// # Errors
/// If helm refuses, or a node does not become ready in time.
pub fn install(stage: &Stage, values: &[String]) -> Result<()> {
    let chart = images::checkout()?.join("charts/peregrine");
    let mut helm = stage.helm();
    helm.args(["upgrade", "--install", RELEASE]).arg(chart).args([
        "--namespace",
        RELEASE_NAMESPACE,
        "--create-namespace",
    ]);
    for (name, image) in [("operator", &stage.images().operator), ("agent", &stage.images().agent)] {
        helm.args(["--set", &format!("{name}.image={}", image.name())]);
    }
    for value in values {
        helm.args(["--set-json", value]);
    }
    output(helm, "helm upgrade --install")?;
    wait_at_work(stage)
}

/// Waits until the operator, and an agent on each node, are at work.
///
/// # Errors
/// What is not in time.
pub fn wait_at_work(stage: &Stage) -> Result<()> {
    stage.wait("the operator to be available", AT_WORK, || {
        for deployment in stage.list::<Deployment>(RELEASE_NAMESPACE, "")? {
            let name = deployment.metadata.name.unwrap_or_default();
            let (wanted, status) = (
                deployment.spec.replicas.unwrap_or(1),
                deployment.status.unwrap_or_default(),
            );
            ensure!(
                status.observed_generation == deployment.metadata.generation,
                "{name} is not observed yet"
            );
            ensure!(
                status.updated_replicas == Some(wanted)
                    && status.available_replicas == Some(wanted)
                    && status.replicas == Some(wanted),
                "{name}: {status:?}"
            );
        }
        Ok(())
    })?;
    stage.wait("an agent on each node", AT_WORK, || {
        for set in stage.list::<DaemonSet>(RELEASE_NAMESPACE, "")? {
            let status = set.status.unwrap_or_default();
            ensure!(
                status.observed_generation == set.metadata.generation,
                "not observed yet"
            );
            ensure!(
                status.number_ready == status.desired_number_scheduled
                    && status.updated_number_scheduled == Some(status.desired_number_scheduled),
                "{status:?}"
            );
        }
        Ok(())
    })?;
    stage.wait("every node to be ready for moves", AT_WORK, || {
        let nodes = stage
            .block(Api::<MigrationNode>::all(stage.client()).list(&ListParams::default()))?
            .items;
        for name in stage.nodes() {
            let node = nodes
                .iter()
                .find(|node| node.metadata.name.as_ref() == Some(name))
                .with_context(|| format!("there is no MigrationNode {name}"))?;
            let conditions = node
                .status
                .as_ref()
                .map(|status| status.conditions.as_slice())
                .unwrap_or_default();
            for type_ in [
                crds::migration_node::cond::READY,
                crds::migration_node::cond::COMPATIBLE,
            ] {
                match crds::condition::find(conditions, type_) {
                    Some(condition) if condition.status == "True" => {}
                    other => bail!(
                        "{name} is not {type_}: {}",
                        other.map(|condition| condition.message.clone()).unwrap_or_default()
                    ),
                }
            }
        }
        Ok(())
    })
}

/// Removes the release.
///
/// # Errors
/// If helm refuses.
pub fn uninstall(stage: &Stage) -> Result<()> {
    let mut helm = stage.helm();
    helm.args([
        "uninstall",
        RELEASE,
        "--namespace",
        RELEASE_NAMESPACE,
        "--wait",
        "--timeout",
        "3m",
    ]);
    output(helm, "helm uninstall").map(drop)
}
