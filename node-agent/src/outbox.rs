//! What a source has to send, from the blocking threads that read files to the one task that writes to the connection.
//! Bounded: a reader waits while the network is slower than it. Buffers are used again.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::unistd::{Whence, lseek64};
use protocol::{
    frame,
    migrate::{
        FromSource,
        message::{Entry, EntryKind, Meta, Place},
    },
    raw::Raw,
};
use tokio::sync::mpsc;

/// Bytes of one piece of a file.
pub const PIECE: usize = 256 * 1024;
/// Room before the bytes of a piece, for the headers of its frame: frame and bytes go out in one write.
pub const HEAD: usize = frame::HEADER + frame::DATA_HEADER;
/// Pieces that wait for the network.
const WAITING: usize = 16;

/// What the connection's task gets.
#[derive(Debug)]
pub enum Outgoing {
    /// A message.
    Message(FromSource),
    /// A piece of a file: `len` bytes behind the first [`HEAD`] of the buffer.
    Piece {
        /// The file.
        file: u32,
        /// Where in the file.
        offset: u64,
        /// The buffer; given back with [`Pool::give_back`].
        buffer: Vec<u8>,
        /// How much of it.
        len: usize,
    },
}

/// Why nothing more can be sent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection's task has ended.
    #[error("the connection to the target was lost")]
    Closed,
    /// A file could not be read.
    #[error("failed to read {0}")]
    Read(String, #[source] io::Error),
}

/// Buffers that are used again.
#[derive(Clone, Debug, Default)]
pub struct Pool(Arc<Mutex<Vec<Vec<u8>>>>);

impl Pool {
    fn take(&self) -> Vec<u8> {
        let spare = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        spare.unwrap_or_else(|| vec![0; HEAD + PIECE])
    }

    /// Gives a buffer back.
    pub fn give_back(&self, buffer: Vec<u8>) {
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if buffer.len() == HEAD + PIECE && spare.len() < WAITING {
            spare.push(buffer);
        }
    }
}

/// The sending side. Its methods block.
#[derive(Clone, Debug)]
pub struct Outbox {
    queue: mpsc::Sender<Outgoing>,
    pool: Pool,
    /// Held while a file's number is taken and its entry queued: the target expects numbers in order.
    next_file: Arc<Mutex<u32>>,
    entries: Arc<AtomicU64>,
    bytes: Arc<AtomicU64>,
}

impl Outbox {
    /// An outbox and the queue behind it.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<Outgoing>, Pool) {
        let (queue, receiver) = mpsc::channel(WAITING);
        let pool = Pool::default();
        let outbox = Self {
            queue,
            pool: pool.clone(),
            next_file: Arc::default(),
            entries: Arc::default(),
            bytes: Arc::default(),
        };
        (outbox, receiver, pool)
    }

    /// Entries queued so far.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.entries.load(Ordering::Acquire)
    }

    /// Bytes of files queued so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Sends a message from async code.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub async fn message(&self, message: FromSource) -> Result<(), Error> {
        self.queue
            .send(Outgoing::Message(message))
            .await
            .map_err(|_| Error::Closed)
    }

    fn queue(&self, what: Outgoing) -> Result<(), Error> {
        self.queue.blocking_send(what).map_err(|_| Error::Closed)
    }

    /// Sends an entry that has no bytes.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub fn entry(&self, place: Place, path: &[u8], kind: EntryKind, meta: Option<Meta>) -> Result<(), Error> {
        self.queue(Outgoing::Message(FromSource::Entry(Entry {
            place,
            path: Raw::from(path),
            kind,
            meta,
        })))?;
        self.entries.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// Announces a file and gives it its number.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub fn begin(&self, place: Place, path: &[u8], meta: Option<Meta>) -> Result<u32, Error> {
        let mut next = self.next_file.lock().unwrap_or_else(PoisonError::into_inner);
        let file = *next;
        self.entry(place, path, EntryKind::File { file }, meta)?;
        *next = next.wrapping_add(1);
        Ok(file)
    }

    /// Says that a file has come to its end.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub fn end(&self, file: u32, size: u64) -> Result<(), Error> {
        self.queue(Outgoing::Message(FromSource::FileEnd { file, size }))
    }

    /// Sends what a file has from `offset` on up to `end`; says where it stopped, which is less where the file is shorter.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn bytes_of(&self, file: u32, from: &File, name: &str, mut offset: u64, end: u64) -> Result<u64, Error> {
        while offset < end {
            let mut buffer = self.pool.take();
            let want = usize::try_from(end - offset).unwrap_or(PIECE).min(PIECE);
            let len = from
                .read_at(buffer.get_mut(HEAD..HEAD + want).unwrap_or_default(), offset)
                .map_err(|e| Error::Read(name.to_owned(), e))?;
            if len == 0 {
                self.pool.give_back(buffer);
                break;
            }
            let sent = u64::try_from(len).unwrap_or(0);
            self.queue(Outgoing::Piece {
                file,
                offset,
                buffer,
                len,
            })?;
            self.bytes.fetch_add(sent, Ordering::AcqRel);
            offset += sent;
        }
        Ok(offset)
    }

    /// Sends a whole file; its holes are not sent.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn whole(&self, place: Place, path: &[u8], meta: Option<Meta>, from: &File, name: &str) -> Result<(), Error> {
        let read = |e| Error::Read(name.to_owned(), e);
        let size = from.metadata().map_err(read)?.len();
        let file = self.begin(place, path, meta)?;
        let mut offset = 0;
        while offset < size {
            let (data, hole) = next_data(from, offset, size).map_err(read)?;
            if data >= size {
                break;
            }
            if self.bytes_of(file, from, name, data, hole)? < hole {
                break;
            }
            offset = hole;
        }
        self.end(file, size)
    }

    /// Sends a file whose bytes are in memory.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn content(&self, place: Place, path: &[u8], content: &[u8]) -> Result<(), Error> {
        let file = self.begin(place, path, None)?;
        let mut offset = 0;
        for piece in content.chunks(PIECE) {
            let mut buffer = self.pool.take();
            if let Some(room) = buffer.get_mut(HEAD..HEAD + piece.len()) {
                room.copy_from_slice(piece);
            }
            let len = u64::try_from(piece.len()).unwrap_or(0);
            self.queue(Outgoing::Piece {
                file,
                offset,
                buffer,
                len: piece.len(),
            })?;
            self.bytes.fetch_add(len, Ordering::AcqRel);
            offset += len;
        }
        self.end(file, offset)
    }
}

/// The next stretch of data at or behind `offset`: its start and its end. A file system that knows no holes has one stretch.
fn next_data(file: &File, offset: u64, size: u64) -> io::Result<(u64, u64)> {
    let at = i64::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    let data = match lseek64(file, at, Whence::SeekData) {
        Ok(data) => data,
        // Nothing but a hole up to the end.
        Err(nix::Error::ENXIO) => return Ok((size, size)),
        Err(nix::Error::EINVAL) => return Ok((offset, size)),
        Err(e) => return Err(e.into()),
    };
    let hole = lseek64(file, data, Whence::SeekHole)?;
    Ok((
        u64::try_from(data).unwrap_or(offset),
        u64::try_from(hole).unwrap_or(size).min(size),
    ))
}
