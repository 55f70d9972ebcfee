//! The target's half: from the hand-offs to the running copy, or to nothing left.
//!
//! ```text
//! Waiting -> HandedOff -> Ready -> Reserved -> Receiving -> Staged -> Held -> (commit) -> Running
//!               \___________\__________\___________\___________\_______\____ Destroy: shepherds, cgroups, images
//! ```
//! Everything that can fail is done before the commit, with every container restored and held by the freezer: no user
//! instruction has run. What the source sends is input like any other: bounded, written beneath its folders only.

mod attempt;
mod ends;
mod pages;
mod parked;
mod receive;
mod restore;

use std::time::Duration;

use crds::{
    ProcessMigration, Reason,
    condition::{self},
    process_migration::{Failure, Party},
};
use tokio::sync::mpsc;

use self::{
    attempt::Attempt,
    ends::{aborted, runs},
};
use super::{
    Busy, Task,
    hand_over::Decided,
    ledger::{Failed, Ledger},
    open_ledger,
};
use crate::{
    decide::{assignment, recover::Plan, step::Role},
    journal,
    journal::{Record, Start},
};

/// The session's task.
pub(super) async fn run(mut task: Task, recovered: Option<(Ledger, Start, Plan)>, busy: Busy) {
    if let Some((ledger, start, plan)) = recovered {
        let _working = busy.begin();
        return recover(&mut task, &ledger, &start, plan).await;
    }
    if let Some(migration) = task.until_begins(assignment::target_begins).await {
        let _working = busy.begin();
        begin(&mut task, &migration).await;
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
        Decided::Committed => runs(task, &ledger, &start, attempt.say.take(), attempt.frozen_at).await,
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
