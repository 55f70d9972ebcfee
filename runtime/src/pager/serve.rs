//! The pager itself: hears CRIU and the kernel in one thread, fills in others.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::Duration;

use hostsys::kin::Entry;
use hostsys::missing_pages::Message;
use hostsys::rights;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::unistd::{Whence, lseek};
use protocol::store_index::{self, StoreIndex};

use super::board::{Board, Record, State, Word, now};
use super::book::{self, Change};
use super::pending::Pending;
use super::space::{Filled, Space, Store, lock};
use super::{Error, Stage};

/// What CRIU says when all its processes are restored.
const FINISHED: u32 = 0x5253_5446;
/// A piece that is filled while nobody waits, and while somebody does: a thread that faults waits for one that is being put.
const PIECE: usize = 512 * 1024;
const PIECE_BETWEEN_FAULTS: usize = 64 * 1024;
/// So long after a fault others are expected.
const FAULTS_LINGER: u64 = 5_000;
/// Nobody has said that the bulk may be filled: the agent may be dead. By then no restorer is disturbed any more.
const FILL_ANYWAY: u64 = 1_000_000;
/// CRIU sends a descriptor right behind the pid.
const CRIU: Duration = Duration::from_secs(5);

/// Of a space that the pager before this one knew: its descriptor and store, what is missing, what of that comes first, and the
/// size of a page.
type Remembered = (Entry, Arc<Store>, Pending, VecDeque<Range<u64>>, u64);

/// What a readable descriptor is. In the low half of an event's data is its number.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Bell = 0,
    Listener = 1,
    Criu = 2,
    Space = 3,
}

fn tag(source: Source, number: usize) -> u64 {
    (source as u64) << 32 | number as u64
}

fn untag(data: u64) -> (Source, usize) {
    let number = usize::try_from(data & u64::from(u32::MAX)).unwrap_or(usize::MAX);
    let source = match data >> 32 {
        0 => Source::Bell,
        1 => Source::Listener,
        2 => Source::Criu,
        _ => Source::Space,
    };
    (source, number)
}

/// What the threads share.
struct Shared {
    stage: Arc<Stage>,
    spaces: RwLock<Vec<Arc<Space>>>,
    may_fill: Mutex<bool>,
    changed: Condvar,
    failed: Mutex<Option<Error>>,
    idle: AtomicBool,
}

impl Shared {
    fn board(&self) -> &Board {
        &self.stage.board
    }

    fn spaces(&self) -> Vec<Arc<Space>> {
        self.spaces.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn add(&self, space: Space) -> Arc<Space> {
        let space = Arc::new(space);
        self.board().add(Word::Remaining, space.bytes());
        let mut spaces = self.spaces.write().unwrap_or_else(PoisonError::into_inner);
        spaces.push(Arc::clone(&space));
        self.board().set(Word::Spaces, spaces.len() as u64);
        space
    }

    fn next_number(&self) -> u32 {
        let spaces = self.spaces.read().unwrap_or_else(PoisonError::into_inner);
        u32::try_from(spaces.len()).unwrap_or(u32::MAX)
    }
}

/// The thread that hears.
struct Pager {
    shared: Arc<Shared>,
    epoll: Epoll,
    /// Connections of CRIU: of which container, and whether it has finished.
    criu: HashMap<usize, usize>,
    finished: Vec<bool>,
    buffer: Vec<u8>,
}

/// Fills until all is in place.
///
/// # Errors
/// What it cannot get past. The pod must not go on then.
pub fn run(stage: &Arc<Stage>) -> Result<(), Error> {
    let mut pager = Pager::begin(stage)?;
    for _ in 0..stage.plan.threads.clamp(1, 64) {
        let shared = Arc::clone(&pager.shared);
        std::thread::Builder::new()
            .name("fill".into())
            .spawn(move || fill(&shared))
            .map_err(|e| Error::Kernel("start a thread", e))?;
    }
    pager.hear()
}

fn kernel(what: &'static str) -> impl FnOnce(Errno) -> Error {
    move |errno| Error::Kernel(what, errno.into())
}

impl Pager {
    fn begin(stage: &Arc<Stage>) -> Result<Self, Error> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(kernel("wait for events"))?;
        let mut pager = Self {
            shared: Arc::new(Shared {
                stage: Arc::clone(stage),
                spaces: RwLock::default(),
                may_fill: Mutex::default(),
                changed: Condvar::new(),
                failed: Mutex::default(),
                idle: AtomicBool::new(false),
            }),
            epoll,
            criu: HashMap::new(),
            finished: vec![false; stage.plan.containers.len()],
            buffer: vec![0; PIECE_BETWEEN_FAULTS],
        };
        pager.watch(stage.bell, Source::Bell, 0)?;
        if stage.board.state() == State::Waiting {
            for (container, listener) in stage.listeners.iter().enumerate() {
                pager.watch(*listener, Source::Listener, container)?;
            }
        } else {
            pager.remember()?;
        }
        Ok(pager)
    }

    fn watch(&self, entry: Entry, source: Source, number: usize) -> Result<(), Error> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, tag(source, number));
        self.epoll.add(entry, event).map_err(kernel("watch a descriptor"))
    }

    /// Learns what the pager before this one knew.
    fn remember(&mut self) -> Result<(), Error> {
        let board = &self.shared.stage.board;
        let records: Vec<Record> = board.records().collect();
        let mut all: Vec<Remembered> = Vec::new();
        for record in records {
            let at = |space: u32| usize::try_from(space).unwrap_or(usize::MAX);
            match record {
                Record::Arrive { fd, pages, index, .. } => {
                    let fd = Entry::of_number(fd).ok_or(Error::Lost)?;
                    let index = Entry::of_number(index).map(read_index).transpose()?.unwrap_or_default();
                    let pages = Entry::of_number(pages);
                    // What was given back is in place, or is not needed.
                    let left = match pages {
                        Some(pages) => still_there(pages, &index.runs)?,
                        None => Vec::new(),
                    };
                    let page = u64::from(index.page_size);
                    all.push((
                        fd,
                        Arc::new(Store::new(pages)),
                        Pending::of(left),
                        index.hot.into(),
                        page,
                    ));
                }
                Record::Fork { parent, fd } => {
                    let fd = Entry::of_number(fd).ok_or(Error::Lost)?;
                    let (_, store, pending, hot, page) = all.get(at(parent)).ok_or(Error::Lost)?;
                    all.push((fd, Arc::clone(store), pending.clone(), hot.clone(), *page));
                }
                Record::Drop { space, start, end } => {
                    let (_, _, pending, ..) = all.get_mut(at(space)).ok_or(Error::Lost)?;
                    book::heed(pending, Change::Drop { start, end });
                }
                Record::Move { space, from, to, len } => {
                    let (_, _, pending, ..) = all.get_mut(at(space)).ok_or(Error::Lost)?;
                    book::heed(pending, Change::Move { from, to, len });
                }
            }
        }
        board.set(Word::Remaining, 0);
        for (number, (fd, store, pending, hot, page)) in (0u32..).zip(all) {
            // Counted anew: what the last one had put but not given back yet is put again, refused, and given back then.
            {
                let mut holders = store.holders();
                pending.pieces().for_each(|piece| holders.hold(&piece.stored()));
            }
            let space = self
                .shared
                .add(Space::new(number, fd, store, pending, hot, page.max(4096)));
            self.watch(space.fd, Source::Space, usize::try_from(number).unwrap_or(usize::MAX))?;
        }
        let (number, messages) = board.left_over();
        if !messages.is_empty() {
            let space = usize::try_from(number).ok();
            let space = space
                .and_then(|n| self.shared.spaces().get(n).cloned())
                .ok_or(Error::Lost)?;
            for message in messages {
                heed(&self.shared, &self.epoll, &space, message)?;
            }
        }
        board.heeded();
        for space in self.shared.spaces() {
            space.wake_all();
        }
        Ok(())
    }

    fn hear(&mut self) -> Result<(), Error> {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            if self.may_fill() && self.is_complete() {
                return self.complete();
            }
            if let Some(error) = lock(&self.shared.failed).take() {
                return Err(error);
            }
            let spaces = self.shared.spaces();
            let waited_for: Vec<&Arc<Space>> = spaces.iter().filter(|s| s.is_waited_for()).collect();
            // A change that is under way, or memory that has to come free, is not announced.
            let timeout = if waited_for.is_empty() { 20u16 } else { 1 };
            let n = match self.epoll.wait(&mut events, EpollTimeout::from(timeout)) {
                Ok(n) => n,
                Err(Errno::EINTR) => 0,
                Err(errno) => return Err(kernel("wait for events")(errno)),
            };
            for space in waited_for {
                self.hear_space(space)?;
            }
            for event in events.iter().take(n) {
                let (source, number) = untag(event.data());
                match source {
                    Source::Bell => self.ring(),
                    Source::Listener => self.accept(number)?,
                    Source::Criu => self.hear_criu(number)?,
                    Source::Space => {
                        if let Some(space) = spaces
                            .get(number)
                            .cloned()
                            .or_else(|| self.shared.spaces().get(number).cloned())
                        {
                            self.hear_space(&space)?;
                        }
                    }
                }
            }
        }
    }

    fn ring(&self) {
        // Only that it rang counts; who rang has written to the board before.
        let mut count = [0; 8];
        let _ = nix::unistd::read(self.shared.stage.bell, &mut count);
    }

    fn may_fill(&self) -> bool {
        let board = self.shared.board();
        if board.state() != State::Filling {
            return false;
        }
        let overdue = now().saturating_sub(board.get(Word::RestoredAt)) > FILL_ANYWAY;
        if board.get(Word::Fill) == 0 && !overdue {
            return false;
        }
        let mut may = lock(&self.shared.may_fill);
        if !*may {
            *may = true;
            self.shared.changed.notify_all();
        }
        true
    }

    fn is_complete(&self) -> bool {
        self.shared.spaces().iter().all(|space| space.is_complete())
    }

    fn complete(&self) -> Result<(), Error> {
        let board = self.shared.board();
        let took = now().saturating_sub(board.get(Word::RestoredAt)) / 1000;
        board.set(Word::FillMilliseconds, took);
        board.set_state(State::Filled);
        Ok(())
    }

    fn hear_space(&mut self, space: &Arc<Space>) -> Result<(), Error> {
        let (shared, epoll) = (Arc::clone(&self.shared), &self.epoll);
        space.hear(shared.board(), &mut self.buffer, |space, message| {
            heed(&shared, epoll, space, message)
        })
    }

    fn accept(&mut self, container: usize) -> Result<(), Error> {
        let Some(listener) = self.shared.stage.listeners.get(container) else {
            return Ok(());
        };
        match nix::sys::socket::accept4(listener.as_fd().as_raw_fd(), nix::sys::socket::SockFlag::SOCK_CLOEXEC) {
            Ok(number) => {
                let connection = Entry::of_number(number).ok_or(Error::Lost)?;
                let wait = nix::sys::time::TimeVal::new(i64::try_from(CRIU.as_secs()).unwrap_or(5), 0);
                nix::sys::socket::setsockopt(&connection, nix::sys::socket::sockopt::ReceiveTimeout, &wait)
                    .map_err(kernel("limit a wait"))?;
                let number = usize::try_from(number).unwrap_or(usize::MAX);
                self.criu.insert(number, container);
                self.watch(connection, Source::Criu, number)
            }
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => Ok(()),
            Err(errno) => Err(kernel("accept CRIU's connection")(errno)),
        }
    }

    /// CRIU says a pid and sends its descriptor, for every process; then that all is restored.
    fn hear_criu(&mut self, number: usize) -> Result<(), Error> {
        let Some(&container) = self.criu.get(&number) else {
            return Ok(());
        };
        let connection = i32::try_from(number)
            .ok()
            .and_then(Entry::of_number)
            .ok_or(Error::Lost)?;
        let mut said = [0; 4];
        let mut have = 0;
        while let Some(rest) = said.get_mut(have..).filter(|rest| !rest.is_empty()) {
            match nix::unistd::read(connection, rest) {
                Ok(0) => {
                    self.criu.remove(&number);
                    let _ = self.epoll.delete(connection);
                    connection.close();
                    return match self.finished.get(container) {
                        Some(true) => Ok(()),
                        _ => Err(Error::RestoreEnded),
                    };
                }
                Ok(n) => have += n,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(kernel("hear CRIU")(errno)),
            }
        }
        if u32::from_ne_bytes(said) == FINISHED {
            if let Some(finished) = self.finished.get_mut(container) {
                *finished = true;
            }
            if self.finished.iter().all(|finished| *finished) {
                let board = self.shared.board();
                board.set(Word::RestoredAt, now());
                board.set_state(State::Filling);
            }
            return Ok(());
        }
        match u32::try_from(i32::from_ne_bytes(said)) {
            Ok(vpid) => {
                let mut byte = [0];
                let (_, fd) =
                    rights::receive(connection.as_fd(), &mut byte).map_err(|e| Error::Kernel("hear CRIU", e))?;
                let fd = fd.ok_or(Error::NoDescriptor(vpid))?;
                self.arrive(container, vpid, Entry::of(fd))
            }
            // A dead process that waits for its parent: it has no memory.
            Err(_) => Ok(()),
        }
    }

    fn arrive(&mut self, container: usize, vpid: u32, fd: Entry) -> Result<(), Error> {
        let stage = Arc::clone(&self.shared.stage);
        let folder = stage
            .plan
            .containers
            .get(container)
            .map(|c| c.store.clone())
            .unwrap_or_default();
        let folder = Path::new(&folder);
        let (index, files) = match open(&folder.join(store_index::index_file(vpid)), false)? {
            Some(file) => {
                let path = folder.join(store_index::pages_file(vpid));
                let pages = open(&path, true)?.ok_or_else(|| Error::File(path, Errno::ENOENT.into()))?;
                (read_index(file)?, Some((file, pages)))
            }
            // Its memory was all in CRIU's images, and what was not is zeros.
            None => (StoreIndex::default(), None),
        };
        let pending = Pending::of(index.runs.iter().cloned());
        let store = Store::new(files.map(|(_, pages)| pages));
        pending.pieces().for_each(|piece| store.holders().hold(&piece.stored()));
        let board = &stage.board;
        board.add(Word::Total, index.bytes());
        let number = self.shared.next_number();
        board.keep(Record::Arrive {
            container: u32::try_from(container).unwrap_or(u32::MAX),
            vpid,
            fd: fd.number(),
            pages: files.map_or(-1, |(_, pages)| pages.number()),
            index: files.map_or(-1, |(file, _)| file.number()),
        });
        let page = u64::from(index.page_size.max(stage.page));
        let space = Space::new(number, fd, Arc::new(store), pending, index.hot.into(), page);
        let space = self.shared.add(space);
        self.watch(space.fd, Source::Space, usize::try_from(number).unwrap_or(usize::MAX))
    }
}

/// Heeds an event: first it is kept, then done.
fn heed(shared: &Shared, epoll: &Epoll, space: &Space, message: Message) -> Result<(), Error> {
    let board = shared.board();
    let number = space.number;
    match message {
        Message::Remove { start, end } | Message::Unmap { start, end } => {
            board.keep(Record::Drop {
                space: number,
                start,
                end,
            });
            space.change(board, Change::Drop { start, end });
        }
        Message::Remap { from, to, len } => {
            board.keep(Record::Move {
                space: number,
                from,
                to,
                len,
            });
            space.change(board, Change::Move { from, to, len });
        }
        Message::Fork { child } => {
            let fd = Entry::of_number(child).ok_or(Error::Lost)?;
            board.keep(Record::Fork {
                parent: number,
                fd: child,
            });
            let child = shared.add(space.child(shared.next_number(), fd));
            let event = EpollEvent::new(
                EpollFlags::EPOLLIN,
                tag(Source::Space, usize::try_from(child.number).unwrap_or(usize::MAX)),
            );
            epoll.add(fd, event).map_err(kernel("watch a descriptor"))?;
            shared.changed.notify_all();
        }
        Message::Fault { .. } => {}
        // It would have to be heeded, and nobody knows how.
        Message::Unknown(kind) => return Err(Error::Unknown(kind)),
    }
    Ok(())
}

/// Fills in the background, once that is allowed.
fn fill(shared: &Shared) {
    let mut buffer = vec![0; PIECE];
    loop {
        {
            let mut may = lock(&shared.may_fill);
            while !*may {
                may = shared.changed.wait(may).unwrap_or_else(PoisonError::into_inner);
            }
        }
        match fill_some(shared, &mut buffer) {
            Ok(Filled::Bytes(_)) => shared.idle.store(false, Ordering::Release),
            // Whoever reads the events needs the gate, and a processor.
            Ok(Filled::Later) => std::thread::sleep(Duration::from_micros(100)),
            Ok(Filled::Nothing) => {
                if !shared.idle.swap(true, Ordering::AcqRel) {
                    shared.stage.ring();
                }
                let may = lock(&shared.may_fill);
                let _ = shared.changed.wait_timeout(may, Duration::from_millis(20));
            }
            Err(error) => {
                lock(&shared.failed).get_or_insert(error);
                shared.stage.ring();
                return;
            }
        }
    }
}

/// First what is hot, in all processes; then the rest, parents before their children, which often run another program soon.
fn fill_some(shared: &Shared, buffer: &mut [u8]) -> Result<Filled, Error> {
    let board = shared.board();
    let faulting = now().saturating_sub(board.get(Word::LastFault)) < FAULTS_LINGER;
    let most = if faulting { PIECE_BETWEEN_FAULTS } else { PIECE };
    let buffer = buffer.get_mut(..most).unwrap_or_default();
    let spaces = shared.spaces();
    let mut later = false;
    for hot in [true, false] {
        for space in &spaces {
            match space.fill(board, buffer, hot)? {
                Filled::Bytes(n) => return Ok(Filled::Bytes(n)),
                Filled::Later => later = true,
                Filled::Nothing => {}
            }
        }
    }
    Ok(if later { Filled::Later } else { Filled::Nothing })
}

fn open(path: &Path, write: bool) -> Result<Option<Entry>, Error> {
    match std::fs::File::options().read(true).write(write).open(path) {
        Ok(file) => Ok(Some(Entry::of(file.into()))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::File(path.to_owned(), e)),
    }
}

fn read_index(file: Entry) -> Result<StoreIndex, Error> {
    let mut bytes = Vec::new();
    let mut piece = vec![0; 256 * 1024];
    loop {
        let at = i64::try_from(bytes.len()).unwrap_or(i64::MAX);
        match nix::sys::uio::pread(file, &mut piece, at) {
            Ok(0) => break,
            Ok(n) => bytes.extend_from_slice(piece.get(..n).unwrap_or_default()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(kernel("read the index of a store")(errno)),
        }
        if bytes.len() > store_index::MAX_BYTES {
            return Err(Error::Index(store_index::Error::CutOff));
        }
    }
    StoreIndex::parse(&bytes).map_err(Error::Index)
}

/// The parts of these ranges that were not given back.
fn still_there(pages: Entry, runs: &[Range<u64>]) -> Result<Vec<Range<u64>>, Error> {
    let seek = |at: u64, whence| {
        let at = i64::try_from(at).map_err(|_| Errno::EOVERFLOW)?;
        match lseek(pages, at, whence) {
            Ok(found) => Ok(u64::try_from(found).ok()),
            // Nothing but a hole until the end.
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(errno),
        }
    };
    let mut found = Vec::new();
    for run in runs {
        let mut at = run.start;
        while at < run.end {
            let data = seek(at, Whence::SeekData).map_err(kernel("look what a store has"))?;
            let Some(start) = data.filter(|start| *start < run.end) else {
                break;
            };
            let hole = seek(start, Whence::SeekHole).map_err(kernel("look what a store has"))?;
            let end = hole.unwrap_or(run.end).min(run.end);
            found.push(start..end);
            at = end;
        }
    }
    Ok(found)
}
