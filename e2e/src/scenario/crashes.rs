//! Machines, programs and networks die at the worst moments; no pod is lost, none doubled.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use crds::ProcessMigration;
use crds::process_migration::Phase;
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

use super::Scenario;
use super::moves::{Move, follow, is_settled, is_true, move_to, phase, story};
use super::stage::{NAMESPACE, Stage};
use super::subject::{Plan, Subject};
use super::{install, runner};
use crate::invariants;

/// A migration may have to wait for a node that restarts, and for a lease that runs out.
const SETTLED: Duration = Duration::from_secs(150);

/// The phases in which something is broken.
const PHASES: [Phase; 4] = [Phase::Preparing, Phase::Freezing, Phase::Restoring, Phase::Finalizing];

pub(super) fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for phase in PHASES {
        let name = phase.as_str().to_lowercase();
        for (what, play) in [
            // Agents are killed at each of their steps: see `steps`.
            ("the_operator_killed", kill_operator as fn(&Stage, &str) -> Result<()>),
            ("the_connection_cut", cut),
            ("the_api_server_gone", api_server),
        ] {
            all.push(Scenario {
                limit: Duration::from_secs(300),
                ..Scenario::new(format!("{what}_while_{name}_leaves_one_copy"), play)
                    .case(phase.as_str())
                    .own_cluster()
            });
        }
        for (what, play) in [
            ("source", crash_source as fn(&Stage, &str) -> Result<()>),
            ("target", crash_target),
        ] {
            all.push(Scenario {
                limit: Duration::from_secs(400),
                ..Scenario::new(
                    format!("the_{what}_node_crashed_while_{name}_loses_nothing_that_survived"),
                    play,
                )
                .case(phase.as_str())
                .own_cluster()
            });
        }
    }
    all
}

/// A move that has reached a phase.
struct Broken {
    subject: Subject,
    migration: Move,
    source: String,
}

fn begin(stage: &Stage, name: &str, wanted: &str) -> Result<Broken> {
    let mib = if ["Freezing", "Restoring"].contains(&wanted) {
        512
    } else {
        64
    };
    let subject = Subject::start(
        stage,
        &Plan {
            mib,
            ..Plan::small(&format!("{name}-{}", wanted.to_lowercase()))
        },
    )?;
    let source = subject.node(stage)?;
    let migration = Move::create(stage, &subject.pod, None, &json!({"progressTimeoutSeconds": 30}))?;
    migration.wait(stage, wanted, super::moves::SETTLED, |migration| {
        phase(migration).is_some_and(|phase| {
            phase.as_str() == wanted || PHASES.iter().any(|one| one.as_str() == wanted && *one < phase)
        })
    })?;
    Ok(Broken {
        subject,
        migration,
        source,
    })
}

/// The target node, if one was chosen yet.
fn target_of(migration: &ProcessMigration) -> Option<String> {
    migration.status.as_ref()?.target.as_ref()?.node_name.clone()
}

impl Broken {
    /// Waits for the end and asserts that exactly one copy runs, with its memory; then moves it again.
    fn end(mut self, stage: &Stage) -> Result<()> {
        let settled = self.migration.wait(stage, "settled", SETTLED, is_settled)?;
        if is_true(&settled, "Committed") || phase(&settled) == Some(Phase::Succeeded) {
            follow(&mut self.subject, &settled)?;
        } else {
            ensure!(
                matches!(phase(&settled), Some(Phase::RolledBack | Phase::Failed)),
                "{}",
                story(&settled)
            );
        }
        self.subject.check(stage)?;
        invariants::one_life(stage, &self.subject)?;
        invariants::exactly_one(stage, &self.subject)?;
        install::wait_at_work(stage)?;
        invariants::nothing_left(stage)?;
        move_to(stage, &mut self.subject, None)?;
        invariants::one_life(stage, &self.subject)?;
        self.subject.remove(stage)
    }
}

/// Kills the programs of that name on a node as the kernel does when memory runs out; says how many there were.
pub(super) fn kill(stage: &Stage, node: &str, program: &str) -> Result<usize> {
    let script = format!(
        "for p in /proc/[0-9]*; do [ \"$(cat $p/comm 2>/dev/null)\" = {program} ] && kill -9 ${{p##*/}} && echo killed; done; true"
    );
    Ok(stage.on_node(node, &script)?.lines().count())
}

fn kill_operator(stage: &Stage, case: &str) -> Result<()> {
    let broken = begin(stage, "operator", case)?;
    for node in stage.nodes() {
        kill(stage, node, "operator")?;
    }
    broken.end(stage)
}

fn cut(stage: &Stage, case: &str) -> Result<()> {
    let broken = begin(stage, "cut", case)?;
    let target = stage.wait("a target", super::moves::SETTLED, || {
        target_of(&broken.migration.get(stage)?).context("none was chosen")
    })?;
    let cluster = stage.cluster()?;
    let (one, other) = (cluster.node(&broken.source)?, cluster.node(&target)?);
    cluster.net_cut(one, other)?;
    let settled = broken.migration.wait(stage, "settled", SETTLED, is_settled);
    cluster.net_heal(one, other)?;
    settled?;
    broken.end(stage)
}

fn api_server(stage: &Stage, case: &str) -> Result<()> {
    let broken = begin(stage, "api", case)?;
    let cluster = stage.cluster()?;
    cluster.apiserver_stop()?;
    // Long enough that requests under way are lost and retried, short enough that no lease of a node runs out.
    std::thread::sleep(Duration::from_secs(5));
    cluster.apiserver_start()?;
    broken.end(stage)
}

fn crash_source(stage: &Stage, case: &str) -> Result<()> {
    let mut broken = begin(stage, "node-s", case)?;
    let cluster = stage.cluster()?;
    let node = cluster.node(&broken.source)?;
    cluster.node_crash(node)?;
    // Only what the operator can know by now counts: whether it was committed.
    let settled = broken.migration.wait(stage, "decided", SETTLED, |migration| {
        migration
            .status
            .as_ref()
            .and_then(|status| status.decision.as_ref())
            .is_some_and(|decision| decision.value != crds::process_migration::DecisionValue::Undecided)
    });
    let committed = settled.as_ref().is_ok_and(|migration| {
        migration
            .status
            .as_ref()
            .and_then(|status| status.decision.as_ref())
            .is_some_and(|decision| decision.value == crds::process_migration::DecisionValue::Committed)
    });
    if committed {
        // The workload survives its node.
        follow(&mut broken.subject, &settled?)?;
        broken.subject.check(stage)?;
        cluster.node_start(node)?;
        return broken.end(stage);
    }
    // The source's memory is gone with its machine: the pod starts anew there or not at all, but never a second copy.
    cluster.node_start(node)?;
    let end = broken.migration.wait(stage, "settled", SETTLED, is_settled)?;
    ensure!(!is_true(&end, "Committed"), "{}", story(&end));
    runner::heal(stage)?;
    install::wait_at_work(stage)?;
    broken.subject.remove(stage)?;
    stage.wait("no pod to be left", Duration::from_secs(60), || {
        ensure!(
            stage
                .list::<Pod>(NAMESPACE, &format!("app={}", broken.subject.name))?
                .is_empty(),
            "there is one"
        );
        Ok(())
    })?;
    no_doubles(stage, &broken.subject)?;
    invariants::nothing_left(stage)
}

/// I1 without the demand of a single life: a pod of a crashed machine may start again.
fn no_doubles(stage: &Stage, subject: &Subject) -> Result<()> {
    for life in subject.lives(stage)?.unwrap_or_default() {
        ensure!(
            life.doubled == 0 && life.backward == 0,
            "two copies of {} ran: {} doubled, {} backward",
            life.token,
            life.doubled,
            life.backward
        );
    }
    Ok(())
}

fn crash_target(stage: &Stage, case: &str) -> Result<()> {
    let broken = begin(stage, "node-t", case)?;
    let target = stage.wait("a target", super::moves::SETTLED, || {
        target_of(&broken.migration.get(stage)?).context("none was chosen")
    })?;
    let cluster = stage.cluster()?;
    let node = cluster.node(&target)?;
    cluster.node_crash(node)?;
    let now = broken.migration.wait(stage, "decided", SETTLED, |migration| {
        migration
            .status
            .as_ref()
            .and_then(|status| status.decision.as_ref())
            .is_some_and(|decision| decision.value != crds::process_migration::DecisionValue::Undecided)
    })?;
    let committed = now
        .status
        .as_ref()
        .and_then(|status| status.decision.as_ref())
        .is_some_and(|decision| decision.value == crds::process_migration::DecisionValue::Committed);
    if !committed {
        let settled = broken.migration.wait(stage, "settled", SETTLED, is_settled);
        cluster.node_start(node)?;
        settled?;
        return broken.end(stage);
    }
    // After the commit the only copy was on that machine: it is lost with it as any pod is, but the source must not come back.
    cluster.node_start(node)?;
    install::wait_at_work(stage)?;
    broken.migration.wait(stage, "settled", SETTLED, is_settled)?;
    no_doubles(stage, &broken.subject)?;
    ensure!(
        stage.find::<Pod>(NAMESPACE, &broken.subject.pod)?.is_none(),
        "the released source is there again"
    );
    broken.subject.remove(stage)?;
    invariants::nothing_left(stage)
}
