//! What a session does, step by step. A record stands in the journal as a step begins and as it ends; faults are injected
//! before and after its effect; deadlines belong to steps.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Which half of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The node that has the pod.
    Source,
    /// The node that will have it.
    Target,
}

impl Role {
    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident $text:literal $role:ident $deadline:literal,)*) => {
        /// The steps of both roles, in their order.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Step { $($(#[$doc])* $name,)* }

        impl Step {
            /// All steps.
            pub const ALL: &[Step] = &[$(Step::$name,)*];

            /// Its name: role, dot, step.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Step::$name => $text,)* }
            }

            /// Whose step it is.
            #[must_use]
            pub fn role(self) -> Role {
                match self { $(Step::$name => Role::$role,)* }
            }

            /// How long it may take before the attempt is given up (or, behind the commit, tried again).
            #[must_use]
            pub fn deadline(self) -> Duration {
                match self { $(Step::$name => Duration::from_secs($deadline),)* }
            }
        }
    };
}

steps! {
    /// Looks the pod up, makes room for its images.
    SourceReserve "source.reserve" Source 10,
    /// Dials the target's agent; offer and manifest are accepted.
    SourceConnect "source.connect" Source 20,
    /// Copies memory in rounds while the pod runs, where the strategy says so.
    SourceCopy "source.copy" Source 86_400,
    /// Freezes all containers.
    SourceFreeze "source.freeze" Source 10,
    /// Drops every packet of the pod.
    SourceHoldPackets "source.hold_packets" Source 10,
    /// Dumps all containers while their files are sent.
    SourceDump "source.dump" Source 3600,
    /// Cures the images and sends what is left.
    SourceCure "source.cure" Source 600,
    /// Tells the target that everything was sent: from here on it may commit.
    SourceComplete "source.complete" Source 60,
    /// Notes for ever that this pod's processes have moved away.
    SourceMoveAway "source.move_away" Source 10,
    /// Lets system calls that the dump interrupted begin again.
    SourceRepair "source.repair" Source 30,
    /// Lets packets pass again.
    SourceReleasePackets "source.release_packets" Source 10,
    /// Lets the containers run again.
    SourceThaw "source.thaw" Source 10,
    /// Removes images and all else that the session made.
    SourceCleanUp "source.clean_up" Source 30,
    /// Lets the wrapper start shepherds for this pod.
    TargetHandOff "target.hand_off" Target 10,
    /// Accepts the source and makes room for the images.
    TargetReserve "target.reserve" Target 10,
    /// Drops the pod's packets.
    TargetPrepareNetwork "target.prepare_network" Target 10,
    /// Receives images and files.
    TargetReceive "target.receive" Target 3600,
    /// Restores all containers, held.
    TargetRestore "target.restore" Target 600,
    /// Sets what CRIU does not, closes connections that cannot live.
    TargetAdjust "target.adjust" Target 30,
    /// Swaps the decision. It is never given up: an unknown decision stays unknown until it is read.
    TargetCommit "target.commit" Target 31_536_000,
    /// Lets the containers run.
    TargetThaw "target.thaw" Target 10,
    /// Ends everything of the target.
    TargetDestroy "target.destroy" Target 60,
    /// Removes images and all else that the session made.
    TargetCleanUp "target.clean_up" Target 30,
}

impl Step {
    /// The step with this name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|s| s.name() == name)
    }

    /// The step that takes its effect back, where it has one on the host.
    #[must_use]
    pub fn undo_of(self) -> Option<Self> {
        match self {
            Self::SourceReserve => Some(Self::SourceCleanUp),
            Self::SourceFreeze => Some(Self::SourceThaw),
            Self::SourceHoldPackets => Some(Self::SourceReleasePackets),
            Self::SourceDump => Some(Self::SourceRepair),
            Self::TargetHandOff | Self::TargetPrepareNetwork | Self::TargetRestore => Some(Self::TargetDestroy),
            Self::TargetReserve | Self::TargetReceive => Some(Self::TargetCleanUp),
            Self::SourceConnect
            | Self::SourceCopy
            | Self::SourceCure
            | Self::SourceComplete
            | Self::SourceMoveAway
            | Self::SourceRepair
            | Self::SourceReleasePackets
            | Self::SourceThaw
            | Self::SourceCleanUp
            | Self::TargetAdjust
            | Self::TargetCommit
            | Self::TargetThaw
            | Self::TargetDestroy
            | Self::TargetCleanUp => None,
        }
    }

    /// Whether it happens only when the decision is Committed.
    #[must_use]
    pub fn is_after_commit(self) -> bool {
        matches!(self, Self::SourceMoveAway | Self::TargetThaw)
    }

    /// Whether it belongs to the way back.
    #[must_use]
    pub fn is_undo(self) -> bool {
        matches!(
            self,
            Self::SourceRepair | Self::SourceReleasePackets | Self::SourceThaw | Self::TargetDestroy
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_start_with_the_role() {
        for step in Step::ALL {
            assert_eq!(Step::parse(step.name()), Some(*step));
            assert!(step.name().starts_with(step.role().as_str()));
        }
    }

    #[test]
    fn every_undo_is_of_the_same_role() {
        for step in Step::ALL {
            if let Some(undo) = step.undo_of() {
                assert_eq!(undo.role(), step.role());
            }
        }
    }
}
