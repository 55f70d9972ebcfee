//! A decision in the making: the stored view, changed step by step.

use crds::Reason;
use crds::condition::Status;
use crds::process_migration::{ActiveOn, DecisionValue, Phase, ProcessMigrationStatus, cond};
use jiff::{SignedDuration, Timestamp};

use super::effect::{Cause, Decision, Effects, FinalizerChange, Wake};
use super::view::View;
use super::wait::Wait;
use super::world::World;

/// After this long a wait is shown in condition `Stalled`.
pub const PATIENCE: SignedDuration = SignedDuration::from_secs(10);

/// Look again after this long where something could not be read.
const RETRY: SignedDuration = SignedDuration::from_secs(1);

/// A decision in the making.
#[derive(Debug)]
pub struct Draft<'a> {
    /// What was observed.
    pub world: &'a World,
    /// The status as stored.
    pub status: ProcessMigrationStatus,
    /// What the operator's part is to say.
    pub view: View,
    /// What is to be done.
    pub effects: Effects,
    wake: Wake,
    guarded: bool,
}

impl<'a> Draft<'a> {
    /// Begins with what is stored.
    #[must_use]
    pub fn new(world: &'a World) -> Self {
        let status = world.status();
        let mut view = View::stored(&status, world.migration.metadata.generation, world.now);
        view.observe_generation();
        Draft {
            world,
            status,
            view,
            effects: Effects::default(),
            wake: Wake::AwaitChange,
            guarded: false,
        }
    }

    /// Ends with what was decided.
    #[must_use]
    pub fn done(self) -> Decision {
        Decision {
            effects: self.effects,
            view: self.view,
            guarded: self.guarded,
            wake: self.wake,
        }
    }

    /// Changes nothing and looks again soon: something could not be read.
    #[must_use]
    pub fn unknown(mut self) -> Decision {
        self.wake_at(self.world.now + RETRY);
        self.done()
    }

    /// Looks again at this time at the latest.
    pub fn wake_at(&mut self, at: Timestamp) {
        self.wake = self.wake.or_at(at);
    }

    /// The view is only to be written over the very status that was observed.
    pub fn guard(&mut self) {
        self.guarded = true;
    }

    /// Whether the finalizer is there.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.world
            .migration
            .metadata
            .finalizers
            .iter()
            .flatten()
            .any(|f| f == crds::names::FINALIZER)
    }

    /// Lets the migration go if we hold it.
    pub fn release(&mut self) {
        if self.is_held() {
            self.effects.finalizer = Some(FinalizerChange::Remove);
        }
    }

    /// Shows what is waited for once it lasts, and takes the complaint back when it is over. Wakes at the next of: end of
    /// patience, `deadline`.
    pub fn wait(&mut self, wait: &Wait, deadline: Timestamp) {
        let patience = wait.since + PATIENCE;
        if self.world.now >= patience {
            self.view.set(cond::STALLED, Status::True, wait.reason, &wait.message);
        } else {
            self.view.unset(cond::STALLED);
            self.wake_at(patience);
        }
        if deadline > self.world.now {
            self.wake_at(deadline);
        }
        // Changes wake us; this is for what no watch tells.
        self.wake_at(self.world.now + PATIENCE);
    }

    /// Gives up before the commit: by the decision where there is one, at once where no agent can have acted.
    pub fn give_up(&mut self, cause: Cause) {
        match self.status.decision.as_ref().map(|d| d.value) {
            Some(DecisionValue::Undecided) => self.effects.abort = Some(cause),
            // Committed and Aborted have their own stages.
            Some(DecisionValue::Committed | DecisionValue::Aborted) => {}
            None => {
                // It must not be opened behind the end, neither by this pass nor by one that saw a later status.
                self.effects.open_decision = false;
                self.guarded = true;
                self.refuse(&cause);
            }
        }
    }

    /// Ends a migration of which no agent was told more than to check.
    pub fn refuse(&mut self, cause: &Cause) {
        let phase = if cause.reason == Reason::CanceledByUser {
            Phase::Canceled
        } else {
            Phase::Failed
        };
        self.view
            .set(cond::ADMITTED, Status::False, cause.reason, &cause.message);
        self.view.finish(phase, false, cause.reason, &cause.message);
    }

    /// Notes where the processes are.
    pub fn active_on(&mut self, place: ActiveOn) {
        self.view.active_on = Some(place);
    }
}
