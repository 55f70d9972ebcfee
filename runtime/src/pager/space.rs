//! An address space that is being filled, and the store that it is filled from.
//!
//! The gate: whoever puts pages holds it shared from choosing them until they are in place; whoever reads events holds it alone
//! from before the reading until they are heeded. The kernel refuses pages while an event is unread; the gate does the same for
//! an event that is read and not heeded. So no page is put where it does not belong any more.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use hostsys::kin::Entry;
use hostsys::missing_pages;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::Error;
use super::board::{Board, Word};
use super::book;
use super::holders::Holders;
use super::pending::{Pending, Piece};

/// What is put around a page that somebody waits for: who reads on finds it there.
const AROUND: u64 = 64 * 1024;
const ALL: Range<u64> = 0..u64::MAX;

/// The pages of one process, as it was moved; its children need them too.
#[derive(Debug)]
pub struct Store {
    pages: Option<Entry>,
    holders: Mutex<Holders>,
}

impl Store {
    /// With nobody who needs it; none where the process has no store.
    #[must_use]
    pub fn new(pages: Option<Entry>) -> Self {
        Self {
            pages,
            holders: Mutex::default(),
        }
    }

    /// Who needs which of its pages.
    pub fn holders(&self) -> MutexGuard<'_, Holders> {
        lock(&self.holders)
    }

    fn read(&self, piece: Piece, into: &mut [u8]) -> Result<(), Error> {
        let failed = |e: Errno| Error::Store(piece.store, e.into());
        let pages = self.pages.ok_or_else(|| failed(Errno::EBADF))?;
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = piece.store + done as u64;
            match nix::sys::uio::pread(pages, rest, i64::try_from(at).map_err(|_| failed(Errno::EOVERFLOW))?) {
                // Less than was promised is never filled up with zeros.
                Ok(0) => return Err(failed(Errno::ENODATA)),
                Ok(n) => done += n,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        Ok(())
    }

    /// Gives back what nobody needs any more. A failure costs memory until the end, nothing else.
    pub fn release(&self, pieces: &[Piece]) {
        let free = book::release(&mut self.holders(), pieces);
        let Some(pages) = self.pages else { return };
        for range in free {
            if let (Ok(start), Ok(len)) = (i64::try_from(range.start), i64::try_from(range.end - range.start)) {
                let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let _ = fallocate(pages, flags, start, len);
            }
        }
    }
}

#[derive(Debug, Default)]
struct Missing {
    pending: Pending,
    hot: VecDeque<Range<u64>>,
    /// Pages that are waited for and could not be put yet.
    waiting: Vec<u64>,
}

/// One address space.
#[derive(Debug)]
pub struct Space {
    /// Its number.
    pub number: u32,
    /// Its userfaultfd.
    pub fd: Entry,
    /// What it is filled from.
    pub store: Arc<Store>,
    gate: RwLock<()>,
    missing: Mutex<Missing>,
    gone: AtomicBool,
    page: u64,
}

/// What came of filling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// There was nothing to fill.
    Nothing,
    /// So many bytes.
    Bytes(u64),
    /// Not now: events have to be read first, or memory has to come free.
    Later,
}

/// Why putting ended.
enum Stop {
    Done,
    Changing,
    NoMemory,
    Gone,
    Refused(Errno),
}

impl Space {
    /// Of a process or a child. What is pending must be held in the store's holders.
    #[must_use]
    pub fn new(
        number: u32,
        fd: Entry,
        store: Arc<Store>,
        pending: Pending,
        hot: VecDeque<Range<u64>>,
        page: u64,
    ) -> Self {
        Self {
            number,
            fd,
            store,
            gate: RwLock::default(),
            missing: Mutex::new(Missing {
                pending,
                hot,
                waiting: Vec::new(),
            }),
            gone: AtomicBool::new(false),
            page,
        }
    }

    fn missing(&self) -> MutexGuard<'_, Missing> {
        lock(&self.missing)
    }

    /// Whether somebody waits for a page that could not be put yet.
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        !self.missing().waiting.is_empty()
    }

    /// Bytes that are missing.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.missing().pending.bytes()
    }

    /// Whether nothing is missing, nobody waits, and no child can come that misses something.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        // Most of the time the answer is no, and needs nobody to wait.
        if !self.missing().pending.is_empty() {
            return false;
        }
        let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let missing = self.missing();
        missing.pending.is_empty()
            && missing.waiting.is_empty()
            && (self.gone.load(Ordering::Acquire) || !missing_pages::is_changing(self.fd.as_fd()))
    }

    /// Fills a little, for nobody in particular. `hot`: only of what comes first.
    ///
    /// # Errors
    /// The store cannot be read, or the kernel refuses a page for good.
    pub fn fill(&self, board: &Board, buffer: &mut [u8], hot: bool) -> Result<Filled, Error> {
        let _shared = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let most = buffer.len() as u64;
        let chosen = {
            let mut missing = self.missing();
            let mut chosen = None;
            while chosen.is_none()
                && let Some(range) = missing.hot.front().cloned()
            {
                chosen = missing.pending.take_first(&range, most);
                if chosen.is_none() {
                    missing.hot.pop_front();
                }
            }
            if chosen.is_none() && !hot {
                chosen = missing.pending.take_first(&ALL, most);
            }
            chosen
        };
        match chosen {
            Some(piece) => self.put_piece(board, piece, buffer),
            None => Ok(Filled::Nothing),
        }
    }

    /// Puts a piece that was taken out of what is pending; what cannot be put goes back there. The gate is held.
    fn put_piece(&self, board: &Board, piece: Piece, buffer: &mut [u8]) -> Result<Filled, Error> {
        let len = usize::try_from(piece.len).unwrap_or(usize::MAX);
        let bytes = buffer.get_mut(..len).unwrap_or_default();
        if let Err(error) = self.store.read(piece, bytes) {
            self.missing().pending.put(piece);
            return Err(error);
        }
        let (done, stop) = self.put(piece.address, bytes);
        let rest = piece.part(done, u64::MAX);
        if rest.len > 0 {
            self.missing().pending.put(rest);
        }
        self.settle(board, &[piece.part(0, done)]);
        match stop {
            Stop::Done => Ok(Filled::Bytes(done)),
            Stop::Changing => Ok(Filled::Later),
            Stop::NoMemory => {
                // The pod is at its limit: the kernel reclaims, or kills as it would have killed at the source.
                std::thread::sleep(std::time::Duration::from_millis(1));
                Ok(Filled::Later)
            }
            Stop::Gone => {
                self.forget(board);
                Ok(Filled::Bytes(done))
            }
            Stop::Refused(errno) => Err(Error::Refused(rest.address, errno)),
        }
    }

    /// These pages are in place, or not needed any more.
    fn settle(&self, board: &Board, pieces: &[Piece]) {
        board.subtract(Word::Remaining, pieces.iter().map(|p| p.len).sum());
        self.store.release(pieces);
    }

    /// The process has ended, or runs another program.
    fn forget(&self, board: &Board) {
        self.gone.store(true, Ordering::Release);
        let pieces = {
            let mut missing = self.missing();
            missing.waiting.clear();
            missing.pending.take(&ALL)
        };
        self.settle(board, &pieces);
    }

    /// Puts pages in place; how many bytes need nothing more, and why not the rest.
    fn put(&self, address: u64, bytes: &[u8]) -> (u64, Stop) {
        let page = usize::try_from(self.page).unwrap_or(4096);
        let (mut done, mut most) = (0usize, bytes.len());
        let stop = loop {
            let end = bytes.len().min(done.saturating_add(most));
            let Some(next) = bytes.get(done..end).filter(|next| !next.is_empty()) else {
                break Stop::Done;
            };
            match missing_pages::copy(self.fd.as_fd(), address + done as u64, next) {
                (n, None) => {
                    done += n;
                    most = bytes.len();
                }
                (n, Some(_)) if n > 0 => done += n,
                // It is there: it was put for somebody who waited, or comes from the process itself.
                (_, Some(Errno::EEXIST)) => done += page,
                (_, Some(Errno::EAGAIN)) => break Stop::Changing,
                // Not all of it in one mapping; or, a single page, in none: its event has been read or it was never inherited.
                (_, Some(Errno::ENOENT)) if next.len() > page => most = (next.len() / 2 / page).max(1) * page,
                (_, Some(Errno::ENOENT)) => done += page,
                (_, Some(Errno::ENOMEM)) => break Stop::NoMemory,
                (_, Some(Errno::ESRCH | Errno::ENOSPC)) => break Stop::Gone,
                (_, Some(Errno::EINTR)) => {}
                (_, Some(errno)) => break Stop::Refused(errno),
            }
        };
        (done.min(bytes.len()) as u64, stop)
    }

    /// Reads and heeds what the kernel has to say. `heed` gets every event, in its order, with the gate held alone.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn hear(
        &self,
        board: &Board,
        buffer: &mut [u8],
        mut heed: impl FnMut(&Self, missing_pages::Message) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        loop {
            match board.read(self.number, self.fd.as_fd()) {
                Ok(0) => break,
                Ok(n) => {
                    for at in 0..n {
                        match board.message(at) {
                            missing_pages::Message::Fault { address } => {
                                self.missing().waiting.push(address & !(self.page - 1));
                            }
                            event => heed(self, event)?,
                        }
                    }
                    board.heeded();
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Read(error)),
            }
        }
        let waiting = std::mem::take(&mut self.missing().waiting);
        let begun = super::board::now();
        for address in waiting {
            if self.answer(board, address, buffer)? {
                board.note_fault(super::board::now().saturating_sub(begun));
            } else {
                self.missing().waiting.push(address);
            }
        }
        Ok(())
    }

    /// Answers one who waits for a page. False: not now. The gate is held alone, so nobody else has the page in hand.
    fn answer(&self, board: &Board, address: u64, buffer: &mut [u8]) -> Result<bool, Error> {
        let page = self.page;
        let most = AROUND.min(buffer.len() as u64);
        let found = self.missing().pending.take_first(&(address..address + page), page);
        let Some(piece) = found else {
            return self.answer_zero(board, address);
        };
        let answered = match self.put_piece(board, piece, buffer)? {
            Filled::Bytes(_) => true,
            Filled::Later => return Ok(false),
            Filled::Nothing => false,
        };
        // Where the page was there already, or its mapping is gone, nobody was woken.
        let _ = missing_pages::wake(self.fd.as_fd(), address, page);
        let next = address + page..address + most;
        let around = self.missing().pending.take_first(&next, most - page);
        match around {
            // What does not follow at once is not around it.
            Some(piece) if piece.address != next.start => self.missing().pending.put(piece),
            Some(piece) => drop(self.put_piece(board, piece, buffer)?),
            None => {}
        }
        Ok(answered)
    }

    fn answer_zero(&self, board: &Board, address: u64) -> Result<bool, Error> {
        match missing_pages::zero(self.fd.as_fd(), address, self.page) {
            Ok(()) => Ok(true),
            Err(Errno::EAGAIN | Errno::ENOMEM) => Ok(false),
            Err(Errno::EEXIST | Errno::ENOENT) => {
                let _ = missing_pages::wake(self.fd.as_fd(), address, self.page);
                Ok(true)
            }
            Err(Errno::ESRCH | Errno::ENOSPC) => {
                self.forget(board);
                Ok(true)
            }
            Err(errno) => Err(Error::Refused(address, errno)),
        }
    }

    /// Heeds a change. The gate is held alone.
    pub fn change(&self, board: &Board, change: book::Change) {
        let gone = book::heed(&mut self.missing().pending, change);
        self.settle(board, &gone);
    }

    /// The address space of a child that has just been forked. The gate is held alone.
    #[must_use]
    pub fn child(&self, number: u32, fd: Entry) -> Self {
        let (pending, hot) = {
            let missing = self.missing();
            let pending = book::fork(&missing.pending, &mut self.store.holders());
            (pending, missing.hot.clone())
        };
        Self::new(number, fd, Arc::clone(&self.store), pending, hot, self.page)
    }

    /// Lets everybody who waits ask again: what they have asked for may have been heard by one who is dead.
    pub fn wake_all(&self) {
        // The kernel refuses a range that goes beyond the address space, whose end depends on architecture and configuration.
        for bits in (32..=57).rev() {
            for end in [1u64 << bits, (1u64 << bits) - self.page] {
                let start = 1 << 20;
                if missing_pages::wake(self.fd.as_fd(), start, end - start).is_ok() {
                    return;
                }
            }
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
