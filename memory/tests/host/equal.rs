//! Byte for byte: what the store has of processes that ran while they were copied, against their memory when they stand
//! still.

use std::{
    fs::{self, File},
    ops::ControlFlow,
    os::unix::{fs::FileExt as _, net::UnixStream},
    path::Path,
    time::{Duration, Instant},
};

use hostsys::pagemap::{Pagemap, TRACKED};
use memory::{
    areas::{self, Depth},
    converge::Goal,
    page_size,
    precopy::{self, End},
    ranges::Ranges,
    store::Store,
    tracker::{Round, Tracker},
    wire::{Sender, receive},
};
use nix::{sys::signal::kill, unistd::Pid};
use protocol::store_index::{StoreIndex, index_file, pages_file};

use crate::workload::{Folder, Workload, no_wp_async};

/// What may explain a page that differs: how much of it, and what the kernel says of its mapping.
fn differs(pid: i32, at: u64, ours: &[u8], theirs: &[u8]) -> String {
    let bytes = ours.iter().zip(theirs).filter(|(a, b)| a != b).count();
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let of = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
    };
    let here = maps
        .lines()
        .skip_while(|l| !of(l).is_some_and(|range| range.contains(&at)));
    let mapping: Vec<&str> = here
        .take_while(|l| !l.starts_with("VmFlags"))
        .filter(|l| of(l).is_some() || l.starts_with("LazyFree"))
        .collect();
    format!("page {at:#x} of process {pid} differs in {bytes} bytes: {mapping:?}")
}

/// Compares the store of a process with its memory; gives the bytes that were equal.
fn compare(store: &Path, pid: i32) -> u64 {
    let vpid = areas::vpid(pid).unwrap();
    let index = StoreIndex::parse(&fs::read(store.join(index_file(vpid))).unwrap()).unwrap();
    let pages = File::open(store.join(pages_file(vpid))).unwrap();
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let look = areas::look(pid, Depth::All).unwrap();
    // As sets: mappings that are tracked for the first time may become one with their neighbours.
    let set = |areas: &[std::ops::Range<u64>]| areas.iter().cloned().collect::<Ranges>();
    assert_eq!(
        set(&index.areas),
        set(&look.areas),
        "all that can be tracked is tracked"
    );
    let mut map = Pagemap::of(pid).unwrap();
    let mut found = Vec::new();
    for area in &look.areas {
        map.held(area.start, area.end, &mut found).unwrap();
    }
    assert!(found.iter().all(|r| r.flags & TRACKED != 0));
    // What CRIU must take: not tracked, or it would be missing. The kernel's own mappings have no pages that it may look at.
    let mut others = Vec::new();
    for area in look.excluded.iter().chain(&look.others) {
        let _ = map.held(area.start, area.end, &mut others);
    }
    assert!(others.iter().all(|r| r.flags & TRACKED == 0), "{others:x?}");
    let held: Ranges = found.iter().map(|r| r.start..r.end).collect();
    let runs = set(&index.runs);
    assert!(
        runs.subtract(&held).is_empty(),
        "the store has what the process has not"
    );
    let size = usize::try_from(page_size()).unwrap();
    let (mut ours, mut theirs) = (vec![0; size], vec![0; size]);
    let mut equal = 0;
    for range in held.as_slice() {
        for at in (range.start..range.end).step_by(size) {
            memory.read_exact_at(&mut theirs, at).unwrap();
            let here = runs.intersect(&std::iter::once(at..at + page_size()).collect());
            if here.is_empty() {
                ours.fill(0);
            } else {
                // The last pages of the file may be a hole behind its end: none of the store's runs are.
                pages.read_exact_at(&mut ours, at).unwrap();
            }
            assert!(ours == theirs, "{}", differs(pid, at, &ours, &theirs));
            equal += page_size();
        }
    }
    equal
}

/// Copies a workload in rounds and compares; gives the last round, or none where this cannot be tried here.
fn copy_and_compare(workload: &Workload, name: &str, rounds: u32, streams: usize) -> Option<Round> {
    let folder = Folder::new(name);
    let store = Store::receive(&folder.0.join("in")).unwrap();
    let mut sinks = vec![store.clone(); streams];
    let mut tracker = Tracker::new();
    for number in 0..rounds {
        let started = Instant::now();
        let round = tracker.round(&workload.members(), &mut sinks).unwrap();
        if no_wp_async(&tracker) {
            return None;
        }
        eprintln!("{name} {number}: {round:?}");
        while started.elapsed() < Duration::from_millis(60) {
            std::thread::yield_now();
        }
    }
    workload.stop();
    let started = Instant::now();
    let members = workload.members();
    tracker.settle(&members).unwrap();
    let round = tracker.last_round(&mut sinks).unwrap();
    eprintln!(
        "{name} frozen: {round:?} in {:?}, longest stop {:?}",
        started.elapsed(),
        tracker.longest_stop()
    );
    let finals = tracker.finals();
    store.finish(&finals, |_| folder.0.join("store")).unwrap();
    let mut equal = 0;
    for member in &members {
        match tracker.untracked().get(&member.pid) {
            Some(why) => eprintln!("{name}: process {} is left to CRIU: {why}", member.pid),
            None => equal += compare(&folder.0.join("store"), member.pid),
        }
    }
    assert!(tracker.spaces().count() > 0 && equal > 0);
    eprintln!("{name}: {} KiB of {} processes equal", equal / 1024, members.len());
    let files = fs::read_dir(folder.0.join("in")).unwrap().count();
    assert_eq!(files, 0, "what is not needed is removed");
    drop(tracker);
    workload.go_on();
    Some(round)
}

#[test]
fn host_rounds_over_connections_end_and_copy_exactly() {
    let Some(workload) = Workload::writer(40, true) else {
        return;
    };
    let folder = Folder::new("wire");
    let store = Store::receive(&folder.0.join("in")).unwrap();
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..3).map(|_| UnixStream::pair().unwrap()).unzip();
    let mut sinks: Vec<_> = senders.into_iter().map(|s| Sender::new(s, None)).collect();
    let goal = Goal {
        freeze: Duration::from_secs(5),
        fixed: Duration::from_millis(50),
        may_slow: false,
    };
    let spaces = std::thread::scope(|scope| {
        let receive = |mut from: UnixStream| receive(&mut from, &store).unwrap();
        let threads: Vec<_> = receivers.into_iter().map(|r| scope.spawn(move || receive(r))).collect();
        let mut tracker = Tracker::new();
        let end = precopy::run(
            &mut tracker,
            || workload.members(),
            &mut sinks,
            &goal,
            |p| {
                eprintln!("round {}: {:?}, predicted {:?}", p.rounds, p.round, p.prediction);
                ControlFlow::Continue(())
            },
        );
        let skip = no_wp_async(&tracker);
        assert!(skip || matches!(end, Ok(End::Freeze(_))), "{end:?}");
        workload.stop();
        tracker.settle(&workload.members()).unwrap();
        tracker.last_round(&mut sinks).unwrap();
        let finals = tracker.finals();
        for (i, sink) in sinks.drain(..).enumerate() {
            sink.finish(if i == 0 { &finals } else { &[] }).unwrap();
        }
        let said: Vec<_> = threads.into_iter().flat_map(|t| t.join().unwrap()).collect();
        assert_eq!(said, finals);
        (!skip).then_some((said, tracker))
    });
    let Some((spaces, tracker)) = spaces else { return };
    store.finish(&spaces, |_| folder.0.join("store")).unwrap();
    for space in tracker.spaces() {
        assert!(compare(&folder.0.join("store"), space.pid()) > 0);
    }
}

#[test]
fn host_random_memory_operations_are_copied_exactly() {
    for seed in 0..6 {
        let Some(workload) = Workload::writer(seed, false) else {
            return;
        };
        for again in 0..3 {
            let name = format!("random-{seed}-{again}");
            if copy_and_compare(&workload, &name, 5, 1 + again).is_none() {
                return;
            }
        }
    }
}

#[test]
fn host_forks_and_programs_that_become_others_are_copied_exactly() {
    for seed in 100..104 {
        let Some(workload) = Workload::writer(seed, true) else {
            return;
        };
        for again in 0..3 {
            if copy_and_compare(&workload, &format!("forks-{seed}-{again}"), 5, 2).is_none() {
                return;
            }
        }
    }
}

#[test]
fn host_a_mapping_that_becomes_one_with_another_that_was_moved_is_copied_exactly() {
    let Some(workload) = Workload::mover() else {
        return;
    };
    for again in 0..4 {
        if copy_and_compare(&workload, &format!("mover-{again}"), 6, 2).is_none() {
            return;
        }
    }
}

#[test]
fn host_a_workload_outlives_its_tracker() {
    let Some(workload) = Workload::writer(7, false) else {
        return;
    };
    let folder = Folder::new("outlives");
    let mut sinks = [Store::receive(&folder.0).unwrap()];
    let mut tracker = Tracker::new();
    for _ in 0..3 {
        tracker.round(&workload.members(), &mut sinks).unwrap();
        if no_wp_async(&tracker) {
            return;
        }
    }
    drop(tracker);
    let pid = workload.group();
    let tracked = || {
        let mut map = Pagemap::of(pid).unwrap();
        let mut found = Vec::new();
        for area in areas::look(pid, Depth::All).unwrap().areas {
            map.held(area.start, area.end, &mut found).unwrap();
        }
        found.iter().any(|r| r.flags & TRACKED != 0)
    };
    assert!(!tracked());
    let before = workload.time();
    let deadline = Instant::now() + Duration::from_secs(20);
    while workload.time() < before + 5 {
        assert!(Instant::now() < deadline, "it does not run");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(kill(Pid::from_raw(pid), None).is_ok());
}
