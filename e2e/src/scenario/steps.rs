//! A fault before and after the effect of *every* step of both agents, by enumeration: nothing is hand-picked.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use crds::ProcessMigration;
use crds::process_migration::Phase;
use serde_json::json;

use self::step::{Role, Step};
use super::Scenario;
use super::moves::{Move, because, follow, is_settled, is_true, move_to, phase, story};
use super::stage::{RELEASE_NAMESPACE, Stage, output};
use super::subject::{Plan, Subject};
use crate::invariants;

// The agent's own list, so that no step can be forgotten; not its whole crate, which would have to build before any cluster comes up.
#[path = "../../../node-agent/src/decide/step.rs"]
#[expect(unreachable_pub, reason = "it is public where it comes from")]
#[expect(dead_code, reason = "the agent uses the rest")]
mod step;

/// Where an agent looks for the fault that is meant for it.
const ARMED: &str = "/run/peregrine/fault";
/// An agent that was killed has to come back, and recover.
const SETTLED: Duration = Duration::from_secs(120);

pub(super) fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for step in Step::ALL {
        let name = step.name().replace('.', "s_");
        all.push(Scenario {
            limit: Duration::from_secs(600),
            ..Scenario::new(format!("a_fault_at_the_{name}_leaves_one_copy"), faults)
                .case(step.name())
                .own_cluster()
        });
    }
    for step in Step::ALL.iter().filter(|step| !step.is_undo() && !is_clean_up(**step)) {
        let name = step.name().replace('.', "s_");
        all.push(Scenario {
            limit: Duration::from_secs(300),
            ..Scenario::new(format!("a_cancel_at_the_{name}_leaves_one_copy"), cancel)
                .case(step.name())
                .own_cluster()
        });
    }
    all
}

fn is_clean_up(step: Step) -> bool {
    matches!(step, Step::SourceCleanUp | Step::TargetCleanUp)
}

/// The nodes of a move.
struct Route {
    source: String,
    target: String,
}

impl Route {
    fn of(stage: &Stage, subject: &Subject) -> Result<Self> {
        let source = subject.node(stage)?;
        let target = stage.other_node(&[&source])?;
        Ok(Self { source, target })
    }

    fn node(&self, role: Role) -> &str {
        match role {
            Role::Source => &self.source,
            Role::Target => &self.target,
        }
    }

    fn arm(&self, stage: &Stage, step: Step, when: &str, action: &str) -> Result<()> {
        let fault = format!("{}:{when}:{action}", step.name());
        stage
            .on_node(
                self.node(step.role()),
                &format!("mkdir -p /run/peregrine && echo {fault} > {ARMED}"),
            )
            .map(drop)
    }

    fn has_struck(&self, stage: &Stage, role: Role) -> Result<bool> {
        Ok(stage
            .on_node(self.node(role), &format!("[ -e {ARMED} ] || echo struck"))?
            .trim()
            == "struck")
    }

    fn disarm(&self, stage: &Stage) -> Result<()> {
        for node in [&self.source, &self.target] {
            stage.on_node(node, &format!("rm -f {ARMED}"))?;
        }
        Ok(())
    }

    /// Makes the attempt fail, so that the steps of the way back are reached: on the other side, because a node has one fault at a time.
    fn arm_abort(&self, stage: &Stage, role: Role) -> Result<()> {
        match role {
            Role::Source => self.arm(stage, Step::TargetRestore, "after", "fail"),
            Role::Target => self.arm(stage, Step::SourceComplete, "before", "fail"),
        }
    }
}

fn named(name: &str) -> Result<Step> {
    Step::parse(name).with_context(|| format!("there is no step {name}"))
}

fn faults(stage: &Stage, case: &str) -> Result<()> {
    let step = named(case)?;
    let mut subject = Subject::start(
        stage,
        &Plan {
            mib: 16,
            ..Plan::small(&format!("fault-{}", case.replace(['.', '_'], "-")))
        },
    )?;
    for when in ["before", "after"] {
        for action in ["fail", "kill"] {
            one_fault(stage, &mut subject, step, when, action).with_context(|| format!("{action} {when} {case}"))?;
        }
    }
    // I6: whatever was done to it, it can still be moved.
    move_to(stage, &mut subject, None)?;
    invariants::one_life(stage, &subject)?;
    subject.remove(stage)
}

fn one_fault(stage: &Stage, subject: &mut Subject, step: Step, when: &str, action: &str) -> Result<()> {
    let route = Route::of(stage, subject)?;
    if step.is_undo() {
        route.arm_abort(stage, step.role())?;
    }
    route.arm(stage, step, when, action)?;
    let migration = Move::create(stage, &subject.pod, Some(&route.target), &json!({}))?;
    if action == "kill" {
        fresh_agent(stage, &route, step.role(), &migration)?;
    }
    let result = migration
        .wait(stage, "settled", SETTLED, is_settled)
        .and_then(|settled| end(stage, subject, &settled));
    let struck = route.has_struck(stage, step.role())?;
    route.disarm(stage)?;
    result?;
    ensure!(struck, "the step was never reached");
    super::install::wait_at_work(stage)
}

/// Gives the node a new agent once its own was killed: after the second death the kubelet waits longer and longer before it starts one again.
fn fresh_agent(stage: &Stage, route: &Route, role: Role, migration: &Move) -> Result<()> {
    while !route.has_struck(stage, role)? {
        // That it never struck is said at the end.
        if is_settled(&migration.get(stage)?) {
            return Ok(());
        }
    }
    let mut kubectl = stage.kubectl();
    kubectl.args([
        "delete",
        "pod",
        "-n",
        RELEASE_NAMESPACE,
        "-l",
        "app.kubernetes.io/component=node-agent",
        "--wait=false",
        "--grace-period=1",
    ]);
    kubectl.arg(format!("--field-selector=spec.nodeName={}", route.node(role)));
    output(kubectl, "the deletion of a dead agent").map(drop)
}

/// One copy, with its memory, on the side that the migration says; nothing else anywhere.
fn end(stage: &Stage, subject: &mut Subject, settled: &ProcessMigration) -> Result<()> {
    if is_true(settled, "Committed") || phase(settled) == Some(Phase::Succeeded) {
        follow(subject, settled)?;
    } else {
        ensure!(
            matches!(phase(settled), Some(Phase::RolledBack | Phase::Canceled)),
            "{}",
            story(settled)
        );
        let (reason, message) = because(settled, "Succeeded");
        ensure!(
            !reason.is_empty() && message.len() > 10,
            "it does not say why: {}",
            story(settled)
        );
    }
    subject.check(stage).with_context(|| story(settled))?;
    invariants::one_life(stage, subject)?;
    invariants::exactly_one(stage, subject)?;
    invariants::nothing_left(stage)
}

/// The step hangs, the user gives up.
fn cancel(stage: &Stage, case: &str) -> Result<()> {
    let step = named(case)?;
    let mut subject = Subject::start(
        stage,
        &Plan {
            mib: 16,
            ..Plan::small(&format!("cancel-{}", case.replace(['.', '_'], "-")))
        },
    )?;
    for when in ["before", "after"] {
        let route = Route::of(stage, &subject)?;
        route.arm(stage, step, when, "hang")?;
        let migration = Move::create(
            stage,
            &subject.pod,
            Some(&route.target),
            &json!({"progressTimeoutSeconds": 60}),
        )?;
        let deadline = Instant::now() + Duration::from_secs(40);
        while !route.has_struck(stage, step.role())? {
            let now = migration.get(stage)?;
            if is_settled(&now) || Instant::now() > deadline {
                route.disarm(stage)?;
                bail!("the step was never reached: {}", story(&now));
            }
        }
        migration.cancel(stage)?;
        let result = migration
            .wait(stage, "settled", SETTLED, is_settled)
            .and_then(|settled| end(stage, &mut subject, &settled));
        route.disarm(stage)?;
        result.with_context(|| format!("{when} {case}"))?;
    }
    move_to(stage, &mut subject, None)?;
    invariants::one_life(stage, &subject)?;
    subject.remove(stage)
}
