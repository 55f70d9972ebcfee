//! The forward steps of the source, from the dial to the decision.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crds::{
    MigrationNode, Reason,
    condition::Status,
    process_migration::{Party, Progress, cond},
};
use hostsys::{inet_diag, warm_memory::WarmMemory};
use kube::Api;
use memory::converge::Goal;
use protocol::migrate::{
    FromSource, FromTarget,
    message::{Facts, Manifest, Offer, PROTOCOL, Place, Stream},
};

use super::super::{
    Task,
    hand_over::{Decided, Decisions, decided_in},
    ledger::{Failed, Ledger, Stop, blocking, millis},
    warm::warm,
    write_marker,
};
use super::{
    Brief,
    checkpointing::{Maxima, reserve, send_metadata, send_nameless, send_pages, sending},
    parked::{ParkedDump, descriptors, park},
    precopy::PreCopy,
    way_back::marker,
};
use crate::{
    checkpoint::{self, Room},
    decide::step::Step,
    files, holding,
    identity::PeerTls,
    journal::{FrozenContainer, Record},
    outbox::Outbox,
    page_link::Breaker,
    peer::{self, ToTarget},
    pod_on_node::PodOnNode,
};

/// How long a source whose target is not heard any more waits before it tries to abort.
const LOST_TARGET: Duration = Duration::from_secs(5);
/// Connections for memory pages. One carries some 2 GB/s where nothing else limits it.
const PAGE_STREAMS: u32 = 2;
/// What a freeze takes besides memory: CRIU's metadata, restore, commit. Replaced by what is measured when there is more of it.
const FIXED_FREEZE: Duration = Duration::from_millis(60);
/// While the decision is not known.
const LOOK: Duration = Duration::from_millis(500);

/// An attempt that is under way.
pub(super) struct Attempt {
    pub(super) brief: Brief,
    pub(super) frozen_at: Option<Instant>,
    pub(super) link: Option<ToTarget>,
    /// Memory on its way while the pod runs.
    pub(super) precopy: Option<PreCopy>,
    /// Dumps that wait for the freeze.
    pub(super) parked: Vec<ParkedDump>,
    /// For CRIU's images, until the freeze.
    pub(super) warm: Option<WarmMemory>,
    /// Connections with peers outside the pod.
    pub(super) outside: usize,
}

impl Attempt {
    pub(super) async fn forward(&mut self, task: &Task, ledger: &Ledger) -> Result<(), Failed> {
        let uid = self.brief.start.uid.clone();
        let room = Room::of(&uid);
        say_step(task, Step::SourceReserve);
        let limit = *task.ctx.checkpoint_limit_bytes.borrow();
        let (pod_uid, memory) = (self.brief.start.pod_uid.clone(), self.brief.memory_bytes);
        let reserve = {
            let (room, path) = (room.clone(), marker(&self.brief.start));
            async move {
                blocking(move || {
                    // Before the freeze, because it takes the disk some milliseconds. Until it is removed the wrapper starts
                    // no container of this pod: neither when one is killed inside the freeze, nor after a reboot.
                    write_marker(&path).map_err(|e| {
                        Failed::new(Reason::StepFailed, format!("failed to write {}: {e}", path.display()))
                    })?;
                    reserve(&pod_uid, memory, limit, &room)
                })
                .await?
            }
        };
        let (pod, maxima) = ledger.forward(Step::SourceReserve, reserve).await?;
        let pod = Arc::new(pod);
        let containers = frozen_containers(&uid, &pod)?;
        ledger
            .record(Record::Frozen {
                containers: containers.clone(),
            })
            .await?;

        say_step(task, Step::SourceConnect);
        let connect = async {
            // Where connections have to be closed by CRIU, only the freeze tells whether there are any.
            if task.ctx.destroys_sockets {
                self.parked = park(&containers, &room, false, self.brief.precopy.is_some()).await?;
            }
            self.connect(task, &pod, maxima).await
        };
        let mut link = ledger.forward(Step::SourceConnect, connect).await?;
        let outbox = link.outbox.clone();
        // A target that gives up, or is lost, before it has everything ends the attempt.
        let lost = follow_target(&mut link, ledger);
        self.link = Some(link);
        if let Some(freeze) = self.brief.precopy {
            say_step(task, Step::SourceCopy);
            let copied = ledger
                .forward(
                    Step::SourceCopy,
                    self.copy_while_it_runs(task, &ledger.stop, &pod, freeze),
                )
                .await;
            if let Err(why) = copied {
                lost.abort();
                return Err(why);
            }
        }
        let result = self
            .freeze_and_send(task, ledger, &pod, &containers, &room, &outbox)
            .await;
        lost.abort();
        result
    }

    fn offer(&self) -> Offer {
        let start = &self.brief.start;
        Offer {
            protocol: PROTOCOL.into(),
            versions: protocol::version::VERSIONS.to_vec(),
            stream: Stream::Session,
            namespace: start.namespace.clone(),
            name: start.name.clone(),
            uid: start.uid.clone(),
            attempt: start.attempt,
            source_pod_uid: start.pod_uid.clone(),
            target_pod_uid: self.brief.target_pod_uid.clone(),
        }
    }

    /// The rounds of a running pod. Nothing of it outlives this process.
    async fn copy_while_it_runs(
        &mut self,
        task: &Task,
        stop: &Stop,
        pod: &Arc<PodOnNode>,
        freeze: Duration,
    ) -> Result<(), Failed> {
        let node = &self.brief.target_node;
        let precopy = PreCopy::connect(task, pod.clone(), node, &self.offer(), PAGE_STREAMS, None).await?;
        let goal = Goal {
            freeze,
            fixed: FIXED_FREEZE,
            may_slow: false,
        };
        let (precopy, progress) = precopy.run(task, stop, goal).await?;
        tracing::info!(?progress, "the memory is copied: freezing");
        self.precopy = Some(precopy);
        Ok(())
    }

    pub(super) async fn connect(&mut self, task: &Task, pod: &PodOnNode, maxima: Maxima) -> Result<ToTarget, Failed> {
        let copied_before = self.brief.precopy.is_some();
        let node = &self.brief.target_node;
        let (endpoint, tls) = agent_of(task, node).await?;
        let failed = |e: peer::Error| Failed::because(Reason::TransferFailed, &e);
        let mut link = peer::dial(&tls, &endpoint, node).await.map_err(failed)?;
        say(&link, FromSource::Offer(self.offer())).await?;
        hear(&mut link, |m| matches!(m, FromTarget::Accept { .. })).await?;
        say(
            &link,
            FromSource::Manifest(Manifest {
                containers: pod.containers.iter().map(|c| c.name.clone()).collect(),
                descriptors: descriptors(&self.parked).await?,
                memory_bytes: if copied_before { 0 } else { maxima.memory },
                copied_before,
                max_image_bytes: maxima.images,
                max_file_bytes: maxima.files,
            }),
        )
        .await?;
        // While the target does the same.
        if !copied_before {
            self.warm = warm(maxima.memory).await;
        }
        hear(&mut link, |m| matches!(m, FromTarget::ManifestAccepted)).await?;
        Ok(link)
    }

    pub(super) async fn freeze_and_send(
        &mut self,
        task: &Task,
        ledger: &Ledger,
        pod: &Arc<PodOnNode>,
        containers: &[FrozenContainer],
        room: &Room,
        outbox: &Outbox,
    ) -> Result<(), Failed> {
        let failed = |e: holding::Error| Failed::because(Reason::StepFailed, &e);
        // Everything that can be known before the freeze is.
        let looked = pod.clone();
        let attributes = blocking(move || holding::own_attributes(&looked.containers))
            .await?
            .map_err(failed)?;
        let cgroups: Vec<PathBuf> = containers.iter().map(|c| c.cgroup.clone()).collect();

        say_step(task, Step::SourceFreeze);
        task.at_freeze()();
        let frozen_at = Instant::now();
        let freeze = async {
            let cgroups = cgroups.clone();
            self.frozen_at = Some(frozen_at);
            let warm = self.warm.take();
            blocking(move || {
                drop(warm);
                holding::freeze(&cgroups)
            })
            .await?
            .map_err(failed)
        };
        ledger.forward(Step::SourceFreeze, freeze).await?;
        let namespace = pod.network_namespace.clone();
        let hold = async {
            blocking(move || holding::hold_packets(&namespace))
                .await?
                .map_err(failed)
        };
        ledger.forward(Step::SourceHoldPackets, hold).await?;

        let looked = pod.clone();
        let (threads, sockets) = blocking(move || {
            Ok::<_, holding::Error>((
                holding::capture(&looked.containers)?,
                holding::sockets(&looked.network_namespace)?,
            ))
        })
        .await?
        .map_err(failed)?;
        ledger
            .record(Record::Threads {
                threads: threads.clone(),
            })
            .await?;
        self.outside = inet_diag::outside(&sockets).len();
        let inside = sockets.iter().filter(|s| s.is_connection()).count() - self.outside;
        let close = self.outside > 0 && !task.ctx.destroys_sockets;
        if close && inside > 0 {
            return Err(Failed::new(
                Reason::ConnectionNotPreservable,
                "the kernel cannot end single connections (INET_DIAG_DESTROY), and the pod has connections both inside and outside",
            ));
        }
        message(outbox, FromSource::Frozen).await?;
        message(
            outbox,
            FromSource::Facts(Facts {
                addresses: holding::bound_addresses(&sockets),
                connections_closed_by_criu: close,
                threads: attributes,
            }),
        )
        .await?;

        say_step(task, Step::SourceDump);
        // From here on what is tracked is decided: CRIU may look.
        let precopy = match self.precopy.take() {
            Some(mut precopy) => {
                let settle = blocking(move || {
                    precopy.settle();
                    precopy
                });
                Some(settle.await?)
            }
            None => None,
        };
        if let Some(precopy) = &precopy {
            let left = precopy.left_to_criu();
            if !left.is_empty() {
                tracing::info!(?left, "some memory is left to the dump");
            }
        }
        let mut parked = std::mem::take(&mut self.parked);
        let dump = async {
            if parked.is_empty() {
                parked = park(containers, room, close, precopy.is_some()).await?;
            }
            dump(ledger, pod, parked, outbox, precopy).await
        };
        ledger.forward(Step::SourceDump, dump).await?;
        let dump_milliseconds = millis(frozen_at);
        task.publish(|h| h.source.dump_milliseconds = Some(dump_milliseconds));

        say_step(task, Step::SourceCure);
        let (room, queue) = (room.clone(), outbox.clone());
        let pod = pod.clone();
        let cure = async move {
            blocking(move || {
                send_nameless(&room, &pod, &queue)?;
                send_metadata(&room, pod.containers.len(), &threads, &queue)
            })
            .await?
        };
        ledger.forward(Step::SourceCure, cure).await?;

        say_step(task, Step::SourceComplete);
        let complete = async {
            message(
                outbox,
                FromSource::Complete {
                    entries: outbox.entries(),
                    bytes: outbox.bytes(),
                },
            )
            .await
        };
        ledger.forward(Step::SourceComplete, complete).await?;
        task.ctx.metrics.transferred("sent", outbox.bytes());
        let bytes = i64::try_from(outbox.bytes()).unwrap_or(i64::MAX);
        let closed = u32::try_from(self.outside).unwrap_or(u32::MAX);
        let sent = millis(frozen_at);
        task.publish(|half| {
            half.source.step = Some("waiting for the decision".into());
            half.source.sent_milliseconds = Some(sent);
            half.source.bytes_sent = Some(bytes);
            half.source.connections_closed = Some(closed);
            half.progress = Some(Progress {
                transferred_bytes: Some(bytes),
                remaining_bytes: Some(0),
                ..Progress::default()
            });
        });
        task.condition(
            cond::MEMORY_SYNCED,
            Status::True,
            Reason::WaitingForRestore,
            "all images are on the target",
        );
        Ok(())
    }

    /// Waits for the decision: told by the target, seen in the API, or brought about where the target is lost.
    pub(super) async fn await_decision(&mut self, task: &mut Task) -> Decided {
        let decisions = task.decisions(&self.brief.start);
        let deadline = Instant::now() + self.brief.progress_timeout;
        let mut lost_at: Option<Instant> = None;
        let mut said_why = String::new();
        loop {
            if let Some(decided) = task.seen().migration.as_deref().and_then(decided_in) {
                return decided;
            }
            let link = self.link.as_mut();
            let heard = async {
                match link {
                    Some(link) if lost_at.is_none() => link.heard.recv().await,
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                heard = heard => match heard {
                    Some(FromTarget::Committed) => return Decided::Committed,
                    // Journaled by the target before it was said: it can never commit this attempt.
                    Some(FromTarget::Destroyed { reason, message }) => {
                        let why = Failed { reason, message };
                        spawn_abort(decisions.clone(), why.clone());
                        return Decided::Aborted(why);
                    }
                    Some(_) => {}
                    None => {
                        lost_at = Some(Instant::now());
                        said_why = self.link.as_ref().and_then(|l| l.end.reason()).unwrap_or_default();
                        tracing::warn!(error = said_why, "the target is not heard any more: waiting for the decision");
                    }
                },
                alive = task.changed() => if !alive {
                    return decisions.wait().await;
                },
                () = tokio::time::sleep(LOOK) => {
                    if lost_at.is_some() && let Some(decided) = decisions.look().await {
                        return decided;
                    }
                }
            }
            if lost_at.is_some_and(|t| t.elapsed() > LOST_TARGET) {
                let why = Failed::new(
                    Reason::TransferFailed,
                    format!("the target's agent is not heard any more: {said_why}"),
                );
                return decisions.abort(Party::Source, &why).await;
            }
            if Instant::now() > deadline {
                let why = Failed::new(
                    Reason::ProgressTimeout,
                    format!("the target did not restore within {:?}", self.brief.progress_timeout),
                );
                return decisions.abort(Party::Source, &why).await;
            }
        }
    }
}

/// Dumps all containers; meanwhile memory pages, root filesystems and /dev/shm are sent.
async fn dump(
    ledger: &Ledger,
    pod: &PodOnNode,
    parked: Vec<ParkedDump>,
    outbox: &Outbox,
    precopy: Option<PreCopy>,
) -> Result<(), Failed> {
    let canceled = Arc::new(AtomicBool::new(false));
    let mut jobs = tokio::task::JoinSet::new();
    for ((mut parked, container), place) in parked.into_iter().zip(&pod.containers).zip(0u32..) {
        parked.go().await?;
        let (folder, dumped) = (parked.images, parked.dumped);
        jobs.spawn(async {
            parked
                .end
                .await
                .unwrap_or_else(|e| Err(Failed::because(Reason::StepFailed, &e)))
        });
        let (queue, stop) = (outbox.clone(), canceled.clone());
        jobs.spawn_blocking(move || send_pages(&folder, place, &queue, &dumped, &stop));
        if let Some(upper) = container.upper.clone() {
            let (merged, queue, stop) = (container.rootfs.clone(), outbox.clone(), canceled.clone());
            jobs.spawn_blocking(move || {
                files::send(&upper, &merged, Place::Root(place), &queue, &stop).map_err(|e| sending(&e))
            });
        }
    }
    if let Some(shm) = pod.containers.iter().find_map(|c| c.shm.clone()) {
        let (queue, stop) = (outbox.clone(), canceled.clone());
        jobs.spawn_blocking(move || files::send(&shm, &shm, Place::Shm, &queue, &stop).map_err(|e| sending(&e)));
    }
    let (keep, tracker) = std::sync::mpsc::channel();
    if let Some(precopy) = precopy {
        let breakers = precopy.breakers();
        let stop = ledger.stop.clone();
        let guard = tokio::spawn(async move {
            let _ = stop.wait().await;
            breakers.iter().for_each(Breaker::end);
        });
        jobs.spawn_blocking(move || {
            let tracker = precopy.last_round();
            guard.abort();
            let _ = keep.send(tracker?);
            Ok(())
        });
    }
    let mut result = Ok(());
    loop {
        let next = tokio::select! {
            next = jobs.join_next() => next,
            why = ledger.stop.wait(), if result.is_ok() => {
                result = Err(why);
                canceled.store(true, Ordering::Release);
                continue;
            }
        };
        let Some(next) = next else { break };
        let one = next.unwrap_or_else(|e| Err(Failed::because(Reason::StepFailed, &e)));
        if let Err(why) = one {
            // The first cause counts: others follow from it. A failed dump says more than a lost connection.
            canceled.store(true, Ordering::Release);
            if result.is_ok() || why.reason == Reason::CheckpointFailed.as_str() {
                result = Err(why);
            }
        }
    }
    // CRIU has looked: nothing needs to be tracked any more.
    drop(tracker);
    result
}

/// The target has destroyed its copy; the API is told when it can be, the source does not wait for that.
pub(super) fn spawn_abort(decisions: Decisions, why: Failed) {
    tokio::spawn(async move {
        decisions.abort(Party::Source, &why).await;
    });
}

/// Where the agent of a node listens, and what this one shows it.
pub(super) async fn agent_of(task: &Task, node: &str) -> Result<(String, PeerTls), Failed> {
    let nodes: Api<MigrationNode> = Api::all(task.ctx.client.clone());
    let found = nodes
        .get(node)
        .await
        .map_err(|e| Failed::because(Reason::ApiUnavailable, &e))?;
    let endpoint = found.status.and_then(|s| s.endpoint).ok_or_else(|| {
        Failed::new(
            Reason::NodeNotReady,
            format!("the MigrationNode {node} names no endpoint"),
        )
    })?;
    let tls = task.ctx.tls.borrow().clone();
    let tls = tls.ok_or_else(|| Failed::because(Reason::TransferFailed, &peer::Error::NoIdentity))?;
    Ok((endpoint, tls))
}

pub(super) fn say_step(task: &Task, step: Step) {
    task.publish(|half| half.source.step = Some(step.name().to_owned()));
}

pub(super) async fn message(outbox: &Outbox, message: FromSource) -> Result<(), Failed> {
    outbox
        .message(message)
        .await
        .map_err(|e| Failed::because(Reason::TransferFailed, &e))
}

pub(super) async fn say(link: &ToTarget, what: FromSource) -> Result<(), Failed> {
    message(&link.outbox, what).await
}

/// Lets what the target says, and its loss, stop the forward steps; what it says is still there to be heard afterwards.
pub(super) fn follow_target(link: &mut ToTarget, ledger: &Ledger) -> tokio::task::AbortHandle {
    let (say, heard) = tokio::sync::mpsc::channel(16);
    let mut from_peer = std::mem::replace(&mut link.heard, heard);
    let mut end = link.end.clone();
    let stop = ledger.stop.clone();
    let lost = ledger.stop.clone();
    tokio::spawn(async move {
        while let Some(message) = from_peer.recv().await {
            if let FromTarget::Destroyed { reason, message } | FromTarget::Refuse { reason, message } = &message {
                stop.give_up(Failed {
                    reason: reason.clone(),
                    message: message.clone(),
                });
            }
            if say.send(message).await.is_err() {
                return;
            }
        }
    });
    tokio::spawn(async move {
        let why = end.wait().await;
        // What it said last comes before the end of the connection, and says more.
        tokio::time::sleep(Duration::from_millis(20)).await;
        lost.give_up(Failed::new(Reason::TransferFailed, why));
    })
    .abort_handle()
}

/// The next thing that the target says, if it is what is waited for.
pub(super) async fn hear(link: &mut ToTarget, expected: impl Fn(&FromTarget) -> bool) -> Result<FromTarget, Failed> {
    match link.heard.recv().await {
        Some(heard) if expected(&heard) => Ok(heard),
        Some(FromTarget::Refuse { reason, message } | FromTarget::Destroyed { reason, message }) => Err(Failed {
            reason,
            message: format!("the target refused: {message}"),
        }),
        Some(other) => Err(Failed::new(
            Reason::PeerRefused,
            format!("the target said {}", other.name()),
        )),
        None => Err(Failed::new(
            Reason::TransferFailed,
            link.end.reason().unwrap_or_else(|| "the connection was lost".into()),
        )),
    }
}

pub(super) fn frozen_containers(uid: &str, pod: &PodOnNode) -> Result<Vec<FrozenContainer>, Failed> {
    pod.containers
        .iter()
        .enumerate()
        .map(|(place, c)| {
            Ok(FrozenContainer {
                name: c.name.clone(),
                id: c.id.clone(),
                cgroup: c.cgroup.clone(),
                dump_cgroup: checkpoint::dump_cgroup(uid, place)
                    .map_err(|e| Failed::because(Reason::StepFailed, &e))?,
            })
        })
        .collect()
}
