//! Waits of every kind. Where no handler ran, none of them may be interrupted, and the periodic ones must go on.

use std::os::fd::{AsFd, AsRawFd as _};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigEvent, SigSet, SigevNotify, Signal};
use nix::sys::time::TimeSpec;
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::sys::timerfd::{ClockId as TimerFdClock, TimerFd, TimerFlags};
use nix::time::{ClockId, ClockNanosleepFlags, clock_nanosleep};

use crate::state::State;

/// The signal of the interval timer.
const TIMER_SIGNAL: Signal = Signal::SIGUSR1;

/// Blocks what [`signals`] takes synchronously; before any thread is started, so that all inherit it.
pub(crate) fn block_signals() -> Result<SigSet, String> {
    let mut set = SigSet::empty();
    for signal in [TIMER_SIGNAL, Signal::SIGTERM, Signal::SIGINT] {
        set.add(signal);
    }
    set.thread_block()
        .map_err(|error| format!("cannot block signals: {error}"))?;
    Ok(set)
}

/// Sleeps as the system call does it: the standard library's sleep hides an interruption.
pub(crate) fn sleep(state: &State, who: &str, time: Duration) {
    let request = TimeSpec::from_duration(time);
    let began = Instant::now();
    match clock_nanosleep(ClockId::CLOCK_MONOTONIC, ClockNanosleepFlags::empty(), &request) {
        Ok(_) if began.elapsed() + Duration::from_millis(1) < time => {
            state.fault(format!(
                "nanosleep of {who} ended after {:?} and not {time:?}",
                began.elapsed()
            ));
        }
        Ok(_) => {}
        Err(error) => state.fault(format!("nanosleep of {who}: {error}")),
    }
}

/// `poll` with a timeout on a pipe that stays silent.
pub(crate) fn poll_loop(state: &State) {
    let (read, _write) = match nix::unistd::pipe() {
        Ok(ends) => ends,
        Err(error) => return state.fault(format!("pipe: {error}")),
    };
    loop {
        let mut descriptors = [PollFd::new(read.as_fd(), PollFlags::POLLIN)];
        match poll(&mut descriptors, PollTimeout::from(20u8)) {
            Ok(0) => state.tick("poll"),
            Ok(_) => return state.fault("poll: a silent pipe is ready"),
            Err(error) => {
                state.fault(format!("poll: {error}"));
                if error != Errno::EINTR {
                    return;
                }
            }
        }
    }
}

/// A periodic timerfd: it has mostly expired unread when a freeze ends.
pub(crate) fn timerfd_loop(state: &State) {
    let timer = TimerFd::new(TimerFdClock::CLOCK_MONOTONIC, TimerFlags::empty()).and_then(|timer| {
        let period = TimeSpec::from_duration(Duration::from_millis(20));
        timer.set(
            nix::sys::timer::Expiration::Interval(period),
            nix::sys::timer::TimerSetTimeFlags::empty(),
        )?;
        Ok(timer)
    });
    let timer = match timer {
        Ok(timer) => timer,
        Err(error) => return state.fault(format!("timerfd: {error}")),
    };
    loop {
        let mut expirations = [0u8; 8];
        match nix::unistd::read(timer.as_fd(), &mut expirations) {
            // Expirations during a freeze may be counted or not; that it goes on is what matters.
            Ok(8) => state.tick("timerfd"),
            Ok(count) => state.fault(format!("timerfd: {count} bytes")),
            Err(error) => {
                state.fault(format!("timerfd {}: {error}", timer.as_fd().as_raw_fd()));
                if error != Errno::EINTR {
                    return;
                }
            }
        }
    }
}

/// A timer of the process that fires every 20 ms, and the end of the program when it is told to end.
pub(crate) fn signals(state: &State, set: &SigSet) {
    let event = SigEvent::new(SigevNotify::SigevSignal {
        signal: TIMER_SIGNAL,
        si_value: 0,
    });
    let period = TimeSpec::from_duration(Duration::from_millis(20));
    let _timer = match Timer::new(ClockId::CLOCK_MONOTONIC, event) {
        Ok(mut timer) => match timer.set(Expiration::Interval(period), TimerSetTimeFlags::empty()) {
            Ok(()) => Some(timer),
            Err(error) => {
                state.fault(format!("timer_settime: {error}"));
                None
            }
        },
        Err(error) => {
            state.fault(format!("timer_create: {error}"));
            None
        }
    };
    loop {
        match set.wait() {
            Ok(TIMER_SIGNAL) => state.tick("itimer"),
            Ok(signal) => {
                println!("ending: {signal}");
                std::process::exit(0);
            }
            Err(error) => state.fault(format!("sigwait: {error}")),
        }
    }
}

/// A futex with a timeout.
pub(crate) fn condvar_loop(state: &State) {
    let (lock, condition) = (Mutex::new(()), Condvar::new());
    loop {
        let guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = condition
            .wait_timeout(guard, Duration::from_millis(30))
            .unwrap_or_else(PoisonError::into_inner);
        drop(waited);
        state.tick("condvar");
    }
}
