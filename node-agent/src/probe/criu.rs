//! CRIU by trying: `criu check`. It also fills CRIU's cache of what the kernel can do (`/run/criu.kdat`), which would
//! otherwise cost 30 to 45 ms inside the first freeze.

use std::time::Duration;

use crate::install;
use crate::install::criu::Criu;
use crds::migration_node::CriuStatus;

/// How to get CRIU where there is none.
const HOW_TO_INSTALL: &str = "install the package `criu` (4.1 or later) on the node, or use an agent image that contains it in /criu; the \
     agent looks again every minute";
/// The oldest version whose images and options are known to work with us.
const OLDEST: (u32, u32) = (4, 0);
/// Programs of the node that CRIU starts: it packs the files of memory file systems (`/dev`) by them.
const HELPERS: [&str; 2] = ["tar", "gzip"];

/// Version, path and need for help; or the sentence that says what is missing.
pub(super) fn probe(criu: Option<&Criu>) -> Result<CriuStatus, String> {
    let Some(criu) = criu else {
        return Err(format!("CRIU is missing: {HOW_TO_INSTALL}"));
    };
    let preload = install::criu::limits_preload();
    if preload.is_none() && !install::criu::may_ask_for_limits() {
        return Err(
            "the machine withholds CAP_SYS_RESOURCE, without which CRIU cannot read the limits of other users' processes: use \
             an agent image that contains /limits.so"
                .to_owned(),
        );
    }
    let path = std::env::var("PATH").unwrap_or_default();
    let absent = HELPERS
        .into_iter()
        .filter(|name| install::containerd::find_program(name, &path).is_none());
    let absent: Vec<&str> = absent.collect();
    if !absent.is_empty() {
        return Err(format!(
            "CRIU needs programs that the node does not have: install {}",
            absent.join(" and ")
        ));
    }
    let run = |arguments: &[&str]| {
        let mut program = criu.program().args(arguments).within(Duration::from_secs(30));
        if let Some(library) = &preload {
            program = program.env("LD_PRELOAD", library);
        }
        program.run().map(|o| {
            [o.stdout, o.stderr]
                .map(|text| String::from_utf8_lossy(&text).into_owned())
                .concat()
        })
    };
    let said = run(&["--version"])
        .map_err(|e| format!("{} does not run: {}", criu.path.display(), crate::error::chain(&e)))?;
    let version = version_in(&said).ok_or_else(|| format!("CRIU does not tell its version: {said}"))?;
    if numbers(&version) < OLDEST {
        return Err(format!("CRIU is {version}, too old: {HOW_TO_INSTALL}"));
    }
    run(&["check"]).map_err(|e| match first_error(e.output()) {
        Some(error) => format!("`criu check` fails: {error}"),
        None => format!("`criu check` fails: {}", crate::error::chain(&e)),
    })?;
    Ok(CriuStatus {
        version,
        path: criu.path.display().to_string(),
        from_agent_image: criu.loader.is_some(),
        limits_from_proc: preload.is_some(),
    })
}

/// Whether it says so itself. One that says nothing is not too old but broken: the probe tells how.
pub fn is_too_old(criu: &Criu) -> bool {
    let said = criu.program().arg("--version").within(Duration::from_secs(30)).output();
    said.is_ok_and(|said| {
        version_in(&String::from_utf8_lossy(&said.stdout)).is_some_and(|version| numbers(&version) < OLDEST)
    })
}

/// `Version: 4.2.1` -> `4.2.1`
fn version_in(text: &str) -> Option<String> {
    let version = text.lines().find_map(|line| line.trim().strip_prefix("Version:"))?;
    Some(version.trim().to_owned())
}

fn numbers(version: &str) -> (u32, u32) {
    let mut parts = version.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

/// `Error (criu/cr-check.c:1): text` -> `text`
fn first_error(output: &str) -> Option<&str> {
    let line = output.lines().find(|line| line.contains("Error ("))?;
    line.split_once("): ").map(|(_, text)| text.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_compared_by_number() {
        assert_eq!(version_in("Version: 4.2.1\nGitID: v4.2\n").as_deref(), Some("4.2.1"));
        assert!(numbers("3.17.1") < OLDEST);
        assert!(numbers("4.10") > numbers("4.9"));
    }

    #[test]
    fn the_first_error_is_the_one_to_show() {
        let output = "Warn  (criu/x.c:1): dull\nError (criu/cr-check.c:54): no such thing\nError (criu/y.c:2): later\n";
        assert_eq!(first_error(output), Some("no such thing"));
        assert_eq!(first_error("Looks good.\n"), None);
    }

    #[test]
    fn a_node_without_criu_says_how_to_get_it() {
        let missing = probe(None).unwrap_err();
        assert!(missing.contains("install the package `criu`"), "{missing}");
    }
}
