//! Moves that succeed: A to B to C and back, small and large, root and ordinary user, one container and three.

use anyhow::{Context as _, Result, ensure};
use crds::ProcessMigration;
use crds::process_migration::Phase;
use serde_json::{Value, json};

use super::Scenario;
use super::moves::{Move, follow, is_true, move_to, move_with, phase, story};
use super::stage::Stage;
use super::subject::{Plan, Subject};
use crate::invariants;

pub(super) fn scenarios() -> Vec<Scenario> {
    let mut all: Vec<Scenario> = ["root-64", "user-64", "root-1024", "user-1024", "three-containers"]
        .into_iter()
        .map(|case| {
            Scenario::new(
                format!("a_pod_moves_from_a_to_b_to_c_to_a_{}", case.replace('-', "_")),
                a_b_c_a,
            )
            .case(case)
        })
        .collect();
    all.extend(["root-64", "user-1024", "three-containers"].into_iter().map(|case| {
        Scenario::new(
            format!(
                "a_pod_copied_while_it_runs_moves_from_a_to_b_to_c_to_a_{}",
                case.replace('-', "_")
            ),
            copied_while_it_runs,
        )
        .case(case)
    }));
    all.push(Scenario::new("a_cold_move_is_a_new_start_and_says_so", cold));
    all.push(Scenario::new(
        "a_target_chosen_by_the_scheduler_is_another_node",
        scheduler_chooses,
    ));
    all.push(Scenario::new("stock_runc_moves_the_same_program", stock).own_cluster());
    all
}

/// What ours is compared with works, so that the comparison is one.
fn stock(stage: &Stage, _: &str) -> Result<()> {
    let [a, b, ..] = stage.nodes() else {
        anyhow::bail!("two nodes are needed")
    };
    for containers in [1, 3] {
        let times = crate::stock::run(stage, a, b, 64, containers)?;
        ensure!(times.freeze >= times.dump + times.restore, "{times:?}");
        eprintln!("stock runc, {containers} containers of 64 MiB: {times:?}");
    }
    Ok(())
}

/// The plan for a case.
fn plan(stage: &Stage, name: &str, case: &str) -> Result<Plan> {
    let name = format!("{name}-{case}");
    let node = stage.nodes().first().cloned();
    let plan = Plan {
        node,
        ..Plan::small(&name)
    };
    Ok(match case {
        "root-64" => plan,
        "user-64" => Plan {
            user: Some(1000),
            ..plan
        },
        "root-1024" => Plan { mib: 1024, ..plan },
        "user-1024" => Plan {
            mib: 1024,
            user: Some(1000),
            ..plan
        },
        "three-containers" => Plan {
            containers: 3,
            mib: 32,
            ..plan
        },
        _ => anyhow::bail!("{case} is no case"),
    })
}

fn a_b_c_a(stage: &Stage, case: &str) -> Result<()> {
    around(
        stage,
        plan(stage, "move", case)?,
        &json!({"strategy": {"type": "StopAndCopy"}}),
        |_| Ok(()),
    )
}

fn copied_while_it_runs(stage: &Stage, case: &str) -> Result<()> {
    let plan = plan(stage, "precopy", case)?;
    let memory = (i64::from(plan.mib) * i64::from(plan.containers)) << 20;
    around(stage, plan, &json!({"strategy": {"type": "PreCopy"}}), |migration| {
        let status = migration.status.as_ref();
        let filling = status.and_then(|status| status.target.as_ref()?.filling.clone());
        let filling = filling.context("the target had no memory to put in place")?;
        ensure!(
            filling.total_bytes >= memory && filling.remaining_bytes == 0,
            "of {memory} bytes: {filling:?}"
        );
        Ok(())
    })
}

/// Moves a pod once around, with a service that is asked after each move.
fn around(stage: &Stage, plan: Plan, spec: &Value, check: impl Fn(&ProcessMigration) -> Result<()>) -> Result<()> {
    let [a, b, c] = stage.nodes() else {
        anyhow::bail!("three nodes are needed and there are {}", stage.nodes().len())
    };
    let client = Subject::start(
        stage,
        &Plan {
            node: Some(c.clone()),
            mib: 1,
            ..Plan::small(&format!("client-{}", plan.name))
        },
    )?;
    let mut subject = Subject::start(stage, &plan)?;
    let address = subject.add_service(stage)?;
    let start = subject.node(stage)?;
    let mut targets = vec![a, b, c];
    let place = targets
        .iter()
        .position(|node| **node == start)
        .context("the pod is nowhere")?;
    targets.rotate_left(place + 1);
    for target in targets {
        let migration = move_with(stage, &mut subject, Some(target), spec)?;
        check(&migration)?;
        let result = migration
            .status
            .as_ref()
            .and_then(|status| status.result.clone())
            .context("a successful move has no result")?;
        ensure!(result.live, "a move with memory must say so: {result:?}");
        ensure!(
            is_true(&migration, "ResidualFree"),
            "something still needs the old node: {}",
            story(&migration)
        );
        subject.check_access(stage)?;
        subject.check_service(stage, &address, &client)?;
        invariants::one_life(stage, &subject)?;
        invariants::exactly_one(stage, &subject)?;
        invariants::nothing_left(stage)?;
    }
    subject.remove(stage)?;
    client.remove(stage)
}

fn scheduler_chooses(stage: &Stage, _: &str) -> Result<()> {
    let mut subject = Subject::start(stage, &Plan::small("anywhere"))?;
    move_to(stage, &mut subject, None)?;
    invariants::one_life(stage, &subject)?;
    invariants::exactly_one(stage, &subject)?;
    invariants::nothing_left(stage)?;
    subject.remove(stage)
}

fn cold(stage: &Stage, _: &str) -> Result<()> {
    let mut subject = Subject::start(stage, &Plan::small("cold"))?;
    let source = subject.node(stage)?;
    let token = subject
        .known()
        .first()
        .map(|state| state.token.clone())
        .unwrap_or_default();
    let migration = Move::create(stage, &subject.pod, None, &json!({"strategy": {"type": "Cold"}}))?.settled(stage)?;
    ensure!(phase(&migration) == Some(Phase::Succeeded), "{}", story(&migration));
    let live = migration
        .status
        .as_ref()
        .and_then(|status| status.result.as_ref())
        .map(|result| result.live);
    ensure!(
        live == Some(false),
        "a cold move is reported as live: {}",
        story(&migration)
    );
    ensure!(
        super::moves::because(&migration, "Succeeded").0 == "StartedCold",
        "{}",
        story(&migration)
    );
    follow(&mut subject, &migration)?;
    ensure!(subject.node(stage)? != source, "the pod is still on {source}");
    invariants::exactly_one(stage, &subject)?;
    let states = subject.states(stage)?;
    ensure!(
        states.iter().all(|state| state.token != token),
        "a cold move kept its memory"
    );
    invariants::nothing_left(stage)?;
    subject.remove(stage)
}
