//! What this node can do, found by trying it: never by a version number alone.
//!
//! What must work for any move is *required*: when it is missing, the node is not compatible and the sentence says what
//! to do. All else is published, and compared between source and target.

pub mod cpu;
pub mod criu;
pub mod memory;

use std::path::Path;
use std::time::Duration;

use crds::migration_node::{CpuStatus, CriuStatus, KernelStatus};
use hostsys::cgroup::{self, Cgroup};
use hostsys::kernel_features;
use hostsys::program::Program;

use crate::install::criu::Criu;

/// The freezer of cgroup v2: both ends of a move are held by it.
const FREEZER: &str = "cgroup-v2-freezer";
/// Ending connections by netlink.
pub const DESTROY: &str = "inet-diag-destroy";

/// Features without which no move is possible: name and what to do.
const REQUIRED: [(&str, &str); 5] = [
    (FREEZER, "boot with cgroup v2 (systemd.unified_cgroup_hierarchy=1)"),
    (
        "tcp-repair",
        "the agent needs CAP_NET_ADMIN and the kernel CONFIG_CHECKPOINT_RESTORE",
    ),
    ("time-namespace", "the kernel needs CONFIG_TIME_NS (5.6 or later)"),
    ("nftables", "load the kernel module nf_tables"),
    ("pidfd", "the kernel must be 5.6 or later"),
];

/// What was found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Probe {
    /// The kernel.
    pub kernel: KernelStatus,
    /// The processor.
    pub cpu: CpuStatus,
    /// `x86_64`, `aarch64`.
    pub architecture: String,
    /// CRIU, where it works.
    pub criu: Option<CriuStatus>,
    /// Version line of the OCI runtime below the wrapper.
    pub oci_version: Option<String>,
    /// What is missing, one sentence each, with what to do.
    pub missing: Vec<String>,
}

impl Probe {
    /// Whether a feature of the kernel works.
    #[must_use]
    pub fn has(&self, feature: &str) -> bool {
        self.kernel.features.iter().any(|f| f == feature)
    }
}

/// Tries the kernel and the processor: milliseconds, needs nothing installed.
#[must_use]
pub fn machine() -> Probe {
    let mut features: Vec<String> = kernel_features::probe()
        .into_iter()
        .filter(|(_, works)| *works)
        .map(|(name, _)| name.to_owned())
        .collect();
    let freezer = freezer();
    if freezer.is_ok() {
        features.push(FREEZER.to_owned());
    }
    features.sort();
    let mut missing = missing_features(&features);
    if let Err(error) = freezer {
        missing.push(format!("the freezer failed: {error}"));
    }
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    Probe {
        kernel: KernelStatus {
            release: text("/proc/sys/kernel/osrelease").trim().to_owned(),
            features,
        },
        cpu: cpu::parse(&text("/proc/cpuinfo"), hostsys::cpu::xsave_bytes()),
        architecture: hostsys::cpu::architecture().to_owned(),
        missing,
        ..Probe::default()
    }
}

/// Tries everything, CRIU and the OCI runtime too: a second or less. `oci_runtime` and `criu` as the installation found
/// them.
#[must_use]
pub fn everything(oci_runtime: Option<&Path>, criu: Option<&Criu>) -> Probe {
    let mut probe = machine();
    match criu::probe(criu) {
        Ok(status) => probe.criu = Some(status),
        Err(missing) => probe.missing.push(missing),
    }
    if let Some(runtime) = oci_runtime {
        match oci(runtime) {
            Ok(version) => probe.oci_version = Some(version),
            Err(missing) => probe.missing.push(missing),
        }
    }
    probe
}

fn missing_features(found: &[String]) -> Vec<String> {
    REQUIRED
        .iter()
        .filter(|(name, _)| !found.iter().any(|f| f == name))
        .map(|(name, remedy)| format!("{name} does not work here: {remedy}"))
        .collect()
}

/// Makes a cgroup, freezes and thaws it, removes it.
fn freezer() -> Result<(), String> {
    let tried = || -> Result<(), cgroup::Error> {
        let group = Cgroup::at(cgroup::mount_point()?.join(format!("peregrine-probe-{}", std::process::id())));
        group.create()?;
        let frozen = group.freeze(Duration::from_secs(2)).and_then(|()| group.thaw());
        group.remove(Duration::from_secs(2))?;
        frozen
    };
    tried().map_err(|e| crate::error::chain(&e))
}

/// Asks the OCI runtime for its version, and whether it can checkpoint the way we need.
fn oci(runtime: &Path) -> Result<String, String> {
    let run = |argument: &[&str]| {
        let output = Program::new(runtime)
            .args(argument)
            .within(Duration::from_secs(10))
            .output();
        output.map(|o| {
            [o.stdout, o.stderr]
                .map(|text| String::from_utf8_lossy(&text).into_owned())
                .concat()
        })
    };
    let version = run(&["--version"]).map_err(|e| crate::error::chain(&e))?;
    let help = run(&["checkpoint", "--help"]).unwrap_or_default();
    for option in [
        "--leave-running",
        "--manage-cgroups-mode",
        "--image-path",
        "--work-path",
        "--link-remap",
    ] {
        if !help.contains(option) {
            return Err(format!(
                "{} has no `checkpoint {option}`: install a newer runc (1.3 is known to work)",
                runtime.display()
            ));
        }
    }
    Ok(version.lines().next().unwrap_or_default().trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_feature_is_named_with_what_to_do() {
        let all: Vec<String> = REQUIRED.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert!(missing_features(&all).is_empty());
        let missing = missing_features(&all[1..]);
        assert_eq!(missing.len(), 1);
        assert!(missing[0].contains("cgroup v2"), "{missing:?}");
        assert_eq!(missing_features(&[]).len(), REQUIRED.len());
    }

    #[test]
    fn a_runtime_that_cannot_checkpoint_is_refused() {
        let error = oci(Path::new("/bin/true")).unwrap_err();
        assert!(error.contains("--leave-running"), "{error}");
    }
}
