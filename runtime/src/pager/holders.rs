//! How many address spaces still need a page of a store: after a fork two do. What nobody needs is given back. Pure.

use std::collections::BTreeMap;
use std::ops::Range;

/// Counts by range of the store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holders {
    /// By start: end and count, which is never 0. Disjoint.
    counts: BTreeMap<u64, (u64, u32)>,
}

impl Holders {
    /// One more needs these.
    pub fn hold(&mut self, range: &Range<u64>) {
        self.split(range.start);
        self.split(range.end);
        let mut at = range.start;
        while at < range.end {
            match self.counts.range_mut(at..range.end).next() {
                Some((&start, (end, count))) if start == at => {
                    *count += 1;
                    at = *end;
                }
                found => {
                    let end = found.map_or(range.end, |(&start, _)| start);
                    self.counts.insert(at, (end, 1));
                    at = end;
                }
            }
        }
    }

    /// One less needs these. Returns what nobody needs any more.
    pub fn release(&mut self, range: &Range<u64>) -> Vec<Range<u64>> {
        self.split(range.start);
        self.split(range.end);
        let mut free: Vec<Range<u64>> = Vec::new();
        let inside: Vec<u64> = self.counts.range(range.clone()).map(|(&start, _)| start).collect();
        for start in inside {
            let Some((end, count)) = self.counts.get_mut(&start) else {
                continue;
            };
            *count -= 1;
            let (end, gone) = (*end, *count == 0);
            if gone {
                self.counts.remove(&start);
                match free.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => free.push(start..end),
                }
            }
        }
        free
    }

    /// Bytes that somebody needs.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.counts.iter().map(|(start, (end, _))| end - start).sum()
    }

    fn split(&mut self, at: u64) {
        if let Some((_, (end, count))) = self.counts.range_mut(..at).next_back()
            && *end > at
        {
            let tail = (*end, *count);
            *end = at;
            self.counts.insert(at, tail);
        }
    }
}
