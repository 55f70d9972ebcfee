//! The target's store: a sparse file for each address space, in a memory file system. The offset of a page is its address; a
//! hole is zeros. See [`protocol::store_index`] for what the pager is told.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use nix::fcntl::{FallocateFlags, fallocate};
use protocol::{
    pages::Space,
    store_index::{self, StoreIndex},
};

use crate::{
    copier::{Batch, Sink},
    page_size,
    ranges::Ranges,
};

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the store.
    #[error("failed to {0} {1}")]
    File(&'static str, PathBuf, #[source] io::Error),
    /// More address spaces than there may be at once.
    #[error("more than {0} address spaces at once")]
    Spaces(usize),
    /// An address space that nothing was received of.
    #[error("nothing was received of address space {0}")]
    Unknown(u32),
    /// What was received is not what was announced.
    #[error("address space {space} has {has} bytes in its store where {announced} were sent")]
    Bytes {
        /// Which.
        space: u32,
        /// What the store has.
        has: u64,
        /// What the source says that it sent.
        announced: u64,
    },
    /// The number of a process is not one.
    #[error("two address spaces of process {0} in one container")]
    Twice(u32),
}

/// Address spaces that may be received at once.
const OPEN: usize = 16_384;

/// Receives pages: one for a pod, shared by all streams.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
    open: Arc<Mutex<BTreeMap<u32, Arc<File>>>>,
}

impl Store {
    /// Receives into `folder`, which must be in the same file system as the stores of the containers.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn receive(folder: &Path) -> Result<Self, Error> {
        fs::create_dir_all(folder).map_err(|e| Error::File("create", folder.to_owned(), e))?;
        Ok(Self {
            folder: folder.to_owned(),
            open: Arc::default(),
        })
    }

    fn path(&self, space: u32) -> PathBuf {
        self.folder.join(format!("in-{space}.pages"))
    }

    fn file(&self, space: u32) -> Result<Arc<File>, Error> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = open.get(&space) {
            return Ok(file.clone());
        }
        if open.len() >= OPEN {
            return Err(Error::Spaces(OPEN));
        }
        let path = self.path(space);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| Error::File("create", path, e))?;
        let file = Arc::new(file);
        open.insert(space, file.clone());
        Ok(file)
    }

    /// Puts pages into their places. Runs must not overlap, `bytes` holds them one behind the other.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn write(&self, space: u32, runs: &[Range<u64>], bytes: &[u8]) -> Result<(), Error> {
        let file = self.file(space)?;
        let failed = |e| Error::File("write", self.path(space), e);
        let mut rest = bytes;
        for run in runs {
            let length = usize::try_from(run.end - run.start).unwrap_or(usize::MAX);
            let (these, others) = rest
                .split_at_checked(length)
                .ok_or_else(|| failed(io::Error::from(io::ErrorKind::UnexpectedEof)))?;
            file.write_all_at(these, run.start).map_err(failed)?;
            rest = others;
        }
        Ok(())
    }

    /// Gives back the memory of pages; they are zeros from now on.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn forget(&self, space: u32, ranges: &[Range<u64>]) -> Result<(), Error> {
        let file = self.file(space)?;
        for range in ranges {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(
                &*file,
                flags,
                range.start.cast_signed(),
                (range.end - range.start).cast_signed(),
            )
            .map_err(|e| Error::File("give back a part of", self.path(space), e.into()))?;
        }
        Ok(())
    }

    /// An address space that is not needed any more, nor ever will be: its process has ended.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn drop_space(&self, space: u32) -> Result<(), Error> {
        let file = self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&space);
        match file {
            Some(_) => fs::remove_file(self.path(space)).map_err(|e| Error::File("remove", self.path(space), e)),
            None => Ok(()),
        }
    }

    /// Everything has arrived: gives each address space to its process in `store_of(container)` and removes all others.
    /// Compares what is there with what must be there.
    ///
    /// # Errors
    /// See [`Error`]; nothing must be restored then.
    pub fn finish(self, all: &[Space], store_of: impl Fn(u32) -> PathBuf) -> Result<(), Error> {
        let mut seen = std::collections::BTreeSet::new();
        for one in all {
            if !seen.insert((one.container, one.vpid)) {
                return Err(Error::Twice(one.vpid));
            }
            let folder = store_of(one.container);
            fs::create_dir_all(&folder).map_err(|e| Error::File("create", folder.clone(), e))?;
            let to = folder.join(store_index::pages_file(one.vpid));
            // A process all of whose memory is zeros has no file yet.
            let file = self.file(one.space)?;
            let runs: Ranges = one.runs.iter().cloned().collect();
            let has = allocated(&file).map_err(|e| Error::File("read", self.path(one.space), e))?;
            // More is no harm: the pager goes by the index.
            if has < runs.bytes() {
                return Err(Error::Bytes {
                    space: one.space,
                    has,
                    announced: runs.bytes(),
                });
            }
            fs::rename(self.path(one.space), &to).map_err(|e| Error::File("move", to, e))?;
            let index = StoreIndex {
                page_size: u32::try_from(page_size()).unwrap_or(4096),
                areas: one.areas.clone(),
                runs: one.runs.clone(),
                hot: one.hot.clone(),
            };
            let path = folder.join(store_index::index_file(one.vpid));
            let new = path.with_extension("new");
            fs::write(&new, index.encode())
                .and_then(|()| fs::rename(&new, &path))
                .map_err(|e| Error::File("write", path, e))?;
            self.open
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&one.space);
        }
        let rest: Vec<u32> = {
            let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.keys().copied().collect()
        };
        for space in rest {
            self.drop_space(space)?;
        }
        Ok(())
    }
}

/// Bytes that a file in a memory file system takes.
fn allocated(file: &File) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    Ok(file.metadata()?.blocks() * 512)
}

impl Sink for Store {
    fn pages(&mut self, batch: &mut Batch) -> io::Result<()> {
        self.write(batch.space(), batch.runs(), batch.bytes())
            .map_err(io::Error::other)
    }

    fn holes(&mut self, space: u32, ranges: &[Range<u64>]) -> io::Result<()> {
        self.forget(space, ranges).map_err(io::Error::other)
    }
}
