//! What all parts of the workload share: its identity, its counters, what it found wrong.

use std::io::Read as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Everything that ticks, by name.
pub(crate) const TICKERS: [&str; 9] = [
    "poll", "timerfd", "itimer", "condvar", "verify", "file", "shm", "loopback", "children",
];

/// The most faults that are kept: the first ones tell the story.
const MAX_FAULTS: usize = 20;

/// Shared by all threads.
#[derive(Debug)]
pub(crate) struct State {
    /// Random, made once, in memory only: it survives a move and nothing else.
    pub(crate) token: String,
    /// When the program started, by its own monotonic clock.
    pub(crate) started: Instant,
    /// The main counter.
    pub(crate) counter: AtomicU64,
    /// Whole passes over the pattern, and words found wrong.
    pub(crate) slices_verified: AtomicU64,
    /// Words of the pattern that were wrong.
    pub(crate) bad_words: AtomicU64,
    /// Datagrams that could not be sent.
    pub(crate) send_errors: AtomicU64,
    tickers: [AtomicU64; TICKERS.len()],
    faults: Mutex<Vec<String>>,
}

impl State {
    pub(crate) fn new() -> Result<Self, String> {
        Ok(Self {
            token: random_token()?,
            started: Instant::now(),
            counter: AtomicU64::new(0),
            slices_verified: AtomicU64::new(0),
            bad_words: AtomicU64::new(0),
            send_errors: AtomicU64::new(0),
            tickers: Default::default(),
            faults: Mutex::new(Vec::new()),
        })
    }

    /// Counts one more beat of the ticker of that name.
    pub(crate) fn tick(&self, name: &str) {
        self.add(name, 1);
    }

    /// Counts beats of the ticker of that name.
    pub(crate) fn add(&self, name: &str, beats: u64) {
        if let Some(index) = TICKERS.iter().position(|ticker| *ticker == name) {
            self.tickers[index].fetch_add(beats, Ordering::Relaxed);
        }
    }

    /// All that have ever ticked.
    pub(crate) fn tickers(&self) -> Vec<(&'static str, u64)> {
        TICKERS
            .iter()
            .zip(&self.tickers)
            .map(|(name, beats)| (*name, beats.load(Ordering::Relaxed)))
            .filter(|(_, beats)| *beats > 0)
            .collect()
    }

    /// Records something that must not happen.
    pub(crate) fn fault(&self, what: impl Into<String>) {
        let what = what.into();
        eprintln!("FAULT {what}");
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        if faults.len() < MAX_FAULTS {
            faults.push(what);
        }
    }

    /// What must not have happened.
    pub(crate) fn faults(&self) -> Vec<String> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// 128 random bits in hexadecimal.
pub(crate) fn random_token() -> Result<String, String> {
    let mut bytes = [0u8; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|error| format!("cannot read /dev/urandom: {error}"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A number made from a token.
pub(crate) fn seed(token: &str) -> u64 {
    token.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
