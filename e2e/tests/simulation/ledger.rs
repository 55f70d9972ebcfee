//! Steps as node-agent/src/session/ledger.rs runs them: journal, deadline, faults, stop.

use std::cell::RefCell;
use std::rc::Rc;

use crds::Reason;
use crds::process_migration::Failure;
use node_agent::decide::step::{Role, Step};
use node_agent::fault::When;
use node_agent::journal::Record;

use super::agent::{Failed, failed};
use super::cluster::Cluster;
use super::fault::Strike;

/// Between two tries of a step that must happen.
const AGAIN: u64 = 500;

pub(crate) type Stop = Rc<RefCell<Option<Failed>>>;

#[derive(Clone)]
pub(crate) struct Ledger {
    c: Cluster,
    n: usize,
    pub(crate) key: (String, Role),
    pub(crate) stop: Stop,
}

impl Ledger {
    pub(crate) fn new(c: &Cluster, n: usize, key: (String, Role)) -> Self {
        Ledger {
            c: c.clone(),
            n,
            key,
            stop: Rc::default(),
        }
    }

    pub(crate) fn records(&self) -> Vec<Record> {
        self.c.nodes[self.n]
            .borrow()
            .journals
            .get(&self.key)
            .cloned()
            .unwrap_or_default()
    }

    pub(crate) fn has_begun(&self, step: Step) -> bool {
        self.records().contains(&Record::Begin { step })
    }

    /// On the disk when this returns; a crash may come just before or just after.
    pub(crate) async fn record(&self, record: Record) {
        self.c.clock.sleep(self.c.clock.below(3)).await;
        self.c.nodes[self.n]
            .borrow_mut()
            .journals
            .entry(self.key.clone())
            .or_default()
            .push(record);
        self.c.clock.sleep(self.c.clock.below(2)).await;
    }

    pub(crate) async fn stopped(&self) -> Failed {
        self.c.clock.until(|| self.stop.borrow().clone()).await
    }

    pub(crate) async fn forward<T>(
        &self,
        step: Step,
        work: impl AsyncFnMut() -> Result<T, Failed>,
    ) -> Result<T, Failed> {
        if let Some(why) = self.stop.borrow().clone() {
            return Err(why);
        }
        self.run(step, true, work).await
    }

    /// A step that must happen: until it has.
    pub(crate) async fn must(&self, step: Step, mut work: impl AsyncFnMut()) {
        let mut work = async || {
            work().await;
            Ok(())
        };
        while self.run(step, false, &mut work).await.is_err() {
            self.c.clock.sleep(AGAIN).await;
        }
    }

    async fn run<T>(
        &self,
        step: Step,
        may_stop: bool,
        mut work: impl AsyncFnMut() -> Result<T, Failed>,
    ) -> Result<T, Failed> {
        self.record(Record::Begin { step }).await;
        let body = async {
            let before = self.fault(step, When::Before, may_stop).await?;
            let mut result = work().await?;
            if before == Strike::Repeat && is_repeatable(step) {
                result = work().await?;
            }
            self.fault(step, When::After, may_stop).await?;
            Ok(result)
        };
        let within = u64::try_from(step.deadline().as_millis()).unwrap();
        let late = || {
            Err(failed(
                Reason::StepFailed,
                format!("step {} did not end in time", step.name()),
            ))
        };
        let result = self.c.clock.timeout(within, body).await.unwrap_or_else(late);
        match &result {
            Ok(_) => self.record(Record::End { step }).await,
            Err(why) => {
                self.c
                    .say(format!("{} failed: {} {}", step.name(), why.reason, why.message));
                let Failure { reason, message } = why.clone();
                self.record(Record::Failed { step, reason, message }).await;
            }
        }
        result
    }

    async fn fault(&self, step: Step, when: When, may_stop: bool) -> Result<Strike, Failed> {
        self.c.say(format!("{} {when:?}", step.name()));
        match self.c.strike(self.n, step, when) {
            strike @ (Strike::None | Strike::Repeat) => Ok(strike),
            Strike::Fail => Err(failed(
                Reason::StepFailed,
                format!("a fault at {} {when:?}", step.name()),
            )),
            Strike::Hang if may_stop => Err(self.stopped().await),
            Strike::Hang | Strike::Die => std::future::pending().await,
        }
    }
}

/// Whether a step has an effect that can be had twice without a second connection.
pub(crate) fn is_repeatable(step: Step) -> bool {
    match step {
        Step::SourceConnect
        | Step::SourceDump
        | Step::SourceCure
        | Step::SourceComplete
        | Step::TargetReserve
        | Step::TargetReceive => false,
        Step::SourceReserve
        | Step::SourceCopy
        | Step::SourceFreeze
        | Step::SourceHoldPackets
        | Step::SourceMoveAway
        | Step::SourceRepair
        | Step::SourceReleasePackets
        | Step::SourceThaw
        | Step::SourceCleanUp
        | Step::TargetHandOff
        | Step::TargetPrepareNetwork
        | Step::TargetRestore
        | Step::TargetAdjust
        | Step::TargetCommit
        | Step::TargetThaw
        | Step::TargetDestroy
        | Step::TargetCleanUp => true,
    }
}
