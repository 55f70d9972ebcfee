//! Sessions: an attempt of a migration on this node, in one role. One task owns it, from its first journal record until
//! nothing of it is left.
//!
//! Interface to `run.rs` (kept stable; the other modules below are private to sessions):
//! ```text
//! let sessions = Sessions::new(SessionContext {
//!     client: kube::Client,                      // the agent's own service account
//!     node: String,                              // name of this node
//!     tls: watch::Receiver<Option<PeerTls>>,     // peer::PeerTls { server: Arc<ServerConfig>, client: Arc<ClientConfig> };
//!                                                // None until the first certificate; rotated by identity.rs
//!     checkpoint_limit_bytes: u64,               // most bytes of checkpoints in memory on this node at once
//!     destroys_sockets: bool,                    // probe: SOCK_DESTROY works (CONFIG_INET_DIAG_DESTROY)
//!     fault: Option<fault::Fault>,               // from PEREGRINE_FAULT, only with --enable-fault-injection
//! });
//! sessions.recover().await;                      // before anything else; needs no API server
//! sessions.clone().listen(TcpListener).await     // peers; a task of its own, ends with shutdown()
//! sessions.observe(&migration);                  // for EVERY ProcessMigration event whose source or target node is me; never blocks
//! sessions.gone(&uid);                           // the watch says that the object was deleted
//! sessions.pod_gone(&pod_uid) .pod_seen(..)      // not needed: sessions ask the API themselves
//! sessions.shutdown().await;                     // SIGTERM: waits for the end of a freeze
//!
//! if decide::assignment::needs_preflight(&migration, &node) {       // run.rs does the preflight itself, in a task of its own
//!     let report = …;                                               // PreflightReport {checks, memory_bytes, predicted_freeze_milliseconds}
//!     sessions.report_preflight(&migration, report).await?;         // the one writer of the source half applies it
//! }
//! ```
//! Everything else (target's hand-offs, TargetReady, the session itself, abort, clean-up) happens inside.
