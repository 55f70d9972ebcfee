//! The witness as a program: datagrams in, JSON out.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::{Ledger, Life, Report};

/// An answer of the witness.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Answer {
    /// Now, in milliseconds since the witness started.
    pub now_ms: u64,
    /// What was asked for.
    pub lives: Vec<Life>,
}

/// Ends this program when its standard input does: whoever started the witness holds the other end, and it must not outlive them, however they end.
pub fn end_with_input() {
    std::thread::spawn(|| {
        drop(std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
        std::process::exit(0);
    });
}

/// Listens until it is killed.
///
/// # Errors
/// If an address or the socket cannot be had.
pub fn run(listen: SocketAddr, socket: &Path) -> Result<()> {
    let datagrams = UdpSocket::bind(listen).with_context(|| format!("the witness cannot listen on {listen}"))?;
    // Another witness's socket: whoever listens last is asked.
    drop(std::fs::remove_file(socket));
    let questions =
        UnixListener::bind(socket).with_context(|| format!("the witness cannot listen on {}", socket.display()))?;
    let started = Instant::now();
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let noting = Arc::clone(&ledger);
    std::thread::spawn(move || {
        let mut bytes = [0u8; 512];
        loop {
            let Ok((length, from)) = datagrams.recv_from(&mut bytes) else {
                continue;
            };
            if let Some(report) = Report::parse(&bytes[..length]) {
                noting.lock().unwrap_or_else(PoisonError::into_inner).note(
                    &report,
                    &from.ip().to_string(),
                    milliseconds(started),
                );
            }
        }
    });
    for question in questions.incoming() {
        // One that goes away without its answer is its own affair.
        drop(question.map(|stream| answer(&stream, &ledger, started)));
    }
    Ok(())
}

fn answer(stream: &UnixStream, ledger: &Mutex<Ledger>, started: Instant) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut name = String::new();
    BufReader::new(stream).read_line(&mut name)?;
    let lives = ledger.lock().unwrap_or_else(PoisonError::into_inner).lives(name.trim());
    let answer = Answer {
        now_ms: milliseconds(started),
        lives,
    };
    let mut stream = stream;
    stream.write_all(&serde_json::to_vec(&answer)?)?;
    Ok(())
}

/// Asks the witness on that socket about the workload of that name; all, if the name is empty.
///
/// # Errors
/// If nobody listens there.
pub fn ask(socket: &Path, name: &str) -> Result<Answer> {
    let mut stream =
        UnixStream::connect(socket).with_context(|| format!("no witness listens on {}", socket.display()))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    writeln!(stream, "{name}").context("cannot ask the witness")?;
    let mut text = String::new();
    stream
        .read_to_string(&mut text)
        .context("the witness does not answer")?;
    serde_json::from_str(&text).context("the witness's answer is not JSON")
}

fn milliseconds(started: Instant) -> u64 {
    u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beat_that_was_sent_is_answered_for() {
        let socket = std::env::temp_dir().join(format!("witness-{}", std::process::id()));
        let free = UdpSocket::bind("127.0.0.1:0").unwrap();
        let listen = free.local_addr().unwrap();
        drop(free);
        let path = socket.clone();
        std::thread::spawn(move || run(listen, &path));
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let report = Report {
            name: "w".into(),
            container: "main".into(),
            token: "t".into(),
            counter: 1,
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut counter = 0;
        loop {
            counter += 1;
            sender
                .send_to(
                    Report {
                        counter,
                        ..report.clone()
                    }
                    .to_line()
                    .as_bytes(),
                    listen,
                )
                .unwrap();
            if ask(&socket, "w").is_ok_and(|answer| answer.lives.len() == 1 && answer.lives[0].doubled == 0) {
                break;
            }
            assert!(Instant::now() < deadline, "the witness never saw a beat");
        }
        std::fs::remove_file(socket).unwrap();
    }
}
