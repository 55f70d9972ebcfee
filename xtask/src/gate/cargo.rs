//! The checks that are cargo's.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::tally::{Outcome, Tally};
use crate::repository;

/// Lines of output that are shown of what failed.
const TAIL: usize = 300;

/// rustfmt and clippy are named in `rust-toolchain.toml`; a toolchain that was installed before may lack them.
pub(super) fn components(root: &Path) -> Result<()> {
    for (verb, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        let mut command = repository::cargo(root);
        let there = command
            .args([verb, "--version"])
            .output()
            .context("failed to start cargo")?
            .status
            .success();
        if there {
            continue;
        }
        eprintln!("installing {component}");
        let status = Command::new("rustup")
            .args(["component", "add", component])
            .current_dir(root)
            .stdin(Stdio::null())
            .status();
        if !status.is_ok_and(|status| status.success()) {
            bail!(
                "the Rust toolchain lacks {component} and rustup cannot add it: install {component} for {}",
                env!("CARGO_PKG_RUST_VERSION")
            );
        }
    }
    Ok(())
}

pub(super) fn format(root: &Path) -> Result<Outcome> {
    simple(
        repository::cargo(root).args(["fmt", "--all", "--", "--check", "--color", "never"]),
        "format",
    )
}

pub(super) fn clippy(root: &Path) -> Result<Outcome> {
    let mut command = repository::cargo(root);
    command.args([
        "clippy",
        "--keep-going",
        "--locked",
        "--workspace",
        "--all-targets",
        "--",
        "--deny",
        "warnings",
    ]);
    simple(&mut command, "clippy")
}

/// Links to private items are fine: nobody reads these documents without the source.
pub(super) fn doc(root: &Path) -> Result<Outcome> {
    let mut command = repository::cargo(root);
    command
        .args(["doc", "--keep-going", "--locked", "--workspace", "--no-deps"])
        .env(
            "RUSTDOCFLAGS",
            "--deny warnings --allow rustdoc::private_intra_doc_links",
        );
    simple(&mut command, "doc")
}

/// All tests of all crates in one run: a run per crate would compile the dependencies again, with other features.
pub(super) fn tests(root: &Path, tally: &mut Tally) -> Result<Outcome> {
    let mut command = repository::cargo(root);
    // What tests print is shown also when they pass: some say that they were skipped.
    command.args([
        "test",
        "--locked",
        "--workspace",
        "--no-fail-fast",
        "--",
        "--show-output",
    ]);
    // Those that need an API server only say so here; they are counted where they have one.
    count(&mut command, "tests", tally, |suite| !suite.name.contains(LIVE))
}

/// How files of tests end that need a real API server, and nothing else of a cluster.
const LIVE: &str = "_live";

/// The tests that need a real API server.
pub(super) fn live(root: &Path, tally: &mut Tally) -> Result<Outcome> {
    let names = live_tests(root)?;
    if names.is_empty() {
        return Ok(Outcome::Skipped("there are no such tests".to_owned()));
    }
    if !repository::is_root() {
        return Ok(Outcome::Skipped(repository::NEEDS_ROOT.to_owned()));
    }
    repository::build_harness(root, repository::Progress::Shown)?;
    let mut command = repository::harness()?;
    let cargo = repository::cargo(root);
    command
        .current_dir(root)
        .args(["api-server", "--"])
        .arg(cargo.get_program());
    command.args(["test", "--locked", "--workspace", "--no-fail-fast"]);
    command.args(names.iter().flat_map(|name| ["--test", name]));
    command.args(["--", "--show-output", "--test-threads", "1"]);
    count(&mut command, "api", tally, |_| true)
}

/// Names of the files `*/tests/*_live.rs`.
fn live_tests(root: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for member in std::fs::read_dir(root)
        .with_context(|| format!("failed to list {}", root.display()))?
        .flatten()
    {
        for test in std::fs::read_dir(member.path().join("tests"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let path = test.path();
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            if path.extension().is_some_and(|extension| extension == "rs") && stem.ends_with(LIVE) {
                names.push(stem.into_owned());
            }
        }
    }
    names.sort();
    Ok(names)
}

/// Runs tests and counts them one by one.
fn count(command: &mut Command, name: &str, tally: &mut Tally, counts: fn(&Suite) -> bool) -> Result<Outcome> {
    let (success, lines) = run(command, name)?;
    let mut suites = suites(&lines);
    if suites.is_empty() {
        return Ok(Outcome::Failed(tail(&lines)));
    }
    suites.retain(counts);
    for suite in &suites {
        let parts = format!(
            "{} passed, {} failed, {} skipped",
            suite.passed, suite.failed, suite.skipped
        );
        super::tally::line(&format!("        {:<60} {parts}", suite.name));
        for why in &suite.reasons {
            super::tally::line(&format!("            skipped: {why}"));
        }
        tally.add(suite.passed, suite.failed, suite.skipped);
    }
    let failed: usize = suites.iter().map(|suite| suite.failed).sum();
    if success {
        return Ok(Outcome::Counted);
    }
    // Failed tests are counted above; anything else that went wrong (a suite that does not build or crashed) counts here.
    if failed == 0 {
        return Ok(Outcome::Failed(tail(&lines)));
    }
    super::tally::line(&failures(&lines));
    Ok(Outcome::Counted)
}

fn simple(command: &mut Command, name: &str) -> Result<Outcome> {
    let (success, lines) = run(command, name)?;
    Ok(if success {
        Outcome::Passed
    } else {
        Outcome::Failed(tail(&lines))
    })
}

/// Runs a command to its end; both its outputs, in the order in which they came.
fn run(command: &mut Command, name: &str) -> Result<(bool, Vec<String>)> {
    let (reader, writer) = std::io::pipe().context("failed to make a pipe")?;
    let both = writer.try_clone().context("failed to copy a pipe")?;
    command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(both)
        .env("CARGO_TERM_COLOR", "never")
        .env("RUST_BACKTRACE", "0");
    let mut child = command
        .spawn()
        .with_context(|| format!("failed to start cargo for {name}"))?;
    // The command holds the writing end: the reader sees the end only when it is gone.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut lines = Vec::new();
    let mut progress = Progress::new(name);
    for line in BufReader::new(reader).lines() {
        let line = line.with_context(|| format!("failed to read the output of {name}"))?;
        progress.saw(&line);
        lines.push(line);
    }
    let status = child.wait().with_context(|| format!("failed to wait for {name}"))?;
    Ok((status.success(), lines))
}

/// Tells now and then what a long step is at.
struct Progress<'a> {
    name: &'a str,
    told: std::time::Instant,
}

impl<'a> Progress<'a> {
    fn new(name: &'a str) -> Self {
        Self {
            name,
            told: std::time::Instant::now(),
        }
    }

    fn saw(&mut self, line: &str) {
        if self.told.elapsed().as_secs() >= 20 {
            self.told = std::time::Instant::now();
            eprintln!("        … {}: {}", self.name, line.trim());
        }
    }
}

/// One test program, as it reported itself.
#[derive(Debug, Default, PartialEq, Eq)]
struct Suite {
    name: String,
    passed: usize,
    failed: usize,
    skipped: usize,
    /// Why tests were skipped, each reason once.
    reasons: BTreeSet<String>,
}

/// Reads what test programs printed. A test that cannot show anything on this machine prints `skipped: why` and returns: to
/// its program it has passed, here it is counted for what it is.
fn suites(lines: &[String]) -> Vec<Suite> {
    let mut suites = Vec::new();
    let mut suite = Suite::default();
    let mut test_skipped = false;
    for line in lines {
        let line = line.trim();
        if let Some(rest) = line.strip_prefix("Running ") {
            suite = Suite {
                name: short(rest.trim_start_matches("unittests ")),
                ..Suite::default()
            };
        } else if let Some(rest) = line.strip_prefix("Doc-tests ") {
            suite = Suite {
                name: format!("doc tests of {rest}"),
                ..Suite::default()
            };
        } else if line.starts_with("---- ") {
            test_skipped = false;
        } else if let Some(why) = skip_reason(line) {
            suite.skipped += usize::from(!test_skipped);
            suite.reasons.insert(why.to_owned());
            test_skipped = true;
        } else if let Some(result) = line.strip_prefix("test result: ") {
            let name = suite.name.clone();
            let said = number_before(result, " passed");
            suite.passed = said.saturating_sub(suite.skipped);
            suite.failed = number_before(result, " failed");
            suite.skipped += number_before(result, " ignored");
            suites.push(std::mem::replace(
                &mut suite,
                Suite {
                    name,
                    ..Suite::default()
                },
            ));
        } else if let Some((_, why)) = line.split_once(" ... ignored, ") {
            suite.reasons.insert(why.to_owned());
        }
    }
    // Programs without tests say nothing worth a line.
    suites.retain(|suite| suite.passed + suite.failed + suite.skipped > 0);
    suites
}

fn skip_reason(line: &str) -> Option<&str> {
    line.strip_prefix("skipped: ")
        .or_else(|| line.strip_prefix("SKIPPED: "))
}

/// `src/lib.rs (target/x/debug/deps/crds-0123)` is `crds src/lib.rs`.
fn short(name: &str) -> String {
    let Some((file, program)) = name.split_once(" (") else {
        return name.to_owned();
    };
    let program = program.trim_end_matches(')').rsplit('/').next().unwrap_or_default();
    let program = program.rsplit_once('-').map_or(program, |(name, _)| name);
    format!("{program} {file}")
}

fn number_before(text: &str, word: &str) -> usize {
    text.split_once(word)
        .and_then(|(before, _)| before.rsplit(|c: char| !c.is_ascii_digit()).next())
        .and_then(|digits| digits.parse().ok())
        .unwrap_or_default()
}

/// What the failed tests printed, and the lines that name them.
fn failures(lines: &[String]) -> String {
    let mut out = Vec::new();
    let mut inside = false;
    for line in lines {
        // After the output of tests that passed (`successes:`) comes that of those that failed (`failures:`).
        if line.starts_with("failures:") {
            inside = true;
        } else if line.starts_with("test result: ") || line.starts_with("successes:") {
            inside = false;
        }
        let named = line.starts_with("error") || line.contains(" ... FAILED");
        if (inside || named) && !line.trim().is_empty() {
            out.push(line.clone());
        }
    }
    if out.is_empty() { tail(lines) } else { tail(&out) }
}

fn tail(lines: &[String]) -> String {
    lines
        .get(lines.len().saturating_sub(TAIL)..)
        .unwrap_or_default()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_failed_is_shown() {
        let lines: Vec<String> = "\
test a ... ok
test b ... FAILED

successes:

---- a stdout ----
fine

successes:
    a

failures:

---- b stdout ----
assertion failed

failures:
    b

test result: FAILED. 1 passed; 1 failed; 0 ignored
test c ... ok
error: 1 target failed:"
            .lines()
            .map(str::to_owned)
            .collect();
        let text = failures(&lines);
        assert!(
            text.contains("assertion failed") && text.contains("1 target failed"),
            "{text}"
        );
        assert!(!text.contains("fine") && !text.contains("test c"), "{text}");
    }

    #[test]
    fn results_are_read_with_the_names_of_their_programs() {
        let lines: Vec<String> = "\
     Running unittests src/lib.rs (target/x86_64-unknown-linux-gnu/debug/deps/crds-0123abcd)
test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s
     Running tests/cel.rs (target/debug/deps/cel-9)
---- a stdout ----
SKIPPED: not root
SKIPPED: no huge pages
---- b stdout ----
skipped: not root
---- c stdout ----
something else
test result: FAILED. 11 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
   Doc-tests crds
test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s"
            .lines()
            .map(str::to_owned)
            .collect();
        let suite = |name: &str, passed, failed, skipped, reasons: &[&str]| Suite {
            name: name.to_owned(),
            passed,
            failed,
            skipped,
            reasons: reasons.iter().map(|why| (*why).to_owned()).collect(),
        };
        assert_eq!(
            suites(&lines),
            [
                suite("crds src/lib.rs", 5, 0, 1, &[]),
                suite("cel tests/cel.rs", 9, 2, 2, &["no huge pages", "not root"]),
            ]
        );
    }
}
