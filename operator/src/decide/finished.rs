//! A settled migration: its finalizer goes, its TTL runs. Nothing else is ever done about it.

use jiff::SignedDuration;

use super::draft::Draft;
use super::effect::Decision;
use super::view::View;
use super::world::World;

/// Decides about a settled migration.
#[must_use]
pub fn decide(world: &World) -> Decision {
    let mut draft = Draft::new(world);
    // The report stays as it was written, also when the TTL is changed.
    draft.view = View::stored(&draft.status, world.migration.metadata.generation, world.now);
    draft.release();
    if world.is_deleting() {
        return draft.done();
    }
    let ended = draft.status.completion_time.as_ref().map(|t| t.0);
    if let (Some(ttl), Some(ended)) = (world.migration.spec.ttl_seconds_after_finished, ended) {
        let end = ended + SignedDuration::from_secs(i64::from(ttl));
        if world.now >= end {
            draft.effects.delete_migration = true;
        } else {
            draft.wake_at(end);
        }
    }
    draft.done()
}
