//! Pages on a connection, both ends: frames of [`protocol::pages`] on whatever can be written to and read from.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    ops::Range,
    time::{Duration, Instant},
};

use protocol::{
    frame,
    pages::{self, Content, List, Space},
};

use crate::{
    copier::{Batch, Sink},
    page_size,
    store::{self, Store},
};

/// Address spaces that may be announced at the end.
const FINALS: usize = 65_536;
/// Ranges that may be announced of one address space.
const RANGES: usize = 32 << 20;

/// The sending end.
#[derive(Debug)]
pub struct Sender<W> {
    to: W,
    frames: u64,
    bytes: u64,
    limit: Option<Limit>,
}

/// Holds the sender back where it would be faster than it may be.
#[derive(Debug)]
struct Limit {
    bytes_per_second: f64,
    next: Instant,
}

impl Limit {
    fn pass(&mut self, bytes: usize) {
        let now = Instant::now();
        // What was not used is lost but for a moment: no burst after a pause.
        let from = self.next.max(now.checked_sub(Duration::from_millis(20)).unwrap_or(now));
        self.next = from + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
        std::thread::sleep(from.saturating_duration_since(now));
    }
}

impl<W: Write> Sender<W> {
    /// Sends on `to`, at most so many bytes in a second.
    pub fn new(to: W, bytes_per_second: Option<u64>) -> Self {
        let limit = bytes_per_second.map(|b| Limit {
            bytes_per_second: (b as f64).max(1.0),
            next: Instant::now(),
        });
        Self {
            to,
            frames: 0,
            bytes: 0,
            limit,
        }
    }

    /// Bytes of pages so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// From now on the pod is frozen: as fast as it goes.
    pub fn without_limit(&mut self) {
        self.limit = None;
    }

    /// Says what the address spaces are (on the first connection only) and that this was all; gives the connection back.
    ///
    /// # Errors
    /// The connection's.
    pub fn finish(mut self, spaces: &[Space]) -> io::Result<W> {
        for space in spaces {
            for frame in pages::space(space).map_err(io::Error::other)? {
                self.to.write_all(&frame)?;
                self.frames += 1;
            }
        }
        self.to.write_all(&pages::end(self.frames, self.bytes))?;
        self.to.flush()?;
        Ok(self.to)
    }
}

impl<W: Write> Sink for Sender<W> {
    fn pages(&mut self, batch: &mut Batch) -> io::Result<()> {
        let bytes = batch.bytes().len();
        let frame = batch.frame().map_err(io::Error::other)?;
        if let Some(limit) = &mut self.limit {
            limit.pass(frame.len());
        }
        self.to.write_all(frame)?;
        self.frames += 1;
        self.bytes += bytes as u64;
        Ok(())
    }

    fn holes(&mut self, space: u32, ranges: &[Range<u64>]) -> io::Result<()> {
        for frame in pages::holes(space, ranges, page_size()).map_err(io::Error::other)? {
            self.to.write_all(&frame)?;
            self.frames += 1;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Why a connection's pages were not taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It was lost.
    #[error("the connection for pages was lost")]
    Lost(#[source] io::Error),
    /// It broke a rule.
    #[error("the peer broke the protocol: {0}")]
    Violation(#[source] pages::Error),
    /// It says that it sent what did not come.
    #[error(
        "{frames} frames with {bytes} bytes of pages came, and the peer says that it sent {said_frames} with {said_bytes}"
    )]
    Count {
        /// What came.
        frames: u64,
        /// What came.
        bytes: u64,
        /// What was said.
        said_frames: u64,
        /// What was said.
        said_bytes: u64,
    },
    /// More than a pod can have.
    #[error("the peer announces too many address spaces or ranges")]
    TooMany,
    /// The store.
    #[error("failed to store pages")]
    Store(#[source] store::Error),
}

/// Takes everything that comes on a connection into the store; gives what was said of address spaces.
///
/// # Errors
/// See [`Error`]; the store is of no use then.
pub fn receive(from: &mut impl Read, store: &Store) -> Result<Vec<Space>, Error> {
    let mut content = Vec::new();
    let mut spaces: BTreeMap<u32, Space> = BTreeMap::new();
    let (mut frames, mut bytes) = (0, 0);
    loop {
        let mut header = [0; frame::HEADER];
        from.read_exact(&mut header).map_err(Error::Lost)?;
        let (kind, length) = pages::read_header(header).map_err(Error::Violation)?;
        if content.len() < length {
            content.resize(length, 0);
        }
        let content = content.get_mut(..length).unwrap_or_default();
        from.read_exact(content).map_err(Error::Lost)?;
        match pages::read(kind, content, page_size()).map_err(Error::Violation)? {
            Content::Pages {
                space,
                runs,
                bytes: pages,
            } => {
                store.write(space, &runs, pages).map_err(Error::Store)?;
                bytes += pages.len() as u64;
            }
            Content::Holes { space, ranges } => store.forget(space, &ranges).map_err(Error::Store)?,
            Content::Space {
                space,
                container,
                vpid,
                list,
                ranges,
            } => {
                if spaces.len() >= FINALS {
                    return Err(Error::TooMany);
                }
                let of = spaces.entry(space).or_insert_with(|| Space {
                    space,
                    container,
                    vpid,
                    ..Space::default()
                });
                let list = match list {
                    List::Areas => &mut of.areas,
                    List::Runs => &mut of.runs,
                    List::Hot => &mut of.hot,
                };
                if list.len() + ranges.len() > RANGES {
                    return Err(Error::TooMany);
                }
                list.extend(ranges);
            }
            Content::End {
                frames: said_frames,
                bytes: said_bytes,
            } => {
                return if (said_frames, said_bytes) == (frames, bytes) {
                    Ok(spaces.into_values().collect())
                } else {
                    Err(Error::Count {
                        frames,
                        bytes,
                        said_frames,
                        said_bytes,
                    })
                };
            }
        }
        frames += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_holds_the_sender_back() {
        let mut limit = Limit {
            bytes_per_second: 1e6,
            next: Instant::now(),
        };
        let started = Instant::now();
        for _ in 0..10 {
            limit.pass(20_000);
        }
        // 200 ms for all, of which the last need not be waited for and a moment was free.
        let took = started.elapsed();
        assert!(took >= Duration::from_millis(150), "{took:?}");
    }

    #[test]
    fn an_end_that_says_more_than_came_is_refused() {
        let folder = std::env::temp_dir().join(format!("peregrine-wire-{}", std::process::id()));
        let store = Store::receive(&folder).unwrap();
        let said = receive(&mut pages::end(1, 0).as_slice(), &store);
        assert!(
            matches!(
                said,
                Err(Error::Count {
                    frames: 0,
                    said_frames: 1,
                    ..
                })
            ),
            "{said:?}"
        );
        assert!(matches!(receive(&mut [].as_slice(), &store), Err(Error::Lost(_))));
        let mut sent = Sender::new(Vec::new(), None);
        sent.holes(0, &[0x1000..0x2000]).unwrap();
        let space = Space {
            space: 3,
            vpid: 5,
            areas: vec![0x1000..0x4000],
            ..Space::default()
        };
        let bytes = sent.finish(std::slice::from_ref(&space)).unwrap();
        assert_eq!(receive(&mut bytes.as_slice(), &store).unwrap(), [space]);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
