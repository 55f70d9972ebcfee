//! The `runc` that containerd calls in a node of the test cluster.
//!
//! The CRI plugin always asks for CPU shares, and runc refuses a container whose cgroup cannot have them. On a machine whose controllers are
//! not in cgroup v2, or are not delegated to the nodes, this program drops `linux.resources` from the bundle before it becomes the real runc.
//! Device rules stay: they are a BPF program, not a controller.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const RUNC: &str = "/usr/sbin/runc";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|arg| arg.to_string_lossy().into_owned())
        .collect();
    if let Some(bundle) = bundle_to_change(&args)
        && !has_controllers(Path::new("/sys/fs/cgroup/cgroup.controllers"))
        && let Err(error) = drop_resources(&bundle.join("config.json"))
    {
        eprintln!("node-runc: {error}");
        return ExitCode::FAILURE;
    }
    let error = Command::new(RUNC).args(std::env::args_os().skip(1)).exec();
    eprintln!("node-runc: cannot run {RUNC}: {error}");
    ExitCode::FAILURE
}

/// The bundle of a call that makes a container; none for all other calls.
fn bundle_to_change(args: &[String]) -> Option<PathBuf> {
    let mut args = args.iter();
    // Flags before the command: only these take a value of their own.
    let command = loop {
        match args.next()?.as_str() {
            "--root" | "--log" | "--log-format" | "--rootless" | "--criu" => {
                args.next();
            }
            flag if flag.starts_with('-') => {}
            command => break command,
        }
    };
    if !matches!(command, "create" | "run" | "restore") {
        return None;
    }
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--bundle" | "-b" => return args.next().map(PathBuf::from),
            other => {
                if let Some(bundle) = other.strip_prefix("--bundle=").or_else(|| other.strip_prefix("-b=")) {
                    return Some(bundle.into());
                }
            }
        }
    }
    Some(PathBuf::from("."))
}

/// Whether this node's cgroup has any controller.
fn has_controllers(list: &Path) -> bool {
    std::fs::read_to_string(list).is_ok_and(|list| !list.trim().is_empty())
}

/// Rewrites a bundle's configuration: by rename, so that nobody reads half of it.
fn drop_resources(config: &Path) -> Result<(), String> {
    let text = std::fs::read(config).map_err(|error| format!("cannot read {}: {error}", config.display()))?;
    let mut spec: serde_json::Value =
        serde_json::from_slice(&text).map_err(|error| format!("cannot parse {}: {error}", config.display()))?;
    if let Some(resources) = spec
        .pointer_mut("/linux/resources")
        .and_then(serde_json::Value::as_object_mut)
    {
        resources.retain(|name, _| name == "devices");
    }
    let new = config.with_extension("json.node-runc");
    let text = serde_json::to_vec(&spec).map_err(|error| format!("cannot write {}: {error}", new.display()))?;
    std::fs::write(&new, text).map_err(|error| format!("cannot write {}: {error}", new.display()))?;
    std::fs::rename(&new, config).map_err(|error| format!("cannot replace {}: {error}", config.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_calls_that_make_containers_are_changed() {
        for (args, bundle) in [
            (
                "--root /r --log /l --log-format json create --bundle /b --pid-file /p id",
                Some("/b"),
            ),
            ("--root=/r create -b /b id", Some("/b")),
            ("--systemd-cgroup restore --image-path /i --bundle=/b id", Some("/b")),
            ("run id", Some(".")),
            ("--root create start id", None),
            ("--root /r kill id 9", None),
            ("state create", None),
            ("", None),
        ] {
            let args: Vec<String> = args.split_whitespace().map(str::to_owned).collect();
            assert_eq!(bundle_to_change(&args), bundle.map(PathBuf::from), "{args:?}");
        }
    }

    #[test]
    fn devices_stay_and_all_other_resources_go() {
        let config = std::env::temp_dir().join(format!("node-runc-{}.json", std::process::id()));
        std::fs::write(&config, r#"{"linux":{"resources":{"cpu":{"shares":2},"devices":[{"allow":false}]},"x":1},"y":18446744073709551615}"#).unwrap();
        drop_resources(&config).unwrap();
        let spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
        assert_eq!(
            spec,
            serde_json::json!({"linux":{"resources":{"devices":[{"allow":false}]},"x":1},"y":u64::MAX})
        );
        std::fs::remove_file(config).unwrap();
    }
}
