//! The scenarios on a real cluster. They live in `e2e`; here their lines are counted.
//!
//! A scenario ends with `ok NAME`, `FAILED NAME: why` or `skipped NAME: why` on standard output.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context as _, Result};

use super::tally::{self, Outcome, Tally};
use crate::repository;

pub(super) fn run(root: &Path, only: Option<&str>, tally: &mut Tally) -> Result<Outcome> {
    if !repository::is_root() {
        return Ok(Outcome::Skipped(repository::NEEDS_ROOT.to_owned()));
    }
    repository::build_harness(root, repository::Progress::Shown)?;
    let mut command = repository::harness()?;
    command
        .arg("scenarios")
        .args(only.map(|name| ["--only", name]).into_iter().flatten());
    let mut child = command
        .current_dir(root)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("failed to start the scenarios")?;
    let output = child.stdout.take().context("the scenarios have no output")?;
    let mut seen = 0;
    let mut since = Instant::now();
    // What was printed between two results belongs to the second one.
    let mut before = Vec::new();
    for line in BufReader::new(output).lines() {
        let line = line.context("failed to read the scenarios' output")?;
        let Some(result) = Line::parse(&line) else {
            before.push(line);
            continue;
        };
        let time = tally::duration(since.elapsed());
        match result {
            Line::Passed(name) => tally.pass(name, &time),
            Line::Failed(name, why) => tally.fail(name, &time, format!("{why}\n{}", before.join("\n"))),
            Line::Skipped(name, why) => tally.skip(name, why),
        }
        before.clear();
        seen += 1;
        since = Instant::now();
    }
    let failed_before = tally.failed();
    let status = child.wait().context("failed to wait for the scenarios")?;
    Ok(match (status.success(), seen) {
        (true, 0) => Outcome::Failed(format!("no scenario ran\n{}", before.join("\n"))),
        (false, _) if failed_before == 0 || seen == 0 => {
            Outcome::Failed(format!("the scenarios ended with {status}\n{}", before.join("\n")))
        }
        _ => Outcome::Counted,
    })
}

/// A result.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Passed(&'a str),
    Failed(&'a str, &'a str),
    Skipped(&'a str, &'a str),
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (word, rest) = line.split_once(' ')?;
        let (name, why) = rest.split_once(": ").unwrap_or((rest, ""));
        // A time may stand behind the name.
        let name = name.split_whitespace().next()?;
        match word {
            "ok" => Some(Self::Passed(name)),
            "FAILED" => Some(Self::Failed(name, why)),
            "skipped" => Some(Self::Skipped(name, why)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_told_from_other_lines() {
        for (line, result) in [
            ("ok moves_three_times", Some(Line::Passed("moves_three_times"))),
            ("ok moves_three_times 3.1s", Some(Line::Passed("moves_three_times"))),
            ("FAILED cancel: a: b", Some(Line::Failed("cancel", "a: b"))),
            ("skipped crash: not root", Some(Line::Skipped("crash", "not root"))),
            ("starting node-a", None),
            ("ok", None),
        ] {
            assert_eq!(Line::parse(line), result, "{line}");
        }
    }
}
