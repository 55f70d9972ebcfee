//! Documents: a link within the repository must lead somewhere.

use std::path::{Component, Path, PathBuf};

use super::Source;

pub(super) fn complaints(root: &Path, documents: &[Source]) -> Vec<String> {
    let mut complaints = Vec::new();
    for document in documents {
        for link in links(&document.text) {
            let file = link.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") || file.starts_with("mailto:") {
                continue;
            }
            let path = document.path.parent().unwrap_or(Path::new("")).join(file);
            if !root.join(normal(&path)).exists() {
                complaints.push(format!("{}: the link to {link} leads nowhere", document.path.display()));
            }
        }
    }
    complaints
}

/// Targets of `[text](target)`, outside code.
fn links(text: &str) -> Vec<&str> {
    let mut links = Vec::new();
    let mut in_code = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        let mut rest = line;
        while let Some((_, after)) = rest.split_once("](") {
            let Some((target, after)) = after.split_once(')') else {
                break;
            };
            links.push(target.trim());
            rest = after;
        }
    }
    links
}

/// Without `..`, so that a folder that does not exist cannot hide a file that does.
fn normal(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::new(), |mut out, part| {
        match part {
            Component::ParentDir => {
                out.pop();
            }
            Component::CurDir => {}
            other => out.push(other),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_found_outside_code() {
        let text = "see [a](b.md) and [c](d.md#e)\n```\n[x](y)\n```\n";
        assert_eq!(links(text), ["b.md", "d.md#e"]);
    }

    #[test]
    fn parents_are_resolved() {
        assert_eq!(
            normal(Path::new("docs/decisions/../../README.md")),
            Path::new("README.md")
        );
    }
}
