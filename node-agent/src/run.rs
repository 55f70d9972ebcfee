//! The agent's life: recover, supervise, watch its own work, leave in order.
//!
//! ```text
//! probe ─> sessions recover ─┬─> installation, probe  ─┐
//! (no API needed)            ├─> identity             ─┼─> MigrationNode
//!                            ├─> heartbeat             ┘
//!                            ├─> peers
//!                            └─> watches ─> sessions, preflight
//! SIGTERM: no new work; a freeze is ended first.
//! ```

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::admin::{self, Admin};
use crate::args::RunArgs;
use crate::context;
use crate::decide::assignment;
use crate::fault::Faults;
use crate::host::Host;
use crate::identity::Keeper;
use crate::install::keep::{self, MemoryShare};
use crate::metrics::Metrics;
use crate::node_status::{self, About, Known};
use crate::preflight::Preflights;
use crate::probe;
use crate::session::{SessionContext, Sessions};
use crate::watches::{self, Half, Seen};

/// How long SIGTERM waits for the end of what is under way; the pod's grace period is longer.
const LEAVING: Duration = Duration::from_secs(20);

/// Why the agent ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No API client.
    #[error(transparent)]
    Context(#[from] context::Error),
    /// A port is taken.
    #[error("failed to listen on port {0}")]
    Listen(u16, #[source] std::io::Error),
    /// Signals.
    #[error("failed to wait for signals")]
    Signals(#[source] std::io::Error),
    /// A fault that is not allowed, or not one.
    #[error("PEREGRINE_FAULT: {0}")]
    Fault(String),
    /// A part that never ends has ended.
    #[error("a part of the agent ended unexpectedly: {0}")]
    Ended(String),
}

/// Runs until SIGTERM.
///
/// # Errors
/// See [`Error`].
pub async fn run(args: RunArgs, host: Host) -> Result<(), Error> {
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signals)?;
    let client = context::client(&args, &host).await?;
    let about = About {
        node: args.node_name.clone(),
        namespace: args.namespace.clone(),
        endpoint: args
            .advertise_address
            .map(|ip| SocketAddr::new(ip, args.peer_port).to_string()),
        protocol_versions: protocol::version::VERSIONS.to_vec(),
    };
    tracing::info!(
        node = about.node,
        version = env!("CARGO_PKG_VERSION"),
        endpoint = about.endpoint.as_deref().unwrap_or_default(),
        "starting"
    );
    let share = MemoryShare {
        percent: args.checkpoint_share_percent,
        at_most: args.checkpoint_limit_bytes,
    };
    let known = watch::Sender::new(Known {
        probe: None,
        checkpoint_limit_bytes: probe::memory::limit_now(share.percent, share.at_most),
        ..Known::default()
    });
    let metrics = Arc::new(Metrics::default());
    let mut parts = JoinSet::new();

    let keeper = Keeper::new(client.clone(), about.node.clone(), about.namespace.clone());
    let (room, checkpoint_limit_bytes) = watch::channel(known.borrow().checkpoint_limit_bytes);
    let preflight_limit = checkpoint_limit_bytes.clone();
    let sessions = Sessions::new(SessionContext {
        client: client.clone(),
        node: about.node.clone(),
        tls: keeper.tls(),
        checkpoint_limit_bytes,
        destroys_sockets: hostsys::sock_diag::can_destroy(),
        faults: faults(&args)?,
        metrics: metrics.clone(),
    });
    if let Err(error) = hostsys::rcu::calm_down() {
        tracing::warn!(%error, "an earlier agent has left the kernel in a hurry (/sys/kernel/rcu_expedited)");
    }
    // Before anything else: a source that an earlier agent has left frozen must not wait for the API server.
    sessions.recover().await;
    parts.spawn(follow_limit(known.subscribe(), room));
    let peers = TcpListener::bind((Ipv6Addr::UNSPECIFIED, args.peer_port));
    let peers = match peers.await {
        Ok(peers) => peers,
        // A kernel without IPv6.
        Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, args.peer_port))
            .await
            .map_err(|e| Error::Listen(args.peer_port, e))?,
    };
    parts.spawn(sessions.clone().listen(peers));
    let preflights = Arc::new(Preflights::new(
        client.clone(),
        about.node.clone(),
        preflight_limit,
        metrics.clone(),
    ));
    // Apart, because they end first.
    let mut watched = JoinSet::new();
    for half in [Half::Source, Half::Target] {
        let (node, sessions, preflights) = (about.node.clone(), sessions.clone(), preflights.clone());
        watched.spawn(watches::follow(client.clone(), about.node.clone(), half, move |seen| {
            attend(&node, seen, &sessions, &preflights)
        }));
    }

    let not_ready = watch::Sender::new(Some("starting".to_owned()));
    let listener = admin::listen(args.admin_port)
        .await
        .map_err(|e| Error::Listen(args.admin_port, e))?;
    parts.spawn(admin::serve(
        listener,
        Admin {
            not_ready: not_ready.subscribe(),
            metrics: metrics.clone(),
        },
    ));

    let mut identity = keeper.state();
    parts.spawn(keeper.run());
    parts.spawn({
        let known = known.clone();
        async move {
            loop {
                let state = identity.borrow_and_update().clone();
                known.send_modify(|k| k.identity = state);
                if identity.changed().await.is_err() {
                    return;
                }
            }
        }
    });
    parts.spawn(follow_readiness(known.subscribe(), about.clone(), not_ready));
    parts.spawn(node_status::publish(
        client.clone(),
        about.clone(),
        known.subscribe(),
        metrics.clone(),
    ));
    parts.spawn(node_status::heartbeat(
        client.clone(),
        about.clone(),
        known.subscribe(),
        metrics.clone(),
    ));

    let uninstall = watch::Sender::new(false);
    let requested = uninstall.subscribe();
    parts.spawn(keep::follow_uninstall_request(
        client.clone(),
        about.namespace.clone(),
        uninstall,
    ));
    parts.spawn(keep::keep(host, requested, known.clone()));
    parts.spawn(keep::follow_memory(known.clone(), share));

    let ended = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        part = parts.join_next() => Some(part),
    };
    match ended {
        None => {
            tracing::info!(sessions = sessions.active(), "leaving");
            // No new work; heartbeat and identity go on until the last session is at rest.
            watched.abort_all();
            sessions.shutdown(LEAVING).await;
            Ok(())
        }
        Some(part) => Err(Error::Ended(match part {
            Some(Err(error)) => error.to_string(),
            Some(Ok(())) | None => "without an error".to_owned(),
        })),
    }
}

/// What an event of a watch means for sessions and preflights.
fn attend(node: &str, seen: Seen, sessions: &Arc<Sessions>, preflights: &Arc<Preflights>) {
    match seen {
        Seen::Present(migration) => {
            sessions.observe(&migration);
            if assignment::needs_preflight(&migration, node) && preflights.begin(&migration) {
                let (sessions, preflights) = (sessions.clone(), preflights.clone());
                tokio::spawn(async move {
                    let report = preflights.run(&migration).await;
                    sessions.report_preflight(&migration, report);
                });
            }
        }
        Seen::Gone(migration) => {
            let uid = migration.metadata.uid.as_deref().unwrap_or_default();
            sessions.gone(uid);
            preflights.forget(uid);
        }
    }
}

/// The faults of tests, where they are allowed.
fn faults(args: &RunArgs) -> Result<Faults, Error> {
    let wanted = std::env::var("PEREGRINE_FAULT").ok();
    if args.enable_fault_injection {
        return Faults::enabled(wanted.as_deref()).map_err(Error::Fault);
    }
    if wanted.is_some() {
        return Err(Error::Fault(
            "it is for tests only: use --enable-fault-injection".to_owned(),
        ));
    }
    Ok(Faults::none())
}

/// Tells the sessions how much memory checkpoints may take.
async fn follow_limit(mut known: watch::Receiver<Known>, room: watch::Sender<u64>) {
    loop {
        room.send_replace(known.borrow_and_update().checkpoint_limit_bytes);
        if known.changed().await.is_err() {
            return;
        }
    }
}

/// Tells the admin endpoint what the MigrationNode says.
async fn follow_readiness(mut known: watch::Receiver<Known>, about: About, not_ready: watch::Sender<Option<String>>) {
    loop {
        let why = node_status::not_ready(&known.borrow_and_update(), &about);
        not_ready.send_replace((!why.is_empty()).then(|| why.join("; ")));
        if known.changed().await.is_err() {
            return;
        }
    }
}
