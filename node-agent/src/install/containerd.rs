//! containerd on this node: the process that serves the kubelet, its configuration, and its restart.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hostsys::namespace::PidFd;
use hostsys::program::{self, Program};
use nix::sys::signal::Signal;

use super::containerd_config::{self as config, Dump};
use super::cri;

/// How long a restarted containerd may take until its CRI answers.
const RESTART_DEADLINE: Duration = Duration::from_secs(90);

/// Why containerd could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/proc` could not be read.
    #[error("failed to list the node's processes")]
    Processes(#[source] std::io::Error),
    /// CRI-O.
    #[error("this node runs CRI-O, which is not supported by this version: only containerd is")]
    Crio,
    /// None runs.
    #[error("no containerd runs on this node")]
    NotRunning,
    /// `containerd config dump` failed.
    #[error("failed to read containerd's configuration")]
    Dump(#[source] program::Error),
    /// The configuration is not one that can be extended.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// The restart failed.
    #[error("failed to restart containerd")]
    Restart(#[source] program::Error),
    /// The process could not be signalled.
    #[error("failed to end containerd (pid {0}) for its restart")]
    Signal(i32, #[source] hostsys::namespace::Error),
    /// It did not come back.
    #[error("containerd did not answer within {0:?} of its restart: {1}")]
    NotBack(Duration, String),
}

/// The containerd that serves the kubelet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Containerd {
    /// Its pid.
    pub pid: i32,
    /// Its program file.
    pub program: PathBuf,
    /// Its configuration file; the default one where it was started without.
    pub config: PathBuf,
    /// Folders in which it looks for `runc`.
    pub path: String,
    /// The systemd unit in whose cgroup it runs.
    pub unit: Option<String>,
}

/// Finds it among the node's processes.
///
/// # Errors
/// [`Error::Crio`], [`Error::NotRunning`], [`Error::Processes`].
pub fn find() -> Result<Containerd, Error> {
    let mut crio = false;
    let own = fs::read_link("/proc/1/ns/mnt").ok();
    for entry in fs::read_dir("/proc").map_err(Error::Processes)?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        let process = entry.path();
        let read = |name: &str| fs::read_to_string(process.join(name)).unwrap_or_default();
        let name = read("comm");
        match name.trim_end() {
            "crio" => crio = true,
            // One inside a container (docker in docker, kind) has a mount namespace of its own.
            "containerd" if own.is_some() && fs::read_link(process.join("ns/mnt")).ok() == own => {}
            _ => continue,
        }
        let arguments = nul_separated(&fs::read(process.join("cmdline")).unwrap_or_default());
        let environment = nul_separated(&fs::read(process.join("environ")).unwrap_or_default());
        let Ok(program) = fs::read_link(process.join("exe")) else {
            continue;
        };
        if name.trim_end() != "containerd" || is_dockers(parent_name(&read("stat")).as_deref(), &arguments) {
            continue;
        }
        return Ok(Containerd {
            pid,
            // An upgraded package has replaced the file of the running process.
            program: program.to_string_lossy().trim_end_matches(" (deleted)").into(),
            config: config_argument(&arguments).unwrap_or_else(|| "/etc/containerd/config.toml".into()),
            path: environment
                .iter()
                .find_map(|e| e.strip_prefix("PATH="))
                .unwrap_or("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
                .to_owned(),
            unit: Path::new("/run/systemd/system")
                .is_dir()
                .then(|| unit_of(&read("cgroup")))
                .flatten(),
        });
    }
    Err(if crio { Error::Crio } else { Error::NotRunning })
}

impl Containerd {
    /// The configuration with all imports, as containerd itself understands the files on disk now.
    ///
    /// # Errors
    /// [`Error::Dump`], [`Error::Config`].
    pub fn dump(&self) -> Result<Dump, Error> {
        let output = Program::new(&self.program)
            .args(["--config".as_ref(), self.config.as_os_str()])
            .args(["config", "dump"])
            .within(Duration::from_secs(30))
            .limit(4 << 20)
            .run()
            .map_err(Error::Dump)?;
        Ok(Dump::parse(&String::from_utf8_lossy(&output.stdout))?)
    }

    /// The OCI runtime that the default handler uses, as an absolute path.
    ///
    /// # Errors
    /// [`Error::Config`]. None: no such program.
    pub fn oci_runtime(&self, dump: &Dump) -> Result<Option<PathBuf>, Error> {
        let name = dump.oci_runtime()?.unwrap_or_else(|| "runc".to_owned());
        Ok(find_program(&name, &self.path))
    }

    /// Restarts it once and waits until its CRI answers with our handler in force (or without it, as `handler` says).
    ///
    /// # Errors
    /// [`Error::Restart`], [`Error::Signal`], [`Error::NotBack`].
    pub async fn restart(&self, socket: &Path, handler: bool) -> Result<(), Error> {
        let begun = Instant::now();
        if let Some(unit) = self.unit.clone() {
            let restart = Program::new("systemctl")
                .args(["restart", &unit])
                .within(RESTART_DEADLINE);
            tokio::task::spawn_blocking(move || restart.run())
                .await
                .map_err(|e| Error::NotBack(RESTART_DEADLINE, e.to_string()))?
                .map_err(Error::Restart)?;
        } else {
            let process = PidFd::open(self.pid).map_err(|e| Error::Signal(self.pid, e))?;
            process
                .signal(Signal::SIGTERM)
                .map_err(|e| Error::Signal(self.pid, e))?;
            // Its supervisor starts it again; the answer of the old process must not be taken for the new one's.
            tokio::task::spawn_blocking(move || process.wait_end(RESTART_DEADLINE))
                .await
                .map_err(|e| Error::NotBack(RESTART_DEADLINE, e.to_string()))?;
        }
        loop {
            let answer = cri::handlers(socket).await;
            let error = match answer {
                // An empty list: a version that does not tell. The dump before the restart has shown the handler.
                Ok(handlers) if handlers.is_empty() => return Ok(()),
                Ok(handlers) if handlers.iter().any(|h| h == crds::names::RUNTIME_CLASS) == handler => return Ok(()),
                Ok(handlers) => format!("its handlers are {}", handlers.join(", ")),
                Err(error) => crate::error::chain(&error),
            };
            if begun.elapsed() > RESTART_DEADLINE {
                return Err(Error::NotBack(RESTART_DEADLINE, error));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Finds a program by path, or by name in the folders of a PATH.
#[must_use]
pub fn find_program(name: &str, path: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Path::new(name).is_file().then(|| name.into());
    }
    path.split(':')
        .filter(|folder| !folder.is_empty())
        .map(|folder| Path::new(folder).join(name))
        .find(|candidate| candidate.is_file())
}

fn nul_separated(bytes: &[u8]) -> Vec<String> {
    bytes
        .split(|b| *b == 0)
        .filter(|part| !part.is_empty())
        .map(|part| String::from_utf8_lossy(part).into_owned())
        .collect()
}

/// `--config FILE`, `--config=FILE`, `-c FILE`.
fn config_argument(arguments: &[String]) -> Option<PathBuf> {
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        if argument == "--config" || argument == "-c" {
            return arguments.next().map(PathBuf::from);
        }
        if let Some(file) = argument
            .strip_prefix("--config=")
            .or_else(|| argument.strip_prefix("-c="))
        {
            return Some(file.into());
        }
    }
    None
}

/// Docker starts a containerd of its own, which no kubelet talks to.
fn is_dockers(parent: Option<&str>, arguments: &[String]) -> bool {
    parent == Some("dockerd") || arguments.iter().any(|a| a.contains("/docker/containerd/"))
}

fn parent_name(stat: &str) -> Option<String> {
    // The name in parentheses may hold spaces and parentheses itself.
    let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?;
    let name = fs::read_to_string(format!("/proc/{parent}/comm")).ok()?;
    Some(name.trim_end().to_owned())
}

/// The systemd service of a process, from `/proc/PID/cgroup`.
fn unit_of(cgroup: &str) -> Option<String> {
    cgroup
        .lines()
        .flat_map(|line| line.rsplit('/'))
        .find(|part| part.ends_with(".service"))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn the_configuration_file_is_the_argument() {
        for (line, file) in [
            ("containerd", None),
            ("containerd --config /a.toml", Some("/a.toml")),
            ("containerd -l debug -c /a.toml", Some("/a.toml")),
            ("containerd --config=/a.toml --root /x", Some("/a.toml")),
        ] {
            assert_eq!(config_argument(&words(line)), file.map(PathBuf::from), "{line}");
        }
    }

    #[test]
    fn dockers_containerd_is_not_the_kubelets() {
        assert!(is_dockers(
            None,
            &words("containerd --config /var/run/docker/containerd/containerd.toml")
        ));
        assert!(is_dockers(Some("dockerd"), &[]));
        assert!(!is_dockers(Some("systemd"), &words("/usr/bin/containerd")));
    }

    #[test]
    fn the_unit_is_the_innermost_service() {
        assert_eq!(
            unit_of("0::/system.slice/containerd.service\n").as_deref(),
            Some("containerd.service")
        );
        assert_eq!(
            unit_of("1:cpu:/\n0::/system.slice/k3s.service/x\n").as_deref(),
            Some("k3s.service")
        );
        assert_eq!(unit_of("0::/\n"), None);
    }
}
