//! Files that a process holds open by a name that was removed, while the file lives on under another name.
//!
//! CRIU gives such a file a name for the time of its dump, `link_remap.N` beside the old one, and the image says that it is to
//! be opened by it. After a dump that leaves the processes alive it takes the name away again, as it must: nothing is left
//! behind on a source that goes on. So the name is made on the target, as another link to the same file; the restore removes
//! it when it has opened the file.
//!
//! Of a file that has no name left at all (a ghost) the image holds the content; nothing is to be done for it.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use hostsys::beneath::{self, Beneath};
use nix::sys::stat::SFlag;
use protocol::{
    migrate::message::{EntryKind, Meta, Place},
    raw::Raw,
};

use crate::{
    cure::{self, Message},
    outbox::{self, Outbox},
    pod_on_node::{self, ContainerOnNode},
};

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An image.
    #[error("failed to read the image {0}")]
    Read(PathBuf, #[source] io::Error),
    /// Its content.
    #[error("the images of open files cannot be understood")]
    Image(#[from] cure::Error),
    /// The container's processes.
    #[error(transparent)]
    Processes(#[from] pod_on_node::Error),
    /// No process has such a file, or two files had that name.
    #[error("{1} open files had the name {0}, which was removed, where one was expected: let the program open it anew")]
    Ambiguous(PathBuf, usize),
    /// It lies in a volume.
    #[error(
        "{0} was removed while it is open, and lies in a volume, which is not carried: let the program open it anew"
    )]
    InVolume(PathBuf),
    /// Its folder.
    #[error(transparent)]
    Beneath(#[from] beneath::Error),
    /// The connection.
    #[error(transparent)]
    Outbox(#[from] outbox::Error),
}

/// An open file without its name. Both paths are absolute in the container.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Remap {
    /// The name by which CRIU opens it on the target.
    link: PathBuf,
    /// The name by which the program had opened it.
    original: PathBuf,
}

/// Gives every such file of a container its name on the target. To be called when all else of the container's files has been
/// sent. Blocking.
///
/// # Errors
/// See [`Error`].
pub fn send(images: &Path, container: &ContainerOnNode, place: u32, outbox: &Outbox) -> Result<(), Error> {
    let read = |name: &str| {
        let path = images.join(name);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::Read(path, e)),
        }
    };
    // Most containers have none: then there is no such image.
    let (Some(remaps), Some(files)) = (read("remap-fpath.img")?, read("files.img")?) else {
        return Ok(());
    };
    for remap in linked(&remaps, &files)? {
        let file = held(&remap.original, &container.pids()?)?;
        if let (Some(shm), Ok(link)) = (&container.shm, remap.link.strip_prefix("/dev/shm")) {
            name_it(&file, shm, shm, link, Place::Shm, outbox)?;
        } else if let (Some(upper), Ok(link)) = (&container.upper, remap.link.strip_prefix("/")) {
            let folder = link.parent().unwrap_or(Path::new(""));
            let volumes = container.config["mounts"].as_array().into_iter().flatten();
            let mut volumes = volumes.filter_map(|m| m["destination"].as_str());
            if volumes.any(|volume| Path::new("/").join(folder).starts_with(volume)) {
                return Err(Error::InVolume(remap.original));
            }
            name_it(&file, upper, &container.rootfs, link, Place::Root(place), outbox)?;
        }
    }
    Ok(())
}

/// Files that CRIU has linked for its dump.
fn linked(remaps: &[u8], files: &[u8]) -> Result<Vec<Remap>, cure::Error> {
    /// Fields of a remap: the file, the file that stands for it, how.
    const REMAP: [u64; 3] = [1, 2, 3];
    /// How: by a link. Others are ghosts and files of /proc.
    const LINKED: u64 = 0;
    /// Fields of a file: its number; a regular file, of which one field is the path.
    const FILE: [u64; 3] = [2, 3, 6];
    let mut names: Vec<(u64, PathBuf)> = Vec::new();
    cure::each_entry(files, |file: &mut Message| {
        let number = file.number(FILE[0]);
        file.edit(FILE[1], |regular| {
            if let (Some(number), Some(name)) = (number, regular.bytes_mut(FILE[2])) {
                names.push((number, PathBuf::from(OsStr::from_bytes(name))));
            }
            Ok(false)
        })
    })?;
    let mut found = Vec::new();
    cure::each_entry(remaps, |remap: &mut Message| {
        let name = |field: u64| {
            let number = remap.number(field)?;
            names.iter().find(|(n, _)| *n == number).map(|(_, name)| name.clone())
        };
        if remap.number(REMAP[2]).unwrap_or(LINKED) == LINKED
            && let (Some(original), Some(link)) = (name(REMAP[0]), name(REMAP[1]))
        {
            found.push(Remap { link, original });
        }
        Ok(false)
    })?;
    Ok(found)
}

/// The file that had this name, from a process that holds it.
fn held(original: &Path, pids: &[i32]) -> Result<File, Error> {
    let mut deleted = original.as_os_str().to_owned();
    deleted.push(" (deleted)");
    let mut found: Vec<(u64, u64, File)> = Vec::new();
    for folder in pids
        .iter()
        .flat_map(|pid| [format!("/proc/{pid}/fd"), format!("/proc/{pid}/map_files")])
    {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if fs::read_link(entry.path()).is_ok_and(|name| name == Path::new(&deleted))
                && let Ok(file) = File::open(entry.path())
                && let Ok(stat) = file.metadata()
                && stat.nlink() > 0
                && !found
                    .iter()
                    .any(|(dev, ino, _)| (*dev, *ino) == (stat.dev(), stat.ino()))
            {
                found.push((stat.dev(), stat.ino(), file));
            }
        }
    }
    let count = found.len();
    match (found.pop(), count) {
        (Some((.., file)), 1) => Ok(file),
        _ => Err(Error::Ambiguous(original.to_owned(), count)),
    }
}

/// Another link to the file where the tree that is sent has it; else (its other names are below it, in the container's image) a
/// file of the same content, which is what the overlay makes of a link when it is written to.
fn name_it(file: &File, upper: &Path, merged: &Path, link: &Path, place: Place, outbox: &Outbox) -> Result<(), Error> {
    let stat = file.metadata().map_err(|e| Error::Read(link.to_owned(), e))?;
    let same = |path: &Path| {
        let there = merged.join(path).symlink_metadata();
        there.is_ok_and(|there| (there.dev(), there.ino()) == (stat.dev(), stat.ino()))
    };
    let bytes = link.as_os_str().as_bytes();
    if let Some(name) = find(&Beneath::open(upper)?, Path::new(""), &same) {
        let to = Raw::from(name.as_os_str().as_bytes());
        return Ok(outbox.entry(place, bytes, EntryKind::HardLink { to }, None)?);
    }
    let meta = Meta {
        mode: stat.mode() & 0o7777,
        uid: stat.uid(),
        gid: stat.gid(),
        mtime: stat.mtime(),
        mtime_nanos: u32::try_from(stat.mtime_nsec()).unwrap_or(0),
        xattrs: Vec::new(),
    };
    Ok(outbox.whole(place, bytes, Some(meta), file, &link.display().to_string())?)
}

/// A name below a folder for which this is so.
fn find(tree: &Beneath, folder: &Path, is_it: &impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let listed = if folder == Path::new("") {
        Path::new(".")
    } else {
        folder
    };
    for name in tree.list(listed).unwrap_or_default() {
        let path = folder.join(name);
        let Ok(stat) = tree.stat(&path) else { continue };
        match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
            SFlag::S_IFDIR => {
                if let Some(found) = find(tree, &path, is_it) {
                    return Some(found);
                }
            }
            SFlag::S_IFREG if is_it(&path) => return Some(path),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::Outgoing;
    use protocol::migrate::FromSource;

    /// An image of entries, each of fields (number, value).
    fn image(entries: &[Vec<u8>]) -> Vec<u8> {
        let mut out = vec![0; 8];
        for entry in entries {
            out.extend_from_slice(&u32::try_from(entry.len()).unwrap().to_le_bytes());
            out.extend_from_slice(entry);
        }
        out
    }

    fn regular(number: u8, name: &str) -> Vec<u8> {
        let mut inner = vec![6 << 3 | 2, u8::try_from(name.len()).unwrap()];
        inner.extend_from_slice(name.as_bytes());
        let mut entry = vec![
            1 << 3,
            1,
            2 << 3,
            number,
            3 << 3 | 2,
            u8::try_from(inner.len()).unwrap(),
        ];
        entry.extend(inner);
        entry
    }

    #[test]
    fn links_are_told_from_ghosts() {
        let files = image(&[
            regular(1, "/data/deleted"),
            regular(2, "/data/removed"),
            regular(3, "/data/link_remap.3"),
        ]);
        let ghost = vec![1 << 3, 1, 2 << 3, 1, 3 << 3, 1];
        let link = vec![1 << 3, 2, 2 << 3, 3, 3 << 3, 0];
        let remap = Remap {
            link: "/data/link_remap.3".into(),
            original: "/data/removed".into(),
        };
        assert_eq!(linked(&image(&[ghost, link.clone()]), &files).unwrap(), [remap]);
        assert!(linked(&image(&[link])[..10], &files).is_err(), "cut off");
    }

    fn queued(outgoing: Option<Outgoing>) -> EntryKind {
        match outgoing {
            Some(Outgoing::Message(FromSource::Entry(entry))) => entry.kind,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_file_that_lost_one_of_its_names_is_linked_to_another() {
        let folder = std::env::temp_dir().join(format!("peregrine-nameless-{}", std::process::id()));
        fs::create_dir_all(folder.join("deeper")).unwrap();
        let original = folder.join("removed");
        let open = File::create_new(&original).unwrap();
        fs::hard_link(&original, folder.join("deeper/other")).unwrap();
        fs::remove_file(&original).unwrap();
        let own = [i32::try_from(std::process::id()).unwrap()];

        let found = held(&original, &own).unwrap();
        assert_eq!(found.metadata().unwrap().ino(), open.metadata().unwrap().ino());
        let (outbox, mut queue, _pool) = Outbox::new();
        let link = Path::new("link_remap.3");
        name_it(&found, &folder, &folder, link, Place::Shm, &outbox).unwrap();
        assert_eq!(
            queued(queue.try_recv().ok()),
            EntryKind::HardLink {
                to: Raw::from("deeper/other")
            }
        );
        // Where its other names are not sent, it is itself.
        let empty = folder.join("empty");
        fs::create_dir(&empty).unwrap();
        name_it(&found, &empty, &empty, link, Place::Shm, &outbox).unwrap();
        assert!(matches!(queued(queue.try_recv().ok()), EntryKind::File { .. }));

        // Two files that had the same name cannot be told apart; one without any name is none.
        let second = File::create_new(&original).unwrap();
        fs::hard_link(&original, folder.join("deeper/third")).unwrap();
        fs::remove_file(&original).unwrap();
        assert!(matches!(held(&original, &own), Err(Error::Ambiguous(_, 2))));
        fs::remove_file(folder.join("deeper/third")).unwrap();
        assert!(held(&original, &own).is_ok());
        drop((second, open));
        fs::remove_dir_all(&folder).unwrap();
    }
}
