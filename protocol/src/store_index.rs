//! What a page store holds: the file `<vpid>.index` beside `<vpid>.pages` on a target. The agent writes it when the store of
//! that process is complete, the pager reads it; it never leaves the node.
//!
//! ```text
//! magic "PGSTORE1", u32 page size, u32 areas, u32 runs, u32 hot ranges, all ranges as (u64 start, u64 end), FNV-1a of all that
//! ```
//! Numbers are little endian. In the store itself the offset of a page is its address.

use std::ops::Range;

/// Name of the folder of a container's stores, beside `images` and `work`.
pub const STORE: &str = "store";
/// Name of the pager's socket in CRIU's work folder; CRIU has it built in.
pub const SOCKET: &str = "lazy-pages.socket";
/// Most bytes of an index: far more ranges than a process may have mappings, or scattered pages.
pub const MAX_BYTES: usize = 1 << 30;

const MAGIC: &[u8; 8] = b"PGSTORE1";
const HEADER: usize = 8 + 4 * 4;

/// Name of the file with a process's pages.
#[must_use]
pub fn pages_file(vpid: u32) -> String {
    format!("{vpid}.pages")
}

/// Name of the file that says what is in it.
#[must_use]
pub fn index_file(vpid: u32) -> String {
    format!("{vpid}.index")
}

/// Memory that a target must have free for a pod with so much: the pages themselves, which are in the store or in the pod, and
/// in both only for the moment of their copy; the page tables of the pod (1/512), the store's own (1/512) and its index; the
/// buffers of the pager and what CRIU's images hold besides memory.
#[must_use]
pub fn needed_bytes(memory: u64) -> u64 {
    memory.saturating_add(memory / 64).saturating_add(64 << 20)
}

/// Why an index was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It does not begin like one.
    #[error("it is not the index of a page store")]
    Magic,
    /// Its length is not what it says.
    #[error("the index is cut off")]
    CutOff,
    /// It was changed.
    #[error("the checksum of the index is wrong")]
    Checksum,
    /// The page size makes no sense.
    #[error("the index has pages of {0} bytes")]
    PageSize(u32),
    /// A range is empty, not of whole pages, out of order or overlaps.
    #[error("the index has the range {0:#x}-{1:#x} where it cannot be")]
    Range(u64, u64),
}

/// What a store holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreIndex {
    /// Bytes of a page.
    pub page_size: u32,
    /// The mappings whose memory the store has whole: sorted, disjoint. Where they have no run they are zeros.
    pub areas: Vec<Range<u64>>,
    /// Where the store has data: sorted, disjoint, inside areas.
    pub runs: Vec<Range<u64>>,
    /// What is filled first, in this order.
    pub hot: Vec<Range<u64>>,
}

impl StoreIndex {
    /// As a file.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let lists = [&self.areas, &self.runs, &self.hot];
        let mut out = Vec::with_capacity(HEADER + lists.iter().map(|l| l.len() * 16).sum::<usize>() + 8);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&self.page_size.to_le_bytes());
        for list in lists {
            out.extend_from_slice(&u32::try_from(list.len()).unwrap_or(u32::MAX).to_le_bytes());
        }
        for range in lists.into_iter().flatten() {
            out.extend_from_slice(&range.start.to_le_bytes());
            out.extend_from_slice(&range.end.to_le_bytes());
        }
        let sum = fnv(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        out
    }

    /// From a file.
    ///
    /// # Errors
    /// See [`Error`]; nothing of a wrong index is returned.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let (content, sum) = bytes.split_last_chunk::<8>().ok_or(Error::CutOff)?;
        let mut rest = content.strip_prefix(MAGIC.as_slice()).ok_or(Error::Magic)?;
        let mut numbers = [0u32; 4];
        for number in &mut numbers {
            let (head, tail) = rest.split_first_chunk::<4>().ok_or(Error::CutOff)?;
            *number = u32::from_le_bytes(*head);
            rest = tail;
        }
        let [page_size, areas, runs, hot] = numbers;
        let count = |n: u32| usize::try_from(n).map_err(|_| Error::CutOff);
        let (areas, runs, hot) = (count(areas)?, count(runs)?, count(hot)?);
        let (ranges, odd) = rest.as_chunks::<16>();
        if !odd.is_empty() || areas.checked_add(runs).and_then(|n| n.checked_add(hot)) != Some(ranges.len()) {
            return Err(Error::CutOff);
        }
        if fnv(content) != u64::from_le_bytes(*sum) {
            return Err(Error::Checksum);
        }
        if !page_size.is_power_of_two() || !(4096..=65536).contains(&page_size) {
            return Err(Error::PageSize(page_size));
        }
        let mut all = ranges.iter().map(range);
        let index = Self {
            page_size,
            areas: all.by_ref().take(areas).collect(),
            runs: all.by_ref().take(runs).collect(),
            hot: all.collect(),
        };
        index.check()?;
        Ok(index)
    }

    fn check(&self) -> Result<(), Error> {
        let size = u64::from(self.page_size);
        let bad = |r: &Range<u64>| Err(Error::Range(r.start, r.end));
        for list in [&self.areas, &self.runs] {
            let mut end = 0;
            for range in list {
                if range.start < end || range.end <= range.start || range.start % size != 0 || range.end % size != 0 {
                    return bad(range);
                }
                end = range.end;
            }
        }
        let mut areas = self.areas.iter();
        let mut area = areas.next();
        for run in &self.runs {
            while area.is_some_and(|a| a.end <= run.start) {
                area = areas.next();
            }
            let mut at = run.start;
            // Two mappings may touch, and a run may lie in both.
            while let Some(a) = area
                && a.start <= at
                && a.end < run.end
            {
                at = a.end;
                area = areas.next();
            }
            if !area.is_some_and(|a| a.start <= at && run.end <= a.end) {
                return bad(run);
            }
        }
        match self
            .hot
            .iter()
            .find(|r| r.end <= r.start || r.start % size != 0 || r.end % size != 0)
        {
            Some(range) => bad(range),
            None => Ok(()),
        }
    }

    /// Bytes of all runs.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|r| r.end - r.start).sum()
    }
}

fn range(bytes: &[u8; 16]) -> Range<u64> {
    let (start, end) = bytes.split_at(8);
    let number = |b: &[u8]| b.try_into().map_or(0, u64::from_le_bytes);
    number(start)..number(end)
}

/// FNV-1a, over words: an index of a fragmented process has megabytes, and it is read in the freeze.
fn fnv(bytes: &[u8]) -> u64 {
    let mix = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x0100_0000_01b3);
    let (words, rest) = bytes.as_chunks::<8>();
    let hash = words
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |h, w| mix(h, u64::from_le_bytes(*w)));
    rest.iter().fold(hash, |h, b| mix(h, u64::from(*b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> StoreIndex {
        StoreIndex {
            page_size: 4096,
            areas: vec![0x1000..0x8000, 0x8000..0x9000, 0x7f00_0000_0000..0x7f00_0010_0000],
            runs: vec![0x1000..0x3000, 0x6000..0x9000, 0x7f00_0000_1000..0x7f00_0000_2000],
            hot: vec![0x7f00_0000_1000..0x7f00_0000_2000, 0x1000..0x2000],
        }
    }

    #[test]
    fn an_index_survives_its_file() {
        let bytes = index().encode();
        assert_eq!(StoreIndex::parse(&bytes).unwrap(), index());
        assert_eq!(index().bytes(), 0x6000);
    }

    #[test]
    fn every_changed_byte_and_every_cut_is_refused() {
        let bytes = index().encode();
        for i in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[i] ^= 1;
            assert!(StoreIndex::parse(&changed).is_err(), "byte {i}");
            assert!(StoreIndex::parse(&bytes[..i]).is_err(), "cut at {i}");
        }
    }

    #[test]
    fn ranges_that_cannot_be_are_refused() {
        let with = |change: fn(&mut StoreIndex)| {
            let mut index = index();
            change(&mut index);
            StoreIndex::parse(&index.encode())
        };
        assert!(
            matches!(with(|i| i.runs[0] = 0..0x1000), Err(Error::Range(0, _))),
            "outside of all areas"
        );
        assert!(
            matches!(with(|i| i.runs[0].end = 0x1000), Err(Error::Range(..))),
            "empty"
        );
        assert!(
            matches!(with(|i| i.runs[0].end = 0x1001), Err(Error::Range(..))),
            "half a page"
        );
        assert!(
            matches!(with(|i| i.runs[1].end = 0xa000), Err(Error::Range(..))),
            "beyond its area"
        );
        assert!(
            matches!(with(|i| i.areas.swap(0, 1)), Err(Error::Range(..))),
            "out of order"
        );
        assert!(matches!(with(|i| i.hot[0].end = 5), Err(Error::Range(..))), "hot");
        assert!(matches!(with(|i| i.page_size = 5000), Err(Error::PageSize(5000))));
    }

    #[test]
    fn a_target_needs_a_little_more_than_the_pod_has() {
        assert_eq!(needed_bytes(0), 64 << 20);
        assert_eq!(needed_bytes(64 << 30), (65 << 30) + (64 << 20));
        assert_eq!(needed_bytes(u64::MAX), u64::MAX);
    }
}
