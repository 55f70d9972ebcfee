//! The workload itself: starts every part, then counts and reports.

use std::net::{TcpListener, UdpSocket};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use e2e::witness::Report;

use crate::args::Settings;
use crate::child::{self, Kid};
use crate::memory::{self, Pattern};
use crate::state::State;
use crate::{files, http, timers};

/// Nodes booted at different times: a clock that follows the node jumps by much more than any freeze.
const CLOCK_JUMP: Duration = Duration::from_secs(3600);

/// Runs until it is told to end.
pub(crate) fn run(settings: Settings) -> Result<(), String> {
    let signals = timers::block_signals()?;
    let state = Arc::new(State::new()?);
    let settings = Arc::new(settings);
    let pattern = Arc::new(Pattern::new(&state.token, settings.mib));
    let listener = TcpListener::bind(("0.0.0.0", settings.http))
        .map_err(|error| format!("cannot listen on port {}: {error}", settings.http))?;
    // Not connected: a connected one would be bound to the address of the pod, which is another one after a move.
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(|error| format!("cannot open a UDP socket: {error}"))?;

    let segment_path = settings
        .shm
        .then(|| files::shm_path(&settings.name, &settings.container));
    let segment = segment_path.as_deref().map(files::create_segment).transpose()?;
    let mut kids = Vec::new();
    for index in 0..settings.children {
        kids.push(Kid::start(segment_path.as_deref().filter(|_| index == 0))?);
    }
    let kids = Arc::new(Mutex::new(kids));

    let spawn = |work: Box<dyn FnOnce(&State) + Send>| {
        let state = Arc::clone(&state);
        std::thread::spawn(move || work(&state));
    };
    spawn(Box::new(timers::poll_loop));
    spawn(Box::new(timers::timerfd_loop));
    spawn(Box::new(timers::condvar_loop));
    spawn(Box::new(move |state| timers::signals(state, &signals)));
    let file = format!("/tmp/workload-{}-{}", settings.name, settings.container);
    spawn(Box::new(move |state| files::file_loop(state, &file)));
    if let Some(segment) = segment.filter(|_| settings.children > 0) {
        spawn(Box::new(move |state| files::shm_loop(state, &segment)));
    }
    if settings.loopback {
        spawn(Box::new(files::loopback_loop));
    }
    if settings.children > 0 {
        let kids = Arc::clone(&kids);
        spawn(Box::new(move |state| child::watch(state, &kids)));
    }
    {
        let (pattern, dirty) = (Arc::clone(&pattern), settings.dirty_mib);
        spawn(Box::new(move |state| memory::watch(state, &pattern, dirty)));
    }
    {
        let (pattern, settings) = (Arc::clone(&pattern), Arc::clone(&settings));
        spawn(Box::new(move |state| {
            http::serve(state, &settings, &pattern, &listener)
        }));
    }
    println!(
        "workload {} {} started: token {}, {} MiB, pid {}",
        settings.name,
        settings.container,
        state.token,
        settings.mib,
        std::process::id()
    );
    count(&state, &settings, &socket)
}

/// The main counter: one beat, one report, for ever.
fn count(state: &State, settings: &Settings, socket: &UdpSocket) -> ! {
    let interval = Duration::from_millis(settings.interval.max(1));
    let mut last_line = Instant::now();
    let mut last_beat = Instant::now();
    loop {
        let counter = state.counter.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(witness) = settings.witness {
            let report = Report {
                name: settings.name.clone(),
                container: settings.container.clone(),
                token: state.token.clone(),
                counter,
            };
            if socket.send_to(report.to_line().as_bytes(), witness).is_err() {
                state.send_errors.fetch_add(1, Ordering::Relaxed);
            }
        }
        if last_line.elapsed() >= Duration::from_secs(1) {
            last_line = Instant::now();
            println!(
                "tick counter {counter} faults {} token {}",
                state.faults().len(),
                state.token
            );
        }
        if last_beat.elapsed() > CLOCK_JUMP {
            state.fault(format!("the monotonic clock jumped by {:?}", last_beat.elapsed()));
        }
        last_beat = Instant::now();
        timers::sleep(state, "the main thread", interval);
    }
}
