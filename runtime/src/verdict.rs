//! What to do with a call: pure, over plain data.

use crate::spec::Role;

/// What is known about a container that has a shepherd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// It has been restored: the runtime below knows it.
    pub below: bool,
    /// The migration is committed: its processes are held no longer.
    pub committed: bool,
    /// The shepherd lives.
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
    Delete,
    /// The same for a container that runs: the runtime below decides first, as for any other.
    DeleteRunning,
    /// The processes, answered for the shepherd.
    Processes,
    /// Cannot be done before the restore.
    NotYet,
}

/// Decides over a call that is not `create`.
#[must_use]
pub fn of_call(verb: &str, standing: Option<Standing>) -> Verdict {
    let Some(Standing {
        below,
        committed,
        alive,
    }) = standing
    else {
        return Verdict::PassThrough;
    };
    match verb {
        "start" => Verdict::Started,
        "delete" if below && alive => Verdict::DeleteRunning,
        "delete" => Verdict::Delete,
        // A shepherd that died takes what it held with it: nobody else would end it before the commit, and after it
        // containerd takes the container for dead as well.
        "kill" if !below || !alive => Verdict::End,
        _ if below && committed => Verdict::PassThrough,
        // A held container can be looked at. `resume` would let it run before the commit; `exec` would start into the freeze.
        "exec" | "resume" | "pause" | "update" | "checkpoint" | "restore" => Verdict::NotYet,
        _ if below => Verdict::PassThrough,
        "state" => Verdict::State,
        "ps" => Verdict::Processes,
        "events" => Verdict::NotYet,
        // `list`, `features` and what is unknown concern no single container.
        _ => Verdict::PassThrough,
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
        use Verdict::{Delete, DeleteRunning, End, NotYet, PassThrough, Processes, Started, State};
        // Restored, committed, alive.
        let waiting = (false, false, true);
        let held = (true, false, true);
        let committed = (true, true, true);
        for (verb, (below, committed, alive), expected) in [
            ("start", waiting, Started),
            ("start", committed, Started),
            ("state", waiting, State),
            ("state", (false, false, false), State),
            ("state", held, PassThrough),
            ("kill", waiting, End),
            ("kill", (false, false, false), End),
            ("kill", held, PassThrough),
            ("kill", committed, PassThrough),
            ("kill", (true, false, false), End),
            ("kill", (true, true, false), End),
            ("exec", waiting, NotYet),
            ("exec", held, NotYet),
            ("exec", committed, PassThrough),
            ("resume", waiting, NotYet),
            ("resume", held, NotYet),
            ("resume", committed, PassThrough),
            ("update", held, NotYet),
            ("events", waiting, NotYet),
            ("events", held, PassThrough),
            ("ps", waiting, Processes),
            ("ps", held, PassThrough),
            ("delete", waiting, Delete),
            ("delete", (false, false, false), Delete),
            ("delete", (true, true, false), Delete),
            ("delete", held, DeleteRunning),
            ("delete", committed, DeleteRunning),
            ("features", waiting, PassThrough),
            ("features", committed, PassThrough),
        ] {
            let standing = Standing {
                below,
                committed,
                alive,
            };
            assert_eq!(of_call(verb, Some(standing)), expected, "{verb} {standing:?}");
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
