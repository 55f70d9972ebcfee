//! The target's session, modelled: the order of steps, the failure path, the commit and the recovery of
//! node-agent/src/session/target.rs, with effects on a modelled node. Keep both alike.

use crds::condition::Status;
use crds::process_migration::{Party, cond};
use crds::{ProcessMigration, Reason};
use futures::future::{Either, select};
use node_agent::decide::assignment;
use node_agent::decide::recover::Plan;
use node_agent::decide::step::Step;
use node_agent::journal::{Record, Start, TargetContainer};
use operator::decide::pod;
use protocol::migrate::FromTarget;
use protocol::migrate::target::Output;
use std::rc::Rc;

use super::agent::{self, Decided, Failed, Task, decided_in, failed};
use super::clock::Owner;
use super::cluster::{NODES, Node, Process};
use super::fault::Broken;
use super::ledger::Ledger;
use super::wire::TargetEnd;

/// When the reply to the commit is late enough to look elsewhere.
const OVERDUE: u64 = 1_000;
/// How long the kubelet may take to call `create` for every container.
const SHEPHERDS: u64 = 300_000;

pub(crate) async fn run(task: Task, recovered: Option<(Start, Plan)>) {
    if let Some((start, plan)) = recovered {
        return recover(&task, &start, plan).await;
    }
    loop {
        let seen = task.seen();
        if seen.gone || seen.migration.as_deref().is_some_and(assignment::is_finished) {
            return;
        }
        if let Some(migration) = seen.migration.filter(|m| assignment::target_begins(m, NODES[task.n]))
            && let Some(migration) = task
                .fresh(migration)
                .await
                .filter(|m| assignment::target_begins(m, NODES[task.n]))
        {
            return begin(&task, &migration).await;
        }
        task.changed().await;
    }
}

struct Attempt<'a> {
    task: &'a Task,
    start: Start,
    source_pod_uid: String,
    link: Option<Rc<TargetEnd>>,
}

async fn begin(task: &Task, migration: &ProcessMigration) {
    let brief = || {
        let status = migration.status.as_ref()?;
        let (source, target) = (status.source.as_ref()?, status.target.as_ref()?);
        let start = task.start(status.attempt?, target.pod_name.clone()?, target.pod_uid.clone()?);
        Some((start, source.pod_uid.clone()?))
    };
    let Some((start, source_pod_uid)) = brief() else { return };
    let ledger = task.ledger();
    ledger.record(Record::Start(start.clone())).await;
    task.follow_decision(&ledger);
    let mut attempt = Attempt {
        task,
        start: start.clone(),
        source_pod_uid,
        link: None,
    };
    let decided = match attempt.forward(&ledger).await {
        Ok(()) => attempt.commit(&ledger).await,
        Err(why) => Decided::Aborted(why),
    };
    let link = attempt.link.take();
    match decided {
        Decided::Committed => runs(task, &ledger, &start, link.as_deref(), true).await,
        Decided::Aborted(why) => aborted(task, &ledger, &start, why, link.as_deref()).await,
    }
    if let Some(link) = link {
        task.c.clock.timeout(3_000, link.lost()).await;
        link.close(true);
    }
}

async fn recover(task: &Task, start: &Start, plan: Plan) {
    let ledger = task.ledger();
    let restarted = failed(Reason::AgentRestarted, "the target's node-agent was restarted");
    match plan {
        Plan::Run => runs(task, &ledger, start, None, false).await,
        Plan::AskCommit => match task.decisions(start).abort(Party::Target, &restarted).await {
            Decided::Committed => runs(task, &ledger, start, None, false).await,
            Decided::Aborted(why) => aborted(task, &ledger, start, why, None).await,
        },
        Plan::Destroy => aborted(task, &ledger, start, restarted, None).await,
        Plan::Nothing | Plan::GoBack | Plan::AskDecision | Plan::GoBackAborted | Plan::MovedAway => {}
    }
}

fn touch(task: &Task, change: impl FnOnce(&mut Node)) {
    let mut node = task.c.nodes[task.n].borrow_mut();
    change(&mut node);
    node.events += 1;
}

async fn note_decision(ledger: &Ledger, committed: bool, why: &Failed) {
    let known = Record::Decided {
        committed,
        reason: why.reason.clone(),
        message: why.message.clone(),
    };
    ledger.record(known).await;
}

/// Behind the commit: packets pass, all containers run. Idempotent. `fresh`: the journal comes after the thaw.
async fn runs(task: &Task, ledger: &Ledger, start: &Start, link: Option<&TargetEnd>, fresh: bool) {
    let c = &task.c;
    let why = failed(Reason::DecisionCommitted, "");
    if !fresh {
        note_decision(ledger, true, &why).await;
    }
    let thaw = async || {
        c.clock.sleep(c.clock.below(4)).await;
        let now = c.clock.now();
        touch(task, |node| {
            node.held_packets.remove(&start.pod_uid);
            if let Some(process) = node.processes.get_mut(&start.pod_uid) {
                process.go_on(now);
            }
        });
    };
    ledger.must(Step::TargetThaw, thaw).await;
    if fresh {
        note_decision(ledger, true, &why).await;
    }
    if let Some(link) = link {
        let _ = link.send(&FromTarget::Committed);
    }
    c.clock.sleep(c.clock.below(4)).await;
    touch(task, |node| {
        // The pod is an ordinary one from now on, also where no shepherd lives to mark it.
        if c.rule != Broken::OnlyShepherdMarks || node.shepherds.contains(&start.pod_uid) {
            node.committed.insert(start.pod_uid.clone());
        }
    });
    task.publish(|half| half.target.step = None);
    clean_up(task, ledger, start).await;
    task.end(ledger).await;
}

async fn clean_up(task: &Task, ledger: &Ledger, start: &Start) {
    let work = async || {
        task.c.clock.sleep(task.c.clock.below(4)).await;
        touch(task, |node| {
            node.rooms.remove(&start.uid);
            node.hand_offs.remove(&start.pod_uid);
        });
    };
    ledger.must(Step::TargetCleanUp, work).await;
}

/// Before the commit: everything of the target is destroyed, journaled, and only then said.
async fn aborted(task: &Task, ledger: &Ledger, start: &Start, why: Failed, link: Option<&TargetEnd>) {
    let c = &task.c;
    if task.seen().migration.as_deref().and_then(decided_in).is_none() {
        task.publish_failure(&why);
    }
    let destroy = async || {
        c.clock.sleep(c.clock.below(10)).await;
        touch(task, |node| {
            node.hand_offs.insert(start.pod_uid.clone(), true);
        });
        c.clock.sleep(c.clock.below(10)).await;
        touch(task, |node| {
            node.shepherds.remove(&start.pod_uid);
            node.processes.remove(&start.pod_uid);
            node.held_packets.remove(&start.pod_uid);
        });
    };
    ledger.must(Step::TargetDestroy, destroy).await;
    // From here on this attempt can never be committed: only this agent could, and it knows.
    note_decision(ledger, false, &why).await;
    if let Some(link) = link {
        let _ = link.send(&FromTarget::Destroyed {
            reason: why.reason.clone(),
            message: why.message.clone(),
        });
    }
    let decided = task.decisions(start).abort(Party::Target, &why).await;
    if decided == Decided::Committed {
        c.violation
            .borrow_mut()
            .get_or_insert("committed although this agent did not commit".to_owned());
    }
    task.wait_until_seen().await;
    task.publish(|half| {
        half.target.step = None;
        half.target.destroyed = Some(true);
    });
    let mut pause = 100;
    while task.pod_exists(&start.pod_name, &start.pod_uid).await != Some(false) {
        c.clock.sleep(pause).await;
        pause = (pause * 5 / 4).min(5_000);
    }
    clean_up(task, ledger, start).await;
    task.end(ledger).await;
}

impl Attempt<'_> {
    async fn forward(&mut self, ledger: &Ledger) -> Result<(), Failed> {
        let (task, c) = (self.task, &self.task.c);
        let start = self.start.clone();
        self.verify_pod().await?;
        task.say_step(Step::TargetHandOff);
        let write = async || {
            c.clock.sleep(c.clock.below(4)).await;
            touch(task, |node| {
                node.hand_offs.insert(start.pod_uid.clone(), false);
            });
            Ok(())
        };
        ledger.forward(Step::TargetHandOff, write).await?;
        let standing = c.clock.until(|| {
            c.nodes[task.n]
                .borrow()
                .shepherds
                .contains(&start.pod_uid)
                .then_some(())
        });
        match select(
            Box::pin(c.clock.timeout(SHEPHERDS, standing)),
            Box::pin(ledger.stopped()),
        )
        .await
        {
            Either::Left((Some(()), _)) => {}
            Either::Left((None, _)) => return Err(failed(Reason::TargetLost, "no container came up in time")),
            Either::Right((why, _)) => return Err(why),
        }
        let containers = vec![TargetContainer {
            name: "app".to_owned(),
            id: start.pod_uid.clone(),
            cgroup: "/".into(),
        }];
        ledger
            .record(Record::Shepherds {
                containers,
                network_namespace: "/".into(),
            })
            .await;
        task.publish(|half| half.target.step = Some("waiting for the source".into()));
        task.condition(
            cond::TARGET_READY,
            Status::True,
            Reason::ShepherdsReady,
            "sandbox and shepherds stand",
        );

        let link = Rc::new(self.source(ledger).await?);
        self.link = Some(link.clone());
        task.say_step(Step::TargetReserve);
        let reserve = async || {
            match link.hear().await {
                Ok((Output::Manifest(_), _)) => {}
                Ok((Output::Abandon { reason, message }, _)) => return Err(Failed { reason, message }),
                Ok(_) => return Err(failed(Reason::PeerRefused, "the source did not send a manifest")),
                Err(why) => return Err(failed(Reason::TransferFailed, why)),
            }
            touch(task, |node| {
                node.rooms.insert(start.uid.clone(), None);
            });
            Ok(())
        };
        ledger.forward(Step::TargetReserve, reserve).await?;
        say(&link, &FromTarget::ManifestAccepted)?;

        task.say_step(Step::TargetReceive);
        ledger
            .forward(Step::TargetReceive, async || receive(task, ledger, &link).await)
            .await?;
        follow_source(task, &link, ledger);
        let _ = say(&link, &FromTarget::Received);

        task.say_step(Step::TargetPrepareNetwork);
        ledger.record(Record::Addresses { addresses: Vec::new() }).await;
        let prepare = async || {
            c.clock.sleep(c.clock.below(4)).await;
            touch(task, |node| {
                node.held_packets.insert(start.pod_uid.clone());
            });
            Ok(())
        };
        ledger.forward(Step::TargetPrepareNetwork, prepare).await?;
        task.say_step(Step::TargetRestore);
        ledger
            .forward(Step::TargetRestore, async || restore(task, ledger, &start).await)
            .await?;
        task.say_step(Step::TargetAdjust);
        let adjust = async || {
            c.clock.sleep(c.clock.below(4)).await;
            let held = c.nodes[task.n].borrow().processes.contains_key(&start.pod_uid);
            if held {
                Ok(())
            } else {
                Err(failed(Reason::RestoreFailed, "the restored processes are gone"))
            }
        };
        ledger.forward(Step::TargetAdjust, adjust).await?;
        let _ = say(&link, &FromTarget::Held);
        Ok(())
    }

    async fn verify_pod(&self) -> Result<(), Failed> {
        let (name, uid) = (self.start.pod_name.clone(), self.start.pod_uid.clone());
        let (owner, n) = (self.start.uid.clone(), self.task.n);
        let fits = self.task.c.call(2 * agent::REQUEST, move |s| {
            s.pods.get(&name).is_some_and(|p| {
                pod::uid(p) == uid && pod::is_controlled_by(p, &owner) && pod::node(p) == Some(NODES[n])
            })
        });
        match fits.await {
            Some(true) => Ok(()),
            Some(false) => Err(failed(Reason::TargetLost, "the target pod was replaced")),
            None => Err(failed(
                Reason::ApiUnavailable,
                "the target pod could not be read in time",
            )),
        }
    }

    /// Waits for the source.
    async fn source(&self, ledger: &Ledger) -> Result<TargetEnd, Failed> {
        loop {
            let (link, offer) = match select(Box::pin(ledger.stopped()), Box::pin(self.task.inbound())).await {
                Either::Left((why, _)) => return Err(why),
                Either::Right((inbound, _)) => inbound,
            };
            let fits = offer.uid == self.start.uid
                && offer.attempt == self.start.attempt
                && offer.source_pod_uid == self.source_pod_uid
                && offer.target_pod_uid == self.start.pod_uid;
            if fits {
                say(&link, &FromTarget::Accept { version: 1 })?;
                return Ok(link);
            }
            let why = failed(Reason::PeerRefused, "the offer is not for this attempt");
            let _ = say(
                &link,
                &FromTarget::Refuse {
                    reason: why.reason,
                    message: why.message,
                },
            );
        }
    }

    /// Every container is restored and held. THE POINT OF NO RETURN is inside.
    async fn commit(&self, ledger: &Ledger) -> Decided {
        let task = self.task;
        task.say_step(Step::TargetCommit);
        let decisions = task.decisions(&self.start);
        let swap = async || Ok(decisions.commit().await);
        // Nobody else commits, so what the watch shows is as good as the reply, when that one is overdue.
        let shown = async {
            task.c.clock.sleep(OVERDUE).await;
            let shows = || {
                let shown = task.seen().migration.as_deref().and_then(decided_in);
                (shown == Some(Decided::Committed)).then_some(())
            };
            task.c.clock.until(shows).await;
        };
        let step = ledger.forward(Step::TargetCommit, swap);
        let decided = match select(Box::pin(step), Box::pin(shown)).await {
            Either::Left((decided, _)) => decided,
            Either::Right(((), _)) => Ok(Decided::Committed),
        };
        match decided {
            Ok(decided) => {
                if decided == Decided::Committed {
                    let message = "every container is restored and held";
                    task.condition(cond::RESTORED, Status::True, Reason::AllContainersHeld, message);
                }
                decided
            }
            Err(why) => decisions.abort(Party::Target, &why).await,
        }
    }
}

fn say(link: &TargetEnd, message: &FromTarget) -> Result<(), Failed> {
    link.send(message).map_err(|why| failed(Reason::TransferFailed, why))
}

async fn receive(task: &Task, ledger: &Ledger, link: &TargetEnd) -> Result<(), Failed> {
    let all = async {
        loop {
            match link.hear().await {
                Ok((Output::Data { .. }, content)) => {
                    let (.., bytes) = protocol::frame::read_data(&content).unwrap();
                    let text = String::from_utf8(bytes.to_vec()).unwrap();
                    let (lineage, ticks) = text.split_once(' ').unwrap();
                    let image = Some((lineage.parse().unwrap(), ticks.parse().unwrap()));
                    touch(task, |node| {
                        node.rooms.insert(task.uid.clone(), image);
                    });
                }
                Ok((Output::Abandon { reason, message }, _)) => return Err(Failed { reason, message }),
                Ok((Output::Complete, _)) => return Ok(()),
                Ok(_) => {}
                Err(why) => return Err(failed(Reason::TransferFailed, why)),
            }
        }
    };
    match select(Box::pin(all), Box::pin(ledger.stopped())).await {
        Either::Left((result, _)) => result,
        Either::Right((why, _)) => Err(why),
    }
}

/// From here on the source only lives or abandons.
fn follow_source(task: &Task, link: &Rc<TargetEnd>, ledger: &Ledger) {
    let (link, stop) = (Rc::downgrade(link), ledger.stop.clone());
    task.c.clock.spawn(Owner::Agent(task.n), async move {
        while let Some(end) = link.upgrade() {
            match end.hear().await {
                Ok((Output::Abandon { reason, message }, _)) => {
                    stop.borrow_mut().get_or_insert(Failed { reason, message });
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
    });
}

/// Through the shepherd, which holds what it restores.
async fn restore(task: &Task, ledger: &Ledger, start: &Start) -> Result<(), Failed> {
    let c = &task.c;
    let time = c.clock.between(20, 700);
    if let Either::Right((why, _)) = select(Box::pin(c.clock.sleep(time)), Box::pin(ledger.stopped())).await {
        return Err(why);
    }
    let mut node = c.nodes[task.n].borrow_mut();
    let image = node.rooms.get(&start.uid).copied().flatten();
    let (Some((lineage, ticks)), true) = (image, node.shepherds.contains(&start.pod_uid)) else {
        return Err(failed(Reason::RestoreFailed, "no shepherd or no image"));
    };
    let held = Process {
        lineage,
        running_since: None,
        ticks,
        interrupted: false,
    };
    node.processes.entry(start.pod_uid.clone()).or_insert(held);
    node.events += 1;
    Ok(())
}
