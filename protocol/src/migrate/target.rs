//! The target's machine: which messages it may hear in which state, and all bounds of what is received.
//!
//! ```text
//! New -> Offered -> Accepted -> Announced -> Receiving -> Complete -> Received -> Held -> Ended
//! ```
//! `Abandon` is legal everywhere before the end. A piece of a file that is not open, out of order, or beyond what the
//! manifest announced is a violation.

use std::collections::HashMap;

use super::{
    FromSource, FromTarget, Violation,
    message::{Entry, EntryKind, Facts, Manifest, Offer, Place},
};
use crate::{
    frame::{self, Kind},
    limits,
};

/// States of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing heard yet.
    New,
    /// An offer was heard.
    Offered,
    /// It was accepted.
    Accepted,
    /// The manifest was heard.
    Announced,
    /// The manifest was accepted: everything may come.
    Receiving,
    /// Complete was heard.
    Complete,
    /// Everything is written, the source was told.
    Received,
    /// Every container is held, the source was told.
    Held,
    /// Nothing more to say.
    Ended,
}

impl State {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::New => "New",
            Self::Offered => "Offered",
            Self::Accepted => "Accepted",
            Self::Announced => "Announced",
            Self::Receiving => "Receiving",
            Self::Complete => "Complete",
            Self::Received => "Received",
            Self::Held => "Held",
            Self::Ended => "Ended",
        }
    }
}

/// What happens to the machine.
#[derive(Clone, Debug, PartialEq)]
pub enum Input<'a> {
    /// We want to send this.
    Send(&'a FromTarget),
    /// A frame came.
    Frame(Kind, &'a [u8]),
}

/// What the session is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// The message may be sent.
    MaySend,
    /// An offer, well formed.
    Offer(Offer),
    /// A manifest, well formed.
    Manifest(Manifest),
    /// The source is frozen.
    Frozen,
    /// An entry at a legal path.
    Entry(Entry),
    /// A piece of an open file: its place in the frame's content is behind [`frame::DATA_HEADER`].
    Data {
        /// The file.
        file: u32,
        /// Where the piece belongs.
        offset: u64,
    },
    /// A file is complete.
    FileEnd {
        /// The file.
        file: u32,
        /// Its size.
        size: u64,
    },
    /// The facts.
    Facts(Facts),
    /// Everything was sent and nothing is missing.
    Complete,
    /// The source gives up.
    Abandon {
        /// A reason.
        reason: String,
        /// One sentence.
        message: String,
    },
    /// The source lives.
    Alive,
}

/// A file that is being received.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Open {
    image: bool,
    next: u64,
}

/// The machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    state: State,
    manifest: Option<Manifest>,
    open: HashMap<u32, Open>,
    next_file: u32,
    entries: u64,
    image_entries: u64,
    image_bytes: u64,
    file_bytes: u64,
    facts: bool,
    frozen: bool,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            state: State::New,
            manifest: None,
            open: HashMap::new(),
            next_file: 0,
            entries: 0,
            image_entries: 0,
            image_bytes: 0,
            file_bytes: 0,
            facts: false,
            frozen: false,
        }
    }
}

impl Machine {
    /// Its state.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Bytes of files received so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.image_bytes.saturating_add(self.file_bytes)
    }

    /// One step. After a violation the connection is of no use any more.
    ///
    /// # Errors
    /// The machine, and what was not allowed.
    pub fn step(mut self, input: &Input<'_>) -> Result<(Self, Output), (Box<Self>, Violation)> {
        let result = match input {
            Input::Send(message) => self.send(message),
            Input::Frame(kind, content) => self.read(*kind, content),
        };
        match result {
            Ok(output) => Ok((self, output)),
            Err(violation) => Err((Box::new(self), violation)),
        }
    }

    fn send(&mut self, message: &FromTarget) -> Result<Output, Violation> {
        if let Some(rule) = message.fault() {
            return Err(self.rule(message.name(), rule));
        }
        self.state = match (self.state, message) {
            (State::Offered, FromTarget::Accept { .. }) => State::Accepted,
            (State::Offered | State::Announced, FromTarget::Refuse { .. }) => State::Ended,
            (State::Announced, FromTarget::ManifestAccepted) => State::Receiving,
            (State::Complete, FromTarget::Received) => State::Received,
            (State::Received, FromTarget::Held) => State::Held,
            (State::Held, FromTarget::Committed) => State::Ended,
            (state, FromTarget::Destroyed { .. }) if !matches!(state, State::New | State::Offered | State::Ended) => {
                State::Ended
            }
            (state, FromTarget::Alive) if !matches!(state, State::New | State::Ended) => state,
            (_, m) => return Err(self.unexpected(m.name())),
        };
        Ok(Output::MaySend)
    }

    fn read(&mut self, kind: Kind, content: &[u8]) -> Result<Output, Violation> {
        if content.len() > kind.max() {
            return Err(self.frame(frame::Error::TooLong {
                len: content.len(),
                max: kind.max(),
            }));
        }
        if kind == Kind::Data {
            return self.data(content);
        }
        let message: FromSource = serde_json::from_slice(content).map_err(|e| Violation::Content {
            state: self.state.name(),
            error: e.to_string(),
        })?;
        if message.kind() != kind {
            return Err(self.rule(message.name(), "a frame of the wrong kind".into()));
        }
        if let Some(rule) = message.fault() {
            return Err(self.rule(message.name(), rule));
        }
        match (self.state, message) {
            (State::New, FromSource::Offer(offer)) => {
                self.state = State::Offered;
                Ok(Output::Offer(offer))
            }
            (State::Accepted, FromSource::Manifest(manifest)) => {
                self.state = State::Announced;
                self.manifest = Some(manifest.clone());
                Ok(Output::Manifest(manifest))
            }
            (State::Receiving, FromSource::Frozen) if !self.frozen => {
                self.frozen = true;
                Ok(Output::Frozen)
            }
            (State::Receiving, FromSource::Entry(entry)) => self.entry(entry),
            (State::Receiving, FromSource::FileEnd { file, size }) => self.file_end(file, size),
            (State::Receiving, FromSource::Facts(facts)) if self.frozen && !self.facts => {
                if let Some(t) = facts.threads.iter().find(|t| !self.is_container(t.container)) {
                    return Err(self.rule("Facts", format!("there is no container {}", t.container)));
                }
                self.facts = true;
                Ok(Output::Facts(facts))
            }
            (State::Receiving, FromSource::Complete { entries, bytes }) => self.complete(entries, bytes),
            (state, FromSource::Abandon { reason, message }) if !matches!(state, State::New | State::Ended) => {
                Ok(Output::Abandon { reason, message })
            }
            (state, FromSource::Alive) if !matches!(state, State::New | State::Ended) => Ok(Output::Alive),
            (_, m) => Err(self.unexpected(m.name())),
        }
    }

    fn is_container(&self, index: u32) -> bool {
        let count = self.manifest.as_ref().map_or(0, |m| m.containers.len());
        usize::try_from(index).is_ok_and(|i| i < count)
    }

    fn entry(&mut self, entry: Entry) -> Result<Output, Violation> {
        if !self.frozen {
            return Err(self.unexpected("Entry before Frozen"));
        }
        let image = match entry.place {
            Place::Images(c) | Place::Root(c) if !self.is_container(c) => {
                return Err(self.rule("Entry", format!("there is no container {c}")));
            }
            Place::Images(_) => true,
            Place::Root(_) | Place::Shm => false,
        };
        let (count, max) = if image {
            (&mut self.image_entries, limits::IMAGES * limits::CONTAINERS as u64)
        } else {
            (&mut self.entries, limits::TREE_ENTRIES)
        };
        *count += 1;
        if *count > max {
            return Err(self.rule("Entry", format!("more than {max} entries")));
        }
        if let EntryKind::File { file } = entry.kind {
            // Numbers are given in order, so that none is used twice and no list of the used ones is needed.
            if file != self.next_file {
                return Err(self.rule("Entry", format!("file {file} where {} was expected", self.next_file)));
            }
            if self.open.len() >= limits::OPEN_FILES {
                return Err(self.rule("Entry", format!("more than {} open files", limits::OPEN_FILES)));
            }
            let Some(next) = self.next_file.checked_add(1) else {
                return Err(self.rule("Entry", "too many files".into()));
            };
            self.next_file = next;
            self.open.insert(file, Open { image, next: 0 });
        }
        Ok(Output::Entry(entry))
    }

    fn data(&mut self, content: &[u8]) -> Result<Output, Violation> {
        if self.state != State::Receiving {
            return Err(self.unexpected("Data"));
        }
        let (file, offset, bytes) = frame::read_data(content).map_err(|e| self.frame(e))?;
        let Some(open) = self.open.get_mut(&file) else {
            return Err(self.rule("Data", format!("file {file} is not open")));
        };
        if offset < open.next {
            let rule = format!("offset {offset} of file {file} where {} was expected", open.next);
            return Err(self.rule("Data", rule));
        }
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let end = offset.saturating_add(len);
        if end > limits::FILE_BYTES {
            return Err(self.rule("Data", format!("a file of {end} bytes")));
        }
        open.next = end;
        let image = open.image;
        self.count(image, len)?;
        Ok(Output::Data { file, offset })
    }

    fn count(&mut self, image: bool, len: u64) -> Result<(), Violation> {
        let (sum, max) = match (&self.manifest, image) {
            (Some(m), true) => (&mut self.image_bytes, m.max_image_bytes),
            (Some(m), false) => (&mut self.file_bytes, m.max_file_bytes),
            (None, _) => return Err(self.unexpected("Data")),
        };
        *sum = sum.saturating_add(len);
        if *sum > max {
            return Err(self.rule("Data", format!("more than the {max} bytes that the manifest announced")));
        }
        Ok(())
    }

    fn file_end(&mut self, file: u32, size: u64) -> Result<Output, Violation> {
        let Some(open) = self.open.remove(&file) else {
            return Err(self.rule("FileEnd", format!("file {file} is not open")));
        };
        if size < open.next {
            return Err(self.rule(
                "FileEnd",
                format!("size {size} of file {file}, which has {}", open.next),
            ));
        }
        Ok(Output::FileEnd { file, size })
    }

    fn complete(&mut self, entries: u64, bytes: u64) -> Result<Output, Violation> {
        if !self.facts {
            return Err(self.unexpected("Complete before Facts"));
        }
        if !self.open.is_empty() {
            return Err(self.rule("Complete", format!("{} files are not complete", self.open.len())));
        }
        let (have, have_bytes) = (self.entries + self.image_entries, self.bytes());
        if (entries, bytes) != (have, have_bytes) {
            return Err(self.rule(
                "Complete",
                format!("{entries} entries of {bytes} bytes where {have} of {have_bytes} came"),
            ));
        }
        self.state = State::Complete;
        Ok(Output::Complete)
    }

    fn unexpected(&self, message: &'static str) -> Violation {
        Violation::Unexpected {
            state: self.state.name(),
            message,
        }
    }

    fn rule(&self, message: &'static str, rule: String) -> Violation {
        Violation::Rule {
            state: self.state.name(),
            message,
            rule,
        }
    }

    fn frame(&self, error: frame::Error) -> Violation {
        Violation::Frame {
            state: self.state.name(),
            error,
        }
    }
}
