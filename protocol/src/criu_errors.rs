//! What CRIU wrote into its log, as one sentence that a user can act on.
//!
//! CRIU goes on logging errors while it cleans up, so the *first* error names the cause; some errors are warnings in
//! disguise and are passed over. What is in no table is quoted, without CRIU's time stamp and source line.

/// The most of a quoted error, in bytes.
const MAX_QUOTE: usize = 300;

/// Error lines that CRIU writes although it goes on: never a cause.
const HARMLESS: &[&str] = &[
    // Each failed probe of a kernel feature.
    "kerndat",
    "Can't get rseq",
    "Unable to restore freezer state",
    "Can't open RLIMIT",
    "nftables based locking",
    "rseq_conf",
    // CRIU raises its own limit of open files where it may.
    "RLIMIT_NOFILE for self",
];

/// Error lines that say only that another line has said more: told where there is no other.
const CONSEQUENCES: &[&str] = &[
    "Can't kill",
    "exited, status=",
    "killed by signal",
    "Restoring FAILED",
    "Dumping FAILED",
    "Dump files fail",
    "Pre-dumping FAILED",
    "Killing processes because of failure",
    "Can't wait root task",
    "One of more action scripts failed",
];

/// (what CRIU says, what we say). The first match wins; special ones stand before general ones.
const KNOWN: &[(&str, &str)] = &[
    (
        "Can't get rlimit",
        "CRIU may not read the limits of another user's process on this node (no CAP_SYS_RESOURCE): the limits preload is not in place",
    ),
    (
        "Unsupported proto 262",
        "the program listens with Multipath TCP, which CRIU cannot move: start the pod with net.mptcp.enabled=0 (the runtime class peregrine does it)",
    ),
    (
        "Unsupported proto",
        "the program has a socket of a protocol that CRIU cannot move",
    ),
    (
        "io_uring",
        "the program uses io_uring, which CRIU cannot move: run it under the RuntimeDefault seccomp profile",
    ),
    (
        "anon_inode:[io_uring]",
        "the program uses io_uring, which CRIU cannot move",
    ),
    ("userfaultfd", "the program uses userfaultfd, which CRIU cannot move"),
    ("fanotify", "the program uses fanotify, which CRIU cannot move"),
    (
        "Can't dump that handle",
        "the program watches files by inotify in a way that CRIU cannot rebuild",
    ),
    (
        "Can't dump ghost file",
        "an open file that was deleted is larger than CRIU carries (ghost-limit)",
    ),
    ("ghost file", "an open file that was deleted could not be carried along"),
    (
        "In-flight connection",
        "a TCP connection was not yet accepted by the program: try again",
    ),
    (
        "in-flight",
        "a connection was not yet accepted by the program: try again",
    ),
    (
        "Can't dump half of stream unix connection",
        "one end of a UNIX socket lies outside of the container",
    ),
    (
        "External socket is used",
        "the container is connected to a UNIX socket outside of it",
    ),
    (
        "unix socket with data in accept queue",
        "a UNIX connection was not yet accepted by the program: try again",
    ),
    (
        "Connected TCP socket",
        "an established TCP connection cannot be carried along",
    ),
    (
        "Can't bind inet socket",
        "the address of a TCP connection does not exist in the target pod's network",
    ),
    (
        "Can't connect inet socket",
        "a TCP connection could not be rebuilt in the target pod's network",
    ),
    (
        "Failed to create shm set",
        "System V shared memory of another container of the pod is already there",
    ),
    (
        "Found pending aio",
        "the program has asynchronous disk operations under way: try again",
    ),
    ("corked", "a UDP socket is corked, which CRIU cannot move"),
    (
        "Can't dump a zombie",
        "a dead child process waits for its parent in a way that CRIU cannot rebuild",
    ),
    (
        "is already being traced",
        "a process of the container is being debugged (ptrace): end the debugger first",
    ),
    (
        "ptrace",
        "a process of the container could not be seized by ptrace: it may be under a debugger",
    ),
    (
        "Unable to freeze tasks",
        "the container's processes did not freeze in time",
    ),
    (
        "has different file size",
        "a file that the program has open differs on the target: its changes were not carried along",
    ),
    (
        "has bad mode",
        "a file that the program has open has other permissions on the target",
    ),
    (
        "has bad build-id",
        "a program file or library differs on the target: the image is not the same",
    ),
    (
        "on restore: No such file or directory",
        "a file that the program has open is missing on the target",
    ),
    (
        "File not found",
        "a file that the program has open is missing on the target",
    ),
    ("No such file or directory", "a file that CRIU needs is missing"),
    ("No space left on device", "there is no room left for the checkpoint"),
    ("Cannot allocate memory", "the node has not enough memory"),
    ("Can't fork for", "a process id or thread id could not be given again"),
    ("Unable to create a thread", "a thread could not be created again"),
    ("Pid", "a process id that the container needs is taken"),
    ("CPU capabilities do not match", "the CPUs of the two nodes differ"),
    (
        "CPU",
        "the CPU of the target lacks a feature that the program was started with",
    ),
    ("xsave", "the CPUs of the two nodes save their registers differently"),
    (
        "seccomp",
        "the seccomp filter of the container could not be carried along",
    ),
    (
        "apparmor",
        "the AppArmor profile of the container differs on the target",
    ),
    ("selinux", "the SELinux label of the container differs on the target"),
    ("lsm", "the security label of the container differs on the target"),
    ("mountpoint", "a mount of the container cannot be rebuilt on the target"),
    ("mnt:", "a mount of the container cannot be carried along or rebuilt"),
    (
        "netns",
        "the container's network namespace has something that CRIU cannot rebuild",
    ),
    ("Script ", "the restored processes could not be held"),
    ("Can't open image", "the checkpoint is incomplete"),
    ("pstree", "the checkpoint is incomplete or damaged"),
    ("Unable to read", "the checkpoint is incomplete or damaged"),
    ("Unexpected EOF", "the checkpoint is cut off"),
    ("Bad image", "the checkpoint is damaged"),
    ("Magic", "the checkpoint is damaged"),
    ("tty", "a terminal of the container cannot be carried along"),
    (
        "Operation not permitted",
        "the node does not permit CRIU to do what it needs",
    ),
];

/// The first error of a CRIU log that names a cause: without time stamp and process id.
#[must_use]
pub fn first_error(log: &str) -> Option<&str> {
    let is_one_of = |text: &str, list: &[&str]| list.iter().any(|words| text.contains(words));
    let errors = || {
        log.lines()
            .filter_map(error_text)
            .filter(|text| !is_one_of(text, HARMLESS))
    };
    errors()
        .find(|text| !is_one_of(text, CONSEQUENCES))
        .or_else(|| errors().next())
}

/// One sentence: what it means, then what CRIU said.
#[must_use]
pub fn explain(error: &str) -> String {
    let quote = shorten(error.trim());
    match KNOWN.iter().find(|(says, _)| error.contains(says)) {
        Some((_, meaning)) => format!("{meaning} (CRIU: {quote})"),
        None => format!("CRIU: {quote}"),
    }
}

/// [`first_error`] and [`explain`].
#[must_use]
pub fn explain_log(log: &str) -> Option<String> {
    first_error(log).map(explain)
}

/// The text of an error line: `(00.012345) 42: Error (criu/files-reg.c:2262): Can't open file …`. The time stamp and the
/// process are optional; warnings and all else are no errors.
fn error_text(line: &str) -> Option<&str> {
    let line = match line.strip_prefix('(') {
        Some(rest) => rest.split_once(')')?.1.trim_start(),
        None => line,
    };
    // Code that runs inside a restored process says so.
    let line = line.strip_prefix("pie:").unwrap_or(line).trim_start();
    // CRIU pads the process id, and prefixes nothing where the coordinator itself speaks.
    let line = line
        .trim_start_matches(|c: char| c.is_ascii_digit())
        .trim_start_matches(':')
        .trim_start();
    let rest = line.strip_prefix("Error")?.trim_start();
    match rest.strip_prefix('(') {
        Some(rest) => rest
            .split_once(')')
            .map(|(_, text)| text.trim_start_matches(':').trim()),
        None => rest.strip_prefix(':').map(str::trim),
    }
}

fn shorten(text: &str) -> &str {
    if text.len() <= MAX_QUOTE {
        return text;
    }
    let mut end = MAX_QUOTE;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_that_names_a_cause_is_found() {
        let log = "(00.000001) Version: 4.2.1\n\
                   (00.000100) Warn  (criu/kerndat.c:1): something\n\
                   (00.000200) Error (criu/kerndat.c:99): kerndat: no such feature\n\
                   (00.010000)      7: Error (criu/files-reg.c:2262): Can't open file data/log on restore: No such file or directory\n\
                   (00.011000) Error (criu/cr-restore.c:1): 7 exited, status=1\n\
                   (00.012000) Error (criu/cr-restore.c:2): Restoring FAILED.\n";
        assert_eq!(
            first_error(log),
            Some("Can't open file data/log on restore: No such file or directory")
        );
        assert_eq!(first_error("(00.0) fine\n"), None);
        assert_eq!(
            first_error("(00.0) Error (criu/util.c:1): rlimit: Can't setup RLIMIT_NOFILE for self"),
            None
        );
        assert_eq!(
            first_error("(00.1) Error (criu/x.c:1): Restoring FAILED.\n"),
            Some("Restoring FAILED.")
        );
        assert_eq!(
            first_error("(00.1) pie: 1: Error (criu/pie/restorer.c:5): seccomp"),
            Some("seccomp")
        );
    }

    #[test]
    fn known_errors_are_said_in_plain_words() {
        for (says, meaning) in [
            ("inet: Unsupported proto 262", "Multipath TCP"),
            ("Can't get rlimit 0: Operation not permitted", "limits preload"),
            (
                "File data/x has different file size 5 (expect 7)",
                "differs on the target",
            ),
            ("Can't open file a on restore: No such file or directory", "is missing"),
            ("Failed to create shm set: File exists", "System V"),
            ("In-flight connection (l) for 3", "try again"),
        ] {
            let said = explain(says);
            assert!(said.contains(meaning) && said.contains(says), "{said}");
        }
        assert_eq!(explain("never seen"), "CRIU: never seen");
    }

    #[test]
    fn a_long_quote_is_cut_at_a_character() {
        let text = "é".repeat(1000);
        assert!(explain(&text).len() <= MAX_QUOTE + 10);
    }
}
