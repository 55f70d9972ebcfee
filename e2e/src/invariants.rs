//! I1 to I6 of `design.md`, as checks of a real cluster.
//!
//! I1 no two copies at once, I2 exactly one afterwards, I3 a failure leaves the source as it was, I4 a released source never runs again,
//! I5 nothing is left behind, I6 a new attempt can succeed (that is the next move of the scenario).

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use crds::ProcessMigration;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams};

use crate::scenario::stage::{NAMESPACE, Stage};
use crate::scenario::subject::Subject;

/// How long clean-up may take after a migration is settled.
const CLEAN: Duration = Duration::from_secs(40);

/// I1, as the witness saw it: one life per container, no beat twice, no beat of an old state.
///
/// # Errors
/// What was seen.
pub fn one_life(stage: &Stage, subject: &Subject) -> Result<()> {
    let Some(lives) = subject.lives(stage)? else {
        return Ok(());
    };
    for state in subject.known() {
        ensure!(
            lives.iter().any(|life| life.token == state.token),
            "the witness never heard of {}",
            state.token
        );
    }
    let mut containers = BTreeSet::new();
    for life in lives {
        ensure!(
            life.doubled == 0,
            "two copies of {} {} ran at once: {} beats came twice, from {}",
            life.name,
            life.container,
            life.doubled,
            life.sources.join(", ")
        );
        ensure!(
            life.backward == 0,
            "an old state of {} {} ran: {} beats, from {}",
            life.name,
            life.container,
            life.backward,
            life.sources.join(", ")
        );
        ensure!(
            containers.insert(life.container.clone()),
            "{} {} was started again",
            life.name,
            life.container
        );
    }
    Ok(())
}

/// I2: exactly one pod of the workload exists in the end, and it runs.
///
/// # Errors
/// What else is there.
pub fn exactly_one(stage: &Stage, subject: &Subject) -> Result<()> {
    stage.wait(&format!("exactly one pod of {}", subject.name), CLEAN, || {
        let pods = stage.list::<Pod>(NAMESPACE, "")?;
        let mine: Vec<String> = pods
            .iter()
            .filter(|pod| belongs(pod, &subject.name))
            .map(describe)
            .collect();
        ensure!(
            mine.len() == 1 && mine[0].starts_with(&format!("{} Running", subject.pod)),
            "there are: {}",
            mine.join(", ")
        );
        Ok(())
    })
}

/// No pod of the workload exists.
///
/// # Errors
/// Which one does.
pub fn none(stage: &Stage, subject: &Subject) -> Result<()> {
    stage.wait(&format!("every pod of {} to be gone", subject.name), CLEAN, || {
        let pods = stage.list::<Pod>(NAMESPACE, "")?;
        let mine: Vec<String> = pods
            .iter()
            .filter(|pod| belongs(pod, &subject.name))
            .map(describe)
            .collect();
        ensure!(mine.is_empty(), "there are: {}", mine.join(", "));
        Ok(())
    })
}

/// Whether a pod is this workload's: by its label, or, before the commit, by the name that it was made from.
fn belongs(pod: &Pod, name: &str) -> bool {
    let metadata = &pod.metadata;
    metadata
        .labels
        .as_ref()
        .and_then(|labels| labels.get("app"))
        .is_some_and(|app| app == name)
        || metadata
            .annotations
            .as_ref()
            .and_then(|annotations| annotations.get(crds::names::ANNOTATION_ORIGINAL_NAME))
            .is_some_and(|original| original == name)
}

fn describe(pod: &Pod) -> String {
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.clone())
        .unwrap_or_default();
    let ending = if pod.metadata.deletion_timestamp.is_some() {
        " (ending)"
    } else {
        ""
    };
    format!("{} {phase}{ending}", pod.metadata.name.clone().unwrap_or_default())
}

/// Prints what a migration may have left on a node, a line each. What belongs to a moved pod that lives is filtered by the caller.
const RESIDUE: &str = r#"
export PATH=$PATH:/usr/sbin:/sbin
for f in /run/peregrine/images/* /run/peregrine/hand-off/*; do [ -e "$f" ] && echo "file $f"; done
for f in /run/peregrine/shepherd/*; do [ -e "$f" ] && echo "shepherd ${f##*/}"; done
grep -o ' /run/peregrine/images[^ ]*' /proc/self/mounts | sed 's/^ /mount /'
for f in $(find /sys/fs/cgroup -name cgroup.freeze 2>/dev/null); do [ "$(cat $f 2>/dev/null)" = 1 ] && echo "frozen ${f%/cgroup.freeze}"; done
for n in /run/netns/*; do [ -e "$n" ] && nsenter --net="$n" nft list tables 2>/dev/null | grep -i peregrine | sed "s|^|nft ${n##*/} |"; done
for p in /proc/[0-9]*; do case "$(cat $p/comm 2>/dev/null)" in criu) echo "process $(tr '\0' ' ' < $p/cmdline)";; esac; done
for f in /var/lib/peregrine/journal/*.jsonl; do [ -e "$f" ] && echo "journal ${f##*/}"; done
for f in /var/lib/peregrine/moved-away/*; do [ -e "$f" ] && echo "moved-away ${f##*/}"; done
true
"#;

/// I5: on no node is anything left of a migration that is settled, and no object waits for one.
///
/// # Errors
/// What is left, and where.
pub fn nothing_left(stage: &Stage) -> Result<()> {
    stage.wait("everything to be cleaned up", CLEAN, || {
        let mut left = Vec::new();
        // In all namespaces: others may move pods on this cluster as well.
        let pods = stage
            .block(Api::<Pod>::all(stage.client()).list(&ListParams::default()))?
            .items;
        let migrations = stage
            .block(Api::<ProcessMigration>::all(stage.client()).list(&ListParams::default()))?
            .items;
        let under_way: BTreeSet<String> = migrations
            .iter()
            .filter(|migration| !crate::scenario::moves::is_settled(migration))
            .filter_map(|migration| migration.metadata.uid.clone())
            .collect();
        for migration in &migrations {
            let settled = crate::scenario::moves::is_settled(migration);
            if settled
                && migration
                    .metadata
                    .finalizers
                    .as_ref()
                    .is_some_and(|finalizers| !finalizers.is_empty())
            {
                left.push(format!(
                    "finalizer on {}",
                    migration.metadata.name.clone().unwrap_or_default()
                ));
            }
        }
        let containers: BTreeSet<String> = pods
            .iter()
            .flat_map(|pod| {
                pod.status
                    .iter()
                    .flat_map(|status| status.container_statuses.iter().flatten())
            })
            .filter_map(|container| container.container_id.as_ref()?.rsplit('/').next().map(str::to_owned))
            .collect();
        if stage.is_own() {
            for node in stage.nodes() {
                for line in stage.on_node(node, RESIDUE)?.lines() {
                    if is_residue(line, &containers, &under_way) {
                        left.push(format!("{node}: {line}"));
                    }
                }
            }
        }
        if left.is_empty() {
            Ok(())
        } else {
            bail!("left: {}", left.join("; "))
        }
    })
}

/// Where things of a migration lie on a node, each named after it or after one of its pods.
const FOLDERS: [&str; 4] = [
    "/run/peregrine/images",
    "/run/peregrine/hand-off",
    "/var/lib/peregrine/journal",
    "/var/lib/peregrine/moved-away",
];

/// I5 while others are under way: on no node is anything left that is named after this settled migration, and it is let go.
///
/// # Errors
/// What is left, and where.
pub fn nothing_left_of(stage: &Stage, migration: &ProcessMigration) -> Result<()> {
    let names = uids(migration);
    let name = migration.metadata.name.clone().unwrap_or_default();
    stage.wait(&format!("everything of {name} to be cleaned up"), CLEAN, || {
        let mut left = Vec::new();
        let held = stage
            .find::<ProcessMigration>(NAMESPACE, &name)?
            .is_some_and(|now| now.metadata.finalizers.is_some_and(|finalizers| !finalizers.is_empty()));
        if held {
            left.push("its finalizer".to_owned());
        }
        for node in stage.nodes() {
            for folder in FOLDERS {
                // Not made yet, where nothing was ever moved.
                for entry in std::fs::read_dir(stage.path_on_node(node, folder)?)
                    .into_iter()
                    .flatten()
                {
                    let file = entry?.file_name().to_string_lossy().into_owned();
                    if names.iter().any(|name| file.contains(name)) {
                        left.push(format!("{node}: {folder}/{file}"));
                    }
                }
            }
        }
        ensure!(left.is_empty(), "left: {}", left.join("; "));
        Ok(())
    })
}

/// What things of a migration are named after: itself and its pods.
fn uids(migration: &ProcessMigration) -> Vec<String> {
    let status = migration.status.clone().unwrap_or_default();
    let source = status.source.and_then(|half| half.pod_uid);
    let target = status.target.and_then(|half| half.pod_uid);
    let own = migration.metadata.uid.clone();
    own.into_iter().chain(source).chain(target).collect()
}

/// Whether a line of [`RESIDUE`] is of something that should be gone: a shepherd stands for its container as long as that lives, a journal may
/// be of a migration under way.
fn is_residue(line: &str, containers: &BTreeSet<String>, under_way: &BTreeSet<String>) -> bool {
    let Some((kind, what)) = line.split_once(' ') else {
        return false;
    };
    match kind {
        "shepherd" => !containers.contains(what),
        "journal" => !under_way.iter().any(|uid| what.starts_with(uid.as_str())),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lives_is_not_left_behind() {
        let containers = BTreeSet::from(["c1".to_owned()]);
        let under_way = BTreeSet::from(["u1".to_owned()]);
        for (line, expected) in [
            ("shepherd c1", false),
            ("shepherd c2", true),
            ("journal u1.source.jsonl", false),
            ("journal u2.source.jsonl", true),
            ("frozen /sys/fs/cgroup/x", true),
            ("", false),
        ] {
            assert_eq!(is_residue(line, &containers, &under_way), expected, "{line}");
        }
    }
}
