//! A pod that runs on the target before its memory is in place: whoever puts it there is killed, and nothing is lost.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::Scenario;
use super::crashes::kill;
use super::moves::{Move, SETTLED, follow, is_true, move_to, story, succeeded};
use super::stage::Stage;
use super::subject::{Plan, Subject};
use crate::invariants;

pub(super) fn scenarios() -> Vec<Scenario> {
    // What they are called in the kernel's list of processes.
    ["pager", "guardian", "deputy"]
        .into_iter()
        .map(|who| {
            Scenario::new(format!("a_{who}_killed_while_memory_is_filled_loses_nothing"), killed)
                .case(who)
                .own_cluster()
        })
        .collect()
}

fn killed(stage: &Stage, who: &str) -> Result<()> {
    let plan = Plan {
        // Enough to be still on its way when the commit has been seen.
        mib: 1024,
        ..Plan::small(&format!("fill-{who}"))
    };
    let mut subject = Subject::start(stage, &plan)?;
    let source = subject.node(stage)?;
    let target = stage.other_node(&[&source])?;
    let spec = json!({"strategy": {"type": "PreCopy"}});
    let migration = Move::create(stage, &subject.pod, Some(&target), &spec)?;
    migration.wait(stage, "committed", SETTLED, |migration| is_true(migration, "Committed"))?;
    let kills = kill(stage, &target, &format!("pgr-{who}"))?;
    ensure!(kills > 0, "the memory was in place before the {who} could be killed");
    let migration = migration.settled(stage)?;
    succeeded(&migration)?;
    let status = migration.status.as_ref();
    let filling = status.and_then(|status| status.target.as_ref()?.filling.clone());
    let filling = filling.with_context(|| format!("the status says nothing of it: {}", story(&migration)))?;
    ensure!(filling.remaining_bytes == 0, "{filling:?}");
    ensure!(who != "pager" || filling.restarts > 0, "{filling:?}");
    follow(&mut subject, &migration)?;
    subject.check(stage)?;
    invariants::one_life(stage, &subject)?;
    invariants::exactly_one(stage, &subject)?;
    invariants::nothing_left(stage)?;
    move_to(stage, &mut subject, None)?;
    subject.remove(stage)
}
