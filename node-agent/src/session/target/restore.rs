//! Network, restore and what CRIU does not do, before anything of the target runs.

use std::{
    collections::HashSet,
    fs,
    net::IpAddr,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use crds::Reason;
use hostsys::{addresses, inet_diag};
use protocol::{
    hand_off::{Request, State},
    migrate::message::Facts,
};

use super::super::{
    ledger::{Failed, Ledger, blocking},
    shepherds,
};
use super::{attempt::Ground, parked::ParkedRestore};
use crate::{
    checkpoint::Room,
    decide::step::Step,
    holding,
    install::WRAPPER,
    pager::{self, Pager, Standing},
};

fn failed(what: &str, e: &(dyn std::error::Error + 'static)) -> Failed {
    Failed::new(
        Reason::RestoreFailed,
        format!("failed to {what}: {}", crate::error::chain(e)),
    )
}

/// Drops the pod's packets until it runs.
pub(super) fn hold_packets(namespace: &Path) -> Result<(), Failed> {
    holding::hold_packets(namespace).map_err(|e| failed("hold the target pod's packets", &e))
}

/// Gives the pod's sockets the addresses that they are bound to.
fn add_addresses(namespace: &Path, wanted: &[IpAddr]) -> Result<(), Failed> {
    if wanted.is_empty() {
        return Ok(());
    }
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

/// The containers as the pager needs to know them.
fn known_to_pager(room: &Room, place: &Ground, order: &[usize]) -> Vec<(u32, protocol::pager::Container)> {
    let all = order.iter().zip(0u32..);
    all.filter_map(|(index, n)| {
        let container = protocol::pager::Container {
            work: room.work(n).display().to_string(),
            store: room.store(n).display().to_string(),
            cgroup: place.containers.get(*index)?.cgroup.display().to_string(),
        };
        Some((n, container))
    })
    .collect()
}

/// Starts the pager before there are stores: for all containers, which are then all restored lazily.
pub(super) async fn start_pager_ahead(
    pager: &Pager,
    room: &Room,
    place: &Ground,
    order: &[usize],
) -> Result<(), Failed> {
    let (pager, room) = (pager.clone(), room.clone());
    let known = known_to_pager(&room, place, order);
    blocking(move || {
        for (n, _) in &known {
            // It listens there.
            room.make_folders(*n)
                .map_err(|e| failed("make the folders of a restore", &e))?;
        }
        start_pager(&pager, known.into_iter().map(|(_, container)| container).collect()).map(drop)
    })
    .await?
}

/// Starts the pager, unless that was done ahead or there is nothing to fill. Returns the work folders of the containers that
/// it waits for: all of these, and no others, are restored lazily.
fn start_pager(pager: &Pager, containers: Vec<protocol::pager::Container>) -> Result<HashSet<String>, Failed> {
    if !pager.exists() && !containers.is_empty() {
        pager
            .start(Path::new(WRAPPER), containers)
            .map_err(|e| failed("start the pager", &e))?;
    }
    let plan = pager.plan().map_err(|e| failed("start the pager", &e))?;
    Ok(plan.containers.into_iter().map(|container| container.work).collect())
}

/// Restores all containers at once through their shepherds, which hold them.
pub(super) async fn restore(
    ledger: &Ledger,
    room: &Room,
    place: &Ground,
    order: &[usize],
    wanted: Vec<IpAddr>,
    pager: &Pager,
    parked: Vec<ParkedRestore>,
) -> Result<(), Failed> {
    let namespace = place.network_namespace.clone();
    blocking(move || add_addresses(&namespace, &wanted)).await??;
    let known = known_to_pager(room, place, order);
    let filled = known.into_iter().filter(|(n, _)| pager::has_store(&room.store(*n)));
    let (known, filled) = (pager.clone(), filled.map(|(_, container)| container).collect());
    let lazy = blocking(move || start_pager(&known, filled)).await??;
    let mut parked = parked.into_iter();
    let restores = order.iter().zip(0u32..).filter_map(|(index, n)| {
        let container = place.containers.get(*index)?;
        let parked = parked.next().map(ParkedRestore::go);
        let work = room.work(n).display().to_string();
        let request = Request::Restore {
            images: room.images(n).display().to_string(),
            lazy: lazy.contains(&work),
            work,
        };
        Some(async move {
            let answer = match parked {
                Some(Ok(answer)) => answer.await.map_err(|e| e.to_string()),
                Some(Err(why)) => Err(why.message),
                None => Ok(shepherds::ask(&container.id, &request, Step::TargetRestore.deadline()).await),
            };
            (container, answer)
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
            Ok(Ok(State::Held { .. })) => {}
            Ok(Ok(State::Failed { message })) => {
                reasons.push(format!("container {} could not be restored: {message}", container.name))
            }
            Ok(Ok(state)) => reasons.push(format!("the shepherd of container {} is {state:?}", container.name)),
            Ok(Err(error)) => reasons.push(crate::error::chain(&error)),
            Err(why) => reasons.push(why),
        }
    }
    if reasons.is_empty() {
        if !lazy.is_empty() {
            let pager = pager.clone();
            // Not awaited: the bulk is nobody's wait, and the commit comes first. No restorer is disturbed any more.
            tokio::task::spawn_blocking(move || {
                if let Err(error) = pager.fill() {
                    tracing::info!(
                        error = crate::error::chain(&error),
                        "the pager fills when it thinks fit"
                    );
                }
            });
        }
        Ok(())
    } else {
        Err(Failed::new(Reason::RestoreFailed, reasons.join("; ")))
    }
}

/// What CRIU does not do: attributes of threads; connections whose peers cannot follow are ended.
pub(super) fn adjust(namespace: &Path, cgroups: &[PathBuf], facts: &Facts, pager: &Pager) -> Result<(), Failed> {
    // What was killed because its memory cannot be made complete must not be committed. One that does not answer for a moment
    // is being replaced.
    if let Ok(Standing::Lost(why)) = pager.standing() {
        return Err(Failed::new(Reason::RestoreFailed, why));
    }
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
