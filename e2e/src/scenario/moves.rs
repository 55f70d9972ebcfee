//! Migrations as a user makes and watches them.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use crds::ProcessMigration;
use crds::process_migration::Phase;
use serde_json::{Value, json};

use super::stage::{NAMESPACE, Stage};
use super::subject::Subject;

/// How long a migration may take to be settled.
pub const SETTLED: Duration = Duration::from_secs(90);

/// A migration that was asked for.
#[derive(Clone, Debug)]
pub struct Move {
    /// Name of the object.
    pub name: String,
}

/// The object for a move of a pod.
#[must_use]
pub fn object(name: &str, pod: &str, target: Option<&str>, more: &Value) -> Value {
    let mut spec = json!({"podRef": {"name": pod}});
    if let Some(target) = target {
        spec["target"] = json!({"nodeName": target});
    }
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    json!({"apiVersion": "peregrine.dev/v1alpha1", "kind": "ProcessMigration", "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec})
}

impl Move {
    /// Asks for it.
    ///
    /// # Errors
    /// If the API server refuses the object.
    pub fn create(stage: &Stage, pod: &str, target: Option<&str>, more: &Value) -> Result<Self> {
        Self::create_as(stage, new_name(pod), pod, target, more)
    }

    /// Asks for it under a name that is known already.
    ///
    /// # Errors
    /// If the API server refuses the object.
    pub fn create_as(stage: &Stage, name: String, pod: &str, target: Option<&str>, more: &Value) -> Result<Self> {
        stage.create::<ProcessMigration>(object(&name, pod, target, more))?;
        Ok(Self { name })
    }

    /// The object as it is.
    ///
    /// # Errors
    /// If it is not there.
    pub fn get(&self, stage: &Stage) -> Result<ProcessMigration> {
        stage
            .find(NAMESPACE, &self.name)?
            .with_context(|| format!("there is no migration {}", self.name))
    }

    /// Waits until the object is as asked.
    ///
    /// # Errors
    /// If that does not happen in time; the message tells where it stands.
    pub fn wait(
        &self,
        stage: &Stage,
        what: &str,
        limit: Duration,
        reached: impl Fn(&ProcessMigration) -> bool,
    ) -> Result<ProcessMigration> {
        stage.wait(&format!("{} to be {what}", self.name), limit, || {
            let migration = self.get(stage)?;
            if reached(&migration) {
                Ok(migration)
            } else {
                bail!("{}", story(&migration))
            }
        })
    }

    /// Waits until it is settled.
    ///
    /// # Errors
    /// If that does not happen in time.
    pub fn settled(&self, stage: &Stage) -> Result<ProcessMigration> {
        self.wait(stage, "settled", SETTLED, is_settled)
    }

    /// Gives up, if that is still possible.
    ///
    /// # Errors
    /// If the API server refuses.
    pub fn cancel(&self, stage: &Stage) -> Result<()> {
        stage
            .merge::<ProcessMigration>(&self.name, &json!({"spec": {"desiredState": "Canceled"}}))
            .map(drop)
    }
}

/// Moves a workload to a node, or anywhere, and follows it there.
///
/// # Errors
/// If the move does not succeed, or the oracle finds something wrong afterwards.
pub fn move_to(stage: &Stage, subject: &mut Subject, target: Option<&str>) -> Result<ProcessMigration> {
    move_with(stage, subject, target, &json!({}))
}

/// As [`move_to`], with more in the migration's spec.
///
/// # Errors
/// As [`move_to`].
pub fn move_with(stage: &Stage, subject: &mut Subject, target: Option<&str>, more: &Value) -> Result<ProcessMigration> {
    let source = subject.node(stage)?;
    let migration = Move::create(stage, &subject.pod, target, more)?.settled(stage)?;
    succeeded(&migration)?;
    follow(subject, &migration)?;
    let node = subject.node(stage)?;
    ensure!(node != source, "the pod is still on {source}");
    if let Some(target) = target {
        ensure!(node == target, "the pod is on {node} and not on {target}");
    }
    subject.check(stage)?;
    Ok(migration)
}

/// That it succeeded.
///
/// # Errors
/// If it did not: its story.
pub fn succeeded(migration: &ProcessMigration) -> Result<()> {
    ensure!(
        phase(migration) == Some(Phase::Succeeded),
        "the move did not succeed: {}",
        story(migration)
    );
    Ok(())
}

/// Lets a workload be known by the name of its new pod.
///
/// # Errors
/// If the migration names none.
pub fn follow(subject: &mut Subject, migration: &ProcessMigration) -> Result<()> {
    subject.pod = migration
        .status
        .as_ref()
        .and_then(|status| status.target.as_ref()?.pod_name.clone())
        .context("the migration does not name its target pod")?;
    Ok(())
}

/// Whether nothing will change any more.
#[must_use]
pub fn is_settled(migration: &ProcessMigration) -> bool {
    is_true(migration, "Finished")
}

/// Whether a condition is True.
#[must_use]
pub fn is_true(migration: &ProcessMigration, condition: &str) -> bool {
    migration
        .status
        .as_ref()
        .is_some_and(|status| crds::condition::is_true(&status.conditions, condition))
}

/// Its phase.
#[must_use]
pub fn phase(migration: &ProcessMigration) -> Option<Phase> {
    migration.status.as_ref()?.phase
}

/// Reason and message of a condition.
#[must_use]
pub fn because(migration: &ProcessMigration, condition: &str) -> (String, String) {
    migration
        .status
        .as_ref()
        .and_then(|status| crds::condition::find(&status.conditions, condition))
        .map(|condition| (condition.reason.clone(), condition.message.clone()))
        .unwrap_or_default()
}

/// Where it stands, in one line.
#[must_use]
pub fn story(migration: &ProcessMigration) -> String {
    let Some(status) = &migration.status else {
        return "the operator has not seen it".to_owned();
    };
    let decision = status.decision.as_ref().map(|decision| {
        format!(
            "{:?} {}",
            decision.value,
            decision.message.as_deref().unwrap_or_default()
        )
    });
    let conditions: Vec<String> = status
        .conditions
        .iter()
        .map(|c| format!("{}={} {} ({})", c.type_, c.status, c.reason, c.message))
        .collect();
    let step = |step: Option<&String>| step.cloned().unwrap_or_else(|| "-".to_owned());
    format!(
        "phase {:?}, decision {}, source step {}, target step {}; {}",
        status.phase,
        decision.unwrap_or_else(|| "none".to_owned()),
        step(status.source.as_ref().and_then(|half| half.step.as_ref())),
        step(status.target.as_ref().and_then(|half| half.step.as_ref())),
        conditions.join("; ")
    )
}

/// A name for a migration of a pod, which no other has.
#[must_use]
pub fn new_name(pod: &str) -> String {
    let pod: String = pod.chars().take(40).collect();
    format!("{}-{}", pod.trim_end_matches(['-', '.']), unique())
}

/// A short suffix that no other object of this run has.
fn unique() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map(|time| time.as_secs() % 1_000_000)
        .unwrap_or_default();
    format!("{seconds:x}{:x}", NEXT.fetch_add(1, Ordering::Relaxed))
}
