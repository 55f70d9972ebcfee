//! The forward steps of the target, from the hand-offs to the commit.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use crds::{
    Reason,
    condition::Status,
    names,
    process_migration::{Party, cond},
};
use hostsys::warm_memory::WarmMemory;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use protocol::{
    hand_off::{HandOff, ShepherdReport},
    limits,
    migrate::{FromTarget, message::Offer, target as machine},
    version,
};
use tokio::sync::mpsc;

use super::super::{
    Inbound, Task,
    hand_over::Decided,
    ledger::{Failed, Ledger, blocking, millis},
    refuse, shepherds,
};
use super::{
    Brief,
    pages::{Expected, Pages},
    parked::park,
    receive::{Incoming, Received, Targets, manifest_order, reserve, write_all},
    restore::{adjust, hold_packets, restore, start_pager_ahead},
};
use crate::{
    checkpoint::Room,
    decide::step::Step,
    journal::{Record, TargetContainer},
    pager::Pager,
    peer::{Event, FromSourceSide},
};

/// How long the kubelet may take to call `create` for every container.
const SHEPHERDS: Duration = Duration::from_secs(300);
/// How much later than the watch the reply to the commit may come.
const LATE_REPLY: Duration = Duration::from_secs(1);
/// Between two looks for shepherds.
const LOOK: Duration = Duration::from_millis(20);

/// An attempt that is under way.
pub(super) struct Attempt {
    pub(super) brief: Brief,
    /// For telling the source how it ended.
    pub(super) say: Option<mpsc::Sender<FromTarget>>,
    /// The connection, once everything has arrived.
    pub(super) link: Option<FromSourceSide>,
    pub(super) frozen_at: Option<Instant>,
}

/// Where everything of the target is.
pub(super) struct Ground {
    pub(super) containers: Vec<TargetContainer>,
    pub(super) reports: Vec<ShepherdReport>,
    pub(super) network_namespace: PathBuf,
}

impl Attempt {
    pub(super) async fn forward(&mut self, task: &mut Task, ledger: &Ledger) -> Result<Ground, Failed> {
        let names = self.verify_pod(task).await?;
        say_step(task, Step::TargetHandOff);
        let hand_offs: Vec<HandOff> = names.iter().map(|name| self.hand_off(name)).collect();
        let write = async {
            blocking(move || shepherds::write_hand_offs(&hand_offs))
                .await?
                .map_err(|e| Failed::because(Reason::StepFailed, &e))
        };
        ledger.forward(Step::TargetHandOff, write).await?;
        let place = self.shepherds(ledger, &names).await?;
        ledger
            .record(Record::Shepherds {
                containers: place.containers.clone(),
                network_namespace: place.network_namespace.clone(),
            })
            .await?;
        task.publish(|half| half.target.step = Some("waiting for the source".into()));
        task.condition(
            cond::TARGET_READY,
            Status::True,
            Reason::ShepherdsReady,
            "sandbox and shepherds of the target pod stand",
        );

        let (mut link, offer) = self.source(task, ledger).await?;
        self.say = Some(link.say.clone());
        say_step(task, Step::TargetReserve);
        let room = Room::of(&self.brief.start.uid);
        let limit = *task.ctx.checkpoint_limit_bytes.borrow();
        let reserved = ledger
            .forward(Step::TargetReserve, reserve(&mut link, &place, room.clone(), limit))
            .await;
        let (order, facts, memory, descriptors, lazy);
        match reserved {
            Ok((manifest, ready)) => {
                order = manifest_order(&manifest, &place)?;
                memory = ready;
                lazy = manifest.copied_before && !manifest.descriptors.is_empty();
                descriptors = manifest.descriptors;
            }
            Err(why) => {
                self.link = Some(link);
                return Err(why);
            }
        }
        // Before the source freezes: nobody may reach what is being rebuilt, and the hold costs milliseconds.
        say_step(task, Step::TargetPrepareNetwork);
        let namespace = place.network_namespace.clone();
        let hold = async { blocking(move || hold_packets(&namespace)).await? };
        if let Err(why) = ledger.forward(Step::TargetPrepareNetwork, hold).await {
            self.link = Some(link);
            return Err(why);
        }
        let pages = match task.pages.take() {
            Some(connections) => {
                let expected = Expected {
                    offer,
                    name: crds::names::agent_dns_name(&self.brief.source_node),
                };
                Some(Pages::take(connections, expected, room.clone(), ledger.stop.clone()))
            }
            None => None,
        };
        let pages = match pages.transpose() {
            Ok(pages) => pages,
            Err(why) => {
                self.link = Some(link);
                return Err(why);
            }
        };
        let pager = Pager::of(&self.brief.start.uid);
        let ready = async {
            if lazy {
                start_pager_ahead(&pager, &room, &place, &order).await?;
            }
            park(ledger, &room, &place, &order, &descriptors, lazy).await
        };
        let parked = match ready.await {
            Ok(parked) => parked,
            Err(why) => {
                self.link = Some(link);
                return Err(why);
            }
        };
        say_step(task, Step::TargetReceive);
        say(&link.say, FromTarget::ManifestAccepted).await?;

        let (_, nothing) = mpsc::channel(1);
        let events = std::mem::replace(&mut link.events, nothing);
        let incoming = Incoming {
            events,
            spare: link.spare.clone(),
            end: link.end.clone(),
        };
        self.link = Some(link);
        let receive = Self::receive(ledger, incoming, &room, &place, &order, memory, task.at_freeze());
        let receive = async {
            let received = receive.await?;
            if let Some(pages) = pages {
                tokio::select! {
                    stored = pages.finish() => stored?,
                    why = ledger.stop.wait() => return Err(why),
                }
            }
            Ok(received)
        };
        let (received, frozen_at) = ledger.forward(Step::TargetReceive, receive).await?;
        facts = received.facts;
        self.frozen_at = Some(frozen_at);
        follow_source(received.events, ledger);
        task.ctx.metrics.transferred("received", received.bytes);
        let received_milliseconds = millis(frozen_at);
        task.publish(|half| half.target.received_milliseconds = Some(received_milliseconds));
        if let Some(say_to) = &self.say {
            say(say_to, FromTarget::Received).await.ok();
        }

        ledger
            .record(Record::Addresses {
                addresses: facts.addresses.clone(),
            })
            .await?;
        say_step(task, Step::TargetRestore);
        let restoring = Instant::now();
        ledger
            .forward(
                Step::TargetRestore,
                restore(ledger, &room, &place, &order, facts.addresses.clone(), &pager, parked),
            )
            .await?;
        let restore_milliseconds = millis(restoring);
        task.publish(|half| half.target.restore_milliseconds = Some(restore_milliseconds));

        say_step(task, Step::TargetAdjust);
        let namespace = place.network_namespace.clone();
        let cgroups: Vec<PathBuf> = order
            .iter()
            .filter_map(|i| place.containers.get(*i))
            .map(|c| c.cgroup.clone())
            .collect();
        let adjust = async { blocking(move || adjust(&namespace, &cgroups, &facts, &pager)).await? };
        ledger.forward(Step::TargetAdjust, adjust).await?;
        if let Some(say_to) = &self.say {
            say(say_to, FromTarget::Held).await.ok();
        }
        Ok(place)
    }

    /// The pod is the migration's own, and bound to this node: the object that the watch showed is not trusted to say so.
    pub(super) async fn verify_pod(&self, task: &Task) -> Result<Vec<String>, Failed> {
        let start = &self.brief.start;
        let pods: Api<Pod> = Api::namespaced(task.ctx.client.clone(), &start.namespace);
        let read = tokio::time::timeout(Duration::from_secs(10), pods.get(&start.pod_name)).await;
        let pod = read
            .map_err(|_| Failed::new(Reason::ApiUnavailable, "the target pod could not be read in time"))?
            .map_err(|e| Failed::because(Reason::TargetLost, &e))?;
        let wrong = |what: &str| Err(Failed::new(Reason::TargetLost, format!("the target pod {what}")));
        if pod.metadata.uid.as_deref() != Some(start.pod_uid.as_str()) {
            return wrong("was replaced");
        }
        let owners = pod.metadata.owner_references.unwrap_or_default();
        if !owners.iter().any(|o| o.uid == start.uid && o.controller == Some(true)) {
            return wrong("does not belong to this migration");
        }
        let annotations = pod.metadata.annotations.unwrap_or_default();
        if annotations.get(names::ANNOTATION_TARGET_OF) != Some(&start.uid) {
            return wrong("is not marked as the target of this migration");
        }
        let Some(spec) = pod.spec else {
            return wrong("has no spec");
        };
        if spec.node_name.as_deref() != Some(task.ctx.node.as_str()) {
            return wrong("is not bound to this node");
        }
        let names: Vec<String> = spec.containers.into_iter().map(|c| c.name).collect();
        if names.is_empty() || names.len() > limits::CONTAINERS {
            return wrong("has no containers, or too many");
        }
        Ok(names)
    }

    pub(super) fn hand_off(&self, container: &str) -> HandOff {
        let start = &self.brief.start;
        HandOff {
            pod_uid: start.pod_uid.clone(),
            namespace: start.namespace.clone(),
            pod_name: start.pod_name.clone(),
            container: container.to_owned(),
            migration_uid: start.uid.clone(),
            attempt: start.attempt,
        }
    }

    /// Waits until a shepherd stands for every container.
    pub(super) async fn shepherds(&self, ledger: &Ledger, names: &[String]) -> Result<Ground, Failed> {
        let start = &self.brief.start;
        let deadline = Instant::now() + SHEPHERDS;
        loop {
            let (pod, migration) = (start.pod_uid.clone(), start.uid.clone());
            let standing = blocking(move || shepherds::standing(&pod, &migration))
                .await?
                .map_err(|e| Failed::because(Reason::StepFailed, &e))?;
            // A container that was started again has two; the one that answers is the present one.
            let found: Vec<ShepherdReport> = names
                .iter()
                .filter_map(|name| {
                    standing
                        .iter()
                        .rfind(|r| &r.hand_off.container == name && r.hand_off.attempt == start.attempt)
                        .cloned()
                })
                .collect();
            if found.len() == names.len()
                && let Some(first) = found.first()
            {
                return Ok(Ground {
                    network_namespace: PathBuf::from(&first.network_namespace),
                    containers: found
                        .iter()
                        .map(|r| TargetContainer {
                            name: r.hand_off.container.clone(),
                            id: r.container_id.clone(),
                            cgroup: PathBuf::from(&r.cgroup),
                        })
                        .collect(),
                    reports: found,
                });
            }
            if Instant::now() > deadline {
                return Err(Failed::new(
                    Reason::TargetLost,
                    format!(
                        "{} of {} containers of the target pod came up within {SHEPHERDS:?}",
                        found.len(),
                        names.len()
                    ),
                ));
            }
            tokio::select! {
                why = ledger.stop.wait() => return Err(why),
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// Waits for the source: its node, its pod and its attempt are compared with the API's, never taken from the peer.
    pub(super) async fn source(&self, task: &mut Task, ledger: &Ledger) -> Result<(FromSourceSide, Offer), Failed> {
        loop {
            let inbound = tokio::select! {
                why = ledger.stop.wait() => return Err(why),
                inbound = task.inbound.recv() => inbound,
            };
            let Some(Inbound { mut link, offer, names }) = inbound else {
                return Err(Failed::new(Reason::StepFailed, "the agent is ending"));
            };
            let start = &self.brief.start;
            let expected = crds::names::agent_dns_name(&self.brief.source_node);
            let fits = offer.namespace == start.namespace
                && offer.name == start.name
                && offer.uid == start.uid
                && offer.attempt == start.attempt
                && offer.source_pod_uid == self.brief.source_pod_uid
                && offer.target_pod_uid == start.pod_uid;
            let refused = if !names.contains(&expected) {
                Some("the peer is not the agent of the source node")
            } else if !fits {
                Some("the offer is not for this attempt")
            } else {
                None
            };
            let selected = version::select(&offer.versions);
            match (refused, selected) {
                (None, Some(version)) => {
                    say(&link.say, FromTarget::Accept { version }).await?;
                    return Ok((link, offer));
                }
                (refused, _) => {
                    let message = refused.unwrap_or("there is no common version of the protocol");
                    tracing::warn!(peer = ?names, message, "refused an offer");
                    refuse(&link.say, Reason::PeerRefused, message).await;
                    tokio::spawn(async move {
                        let _ = tokio::time::timeout(Duration::from_secs(2), link.end.wait()).await;
                    });
                }
            }
        }
    }

    /// Receives everything. The connection is given back when everything has arrived.
    pub(super) async fn receive(
        ledger: &Ledger,
        incoming: Incoming,
        room: &Room,
        place: &Ground,
        order: &[usize],
        memory: Option<WarmMemory>,
        at_freeze: impl FnOnce() + Send + 'static,
    ) -> Result<(Received, Instant), Failed> {
        let targets = Targets {
            images: (0u32..).take(order.len()).map(|i| room.images(i)).collect(),
            roots: order
                .iter()
                .filter_map(|i| place.reports.get(*i))
                .map(|r| PathBuf::from(&r.rootfs))
                .collect(),
            shm: place.reports.iter().find_map(|r| r.shm.clone()).map(PathBuf::from),
        };
        let room = room.clone();
        let count = order.len();
        let end = incoming.end.clone();
        // Dropping the sender of this channel ends the writer between two pieces.
        let (go_on, stopped) = std::sync::mpsc::channel::<()>();
        let mut writer = tokio::task::spawn_blocking(move || {
            for place in (0u32..).take(count) {
                room.make_folders(place)
                    .map_err(|e| Failed::because(Reason::StepFailed, &e))?;
            }
            write_all(incoming, &targets, memory, at_freeze, &stopped)
        });
        let joined = tokio::select! {
            joined = &mut writer => joined,
            why = ledger.stop.wait() => {
                drop(go_on);
                // Nothing may still be written when the target is destroyed.
                let _ = writer.await;
                return Err(why);
            }
        };
        let result = joined.map_err(|e| Failed::because(Reason::StepFailed, &e))?;
        result.map_err(|why| match end.reason() {
            Some(reason) if why.reason == Reason::TransferFailed.as_str() => {
                Failed::new(Reason::TransferFailed, reason)
            }
            _ => why,
        })
    }

    /// Every container is restored and held. THE POINT OF NO RETURN is inside.
    pub(super) async fn commit(&mut self, task: &Task, ledger: &Ledger, _held: &Ground) -> Decided {
        say_step(task, Step::TargetCommit);
        let decisions = task.decisions(&self.brief.start);
        let begun = Instant::now();
        let swap = async { Ok(decisions.commit().await) };
        // Nobody else commits. Where the watch has shown it for a while, the reply was lost or is late: nothing is gained by waiting
        // for it with everything stopped.
        let shown = async {
            task.sees_commit().await;
            tokio::time::sleep(LATE_REPLY).await;
        };
        let decided = tokio::select! {
            biased;
            decided = ledger.forward(Step::TargetCommit, swap) => decided,
            () = shown => Ok(Decided::Committed),
        };
        match decided {
            Ok(decided) => {
                let commit_milliseconds = millis(begun);
                task.publish(|half| {
                    half.target.commit_milliseconds = Some(commit_milliseconds);
                    if decided == Decided::Committed {
                        half.set(
                            cond::RESTORED,
                            Status::True,
                            Reason::AllContainersHeld,
                            "every container is restored and held",
                            None,
                        );
                    }
                });
                decided
            }
            // It failed before or after the swap: only the API knows. Where nobody has decided, it is aborted.
            Err(why) => decisions.abort(Party::Target, &why).await,
        }
    }
}

/// From here on the source only lives or abandons. If it is lost, the target still commits: that is why it has everything.
pub(super) fn follow_source(mut events: mpsc::Receiver<Event>, ledger: &Ledger) {
    let stop = ledger.stop.clone();
    tokio::spawn(async move {
        while let Some(event) = events.recv().await {
            if let Event::Message(machine::Output::Abandon { reason, message }) = event {
                stop.give_up(Failed { reason, message });
            }
        }
    });
}

pub(super) fn say_step(task: &Task, step: Step) {
    task.publish(|half| half.target.step = Some(step.name().to_owned()));
}

pub(super) async fn say(to: &mpsc::Sender<FromTarget>, message: FromTarget) -> Result<(), Failed> {
    to.send(message)
        .await
        .map_err(|_| Failed::new(Reason::TransferFailed, "the connection to the source was lost"))
}
