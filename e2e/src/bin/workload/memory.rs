//! A pattern over many MiB: every word follows from the token, its place and how often its slice was rewritten.
//!
//! The slices are rewritten in turn, so that an old page in place of a new one is found as well as a lost one.

use crate::state::{State, seed};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Words in a slice: 1 MiB.
const WORDS: usize = 1 << 17;

/// The pattern.
#[derive(Debug)]
pub(crate) struct Pattern {
    seed: u64,
    slices: Vec<Mutex<Slice>>,
}

#[derive(Debug)]
struct Slice {
    generation: u64,
    words: Vec<u64>,
}

impl Pattern {
    /// Fills `mib` MiB.
    pub(crate) fn new(token: &str, mib: usize) -> Self {
        let seed = seed(token);
        let slice = |index| {
            let mut slice = Slice {
                generation: 0,
                words: vec![0; WORDS],
            };
            slice.fill(seed, index);
            Mutex::new(slice)
        };
        Self {
            seed,
            slices: (0..mib as u64).map(slice).collect(),
        }
    }

    /// Number of slices.
    pub(crate) fn len(&self) -> usize {
        self.slices.len()
    }

    /// Counts the words of a slice that are wrong.
    pub(crate) fn verify(&self, index: usize) -> u64 {
        let Some(slice) = self.slices.get(index) else { return 0 };
        slice
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .wrong(self.seed, index as u64)
    }

    /// Counts all words that are wrong.
    pub(crate) fn verify_all(&self) -> u64 {
        (0..self.len()).map(|index| self.verify(index)).sum()
    }

    /// Rewrites a slice with its next generation.
    fn rewrite(&self, index: usize) {
        if let Some(slice) = self.slices.get(index) {
            let mut slice = slice.lock().unwrap_or_else(PoisonError::into_inner);
            slice.generation += 1;
            slice.fill(self.seed, index as u64);
        }
    }
}

impl Slice {
    fn fill(&mut self, seed: u64, index: u64) {
        let start = start(seed, index, self.generation);
        for (place, word) in self.words.iter_mut().enumerate() {
            *word = mix(start.wrapping_add(place as u64));
        }
    }

    fn wrong(&self, seed: u64, index: u64) -> u64 {
        let start = start(seed, index, self.generation);
        self.words
            .iter()
            .enumerate()
            .filter(|(place, word)| **word != mix(start.wrapping_add(*place as u64)))
            .count() as u64
    }
}

fn start(seed: u64, index: u64, generation: u64) -> u64 {
    mix(seed ^ mix(index) ^ generation.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// The finalizer of splitmix64: cheap, and pages do not compress.
fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Verifies slice after slice for ever, and rewrites `dirty` of them each second.
pub(crate) fn watch(state: &State, pattern: &Pattern, dirty: usize) {
    /// Slices verified each second.
    const PACE: u64 = 25;
    let mut owed = 0;
    for round in 0u64.. {
        let index = usize::try_from(round).unwrap_or(0) % pattern.len().max(1);
        let wrong = pattern.verify(index);
        if wrong > 0 {
            state.bad_words.fetch_add(wrong, Ordering::Relaxed);
            state.fault(format!("{wrong} words of slice {index} are wrong"));
        }
        state.slices_verified.fetch_add(1, Ordering::Relaxed);
        state.tick("verify");
        owed += dirty as u64;
        while owed >= PACE {
            owed -= PACE;
            pattern.rewrite(usize::try_from(round + owed).unwrap_or(0) % pattern.len().max(1));
        }
        std::thread::sleep(Duration::from_millis(1000 / PACE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_word_and_an_old_slice_are_found() {
        let pattern = Pattern::new("token", 2);
        assert_eq!(pattern.verify_all(), 0);
        pattern.rewrite(1);
        assert_eq!(pattern.verify_all(), 0);
        pattern.slices[0].lock().unwrap().words[7] ^= 1;
        assert_eq!((pattern.verify(0), pattern.verify_all()), (1, 1));
        pattern.slices[1].lock().unwrap().generation = 0;
        assert!(pattern.verify(1) > 1000);
    }
}
