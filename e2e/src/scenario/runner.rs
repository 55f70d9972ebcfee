//! Plays scenarios one after the other and says how each went.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use crds::ProcessMigration;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, Service};

use super::stage::{NAMESPACE, RELEASE_NAMESPACE, Stage};
use super::{Scenario, all, install};
use crate::cluster::{Cluster, Member, Options};
use crate::parts;

/// What is to be played.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Only names that contain one of these; all, if empty.
    pub only: Vec<String>,
    /// Only say the names.
    pub list: bool,
    /// On the cluster of `KUBECONFIG`.
    pub any_cluster: bool,
}

/// How many ended in which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Shown.
    pub passed: u32,
    /// Not so.
    pub failed: u32,
    /// Not possible here.
    pub skipped: u32,
}

/// Plays them.
///
/// # Errors
/// If there is no stage to play on; a scenario that fails is counted.
pub fn run(settings: &Settings) -> Result<Outcome> {
    let chosen: Vec<Scenario> = all()
        .into_iter()
        .filter(|scenario| settings.only.is_empty() || settings.only.iter().any(|only| scenario.name.contains(only)))
        .collect();
    if settings.list {
        for scenario in &chosen {
            println!("{}", scenario.name);
        }
        return Ok(Outcome::default());
    }
    let stage = if settings.any_cluster {
        Stage::on_kubeconfig()?
    } else {
        Cluster::up(&Options::default())?;
        Stage::on_own_cluster()?
    };
    sweep(&stage)?;
    install::install(&stage, &install::with_faults())?;
    let mut outcome = Outcome::default();
    let (possible, impossible): (Vec<Scenario>, Vec<Scenario>) = chosen
        .into_iter()
        .partition(|scenario| stage.is_own() || !scenario.needs_own_cluster);
    for scenario in impossible {
        println!(
            "skipped {}: it breaks nodes, which only the cluster of `cargo xtask cluster` allows",
            scenario.name
        );
        outcome.skipped += 1;
    }
    for together in possible.chunk_by(|one, next| one.company.is_some() && one.company == next.company) {
        let failed = match together {
            [alone] => u32::from(!play(&stage, alone)),
            several => play_together(&stage, several),
        };
        outcome.failed += failed;
        outcome.passed += u32::try_from(together.len()).unwrap_or(u32::MAX) - failed;
        if failed > 0 {
            // What they left must not fail the next one.
            repair(&stage);
        }
    }
    // Nothing of ours stays behind on the cluster.
    sweep(&stage)?;
    println!(
        "{} passed, {} failed, {} skipped",
        outcome.passed, outcome.failed, outcome.skipped
    );
    Ok(outcome)
}

/// Plays one and says how it went; true, if well. Every wait inside has its own deadline; the limit of the whole is checked afterwards.
fn play(stage: &Stage, scenario: &Scenario) -> bool {
    let began = Instant::now();
    let result = (scenario.play)(stage, &scenario.case).and_then(|()| {
        anyhow::ensure!(
            began.elapsed() <= scenario.limit,
            "it took longer than its limit of {} s",
            scenario.limit.as_secs()
        );
        Ok(())
    });
    let seconds = began.elapsed().as_secs_f64();
    match result {
        Ok(()) => println!("ok {} ({seconds:.1} s)", scenario.name),
        Err(ref error) => {
            let logs = collect(stage, &scenario.name)
                .map(|folder| folder.display().to_string())
                .unwrap_or_else(|error| format!("not collected: {error:#}"));
            println!("FAILED {}: {error:#} ({seconds:.1} s; logs: {logs})", scenario.name);
        }
    }
    result.is_ok()
}

/// Plays scenarios side by side; how many failed.
fn play_together(stage: &Stage, scenarios: &[Scenario]) -> u32 {
    let lanes = scenarios
        .first()
        .and_then(|one| one.company)
        .map_or(1, |company| company.lanes);
    let (next, failed) = (AtomicUsize::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for _ in 0..lanes.min(scenarios.len()) {
            scope.spawn(|| {
                while let Some(scenario) = scenarios.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if !play(stage, scenario) {
                        failed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    failed.into_inner()
}

/// Brings cluster and release back to work, as far as that is possible.
fn repair(stage: &Stage) {
    let say = |what: &str, result: Result<()>| {
        if let Err(error) = result {
            eprintln!("cannot bring back the {what}: {error:#}");
        }
    };
    say("nodes", heal(stage));
    say("release", install::install(stage, &install::with_faults()));
    say("objects", sweep(stage));
}

/// Starts what is down and heals what is cut.
pub(super) fn heal(stage: &Stage) -> Result<()> {
    let Ok(cluster) = stage.cluster() else { return Ok(()) };
    cluster.apiserver_start()?;
    let members: Vec<Member> = cluster.nodes();
    for (index, one) in members.iter().enumerate() {
        if cluster.init_of(*one).is_none() {
            cluster.node_start(*one)?;
        }
        cluster.net_heal(*one, Member::ControlPlane)?;
        for other in &members[index + 1..] {
            if cluster.init_of(*other).is_some() {
                cluster.net_heal(*one, *other)?;
            }
        }
    }
    Ok(())
}

/// Removes all migrations and pods of earlier scenarios.
///
/// # Errors
/// If they do not go in time.
pub fn sweep(stage: &Stage) -> Result<()> {
    if stage.is_own() {
        for node in stage.nodes() {
            // A fault that a killed run left armed would strike somebody else.
            stage.on_node(node, "rm -rf /run/peregrine/fault /run/peregrine/faults")?;
        }
    }
    // Before the first installation there is no such kind.
    for migration in stage.list::<ProcessMigration>(NAMESPACE, "").unwrap_or_default() {
        stage.delete::<ProcessMigration>(&migration.metadata.name.unwrap_or_default(), None)?;
    }
    for deployment in stage.list::<Deployment>(NAMESPACE, "")? {
        stage.delete::<Deployment>(&deployment.metadata.name.unwrap_or_default(), None)?;
    }
    for service in stage.list::<Service>(NAMESPACE, "app")? {
        stage.delete::<Service>(&service.metadata.name.unwrap_or_default(), None)?;
    }
    for pod in stage.list::<Pod>(NAMESPACE, "")? {
        stage.delete::<Pod>(&pod.metadata.name.unwrap_or_default(), Some(1))?;
    }
    stage.wait(
        "the pods of earlier scenarios to be gone",
        Duration::from_secs(60),
        || {
            let left = stage.list::<Pod>(NAMESPACE, "")?.len()
                + stage.list::<ProcessMigration>(NAMESPACE, "").unwrap_or_default().len();
            anyhow::ensure!(left == 0, "{left} are left");
            Ok(())
        },
    )
}

/// Everything that helps to find out, in a folder of its own.
fn collect(stage: &Stage, name: &str) -> Result<PathBuf> {
    let folder = parts::home()?.join("failures").join(name);
    drop(std::fs::remove_dir_all(&folder));
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let save = |file: &str, mut command: Command| {
        // A part that cannot be had must not hide the others.
        if let Ok(output) = command.stdin(Stdio::null()).output() {
            drop(std::fs::write(
                folder.join(file),
                [output.stdout, output.stderr].concat(),
            ));
        }
    };
    let kubectl = |args: &[&str]| {
        let mut command = stage.kubectl();
        command.args(args);
        command
    };
    save(
        "objects.yaml",
        kubectl(&["get", "pmig,pods,migrationnodes,leases", "-A", "-o", "yaml"]),
    );
    save(
        "overview.txt",
        kubectl(&["get", "pmig,pods,migrationnodes,nodes", "-A", "-o", "wide"]),
    );
    save(
        "events.txt",
        kubectl(&["get", "events", "-A", "--sort-by=.lastTimestamp"]),
    );
    for pod in stage.list::<Pod>(RELEASE_NAMESPACE, "").unwrap_or_default() {
        let name = pod.metadata.name.unwrap_or_default();
        save(
            &format!("{name}.log"),
            kubectl(&[
                "logs",
                "-n",
                RELEASE_NAMESPACE,
                &name,
                "--all-containers",
                "--tail=2000",
            ]),
        );
        save(
            &format!("{name}.previous.log"),
            kubectl(&["logs", "-n", RELEASE_NAMESPACE, &name, "--previous", "--tail=2000"]),
        );
    }
    for pod in stage.list::<Pod>(NAMESPACE, "").unwrap_or_default() {
        let name = pod.metadata.name.unwrap_or_default();
        save(
            &format!("{name}.log"),
            kubectl(&["logs", "-n", NAMESPACE, &name, "--all-containers", "--tail=300"]),
        );
    }
    if let Ok(cluster) = stage.cluster() {
        for node in cluster.nodes() {
            let script = "find /run/peregrine /var/lib/peregrine /opt/peregrine 2>/dev/null; cat /var/lib/peregrine/journal/* 2>/dev/null; ps axf; cat /proc/self/mounts; tail -n 400 /var/log/kubelet.log /var/log/containerd.log";
            if let Ok(command) = cluster.exec(node, &["sh", "-c", script]) {
                save(&format!("{}.txt", node.name()), command);
            }
        }
    }
    if let Ok(Some((now, lives))) = stage.witnessed("") {
        drop(std::fs::write(
            folder.join("witness.json"),
            serde_json::to_vec_pretty(&(now, lives))?,
        ));
    }
    Ok(folder)
}
