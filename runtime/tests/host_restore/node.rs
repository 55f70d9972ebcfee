//! A node: mount, pid, uts, ipc, network and cgroup namespaces, on an overlay of the Debian tree.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use hostsys::cgroup::{self, Cgroup};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use protocol::hand_off::{HAND_OFF_DIR, RUNTIME_CONFIG, RuntimeConfig, SHEPHERD_DIR};

const TREE: &str = "PEREGRINE_TEST_TREE";
const LIMITS: &str = "PEREGRINE_TEST_LIMITS";
const CRIU: &str = "PEREGRINE_TEST_CRIU";
/// CRIU of the agent's image, as the agent installs it.
const OWN_CRIU: &str = "/opt/peregrine/criu/test";
/// Cgroup of all containers inside.
pub(crate) const CONTAINERS: &str = "/sys/fs/cgroup/containers";

fn tree() -> Option<PathBuf> {
    let of = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cached = || {
        let home = of("PEREGRINE_HOME")
            .or_else(|| of("XDG_CACHE_HOME").map(|cache| cache.join("peregrine")))
            .or_else(|| of("HOME").map(|home| home.join(".cache/peregrine")))?;
        let parts = fs::read_dir(home.join("parts"))
            .ok()?
            .flatten()
            .map(|entry| entry.path());
        parts.filter(has_programs).max()
    };
    of(TREE).filter(has_programs).or_else(cached)
}

#[expect(clippy::ptr_arg, reason = "a filter of paths")]
fn has_programs(tree: &PathBuf) -> bool {
    tree.join("usr/sbin/criu").exists() && tree.join("usr/sbin/runc").exists()
}

/// Why the cases cannot run here.
pub(crate) fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".into());
    }
    if cgroup::mount_point().is_err() {
        return Some("needs a cgroup v2 mount".into());
    }
    tree()
        .is_none()
        .then(|| format!("needs a Debian tree with runc and CRIU ({TREE})"))
}

/// The preload is a crate of its own with a dynamic libc: it is built here.
fn build_limits() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../hostsys/criu-preload/Cargo.toml");
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/criu-preload");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["build", "--release", "--quiet", "--manifest-path"])
        .arg(manifest)
        .arg("--target-dir")
        .arg(&target)
        .env("RUSTFLAGS", "-C target-feature=-crt-static")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "the preload does not build: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let triples = fs::read_dir(&target).unwrap().flatten().map(|entry| entry.path());
    triples
        .map(|path| path.join("release/libcriu_preload.so"))
        .find(|path| path.exists())
        .unwrap()
}

/// CRIU as the agent's image has it, made from the tree.
fn bundle_criu(tree: &Path) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../node-agent/criu-bundle.sh");
    let folder = std::env::temp_dir().join(format!("peregrine-criu-{}", std::process::id()));
    let status = Command::new("sh").arg(script).arg(tree).arg(&folder).status();
    assert!(status.unwrap().success());
    folder
}

/// Makes the namespaces and runs the cases in them.
pub(crate) fn run_inside(filter: &str) -> ExitCode {
    let limits = build_limits();
    let tree = tree().unwrap();
    let criu = bundle_criu(&tree);
    let group = Cgroup::at(
        cgroup::mount_point()
            .unwrap()
            .join(format!("peregrine-host-test-{}", std::process::id())),
    );
    group.create().unwrap();
    let home = Cgroup::of_process(i32::try_from(std::process::id()).unwrap()).unwrap();
    group.add(0).unwrap();
    // Of the pid namespace only children are part, so it is made here; the others are the child's own affair.
    unshare(CloneFlags::CLONE_NEWPID).unwrap();
    let status = Command::new("/proc/self/exe")
        .args(["--inside", filter])
        .env(TREE, tree)
        .env(LIMITS, limits)
        .env(CRIU, &criu)
        .status()
        .unwrap();
    fs::remove_dir_all(criu).unwrap();
    home.add(0).unwrap();
    group.kill(Duration::from_secs(10)).unwrap();
    group.remove(Duration::from_secs(10)).unwrap();
    if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// As the first process of the namespaces: a file system of its own, with the wrapper installed.
pub(crate) fn set_up() {
    let none = None::<&str>;
    let flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(flags).unwrap();
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    let base = Path::new("/tmp");
    let tree = PathBuf::from(std::env::var_os(TREE).unwrap());
    // Opened before /tmp is covered: all of these may lie in it.
    let own_criu = fs::read_dir(std::env::var_os(CRIU).unwrap()).unwrap().flatten();
    let own_criu = own_criu.map(|file| (Path::new(OWN_CRIU).join(file.file_name()), file.path()));
    let files: Vec<(PathBuf, File)> = [
        (
            "/opt/peregrine/bin/peregrine-runc".into(),
            PathBuf::from(env!("CARGO_BIN_EXE_peregrine-runc")),
        ),
        (
            "/opt/peregrine/lib/limits.so".into(),
            PathBuf::from(std::env::var_os(LIMITS).unwrap()),
        ),
        ("/workload".into(), std::env::current_exe().unwrap()),
    ]
    .into_iter()
    .chain(own_criu)
    .map(|(to, from)| (to, File::open(from).unwrap()))
    .collect();
    let tree_fd = File::open(&tree).unwrap();
    let lower = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&tree_fd));
    mount(Some("tmpfs"), base, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    for folder in ["upper", "work", "root"] {
        fs::create_dir(base.join(folder)).unwrap();
    }
    let root = base.join("root");
    let options = format!("lowerdir={lower},upperdir=/tmp/upper,workdir=/tmp/work");
    mount(
        Some("overlay"),
        &root,
        Some("overlay"),
        MsFlags::empty(),
        Some(&*options),
    )
    .unwrap();
    for (source, to, kind) in [
        ("proc", "proc", "proc"),
        ("sysfs", "sys", "sysfs"),
        ("cgroup2", "sys/fs/cgroup", "cgroup2"),
        ("tmpfs", "run", "tmpfs"),
        ("tmpfs", "tmp", "tmpfs"),
    ] {
        mount(Some(source), &root.join(to), Some(kind), MsFlags::empty(), none).unwrap();
    }
    mount(
        Some("/dev"),
        &root.join("dev"),
        none,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        none,
    )
    .unwrap();
    for (to, mut file) in files {
        let to = root.join(to.strip_prefix("/").unwrap());
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::io::copy(&mut file, &mut File::create(&to).unwrap()).unwrap();
        fs::set_permissions(&to, PermissionsExt::from_mode(0o755)).unwrap();
    }
    fs::create_dir(root.join("old")).unwrap();
    nix::unistd::pivot_root(&root, &root.join("old")).unwrap();
    std::env::set_current_dir("/").unwrap();
    umount2("/old", MntFlags::MNT_DETACH).unwrap();
    fs::create_dir_all("/opt/peregrine/libexec").unwrap();
    fs::create_dir_all("/opt/peregrine/etc").unwrap();
    symlink("../bin/peregrine-runc", "/opt/peregrine/libexec/criu").unwrap();
    settings(2);
    // CRIU probes the kernel by a connection to itself.
    assert!(
        Command::new("/usr/sbin/ip")
            .args(["link", "set", "lo", "up"])
            .status()
            .unwrap()
            .success()
    );
    fs::create_dir_all(CONTAINERS).unwrap();
    for name in ["source", "target"] {
        network_namespace(name);
    }
}

/// The installer's settings, with this deadline for hand-offs.
pub(crate) fn settings(hand_off_timeout_seconds: u32) {
    write_settings(RuntimeConfig {
        hand_off_timeout_seconds,
        ..RuntimeConfig::default()
    });
}

/// As on a node that has no CRIU, while `what` is done; then as before.
pub(crate) fn without_criu_of_the_node(what: impl FnOnce()) {
    // With it goes a library that nothing else needs: none of the node's may help.
    let library = format!("/usr/lib/{}-linux-gnu/libprotobuf-c.so.1", std::env::consts::ARCH);
    let hidden = ["/usr/sbin/criu", &library];
    let away = |path: &str| format!("{path}.away");
    hidden.iter().for_each(|path| fs::rename(path, away(path)).unwrap());
    write_settings(RuntimeConfig {
        criu: format!("{OWN_CRIU}/criu"),
        criu_loader: Some(format!("{OWN_CRIU}/loader")),
        hand_off_timeout_seconds: 2,
        ..RuntimeConfig::default()
    });
    what();
    hidden.iter().for_each(|path| fs::rename(away(path), path).unwrap());
    settings(2);
}

fn write_settings(settings: RuntimeConfig) {
    let settings = RuntimeConfig {
        preload: Some("/opt/peregrine/lib/limits.so".into()),
        ..settings
    };
    fs::write(RUNTIME_CONFIG, serde_json::to_vec(&settings).unwrap()).unwrap();
}

/// A network namespace that is bound to a path, as CNI leaves it.
fn network_namespace(name: &str) {
    let path = PathBuf::from(format!("/run/netns/{name}"));
    fs::create_dir_all("/run/netns").unwrap();
    File::create(&path).unwrap();
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let none = None::<&str>;
        mount(Some("/proc/thread-self/ns/net"), &path, none, MsFlags::MS_BIND, none).unwrap();
    })
    .join()
    .unwrap();
}

fn names(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|e| e.path().is_dir())
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}

/// No shepherd, no container, no cgroup, no process, no mount of a case.
pub(crate) fn assert_nothing_left() {
    assert_eq!(names(SHEPHERD_DIR), [""; 0], "shepherds");
    assert_eq!(names("/run/runc"), [""; 0], "containers of runc");
    assert_eq!(names(CONTAINERS), [""; 0], "cgroups");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("criu-root"), "{mounts}");
    let processes = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let live: Vec<String> = processes
        .filter(|pid| *pid != 1)
        .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok())
        .filter(|stat| !stat.contains(") Z "))
        .collect();
    assert!(live.is_empty(), "processes: {live:?}");
    clear();
}

/// After a failed case: what it has left must not disturb the next.
pub(crate) fn clear() {
    for child in Cgroup::at(CONTAINERS).children().unwrap() {
        let _ = child
            .kill(Duration::from_secs(10))
            .and_then(|()| child.remove(Duration::from_secs(5)));
    }
    for folder in [
        SHEPHERD_DIR,
        "/run/runc",
        HAND_OFF_DIR,
        "/run/case",
        "/var/lib/peregrine",
    ] {
        for name in names(folder) {
            let _ = umount2(&Path::new(folder).join(&name).join("criu-root"), MntFlags::MNT_DETACH);
        }
        let _ = fs::remove_dir_all(folder);
    }
}
