//! What follows from the beats that were seen.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Report;

/// A pause worth noting: beats are 5 ms apart.
const GAP_MS: u64 = 40;
/// The most pauses that are kept for one life.
const MAX_GAPS: usize = 200;
/// Beats that may overtake each other on their way through a node, and within which time.
const REORDER: (u64, u64) = (3, 10);

/// One run of a container's program, from its start to its end, wherever it was: the processes that share a token.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    /// Name of the workload.
    pub name: String,
    /// Its container.
    pub container: String,
    /// Its token.
    pub token: String,
    /// Highest counter.
    pub counter: u64,
    /// Beats seen.
    pub beats: u64,
    /// Beats that were seen twice: two copies ran.
    pub doubled: u64,
    /// Beats far below the highest that had not been seen: an old state ran on.
    pub backward: u64,
    /// When the first beat came, in milliseconds since the witness started.
    pub first_ms: u64,
    /// When the last beat came.
    pub last_ms: u64,
    /// Addresses they came from, in the order of their first beat.
    pub sources: Vec<String>,
    /// Pauses.
    pub gaps: Vec<Gap>,
    /// Bits of the counters that were seen.
    #[serde(skip)]
    seen: Vec<u64>,
}

/// A pause between two beats.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// When it ended, in milliseconds since the witness started.
    pub at_ms: u64,
    /// How long it was.
    pub ms: u64,
    /// Beats that never arrived.
    pub lost: u64,
}

impl Life {
    /// The longest pause that ended after `since_ms`, in milliseconds.
    #[must_use]
    pub fn longest_gap(&self, since_ms: u64) -> u64 {
        self.gaps
            .iter()
            .filter(|gap| gap.at_ms >= since_ms)
            .map(|gap| gap.ms)
            .max()
            .unwrap_or(0)
    }

    fn note(&mut self, counter: u64, source: &str, now: u64) {
        let (word, bit) = (usize::try_from(counter / 64).unwrap_or(0), 1 << (counter % 64));
        if self.seen.len() <= word {
            self.seen.resize(word + 1, 0);
        }
        if self.seen[word] & bit != 0 {
            self.doubled += 1;
        } else if counter < self.counter && (self.counter - counter > REORDER.0 || now - self.last_ms > REORDER.1) {
            self.backward += 1;
        }
        self.seen[word] |= bit;
        if self.beats > 0 && now - self.last_ms >= GAP_MS && self.gaps.len() < MAX_GAPS {
            self.gaps.push(Gap {
                at_ms: now,
                ms: now - self.last_ms,
                lost: counter.saturating_sub(self.counter + 1),
            });
        }
        if !self.sources.iter().any(|known| known == source) {
            self.sources.push(source.to_owned());
        }
        self.counter = self.counter.max(counter);
        self.beats += 1;
        self.last_ms = now;
    }
}

/// All lives that were seen.
#[derive(Debug, Default)]
pub struct Ledger {
    lives: BTreeMap<(String, String, String), Life>,
}

/// Counters beyond this are no counters of a test's workload: a bit is kept for each.
const MAX_COUNTER: u64 = 1 << 28;

impl Ledger {
    /// Notes a beat from an address, at a time in milliseconds.
    pub fn note(&mut self, report: &Report, source: &str, now: u64) {
        if report.counter > MAX_COUNTER {
            return;
        }
        let key = (report.name.clone(), report.container.clone(), report.token.clone());
        let life = self.lives.entry(key).or_insert_with(|| Life {
            name: report.name.clone(),
            container: report.container.clone(),
            token: report.token.clone(),
            first_ms: now,
            last_ms: now,
            ..Life::default()
        });
        life.note(report.counter, source, now);
    }

    /// Lives of the workload of that name, in the order of their beginning; more than one for a container is a restart.
    #[must_use]
    pub fn lives(&self, name: &str) -> Vec<Life> {
        let mut lives: Vec<Life> = self
            .lives
            .values()
            .filter(|life| name.is_empty() || life.name == name)
            .cloned()
            .collect();
        lives.sort_by_key(|life| life.first_ms);
        lives
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(beats: &[(&str, u64, &str, u64)]) -> Ledger {
        let mut ledger = Ledger::default();
        for (token, counter, source, now) in beats {
            ledger.note(
                &Report {
                    name: "w".into(),
                    container: "main".into(),
                    token: (*token).into(),
                    counter: *counter,
                },
                source,
                *now,
            );
        }
        ledger
    }

    #[test]
    fn a_move_is_one_life_with_a_pause() {
        let lives = ledger(&[
            ("t", 1, "a", 0),
            ("t", 2, "a", 5),
            ("t", 3, "b", 205),
            ("t", 4, "b", 210),
        ])
        .lives("w");
        assert_eq!(lives.len(), 1);
        assert_eq!((lives[0].doubled, lives[0].backward, lives[0].counter), (0, 0, 4));
        assert_eq!(lives[0].sources, ["a", "b"]);
        assert_eq!(
            lives[0].gaps,
            [Gap {
                at_ms: 205,
                ms: 200,
                lost: 0
            }]
        );
        assert_eq!((lives[0].longest_gap(0), lives[0].longest_gap(206)), (200, 0));
    }

    #[test]
    fn two_copies_are_seen_by_a_beat_that_comes_twice() {
        let lives = ledger(&[
            ("t", 1, "a", 0),
            ("t", 2, "a", 5),
            ("t", 3, "a", 10),
            ("t", 3, "b", 11),
            ("t", 4, "a", 15),
        ])
        .lives("w");
        assert_eq!((lives[0].doubled, lives[0].backward), (1, 0));
    }

    #[test]
    fn an_old_state_is_seen_by_a_beat_that_never_came_before() {
        let lives = ledger(&[("t", 1, "a", 0), ("t", 90, "a", 5), ("t", 50, "b", 10)]).lives("w");
        assert_eq!((lives[0].doubled, lives[0].backward), (0, 1));
    }

    #[test]
    fn datagrams_may_overtake_each_other() {
        let lives = ledger(&[("t", 1, "a", 0), ("t", 3, "a", 5), ("t", 2, "a", 5), ("t", 4, "a", 10)]).lives("w");
        assert_eq!((lives[0].doubled, lives[0].backward), (0, 0));
    }

    #[test]
    fn a_restart_is_another_life() {
        let lives = ledger(&[("t", 1, "a", 0), ("u", 1, "a", 5)]).lives("w");
        assert_eq!(
            lives.iter().map(|life| life.token.as_str()).collect::<Vec<_>>(),
            ["t", "u"]
        );
        assert!(ledger(&[("t", 1, "a", 0)]).lives("other").is_empty());
    }
}
