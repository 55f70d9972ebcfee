//! Memory pages between two agents, on connections of their own beside the session's.
//!
//! | kind | content |
//! |---|---|
//! | 16 | pages: space (4), count of runs (4), runs as address (8) and pages (4), then the bytes of all runs |
//! | 17 | holes: space (4), count (4), ranges as address (8) and pages (8): what the target must forget |
//! | 18 | end: how many frames were sent before this one (8), bytes of pages in them (8) |
//! | 19 | a part of what is said of an address space when the pod is frozen: space (4), container (4), process (4), list (1), count (4), ranges as start (8) and end (8) |
//!
//! Numbers are big endian. A *space* is one address space of a process, numbered by the source, no number is used twice;
//! which process it is, is said when the pod is frozen, on the first connection. The same page always travels on the same connection
//! ([`stream_of`]), so that an older copy of it never overtakes a newer one.

use std::ops::Range;

use crate::frame;

/// Most bytes of pages in a frame.
pub const BATCH_BYTES: usize = 1 << 20;
/// Most runs in a frame: every page of a batch may stand alone.
pub const BATCH_RUNS: usize = BATCH_BYTES / 4096;
/// Most ranges in a frame of holes.
pub const HOLES: usize = 4096;
/// Most connections for pages.
pub const STREAMS: u32 = 16;
/// Most address spaces of a pod, in all rounds.
pub const SPACES: u32 = 1 << 20;
/// The end of what addresses of processes may be.
const ADDRESSES: u64 = 1 << 56;

const SPACE_AND_COUNT: usize = 8;
const RUN: usize = 12;
const HOLE: usize = 16;
const END: usize = 16;
const SPACE_HEAD: usize = 17;

/// Room before the bytes of a batch, for all its headers.
pub const HEAD: usize = frame::HEADER + SPACE_AND_COUNT + BATCH_RUNS * RUN;
/// Most bytes behind the header of a frame of these kinds.
pub const MOST: usize = SPACE_AND_COUNT + BATCH_RUNS * RUN + BATCH_BYTES;

/// Kinds of frames on such a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Pages.
    Pages,
    /// Holes.
    Holes,
    /// The end of the connection.
    End,
    /// What an address space is.
    Space,
}

/// Which list of an address space a frame continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// The tracked areas.
    Areas,
    /// Where the target must have data.
    Runs,
    /// What is filled first.
    Hot,
}

/// An address space as it is when the pod is frozen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// Its number.
    pub space: u32,
    /// Place of its container.
    pub container: u32,
    /// The process, as CRIU names it.
    pub vpid: u32,
    /// The tracked areas.
    pub areas: Vec<Range<u64>>,
    /// Where the target must have data.
    pub runs: Vec<Range<u64>>,
    /// What is filled first.
    pub hot: Vec<Range<u64>>,
}

impl Kind {
    fn byte(self) -> u8 {
        match self {
            Self::Pages => 16,
            Self::Holes => 17,
            Self::End => 18,
            Self::Space => 19,
        }
    }

    fn most(self) -> usize {
        match self {
            Self::Pages => MOST,
            Self::Holes => SPACE_AND_COUNT + HOLES * HOLE,
            Self::End => END,
            Self::Space => SPACE_HEAD + HOLES * HOLE,
        }
    }
}

/// Why a frame was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The kind is not known.
    #[error("a frame of unknown kind {0} among pages")]
    Kind(u8),
    /// Longer than its kind may be.
    #[error("a frame of pages with {0} bytes")]
    TooLong(usize),
    /// Its parts do not make up its length.
    #[error("a frame of pages whose parts do not fit its length")]
    Length,
    /// More runs than there may be, or none.
    #[error("a frame of pages with {0} ranges")]
    Count(usize),
    /// A range that cannot be.
    #[error("a frame of pages with a range at {0:#x}")]
    Range(u64),
    /// A space that cannot be.
    #[error("a frame of pages with the address space {0}")]
    Space(u32),
}

/// What a frame holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// Pages: the bytes of all runs, one behind the other.
    Pages {
        /// Which address space.
        space: u32,
        /// Where they belong.
        runs: Vec<Range<u64>>,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// Pages that are to be forgotten.
    Holes {
        /// Which address space.
        space: u32,
        /// Where.
        ranges: Vec<Range<u64>>,
    },
    /// A part of what an address space is.
    Space {
        /// Which.
        space: u32,
        /// Place of its container.
        container: u32,
        /// The process, as CRIU names it.
        vpid: u32,
        /// Which list is continued.
        list: List,
        /// By these.
        ranges: Vec<Range<u64>>,
    },
    /// Everything was sent on this connection.
    End {
        /// Frames before this one.
        frames: u64,
        /// Bytes of pages in them.
        bytes: u64,
    },
}

/// On which of `count` connections a page travels: blocks of 2 MiB in turn.
#[must_use]
pub fn stream_of(space: u32, address: u64, count: u32) -> u32 {
    let turn = (address >> 21).wrapping_add(u64::from(space));
    u32::try_from(turn % u64::from(count.max(1))).unwrap_or(0)
}

/// The end of the block that an address is in.
#[must_use]
pub fn end_of_block(address: u64) -> u64 {
    (address | ((1 << 21) - 1)).saturating_add(1)
}

/// Writes all headers of a batch into the end of `head`, which lies before its bytes; gives where the frame begins.
///
/// # Errors
/// Too many runs or bytes.
pub fn write_head(head: &mut [u8; HEAD], space: u32, runs: &[Range<u64>], page: u64) -> Result<usize, Error> {
    if runs.is_empty() || runs.len() > BATCH_RUNS {
        return Err(Error::Count(runs.len()));
    }
    let mut out = Vec::with_capacity(frame::HEADER + SPACE_AND_COUNT + runs.len() * RUN);
    let bytes: u64 = runs.iter().map(|r| r.end - r.start).sum();
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    let length = (SPACE_AND_COUNT + runs.len() * RUN).saturating_add(bytes);
    if bytes > BATCH_BYTES {
        return Err(Error::TooLong(length));
    }
    header(&mut out, Kind::Pages, length)?;
    out.extend_from_slice(&space.to_be_bytes());
    out.extend_from_slice(&u32::try_from(runs.len()).unwrap_or(0).to_be_bytes());
    for run in runs {
        out.extend_from_slice(&run.start.to_be_bytes());
        let pages = u32::try_from((run.end - run.start) / page).map_err(|_| Error::Range(run.start))?;
        out.extend_from_slice(&pages.to_be_bytes());
    }
    let begin = HEAD - out.len();
    if let Some(room) = head.get_mut(begin..) {
        room.copy_from_slice(&out);
    }
    Ok(begin)
}

/// Frames that say what is to be forgotten.
///
/// # Errors
/// A range that cannot be.
pub fn holes(space: u32, ranges: &[Range<u64>], page: u64) -> Result<Vec<Vec<u8>>, Error> {
    ranges
        .chunks(HOLES)
        .map(|some| {
            let mut out = Vec::with_capacity(frame::HEADER + SPACE_AND_COUNT + some.len() * HOLE);
            header(&mut out, Kind::Holes, SPACE_AND_COUNT + some.len() * HOLE)?;
            out.extend_from_slice(&space.to_be_bytes());
            out.extend_from_slice(&u32::try_from(some.len()).unwrap_or(0).to_be_bytes());
            for range in some {
                out.extend_from_slice(&range.start.to_be_bytes());
                out.extend_from_slice(&((range.end - range.start) / page).to_be_bytes());
            }
            Ok(out)
        })
        .collect()
}

/// Frames that say what an address space is; at least one.
///
/// # Errors
/// A frame would be too long, which cannot be.
pub fn space(of: &Space) -> Result<Vec<Vec<u8>>, Error> {
    let mut frames = Vec::new();
    for (list, ranges) in [(0u8, &of.areas), (1, &of.runs), (2, &of.hot)] {
        // One without areas is said too: all of its process is CRIU's.
        let none: &[Range<u64>] = &[];
        let chunks = ranges
            .chunks(HOLES)
            .chain((list == 0 && ranges.is_empty()).then_some(none));
        for some in chunks {
            let mut out = Vec::with_capacity(frame::HEADER + SPACE_HEAD + some.len() * HOLE);
            header(&mut out, Kind::Space, SPACE_HEAD + some.len() * HOLE)?;
            for number in [of.space, of.container, of.vpid] {
                out.extend_from_slice(&number.to_be_bytes());
            }
            out.push(list);
            out.extend_from_slice(&u32::try_from(some.len()).unwrap_or(0).to_be_bytes());
            for range in some {
                out.extend_from_slice(&range.start.to_be_bytes());
                out.extend_from_slice(&range.end.to_be_bytes());
            }
            frames.push(out);
        }
    }
    Ok(frames)
}

fn read_space(content: &[u8], page: u64) -> Result<Content<'_>, Error> {
    let (head, rest) = content.split_first_chunk::<SPACE_HEAD>().ok_or(Error::Length)?;
    let number = |at: usize| {
        head.get(at..at + 4)
            .map_or(0, |b| b.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)))
    };
    let (space, container, vpid, count) = (number(0), number(4), number(8), number(13));
    if space >= SPACES {
        return Err(Error::Space(space));
    }
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if count > HOLES {
        return Err(Error::Count(count));
    }
    if rest.len() != count * HOLE {
        return Err(Error::Length);
    }
    let list = match head.get(12) {
        Some(0) => List::Areas,
        Some(1) => List::Runs,
        Some(2) => List::Hot,
        _ => return Err(Error::Length),
    };
    let mut ranges = Vec::with_capacity(count);
    let mut last = 0;
    let (pairs, _) = rest.as_chunks::<8>();
    for pair in pairs.chunks_exact(2) {
        let [start, end] = pair else { return Err(Error::Length) };
        let (start, end) = (u64::from_be_bytes(*start), u64::from_be_bytes(*end));
        // What is hot has an order of its own.
        let in_order = list == List::Hot || start >= last;
        if !in_order || end <= start || end > ADDRESSES || start % page != 0 || end % page != 0 {
            return Err(Error::Range(start));
        }
        last = end;
        ranges.push(start..end);
    }
    Ok(Content::Space {
        space,
        container,
        vpid,
        list,
        ranges,
    })
}

/// The frame that ends a connection.
#[must_use]
pub fn end(frames: u64, bytes: u64) -> Vec<u8> {
    let mut out = vec![Kind::End.byte(), 0, 0, 0, 16];
    out.extend_from_slice(&frames.to_be_bytes());
    out.extend_from_slice(&bytes.to_be_bytes());
    out
}

fn header(out: &mut Vec<u8>, kind: Kind, length: usize) -> Result<(), Error> {
    out.push(kind.byte());
    let length = u32::try_from(length).map_err(|_| Error::TooLong(length))?;
    out.extend_from_slice(&length.to_be_bytes());
    Ok(())
}

/// Reads the header of a frame: what follows is safe to allocate.
///
/// # Errors
/// See [`Error`].
pub fn read_header(bytes: [u8; frame::HEADER]) -> Result<(Kind, usize), Error> {
    let [kind, a, b, c, d] = bytes;
    let kind = match kind {
        16 => Kind::Pages,
        17 => Kind::Holes,
        18 => Kind::End,
        19 => Kind::Space,
        other => return Err(Error::Kind(other)),
    };
    let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    if length > kind.most() {
        return Err(Error::TooLong(length));
    }
    Ok((kind, length))
}

/// Reads what follows a header. Ranges are of whole pages, in order and disjoint.
///
/// # Errors
/// See [`Error`].
pub fn read(kind: Kind, content: &[u8], page: u64) -> Result<Content<'_>, Error> {
    if kind == Kind::End {
        let (frames, rest) = content.split_first_chunk::<8>().ok_or(Error::Length)?;
        let bytes: [u8; 8] = rest.try_into().map_err(|_| Error::Length)?;
        return Ok(Content::End {
            frames: u64::from_be_bytes(*frames),
            bytes: u64::from_be_bytes(bytes),
        });
    }
    if kind == Kind::Space {
        return read_space(content, page);
    }
    let (space, rest) = content.split_first_chunk::<4>().ok_or(Error::Length)?;
    let (count, rest) = rest.split_first_chunk::<4>().ok_or(Error::Length)?;
    let space = u32::from_be_bytes(*space);
    if space >= SPACES {
        return Err(Error::Space(space));
    }
    let count = usize::try_from(u32::from_be_bytes(*count)).unwrap_or(usize::MAX);
    let (most, one) = if kind == Kind::Pages {
        (BATCH_RUNS, RUN)
    } else {
        (HOLES, HOLE)
    };
    if count == 0 || count > most {
        return Err(Error::Count(count));
    }
    let (list, bytes) = rest.split_at_checked(count * one).ok_or(Error::Length)?;
    let mut ranges = Vec::with_capacity(count);
    let mut last = 0;
    let mut total = 0u64;
    for item in list.chunks_exact(one) {
        let (start, pages) = item.split_first_chunk::<8>().ok_or(Error::Length)?;
        let start = u64::from_be_bytes(*start);
        let pages = pages.iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let end = pages.checked_mul(page).and_then(|l| l.checked_add(start));
        match end {
            Some(end) if start >= last && end > start && end <= ADDRESSES && start % page == 0 => {
                last = end;
                total = total.saturating_add(end - start);
                ranges.push(start..end);
            }
            _ => return Err(Error::Range(start)),
        }
    }
    let expected = if kind == Kind::Pages { total } else { 0 };
    if u64::try_from(bytes.len()) != Ok(expected) {
        return Err(Error::Length);
    }
    Ok(if kind == Kind::Pages {
        Content::Pages {
            space,
            runs: ranges,
            bytes,
        }
    } else {
        Content::Holes { space, ranges }
    })
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a set of addresses is a list of ranges")]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn parse(frame: &[u8]) -> Result<Content<'_>, Error> {
        let (head, content) = frame.split_first_chunk::<5>().unwrap();
        let (kind, length) = read_header(*head)?;
        assert_eq!(length, content.len());
        read(kind, content, PAGE)
    }

    fn batch(runs: &[Range<u64>]) -> Vec<u8> {
        let bytes: u64 = runs.iter().map(|r| r.end - r.start).sum();
        let mut head = [0; HEAD];
        let begin = write_head(&mut head, 7, runs, PAGE).unwrap();
        let mut frame = head[begin..].to_vec();
        frame.resize(frame.len() + usize::try_from(bytes).unwrap(), 3);
        frame
    }

    #[test]
    fn pages_holes_and_the_end_survive() {
        let runs = vec![0x1000..0x3000, 0x7000..0x8000];
        let frame = batch(&runs);
        let bytes = vec![3; 0x3000];
        let expected = Content::Pages {
            space: 7,
            runs: runs.clone(),
            bytes: &bytes,
        };
        assert_eq!(parse(&frame).unwrap(), expected);
        let frames = holes(9, &runs, PAGE).unwrap();
        let expected = Content::Holes { space: 9, ranges: runs };
        assert_eq!(parse(&frames[0]).unwrap(), expected);
        assert_eq!(parse(&end(5, 6)).unwrap(), Content::End { frames: 5, bytes: 6 });
        let full: Vec<_> = (0..BATCH_RUNS as u64).map(|i| i * 8192..i * 8192 + 4096).collect();
        assert!(parse(&batch(&full)).is_ok());
    }

    #[test]
    fn what_is_said_of_a_space_survives_in_parts_and_in_order() {
        let many: Vec<_> = (0..HOLES as u64 + 5).map(|i| i * 8192..i * 8192 + 4096).collect();
        let of = Space {
            space: 4,
            container: 2,
            vpid: 17,
            areas: vec![0x1000..0x9000],
            runs: many.clone(),
            hot: vec![0x5000..0x6000, 0x1000..0x2000],
        };
        let frames = space(&of).unwrap();
        let mut got = Space {
            space: 4,
            container: 2,
            vpid: 17,
            ..Space::default()
        };
        for frame in &frames {
            match parse(frame).unwrap() {
                Content::Space {
                    space: 4,
                    container: 2,
                    vpid: 17,
                    list,
                    ranges,
                } => match list {
                    List::Areas => got.areas.extend(ranges),
                    List::Runs => got.runs.extend(ranges),
                    List::Hot => got.hot.extend(ranges),
                },
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(got, of);
        assert_eq!(space(&Space::default()).unwrap().len(), 1);
        let mut changed = frames[0].clone();
        changed[5 + 12] = 9;
        assert_eq!(parse(&changed), Err(Error::Length));
        for cut in 0..frames[0].len() - 5 {
            assert!(read(Kind::Space, &frames[0][5..5 + cut], PAGE).is_err());
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert_eq!(read_header([1, 0, 0, 0, 0]), Err(Error::Kind(1)));
        assert!(matches!(read_header([16, 255, 0, 0, 0]), Err(Error::TooLong(_))));
        let frame = batch(&[0x1000..0x3000, 0x7000..0x8000]);
        let content = &frame[5..];
        for cut in 0..content.len() {
            assert!(read(Kind::Pages, &content[..cut], PAGE).is_err(), "cut at {cut}");
        }
        let changed = |at: usize, to: u8| {
            let mut content = content.to_vec();
            content[at] = to;
            read(Kind::Pages, &content, PAGE).map(drop).unwrap_err()
        };
        assert!(matches!(changed(0, 1), Error::Space(_)));
        assert!(matches!(changed(7, 0), Error::Count(0)));
        // Half a page; out of order; beyond what addresses are.
        assert!(matches!(changed(15, 1), Error::Range(_)));
        assert!(matches!(changed(26, 0x10), Error::Range(0x1000)));
        assert!(matches!(changed(8, 1), Error::Range(_)));
        let mut head = [0; HEAD];
        assert!(matches!(write_head(&mut head, 0, &[], PAGE), Err(Error::Count(0))));
        assert!(matches!(
            write_head(&mut head, 0, &[0..2 << 20], PAGE),
            Err(Error::TooLong(_))
        ));
    }

    #[test]
    fn a_page_always_takes_the_same_stream_and_all_streams_are_used() {
        let mut used = [0; 4];
        for block in 0..400u64 {
            let address = block << 21;
            let stream = stream_of(3, address, 4);
            assert_eq!(stream, stream_of(3, end_of_block(address) - 1, 4));
            used[usize::try_from(stream).unwrap()] += 1;
        }
        assert_eq!(used, [100; 4]);
        assert_eq!(stream_of(3, 0x1234_5000, 0), 0);
    }
}
