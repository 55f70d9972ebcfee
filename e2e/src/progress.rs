//! What a person sees of a step that takes long: that it began, that it is alive, how long it took.

use std::io::Write as _;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How often a running step says that it is still at work.
const TICK: Duration = Duration::from_secs(10);

/// Runs `work` as one named step; says so on stderr.
///
/// # Errors
/// What `work` returns.
pub fn step<T>(what: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let began = Instant::now();
    say(&format!("{what} …"));
    let (done, ticker) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // Ends as soon as the sender is dropped, in every way of leaving `work`.
            while let Err(mpsc::RecvTimeoutError::Timeout) = ticker.recv_timeout(TICK) {
                say(&format!("{what}: {} so far", seconds(began.elapsed())));
            }
        });
        let result = work();
        drop(done);
        match &result {
            Ok(_) => say(&format!("{what}: done in {}", seconds(began.elapsed()))),
            Err(_) => say(&format!("{what}: failed after {}", seconds(began.elapsed()))),
        }
        result
    })
}

/// One line on stderr; a reader that went away is no reason to stop.
pub fn say(line: &str) {
    let mut stderr = std::io::stderr().lock();
    drop(writeln!(stderr, "cluster: {line}"));
}

/// `1.2 s`, `75 s`.
pub fn seconds(elapsed: Duration) -> String {
    if elapsed < Duration::from_secs(10) {
        format!("{:.1} s", elapsed.as_secs_f64())
    } else {
        format!("{} s", elapsed.as_secs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_times_keep_a_digit() {
        assert_eq!(seconds(Duration::from_millis(1_240)), "1.2 s");
        assert_eq!(seconds(Duration::from_millis(75_400)), "75 s");
    }

    #[test]
    fn a_step_gives_back_what_its_work_gave() {
        assert_eq!(step("adding", || Ok(2)).unwrap(), 2);
        assert!(step("failing", || -> anyhow::Result<()> { anyhow::bail!("no") }).is_err());
    }
}
