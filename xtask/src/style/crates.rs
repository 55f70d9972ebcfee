//! Which crate may use which. A crate exists for a guarantee that the compiler then keeps.

use std::path::Path;

use anyhow::{Context as _, Result};
use toml::Table;

use super::Source;

/// What a crate guarantees.
struct Rule {
    name: &'static str,
    /// Crates of this workspace that it may use.
    ours: &'static [&'static str],
    /// Other crates that would break its guarantee.
    never: &'static [&'static str],
}

/// Clients of the API server, runtimes and the network.
const NETWORK: &[&str] = &[
    "kube",
    "tokio",
    "tokio-rustls",
    "rustls",
    "hyper",
    "reqwest",
    "k8s-openapi",
];

const RULES: &[Rule] = &[
    // API types and vocabulary; no client (kube only for its derive).
    Rule {
        name: "crds",
        ours: &[],
        never: &["tokio", "nix", "rustls"],
    },
    // No I/O, no clock, no async.
    Rule {
        name: "protocol",
        ours: &[],
        never: &["kube", "tokio", "tokio-rustls", "rustls", "nix", "k8s-openapi", "jiff"],
    },
    // Knows no Kubernetes.
    Rule {
        name: "hostsys",
        ours: &[],
        never: NETWORK,
    },
    // Knows no Kubernetes and no network.
    Rule {
        name: "memory",
        ours: &["protocol", "hostsys"],
        never: NETWORK,
    },
    // Static, small, no network.
    Rule {
        name: "runtime",
        ours: &["protocol", "hostsys"],
        never: NETWORK,
    },
    Rule {
        name: "node-agent",
        ours: &["crds", "protocol", "hostsys", "memory"],
        never: &["anyhow"],
    },
    // No host rights.
    Rule {
        name: "operator",
        ours: &["crds"],
        never: &["anyhow", "nix"],
    },
    Rule {
        name: "e2e",
        ours: &["crds", "protocol", "hostsys", "runtime", "node-agent", "operator"],
        never: &[],
    },
    // Compiles in seconds.
    Rule {
        name: "xtask",
        ours: &["crds"],
        never: &["tokio", "rustls"],
    },
];

pub(super) fn complaints(root: &Path, sources: &[Source]) -> Result<Vec<String>> {
    let workspace = manifest(&root.join("Cargo.toml"))?;
    let members = workspace
        .get("workspace")
        .and_then(|w| w.get("members"))
        .and_then(|m| m.as_array())
        .context("Cargo.toml lists no members")?;
    let members: Vec<&str> = members.iter().filter_map(|m| m.as_str()).collect();
    let mut complaints = Vec::new();
    for member in &members {
        match RULES.iter().find(|rule| rule.name == *member) {
            Some(rule) => complaints.extend(uses(rule, &members, &manifest(&root.join(member).join("Cargo.toml"))?)),
            None => complaints.push(format!("the crate {member} has no rule in xtask/src/style/crates.rs")),
        }
    }
    complaints.extend(sources.iter().filter_map(unsafe_code));
    Ok(complaints)
}

fn manifest(path: &Path) -> Result<Table> {
    let text = std::fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
    text.parse()
        .with_context(|| format!("failed to parse {}", path.display()))
}

fn uses(rule: &Rule, members: &[&str], manifest: &Table) -> Vec<String> {
    let mut complaints = Vec::new();
    let name = rule.name;
    if manifest
        .get("lints")
        .and_then(|l| l.get("workspace"))
        .and_then(toml::Value::as_bool)
        != Some(true)
    {
        complaints.push(format!("{name}/Cargo.toml lacks `[lints] workspace = true`"));
    }
    let Some(dependencies) = manifest.get("dependencies").and_then(|d| d.as_table()) else {
        return complaints;
    };
    for (used, how) in dependencies {
        if members.contains(&used.as_str()) && !rule.ours.contains(&used.as_str()) {
            complaints.push(format!(
                "{name} may not use {used}: see the table of crates in ARCHITECTURE.md"
            ));
        }
        if rule.never.contains(&used.as_str()) {
            complaints.push(format!(
                "{name} may not use the crate {used}: it would break what {name} guarantees"
            ));
        }
        let inherits = how.get("workspace").and_then(|w| w.as_bool()) == Some(true);
        if name == "crds" && used == "kube" && (inherits || features(how).any(|f| f == "client" || f == "runtime")) {
            complaints.push("crds may use kube only for its derive, without a client".to_owned());
        }
    }
    complaints
}

fn features(dependency: &toml::Value) -> impl Iterator<Item = &str> {
    dependency
        .get("features")
        .and_then(|f| f.as_array())
        .into_iter()
        .flatten()
        .filter_map(|f| f.as_str())
}

/// The lint `unsafe_code` is denied everywhere; it may be allowed in `hostsys` alone, and in tests that make by hand what the
/// kernel holds for a process.
fn unsafe_code(file: &Source) -> Option<String> {
    let allows = ["allow(unsafe_code", "expect(unsafe_code"].iter().any(|mark| {
        file.text
            .lines()
            .any(|line| line.trim_start().starts_with('#') && line.contains(mark))
    });
    let test = file.path.iter().nth(1).is_some_and(|folder| folder == "tests");
    (allows && !test && !file.path.starts_with("hostsys"))
        .then(|| format!("{}: unsafe code belongs in the crate hostsys", file.path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(name: &str) -> &'static Rule {
        RULES.iter().find(|rule| rule.name == name).unwrap()
    }

    fn check(name: &str, dependencies: &str) -> Vec<String> {
        let manifest = format!("[lints]\nworkspace = true\n[dependencies]\n{dependencies}")
            .parse()
            .unwrap();
        uses(rule(name), &["crds", "protocol", "hostsys", "operator"], &manifest)
    }

    #[test]
    fn allowed_uses_pass() {
        assert!(check("operator", "crds.workspace = true\nkube.workspace = true").is_empty());
    }

    #[test]
    fn forbidden_uses_are_named() {
        assert!(check("operator", "hostsys.workspace = true")[0].contains("may not use hostsys"));
        assert!(check("protocol", "tokio.workspace = true")[0].contains("tokio"));
        assert!(check("crds", "kube.workspace = true")[0].contains("derive"));
    }

    #[test]
    fn unsafe_is_allowed_in_hostsys_alone() {
        let file = |path: &str| Source {
            path: path.into(),
            text: "#![allow(unsafe_code)]\n".to_owned(),
        };
        assert!(unsafe_code(&file("hostsys/src/lib.rs")).is_none());
        assert!(unsafe_code(&file("runtime/src/lib.rs")).is_some());
    }
}
