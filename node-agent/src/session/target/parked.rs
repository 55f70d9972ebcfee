//! Restores that were started before the freeze and wait for the images.
//!
//! Where an image is a FIFO, CRIU waits in the read of it. The inventory is the first image that a restore reads, before it
//! has made anything: so runc and CRIU are up, and go on as soon as its bytes are written. An agent that dies closes the FIFO,
//! and CRIU ends with an inventory that is empty.

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use crds::Reason;
use nix::sys::stat::Mode;
use protocol::hand_off::{Request, State};
use tokio::task::JoinHandle;

use super::super::{
    ledger::{Failed, Ledger, blocking},
    shepherds,
};
use super::attempt::Ground;
use crate::{checkpoint::Room, decide::step::Step};

/// Name of the image.
const INVENTORY: &str = "inventory.img";
/// What runc reads before it starts CRIU: the names of the container's standard streams.
const DESCRIPTORS: &str = "descriptors.json";
/// runc and CRIU are up within milliseconds; the first one after a boot looks at the kernel for a second.
const PARKED: Duration = Duration::from_secs(15);
/// Between two looks whether CRIU waits.
const LOOK: Duration = Duration::from_millis(2);

/// A restore of one container.
#[derive(Debug)]
pub(super) struct ParkedRestore {
    images: PathBuf,
    inventory: File,
    /// What the shepherd says in the end.
    answer: JoinHandle<Result<State, shepherds::Error>>,
}

/// Starts a restore of every container in the order of the manifest and waits until all are parked. `lazy`: a pager stands.
pub(super) async fn park(
    ledger: &Ledger,
    room: &Room,
    place: &Ground,
    order: &[usize],
    descriptors: &[String],
    lazy: bool,
) -> Result<Vec<ParkedRestore>, Failed> {
    let all = order
        .iter()
        .zip(0u32..)
        .zip(descriptors)
        .filter_map(|((index, n), text)| {
            let container = place.containers.get(*index)?;
            Some(one(
                room.clone(),
                n,
                container.id.clone(),
                container.name.clone(),
                text.clone(),
                lazy,
            ))
        });
    tokio::select! {
        parked = futures::future::try_join_all(all) => parked,
        why = ledger.stop.wait() => Err(why),
    }
}

async fn one(
    room: Room,
    n: u32,
    id: String,
    name: String,
    descriptors: String,
    lazy: bool,
) -> Result<ParkedRestore, Failed> {
    let images = room.images(n);
    let (at, fifo) = (images.clone(), images.join(INVENTORY));
    let prepared = blocking(move || {
        room.make_folders(n)
            .map_err(|e| Failed::because(Reason::StepFailed, &e))?;
        let failed = |e: std::io::Error| {
            Failed::new(
                Reason::StepFailed,
                format!("failed to prepare the restore in {}: {e}", at.display()),
            )
        };
        std::fs::write(at.join(DESCRIPTORS), descriptors).map_err(failed)?;
        nix::unistd::mkfifo(&at.join(INVENTORY), Mode::S_IRUSR | Mode::S_IWUSR).map_err(|e| failed(e.into()))?;
        Ok(Request::Restore {
            lazy,
            images: at.display().to_string(),
            work: room.work(n).display().to_string(),
        })
    });
    let request = prepared.await??;
    // It waits for all that is received first.
    let limit = Step::TargetReceive.deadline() + Step::TargetRestore.deadline();
    let mut answer = tokio::spawn(async move { shepherds::ask(&id, &request, limit).await });
    let begun = Instant::now();
    loop {
        // Refused until somebody reads. Opened by name: nothing was received yet that could have taken its place.
        match OpenOptions::new()
            .write(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open(&fifo)
        {
            Ok(inventory) => {
                return Ok(ParkedRestore {
                    images,
                    inventory,
                    answer,
                });
            }
            Err(e) if e.raw_os_error() == Some(nix::libc::ENXIO) => {}
            Err(e) => {
                return Err(Failed::new(
                    Reason::StepFailed,
                    format!("failed to open {}: {e}", fifo.display()),
                ));
            }
        }
        if begun.elapsed() > PARKED {
            return Err(Failed::new(
                Reason::RestoreFailed,
                format!("CRIU was not ready to restore container {name} within {PARKED:?}"),
            ));
        }
        tokio::select! {
            ended = &mut answer => {
                let why = match ended {
                    Ok(Ok(State::Failed { message })) => message,
                    Ok(Ok(state)) => format!("its shepherd is {state:?}"),
                    Ok(Err(error)) => crate::error::chain(&error),
                    Err(error) => error.to_string(),
                };
                return Err(Failed::new(Reason::RestoreFailed, format!("container {name} could not be restored: {why}")));
            }
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

impl ParkedRestore {
    /// Lets it begin: everything else has arrived. The inventory that was received has taken the place of the FIFO.
    pub(super) fn go(mut self) -> Result<JoinHandle<Result<State, shepherds::Error>>, Failed> {
        let path = self.images.join(INVENTORY);
        // A few hundred bytes, which a FIFO takes at once.
        let write = std::fs::read(&path).and_then(|bytes| self.inventory.write_all(&bytes));
        let answer = self.answer;
        write.map_err(|e| {
            Failed::new(
                Reason::RestoreFailed,
                format!("failed to hand over {}: {e}", path.display()),
            )
        })?;
        Ok(answer)
    }
}
