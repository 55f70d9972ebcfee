//! What a source sends of a frozen pod: memory pages while CRIU writes them, then all other images, cured.

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use crds::Reason;
use protocol::{limits, migrate::message::Place};

use super::super::ledger::Failed;
use crate::{
    checkpoint::{self, Room},
    cure, files,
    journal::FrozenThread,
    nameless,
    outbox::Outbox,
    pod_on_node::{self, PodOnNode},
};

/// Room for what grows between the estimate and the freeze.
const SPARE: u64 = 256 << 20;

/// Most bytes that may be sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Maxima {
    /// Bytes of memory that the pod has now.
    pub(super) memory: u64,
    pub(super) images: u64,
    pub(super) files: u64,
}

/// Looks the pod up and makes room for its images.
pub(super) fn reserve(pod_uid: &str, memory: u64, limit: u64, room: &Room) -> Result<(PodOnNode, Maxima), Failed> {
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
        memory,
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
pub(super) fn resident(pod: &PodOnNode) -> u64 {
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

pub(super) fn sending(error: &files::Error) -> Failed {
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

pub(super) fn is_pages(name: &str) -> bool {
    name.starts_with("pages-") && name.ends_with(".img")
}

/// Sends memory pages while CRIU writes them. CRIU only appends to these files; all others are sent when it has ended.
pub(super) fn send_pages(
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

/// Sends the names of open files that only CRIU gave them.
pub(super) fn send_nameless(room: &Room, pod: &PodOnNode, outbox: &Outbox) -> Result<(), Failed> {
    for (container, place) in pod.containers.iter().zip(0u32..) {
        nameless::send(&room.images(place), container, place, outbox)
            .map_err(|e| Failed::because(Reason::CheckpointFailed, &e))?;
    }
    Ok(())
}

/// Sends all other images, cured.
pub(super) fn send_metadata(
    room: &Room,
    containers: usize,
    threads: &[FrozenThread],
    outbox: &Outbox,
) -> Result<(), Failed> {
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
            if memory::images::is_pagemap(&name) {
                // A restore with pages from a store would leave out what the images have.
                let mut image = fs::read(&path).map_err(read)?;
                memory::images::make_eager(&mut image).map_err(|e| {
                    Failed::new(
                        Reason::CheckpointFailed,
                        format!("image {name} cannot be understood: {e}"),
                    )
                })?;
                outbox.content(whose, name.as_bytes(), &image).map_err(failed)?;
            } else if cure::is_cured(&name) {
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
pub(super) fn cured(
    name: &str,
    image: &[u8],
    container: u32,
    threads: &[FrozenThread],
) -> Result<Option<Vec<u8>>, cure::Error> {
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
