//! The rounds of a running pod, from the first copy to the moment at which it should be frozen.

use std::{
    ops::ControlFlow,
    time::{Duration, Instant},
};

use crate::{
    converge::{Convergence, Goal, Measured, Next, Prediction},
    copier::Sink,
    tracker::{Error, Member, Round, Tracker},
};

/// Between two looks whether to go on, while a round has to wait.
const LOOK: Duration = Duration::from_millis(20);

/// Where it stands, after each round.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Rounds so far.
    pub rounds: u32,
    /// The last one.
    pub round: Round,
    /// Bytes of pages that were sent in all rounds.
    pub sent: u64,
    /// The freeze, if it began now.
    pub prediction: Prediction,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    /// It should be frozen now.
    Freeze(Progress),
    /// More rounds bring nothing, and the freeze would be too long.
    Hopeless(Progress),
    /// It was stopped from outside.
    Stopped,
}

/// Runs the rounds. `members` gives the pod's processes, anew for each; `each` is told how it stands, and may stop it. Blocking.
///
/// # Errors
/// The tracker's. What the target has is of no use then.
pub fn run<S: Sink + Send>(
    tracker: &mut Tracker,
    mut members: impl FnMut() -> Vec<Member>,
    sinks: &mut [S],
    goal: &Goal,
    mut each: impl FnMut(&Progress) -> ControlFlow<()>,
) -> Result<End, Error> {
    let mut convergence = Convergence::default();
    let mut progress = Progress::default();
    let mut last_look: Option<Instant> = None;
    loop {
        let look = Instant::now();
        let round = tracker.round(&members(), sinks)?;
        convergence.add(
            Measured {
                since_look: last_look.map_or(Duration::ZERO, |l| look.duration_since(l)),
                dirty: round.dirty,
                held: round.held,
                look: round.looked,
                copy: round.copied,
                sent: round.sent,
            },
            goal,
        );
        last_look = Some(look);
        progress = Progress {
            rounds: progress.rounds + 1,
            round,
            sent: progress.sent + round.sent,
            prediction: convergence.predict(goal, look.elapsed()),
        };
        if each(&progress).is_break() {
            return Ok(End::Stopped);
        }
        match convergence.next(goal) {
            Next::Freeze => return Ok(End::Freeze(progress)),
            Next::Hopeless => return Ok(End::Hopeless(progress)),
            Next::Round { apart } => {
                // A pod may be told to stop while it waits.
                while let Some(left) = apart.checked_sub(look.elapsed()).filter(|l| !l.is_zero()) {
                    std::thread::sleep(left.min(LOOK));
                    if each(&progress).is_break() {
                        return Ok(End::Stopped);
                    }
                }
            }
        }
    }
}
