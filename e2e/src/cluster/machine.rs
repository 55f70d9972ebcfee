//! A machine of the cluster, seen from the host: power on, power off, orders to its init, a shell in it.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::cgroup::Cgroup;
use super::machine_spec::{CONTROL_SOCKET, MachineSpec};

/// A machine by its name.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    name: String,
    cgroup: Cgroup,
}

impl Machine {
    pub(super) fn named(name: &str) -> Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            cgroup: Cgroup::named(name)?,
        })
    }

    /// PID 1 of the machine, as the host counts.
    pub(super) fn init(&self) -> Option<u32> {
        self.cgroup.processes().into_iter().find(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            is_init(&status)
        })
    }

    /// Powers on. What is left of an earlier run goes first.
    pub(super) fn start(&self, spec: &MachineSpec) -> Result<()> {
        self.crash()?;
        for folder in ["upper", "work", "root", "log"] {
            let folder = spec.disk.join(folder);
            fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        }
        for bind in &spec.binds {
            fs::create_dir_all(&bind.from)
                .with_context(|| format!("cannot make the folder {}", bind.from.display()))?;
        }
        let file = spec.disk.join("spec.json");
        fs::write(&file, serde_json::to_vec_pretty(spec)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
        self.cgroup.create()?;
        let log = spec.logs().join("init.log");
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot open {}", log.display()))?;
        let output = Command::new(&spec.program)
            .args(["internal", "spawn"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .status()
            .with_context(|| format!("cannot start {}", spec.program.display()))?;
        if !output.success() {
            let log = fs::read_to_string(spec.logs().join("init.log")).unwrap_or_default();
            bail!(
                "the machine {} did not start: {}",
                self.name,
                log.lines()
                    .rev()
                    .find(|line| !line.trim().is_empty())
                    .unwrap_or("no reason given")
            );
        }
        Ok(())
    }

    /// Power loss.
    pub(super) fn crash(&self) -> Result<()> {
        self.cgroup
            .destroy()
            .with_context(|| format!("cannot end the machine {}", self.name))?;
        forget_settings()
    }

    /// Gives init an order and returns its answer.
    pub(super) fn order(&self, order: &str) -> Result<String> {
        let init = self.init().with_context(|| format!("{} is not running", self.name))?;
        let socket = PathBuf::from(format!("/proc/{init}/root{CONTROL_SOCKET}"));
        let talk = || -> std::io::Result<String> {
            let mut stream = UnixStream::connect(&socket)?;
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            stream.write_all(format!("{order}\n").as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let answer = talk().with_context(|| format!("cannot talk to the init of {}", self.name))?;
        ensure!(!answer.starts_with("no service"), "{} has {}", self.name, answer.trim());
        Ok(answer)
    }
}

/// Whether `/proc/PID/status` is that of PID 1 in a namespace right below ours: a container's own PID 1 is one deeper.
fn is_init(status: &str) -> bool {
    status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))
        .is_some_and(|pids| {
            let pids: Vec<&str> = pids.split_whitespace().collect();
            pids.len() == 2 && pids[1] == "1"
        })
}

/// A machine that loses its power loses what an agent has set in its kernel for the length of a freeze. Ours share one kernel.
///
/// # Errors
/// If the kernel refuses.
pub(super) fn forget_settings() -> Result<()> {
    const HURRY: &str = "/sys/kernel/rcu_expedited";
    if std::fs::read_to_string(HURRY).is_ok_and(|value| value.trim() != "0") {
        std::fs::write(HURRY, "0").with_context(|| format!("cannot write {HURRY}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_is_pid_one_one_level_down() {
        assert!(is_init("Name:\tx\nNSpid:\t4711\t1\n"));
        assert!(!is_init("NSpid:\t4711\t12\n"));
        assert!(!is_init("NSpid:\t4711\t12\t1\n"));
        assert!(!is_init("NSpid:\t1\n"));
    }
}
