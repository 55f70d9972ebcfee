//! The agent's permission to start a container as a target: awaited a bounded time, checked, used once.
//!
//! It is opened beneath its folder, never through a link, must belong to root and to nobody else, and must name exactly this
//! pod, container and migration. Using it *moves* it into the shepherd's folder, so that of two calls only one can have it.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hostsys::beneath::{self, Beneath};
use nix::sys::stat::{SFlag, fstat};
use protocol::hand_off::{HAND_OFF_ABORTED, HAND_OFF_DIR, HAND_OFF_FILE, HAND_OFF_USED, HandOff, MAX_FILE};

use crate::folder::{Folder, is_name};
use crate::spec::Identity;

/// How often the folder is looked at: a look costs a few microseconds, and the kubelet waits for the answer.
const POLL: Duration = Duration::from_millis(5);

/// Why a target is not started. Users read it in `kubectl describe pod`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The CRI request does not name the pod as it should.
    #[error("this pod is marked as the target of a migration, but its {0} cannot be one: it is not started")]
    Identity(&'static str),
    /// Nothing came.
    #[error(
        "this pod is the target of a migration, and the node's agent gave no hand-off for container {container} within {within:?}: \
         it is not started, because a target never starts afresh; see the ProcessMigration's status"
    )]
    Timeout {
        /// The container.
        container: String,
        /// The deadline.
        within: Duration,
    },
    /// It was used.
    #[error(
        "container {0} of this migration target was started once and ended before the migration was committed: it is not \
         started again; see the ProcessMigration's status"
    )]
    Used(String),
    /// The migration was aborted.
    #[error("the migration into this pod was aborted: the pod is not started; see the ProcessMigration's status")]
    Aborted,
    /// It is for somebody else.
    #[error("the hand-off for container {container} names another {what}: it is not started")]
    Foreign {
        /// The container.
        container: String,
        /// What differs.
        what: &'static str,
    },
    /// It belongs to somebody else.
    #[error("the hand-off for container {0} is not a file of root alone: it is not started")]
    Owner(String),
    /// It cannot be read.
    #[error("the hand-off for container {0} is not valid: it is not started")]
    Invalid(String, #[source] protocol::sealed::Error),
    /// The file system.
    #[error("the hand-off for container {0} cannot be used: it is not started")]
    File(String, #[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Waits for the hand-off of a container and moves it into the shepherd's folder.
///
/// # Errors
/// See [`Error`]: in each case the container must not be started.
pub fn take(
    identity: &Identity,
    migration_uid: &str,
    within: Duration,
    to: impl FnOnce() -> Result<Folder, Error>,
) -> Result<HandOff, Error> {
    take_from(Path::new(HAND_OFF_DIR), identity, migration_uid, within, to)
}

fn take_from(
    root: &Path,
    identity: &Identity,
    migration_uid: &str,
    within: Duration,
    to: impl FnOnce() -> Result<Folder, Error>,
) -> Result<HandOff, Error> {
    for (value, what) in [
        (identity.pod_uid.as_str(), "uid"),
        (&identity.namespace, "namespace"),
        (&identity.pod_name, "name"),
        (&identity.container, "container"),
        (migration_uid, "migration"),
    ] {
        if !is_name(value) {
            return Err(Error::Identity(what));
        }
    }
    let container = &identity.container;
    let end = Instant::now() + within;
    loop {
        if let Some(found) = look(root, identity, migration_uid)? {
            let folder = to()?;
            return found.move_to(&folder, container);
        }
        if Instant::now() >= end {
            return Err(Error::Timeout {
                container: container.clone(),
                within,
            });
        }
        std::thread::sleep(POLL);
    }
}

/// A hand-off that is valid but not yet used.
struct Found {
    hand_off: HandOff,
    folder: Beneath,
    device_and_inode: (u64, u64),
}

/// Looks once; nothing where it has not come yet.
fn look(root: &Path, identity: &Identity, migration_uid: &str) -> Result<Option<Found>, Error> {
    let container = &identity.container;
    let Some(pod) = absent_is_none(
        Beneath::open(root).and_then(|r| r.subfolder(Path::new(&identity.pod_uid))),
        container,
    )?
    else {
        return Ok(None);
    };
    if absent_is_none(pod.stat(Path::new(HAND_OFF_ABORTED)), container)?.is_some() {
        return Err(Error::Aborted);
    }
    let Some(folder) = absent_is_none(pod.subfolder(Path::new(container)), container)? else {
        return Ok(None);
    };
    if absent_is_none(folder.stat(Path::new(HAND_OFF_USED)), container)?.is_some() {
        return Err(Error::Used(container.clone()));
    }
    let Some(file) = absent_is_none(folder.read(Path::new(HAND_OFF_FILE)), container)? else {
        return Ok(None);
    };
    let stat = fstat(&file).map_err(|errno| file_error(container, errno))?;
    let is_file = stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits();
    if !is_file || stat.st_uid != 0 || stat.st_mode & 0o077 != 0 {
        return Err(Error::Owner(container.clone()));
    }
    let mut text = Vec::new();
    file.take(MAX_FILE as u64 + 1)
        .read_to_end(&mut text)
        .map_err(|error| file_error(container, error))?;
    let hand_off = HandOff::open(&text).map_err(|source| Error::Invalid(container.clone(), source))?;
    if let Some(what) = difference(&hand_off, identity, migration_uid) {
        return Err(Error::Foreign {
            container: container.clone(),
            what,
        });
    }
    Ok(Some(Found {
        hand_off,
        folder,
        device_and_inode: (stat.st_dev, stat.st_ino),
    }))
}

impl Found {
    fn move_to(self, to: &Folder, container: &str) -> Result<HandOff, Error> {
        let error = |error: beneath::Error| file_error(container, error);
        // First the mark, then the move: a crash between them refuses the container, never starts it twice.
        let mut used = self.folder.create(Path::new(HAND_OFF_USED), 0o600).map_err(|e| {
            if e.source.kind() == std::io::ErrorKind::AlreadyExists {
                Error::Used(container.to_owned())
            } else {
                error(e)
            }
        })?;
        writeln!(used, "{} {}", self.hand_off.migration_uid, self.hand_off.attempt)
            .map_err(|e| file_error(container, e))?;
        let target = Beneath::open(to.path()).map_err(error)?;
        let name = Path::new(HAND_OFF_FILE);
        self.folder.rename_into(name, &target, name).map_err(error)?;
        let stat = target.stat(name).map_err(error)?;
        // Somebody replaced it between look and move: what was checked is not what was used.
        if (stat.st_dev, stat.st_ino) != self.device_and_inode {
            return Err(Error::Foreign {
                container: container.to_owned(),
                what: "file than a moment before",
            });
        }
        Ok(self.hand_off)
    }
}

/// What a hand-off names otherwise than the CRI request does.
fn difference(hand_off: &HandOff, identity: &Identity, migration_uid: &str) -> Option<&'static str> {
    [
        (&hand_off.pod_uid, identity.pod_uid.as_str(), "pod uid"),
        (&hand_off.namespace, &identity.namespace, "namespace"),
        (&hand_off.pod_name, &identity.pod_name, "pod name"),
        (&hand_off.container, &identity.container, "container"),
        (&hand_off.migration_uid, migration_uid, "migration"),
    ]
    .into_iter()
    .find_map(|(named, is, what)| (named != is).then_some(what))
}

fn absent_is_none<T>(result: Result<T, beneath::Error>, container: &str) -> Result<Option<T>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file_error(container, error)),
    }
}

fn file_error(container: &str, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::File(container.to_owned(), Box::new(error))
}

/// Path of the mark that says: this pod's processes were moved away, or: this pod is committed.
#[must_use]
pub fn mark(folder: &str, pod_uid: &str) -> Option<PathBuf> {
    is_name(pod_uid).then(|| Path::new(folder).join(pod_uid))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    struct Case {
        root: PathBuf,
        identity: Identity,
    }

    fn case(name: &str) -> Case {
        let root = std::env::temp_dir().join(format!("peregrine-hand-off-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(root.join("in/u/c")).unwrap();
        fs::create_dir_all(root.join("shepherd")).unwrap();
        let identity = Identity {
            pod_uid: "u".into(),
            namespace: "n".into(),
            pod_name: "p".into(),
            container: "c".into(),
        };
        Case { root, identity }
    }

    fn valid() -> HandOff {
        HandOff {
            pod_uid: "u".into(),
            namespace: "n".into(),
            pod_name: "p".into(),
            container: "c".into(),
            migration_uid: "m".into(),
            attempt: 1,
        }
    }

    impl Case {
        fn file(&self) -> PathBuf {
            self.root.join("in/u/c/hand-off.json")
        }

        fn put(&self, bytes: &[u8]) {
            fs::write(self.file(), bytes).unwrap();
            fs::set_permissions(self.file(), Permissions::from_mode(0o600)).unwrap();
        }

        fn take(&self) -> Result<HandOff, Error> {
            let folder = Folder::at(self.root.join("shepherd"));
            take_from(
                &self.root.join("in"),
                &self.identity,
                "m",
                Duration::from_millis(30),
                || Ok(folder),
            )
        }
    }

    fn is_root() -> bool {
        nix::unistd::geteuid().is_root()
    }

    #[test]
    fn a_valid_one_is_used_once() {
        if !is_root() {
            return;
        }
        let case = case("once");
        case.put(&valid().seal().unwrap());
        assert_eq!(case.take().unwrap(), valid());
        assert!(!case.file().exists() && case.root.join("shepherd/hand-off.json").exists());
        assert!(matches!(case.take(), Err(Error::Used(_))));
        case.put(&valid().seal().unwrap());
        assert!(
            matches!(case.take(), Err(Error::Used(_))),
            "even when another one is written"
        );
        fs::remove_dir_all(&case.root).unwrap();
    }

    #[test]
    fn what_is_not_valid_is_refused() {
        if !is_root() {
            return;
        }
        let case = case("refused");
        assert!(matches!(case.take(), Err(Error::Timeout { .. })));
        let sealed = valid().seal().unwrap();
        case.put(&sealed[..sealed.len() - 5]);
        assert!(matches!(case.take(), Err(Error::Invalid(..))), "cut off");
        case.put(&vec![b'x'; MAX_FILE + 10]);
        assert!(matches!(case.take(), Err(Error::Invalid(..))), "oversized");
        for (other, what) in [
            (
                HandOff {
                    pod_uid: "v".into(),
                    ..valid()
                },
                "pod uid",
            ),
            (
                HandOff {
                    namespace: "v".into(),
                    ..valid()
                },
                "namespace",
            ),
            (
                HandOff {
                    pod_name: "v".into(),
                    ..valid()
                },
                "pod name",
            ),
            (
                HandOff {
                    container: "v".into(),
                    ..valid()
                },
                "container",
            ),
            (
                HandOff {
                    migration_uid: "v".into(),
                    ..valid()
                },
                "migration",
            ),
        ] {
            case.put(&other.seal().unwrap());
            assert!(matches!(case.take(), Err(Error::Foreign { what: w, .. }) if w == what));
        }
        case.put(&sealed);
        fs::set_permissions(case.file(), Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(case.take(), Err(Error::Owner(_))), "readable by others");
        case.put(&sealed);
        std::os::unix::fs::chown(case.file(), Some(1), None).unwrap();
        assert!(matches!(case.take(), Err(Error::Owner(_))), "of another user");
        fs::remove_file(case.file()).unwrap();
        fs::write(case.root.join("elsewhere"), &sealed).unwrap();
        symlink(case.root.join("elsewhere"), case.file()).unwrap();
        assert!(matches!(case.take(), Err(Error::File(..))), "a link");
        fs::write(case.root.join("in/u/aborted"), "").unwrap();
        assert!(matches!(case.take(), Err(Error::Aborted)));
        assert!(!case.root.join("in/u/c/used").exists());
        fs::remove_dir_all(&case.root).unwrap();
    }

    #[test]
    fn names_that_are_no_names_are_refused() {
        let mut case = case("names");
        case.identity.pod_uid = "../u".into();
        assert!(matches!(case.take(), Err(Error::Identity("uid"))));
        case.identity.pod_uid = String::new();
        assert!(matches!(case.take(), Err(Error::Identity("uid"))));
        fs::remove_dir_all(&case.root).unwrap();
    }
}
