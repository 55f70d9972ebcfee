//! One tracked address space: what of it is held, what is dirty, and what the target has of it.
//!
//! Rule that every round keeps: a held page is on the target, or known to be zero, or dirty. So whatever goes wrong in a
//! round (an area that changes while it is looked at, a page that cannot be read) only makes a page dirty once more.

use std::{collections::VecDeque, io, ops::Range};

use hostsys::{
    pagemap::{Pagemap, Region, TRACKED, WRITTEN},
    userfaultfd::Userfaultfd,
};
use nix::errno::Errno;

use crate::{
    areas::{self, Depth, Look, Untracked},
    ranges::Ranges,
};

/// Rounds whose dirty pages are filled first on the target.
const HOT_ROUNDS: usize = 3;

/// Why an address space is not followed any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// The process has ended, or executes another program.
    #[error("the address space is gone")]
    Gone,
    /// The process lives and must be left to CRIU.
    #[error("{0}")]
    Untracked(Untracked),
}

/// What a look at all pages found.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// What is to be copied.
    pub dirty: Ranges,
    /// What is there at all.
    pub held: Ranges,
}

/// What became of the dirty pages.
#[derive(Clone, Debug, Default)]
pub struct Copied {
    /// They were zero, and were not sent.
    pub zeros: Ranges,
    /// They could not be read.
    pub failed: Ranges,
}

/// One address space of a process.
#[derive(Debug)]
pub struct Space {
    number: u32,
    pid: i32,
    vpid: u32,
    container: u32,
    uffd: Userfaultfd,
    areas: Vec<Range<u64>>,
    /// Mappings that a fork wipes, as of the last close look: known in the freeze without another one.
    wiped: Ranges,
    stacks: Vec<Range<u64>>,
    stored: Ranges,
    zero: Ranges,
    recent: VecDeque<Ranges>,
}

impl Space {
    /// Begins to follow a process. Its pages are all dirty.
    ///
    /// # Errors
    /// See [`Lost`].
    pub fn attach(number: u32, container: u32, pid: i32) -> Result<Self, Lost> {
        let look = areas::look(pid, Depth::All).map_err(|_| Lost::Gone)?;
        if let Some(why) = look.untracked {
            return Err(Lost::Untracked(why));
        }
        if let Some(file) = areas::direct_io(pid) {
            return Err(Lost::Untracked(Untracked::DirectIo(file)));
        }
        let vpid = areas::vpid(pid).map_err(|_| Lost::Gone)?;
        // Between vfork and exec a child has its parent's memory: tracked under the parent, it would be dropped with the child.
        if any_tracked(pid, &look).map_err(|_| Lost::Gone)? {
            return Err(Lost::Untracked(Untracked::Shared));
        }
        let uffd = Userfaultfd::in_process(pid).map_err(|error| match error {
            hostsys::userfaultfd::Error::Open(..) => Lost::Gone,
            error => Lost::Untracked(Untracked::Refused(chain(&error))),
        })?;
        tracing::debug!(pid, number, stopped = ?uffd.stopped_for(), "a process is followed");
        Ok(Self {
            number,
            pid,
            vpid,
            container,
            uffd,
            areas: Vec::new(),
            wiped: Ranges::new(),
            stacks: Vec::new(),
            stored: Ranges::new(),
            zero: Ranges::new(),
            recent: VecDeque::new(),
        })
    }

    /// Its number, used once.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The process, as CRIU names it.
    #[must_use]
    pub fn vpid(&self) -> u32 {
        self.vpid
    }

    /// Place of its container.
    #[must_use]
    pub fn container(&self) -> u32 {
        self.container
    }

    /// The tracked areas, as of the last look.
    #[must_use]
    pub fn areas(&self) -> &[Range<u64>] {
        &self.areas
    }

    /// For how long a thread of it was stopped to begin with.
    #[must_use]
    pub fn stopped_for(&self) -> std::time::Duration {
        self.uffd.stopped_for()
    }

    /// What the target has of it, once all that was sent has arrived.
    #[must_use]
    pub fn stored(&self) -> &Ranges {
        &self.stored
    }

    /// What to fill first on the target: the stacks, and what was written last.
    #[must_use]
    pub fn hot(&self) -> Vec<Range<u64>> {
        let stacks: Ranges = self.stacks.iter().cloned().collect();
        let mut taken = Ranges::new();
        let mut hot = Vec::new();
        for set in std::iter::once(&stacks).chain(&self.recent) {
            let new = set.intersect(&self.stored).subtract(&taken);
            taken = taken.union(&new);
            hot.extend(new.into_vec());
        }
        hot
    }

    /// Tracks what is new in its memory map and lets go what must not be tracked.
    ///
    /// # Errors
    /// See [`Lost`].
    pub fn follow_map(&mut self) -> Result<(), Lost> {
        let look = areas::look(self.pid, Depth::All).map_err(|_| Lost::Gone)?;
        self.wiped = look.wiped.iter().cloned().collect();
        self.follow(look)
    }

    fn follow(&mut self, look: Look) -> Result<(), Lost> {
        if let Some(why) = look.untracked {
            return Err(Lost::Untracked(why));
        }
        for area in &look.excluded {
            // Not registered, or gone: nothing to let go.
            let _ = self.uffd.unregister(area.start, area.end);
        }
        self.stacks = look.stacks;
        self.areas.clear();
        let mut map = Pagemap::of(self.pid).map_err(|_| Lost::Gone)?;
        for area in look.areas {
            // What is tracked is left alone: an area that the kernel has let go since is then found by the scan.
            if map.is_tracked(area.start).map_err(|_| Lost::Gone)? {
                self.areas.push(area);
                continue;
            }
            let registered = self.uffd.register(area.start, area.end);
            match registered.and_then(|()| self.uffd.forget_marks(area.start, area.end)) {
                Ok(()) => self.areas.push(area),
                Err(Errno::EBUSY) => return Err(Lost::Untracked(Untracked::Shared)),
                Err(_) if self.uffd.is_gone() => return Err(Lost::Gone),
                // It has changed since the map was read: the next round sees it.
                Err(error) => tracing::debug!(pid = self.pid, ?area, %error, "an area is not tracked in this round"),
            }
        }
        Ok(())
    }

    /// As [`Space::follow_map`] for a frozen process: what is not tracked now is CRIU's.
    ///
    /// # Errors
    /// See [`Lost`]. The process must be left to CRIU as a whole then: let this go before CRIU looks.
    pub fn follow_map_at_last(&mut self) -> Result<(), Lost> {
        let look = areas::look(self.pid, Depth::Quick(&self.wiped)).map_err(|_| Lost::Gone)?;
        // While it ran, a mapping may have been replaced between the look at the map and its registration: then something is
        // tracked that is not ours, whatever it is, and CRIU would leave it out.
        for area in &look.others {
            let _ = self.uffd.unregister(area.start, area.end);
        }
        self.follow(look)?;
        if self.uffd.is_gone() {
            return Err(Lost::Gone);
        }
        // An area that could not be registered is not tracked, so CRIU takes it. One that is tracked and not in the map's
        // list would be taken by nobody.
        let mut map = Pagemap::of(self.pid).map_err(|_| Lost::Gone)?;
        match self.areas.first() {
            // The descriptor may be that of another address space: of a parent, after vfork and exec.
            Some(_) if !self.areas_are_tracked(&mut map) => Err(Lost::Untracked(Untracked::Late)),
            _ => Ok(()),
        }
    }

    fn areas_are_tracked(&self, map: &mut Pagemap) -> bool {
        // A stack always holds something, and is enough to tell two address spaces apart.
        let mut found = Vec::new();
        let looked = self
            .stacks
            .iter()
            .try_for_each(|s| map.held(s.start, s.end, &mut found));
        looked.is_ok() && found.iter().all(|r| r.flags & TRACKED != 0)
    }

    /// Looks at all pages and protects what was written.
    ///
    /// # Errors
    /// [`Lost::Gone`].
    pub fn look_and_protect(&mut self) -> Result<Seen, Lost> {
        let mut map = Pagemap::of(self.pid).map_err(|_| Lost::Gone)?;
        let mut found = Vec::new();
        let mut followed = self.areas.is_empty();
        for area in &self.areas {
            // Not tracked: the area was replaced by another since it was registered. The next round registers that.
            followed |= map
                .held_and_protect(area.start, area.end, &mut found)
                .map_err(|_| Lost::Gone)?;
        }
        if !followed {
            // None of what we registered is tracked in this process: it executes another program by now.
            return Err(Lost::Gone);
        }
        Ok(self.judge(&found))
    }

    /// Looks at all pages of a frozen process.
    ///
    /// # Errors
    /// Something there is not tracked that should be.
    pub fn look_at_last(&mut self) -> io::Result<Seen> {
        let mut map = Pagemap::of(self.pid)?;
        let mut found = Vec::new();
        for area in &self.areas {
            map.held(area.start, area.end, &mut found)?;
        }
        match found.iter().find(|r| r.flags & TRACKED == 0) {
            Some(region) => Err(io::Error::other(format!(
                "the memory of process {} at {:#x}-{:#x} is not tracked",
                self.pid, region.start, region.end
            ))),
            None => Ok(self.judge(&found)),
        }
    }

    fn judge(&self, found: &[Region]) -> Seen {
        let held: Ranges = found.iter().map(|r| r.start..r.end).collect();
        let is_dirty = |r: &&Region| r.flags & WRITTEN != 0 || r.flags & TRACKED == 0;
        let written: Ranges = found.iter().filter(is_dirty).map(|r| r.start..r.end).collect();
        let missing = held.subtract(&self.stored).subtract(&self.zero);
        Seen {
            dirty: written.union(&missing),
            held,
        }
    }

    /// Takes note of what was sent; gives what the target must forget.
    pub fn note(&mut self, seen: &Seen, copied: &Copied) -> Ranges {
        let sent = seen.dirty.subtract(&copied.zeros).subtract(&copied.failed);
        let stored = self.stored.intersect(&seen.held).subtract(&seen.dirty).union(&sent);
        let holes = self.stored.subtract(&stored);
        self.zero = self
            .zero
            .intersect(&seen.held)
            .subtract(&seen.dirty)
            .union(&copied.zeros);
        self.stored = stored;
        self.recent.push_front(sent);
        self.recent.truncate(HOT_ROUNDS);
        holes
    }
}

/// Whether any page of a process is tracked, by whomever.
pub(crate) fn any_tracked(pid: i32, look: &Look) -> io::Result<bool> {
    let mut map = Pagemap::of(pid)?;
    let mut found = Vec::new();
    for area in look.areas.iter().chain(&look.excluded) {
        found.clear();
        map.held(area.start, area.end, &mut found)?;
        if found.iter().any(|r| r.flags & TRACKED != 0) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
