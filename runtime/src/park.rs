//! Run by CRIU as its action script while `runc checkpoint` is under way; keeps it from touching anything until the moment.
//!
//! CRIU calls it before it looks at the first process (`pre-dump`), and gives up where it fails. So runc and CRIU can be started
//! while the pod still runs, which saves their start-up from the freeze. The agent listens on a socket beside the script: one
//! byte lets CRIU go on. An agent that dies closes the socket, and CRIU ends without having touched the pod.

use std::ffi::OsStr;
use std::io::{self, Read as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use protocol::hand_off::{PARK_GO, PARK_SOCKET};

/// Acts on the stage that CRIU names in the environment. `name` is the path under which it was called.
///
/// # Errors
/// Nobody listens, or the dump is not wanted any more.
pub fn act(name: &OsStr, stage: Option<&OsStr>) -> io::Result<()> {
    if stage.and_then(OsStr::to_str) != Some("pre-dump") {
        return Ok(());
    }
    let socket = Path::new(name)
        .parent()
        .ok_or(io::ErrorKind::InvalidInput)?
        .join(PARK_SOCKET);
    let mut answer = [0];
    let mut agent = UnixStream::connect(socket)?;
    // What the agents send meanwhile is much, and can wait; CRIU's own way is the longest. Only a wish: it works without.
    let _ = hostsys::program::prefer(nix::unistd::getppid().as_raw());
    agent.read_exact(&mut answer)?;
    if answer == [PARK_GO] {
        Ok(())
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::unix::net::UnixListener;

    fn folder(name: &str) -> std::path::PathBuf {
        let folder = std::env::temp_dir().join(format!("peregrine-park-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn it_goes_on_only_when_it_is_told_to() {
        let told = |answer: &[u8]| {
            let folder = folder(&format!("told-{answer:?}"));
            let listener = UnixListener::bind(folder.join(PARK_SOCKET)).unwrap();
            let script = folder.join("park");
            let caller = std::thread::spawn(move || act(script.as_os_str(), Some(OsStr::new("pre-dump"))).is_ok());
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(answer).unwrap();
            drop(stream);
            let result = caller.join().unwrap();
            std::fs::remove_dir_all(folder).unwrap();
            result
        };
        assert!(told(&[PARK_GO]));
        assert!(!told(b""), "the agent died");
        assert!(!told(b"x"));
    }

    #[test]
    fn nobody_there_is_an_end_and_not_a_wait() {
        let folder = folder("nobody");
        let script = folder.join("park");
        drop(UnixListener::bind(folder.join(PARK_SOCKET)).unwrap());
        assert!(act(script.as_os_str(), Some(OsStr::new("pre-dump"))).is_err());
        assert!(act(script.as_os_str(), Some(OsStr::new("post-dump"))).is_ok());
        std::fs::remove_dir_all(folder).unwrap();
    }
}
