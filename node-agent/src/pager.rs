//! The pager of a target: the program that fills a restored pod's memory while the pod runs already (`runtime::pager`). It is
//! a process of its own in a cgroup of its own, so that an agent that ends or is killed does not hurt the pod; everything
//! here works from the migration's uid alone.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::{
        fs::{DirBuilderExt as _, OpenOptionsExt as _},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use hostsys::{
    cgroup::{self, Cgroup},
    program,
};
use protocol::{
    pager::{CONTROL_SOCKET, Container, PAGER_DIR, PLAN_FILE, Phase, Plan, RESULT_FILE, Request, Status},
    sealed,
};

/// Its name is how the wrapper knows what to be.
const NAME: &str = "pager";
/// What it says, in its folder.
const LOG: &str = "log";
/// Folder of cgroups in which dumps and pagers run.
const GROUPS: &str = "peregrine";
/// A started program listens within milliseconds.
const START: Duration = Duration::from_secs(10);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(1);
/// For an answer. A guardian that is killed is replaced within less.
const ANSWER: Duration = Duration::from_secs(5);
/// For the guardian's own killing of a pod, which it repeats.
const END: Duration = Duration::from_secs(30);

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder.
    #[error("failed to {0} {1}")]
    File(&'static str, PathBuf, #[source] io::Error),
    /// The plan could not be encoded, or the result not read.
    #[error("failed to use a file of the pager")]
    Sealed(#[source] sealed::Error),
    /// Its cgroup.
    #[error("failed to use the cgroup of the pager")]
    Cgroup(#[source] cgroup::Error),
    /// The program.
    #[error("failed to start the pager")]
    Start(#[source] program::Error),
    /// It ended at once.
    #[error("the pager did not come up within {START:?}")]
    NotUp,
    /// Nobody answers.
    #[error("the pager does not answer")]
    Answer(#[source] io::Error),
}

/// How it stands with a pod's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// There is, or was, nothing to fill, or all is filled.
    Complete(Option<Status>),
    /// It is being filled.
    Filling(Status),
    /// The pod was killed; or all that held its missing pages was, and it must be killed.
    Lost(String),
}

/// The pager of one migration; it need not exist.
#[derive(Clone, Debug)]
pub struct Pager {
    folder: PathBuf,
    uid: String,
}

impl Pager {
    /// That of a migration.
    #[must_use]
    pub fn of(uid: &str) -> Self {
        Self {
            folder: Path::new(PAGER_DIR).join(uid),
            uid: uid.to_owned(),
        }
    }

    /// Whether one was started.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.folder.exists()
    }

    fn cgroup(&self) -> Result<Cgroup, Error> {
        let root = cgroup::mount_point().map_err(Error::Cgroup)?;
        Ok(Cgroup::at(root.join(GROUPS).join(format!("pager-{}", self.uid))))
    }

    /// Starts it; when this returns, CRIU can connect to it in every work folder. Stores are looked for when CRIU names a
    /// process, so it can be started long before they are complete; but every container of its plan must then be restored
    /// lazily. Blocking.
    ///
    /// # Errors
    /// See [`Error`]; nothing of it is left then.
    pub fn start(&self, wrapper: &Path, containers: Vec<Container>) -> Result<(), Error> {
        self.start_inner(wrapper, containers).inspect_err(|_| {
            // Best effort: nothing was restored with it.
            if let Ok(cgroup) = self.cgroup() {
                let _ = cgroup.kill(END).and_then(|()| cgroup.remove(END));
            }
            let _ = fs::remove_dir_all(&self.folder);
        })
    }

    fn start_inner(&self, wrapper: &Path, containers: Vec<Container>) -> Result<(), Error> {
        let file = |what, path: &Path| {
            let path = path.to_owned();
            move |e| Error::File(what, path, e)
        };
        if self.folder.exists() {
            fs::remove_dir_all(&self.folder).map_err(file("remove", &self.folder))?;
        }
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)
            .map_err(file("create", &self.folder))?;
        let plan = Plan {
            containers,
            threads: threads(),
        };
        let sealed = plan.seal().map_err(Error::Sealed)?;
        let path = self.folder.join(PLAN_FILE);
        let written = fs::OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(&sealed));
        written.map_err(file("write", &path))?;
        let cgroup = self.cgroup()?;
        cgroup.create().map_err(Error::Cgroup)?;
        let arguments = [self.folder.clone().into_os_string()];
        let path = self.folder.join(LOG);
        let log = fs::File::create(&path).map_err(file("create", &path))?;
        let mut child = program::start_detached(wrapper, NAME.as_ref(), &arguments, cgroup.path(), Some(&log))
            .map_err(Error::Start)?;
        let deadline = Instant::now() + START;
        let socket = self.folder.join(CONTROL_SOCKET);
        while !socket.exists() {
            let ended = !matches!(child.try_wait(), Ok(None));
            if ended || Instant::now() > deadline {
                return Err(Error::NotUp);
            }
            std::thread::sleep(LOOK);
        }
        // Awaited, so that it leaves no zombie; after a restart of the agent it is init's.
        std::thread::spawn(move || child.wait());
        Ok(())
    }

    /// What it was told to do; nothing where there is none.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn plan(&self) -> Result<Plan, Error> {
        let path = self.folder.join(PLAN_FILE);
        match fs::read(&path) {
            Ok(bytes) => Plan::open(&bytes).map_err(Error::Sealed),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Plan {
                containers: Vec::new(),
                threads: 0,
            }),
            Err(e) => Err(Error::File("read", path, e)),
        }
    }

    fn ask(&self, request: Request) -> Result<Status, Error> {
        let exchange = || -> io::Result<Status> {
            let mut stream = UnixStream::connect(self.folder.join(CONTROL_SOCKET))?;
            stream.set_read_timeout(Some(ANSWER))?;
            stream.set_write_timeout(Some(ANSWER))?;
            let mut line = serde_json::to_vec(&request)?;
            line.push(b'\n');
            stream.write_all(&line)?;
            let mut answer = String::new();
            BufReader::new(io::Read::take(stream, 64 * 1024)).read_line(&mut answer)?;
            Ok(serde_json::from_str(&answer)?)
        };
        exchange().map_err(Error::Answer)
    }

    /// Lets it fill what nobody waits for. Blocking, a millisecond.
    ///
    /// # Errors
    /// It does not answer. It begins by itself a little later.
    pub fn fill(&self) -> Result<(), Error> {
        self.ask(Request::Fill).map(drop)
    }

    fn result(&self) -> Result<Option<Status>, Error> {
        let path = self.folder.join(RESULT_FILE);
        match fs::read(&path) {
            Ok(bytes) => Status::open(&bytes).map(Some).map_err(Error::Sealed),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::File("read", path, e)),
        }
    }

    /// How far it is. Blocking.
    ///
    /// # Errors
    /// It cannot be known now: its guardian is just being replaced, or is busy.
    pub fn standing(&self) -> Result<Standing, Error> {
        if !self.exists() {
            return Ok(Standing::Complete(None));
        }
        let asked = self.ask(Request::Status);
        if let Some(result) = self.result()? {
            return Ok(match result.phase {
                Phase::Filled => Standing::Complete(Some(result)),
                Phase::Waiting | Phase::Filling | Phase::Killed => Standing::Lost(result.message),
            });
        }
        match asked {
            Ok(status) => Ok(Standing::Filling(status)),
            Err(error) => {
                let cgroup = self.cgroup()?;
                let lives = cgroup.exists() && cgroup.is_populated().map_err(Error::Cgroup)?;
                // Between the two looks it may have ended well.
                if lives || self.result()?.is_some() {
                    return Err(error);
                }
                Ok(Standing::Lost(
                    "the pager and all that guards it were killed before the memory was complete".into(),
                ))
            }
        }
    }

    /// Ends it with the pod that it fills, and removes what it has left. Blocking.
    ///
    /// # Errors
    /// It cannot be ended: to be tried again.
    pub fn kill(&self) -> Result<(), Error> {
        if !self.exists() {
            return Ok(());
        }
        // Where nobody answers, the caller's own killing of the pod has to do; this is for the descriptors to be closed last.
        let _ = self.ask(Request::Kill);
        let cgroup = self.cgroup()?;
        if cgroup.exists() && cgroup.wait_empty(END).is_err() {
            cgroup.kill(END).map_err(Error::Cgroup)?;
        }
        self.remove()
    }

    /// Removes what is left of one that has ended.
    ///
    /// # Errors
    /// It still runs, or a folder cannot be removed.
    pub fn remove(&self) -> Result<(), Error> {
        let cgroup = self.cgroup()?;
        if cgroup.exists() {
            cgroup.wait_empty(END).map_err(Error::Cgroup)?;
            cgroup.remove(END).map_err(Error::Cgroup)?;
        }
        match fs::remove_dir_all(&self.folder) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::File("remove", self.folder.clone(), e)),
            _ => Ok(()),
        }
    }
}

/// Threads that fill: half of the processors, so that the pod keeps the other half; a few reach what memory can do.
fn threads() -> u32 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    u32::try_from((processors / 2).clamp(1, 4)).unwrap_or(1)
}

/// Whether a container's memory comes from a store: then it is restored lazily.
#[must_use]
pub fn has_store(store: &Path) -> bool {
    let Ok(entries) = fs::read_dir(store) else {
        return false;
    };
    entries
        .flatten()
        .any(|e| e.file_name().to_str().is_some_and(|name| name.ends_with(".index")))
}

/// Whether memory of one of these cgroups is still being filled: what CRIU would dump now lacks the missing pages.
#[must_use]
pub fn fills(cgroups: &[PathBuf]) -> bool {
    let Ok(entries) = fs::read_dir(PAGER_DIR) else {
        return false;
    };
    entries.flatten().any(|entry| {
        let folder = entry.path();
        let plan = fs::read(folder.join(PLAN_FILE)).ok().and_then(|b| Plan::open(&b).ok());
        let ours = plan.is_some_and(|plan| {
            let mut theirs = plan.containers.iter().map(|c| Path::new(&c.cgroup));
            theirs.any(|cgroup| cgroups.iter().any(|c| c == cgroup))
        });
        ours && !folder.join(RESULT_FILE).exists()
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn without_a_pager_memory_is_complete() {
        let pager = Pager::of("never-started");
        assert_eq!(pager.standing().unwrap(), Standing::Complete(None));
        pager.kill().unwrap();
        assert!(!has_store(Path::new("/nonexistent")));
        assert!(!fills(&[PathBuf::from("/sys/fs/cgroup/none")]));
    }

    #[test]
    fn host_a_pager_of_which_nothing_lives_has_lost_the_memory() {
        let pager = Pager::of(&format!("test-{}", std::process::id()));
        if !nix::unistd::geteuid().is_root() || pager.cgroup().is_err() {
            eprintln!("skipped: needs root and a cgroup v2 mount");
            return;
        }
        fs::create_dir_all(&pager.folder).unwrap();
        assert!(matches!(pager.standing().unwrap(), Standing::Lost(_)));
        let filled = Status {
            phase: Phase::Filled,
            ..Status::default()
        };
        fs::write(pager.folder.join(RESULT_FILE), filled.seal().unwrap()).unwrap();
        assert_eq!(pager.standing().unwrap(), Standing::Complete(Some(filled)));
        pager.remove().unwrap();
        assert!(!pager.exists());
    }

    #[test]
    fn host_a_pager_that_cannot_start_leaves_nothing() {
        let pager = Pager::of(&format!("test-start-{}", std::process::id()));
        if !nix::unistd::geteuid().is_root() || pager.cgroup().is_err() {
            eprintln!("skipped: needs root and a cgroup v2 mount");
            return;
        }
        assert!(pager.start(Path::new("/bin/false"), Vec::new()).is_err());
        assert!(!pager.exists() && !pager.cgroup().unwrap().exists());
    }

    /// The agent's container would count as running for as long as a pager has its streams, and not be started again.
    #[test]
    fn host_a_pager_has_none_of_the_agents_streams() {
        let pager = Pager::of(&format!("test-streams-{}", std::process::id()));
        if !nix::unistd::geteuid().is_root() || pager.cgroup().is_err() {
            eprintln!("skipped: needs root and a cgroup v2 mount");
            return;
        }
        let seen = std::env::temp_dir().join(format!("peregrine-streams-{}", std::process::id()));
        let script = seen.with_extension("sh");
        let text = format!(
            "#!/bin/sh\nlinks=$(readlink /proc/$$/fd/0 /proc/$$/fd/1 /proc/$$/fd/2)\necho \"$links\" > {0}\n",
            seen.display()
        );
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
        // It ends without a socket: that it did not come up is what it should say.
        assert!(pager.start(&script, Vec::new()).is_err());
        let links = fs::read_to_string(&seen).unwrap();
        fs::remove_file(&script).unwrap();
        fs::remove_file(&seen).unwrap();
        let log = pager.folder.join(LOG);
        let links: Vec<&str> = links.lines().map(|l| l.trim_end_matches(" (deleted)")).collect();
        assert_eq!(links, ["/dev/null", log.to_str().unwrap(), log.to_str().unwrap()]);
    }
}
