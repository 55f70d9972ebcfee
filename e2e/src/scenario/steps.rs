//! A fault before and after the effect of *every* step of both agents, by enumeration: nothing is hand-picked.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use crds::ProcessMigration;
use crds::process_migration::Phase;
use serde_json::json;

use self::step::{Role, Step};
use super::moves::{Move, because, follow, is_settled, is_true, move_to, new_name, phase, story};
use super::stage::Stage;
use super::subject::{Plan, Subject};
use super::{Company, Scenario, install};
use crate::invariants;

// The agent's own list, so that no step can be forgotten; not its whole crate, which would have to build before any cluster comes up.
#[path = "../../../node-agent/src/decide/step.rs"]
#[expect(unreachable_pub, reason = "it is public where it comes from")]
#[cfg_attr(not(test), expect(dead_code, reason = "the agent uses the rest"))]
mod step;

/// Where an agent looks for the faults that are meant for it.
const ARMED: &str = "/run/peregrine/faults";
/// An agent that was killed has to come back, and recover.
const SETTLED: Duration = Duration::from_secs(120);
/// After so many seconds without progress the operator gives up a move in which something hangs.
const PROGRESS: u64 = 20;

/// Steps that fail and hang, and users that give up: they disturb nobody else on their nodes.
const FAULTS: Company = Company {
    name: "faults",
    lanes: 6,
};
/// Agents that are killed: each has a node for itself, all move to or from the node that is never lent.
const KILLS: Company = Company {
    name: "kills",
    lanes: 2,
};

pub(super) fn scenarios() -> Vec<Scenario> {
    let scenario = |what: &str, step: &Step, play, company| {
        let name = step.name().replace('.', "s_");
        Scenario {
            limit: Duration::from_secs(600),
            ..Scenario::new(format!("{what}_at_the_{name}_leaves_one_copy"), play)
                .case(step.name())
                .own_cluster()
                .beside(company)
        }
    };
    // Those that hang longest begin first.
    let mut steps = Step::ALL.to_vec();
    steps.sort_by_key(|step| std::cmp::Reverse(hangs(*step)));
    let mut all: Vec<Scenario> = steps
        .iter()
        .map(|step| scenario("a_fault", step, faults, FAULTS))
        .collect();
    let forward = steps.iter().filter(|step| !step.is_undo() && !is_clean_up(**step));
    all.extend(forward.map(|step| scenario("a_cancel", step, cancel, FAULTS)));
    all.extend(Step::ALL.iter().map(|step| scenario("a_kill", step, kills, KILLS)));
    all.push(Scenario::new("nothing_is_left_of_all_faults", |stage, _| clean(stage)).own_cluster());
    all
}

fn is_clean_up(step: Step) -> bool {
    matches!(step, Step::SourceCleanUp | Step::TargetCleanUp)
}

/// How long a step can hang: until its deadline, or until the whole move is given up.
fn hangs(step: Step) -> Duration {
    if step.is_undo() || step.is_after_commit() || is_clean_up(step) {
        step.deadline()
    } else {
        step.deadline().min(Duration::from_secs(PROGRESS))
    }
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
}

/// A fault that waits on a node for one migration; what has not struck is taken back in the end.
struct Armed(PathBuf);

impl Armed {
    fn new(stage: &Stage, node: &str, migration: &str, step: Step, when: &str, action: &str) -> Result<Self> {
        let folder = stage.path_on_node(node, ARMED)?;
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let armed = Self(folder.join(format!("{migration}-{}", step.name())));
        std::fs::write(&armed.0, format!("{}:{when}:{action}:{migration}\n", step.name()))
            .with_context(|| format!("cannot write {}", armed.0.display()))?;
        Ok(armed)
    }

    fn has_struck(&self) -> bool {
        !self.0.exists()
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

/// A move with a fault.
struct Faulty {
    migration: Move,
    fault: Armed,
    /// Makes the attempt fail, so that the steps of the way back are reached.
    _abort: Option<Armed>,
}

impl Faulty {
    fn begin(stage: &Stage, subject: &Subject, route: &Route, step: Step, when: &str, action: &str) -> Result<Self> {
        let name = new_name(&subject.name);
        let abort = step
            .is_undo()
            .then(|| match step.role() {
                Role::Source => Armed::new(stage, &route.target, &name, Step::TargetRestore, "after", "fail"),
                Role::Target => Armed::new(stage, &route.source, &name, Step::SourceComplete, "before", "fail"),
            })
            .transpose()?;
        let fault = Armed::new(stage, route.node(step.role()), &name, step, when, action)?;
        let patience = if action == "hang" { PROGRESS } else { 60 };
        Ok(Self {
            migration: Move::create_as(
                stage,
                name,
                &subject.pod,
                Some(&route.target),
                &json!({"progressTimeoutSeconds": patience}),
            )?,
            fault,
            _abort: abort,
        })
    }
}

fn named(name: &str) -> Result<Step> {
    Step::parse(name).with_context(|| format!("there is no step {name}"))
}

fn start(stage: &Stage, what: &str, case: &str, node: Option<&str>) -> Result<Subject> {
    Subject::start(
        stage,
        &Plan {
            mib: 16,
            node: node.map(str::to_owned),
            ..Plan::small(&format!("{what}-{}", case.replace(['.', '_'], "-")))
        },
    )
}

/// I6: whatever was done to it, it can still be moved.
fn finish(stage: &Stage, mut subject: Subject) -> Result<()> {
    move_to(stage, &mut subject, None)?;
    invariants::one_life(stage, &subject)?;
    subject.remove(stage)
}

/// The step fails, and it hangs.
fn faults(stage: &Stage, case: &str) -> Result<()> {
    let step = named(case)?;
    let mut subject = start(stage, "fault", case, None)?;
    for when in ["before", "after"] {
        for action in ["fail", "hang"] {
            let route = Route::of(stage, &subject)?;
            one_fault(stage, &mut subject, &route, step, when, action)
                .with_context(|| format!("{action} {when} {case}"))?;
        }
    }
    finish(stage, subject)
}

/// The step's agent dies.
fn kills(stage: &Stage, case: &str) -> Result<()> {
    let step = named(case)?;
    let (common, lent) = (stage.common_node()?, stage.lend());
    let (source, target) = match step.role() {
        Role::Source => (lent.node.clone(), common),
        Role::Target => (common, lent.node.clone()),
    };
    let route = Route { source, target };
    let mut subject = start(stage, "kill", case, Some(&route.source))?;
    for when in ["before", "after"] {
        if subject.node(stage)? != route.source {
            move_to(stage, &mut subject, Some(&route.source))?;
        }
        one_fault(stage, &mut subject, &route, step, when, "kill").with_context(|| format!("kill {when} {case}"))?;
    }
    let back = if subject.node(stage)? == route.source {
        &route.target
    } else {
        &route.source
    };
    move_to(stage, &mut subject, Some(back))?;
    invariants::one_life(stage, &subject)?;
    subject.remove(stage)
}

fn one_fault(stage: &Stage, subject: &mut Subject, route: &Route, step: Step, when: &str, action: &str) -> Result<()> {
    let faulty = Faulty::begin(stage, subject, route, step, when, action)?;
    let mut complaint = String::new();
    let settled = stage.wait(&format!("{} to be settled", faulty.migration.name), SETTLED, || {
        let now = faulty.migration.get(stage)?;
        if is_true(&now, "Stalled") {
            complaint = because(&now, "Stalled").1;
        }
        ensure!(is_settled(&now), "{}", story(&now));
        Ok(now)
    })?;
    ensure!(
        faulty.fault.has_struck(),
        "the step was never reached: {}",
        story(&settled)
    );
    if action == "hang" && must_be_said(step, when) {
        ensure!(
            complaint.contains("waiting for"),
            "it hung and did not say for what: {complaint:?}; {}",
            story(&settled)
        );
    }
    end(stage, subject, &settled)
}

/// Whether users can see that a step hangs. Not, where others go on without it: with a copy that runs, or with a decision that the watch tells.
fn must_be_said(step: Step, when: &str) -> bool {
    hangs(step) >= Duration::from_secs(PROGRESS)
        && step != Step::TargetCleanUp
        && !(when == "after" && matches!(step, Step::SourceComplete | Step::TargetCommit))
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
    invariants::nothing_left_of(stage, settled)
}

/// The step hangs, the user gives up.
fn cancel(stage: &Stage, case: &str) -> Result<()> {
    let step = named(case)?;
    let mut subject = start(stage, "cancel", case, None)?;
    for when in ["before", "after"] {
        let route = Route::of(stage, &subject)?;
        let faulty = Faulty::begin(stage, &subject, &route, step, when, "hang")?;
        stage.wait("the step to be reached", Duration::from_secs(40), || {
            ensure!(faulty.fault.has_struck(), "{}", story(&faulty.migration.get(stage)?));
            Ok(())
        })?;
        faulty.migration.cancel(stage)?;
        faulty
            .migration
            .wait(stage, "settled", SETTLED, is_settled)
            .and_then(|settled| end(stage, &mut subject, &settled))
            .with_context(|| format!("{when} {case}"))?;
    }
    finish(stage, subject)
}

/// When nothing is under way any more, nothing at all is left, and all agents are at work.
fn clean(stage: &Stage) -> Result<()> {
    install::wait_at_work(stage)?;
    invariants::nothing_left(stage)
}
