//! Back to a running source, from the journal alone: after a failure, an abort, a restart of the agent. And what is removed
//! from the host in the end, whichever way it went.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crds::Reason;
use protocol::hand_off::MOVED_AWAY_DIR;

use super::super::{
    Task,
    ledger::{Failed, Ledger, blocking, millis},
};
use crate::{
    checkpoint::{self, Room},
    decide::step::Step,
    holding,
    journal::{FrozenContainer, FrozenThread, Record, Start},
    pod_on_node::{self},
};

/// Between two tries of a step that must happen.
const AGAIN: Duration = Duration::from_millis(500);

/// What the journal says was frozen.
pub(super) fn frozen(ledger: &Ledger) -> (Vec<FrozenContainer>, Vec<FrozenThread>) {
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
pub(super) async fn go_back(task: &Task, ledger: &Ledger, start: &Start, frozen_at: Option<Instant>) -> Option<u32> {
    let (containers, threads) = frozen(ledger);
    let cgroups: Vec<PathBuf> = containers.iter().map(|c| c.cgroup.clone()).collect();
    let dumps: Vec<PathBuf> = containers.iter().map(|c| c.dump_cgroup.clone()).collect();
    // From here on runc and CRIU may be at work, or wait for the freeze.
    if ledger.has_begun(Step::SourceConnect) {
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
        ledger.until_done(Step::SourceRepair, repair).await;
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
        ledger.until_done(Step::SourceReleasePackets, release).await;
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
        ledger.until_done(Step::SourceThaw, thaw).await;
        frozen_for = frozen_at.map(millis);
    }
    clean_up(ledger, start).await;
    frozen_for
}

pub(super) fn marker(start: &Start) -> PathBuf {
    Path::new(MOVED_AWAY_DIR).join(&start.pod_uid)
}

pub(super) fn remove_marker(path: &Path) -> Result<(), Failed> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Failed::new(
            Reason::StepFailed,
            format!("failed to remove {}: {e}", path.display()),
        )),
        _ => Ok(()),
    }
}

/// Removes everything that the session made on the host.
pub(super) async fn clean_up(ledger: &Ledger, start: &Start) {
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
    ledger.until_done(Step::SourceCleanUp, work).await;
}
