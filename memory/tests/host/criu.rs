//! With CRIU itself: its images hold what is not tracked, a restore takes all else from the store.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{fs::FileExt as _, net::UnixListener},
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use hostsys::{missing_pages, rights, shared_words::SharedWords};
use memory::{page_size, store::Store, tracker::Tracker};
use nix::errno::Errno;
use protocol::store_index::{SOCKET, StoreIndex, index_file, pages_file};

use crate::workload::{Folder, Workload, no_wp_async};

/// CRIU and its libraries, of this machine or of the Debian tree that the cluster's parts hold.
struct Criu {
    tree: Option<PathBuf>,
    preload: PathBuf,
}

impl Criu {
    fn find() -> Option<Self> {
        let home = std::env::var_os("PEREGRINE_HOME").map(PathBuf::from);
        let home = home.or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cache/peregrine")));
        let parts = home.and_then(|h| fs::read_dir(h.join("parts")).ok());
        let mut trees = parts.into_iter().flatten().flatten().map(|e| e.path());
        let tree = trees.find(|t| t.join("usr/sbin/criu").is_file());
        if tree.is_none()
            && Command::new("criu")
                .arg("--version")
                .stdout(Stdio::null())
                .status()
                .is_err()
        {
            eprintln!("SKIPPED: no CRIU; `cargo xtask cluster up` makes a tree with one");
            return None;
        }
        let preload = preload();
        Some(Self { tree, preload })
    }

    fn run(&self, arguments: &[&str], folder: &Path, skip_tracked: bool) -> Output {
        let mut command = match &self.tree {
            Some(tree) => {
                let mut command = Command::new(tree.join("usr/lib64/ld-linux-x86-64.so.2"));
                command
                    .arg("--library-path")
                    .arg(tree.join("usr/lib/x86_64-linux-gnu"))
                    .arg("--preload")
                    .arg(&self.preload)
                    .arg(tree.join("usr/sbin/criu"));
                command
            }
            None => {
                let mut command = Command::new("criu");
                command.env("LD_PRELOAD", &self.preload);
                command
            }
        };
        if skip_tracked {
            command.env("PEREGRINE_SKIP_TRACKED", "1");
        }
        command.args(arguments).arg("-D").arg(folder);
        command.args([
            "-v1",
            "--network-lock",
            "skip",
            "--manage-cgroups=ignore",
            "--ghost-limit",
            "256M",
        ]);
        command.output().unwrap()
    }
}

/// The preload is a crate of its own with a dynamic libc: it is built here.
fn preload() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../hostsys/criu-preload/Cargo.toml");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("criu-preload");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["build", "--release", "--quiet", "--manifest-path"])
        .arg(manifest)
        .arg("--target-dir")
        .arg(&target)
        .env("RUSTFLAGS", "-C target-feature=-crt-static")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let candidates = fs::read_dir(&target).unwrap().flatten().map(|e| e.path());
    let mut candidates = candidates
        .chain([target.clone()])
        .map(|p| p.join("release/libcriu_preload.so"));
    candidates.find(|p| p.is_file()).unwrap()
}

/// The readable memory of a process: by address, without what the kernel makes anew.
type Memory = BTreeMap<u64, Vec<u8>>;

fn memory_of(pid: i32) -> Memory {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let file = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut all = Memory::new();
    for line in maps.lines().filter(|l| !l.contains("[v")) {
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let (start, end) = (
            u64::from_str_radix(start, 16).unwrap(),
            u64::from_str_radix(end, 16).unwrap(),
        );
        for at in (start..end).step_by(usize::try_from(page_size()).unwrap()) {
            let mut page = vec![0; usize::try_from(page_size()).unwrap()];
            // Behind the end of a file there is nothing to read.
            if file.read_exact_at(&mut page, at).is_ok() {
                all.insert(at, page);
            }
        }
    }
    all
}

fn assert_equal(before: &Memory, after: &Memory) {
    let missing: Vec<String> = before
        .keys()
        .filter(|k| !after.contains_key(k))
        .map(|k| format!("{k:x}"))
        .collect();
    let new: Vec<String> = after
        .keys()
        .filter(|k| !before.contains_key(k))
        .map(|k| format!("{k:x}"))
        .collect();
    assert!(missing.is_empty() && new.is_empty(), "missing {missing:?}, new {new:?}");
    let mut different = 0;
    for (at, page) in before {
        let now = after.get(at).unwrap_or_else(|| panic!("page {at:#x} is missing"));
        if now != page {
            // The kernel writes the number of the processor into each thread's `struct rseq`: 8 bytes.
            let bytes = now
                .iter()
                .zip(page)
                .enumerate()
                .filter(|(_, (a, b))| a != b)
                .map(|(i, _)| i);
            let bytes: Vec<usize> = bytes.collect();
            let zero = now.iter().all(|b| *b == 0);
            assert!(
                bytes.len() <= 8 && bytes[bytes.len() - 1] - bytes[0] < 8,
                "page {at:#x} differs at {} bytes from {}, all zero: {zero}; {:x?} was {:x?}",
                bytes.len(),
                bytes[0],
                &now[bytes[0]..][..16.min(now.len() - bytes[0])],
                &page[bytes[0]..][..16.min(now.len() - bytes[0])],
            );
            different += 1;
        }
    }
    assert!(different <= 1, "{different} pages differ");
    eprintln!("{} pages equal", before.len());
}

/// The simplest pager that there can be: answers faults, and puts everything in place when CRIU is done.
fn serve(listener: &UnixListener, store: &Path) -> io::Result<()> {
    let (mut socket, _) = listener.accept()?;
    let mut spaces = Vec::new();
    let finished = 0x5253_5446_i32;
    std::thread::scope(|scope| {
        loop {
            let mut word = [0; 4];
            socket.read_exact(&mut word)?;
            let pid = i32::from_ne_bytes(word);
            if pid == finished {
                break;
            }
            if pid < 0 {
                continue;
            }
            let (_, fd) = rights::receive(socket.as_fd(), &mut [0; 8])?;
            let space = std::sync::Arc::new(Missing::open(store, pid, fd.expect("a descriptor"))?);
            spaces.push(space.clone());
            scope.spawn(move || space.answer());
        }
        for space in spaces {
            space.fill();
        }
        Ok(())
    })
}

struct Missing {
    fd: OwnedFd,
    index: StoreIndex,
    pages: Option<File>,
    filled: std::sync::atomic::AtomicBool,
}

impl Missing {
    fn open(store: &Path, pid: i32, fd: OwnedFd) -> io::Result<Self> {
        let vpid = pid.cast_unsigned();
        let index = fs::read(store.join(index_file(vpid))).ok();
        Ok(Self {
            fd,
            index: index.map_or_else(StoreIndex::default, |bytes| StoreIndex::parse(&bytes).unwrap()),
            pages: File::open(store.join(pages_file(vpid))).ok(),
            filled: false.into(),
        })
    }

    fn put(&self, at: u64) {
        let run = self.index.runs.iter().find(|r| r.contains(&at));
        let mut page = vec![0; usize::try_from(page_size()).unwrap()];
        if let (Some(_), Some(pages)) = (run, &self.pages) {
            pages.read_exact_at(&mut page, at).unwrap();
        }
        while let (_, Some(Errno::EAGAIN)) = missing_pages::copy(self.fd.as_fd(), at, &page) {}
        let _ = missing_pages::wake(self.fd.as_fd(), at, page_size());
    }

    fn answer(&self) {
        let words = SharedWords::new(64).unwrap();
        while !self.filled.load(std::sync::atomic::Ordering::Acquire) {
            let Ok(count) = missing_pages::read(self.fd.as_fd(), &words, 0, 16) else {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            };
            for i in 0..count {
                let message = [0, 1, 2, 3].map(|w| words.get(i * 4 + w));
                if let missing_pages::Message::Fault { address } = missing_pages::Message::of(message) {
                    self.put(address / page_size() * page_size());
                }
            }
        }
    }

    fn fill(&self) {
        for run in &self.index.runs {
            for at in (run.start..run.end).step_by(usize::try_from(page_size()).unwrap()) {
                self.put(at);
            }
        }
        self.filled.store(true, std::sync::atomic::Ordering::Release);
    }
}

fn image_bytes(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).unwrap().flatten();
    let pages = entries.filter(|e| e.file_name().to_string_lossy().starts_with("pages-"));
    pages.map(|e| e.metadata().unwrap().len()).sum()
}

/// Copies a workload while it runs, dumps it, lets CRIU kill it and restores it from images and store.
fn there_and_back(criu: &Criu, workload: &Workload, name: &str, follow: usize) -> bool {
    let folder = Folder::new(name);
    let (images, stores) = (folder.0.join("images"), folder.0.join("store"));
    fs::create_dir_all(&images).unwrap();
    let store = Store::receive(&folder.0.join("in")).unwrap();
    let mut sinks = vec![store.clone(); 2];
    let mut tracker = Tracker::new();
    for _ in 0..4 {
        let mut members = workload.members();
        members.truncate(follow);
        tracker.round(&members, &mut sinks).unwrap();
        if no_wp_async(&tracker) {
            return false;
        }
    }
    workload.stop();
    let members = workload.members();
    tracker.settle(&members).unwrap();
    // At the same time, as in a real freeze.
    let root = workload.group().to_string();
    let started = Instant::now();
    let (dumped, round) = std::thread::scope(|scope| {
        let dump = scope.spawn(|| criu.run(&["dump", "--leave-stopped", "-t", &root], &images, true));
        let round = tracker.last_round(&mut sinks).unwrap();
        (dump.join().unwrap(), round)
    });
    assert!(dumped.status.success(), "{}", String::from_utf8_lossy(&dumped.stderr));
    let before: Vec<(i32, Memory)> = members.iter().map(|m| (m.pid, memory_of(m.pid))).collect();
    let in_images = image_bytes(&images);
    eprintln!(
        "{name}: frozen for {:?}, {in_images} bytes in the images, {round:?}",
        started.elapsed()
    );
    // The copy in the images: what cannot be tracked; private files, shared memory, what came too late.
    let all: u64 = before.iter().map(|(_, m)| m.len() as u64 * page_size()).sum();
    assert!(in_images + round.held <= all + (1 << 20));
    if tracker.untracked().is_empty() {
        assert!(
            in_images < (members.len() as u64) << 24,
            "tracked pages are in the images: {in_images} bytes"
        );
    }
    for image in fs::read_dir(&images).unwrap().flatten() {
        if memory::images::is_pagemap(&image.file_name().to_string_lossy()) {
            let mut bytes = fs::read(image.path()).unwrap();
            memory::images::make_eager(&mut bytes).unwrap();
            fs::write(image.path(), bytes).unwrap();
        }
    }
    store.finish(&tracker.finals(), |_| stores.clone()).unwrap();
    let untracked = tracker.untracked().clone();
    drop(tracker);
    workload.end();

    let listener = UnixListener::bind(images.join(SOCKET)).unwrap();
    let restored = std::thread::scope(|scope| {
        let pager = scope.spawn(|| serve(&listener, &stores));
        let restored = criu.run(&["restore", "-d", "--lazy-pages"], &images, false);
        if restored.status.success() {
            pager.join().unwrap().unwrap();
        }
        restored
    });
    assert!(
        restored.status.success(),
        "{}",
        String::from_utf8_lossy(&restored.stderr)
    );
    for (pid, memory) in &before {
        eprintln!("process {pid}, left to CRIU: {:?}", untracked.get(pid));
        assert_equal(memory, &memory_of(*pid));
    }
    workload.go_on();
    let deadline = Instant::now() + Duration::from_secs(20);
    let busy = workload.time();
    while workload.time() < busy + 3 {
        assert!(Instant::now() < deadline, "it does not run");
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

#[test]
fn host_what_is_tracked_is_left_out_of_the_images_and_restored_from_the_store() {
    let Some(criu) = Criu::find() else { return };
    for seed in 20..22 {
        let Some(workload) = Workload::writer(seed, false) else {
            return;
        };
        for again in 0..3 {
            if !there_and_back(&criu, &workload, &format!("criu-{seed}-{again}"), 1) {
                return;
            }
        }
    }
}

#[test]
fn host_a_tree_of_processes_comes_back_from_images_and_stores() {
    let Some(criu) = Criu::find() else { return };
    let Some(workload) = Workload::writer(30, true) else {
        return;
    };
    // With children that are left to CRIU, as those that are made just before the freeze.
    for (again, follow) in [usize::MAX, 1, usize::MAX, 2].into_iter().enumerate() {
        if !there_and_back(&criu, &workload, &format!("tree-{again}"), follow) {
            return;
        }
    }
}
