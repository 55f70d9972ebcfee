//! Keeps the installation as it is wanted: in place, or undone while an uninstall is asked for (a key in a ConfigMap that
//! the chart's pre-delete job sets). Looks again now and then: packages are upgraded and files overwritten.

use std::time::Duration;

use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::timeout;

use super::undo::{self, undo};
use super::{Error, install};
use crate::host::Host;
use crate::node_status::{Installation, Known};
use crate::probe;

/// How often installation and probe are looked at again while all is well: it costs CRIU, runc and containerd a start each.
const INTERVAL: Duration = Duration::from_secs(600);
/// How often they are while something is missing: people install it and want to see it.
const SOON: Duration = Duration::from_secs(60);
/// How often the free memory is looked at.
const MEMORY_INTERVAL: Duration = Duration::from_secs(30);

/// How much memory checkpoints may use.
#[derive(Clone, Copy, Debug)]
pub struct MemoryShare {
    /// Share of the available memory.
    pub percent: u8,
    /// And at most so many bytes.
    pub at_most: Option<u64>,
}

/// Follows the request to uninstall. Unknown (the API cannot be reached) is not a request.
pub async fn follow_uninstall_request(client: Client, namespace: String, requested: watch::Sender<bool>) {
    let maps: Api<ConfigMap> = Api::namespaced(client, &namespace);
    let config = watcher::Config::default().fields(&format!("metadata.name={}", crds::names::CONFIG_MAP_UNINSTALL));
    let mut events = watcher(maps, config).default_backoff().boxed();
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Apply(map) | watcher::Event::InitApply(map)) => {
                let asked = map
                    .data
                    .is_some_and(|data| data.contains_key(crds::names::UNINSTALL_KEY));
                requested.send_if_modified(|now| std::mem::replace(now, asked) != asked);
            }
            // The release is being deleted: the agent ends soon, and has been asked before or never will be.
            Ok(watcher::Event::Delete(_) | watcher::Event::Init | watcher::Event::InitDone) => {}
            Err(error) => tracing::debug!(%error, "the watch of the uninstall request begins again"),
        }
    }
}

/// Keeps installation and probe in `known` up to date. Never returns.
pub async fn keep(host: Host, mut uninstall: watch::Receiver<bool>, known: watch::Sender<Known>) {
    let mut failures = 0u32;
    loop {
        let wanted_gone = *uninstall.borrow_and_update();
        let wait = if wanted_gone {
            take_away(&known).await
        } else {
            put_in_place(&host, &known, &mut failures).await
        };
        // A new request is looked at immediately; an ended sender means that the agent ends.
        if matches!(timeout(wait, uninstall.changed()).await, Ok(Err(_))) {
            tokio::time::sleep(wait).await;
        }
    }
}

/// Keeps the memory limit in `known` up to date. Never returns.
pub async fn follow_memory(known: watch::Sender<Known>, share: MemoryShare) {
    loop {
        let limit = probe::memory::limit_now(share.percent, share.at_most);
        known.send_if_modified(|k| {
            let worth_telling = probe::memory::differs(k.checkpoint_limit_bytes, limit);
            if worth_telling {
                k.checkpoint_limit_bytes = limit;
            }
            worth_telling
        });
        tokio::time::sleep(MEMORY_INTERVAL).await;
    }
}

async fn put_in_place(host: &Host, known: &watch::Sender<Known>, failures: &mut u32) -> Duration {
    let (installation, wait) = match install(host).await {
        Ok(installed) => {
            *failures = 0;
            (Installation::Done(installed), INTERVAL)
        }
        Err(error) => {
            let text = crate::error::chain(&error);
            *failures = failures.saturating_add(1);
            tracing::warn!(error = text, failures, "not installed");
            let wait = match error {
                Error::Busy(_) => Duration::from_secs(2),
                _ => Duration::from_secs(1 << (*failures).min(6)),
            };
            (Installation::Failed(text), wait)
        }
    };
    let (oci, criu) = match &installation {
        Installation::Done(installed) => (Some(installed.oci_runtime.clone()), installed.criu.clone()),
        _ => (None, super::criu::in_place()),
    };
    let probe = tokio::task::spawn_blocking(move || probe::everything(oci.as_deref(), criu.as_ref()))
        .await
        .ok();
    let complete = probe.as_ref().is_some_and(|p| p.missing.is_empty());
    known.send_modify(|k| {
        k.installation = installation;
        if probe.is_some() {
            k.probe = probe;
            k.probed_at = Some(Timestamp::now());
        }
    });
    if complete { wait } else { wait.min(SOON) }
}

async fn take_away(known: &watch::Sender<Known>) -> Duration {
    if matches!(known.borrow().installation, Installation::Uninstalled(_)) {
        return INTERVAL;
    }
    known.send_modify(|k| k.installation = Installation::Uninstalling("it was asked for".to_owned()));
    match undo().await {
        Ok(undone) => {
            tracing::info!(detail = undone.message(), "uninstalled");
            known.send_modify(|k| k.installation = Installation::Uninstalled(undone.message()));
            INTERVAL
        }
        Err(error) => {
            let text = crate::error::chain(&error);
            let waits = matches!(error, undo::Error::UnderWay(_));
            tracing::warn!(error = text, "not uninstalled yet");
            known.send_modify(|k| k.installation = Installation::Uninstalling(text));
            Duration::from_secs(if waits { 1 } else { 5 })
        }
    }
}
