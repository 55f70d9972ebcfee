//! One connection of the agent: bounded lines in, one line out for each.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use protocol::hand_off::{MAX_LINE, Request, State};

/// A connection.
pub(super) struct Client {
    stream: UnixStream,
    pending: Vec<u8>,
    open: bool,
    /// It has asked for a restore and gets its answer when that has ended.
    pub(super) wants_restore: bool,
}

impl Client {
    /// Takes a connection of root; any other is closed. Root of another user namespace is not uid 0 here.
    pub(super) fn of(stream: UnixStream) -> Option<Self> {
        let peer = getsockopt(&stream, PeerCredentials).ok()?;
        stream.set_nonblocking(true).ok()?;
        (peer.uid() == 0).then_some(Self {
            stream,
            pending: Vec::new(),
            open: true,
            wants_restore: false,
        })
    }

    /// Whether it is still of use.
    pub(super) fn is_open(&self) -> bool {
        self.open
    }

    /// Reads what has come: one entry a line, none for a line that is no request.
    pub(super) fn read(&mut self) -> Vec<Option<Request>> {
        let mut buffer = [0_u8; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    self.open = false;
                    break;
                }
                Ok(n) => self.pending.extend_from_slice(buffer.get(..n).unwrap_or_default()),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.open = false;
                    break;
                }
            }
            if self.pending.len() > MAX_LINE {
                self.open = false;
                break;
            }
        }
        let mut requests = Vec::new();
        while let Some(end) = self.pending.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            let request = serde_json::from_slice(&line).ok();
            self.wants_restore |= matches!(request, Some(Request::Restore { .. }));
            requests.push(request);
        }
        requests
    }

    /// Answers. A peer that does not read is dropped, never waited for.
    pub(super) fn answer(&mut self, state: &State) {
        self.wants_restore = false;
        let written = serde_json::to_vec(state)
            .map_err(std::io::Error::from)
            .and_then(|mut line| {
                line.push(b'\n');
                self.stream.write_all(&line)
            });
        self.open &= written.is_ok();
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
