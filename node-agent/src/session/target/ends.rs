//! The two ends of a target: it runs, or nothing of it is left. Both work from the journal alone.

use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crds::{
    Reason,
    condition::{self},
    process_migration::{Filling, Party},
};
use hostsys::{addresses, cgroup::Cgroup};
use protocol::{
    hand_off::{COMMITTED_DIR, Request, State},
    limits,
    migrate::FromTarget,
};
use tokio::sync::mpsc;

use super::super::{
    Task,
    hand_over::{Decided, decided_in},
    ledger::{Failed, Ledger, blocking, millis},
    remove_journal, shepherds, write_marker,
};
use super::publish_failure;
use crate::{
    checkpoint::Room,
    decide::step::{Role, Step},
    holding,
    journal::{Record, Start, TargetContainer},
    pager::{Pager, Standing},
};

/// For a shepherd's answer to anything but a restore.
const ANSWER: Duration = Duration::from_secs(10);
/// Between two tries to write a marker.
const AGAIN: Duration = Duration::from_millis(500);
/// Between two questions how far the memory is.
const FILLING: Duration = Duration::from_millis(500);
/// For the end of killed processes.
const KILL: Duration = Duration::from_secs(20);

/// What the journal says of the shepherds.
pub(super) fn shepherds_of(ledger: &Ledger) -> (Vec<TargetContainer>, Option<PathBuf>, Vec<IpAddr>) {
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

/// Behind the commit: packets pass, all containers run. Idempotent.
pub(super) async fn runs(
    task: &mut Task,
    ledger: &Ledger,
    start: &Start,
    say: Option<mpsc::Sender<FromTarget>>,
    frozen_at: Option<Instant>,
) {
    let (containers, namespace, _) = shepherds_of(ledger);
    let cgroups: Vec<PathBuf> = containers.iter().map(|c| c.cgroup.clone()).collect();
    if frozen_at.is_none() {
        ledger.decided(true, &Failed::new(Reason::DecisionCommitted, "")).await;
    }
    let thaw = || {
        let (cgroups, namespace) = (cgroups.clone(), namespace.clone());
        async move {
            let done = blocking(move || {
                // At once: packets pass as soon as the kernel has taken the hold away, but it answers only when no processor
                // can see the hold any more, 10 ms later.
                std::thread::scope(|threads| {
                    let released = namespace.map(|at| threads.spawn(move || holding::release_packets(&at)));
                    let thawed = holding::thaw(&cgroups);
                    let released = released.map(std::thread::ScopedJoinHandle::join);
                    match released {
                        Some(Ok(Err(error))) => Err(error),
                        Some(Ok(Ok(()))) | None => thawed,
                        Some(Err(panic)) => std::panic::resume_unwind(panic),
                    }
                })
            });
            done.await?.map_err(|e| Failed::because(Reason::StepFailed, &e))
        }
    };
    ledger.until_done(Step::TargetThaw, thaw).await;
    let frozen_for = frozen_at.map(millis);
    task.freeze_ends();
    if frozen_at.is_some() {
        // Not awaited: the containers run already, the journal is for a restart only.
        ledger.decided(true, &Failed::new(Reason::DecisionCommitted, "")).await;
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
    // The shepherds write it too, but not where the machine lost its power in between: without it the wrapper would refuse
    // every later start of this pod, which is the only one now.
    let marker = Path::new(COMMITTED_DIR).join(&start.pod_uid);
    // Not a step of its own: it is idempotent, and a restart comes here again until the journal is settled.
    loop {
        let path = marker.clone();
        match blocking(move || write_marker(&path)).await {
            Ok(Ok(())) => break,
            Ok(Err(error)) => tracing::error!(%error, "failed to mark a pod as committed; trying again"),
            Err(error) => tracing::error!(%error, "failed to mark a pod as committed; trying again"),
        }
        tokio::time::sleep(AGAIN).await;
    }
    task.publish(|half| {
        half.target.step = None;
        if frozen_for.is_some() {
            half.target.frozen_milliseconds = frozen_for;
        }
    });
    fill(task, start, &cgroups).await;
    clean_up(ledger, start).await;
    finish(task, ledger).await;
}

/// Waits until the pod's memory is complete, and says how far it is. Without a pager it was from the beginning. Works from
/// what it finds: an agent that was restarted comes here too.
async fn fill(task: &Task, start: &Start, cgroups: &[PathBuf]) {
    let pager = Pager::of(&start.uid);
    let mut unknown_since: Option<Instant> = None;
    loop {
        let asked = pager.clone();
        let standing = match blocking(move || asked.standing()).await {
            Ok(Ok(standing)) => standing,
            Ok(Err(error)) => {
                // A guardian is replaced within milliseconds. One that never answers is told about, and waited for.
                if unknown_since.get_or_insert_with(Instant::now).elapsed() > ANSWER {
                    tracing::warn!(
                        error = crate::error::chain(&error),
                        "the pager does not say how far it is"
                    );
                    unknown_since = None;
                }
                tokio::time::sleep(FILLING).await;
                continue;
            }
            Err(error) => {
                tracing::error!(%error, "failed to ask the pager");
                tokio::time::sleep(FILLING).await;
                continue;
            }
        };
        match standing {
            Standing::Complete(None) => return,
            Standing::Complete(Some(status)) => {
                tracing::info!(?status, "the pod's memory is complete");
                let milliseconds = signed(status.fill_milliseconds);
                task.publish(|half| {
                    half.target.filling = Some(Filling {
                        milliseconds: Some(milliseconds),
                        ..filling(&status)
                    });
                });
                return;
            }
            Standing::Filling(status) => {
                task.publish(|half| half.target.filling = Some(filling(&status)));
                // It begins by itself a little later; an agent that was restarted may be sooner.
                let pager = pager.clone();
                if let Ok(Err(error)) = blocking(move || pager.fill()).await {
                    tracing::debug!(error = crate::error::chain(&error), "the pager was not reached");
                }
                tokio::time::sleep(FILLING).await;
            }
            Standing::Lost(why) => return lost(task, cgroups, why).await,
        }
    }
}

/// What cannot have all of its memory must not run.
async fn lost(task: &Task, cgroups: &[PathBuf], why: String) {
    let why = Failed::new(Reason::MemoryLost, why);
    tracing::error!(error = %why, "killing a pod whose memory is not complete");
    publish_failure(task, &why);
    loop {
        let cgroups = cgroups.to_vec();
        let killed = blocking(move || cgroups.iter().try_for_each(|path| Cgroup::at(path).kill(KILL))).await;
        match killed {
            Ok(Ok(())) => return,
            Ok(Err(error)) => tracing::error!(error = crate::error::chain(&error), "failed to kill it; trying again"),
            Err(error) => tracing::error!(%error, "failed to kill it; trying again"),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn filling(status: &protocol::pager::Status) -> Filling {
    Filling {
        total_bytes: signed(status.total_bytes),
        remaining_bytes: signed(status.remaining_bytes),
        page_faults: signed(status.faults),
        longest_fault_microseconds: signed(status.longest_fault_microseconds),
        restarts: signed(status.restarts),
        milliseconds: None,
    }
}

pub(super) async fn finish(task: &Task, ledger: &Ledger) {
    task.stored().await;
    if let Err(error) = ledger.record(Record::Settled).await {
        tracing::warn!(%error, "failed to note that the session is settled");
    }
    remove_journal(&task.whose.uid, Role::Target).await;
    tracing::info!(uid = task.whose.uid, "the target's part has ended");
}

pub(super) async fn clean_up(ledger: &Ledger, start: &Start) {
    let (room, pod_uid) = (Room::of(&start.uid), start.pod_uid.clone());
    let pager = Pager::of(&start.uid);
    let work = || {
        let (room, pod_uid, pager) = (room.clone(), pod_uid.clone(), pager.clone());
        async move {
            blocking(move || {
                pager.remove().map_err(|e| Failed::because(Reason::StepFailed, &e))?;
                room.remove().map_err(|e| Failed::because(Reason::StepFailed, &e))?;
                shepherds::remove_hand_offs(&pod_uid).map_err(|e| Failed::because(Reason::StepFailed, &e))
            })
            .await?
        }
    };
    ledger.until_done(Step::TargetCleanUp, work).await;
}

/// Before the commit: everything of the target is destroyed, journaled, and only then said.
pub(super) async fn aborted(
    task: &mut Task,
    ledger: &Ledger,
    start: &Start,
    why: Failed,
    say: Option<mpsc::Sender<FromTarget>>,
) {
    tracing::info!(reason = why.reason, message = why.message, "giving up the target");
    task.freeze_ends();
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
    ledger.until_done(Step::TargetDestroy, destroy).await;
    containers.clear();
    // From here on this attempt can never be committed: only this agent could, and it knows.
    ledger.decided(false, &why).await;
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
    task.wait_until_seen().await;
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

/// Ends everything of the target and verifies it.
pub(super) async fn destroy(
    pod_uid: String,
    migration_uid: String,
    known: Vec<TargetContainer>,
    namespace: Option<PathBuf>,
    added: Vec<IpAddr>,
) -> Result<(), Failed> {
    let failed = |e: shepherds::Error| Failed::because(Reason::StepFailed, &e);
    let (uid, migration) = (pod_uid, migration_uid.clone());
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
        // It has killed them too, if it was there: nothing lives whose missing pages could become zeros.
        Pager::of(&migration_uid)
            .kill()
            .map_err(|e| Failed::because(Reason::StepFailed, &e))?;
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
