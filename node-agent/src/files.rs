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

/// Whether CRIU gives such names to open files that have lost theirs, while it dumps.
fn is_of_the_dump(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b"link_remap.")
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
            let path = join(folder, &name);
            match self.name(whole, &path) {
                // CRIU's own, for the time of the dump that runs meanwhile: `nameless` sends what is needed of it.
                Err(error) if is_of_the_dump(&name) && self.tree(whole).stat(&path).is_err() => {
                    tracing::debug!(%error, path = %path.display(), "gone with the dump");
                    self.names.retain(|_, first| *first != path);
                }
                result => result?,
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::Outgoing;
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    use protocol::migrate::FromSource;
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};

    /// Sends a tree and writes it, in this process.
    fn carry(upper: &Path, merged: &Path, to: &Path) {
        let (outbox, mut queue, pool) = Outbox::new();
        let (upper, merged) = (upper.to_owned(), merged.to_owned());
        let sender = std::thread::spawn(move || {
            send(&upper, &merged, Place::Shm, &outbox, &AtomicBool::new(false)).unwrap();
        });
        let mut tree = Tree::open(to).unwrap();
        while let Some(next) = queue.blocking_recv() {
            match next {
                Outgoing::Message(FromSource::Entry(entry)) => tree.entry(entry).unwrap(),
                Outgoing::Message(FromSource::FileEnd { file, size }) => tree.end(file, size).unwrap(),
                Outgoing::Message(other) => panic!("{other:?}"),
                Outgoing::Piece {
                    file,
                    offset,
                    buffer,
                    len,
                } => {
                    let bytes = &buffer[outbox::HEAD..outbox::HEAD + len];
                    tree.piece(file, offset, bytes).unwrap();
                    pool.give_back(buffer);
                }
            }
        }
        sender.join().unwrap();
        tree.finish().unwrap();
    }

    /// Needs root: mounts two overlays with the same lower layer in a mount namespace of its own.
    #[test]
    fn host_what_a_container_changed_is_the_same_on_the_other_side() {
        std::thread::spawn(|| {
            let dir = std::env::temp_dir().join(format!("files-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&dir);
            std::fs::create_dir_all(&dir).unwrap();
            if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS | nix::sched::CloneFlags::CLONE_FS).is_err() {
                eprintln!("skipped: making a mount namespace needs root");
                return;
            }
            mount(
                None::<&str>,
                "/",
                None::<&str>,
                MsFlags::MS_REC | MsFlags::MS_PRIVATE,
                None::<&str>,
            )
            .unwrap();
            // Overlay cannot be the upper layer of an overlay, and a test's folder may be on one.
            mount(Some("t"), &dir, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
            for folder in [
                "lower/keep",
                "lower/hide",
                "lower/gone",
                "ua",
                "wa",
                "a",
                "ub",
                "wb",
                "b",
            ] {
                std::fs::create_dir_all(dir.join(folder)).unwrap();
            }
            for (name, text) in [
                ("keep/f", "old"),
                ("hide/under", "x"),
                ("gone/deep", "x"),
                ("removed", "x"),
                ("was_file", "x"),
            ] {
                std::fs::write(dir.join("lower").join(name), text).unwrap();
            }
            for (upper, work, merged) in [("ua", "wa", "a"), ("ub", "wb", "b")] {
                let d = dir.display();
                let options = format!("lowerdir={d}/lower,upperdir={d}/{upper},workdir={d}/{work}");
                mount(
                    Some("o"),
                    &dir.join(merged),
                    Some("overlay"),
                    MsFlags::empty(),
                    Some(options.as_str()),
                )
                .unwrap();
            }
            let a = dir.join("a");
            std::fs::write(a.join("keep/f"), "new").unwrap();
            std::fs::set_permissions(a.join("keep/f"), std::fs::Permissions::from_mode(0o4751)).unwrap();
            std::os::unix::fs::chown(a.join("keep/f"), Some(12), Some(34)).unwrap();
            std::fs::set_permissions(a.join("keep/f"), std::fs::Permissions::from_mode(0o4751)).unwrap();
            std::fs::remove_file(a.join("removed")).unwrap();
            std::fs::remove_dir_all(a.join("gone")).unwrap();
            std::fs::remove_dir_all(a.join("hide")).unwrap();
            std::fs::create_dir(a.join("hide")).unwrap();
            std::fs::write(a.join("hide/other"), "y").unwrap();
            std::fs::remove_file(a.join("was_file")).unwrap();
            std::fs::create_dir(a.join("was_file")).unwrap();
            std::fs::write(a.join("one"), "linked").unwrap();
            std::fs::hard_link(a.join("one"), a.join("two")).unwrap();
            symlink("/etc/passwd", a.join("link")).unwrap();
            nix::unistd::mkfifo(&a.join("fifo"), nix::sys::stat::Mode::from_bits_truncate(0o640)).unwrap();
            let _socket = std::os::unix::net::UnixListener::bind(a.join("socket")).unwrap();
            let sparse = File::create(a.join("sparse")).unwrap();
            sparse.write_all_at(b"head", 0).unwrap();
            sparse.write_all_at(b"middle", 5 << 20).unwrap();
            sparse.set_len(64 << 20).unwrap();
            std::fs::write(a.join("big"), vec![7; 3 * outbox::PIECE + 5]).unwrap();
            let attributes = Beneath::open(&a).unwrap();
            attributes
                .set_attribute(Path::new("big"), OsStr::new("user.note"), b"\0\xff%")
                .unwrap();
            let old = TimeSpec::new(1_000_000_000, 5);
            attributes.set_times(Path::new("keep"), old, old).unwrap();

            carry(&dir.join("ua"), &a, &dir.join("b"));
            let b = dir.join("b");
            assert_eq!(std::fs::read_to_string(b.join("keep/f")).unwrap(), "new");
            let f = std::fs::metadata(b.join("keep/f")).unwrap();
            assert_eq!((f.mode() & 0o7777, f.uid(), f.gid()), (0o4751, 12, 34));
            for gone in ["removed", "gone", "hide/under"] {
                assert!(!b.join(gone).exists(), "{gone}");
            }
            assert_eq!(std::fs::read_to_string(b.join("hide/other")).unwrap(), "y");
            assert!(b.join("was_file").is_dir());
            let ino = |n: &str| std::fs::metadata(b.join(n)).unwrap().ino();
            assert_eq!(ino("one"), ino("two"));
            assert_eq!(std::fs::read_link(b.join("link")).unwrap(), Path::new("/etc/passwd"));
            let kind = |n: &str| std::fs::symlink_metadata(b.join(n)).unwrap().file_type();
            assert!(kind("fifo").is_fifo() && kind("socket").is_socket());
            let sparse = std::fs::metadata(b.join("sparse")).unwrap();
            assert_eq!(sparse.len(), 64 << 20);
            assert!(sparse.blocks() * 512 < 1 << 20, "{} blocks", sparse.blocks());
            assert_eq!(
                std::fs::read(b.join("sparse")).unwrap(),
                std::fs::read(a.join("sparse")).unwrap()
            );
            assert_eq!(
                std::fs::read(b.join("big")).unwrap(),
                std::fs::read(a.join("big")).unwrap()
            );
            let there = Beneath::open(&b).unwrap();
            assert_eq!(
                there
                    .attribute(Path::new("big"), OsStr::new("user.note"))
                    .unwrap()
                    .as_deref(),
                Some(&b"\0\xff%"[..])
            );
            assert_eq!(std::fs::metadata(b.join("keep")).unwrap().mtime(), 1_000_000_000);
            // Nothing else came along.
            let list = |p: &Path| Beneath::open(p).unwrap().list(Path::new(".")).unwrap().len();
            assert_eq!(list(&a), list(&b));
            umount2(&dir, MntFlags::MNT_DETACH).unwrap();
        })
        .join()
        .unwrap();
        let _ = std::fs::remove_dir(std::env::temp_dir().join(format!("files-{}", std::process::id())));
    }

    #[test]
    fn a_path_through_a_link_is_refused() {
        let dir = std::env::temp_dir().join(format!("files-link-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(dir.join("tree")).unwrap();
        std::fs::create_dir_all(dir.join("outside")).unwrap();
        let mut tree = Tree::open(&dir.join("tree")).unwrap();
        let meta = Some(Meta::default());
        let entry = |path: &str, kind| Entry {
            place: Place::Shm,
            path: path.into(),
            kind,
            meta: meta.clone(),
        };
        let out = Raw::from(dir.join("outside").as_os_str().as_bytes());
        tree.entry(entry("way", EntryKind::Symlink { target: out })).ok();
        assert!(tree.entry(entry("way/file", EntryKind::File { file: 0 })).is_err());
        assert!(tree.entry(entry("way/dir", EntryKind::Dir { opaque: true })).is_err());
        assert_eq!(std::fs::read_dir(dir.join("outside")).unwrap().count(), 0);
        std::fs::remove_dir_all(dir).unwrap();
    }
}
