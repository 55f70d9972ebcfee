//! The journal of a session: what it is about to do, before it does it. It is on the node's disk and outlives the agent
//! and the node.
//!
//! One line a record: JSON, a tab, the first 16 hexadecimal digits of the SHA-256 of that JSON. A last line that is cut off
//! was never acknowledged and is dropped; damage anywhere else is an error, and nothing is guessed.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    net::IpAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::decide::step::{Role, Step};

/// Folder of all journals of a node.
pub const JOURNALS: &str = "/var/lib/peregrine/journal";
/// Largest journal that is read.
const MAX_BYTES: u64 = 64 * 1024 * 1024;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("failed to {0} journal {1}")]
    File(&'static str, PathBuf, #[source] io::Error),
    /// A line in the middle is not what was written.
    #[error("journal {0} is damaged in line {1}")]
    Damaged(PathBuf, usize),
    /// A record could not be put into words.
    #[error("failed to encode a record for journal {0}")]
    Encode(PathBuf, #[source] serde_json::Error),
}

/// Whose journal it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// Version of the format.
    pub version: u32,
    /// Role of this node.
    pub role: Role,
    /// Namespace of the migration.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// The attempt.
    pub attempt: u32,
    /// Uid of this node's pod.
    pub pod_uid: String,
    /// Name of this node's pod.
    pub pod_name: String,
    /// Boot of the node in which it was written: after a reboot no process of the session lives.
    pub boot_id: String,
}

/// A container that is about to be frozen and dumped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenContainer {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// Its cgroup.
    pub cgroup: PathBuf,
    /// The cgroup in which its dump runs.
    pub dump_cgroup: PathBuf,
}

/// A thread as it was when it was frozen, before CRIU touched it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenThread {
    /// Place of its container in [`Record::Frozen`].
    pub container: u32,
    /// Id in the node's pid namespace.
    pub tid: i32,
    /// Id in the container's pid namespace.
    pub vtid: u32,
    /// Number of the system call it is in, its first argument and the address behind it; absent where it is in none.
    pub call: Option<(u64, u64, u64)>,
    /// A signal waits for it: then EINTR is what it should see.
    pub pending: bool,
}

/// A container of a target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetContainer {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// Its cgroup.
    pub cgroup: PathBuf,
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// The first.
    Start(Start),
    /// A step begins: nothing of it has happened before this record was on disk.
    Begin {
        /// The step.
        step: Step,
    },
    /// All of a step has happened.
    End {
        /// The step.
        step: Step,
    },
    /// A step failed.
    Failed {
        /// The step.
        step: Step,
        /// A reason of the API's vocabulary.
        reason: String,
        /// One sentence.
        message: String,
    },
    /// Source: what is about to be frozen.
    Frozen {
        /// The containers.
        containers: Vec<FrozenContainer>,
    },
    /// Source: the threads as they were frozen.
    Threads {
        /// All of them.
        threads: Vec<FrozenThread>,
    },
    /// Target: the containers whose shepherds stand.
    Shepherds {
        /// The containers.
        containers: Vec<TargetContainer>,
        /// Network namespace of the sandbox.
        network_namespace: PathBuf,
    },
    /// Target: addresses that are about to be added to the loopback.
    Addresses {
        /// The addresses.
        addresses: Vec<IpAddr>,
    },
    /// The decision is known.
    Decided {
        /// True: Committed.
        committed: bool,
        /// Why it was aborted.
        reason: String,
        /// One sentence.
        message: String,
    },
    /// Nothing of the session is left on this node; the API need not know yet.
    Settled,
}

impl Record {
    /// Whether it has to be on the disk before anything is done. A frozen cgroup, a packet hold, a memory file system or a
    /// restored process is gone after a loss of power, and so is the need to know of it: such a record only has to outlive
    /// the agent, which the page cache does. That saves several writes to the disk inside the freeze. What the other node
    /// or the API may have acted upon is different.
    #[must_use]
    pub fn outlives_a_reboot(&self) -> bool {
        match self {
            Self::Begin { step } => match step {
                Step::SourceReserve
                | Step::SourceComplete
                | Step::SourceMoveAway
                | Step::SourceCleanUp
                | Step::TargetHandOff
                | Step::TargetCommit
                | Step::TargetDestroy
                | Step::TargetCleanUp => true,
                Step::SourceConnect
                | Step::SourceCopy
                | Step::SourceFreeze
                | Step::SourceHoldPackets
                | Step::SourceDump
                | Step::SourceCure
                | Step::SourceRepair
                | Step::SourceReleasePackets
                | Step::SourceThaw
                | Step::TargetReserve
                | Step::TargetReceive
                | Step::TargetPrepareNetwork
                | Step::TargetRestore
                | Step::TargetAdjust
                | Step::TargetThaw => false,
            },
            Self::Start(_) | Self::Decided { .. } | Self::Settled => true,
            Self::End { .. }
            | Self::Failed { .. }
            | Self::Frozen { .. }
            | Self::Threads { .. }
            | Self::Shepherds { .. }
            | Self::Addresses { .. } => false,
        }
    }
}

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    records: Vec<Record>,
}

/// File name of a journal.
#[must_use]
pub fn file_name(uid: &str, role: Role) -> String {
    format!("{uid}.{}.jsonl", role.as_str())
}

impl Journal {
    /// Opens a journal, or makes an empty one, durable in its folder.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(folder: &Path, uid: &str, role: Role) -> Result<Self, Error> {
        let path = folder.join(file_name(uid, role));
        fs::create_dir_all(folder).map_err(|e| Error::File("create the folder of", path.clone(), e))?;
        let records = match fs::metadata(&path) {
            Ok(m) if m.len() > MAX_BYTES => return Err(Error::Damaged(path, 0)),
            Ok(_) => {
                let bytes = fs::read(&path).map_err(|e| Error::File("read", path.clone(), e))?;
                let (records, good) = parse(&path, &bytes)?;
                if good < bytes.len() {
                    // What is cut off was never acknowledged: the next record must not stand behind it.
                    let file = OpenOptions::new().write(true).open(&path);
                    file.and_then(|f| f.set_len(u64::try_from(good).unwrap_or(0)).and_then(|()| f.sync_all()))
                        .map_err(|e| Error::File("repair", path.clone(), e))?;
                }
                records
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(Error::File("look at", path, e)),
        };
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| Error::File("open", path.clone(), e))?;
        sync_folder(folder).map_err(|e| Error::File("make durable the folder of", path.clone(), e))?;
        Ok(Self { path, file, records })
    }

    /// Everything in it.
    #[must_use]
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Adds a record. When this returns, the record outlives this process, and a loss of power where it says something
    /// that a reboot does not itself take back.
    ///
    /// # Errors
    /// See [`Error`]; nothing may be done then that the record announces.
    pub fn append(&mut self, record: Record) -> Result<(), Error> {
        let line = encode(&record).map_err(|e| Error::Encode(self.path.clone(), e))?;
        let durable = record.outlives_a_reboot();
        self.file
            .write_all(&line)
            .and_then(|()| if durable { self.file.sync_data() } else { Ok(()) })
            .map_err(|e| Error::File("append to", self.path.clone(), e))?;
        self.records.push(record);
        Ok(())
    }

    /// Removes it: nothing of the session is left, and the API knows.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn remove(folder: &Path, uid: &str, role: Role) -> Result<(), Error> {
        let path = folder.join(file_name(uid, role));
        match fs::remove_file(&path) {
            Ok(()) => sync_folder(folder).map_err(|e| Error::File("make durable the folder of", path, e)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(Error::File("remove", path, e)),
        }
    }
}

/// All journals of a folder: uid and role.
///
/// # Errors
/// See [`Error`].
pub fn all(folder: &Path) -> Result<Vec<(String, Role)>, Error> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::File("list the folder of", folder.to_owned(), e)),
    };
    let mut found: Vec<(String, Role)> = entries
        .flatten()
        .filter_map(|e| {
            let name = e.file_name().into_string().ok()?;
            let rest = name.strip_suffix(".jsonl")?;
            let (uid, role) = rest.rsplit_once('.')?;
            let role = [Role::Source, Role::Target].into_iter().find(|r| r.as_str() == role)?;
            Some((uid.to_owned(), role))
        })
        .collect();
    found.sort();
    Ok(found)
}

/// This boot of the node.
#[must_use]
pub fn boot_id() -> String {
    // In the cluster on one machine all nodes share one kernel and boot id: the start of the node's first process tells
    // its boots apart, on a real node as well.
    let kernel = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let init = fs::read_to_string("/proc/1/stat").unwrap_or_default();
    let start = init
        .rsplit_once(") ")
        .and_then(|(_, r)| r.split(' ').nth(19))
        .unwrap_or_default();
    format!("{}-{start}", kernel.trim())
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn encode(record: &Record) -> Result<Vec<u8>, serde_json::Error> {
    let mut line = serde_json::to_vec(record)?;
    let sum = checksum(&line);
    line.push(b'\t');
    line.extend_from_slice(sum.as_bytes());
    line.push(b'\n');
    Ok(line)
}

fn checksum(json: &[u8]) -> String {
    let mut text = protocol::sealed::hex(&Sha256::digest(json));
    text.truncate(16);
    text
}

/// The records, and how many bytes of the file they take.
fn parse(path: &Path, bytes: &[u8]) -> Result<(Vec<Record>, usize), Error> {
    let mut records = Vec::new();
    let mut at = 0;
    let mut rest = bytes;
    while !rest.is_empty() {
        let Some(end) = rest.iter().position(|b| *b == b'\n') else {
            break;
        };
        let (line, after) = rest.split_at(end + 1);
        let record = decode(line.get(..end).unwrap_or_default());
        match record {
            Some(record) => records.push(record),
            // Blocks of the last write may have reached the disk in any order.
            None if after.is_empty() => break,
            None => return Err(Error::Damaged(path.to_owned(), records.len() + 1)),
        }
        at += line.len();
        rest = after;
    }
    Ok((records, at))
}

fn decode(line: &[u8]) -> Option<Record> {
    let tab = line.iter().rposition(|b| *b == b'\t')?;
    let (json, sum) = line.split_at(tab);
    if sum.get(1..)? != checksum(json).as_bytes() {
        return None;
    }
    serde_json::from_slice(json).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("journal-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    fn begin(step: Step) -> Record {
        Record::Begin { step }
    }

    #[test]
    fn what_was_appended_is_there_after_a_restart() {
        let dir = folder("restart");
        let mut journal = Journal::open(&dir, "u", Role::Source).unwrap();
        journal.append(begin(Step::SourceReserve)).unwrap();
        journal.append(Record::Settled).unwrap();
        let again = Journal::open(&dir, "u", Role::Source).unwrap();
        assert_eq!(again.records(), [begin(Step::SourceReserve), Record::Settled]);
        assert_eq!(all(&dir).unwrap(), [("u".to_owned(), Role::Source)]);
        Journal::remove(&dir, "u", Role::Source).unwrap();
        assert!(all(&dir).unwrap().is_empty());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_last_record_that_is_cut_anywhere_is_dropped_and_the_next_one_stands_behind_the_good_ones() {
        let dir = folder("cut");
        let path = dir.join(file_name("u", Role::Target));
        let first = encode(&begin(Step::TargetHandOff)).unwrap();
        let second = encode(&Record::Settled).unwrap();
        for cut in 0..second.len() {
            fs::create_dir_all(&dir).unwrap();
            let mut bytes = first.clone();
            bytes.extend_from_slice(&second[..cut]);
            fs::write(&path, &bytes).unwrap();
            let mut journal = Journal::open(&dir, "u", Role::Target).unwrap();
            assert_eq!(journal.records(), [begin(Step::TargetHandOff)], "cut at {cut}");
            journal.append(begin(Step::TargetReserve)).unwrap();
            drop(journal);
            let again = Journal::open(&dir, "u", Role::Target).unwrap();
            assert_eq!(again.records().len(), 2);
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn every_changed_byte_in_the_middle_is_an_error() {
        let dir = folder("damage");
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join(file_name("u", Role::Source));
        let mut good = encode(&begin(Step::SourceFreeze)).unwrap();
        let first = good.len();
        good.extend(encode(&Record::Settled).unwrap());
        for at in 0..first - 1 {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            fs::write(&path, &bytes).unwrap();
            assert!(Journal::open(&dir, "u", Role::Source).is_err(), "byte {at}");
        }
        fs::remove_dir_all(dir).unwrap();
    }
}
