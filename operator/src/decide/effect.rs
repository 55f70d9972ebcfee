//! All that may be done. Each effect is idempotent and carries its precondition.

use std::collections::BTreeMap;

use crds::Reason;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

use super::view::View;

/// What follows from an observation.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// What is to be done, in the order of the fields.
    pub effects: Effects,
    /// What the operator's part of the status is to say.
    pub view: View,
    /// Whether the view may only be written over the status from which it was decided (a cold commit has no other guard).
    pub guarded: bool,
    /// When to look again if nothing happens before.
    pub wake: Wake,
}

/// When to look again if nothing happens before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Nothing is pending.
    AwaitChange,
    /// A deadline, or the end of a patience.
    At(Timestamp),
}

impl Wake {
    /// The earlier of the two.
    #[must_use]
    pub fn or_at(self, at: Timestamp) -> Wake {
        match self {
            Wake::AwaitChange => Wake::At(at),
            Wake::At(present) => Wake::At(present.min(at)),
        }
    }
}

/// What is to be done. `act` destructures it: an effect that nobody applies does not compile.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Effects {
    /// Change of our finalizer.
    pub finalizer: Option<FinalizerChange>,
    /// Set the decision to Undecided where there is none.
    pub open_decision: bool,
    /// Swap the decision from Undecided to Aborted.
    pub abort: Option<Cause>,
    /// Ask whether the target pod would be accepted.
    pub try_target: Option<Box<Pod>>,
    /// Create the target pod.
    pub create_target: Option<Box<Pod>>,
    /// Make the target pod the user's.
    pub hand_over: Option<HandOver>,
    /// Delete the source pod.
    pub delete_source: Option<DeletePod>,
    /// Delete the target pod.
    pub delete_target: Option<DeletePod>,
    /// Delete the migration, whose TTL is over.
    pub delete_migration: bool,
}

impl Effects {
    /// What every replica may do, leading or not: end a source that was released. A source node that crashes right after the
    /// commit and takes the leader with it would else start the source anew as soon as its kubelet is back, long before
    /// another replica leads. Both effects carry their preconditions, so that doing them twice is harmless.
    #[must_use]
    pub fn of_any_replica(self) -> Effects {
        Effects {
            hand_over: self.hand_over,
            delete_source: self.delete_source,
            ..Effects::default()
        }
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Effects::default()
    }
}

/// Change of our finalizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinalizerChange {
    /// Hold the migration.
    Add,
    /// Let it go.
    Remove,
}

/// Why an attempt ends before the commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// The reason.
    pub reason: Reason,
    /// One sentence that names the cause.
    pub message: String,
}

impl Cause {
    /// Builds a cause.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Cause {
            reason,
            message: message.into(),
        }
    }
}

/// The target pod becomes the user's: labels, and our owner reference goes.
#[derive(Clone, Debug, PartialEq)]
pub struct HandOver {
    /// The pod.
    pub name: String,
    /// Its uid: precondition.
    pub uid: String,
    /// Its version: precondition, since a list of owners is replaced.
    pub resource_version: String,
    /// Labels to set.
    pub labels: BTreeMap<String, String>,
    /// Owners to set.
    pub owners: Vec<OwnerReference>,
}

/// Deletion of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeletePod {
    /// The pod.
    pub name: String,
    /// Its uid: precondition.
    pub uid: String,
    /// Grace in seconds; absent: the pod's own. 0 removes the object without waiting for its kubelet.
    pub grace: Option<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_that_does_not_lead_only_ends_a_released_source() {
        let victim = DeletePod {
            name: "p".to_owned(),
            uid: "u".to_owned(),
            grace: Some(0),
        };
        let all = Effects {
            finalizer: Some(FinalizerChange::Remove),
            open_decision: true,
            abort: Some(Cause::new(Reason::PodDeleted, "gone")),
            delete_source: Some(victim.clone()),
            delete_target: Some(victim.clone()),
            delete_migration: true,
            ..Effects::default()
        };
        let expected = Effects {
            delete_source: Some(victim),
            ..Effects::default()
        };
        assert_eq!(all.of_any_replica(), expected);
    }
}
