//! Memory that both sides will need inside the freeze, made ready before it.

use std::time::Duration;

use hostsys::warm_memory::WarmMemory;

use super::ledger::blocking;
use crate::checkpoint;

/// A node whose hypervisor is slow to give memory back still moves the pod, only slower.
const WITHIN: Duration = Duration::from_secs(8);

/// Takes `bytes`, never more than half of what is free. None is no error: then it is taken inside the freeze.
pub(super) async fn warm(bytes: u64) -> Option<WarmMemory> {
    let bytes = bytes.min(checkpoint::available_memory() / 2);
    let taken = blocking(move || WarmMemory::take(bytes, WITHIN)).await.ok()?;
    taken
        .inspect_err(|error| tracing::debug!(%error, bytes, "no memory was made ready before the freeze"))
        .ok()
}
