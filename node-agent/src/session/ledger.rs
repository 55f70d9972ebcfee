//! Runs the steps of a session: a record before and after each, its deadline, the faults of tests, and why it is to stop.

use std::{
    fmt,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crds::Reason;
use tokio::sync::watch;

use crate::{
    decide::step::Step,
    fault::{Action, Faults, When},
    journal::{Journal, Record},
    metrics::Metrics,
};

/// Between two tries of what must happen.
const AGAIN: Duration = Duration::from_millis(500);

/// Why a session cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failed {
    /// A reason of the API's vocabulary.
    pub reason: String,
    /// One sentence that names the cause.
    pub message: String,
}

impl Failed {
    /// With a reason and a sentence.
    pub(super) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason: reason.as_str().to_owned(),
            message: message.into(),
        }
    }

    /// From an error with all its causes.
    pub(super) fn because(reason: Reason, error: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(reason, crate::error::chain(error))
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.message)
    }
}

/// Says when a session is to give up, and why. The first reason stays.
#[derive(Clone, Debug)]
pub(super) struct Stop(Arc<watch::Sender<Option<Failed>>>);

impl Default for Stop {
    fn default() -> Self {
        Self(Arc::new(watch::channel(None).0))
    }
}

impl Stop {
    /// Gives up.
    pub(super) fn give_up(&self, why: Failed) {
        self.0.send_if_modified(|slot| {
            let first = slot.is_none();
            if first {
                *slot = Some(why);
            }
            first
        });
    }

    /// Why, if so.
    #[must_use]
    pub(super) fn reason(&self) -> Option<Failed> {
        self.0.borrow().clone()
    }

    /// Waits for it.
    pub(super) async fn wait(&self) -> Failed {
        let mut receiver = self.0.subscribe();
        loop {
            if let Some(why) = receiver.borrow_and_update().clone() {
                return why;
            }
            // The sender lives as long as `self`.
            if receiver.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// The journal of a session and what belongs to its steps.
#[derive(Clone, Debug)]
pub(super) struct Ledger {
    journal: Arc<Mutex<Journal>>,
    faults: Faults,
    metrics: Arc<Metrics>,
    /// Why the forward steps are to stop.
    pub stop: Stop,
}

impl Ledger {
    /// For an open journal.
    #[must_use]
    pub(super) fn new(journal: Journal, faults: Faults, metrics: Arc<Metrics>) -> Self {
        Self {
            journal: Arc::new(Mutex::new(journal)),
            faults,
            metrics,
            stop: Stop::default(),
        }
    }

    /// All records.
    #[must_use]
    pub(super) fn records(&self) -> Vec<Record> {
        self.journal
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .records()
            .to_vec()
    }

    /// Name of the migration.
    fn migration(&self) -> String {
        match self
            .journal
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .records()
            .first()
        {
            Some(Record::Start(start)) => start.name.clone(),
            _ => String::new(),
        }
    }

    /// Whether a step has begun.
    #[must_use]
    pub(super) fn has_begun(&self, step: Step) -> bool {
        self.records().contains(&Record::Begin { step })
    }

    /// Adds a record, durable when this returns.
    ///
    /// # Errors
    /// The disk refuses: then nothing may be done that the record announces.
    pub(super) async fn record(&self, record: Record) -> Result<(), Failed> {
        let settled = record == Record::Settled;
        let journal = self.journal.clone();
        let written = blocking(move || journal.lock().unwrap_or_else(PoisonError::into_inner).append(record)).await?;
        written.map_err(|e| Failed::because(Reason::StepFailed, &e))?;
        if settled {
            self.count();
        }
        Ok(())
    }

    /// Counts an attempt that has ended.
    fn count(&self) {
        let records = self.records();
        let decided = records.iter().find_map(|r| match r {
            Record::Decided { committed, .. } => Some(*committed),
            _ => None,
        });
        if let (Some(Record::Start(start)), Some(committed)) = (records.first(), decided) {
            self.metrics.attempt(start.role, committed);
        }
    }

    /// Runs a step of the way forward: it does not begin when the session is to stop.
    ///
    /// # Errors
    /// Its own, its deadline's, or why the session is to stop.
    pub(super) async fn forward<T>(
        &self,
        step: Step,
        work: impl Future<Output = Result<T, Failed>>,
    ) -> Result<T, Failed> {
        if let Some(why) = self.stop.reason() {
            return Err(why);
        }
        self.run(step, true, work).await
    }

    /// Runs a step that must happen: behind the commit, or on the way back. The caller tries again until it succeeds.
    ///
    /// # Errors
    /// Its own or its deadline's.
    pub(super) async fn must<T>(&self, step: Step, work: impl Future<Output = Result<T, Failed>>) -> Result<T, Failed> {
        self.run(step, false, work).await
    }

    /// Runs a step that must happen until it has. Every try is journaled.
    pub(super) async fn until_done<F, Fut>(&self, step: Step, work: F)
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<(), Failed>>,
    {
        while let Err(error) = self.must(step, work()).await {
            tracing::error!(step = step.name(), %error, "a step that must happen failed; trying again");
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Notes the decision, until it is on the disk.
    pub(super) async fn decided(&self, committed: bool, why: &Failed) {
        let known = Record::Decided {
            committed,
            reason: why.reason.clone(),
            message: why.message.clone(),
        };
        while let Err(error) = self.record(known.clone()).await {
            tracing::error!(%error, "failed to note the decision; trying again");
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn run<T>(
        &self,
        step: Step,
        may_stop: bool,
        work: impl Future<Output = Result<T, Failed>>,
    ) -> Result<T, Failed> {
        let begun = Instant::now();
        self.record(Record::Begin { step }).await?;
        let body = async {
            self.fault(step, When::Before, may_stop).await?;
            let result = work.await?;
            self.fault(step, When::After, may_stop).await?;
            Ok(result)
        };
        let result = tokio::time::timeout(step.deadline(), body).await.unwrap_or_else(|_| {
            Err(Failed::new(
                Reason::StepFailed,
                format!("step {} did not end within {:?}", step.name(), step.deadline()),
            ))
        });
        let elapsed = begun.elapsed();
        self.metrics.step(step, result.is_ok(), elapsed);
        let elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        match &result {
            Ok(_) => {
                tracing::info!(step = step.name(), elapsed_ms, "step done");
                self.record(Record::End { step }).await?;
            }
            Err(why) => {
                tracing::warn!(
                    step = step.name(),
                    elapsed_ms,
                    reason = why.reason,
                    error = why.message,
                    "step failed"
                );
                self.record(Record::Failed {
                    step,
                    reason: why.reason.clone(),
                    message: why.message.clone(),
                })
                .await?;
            }
        }
        result
    }

    async fn fault(&self, step: Step, when: When, may_stop: bool) -> Result<(), Failed> {
        if !self.faults.are_enabled() {
            return Ok(());
        }
        let (faults, migration) = (self.faults.clone(), self.migration());
        match blocking(move || faults.strikes(step, when, &migration)).await? {
            None => Ok(()),
            Some(Action::Fail) => Err(Failed::new(
                Reason::StepFailed,
                format!("a fault was injected at {} {when:?}", step.name()),
            )),
            Some(Action::Hang) if may_stop => Err(self.stop.wait().await),
            Some(Action::Hang) => std::future::pending().await,
            Some(Action::Kill) => {
                // Nothing of this process may run on, as if the kernel had killed it.
                let killed = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
                tracing::error!(?killed, "the fault did not kill");
                std::future::pending().await
            }
        }
    }
}

/// Runs what blocks off the async threads.
///
/// # Errors
/// It panicked.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failed> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Failed::because(Reason::StepFailed, &e))
}

/// Milliseconds since then.
pub(super) fn millis(since: Instant) -> u32 {
    u32::try_from(since.elapsed().as_millis()).unwrap_or(u32::MAX)
}
