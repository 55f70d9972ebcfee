//! Calls as containerd 2.1.9 makes them (recorded on a node), and as conmon makes them for CRI-O.

use std::ffi::OsString;
use std::path::Path;

use runtime::argv::Call;

const LOG: &str = "/run/containerd/io.containerd.runtime.v2.task/k8s.io/ID/log.json";

fn call(text: &str) -> Call {
    let arguments: Vec<OsString> = text.split_whitespace().map(OsString::from).collect();
    let call = Call::parse(&arguments);
    // Whatever was understood: nothing is lost or moved.
    let mut again = call.globals.clone();
    again.extend(call.verb.clone().map(OsString::from));
    again.extend(call.rest.clone());
    assert_eq!(again, arguments);
    call
}

fn containerd(rest: &str) -> Call {
    call(&format!(
        "--root /run/containerd/runc/k8s.io --log {LOG} --log-format json {rest}"
    ))
}

#[test]
fn verb_and_id_of_recorded_calls() {
    for (rest, verb) in [
        ("create --bundle /B --pid-file /B/init.pid ID", "create"),
        ("start ID", "start"),
        (
            "exec --process /tmp/runc-process3841116399 --detach --pid-file /B/35942fee.pid ID",
            "exec",
        ),
        ("ps --format json ID", "ps"),
        ("pause ID", "pause"),
        ("resume ID", "resume"),
        ("kill ID 15", "kill"),
        ("kill ID 9", "kill"),
        ("kill --all ID 9", "kill"),
        ("delete ID", "delete"),
        ("delete --force ID", "delete"),
        ("state ID", "state"),
        ("update --resources - ID", "update"),
        ("events --stats ID", "events"),
        ("events --interval 5s ID", "events"),
    ] {
        for call in [
            containerd(rest),
            call(&format!("--root=/run/runc --systemd-cgroup {rest}")),
            call(&format!("-root /run/runc --debug --rootless auto {rest}")),
            call(rest),
        ] {
            assert_eq!(call.verb.as_deref(), Some(verb), "{rest}");
            assert_eq!(call.id(), Some("ID"), "{rest}");
        }
    }
}

#[test]
fn options_of_create() {
    for text in [
        "create --bundle /B --pid-file /B/init.pid ID",
        "create --bundle=/B --pid-file=/B/init.pid ID",
        "create -b /B -pid-file /B/init.pid -- ID",
        "create --no-pivot --preserve-fds 2 --console-socket /c --bundle /B --pid-file /B/init.pid ID",
    ] {
        let call = containerd(text);
        assert_eq!(call.bundle(), Path::new("/B"), "{text}");
        assert_eq!(call.option(&["pid-file"]).unwrap(), "/B/init.pid", "{text}");
        assert_eq!(call.id(), Some("ID"), "{text}");
    }
    assert_eq!(call("create ID").bundle(), Path::new("."));
}

#[test]
fn global_flags() {
    let containerd = containerd("start ID");
    assert_eq!(containerd.global("root").unwrap(), "/run/containerd/runc/k8s.io");
    assert_eq!(containerd.global("log").unwrap(), LOG);
    assert_eq!(
        containerd.globals_without_log(),
        ["--root", "/run/containerd/runc/k8s.io"]
    );
    assert!(!containerd.has_global("systemd-cgroup"));
    let conmon = call("--root=/run/runc --systemd-cgroup --log=/l start ID");
    assert!(conmon.has_global("systemd-cgroup"));
    assert!(!call("--systemd-cgroup=false start ID").has_global("systemd-cgroup"));
    assert_eq!(conmon.globals_without_log(), ["--root=/run/runc", "--systemd-cgroup"]);
    assert_eq!(conmon.global("log").unwrap(), "/l");
}

#[test]
fn what_is_unknown_is_left_alone() {
    for (text, verb, id) in [
        ("", None, None),
        ("--version", None, None),
        ("--root", None, None),
        ("features", Some("features"), None),
        ("list --format json", Some("list"), Some("json")),
        ("frobnicate --whatever x", Some("frobnicate"), Some("x")),
    ] {
        let call = call(text);
        assert_eq!((call.verb.as_deref(), call.id()), (verb, id), "{text:?}");
    }
}
