//! Reads pages of a process, many scattered ones in one system call, and gives them away in batches. Pages of zeros are left
//! out: where the target has nothing, it has zeros.
//!
//! Reading does not make a page written. A page that changes while it is read is written, and comes again.

use std::{
    fs::File,
    io::{self, IoSliceMut},
    ops::Range,
    os::unix::fs::FileExt as _,
};

use nix::{
    errno::Errno,
    sys::uio::{RemoteIoVec, process_vm_readv},
    unistd::Pid,
};
use protocol::pages::{self, BATCH_BYTES, BATCH_RUNS, HEAD};

use crate::{page_size, ranges::Ranges, space::Copied};

/// Where batches go.
pub trait Sink {
    /// Takes the pages of a batch.
    ///
    /// # Errors
    /// They could not be taken: the copy ends.
    fn pages(&mut self, batch: &mut Batch) -> io::Result<()>;

    /// Forgets pages.
    ///
    /// # Errors
    /// As for pages.
    fn holes(&mut self, space: u32, ranges: &[Range<u64>]) -> io::Result<()>;

    /// Everything that was given is on its way.
    ///
    /// # Errors
    /// As for pages.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Pages of one address space, with room for the headers of a frame before them.
#[derive(Debug)]
pub struct Batch {
    space: u32,
    runs: Vec<Range<u64>>,
    buffer: Vec<u8>,
    length: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Self {
            space: 0,
            runs: Vec::new(),
            buffer: vec![0; HEAD + BATCH_BYTES],
            length: 0,
        }
    }
}

impl Batch {
    /// Which address space.
    #[must_use]
    pub fn space(&self) -> u32 {
        self.space
    }

    /// Where the pages belong.
    #[must_use]
    pub fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }

    /// The pages, one behind the other.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.buffer.get(HEAD..HEAD + self.length).unwrap_or_default()
    }

    /// As a frame of the protocol.
    ///
    /// # Errors
    /// Never for a batch that a copier made.
    pub fn frame(&mut self) -> Result<&[u8], pages::Error> {
        let head = self.buffer.first_chunk_mut::<HEAD>().ok_or(pages::Error::Length)?;
        let begin = pages::write_head(head, self.space, &self.runs, page_size())?;
        self.buffer.get(begin..HEAD + self.length).ok_or(pages::Error::Length)
    }

    fn room(&mut self) -> &mut [u8] {
        self.buffer.get_mut(HEAD..).unwrap_or_default()
    }
}

/// Reads pages on one thread.
#[derive(Debug, Default)]
pub struct Copier {
    batch: Batch,
    /// What the batch is filled with, page by page where need be.
    asked: Vec<Range<u64>>,
    sent: u64,
}

impl Copier {
    /// Bytes given to the sink so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Copies ranges of a process; says what was zero and what could not be read.
    ///
    /// # Errors
    /// The sink's.
    pub fn copy(
        &mut self,
        space: u32,
        pid: i32,
        ranges: impl IntoIterator<Item = Range<u64>>,
        sink: &mut dyn Sink,
    ) -> io::Result<Copied> {
        let mut copied = Copied::default();
        let mut ranges = ranges.into_iter();
        let mut rest: Option<Range<u64>> = None;
        loop {
            self.asked.clear();
            let mut room = BATCH_BYTES as u64;
            while room > 0 && self.asked.len() < BATCH_RUNS {
                let Some(range) = rest.take().or_else(|| ranges.next()) else {
                    break;
                };
                let end = range.end.min(range.start + room);
                room -= end - range.start;
                self.asked.push(range.start..end);
                if end < range.end {
                    rest = Some(end..range.end);
                }
            }
            if self.asked.is_empty() {
                return Ok(copied);
            }
            let got = self.read(pid, &mut copied.failed);
            self.keep(space, got, &mut copied.zeros);
            if !self.batch.runs.is_empty() {
                sink.pages(&mut self.batch)?;
                self.sent += self.batch.length as u64;
            }
        }
    }

    /// Reads what is asked for; gives what was read, whose bytes lie one behind the other.
    fn read(&mut self, pid: i32, failed: &mut Ranges) -> Vec<Range<u64>> {
        let page = page_size();
        let mut got = Ranges::new();
        let mut filled = 0;
        let mut memory: Option<File> = None;
        // Reversed: the next one is the last.
        let mut asked: Vec<Range<u64>> = self.asked.iter().rev().cloned().collect();
        while !asked.is_empty() {
            let remote: Vec<RemoteIoVec> = asked
                .iter()
                .rev()
                .filter_map(|r| {
                    Some(RemoteIoVec {
                        base: usize::try_from(r.start).ok()?,
                        len: usize::try_from(r.end - r.start).ok()?,
                    })
                })
                .collect();
            let local = self.batch.room().get_mut(filled..).unwrap_or_default();
            let result = process_vm_readv(Pid::from_raw(pid), &mut [IoSliceMut::new(local)], &remote);
            let whole = match result {
                Ok(bytes) => bytes as u64 / page * page,
                Err(Errno::ESRCH) => {
                    // It has ended: nothing of it is needed any more.
                    asked.iter().rev().for_each(|r| failed.push(r.clone()));
                    break;
                }
                Err(_) => 0,
            };
            let mut left = whole;
            while left > 0
                && let Some(range) = asked.pop()
            {
                let end = range.end.min(range.start + left);
                left -= end - range.start;
                got.push(range.start..end);
                if end < range.end {
                    asked.push(end..range.end);
                }
            }
            filled += usize::try_from(whole).unwrap_or(0);
            // The next page cannot be read this way: it is gone, or its mapping may not be read by the program itself.
            let Some(range) = asked.pop() else { break };
            if memory.is_none() {
                memory = File::open(format!("/proc/{pid}/mem")).ok();
            }
            let length = usize::try_from(range.end - range.start).unwrap_or(0);
            let local = self.batch.room().get_mut(filled..filled + length).unwrap_or_default();
            let bytes = memory
                .as_ref()
                .and_then(|m| m.read_at(local, range.start).ok())
                .unwrap_or(0);
            let whole = bytes as u64 / page * page;
            got.push(range.start..range.start + whole);
            filled += usize::try_from(whole).unwrap_or(0);
            let mut next = range.start + whole;
            if whole == 0 {
                failed.push(next..next + page);
                next += page;
            }
            if next < range.end {
                asked.push(next..range.end);
            }
        }
        self.batch.length = filled;
        got.into_vec()
    }

    /// Makes the batch of what was read, without the pages of zeros.
    fn keep(&mut self, space: u32, got: Vec<Range<u64>>, zeros: &mut Ranges) {
        let page = page_size();
        let size = usize::try_from(page).unwrap_or(4096);
        self.batch.space = space;
        self.batch.runs.clear();
        let mut kept = Ranges::new();
        let (mut from, mut to) = (0, 0);
        for range in got {
            let mut at = range.start;
            while at < range.end {
                let room = self.batch.room();
                let is_zero = room.get(from..from + size).is_some_and(is_zero);
                if is_zero {
                    zeros.push(at..at + page);
                } else {
                    if from != to {
                        room.copy_within(from..from + size, to);
                    }
                    kept.push(at..at + page);
                    to += size;
                }
                from += size;
                at += page;
            }
        }
        self.batch.runs = kept.into_vec();
        self.batch.length = to;
    }
}

fn is_zero(page: &[u8]) -> bool {
    let (words, _) = page.as_chunks::<64>();
    // Most pages differ in the first words: those are not read to their end.
    words.iter().all(|w| w.iter().fold(0, |all, b| all | b) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What came, by address.
    #[derive(Default)]
    struct Collected(std::collections::BTreeMap<u64, Vec<u8>>);

    impl Sink for Collected {
        fn pages(&mut self, batch: &mut Batch) -> io::Result<()> {
            let mut bytes = batch.bytes().to_vec();
            for run in batch.runs() {
                let rest = bytes.split_off(usize::try_from(run.end - run.start).unwrap());
                self.0.insert(run.start, std::mem::replace(&mut bytes, rest));
            }
            assert!(bytes.is_empty());
            let expected = batch.bytes().to_vec();
            let frame = batch.frame().unwrap();
            let (kind, _) = pages::read_header(*frame.first_chunk().unwrap()).unwrap();
            let content = pages::read(kind, &frame[5..], page_size()).unwrap();
            assert!(matches!(content, pages::Content::Pages { bytes, .. } if bytes == expected));
            Ok(())
        }

        fn holes(&mut self, _: u32, _: &[Range<u64>]) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn scattered_pages_come_without_zeros_and_what_cannot_be_read_is_said() {
        let page = page_size();
        let size = usize::try_from(page).unwrap();
        let pages = 700;
        let mut memory = vec![0u8; (pages + 1) * size];
        let start = (memory.as_ptr().addr() as u64).next_multiple_of(page);
        let offset = usize::try_from(start - memory.as_ptr().addr() as u64).unwrap();
        // Every third is zero; the others hold their number.
        for i in (0..pages).filter(|i| i % 3 != 0) {
            memory[offset + i * size + 17] = u8::try_from(i % 251 + 1).unwrap();
        }
        let at = |i: u64| start + i * page;
        // All, and something at an address where nothing is, and something behind it.
        let asked = [0x1_0000..0x1_0000 + 2 * page, at(0)..at(600), at(610)..at(700)];
        let mut collected = Collected::default();
        let own = std::process::id().cast_signed();
        let copied = Copier::default().copy(3, own, asked, &mut collected).unwrap();
        assert_eq!(copied.failed.as_slice(), [0x1_0000..0x1_0000 + 2 * page]);
        assert_eq!(copied.zeros.bytes(), (200 + 30) * page);
        let mut seen = 0;
        for (address, bytes) in collected.0 {
            for (i, content) in bytes.chunks(size).enumerate() {
                let number = (address - start) / page + i as u64;
                assert_eq!(u64::from(content[17]), number % 251 + 1);
                seen += 1;
            }
        }
        assert_eq!(seen, 400 + 60);
    }

    #[test]
    fn a_process_that_has_ended_gives_nothing() {
        let mut collected = Collected::default();
        let copied = Copier::default()
            .copy(0, i32::MAX, [0x1000..0x5000], &mut collected)
            .unwrap();
        assert!(collected.0.is_empty());
        assert_eq!(copied.failed.bytes(), 0x4000);
    }
}
