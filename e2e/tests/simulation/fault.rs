//! What goes wrong, and when.

use node_agent::decide::step::Step;
use node_agent::fault::When;

/// When a fault strikes. Each strikes once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Trigger {
    /// As a step has begun, before its effect; or right behind it.
    Step(Step, When),
    /// So many milliseconds after the beginning.
    Time(u64),
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Action {
    /// The step fails. (At a time: nothing.)
    Fail,
    /// The step hangs until its deadline, or until the attempt is given up.
    Hang,
    /// The effect happens twice.
    Repeat,
    /// SIGKILL of the agent whose step it is, or of this node's.
    Kill(Whose),
    /// Power loss of the node for so long.
    Reboot(Whose, u64),
    /// Requests of everybody are applied, the replies are lost, for so long.
    LoseReplies(u64),
    /// Requests of everybody do not reach the API server, for so long.
    ApiDown(u64),
    /// The agents do not reach each other for so long.
    Cut(u64),
    /// Watches deliver late by this much, for a minute.
    LateWatches(u64),
    /// The leading operator ends; the next leads a little later.
    KillOperator,
    /// The user sets spec.desiredState to Canceled.
    Cancel,
    /// The user deletes the pod that is moved.
    DeletePod,
    /// The user deletes the migration.
    DeleteMigration,
    /// Somebody takes the migration's finalizers away and deletes it.
    ForceDelete,
    /// Somebody deletes the target pod.
    DeleteTarget,
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    Source,
    Target,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Fault {
    pub(crate) at: Trigger,
    pub(crate) action: Action,
}

/// A rule that an agent breaks: the simulation must see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    None,
    /// An unknown decision counts as Aborted.
    UnknownIsAborted,
    /// An unknown decision counts as Committed.
    UnknownIsCommitted,
    /// A session begins from what a watch delivered, without asking the API server whether it is still so.
    BeginsUnasked,
    /// Only a shepherd marks a pod as committed; after a reboot there is none.
    OnlyShepherdMarks,
    /// The source's pod is not marked before the target may commit.
    NoMarkBeforeCommit,
    /// The source goes on without the repair of interrupted calls.
    NoRepair,
}

/// What a step is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strike {
    None,
    Fail,
    Hang,
    Repeat,
    Die,
}
