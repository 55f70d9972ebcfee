//! The Dockerfile, which nothing here builds: what it names must exist, and say the same as the files beside it.

use std::path::Path;

use anyhow::{Context as _, Result};

const FILE: &str = "Dockerfile";

/// An instruction with its continued lines, without comments.
#[derive(Debug, PartialEq, Eq)]
struct Instruction {
    word: String,
    rest: String,
}

pub(super) fn complaints(root: &Path) -> Result<Vec<String>> {
    let read = |path: &str| {
        std::fs::read_to_string(root.join(path)).with_context(|| format!("failed to read {path} of the checkout"))
    };
    let instructions = instructions(&read(FILE)?);
    let mut complaints = named(&instructions, |path| root.join(path).exists());
    let toolchain: toml::Table = toml::from_str(&read("rust-toolchain.toml")?).context("rust-toolchain.toml")?;
    let versions: toml::Table = toml::from_str(&read("e2e/versions.toml")?).context("e2e/versions.toml")?;
    let text = |value: Option<&toml::Value>| value.and_then(toml::Value::as_str).unwrap_or_default().to_owned();
    let rust = text(toolchain.get("toolchain").and_then(|t| t.get("channel")));
    let debian = versions.get("debian");
    let suite = text(debian.and_then(|d| d.get("suite")));
    let criu = text(debian.and_then(|d| d.get("verified")).and_then(|v| v.get("criu")));
    for (what, word, needed) in [
        (
            "the Rust of rust-toolchain.toml",
            "FROM",
            format!("library/rust:{rust}-"),
        ),
        (
            "the Rust of rust-toolchain.toml",
            "ENV",
            format!("RUSTUP_TOOLCHAIN={rust}"),
        ),
        (
            "the suite of e2e/versions.toml",
            "FROM",
            format!("library/debian:{suite}-slim"),
        ),
        ("the CRIU of e2e/versions.toml", "ARG", format!("CRIU_VERSION={criu}")),
    ] {
        if !instructions.iter().any(|i| i.word == word && i.rest.contains(&needed)) {
            complaints.push(format!(
                "{FILE}: {what} is not in any {word}, which must say `{needed}`"
            ));
        }
    }
    for member in instructions.iter().flat_map(|i| after(&i.rest, "--package")) {
        if !root.join(member).join("Cargo.toml").exists() {
            complaints.push(format!("{FILE}: there is no package `{member}`"));
        }
    }
    for run in instructions.iter().filter(|i| i.word == "RUN") {
        complaints.extend(syntax(&run.rest)?);
    }
    Ok(complaints)
}

/// Stages and files: each is named after it was made.
fn named(instructions: &[Instruction], exists: impl Fn(&str) -> bool) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut stages: Vec<&str> = Vec::new();
    // What the shell lines so far could have made.
    let mut made = String::new();
    for Instruction { word, rest } in instructions {
        let words: Vec<&str> = rest.split_whitespace().collect();
        match word.as_str() {
            "FROM" => stages.extend(words.last()),
            "RUN" => made.push_str(rest),
            "COPY" => {
                let (from, files): (Vec<&str>, Vec<&str>) =
                    words.iter().copied().partition(|word| word.starts_with("--from="));
                let sources = files.split_last().map_or(&[][..], |(_, sources)| sources);
                match from.first().and_then(|flag| flag.strip_prefix("--from=")) {
                    None => complaints.extend(
                        sources
                            .iter()
                            .filter(|source| !exists(source))
                            .map(|source| format!("{FILE}: COPY of {source}, which the checkout does not have")),
                    ),
                    Some(stage) if stages.contains(&stage) => {
                        let unmade = |source: &&&str| {
                            let name = source.rsplit('/').next().unwrap_or_default();
                            !made.contains(name)
                        };
                        complaints.extend(
                            sources
                                .iter()
                                .filter(unmade)
                                .map(|source| format!("{FILE}: COPY of {source}, which no RUN makes")),
                        );
                    }
                    Some(stage) => complaints.push(format!("{FILE}: COPY from `{stage}`, which is no stage before it")),
                }
            }
            "ENTRYPOINT" => {
                let program = rest
                    .trim_matches(['[', ']', '"', ' '])
                    .trim_start_matches('/')
                    .to_owned();
                let copied = |i: &Instruction| {
                    i.word == "COPY"
                        && i.rest
                            .split_whitespace()
                            .any(|w| w.rsplit('/').next() == Some(&program))
                };
                if !instructions.iter().any(copied) {
                    complaints.push(format!("{FILE}: the program {program} is started and never copied"));
                }
            }
            "ARG" | "ENV" | "USER" | "WORKDIR" => {}
            other => complaints.push(format!("{FILE}: the instruction {other} is not known to this check")),
        }
    }
    complaints
}

/// Words behind a flag.
fn after<'a>(text: &'a str, flag: &'a str) -> impl Iterator<Item = &'a str> {
    let words = text.split_whitespace();
    words
        .clone()
        .zip(words.skip(1))
        .filter(move |(word, _)| *word == flag)
        .map(|(_, value)| value.trim_end_matches(';'))
}

/// What the shell says against a RUN.
fn syntax(rest: &str) -> Result<Option<String>> {
    let script: Vec<&str> = rest.split(' ').filter(|word| !word.starts_with("--mount=")).collect();
    let output = std::process::Command::new("sh")
        .args(["-n", "-c", &script.join(" ")])
        .output()
        .context("failed to start sh")?;
    Ok((!output.status.success()).then(|| {
        format!(
            "{FILE}: a RUN is no shell script: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )
    }))
}

fn instructions(text: &str) -> Vec<Instruction> {
    let mut found = Vec::new();
    let mut whole = String::new();
    for line in text.lines().filter(|line| !line.trim_start().starts_with('#')) {
        match line.strip_suffix('\\') {
            Some(begun) => whole.push_str(begun),
            None => {
                whole.push_str(line);
                if let Some((word, rest)) = whole.trim().split_once(char::is_whitespace) {
                    found.push(Instruction {
                        word: word.to_owned(),
                        rest: rest.trim().to_owned(),
                    });
                }
                whole.clear();
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "# x\nFROM a AS build\nCOPY src .\nRUN set -e; \\\n  # why\n  cc -o /out/p\nFROM scratch AS p\nCOPY --from=build /out/p /\nENTRYPOINT [\"/p\"]\n";

    fn of(text: &str) -> Vec<String> {
        named(&instructions(text), |path| path == "src")
    }

    #[test]
    fn continued_lines_are_one_instruction_without_comments() {
        assert_eq!(instructions(GOOD)[2].rest, "set -e;   cc -o /out/p");
        assert!(of(GOOD).is_empty(), "{:?}", of(GOOD));
    }

    #[test]
    fn each_fault_is_named() {
        for (from, to, what) in [
            ("COPY src", "COPY gone", "gone"),
            ("--from=build", "--from=other", "`other`"),
            ("/out/p /", "/out/q /", "/out/q"),
            ("\"/p\"", "\"/r\"", "program r"),
            ("RUN", "RUM", "RUM"),
        ] {
            let complaints = of(&GOOD.replace(from, to));
            assert!(complaints.iter().any(|c| c.contains(what)), "{what}: {complaints:?}");
        }
        assert!(syntax("set -e; if true; then").unwrap().is_some());
        assert!(syntax("--mount=type=cache,target=/x set -e; true").unwrap().is_none());
    }

    #[test]
    fn packages_are_read_behind_their_flag() {
        let found: Vec<&str> = after("cargo build --package a --package b; cp c", "--package").collect();
        assert_eq!(found, ["a", "b"]);
    }
}
