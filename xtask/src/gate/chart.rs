//! The chart: linted and rendered in every way that its values allow, and refusing what they do not.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result};

use super::tally::Outcome;
use crate::repository;

const CHART: &str = "charts/peregrine";

/// Values that must render, beside the defaults.
const ACCEPTED: &[&[&str]] = &[
    &[],
    &["--set", "crds.keep=false"],
    &[
        "--set",
        "crds.install=false,admissionPolicies.enabled=false,uninstall.enabled=false",
    ],
    &[
        "--set",
        "networkPolicy.enabled=true,rbac.aggregateEditor=true,operator.podDisruptionBudget=false,operator.replicas=1",
    ],
    &[
        "--set",
        "imagePullSecrets={one,two},agent.checkpointLimitBytes=8589934592",
    ],
    &[
        "--set",
        "runtimeClass.nodeSelector.pool=moves,agent.nodeSelector.pool=moves",
    ],
];

/// Values that must be refused, with a word of the refusal.
const REFUSED: &[(&str, &str)] = &[
    ("operator.replica=2", "replica"),
    ("operator.replicas=0", "replicas"),
    ("agent.maxUnavailable=0", "maxUnavailable"),
    ("uninstall.timeoutSeconds=forever", "timeoutSeconds"),
];

pub(super) fn run(root: &Path) -> Result<Outcome> {
    let helm = match helm(root) {
        Ok(helm) => helm,
        Err(error) => return Ok(Outcome::Skipped(format!("{error:#}"))),
    };
    let mut complaints = Vec::new();
    let lint = call(&helm, root, &["lint", "--strict", CHART])?;
    if !lint.status.success() {
        complaints.push(format!("helm lint: {}", both(&lint)));
    }
    for values in ACCEPTED {
        let output = template(&helm, root, values)?;
        if output.status.success() {
            complaints.extend(rendered(&String::from_utf8_lossy(&output.stdout), values));
        } else {
            complaints.push(format!("helm template {}: {}", values.join(" "), both(&output)));
        }
    }
    for (value, word) in REFUSED {
        let output = template(&helm, root, &["--set", value])?;
        if output.status.success() {
            complaints.push(format!("values.schema.json accepts --set {value}"));
        } else if !both(&output).contains(word) {
            complaints.push(format!(
                "the refusal of --set {value} does not name {word}: {}",
                both(&output)
            ));
        }
    }
    Ok(Outcome::of(complaints))
}

/// Every document must be one that an API server could take: YAML with a kind and a name.
fn rendered(text: &str, values: &[&str]) -> Vec<String> {
    let mut complaints = Vec::new();
    for document in text.split("\n---\n") {
        match serde_yaml::from_str::<serde_yaml::Value>(document) {
            Ok(serde_yaml::Value::Null) => {}
            Ok(value) => {
                let named = value.get("metadata").and_then(|m| m.get("name")).is_some();
                if value.get("kind").is_none() || !named {
                    complaints.push(format!(
                        "helm template {}: a document without kind or name:\n{document}",
                        values.join(" ")
                    ));
                }
            }
            Err(error) => complaints.push(format!("helm template {}: {error}\n{document}", values.join(" "))),
        }
    }
    complaints
}

fn template(helm: &Path, root: &Path, values: &[&str]) -> Result<Output> {
    let mut arguments = vec!["template", "peregrine", CHART, "--namespace", "peregrine-system"];
    arguments.extend(values);
    call(helm, root, &arguments)
}

fn call(helm: &Path, root: &Path, arguments: &[&str]) -> Result<Output> {
    Command::new(helm)
        .args(arguments)
        .current_dir(root)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("failed to start {}", helm.display()))
}

fn both(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// The helm of the caller, else the pinned one of the harness, which builds it where it is missing.
fn helm(root: &Path) -> Result<PathBuf> {
    if let Some(helm) = std::env::var_os("HELM") {
        return Ok(helm.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    if let Some(helm) = std::env::split_paths(&path)
        .map(|folder| folder.join("helm"))
        .find(|helm| helm.is_file())
    {
        return Ok(helm);
    }
    repository::build_harness(root, repository::Progress::Shown)?;
    let output = repository::harness()?
        .args(["cluster", "helm-path"])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("failed to start the harness")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let helm = text
        .lines()
        .last()
        .map(PathBuf::from)
        .filter(|helm| output.status.success() && helm.is_file());
    helm.context("there is no helm: put one into PATH or name it by HELM")
}
