//! The wrapper's side of a target pod: hand-offs are written for it, its shepherds are found and spoken to.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use protocol::hand_off::{
    HAND_OFF_ABORTED, HAND_OFF_DIR, HAND_OFF_FILE, HandOff, MAX_FILE, MAX_LINE, Request, SHEPHERD_DIR, SHEPHERD_FILE,
    SHEPHERD_SOCKET, ShepherdReport, State,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
};

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// A file.
    #[error("failed to {0} {1}")]
    File(&'static str, PathBuf, #[source] io::Error),
    /// The uid or name makes no path.
    #[error("{0:?} is not the name of a pod or container")]
    Name(String),
    /// The hand-off could not be encoded.
    #[error("failed to encode a hand-off")]
    Seal(#[source] protocol::sealed::Error),
    /// The shepherd could not be asked.
    #[error("failed to speak to the shepherd of container {0}")]
    Socket(String, #[source] io::Error),
    /// It answered nonsense, or too slowly.
    #[error("the shepherd of container {0} {1}")]
    Answer(String, &'static str),
}

fn plain(name: &str) -> Result<&str, Error> {
    let ok =
        !name.is_empty() && name.len() <= 253 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
    if ok && name != "." && name != ".." {
        Ok(name)
    } else {
        Err(Error::Name(name.to_owned()))
    }
}

fn folder_of(pod_uid: &str) -> Result<PathBuf, Error> {
    Ok(Path::new(HAND_OFF_DIR).join(plain(pod_uid)?))
}

fn private_folder(path: &Path) -> Result<(), Error> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|e| Error::File("create", path.to_owned(), e))
}

/// Lets the wrapper start shepherds: one hand-off for each container.
///
/// # Errors
/// See [`Error`].
pub(super) fn write_hand_offs(hand_offs: &[HandOff]) -> Result<(), Error> {
    for hand_off in hand_offs {
        let folder = folder_of(&hand_off.pod_uid)?.join(plain(&hand_off.container)?);
        private_folder(&folder)?;
        let path = folder.join(HAND_OFF_FILE);
        let sealed = hand_off.seal().map_err(Error::Seal)?;
        // The wrapper polls for the name: it must never see half a file.
        let new = folder.join("new");
        let write = || -> io::Result<()> {
            use std::io::Write as _;
            let mut file = fs::OpenOptions::new()
                .create(true)
                .truncate(true)
                .write(true)
                .mode(0o600)
                .open(&new)?;
            file.write_all(&sealed)?;
            fs::rename(&new, &path)
        };
        write().map_err(|e| Error::File("write", path.clone(), e))?;
    }
    Ok(())
}

/// Lets a `create` that still waits fail at once, and every later one.
///
/// # Errors
/// See [`Error`].
pub(super) fn mark_aborted(pod_uid: &str) -> Result<(), Error> {
    let folder = folder_of(pod_uid)?;
    private_folder(&folder)?;
    let marker = folder.join(HAND_OFF_ABORTED);
    fs::write(&marker, b"").map_err(|e| Error::File("write", marker, e))?;
    // What was not used yet must not be used any more.
    let entries = fs::read_dir(&folder).map_err(|e| Error::File("list", folder.clone(), e))?;
    for entry in entries.flatten() {
        let path = entry.path().join(HAND_OFF_FILE);
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(e) => return Err(Error::File("remove", path, e)),
        }
    }
    Ok(())
}

/// Removes all hand-offs of a pod.
///
/// # Errors
/// See [`Error`].
pub(super) fn remove_hand_offs(pod_uid: &str) -> Result<(), Error> {
    let folder = folder_of(pod_uid)?;
    match fs::remove_dir_all(&folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::File("remove", folder, e)),
        _ => Ok(()),
    }
}

/// The shepherds that stand for a pod.
///
/// # Errors
/// The folder cannot be read. A report that is not valid is passed over: it is not ours, or not complete yet.
pub(super) fn standing(pod_uid: &str, migration_uid: &str) -> Result<Vec<ShepherdReport>, Error> {
    let folder = Path::new(SHEPHERD_DIR);
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::File("list", folder.to_owned(), e)),
    };
    let mut found: Vec<ShepherdReport> = entries
        .flatten()
        .filter_map(|e| {
            let path = e.path().join(SHEPHERD_FILE);
            if fs::metadata(&path).ok()?.len() > u64::try_from(MAX_FILE).ok()? {
                return None;
            }
            let report = ShepherdReport::open(&fs::read(path).ok()?).ok()?;
            let ours = report.hand_off.pod_uid == pod_uid && report.hand_off.migration_uid == migration_uid;
            (ours && e.file_name().to_str() == Some(report.container_id.as_str())).then_some(report)
        })
        .collect();
    found.sort_by(|a, b| a.hand_off.container.cmp(&b.hand_off.container));
    Ok(found)
}

/// Asks a shepherd, and waits for its answer.
///
/// # Errors
/// See [`Error`]; what was asked may have happened.
pub(super) async fn ask(container_id: &str, request: &Request, within: Duration) -> Result<State, Error> {
    let path = Path::new(SHEPHERD_DIR).join(plain(container_id)?).join(SHEPHERD_SOCKET);
    let id = || container_id.to_owned();
    let socket = |e| Error::Socket(id(), e);
    let exchange = async {
        let mut stream = UnixStream::connect(&path).await.map_err(socket)?;
        let mut line = serde_json::to_vec(request).map_err(|_| Error::Answer(id(), "cannot be asked this"))?;
        line.push(b'\n');
        stream.write_all(&line).await.map_err(socket)?;
        let mut answer = Vec::new();
        let mut piece = [0; 4096];
        while !answer.contains(&b'\n') {
            let n = stream.read(&mut piece).await.map_err(socket)?;
            if n == 0 || answer.len() > MAX_LINE {
                return Err(Error::Answer(id(), "did not answer"));
            }
            answer.extend_from_slice(piece.get(..n).unwrap_or_default());
        }
        let line = answer.split(|b| *b == b'\n').next().unwrap_or_default();
        serde_json::from_slice(line).map_err(|_| Error::Answer(id(), "gave an answer that cannot be read"))
    };
    tokio::time::timeout(within, exchange)
        .await
        .map_err(|_| Error::Answer(id(), "did not answer in time"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_leads_elsewhere_is_refused() {
        for bad in ["", ".", "..", "a/b", "../x", "a\0b", "ä"] {
            assert!(plain(bad).is_err(), "{bad:?}");
        }
        assert!(plain("0f3a-77.b_c").is_ok());
    }
}
