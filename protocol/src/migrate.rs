//! Between the agents of the two nodes of a migration.
//!
//! ```text
//! source (dials)                               target (listens)
//!   Offer {versions, migration, attempt}   ->
//!                                          <-  Accept {version} | Refuse
//!   Manifest {containers, maxima}          ->
//!                                          <-  ManifestAccepted | Refuse
//!   Frozen                                 ->  the target's clock of the freeze starts
//!   Entry, Data …, FileEnd                 ->  images while they are written, root filesystems, /dev/shm
//!   Facts                                  ->  what CRIU's images do not hold
//!   Complete {files, bytes}                ->
//!                                          <-  Received
//!                                          <-  Held | Failed…
//!                                          <-  Committed | Destroyed
//!   Abandon                                ->  legal until the source has heard the end; answered by Destroyed or Committed
//! ```
//! Each side says [`message::FromSource::Alive`] when it has nothing else to say, so that a dead peer is noticed.
//! The machines in [`source`] and [`target`] see no socket and no clock.

pub mod message;
pub mod source;
pub mod target;

pub use message::{FromSource, FromTarget};

/// What a peer did that is not allowed: names the state and the message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A message that this state does not expect.
    #[error("{message} in state {state}")]
    Unexpected {
        /// State of our machine.
        state: &'static str,
        /// Name of the message.
        message: &'static str,
    },
    /// A frame that breaks a maximum or has an unknown kind.
    #[error("{error} in state {state}")]
    Frame {
        /// State of our machine.
        state: &'static str,
        /// What was wrong.
        error: crate::frame::Error,
    },
    /// A message that is not what its kind should be.
    #[error("a message that cannot be read in state {state}: {error}")]
    Content {
        /// State of our machine.
        state: &'static str,
        /// What was wrong.
        error: String,
    },
    /// A message whose content breaks a rule.
    #[error("{message} in state {state}: {rule}")]
    Rule {
        /// State of our machine.
        state: &'static str,
        /// Name of the message.
        message: &'static str,
        /// The rule.
        rule: String,
    },
}
