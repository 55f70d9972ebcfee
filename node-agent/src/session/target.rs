//! The target's half: from the hand-offs to the running copy, or to nothing left.
//!
//! ```text
//! Waiting -> HandedOff -> Ready -> Reserved -> Receiving -> Staged -> Held -> (commit) -> Running
//!               \___________\__________\___________\___________\_______\____ Destroy: shepherds, cgroups, images
//! ```
//! Everything that can fail is done before the commit, with every container restored and held by the freezer: no user
//! instruction has run. What the source sends is input like any other: bounded, written beneath its folders only.

use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crds::{
    ProcessMigration, Reason,
    condition::{self, Status},
    names,
    process_migration::{Failure, Party, cond},
};
use hostsys::{addresses, cgroup::Cgroup, inet_diag};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use protocol::{
    frame,
    hand_off::{HandOff, Request, ShepherdReport, State},
    limits,
    migrate::{
        FromTarget,
        message::{Facts, Manifest, Place},
        target as machine,
    },
    version,
};
use tokio::sync::mpsc;

use super::{
    Busy, Inbound, Task,
    hand_over::{Decided, decided_in},
    ledger::{Failed, Ledger, blocking},
    open_ledger, refuse, remove_journal, shepherds,
};
use crate::{
    checkpoint::{self, Room},
    decide::{
        assignment,
        recover::Plan,
        step::{Role, Step},
    },
    files::{self, Tree},
    holding, journal,
    journal::{Record, Start, TargetContainer},
    peer::{self, Event, FromSourceSide},
};

/// How long the kubelet may take to call `create` for every container.
const SHEPHERDS: Duration = Duration::from_secs(300);
/// Between two looks for shepherds.
const LOOK: Duration = Duration::from_millis(20);
/// Between two tries of a step that must happen.
const AGAIN: Duration = Duration::from_millis(500);
/// For a shepherd's answer to anything but a restore.
const ANSWER: Duration = Duration::from_secs(10);
/// For the end of killed processes.
const KILL: Duration = Duration::from_secs(20);
/// The kernel keeps this much for itself and others.
const RESERVE: u64 = 64 << 20;

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
        if let Some(migration) = seen.migration.filter(|m| assignment::target_begins(m, &task.ctx.node)) {
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
    source_node: String,
    source_pod_uid: String,
}

fn brief(task: &Task, migration: &ProcessMigration) -> Option<Brief> {
    let status = migration.status.as_ref()?;
    let (source, target) = (status.source.as_ref()?, status.target.as_ref()?);
    Some(Brief {
        start: Start {
            version: 1,
            role: Role::Target,
            namespace: task.whose.namespace.clone(),
            name: task.whose.name.clone(),
            uid: task.whose.uid.clone(),
            attempt: status.attempt?,
            pod_uid: target.pod_uid.clone()?,
            pod_name: target.pod_name.clone()?,
            boot_id: journal::boot_id(),
        },
        source_node: source.node_name.clone()?,
        source_pod_uid: source.pod_uid.clone()?,
    })
}

/// An attempt that is under way.
struct Attempt {
    brief: Brief,
    /// For telling the source how it ended.
    say: Option<mpsc::Sender<FromTarget>>,
    /// The connection, once everything has arrived.
    link: Option<FromSourceSide>,
    frozen_at: Option<Instant>,
}

async fn begin(task: &mut Task, migration: &ProcessMigration) {
    let Some(brief) = brief(task, migration) else {
        return;
    };
    let opened = open_ledger(&task.ctx, &task.whose.uid, Role::Target).await;
    let begun = match opened {
        Ok(ledger) => ledger.record(Record::Start(brief.start.clone())).await.map(|()| ledger),
        Err(why) => Err(why),
    };
    let ledger = match begun {
        Ok(ledger) => ledger,
        Err(why) => {
            tracing::error!(error = %why, "failed to begin");
            publish_failure(task, &why);
            task.decisions(&brief.start).abort(Party::Target, &why).await;
            return task.stored().await;
        }
    };
    tracing::info!(
        migration = task.whose.name,
        uid = task.whose.uid,
        pod = brief.start.pod_name,
        peer = brief.source_node,
        "receiving a pod"
    );
    let following = task.follow_decision(&ledger);
    // Only for the length of the attempt: it costs every task switch of the node a little.
    let _fewer_stalls = hostsys::perf::hold();
    let mut attempt = Attempt {
        brief,
        say: None,
        link: None,
        frozen_at: None,
    };
    let result = attempt.forward(task, &ledger).await;
    let start = attempt.brief.start.clone();
    let decided = match result {
        Ok(containers) => attempt.commit(task, &ledger, &containers).await,
        Err(why) => Decided::Aborted(why),
    };
    following.abort();
    match decided {
        Decided::Committed => attempt_runs(task, &ledger, &start, &mut attempt).await,
        Decided::Aborted(why) => aborted(task, &ledger, &start, why, attempt.say.take()).await,
    }
    // The last word has to reach the source before the connection goes.
    drop(attempt.say.take());
    if let Some(mut link) = attempt.link.take() {
        let (unused, _) = mpsc::channel(1);
        drop(std::mem::replace(&mut link.say, unused));
        let _ = tokio::time::timeout(Duration::from_secs(3), link.end.wait()).await;
    }
}

fn publish_failure(task: &Task, why: &Failed) {
    let failure = Failure {
        reason: why.reason.clone(),
        message: condition::cut(&why.message, condition::MAX_MESSAGE).to_owned(),
    };
    task.publish(|half| half.target.failure = Some(failure));
}

async fn recover(task: &mut Task, ledger: &Ledger, start: &Start, plan: Plan) {
    let restarted = Failed::new(
        Reason::AgentRestarted,
        "the target's node-agent was restarted in the middle of the attempt",
    );
    let committed = match plan {
        Plan::Run => true,
        // The swap may have happened. Where it has not, nobody may make it any more.
        Plan::AskCommit => match task.decisions(start).abort(Party::Target, &restarted).await {
            Decided::Committed => true,
            Decided::Aborted(why) => return aborted(task, ledger, start, why, None).await,
        },
        Plan::Destroy => {
            let why = ledger.records().into_iter().rev().find_map(|r| match r {
                Record::Decided { reason, message, .. } => Some(Failed { reason, message }),
                _ => None,
            });
            return aborted(task, ledger, start, why.unwrap_or(restarted), None).await;
        }
        Plan::Nothing | Plan::GoBack | Plan::AskDecision | Plan::GoBackAborted | Plan::MovedAway => false,
    };
    if committed {
        runs(task, ledger, start, None, None).await;
    }
}

async fn attempt_runs(task: &mut Task, ledger: &Ledger, start: &Start, attempt: &mut Attempt) {
    runs(task, ledger, start, attempt.say.take(), attempt.frozen_at).await;
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

async fn note_decision(ledger: &Ledger, committed: bool, why: &Failed) {
    let known = Record::Decided {
        committed,
        reason: why.reason.clone(),
        message: why.message.clone(),
    };
    while let Err(error) = ledger.record(known.clone()).await {
        tracing::error!(%error, "failed to note the decision; trying again");
        tokio::time::sleep(AGAIN).await;
    }
}

/// What the journal says of the shepherds.
fn shepherds_of(ledger: &Ledger) -> (Vec<TargetContainer>, Option<PathBuf>, Vec<IpAddr>) {
    let mut found = (Vec::new(), None, Vec::new());
    for record in ledger.records() {
        match record {
            Record::Shepherds {
                containers,
                network_namespace,
            } => {
                found.0 = containers;
                found.1 = Some(network_namespace);
            }
            Record::Addresses { addresses } => found.2 = addresses,
            _ => {}
        }
    }
    found
}

fn millis(since: Instant) -> u32 {
    u32::try_from(since.elapsed().as_millis()).unwrap_or(u32::MAX)
}

/// Behind the commit: packets pass, all containers run. Idempotent.
async fn runs(
    task: &mut Task,
    ledger: &Ledger,
    start: &Start,
    say: Option<mpsc::Sender<FromTarget>>,
    frozen_at: Option<Instant>,
) {
    let (containers, namespace, _) = shepherds_of(ledger);
    let cgroups: Vec<PathBuf> = containers.iter().map(|c| c.cgroup.clone()).collect();
    if frozen_at.is_none() {
        note_decision(ledger, true, &Failed::new(Reason::DecisionCommitted, "")).await;
    }
    let thaw = || {
        let (cgroups, namespace) = (cgroups.clone(), namespace.clone());
        async move {
            let done = blocking(move || {
                if let Some(namespace) = namespace {
                    holding::release_packets(&namespace)?;
                }
                holding::thaw(&cgroups)
            });
            done.await?.map_err(|e| Failed::because(Reason::StepFailed, &e))
        }
    };
    until_done(ledger, Step::TargetThaw, thaw).await;
    let frozen_for = frozen_at.map(millis);
    if frozen_at.is_some() {
        // Not awaited: the containers run already, the journal is for a restart only.
        note_decision(ledger, true, &Failed::new(Reason::DecisionCommitted, "")).await;
    }
    if let Some(say) = say
        && say.send(FromTarget::Committed).await.is_err()
    {
        tracing::info!("the source is not connected any more: it reads the decision from the API");
    }
    for container in &containers {
        match shepherds::ask(&container.id, &Request::Committed, ANSWER).await {
            Ok(State::Committed { .. } | State::Ended) => {}
            Ok(state) => tracing::warn!(
                container = container.name,
                ?state,
                "a shepherd does not follow the commit"
            ),
            Err(error) => tracing::warn!(
                container = container.name,
                error = crate::error::chain(&error),
                "a shepherd did not hear of the commit"
            ),
        }
    }
    task.publish(|half| {
        half.target.step = None;
        if frozen_for.is_some() {
            half.target.frozen_milliseconds = frozen_for;
        }
    });
    clean_up(ledger, start).await;
    finish(task, ledger).await;
}

async fn finish(task: &Task, ledger: &Ledger) {
    task.stored().await;
    if let Err(error) = ledger.record(Record::Settled).await {
        tracing::warn!(%error, "failed to note that the session is settled");
    }
    remove_journal(&task.whose.uid, Role::Target).await;
    tracing::info!(uid = task.whose.uid, "the target's part has ended");
}

async fn clean_up(ledger: &Ledger, start: &Start) {
    let (room, pod_uid) = (Room::of(&start.uid), start.pod_uid.clone());
    let work = || {
        let (room, pod_uid) = (room.clone(), pod_uid.clone());
        async move {
            blocking(move || {
                room.remove().map_err(|e| Failed::because(Reason::StepFailed, &e))?;
                shepherds::remove_hand_offs(&pod_uid).map_err(|e| Failed::because(Reason::StepFailed, &e))
            })
            .await?
        }
    };
    until_done(ledger, Step::TargetCleanUp, work).await;
}

/// Before the commit: everything of the target is destroyed, journaled, and only then said.
async fn aborted(task: &mut Task, ledger: &Ledger, start: &Start, why: Failed, say: Option<mpsc::Sender<FromTarget>>) {
    tracing::info!(reason = why.reason, message = why.message, "giving up the target");
    if task.seen().migration.as_deref().and_then(decided_in).is_none() {
        publish_failure(task, &why);
    }
    let (mut containers, namespace, added) = shepherds_of(ledger);
    let (pod_uid, migration_uid) = (start.pod_uid.clone(), start.uid.clone());
    let destroy = || {
        let (pod_uid, migration_uid) = (pod_uid.clone(), migration_uid.clone());
        let (namespace, added, known) = (namespace.clone(), added.clone(), containers.clone());
        async move { destroy(pod_uid, migration_uid, known, namespace, added).await }
    };
    until_done(ledger, Step::TargetDestroy, destroy).await;
    containers.clear();
    // From here on this attempt can never be committed: only this agent could, and it knows.
    note_decision(ledger, false, &why).await;
    if let Some(say) = say {
        let destroyed = FromTarget::Destroyed {
            reason: why.reason.clone(),
            message: condition::cut(&why.message, limits::MESSAGE_BYTES).to_owned(),
        };
        if say.send(destroyed).await.is_err() {
            tracing::info!("the source is not connected any more: it reads the decision from the API");
        }
    }
    let decided = task.decisions(start).abort(Party::Target, &why).await;
    if decided == Decided::Committed {
        tracing::error!("the decision is Committed although this agent did not commit; this is a bug");
    }
    wait_until_seen(task).await;
    task.publish(|half| {
        half.target.step = None;
        half.target.destroyed = Some(true);
    });
    // The marker that fails a `create` stays until the kubelet cannot call it any more.
    let mut pause = Duration::from_millis(100);
    while task.pod_exists(&start.pod_name, &start.pod_uid).await != Some(false) {
        tokio::time::sleep(pause).await;
        pause = (pause * 5 / 4).min(Duration::from_secs(5));
    }
    clean_up(ledger, start).await;
    finish(task, ledger).await;
}

async fn wait_until_seen(task: &mut Task) {
    let wait = async { while task.seen().migration.is_none() && !task.seen().gone && task.changed().await {} };
    let _ = tokio::time::timeout(Duration::from_secs(20), wait).await;
}

/// Ends everything of the target and verifies it.
async fn destroy(
    pod_uid: String,
    migration_uid: String,
    known: Vec<TargetContainer>,
    namespace: Option<PathBuf>,
    added: Vec<IpAddr>,
) -> Result<(), Failed> {
    let failed = |e: shepherds::Error| Failed::because(Reason::StepFailed, &e);
    let (uid, migration) = (pod_uid.clone(), migration_uid.clone());
    let standing = blocking(move || {
        shepherds::mark_aborted(&uid)?;
        shepherds::standing(&uid, &migration)
    })
    .await?
    .map_err(failed)?;
    let mut cgroups: BTreeSet<PathBuf> = known.into_iter().map(|c| c.cgroup).collect();
    let asks = standing
        .iter()
        .map(|report| shepherds::ask(&report.container_id, &Request::Abort, ANSWER));
    for (answer, report) in futures::future::join_all(asks).await.into_iter().zip(&standing) {
        cgroups.insert(PathBuf::from(&report.cgroup));
        if let Err(error) = answer {
            tracing::info!(
                error = crate::error::chain(&error),
                "a shepherd does not answer: killing what it holds"
            );
        }
    }
    blocking(move || {
        for path in &cgroups {
            // Also what a shepherd that has died left behind.
            Cgroup::at(path)
                .kill(KILL)
                .map_err(|e| Failed::because(Reason::StepFailed, &e))?;
        }
        if let Some(namespace) = namespace {
            // The sandbox may be gone; where it is not, it goes with the pod.
            if let Err(error) = holding::release_packets(&namespace) {
                tracing::info!(
                    error = crate::error::chain(&error),
                    "failed to release the packets of a target that is gone"
                );
            }
            if let Ok(file) = fs::File::open(&namespace) {
                for address in added {
                    if let Err(error) = addresses::remove_from_loopback(file.as_fd(), address) {
                        tracing::info!(error = crate::error::chain(&error), "failed to remove an address");
                    }
                }
            }
        }
        Ok(())
    })
    .await?
}

/// Where everything of the target is.
struct Ground {
    containers: Vec<TargetContainer>,
    reports: Vec<ShepherdReport>,
    network_namespace: PathBuf,
}

impl Attempt {
    async fn forward(&mut self, task: &mut Task, ledger: &Ledger) -> Result<Ground, Failed> {
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

        let mut link = self.source(task, ledger).await?;
        self.say = Some(link.say.clone());
        say_step(task, Step::TargetReserve);
        let room = Room::of(&self.brief.start.uid);
        let limit = *task.ctx.checkpoint_limit_bytes.borrow();
        let reserved = ledger
            .forward(Step::TargetReserve, reserve(&mut link, &place, room.clone(), limit))
            .await;
        let (order, facts);
        match reserved {
            Ok(manifest) => order = manifest_order(&manifest, &place)?,
            Err(why) => {
                self.link = Some(link);
                return Err(why);
            }
        }
        say(&link.say, FromTarget::ManifestAccepted).await?;

        say_step(task, Step::TargetReceive);
        let (_, nothing) = mpsc::channel(1);
        let events = std::mem::replace(&mut link.events, nothing);
        let incoming = Incoming {
            events,
            spare: link.spare.clone(),
            end: link.end.clone(),
        };
        self.link = Some(link);
        let receive = self.receive(ledger, incoming, &room, &place, &order);
        let (received, frozen_at) = ledger.forward(Step::TargetReceive, receive).await?;
        facts = received.facts;
        self.frozen_at = Some(frozen_at);
        follow_source(received.events, ledger);
        let received_milliseconds = millis(frozen_at);
        task.publish(|half| half.target.received_milliseconds = Some(received_milliseconds));
        if let Some(say_to) = &self.say {
            say(say_to, FromTarget::Received).await.ok();
        }

        say_step(task, Step::TargetPrepareNetwork);
        ledger
            .record(Record::Addresses {
                addresses: facts.addresses.clone(),
            })
            .await?;
        let (namespace, wanted) = (place.network_namespace.clone(), facts.addresses.clone());
        let prepare = async { blocking(move || prepare_network(&namespace, &wanted)).await? };
        ledger.forward(Step::TargetPrepareNetwork, prepare).await?;

        say_step(task, Step::TargetRestore);
        let restoring = Instant::now();
        ledger
            .forward(Step::TargetRestore, restore(ledger, &room, &place, &order))
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
        let adjust = async { blocking(move || adjust(&namespace, &cgroups, &facts)).await? };
        ledger.forward(Step::TargetAdjust, adjust).await?;
        if let Some(say_to) = &self.say {
            say(say_to, FromTarget::Held).await.ok();
        }
        Ok(place)
    }

    /// The pod is the migration's own, and bound to this node: the object that the watch showed is not trusted to say so.
    async fn verify_pod(&self, task: &Task) -> Result<Vec<String>, Failed> {
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

    fn hand_off(&self, container: &str) -> HandOff {
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
    async fn shepherds(&self, ledger: &Ledger, names: &[String]) -> Result<Ground, Failed> {
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
    async fn source(&self, task: &mut Task, ledger: &Ledger) -> Result<FromSourceSide, Failed> {
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
                    return Ok(link);
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
    async fn receive(
        &mut self,
        ledger: &Ledger,
        incoming: Incoming,
        room: &Room,
        place: &Ground,
        order: &[usize],
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
            write_all(incoming, &targets, &stopped)
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
    async fn commit(&mut self, task: &Task, ledger: &Ledger, _held: &Ground) -> Decided {
        say_step(task, Step::TargetCommit);
        let decisions = task.decisions(&self.brief.start);
        let begun = Instant::now();
        let swap = async { Ok(decisions.commit().await) };
        match ledger.forward(Step::TargetCommit, swap).await {
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
fn follow_source(mut events: mpsc::Receiver<Event>, ledger: &Ledger) {
    let stop = ledger.stop.clone();
    tokio::spawn(async move {
        while let Some(event) = events.recv().await {
            if let Event::Message(machine::Output::Abandon { reason, message }) = event {
                stop.give_up(Failed { reason, message });
            }
        }
    });
}

fn say_step(task: &Task, step: Step) {
    task.publish(|half| half.target.step = Some(step.name().to_owned()));
}

async fn say(to: &mpsc::Sender<FromTarget>, message: FromTarget) -> Result<(), Failed> {
    to.send(message)
        .await
        .map_err(|_| Failed::new(Reason::TransferFailed, "the connection to the source was lost"))
}

/// Hears the manifest and makes room for what it announces.
async fn reserve(link: &mut FromSourceSide, place: &Ground, room: Room, limit: u64) -> Result<Manifest, Failed> {
    let manifest = match link.events.recv().await {
        Some(Event::Message(machine::Output::Manifest(manifest))) => manifest,
        Some(Event::Message(machine::Output::Abandon { reason, message })) => return Err(Failed { reason, message }),
        Some(Event::Message(_) | Event::Piece { .. }) => {
            return Err(Failed::new(Reason::PeerRefused, "the source did not send a manifest"));
        }
        None => {
            let why = link.end.reason().unwrap_or_default();
            return Err(Failed::new(Reason::TransferFailed, why));
        }
    };
    manifest_order(&manifest, place)?;
    let available = checkpoint::available_memory().saturating_sub(RESERVE);
    let most = limit.min(available);
    if manifest.max_image_bytes > most {
        return Err(Failed::new(
            Reason::NotEnoughMemory,
            format!(
                "the images may take {} bytes, and this node has room for {most}",
                manifest.max_image_bytes
            ),
        ));
    }
    let bytes = manifest.max_image_bytes;
    blocking(move || room.make(bytes))
        .await?
        .map_err(|e| Failed::because(Reason::StepFailed, &e))?;
    Ok(manifest)
}

/// For each container of the manifest its place in ours: both must have the same names.
fn manifest_order(manifest: &Manifest, place: &Ground) -> Result<Vec<usize>, Failed> {
    let found: Vec<usize> = manifest
        .containers
        .iter()
        .filter_map(|name| place.containers.iter().position(|c| &c.name == name))
        .collect();
    if found.len() == manifest.containers.len() && found.len() == place.containers.len() {
        Ok(found)
    } else {
        Err(Failed::new(
            Reason::PeerRefused,
            format!("the source announces the containers {}", manifest.containers.join(", ")),
        ))
    }
}

/// Where what is received goes.
struct Targets {
    images: Vec<PathBuf>,
    roots: Vec<PathBuf>,
    shm: Option<PathBuf>,
}

/// What comes from the source. The connection itself stays with the session: it has to say how it ended.
struct Incoming {
    events: mpsc::Receiver<Event>,
    spare: peer::Spare,
    end: peer::End,
}

/// Everything has arrived.
struct Received {
    events: mpsc::Receiver<Event>,
    facts: Facts,
}

/// The folders that are written to, opened when the first entry for them comes.
struct Trees<'a> {
    targets: &'a Targets,
    open: Vec<(Place, Tree)>,
    /// Which tree an open file is in.
    files: std::collections::HashMap<u32, usize>,
}

impl Trees<'_> {
    fn index(&mut self, place: Place) -> Result<usize, Failed> {
        if let Some(found) = self.open.iter().position(|(p, _)| *p == place) {
            return Ok(found);
        }
        let of = |list: &[PathBuf], n: u32| usize::try_from(n).ok().and_then(|n| list.get(n)).cloned();
        let folder = match place {
            Place::Images(n) => of(&self.targets.images, n),
            Place::Root(n) => of(&self.targets.roots, n),
            Place::Shm => self.targets.shm.clone(),
        };
        let folder =
            folder.ok_or_else(|| Failed::new(Reason::PeerRefused, "the source sends files that have no place here"))?;
        let tree = Tree::open(&folder).map_err(|e| writing(&e))?;
        self.open.push((place, tree));
        Ok(self.open.len() - 1)
    }

    fn tree(&mut self, index: usize) -> Result<&mut Tree, Failed> {
        match self.open.get_mut(index) {
            Some((_, tree)) => Ok(tree),
            None => Err(Failed::new(Reason::StepFailed, "a tree is missing")),
        }
    }

    fn of_file(&mut self, file: u32) -> Result<&mut Tree, Failed> {
        let index = self.files.get(&file).copied().unwrap_or(usize::MAX);
        self.tree(index)
    }
}

fn writing(error: &files::Error) -> Failed {
    Failed::because(Reason::StepFailed, error)
}

/// Writes what comes until everything has arrived. Blocking.
fn write_all(
    mut incoming: Incoming,
    targets: &Targets,
    go_on: &std::sync::mpsc::Receiver<()>,
) -> Result<(Received, Instant), Failed> {
    let mut trees = Trees {
        targets,
        open: Vec::new(),
        files: std::collections::HashMap::new(),
    };
    let mut facts = None;
    let mut frozen_at = None;
    loop {
        if matches!(go_on.try_recv(), Err(std::sync::mpsc::TryRecvError::Disconnected)) {
            return Err(Failed::new(Reason::TransferFailed, "the copy was given up"));
        }
        let next = match incoming.events.try_recv() {
            Ok(event) => Some(event),
            Err(mpsc::error::TryRecvError::Disconnected) => None,
            // Now and then a look whether to go on.
            Err(mpsc::error::TryRecvError::Empty) => {
                let wait = async { tokio::time::timeout(LOOK, incoming.events.recv()).await };
                match tokio::runtime::Handle::current().block_on(wait) {
                    Ok(next) => next,
                    Err(_) => continue,
                }
            }
        };
        let Some(event) = next else {
            return Err(Failed::new(
                Reason::TransferFailed,
                incoming
                    .end
                    .reason()
                    .unwrap_or_else(|| "the connection to the source was lost".into()),
            ));
        };
        match event {
            Event::Piece {
                file,
                offset,
                buffer,
                len,
            } => {
                let bytes = buffer.get(frame::DATA_HEADER..len).unwrap_or_default();
                trees
                    .of_file(file)?
                    .piece(file, offset, bytes)
                    .map_err(|e| writing(&e))?;
                incoming.spare.give_back(buffer);
            }
            Event::Message(machine::Output::Entry(entry)) => {
                let index = trees.index(entry.place)?;
                if let protocol::migrate::message::EntryKind::File { file } = entry.kind {
                    trees.files.insert(file, index);
                }
                trees.tree(index)?.entry(entry).map_err(|e| writing(&e))?;
            }
            Event::Message(machine::Output::FileEnd { file, size }) => {
                trees.of_file(file)?.end(file, size).map_err(|e| writing(&e))?;
                trees.files.remove(&file);
            }
            Event::Message(machine::Output::Frozen) => frozen_at = Some(Instant::now()),
            Event::Message(machine::Output::Facts(f)) => facts = Some(f),
            Event::Message(machine::Output::Abandon { reason, message }) => return Err(Failed { reason, message }),
            Event::Message(machine::Output::Complete) => {
                for (_, tree) in trees.open {
                    tree.finish().map_err(|e| writing(&e))?;
                }
                let facts = facts.unwrap_or_default();
                let events = incoming.events;
                return Ok((Received { events, facts }, frozen_at.unwrap_or_else(Instant::now)));
            }
            Event::Message(
                machine::Output::Offer(_)
                | machine::Output::Manifest(_)
                | machine::Output::Data { .. }
                | machine::Output::Alive
                | machine::Output::MaySend,
            ) => {}
        }
    }
}

/// Drops the pod's packets until it runs, and gives its sockets the addresses that they are bound to.
fn prepare_network(namespace: &Path, wanted: &[IpAddr]) -> Result<(), Failed> {
    let failed = |what: &str, e: &(dyn std::error::Error + 'static)| {
        Failed::new(
            Reason::RestoreFailed,
            format!("failed to {what}: {}", crate::error::chain(e)),
        )
    };
    holding::hold_packets(namespace).map_err(|e| failed("hold the target pod's packets", &e))?;
    let file = fs::File::open(namespace).map_err(|e| failed("open the target pod's network namespace", &e))?;
    let present = addresses::list(file.as_fd()).map_err(|e| failed("list the target pod's addresses", &e))?;
    for address in wanted {
        if !present.iter().any(|(a, _)| a == address) {
            addresses::add_to_loopback(file.as_fd(), *address)
                .map_err(|e| failed("add an address to the target pod's loopback", &e))?;
        }
    }
    Ok(())
}

/// Restores all containers at once through their shepherds, which hold them.
async fn restore(ledger: &Ledger, room: &Room, place: &Ground, order: &[usize]) -> Result<(), Failed> {
    let restores = order.iter().zip(0u32..).filter_map(|(index, n)| {
        let container = place.containers.get(*index)?;
        let request = Request::Restore {
            images: room.images(n).display().to_string(),
            work: room.work(n).display().to_string(),
        };
        Some(async move {
            (
                container,
                shepherds::ask(&container.id, &request, Step::TargetRestore.deadline()).await,
            )
        })
    });
    let all = futures::future::join_all(restores);
    let answers = tokio::select! {
        answers = all => answers,
        why = ledger.stop.wait() => return Err(why),
    };
    let mut reasons = Vec::new();
    for (container, answer) in answers {
        match answer {
            Ok(State::Held { .. }) => {}
            Ok(State::Failed { message }) => {
                reasons.push(format!("container {} could not be restored: {message}", container.name))
            }
            Ok(state) => reasons.push(format!("the shepherd of container {} is {state:?}", container.name)),
            Err(error) => reasons.push(crate::error::chain(&error)),
        }
    }
    if reasons.is_empty() {
        Ok(())
    } else {
        Err(Failed::new(Reason::RestoreFailed, reasons.join("; ")))
    }
}

/// What CRIU does not do: attributes of threads; connections whose peers cannot follow are ended.
fn adjust(namespace: &Path, cgroups: &[PathBuf], facts: &Facts) -> Result<(), Failed> {
    let failed = |e: holding::Error| Failed::because(Reason::RestoreFailed, &e);
    holding::set_attributes(cgroups, &facts.threads).map_err(failed)?;
    let sockets = holding::sockets(namespace).map_err(failed)?;
    let outside = inet_diag::outside(&sockets);
    if outside.is_empty() {
        return Ok(());
    }
    let network = |e: hostsys::sock_diag::Error| Failed::because(Reason::RestoreFailed, &e);
    let file = fs::File::open(namespace).map_err(|e| {
        Failed::new(
            Reason::RestoreFailed,
            format!("failed to open the target pod's network namespace: {e}"),
        )
    })?;
    for socket in outside {
        // Packets are held: the reset does not leave the pod, the program reads ECONNABORTED.
        inet_diag::destroy(file.as_fd(), socket).map_err(network)?;
    }
    Ok(())
}
