//! Containers as containerd's shim makes them: a bundle, pipes for the streams, calls of the wrapper.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use hostsys::cgroup::Cgroup;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::json;

use crate::node::CONTAINERS;
use crate::workload::COUNTERS;

pub(crate) const WRAPPER: &str = "/opt/peregrine/bin/peregrine-runc";

pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) folder: PathBuf,
    /// Reading end of its standard output.
    pub(crate) output: Option<File>,
}

impl Container {
    /// A bundle in the given network namespace (`source`, `target`), with annotations.
    pub(crate) fn new(id: &str, network: &str, uid: u32, annotations: &[(&str, &str)]) -> Self {
        let folder = PathBuf::from("/run/case").join(id);
        for part in ["rootfs/data", "rootfs/proc", "rootfs/dev", "rootfs/sys", "shm"] {
            fs::create_dir_all(folder.join(part)).unwrap();
        }
        std::os::unix::fs::chown(folder.join("rootfs/data"), Some(uid), Some(uid)).unwrap();
        fs::copy("/workload", folder.join("rootfs/workload")).unwrap();
        let annotations: serde_json::Map<String, serde_json::Value> = annotations
            .iter()
            .map(|(key, value)| ((*key).to_owned(), json!(value)))
            .collect();
        let capabilities = if uid == 0 {
            vec!["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
        } else {
            vec![]
        };
        let config = json!({
            "ociVersion": "1.2.1",
            "process": {
                "terminal": false, "user": {"uid": uid, "gid": uid}, "args": ["/workload"], "env": ["PATH=/"], "cwd": "/",
                "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
                "noNewPrivileges": true,
            },
            "root": {"path": "rootfs"},
            "hostname": "pod",
            "annotations": annotations,
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
                {"destination": "/dev/shm", "type": "bind", "source": folder.join("shm"), "options": ["rbind", "rprivate", "rw"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            ],
            "linux": {
                "cgroupsPath": format!("/containers/{id}"),
                "namespaces": [
                    {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"},
                    {"type": "network", "path": format!("/run/netns/{network}")},
                ],
                "maskedPaths": ["/proc/kcore", "/proc/keys"],
                "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
            },
        });
        fs::write(folder.join("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
        Self {
            id: id.into(),
            folder,
            output: None,
        }
    }

    pub(crate) fn cgroup(&self) -> Cgroup {
        Cgroup::at(Path::new(CONTAINERS).join(&self.id))
    }

    fn command(&self, verb: &[&str]) -> Command {
        let mut command = Command::new(WRAPPER);
        command
            .args(["--root", "/run/runc", "--log"])
            .arg(self.folder.join("log.json"))
            .args(["--log-format", "json"]);
        command.args(verb);
        command
    }

    /// A call with the container's id at its end.
    pub(crate) fn call(&self, verb: &[&str]) -> Output {
        self.command(verb).arg(&self.id).stdin(Stdio::null()).output().unwrap()
    }

    /// A call that must succeed.
    pub(crate) fn must(&self, verb: &[&str]) -> String {
        let output = self.call(verb);
        assert!(
            output.status.success(),
            "{verb:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// `create`; the error is what the kubelet would show: the last line of the log.
    pub(crate) fn create(&mut self) -> Result<i32, String> {
        let (read, write) = nix::unistd::pipe().unwrap();
        let pid_file = self.folder.join("init.pid");
        let bundle = self.folder.display().to_string();
        let status = self
            .command(&[
                "create",
                "--bundle",
                &bundle,
                "--pid-file",
                &pid_file.display().to_string(),
                &self.id,
            ])
            .stdin(Stdio::null())
            .stdout(write.try_clone().unwrap())
            .stderr(write)
            .status()
            .unwrap();
        nix::fcntl::fcntl(&read, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
        self.output = Some(File::from(read));
        if status.success() {
            return Ok(fs::read_to_string(pid_file).unwrap().parse().unwrap());
        }
        let log = fs::read_to_string(self.folder.join("log.json")).unwrap();
        let line: serde_json::Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
        assert_eq!(line["level"], "error");
        let message = line["msg"].as_str().unwrap().to_owned();
        assert!(self.read_output().contains(&message), "standard error says the same");
        Err(message)
    }

    pub(crate) fn start_workload(&mut self) -> i32 {
        let pid = self.create().unwrap();
        self.must(&["start"]);
        self.await_progress();
        pid
    }

    pub(crate) fn read_output(&mut self) -> String {
        let mut text = Vec::new();
        // Ends with WouldBlock.
        let _ = self.output.as_mut().unwrap().read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    }

    pub(crate) fn counters(&self) -> Vec<u64> {
        let read = |name: &&str| {
            let bytes = fs::read(self.folder.join("rootfs/data").join(name)).unwrap_or_default();
            u64::from_le_bytes(bytes.try_into().unwrap_or_default())
        };
        COUNTERS.iter().map(read).collect()
    }

    /// Every process and thread goes on counting.
    pub(crate) fn await_progress(&self) {
        let before = self.counters();
        eventually("every counter advances", || {
            self.counters().iter().zip(&before).all(|(now, then)| now > &(then + 3))
        });
    }

    pub(crate) fn state(&self) -> serde_json::Value {
        serde_json::from_str(&self.must(&["state"])).unwrap()
    }

    /// What the container's files are at this moment, for the other node, and CRIU's name for the one that has lost its own,
    /// as the agent gives it (node-agent/src/nameless.rs).
    pub(crate) fn copy_data_to(&self, other: &Self) {
        let copied = Command::new("cp")
            .args(["-a", "--"])
            .arg(self.folder.join("rootfs/data"))
            .arg(other.folder.join("rootfs"))
            .status();
        assert!(copied.unwrap().success());
        let files = fs::read(crate::agent::images().join("files.img")).unwrap();
        // A string in an image stands behind its length.
        let begin = files.windows(17).position(|part| part == b"/data/link_remap.").unwrap();
        let link = &files[begin..][..usize::from(files[begin - 1])];
        let root = other.folder.join("rootfs");
        let link = root.join(String::from_utf8_lossy(link).trim_start_matches('/'));
        fs::hard_link(root.join("data/other-name"), link).unwrap();
    }
}

/// Polls a condition, with a deadline.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < end, "not within 60 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// How a process ended that fell to this one, as containerd's shim sees it: an exit status, or minus a signal.
pub(crate) fn await_end(pid: i32) -> i32 {
    let mut end = None;
    eventually("the process ends", || {
        end = match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)).unwrap() {
            WaitStatus::Exited(_, status) => Some(status),
            WaitStatus::Signaled(_, signal, _) => Some(-(signal as i32)),
            _ => None,
        };
        end.is_some()
    });
    end.unwrap()
}

/// User and system time of a process, in ticks.
pub(crate) fn cpu_time(pid: i32) -> (u64, u64) {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    (fields[11].parse().unwrap(), fields[12].parse().unwrap())
}
