//! The installer on a real containerd, in a machine of its own made of namespaces: one restart for an installation, none for
//! a second one, an undo that leaves every byte as it was.
//!
//! Needs root and the Debian tree that `cargo xtask cluster up` makes; skipped, with the reason, without them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use hostsys::program::Program;

/// The newest Debian tree with a containerd among the cluster's parts.
fn tree() -> Option<PathBuf> {
    let of = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = of("PEREGRINE_HOME")
        .or_else(|| of("XDG_CACHE_HOME").map(|cache| cache.join("peregrine")))
        .or_else(|| of("HOME").map(|home| home.join(".cache/peregrine")))?;
    std::fs::read_dir(home.join("parts"))
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join("usr/bin/containerd").is_file() && path.join("usr/sbin/runc").is_file())
        .max()
}

fn skip(why: &str) {
    println!("SKIPPED: {why}");
}

#[test]
fn an_installation_is_made_once_and_undone_exactly() {
    if !nix::unistd::geteuid().is_root() {
        return skip("not root");
    }
    let Some(tree) = tree() else {
        return skip("no Debian tree: `cargo xtask cluster up` makes it");
    };
    if Command::new("unshare")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        return skip("no `unshare` here");
    }
    let work = std::env::temp_dir().join(format!("peregrine-install-{}", std::process::id()));
    std::fs::create_dir_all(&work).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/host_install.sh");
    let criu = work.join("criu");
    let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("criu-bundle.sh");
    let bundled = Command::new("sh").args([&bundle, &tree, &criu]).status();
    assert!(bundled.unwrap().success());
    let output = Program::new("unshare")
        .args([
            "--mount",
            "--pid",
            "--cgroup",
            "--net",
            "--uts",
            "--ipc",
            "--fork",
            "--kill-child",
            "bash",
        ])
        .args([script.as_os_str(), work.as_os_str(), tree.as_os_str()])
        .args([env!("CARGO_BIN_EXE_node-agent"), "/bin/true"])
        .arg(&criu)
        .within(Duration::from_secs(120))
        .output()
        .unwrap();
    std::fs::remove_dir_all(&work).unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let results: Vec<&str> = said
        .lines()
        .filter_map(|line| line.strip_prefix("RESULT "))
        .map(str::trim)
        .collect();
    let expected = [
        // Numbers: how often containerd has been restarted.
        "installed 1",
        "handler",
        "below",
        "again 1",
        "undone 2",
        "same",
        "left /etc/containerd/config.toml",
        "twice 2",
        "kept",
        "waits",
        "named",
        "stays",
        "left /etc/containerd/config.toml",
        "the node's own: /usr/sbin/criu \"fromAgentImage\":false",
        "the image's: \"fromAgentImage\":true",
        "upgraded: \"fromAgentImage\":true",
        "too old: \"fromAgentImage\":true",
        "CRIU is 3.16.1, too old",
        "CRIU is missing",
        "left /etc/containerd/config.toml",
    ];
    assert_eq!(results, expected, "{said}");
}
