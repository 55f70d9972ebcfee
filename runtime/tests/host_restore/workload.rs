//! A program that counts: first process with a thread, two child processes. Each writes its counter to a file of its own and
//! ends loudly when somebody else has written there, so that a second copy or a step back is seen.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

pub(crate) const COUNTERS: [&str; 4] = ["main", "thread", "child1", "child2"];

pub(crate) fn run(arguments: &[String]) -> ! {
    match arguments.first().map(String::as_str) {
        Some("hello") => {
            println!("hello");
            std::process::exit(0);
        }
        Some(name) => count(name),
        None => {
            let children = ["child1", "child2"].map(|name| Command::new("/workload").arg(name).spawn().unwrap());
            std::thread::spawn(|| count("thread"));
            println!("begun with {} children", children.len());
            count("main");
        }
    }
}

/// So many words of memory with a value that is known for each, where the case asks for it.
fn memory() -> Vec<u64> {
    let mib: u64 = std::fs::read_to_string("/data/memory").map_or(0, |text| text.trim().parse().unwrap());
    (0..mib << 17).map(known).collect()
}

fn known(word: u64) -> u64 {
    // Every eighth page is zeros.
    if (word / 512).is_multiple_of(8) {
        0
    } else {
        word.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
    }
}

/// Looks at words that lie far apart; a word that was looked at is changed, and changed back.
fn look(memory: &mut [u64], counter: u64) {
    for i in 0..16 {
        let word = (counter * 16 + i).wrapping_mul(0x0010_3fd1) % memory.len().max(1) as u64;
        let Some(value) = memory.get_mut(word as usize) else {
            return;
        };
        if *value != known(word) {
            eprintln!("word {word} is {value:#x}");
            std::process::exit(98);
        }
        *value = std::hint::black_box(!*value);
        *value = std::hint::black_box(!*value);
    }
}

fn count(name: &str) -> ! {
    let mut memory = if name.starts_with("child") || name == "main" {
        memory()
    } else {
        Vec::new()
    };
    let path = format!("/data/{name}");
    let file: File = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .unwrap();
    let nameless = (name == "main").then(Nameless::open);
    let mut counter = 0_u64;
    loop {
        let mut on_disk = [0_u8; 8];
        if counter > 0 {
            file.read_exact_at(&mut on_disk, 0).unwrap();
            if u64::from_le_bytes(on_disk) != counter {
                std::process::exit(99);
            }
        }
        counter += 1;
        look(&mut memory, counter);
        file.write_all_at(&counter.to_le_bytes(), 0).unwrap();
        if let Some(files) = &nameless {
            files.check(counter);
            if counter.is_multiple_of(20) {
                println!("at {counter}");
            }
            if let Ok(status) = std::fs::read_to_string(Path::new("/data/end")) {
                std::process::exit(status.trim().parse().unwrap());
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Open files whose names are gone: one of which nothing else is left, one that lives on under another name.
struct Nameless {
    deleted: File,
    renamed: File,
}

const OTHER_NAME: &str = "/data/other-name";

impl Nameless {
    fn open() -> Self {
        let create = |path: &str| {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(path)
                .unwrap();
            file.write_all_at(&0_u64.to_le_bytes(), 0).unwrap();
            file
        };
        let (deleted, renamed) = (create("/data/deleted"), create("/data/removed"));
        std::fs::hard_link("/data/removed", OTHER_NAME).unwrap();
        std::fs::remove_file("/data/deleted").unwrap();
        std::fs::remove_file("/data/removed").unwrap();
        Self { deleted, renamed }
    }

    /// Both can be read and written, the second through either name; nothing has been added to the folder.
    fn check(&self, counter: u64) {
        let in_folder = || {
            let names = std::fs::read_dir("/data").unwrap().flatten().map(|e| e.file_name());
            names.filter(|name| name.to_string_lossy().contains("remap") || name.to_string_lossy().contains("ghost"))
        };
        let mut bytes = [0_u8; 8];
        for file in [&self.deleted, &self.renamed] {
            file.read_exact_at(&mut bytes, 0).unwrap();
            if u64::from_le_bytes(bytes) != counter - 1 {
                std::process::exit(97);
            }
            file.write_all_at(&counter.to_le_bytes(), 0).unwrap();
        }
        let other = File::open(OTHER_NAME).unwrap();
        other.read_exact_at(&mut bytes, 0).unwrap();
        let links = (
            self.deleted.metadata().unwrap().nlink(),
            other.metadata().unwrap().nlink(),
        );
        if u64::from_le_bytes(bytes) != counter || links != (0, 1) {
            std::process::exit(96);
        }
        if let Some(name) = in_folder().next() {
            println!("left behind: {name:?}");
            std::process::exit(95);
        }
    }
}
