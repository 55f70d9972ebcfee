//! Short grace periods of the kernel's RCU, for the length of a freeze.
//!
//! A dump and a restore wait for a grace period again and again: when a process changes its cgroup, when a mount or a network
//! namespace goes, when a packet filter changes. Each wait takes about 10 ms, unless the kernel is asked to hurry
//! (`/sys/kernel/rcu_expedited`, since 2.6.36): then it interrupts every processor once and goes on, within a tenth of a
//! millisecond. That takes a little from every other program, so it is turned off again at once.

use std::{
    fs, io,
    path::Path,
    sync::{Mutex, PoisonError},
};

const SWITCH: &str = "/sys/kernel/rcu_expedited";
/// Says that the switch is ours to turn off: it must be, also by an agent that was started anew.
const MARKER: &str = "/run/peregrine/rcu-expedited";

/// How many want it now.
static WANTED: Mutex<usize> = Mutex::new(0);

/// Grace periods are short while one of these lives.
#[derive(Debug)]
pub struct Hurry(());

/// Asks the kernel to hurry.
///
/// # Errors
/// The switch cannot be turned on: then the freeze is longer.
pub fn hurry() -> io::Result<Hurry> {
    let mut wanted = WANTED.lock().unwrap_or_else(PoisonError::into_inner);
    if *wanted == 0 {
        turn_on(Path::new(SWITCH), Path::new(MARKER))?;
    }
    *wanted += 1;
    Ok(Hurry(()))
}

/// Turns off what an earlier process of ours has left on. To be called before any [`hurry`].
///
/// # Errors
/// The switch cannot be turned off.
pub fn calm_down() -> io::Result<()> {
    turn_off(Path::new(SWITCH), Path::new(MARKER))
}

impl Drop for Hurry {
    fn drop(&mut self) {
        let mut wanted = WANTED.lock().unwrap_or_else(PoisonError::into_inner);
        *wanted = wanted.saturating_sub(1);
        if *wanted == 0 {
            // What stays on is turned off by the next one, or by the next start.
            let _ = calm_down();
        }
    }
}

fn turn_on(switch: &Path, marker: &Path) -> io::Result<()> {
    // Where somebody else has turned it on it stays theirs.
    if fs::read_to_string(switch)?.trim() != "0" {
        return Ok(());
    }
    if let Some(folder) = marker.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(marker, b"")?;
    fs::write(switch, b"1")
}

fn turn_off(switch: &Path, marker: &Path) -> io::Result<()> {
    if !marker.exists() {
        return Ok(());
    }
    fs::write(switch, b"0")?;
    fs::remove_file(marker)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(name: &str, value: &str) -> (std::path::PathBuf, std::path::PathBuf) {
        let folder = std::env::temp_dir().join(format!("peregrine-rcu-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("switch"), value).unwrap();
        (folder.join("switch"), folder.join("run/marker"))
    }

    #[test]
    fn what_was_turned_on_is_turned_off_also_after_a_death() {
        let (switch, marker) = files("ours", "0\n");
        turn_on(&switch, &marker).unwrap();
        assert_eq!(fs::read_to_string(&switch).unwrap(), "1");
        // Nothing but the files is left of a process that was killed here.
        turn_off(&switch, &marker).unwrap();
        assert_eq!(fs::read_to_string(&switch).unwrap(), "0");
        assert!(!marker.exists());
        fs::remove_dir_all(switch.parent().unwrap()).unwrap();
    }

    #[test]
    fn what_somebody_else_has_turned_on_stays_on() {
        let (switch, marker) = files("theirs", "1\n");
        turn_on(&switch, &marker).unwrap();
        turn_off(&switch, &marker).unwrap();
        assert_eq!(fs::read_to_string(&switch).unwrap(), "1\n");
        fs::remove_dir_all(switch.parent().unwrap()).unwrap();
    }
}
