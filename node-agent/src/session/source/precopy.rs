//! A pod's memory on its way while the pod runs, and what is left of it when it is frozen.
//!
//! ```text
//! connect ── run (rounds, pod runs) ── [freeze] ── settle ──┬── dump with SKIP_TRACKED (CRIU)
//!                                                           └── last_round, finish
//! ```
//! CRIU may look at the pod only behind [`PreCopy::settle`]. When this is dropped, at whatever point, nothing is tracked any
//! more: a dump then has everything, and a pod that goes on runs as ever.

use std::{
    ops::ControlFlow,
    sync::Arc,
    time::{Duration, Instant},
};

use crds::{Reason, process_migration::Progress as Shown};
use memory::{
    converge::Goal,
    precopy::{self, End, Progress},
    tracker::{Member, Tracker},
    wire::Sender,
};
use protocol::migrate::message::{Offer, Stream};

use super::super::{
    Task,
    ledger::{Failed, Stop, blocking},
};
use super::attempt::agent_of;
use crate::{
    page_link::{self, Breaker, Outgoing},
    pod_on_node::PodOnNode,
};

/// Between two words on how far it is.
const SHOW: Duration = Duration::from_secs(1);

/// What is tracked, and where it is sent to.
pub(super) struct PreCopy {
    tracker: Tracker,
    links: Vec<Sender<Outgoing>>,
    breakers: Vec<Breaker>,
    pod: Arc<PodOnNode>,
}

impl PreCopy {
    /// Makes `count` connections for pages to a target that is receiving. `session` is the offer of the session.
    pub(super) async fn connect(
        task: &Task,
        pod: Arc<PodOnNode>,
        node: &str,
        session: &Offer,
        count: u32,
        bytes_per_second: Option<u64>,
    ) -> Result<Self, Failed> {
        let (endpoint, tls) = agent_of(task, node).await?;
        let (mut links, mut breakers) = (Vec::new(), Vec::new());
        for index in 0..count {
            let offer = Offer {
                stream: Stream::Pages { index, count },
                ..session.clone()
            };
            let (tls, endpoint, node) = (tls.clone(), endpoint.clone(), node.to_owned());
            let (link, breaker) = blocking(move || page_link::dial(&tls, &endpoint, &node, offer))
                .await?
                .map_err(|e| Failed::because(Reason::TransferFailed, &e))?;
            links.push(Sender::new(link, bytes_per_second.map(|b| b / u64::from(count))));
            breakers.push(breaker);
        }
        Ok(Self {
            tracker: Tracker::new(),
            links,
            breakers,
            pod,
        })
    }

    /// Copies in rounds until the pod should be frozen. Gives itself back: what is tracked stays so.
    pub(super) async fn run(mut self, task: &Task, stop: &Stop, goal: Goal) -> Result<(Self, Progress), Failed> {
        let (say, mut heard) = tokio::sync::watch::channel(Progress::default());
        let stopped = stop.clone();
        let breakers = self.breakers.clone();
        let mut work = tokio::task::spawn_blocking(move || {
            let pod = self.pod.clone();
            let each = |progress: &Progress| {
                say.send_replace(*progress);
                if stopped.reason().is_some() {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            };
            let end = precopy::run(&mut self.tracker, || members(&pod), &mut self.links, &goal, each);
            (self, end)
        });
        let mut shown: Option<Instant> = None;
        let joined = loop {
            tokio::select! {
                joined = &mut work => break joined,
                changed = heard.changed(), if !work.is_finished() => {
                    if changed.is_ok() && shown.is_none_or(|s| s.elapsed() >= SHOW) {
                        shown = Some(Instant::now());
                        let progress = *heard.borrow_and_update();
                        show(task, &progress);
                    } else if changed.is_err() {
                        break (&mut work).await;
                    }
                }
                why = stop.wait() => {
                    // A round may be waiting for a target that takes nothing more.
                    breakers.iter().for_each(Breaker::end);
                    let _ = (&mut work).await;
                    return Err(why);
                }
            }
        };
        let (me, end) = joined.map_err(|e| Failed::because(Reason::StepFailed, &e))?;
        match end.map_err(|e| Failed::because(Reason::TransferFailed, &e))? {
            End::Freeze(progress) => {
                show(task, &progress);
                Ok((me, progress))
            }
            End::Hopeless(progress) => Err(Failed::new(
                Reason::FreezeTooLong,
                format!(
                    "after {} rounds the freeze would still take {} ms where {} ms are allowed: the pod writes {} MiB/s, {} MiB/s can be copied",
                    progress.rounds,
                    progress.prediction.freeze.as_millis(),
                    goal.freeze.as_millis(),
                    progress.prediction.dirty_rate >> 20,
                    progress.prediction.copy_rate >> 20,
                ),
            )),
            End::Stopped => Err(stop.wait().await),
        }
    }

    /// The pod is frozen: what is tracked now is ours to copy, all else CRIU's. CRIU may look when this has returned. Where the
    /// two cannot be told apart nothing is tracked any more: CRIU takes all, the target throws away what it has. Blocking.
    pub(super) fn settle(&mut self) {
        if let Err(error) = self.tracker.settle(&members(&self.pod)) {
            tracing::warn!(error = crate::error::chain(&error), "nothing is left to the tracker");
            self.tracker = Tracker::new();
        }
    }

    /// For ending the connections while a round is under way.
    pub(super) fn breakers(&self) -> Vec<Breaker> {
        self.breakers.clone()
    }

    /// Why processes are left to CRIU.
    pub(super) fn left_to_criu(&self) -> Vec<String> {
        let all = self.tracker.untracked().iter();
        all.map(|(pid, why)| format!("process {pid}: {why}")).collect()
    }

    /// The rest of the memory of the frozen pod. Nothing is tracked any more when this is dropped: keep what it gives until the
    /// dump has ended. Blocking; may run beside the dump.
    pub(super) fn last_round(mut self) -> Result<Tracker, Failed> {
        let failed = |e: memory::tracker::Error| Failed::because(Reason::TransferFailed, &e);
        for link in &mut self.links {
            link.without_limit();
        }
        let round = self.tracker.last_round(&mut self.links).map_err(failed)?;
        let finals = self.tracker.finals();
        for (link, index) in self.links.drain(..).zip(0u32..) {
            link.finish(if index == 0 { &finals } else { &[] })
                .map_err(|e| Failed::because(Reason::TransferFailed, &e))?;
        }
        tracing::info!(?round, "the last round is on its way");
        Ok(self.tracker)
    }
}

/// The pod's processes, by the place of their container.
fn members(pod: &PodOnNode) -> Vec<Member> {
    let of = |(container, pids): (u32, Vec<i32>)| pids.into_iter().map(move |pid| Member { pid, container });
    (0u32..)
        .zip(pod.containers.iter().map(|c| c.pids().unwrap_or_default()))
        .flat_map(of)
        .collect()
}

fn show(task: &Task, progress: &Progress) {
    let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let prediction = progress.prediction;
    task.publish(|half| {
        half.progress = Some(Shown {
            round: Some(progress.rounds),
            transferred_bytes: Some(signed(progress.sent)),
            remaining_bytes: Some(signed(progress.round.dirty)),
            dirty_bytes_per_second: Some(signed(prediction.dirty_rate)),
            transfer_bytes_per_second: Some(signed(prediction.copy_rate)),
            predicted_freeze_milliseconds: Some(u32::try_from(prediction.freeze.as_millis()).unwrap_or(u32::MAX)),
            ..Shown::default()
        });
    });
}
