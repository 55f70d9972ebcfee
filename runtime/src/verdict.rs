//! What to do with a call: pure, over plain data.

use protocol::hand_off::State;

use crate::spec::Role;

/// What is known about the container that a call names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The shepherd's last state.
    pub state: State,
    /// Whether the shepherd lives.
    pub alive: bool,
}

/// What to do with a call that is not `create`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It becomes a call of the node's runtime, unchanged.
    PassThrough,
    /// Nothing to do: success. The restored processes run since the commit, by the agent's hand.
    Started,
    /// The state, answered for the shepherd.
    State,
    /// End the shepherd and what it restores.
    End,
    /// Remove all; what may live of the container is killed first.
    Delete {
        /// The container exists for the runtime below as well.
        below: bool,
    },
    /// The processes, answered for the shepherd.
    Processes,
    /// Cannot be done before the restore.
    NotYet,
}

/// Decides over a call that is not `create`.
#[must_use]
pub fn of_call(verb: &str, standing: Option<&Standing>) -> Verdict {
    let Some(standing) = standing else {
        return Verdict::PassThrough;
    };
    let restored = match standing.state {
        // Ended keeps no trace of how far it came; the runtime below is asked in any case.
        State::Held { .. } | State::Committed { .. } | State::Ended => true,
        State::Waiting | State::Restoring | State::Failed { .. } => false,
    };
    match (verb, restored) {
        ("start", _) => Verdict::Started,
        ("delete", below) => Verdict::Delete { below },
        // A shepherd that died takes what it held with it: nobody else would end it before the commit, and after it
        // containerd takes the container for dead as well.
        ("kill", false) => Verdict::End,
        ("kill", true) if !standing.alive => Verdict::End,
        (_, true) => Verdict::PassThrough,
        ("state", false) => Verdict::State,
        ("ps", false) => Verdict::Processes,
        ("exec" | "events" | "update" | "pause" | "resume" | "checkpoint" | "restore", false) => Verdict::NotYet,
        // `list`, `features` and what is unknown concern no single container.
        (_, false) => Verdict::PassThrough,
    }
}

/// What is known when a container is to be created.
#[derive(Clone, Copy, Debug)]
pub struct Creation<'a> {
    /// Sandbox or container.
    pub role: Role,
    /// The annotation that marks a target.
    pub target_of: Option<&'a str>,
    /// The pod's processes were moved to another node.
    pub moved_away: bool,
    /// The migration into this pod was committed.
    pub committed: bool,
}

/// What to do with `create`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateVerdict {
    /// Unchanged.
    PassThrough,
    /// Unchanged, after Multipath TCP is switched off in its network namespace.
    Sandbox,
    /// Refused: it runs elsewhere.
    MovedAway,
    /// Wait for the hand-off and start a shepherd.
    Target,
}

/// Decides over `create`.
#[must_use]
pub fn of_create(creation: Creation<'_>) -> CreateVerdict {
    match creation {
        Creation { moved_away: true, .. } => CreateVerdict::MovedAway,
        Creation {
            role: Role::Sandbox, ..
        } => CreateVerdict::Sandbox,
        // After the commit the pod is an ordinary one, which the kubelet may restart.
        Creation {
            target_of: Some(_),
            committed: false,
            ..
        } => CreateVerdict::Target,
        Creation { .. } => CreateVerdict::PassThrough,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_without_a_shepherd_pass() {
        for verb in ["start", "delete", "kill", "state", "exec", "ps", "list", "unknown"] {
            assert_eq!(of_call(verb, None), Verdict::PassThrough);
        }
    }

    #[test]
    fn calls_for_a_shepherd() {
        use Verdict::{Delete, End, NotYet, PassThrough, Processes, Started};
        let (held, committed) = (State::Held { pid: 2 }, State::Committed { pid: 2 });
        let failed = State::Failed { message: String::new() };
        for (verb, state, alive, expected) in [
            ("start", State::Waiting, true, Started),
            ("start", committed.clone(), true, Started),
            ("state", State::Waiting, true, Verdict::State),
            ("state", held.clone(), true, PassThrough),
            ("kill", State::Waiting, true, End),
            ("kill", State::Restoring, true, End),
            ("kill", failed.clone(), true, End),
            ("kill", held.clone(), true, PassThrough),
            ("kill", held.clone(), false, End),
            ("kill", committed.clone(), true, PassThrough),
            ("exec", State::Waiting, true, NotYet),
            ("exec", committed.clone(), true, PassThrough),
            ("update", State::Restoring, true, NotYet),
            ("ps", State::Waiting, true, Processes),
            ("delete", State::Waiting, false, Delete { below: false }),
            ("delete", committed, false, Delete { below: true }),
            ("delete", State::Ended, false, Delete { below: true }),
            ("features", State::Waiting, true, PassThrough),
        ] {
            let standing = Standing { state, alive };
            assert_eq!(of_call(verb, Some(&standing)), expected, "{verb} {standing:?}");
        }
    }

    #[test]
    fn a_target_never_passes_before_the_commit() {
        use CreateVerdict::{MovedAway, PassThrough, Sandbox, Target};
        for (role, target_of, moved_away, committed, expected) in [
            (Role::Container, None, false, false, PassThrough),
            (Role::Container, Some("m"), false, false, Target),
            (Role::Other, Some("m"), false, false, Target),
            (Role::Container, Some(""), false, false, Target),
            (Role::Container, Some("m"), false, true, PassThrough),
            (Role::Container, Some("m"), true, true, MovedAway),
            (Role::Container, None, true, false, MovedAway),
            (Role::Sandbox, Some("m"), false, false, Sandbox),
            (Role::Sandbox, None, true, false, MovedAway),
        ] {
            let creation = Creation {
                role,
                target_of,
                moved_away,
                committed,
            };
            assert_eq!(of_create(creation), expected, "{creation:?}");
        }
    }
}
