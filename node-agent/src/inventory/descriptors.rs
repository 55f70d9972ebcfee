//! Open files of a process, by kind: from the link in `/proc/PID/fd`, what it leads to, and `/proc/PID/fdinfo`.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use hostsys::descriptor;
use nix::sys::stat::{major, minor};

use super::processes::is_gone;

/// An open file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Its number.
    pub fd: i32,
    /// What it is.
    pub kind: Kind,
}

/// What an open file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File {
        /// Path, as the process sees it.
        path: String,
        /// Whether its name is gone.
        deleted: bool,
        /// Links that are left; 0: the content exists only through this descriptor.
        links: u64,
        /// Size in bytes.
        size: u64,
    },
    /// A directory.
    Directory {
        /// Path, as the process sees it.
        path: String,
    },
    /// A pipe.
    Pipe {
        /// Its inode.
        inode: u64,
    },
    /// A named pipe.
    Fifo {
        /// Path.
        path: String,
    },
    /// A socket.
    Socket {
        /// Its inode.
        inode: u64,
        /// The protocol as the kernel calls it.
        protocol: String,
    },
    /// A character or block device.
    Device {
        /// Path.
        path: String,
        /// Whether it is a block device.
        block: bool,
        /// Major number.
        major: u64,
        /// Minor number.
        minor: u64,
    },
    /// eventfd, timerfd, signalfd, epoll: carried.
    Carried(&'static str),
    /// inotify.
    Inotify {
        /// Devices (as in `fdinfo`: major << 20 | minor) on which files are watched.
        watched_devices: Vec<u64>,
    },
    /// fanotify.
    Fanotify,
    /// io_uring.
    IoUring,
    /// userfaultfd.
    Userfaultfd,
    /// memfd.
    Memfd {
        /// Its name.
        name: String,
        /// Whether it is made of huge pages.
        huge: bool,
    },
    /// A pidfd.
    Pidfd {
        /// Pid on the node; -1: the process has ended.
        pid: i32,
    },
    /// A POSIX message queue.
    MessageQueue {
        /// Its name.
        name: String,
    },
    /// A namespace.
    Namespace {
        /// For example `net:[4026531840]`.
        name: String,
    },
    /// Anything else, as the kernel calls it.
    Other {
        /// For example `anon_inode:bpf-map`.
        name: String,
    },
}

/// Reads all open files of a process, by its folder in `/proc`.
///
/// # Errors
/// The list cannot be read. Files that are closed meanwhile are left out.
pub fn read(process: &Path) -> io::Result<Vec<Descriptor>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(process.join("fd"))? {
        let entry = entry?;
        let Some(fd) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        match kind(process, &entry.path(), fd) {
            Ok(kind) => found.push(Descriptor { fd, kind }),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_by_key(|d| d.fd);
    Ok(found)
}

fn kind(process: &Path, path: &Path, fd: i32) -> io::Result<Kind> {
    let link = fs::read_link(path)?;
    let link = link.to_string_lossy().into_owned();
    if let Some(kind) = by_name(&link) {
        return Ok(match kind {
            Kind::Socket { inode, .. } => Kind::Socket {
                inode,
                protocol: descriptor::socket_protocol(path)?,
            },
            Kind::Inotify { .. } => Kind::Inotify {
                watched_devices: watched_devices(&info(process, fd)?),
            },
            Kind::Pidfd { .. } => Kind::Pidfd {
                pid: pid_in(&info(process, fd)?),
            },
            kind => kind,
        });
    }
    let file_system = descriptor::file_system(path)?;
    if file_system == descriptor::MQUEUE {
        return Ok(Kind::MessageQueue { name: link });
    }
    if file_system == descriptor::SECRETMEM {
        return Ok(Kind::Other { name: link });
    }
    let (name, deleted) = match link.strip_suffix(" (deleted)") {
        Some(name) => (name.to_owned(), true),
        None => (link.clone(), false),
    };
    let data = fs::metadata(path)?;
    let type_ = data.file_type();
    if let Some(memfd) = name.strip_prefix("/memfd:") {
        return Ok(Kind::Memfd {
            name: memfd.to_owned(),
            huge: file_system == descriptor::HUGETLBFS,
        });
    }
    Ok(if type_.is_char_device() || type_.is_block_device() {
        Kind::Device {
            path: name,
            block: type_.is_block_device(),
            major: major(data.rdev()),
            minor: minor(data.rdev()),
        }
    } else if type_.is_fifo() {
        Kind::Fifo { path: name }
    } else if type_.is_dir() {
        Kind::Directory { path: name }
    } else if type_.is_file() {
        Kind::File {
            path: name,
            deleted,
            links: data.nlink(),
            size: data.size(),
        }
    } else {
        Kind::Other { name: link }
    })
}

/// What the link's text alone tells; None: a path.
fn by_name(link: &str) -> Option<Kind> {
    if let Some(name) = link.strip_prefix("anon_inode:") {
        return Some(match name.trim_matches(['[', ']']) {
            "eventfd" => Kind::Carried("eventfd"),
            "eventpoll" => Kind::Carried("epoll"),
            "timerfd" => Kind::Carried("timerfd"),
            "signalfd" => Kind::Carried("signalfd"),
            "inotify" => Kind::Inotify {
                watched_devices: Vec::new(),
            },
            "fanotify" => Kind::Fanotify,
            "io_uring" => Kind::IoUring,
            "userfaultfd" => Kind::Userfaultfd,
            "pidfd" => Kind::Pidfd { pid: -1 },
            _ => Kind::Other { name: link.to_owned() },
        });
    }
    if link.starts_with('/') {
        return None;
    }
    // `kind:[inode]`
    let (kind, rest) = link.split_once(":[")?;
    let inode = rest.strip_suffix(']')?.parse().ok()?;
    Some(match kind {
        "pipe" => Kind::Pipe { inode },
        "socket" => Kind::Socket {
            inode,
            protocol: String::new(),
        },
        "pidfd" => Kind::Pidfd { pid: -1 },
        "mnt" | "net" | "ipc" | "uts" | "user" | "cgroup" | "pid" | "time" | "pid_for_children"
        | "time_for_children" => Kind::Namespace { name: link.to_owned() },
        _ => Kind::Other { name: link.to_owned() },
    })
}

fn info(process: &Path, fd: i32) -> io::Result<String> {
    fs::read_to_string(process.join("fdinfo").join(fd.to_string()))
}

/// `inotify wd:1 ino:2 sdev:2f mask:3 …` -> 0x2f
fn watched_devices(info: &str) -> Vec<u64> {
    let mut devices: Vec<u64> = info
        .lines()
        .filter(|line| line.starts_with("inotify "))
        .filter_map(|line| line.split(' ').find_map(|word| word.strip_prefix("sdev:")))
        .filter_map(|device| u64::from_str_radix(device, 16).ok())
        .collect();
    devices.sort_unstable();
    devices.dedup();
    devices
}

/// `Pid:\t123` -> 123
fn pid_in(info: &str) -> i32 {
    info.lines()
        .find_map(|line| line.strip_prefix("Pid:"))
        .and_then(|pid| pid.trim().parse().ok())
        .unwrap_or(-1)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn links_without_a_path_tell_the_kind() {
        let other = |name: &str| Kind::Other { name: name.to_owned() };
        for (link, kind) in [
            ("anon_inode:[eventfd]", Some(Kind::Carried("eventfd"))),
            ("anon_inode:[eventpoll]", Some(Kind::Carried("epoll"))),
            ("anon_inode:[timerfd]", Some(Kind::Carried("timerfd"))),
            ("anon_inode:[signalfd]", Some(Kind::Carried("signalfd"))),
            (
                "anon_inode:inotify",
                Some(Kind::Inotify {
                    watched_devices: vec![],
                }),
            ),
            ("anon_inode:[fanotify]", Some(Kind::Fanotify)),
            ("anon_inode:[io_uring]", Some(Kind::IoUring)),
            ("anon_inode:[userfaultfd]", Some(Kind::Userfaultfd)),
            ("anon_inode:[pidfd]", Some(Kind::Pidfd { pid: -1 })),
            ("anon_inode:bpf-map", Some(other("anon_inode:bpf-map"))),
            ("anon_inode:[perf_event]", Some(other("anon_inode:[perf_event]"))),
            ("anon_inode:kvm-vm", Some(other("anon_inode:kvm-vm"))),
            ("pipe:[12]", Some(Kind::Pipe { inode: 12 })),
            (
                "socket:[13]",
                Some(Kind::Socket {
                    inode: 13,
                    protocol: String::new(),
                }),
            ),
            (
                "net:[4026531840]",
                Some(Kind::Namespace {
                    name: "net:[4026531840]".into(),
                }),
            ),
            ("dmabuf:[5]", Some(other("dmabuf:[5]"))),
            ("/etc/hosts", None),
        ] {
            assert_eq!(by_name(link), kind, "{link}");
        }
    }

    #[test]
    fn watches_and_pidfds_are_read_from_fdinfo() {
        let info = "pos:\t0\nflags:\t00\nmnt_id:\t15\ninotify wd:2 ino:1 sdev:2f mask:fce ignored_mask:0\ninotify wd:1 ino:9 sdev:2f mask:2\n";
        assert_eq!(watched_devices(info), [0x2f]);
        assert_eq!(pid_in("pos:\t0\nPid:\t77\nNSpid:\t77\n"), 77);
        assert_eq!(pid_in("Pid:\t-1\n"), -1);
    }

    #[test]
    fn our_own_files_are_told_apart() {
        let me = Path::new("/proc/self");
        let of = |fd: i32| kind(me, &me.join(format!("fd/{fd}")), fd).unwrap();
        let null = fs::File::open("/dev/null").unwrap();
        assert_eq!(
            of(null.as_raw_fd()),
            Kind::Device {
                path: "/dev/null".into(),
                block: false,
                major: 1,
                minor: 3
            }
        );
        let path = std::env::temp_dir().join(format!("peregrine-descriptors-{}", std::process::id()));
        fs::write(&path, b"abc").unwrap();
        let file = fs::File::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(
            of(file.as_raw_fd()),
            Kind::File {
                path: path.display().to_string(),
                deleted: true,
                links: 0,
                size: 3
            }
        );
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(matches!(of(socket.as_raw_fd()), Kind::Socket { protocol, .. } if protocol == "UDP"));
        assert!(read(me).unwrap().len() > 3);
    }
}
