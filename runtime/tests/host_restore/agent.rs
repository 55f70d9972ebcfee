//! What the node's agents do around the wrapper: hand-offs, the dump, requests to the shepherd.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use protocol::hand_off::{HAND_OFF_DIR, HandOff, Request, SHEPHERD_DIR, ShepherdReport, State};

use crate::container::Container;

pub(crate) const ANNOTATIONS: &[(&str, &str)] = &[
    ("io.kubernetes.cri.container-type", "container"),
    ("io.kubernetes.cri.container-name", "c"),
    ("io.kubernetes.cri.sandbox-uid", "uid-1"),
    ("io.kubernetes.cri.sandbox-namespace", "default"),
    ("io.kubernetes.cri.sandbox-name", "pod-m"),
    ("peregrine.dev/target-of", "migration-1"),
];

pub(crate) fn hand_off() -> HandOff {
    HandOff {
        pod_uid: "uid-1".into(),
        namespace: "default".into(),
        pod_name: "pod-m".into(),
        container: "c".into(),
        migration_uid: "migration-1".into(),
        attempt: 1,
    }
}

pub(crate) fn hand_off_path() -> PathBuf {
    Path::new(HAND_OFF_DIR).join("uid-1/c/hand-off.json")
}

pub(crate) fn write_hand_off(bytes: &[u8]) {
    let path = hand_off_path();
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let new = path.with_extension("new");
    fs::write(&new, bytes).unwrap();
    fs::set_permissions(&new, PermissionsExt::from_mode(0o600)).unwrap();
    fs::rename(new, path).unwrap();
}

/// A target whose shepherd stands.
pub(crate) fn target(id: &str) -> (Container, i32) {
    write_hand_off(&hand_off().seal().unwrap());
    let mut target = Container::new(id, "target", 0, ANNOTATIONS);
    let pid = target.create().unwrap();
    target.must(&["start"]);
    (target, pid)
}

pub(crate) fn report(target: &Container) -> ShepherdReport {
    let path = Path::new(SHEPHERD_DIR).join(&target.id).join("shepherd.json");
    ShepherdReport::open(&fs::read(path).unwrap()).unwrap()
}

/// A connection to a shepherd.
pub(crate) struct Connection(BufReader<UnixStream>);

impl Connection {
    pub(crate) fn to(target: &Container) -> Self {
        let stream = UnixStream::connect(Path::new(SHEPHERD_DIR).join(&target.id).join("sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Self(BufReader::new(stream))
    }

    pub(crate) fn send(&mut self, request: &Request) {
        let mut line = serde_json::to_vec(request).unwrap();
        line.push(b'\n');
        self.0.get_mut().write_all(&line).unwrap();
    }

    pub(crate) fn send_raw(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.get_mut().write_all(bytes)
    }

    /// None at the end of the connection.
    pub(crate) fn receive(&mut self) -> Option<State> {
        let mut line = String::new();
        self.0.read_line(&mut line).ok()?;
        serde_json::from_str(&line).ok()
    }

    pub(crate) fn ask(&mut self, request: &Request) -> State {
        self.send(request);
        self.receive().unwrap()
    }
}

pub(crate) fn ask(target: &Container, request: &Request) -> State {
    Connection::to(target).ask(request)
}

pub(crate) fn images() -> PathBuf {
    PathBuf::from("/run/case/images")
}

pub(crate) fn restore_request() -> Request {
    let work = images().with_file_name("work");
    fs::create_dir_all(&work).unwrap();
    Request::Restore {
        images: images().display().to_string(),
        work: work.display().to_string(),
        lazy: false,
    }
}

/// Freezes a source and dumps it; it stays frozen.
pub(crate) fn checkpoint(source: &Container) {
    let folder = images();
    fs::create_dir_all(&folder).unwrap();
    source.cgroup().freeze(Duration::from_secs(5)).unwrap();
    let options = folder.with_file_name("dump.conf");
    fs::write(&options, "network-lock skip\nghost-limit 256M\n").unwrap();
    let output = Command::new("/usr/sbin/runc")
        .args([
            "--root",
            "/run/runc",
            "checkpoint",
            "--leave-running",
            "--tcp-established",
            "--ext-unix-sk",
            "--file-locks",
            "--link-remap",
        ])
        .args(["--manage-cgroups-mode", "ignore", "--image-path"])
        .arg(&folder)
        .arg("--work-path")
        .arg(&folder)
        .arg(&source.id)
        .env("PATH", "/opt/peregrine/libexec:/usr/sbin:/usr/bin")
        .env("CRIU_CONFIG_FILE", options)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let log = fs::read_to_string(folder.join("dump.log")).unwrap_or_default();
    let error = protocol::criu_errors::explain_log(&log);
    assert!(
        output.status.success(),
        "{error:?} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(source.cgroup().is_frozen().unwrap(), "the source stays frozen");
}
