//! Child processes: each has its own token, counter and memory, and answers its parent over pipes.

use std::fs::OpenOptions;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use crate::files::segment_step;
use crate::memory::Pattern;
use crate::state::State;
use crate::timers::{block_signals, sleep};

/// Name of the variable that names the segment.
const SEGMENT: &str = "WORKLOAD_SEGMENT";

/// A child as its parent holds it.
#[derive(Debug)]
pub(crate) struct Kid {
    process: Child,
    ask: ChildStdin,
    answer: BufReader<ChildStdout>,
}

impl Kid {
    /// Starts one.
    pub(crate) fn start(segment: Option<&str>) -> Result<Self, String> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("child").stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(segment) = segment {
            command.env(SEGMENT, segment);
        }
        let mut process = command
            .spawn()
            .map_err(|error| format!("cannot start a child: {error}"))?;
        let (Some(ask), Some(answer)) = (process.stdin.take(), process.stdout.take()) else {
            return Err("a child has no pipes".to_owned());
        };
        Ok(Self {
            process,
            ask,
            answer: BufReader::new(answer),
        })
    }

    /// Asks for its state.
    pub(crate) fn state(&mut self) -> Result<Value, String> {
        if let Ok(Some(status)) = self.process.try_wait() {
            return Err(format!("child {} has ended: {status}", self.process.id()));
        }
        self.ask
            .write_all(b"?\n")
            .map_err(|error| format!("cannot ask child {}: {error}", self.process.id()))?;
        let mut line = String::new();
        self.answer
            .read_line(&mut line)
            .map_err(|error| format!("cannot hear child {}: {error}", self.process.id()))?;
        serde_json::from_str(&line).map_err(|error| format!("child {} says {line:?}: {error}", self.process.id()))
    }
}

/// Asks all children over and over; one that is silent or starts anew is a fault.
pub(crate) fn watch(state: &State, kids: &Mutex<Vec<Kid>>) {
    let mut known: Vec<Option<(Value, u64)>> = Vec::new();
    loop {
        let answers: Vec<Result<Value, String>> = kids
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter_mut()
            .map(Kid::state)
            .collect();
        known.resize(answers.len(), None);
        for (known, answer) in known.iter_mut().zip(answers) {
            let answer = match answer {
                Ok(answer) => answer,
                Err(error) => return state.fault(error),
            };
            let counter = answer["counter"].as_u64().unwrap_or(0);
            let token = answer["token"].clone();
            match known {
                Some((same, before)) if *same != token || *before > counter => {
                    state.fault(format!("child {same} at {before} became {token} at {counter}"))
                }
                Some((_, before)) if *before < counter => state.tick("children"),
                _ => {}
            }
            if let Some(faults) = answer["faults"].as_array().filter(|faults| !faults.is_empty()) {
                return state.fault(format!("child: {faults:?}"));
            }
            *known = Some((token, counter));
        }
        sleep(state, "the children's thread", Duration::from_millis(100));
    }
}

/// What a child does.
pub(crate) fn main() -> Result<(), String> {
    // Its parent ends it by the end of its input; the signals are blocked as in the parent.
    block_signals()?;
    let state = Arc::new(State::new()?);
    let pattern = Pattern::new(&state.token, 1);
    let segment = match std::env::var(SEGMENT) {
        Ok(path) => Some(
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .map_err(|error| format!("cannot open {path}: {error}"))?,
        ),
        Err(_) => None,
    };
    let ticking = Arc::clone(&state);
    std::thread::spawn(move || {
        let mut seen = 0;
        loop {
            let count = ticking.counter.fetch_add(1, Ordering::Relaxed) + 1;
            if let Some(Err(error)) = segment.as_ref().map(|file| segment_step(file, 8, 0, count, &mut seen)) {
                ticking.fault(format!("/dev/shm of the child: {error}"));
            }
            if count.is_multiple_of(50) && pattern.verify_all() > 0 {
                ticking.fault("the memory of a child is wrong");
            }
            sleep(&ticking, "a child", Duration::from_millis(10));
        }
    });
    let mut output = std::io::stdout();
    for line in std::io::stdin().lock().lines() {
        line.map_err(|error| format!("cannot read what is asked: {error}"))?;
        let answer = json!({"pid": std::process::id(), "token": state.token, "counter": state.counter.load(Ordering::Relaxed), "faults": state.faults()});
        writeln!(output, "{answer}")
            .and_then(|()| output.flush())
            .map_err(|error| format!("cannot answer: {error}"))?;
    }
    Ok(())
}
