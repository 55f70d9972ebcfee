//! The source's half: from the dial to the end of the released source, or back to the running one.
//!
//! ```text
//! Waiting -> Reserved -> Connected -> Frozen -> Dumped -> Complete -> (decision) -> MovedAway -> Released
//!                \___________\___________\__________\__________\____ GoBack: repair, packets, thaw, clean up
//! ```
//! Until `Complete` is sent the target cannot have everything, so it can never commit: a failure goes back at once, API
//! server or not. From then on only the decision says which way to go, read from the API or told by the target's agent.
//! The way back works from the journal alone: it is the same after a failure, an abort and a restart of the agent.

mod attempt;
mod checkpointing;
mod parked;
mod precopy;
mod way_back;

use std::{
    collections::BTreeSet,
    path::PathBuf,
    time::{Duration, Instant},
};

use crds::{
    ProcessMigration, Reason,
    condition::Status,
    process_migration::{Failure, Party, StrategyType, cond},
};
use hostsys::cgroup::Cgroup;
use protocol::{limits, migrate::FromSource};

use self::{
    attempt::Attempt,
    way_back::{clean_up, frozen, go_back, marker},
};
use super::{
    Busy, Task,
    hand_over::{Decided, decided_in},
    ledger::{Failed, Ledger, blocking, millis},
    open_ledger, remove_journal, write_marker,
};
use crate::{
    checkpoint::{self, Room},
    decide::{
        assignment,
        recover::Plan,
        step::{Role, Step},
    },
    journal::{self, Record, Start},
    pod_on_node,
};

/// The longest freeze of a pod whose migration names none: what a probe with the defaults of Kubernetes lets pass.
const LONGEST_FREEZE: Duration = Duration::from_secs(10);

/// The session's task.
pub(super) async fn run(mut task: Task, recovered: Option<(Ledger, Start, Plan)>, busy: Busy) {
    if let Some((ledger, start, plan)) = recovered {
        let _working = busy.begin();
        return recover(&mut task, &ledger, &start, plan).await;
    }
    if let Some(migration) = task.until_begins(assignment::source_begins).await {
        let _working = busy.begin();
        begin(&mut task, &migration).await;
    }
}

/// What the object says that an attempt needs.
struct Brief {
    start: Start,
    target_node: String,
    target_pod_uid: String,
    memory_bytes: u64,
    progress_timeout: Duration,
    /// The memory is copied while the pod runs, for a freeze that is at most so long.
    precopy: Option<Duration>,
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
        precopy: (assignment::strategy(migration) == StrategyType::PreCopy).then(|| {
            let most = migration.spec.max_freeze_milliseconds.map(u64::from);
            most.map_or(LONGEST_FREEZE, Duration::from_millis)
        }),
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
        precopy: None,
        parked: Vec::new(),
        warm: None,
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
            // What still waits for the freeze ends, without having touched the pod.
            attempt.parked.clear();
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
            task.wait_until_seen().await;
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
    ledger.decided(committed, &why).await;
    tracing::info!(committed, reason = why.reason, message = why.message, "decided");
    match decided {
        Decided::Committed => {
            task.freeze_ends();
            release(task, ledger, start, frozen_at).await;
        }
        Decided::Aborted(why) => {
            let frozen = match gone_back {
                Some(frozen) => frozen,
                None => go_back(task, ledger, start, frozen_at).await,
            };
            task.freeze_ends();
            task.wait_until_seen().await;
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
    ledger.until_done(Step::SourceMoveAway, move_away).await;
    task.wait_until_seen().await;
    task.publish(|half| {
        half.source.step = Some("waiting for the source to end".into());
        if frozen_for.is_some() {
            half.source.frozen_milliseconds = frozen_for;
        }
    });
    let mut pause = Duration::from_millis(100);
    loop {
        let (watched, pod_uid) = (cgroups.clone(), start.pod_uid.clone());
        let ended = blocking(move || keep_stopped(&pod_uid, &watched));
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

/// What a cgroup of a pod that has moved away needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Upkeep {
    Nothing,
    Stop,
    LetGo,
}

/// Decides by whether processes are in it, and whether it is marked as frozen.
fn upkeep(populated: bool, frozen: bool) -> Upkeep {
    match (populated, frozen) {
        // A kubelet that comes up after a reboot, before the pod is deleted, starts its containers anew, where the wrapper is
        // not their runtime; and runc thaws what it has killed, a moment before it is dead. Neither may run beside the moved ones.
        (true, false) => Upkeep::Stop,
        // runc says of a container whose cgroup is marked that it is paused, and never deletes it: its pod's network would stay.
        (false, true) => Upkeep::LetGo,
        (true, true) | (false, false) => Upkeep::Nothing,
    }
}

/// Keeps the containers of a pod that has moved away as they are. True: those of `cgroups` have ended, and can be deleted.
fn keep_stopped(pod_uid: &str, cgroups: &[PathBuf]) -> bool {
    // Containers that were started anew have others.
    let now = pod_on_node::find(pod_uid).map(|pod| pod.containers).unwrap_or_default();
    let now = now.into_iter().map(|container| container.cgroup);
    let all: BTreeSet<PathBuf> = now.chain(cgroups.iter().cloned()).collect();
    for cgroup in all.iter().map(Cgroup::at) {
        let (Ok(populated), Ok(frozen)) = (cgroup.is_populated(), cgroup.is_freeze_requested()) else {
            continue;
        };
        let (done, what) = match upkeep(populated, frozen) {
            Upkeep::Nothing => continue,
            Upkeep::Stop => (cgroup.begin_freeze(), "stop a container of a pod that has moved away"),
            Upkeep::LetGo => (cgroup.thaw(), "let the empty cgroup of a container go"),
        };
        match done {
            Ok(()) => tracing::info!(cgroup = %cgroup.path().display(), what, "done"),
            // It may have gone in between; where not, the next look finds it again.
            Err(error) => tracing::warn!(error = crate::error::chain(&error), what, "failed"),
        }
    }
    cgroups.iter().map(Cgroup::at).all(|cgroup| {
        !cgroup.exists() || !cgroup.is_populated().unwrap_or(true) && !cgroup.is_freeze_requested().unwrap_or(true)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lives_is_stopped_and_what_is_dead_is_not_marked_as_paused() {
        for (populated, frozen, expected) in [
            (true, true, Upkeep::Nothing),
            (true, false, Upkeep::Stop),
            (false, true, Upkeep::LetGo),
            (false, false, Upkeep::Nothing),
        ] {
            assert_eq!(
                upkeep(populated, frozen),
                expected,
                "populated {populated}, frozen {frozen}"
            );
        }
    }
}
