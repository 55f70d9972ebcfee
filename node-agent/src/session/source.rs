//! The source's half: from the dial to the end of the released source, or back to the running one.
//!
//! ```text
//! Waiting -> Reserved -> Connected -> Frozen -> Dumped -> Complete -> (decision) -> MovedAway -> Released
//!                \___________\___________\__________\__________\____ GoBack: repair, packets, thaw, clean up
//! ```
//! Until `Complete` is sent the target cannot have everything, so it can never commit: a failure goes back at once, API
//! server or not. From then on only the decision says which way to go, read from the API or told by the target's agent.
//! The way back works from the journal alone: it is the same after a failure, an abort and a restart of the agent.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crds::{
    MigrationNode, ProcessMigration, Reason,
    condition::Status,
    process_migration::{Failure, Party, Progress, cond},
};
use hostsys::{cgroup::Cgroup, inet_diag};
use kube::Api;
use protocol::{
    hand_off::MOVED_AWAY_DIR,
    limits,
    migrate::{
        FromSource, FromTarget,
        message::{Facts, Manifest, Offer, PROTOCOL, Place, Stream},
    },
};

use super::{
    Busy, Task,
    hand_over::{Decided, Decisions, decided_in},
    ledger::{Failed, Ledger, blocking},
    open_ledger, remove_journal,
};
use crate::{
    checkpoint::{self, Dump, Room},
    cure,
    decide::{
        assignment,
        recover::Plan,
        step::{Role, Step},
    },
    files, holding,
    journal::{self, FrozenContainer, FrozenThread, Record, Start},
    outbox::Outbox,
    peer::{self, ToTarget},
    pod_on_node::{self, PodOnNode},
};

/// How long a source whose target is not heard any more waits before it tries to abort.
const LOST_TARGET: Duration = Duration::from_secs(5);
/// While the decision is not known.
const LOOK: Duration = Duration::from_millis(500);
/// Between two tries of a step that must happen.
const AGAIN: Duration = Duration::from_millis(500);
/// Room for what grows between the estimate and the freeze.
const SPARE: u64 = 256 << 20;

/// The session's task.
pub(super) async fn run(mut task: Task, recovered: Option<(Ledger, Start, Plan)>, busy: Busy) {
    if let Some((ledger, start, plan)) = recovered {
        let _working = busy.begin();
        return recover(&mut task, &ledger, &start, plan).await;
    }
    loop {
        let seen = task.seen();
        if seen.gone || seen.migration.as_deref().is_some_and(assignment::is_finished) {
            return;
        }
        if let Some(migration) = seen.migration.filter(|m| assignment::source_begins(m, &task.ctx.node)) {
            let _working = busy.begin();
            return begin(&mut task, &migration).await;
        }
        if !task.changed().await {
            return;
        }
    }
}

/// What the object says that an attempt needs.
struct Brief {
    start: Start,
    target_node: String,
    target_pod_uid: String,
    memory_bytes: u64,
    progress_timeout: Duration,
}

fn brief(task: &Task, migration: &ProcessMigration) -> Option<Brief> {
    let status = migration.status.as_ref()?;
    let (source, target) = (status.source.as_ref()?, status.target.as_ref()?);
    Some(Brief {
        start: Start {
            version: 1,
            role: Role::Source,
            namespace: task.whose.namespace.clone(),
            name: task.whose.name.clone(),
            uid: task.whose.uid.clone(),
            attempt: status.attempt?,
            pod_uid: source.pod_uid.clone()?,
            pod_name: source.pod_name.clone()?,
            boot_id: journal::boot_id(),
        },
        target_node: target.node_name.clone()?,
        target_pod_uid: target.pod_uid.clone()?,
        memory_bytes: source.memory_bytes.and_then(|b| u64::try_from(b).ok()).unwrap_or(0),
        progress_timeout: Duration::from_secs(u64::from(migration.spec.progress_timeout_seconds)),
    })
}

async fn begin(task: &mut Task, migration: &ProcessMigration) {
    let Some(brief) = brief(task, migration) else {
        return;
    };
    let opened = open_ledger(&task.ctx, &task.whose.uid, Role::Source).await;
    let ledger = match opened {
        Ok(ledger) => ledger,
        Err(why) => return give_up_unbegun(task, &brief.start, &why).await,
    };
    if let Err(why) = ledger.record(Record::Start(brief.start.clone())).await {
        return give_up_unbegun(task, &brief.start, &why).await;
    }
    tracing::info!(
        migration = task.whose.name,
        uid = task.whose.uid,
        pod = brief.start.pod_name,
        peer = brief.target_node,
        "moving a pod away"
    );
    let following = task.follow_decision(&ledger);
    // Only for the length of the attempt: it costs every task switch of the node a little.
    let _fewer_stalls = hostsys::perf::hold();
    let mut attempt = Attempt {
        brief,
        frozen_at: None,
        link: None,
        outside: 0,
    };
    let result = attempt.forward(task, &ledger).await;
    following.abort();
    match result {
        Ok(()) => {
            let decided = attempt.await_decision(task).await;
            settle(task, &ledger, &attempt.brief.start, decided, attempt.frozen_at, None).await;
        }
        Err(why) => {
            if let Some(link) = &attempt.link {
                let abandon = FromSource::Abandon {
                    reason: why.reason.clone(),
                    message: crds::condition::cut(&why.message, limits::MESSAGE_BYTES).to_owned(),
                };
                let said = tokio::time::timeout(Duration::from_secs(1), link.outbox.message(abandon)).await;
                tracing::debug!(?said, "told the target that the attempt is given up");
            }
            fail(task, &ledger, &attempt.brief.start, why, attempt.frozen_at).await;
        }
    }
}

/// Nothing was begun, not even the journal: only the decision is to be written.
async fn give_up_unbegun(task: &Task, start: &Start, why: &Failed) {
    tracing::error!(error = %why, "failed to begin");
    publish_failure(task, why);
    task.decisions(start).abort(Party::Source, why).await;
    task.stored().await;
}

fn publish_failure(task: &Task, why: &Failed) {
    let failure = Failure {
        reason: why.reason.clone(),
        message: crds::condition::cut(&why.message, crds::condition::MAX_MESSAGE).to_owned(),
    };
    task.publish(|half| half.source.failure = Some(failure));
}

/// The forward steps failed.
async fn fail(task: &mut Task, ledger: &Ledger, start: &Start, why: Failed, frozen_at: Option<Instant>) {
    if task.seen().migration.as_deref().and_then(decided_in).is_none() {
        publish_failure(task, &why);
    }
    let decisions = task.decisions(start);
    if ledger.has_begun(Step::SourceComplete) {
        // The target may have everything: nobody may go back before the decision is known.
        let decided = decisions.abort(Party::Source, &why).await;
        return settle(task, ledger, start, decided, frozen_at, None).await;
    }
    // The target can never commit what it does not have.
    let frozen = go_back(task, ledger, start, frozen_at).await;
    let decided = decisions.abort(Party::Source, &why).await;
    if decided == Decided::Committed {
        tracing::error!("the decision is Committed although not everything was sent: the source runs; this is a bug");
    }
    settle(task, ledger, start, Decided::Aborted(why), None, Some(frozen)).await;
}

async fn recover(task: &mut Task, ledger: &Ledger, start: &Start, plan: Plan) {
    let restarted = Failed::new(
        Reason::AgentRestarted,
        "the source's node-agent was restarted in the middle of the attempt",
    );
    match plan {
        Plan::GoBack => {
            let frozen = go_back(task, ledger, start, None).await;
            wait_until_seen(task).await;
            publish_failure(task, &restarted);
            let decided = task.decisions(start).abort(Party::Source, &restarted).await;
            let why = match decided {
                Decided::Aborted(why) => why,
                Decided::Committed => restarted,
            };
            settle(task, ledger, start, Decided::Aborted(why), None, Some(frozen)).await;
        }
        Plan::AskDecision => {
            let decided = task.decisions(start).abort(Party::Source, &restarted).await;
            settle(task, ledger, start, decided, None, None).await;
        }
        Plan::GoBackAborted => {
            let why = ledger.records().into_iter().rev().find_map(|r| match r {
                Record::Decided { reason, message, .. } => Some(Failed { reason, message }),
                _ => None,
            });
            settle(
                task,
                ledger,
                start,
                Decided::Aborted(why.unwrap_or(restarted)),
                None,
                None,
            )
            .await;
        }
        Plan::MovedAway => settle(task, ledger, start, Decided::Committed, None, None).await,
        Plan::Nothing | Plan::Destroy | Plan::AskCommit | Plan::Run => {}
    }
}

/// Waits a moment for the watch to show the object, so that the status can be written.
async fn wait_until_seen(task: &mut Task) {
    let wait = async { while task.seen().migration.is_none() && !task.seen().gone && task.changed().await {} };
    let _ = tokio::time::timeout(Duration::from_secs(20), wait).await;
}

/// The decision is known. `gone_back`: the way back was already gone, and for how long the pod was frozen.
async fn settle(
    task: &mut Task,
    ledger: &Ledger,
    start: &Start,
    decided: Decided,
    frozen_at: Option<Instant>,
    gone_back: Option<Option<u32>>,
) {
    let (committed, why) = match &decided {
        Decided::Committed => (true, Failed::new(Reason::DecisionCommitted, "")),
        Decided::Aborted(why) => (false, why.clone()),
    };
    let known = Record::Decided {
        committed,
        reason: why.reason.clone(),
        message: why.message.clone(),
    };
    while let Err(error) = ledger.record(known.clone()).await {
        tracing::error!(%error, "failed to note the decision; trying again");
        tokio::time::sleep(AGAIN).await;
    }
    tracing::info!(committed, reason = why.reason, message = why.message, "decided");
    match decided {
        Decided::Committed => release(task, ledger, start, frozen_at).await,
        Decided::Aborted(why) => {
            let frozen = match gone_back {
                Some(frozen) => frozen,
                None => go_back(task, ledger, start, frozen_at).await,
            };
            wait_until_seen(task).await;
            task.publish(|half| {
                half.source.step = None;
                if frozen.is_some() {
                    half.source.frozen_milliseconds = frozen;
                }
            });
            let reason = Reason::ALL.iter().copied().find(|r| r.as_str() == why.reason);
            task.condition(
                cond::SOURCE_RELEASED,
                Status::False,
                reason.unwrap_or(Reason::StepFailed),
                &format!("the source runs: {}", why.message),
            );
        }
    }
    task.stored().await;
    if let Err(error) = ledger.record(Record::Settled).await {
        tracing::warn!(%error, "failed to note that the session is settled");
    }
    remove_journal(&task.whose.uid, Role::Source).await;
    tracing::info!(uid = task.whose.uid, "the source's part has ended");
}

fn millis(since: Instant) -> u32 {
    u32::try_from(since.elapsed().as_millis()).unwrap_or(u32::MAX)
}

async fn until_done<F, Fut>(ledger: &Ledger, step: Step, work: F)
where
    F: Fn() -> Fut,
    Fut: Future<Output = Result<(), Failed>>,
{
    while let Err(error) = ledger.must(step, work()).await {
        tracing::error!(step = step.name(), %error, "a step that must happen failed; trying again");
        tokio::time::sleep(AGAIN).await;
    }
}

/// What the journal says was frozen.
fn frozen(ledger: &Ledger) -> (Vec<FrozenContainer>, Vec<FrozenThread>) {
    let mut found = (Vec::new(), Vec::new());
    for record in ledger.records() {
        match record {
            Record::Frozen { containers } => found.0 = containers,
            Record::Threads { threads } => found.1 = threads,
            _ => {}
        }
    }
    found
}

/// Back to a running source, from the journal alone. Says how long it was frozen, where that is known.
async fn go_back(task: &Task, ledger: &Ledger, start: &Start, frozen_at: Option<Instant>) -> Option<u32> {
    let (containers, threads) = frozen(ledger);
    let cgroups: Vec<PathBuf> = containers.iter().map(|c| c.cgroup.clone()).collect();
    let dumps: Vec<PathBuf> = containers.iter().map(|c| c.dump_cgroup.clone()).collect();
    if ledger.has_begun(Step::SourceDump) {
        loop {
            let dumps = dumps.clone();
            match blocking(move || checkpoint::wait_for_dumps(&dumps, Duration::from_secs(30))).await {
                Ok(Ok(())) => break,
                Ok(Err(error)) => {
                    task.publish(|h| h.source.step = Some("waiting for CRIU to end".into()));
                    tracing::error!(
                        error = crate::error::chain(&error),
                        "CRIU is still at work: the source stays frozen"
                    );
                }
                Err(error) => tracing::error!(%error, "failed to wait for CRIU"),
            }
            tokio::time::sleep(AGAIN).await;
        }
    }
    if ledger.has_begun(Step::SourceFreeze) {
        let repair = || {
            let threads = threads.clone();
            async move {
                let repaired = blocking(move || holding::repair(&threads)).await?;
                match repaired {
                    Ok(count) => tracing::info!(count, "interrupted system calls begin again"),
                    // Better an EINTR than a source that stays frozen.
                    Err(error) => tracing::warn!(error = crate::error::chain(&error), "some system calls return EINTR"),
                }
                Ok(())
            }
        };
        until_done(ledger, Step::SourceRepair, repair).await;
    }
    if ledger.has_begun(Step::SourceHoldPackets) {
        let pod_uid = start.pod_uid.clone();
        let release = || {
            let pod_uid = pod_uid.clone();
            async move {
                let done = blocking(move || match pod_on_node::find(&pod_uid) {
                    Ok(pod) => holding::release_packets(&pod.network_namespace),
                    // The sandbox is gone, and its network with it.
                    Err(pod_on_node::Error::NoSandbox(_)) => Ok(()),
                    Err(error) => Err(error.into()),
                });
                done.await?.map_err(|e| Failed::because(Reason::StepFailed, &e))
            }
        };
        until_done(ledger, Step::SourceReleasePackets, release).await;
    }
    let mut frozen_for = None;
    if ledger.has_begun(Step::SourceFreeze) {
        let thaw = || {
            let cgroups = cgroups.clone();
            async move {
                let done = blocking(move || holding::thaw(&cgroups)).await?;
                done.map_err(|e| Failed::because(Reason::StepFailed, &e))
            }
        };
        until_done(ledger, Step::SourceThaw, thaw).await;
        frozen_for = frozen_at.map(millis);
    }
    clean_up(ledger, start).await;
    frozen_for
}

fn marker(start: &Start) -> PathBuf {
    Path::new(MOVED_AWAY_DIR).join(&start.pod_uid)
}

fn remove_marker(path: &Path) -> Result<(), Failed> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Failed::new(
            Reason::StepFailed,
            format!("failed to remove {}: {e}", path.display()),
        )),
        _ => Ok(()),
    }
}

fn write_marker(path: &Path) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder)?;
    fs::File::create(path)?.sync_all()?;
    fs::File::open(folder)?.sync_all()
}

/// Removes everything that the session made on the host.
async fn clean_up(ledger: &Ledger, start: &Start) {
    let (room, marker) = (Room::of(&start.uid), marker(start));
    let work = || {
        let (room, marker) = (room.clone(), marker.clone());
        async move {
            blocking(move || {
                remove_marker(&marker)?;
                room.remove().map_err(|e| Failed::because(Reason::StepFailed, &e))
            })
            .await?
        }
    };
    until_done(ledger, Step::SourceCleanUp, work).await;
}

/// Behind the commit: the processes stay frozen until the kubelet, for which their pod is deleted, has ended them.
async fn release(task: &mut Task, ledger: &Ledger, start: &Start, frozen_at: Option<Instant>) {
    let (containers, _) = frozen(ledger);
    let cgroups: Vec<PathBuf> = containers.iter().map(|c| c.cgroup.clone()).collect();
    let dumps: Vec<PathBuf> = containers.iter().map(|c| c.dump_cgroup.clone()).collect();
    let frozen_for = frozen_at.map(millis);
    let (room, path) = (Room::of(&start.uid), marker(start));
    let move_away = || {
        let (room, path) = (room.clone(), path.clone());
        async move {
            blocking(move || {
                write_marker(&path)
                    .map_err(|e| Failed::new(Reason::StepFailed, format!("failed to write {}: {e}", path.display())))?;
                room.remove().map_err(|e| Failed::because(Reason::StepFailed, &e))
            })
            .await?
        }
    };
    until_done(ledger, Step::SourceMoveAway, move_away).await;
    wait_until_seen(task).await;
    task.publish(|half| {
        half.source.step = Some("waiting for the source to end".into());
        if frozen_for.is_some() {
            half.source.frozen_milliseconds = frozen_for;
        }
    });
    let mut pause = Duration::from_millis(100);
    loop {
        let watched = cgroups.clone();
        let ended = blocking(move || {
            watched
                .iter()
                .all(|c| !Cgroup::at(c).exists() || !Cgroup::at(c).is_populated().unwrap_or(true))
        });
        if ended.await.unwrap_or(false) && task.pod_exists(&start.pod_name, &start.pod_uid).await == Some(false) {
            break;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 5 / 4).min(Duration::from_secs(2));
    }
    let waited = blocking(move || checkpoint::wait_for_dumps(&dumps, Duration::from_secs(30))).await;
    if !matches!(waited, Ok(Ok(()))) {
        tracing::warn!(?waited, "failed to remove the cgroups of the dumps");
    }
    clean_up(ledger, start).await;
    task.publish(|half| half.source.step = None);
    task.condition(
        cond::SOURCE_RELEASED,
        Status::True,
        Reason::SourceGone,
        "the source's processes and its pod are gone",
    );
}

/// An attempt that is under way.
struct Attempt {
    brief: Brief,
    frozen_at: Option<Instant>,
    link: Option<ToTarget>,
    /// Connections with peers outside the pod.
    outside: usize,
}

impl Attempt {
    async fn forward(&mut self, task: &Task, ledger: &Ledger) -> Result<(), Failed> {
        let uid = self.brief.start.uid.clone();
        let room = Room::of(&uid);
        say_step(task, Step::SourceReserve);
        let limit = *task.ctx.checkpoint_limit_bytes.borrow();
        let (pod_uid, memory) = (self.brief.start.pod_uid.clone(), self.brief.memory_bytes);
        let reserve = {
            let room = room.clone();
            async move { blocking(move || reserve(&pod_uid, memory, limit, &room)).await? }
        };
        let (pod, maxima) = ledger.forward(Step::SourceReserve, reserve).await?;
        let pod = Arc::new(pod);

        say_step(task, Step::SourceConnect);
        let mut link = ledger
            .forward(Step::SourceConnect, self.connect(task, &pod, maxima))
            .await?;
        let outbox = link.outbox.clone();
        // A target that gives up, or is lost, before it has everything ends the attempt.
        let lost = follow_target(&mut link, ledger);
        self.link = Some(link);
        let result = self.freeze_and_send(task, ledger, &pod, &room, &outbox).await;
        lost.abort();
        result
    }

    async fn connect(&self, task: &Task, pod: &PodOnNode, maxima: Maxima) -> Result<ToTarget, Failed> {
        let node = &self.brief.target_node;
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
        let failed = |e: peer::Error| Failed::because(Reason::TransferFailed, &e);
        let tls = task
            .ctx
            .tls
            .borrow()
            .clone()
            .ok_or_else(|| failed(peer::Error::NoIdentity))?;
        let mut link = peer::dial(&tls, &endpoint, node).await.map_err(failed)?;
        let start = &self.brief.start;
        say(
            &link,
            FromSource::Offer(Offer {
                protocol: PROTOCOL.into(),
                versions: protocol::version::VERSIONS.to_vec(),
                stream: Stream::Session,
                namespace: start.namespace.clone(),
                name: start.name.clone(),
                uid: start.uid.clone(),
                attempt: start.attempt,
                source_pod_uid: start.pod_uid.clone(),
                target_pod_uid: self.brief.target_pod_uid.clone(),
            }),
        )
        .await?;
        hear(&mut link, |m| matches!(m, FromTarget::Accept { .. })).await?;
        say(
            &link,
            FromSource::Manifest(Manifest {
                containers: pod.containers.iter().map(|c| c.name.clone()).collect(),
                max_image_bytes: maxima.images,
                max_file_bytes: maxima.files,
            }),
        )
        .await?;
        hear(&mut link, |m| matches!(m, FromTarget::ManifestAccepted)).await?;
        Ok(link)
    }

    async fn freeze_and_send(
        &mut self,
        task: &Task,
        ledger: &Ledger,
        pod: &Arc<PodOnNode>,
        room: &Room,
        outbox: &Outbox,
    ) -> Result<(), Failed> {
        let start = self.brief.start.clone();
        let failed = |e: holding::Error| Failed::because(Reason::StepFailed, &e);
        // Everything that can be known before the freeze is.
        let looked = pod.clone();
        let attributes = blocking(move || holding::own_attributes(&looked.containers))
            .await?
            .map_err(failed)?;
        let containers = frozen_containers(&start.uid, pod)?;
        let cgroups: Vec<PathBuf> = containers.iter().map(|c| c.cgroup.clone()).collect();
        ledger
            .record(Record::Frozen {
                containers: containers.clone(),
            })
            .await?;

        say_step(task, Step::SourceFreeze);
        let frozen_at = Instant::now();
        let freeze = async {
            let cgroups = cgroups.clone();
            self.frozen_at = Some(frozen_at);
            blocking(move || holding::freeze(&cgroups)).await?.map_err(failed)
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
        let dump = self.dump(ledger, pod, &containers, room, outbox, close);
        ledger.forward(Step::SourceDump, dump).await?;
        let dump_milliseconds = millis(frozen_at);
        task.publish(|h| h.source.dump_milliseconds = Some(dump_milliseconds));

        say_step(task, Step::SourceCure);
        let (room, queue) = (room.clone(), outbox.clone());
        let count = pod.containers.len();
        let cure = async move { blocking(move || send_metadata(&room, count, &threads, &queue)).await? };
        ledger.forward(Step::SourceCure, cure).await?;

        say_step(task, Step::SourceComplete);
        let path = marker(&start);
        let complete = async {
            blocking(move || write_marker(&path)).await?.map_err(|e| {
                Failed::new(
                    Reason::StepFailed,
                    format!("failed to write the moved-away marker: {e}"),
                )
            })?;
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

    /// Dumps all containers; meanwhile memory pages, root filesystems and /dev/shm are sent.
    async fn dump(
        &self,
        ledger: &Ledger,
        pod: &Arc<PodOnNode>,
        containers: &[FrozenContainer],
        room: &Room,
        outbox: &Outbox,
        close_connections: bool,
    ) -> Result<(), Failed> {
        let settings = Arc::new(checkpoint::runtime_config());
        let canceled = Arc::new(AtomicBool::new(false));
        let mut jobs = tokio::task::JoinSet::new();
        for ((frozen, container), place) in containers.iter().zip(&pod.containers).zip(0u32..) {
            let dump = Dump {
                id: frozen.id.clone(),
                name: frozen.name.clone(),
                images: room.images(place),
                work: room.work(place),
                cgroup: frozen.dump_cgroup.clone(),
                close_connections,
            };
            let dumped = Arc::new(AtomicBool::new(false));
            let (settings, done) = (settings.clone(), dumped.clone());
            jobs.spawn_blocking(move || {
                let result = dump.run(&settings);
                done.store(true, Ordering::Release);
                result.map_err(|e| Failed::new(Reason::CheckpointFailed, e.to_string()))
            });
            let (folder, queue, stop) = (room.images(place), outbox.clone(), canceled.clone());
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
        result
    }

    /// Waits for the decision: told by the target, seen in the API, or brought about where the target is lost.
    async fn await_decision(&mut self, task: &mut Task) -> Decided {
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

/// The target has destroyed its copy; the API is told when it can be, the source does not wait for that.
fn spawn_abort(decisions: Decisions, why: Failed) {
    tokio::spawn(async move {
        decisions.abort(Party::Source, &why).await;
    });
}

fn sending(error: &files::Error) -> Failed {
    let reason = match error {
        files::Error::Device(_) => Reason::DeviceNotSupported,
        files::Error::Beneath(..)
        | files::Error::Outbox(_)
        | files::Error::Write(..)
        | files::Error::NotOpen(_)
        | files::Error::Canceled => Reason::TransferFailed,
    };
    Failed::because(reason, error)
}

fn say_step(task: &Task, step: Step) {
    task.publish(|half| half.source.step = Some(step.name().to_owned()));
}

async fn message(outbox: &Outbox, message: FromSource) -> Result<(), Failed> {
    outbox
        .message(message)
        .await
        .map_err(|e| Failed::because(Reason::TransferFailed, &e))
}

async fn say(link: &ToTarget, what: FromSource) -> Result<(), Failed> {
    message(&link.outbox, what).await
}

/// Lets what the target says, and its loss, stop the forward steps; what it says is still there to be heard afterwards.
fn follow_target(link: &mut ToTarget, ledger: &Ledger) -> tokio::task::AbortHandle {
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
async fn hear(link: &mut ToTarget, expected: impl Fn(&FromTarget) -> bool) -> Result<FromTarget, Failed> {
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

/// Most bytes that may be sent.
#[derive(Clone, Copy, Debug)]
struct Maxima {
    images: u64,
    files: u64,
}

/// Looks the pod up and makes room for its images.
fn reserve(pod_uid: &str, memory: u64, limit: u64, room: &Room) -> Result<(PodOnNode, Maxima), Failed> {
    let pod = pod_on_node::find(pod_uid).map_err(|e| Failed::because(Reason::SourceLost, &e))?;
    if pod.containers.is_empty() || pod.containers.len() > limits::CONTAINERS {
        return Err(Failed::new(
            Reason::SourceLost,
            format!("the pod has {} running containers", pod.containers.len()),
        ));
    }
    let memory = memory.max(resident(&pod));
    let available = checkpoint::available_memory();
    let most = limit.min(available);
    if memory > most {
        return Err(Failed::new(
            Reason::NotEnoughMemory,
            format!("the pod has {memory} bytes of memory, and this node has room for {most} bytes of images"),
        ));
    }
    let maxima = Maxima {
        images: (memory + memory / 4 + SPARE).min(most.max(SPARE)),
        files: {
            let uppers = pod.containers.iter().filter_map(|c| c.upper.as_deref());
            let shm = pod.containers.iter().find_map(|c| c.shm.as_deref());
            let bytes: u64 = uppers.chain(shm).map(files::measure).sum();
            bytes.saturating_mul(2).saturating_add(SPARE)
        },
    };
    let failed = |e: checkpoint::Error| Failed::because(Reason::StepFailed, &e);
    room.make(maxima.images).map_err(failed)?;
    for (_, place) in pod.containers.iter().zip(0u32..) {
        room.make_folders(place).map_err(failed)?;
    }
    Ok((pod, maxima))
}

/// Memory of all processes, by their resident pages: shared ones count several times, which is on the safe side.
fn resident(pod: &PodOnNode) -> u64 {
    let pids = pod.containers.iter().flat_map(|c| c.pids().unwrap_or_default());
    pids.filter_map(|pid| {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| -> u64 {
            text.lines()
                .find_map(|l| l.strip_prefix(name))
                .and_then(|v| v.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
                .unwrap_or(0)
        };
        Some((field("RssAnon:") + field("RssShmem:") + field("VmSwap:")) * 1024)
    })
    .sum()
}

fn frozen_containers(uid: &str, pod: &PodOnNode) -> Result<Vec<FrozenContainer>, Failed> {
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

fn is_pages(name: &str) -> bool {
    name.starts_with("pages-") && name.ends_with(".img")
}

/// Sends memory pages while CRIU writes them. CRIU only appends to these files; all others are sent when it has ended.
fn send_pages(
    folder: &Path,
    place: u32,
    outbox: &Outbox,
    dumped: &AtomicBool,
    canceled: &AtomicBool,
) -> Result<(), Failed> {
    let failed = |e: crate::outbox::Error| Failed::because(Reason::TransferFailed, &e);
    let mut open: Vec<(String, u32, fs::File, u64)> = Vec::new();
    loop {
        // Read before the look at the files: what was written before the end is then seen.
        let last = dumped.load(Ordering::Acquire);
        if canceled.load(Ordering::Acquire) {
            return Err(Failed::new(Reason::TransferFailed, "the copy was given up"));
        }
        let mut moved = false;
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else {
                continue;
            };
            if !is_pages(&name) || open.iter().any(|(n, ..)| *n == name) {
                continue;
            }
            let file = fs::File::open(entry.path())
                .map_err(|e| Failed::new(Reason::TransferFailed, format!("failed to open {name}: {e}")))?;
            let number = outbox
                .begin(Place::Images(place), name.as_bytes(), None)
                .map_err(failed)?;
            open.push((name, number, file, 0));
        }
        for (name, number, file, offset) in &mut open {
            let size = file.metadata().map_or(0, |m| m.len());
            let before = *offset;
            *offset = outbox.bytes_of(*number, file, name, before, size).map_err(failed)?;
            moved |= *offset > before;
        }
        if last && !moved {
            break;
        }
        if !moved {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    for (_, number, _, offset) in open {
        outbox.end(number, offset).map_err(failed)?;
    }
    Ok(())
}

/// Sends all other images, cured.
fn send_metadata(room: &Room, containers: usize, threads: &[FrozenThread], outbox: &Outbox) -> Result<(), Failed> {
    for place in (0u32..).take(containers) {
        let folder = room.images(place);
        let read = |e: std::io::Error| {
            Failed::new(
                Reason::CheckpointFailed,
                format!("failed to read the images in {}: {e}", folder.display()),
            )
        };
        let mut names: Vec<String> = fs::read_dir(&folder)
            .map_err(read)?
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .filter(|n| !is_pages(n))
            .collect();
        names.sort();
        for name in names {
            let path = folder.join(&name);
            let failed = |e: crate::outbox::Error| Failed::because(Reason::TransferFailed, &e);
            let whose = Place::Images(place);
            if cure::is_cured(&name) {
                let image = fs::read(&path).map_err(read)?;
                let cured = cured(&name, &image, place, threads).map_err(|e| {
                    Failed::new(
                        Reason::CheckpointFailed,
                        format!("image {name} cannot be understood: {e}"),
                    )
                })?;
                outbox
                    .content(whose, name.as_bytes(), cured.as_deref().unwrap_or(&image))
                    .map_err(failed)?;
            } else {
                let file = fs::File::open(&path).map_err(read)?;
                outbox
                    .whole(whose, name.as_bytes(), None, &file, &name)
                    .map_err(failed)?;
            }
        }
    }
    Ok(())
}

/// An image as it is to be sent, where it differs.
fn cured(name: &str, image: &[u8], container: u32, threads: &[FrozenThread]) -> Result<Option<Vec<u8>>, cure::Error> {
    if let Some(vtid) = cure::thread_of_core(name) {
        let thread = threads.iter().find(|t| t.container == container && t.vtid == vtid);
        if thread.is_some_and(|t| t.pending) {
            return Ok(None);
        }
        let known = thread
            .and_then(|t| t.call)
            .map(|(number, first, _)| cure::KnownCall { number, first });
        return cure::cure_core(image, known);
    }
    if cure::is_system_v(name) {
        return if container == 0 {
            Ok(None)
        } else {
            cure::without_objects(image).map(Some)
        };
    }
    cure::cure_files(image)
}
