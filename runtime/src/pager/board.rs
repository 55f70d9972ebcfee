//! What guardian, deputy and pager share and what outlives each of them: counters, the messages that are being heeded, and
//! all that was heard so far, from which a new pager knows as much as the one before it.
//!
//! A message is taken out of the kernel by reading it, so it is read into the board. Who is killed between reading and heeding
//! leaves it there; how many of them were heeded is known by the records that they have made.

use std::sync::atomic::{AtomicU64, Ordering};

use hostsys::missing_pages::{self, MESSAGE_WORDS, Message};
use hostsys::shared_words::SharedWords;
use protocol::pager::{Phase, Status};

/// Most messages that are read at once.
pub const MESSAGES: usize = 16;
/// Most records. Without more room a pager that is killed cannot be started again.
pub const RECORDS: usize = 1 << 21;
const INBOX: usize = 64;
const LOG: usize = INBOX + MESSAGES * MESSAGE_WORDS;
const RECORD_WORDS: usize = 4;

/// Words with a meaning of their own.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
pub enum Word {
    /// See [`State`].
    State,
    /// The bulk may be filled.
    Fill,
    /// Number of records.
    Records,
    /// There was no room for a record.
    Overflow,
    /// Messages were read, or are just being read, and not all were heeded.
    InboxOpen,
    /// The address space that they are of.
    InboxSpace,
    /// Number of records when they were read.
    InboxBase,
    /// Bytes of all stores.
    Total,
    /// Bytes that are missing.
    Remaining,
    /// Pages that were waited for.
    Faults,
    /// The longest wait, in microseconds.
    Longest,
    /// Address spaces.
    Spaces,
    /// Pagers that were started again.
    Restarts,
    /// When all was restored, in microseconds of the monotonic clock.
    RestoredAt,
    /// From then until all was filled, in milliseconds.
    FillMilliseconds,
    /// When a page was last waited for, in microseconds of the monotonic clock.
    LastFault,
}

/// How far the pager is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum State {
    /// CRIU has not finished yet. A pager that is killed now cannot be started again: descriptors may be on their way.
    Waiting = 0,
    /// All processes are known.
    Filling = 1,
    /// Everything is in place.
    Filled = 2,
    /// The pager has met something that it cannot get past.
    Failed = 3,
    /// The guardian kills, or has killed.
    Killed = 4,
}

/// Something that was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// A restored process. Descriptors are numbers in the shared table, -1 where there is none.
    Arrive {
        /// Its container.
        container: u32,
        /// Its pid there.
        vpid: u32,
        /// Its userfaultfd.
        fd: i32,
        /// Its store.
        pages: i32,
        /// The store's index.
        index: i32,
    },
    /// A child of an address space.
    Fork {
        /// Number of the parent's.
        parent: u32,
        /// The child's userfaultfd.
        fd: i32,
    },
    /// Memory was dropped or unmapped.
    Drop {
        /// Where.
        space: u32,
        /// First byte.
        start: u64,
        /// Behind the last byte.
        end: u64,
    },
    /// Memory has moved.
    Move {
        /// Where.
        space: u32,
        /// From here.
        from: u64,
        /// To here.
        to: u64,
        /// So many bytes.
        len: u64,
    },
}

fn pair(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

fn halves(word: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = word.to_be_bytes();
    (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]))
}

impl Record {
    fn encode(self) -> [u64; RECORD_WORDS] {
        match self {
            Self::Arrive {
                container,
                vpid,
                fd,
                pages,
                index,
            } => [
                pair(container, 1),
                u64::from(vpid),
                pair(fd.cast_unsigned(), pages.cast_unsigned()),
                u64::from(index.cast_unsigned()),
            ],
            Self::Fork { parent, fd } => [pair(parent, 2), u64::from(fd.cast_unsigned()), 0, 0],
            Self::Drop { space, start, end } => [pair(space, 3), start, end, 0],
            Self::Move { space, from, to, len } => [pair(space, 4), from, to, len],
        }
    }

    fn decode([head, a, b, c]: [u64; RECORD_WORDS]) -> Option<Self> {
        let (space, kind) = halves(head);
        let low = |word: u64| halves(word).1;
        match kind {
            1 => Some(Self::Arrive {
                container: space,
                vpid: low(a),
                fd: halves(b).0.cast_signed(),
                pages: low(b).cast_signed(),
                index: low(c).cast_signed(),
            }),
            2 => Some(Self::Fork {
                parent: space,
                fd: low(a).cast_signed(),
            }),
            3 => Some(Self::Drop {
                space,
                start: a,
                end: b,
            }),
            4 => Some(Self::Move {
                space,
                from: a,
                to: b,
                len: c,
            }),
            _ => None,
        }
    }
}

/// The shared memory.
#[derive(Debug)]
pub struct Board {
    words: SharedWords,
}

/// Microseconds of the monotonic clock, which all processes share.
#[must_use]
pub fn now() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map(std::time::Duration::from);
    now.map_or(0, |now| u64::try_from(now.as_micros()).unwrap_or(u64::MAX))
}

impl Board {
    /// A new one.
    ///
    /// # Errors
    /// No address space.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            words: SharedWords::new(LOG + RECORDS * RECORD_WORDS)?,
        })
    }

    /// Reads a word.
    #[must_use]
    pub fn get(&self, word: Word) -> u64 {
        self.words.get(word as usize)
    }

    /// Writes a word.
    pub fn set(&self, word: Word, value: u64) {
        self.words.set(word as usize, value);
    }

    /// Adds to a word.
    pub fn add(&self, word: Word, value: u64) {
        self.words.add(word as usize, value);
    }

    /// Takes from a word.
    pub fn subtract(&self, word: Word, value: u64) {
        self.words.add(word as usize, value.wrapping_neg());
    }

    /// How far it is.
    #[must_use]
    pub fn state(&self) -> State {
        match self.get(Word::State) {
            0 => State::Waiting,
            1 => State::Filling,
            2 => State::Filled,
            3 => State::Failed,
            _ => State::Killed,
        }
    }

    /// Notes how far it is.
    pub fn set_state(&self, state: State) {
        self.set(Word::State, state as u64);
    }

    /// Notes that a thread has waited so long for a page.
    pub fn note_fault(&self, microseconds: u64) {
        self.add(Word::Faults, 1);
        let longest: Option<&[AtomicU64]> = self.words.slice(Word::Longest as usize, 1);
        if let Some([longest]) = longest {
            longest.fetch_max(microseconds, Ordering::AcqRel);
        }
        self.set(Word::LastFault, now());
    }

    /// Keeps what was heard; only one thread of one process does.
    pub fn keep(&self, record: Record) {
        let count = self.get(Word::Records);
        let Some(at) = usize::try_from(count).ok().filter(|n| *n < RECORDS) else {
            return self.set(Word::Overflow, 1);
        };
        for (i, word) in record.encode().into_iter().enumerate() {
            self.words.set(LOG + at * RECORD_WORDS + i, word);
        }
        self.set(Word::Records, count + 1);
    }

    /// All that was heard, in its order.
    pub fn records(&self) -> impl Iterator<Item = Record> + '_ {
        let count = usize::try_from(self.get(Word::Records)).unwrap_or(0).min(RECORDS);
        (0..count).filter_map(|at| {
            let words = std::array::from_fn(|i| self.words.get(LOG + at * RECORD_WORDS + i));
            Record::decode(words)
        })
    }

    /// Reads messages of an address space; each is heeded and then all are [`Board::heeded`]. Returns how many there are.
    ///
    /// # Errors
    /// EAGAIN where there is none.
    pub fn read(&self, space: u32, fd: std::os::fd::BorrowedFd<'_>) -> std::io::Result<usize> {
        self.set(Word::InboxSpace, u64::from(space));
        self.set(Word::InboxBase, self.get(Word::Records));
        self.set(Word::InboxOpen, 1);
        missing_pages::read(fd, &self.words, INBOX, MESSAGES).inspect_err(|_| self.heeded())
    }

    /// A message that was read.
    #[must_use]
    pub fn message(&self, at: usize) -> Message {
        Message::of(std::array::from_fn(|i| {
            self.words.get(INBOX + at.min(MESSAGES - 1) * MESSAGE_WORDS + i)
        }))
    }

    /// All messages were heeded.
    pub fn heeded(&self) {
        for at in 0..MESSAGES * MESSAGE_WORDS {
            self.words.set(INBOX + at, 0);
        }
        self.set(Word::InboxOpen, 0);
    }

    /// The messages that somebody has read who was killed before all were heeded, and their address space. Faults are not
    /// among them: whoever waits is told to ask again.
    #[must_use]
    pub fn left_over(&self) -> (u32, Vec<Message>) {
        let space = u32::try_from(self.get(Word::InboxSpace)).unwrap_or(u32::MAX);
        if self.get(Word::InboxOpen) == 0 {
            return (space, Vec::new());
        }
        let heeded = self.get(Word::Records).saturating_sub(self.get(Word::InboxBase));
        let events = (0..MESSAGES)
            .map(|at| self.message(at))
            .filter(|m| !matches!(m, Message::Unknown(_) | Message::Fault { .. }));
        let left = events.skip(usize::try_from(heeded).unwrap_or(usize::MAX)).collect();
        (space, left)
    }

    /// For the agent.
    #[must_use]
    pub fn status(&self) -> Status {
        Status {
            phase: match self.state() {
                State::Waiting => Phase::Waiting,
                // A pager that has failed is about to be dealt with by the guardian.
                State::Filling | State::Failed => Phase::Filling,
                State::Filled => Phase::Filled,
                State::Killed => Phase::Killed,
            },
            total_bytes: self.get(Word::Total),
            remaining_bytes: self.get(Word::Remaining),
            faults: self.get(Word::Faults),
            longest_fault_microseconds: self.get(Word::Longest),
            processes: self.get(Word::Spaces),
            restarts: self.get(Word::Restarts),
            fill_milliseconds: self.get(Word::FillMilliseconds),
            message: String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DROP: Record = Record::Drop {
        space: 3,
        start: 4096,
        end: 1 << 46,
    };

    #[test]
    fn what_was_heard_is_read_again_in_its_order() {
        let board = Board::new().unwrap();
        let records = [
            Record::Arrive {
                container: 2,
                vpid: 17,
                fd: 9,
                pages: -1,
                index: 11,
            },
            Record::Fork { parent: 0, fd: 12 },
            DROP,
            Record::Move {
                space: 1,
                from: 1 << 40,
                to: 8192,
                len: 4096,
            },
        ];
        records.into_iter().for_each(|r| board.keep(r));
        assert_eq!(board.records().collect::<Vec<_>>(), records);
    }

    #[test]
    fn a_board_that_is_full_says_so_and_keeps_what_it_has() {
        let board = Board::new().unwrap();
        board.keep(DROP);
        board.set(Word::Records, RECORDS as u64);
        board.keep(Record::Fork { parent: 0, fd: 1 });
        assert_eq!(board.get(Word::Overflow), 1);
        assert_eq!(board.records().next(), Some(DROP));
    }

    #[test]
    fn messages_that_were_read_and_not_heeded_are_left_over() {
        let board = Board::new().unwrap();
        let put = |at: usize, words: [u64; 4]| {
            for (i, word) in words.into_iter().enumerate() {
                board.words.set(INBOX + at * MESSAGE_WORDS + i, word);
            }
        };
        board.set(Word::InboxSpace, 5);
        board.set(Word::InboxOpen, 1);
        put(0, [0x15, 1, 2, 0]);
        put(1, [0x12, 0, 77, 0]);
        put(2, [0x14, 1, 2, 3]);
        let remove = Message::Remove { start: 1, end: 2 };
        let remap = Message::Remap { from: 1, to: 2, len: 3 };
        assert_eq!(board.left_over(), (5, vec![remove, remap]));
        board.keep(DROP);
        assert_eq!(board.left_over(), (5, vec![remap]), "one was heeded");
        board.heeded();
        assert_eq!(board.left_over(), (5, vec![]));
    }
}
