//! The judgement by tables: what is refused, what passes, and how a report reads.

mod passes;
mod refused;
mod samples;

use std::collections::BTreeSet;

use samples::*;

use super::*;
use crate::inventory::{Descriptor, Kind, Process};

#[test]
fn all_refusals_come_at_once_first_and_areas_without_one_pass() {
    let inventory = with(|i| {
        i.spec.containers[0].tty = true;
        for kind in [Kind::IoUring, Kind::Fanotify, Kind::Userfaultfd, socket("MPTCP")] {
            first(i).descriptors.push(Descriptor { fd: 3, kind });
        }
    });
    let report = asked(&inventory, Connections::BestEffort);
    let refusals: BTreeSet<&str> = report.refusals().collect();
    let expected = [
        "TtyNotSupported",
        "IoUringNotSupported",
        "FanotifyNotSupported",
        "UserfaultfdNotSupported",
        "MptcpNotSupported",
    ];
    assert_eq!(refusals, expected.into());
    let first_passed = report.checks.iter().position(|c| c.verdict == Verdict::Passed).unwrap();
    assert_eq!(first_passed, expected.len());
    let names: BTreeSet<&str> = report.checks.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names.len(), Area::ALL.len(), "every area speaks");
}

#[test]
fn a_thousand_of_the_same_are_counted() {
    let inventory = with(|i| {
        for pid in 200..1200 {
            let descriptors = vec![Descriptor {
                fd: pid,
                kind: Kind::IoUring,
            }];
            i.containers[0].processes.push(Process {
                descriptors,
                ..process(pid)
            });
        }
    });
    let report = asked(&inventory, Connections::BestEffort);
    assert_eq!(report.refusals().count(), MAX_ALIKE);
    let counted = report
        .checks
        .iter()
        .filter_map(|c| c.message.as_ref())
        .any(|m| m.ends_with("and 997 more like it"));
    assert!(counted, "{:?}", report.checks);
}

#[test]
fn many_different_things_of_one_reason_are_counted_too() {
    let inventory = with(|i| {
        for letter in 'a'..='z' {
            i.containers[0].mounts.push(mount(&format!("/mnt/{letter}"), "ext4", 3));
        }
    });
    let report = asked(&inventory, Connections::BestEffort);
    assert_eq!(report.refusals().count(), MAX_PER_REASON);
    let counted = report
        .checks
        .iter()
        .filter_map(|c| c.message.as_ref())
        .any(|m| m.ends_with("and 18 more like it"));
    assert!(counted, "{:?}", report.checks);
}

#[test]
fn connections_are_judged_by_what_the_user_wants() {
    let mut inventory = holds(socket("TCP"));
    inventory.sockets.inet.insert(9, inet(1, "192.0.2.1:443", 0));
    for (wish, verdict, reason) in [
        (
            Connections::Preserve,
            Verdict::Refused,
            Reason::ConnectionNotPreservable,
        ),
        (Connections::BestEffort, Verdict::Warning, Reason::WillBeLost),
        (Connections::Close, Verdict::Warning, Reason::WillBeLost),
    ] {
        let report = asked(&inventory, wish);
        let check = report.checks.iter().find(|c| c.name == "connections").unwrap();
        assert_eq!(
            (check.verdict, check.reason.as_deref()),
            (verdict, Some(reason.as_str()))
        );
        assert!(check.message.as_ref().unwrap().contains("192.0.2.1:443"));
    }
}

#[test]
fn exec_sessions_are_told_and_their_files_do_not_count() {
    let inventory = with(|i| {
        let descriptors = vec![Descriptor {
            fd: 3,
            kind: Kind::IoUring,
        }];
        let session = Process {
            in_tree: false,
            name: "sh".into(),
            descriptors,
            ..process(300)
        };
        i.containers[0].processes.push(session);
    });
    let report = asked(&inventory, Connections::BestEffort);
    assert_eq!(report.refusals().count(), 0);
    let check = report.checks.iter().find(|c| c.name == "sessions").unwrap();
    assert_eq!(
        (check.verdict, check.reason.as_deref()),
        (Verdict::Warning, Some("ExecSessionEnds"))
    );
    assert_eq!(report.memory_bytes, 1 << 20, "its memory is not moved either");
}
