//! The closed list of messages between two agents.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{frame::Kind, limits, raw::Raw};

/// Source -> target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum FromSource {
    /// The first message.
    Offer(Offer),
    /// What will be sent.
    Manifest(Manifest),
    /// The source is frozen from now on.
    Frozen,
    /// A file, folder, link or removal. A file's bytes follow in data frames, in order, then [`FromSource::FileEnd`].
    Entry(Entry),
    /// All bytes of a file were sent.
    FileEnd {
        /// Its number.
        file: u32,
        /// Its size; a hole at its end has no data frame.
        size: u64,
    },
    /// What CRIU's images do not hold.
    Facts(Facts),
    /// Everything was sent.
    Complete {
        /// Entries that were sent.
        entries: u64,
        /// Bytes of files that were sent.
        bytes: u64,
    },
    /// The source gives up. Until it hears `Destroyed` or `Committed` it stays as it is.
    Abandon {
        /// A reason of the API's vocabulary.
        reason: String,
        /// One sentence.
        message: String,
    },
    /// Nothing to say; the source lives.
    Alive,
}

/// Target -> source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum FromTarget {
    /// The offer is accepted.
    Accept {
        /// The selected version.
        version: u32,
    },
    /// The offer or the manifest is refused; nothing was done.
    Refuse {
        /// A reason of the API's vocabulary.
        reason: String,
        /// One sentence.
        message: String,
    },
    /// There is room for what the manifest announces.
    ManifestAccepted,
    /// Everything has arrived.
    Received,
    /// Every container is restored and held.
    Held,
    /// The decision is Committed; the target runs.
    Committed,
    /// Nothing of the target is left, which was journaled; it can never commit this attempt.
    Destroyed {
        /// A reason of the API's vocabulary.
        reason: String,
        /// One sentence.
        message: String,
    },
    /// Nothing to say; the target lives.
    Alive,
}

/// What connection this is. Names the attempt; the target checks every field against the API, never the reverse.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// Always [`PROTOCOL`].
    pub protocol: String,
    /// Versions that the source speaks.
    pub versions: Vec<u32>,
    /// What the connection carries.
    pub stream: Stream,
    /// Namespace of the migration.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// The attempt.
    pub attempt: u32,
    /// Uid of the source pod.
    pub source_pod_uid: String,
    /// Uid of the target pod.
    pub target_pod_uid: String,
}

/// Value of [`Offer::protocol`].
pub const PROTOCOL: &str = "peregrine-migrate";

/// What a connection carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// The session: everything but page streams.
    Session,
    /// Memory pages: after the offer and its acceptance, frames of [`crate::pages`] only. Made while the session is receiving.
    Pages {
        /// Which of them.
        index: u32,
        /// How many there are.
        count: u32,
    },
}

/// What a checkpoint will hold, at most.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Names of the containers; other messages name a container by its place in this list.
    pub containers: Vec<String>,
    /// What runc notes of each container's standard streams (`descriptors.json`), where the dumps are started already: a
    /// restore that is started before the freeze needs it. Empty: it is not started before.
    pub descriptors: Vec<String>,
    /// Bytes of memory that the pod has now: what the target makes ready before the freeze. None where it is copied before.
    pub memory_bytes: u64,
    /// The memory is copied while the pod runs, into stores: all containers are restored lazily.
    pub copied_before: bool,
    /// Most bytes of all image files.
    pub max_image_bytes: u64,
    /// Most bytes of all files of root filesystems and /dev/shm.
    pub max_file_bytes: u64,
}

/// Where an entry belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Place {
    /// CRIU's images of a container.
    Images(u32),
    /// Changes of its root filesystem.
    Root(u32),
    /// The pod's /dev/shm.
    Shm,
}

/// A file, folder, link or removal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Where it belongs.
    pub place: Place,
    /// Path below that place, without a leading slash; empty for the place's own folder.
    pub path: Raw,
    /// What it is.
    pub kind: EntryKind,
    /// Owner, mode, times, attributes; absent for images and removals.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meta: Option<Meta>,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum EntryKind {
    /// A regular file; its bytes follow under this number.
    File {
        /// Number on this connection; used once.
        file: u32,
    },
    /// A folder; `opaque`: what the image has below it is hidden.
    Dir {
        /// Whether to remove first all that is there.
        opaque: bool,
    },
    /// A symbolic link.
    Symlink {
        /// What it says.
        target: Raw,
    },
    /// Another name of a file that was sent before, in the same place.
    HardLink {
        /// The path sent before.
        to: Raw,
    },
    /// A named pipe.
    Fifo,
    /// The name of a UNIX socket.
    Socket,
    /// Something of the image that was removed.
    Removed,
}

/// What a file has besides its bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Meta {
    /// Permission bits (07777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change, seconds.
    pub mtime: i64,
    /// Last change, nanoseconds of the second.
    pub mtime_nanos: u32,
    /// Extended attributes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub xattrs: Vec<(Raw, Raw)>,
}

/// What CRIU's images do not hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// Addresses to which a socket of the pod is bound, loopback and wildcards aside.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// Whether established connections with peers outside the pod are closed instead of restored and then closed.
    #[serde(default)]
    pub connections_closed_by_criu: bool,
    /// Threads with a timer slack or an affinity of their own.
    #[serde(default)]
    pub threads: Vec<ThreadFacts>,
}

/// What is set again on a restored thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThreadFacts {
    /// The container, by its place in the manifest.
    pub container: u32,
    /// Id of the thread in the container's pid namespace.
    pub tid: u32,
    /// Timer slack in nanoseconds, where it is not the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slack: Option<u64>,
    /// Processors that it may use, where it may not use all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub processors: Vec<u32>,
}

impl FromSource {
    /// Its name, for errors and logs.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Offer(_) => "Offer",
            Self::Manifest(_) => "Manifest",
            Self::Frozen => "Frozen",
            Self::Entry(_) => "Entry",
            Self::FileEnd { .. } => "FileEnd",
            Self::Facts(_) => "Facts",
            Self::Complete { .. } => "Complete",
            Self::Abandon { .. } => "Abandon",
            Self::Alive => "Alive",
        }
    }

    /// The kind of frame that carries it.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Manifest(_) | Self::Facts(_) => Kind::Large,
            _ => Kind::Control,
        }
    }

    /// What is wrong with its content, whatever the state.
    pub(super) fn fault(&self) -> Option<String> {
        match self {
            Self::Offer(o) => o.fault(),
            Self::Manifest(m) => m.fault(),
            Self::Entry(e) => e.fault(),
            Self::Facts(f) => f.fault(),
            Self::FileEnd { size, .. } => (*size > limits::FILE_BYTES).then(|| format!("a file of {size} bytes")),
            Self::Abandon { reason, message } => words(reason, message),
            Self::Frozen | Self::Complete { .. } | Self::Alive => None,
        }
    }
}

impl FromTarget {
    /// Its name, for errors and logs.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Accept { .. } => "Accept",
            Self::Refuse { .. } => "Refuse",
            Self::ManifestAccepted => "ManifestAccepted",
            Self::Received => "Received",
            Self::Held => "Held",
            Self::Committed => "Committed",
            Self::Destroyed { .. } => "Destroyed",
            Self::Alive => "Alive",
        }
    }

    pub(super) fn fault(&self) -> Option<String> {
        match self {
            Self::Refuse { reason, message } | Self::Destroyed { reason, message } => words(reason, message),
            Self::Accept { .. }
            | Self::ManifestAccepted
            | Self::Received
            | Self::Held
            | Self::Committed
            | Self::Alive => None,
        }
    }
}

fn words(reason: &str, message: &str) -> Option<String> {
    if reason.len() > limits::WORD_BYTES {
        return Some(format!("a reason of {} bytes", reason.len()));
    }
    (message.len() > limits::MESSAGE_BYTES).then(|| format!("a sentence of {} bytes", message.len()))
}

impl Offer {
    /// What is wrong with its content.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        if self.protocol != PROTOCOL {
            return Some("the protocol is not peregrine-migrate".into());
        }
        if self.versions.len() > crate::version::MAX_OFFERED {
            return Some(format!("{} versions", self.versions.len()));
        }
        if let Stream::Pages { index, count } = self.stream
            && (count > crate::pages::STREAMS || index >= count)
        {
            return Some(format!("stream {index} of {count}"));
        }
        [
            &self.namespace,
            &self.name,
            &self.uid,
            &self.source_pod_uid,
            &self.target_pod_uid,
        ]
        .into_iter()
        .find(|w| w.is_empty() || w.len() > limits::WORD_BYTES)
        .map(|w| format!("a name of {} bytes", w.len()))
    }
}

impl Manifest {
    fn fault(&self) -> Option<String> {
        if self.containers.is_empty() || self.containers.len() > limits::CONTAINERS {
            return Some(format!("{} containers", self.containers.len()));
        }
        if self.max_image_bytes > limits::FILE_BYTES || self.max_file_bytes > limits::FILE_BYTES {
            return Some("more bytes than any node has".into());
        }
        if !self.descriptors.is_empty() && self.descriptors.len() != self.containers.len() {
            return Some(format!("descriptors of {} containers", self.descriptors.len()));
        }
        if let Some(text) = self.descriptors.iter().find(|d| d.len() > limits::DESCRIPTORS_BYTES) {
            return Some(format!("descriptors of {} bytes", text.len()));
        }
        if self.memory_bytes > self.max_image_bytes {
            return Some("more memory than image bytes".into());
        }
        let mut names: Vec<&str> = self.containers.iter().map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        if names.len() != self.containers.len() {
            return Some("a container's name stands there twice".into());
        }
        names
            .into_iter()
            .find(|n| n.is_empty() || n.len() > limits::WORD_BYTES)
            .map(|n| format!("a name of {} bytes", n.len()))
    }
}

impl Entry {
    fn fault(&self) -> Option<String> {
        if let Place::Images(_) = self.place {
            return self.image_fault();
        }
        if let Some(fault) = path_fault(self.path.as_bytes(), matches!(self.kind, EntryKind::Dir { .. })) {
            return Some(fault);
        }
        match &self.kind {
            EntryKind::Symlink { target } => {
                if target.0.is_empty() || target.0.len() > limits::PATH_BYTES || target.0.contains(&0) {
                    return Some(format!("a symbolic link of {} bytes", target.0.len()));
                }
            }
            EntryKind::HardLink { to } => {
                if let Some(fault) = path_fault(to.as_bytes(), false) {
                    return Some(fault);
                }
            }
            EntryKind::File { .. }
            | EntryKind::Dir { .. }
            | EntryKind::Fifo
            | EntryKind::Socket
            | EntryKind::Removed => {}
        }
        match (&self.kind, &self.meta) {
            (EntryKind::Removed | EntryKind::HardLink { .. }, Some(_)) => Some("attributes where none belong".into()),
            (EntryKind::Removed | EntryKind::HardLink { .. }, None) => None,
            (_, None) => Some("no attributes".into()),
            (_, Some(meta)) => meta.fault(),
        }
    }

    /// Images are plain files with plain names, directly in their folder.
    fn image_fault(&self) -> Option<String> {
        let name = self.path.as_bytes();
        let plain = !name.is_empty()
            && name.len() <= limits::NAME_BYTES
            && name.first() != Some(&b'.')
            && name
                .iter()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        if !plain {
            return Some(format!("{:?} is not the name of an image", self.path));
        }
        if !matches!(self.kind, EntryKind::File { .. }) || self.meta.is_some() {
            return Some("an image that is not a plain file".into());
        }
        None
    }
}

impl Meta {
    fn fault(&self) -> Option<String> {
        if self.mode & !0o7777 != 0 {
            return Some(format!("mode {:o}", self.mode));
        }
        if self.mtime_nanos >= 1_000_000_000 {
            return Some(format!("{} nanoseconds", self.mtime_nanos));
        }
        if self.xattrs.len() > limits::XATTRS {
            return Some(format!("{} extended attributes", self.xattrs.len()));
        }
        self.xattrs.iter().find_map(|(name, value)| {
            let bad = name.0.is_empty()
                || name.0.len() > limits::XATTR_NAME_BYTES
                || name.0.contains(&0)
                || value.0.len() > limits::XATTR_BYTES;
            bad.then(|| "an extended attribute that is too long".to_owned())
        })
    }
}

impl Facts {
    fn fault(&self) -> Option<String> {
        if self.addresses.len() > limits::ADDRESSES {
            return Some(format!("{} addresses", self.addresses.len()));
        }
        if let Some(a) = self
            .addresses
            .iter()
            .find(|a| a.is_unspecified() || a.is_multicast() || a.is_loopback())
        {
            return Some(format!("address {a} is not that of a pod"));
        }
        if self.threads.len() > limits::THREADS {
            return Some(format!("{} threads", self.threads.len()));
        }
        self.threads
            .iter()
            .flat_map(|t| &t.processors)
            .find(|p| **p >= limits::PROCESSORS)
            .map(|p| format!("processor {p}"))
    }
}

/// A relative path without `.`, `..` and empty components; empty only for the place's own folder.
fn path_fault(path: &[u8], may_be_empty: bool) -> Option<String> {
    if path.is_empty() {
        return (!may_be_empty).then(|| "an empty path".to_owned());
    }
    if path.len() > limits::PATH_BYTES {
        return Some(format!("a path of {} bytes", path.len()));
    }
    let bad = path.contains(&0)
        || path
            .split(|b| *b == b'/')
            .any(|c| c.is_empty() || c == b"." || c == b".." || c.len() > limits::NAME_BYTES);
    bad.then(|| format!("the path {} is not plain", Raw::from(path)))
}
