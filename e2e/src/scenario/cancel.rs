//! A user changes their mind: the migration is canceled, the pod deleted, the object deleted, whatever the phase.

use anyhow::{Result, ensure};
use crds::ProcessMigration;
use crds::process_migration::Phase;
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

use super::Scenario;
use super::moves::{Move, SETTLED, because, follow, is_settled, is_true, move_to, phase, story};
use super::stage::{NAMESPACE, Stage};
use super::subject::{Plan, Subject};
use crate::invariants;

/// The phases of a move in their order.
const PHASES: [Phase; 6] = [
    Phase::Pending,
    Phase::Preparing,
    Phase::Freezing,
    Phase::Restoring,
    Phase::Committing,
    Phase::Finalizing,
];

pub(super) fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for phase in PHASES {
        let name = phase.as_str().to_lowercase();
        all.push(Scenario::new(format!("a_cancel_while_{name}_ends_with_one_copy"), cancel).case(phase.as_str()));
        all.push(
            Scenario::new(
                format!("a_pod_deleted_while_{name}_is_gone_and_nothing_is_left"),
                delete_pod,
            )
            .case(phase.as_str()),
        );
        all.push(
            Scenario::new(
                format!("a_migration_deleted_while_{name}_ends_with_one_copy"),
                delete_migration,
            )
            .case(phase.as_str()),
        );
    }
    all
}

/// Starts a move and waits until it has reached a phase, or is past it.
fn until(stage: &Stage, subject: &Subject, wanted: &str) -> Result<Move> {
    let migration = Move::create(stage, &subject.pod, None, &json!({}))?;
    migration.wait(stage, wanted, SETTLED, |migration| {
        phase(migration).is_some_and(|phase| {
            phase.as_str() == wanted || PHASES.iter().any(|one| one.as_str() == wanted && *one < phase)
        })
    })?;
    Ok(migration)
}

/// Enough memory that a freeze lasts long enough to be hit.
fn plan(name: &str, wanted: &str) -> Plan {
    let mib = if ["Freezing", "Restoring", "Committing"].contains(&wanted) {
        512
    } else {
        64
    };
    Plan {
        mib,
        ..Plan::small(&format!("{name}-{}", wanted.to_lowercase()))
    }
}

/// After the end: the pod is where the migration says, whichever way it went.
fn one_copy(stage: &Stage, subject: &mut Subject, migration: &ProcessMigration) -> Result<()> {
    match phase(migration) {
        Some(Phase::Succeeded) => follow(subject, migration)?,
        Some(Phase::Canceled) => ensure!(
            because(migration, "Succeeded").0 == "CanceledByUser",
            "{}",
            story(migration)
        ),
        _ => anyhow::bail!("neither moved nor canceled: {}", story(migration)),
    }
    subject.check(stage)?;
    invariants::one_life(stage, subject)?;
    invariants::exactly_one(stage, subject)?;
    invariants::nothing_left(stage)?;
    move_to(stage, subject, None)?;
    invariants::one_life(stage, subject)?;
    invariants::nothing_left(stage)
}

fn cancel(stage: &Stage, case: &str) -> Result<()> {
    let mut subject = Subject::start(stage, &plan("cancel", case))?;
    let migration = until(stage, &subject, case)?;
    migration.cancel(stage)?;
    let settled = migration.settled(stage)?;
    one_copy(stage, &mut subject, &settled)?;
    subject.remove(stage)
}

fn delete_migration(stage: &Stage, case: &str) -> Result<()> {
    let mut subject = Subject::start(stage, &plan("object", case))?;
    let migration = until(stage, &subject, case)?;
    let target = migration
        .get(stage)?
        .status
        .and_then(|status| status.target)
        .and_then(|target| target.pod_name);
    stage.delete::<ProcessMigration>(&migration.name, None)?;
    let mut last = None;
    stage.wait("the migration to be gone", SETTLED, || {
        match stage.find::<ProcessMigration>(NAMESPACE, &migration.name)? {
            Some(object) => {
                let story = story(&object);
                last = Some(object);
                anyhow::bail!("{story}")
            }
            None => Ok(()),
        }
    })?;
    // Whether it was committed before it was deleted is seen by which pod is there.
    if stage.find::<Pod>(NAMESPACE, &subject.pod)?.is_none() {
        subject.pod = target.or_else(|| last?.status?.target?.pod_name).unwrap_or_default();
    }
    subject.check(stage)?;
    invariants::one_life(stage, &subject)?;
    invariants::exactly_one(stage, &subject)?;
    invariants::nothing_left(stage)?;
    move_to(stage, &mut subject, None)?;
    subject.remove(stage)
}

fn delete_pod(stage: &Stage, case: &str) -> Result<()> {
    let mut subject = Subject::start(stage, &plan("deleted", case))?;
    let migration = until(stage, &subject, case)?;
    stage.delete::<Pod>(&subject.pod, None)?;
    let settled = migration.wait(stage, "settled", SETTLED, is_settled)?;
    invariants::one_life(stage, &subject)?;
    if is_true(&settled, "Committed") || phase(&settled) == Some(Phase::Succeeded) {
        // The deletion of a pod that has been released is what the migration wants as well.
        follow(&mut subject, &settled)?;
        subject.check(stage)?;
        invariants::exactly_one(stage, &subject)?;
    } else {
        ensure!(
            ["PodDeleted", "PodTerminating", "SourceLost"].contains(&because(&settled, "Succeeded").0.as_str()),
            "{}",
            story(&settled)
        );
        invariants::none(stage, &subject)?;
    }
    invariants::nothing_left(stage)?;
    subject.remove(stage)
}
