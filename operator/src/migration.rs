//! A pass over one migration: observe, decide, act, report; again while something was done, so that a pass ends where only
//! a change from outside can lead further.

pub mod act;
pub mod observe;
pub mod report;

use std::sync::Arc;
use std::time::Duration;

use crds::ProcessMigration;
use crds::condition::is_true;
use crds::process_migration::{DecisionValue, cond};
use jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use kube::runtime::controller::Action;

use crate::context::{Context, is_finished};
use crate::decide::world::Learned;
use crate::decide::{Wake, decide};
use crate::error::{Error, chain};

/// Most rounds of one pass. Each does something; a pass that needs more is left to the next.
const ROUNDS: usize = 16;
/// Longest pass. A request to a server that went away without a word would hold it for minutes.
const LONGEST: Duration = Duration::from_secs(30);
/// Between two looks whether the first lists of nodes are here. A leader that does not wait for them sees none, and would give up
/// every migration because its nodes were removed.
const FIRST_LISTS: Duration = Duration::from_millis(200);
/// An object of which the watch has told nothing for this long is read past it: its connection may be dead.
const UNCONFIRMED: SignedDuration = SignedDuration::from_secs(15);
/// Before the next pass where this one lost a race over and over.
const AFTER_CONFLICTS: Duration = Duration::from_millis(200);

/// One pass.
pub async fn reconcile(watched: Arc<ProcessMigration>, ctx: Arc<Context>) -> Result<Action, Error> {
    if !ctx.leads() {
        return match tokio::time::timeout(LONGEST, release(watched.clone(), &ctx)).await {
            Ok(result) => result.map(|()| Action::await_change()),
            Err(_) => Err(Error::Deadline {
                migration: name(&watched),
            }),
        };
    }
    if !ctx.is_synced() {
        return Ok(Action::requeue(FIRST_LISTS));
    }
    let begun = std::time::Instant::now();
    let result = match tokio::time::timeout(LONGEST, pass(watched.clone(), &ctx)).await {
        Ok(result) => result,
        // What was under way is lost, not failed: the next pass observes what became of it.
        Err(_) => Err(Error::Deadline {
            migration: name(&watched),
        }),
    };
    let outcome = if result.is_ok() { "ok" } else { "error" };
    ctx.metrics.observe(
        "peregrine_reconcile_seconds",
        &[("controller", "migration"), ("outcome", outcome)],
        begun.elapsed().as_secs_f64(),
    );
    result
}

/// After an error: soon again, whatever it was; preconditions keep repetitions harmless.
#[must_use]
pub fn after_error(migration: Arc<ProcessMigration>, error: &Error, _ctx: Arc<Context>) -> Action {
    tracing::warn!(
        migration = %name(&migration),
        uid = migration.uid().unwrap_or_default(),
        error = %chain(error),
        "a pass failed"
    );
    Action::requeue(Duration::from_secs(1))
}

/// What a replica that does not lead does: see [`crate::decide::Effects::of_any_replica`]. Only for a live move that is
/// committed; nothing is written to the migration.
async fn release(watched: Arc<ProcessMigration>, ctx: &Context) -> Result<(), Error> {
    let mut migration = watched;
    if !is_committed(&migration) || is_finished(&migration) {
        return Ok(());
    }
    for _ in 0..ROUNDS {
        let world = observe::observe(ctx, &migration, Learned::default()).await;
        let effects = decide(&world).effects.of_any_replica();
        if effects.is_empty() {
            return Ok(());
        }
        act::act(ctx, &world, effects).await?;
        match observe::read_again(ctx, &migration).await? {
            Some(newest) => migration = newest,
            None => return Ok(()),
        }
    }
    Ok(())
}

fn is_committed(migration: &ProcessMigration) -> bool {
    migration
        .status
        .as_ref()
        .and_then(|status| status.decision.as_ref())
        .is_some_and(|decision| decision.value == DecisionValue::Committed)
}

async fn pass(watched: Arc<ProcessMigration>, ctx: &Context) -> Result<Action, Error> {
    let mut migration = ctx.newest(watched);
    // Acceptance and admission count the others: one at a time.
    let _turn = if takes_a_slot(&migration) {
        let turn = ctx.admission.lock().await;
        migration = ctx.newest(migration);
        Some(turn)
    } else {
        None
    };
    let now = Timestamp::now();
    if !is_finished(&migration) && now.duration_since(ctx.saw(&migration, now).confirmed) >= UNCONFIRMED {
        match observe::read_again(ctx, &migration).await? {
            Some(newest) => migration = newest,
            None => return Ok(Action::await_change()),
        }
    }
    let mut learned = Learned::default();
    for _ in 0..ROUNDS {
        if !ctx.leads() {
            return Ok(Action::await_change());
        }
        let world = observe::observe(ctx, &migration, learned.clone()).await;
        let decision = decide(&world);
        let applied = act::act(ctx, &world, decision.effects).await?;
        let mut went_on = applied.done;
        if let Some(newest) = applied.newest {
            migration = newest;
        }
        learned = applied.learned;
        if applied.gone {
            return Ok(Action::await_change());
        }
        if applied.raced {
            match observe::read_again(ctx, &migration).await? {
                Some(newest) => migration = newest,
                None => return Ok(Action::await_change()),
            }
            continue;
        }
        match report::report(ctx, &world, &migration, decision.view, decision.guarded).await? {
            report::Written::Nothing => {}
            report::Written::Status(newest) => {
                migration = newest;
                went_on = true;
            }
            report::Written::Raced => match observe::read_again(ctx, &migration).await? {
                Some(newest) => {
                    migration = newest;
                    went_on = true;
                }
                None => return Ok(Action::await_change()),
            },
        }
        if !went_on {
            return Ok(action(decision.wake, world.now));
        }
    }
    Ok(Action::requeue(AFTER_CONFLICTS))
}

fn action(wake: Wake, now: Timestamp) -> Action {
    match wake {
        Wake::AwaitChange => Action::await_change(),
        Wake::At(at) => {
            let wait = Duration::try_from(at.duration_since(now)).unwrap_or_default();
            // A little late rather than a little early: the deadline must be over when we look.
            Action::requeue(wait.max(Duration::from_millis(20)) + Duration::from_millis(10))
        }
    }
}

fn takes_a_slot(migration: &ProcessMigration) -> bool {
    !is_finished(migration)
        && !migration
            .status
            .as_ref()
            .is_some_and(|s| is_true(&s.conditions, cond::ADMITTED))
}

/// `namespace/name`.
#[must_use]
pub fn name(migration: &ProcessMigration) -> String {
    format!("{}/{}", migration.namespace().unwrap_or_default(), migration.name_any())
}
