//! Dumps that were started before the freeze and wait for it.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crds::Reason;
use protocol::hand_off::PARK_GO;
use tokio::{
    io::AsyncWriteExt as _,
    net::{UnixListener, UnixStream},
    task::JoinHandle,
};

use super::super::ledger::{Failed, blocking};
use crate::{
    checkpoint::{self, Dump, Room},
    journal::FrozenContainer,
};

/// runc and CRIU are up within milliseconds; the first one after a boot looks at the kernel for a second.
const PARKED: Duration = Duration::from_secs(15);

/// A dump of one container.
pub(super) struct ParkedDump {
    go: UnixStream,
    /// Its end.
    pub(super) end: JoinHandle<Result<(), Failed>>,
    /// Set when it has ended.
    pub(super) dumped: Arc<AtomicBool>,
    /// Where its images are.
    pub(super) images: PathBuf,
}

/// Starts a dump of every container and waits until all are parked. Dropped, they end without having touched the pod.
pub(super) async fn park(
    containers: &[FrozenContainer],
    room: &Room,
    close_connections: bool,
    skip_tracked: bool,
) -> Result<Vec<ParkedDump>, Failed> {
    let all = containers.iter().zip(0u32..).map(|(frozen, place)| {
        let dump = Dump {
            id: frozen.id.clone(),
            name: frozen.name.clone(),
            images: room.images(place),
            work: room.work(place),
            cgroup: frozen.dump_cgroup.clone(),
            close_connections,
            skip_tracked,
        };
        one(dump)
    });
    futures::future::try_join_all(all).await
}

async fn one(dump: Dump) -> Result<ParkedDump, Failed> {
    let failed = |e: &checkpoint::Error| Failed::because(Reason::CheckpointFailed, e);
    let settings = checkpoint::runtime_config();
    let (images, name) = (dump.images.clone(), dump.name.clone());
    let (at, with) = (dump.clone(), settings.clone());
    let gate = blocking(move || at.gate(&with)).await?.map_err(|e| failed(&e))?;
    let listen = |gate: std::os::unix::net::UnixListener| {
        gate.set_nonblocking(true)?;
        UnixListener::from_std(gate)
    };
    let gate = listen(gate).map_err(|e| Failed::because(Reason::StepFailed, &e))?;
    let dumped = Arc::new(AtomicBool::new(false));
    let done = dumped.clone();
    let mut end = tokio::task::spawn_blocking(move || {
        let result = dump.run(&settings);
        done.store(true, Ordering::Release);
        result.map_err(|e| Failed::new(Reason::CheckpointFailed, e.to_string()))
    });
    tokio::select! {
        accepted = gate.accept() => {
            let (go, _) = accepted.map_err(|e| Failed::because(Reason::StepFailed, &e))?;
            Ok(ParkedDump { go, end, dumped, images })
        }
        ended = &mut end => {
            let why = match ended {
                Ok(Err(why)) => why,
                Ok(Ok(())) => Failed::new(Reason::CheckpointFailed, "CRIU did not wait for the freeze"),
                Err(e) => Failed::because(Reason::StepFailed, &e),
            };
            Err(why)
        }
        () = tokio::time::sleep(PARKED) => Err(Failed::new(
            Reason::CheckpointFailed,
            format!("CRIU was not ready to dump container {name} within {PARKED:?}"),
        )),
    }
}

/// What runc has noted of each container's standard streams: it does so before it starts CRIU.
pub(super) async fn descriptors(parked: &[ParkedDump]) -> Result<Vec<String>, Failed> {
    let paths: Vec<PathBuf> = parked.iter().map(|p| p.images.join("descriptors.json")).collect();
    let read = move || {
        paths
            .iter()
            .map(std::fs::read_to_string)
            .collect::<std::io::Result<Vec<_>>>()
    };
    blocking(read).await?.map_err(|e| {
        Failed::new(
            Reason::CheckpointFailed,
            format!("failed to read the descriptors of runc: {e}"),
        )
    })
}

impl ParkedDump {
    /// Lets it begin.
    pub(super) async fn go(&mut self) -> Result<(), Failed> {
        // One byte into an empty socket: it never waits.
        self.go
            .write_all(&[PARK_GO])
            .await
            .map_err(|e| Failed::new(Reason::CheckpointFailed, format!("CRIU does not wait any more: {e}")))
    }
}
