//! Generated sequences of events: whatever happens in whatever order, the rules hold, and it comes to an end.

use crds::condition::is_true;
use crds::names::FINALIZER;
use crds::process_migration::{DecisionValue, Party, Phase, cond};
use proptest::prelude::*;
use serde_json::json;

use super::fixture::{Cluster, wakes_at};
use super::{Observed, Stage, decide, pod, stage};

/// What has to happen, in this order, for a move to succeed.
const STORY: [Event; 9] = [
    Event::Checks,
    Event::Bind(true),
    Event::TargetReady,
    Event::Freeze,
    Event::Sent,
    Event::Commit,
    Event::KubeletsEnd,
    Event::AgentsConclude,
    Event::AgentsConclude,
];

#[derive(Clone, Copy, Debug)]
enum Event {
    /// The next of the story.
    Next,
    Checks,
    Refuses,
    Bind(bool),
    TargetReady,
    Freeze,
    Sent,
    Commit,
    SourceAborts,
    TargetAborts,
    SourceFails,
    AgentsConclude,
    KubeletsEnd,
    TargetRuns(bool),
    Cancel,
    DeleteMigration,
    DeletePod,
    PodVanishes,
    DeleteTarget,
    LoseSourceNode,
    LoseTargetNode,
    PodsRefused,
    ReadsFail,
    RestartOperator,
    Time(u16),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        60 => Just(Event::Next),
        2 => prop::sample::select(&STORY[..]),
        1 => Just(Event::Refuses),
        1 => Just(Event::Bind(false)),
        1 => Just(Event::SourceAborts),
        1 => Just(Event::TargetAborts),
        1 => Just(Event::SourceFails),
        3 => any::<bool>().prop_map(Event::TargetRuns),
        1 => Just(Event::Cancel),
        1 => Just(Event::DeleteMigration),
        1 => Just(Event::DeletePod),
        1 => Just(Event::PodVanishes),
        1 => Just(Event::DeleteTarget),
        1 => Just(Event::LoseSourceNode),
        1 => Just(Event::LoseTargetNode),
        1 => Just(Event::PodsRefused),
        3 => Just(Event::ReadsFail),
        3 => Just(Event::RestartOperator),
        6 => (1u16..100).prop_map(Event::Time),
    ]
}

fn happen(cluster: &mut Cluster, story: &mut usize, event: Event) {
    match event {
        Event::Next => {
            if let Some(next) = STORY.get(*story) {
                *story += 1;
                happen(cluster, story, *next);
            }
        }
        Event::Checks => cluster.source_checks(json!([])),
        Event::Refuses => cluster.source_checks(json!([{"name": "sockets", "verdict": "Refused",
            "reason": "SocketNotSupported", "message": "a packet socket"}])),
        Event::Bind(to_b) => cluster.bind(if to_b { "b" } else { "c" }),
        Event::TargetReady => cluster.target_is_ready(),
        Event::Freeze => cluster.source_freezes(),
        Event::Sent => cluster.source_sent(),
        Event::Commit => {
            cluster.commit();
        }
        Event::SourceAborts => {
            cluster.decide_as(DecisionValue::Aborted, Party::Source, "CheckpointFailed", "no");
        }
        Event::TargetAborts => {
            cluster.decide_as(DecisionValue::Aborted, Party::Target, "unknown to us", "no");
        }
        Event::SourceFails => cluster.source_fails(),
        Event::AgentsConclude => cluster.agents_conclude(),
        Event::KubeletsEnd => cluster.kubelets_end(),
        Event::TargetRuns(ready) => cluster.target_pod_runs(ready),
        Event::Cancel => cluster.user_cancels(),
        Event::DeleteMigration => cluster.user_deletes_migration(),
        Event::DeletePod => cluster.user_deletes_source(),
        Event::PodVanishes => cluster.world.source_pod = Observed::Absent,
        Event::DeleteTarget => cluster.user_deletes_target(),
        Event::LoseSourceNode => cluster.lose_node("a"),
        Event::LoseTargetNode => {
            cluster.lose_node("b");
            cluster.lose_node("c");
        }
        Event::PodsRefused => cluster.refuses_pods = true,
        Event::ReadsFail => {
            let before = (cluster.world.source_pod.clone(), cluster.world.target_pod.clone());
            cluster.world.source_pod = Observed::Unknown;
            cluster.world.target_pod = Observed::Unknown;
            cluster.settle();
            (cluster.world.source_pod, cluster.world.target_pod) = before;
        }
        Event::RestartOperator => cluster.restart_operator(),
        Event::Time(seconds) => cluster.pass_time(i64::from(seconds)),
    }
}

/// What must hold of everything that was ever done.
fn holds(cluster: &Cluster, checked: usize, is_cold: bool) {
    for (stage, effects) in &cluster.log[checked..] {
        match stage {
            Stage::Committed => {
                assert!(
                    effects.delete_target.is_none(),
                    "the target was deleted after the commit"
                );
                assert!(effects.abort.is_none() && effects.create_target.is_none());
            }
            Stage::Aborted | Stage::ColdAborted => {
                assert!(effects.delete_source.is_none(), "the source was deleted after an abort");
                assert!(effects.hand_over.is_none() && effects.create_target.is_none());
            }
            Stage::ColdCommitted => assert!(effects.delete_target.is_none()),
            Stage::Finished => {
                let mut rest = effects.clone();
                rest.finalizer = None;
                rest.delete_migration = false;
                assert!(
                    rest.is_empty(),
                    "something was done about a settled migration: {rest:?}"
                );
            }
            Stage::New | Stage::Checking | Stage::Moving | Stage::ColdMoving => {
                assert!(
                    effects.delete_source.is_none(),
                    "the source was deleted before the commit"
                );
                assert!(effects.hand_over.is_none());
            }
        }
        if is_cold {
            assert!(effects.abort.is_none() && !effects.open_decision);
        }
    }
}

/// What must hold when a pass has come to its end.
fn holds_at_rest(cluster: &Cluster) {
    if cluster.gone {
        return;
    }
    let status = cluster.status();
    let decision = decide(&cluster.world);
    assert!(decision.effects.is_empty(), "not settled: {:?}", decision.effects);
    let decided = status.decision.as_ref().map(|d| d.value);
    if stage::of(&cluster.world) == Stage::Finished {
        assert_ne!(
            decided,
            Some(DecisionValue::Undecided),
            "a settled migration can still be committed"
        );
        assert!(
            !cluster
                .world
                .migration
                .metadata
                .finalizers
                .iter()
                .flatten()
                .any(|f| f == FINALIZER)
        );
        if !matches!(decided, Some(DecisionValue::Committed)) && !is_true(&status.conditions, cond::COMMITTED) {
            let ours = cluster
                .world
                .target_pod
                .present()
                .is_some_and(|p| pod::is_controlled_by(p, cluster.world.uid()));
            assert!(!ours, "a target pod is left behind: {status:#?}");
            let dry = cluster.world.migration.spec.dry_run;
            assert_eq!(
                status.phase == Some(Phase::Succeeded),
                dry && is_true(&status.conditions, cond::SUCCEEDED)
            );
        }
    } else {
        let at = wakes_at(&decision);
        assert!(
            at.is_some_and(|at| at > cluster.world.now),
            "waits for ever: {status:#?}"
        );
    }
}

/// Nobody does anything any more but kubelets. It ends all the same.
fn comes_to_an_end(cluster: &mut Cluster) {
    for _ in 0..4000 {
        let checked = cluster.log.len();
        let decision = cluster.settle();
        holds(cluster, checked, cluster.world.is_cold());
        holds_at_rest(cluster);
        if cluster.gone || cluster.is_finished() {
            return;
        }
        let at = wakes_at(&decision).expect("a deadline");
        cluster.world.now = cluster.world.now.max(at);
        cluster.kubelets_end();
    }
    panic!("no end: {:#?}", cluster.status());
}

#[test]
fn the_generated_sequences_reach_every_stage() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let sequences = prop::collection::vec(event(), 0..40);
    let mut reached: Vec<(Stage, usize)> = Vec::new();
    for round in 0..600 {
        let spec = if round % 3 == 0 {
            json!({"strategy": {"type": "Cold"}})
        } else {
            json!({})
        };
        let mut cluster = Cluster::new(spec);
        let mut story = 0;
        for event in sequences.new_tree(&mut runner).unwrap().current() {
            happen(&mut cluster, &mut story, event);
            let stage = stage::of(&cluster.world);
            match reached.iter_mut().find(|(s, _)| *s == stage) {
                Some((_, count)) => *count += 1,
                None => reached.push((stage, 1)),
            }
            if cluster.gone {
                break;
            }
            cluster.settle();
        }
    }
    for stage in [
        Stage::Checking,
        Stage::Moving,
        Stage::Aborted,
        Stage::Committed,
        Stage::ColdMoving,
        Stage::ColdAborted,
        Stage::ColdCommitted,
        Stage::Finished,
    ] {
        let count = reached.iter().find(|(s, _)| *s == stage).map_or(0, |(_, count)| *count);
        assert!(count >= 20, "{stage:?} was reached {count} times: {reached:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_rules_hold_and_it_ends(
        kind in 0..4,
        events in prop::collection::vec((event(), prop::bool::weighted(0.7)), 0..40),
    ) {
        let spec = match kind {
            0 | 1 => json!({}),
            2 => json!({"strategy": {"type": "Cold"}}),
            _ => json!({"dryRun": true}),
        };
        let mut cluster = Cluster::new(spec);
        let is_cold = cluster.world.is_cold();
        let mut story = 0;
        cluster.settle();
        for (event, rests) in events {
            let checked = cluster.log.len();
            let settled = cluster.is_finished().then(|| cluster.status());
            happen(&mut cluster, &mut story, event);
            if cluster.gone {
                return Ok(());
            }
            if rests {
                cluster.settle();
                holds_at_rest(&cluster);
            } else {
                // The next event comes between two rounds of a pass.
                cluster.round();
            }
            holds(&cluster, checked, is_cold);
            if let Some(before) = settled {
                let after = cluster.status();
                prop_assert_eq!(before.phase, after.phase);
                prop_assert_eq!(before.completion_time, after.completion_time);
            }
        }
        comes_to_an_end(&mut cluster);
    }

    #[test]
    fn a_move_to_which_nothing_happens_succeeds(
        noise in prop::collection::vec(prop_oneof![Just(Event::RestartOperator), (1u16..9).prop_map(Event::Time), Just(Event::ReadsFail)], 9..40),
    ) {
        let mut cluster = Cluster::new(json!({}));
        let mut noise = noise.chunks(noise.len() / STORY.len());
        cluster.settle();
        for event in STORY {
            for odd in noise.next().unwrap_or_default() {
                happen(&mut cluster, &mut 0, *odd);
                cluster.settle();
            }
            happen(&mut cluster, &mut 0, event);
            cluster.settle();
        }
        let (phase, _, message) = cluster.finished();
        prop_assert_eq!(phase, Phase::Succeeded, "{}", message);
    }
}
