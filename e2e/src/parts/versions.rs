//! `versions.toml`: every outside part, and the version that was seen to work.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde::Deserialize;

/// The file, as it was when this program was built.
const TEXT: &str = include_str!("../../versions.toml");

/// What `versions.toml` says.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Versions {
    /// The Debian tree.
    pub debian: Debian,
    /// The Go program of Kubernetes components.
    pub kubernetes: Kubernetes,
    /// helm.
    pub helm: Helm,
    /// The Go that builds them.
    pub go: Go,
}

/// The Debian tree.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Debian {
    /// Name of the suite.
    pub suite: String,
    /// Where packages come from.
    pub mirror: String,
    /// debootstrap scripts that can make the suite.
    pub scripts: Vec<String>,
    /// Packages beside the minimal set.
    pub include: Vec<String>,
    /// Upstream version by package.
    pub verified: BTreeMap<String, String>,
}

/// The Kubernetes components.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kubernetes {
    /// Without the `v`.
    pub version: String,
}

/// helm.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Helm {
    /// Package of its `main`.
    pub module: String,
    /// With the `v`.
    pub version: String,
}

/// The Go toolchain.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Go {
    /// The oldest one of the host that is used.
    pub host_minimum: String,
    /// What a tree needs to build Go programs.
    pub packages: Vec<String>,
}

impl Versions {
    /// Parses the file.
    ///
    /// # Errors
    /// If it does not have the shape above.
    pub fn load() -> Result<Self> {
        toml::from_str(TEXT).context("cannot read versions.toml")
    }
}

/// How an installed version compares with the verified one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The very version that was seen to work.
    Verified,
    /// Newer, same major version: probably fine.
    Newer,
    /// Older, or another major version: refused.
    Unfit,
}

/// Compares upstream versions by their numbers.
pub(super) fn compare(installed: &str, verified: &str) -> Verdict {
    let (installed, verified) = (numbers(installed), numbers(verified));
    if installed == verified {
        Verdict::Verified
    } else if installed > verified && installed.first() == verified.first() {
        Verdict::Newer
    } else {
        Verdict::Unfit
    }
}

/// `1:2.1.9+ds1-5` is 2, 1, 9: without Debian's epoch, revision and repacking suffix.
fn numbers(version: &str) -> Vec<u64> {
    let upstream = version.split_once(':').map_or(version, |(_, rest)| rest);
    let upstream = upstream.split(['-', '+', '~']).next().unwrap_or_default();
    upstream
        .trim_start_matches(['v', 'g', 'o'])
        .split('.')
        .map_while(|part| part.parse().ok())
        .collect()
}

/// Whether a version is at least another one.
pub(super) fn at_least(version: &str, minimum: &str) -> bool {
    numbers(version) >= numbers(minimum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_parses_and_every_verified_package_is_included() {
        let versions = Versions::load().unwrap();
        for package in versions.debian.verified.keys() {
            assert!(
                versions.debian.include.contains(package),
                "{package} is verified but not installed"
            );
        }
    }

    #[test]
    fn versions_compare_by_number() {
        for (installed, verified, verdict) in [
            ("1:1.4.9-1", "1.4.9", Verdict::Verified),
            ("2.1.9+ds1-5", "2.1.9", Verdict::Verified),
            ("2.1.10-1", "2.1.9", Verdict::Newer),
            ("2.2.0~rc1-1", "2.1.9", Verdict::Newer),
            ("2.1.8-1", "2.1.9", Verdict::Unfit),
            ("1.9.9", "2.1.9", Verdict::Unfit),
            ("3.0.0", "2.1.9", Verdict::Unfit),
            ("nonsense", "2.1.9", Verdict::Unfit),
        ] {
            assert_eq!(compare(installed, verified), verdict, "{installed} against {verified}");
        }
        assert!(at_least("go1.26.8", "1.21") && !at_least("go1.19.4", "1.21") && at_least("2:1.27~1", "1.21"));
    }
}
