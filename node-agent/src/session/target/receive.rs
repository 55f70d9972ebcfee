//! What comes from the source is written: into the room of the images, into root filesystems, into /dev/shm.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use crds::Reason;
use hostsys::warm_memory::WarmMemory;
use protocol::{
    frame,
    migrate::{
        message::{Facts, Manifest, Place},
        target as machine,
    },
};
use tokio::sync::mpsc;

use super::super::{
    ledger::{Failed, blocking},
    warm::warm,
};
use super::attempt::Ground;
use crate::{
    checkpoint::{self, Room},
    files::{self, Tree},
    peer::{self, Event, FromSourceSide},
};

/// Between two looks for shepherds.
const LOOK: Duration = Duration::from_millis(20);
/// The kernel keeps this much for itself and others.
const RESERVE: u64 = 64 << 20;

/// Hears the manifest and makes room for what it announces.
pub(super) async fn reserve(
    link: &mut FromSourceSide,
    place: &Ground,
    room: Room,
    limit: u64,
) -> Result<(Manifest, Option<WarmMemory>), Failed> {
    let manifest = match link.events.recv().await {
        Some(Event::Message(machine::Output::Manifest(manifest))) => manifest,
        Some(Event::Message(machine::Output::Abandon { reason, message })) => return Err(Failed { reason, message }),
        Some(Event::Message(_) | Event::Piece { .. }) => {
            return Err(Failed::new(Reason::PeerRefused, "the source did not send a manifest"));
        }
        None => {
            let why = link.end.reason().unwrap_or_default();
            return Err(Failed::new(Reason::TransferFailed, why));
        }
    };
    manifest_order(&manifest, place)?;
    let available = checkpoint::available_memory().saturating_sub(RESERVE);
    let most = limit.min(available);
    if manifest.max_image_bytes > most {
        return Err(Failed::new(
            Reason::NotEnoughMemory,
            format!(
                "the images may take {} bytes, and this node has room for {most}",
                manifest.max_image_bytes
            ),
        ));
    }
    let bytes = manifest.max_image_bytes;
    blocking(move || room.make(bytes))
        .await?
        .map_err(|e| Failed::because(Reason::StepFailed, &e))?;
    // Once for the images, once for the processes that are restored from them.
    let memory = warm(manifest.memory_bytes.saturating_mul(2)).await;
    Ok((manifest, memory))
}

/// For each container of the manifest its place in ours: both must have the same names.
pub(super) fn manifest_order(manifest: &Manifest, place: &Ground) -> Result<Vec<usize>, Failed> {
    let found: Vec<usize> = manifest
        .containers
        .iter()
        .filter_map(|name| place.containers.iter().position(|c| &c.name == name))
        .collect();
    if found.len() == manifest.containers.len() && found.len() == place.containers.len() {
        Ok(found)
    } else {
        Err(Failed::new(
            Reason::PeerRefused,
            format!("the source announces the containers {}", manifest.containers.join(", ")),
        ))
    }
}

/// Where what is received goes.
pub(super) struct Targets {
    pub(super) images: Vec<PathBuf>,
    pub(super) roots: Vec<PathBuf>,
    pub(super) shm: Option<PathBuf>,
}

/// What comes from the source. The connection itself stays with the session: it has to say how it ended.
pub(super) struct Incoming {
    pub(super) events: mpsc::Receiver<Event>,
    pub(super) spare: peer::Spare,
    pub(super) end: peer::End,
}

/// Everything has arrived.
pub(super) struct Received {
    pub(super) events: mpsc::Receiver<Event>,
    pub(super) facts: Facts,
    /// Bytes of all files.
    pub(super) bytes: u64,
}

/// The folders that are written to, opened when the first entry for them comes.
pub(super) struct Trees<'a> {
    targets: &'a Targets,
    open: Vec<(Place, Tree)>,
    /// Which tree an open file is in.
    files: std::collections::HashMap<u32, usize>,
}

impl Trees<'_> {
    pub(super) fn index(&mut self, place: Place) -> Result<usize, Failed> {
        if let Some(found) = self.open.iter().position(|(p, _)| *p == place) {
            return Ok(found);
        }
        let of = |list: &[PathBuf], n: u32| usize::try_from(n).ok().and_then(|n| list.get(n)).cloned();
        let folder = match place {
            Place::Images(n) => of(&self.targets.images, n),
            Place::Root(n) => of(&self.targets.roots, n),
            Place::Shm => self.targets.shm.clone(),
        };
        let folder =
            folder.ok_or_else(|| Failed::new(Reason::PeerRefused, "the source sends files that have no place here"))?;
        let tree = Tree::open(&folder).map_err(|e| writing(&e))?;
        self.open.push((place, tree));
        Ok(self.open.len() - 1)
    }

    pub(super) fn tree(&mut self, index: usize) -> Result<&mut Tree, Failed> {
        match self.open.get_mut(index) {
            Some((_, tree)) => Ok(tree),
            None => Err(Failed::new(Reason::StepFailed, "a tree is missing")),
        }
    }

    pub(super) fn of_file(&mut self, file: u32) -> Result<&mut Tree, Failed> {
        let index = self.files.get(&file).copied().unwrap_or(usize::MAX);
        self.tree(index)
    }
}

pub(super) fn writing(error: &files::Error) -> Failed {
    Failed::because(Reason::StepFailed, error)
}

/// Writes what comes until everything has arrived. Blocking.
pub(super) fn write_all(
    mut incoming: Incoming,
    targets: &Targets,
    mut memory: Option<WarmMemory>,
    at_freeze: impl FnOnce(),
    go_on: &std::sync::mpsc::Receiver<()>,
) -> Result<(Received, Instant), Failed> {
    let mut trees = Trees {
        targets,
        open: Vec::new(),
        files: std::collections::HashMap::new(),
    };
    let mut at_freeze = Some(at_freeze);
    let mut facts = None;
    let mut frozen_at = None;
    let mut bytes = 0;
    loop {
        if matches!(go_on.try_recv(), Err(std::sync::mpsc::TryRecvError::Disconnected)) {
            return Err(Failed::new(Reason::TransferFailed, "the copy was given up"));
        }
        let next = match incoming.events.try_recv() {
            Ok(event) => Some(event),
            Err(mpsc::error::TryRecvError::Disconnected) => None,
            // Now and then a look whether to go on.
            Err(mpsc::error::TryRecvError::Empty) => {
                let wait = async { tokio::time::timeout(LOOK, incoming.events.recv()).await };
                match tokio::runtime::Handle::current().block_on(wait) {
                    Ok(next) => next,
                    Err(_) => continue,
                }
            }
        };
        let Some(event) = next else {
            return Err(Failed::new(
                Reason::TransferFailed,
                incoming
                    .end
                    .reason()
                    .unwrap_or_else(|| "the connection to the source was lost".into()),
            ));
        };
        match event {
            Event::Piece {
                file,
                offset,
                buffer,
                len,
            } => {
                let piece = buffer.get(frame::DATA_HEADER..len).unwrap_or_default();
                bytes += piece.len() as u64;
                trees
                    .of_file(file)?
                    .piece(file, offset, piece)
                    .map_err(|e| writing(&e))?;
                incoming.spare.give_back(buffer);
            }
            Event::Message(machine::Output::Entry(entry)) => {
                let index = trees.index(entry.place)?;
                if let protocol::migrate::message::EntryKind::File { file } = entry.kind {
                    trees.files.insert(file, index);
                }
                trees.tree(index)?.entry(entry).map_err(|e| writing(&e))?;
            }
            Event::Message(machine::Output::FileEnd { file, size }) => {
                trees.of_file(file)?.end(file, size).map_err(|e| writing(&e))?;
                trees.files.remove(&file);
            }
            Event::Message(machine::Output::Frozen) => {
                frozen_at = Some(Instant::now());
                drop(memory.take());
                if let Some(begins) = at_freeze.take() {
                    begins();
                }
            }
            Event::Message(machine::Output::Facts(f)) => facts = Some(f),
            Event::Message(machine::Output::Abandon { reason, message }) => return Err(Failed { reason, message }),
            Event::Message(machine::Output::Complete) => {
                for (_, tree) in trees.open {
                    tree.finish().map_err(|e| writing(&e))?;
                }
                let facts = facts.unwrap_or_default();
                let events = incoming.events;
                return Ok((
                    Received { events, facts, bytes },
                    frozen_at.unwrap_or_else(Instant::now),
                ));
            }
            Event::Message(
                machine::Output::Offer(_)
                | machine::Output::Manifest(_)
                | machine::Output::Data { .. }
                | machine::Output::Alive
                | machine::Output::MaySend,
            ) => {}
        }
    }
}
