//! What passed, what failed, what was skipped, and the lines that say so.

use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::Result;

/// How a check ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It counts as one that passed.
    Passed,
    /// What was wrong.
    Failed(String),
    /// Why it did not run.
    Skipped(String),
    /// Its parts were counted one by one.
    Counted,
}

impl Outcome {
    /// Passed when there are no complaints.
    pub(super) fn of(complaints: Vec<String>) -> Self {
        if complaints.is_empty() {
            Self::Passed
        } else {
            Self::Failed(complaints.join("\n"))
        }
    }
}

/// The sums.
#[derive(Debug, Default)]
pub(super) struct Tally {
    passed: usize,
    failures: Vec<(String, String)>,
    more_failed: usize,
    skipped: usize,
}

impl Tally {
    /// Runs a check and prints its line.
    pub(super) fn timed(&mut self, name: &str, check: impl FnOnce(&mut Self) -> Result<Outcome>) {
        let started = Instant::now();
        let failed_before = self.failed();
        let outcome = check(self).unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")));
        let time = duration(started.elapsed());
        match outcome {
            Outcome::Counted => {
                let word = if self.failed() > failed_before { "FAILED" } else { "ok" };
                line(&format!("{word:<8}{name:<64}{time:>9}"));
            }
            Outcome::Passed => self.pass(name, &time),
            Outcome::Failed(output) => self.fail(name, &time, output),
            Outcome::Skipped(reason) => self.skip(name, &reason),
        }
    }

    /// Counts one that passed and prints its line.
    pub(super) fn pass(&mut self, name: &str, time: &str) {
        self.passed += 1;
        line(&format!("{:<8}{name:<64}{time:>9}", "ok"));
    }

    /// Counts one that failed, prints its line and keeps its output for the end.
    pub(super) fn fail(&mut self, name: &str, time: &str, output: String) {
        line(&format!("{:<8}{name:<64}{time:>9}", "FAILED"));
        self.failures.push((name.to_owned(), output));
    }

    /// Counts one that did not run and prints why.
    pub(super) fn skip(&mut self, name: &str, reason: &str) {
        self.skipped += 1;
        line(&format!("{:<8}{name:<64}{:>9}  {reason}", "skipped", ""));
    }

    /// Adds what another runner counted, without lines.
    pub(super) fn add(&mut self, passed: usize, failed: usize, skipped: usize) {
        self.passed += passed;
        self.more_failed += failed;
        self.skipped += skipped;
    }

    pub(super) fn failed(&self) -> usize {
        self.failures.len() + self.more_failed
    }

    pub(super) fn total(&self) -> usize {
        self.passed + self.failed() + self.skipped
    }

    /// What failed, with its output.
    pub(super) fn print_failures(&self) {
        for (name, output) in &self.failures {
            println!("\n---- {name} ----\n{}", output.trim_end());
        }
        if !self.failures.is_empty() {
            println!();
        }
    }

    pub(super) fn summary(&self) -> String {
        format!(
            "{} passed, {} failed, {} skipped",
            self.passed,
            self.failed(),
            self.skipped
        )
    }
}

/// A line that is seen at once, also through a pipe.
pub(super) fn line(text: &str) {
    println!("{text}");
    drop(std::io::stdout().flush());
}

/// `0.4 s`, `3 min 12 s`.
pub(super) fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds < 60 {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        format!("{} min {} s", seconds / 60, seconds % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_counts_everything_once() {
        let mut tally = Tally::default();
        tally.timed("a", |_| Ok(Outcome::Passed));
        tally.timed("b", |_| Ok(Outcome::Failed("why".into())));
        tally.timed("c", |_| Ok(Outcome::Skipped("why".into())));
        tally.timed("d", |tally| {
            tally.add(3, 1, 2);
            Ok(Outcome::Counted)
        });
        tally.timed("e", |_| anyhow::bail!("did not start"));
        assert_eq!(tally.summary(), "4 passed, 3 failed, 3 skipped");
    }

    #[test]
    fn durations_are_short() {
        assert_eq!(duration(Duration::from_millis(420)), "0.4 s");
        assert_eq!(duration(Duration::from_secs(192)), "3 min 12 s");
    }
}
