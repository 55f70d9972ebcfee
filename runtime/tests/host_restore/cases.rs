//! The cases. Each begins and ends with an empty node.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protocol::hand_off::{
    COMMITTED_DIR, HAND_OFF_DIR, HandOff, MAX_FILE, MOVED_AWAY_DIR, Request, SHEPHERD_DIR, State,
};

use crate::agent::{
    ANNOTATIONS, Connection, ask, checkpoint, hand_off, hand_off_path, images, report, restore_request, target,
    write_hand_off,
};
use crate::container::{Container, await_end, cpu_time, eventually};
use crate::node::{settings, without_criu_of_the_node};

type Case = (&'static str, fn());

/// All cases by name.
pub(crate) const ALL: &[Case] = &[
    ("a_call_without_annotation_is_plain_runc", plain),
    (
        "a_container_is_restored_held_and_goes_on_after_the_commit",
        moved_as_root,
    ),
    ("a_container_of_an_ordinary_user_is_moved", moved_as_user),
    ("a_moved_container_is_moved_again", moved_again),
    ("the_shepherd_ends_as_the_container_ends", ends_alike),
    ("a_target_without_hand_off_is_not_started", no_hand_off),
    ("hand_offs_that_are_not_valid_are_refused", bad_hand_offs),
    ("a_hand_off_is_used_once", used_once),
    ("after_the_commit_the_pod_is_an_ordinary_one", ordinary_after_commit),
    ("a_pod_that_moved_away_is_not_started_again", moved_away),
    ("calls_before_the_restore_are_answered", before_the_restore),
    ("an_abort_before_the_restore_ends_the_shepherd", abort_before),
    ("an_abort_of_a_held_container_leaves_nothing", abort_held),
    ("an_abort_in_the_middle_of_a_restore_leaves_nothing", abort_in_restore),
    ("a_missing_image_fails_with_a_reason_and_leaves_nothing", missing_image),
    ("a_missing_file_is_named", missing_file),
    ("a_hold_that_cannot_work_lets_nothing_run", broken_hold),
    (
        "a_killed_shepherd_leaves_a_frozen_tree_that_delete_ends",
        shepherd_killed,
    ),
    ("a_stranger_or_a_babbler_on_the_socket_is_refused", hostile_peer),
    ("multipath_tcp_is_off_in_a_sandbox", multipath_off),
    (
        "lazy_memory_is_equal_byte_for_byte_before_the_first_instruction",
        crate::lazy::equal,
    ),
    ("lazy_memory_arrives_while_the_container_runs", crate::lazy::running),
    (
        "lazy_memory_arrives_though_pager_and_guardian_are_killed",
        crate::lazy::killed,
    ),
    (
        "lazy_memory_that_cannot_be_read_ends_the_container",
        crate::lazy::damaged,
    ),
    ("a_node_without_criu_moves_by_that_of_the_agent", without_criu),
];

pub(crate) fn source(uid: u32) -> Container {
    let mut source = Container::new("source", "source", uid, &[]);
    source.start_workload();
    source
}

pub(crate) fn end(container: &Container) {
    container.must(&["delete", "--force"]);
}

fn plain() {
    let mut plain = Container::new(
        "plain",
        "source",
        0,
        &[("io.kubernetes.cri.container-type", "container")],
    );
    let pid = plain.start_workload();
    assert_eq!(plain.state()["status"], "running");
    assert_eq!(plain.state()["pid"], pid);
    plain.must(&["kill", "--all"]);
    plain.call(&["kill", "--all", "9"]);
    end(&plain);
}

/// A source that is frozen and dumped, and a target that holds its copy.
fn held(uid: u32) -> (Container, Container, i32, i32) {
    let source = source(uid);
    write_hand_off(&hand_off().seal().unwrap());
    let mut target = Container::new("target", "target", uid, ANNOTATIONS);
    let shepherd = target.create().unwrap();
    target.must(&["start"]);
    assert_eq!(ask(&target, &Request::Status), State::Waiting);
    checkpoint(&source);
    source.copy_data_to(&target);
    let begun = Instant::now();
    let state = ask(&target, &restore_request());
    let State::Held { pid } = state else {
        let log = fs::read_to_string("/run/case/work/restore.log").unwrap_or_default();
        let tail: Vec<&str> = log.lines().rev().take(30).collect();
        panic!("{state:?}\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
    };
    println!("restored and held in {:?}", begun.elapsed());
    (source, target, shepherd, pid)
}

fn move_and_check(uid: u32) {
    let (source, mut target, shepherd, pid) = held(uid);
    assert_eq!(ask(&target, &Request::Status), State::Held { pid });
    assert_eq!(
        ask(&target, &restore_request()),
        State::Held { pid },
        "a repeated request changes nothing"
    );
    // Held: no counter, no processor time.
    let (counters, time) = (target.counters(), cpu_time(pid));
    let processes = target.cgroup().processes().unwrap();
    assert_eq!(processes.len(), 3);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!((target.counters(), cpu_time(pid)), (counters.clone(), time));
    assert_eq!(source.counters(), counters);
    assert_eq!(target.state()["status"], "paused");
    for verb in ["resume", "exec", "pause"] {
        assert!(!target.call(&[verb]).status.success(), "{verb} of what is held");
    }
    assert!(target.cgroup().is_frozen().unwrap());
    target.read_output();
    // The commit.
    assert_eq!(ask(&target, &Request::Committed), State::Committed { pid });
    assert_eq!(ask(&target, &Request::Abort), State::Committed { pid }, "too late");
    target.cgroup().thaw().unwrap();
    target.await_progress();
    assert!(target.counters().iter().zip(&counters).all(|(now, then)| now > then));
    eventually("its output reaches the new pipe", || {
        target.read_output().contains("at ")
    });
    // Calls go to runc.
    assert_eq!(target.state()["status"], "running");
    assert_eq!(target.state()["pid"], pid);
    let executed = target.call(&["exec"]);
    assert!(!executed.status.success(), "without a program");
    let output = std::process::Command::new(crate::container::WRAPPER)
        .args(["--root", "/run/runc", "exec", "target", "/workload", "hello"])
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "hello\n",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(source.counters(), counters, "the source stays frozen");
    // The end.
    fs::write(target.folder.join("rootfs/data/end"), "42").unwrap();
    assert_eq!(await_end(shepherd), 42);
    target.must(&["delete"]);
    end(&source);
}

fn moved_as_root() {
    move_and_check(0);
}

fn moved_as_user() {
    move_and_check(1000);
}

fn without_criu() {
    without_criu_of_the_node(|| {
        let own = std::process::Command::new("/opt/peregrine/libexec/criu")
            .arg("--version")
            .output();
        assert!(String::from_utf8_lossy(&own.unwrap().stdout).contains("Version:"));
        assert!(
            std::process::Command::new("/usr/sbin/criu").output().is_err(),
            "the node has none"
        );
        move_and_check(1000);
    });
}

fn moved_again() {
    let (source, target, shepherd, _) = held(1000);
    ask(&target, &Request::Committed);
    target.cgroup().thaw().unwrap();
    target.await_progress();
    end(&source);
    fs::remove_dir_all(images()).unwrap();
    fs::remove_dir_all("/run/case/work").unwrap();
    // Back to the first node, into another pod.
    let annotations: Vec<(&str, &str)> = ANNOTATIONS
        .iter()
        .map(|(key, value)| (*key, if *value == "uid-1" { "uid-2" } else { *value }))
        .collect();
    let path = Path::new(HAND_OFF_DIR).join("uid-2/c");
    write_hand_off(
        &HandOff {
            pod_uid: "uid-2".into(),
            ..hand_off()
        }
        .seal()
        .unwrap(),
    );
    fs::create_dir_all(&path).unwrap();
    fs::rename(hand_off_path(), path.join("hand-off.json")).unwrap();
    let mut back = Container::new("back", "source", 1000, &annotations);
    let second = back.create().unwrap();
    back.must(&["start"]);
    checkpoint(&target);
    target.copy_data_to(&back);
    let answer = ask(&back, &restore_request());
    assert!(matches!(answer, State::Held { .. }), "{answer:?}");
    ask(&back, &Request::Committed);
    back.cgroup().thaw().unwrap();
    back.await_progress();
    eventually("its output reaches the third pipe", || {
        back.read_output().contains("at ")
    });
    // The one that was left behind is killed in its freeze, as the kubelet does.
    target.must(&["kill", "--all"]);
    assert!(target.cgroup().kill(Duration::from_secs(5)).is_ok());
    assert_eq!(await_end(shepherd), -(Signal::SIGKILL as i32));
    target.must(&["delete"]);
    fs::write(back.folder.join("rootfs/data/end"), "3").unwrap();
    assert_eq!(await_end(second), 3);
    back.must(&["delete"]);
}

fn ends_alike() {
    let (source, target, shepherd, pid) = held(0);
    ask(&target, &Request::Committed);
    target.cgroup().thaw().unwrap();
    // It keeps its first process from other signals, as every pid namespace does.
    let output = std::process::Command::new(crate::container::WRAPPER)
        .args(["--root", "/run/runc", "kill", "target", "KILL"])
        .output()
        .unwrap();
    assert!(output.status.success());
    assert_eq!(await_end(shepherd), -(Signal::SIGKILL as i32));
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    target.must(&["delete"]);
    end(&source);
}

fn no_hand_off() {
    settings(1);
    let mut target = Container::new("target", "target", 0, ANNOTATIONS);
    let begun = Instant::now();
    let message = target.create().unwrap_err();
    assert!(
        message.contains("no hand-off") && message.contains("never starts afresh"),
        "{message}"
    );
    assert!(begun.elapsed() >= Duration::from_secs(1));
    // One that comes while it waits is taken.
    settings(20);
    let writer = std::thread::spawn(|| {
        std::thread::sleep(Duration::from_millis(200));
        write_hand_off(&hand_off().seal().unwrap());
    });
    let shepherd = target.create().unwrap();
    writer.join().unwrap();
    end(&target);
    assert_eq!(await_end(shepherd), 125);
    // An abort ends the wait.
    fs::write(Path::new(HAND_OFF_DIR).join("uid-1/aborted"), "").unwrap();
    let message = target.create().unwrap_err();
    assert!(message.contains("aborted"), "{message}");
    settings(2);
}

fn bad_hand_offs() {
    let good = hand_off().seal().unwrap();
    let mut flipped = good.clone();
    flipped[40] ^= 1;
    let foreign = |change: fn(&mut HandOff)| {
        let mut other = hand_off();
        change(&mut other);
        other.seal().unwrap()
    };
    for (bytes, says) in [
        (good[..good.len() / 2].to_vec(), "not valid"),
        (flipped, "not valid"),
        (vec![b'x'; MAX_FILE * 2], "not valid"),
        (b"{}".to_vec(), "not valid"),
        (foreign(|h| h.pod_uid = "uid-2".into()), "another pod uid"),
        (foreign(|h| h.namespace = "kube-system".into()), "another namespace"),
        (foreign(|h| h.pod_name = "pod-x".into()), "another pod name"),
        (foreign(|h| h.container = "d".into()), "another container"),
        (foreign(|h| h.migration_uid = "migration-2".into()), "another migration"),
    ] {
        write_hand_off(&bytes);
        let mut target = Container::new("target", "target", 0, ANNOTATIONS);
        let message = target.create().unwrap_err();
        assert!(message.contains(says), "{message}");
    }
    // Forged: not root's, or open to others, or a link.
    for forge in [
        (|| std::os::unix::fs::chown(hand_off_path(), Some(1000), None)) as fn() -> std::io::Result<()>,
        || fs::set_permissions(hand_off_path(), std::os::unix::fs::PermissionsExt::from_mode(0o622)),
        || {
            fs::rename(hand_off_path(), "/run/case/real")?;
            std::os::unix::fs::symlink("/run/case/real", hand_off_path())
        },
    ] {
        write_hand_off(&good);
        forge().unwrap();
        let mut target = Container::new("target", "target", 0, ANNOTATIONS);
        let message = target.create().unwrap_err();
        assert!(message.contains("not started"), "{message}");
    }
}

fn used_once() {
    let (first, shepherd) = target("target");
    let mut second = Container::new("second", "target", 0, ANNOTATIONS);
    let message = second.create().unwrap_err();
    assert!(message.contains("started once"), "{message}");
    write_hand_off(&hand_off().seal().unwrap());
    let message = second.create().unwrap_err();
    assert!(message.contains("started once"), "{message}");
    assert_eq!(ask(&first, &Request::Status), State::Waiting);
    end(&first);
    assert_eq!(await_end(shepherd), 125);
}

fn ordinary_after_commit() {
    let (source, target, shepherd, _) = held(0);
    ask(&target, &Request::Committed);
    assert!(Path::new(COMMITTED_DIR).join("uid-1").exists());
    target.cgroup().thaw().unwrap();
    fs::write(target.folder.join("rootfs/data/end"), "1").unwrap();
    assert_eq!(await_end(shepherd), 1);
    target.must(&["delete"]);
    // The kubelet restarts it: it starts afresh.
    let mut again = Container::new("again", "target", 0, ANNOTATIONS);
    again.start_workload();
    end(&again);
    end(&source);
}

fn moved_away() {
    fs::create_dir_all(MOVED_AWAY_DIR).unwrap();
    fs::write(Path::new(MOVED_AWAY_DIR).join("uid-1"), "").unwrap();
    for annotations in [ANNOTATIONS, &ANNOTATIONS[..5]] {
        let mut container = Container::new("target", "target", 0, annotations);
        let message = container.create().unwrap_err();
        assert!(message.contains("moved to another node"), "{message}");
    }
}

fn before_the_restore() {
    write_hand_off(&hand_off().seal().unwrap());
    let mut target = Container::new("target", "target", 0, ANNOTATIONS);
    let shepherd = target.create().unwrap();
    assert_eq!(target.state()["status"], "created");
    target.must(&["start"]);
    assert_eq!(target.state()["status"], "running");
    assert_eq!(target.state()["pid"], shepherd);
    assert_eq!(target.must(&["ps", "--format", "json"]).trim(), format!("[{shepherd}]"));
    for verb in ["exec", "events", "update", "pause", "checkpoint"] {
        let output = target.call(&[verb]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && said.contains("not here yet"),
            "{verb}: {said}"
        );
    }
    let report = report(&target);
    assert_eq!((report.shepherd_pid, &*report.container_id), (shepherd, "target"));
    assert_eq!(report.hand_off, hand_off());
    assert_eq!(Path::new(&report.rootfs), target.folder.join("rootfs"));
    assert_eq!(Path::new(&report.cgroup), target.cgroup().path());
    assert_eq!(report.network_namespace, "/run/netns/target");
    assert_eq!(report.shm.as_deref().map(Path::new), Some(&*target.folder.join("shm")));
    let mode = |name| {
        std::os::unix::fs::PermissionsExt::mode(
            &fs::metadata(Path::new(SHEPHERD_DIR).join(name)).unwrap().permissions(),
        )
    };
    assert_eq!((mode("target") & 0o777, mode("target/sock") & 0o777), (0o700, 0o600));
    let begun = Instant::now();
    target.must(&["kill"]);
    assert_eq!(await_end(shepherd), 125);
    assert!(begun.elapsed() < Duration::from_secs(2), "nothing is waited for");
    assert_eq!(target.state()["status"], "stopped");
    target.must(&["kill"]);
    target.must(&["delete"]);
    // What is gone is gone for runc as well.
    assert!(!target.call(&["state"]).status.success());
}

fn abort_before() {
    let (target, shepherd) = target("target");
    let mut connection = Connection::to(&target);
    assert_eq!(connection.ask(&Request::Abort), State::Ended);
    assert_eq!(await_end(shepherd), 125);
    target.must(&["delete"]);
    // SIGTERM means the same.
    fs::remove_dir_all(HAND_OFF_DIR).unwrap();
    let (target, shepherd) = self::target("target");
    kill(Pid::from_raw(shepherd), Signal::SIGTERM).unwrap();
    assert_eq!(await_end(shepherd), 125);
    target.must(&["delete"]);
}

fn abort_held() {
    let (source, target, shepherd, pid) = held(0);
    assert_eq!(ask(&target, &Request::Abort), State::Ended);
    assert_eq!(await_end(shepherd), 125);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert!(!target.cgroup().exists() || target.cgroup().processes().unwrap().is_empty());
    target.must(&["delete"]);
    // The source goes on as if nothing had been.
    source.cgroup().thaw().unwrap();
    source.await_progress();
    end(&source);
}

fn abort_in_restore() {
    let source = source(0);
    checkpoint(&source);
    // At different moments of the restore, which takes some tens of milliseconds.
    for delay in [0, 5, 15, 30, 45, 60, 80, 120] {
        let _ = fs::remove_dir_all(HAND_OFF_DIR);
        let (target, shepherd) = target("target");
        source.copy_data_to(&target);
        let mut restoring = Connection::to(&target);
        restoring.send(&restore_request());
        std::thread::sleep(Duration::from_millis(delay));
        let counters = target.counters();
        let answer = ask(&target, &Request::Abort);
        assert_eq!(answer, State::Ended, "after {delay} ms");
        assert_eq!(await_end(shepherd), 125);
        assert_eq!(target.counters(), counters, "nothing has run");
        target.must(&["delete"]);
        fs::remove_dir_all(&target.folder).unwrap();
    }
    source.cgroup().thaw().unwrap();
    source.await_progress();
    end(&source);
}

fn missing_image() {
    let source = source(0);
    checkpoint(&source);
    source.cgroup().thaw().unwrap();
    for victim in ["pstree.img", "inventory.img", "core-1.img", "descriptors.json"] {
        let _ = fs::remove_dir_all(HAND_OFF_DIR);
        let (target, shepherd) = target("target");
        source.copy_data_to(&target);
        let (path, aside) = (images().join(victim), images().join("aside"));
        fs::rename(&path, &aside).unwrap();
        let answer = ask(&target, &restore_request());
        fs::rename(&aside, &path).unwrap();
        let State::Failed { message } = answer else {
            panic!("{victim}: {answer:?}")
        };
        println!("without {victim}: {message}");
        assert!(message.len() > 20, "{message}");
        assert!(!target.cgroup().exists() || target.cgroup().processes().unwrap().is_empty());
        assert!(
            matches!(ask(&target, &restore_request()), State::Failed { .. }),
            "a repeated request changes nothing"
        );
        assert_eq!(ask(&target, &Request::Abort), State::Ended);
        assert_eq!(await_end(shepherd), 125);
        target.must(&["delete"]);
        fs::remove_dir_all(&target.folder).unwrap();
        fs::remove_dir_all("/run/case/work").unwrap();
    }
    end(&source);
}

fn missing_file() {
    let source = source(0);
    checkpoint(&source);
    let (target, shepherd) = target("target");
    let answer = ask(&target, &restore_request());
    let State::Failed { message } = answer else {
        panic!("{answer:?}")
    };
    assert!(
        message.contains("missing on the target") && message.contains("data/"),
        "{message}"
    );
    // containerd ends it, not the agent.
    target.must(&["kill"]);
    assert_eq!(await_end(shepherd), 125);
    target.must(&["delete"]);
    end(&source);
}

fn broken_hold() {
    let source = source(0);
    checkpoint(&source);
    let (target, shepherd) = target("target");
    source.copy_data_to(&target);
    // The action script finds no cgroup to move CRIU to.
    let folder = Path::new(SHEPHERD_DIR).join("target");
    let start = fs::read_to_string(folder.join("start.json")).unwrap();
    fs::write(
        folder.join("start.json"),
        start.replace("/containers/target", "/containers/elsewhere"),
    )
    .unwrap();
    let counters = target.counters();
    let answer = ask(&target, &restore_request());
    let State::Failed { message } = answer else {
        panic!("{answer:?}")
    };
    assert!(message.contains("could not be held"), "{message}");
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(target.counters(), counters, "nothing has run");
    assert!(target.cgroup().processes().unwrap_or_default().is_empty());
    fs::write(folder.join("start.json"), start).unwrap();
    assert_eq!(ask(&target, &Request::Abort), State::Ended);
    assert_eq!(await_end(shepherd), 125);
    target.must(&["delete"]);
    end(&source);
}

fn shepherd_killed() {
    let (source, target, shepherd, pid) = held(0);
    kill(Pid::from_raw(shepherd), Signal::SIGKILL).unwrap();
    assert_eq!(await_end(shepherd), -(Signal::SIGKILL as i32));
    // The tree stays, frozen: nothing of it runs.
    assert!(target.cgroup().is_frozen().unwrap() && Path::new(&format!("/proc/{pid}")).exists());
    target.must(&["kill"]);
    assert!(target.cgroup().processes().unwrap().is_empty());
    target.must(&["delete"]);
    source.cgroup().thaw().unwrap();
    source.await_progress();
    end(&source);
    // A shepherd that never restored anything.
    fs::remove_dir_all(HAND_OFF_DIR).unwrap();
    let (target, shepherd) = self::target("target");
    kill(Pid::from_raw(shepherd), Signal::SIGKILL).unwrap();
    await_end(shepherd);
    target.must(&["delete"]);
}

fn hostile_peer() {
    let (target, shepherd) = target("target");
    let mut connection = Connection::to(&target);
    connection.send_raw(b"not json\n{\"request\":\"unknown\"}\n").unwrap();
    assert_eq!(connection.receive(), Some(State::Waiting));
    assert_eq!(connection.receive(), Some(State::Waiting));
    let _ = connection.send_raw(&vec![b'x'; 200 * 1024]);
    assert_eq!(connection.receive(), None);
    let status = std::process::Command::new("/usr/bin/setpriv")
        .args(["--reuid=1000", "--regid=1000", "--clear-groups", "/usr/bin/test", "-r"])
        .arg(Path::new(SHEPHERD_DIR).join("target/sock"))
        .status()
        .unwrap();
    assert!(!status.success());
    let many: Vec<Connection> = (0..40).map(|_| Connection::to(&target)).collect();
    drop(many);
    assert_eq!(ask(&target, &Request::Status), State::Waiting);
    end(&target);
    assert_eq!(await_end(shepherd), 125);
}

fn multipath_off() {
    let inside = || {
        let namespace =
            hostsys::namespace::Namespace::at(Path::new("/run/netns/source"), hostsys::namespace::Kind::Network)
                .unwrap();
        hostsys::namespace::within(&[namespace], || fs::read_to_string("/proc/sys/net/mptcp/enabled").ok()).unwrap()
    };
    let own = || fs::read_to_string("/proc/sys/net/mptcp/enabled").ok();
    let before = own();
    let mut sandbox = Container::new(
        "sandbox",
        "source",
        0,
        &[("io.kubernetes.cri.container-type", "sandbox")],
    );
    sandbox.start_workload();
    if let Some(enabled) = inside() {
        assert_eq!(enabled.trim(), "0");
    }
    assert_eq!(own(), before, "the node's own stays");
    end(&sandbox);
}
