//! Moves in virtual time: every step with every fault, and seeds. `SEED=n` runs one seed; `SEEDS=n` that many.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod simulation;

use crds::process_migration::{DecisionValue, Phase};
use node_agent::decide::step::{Role, Step};
use node_agent::fault::When;
use simulation::fault::{Action, Broken, Fault, Trigger, Whose};

/// Seeds that have failed once: always run.
const KEPT: &[u64] = &[1019, 1053, 1054, 1059, 1090, 1110, 1187, 1239, 1274];
/// How many others.
const SEEDS: u64 = 300;

const STRIKES: [When; 2] = [When::Before, When::After];

fn whose(role: Role) -> (Whose, Whose) {
    match role {
        Role::Source => (Whose::Source, Whose::Target),
        Role::Target => (Whose::Target, Whose::Source),
    }
}

/// What makes a step happen at all: the way back needs a failure before it.
fn reaching(step: Step) -> Vec<Fault> {
    if step.is_undo() {
        vec![Fault {
            at: Trigger::Step(Step::TargetRestore, When::After),
            action: Action::Fail,
        }]
    } else {
        Vec::new()
    }
}

/// Runs each step with an action, before and after its effect. Gives all failures, not only the first.
fn each_step(seed: u64, steps: impl Fn(Step) -> bool, action: impl Fn(Role) -> Action) {
    let mut failures = Vec::new();
    for step in Step::ALL.iter().copied().filter(|s| steps(*s)) {
        for when in STRIKES {
            let action = action(step.role());
            let mut faults = reaching(step);
            faults.push(Fault {
                at: Trigger::Step(step, when),
                action,
            });
            match simulation::run(seed, 0, &faults) {
                Ok(report) if report.not_struck.is_empty() => {}
                Ok(report) => failures.push(format!(
                    "{} {when:?}: {:?} did not strike",
                    step.name(),
                    report.not_struck
                )),
                Err(broken) => failures.push(format!("{} {when:?}: {broken}", step.name())),
            }
        }
    }
    assert!(
        failures.is_empty(),
        "{} failed:\n{}",
        failures.len(),
        failures.join("\n\n")
    );
}

#[test]
fn sim_a_move_without_faults_succeeds() {
    for seed in 0..20 {
        let report = simulation::run(seed, 0, &[]).unwrap_or_else(|broken| panic!("{broken}"));
        assert_eq!(
            (report.phase, report.decision),
            (Some(Phase::Succeeded), Some(DecisionValue::Committed))
        );
    }
}

#[test]
fn sim_every_step_may_fail() {
    each_step(1, |_| true, |_| Action::Fail);
}

#[test]
fn sim_every_step_may_hang() {
    each_step(2, |_| true, |_| Action::Hang);
}

#[test]
fn sim_every_step_may_happen_twice() {
    each_step(3, |_| true, |_| Action::Repeat);
}

#[test]
fn sim_the_agent_may_die_at_every_step() {
    each_step(4, |_| true, |role| Action::Kill(whose(role).0));
}

#[test]
fn sim_the_other_agent_may_die_at_every_step() {
    each_step(5, |_| true, |role| Action::Kill(whose(role).1));
}

#[test]
fn sim_the_node_may_lose_power_at_every_step() {
    each_step(6, |_| true, |role| Action::Reboot(whose(role).0, 15_000));
}

#[test]
fn sim_the_other_node_may_lose_power_at_every_step() {
    each_step(7, |_| true, |role| Action::Reboot(whose(role).1, 15_000));
}

#[test]
fn sim_a_node_may_stay_away_long_at_every_step() {
    each_step(8, |_| true, |role| Action::Reboot(whose(role).0, 300_000));
    each_step(9, |_| true, |role| Action::Reboot(whose(role).1, 300_000));
}

#[test]
fn sim_replies_may_be_lost_at_every_step() {
    each_step(10, |_| true, |_| Action::LoseReplies(12_000));
}

#[test]
fn sim_the_api_server_may_be_down_at_every_step() {
    each_step(11, |_| true, |_| Action::ApiDown(20_000));
    each_step(12, |_| true, |_| Action::ApiDown(150_000));
}

#[test]
fn sim_the_network_may_be_cut_at_every_step() {
    each_step(13, |_| true, |_| Action::Cut(8_000));
    each_step(14, |_| true, |_| Action::Cut(120_000));
}

#[test]
fn sim_watches_may_be_late_at_every_step() {
    each_step(15, |_| true, |_| Action::LateWatches(6_000));
}

#[test]
fn sim_the_operator_may_end_at_every_step() {
    each_step(16, |_| true, |_| Action::KillOperator);
}

#[test]
fn sim_the_user_may_cancel_at_every_step() {
    each_step(17, |_| true, |_| Action::Cancel);
}

#[test]
fn sim_the_user_may_delete_anything_at_every_step() {
    each_step(18, |_| true, |_| Action::DeletePod);
    each_step(19, |_| true, |_| Action::DeleteMigration);
    each_step(20, |_| true, |_| Action::DeleteTarget);
}

/// Until the commit. Behind it nothing helps yet: the target pod, still the migration's, is collected with it, and nobody ends
/// the frozen source.
#[test]
fn sim_a_migration_may_be_taken_away_by_force_at_every_step_before_the_commit() {
    let unsettled = [
        Step::TargetCommit,
        Step::TargetThaw,
        Step::SourceMoveAway,
        Step::TargetCleanUp,
    ];
    each_step(21, |step| !unsettled.contains(&step), |_| Action::ForceDelete);
}

/// Which broken rule is seen as which broken invariant, and what it takes.
#[test]
fn sim_a_broken_rule_is_seen() {
    let at = |step, when, action| Fault {
        at: Trigger::Step(step, when),
        action,
    };
    let unheard = |when| {
        [Action::Cut(120_000), Action::ApiDown(150_000)]
            .map(|action| at(Step::TargetCommit, when, action))
            .to_vec()
    };
    for (rule, expected, faults) in [
        (Broken::UnknownIsAborted, "I4", unheard(When::After)),
        (Broken::UnknownIsCommitted, "I1", unheard(When::Before)),
        (
            Broken::BeginsUnasked,
            "committed although",
            vec![at(Step::SourceReserve, When::Before, Action::LateWatches(6_000))],
        ),
        (
            Broken::OnlyShepherdMarks,
            "I2",
            vec![at(
                Step::TargetCommit,
                When::After,
                Action::Reboot(Whose::Target, 15_000),
            )],
        ),
        (
            Broken::NoMarkBeforeCommit,
            "I4",
            vec![
                at(Step::TargetCommit, When::Before, Action::Reboot(Whose::Source, 1_000)),
                at(Step::TargetCommit, When::Before, Action::KillOperator),
            ],
        ),
        (
            Broken::NoRepair,
            "I3",
            vec![at(Step::TargetRestore, When::After, Action::Fail)],
        ),
    ] {
        // The order in which things happen is the seed's: some meet the gap.
        let seen: Vec<String> = (0..40)
            .filter_map(|seed| simulation::run_breaking(rule, seed, 0, &faults).err())
            .collect();
        let first = seen.first().unwrap_or_else(|| panic!("{rule:?} was not seen"));
        assert!(
            seen.iter().any(|s| s.starts_with(expected)),
            "{rule:?} was seen as: {first}"
        );
        // The same with the rule kept.
        for seed in 0..40 {
            simulation::run(seed, 0, &faults).unwrap_or_else(|broken| panic!("{broken}"));
        }
    }
}

/// Faults of a seed: some, anywhere.
fn faults_of(seed: u64) -> (u64, Vec<Fault>) {
    let mut state = seed.wrapping_mul(0x2545_F491_4F6C_DD1D) | 1;
    let mut below = |bound: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % bound
    };
    let noise = [0, 0, 10, 50, 150][below(5) as usize];
    let count = below(5);
    let faults = (0..count)
        .map(|_| {
            let at = if below(4) == 0 {
                Trigger::Time(below(20_000))
            } else {
                Trigger::Step(
                    Step::ALL[below(Step::ALL.len() as u64) as usize],
                    STRIKES[below(2) as usize],
                )
            };
            let someone = if below(2) == 0 { Whose::Source } else { Whose::Target };
            let millis = [500, 3_000, 12_000, 45_000, 130_000][below(5) as usize];
            let action = match below(16) {
                0 | 1 => Action::Fail,
                2 => Action::Hang,
                3 => Action::Repeat,
                4..=6 => Action::Kill(someone),
                7 => Action::Reboot(someone, millis),
                8 => Action::LoseReplies(millis),
                9 => Action::ApiDown(millis),
                10 => Action::Cut(millis),
                11 => Action::LateWatches(millis / 10),
                12 => Action::KillOperator,
                13 => Action::Cancel,
                14 => [Action::DeletePod, Action::DeleteTarget][below(2) as usize],
                _ => Action::DeleteMigration,
            };
            Fault { at, action }
        })
        .collect();
    (noise, faults)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn sim_invariants_hold_for_random_seeds() {
    let seeds: Vec<u64> = match number("SEED") {
        Some(seed) => vec![seed],
        None => KEPT
            .iter()
            .copied()
            .chain(1000..1000 + number("SEEDS").unwrap_or(SEEDS))
            .collect(),
    };
    let (mut committed, mut aborted) = (0, 0);
    let mut failures = Vec::new();
    for seed in &seeds {
        let (noise, faults) = faults_of(*seed);
        match simulation::run(*seed, noise, &faults) {
            Ok(report) => match report.decision {
                Some(DecisionValue::Committed) => committed += 1,
                _ => aborted += 1,
            },
            Err(broken) => failures.push(format!("SEED={seed}: {broken}")),
        }
    }
    println!("{} seeds: {committed} committed, {aborted} not", seeds.len());
    assert!(
        failures.is_empty(),
        "{} failed:\n{}",
        failures.len(),
        failures.join("\n\n")
    );
    // Faults that all come to the same end would show little.
    assert!(
        seeds.len() < 100 || (committed > 20 && aborted > 20),
        "{committed} committed, {aborted} not"
    );
}
