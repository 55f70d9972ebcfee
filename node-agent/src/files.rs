//! File trees on their way: what a container changed in its root filesystem (the upper layer of its overlay) and the pod's
//! /dev/shm. [`send`] reads on the source while everything is frozen, [`Tree`] writes on the target, always beneath one
//! folder and never through a link: everything that a peer sends is somebody's input.
//!
//! | in the upper layer | becomes |
//! |---|---|
//! | character device 0/0, attribute `trusted.overlay.whiteout` | a removal |
//! | attribute `trusted.overlay.opaque` = `y` | a folder that is emptied first |
//! | attribute `trusted.overlay.redirect` (a renamed folder) | the whole merged folder, emptied first |
//! | attribute `trusted.overlay.metacopy` (only attributes changed) | the merged file |
//! | socket, FIFO, link, hard link, sparse file | itself |
//! | any other device | an error: it cannot be carried |

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs::File,
    io,
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::FileExt as _,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use hostsys::beneath::{self, Beneath};
use nix::sys::{
    stat::{FileStat, SFlag},
    time::TimeSpec,
};
use protocol::{
    migrate::message::{Entry, EntryKind, Meta, Place},
    raw::Raw,
};

use crate::outbox::{self, Outbox};

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file below a folder.
    #[error("{0}")]
    Beneath(#[source] beneath::Error, String),
    /// The connection or a file's content.
    #[error(transparent)]
    Outbox(#[from] outbox::Error),
    /// A device in a root filesystem.
    #[error("{0} is a device, which cannot be carried")]
    Device(PathBuf),
    /// Writing a file's bytes.
    #[error("failed to write {0}")]
    Write(PathBuf, #[source] io::Error),
    /// A message that makes no sense here.
    #[error("file {0} is not open")]
    NotOpen(u32),
    /// The attempt was given up.
    #[error("the copy was given up")]
    Canceled,
}

impl From<beneath::Error> for Error {
    fn from(error: beneath::Error) -> Self {
        let text = crate::error::chain(&error);
        Self::Beneath(error, text)
    }
}

/// Overlay's own attributes, in all their forms.
const OVERLAY: &[u8] = b"trusted.overlay.";
/// The label is the target's own business.
const SELINUX: &[u8] = b"security.selinux";

fn kind_of(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

fn join(folder: &Path, name: &OsStr) -> PathBuf {
    if folder == Path::new(".") {
        PathBuf::from(name)
    } else {
        folder.join(name)
    }
}

/// A tree that is sent.
struct Walk<'a> {
    upper: Beneath,
    merged: Beneath,
    place: Place,
    outbox: &'a Outbox,
    canceled: &'a AtomicBool,
    /// First name of each file that has several.
    names: HashMap<(u64, u64), PathBuf>,
}

/// Sends what a container changed: `upper` is the overlay's upper layer, `merged` its mount. For a plain folder both are it.
///
/// # Errors
/// See [`Error`].
pub fn send(upper: &Path, merged: &Path, place: Place, outbox: &Outbox, canceled: &AtomicBool) -> Result<(), Error> {
    let mut walk = Walk {
        upper: Beneath::open(upper)?,
        merged: Beneath::open(merged)?,
        place,
        outbox,
        canceled,
        names: HashMap::new(),
    };
    let root = Path::new(".");
    let stat = walk.upper.stat(root)?;
    let meta = walk.meta(false, root, &stat)?;
    walk.outbox
        .entry(place, b"", EntryKind::Dir { opaque: false }, Some(meta))?;
    walk.folder(false, root)
}

/// Bytes of all files below a folder, as an estimate before the freeze: files that vanish meanwhile do not count.
#[must_use]
pub fn measure(folder: &Path) -> u64 {
    fn below(tree: &Beneath, folder: &Path, sum: &mut u64) {
        for name in tree.list(folder).unwrap_or_default() {
            let path = join(folder, &name);
            let Ok(stat) = tree.stat(&path) else { continue };
            match kind_of(&stat) {
                SFlag::S_IFDIR => below(tree, &path, sum),
                SFlag::S_IFREG => *sum = sum.saturating_add(u64::try_from(stat.st_size).unwrap_or(0)),
                _ => {}
            }
        }
    }
    let mut sum = 0;
    if let Ok(tree) = Beneath::open(folder) {
        below(&tree, Path::new("."), &mut sum);
    }
    sum
}

impl Walk<'_> {
    fn tree(&self, whole: bool) -> &Beneath {
        if whole { &self.merged } else { &self.upper }
    }

    /// `whole`: below a folder of which everything is sent, not only what changed.
    fn folder(&mut self, whole: bool, folder: &Path) -> Result<(), Error> {
        let mut names = self.tree(whole).list(folder)?;
        names.sort();
        for name in names {
            if self.canceled.load(Ordering::Acquire) {
                return Err(Error::Canceled);
            }
            self.name(whole, &join(folder, &name))?;
        }
        Ok(())
    }

    fn attribute(&self, whole: bool, path: &Path, name: &str) -> Result<Option<Vec<u8>>, Error> {
        if whole {
            return Ok(None);
        }
        Ok(self.upper.attribute(path, OsStr::new(name))?)
    }

    fn name(&mut self, whole: bool, path: &Path) -> Result<(), Error> {
        let stat = self.tree(whole).stat(path)?;
        let bytes = path.as_os_str().as_bytes();
        let kind = kind_of(&stat);
        if kind == SFlag::S_IFCHR && stat.st_rdev == 0 && !whole {
            return Ok(self.outbox.entry(self.place, bytes, EntryKind::Removed, None)?);
        }
        if kind == SFlag::S_IFREG
            && stat.st_size == 0
            && self.attribute(whole, path, "trusted.overlay.whiteout")?.is_some()
        {
            return Ok(self.outbox.entry(self.place, bytes, EntryKind::Removed, None)?);
        }
        if kind == SFlag::S_IFDIR {
            let redirected = self.attribute(whole, path, "trusted.overlay.redirect")?.is_some();
            let opaque = redirected || self.attribute(whole, path, "trusted.overlay.opaque")?.as_deref() == Some(b"y");
            let meta = self.meta(whole, path, &stat)?;
            self.outbox
                .entry(self.place, bytes, EntryKind::Dir { opaque }, Some(meta))?;
            return self.folder(whole || redirected, path);
        }
        if stat.st_nlink > 1 {
            // Device numbers differ between upper layer and merged mount; the inode numbers of one tree do not collide.
            if let Some(first) = self.names.get(&(stat.st_dev, stat.st_ino)) {
                let to = Raw::from(first.as_os_str().as_bytes());
                return Ok(self.outbox.entry(self.place, bytes, EntryKind::HardLink { to }, None)?);
            }
            self.names.insert((stat.st_dev, stat.st_ino), path.to_owned());
        }
        let meta = self.meta(whole, path, &stat)?;
        let kind = match kind {
            SFlag::S_IFREG => {
                let copied_up = self.attribute(whole, path, "trusted.overlay.metacopy")?.is_none();
                let file = self.tree(whole || !copied_up).read(path)?;
                return Ok(self
                    .outbox
                    .whole(self.place, bytes, Some(meta), &file, &path.display().to_string())?);
            }
            SFlag::S_IFLNK => EntryKind::Symlink {
                target: Raw(self.tree(whole).read_link(path)?.into_vec()),
            },
            SFlag::S_IFIFO => EntryKind::Fifo,
            SFlag::S_IFSOCK => EntryKind::Socket,
            _ => return Err(Error::Device(path.to_owned())),
        };
        Ok(self.outbox.entry(self.place, bytes, kind, Some(meta))?)
    }

    fn meta(&self, whole: bool, path: &Path, stat: &FileStat) -> Result<Meta, Error> {
        let tree = self.tree(whole);
        let mut xattrs = Vec::new();
        for name in tree.attributes(path)? {
            let bytes = name.as_bytes();
            if bytes.starts_with(OVERLAY) || bytes == SELINUX {
                continue;
            }
            if let Some(value) = tree.attribute(path, &name)? {
                xattrs.push((Raw::from(bytes), Raw(value)));
            }
        }
        Ok(Meta {
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: stat.st_mtime,
            mtime_nanos: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
            xattrs,
        })
    }
}

/// A file that is being written.
#[derive(Debug)]
struct Open {
    file: File,
    path: PathBuf,
    meta: Option<Meta>,
}

/// A tree that is written: a root filesystem, /dev/shm or a folder of images.
#[derive(Debug)]
pub struct Tree {
    root: Beneath,
    open: HashMap<u32, Open>,
    /// Folders get their attributes last: writing into them changes their times.
    folders: Vec<(PathBuf, Meta)>,
}

impl Tree {
    /// Below this folder.
    ///
    /// # Errors
    /// It could not be opened.
    pub fn open(root: &Path) -> Result<Self, Error> {
        Ok(Self {
            root: Beneath::open(root)?,
            open: HashMap::new(),
            folders: Vec::new(),
        })
    }

    /// Makes, replaces or removes a name.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn entry(&mut self, entry: Entry) -> Result<(), Error> {
        let path = if entry.path.as_bytes().is_empty() {
            PathBuf::from(".")
        } else {
            PathBuf::from(OsString::from_vec(entry.path.0))
        };
        match entry.kind {
            EntryKind::File { file } => {
                self.root.remove_tree(&path)?;
                let handle = self.root.create(&path, 0o600)?;
                self.open.insert(
                    file,
                    Open {
                        file: handle,
                        path,
                        meta: entry.meta,
                    },
                );
                return Ok(());
            }
            EntryKind::Dir { opaque } => {
                self.dir(&path, opaque)?;
                self.folders.extend(entry.meta.map(|m| (path, m)));
                return Ok(());
            }
            EntryKind::Removed => return Ok(self.root.remove_tree(&path)?),
            EntryKind::HardLink { to } => {
                self.root.remove_tree(&path)?;
                return Ok(self.root.hard_link(Path::new(&OsString::from_vec(to.0)), &path)?);
            }
            EntryKind::Symlink { target } => {
                self.root.remove_tree(&path)?;
                self.root.create_link(&path, &OsString::from_vec(target.0))?;
            }
            EntryKind::Fifo => self.node(&path, SFlag::S_IFIFO)?,
            EntryKind::Socket => self.node(&path, SFlag::S_IFSOCK)?,
        }
        self.set(&path, entry.meta.as_ref())
    }

    fn dir(&self, path: &Path, opaque: bool) -> Result<(), Error> {
        let is_folder = self.root.stat(path).is_ok_and(|s| kind_of(&s) == SFlag::S_IFDIR);
        if is_folder && opaque {
            for name in self.root.list(path)? {
                self.root.remove_tree(&join(path, &name))?;
            }
        } else if !is_folder {
            self.root.remove_tree(path)?;
            self.root.create_folder(path, 0o700)?;
        }
        Ok(())
    }

    fn node(&self, path: &Path, kind: SFlag) -> Result<(), Error> {
        self.root.remove_tree(path)?;
        Ok(self.root.create_node(path, kind.bits() | 0o600, 0)?)
    }

    /// Writes a piece of an open file.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn piece(&mut self, file: u32, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let open = self.open.get(&file).ok_or(Error::NotOpen(file))?;
        open.file
            .write_all_at(bytes, offset)
            .map_err(|e| Error::Write(open.path.clone(), e))
    }

    /// Completes an open file.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn end(&mut self, file: u32, size: u64) -> Result<(), Error> {
        let open = self.open.remove(&file).ok_or(Error::NotOpen(file))?;
        // A hole at the end has no piece.
        let len = open.file.metadata().map(|m| m.len());
        if len.map_err(|e| Error::Write(open.path.clone(), e))? != size {
            open.file
                .set_len(size)
                .map_err(|e| Error::Write(open.path.clone(), e))?;
        }
        self.set(&open.path, open.meta.as_ref())
    }

    /// Gives the folders their attributes.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn finish(mut self) -> Result<(), Error> {
        for (path, meta) in std::mem::take(&mut self.folders).iter().rev() {
            self.set(path, Some(meta))?;
        }
        Ok(())
    }

    fn set(&self, path: &Path, meta: Option<&Meta>) -> Result<(), Error> {
        let Some(meta) = meta else { return Ok(()) };
        self.root.set_owner(path, meta.uid, meta.gid)?;
        if self.root.stat(path).is_ok_and(|s| kind_of(&s) != SFlag::S_IFLNK) {
            self.root.set_mode(path, meta.mode)?;
        }
        // Behind the owner: a change of owner drops file capabilities.
        for (name, value) in &meta.xattrs {
            self.root
                .set_attribute(path, OsStr::from_bytes(name.as_bytes()), value.as_bytes())?;
        }
        let time = TimeSpec::new(meta.mtime, i64::from(meta.mtime_nanos));
        Ok(self.root.set_times(path, time, time)?)
    }
}
