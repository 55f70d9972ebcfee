//! Sessions: an attempt of a migration on this node, in one role. One task owns it, from its first journal record until
//! nothing of it is left.
//!
//! ```text
//! watch ──observe──> Sessions ──watch channel──> one task per (migration, role): source.rs or target.rs
//! peers ──listen───>          ──mpsc──────────>  (target) the source's connection
//! start ──recover──>          ──journal───────>  a task that goes on where an earlier agent stopped
//! ```
//! | module | holds |
//! |---|---|
//! | `source` | from the dial to the end of the released source, or back to the running one |
//! | `target` | from the hand-offs to the running copy, or to nothing left |
//! | `hand_over` | the point of no return, alone |
//! | `ledger` | steps: journal, deadline, faults, stop |
//! | `publish` | own half of the status |
//! | `shepherds` | the wrapper's side of a target pod |
//!
//! A task that panics is a crash: its journal is read again and recovery goes on from there.

mod hand_over;
mod ledger;
mod publish;
mod shepherds;
mod source;
mod target;
mod warm;

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use crds::{ProcessMigration, Reason};
use hostsys::rcu::Hurry;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, api::ListParams};
use protocol::{
    hand_off::{COMMITTED_DIR, MOVED_AWAY_DIR},
    migrate::{FromTarget, message::Offer, target as machine},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
};

use crate::{
    decide::{
        assignment::{self, PreflightReport},
        recover::{Plan, plan},
        step::Role,
    },
    fault::Faults,
    identity::PeerTls,
    journal::{self, JOURNALS, Journal, Record, Start},
    metrics::Metrics,
    page_link,
    peer::{self, Accepted, Event, FromSourceSide},
};
use hand_over::Decisions;
use ledger::Ledger;
use publish::{Half, Publisher, Whose};

/// How long a connection may take to say what it is.
const OFFER: Duration = Duration::from_secs(10);
/// Connections that wait for a session.
const INBOUND: usize = 4;
/// How often markers of pods that are gone are looked for.
const SWEEP: Duration = Duration::from_secs(300);

/// What sessions need of the agent.
#[derive(Clone)]
pub struct SessionContext {
    /// The agent's own service account.
    pub client: Client,
    /// Name of this node.
    pub node: String,
    /// TLS settings; `None` until the first certificate.
    pub tls: watch::Receiver<Option<PeerTls>>,
    /// Most bytes of checkpoints in memory on this node at once.
    pub checkpoint_limit_bytes: watch::Receiver<u64>,
    /// Whether the kernel can end connections on request.
    pub destroys_sockets: bool,
    /// Faults of tests.
    pub faults: Faults,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// A connection that names this node's session.
struct Inbound {
    link: FromSourceSide,
    offer: Offer,
    /// Names in the peer's certificate.
    names: Vec<String>,
}

/// What a session's task works with.
struct Task {
    ctx: Arc<SessionContext>,
    whose: Whose,
    /// The object as last seen; `None` before it was seen (a recovered session).
    observed: watch::Receiver<Seen>,
    /// The writer of this half; made when the object is first seen.
    publisher: Arc<Mutex<Option<Publisher>>>,
    inbound: mpsc::Receiver<Inbound>,
    /// Connections for pages; taken by whoever receives them.
    pages: Option<mpsc::Receiver<page_link::Incoming>>,
    /// While the pod is frozen.
    hurry: Arc<Mutex<Option<Hurry>>>,
}

/// What the watch says.
#[derive(Clone, Debug, Default)]
struct Seen {
    migration: Option<Arc<ProcessMigration>>,
    gone: bool,
}

impl Task {
    /// The object as last seen.
    fn seen(&self) -> Seen {
        self.observed.borrow().clone()
    }

    /// The next change; false when no more will come.
    async fn changed(&mut self) -> bool {
        self.observed.changed().await.is_ok()
    }

    /// The object as the API has it now; `None` when it is gone. A watch may deliver an event that is older than the end of
    /// this node's own last session, and a session that began from it would touch what has been decided since. Repeated until
    /// the API answers: without it nothing may begin.
    async fn fresh(&self) -> Option<Arc<ProcessMigration>> {
        let api: Api<ProcessMigration> = Api::namespaced(self.ctx.client.clone(), &self.whose.namespace);
        loop {
            match tokio::time::timeout(Duration::from_secs(5), api.get_opt(&self.whose.name)).await {
                Ok(Ok(found)) => {
                    return found
                        .filter(|m| m.metadata.uid.as_deref() == Some(self.whose.uid.as_str()))
                        .map(Arc::new);
                }
                Ok(Err(error)) => tracing::warn!(
                    migration = self.whose.name,
                    error = crate::error::chain(&error),
                    "failed to read a migration before it begins"
                ),
                Err(_) => tracing::warn!(migration = self.whose.name, "the API does not answer"),
            }
            if self.seen().gone {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// Waits until this node is to begin, by what the watch says and then by what is stored; `None`: it never will be.
    async fn until_begins(&mut self, begins: fn(&ProcessMigration, &str) -> bool) -> Option<Arc<ProcessMigration>> {
        loop {
            let seen = self.seen();
            if seen.gone || seen.migration.as_deref().is_some_and(assignment::is_finished) {
                return None;
            }
            if seen.migration.is_some_and(|m| begins(&m, &self.ctx.node)) {
                let stored = self.fresh().await.filter(|m| !assignment::is_finished(m))?;
                if begins(&stored, &self.ctx.node) {
                    return Some(stored);
                }
            }
            if !self.changed().await {
                return None;
            }
        }
    }

    /// Changes this node's half of the status, as soon as the object was seen.
    fn publish(&self, change: impl FnOnce(&mut Half)) {
        if let Some(p) = self.publisher.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            p.change(change);
        }
    }

    /// To be called when the pod is frozen: the node does what makes it short.
    fn at_freeze(&self) -> impl FnOnce() + Send + 'static {
        let (slot, publisher) = (self.hurry.clone(), self.publisher.clone());
        move || {
            let hurry = hostsys::rcu::hurry()
                .inspect_err(|error| tracing::debug!(%error, "the kernel does not hurry"))
                .ok();
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = hurry;
            if let Some(p) = publisher.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
                p.quiet(true);
            }
        }
    }

    /// The freeze is over, or was none.
    fn freeze_ends(&self) {
        drop(self.hurry.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(p) = self.publisher.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            p.quiet(false);
        }
    }

    fn condition(&self, type_: &str, status: crds::condition::Status, reason: Reason, message: &str) {
        if let Some(p) = self.publisher.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            p.condition(type_, status, reason, message);
        }
    }

    /// Waits until all of this half is stored, or cannot be any more.
    async fn stored(&self) {
        let publisher = self.publisher.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(publisher) = publisher {
            publisher.stored().await;
        }
    }

    /// Waits a moment for the watch to show the object, so that the status can be written.
    async fn wait_until_seen(&mut self) {
        let wait = async { while self.seen().migration.is_none() && !self.seen().gone && self.changed().await {} };
        if tokio::time::timeout(Duration::from_secs(20), wait).await.is_err() {
            tracing::info!("the migration is not seen yet: its status is not written");
        }
    }

    fn decisions(&self, start: &Start) -> Decisions {
        let seen = self.seen();
        let target = seen
            .migration
            .as_ref()
            .and_then(|m| m.status.as_ref()?.target.clone())
            .and_then(|t| Some((t.pod_name?, t.pod_uid?)));
        let target =
            target.or_else(|| (start.role == Role::Target).then(|| (start.pod_name.clone(), start.pod_uid.clone())));
        let generation = seen.migration.as_ref().and_then(|m| m.metadata.generation);
        Decisions::new(self.ctx.client.clone(), self.whose.clone(), target, generation)
    }

    /// Waits until the watch shows that the migration is committed.
    async fn sees_commit(&self) {
        let committed = |seen: &Seen| {
            seen.migration.as_deref().and_then(hand_over::decided_in) == Some(hand_over::Decided::Committed)
        };
        // Without a watch nothing is seen.
        if self.observed.clone().wait_for(committed).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Lets the decision of the object stop the forward steps of a session.
    fn follow_decision(&self, ledger: &Ledger) -> tokio::task::AbortHandle {
        let (mut observed, stop) = (self.observed.clone(), ledger.stop.clone());
        tokio::spawn(async move {
            loop {
                let seen = observed.borrow_and_update().clone();
                if let Some(m) = &seen.migration
                    && let Some(hand_over::Decided::Aborted(why)) = hand_over::decided_in(m)
                {
                    return stop.give_up(why);
                }
                if seen.gone {
                    return stop.give_up(ledger::Failed::new(Reason::CanceledByUser, "the migration was deleted"));
                }
                if observed.changed().await.is_err() {
                    return;
                }
            }
        })
        .abort_handle()
    }

    /// Whether a pod object with this uid still exists. `None`: not known.
    async fn pod_exists(&self, name: &str, uid: &str) -> Option<bool> {
        let pods: Api<Pod> = Api::namespaced(self.ctx.client.clone(), &self.whose.namespace);
        let pod = tokio::time::timeout(Duration::from_secs(5), pods.get_opt(name))
            .await
            .ok()?
            .ok()?;
        Some(pod.is_some_and(|p| p.metadata.uid.as_deref() == Some(uid)))
    }
}

/// Opens the journal of a session for its first record, or as it was left.
async fn open_ledger(ctx: &SessionContext, uid: &str, role: Role) -> Result<Ledger, ledger::Failed> {
    let (uid, faults, metrics) = (uid.to_owned(), ctx.faults.clone(), ctx.metrics.clone());
    let opened = ledger::blocking(move || Journal::open(Path::new(JOURNALS), &uid, role)).await?;
    opened
        .map(|journal| Ledger::new(journal, faults, metrics))
        .map_err(|e| ledger::Failed::because(Reason::StepFailed, &e))
}

/// A session that someone may talk to.
struct Handle {
    observed: watch::Sender<Seen>,
    publisher: Arc<Mutex<Option<Publisher>>>,
    inbound: mpsc::Sender<Inbound>,
    pages: mpsc::Sender<page_link::Incoming>,
}

/// All sessions of this node.
pub struct Sessions {
    ctx: Arc<SessionContext>,
    handles: Mutex<HashMap<(String, Role), Handle>>,
    /// Number of sessions between their first effect and their end.
    busy: watch::Sender<usize>,
    me: Weak<Sessions>,
}

impl Sessions {
    /// None yet.
    #[must_use]
    pub fn new(ctx: SessionContext) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            ctx: Arc::new(ctx),
            handles: Mutex::new(HashMap::new()),
            busy: watch::channel(0).0,
            me: me.clone(),
        })
    }

    /// Goes on with what an earlier agent left. To be called before anything else; needs no API server: a source that may
    /// go back does so at once. Returns when every unfinished session has a task again.
    pub async fn recover(&self) {
        let found = ledger::blocking(|| journal::all(Path::new(JOURNALS))).await;
        let journals = match found {
            Ok(Ok(journals)) => journals,
            Ok(Err(error)) => {
                tracing::error!(error = crate::error::chain(&error), "failed to list the journals");
                return;
            }
            Err(error) => {
                tracing::error!(%error, "failed to list the journals");
                return;
            }
        };
        for (uid, role) in journals {
            match open_ledger(&self.ctx, &uid, role).await {
                Ok(ledger) => self.resume(&uid, role, ledger).await,
                // Nothing is guessed from a damaged journal. What it froze stays frozen until a person looks.
                Err(error) => tracing::error!(uid, role = role.as_str(), %error, "failed to read a journal"),
            }
        }
        if let Some(me) = self.me.upgrade() {
            tokio::spawn(me.sweep());
        }
    }

    async fn resume(&self, uid: &str, role: Role, ledger: Ledger) {
        let records = ledger.records();
        let plan = plan(&records);
        let Some(Record::Start(start)) = records.into_iter().next() else {
            remove_journal(uid, role).await;
            return;
        };
        if plan == Plan::Nothing {
            remove_journal(uid, role).await;
            return;
        }
        tracing::info!(
            uid,
            role = role.as_str(),
            ?plan,
            "going on with a session of an earlier agent"
        );
        let whose = Whose {
            namespace: start.namespace.clone(),
            name: start.name.clone(),
            uid: start.uid.clone(),
        };
        self.spawn(whose, role, Some((ledger, start, plan)), None);
    }

    /// Tells of a migration whose source or target is this node. Never blocks.
    pub fn observe(&self, migration: &ProcessMigration) {
        let Some(role) = assignment::role(migration, &self.ctx.node) else {
            return;
        };
        let Some(uid) = migration.metadata.uid.clone() else {
            return;
        };
        let migration = Arc::new(migration.clone());
        {
            let handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(handle) = handles.get(&(uid.clone(), role)) {
                start_publisher(&self.ctx, &handle.publisher, &migration, role);
                handle.observed.send_replace(Seen {
                    migration: Some(migration),
                    gone: false,
                });
                return;
            }
        }
        if assignment::is_finished(&migration) {
            return;
        }
        let whose = Whose {
            namespace: migration.metadata.namespace.clone().unwrap_or_default(),
            name: migration.metadata.name.clone().unwrap_or_default(),
            uid,
        };
        self.spawn(whose, role, None, Some(migration));
    }

    /// Tells that a migration's object is gone.
    pub fn gone(&self, uid: &str) {
        let handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        for role in [Role::Source, Role::Target] {
            if let Some(handle) = handles.get(&(uid.to_owned(), role)) {
                handle.observed.send_modify(|s| s.gone = true);
            }
        }
    }

    /// Publishes what the preflight of the source found. The write follows by itself, and is repeated until it succeeds.
    pub fn report_preflight(&self, migration: &ProcessMigration, report: PreflightReport) {
        let (Some(uid), Some(attempt)) = (
            migration.metadata.uid.clone(),
            migration.status.as_ref().and_then(|s| s.attempt),
        ) else {
            return;
        };
        self.observe(migration);
        let handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(handle) = handles.get(&(uid, Role::Source)) else {
            return;
        };
        if let Some(p) = handle.publisher.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            p.change(|half| {
                half.source.checks = report.checks;
                half.source.memory_bytes = report.memory_bytes;
                half.source.predicted_freeze_milliseconds = report.predicted_freeze_milliseconds;
                half.source.checked_attempt = Some(attempt);
            });
        }
    }

    /// Sessions between their first effect and their end.
    #[must_use]
    pub fn active(&self) -> usize {
        *self.busy.borrow()
    }

    /// SIGTERM: waits until no session is in the middle of something, at most this long. What is left is recovered by the
    /// next agent.
    pub async fn shutdown(&self, within: Duration) {
        let mut busy = self.busy.subscribe();
        if tokio::time::timeout(within, busy.wait_for(|n| *n == 0)).await.is_err() {
            tracing::warn!("leaving in the middle of a session: the next agent goes on with it");
        }
    }

    /// Takes connections of peers until the listener fails.
    pub async fn listen(self: Arc<Self>, listener: TcpListener) {
        // Every connection costs a handshake: more at once wait.
        let room = Arc::new(tokio::sync::Semaphore::new(16));
        loop {
            let Ok(permit) = room.clone().acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((tcp, from)) => {
                    let me = self.clone();
                    tokio::spawn(async move {
                        me.take(tcp, from).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "failed to take a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn take(&self, tcp: TcpStream, from: SocketAddr) {
        let Some(tls) = self.ctx.tls.borrow().clone() else {
            tracing::warn!(%from, "a peer connects before this agent has a certificate");
            return;
        };
        let (mut link, names) = match peer::accept(&tls, tcp, from).await {
            Ok(Accepted::Session(link, names)) => (link, names),
            Ok(Accepted::Pages(incoming)) => return self.take_pages(incoming, from).await,
            Err(error) => {
                tracing::warn!(%from, error = crate::error::chain(&error), "refused a connection");
                return;
            }
        };
        let offer = match tokio::time::timeout(OFFER, link.events.recv()).await {
            Ok(Some(Event::Message(machine::Output::Offer(offer)))) => offer,
            Ok(_) => {
                let why = link.end.reason().unwrap_or_default();
                tracing::warn!(%from, error = why, "a peer did not make an offer");
                return;
            }
            Err(_) => return,
        };
        let session = {
            let handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
            handles
                .get(&(offer.uid.clone(), Role::Target))
                .map(|h| h.inbound.clone())
        };
        let say = link.say.clone();
        let refused = match session {
            Some(session) => session.try_send(Inbound { link, offer, names }).err().map(|e| match e {
                mpsc::error::TrySendError::Full(i) | mpsc::error::TrySendError::Closed(i) => i.link,
            }),
            None => Some(link),
        };
        if let Some(mut link) = refused {
            let message = "this node has no such migration";
            tracing::warn!(%from, message, "refused an offer");
            refuse(&say, Reason::PeerRefused, message).await;
            drop(say);
            let _ = tokio::time::timeout(Duration::from_secs(2), link.end.wait()).await;
        }
    }

    /// A connection for pages belongs to a session that is receiving.
    async fn take_pages(&self, incoming: page_link::Incoming, from: SocketAddr) {
        let session = {
            let handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
            let handle = handles.get(&(incoming.offer().uid.clone(), Role::Target));
            handle.map(|h| h.pages.clone())
        };
        let refused = match session {
            Some(session) => session.try_send(incoming).err().map(|e| match e {
                mpsc::error::TrySendError::Full(i) | mpsc::error::TrySendError::Closed(i) => i,
            }),
            None => Some(incoming),
        };
        if let Some(incoming) = refused {
            tracing::warn!(%from, "refused a connection for pages");
            incoming.refuse("this node receives no such migration").await;
        }
    }

    fn spawn(
        &self,
        whose: Whose,
        role: Role,
        recovered: Option<(Ledger, Start, Plan)>,
        migration: Option<Arc<ProcessMigration>>,
    ) {
        let Some(me) = self.me.upgrade() else { return };
        let publisher = Arc::new(Mutex::new(None));
        if let Some(migration) = &migration {
            start_publisher(&self.ctx, &publisher, migration, role);
        }
        let (observed, receiver) = watch::channel(Seen { migration, gone: false });
        let (inbound, inbound_receiver) = mpsc::channel(INBOUND);
        let (pages, pages_receiver) = mpsc::channel(usize::try_from(protocol::pages::STREAMS).unwrap_or(1));
        let key = (whose.uid.clone(), role);
        let task = Task {
            ctx: self.ctx.clone(),
            whose,
            observed: receiver,
            publisher: publisher.clone(),
            inbound: inbound_receiver,
            pages: Some(pages_receiver),
            hurry: Arc::default(),
        };
        let handle = Handle {
            observed,
            publisher,
            inbound,
            pages,
        };
        self.handles
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(key.clone(), handle);
        tokio::spawn(async move {
            let whose = task.whose.clone();
            let busy = Busy(me.busy.clone());
            let done = tokio::spawn(async move {
                match role {
                    Role::Source => source::run(task, recovered, busy).await,
                    Role::Target => target::run(task, recovered, busy).await,
                }
            });
            let crashed = done.await.is_err();
            // The buffers of a transfer would stay with the allocator: an agent at rest is small.
            drop(tokio::task::spawn_blocking(hostsys::warm_memory::give_back));
            me.handles.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
            if crashed {
                tracing::error!(
                    uid = whose.uid,
                    role = role.as_str(),
                    "a session crashed; recovering it from its journal"
                );
                if let Ok(ledger) = open_ledger(&me.ctx, &whose.uid, role).await {
                    me.resume(&whose.uid, role, ledger).await;
                }
            }
        });
    }

    /// Removes the markers of pods whose objects are gone.
    async fn sweep(self: Arc<Self>) {
        loop {
            let pods: Api<Pod> = Api::all(self.ctx.client.clone());
            let here = ListParams::default().fields(&format!("spec.nodeName={}", self.ctx.node));
            match pods.list(&here).await {
                Ok(list) => {
                    let uids: Vec<String> = list.items.into_iter().filter_map(|p| p.metadata.uid).collect();
                    let active: Vec<String> = {
                        let handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
                        handles.keys().map(|(uid, _)| uid.clone()).collect()
                    };
                    // A source that is not settled removes its own marker.
                    if active.is_empty()
                        && let Err(error) = ledger::blocking(move || remove_markers(&uids)).await
                    {
                        tracing::warn!(%error, "failed to remove old markers");
                    }
                }
                Err(error) => tracing::warn!(error = crate::error::chain(&error), "failed to list this node's pods"),
            }
            tokio::time::sleep(SWEEP).await;
        }
    }
}

fn remove_markers(alive: &[String]) {
    for folder in [COMMITTED_DIR, MOVED_AWAY_DIR] {
        let Ok(entries) = std::fs::read_dir(folder) else {
            continue;
        };
        for entry in entries.flatten() {
            let known = entry.file_name().to_str().is_some_and(|n| alive.iter().any(|a| a == n));
            if !known && let Err(error) = std::fs::remove_file(entry.path()) {
                tracing::warn!(path = %entry.path().display(), %error, "failed to remove a marker");
            }
        }
    }
}

/// Writes an empty file that outlives a reboot.
fn write_marker(path: &Path) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(folder)?;
    std::fs::File::create(path)?.sync_all()?;
    std::fs::File::open(folder)?.sync_all()
}

fn start_publisher(
    ctx: &SessionContext,
    slot: &Mutex<Option<Publisher>>,
    migration: &Arc<ProcessMigration>,
    role: Role,
) {
    let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
    if slot.is_some() {
        return;
    }
    let whose = Whose {
        namespace: migration.metadata.namespace.clone().unwrap_or_default(),
        name: migration.metadata.name.clone().unwrap_or_default(),
        uid: migration.metadata.uid.clone().unwrap_or_default(),
    };
    *slot = Some(Publisher::start(
        &ctx.client,
        whose,
        role,
        Half::stored(migration, role),
        migration.metadata.generation,
    ));
}

async fn refuse(say: &mpsc::Sender<FromTarget>, reason: Reason, message: &str) {
    let refuse = FromTarget::Refuse {
        reason: reason.as_str().to_owned(),
        message: message.to_owned(),
    };
    if say.send(refuse).await.is_err() {
        tracing::debug!("the peer left before it was refused");
    }
}

async fn remove_journal(uid: &str, role: Role) {
    let uid = uid.to_owned();
    match ledger::blocking(move || Journal::remove(Path::new(JOURNALS), &uid, role)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(error = crate::error::chain(&error), "failed to remove a journal"),
        Err(error) => tracing::warn!(%error, "failed to remove a journal"),
    }
}

/// Counts a session while it has effects on the host.
struct Busy(watch::Sender<usize>);

impl Busy {
    /// From the first effect on.
    fn begin(&self) -> Working {
        self.0.send_modify(|n| *n += 1);
        Working(self.0.clone())
    }
}

/// A session that has effects.
struct Working(watch::Sender<usize>);

impl Drop for Working {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n = n.saturating_sub(1));
    }
}
