//! The source's session, modelled: the order of steps, the failure path and the recovery of node-agent/src/session/source.rs,
//! with effects on a modelled node. Keep both alike.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use crds::condition::Status;
use crds::process_migration::{Party, cond};
use crds::{ProcessMigration, Reason};
use futures::future::{Either, select};
use node_agent::decide::assignment;
use node_agent::decide::recover::Plan;
use node_agent::decide::step::Step;
use node_agent::journal::{FrozenContainer, Record, Start};
use protocol::migrate::message::{Entry, EntryKind, Facts, Manifest, Offer, PROTOCOL, Place, Stream};
use protocol::migrate::{FromSource, FromTarget};
use protocol::raw::Raw;

use super::agent::{self, Decided, Failed, Task, decided_in, failed};
use super::clock::Owner;
use super::cluster::{Cluster, NAMESPACE, NODES, Node};
use super::fault::Broken;
use super::ledger::Ledger;
use super::wire::{self, SourceEnd};

/// How long a source whose target is not heard any more waits before it tries to abort.
const LOST_TARGET: u64 = 5_000;
/// While the decision is not known.
const LOOK: u64 = 500;

pub(crate) async fn run(task: Task, recovered: Option<(Start, Plan)>) {
    if let Some((start, plan)) = recovered {
        return recover(&task, &start, plan).await;
    }
    loop {
        let seen = task.seen();
        if seen.gone || seen.migration.as_deref().is_some_and(assignment::is_finished) {
            return;
        }
        if let Some(migration) = seen.migration.filter(|m| assignment::source_begins(m, NODES[task.n]))
            && let Some(migration) = task
                .fresh(migration)
                .await
                .filter(|m| assignment::source_begins(m, NODES[task.n]))
        {
            return begin(&task, &migration).await;
        }
        task.changed().await;
    }
}

struct Brief {
    start: Start,
    target_node: usize,
    target_pod_uid: String,
    progress_timeout: u64,
}

fn brief(task: &Task, migration: &ProcessMigration) -> Option<Brief> {
    let status = migration.status.as_ref()?;
    let (source, target) = (status.source.as_ref()?, status.target.as_ref()?);
    Some(Brief {
        start: task.start(status.attempt?, source.pod_name.clone()?, source.pod_uid.clone()?),
        target_node: NODES.iter().position(|n| target.node_name.as_deref() == Some(n))?,
        target_pod_uid: target.pod_uid.clone()?,
        progress_timeout: u64::from(migration.spec.progress_timeout_seconds) * 1_000,
    })
}

/// What the target has said and the session has not heard yet; closed with the connection.
#[derive(Default)]
struct Heard {
    messages: RefCell<VecDeque<FromTarget>>,
    lost: RefCell<Option<String>>,
}

struct Attempt<'a> {
    task: &'a Task,
    brief: Brief,
    link: Option<Rc<SourceEnd>>,
    heard: Rc<Heard>,
}

async fn begin(task: &Task, migration: &ProcessMigration) {
    let Some(brief) = brief(task, migration) else { return };
    let ledger = task.ledger();
    ledger.record(Record::Start(brief.start.clone())).await;
    task.follow_decision(&ledger);
    let mut attempt = Attempt {
        task,
        brief,
        link: None,
        heard: Rc::default(),
    };
    let result = attempt.forward(&ledger).await;
    let start = attempt.brief.start.clone();
    match result {
        Ok(()) => {
            let decided = attempt.await_decision().await;
            settle(task, &ledger, &start, decided, false).await;
        }
        Err(why) => {
            if let Some(link) = &attempt.link {
                let abandon = FromSource::Abandon {
                    reason: why.reason.clone(),
                    message: why.message.clone(),
                };
                let _ = link.send(&abandon);
            }
            fail(task, &ledger, &start, why).await;
        }
    }
    if let Some(link) = &attempt.link {
        link.close(true);
    }
}

async fn fail(task: &Task, ledger: &Ledger, start: &Start, why: Failed) {
    if task.seen().migration.as_deref().and_then(decided_in).is_none() {
        task.publish_failure(&why);
    }
    let decisions = task.decisions(start);
    if ledger.has_begun(Step::SourceComplete) {
        let decided = decisions.abort(Party::Source, &why).await;
        return settle(task, ledger, start, decided, false).await;
    }
    go_back(task, ledger, start).await;
    let decided = decisions.abort(Party::Source, &why).await;
    if decided == Decided::Committed {
        task.c
            .violation
            .borrow_mut()
            .get_or_insert("committed although not everything was sent".to_owned());
    }
    settle(task, ledger, start, Decided::Aborted(why), true).await;
}

async fn recover(task: &Task, start: &Start, plan: Plan) {
    let ledger = task.ledger();
    let restarted = failed(Reason::AgentRestarted, "the source's node-agent was restarted");
    let decided = match plan {
        Plan::GoBack => {
            go_back(task, &ledger, start).await;
            task.wait_until_seen().await;
            task.publish_failure(&restarted);
            let why = match task.decisions(start).abort(Party::Source, &restarted).await {
                Decided::Aborted(why) => why,
                Decided::Committed => restarted,
            };
            return settle(task, &ledger, start, Decided::Aborted(why), true).await;
        }
        Plan::AskDecision => task.decisions(start).abort(Party::Source, &restarted).await,
        Plan::GoBackAborted => Decided::Aborted(restarted),
        Plan::MovedAway => Decided::Committed,
        Plan::Nothing | Plan::Destroy | Plan::AskCommit | Plan::Run => return,
    };
    settle(task, &ledger, start, decided, false).await;
}

async fn settle(task: &Task, ledger: &Ledger, start: &Start, decided: Decided, gone_back: bool) {
    let (committed, why) = match &decided {
        Decided::Committed => (true, failed(Reason::DecisionCommitted, "")),
        Decided::Aborted(why) => (false, why.clone()),
    };
    let known = Record::Decided {
        committed,
        reason: why.reason.clone(),
        message: why.message.clone(),
    };
    ledger.record(known).await;
    match decided {
        Decided::Committed => release(task, ledger, start).await,
        Decided::Aborted(why) => {
            if !gone_back {
                go_back(task, ledger, start).await;
            }
            task.wait_until_seen().await;
            task.publish(|half| half.source.step = None);
            let reason = Reason::from_name(&why.reason).unwrap_or(Reason::StepFailed);
            let message = format!("the source runs: {}", why.message);
            task.condition(cond::SOURCE_RELEASED, Status::False, reason, &message);
        }
    }
    task.end(ledger).await;
}

fn touch(task: &Task, change: impl FnOnce(&mut Node)) {
    let mut node = task.c.nodes[task.n].borrow_mut();
    change(&mut node);
    node.events += 1;
}

/// Back to a running source, from the journal alone.
async fn go_back(task: &Task, ledger: &Ledger, start: &Start) {
    let c = &task.c;
    if ledger.has_begun(Step::SourceDump) {
        wait_for_dump(task).await;
    }
    if ledger.has_begun(Step::SourceFreeze) {
        let repair = async || {
            c.clock.sleep(c.clock.below(4)).await;
            touch(task, |node| {
                if let Some(process) = node.processes.get_mut(&start.pod_uid) {
                    process.interrupted &= c.rule == Broken::NoRepair;
                }
            });
        };
        ledger.must(Step::SourceRepair, repair).await;
    }
    if ledger.has_begun(Step::SourceHoldPackets) {
        let release = async || {
            c.clock.sleep(c.clock.below(4)).await;
            touch(task, |node| {
                node.held_packets.remove(&start.pod_uid);
            });
        };
        ledger.must(Step::SourceReleasePackets, release).await;
    }
    if ledger.has_begun(Step::SourceFreeze) {
        let thaw = async || {
            c.clock.sleep(c.clock.below(4)).await;
            let now = c.clock.now();
            touch(task, |node| {
                if let Some(process) = node.processes.get_mut(&start.pod_uid) {
                    process.go_on(now);
                }
            });
        };
        ledger.must(Step::SourceThaw, thaw).await;
    }
    clean_up(task, ledger, start).await;
}

/// CRIU outlives the agent: it is outside the agent's cgroup.
async fn wait_for_dump(task: &Task) {
    let c = &task.c;
    let ended = || {
        let mut node = c.nodes[task.n].borrow_mut();
        match node.dumps.get(&task.uid) {
            Some(end) if *end > c.clock.now() => {
                c.clock.wake_at(*end);
                None
            }
            Some(_) => {
                node.dumps.remove(&task.uid);
                node.events += 1;
                Some(())
            }
            None => Some(()),
        }
    };
    c.clock.until(ended).await;
}

async fn clean_up(task: &Task, ledger: &Ledger, start: &Start) {
    let work = async || {
        task.c.clock.sleep(task.c.clock.below(4)).await;
        touch(task, |node| {
            node.moved_away.remove(&start.pod_uid);
            node.rooms.remove(&start.uid);
        });
    };
    ledger.must(Step::SourceCleanUp, work).await;
}

/// Behind the commit: the processes stay frozen until the kubelet has ended them.
async fn release(task: &Task, ledger: &Ledger, start: &Start) {
    let c = &task.c;
    let move_away = async || {
        c.clock.sleep(c.clock.below(4)).await;
        touch(task, |node| {
            node.moved_away.insert(start.pod_uid.clone());
            node.rooms.remove(&start.uid);
        });
    };
    ledger.must(Step::SourceMoveAway, move_away).await;
    task.wait_until_seen().await;
    task.publish(|half| half.source.step = Some("waiting for the source to end".into()));
    let mut pause = 100;
    loop {
        let ended = !c.nodes[task.n].borrow().processes.contains_key(&start.pod_uid);
        if ended && task.pod_exists(&start.pod_name, &start.pod_uid).await == Some(false) {
            break;
        }
        c.clock.sleep(pause).await;
        pause = (pause * 5 / 4).min(2_000);
    }
    wait_for_dump(task).await;
    clean_up(task, ledger, start).await;
    task.publish(|half| half.source.step = None);
    task.condition(
        cond::SOURCE_RELEASED,
        Status::True,
        Reason::SourceGone,
        "the source's processes and its pod are gone",
    );
}

impl Attempt<'_> {
    async fn forward(&mut self, ledger: &Ledger) -> Result<(), Failed> {
        let (task, c) = (self.task, &self.task.c);
        let (pod_uid, uid) = (self.brief.start.pod_uid.clone(), task.uid.clone());
        task.say_step(Step::SourceReserve);
        let reserve = async || {
            c.clock.sleep(c.clock.below(4)).await;
            let mut node = c.nodes[task.n].borrow_mut();
            if !node.processes.contains_key(&pod_uid) {
                return Err(failed(Reason::SourceLost, "the pod has 0 running containers"));
            }
            node.rooms.insert(uid.clone(), None);
            Ok(())
        };
        ledger.forward(Step::SourceReserve, reserve).await?;

        task.say_step(Step::SourceConnect);
        let link = {
            let brief = &self.brief;
            ledger
                .forward(Step::SourceConnect, async || connect(task, brief).await)
                .await?
        };
        let link = Rc::new(link);
        self.link = Some(link.clone());
        follow_target(task, &link, &self.heard, ledger);
        let copy = async || {
            task.c.clock.sleep(task.c.clock.below(200)).await;
            Ok(())
        };
        ledger.forward(Step::SourceCopy, copy).await?;
        self.freeze_and_send(ledger, &link).await
    }

    async fn freeze_and_send(&self, ledger: &Ledger, link: &SourceEnd) -> Result<(), Failed> {
        let (task, c) = (self.task, &self.task.c);
        let start = &self.brief.start;
        let containers = vec![FrozenContainer {
            name: "app".to_owned(),
            id: start.pod_uid.clone(),
            cgroup: "/".into(),
            dump_cgroup: "/".into(),
        }];
        ledger.record(Record::Frozen { containers }).await;
        task.say_step(Step::SourceFreeze);
        let freeze = async || {
            c.clock.sleep(c.clock.below(4)).await;
            let now = c.clock.now();
            let mut node = c.nodes[task.n].borrow_mut();
            node.events += 1;
            let process = node.processes.get_mut(&start.pod_uid);
            process
                .map(|p| p.stop(now))
                .ok_or_else(|| failed(Reason::StepFailed, "the cgroup is gone"))
        };
        ledger.forward(Step::SourceFreeze, freeze).await?;
        let hold = async || {
            c.clock.sleep(c.clock.below(4)).await;
            touch(task, |node| {
                node.held_packets.insert(start.pod_uid.clone());
            });
            Ok(())
        };
        ledger.forward(Step::SourceHoldPackets, hold).await?;
        ledger.record(Record::Threads { threads: Vec::new() }).await;
        say(link, &FromSource::Frozen)?;
        say(link, &FromSource::Facts(Facts::default()))?;

        task.say_step(Step::SourceDump);
        let image = ledger
            .forward(Step::SourceDump, async || dump(task, start, link).await)
            .await?;
        task.say_step(Step::SourceCure);
        let cure = async || {
            c.clock.sleep(c.clock.between(1, 30)).await;
            link.send_piece(&image)
                .map_err(|why| failed(Reason::TransferFailed, why))?;
            say(
                link,
                &FromSource::FileEnd {
                    file: 0,
                    size: image.len() as u64,
                },
            )
        };
        ledger.forward(Step::SourceCure, cure).await?;

        task.say_step(Step::SourceComplete);
        let complete = async || {
            touch(task, |node| {
                if c.rule != Broken::NoMarkBeforeCommit {
                    node.moved_away.insert(start.pod_uid.clone());
                }
            });
            c.clock.sleep(c.clock.below(4)).await;
            say(
                link,
                &FromSource::Complete {
                    entries: 1,
                    bytes: image.len() as u64,
                },
            )
        };
        ledger.forward(Step::SourceComplete, complete).await?;
        task.publish(|half| half.source.step = Some("waiting for the decision".into()));
        task.condition(
            cond::MEMORY_SYNCED,
            Status::True,
            Reason::WaitingForRestore,
            "all images are on the target",
        );
        Ok(())
    }

    /// Waits for the decision: told by the target, seen in the API, or brought about where the target is lost.
    async fn await_decision(&self) -> Decided {
        let (task, c) = (self.task, &self.task.c);
        let decisions = task.decisions(&self.brief.start);
        let deadline = c.clock.now() + self.brief.progress_timeout;
        let mut lost_at: Option<u64> = None;
        loop {
            if let Some(decided) = task.seen().migration.as_deref().and_then(decided_in) {
                return decided;
            }
            let listens = lost_at.is_none();
            let heard = c.clock.until(|| match self.heard.messages.borrow_mut().pop_front() {
                Some(message) => Some(Some(message)),
                None => (listens && self.heard.lost.borrow().is_some()).then_some(None),
            });
            let next = select(
                Box::pin(heard),
                select(Box::pin(task.changed()), Box::pin(c.clock.sleep(LOOK))),
            );
            match next.await {
                Either::Left((Some(FromTarget::Committed), _)) => return Decided::Committed,
                Either::Left((Some(FromTarget::Destroyed { reason, message }), _)) => {
                    let why = Failed { reason, message };
                    let (later, again) = (decisions.clone(), why.clone());
                    c.clock.spawn(Owner::Agent(task.n), async move {
                        later.abort(Party::Source, &again).await;
                    });
                    return Decided::Aborted(why);
                }
                Either::Left((Some(_), _)) | Either::Right((Either::Left(_), _)) => {}
                Either::Left((None, _)) => lost_at = Some(c.clock.now()),
                Either::Right((Either::Right(_), _)) => {
                    if lost_at.is_some()
                        && let Some(decided) = decisions.look().await
                    {
                        return decided;
                    }
                }
            }
            if lost_at.is_some_and(|at| c.clock.now() - at > LOST_TARGET) {
                let why = failed(Reason::TransferFailed, "the target's agent is not heard any more");
                return decisions.abort(Party::Source, &why).await;
            }
            if c.clock.now() > deadline {
                let why = failed(Reason::ProgressTimeout, "the target did not restore in time");
                return decisions.abort(Party::Source, &why).await;
            }
        }
    }
}

fn say(link: &SourceEnd, message: &FromSource) -> Result<(), Failed> {
    link.send(message).map_err(|why| failed(Reason::TransferFailed, why))
}

async fn connect(task: &Task, brief: &Brief) -> Result<SourceEnd, Failed> {
    let c = &task.c;
    let lost = |why: String| failed(Reason::TransferFailed, why);
    // The MigrationNode of the target, for its endpoint.
    c.call(agent::REQUEST, |_| ())
        .await
        .ok_or_else(|| failed(Reason::ApiUnavailable, "no answer"))?;
    let reached = c.clock.until(|| c.cut_since().is_none().then_some(()));
    c.clock
        .timeout(10_000, reached)
        .await
        .ok_or_else(|| lost("the target's node does not answer".into()))?;
    if !agent::is_listening(c, brief.target_node) {
        return Err(lost("connection refused".into()));
    }
    let (link, other) = wire::open(c);
    agent::accept(c, brief.target_node, other);
    let start = &brief.start;
    say(
        &link,
        &FromSource::Offer(Offer {
            protocol: PROTOCOL.into(),
            versions: protocol::version::VERSIONS.to_vec(),
            stream: Stream::Session,
            namespace: NAMESPACE.to_owned(),
            name: start.name.clone(),
            uid: start.uid.clone(),
            attempt: start.attempt,
            source_pod_uid: start.pod_uid.clone(),
            target_pod_uid: brief.target_pod_uid.clone(),
        }),
    )?;
    hear(&link, |m| matches!(m, FromTarget::Accept { .. })).await?;
    let manifest = Manifest {
        containers: vec!["app".to_owned()],
        descriptors: Vec::new(),
        memory_bytes: 500_000,
        max_image_bytes: 1_000_000,
        max_file_bytes: 1_000_000,
        copied_before: false,
    };
    say(&link, &FromSource::Manifest(manifest))?;
    hear(&link, |m| matches!(m, FromTarget::ManifestAccepted)).await?;
    Ok(link)
}

async fn hear(link: &SourceEnd, expected: impl Fn(&FromTarget) -> bool) -> Result<(), Failed> {
    match link.hear().await {
        Ok(heard) if expected(&heard) => Ok(()),
        Ok(FromTarget::Refuse { reason, message } | FromTarget::Destroyed { reason, message }) => Err(Failed {
            reason,
            message: format!("the target refused: {message}"),
        }),
        Ok(other) => Err(failed(Reason::PeerRefused, format!("the target said {}", other.name()))),
        Err(why) => Err(failed(Reason::TransferFailed, why)),
    }
}

/// What the target says, and its loss, stop the forward steps; what it says is still there to be heard afterwards.
fn follow_target(task: &Task, link: &Rc<SourceEnd>, heard: &Rc<Heard>, ledger: &Ledger) {
    let (link, heard, stop) = (Rc::downgrade(link), heard.clone(), ledger.stop.clone());
    let c: Cluster = task.c.clone();
    c.clock.spawn(Owner::Agent(task.n), async move {
        // It ends when the session lets the connection go; holding the end only for the wait would keep it open.
        while let Some(end) = link.upgrade() {
            match end.hear().await {
                Ok(message) => {
                    if let FromTarget::Destroyed { reason, message } | FromTarget::Refuse { reason, message } = &message
                    {
                        let why = Failed {
                            reason: reason.clone(),
                            message: message.clone(),
                        };
                        stop.borrow_mut().get_or_insert(why);
                    }
                    heard.messages.borrow_mut().push_back(message);
                }
                Err(why) => {
                    *heard.lost.borrow_mut() = Some(why.clone());
                    stop.borrow_mut().get_or_insert(failed(Reason::TransferFailed, why));
                    return;
                }
            }
        }
    });
}

/// The dump runs on when the agent dies. Its image: which start the processes go back to, and their memory.
async fn dump(task: &Task, start: &Start, link: &SourceEnd) -> Result<Vec<u8>, Failed> {
    let c = &task.c;
    let image = {
        let mut node = c.nodes[task.n].borrow_mut();
        let ends = c.clock.now() + c.clock.between(20, 900);
        node.dumps.insert(start.uid.clone(), ends);
        let gone = || failed(Reason::CheckpointFailed, "the processes are gone");
        let process = node.processes.get_mut(&start.pod_uid).ok_or_else(gone)?;
        process.interrupted = true;
        if process.running_since.is_some() {
            c.violation
                .borrow_mut()
                .get_or_insert("a running process was dumped".to_owned());
        }
        format!("{} {}", process.lineage, process.ticks).into_bytes()
    };
    let entry = Entry {
        place: Place::Images(0),
        path: Raw::from(&b"pages-1.img"[..]),
        kind: EntryKind::File { file: 0 },
        meta: None,
    };
    let sent = say(link, &FromSource::Entry(entry));
    // A stop ends what is sent, never CRIU.
    wait_for_dump(task).await;
    sent?;
    Ok(image)
}
