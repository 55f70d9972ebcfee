//! Files below a folder, never outside of it and never through a link.
//!
//! Everything inside a container's file systems belongs to the container: a path there may be replaced by a symbolic link
//! to a file of the host between a check and a use. So every access goes through one descriptor of the folder and
//! `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS)`: the kernel refuses, nothing is checked here.
//! Operations on a name (create, remove, change) open its *parent* that way and use one plain component.

#![expect(unsafe_code, reason = "raw system calls: this crate is where they live")]

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Component, Path, PathBuf};

use nix::dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, RenameFlags, ResolveFlag, open, openat2, readlinkat, renameat2};
use nix::sys::stat::{
    FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmodat, fstat, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, LinkatFlags, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};

/// What was being done to which path.
#[derive(Debug, thiserror::Error)]
#[error("failed to {doing} {} (below {})", path.display(), root.display())]
pub struct Error {
    /// The operation.
    pub doing: &'static str,
    /// Path relative to the folder.
    pub path: PathBuf,
    /// The folder, as it was opened.
    pub root: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// An open folder below which everything happens.
#[derive(Debug)]
pub struct Beneath {
    fd: OwnedFd,
    root: PathBuf,
}

const RESOLVE: ResolveFlag = ResolveFlag::RESOLVE_BENEATH
    .union(ResolveFlag::RESOLVE_NO_SYMLINKS)
    .union(ResolveFlag::RESOLVE_NO_MAGICLINKS);

impl Beneath {
    /// Opens the folder itself. Its own path is the host's: links in it are followed.
    ///
    /// # Errors
    /// It does not exist or is no folder.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let fd = open(
            root,
            OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
        .map_err(|errno| Error {
            doing: "open",
            path: ".".into(),
            root: root.to_owned(),
            source: errno.into(),
        })?;
        Ok(Self {
            fd,
            root: root.to_owned(),
        })
    }

    /// The folder's path, as it was opened.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A folder below as a root of its own.
    ///
    /// # Errors
    /// It does not exist, is no folder, or a link is on the way.
    pub fn subfolder(&self, path: &Path) -> Result<Self, Error> {
        let fd = self.resolve("open", path, OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::empty())?;
        Ok(Self {
            fd,
            root: self.root.join(path),
        })
    }

    /// Opens an existing file for reading. It never blocks on a FIFO and takes no terminal.
    ///
    /// # Errors
    /// It does not exist, or a link is on the way.
    pub fn read(&self, path: &Path) -> Result<File, Error> {
        self.resolve(
            "open",
            path,
            OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY,
            Mode::empty(),
        )
        .map(File::from)
    }

    /// Opens an existing file with flags of the caller's.
    ///
    /// # Errors
    /// It does not exist, or a link is on the way.
    pub fn open_with(&self, path: &Path, flags: OFlag) -> Result<File, Error> {
        self.resolve(
            "open",
            path,
            flags & !(OFlag::O_CREAT | OFlag::O_TMPFILE),
            Mode::empty(),
        )
        .map(File::from)
    }

    /// Creates a file that must not exist, for reading and writing.
    ///
    /// # Errors
    /// It exists, its folder does not, or a link is on the way.
    pub fn create(&self, path: &Path, mode: u32) -> Result<File, Error> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL;
        self.resolve("create", path, flags, Mode::from_bits_truncate(mode))
            .map(File::from)
    }

    /// Creates a folder that must not exist.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_folder(&self, path: &Path, mode: u32) -> Result<(), Error> {
        self.at_parent("create the folder", path, |parent, name| {
            mkdirat(parent, name, Mode::from_bits_truncate(mode))
        })
    }

    /// Creates a folder and its missing parents; existing folders are kept as they are.
    ///
    /// # Errors
    /// Something on the way exists and is no folder.
    pub fn create_folders(&self, path: &Path, mode: u32) -> Result<(), Error> {
        let mut so_far = PathBuf::new();
        for component in path.components() {
            so_far.push(component);
            match self.create_folder(&so_far, mode) {
                Err(error) if error.source.kind() == io::ErrorKind::AlreadyExists => {
                    if self.stat(&so_far)?.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFDIR.bits() {
                        return Err(error);
                    }
                }
                result => result?,
            }
        }
        Ok(())
    }

    /// Creates a symbolic link; where it points to is not looked at.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_link(&self, path: &Path, target: &OsStr) -> Result<(), Error> {
        self.at_parent("create the link", path, |parent, name| symlinkat(target, parent, name))
    }

    /// Creates a device, FIFO, socket or plain file. `kind` and `mode` as in `st_mode`, `device` as in `st_rdev`.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_node(&self, path: &Path, kind_and_mode: u32, device: u64) -> Result<(), Error> {
        let kind = SFlag::from_bits_truncate(kind_and_mode & SFlag::S_IFMT.bits());
        let mode = Mode::from_bits_truncate(kind_and_mode);
        self.at_parent("create the node", path, |parent, name| {
            mknodat(parent, name, kind, mode, device)
        })
    }

    /// Gives a file a second name, both below the folder.
    ///
    /// # Errors
    /// The file does not exist, the name does, or a link is on the way.
    pub fn hard_link(&self, existing: &Path, path: &Path) -> Result<(), Error> {
        let (from, from_name) = self.parent("link", existing)?;
        self.at_parent("create the hard link", path, |parent, name| {
            linkat(&from, from_name.as_os_str(), parent, name, LinkatFlags::empty())
        })
    }

    /// Renames, replacing what is there.
    ///
    /// # Errors
    /// The file does not exist, or a link is on the way.
    pub fn rename(&self, from: &Path, to: &Path) -> Result<(), Error> {
        self.rename_into(from, self, to)
    }

    /// Renames into another folder of the same file system, replacing what is there.
    ///
    /// # Errors
    /// As [`Self::rename`].
    pub fn rename_into(&self, from: &Path, other: &Self, to: &Path) -> Result<(), Error> {
        let (old, old_name) = self.parent("rename", from)?;
        other.at_parent("rename to", to, |parent, name| {
            renameat2(&old, old_name.as_os_str(), parent, name, RenameFlags::empty())
        })
    }

    /// Removes a name that is no folder.
    ///
    /// # Errors
    /// It does not exist, is a folder, or a link is on the way (a link itself is removed).
    pub fn remove(&self, path: &Path) -> Result<(), Error> {
        self.at_parent("remove", path, |parent, name| {
            unlinkat(parent, name, UnlinkatFlags::NoRemoveDir)
        })
    }

    /// Removes an empty folder.
    ///
    /// # Errors
    /// It does not exist or is not empty.
    pub fn remove_folder(&self, path: &Path) -> Result<(), Error> {
        self.at_parent("remove the folder", path, |parent, name| {
            unlinkat(parent, name, UnlinkatFlags::RemoveDir)
        })
    }

    /// Removes whatever has this name, folders with all they hold; an absent name is no error. Mounts are not entered:
    /// removing a mount point fails.
    ///
    /// # Errors
    /// The first that could not be removed.
    pub fn remove_tree(&self, path: &Path) -> Result<(), Error> {
        match self.remove(path) {
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => return Ok(()),
            // Linux says EISDIR for a folder (POSIX allows EPERM).
            Err(error) if matches!(error.source.raw_os_error(), Some(nix::libc::EISDIR | nix::libc::EPERM)) => {}
            result => return result,
        }
        for name in self.list(path)? {
            self.remove_tree(&path.join(name))?;
        }
        self.remove_folder(path)
    }

    /// The names in a folder, without `.` and `..`; `.` lists the root.
    ///
    /// # Errors
    /// It is no folder, or a link is on the way.
    pub fn list(&self, path: &Path) -> Result<Vec<OsString>, Error> {
        let fd = self.resolve("list", path, OFlag::O_RDONLY | OFlag::O_DIRECTORY, Mode::empty())?;
        let error = |errno: Errno| self.error("list", path, errno);
        let mut folder = dir::Dir::from_fd(fd).map_err(error)?;
        let mut names = Vec::new();
        for entry in folder.iter() {
            let name = entry.map_err(error)?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(OsString::from_vec(name));
            }
        }
        Ok(names)
    }

    /// What a name is, a link not followed.
    ///
    /// # Errors
    /// It does not exist, or a link is on the way.
    pub fn stat(&self, path: &Path) -> Result<FileStat, Error> {
        let fd = self.resolve_last_link("look at", path)?;
        fstat(fd).map_err(|errno| self.error("look at", path, errno))
    }

    /// Where a symbolic link points to.
    ///
    /// # Errors
    /// It is no link, or a link is on the way to it.
    pub fn read_link(&self, path: &Path) -> Result<OsString, Error> {
        let (parent, name) = self.parent("read the link", path)?;
        readlinkat(&parent, name.as_os_str()).map_err(|errno| self.error("read the link", path, errno))
    }

    /// Sets owner and group, a link not followed. It clears set-user-id bits: set the mode afterwards.
    ///
    /// # Errors
    /// It does not exist, or a link is on the way.
    pub fn set_owner(&self, path: &Path, uid: u32, gid: u32) -> Result<(), Error> {
        self.at_name("set the owner of", path, |parent, name| {
            fchownat(
                parent,
                name,
                Some(Uid::from_raw(uid)),
                Some(Gid::from_raw(gid)),
                AtFlags::AT_SYMLINK_NOFOLLOW,
            )
        })
    }

    /// Sets the mode bits; a link is refused.
    ///
    /// # Errors
    /// It does not exist, is a link, or a link is on the way.
    pub fn set_mode(&self, path: &Path, mode: u32) -> Result<(), Error> {
        let mode = Mode::from_bits_truncate(mode);
        let error = |errno: Errno| self.error("set the mode of", path, errno);
        // fchmodat2 came with Linux 6.6 and libc may lack it: go by a descriptor of the very file, which cannot be swapped.
        let fd = self.resolve_last_link("set the mode of", path)?;
        let stat = fstat(&fd).map_err(error)?;
        if stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFLNK.bits() {
            return Err(error(Errno::ELOOP));
        }
        let by_fd = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        fchmodat(nix::fcntl::AT_FDCWD, &by_fd, mode, FchmodatFlags::FollowSymlink).map_err(error)
    }

    /// Sets the times of last access and change, a link not followed.
    ///
    /// # Errors
    /// It does not exist, or a link is on the way.
    pub fn set_times(&self, path: &Path, accessed: TimeSpec, modified: TimeSpec) -> Result<(), Error> {
        self.at_name("set the times of", path, |parent, name| {
            utimensat(parent, name, &accessed, &modified, UtimensatFlags::NoFollowSymlink)
        })
    }

    /// Sets an extended attribute, a link not followed.
    ///
    /// # Errors
    /// The file system refuses it, or a link is on the way.
    pub fn set_attribute(&self, path: &Path, name: &OsStr, value: &[u8]) -> Result<(), Error> {
        let (_parent, file) = self.by_parent("set an attribute of", path)?;
        let attribute = self.c_string("set an attribute of", path, name)?;
        // SAFETY: two NUL-terminated strings and a buffer with its length; all live until the call returns.
        let result =
            unsafe { nix::libc::lsetxattr(file.as_ptr(), attribute.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
        Errno::result(result)
            .map(drop)
            .map_err(|errno| self.error("set an attribute of", path, errno))
    }

    /// The names of all extended attributes, a link not followed. A file system without attributes has none.
    ///
    /// # Errors
    /// It does not exist, or a link is on the way.
    pub fn attributes(&self, path: &Path) -> Result<Vec<OsString>, Error> {
        let (_parent, file) = self.by_parent("list the attributes of", path)?;
        // 64 KiB is the kernel's own limit for the list.
        let mut names = vec![0_u8; 64 * 1024];
        // SAFETY: a NUL-terminated string and a buffer with its length; both live until the call returns.
        let result = unsafe { nix::libc::llistxattr(file.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
        match Errno::result(result) {
            Ok(len) => names.truncate(usize::try_from(len).unwrap_or(0)),
            Err(Errno::ENOTSUP) => return Ok(Vec::new()),
            Err(errno) => return Err(self.error("list the attributes of", path, errno)),
        }
        Ok(names
            .split(|b| *b == 0)
            .filter(|n| !n.is_empty())
            .map(|n| OsStr::from_bytes(n).to_owned())
            .collect())
    }

    /// The value of an extended attribute, a link not followed; none where it is absent.
    ///
    /// # Errors
    /// It could not be read, or a link is on the way.
    pub fn attribute(&self, path: &Path, name: &OsStr) -> Result<Option<Vec<u8>>, Error> {
        let (_parent, file) = self.by_parent("read an attribute of", path)?;
        let attribute = self.c_string("read an attribute of", path, name)?;
        let mut value = vec![0_u8; 64 * 1024];
        // SAFETY: two NUL-terminated strings and a buffer with its length; all live until the call returns.
        let result = unsafe {
            nix::libc::lgetxattr(
                file.as_ptr(),
                attribute.as_ptr(),
                value.as_mut_ptr().cast(),
                value.len(),
            )
        };
        match Errno::result(result) {
            Ok(len) => {
                value.truncate(usize::try_from(len).unwrap_or(0));
                Ok(Some(value))
            }
            Err(Errno::ENODATA | Errno::ENOTSUP) => Ok(None),
            Err(errno) => Err(self.error("read an attribute of", path, errno)),
        }
    }

    fn resolve(&self, doing: &'static str, path: &Path, flags: OFlag, mode: Mode) -> Result<OwnedFd, Error> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW)
            .mode(mode)
            .resolve(RESOLVE);
        loop {
            match openat2(&self.fd, path, how) {
                // EAGAIN: a rename elsewhere raced with the check of `..`; the kernel asks for a repetition.
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                result => return result.map_err(|errno| self.error(doing, path, errno)),
            }
        }
    }

    /// A descriptor of the very name, a link itself included (`O_PATH | O_NOFOLLOW` at the last component).
    fn resolve_last_link(&self, doing: &'static str, path: &Path) -> Result<OwnedFd, Error> {
        match split(path) {
            None => self.resolve(doing, path, OFlag::O_PATH, Mode::empty()),
            Some((parent, name)) => {
                let parent = self.resolve(doing, parent, OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::empty())?;
                nix::fcntl::openat(
                    &parent,
                    name,
                    OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
                    Mode::empty(),
                )
                .map_err(|errno| self.error(doing, path, errno))
            }
        }
    }

    fn parent(&self, doing: &'static str, path: &Path) -> Result<(OwnedFd, OsString), Error> {
        let (parent, name) = split(path).ok_or_else(|| self.error(doing, path, Errno::EINVAL))?;
        let fd = self.resolve(doing, parent, OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::empty())?;
        Ok((fd, name.to_owned()))
    }

    fn at_parent(
        &self,
        doing: &'static str,
        path: &Path,
        work: impl FnOnce(BorrowedFd<'_>, &OsStr) -> nix::Result<()>,
    ) -> Result<(), Error> {
        let (parent, name) = self.parent(doing, path)?;
        work(parent.as_fd(), &name).map_err(|errno| self.error(doing, path, errno))
    }

    /// As [`Self::at_parent`], for what may also be done to the root itself (`.`).
    fn at_name(
        &self,
        doing: &'static str,
        path: &Path,
        work: impl FnOnce(BorrowedFd<'_>, &OsStr) -> nix::Result<()>,
    ) -> Result<(), Error> {
        if path == Path::new(".") {
            return work(self.fd.as_fd(), OsStr::new(".")).map_err(|errno| self.error(doing, path, errno));
        }
        self.at_parent(doing, path, work)
    }

    /// A path through the descriptor of the parent, for calls that have no `at` form.
    fn by_parent(&self, doing: &'static str, path: &Path) -> Result<(OwnedFd, CString), Error> {
        let (fd, name) = match split(path) {
            Some(_) => self.parent(doing, path)?,
            None => (
                self.resolve(doing, Path::new("."), OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::empty())?,
                ".".into(),
            ),
        };
        let mut text = format!("/proc/self/fd/{}/", fd.as_raw_fd()).into_bytes();
        text.extend_from_slice(name.as_bytes());
        let text = CString::new(text).map_err(|_| self.error(doing, path, Errno::EINVAL))?;
        Ok((fd, text))
    }

    fn c_string(&self, doing: &'static str, path: &Path, text: &OsStr) -> Result<CString, Error> {
        CString::new(text.as_bytes()).map_err(|_| self.error(doing, path, Errno::EINVAL))
    }

    fn error(&self, doing: &'static str, path: &Path, errno: Errno) -> Error {
        Error {
            doing,
            path: path.to_owned(),
            root: self.root.clone(),
            source: errno.into(),
        }
    }
}

/// Parent (`.` for the root itself) and last component; none where the path does not end in a plain name.
fn split(path: &Path) -> Option<(&Path, &OsStr)> {
    let Some(Component::Normal(name)) = path.components().next_back() else {
        return None;
    };
    // `a/..` has no plain last name; `a/` and `a/.` are `a` for Path, but not for the kernel.
    if path.as_os_str().as_bytes().last() == Some(&b'/') {
        return None;
    }
    let parent = path.parent()?;
    Some((
        if parent.as_os_str().is_empty() {
            Path::new(".")
        } else {
            parent
        },
        name,
    ))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    fn folder(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("peregrine-beneath-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(path.join("in")).unwrap();
        std::fs::create_dir_all(path.join("out")).unwrap();
        std::fs::write(path.join("out/secret"), "s").unwrap();
        path
    }

    #[test]
    fn nothing_reaches_outside() {
        let base = folder("outside");
        let root = Beneath::open(&base.join("in")).unwrap();
        std::os::unix::fs::symlink("../out", base.join("in/link")).unwrap();
        std::os::unix::fs::symlink("../out/secret", base.join("in/file")).unwrap();
        std::os::unix::fs::symlink("/proc/self/root", base.join("in/magic")).unwrap();
        for path in [
            "../out/secret",
            "link/secret",
            "file",
            "/etc/passwd",
            "magic/etc/passwd",
            "a/../../out/secret",
        ] {
            let path = Path::new(path);
            assert!(root.read(path).is_err(), "read {}", path.display());
        }
        for path in ["../new", "link/new", "/tmp/new", "..", ".", ""] {
            let path = Path::new(path);
            assert!(root.create(path, 0o600).is_err(), "create {}", path.display());
            assert!(root.create_folder(path, 0o700).is_err(), "folder {}", path.display());
            assert!(
                root.create_link(path, OsStr::new("x")).is_err(),
                "link {}",
                path.display()
            );
            assert!(root.create_node(path, 0o100_600, 0).is_err(), "node {}", path.display());
            assert!(root.remove(path).is_err(), "remove {}", path.display());
        }
        assert!(root.set_mode(Path::new("file"), 0o777).is_err());
        assert!(root.remove_tree(Path::new("link/secret")).is_err());
        root.remove_tree(Path::new("link")).unwrap();
        root.remove(Path::new("file")).unwrap();
        assert!(base.join("out/secret").exists());
        std::fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn what_is_made_is_found_and_removed() {
        let base = folder("made");
        let root = Beneath::open(&base.join("in")).unwrap();
        let p = Path::new;
        root.create_folders(p("a/b/c"), 0o750).unwrap();
        root.create_folders(p("a/b/c"), 0o750).unwrap();
        root.create(p("a/b/f"), 0o600).unwrap().write_all(b"text").unwrap();
        assert!(root.create(p("a/b/f"), 0o600).is_err());
        root.hard_link(p("a/b/f"), p("a/g")).unwrap();
        root.create_link(p("a/l"), OsStr::new("/etc")).unwrap();
        root.create_node(p("a/fifo"), 0o010_600, 0).unwrap();
        root.set_mode(p("a/g"), 0o640).unwrap();
        root.set_owner(p("a/l"), 1, 2).unwrap();
        assert_eq!(root.stat(p("a/l")).unwrap().st_uid, 1);
        assert_eq!(root.read_link(p("a/l")).unwrap(), "/etc");
        assert_eq!(root.stat(p("a/b/f")).unwrap().st_mode & 0o7777, 0o640);
        let mut text = String::new();
        root.read(p("a/g")).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
        root.rename(p("a/g"), p("a/b/h")).unwrap();
        if root.set_attribute(p("a/b/h"), OsStr::new("trusted.x"), b"1").is_ok() {
            assert_eq!(
                root.attribute(p("a/b/h"), OsStr::new("trusted.x")).unwrap().unwrap(),
                b"1"
            );
            assert_eq!(root.attributes(p("a/b/h")).unwrap(), ["trusted.x"]);
        }
        assert_eq!(root.attribute(p("."), OsStr::new("trusted.none")).unwrap(), None);
        let mut names = root.list(p("a")).unwrap();
        names.sort();
        assert_eq!(names, ["b", "fifo", "l"]);
        root.remove_tree(p("a")).unwrap();
        root.remove_tree(p("a")).unwrap();
        assert!(root.list(p(".")).unwrap().is_empty());
        assert!(p("/etc").exists());
        std::fs::remove_dir_all(base).unwrap();
    }
}
