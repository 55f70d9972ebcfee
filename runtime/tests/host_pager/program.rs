//! A restored program: it says its descriptor to the pager as CRIU does, then uses its memory and knows what must be there.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hostsys::own_memory::{self, Advice, Memory, PAGE};
use hostsys::{missing_pages, rights};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// Where the program's memory is.
pub(crate) const BASE: usize = 0x10_0000_0000;
/// Every so many pages there is one without data in the store.
pub(crate) const HOLE_EACH: usize = 13;

/// What the store has at an address.
pub(crate) fn stored(page: usize, word: usize) -> u64 {
    if page.is_multiple_of(HOLE_EACH) {
        return 0;
    }
    ((BASE + page * PAGE) as u64 ^ 0x5eed_0000_0000_0000).wrapping_add(word as u64)
}

struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % below.max(1) as u64) as usize
    }
}

/// What a page must hold.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Page {
    /// What the store had for this page.
    Stored(usize),
    Zero,
    /// This in word 5, the rest of it as before.
    Written(u64, Was),
    /// Zeros or the old content: MADV_FREE.
    Maybe(Was),
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Was {
    Stored(usize),
    Zero,
}

impl Was {
    fn word(self, word: usize) -> u64 {
        match self {
            Was::Stored(page) => stored(page, word),
            Was::Zero => 0,
        }
    }
}

struct Region {
    memory: Memory,
    pages: Vec<Page>,
}

impl Region {
    fn check(&mut self, page: usize) -> Result<(), String> {
        for word in [0, 5, 511] {
            let is = self.memory.read(page, word);
            let fits = match self.pages[page] {
                Page::Stored(n) => is == stored(n, word),
                Page::Zero => is == 0,
                Page::Written(value, _) if word == 5 => is == value,
                Page::Written(_, was) => is == was.word(word),
                Page::Maybe(was) => is == 0 || is == was.word(word),
            };
            if !fits {
                return Err(format!(
                    "page {page} of {:#x}: word {word} is {is:#x}, must be {:?}",
                    self.memory.address(),
                    self.pages[page]
                ));
            }
        }
        Ok(())
    }

    fn write(&mut self, page: usize, value: u64) {
        let was = match self.pages[page] {
            Page::Stored(n) => Was::Stored(n),
            Page::Written(_, was) => was,
            Page::Zero => Was::Zero,
            // A write makes it stay, as what it is then.
            Page::Maybe(was)
                if self.memory.read(page, 0) == was.word(0) && self.memory.read(page, 511) == was.word(511) =>
            {
                was
            }
            Page::Maybe(_) => Was::Zero,
        };
        // A page that may vanish could do so between the look and the write: it is looked at again behind the write.
        let maybe = matches!(self.pages[page], Page::Maybe(_));
        self.memory.write(page, 5, value);
        let was = if maybe && self.memory.read(page, 511) == 0 {
            Was::Zero
        } else {
            was
        };
        self.pages[page] = Page::Written(value, was);
    }
}

fn op(regions: &mut Vec<Region>, random: &mut Random, spare: &mut usize, depth: usize) -> Result<(), String> {
    let index = random.next(regions.len());
    let count = regions[index].pages.len();
    let page = random.next(count);
    let pages = 1 + random.next((count - page).min(24));
    let fail = |e: std::io::Error| e.to_string();
    match random.next(100) {
        0..40 => regions[index].check(page)?,
        40..60 => regions[index].write(page, random.0),
        60..72 => {
            let region = &mut regions[index];
            region.memory.advise(page, pages, Advice::DontNeed).map_err(fail)?;
            region.pages[page..page + pages].fill(Page::Zero);
        }
        72..76 => {
            let region = &mut regions[index];
            region.memory.advise(page, pages, Advice::Free).map_err(fail)?;
            for page in &mut region.pages[page..page + pages] {
                *page = match *page {
                    Page::Stored(n) => Page::Maybe(Was::Stored(n)),
                    Page::Zero | Page::Written(..) => Page::Zero,
                    maybe => maybe,
                };
            }
            // What was written may vanish or not: it is dropped for sure, so that the model stays simple.
            let zero: Vec<usize> = (page..page + pages)
                .filter(|p| region.pages[*p] == Page::Zero)
                .collect();
            for page in zero {
                region.memory.advise(page, 1, Advice::DontNeed).map_err(fail)?;
            }
        }
        76..86 => {
            // Moves the second half, or all, elsewhere.
            if regions.len() < 40 && count > 1 && page > 0 {
                let memory = regions[index].memory.split_off(page);
                let pages = regions[index].pages.split_off(page);
                regions.push(Region { memory, pages });
            }
            let last = regions.len() - 1;
            *spare += (regions[last].pages.len() + 3) * PAGE;
            let to = *spare;
            *spare += regions[last].pages.len() * PAGE;
            regions[last].memory.remap(to).map_err(fail)?;
        }
        // Nothing to unmap.
        86..89 if count <= 64 => {}
        86..89 => {
            // Unmaps a tail; later something new is mapped there.
            let gone = regions[index].memory.split_off(count - 8);
            let at = gone.address();
            drop(gone);
            regions[index].pages.truncate(count - 8);
            let mut memory = Memory::map(at, 8).map_err(fail)?;
            memory.write(0, 5, 77);
            let mut pages = vec![Page::Zero; 8];
            pages[0] = Page::Written(77, Was::Zero);
            regions.push(Region { memory, pages });
        }
        89..92 => {
            let region = &mut regions[index];
            region.memory.protect(page, pages, false).map_err(fail)?;
            region.check(page)?;
            region.memory.protect(page, pages, true).map_err(fail)?;
        }
        92..95 => {
            // The kernel itself writes into a page that may be missing.
            let region = &mut regions[index];
            let zero = std::fs::File::open("/dev/zero").map_err(fail)?;
            region.memory.fill_from(page, zero.as_fd()).map_err(fail)?;
            region.pages[page] = Page::Zero;
        }
        _ if depth < 2 => {
            let seed = random.next(usize::MAX) as u64 | 1;
            let mut spare = *spare;
            let pid = own_memory::fork(|| {
                let mut random = Random(seed);
                let mut result = Ok(());
                for _ in 0..random.next(60) {
                    result = result.and_then(|()| op(regions, &mut random, &mut spare, depth + 1));
                }
                finish(result.and_then(|()| all(regions)))
            });
            let pid = pid.map_err(|e| e.to_string())?;
            let status = waitpid(Pid::from_raw(pid), None).map_err(|e| e.to_string())?;
            if status != WaitStatus::Exited(Pid::from_raw(pid), 0) {
                return Err(format!("a child at depth {depth}: {status:?}"));
            }
        }
        _ => {}
    }
    Ok(())
}

fn all(regions: &mut [Region]) -> Result<(), String> {
    for region in regions {
        for page in 0..region.pages.len() {
            region.check(page)?;
        }
    }
    Ok(())
}

fn finish(result: Result<(), String>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(why) => {
            eprintln!("program {}: {why}", std::process::id());
            1
        }
    }
}

/// `WORK VPID PAGES SEED MILLISECONDS [unfinished]`
pub(crate) fn run(arguments: &[String]) -> ExitCode {
    let number = |i: usize| arguments[i].parse::<usize>().unwrap();
    let (vpid, count, seed, time) = (number(1), number(2), number(3), number(4));
    let memory = Memory::map(BASE, count).unwrap();
    let uffd = missing_pages::open().unwrap();
    missing_pages::register(uffd.as_fd(), BASE as u64, (count * PAGE) as u64).unwrap();
    let mut criu = UnixStream::connect(std::path::Path::new(&arguments[0]).join("lazy-pages.socket")).unwrap();
    criu.write_all(&(-77i32).to_ne_bytes()).unwrap();
    criu.write_all(&i32::try_from(vpid).unwrap().to_ne_bytes()).unwrap();
    rights::send(criu.as_fd(), &[0], uffd.as_fd()).unwrap();
    drop(uffd);
    let pages = (0..count)
        .map(|page| {
            if page % HOLE_EACH == 0 {
                Page::Zero
            } else {
                Page::Stored(page)
            }
        })
        .collect();
    let mut regions = vec![Region { memory, pages }];
    if arguments.get(5).is_some_and(|a| a == "unfinished") {
        let result = regions[0].check(1);
        println!("ready");
        // Killed here.
        std::thread::sleep(Duration::from_secs(60));
        return ExitCode::from(u8::try_from(finish(result)).unwrap());
    }
    criu.write_all(&0x5253_5446u32.to_ne_bytes()).unwrap();
    drop(criu);
    println!("ready");
    let end = Instant::now() + Duration::from_millis(time as u64);
    let mut random = Random(seed as u64 | 1);
    let mut spare = BASE + (1 << 36);
    let mut result = Ok(());
    let mut ops = 0u64;
    while result.is_ok() && Instant::now() < end {
        result = op(&mut regions, &mut random, &mut spare, 0);
        ops += 1;
    }
    let result = result.and_then(|()| all(&mut regions));
    let by_kind = regions.iter().flat_map(|r| &r.pages).fold(BTreeMap::new(), |mut n, p| {
        *n.entry(matches!(p, Page::Stored(_))).or_insert(0) += 1;
        n
    });
    println!("{ops} operations, {:?} pages as stored", by_kind.get(&true));
    ExitCode::from(u8::try_from(finish(result)).unwrap())
}
