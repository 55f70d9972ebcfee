//! The source's machine: which answers it may hear, and what it may send, in which state.
//!
//! ```text
//! Offered -> Accepted -> Sending -> Waiting -> Ended
//!    \________\___________\__________\______ Refuse, Destroyed, Committed
//! ```

use super::{FromSource, FromTarget, Violation};
use crate::{frame::Kind, version};

/// States of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing sent yet.
    New,
    /// The offer is out.
    Offered,
    /// The target accepted the offer.
    Accepted,
    /// The manifest is out.
    Announced,
    /// The target has room: everything may be sent.
    Sending,
    /// Complete was sent.
    Waiting,
    /// The target has received everything.
    Received,
    /// The target holds every container.
    Held,
    /// Committed, Destroyed or Refuse was heard.
    Ended,
}

impl State {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::New => "New",
            Self::Offered => "Offered",
            Self::Accepted => "Accepted",
            Self::Announced => "Announced",
            Self::Sending => "Sending",
            Self::Waiting => "Waiting",
            Self::Received => "Received",
            Self::Held => "Held",
            Self::Ended => "Ended",
        }
    }
}

/// What happens to the machine.
#[derive(Clone, Debug, PartialEq)]
pub enum Input<'a> {
    /// We want to send this.
    Send(&'a FromSource),
    /// A frame came.
    Frame(Kind, &'a [u8]),
}

/// What the session is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// The message may be sent.
    MaySend,
    /// The target said this; legal in this state.
    Heard(FromTarget),
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    state: State,
}

impl Default for Machine {
    fn default() -> Self {
        Self { state: State::New }
    }
}

impl Machine {
    /// Its state.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// One step. After a violation the connection is of no use any more.
    ///
    /// # Errors
    /// The machine unchanged, and what was not allowed.
    pub fn step(self, input: &Input<'_>) -> Result<(Self, Output), (Self, Violation)> {
        let result = match input {
            Input::Send(message) => self.send(message).map(|s| (s, Output::MaySend)),
            Input::Frame(kind, content) => self.read(*kind, content),
        };
        match result {
            Ok((state, output)) => Ok((Self { state }, output)),
            Err(violation) => Err((self, violation)),
        }
    }

    fn send(&self, message: &FromSource) -> Result<State, Violation> {
        if let Some(rule) = message.fault() {
            return Err(self.rule(message.name(), rule));
        }
        match (self.state, message) {
            (State::New, FromSource::Offer(_)) => Ok(State::Offered),
            (State::Accepted, FromSource::Manifest(_)) => Ok(State::Announced),
            (
                State::Sending,
                FromSource::Frozen | FromSource::Entry(_) | FromSource::FileEnd { .. } | FromSource::Facts(_),
            ) => Ok(State::Sending),
            (State::Sending, FromSource::Complete { .. }) => Ok(State::Waiting),
            (state, FromSource::Alive | FromSource::Abandon { .. }) if state != State::New && state != State::Ended => {
                Ok(state)
            }
            (_, m) => Err(self.unexpected(m.name())),
        }
    }

    fn read(&self, kind: Kind, content: &[u8]) -> Result<(State, Output), Violation> {
        if kind != Kind::Control {
            return Err(self.unexpected("a large or data frame"));
        }
        let message: FromTarget = serde_json::from_slice(content).map_err(|e| Violation::Content {
            state: self.state.name(),
            error: e.to_string(),
        })?;
        if let Some(rule) = message.fault() {
            return Err(self.rule(message.name(), rule));
        }
        let next = match (self.state, &message) {
            (State::Offered, FromTarget::Accept { version }) => {
                if !version::VERSIONS.contains(version) {
                    return Err(self.rule("Accept", format!("version {version} was not offered")));
                }
                State::Accepted
            }
            (State::Offered | State::Announced, FromTarget::Refuse { .. }) => State::Ended,
            (State::Announced, FromTarget::ManifestAccepted) => State::Sending,
            (State::Waiting, FromTarget::Received) => State::Received,
            (State::Received, FromTarget::Held) => State::Held,
            // Only a target that holds everything commits; only one that has accepted something destroys.
            (State::Held, FromTarget::Committed) => State::Ended,
            (
                State::Accepted | State::Announced | State::Sending | State::Waiting | State::Received | State::Held,
                FromTarget::Destroyed { .. },
            ) => State::Ended,
            (state, FromTarget::Alive) if state != State::New && state != State::Ended => state,
            (_, m) => return Err(self.unexpected(m.name())),
        };
        Ok((next, Output::Heard(message)))
    }

    fn unexpected(&self, message: &'static str) -> Violation {
        Violation::Unexpected {
            state: self.state.name(),
            message,
        }
    }

    fn rule(&self, message: &'static str, rule: String) -> Violation {
        Violation::Rule {
            state: self.state.name(),
            message,
            rule,
        }
    }
}
