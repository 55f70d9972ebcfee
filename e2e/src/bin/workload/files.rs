//! An open file that grows, a segment in /dev/shm, a TCP connection to itself: each is written and read back.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use crate::state::{State, seed};
use crate::timers::sleep;

/// Bytes in a line of the file.
const LINE: usize = 32;
/// Lines read back after each append.
const READ_BACK: u64 = 32;

/// Appends to a file of the container's own file system and reads back, by the descriptor and by the path.
pub(crate) fn file_loop(state: &State, path: &str) {
    let mut file = match OpenOptions::new()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(path)
    {
        Ok(file) => file,
        Err(error) => return state.fault(format!("cannot create {path}: {error}")),
    };
    let seed = seed(&state.token);
    for count in 0u64.. {
        if let Err(error) = file.write_all(line(seed, count).as_bytes()) {
            return state.fault(format!("cannot append to {path}: {error}"));
        }
        let by_path = File::open(path);
        for (how, file) in [("its descriptor", Some(&file)), ("its path", by_path.as_ref().ok())] {
            if let Err(error) = check(file, seed, count) {
                state.fault(format!("{path} by {how}: {error}"));
            }
        }
        state.tick("file");
        sleep(state, "the file's thread", Duration::from_millis(100));
    }
}

fn line(seed: u64, count: u64) -> String {
    format!("{count:>14} {seed:016x}\n")
}

fn check(file: Option<&File>, seed: u64, last: u64) -> Result<(), String> {
    let file = file.ok_or("cannot be opened")?;
    let length = file.metadata().map_err(|error| error.to_string())?.len();
    let expected = (last + 1) * LINE as u64;
    if length != expected {
        return Err(format!("{length} bytes long and not {expected}"));
    }
    for count in last.saturating_sub(READ_BACK)..=last {
        let mut bytes = [0u8; LINE];
        file.read_exact_at(&mut bytes, count * LINE as u64)
            .map_err(|error| error.to_string())?;
        if bytes != line(seed, count).as_bytes() {
            return Err(format!("line {count} is {:?}", String::from_utf8_lossy(&bytes)));
        }
    }
    Ok(())
}

/// The segment's path for a workload of this name.
pub(crate) fn shm_path(name: &str, container: &str) -> String {
    format!("/dev/shm/workload-{name}-{container}")
}

/// Makes the segment.
pub(crate) fn create_segment(path: &str) -> Result<File, String> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(path)
        .map_err(|error| format!("cannot create {path}: {error}"))?;
    file.set_len(4096)
        .map_err(|error| format!("cannot size {path}: {error}"))?;
    Ok(file)
}

/// Counts at one place of a shared segment and follows the count of the other side, which must never go back.
pub(crate) fn segment_step(file: &File, mine: u64, other: u64, count: u64, seen: &mut u64) -> Result<(), String> {
    let mut bytes = [0u8; 8];
    if count > 1 {
        file.read_exact_at(&mut bytes, mine)
            .map_err(|error| format!("cannot read: {error}"))?;
        let stored = u64::from_le_bytes(bytes);
        if stored != count - 1 {
            return Err(format!("holds {stored} where {} was written", count - 1));
        }
    }
    file.write_all_at(&count.to_le_bytes(), mine)
        .map_err(|error| format!("cannot write: {error}"))?;
    file.read_exact_at(&mut bytes, other)
        .map_err(|error| format!("cannot read: {error}"))?;
    let theirs = u64::from_le_bytes(bytes);
    if theirs < *seen {
        return Err(format!("the other side went back from {seen} to {theirs}"));
    }
    *seen = theirs;
    Ok(())
}

/// The parent's side of the segment.
pub(crate) fn shm_loop(state: &State, file: &File) {
    let mut seen = 0;
    for count in 1u64.. {
        let before = seen;
        if let Err(error) = segment_step(file, 0, 8, count, &mut seen) {
            return state.fault(format!("/dev/shm: {error}"));
        }
        // Only a child that lives makes it tick.
        state.add("shm", seen - before);
        sleep(state, "the segment's thread", Duration::from_millis(20));
    }
}

/// A connection to itself over loopback: what is sent comes back, in order.
pub(crate) fn loopback_loop(state: &State) {
    if let Err(error) = loopback(state) {
        state.fault(format!("connection over loopback: {error}"));
    }
}

fn loopback(state: &State) -> std::io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut near = TcpStream::connect(listener.local_addr()?)?;
    let (mut far, _) = listener.accept()?;
    for count in 0u64.. {
        let sent = count.to_le_bytes();
        near.write_all(&sent)?;
        let mut echo = [0u8; 8];
        far.read_exact(&mut echo)?;
        far.write_all(&echo)?;
        near.read_exact(&mut echo)?;
        if echo != sent {
            state.fault(format!("connection over loopback: {echo:?} came back for {sent:?}"));
        }
        state.tick("loopback");
        sleep(state, "the connection's thread", Duration::from_millis(20));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_of_equal_length_and_a_wrong_one_is_found() {
        assert_eq!(line(7, 0).len(), LINE);
        assert_eq!(line(u64::MAX, 99_999_999).len(), LINE);
        let path = std::env::temp_dir().join(format!("workload-file-{}", std::process::id()));
        std::fs::write(&path, line(7, 0) + &line(7, 1)).unwrap();
        let file = File::open(&path).unwrap();
        assert!(check(Some(&file), 7, 1).is_ok());
        assert!(check(Some(&file), 7, 2).unwrap_err().contains("bytes long"));
        assert!(check(Some(&file), 8, 1).unwrap_err().contains("line 0"));
        std::fs::remove_file(path).unwrap();
    }
}
