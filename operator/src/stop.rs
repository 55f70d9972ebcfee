//! The wish to stop, told to every part.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::error::Fatal;

/// A part's ear for the wish to stop.
#[derive(Clone, Debug)]
pub struct Stop(watch::Receiver<bool>);

impl Stop {
    /// A wish that the sender utters.
    #[must_use]
    pub fn new() -> (watch::Sender<bool>, Stop) {
        let (sender, receiver) = watch::channel(false);
        (sender, Stop(receiver))
    }

    /// Returns when it was uttered.
    pub async fn requested(&mut self) {
        // A sender that is gone cannot wish for anything any more: stop.
        let _gone = self.0.wait_for(|stop| *stop).await;
    }

    /// Stops at SIGTERM or SIGINT.
    pub fn on_signals() -> Result<Stop, Fatal> {
        let mut terminate = signal(SignalKind::terminate()).map_err(Fatal::Signals)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(Fatal::Signals)?;
        let (sender, stop) = Stop::new();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => tracing::info!(signal = "SIGTERM", "stopping"),
                _ = interrupt.recv() => tracing::info!(signal = "SIGINT", "stopping"),
            }
            sender.send_replace(true);
            sender.closed().await;
        });
        Ok(stop)
    }
}
