//! Printing an error with all its causes, once, where it is handled.

use std::error::Error;
use std::fmt::Write as _;

/// The error and its causes in one line: `what was done: why: why`. A cause that its parent already quotes is left out.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut out = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !out.contains(&text) {
            // Writing to a String cannot fail.
            let _ = write!(out, ": {text}");
        }
        cause = error.source();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("failed to read {0}")]
    struct Outer(&'static str, #[source] std::io::Error);

    #[test]
    fn causes_follow_each_other() {
        let error = Outer("x", std::io::Error::other("disk on fire"));
        assert_eq!(chain(&error), "failed to read x: disk on fire");
    }
}
