//! HTTP: `/healthz`, `/state`, `/verify`. One request a connection.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::args::Settings;
use crate::memory::Pattern;
use crate::state::State;

/// Serves for ever.
pub(crate) fn serve(state: &State, settings: &Settings, pattern: &Pattern, listener: &TcpListener) {
    for stream in listener.incoming() {
        match stream {
            // A client that goes away in the middle is its own affair.
            Ok(stream) => drop(answer(state, settings, pattern, stream)),
            Err(error) => state.fault(format!("accept: {error}")),
        }
    }
}

fn answer(state: &State, settings: &Settings, pattern: &Pattern, mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut header = String::new();
    while reader.read_line(&mut header)? > 2 {
        header.clear();
    }
    let path = request.split(' ').nth(1).unwrap_or("/");
    let (status, body) = match path.split('?').next().unwrap_or(path) {
        "/healthz" => ("200 OK", json!({"ok": true})),
        "/state" | "/" => ("200 OK", describe(state, settings)),
        "/verify" => {
            let wrong = pattern.verify_all();
            if wrong > 0 {
                state.bad_words.fetch_add(wrong, Ordering::Relaxed);
                state.fault(format!("{wrong} words are wrong"));
            }
            (
                "200 OK",
                json!({"mib": pattern.len(), "bad_words": wrong, "token": state.token}),
            )
        }
        _ => (
            "404 Not Found",
            json!({"error": "there are /healthz, /state and /verify"}),
        ),
    };
    let body = body.to_string();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

/// Everything the workload knows of itself.
fn describe(state: &State, settings: &Settings) -> Value {
    let counters: Map<String, Value> = state
        .tickers()
        .into_iter()
        .map(|(name, beats)| (name.to_owned(), beats.into()))
        .collect();
    json!({
        "name": settings.name,
        "container": settings.container,
        "token": state.token,
        "pid": std::process::id(),
        "uid": nix::unistd::getuid().as_raw(),
        "hostname": nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        "uptime_ms": u64::try_from(state.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "mib": settings.mib,
        "counter": state.counter.load(Ordering::Relaxed),
        "counters": counters,
        "slices_verified": state.slices_verified.load(Ordering::Relaxed),
        "bad_words": state.bad_words.load(Ordering::Relaxed),
        "send_errors": state.send_errors.load(Ordering::Relaxed),
        "faults": state.faults(),
    })
}
