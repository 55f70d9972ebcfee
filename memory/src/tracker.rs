//! All processes of a pod. A round looks at every process once: new ones are attached, those that have ended are let go.
//!
//! What it does to the workload is noted writes and nothing else: when it is dropped, or dies, the kernel undoes that and
//! every process runs on.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Range,
    time::{Duration, Instant},
};

use protocol::pages::{self, end_of_block, stream_of};

use crate::{
    areas::{self, Depth, Untracked},
    copier::{Copier, Sink},
    ranges::Ranges,
    space::{self, Copied, Lost, Seen, Space},
};

/// A process of the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Member {
    /// Its pid here.
    pub pid: i32,
    /// Place of its container.
    pub container: u32,
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The sink took nothing more.
    #[error("failed to hand over pages")]
    Sink(#[source] io::Error),
    /// A frozen process has a page that cannot be read.
    #[error("the page at {1:#x} of process {0} cannot be read")]
    Page(i32, u64),
    /// The memory of a frozen process could not be looked at.
    #[error("failed to look at the memory of process {0}")]
    Look(i32, #[source] io::Error),
    /// A process is not tracked, yet its memory is: CRIU would leave it out.
    #[error("the memory of process {0} is tracked as that of another")]
    Foreign(i32),
    /// More address spaces than numbers.
    #[error("too many processes came and went")]
    TooMany,
}

/// What a round did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Round {
    /// Bytes of held pages in tracked areas.
    pub held: u64,
    /// Bytes of dirty pages.
    pub dirty: u64,
    /// Bytes that were sent: without pages of zeros.
    pub sent: u64,
    /// Bytes that the target must forget.
    pub forgotten: u64,
    /// Pages that could not be read, in bytes.
    pub failed: u64,
    /// Processes.
    pub processes: usize,
    /// How long the look at all pages took.
    pub looked: Duration,
    /// How long the copy took.
    pub copied: Duration,
}

/// All processes of a pod.
#[derive(Debug, Default)]
pub struct Tracker {
    spaces: BTreeMap<i32, Space>,
    untracked: BTreeMap<i32, Untracked>,
    /// What the target still has of address spaces that are not followed any more.
    left: Vec<(u32, Ranges)>,
    next: u32,
    longest_stop: Duration,
}

impl Tracker {
    /// Follows nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Why processes are left to CRIU, as of the last round.
    #[must_use]
    pub fn untracked(&self) -> &BTreeMap<i32, Untracked> {
        &self.untracked
    }

    /// The longest time for which a thread of the pod was stopped.
    #[must_use]
    pub fn longest_stop(&self) -> Duration {
        self.longest_stop
    }

    /// The address spaces.
    pub fn spaces(&self) -> impl Iterator<Item = &Space> {
        self.spaces.values()
    }

    /// One round while the pod runs: what was written since the last one is protected again and copied to the sinks, one
    /// thread each.
    ///
    /// # Errors
    /// [`Error::Sink`], [`Error::TooMany`]. The round is of no use then, nor is what the target has.
    pub fn round<S: Sink + Send>(&mut self, members: &[Member], sinks: &mut [S]) -> Result<Round, Error> {
        let started = Instant::now();
        self.attach(members)?;
        let mut seen = Vec::new();
        let mut gone = Vec::new();
        for (pid, space) in &mut self.spaces {
            match space.follow_map().and_then(|()| space.look_and_protect()) {
                Ok(one) => seen.push((*pid, one)),
                Err(why) => gone.push((*pid, why)),
            }
        }
        for (pid, why) in gone {
            self.let_go(pid, why);
        }
        let looked = started.elapsed();
        self.copy(&seen, sinks, looked)
    }

    /// The pod is frozen: from now on every process is either tracked as it is, or not at all. CRIU may look at the page
    /// maps when this has returned.
    ///
    /// # Errors
    /// [`Error::Foreign`]: nothing must be tracked when CRIU looks; drop this, and let CRIU take all.
    pub fn settle(&mut self, members: &[Member]) -> Result<(), Error> {
        self.only_present(members);
        let lost: Vec<(i32, Lost)> = self
            .spaces
            .iter_mut()
            .filter_map(|(pid, space)| space.follow_map_at_last().err().map(|why| (*pid, why)))
            .collect();
        for (pid, why) in lost {
            self.let_go(pid, why);
        }
        for member in members {
            if self.spaces.contains_key(&member.pid) {
                continue;
            }
            self.untracked.entry(member.pid).or_insert(Untracked::Late);
            let foreign = areas::look(member.pid, Depth::Quick(&Ranges::new()))
                .and_then(|look| space::any_tracked(member.pid, &look));
            if foreign.map_err(|e| Error::Look(member.pid, e))? {
                return Err(Error::Foreign(member.pid));
            }
        }
        Ok(())
    }

    /// The last round, of the frozen pod, after [`Tracker::settle`].
    ///
    /// # Errors
    /// See [`Error`]; the target must not restore then.
    pub fn last_round<S: Sink + Send>(&mut self, sinks: &mut [S]) -> Result<Round, Error> {
        let started = Instant::now();
        let mut seen = Vec::new();
        for (pid, space) in &mut self.spaces {
            seen.push((*pid, space.look_at_last().map_err(|e| Error::Look(*pid, e))?));
        }
        let looked = started.elapsed();
        let mut failed = None;
        let round = self.copy_and(&seen, sinks, looked, |pid, copied| {
            if let Some(page) = copied.failed.as_slice().first() {
                failed.get_or_insert((pid, page.start));
            }
        })?;
        match failed {
            Some((pid, page)) => Err(Error::Page(pid, page)),
            None => Ok(round),
        }
    }

    /// What the target is told of each address space, after the last round.
    #[must_use]
    pub fn finals(&self) -> Vec<pages::Space> {
        self.spaces
            .values()
            .map(|space| pages::Space {
                space: space.number(),
                container: space.container(),
                vpid: space.vpid(),
                areas: space.areas().to_vec(),
                runs: space.stored().as_slice().to_vec(),
                hot: space.hot(),
            })
            .collect()
    }

    fn attach(&mut self, members: &[Member]) -> Result<(), Error> {
        self.only_present(members);
        let direct: Vec<(i32, String)> = self
            .spaces
            .keys()
            .filter_map(|pid| Some((*pid, areas::direct_io(*pid)?)))
            .collect();
        for (pid, file) in direct {
            self.let_go(pid, Lost::Untracked(Untracked::DirectIo(file)));
        }
        for member in members {
            if self.spaces.contains_key(&member.pid) || self.is_given_up(member.pid) {
                continue;
            }
            if self.next >= protocol::pages::SPACES {
                return Err(Error::TooMany);
            }
            match Space::attach(self.next, member.container, member.pid) {
                Ok(space) => {
                    self.next += 1;
                    self.longest_stop = self.longest_stop.max(space.stopped_for());
                    self.untracked.remove(&member.pid);
                    self.spaces.insert(member.pid, space);
                }
                Err(why) => self.let_go(member.pid, why),
            }
        }
        Ok(())
    }

    fn only_present(&mut self, members: &[Member]) {
        let present: BTreeSet<i32> = members.iter().map(|m| m.pid).collect();
        let gone: Vec<i32> = self.spaces.keys().copied().filter(|p| !present.contains(p)).collect();
        for pid in gone {
            self.let_go(pid, Lost::Gone);
        }
        self.untracked.retain(|pid, _| present.contains(pid));
    }

    /// What never passes: no use to try again in every round.
    fn is_given_up(&self, pid: i32) -> bool {
        matches!(
            self.untracked.get(&pid),
            Some(Untracked::DirectIo(_) | Untracked::Aio | Untracked::ShadowStack | Untracked::Refused(_))
        )
    }

    fn let_go(&mut self, pid: i32, why: Lost) {
        if let Some(space) = self.spaces.remove(&pid) {
            self.left.push((space.number(), space.stored().clone()));
        }
        match why {
            Lost::Gone => {}
            Lost::Untracked(why) => {
                tracing::debug!(pid, %why, "a process is left to CRIU");
                self.untracked.insert(pid, why);
            }
        }
    }

    fn copy<S: Sink + Send>(
        &mut self,
        seen: &[(i32, Seen)],
        sinks: &mut [S],
        looked: Duration,
    ) -> Result<Round, Error> {
        self.copy_and(seen, sinks, looked, |_, _| {})
    }

    fn copy_and<S: Sink + Send>(
        &mut self,
        seen: &[(i32, Seen)],
        sinks: &mut [S],
        looked: Duration,
        mut also: impl FnMut(i32, &Copied),
    ) -> Result<Round, Error> {
        let started = Instant::now();
        let count = u32::try_from(sinks.len()).unwrap_or(1);
        let spaces = &self.spaces;
        let parts: Vec<io::Result<Part>> = std::thread::scope(|scope| {
            let threads: Vec<_> = sinks
                .iter_mut()
                .zip(0u32..)
                .map(|(sink, stream)| scope.spawn(move || copy_part(spaces, seen, stream, count, sink)))
                .collect();
            let join = |t: std::thread::ScopedJoinHandle<'_, io::Result<Part>>| {
                t.join()
                    .unwrap_or_else(|_| Err(io::Error::other("a copying thread panicked")))
            };
            threads.into_iter().map(join).collect()
        });
        let mut round = Round {
            looked,
            processes: seen.len(),
            ..Round::default()
        };
        let mut all: Vec<Copied> = vec![Copied::default(); seen.len()];
        for part in parts {
            let part = part.map_err(Error::Sink)?;
            round.sent += part.sent;
            for (sum, one) in all.iter_mut().zip(part.copied) {
                sum.zeros = sum.zeros.union(&one.zeros);
                sum.failed = sum.failed.union(&one.failed);
            }
        }
        for ((pid, seen), copied) in seen.iter().zip(&all) {
            let Some(space) = self.spaces.get_mut(pid) else {
                continue;
            };
            also(*pid, copied);
            round.held += seen.held.bytes();
            round.dirty += seen.dirty.bytes();
            round.failed += copied.failed.bytes();
            let holes = space.note(seen, copied);
            self.left.push((space.number(), holes));
        }
        for (space, holes) in self.left.drain(..) {
            round.forgotten += holes.bytes();
            for (stream, sink) in (0u32..).zip(sinks.iter_mut()) {
                let own: Vec<Range<u64>> = part_of(&holes, space, stream, count).collect();
                if !own.is_empty() {
                    sink.holes(space, &own).map_err(Error::Sink)?;
                }
            }
        }
        round.copied = started.elapsed();
        Ok(round)
    }
}

/// What one thread did: for each process that was seen.
struct Part {
    copied: Vec<Copied>,
    sent: u64,
}

fn copy_part(
    spaces: &BTreeMap<i32, Space>,
    seen: &[(i32, Seen)],
    stream: u32,
    count: u32,
    sink: &mut dyn Sink,
) -> io::Result<Part> {
    let mut copier = Copier::default();
    let mut copied = Vec::with_capacity(seen.len());
    for (pid, seen) in seen {
        let Some(space) = spaces.get(pid) else {
            copied.push(Copied::default());
            continue;
        };
        let own = part_of(&seen.dirty, space.number(), stream, count);
        copied.push(copier.copy(space.number(), *pid, own, sink)?);
    }
    sink.flush()?;
    Ok(Part {
        copied,
        sent: copier.sent(),
    })
}

/// The parts of a set that travel on one stream.
fn part_of(set: &Ranges, space: u32, stream: u32, count: u32) -> impl Iterator<Item = Range<u64>> {
    let blocks = move |range: &Range<u64>| {
        let mut at = range.start;
        let end = range.end;
        std::iter::from_fn(move || {
            let next = if count == 1 { end } else { end_of_block(at).min(end) };
            let block = (at < end).then_some(at..next);
            at = next;
            block
        })
    };
    set.as_slice()
        .iter()
        .flat_map(blocks)
        .filter(move |block| stream_of(space, block.start, count) == stream)
}
