//! Events on the migration and on its pods. They pass through a bounded queue: publishing never holds up or fails a pass.

use crds::condition::cut;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc;

/// Longest note that the API takes, in bytes.
const LONGEST_NOTE: usize = 1024;

/// Where events are dropped in.
#[derive(Clone, Debug)]
pub struct Events(mpsc::Sender<Notice>);

/// An event to be published.
#[derive(Clone, Debug, PartialEq)]
pub struct Notice {
    /// The objects that it is about.
    pub about: Vec<ObjectReference>,
    /// Whether something went wrong.
    pub warning: bool,
    /// A [`crds::Reason`] or phase.
    pub reason: String,
    /// What happened, in one sentence.
    pub note: String,
}

impl Events {
    /// Starts to publish.
    #[must_use]
    pub fn start(client: Client, instance: String) -> Events {
        let (sender, mut receiver) = mpsc::channel::<Notice>(256);
        tokio::spawn(async move {
            let recorder = Recorder::new(
                client,
                Reporter {
                    controller: "peregrine.dev/operator".to_owned(),
                    instance: Some(instance),
                },
            );
            while let Some(notice) = receiver.recv().await {
                let event = Event {
                    type_: if notice.warning {
                        EventType::Warning
                    } else {
                        EventType::Normal
                    },
                    reason: notice.reason.clone(),
                    note: Some(cut(&notice.note, LONGEST_NOTE).to_owned()),
                    action: "Migrate".to_owned(),
                    secondary: None,
                };
                for object in &notice.about {
                    if let Err(error) = recorder.publish(&event, object).await {
                        tracing::warn!(
                            error = %crate::error::chain(&error),
                            reason = %notice.reason,
                            "failed to publish an event"
                        );
                    }
                }
            }
        });
        Events(sender)
    }

    /// Publishes in time; drops the event where too many wait.
    pub fn publish(&self, notice: Notice) {
        if self.0.try_send(notice).is_err() {
            tracing::warn!("an event was dropped: too many wait to be published");
        }
    }

    /// Events that only the receiver sees.
    #[cfg(test)]
    #[must_use]
    pub fn captured() -> (Events, mpsc::Receiver<Notice>) {
        let (sender, receiver) = mpsc::channel(256);
        (Events(sender), receiver)
    }
}
