//! When to stop copying and freeze. A pure function of what the rounds measured.
//!
//! A workload that writes to pages of a set of `W` bytes at random dirties `W (1 - e^(-rt/W))` bytes in a time `t`. The
//! largest dirty set of any round is taken for `W`, which is on the safe side: where it is too small, it equals what was
//! measured and nothing is gained by a shorter time. So one round of `D` bytes in a time `T` predicts
//! `W (1 - (1 - D/W)^(t/T))` bytes for the time `t` between the last look and the freeze.

use std::time::Duration;

/// A prediction must get better by this much, or the rounds have stalled.
const BETTER: f64 = 0.9;
/// Rounds without that before it counts as stalled.
const STALLED: u32 = 2;
/// Between two looks while the workload must not suffer: each makes it pay some 0.8 µs for every page that it writes next.
const APART: Duration = Duration::from_millis(200);
/// Between two looks where the workload may be slowed down to converge.
const APART_SLOWING: Duration = Duration::from_millis(50);
/// A workload that writes at more than this part of the copy's rate is given so many rounds.
const RACE: f64 = 0.7;
const RACE_ROUNDS: u32 = 4;
/// Copying is never endless.
const MOST_ROUNDS: u32 = 30;

/// What one round measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measured {
    /// Since the look of the round before; not known in the first one.
    pub since_look: Duration,
    /// Bytes that were dirty.
    pub dirty: u64,
    /// Bytes held in all.
    pub held: u64,
    /// How long the look took.
    pub look: Duration,
    /// How long the copy took, until the target had everything.
    pub copy: Duration,
    /// Bytes that were sent in it.
    pub sent: u64,
}

/// What is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Goal {
    /// The longest freeze.
    pub freeze: Duration,
    /// What a freeze takes besides memory, as measured or assumed for this pod.
    pub fixed: Duration,
    /// Whether the workload may be slowed down by more frequent looks.
    pub may_slow: bool,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Freeze now.
    Freeze,
    /// One more round, not before this time has passed since the last look.
    Round {
        /// The time.
        apart: Duration,
    },
    /// More rounds bring nothing, and the freeze would be too long.
    Hopeless,
}

/// Where the copy stands.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prediction {
    /// How long the freeze would be if it began now.
    pub freeze: Duration,
    /// Bytes that the workload makes dirty in a second.
    pub dirty_rate: u64,
    /// Bytes of the pages that it writes to again and again.
    pub working_set: u64,
    /// Bytes that can be copied in a second.
    pub copy_rate: u64,
}

/// The rounds so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Convergence {
    rounds: u32,
    working_set: f64,
    copy_rate: f64,
    last: Measured,
    best: Option<f64>,
    stalled: u32,
}

impl Convergence {
    /// Rounds so far.
    #[must_use]
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    /// Takes a round into account.
    pub fn add(&mut self, round: Measured, goal: &Goal) {
        // Small rounds measure the latency, not the rate.
        if round.sent >= 1 << 20 || self.copy_rate == 0.0 {
            let rate = round.sent as f64 / round.copy.as_secs_f64().max(1e-6);
            self.copy_rate = if self.copy_rate == 0.0 {
                rate
            } else {
                // What the link gave last counts more than what it gave at first.
                0.5 * self.copy_rate + 0.5 * rate
            };
        }
        self.last = round;
        self.rounds += 1;
        if self.rounds == 1 {
            return;
        }
        self.working_set = self.working_set.max(round.dirty as f64);
        let freeze = self.predict(goal, round.copy).freeze.as_secs_f64();
        match self.best {
            Some(best) if freeze > best * BETTER => {
                self.stalled += 1;
                self.best = Some(best.min(freeze));
            }
            _ => {
                self.stalled = 0;
                self.best = Some(freeze);
            }
        }
    }

    /// What a freeze would take that begins `since_look` after the last look at the pages.
    #[must_use]
    pub fn predict(&self, goal: &Goal, since_look: Duration) -> Prediction {
        let (dirty, set) = (self.last.dirty as f64, self.working_set.max(1.0));
        let apart = self.last.since_look.as_secs_f64().max(1e-4);
        let share = (dirty / set).min(1.0);
        let expected = if self.rounds < 2 {
            // Nothing is known of how it writes.
            self.last.held as f64
        } else {
            set * (1.0 - (1.0 - share).powf(since_look.as_secs_f64() / apart))
        };
        let copy = expected / self.copy_rate.max(1.0);
        let look = self.last.look.as_secs_f64();
        let seconds = (goal.fixed.as_secs_f64() + look + copy).min(86_400.0);
        Prediction {
            freeze: Duration::from_secs_f64(seconds),
            dirty_rate: if self.rounds < 2 { 0 } else { (dirty / apart) as u64 },
            working_set: self.working_set as u64,
            copy_rate: self.copy_rate as u64,
        }
    }

    /// What to do after the last round that was added.
    #[must_use]
    pub fn next(&self, goal: &Goal) -> Next {
        if self.rounds < 2 {
            return Next::Round { apart: Duration::ZERO };
        }
        let freeze = self.predict(goal, self.last.copy).freeze;
        let good = freeze <= goal.freeze;
        // Nothing left that one more round could bring.
        let floor = goal.fixed + self.last.look;
        if good && (self.stalled > 0 || freeze.as_secs_f64() * BETTER <= floor.as_secs_f64()) {
            return Next::Freeze;
        }
        // The workload writes nearly as fast as can be copied: it would get better by a little in many rounds.
        let prediction = self.predict(goal, self.last.copy);
        let race = self.rounds > RACE_ROUNDS && prediction.dirty_rate as f64 > RACE * prediction.copy_rate as f64;
        if self.stalled >= STALLED || self.rounds >= MOST_ROUNDS || (race && !good) {
            return if good { Next::Freeze } else { Next::Hopeless };
        }
        let apart = if goal.may_slow && self.stalled > 0 {
            APART_SLOWING
        } else {
            APART
        };
        Next::Round { apart }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = (1 << 20) as f64;

    /// A workload of `held` MiB that writes `rate` MiB/s at random to `set` MiB of it, copied at `link` MiB/s.
    struct Workload {
        held: f64,
        set: f64,
        rate: f64,
        link: f64,
    }

    fn goal(freeze: u64) -> Goal {
        Goal {
            freeze: Duration::from_millis(freeze),
            fixed: Duration::from_millis(60),
            may_slow: false,
        }
    }

    impl Workload {
        fn dirty(&self, seconds: f64) -> f64 {
            if self.set == 0.0 {
                return 0.0;
            }
            self.set * (1.0 - (-self.rate * seconds / self.set).exp())
        }

        /// Runs the rounds to their end; what was decided, in which round, and the real freeze in milliseconds.
        fn run(&self, goal: &Goal) -> (Next, u32, f64, f64) {
            let mut convergence = Convergence::default();
            let look = self.held / 1024.0 * 0.006;
            let mut since = 0.0;
            let mut dirty = self.held;
            loop {
                let copy = dirty / self.link + 0.0005;
                convergence.add(
                    Measured {
                        since_look: Duration::from_secs_f64(since),
                        dirty: (dirty * MIB) as u64,
                        held: (self.held * MIB) as u64,
                        look: Duration::from_secs_f64(look),
                        copy: Duration::from_secs_f64(copy),
                        sent: (dirty * MIB) as u64,
                    },
                    goal,
                );
                let predicted = convergence
                    .predict(goal, Duration::from_secs_f64(copy))
                    .freeze
                    .as_secs_f64()
                    * 1e3;
                match convergence.next(goal) {
                    Next::Round { apart } => {
                        since = apart.as_secs_f64().max(copy + look);
                        dirty = self.dirty(since);
                    }
                    end => {
                        let real = goal.fixed.as_secs_f64() + look + self.dirty(copy) / self.link;
                        return (end, convergence.rounds(), predicted, real * 1e3);
                    }
                }
            }
        }
    }

    #[test]
    fn workloads_that_converge_are_frozen_in_time_and_others_are_not() {
        type Row = (&'static str, f64, f64, f64, f64, u64, Next, u32);
        let table: &[Row] = &[
            // name, held, set, rate, link (MiB, MiB/s), longest freeze, what is decided, at most so many rounds
            ("idle", 1024.0, 0.0, 0.0, 1500.0, 150, Next::Freeze, 3),
            ("5 MiB/s", 1024.0, 1024.0, 5.0, 1500.0, 150, Next::Freeze, 4),
            ("100 MiB/s", 1024.0, 1024.0, 100.0, 1500.0, 150, Next::Freeze, 5),
            (
                "100 MiB/s at 1 Gbit/s",
                1024.0,
                1024.0,
                100.0,
                110.0,
                300,
                Next::Hopeless,
                8,
            ),
            (
                "small hot set, fast",
                1024.0,
                48.0,
                5000.0,
                1500.0,
                150,
                Next::Freeze,
                6,
            ),
            (
                "1 GB/s over everything",
                1024.0,
                1024.0,
                1000.0,
                1500.0,
                150,
                Next::Freeze,
                6,
            ),
            (
                "1 GB/s over everything, slower link",
                1024.0,
                1024.0,
                1000.0,
                1000.0,
                150,
                Next::Hopeless,
                5,
            ),
            (
                "1 GB/s, long freeze allowed",
                1024.0,
                1024.0,
                1000.0,
                1500.0,
                1000,
                Next::Freeze,
                8,
            ),
            (
                "64 GiB at 100 MiB/s",
                65536.0,
                65536.0,
                100.0,
                1500.0,
                1000,
                Next::Freeze,
                10,
            ),
            ("nothing at all", 0.0, 0.0, 0.0, 1500.0, 150, Next::Freeze, 3),
            ("no goal can be met", 16.0, 0.0, 0.0, 1500.0, 10, Next::Hopeless, 6),
        ];
        let mut wrong = Vec::new();
        for (name, held, set, rate, link, freeze, expected, rounds) in table {
            let workload = Workload {
                held: *held,
                set: *set,
                rate: *rate,
                link: *link,
            };
            let (next, took, predicted, real) = workload.run(&goal(*freeze));
            eprintln!("{name}: {next:?} after {took} rounds, predicted {predicted:.1} ms, real {real:.1} ms");
            let honest = next != Next::Freeze || (real <= *freeze as f64 && predicted >= real * 0.9);
            if next != *expected || took > *rounds || !honest {
                wrong.push(*name);
            }
        }
        assert!(wrong.is_empty(), "{wrong:?}");
    }

    #[test]
    fn nothing_is_predicted_from_the_first_round_but_all_of_it() {
        let mut convergence = Convergence::default();
        let round = Measured {
            dirty: 1 << 30,
            held: 1 << 30,
            copy: Duration::from_secs(1),
            sent: 1 << 30,
            ..Measured::default()
        };
        convergence.add(round, &goal(100));
        assert_eq!(convergence.next(&goal(5000)), Next::Round { apart: Duration::ZERO });
        let prediction = convergence.predict(&goal(100), Duration::ZERO);
        assert!(prediction.freeze >= Duration::from_secs(1), "{prediction:?}");
        assert_eq!(prediction.copy_rate, 1 << 30);
    }

    #[test]
    fn a_workload_that_may_be_slowed_down_is_looked_at_more_often() {
        let slow = Goal {
            may_slow: true,
            ..goal(50)
        };
        let mut convergence = Convergence::default();
        let round = Measured {
            since_look: Duration::from_millis(200),
            dirty: 100 << 20,
            held: 1 << 30,
            copy: Duration::from_millis(100),
            sent: 100 << 20,
            ..Measured::default()
        };
        for _ in 0..3 {
            convergence.add(round, &slow);
        }
        assert_eq!(convergence.next(&slow), Next::Round { apart: APART_SLOWING });
        assert_eq!(convergence.next(&goal(50)), Next::Round { apart: APART });
    }
}
