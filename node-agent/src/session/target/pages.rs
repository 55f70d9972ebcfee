//! Memory pages that come beside the session, into the stores of the containers.

use std::sync::{Arc, Mutex, PoisonError};

use crds::Reason;
use memory::{
    store::Store,
    wire::{self, receive},
};
use protocol::{
    migrate::message::{Offer, Stream},
    pages::Space,
    version,
};
use tokio::{sync::mpsc, task::JoinSet};

use super::super::ledger::{Failed, Stop, blocking};
use crate::{
    checkpoint::Room,
    page_link::{Breaker, Incoming},
};

/// What the session knows of its peer: an offer of pages must say the same.
#[derive(Clone, Debug)]
pub(super) struct Expected {
    /// The session's own offer.
    pub(super) offer: Offer,
    /// Name in the certificate of the source's agent.
    pub(super) name: String,
}

impl Expected {
    /// Why an offer is refused.
    fn refuses(&self, incoming: &Incoming) -> Option<&'static str> {
        let offer = incoming.offer();
        let same = Offer {
            stream: offer.stream,
            versions: offer.versions.clone(),
            ..self.offer.clone()
        };
        if !incoming.names().contains(&self.name) {
            Some("the peer is not the agent of the source node")
        } else if *offer != same || offer.fault().is_some() {
            Some("the offer is not for this attempt")
        } else {
            None
        }
    }
}

/// A thread for each connection: what it was told of the address spaces in the end.
type Threads = Arc<Mutex<JoinSet<Result<Vec<Space>, wire::Error>>>>;

/// Takes connections for pages for as long as the session receives.
#[derive(Debug)]
pub(super) struct Pages {
    threads: Threads,
    breakers: Arc<Mutex<Vec<Breaker>>>,
    store: Store,
    room: Room,
    taking: tokio::task::AbortHandle,
}

impl Pages {
    /// Begins to take them. `stop` is told when one is lost: the attempt cannot go on then.
    pub(super) fn take(
        mut connections: mpsc::Receiver<Incoming>,
        expected: Expected,
        room: Room,
        stop: Stop,
    ) -> Result<Self, Failed> {
        let store = Store::receive(&room.pages()).map_err(|e| Failed::because(Reason::StepFailed, &e))?;
        let threads = Threads::default();
        let breakers: Arc<Mutex<Vec<Breaker>>> = Arc::default();
        let (set, list, to) = (threads.clone(), breakers.clone(), store.clone());
        let taking = tokio::spawn(async move {
            while let Some(incoming) = connections.recv().await {
                let why = expected.refuses(&incoming);
                let selected = version::select(&incoming.offer().versions);
                let (None, Some(version), Stream::Pages { .. }) = (why, selected, incoming.offer().stream) else {
                    incoming
                        .refuse(why.unwrap_or("there is no common version of the protocol"))
                        .await;
                    continue;
                };
                let (mut stream, breaker) = match incoming.accept(version).await {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        tracing::warn!(%error, "a connection for pages was lost before it was accepted");
                        continue;
                    }
                };
                list.lock().unwrap_or_else(PoisonError::into_inner).push(breaker);
                let (store, stop) = (to.clone(), stop.clone());
                set.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .spawn_blocking(move || {
                        let received = receive(&mut stream, &store);
                        if let Err(error) = &received {
                            stop.give_up(Failed::because(Reason::TransferFailed, error));
                        }
                        received
                    });
            }
        })
        .abort_handle();
        Ok(Self {
            threads,
            breakers,
            store,
            room,
            taking,
        })
    }

    /// The session has everything: waits until all pages are there too and gives each process its store. Without connections
    /// for pages there is nothing to do.
    pub(super) async fn finish(self) -> Result<(), Failed> {
        self.taking.abort();
        let mut threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        if threads.is_empty() {
            return Ok(());
        }
        let mut spaces = Vec::new();
        while let Some(joined) = threads.join_next().await {
            let received = joined.map_err(|e| Failed::because(Reason::StepFailed, &e))?;
            spaces.extend(received.map_err(|e| Failed::because(Reason::TransferFailed, &e))?);
        }
        let (store, room) = (self.store.clone(), self.room.clone());
        blocking(move || store.finish(&spaces, |container| room.store(container)))
            .await?
            .map_err(|e| Failed::because(Reason::TransferFailed, &e))
    }
}

impl Drop for Pages {
    /// Nothing may still be written when the target is destroyed.
    fn drop(&mut self) {
        self.taking.abort();
        for breaker in self.breakers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            breaker.end();
        }
    }
}
