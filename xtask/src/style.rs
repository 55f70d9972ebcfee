//! What compilers and linters do not look at: sizes of files, which crate may use which, names that say nothing.

mod crates;
mod dockerfile;
mod documents;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};

use crate::repository;

/// Longest source file, in lines.
const LINES: usize = 800;

/// Files that may be longer, each with its limit and its reason.
const LONGER: &[(&str, usize, &str)] = &[];

/// Names of files and folders that do not say what is inside.
const EMPTY_NAMES: &[&str] = &[
    "util", "utils", "helper", "helpers", "common", "manager", "misc", "types",
];

/// Marks of work that is not finished.
const UNFINISHED: &[&str] = &["todo!(", "unimplemented!(", concat!("TO", "DO"), concat!("FIX", "ME")];

/// A file of the checkout.
struct Source {
    /// Relative to the checkout.
    path: PathBuf,
    text: String,
}

/// Prints what is wrong.
pub(crate) fn run() -> Result<ExitCode> {
    let complaints = complaints(&repository::root())?;
    for complaint in &complaints {
        println!("{complaint}");
    }
    Ok(if complaints.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Everything that is wrong, one sentence each.
pub(crate) fn complaints(root: &Path) -> Result<Vec<String>> {
    let sources = read(root, &["rs"])?;
    let mut complaints: Vec<String> = sources.iter().flat_map(source).collect();
    complaints.extend(crates::complaints(root, &sources)?);
    complaints.extend(dockerfile::complaints(root)?);
    complaints.extend(documents::complaints(root, &read(root, &["md"])?));
    Ok(complaints)
}

fn source(file: &Source) -> Vec<String> {
    let path = file.path.display();
    let mut complaints = Vec::new();
    let limit = LONGER
        .iter()
        .find(|(longer, ..)| Path::new(longer) == file.path)
        .map_or(LINES, |(_, lines, _)| *lines);
    let lines = file.text.lines().count();
    if lines > limit {
        complaints.push(format!(
            "{path} has {lines} lines, more than {limit}: cut it by its nouns"
        ));
    }
    if !file.text.starts_with("//!") && !file.text.starts_with("#!") {
        complaints.push(format!(
            "{path} does not begin with a `//!` header that says what it is"
        ));
    }
    for part in &file.path {
        let stem = Path::new(part).file_stem().unwrap_or_default().to_string_lossy();
        if EMPTY_NAMES.contains(&stem.as_ref()) {
            complaints.push(format!("{path}: the name `{stem}` does not say what is inside"));
        }
    }
    for (number, line) in file.text.lines().enumerate() {
        if UNFINISHED.iter().any(|mark| line.contains(mark)) && !file.path.ends_with("xtask/src/style.rs") {
            complaints.push(format!("{path}:{}: unfinished: {}", number + 1, line.trim()));
        }
    }
    complaints
}

/// All files that git knows or would add, with one of these extensions.
fn read(root: &Path, extensions: &[&str]) -> Result<Vec<Source>> {
    let mut files = Vec::new();
    walk(root, Path::new(""), extensions, &mut files)?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn walk(root: &Path, folder: &Path, extensions: &[&str], files: &mut Vec<Source>) -> Result<()> {
    let full = root.join(folder);
    for entry in std::fs::read_dir(&full).with_context(|| format!("failed to list {}", full.display()))? {
        let entry = entry.with_context(|| format!("failed to list {}", full.display()))?;
        let path = folder.join(entry.file_name());
        let kind = entry
            .file_type()
            .with_context(|| format!("failed to look at {}", path.display()))?;
        let name = entry.file_name();
        if kind.is_dir() {
            if name != "target" && !name.to_string_lossy().starts_with('.') {
                walk(root, &path, extensions, files)?;
            }
        } else if path
            .extension()
            .is_some_and(|e| extensions.iter().any(|wanted| e == *wanted))
        {
            let text =
                std::fs::read_to_string(entry.path()).with_context(|| format!("failed to read {}", path.display()))?;
            files.push(Source { path, text });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(path: &str, text: &str) -> Vec<String> {
        source(&Source {
            path: path.into(),
            text: text.to_owned(),
        })
    }

    #[test]
    fn a_good_file_passes() {
        assert!(of("operator/src/lease.rs", "//! A lease.\n").is_empty());
    }

    #[test]
    fn each_fault_is_named() {
        assert!(of("operator/src/utils.rs", "//! x\n")[0].contains("`utils`"));
        assert!(of("operator/src/lease.rs", "fn x() {}\n")[0].contains("header"));
        assert!(of("operator/src/lease.rs", &"//! x\n".repeat(LINES + 1))[0].contains("more than"));
        assert!(of("operator/src/lease.rs", "//! x\nfn y() { unimplemented!() }\n")[0].contains(":2:"));
    }
}
