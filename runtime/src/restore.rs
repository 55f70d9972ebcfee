//! `runc restore` by the hand-off alone: which container, which bundle, which flags come from `create`; only the folder of
//! the images comes from the agent.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use hostsys::program::{self, Program};
use protocol::criu_errors;

use crate::folder::{Folder, Start};

/// CRIU's log is read up to this size: the first error of a restore stands early.
const MAX_LOG: u64 = 8 * 1024 * 1024;

/// Starts it, in a process group of its own, with the shepherd's streams: these become the container's.
///
/// # Errors
/// It could not be started.
pub fn start(folder: &Folder, start: &Start, images: &str, work: &str, lazy: bool) -> Result<i32, program::Error> {
    // Of an earlier one there is nothing, but a stale pid would be worse than none.
    let _ = std::fs::remove_file(folder.file("pid"));
    program::start_in_group(
        Path::new(&start.settings.oci_runtime),
        &arguments(folder, start, images, work, lazy),
        &environment(folder, start),
    )
}

fn arguments(folder: &Folder, start: &Start, images: &str, work: &str, lazy: bool) -> Vec<OsString> {
    let mut arguments = runtime_flags(folder, start);
    let options = [
        "restore",
        "--detach",
        "--image-path",
        images,
        "--work-path",
        work,
        "--bundle",
        &start.report.bundle,
    ];
    arguments.extend(options.map(OsString::from));
    arguments.extend(["--pid-file".into(), folder.file("pid").into_os_string()]);
    let options = [
        "--tcp-established",
        "--ext-unix-sk",
        "--file-locks",
        "--manage-cgroups-mode",
        "ignore",
    ];
    arguments.extend(options.map(OsString::from));
    if lazy {
        arguments.push("--lazy-pages".into());
    }
    arguments.push(start.report.container_id.clone().into());
    arguments
}

/// The flags of `create`, but with a log of our own: containerd's belongs to calls of its own.
fn runtime_flags(folder: &Folder, start: &Start) -> Vec<OsString> {
    let mut flags: Vec<OsString> = start.globals.iter().map(OsString::from).collect();
    flags.extend([
        "--log".into(),
        folder.file("runc.log").into_os_string(),
        "--log-format".into(),
        "json".into(),
    ]);
    flags
}

fn environment(folder: &Folder, start: &Start) -> Vec<(OsString, OsString)> {
    let path = std::env::var("PATH").unwrap_or_default();
    let path = if path.is_empty() {
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    } else {
        &path
    };
    vec![
        ("PATH".into(), format!("{}:{path}", start.settings.libexec).into()),
        ("CRIU_CONFIG_FILE".into(), folder.file("criu.conf").into_os_string()),
    ]
}

/// Why a restore failed, as one sentence.
#[must_use]
pub fn why(folder: &Folder, work: &str) -> String {
    let criu = read_start(&Path::new(work).join("restore.log")).and_then(|log| criu_errors::explain_log(&log));
    let runc = || runc_error(&read_start(&folder.file("runc.log"))?).map(|said| without_criu(&said));
    criu.or_else(runc)
        .unwrap_or_else(|| "runc restore failed and did not say why".into())
}

/// What runc says where CRIU has said nothing: CRIU 4.2 crashes on some incomplete checkpoints.
fn without_criu(said: &str) -> String {
    if said.contains("EOF") {
        format!("CRIU crashed: the checkpoint is incomplete or damaged (runc: {said})")
    } else {
        format!("runc: {said}")
    }
}

/// The last error that runc has logged: it logs one, at its end.
fn runc_error(log: &str) -> Option<String> {
    log.lines().rev().find_map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        (line.get("level")?.as_str()? == "error").then(|| line.get("msg")?.as_str().map(str::to_owned))?
    })
}

fn read_start(path: &Path) -> Option<String> {
    let mut text = Vec::new();
    File::open(path).ok()?.take(MAX_LOG).read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

/// Removes what the runtime below knows of the container; one that it does not know is no error for it.
///
/// # Errors
/// It could not be run, or says why not.
pub fn forget(folder: &Folder, start: &Start) -> Result<(), program::Error> {
    // runc binds the root file system below its own folder while it restores; if it was killed, the mount is still there
    // and the folder busy.
    if let Some(root) = runtime_root(&start.globals) {
        let bound = Path::new(&root).join(&start.report.container_id).join("criu-root");
        // Not mounted, or not there: nothing to do.
        let _ = nix::mount::umount2(&bound, nix::mount::MntFlags::MNT_DETACH);
    }
    Program::new(&start.settings.oci_runtime)
        .args(runtime_flags(folder, start))
        .args(["delete", "--force", &start.report.container_id])
        .within(Duration::from_secs(20))
        .run()
        .map(drop)
}

fn runtime_root(globals: &[String]) -> Option<String> {
    let globals: Vec<OsString> = globals.iter().map(OsString::from).collect();
    crate::argv::Call {
        globals,
        ..Default::default()
    }
    .global("root")?
    .into_string()
    .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_runc_is_found() {
        let log =
            "{\"level\":\"warning\",\"msg\":\"w\"}\nnoise\n{\"level\":\"error\",\"msg\":\"container is not there\"}\n";
        assert_eq!(runc_error(log).unwrap(), "container is not there");
        assert_eq!(runc_error("noise\n"), None);
    }
}
