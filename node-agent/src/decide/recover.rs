//! What a restarted agent does with an unfinished journal: (records, same boot?) -> plan. The plan is carried out by the
//! same code as any failure or success.

use super::step::{Role, Step};
use crate::journal::{Record, Start};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Nothing was begun, or nothing is left.
    Nothing,
    /// Source: the target can never commit, because not everything was sent. Go back at once, then say so.
    GoBack,
    /// Source: everything was sent. Only the decision says which way to go; abort it if nobody has decided.
    AskDecision,
    /// Source: the decision is Aborted. Go back.
    GoBackAborted,
    /// Source: the decision is Committed. The processes stay as they are until their pod is gone.
    MovedAway,
    /// Target: it never tried to commit. Destroy everything, then say so.
    Destroy,
    /// Target: it tried to commit. Read the decision; where nobody has decided, abort it.
    AskCommit,
    /// Target: the decision is Committed. Let it run.
    Run,
}

/// Decides. After a reboot of the node the plans are the same: what they thaw or destroy is then gone already.
#[must_use]
pub fn plan(records: &[Record]) -> Plan {
    let Some(Record::Start(Start { role, .. })) = records.first() else {
        // Not even the first record was written: nothing was touched.
        return Plan::Nothing;
    };
    if records.contains(&Record::Settled) {
        return Plan::Nothing;
    }
    let begun = |step: Step| records.contains(&Record::Begin { step });
    let decided = records.iter().rev().find_map(|r| match r {
        Record::Decided { committed, .. } => Some(*committed),
        Record::Start(_)
        | Record::Begin { .. }
        | Record::End { .. }
        | Record::Failed { .. }
        | Record::Frozen { .. }
        | Record::Threads { .. }
        | Record::Shepherds { .. }
        | Record::Addresses { .. }
        | Record::Settled => None,
    });
    match (role, decided) {
        (Role::Source, Some(true)) => Plan::MovedAway,
        (Role::Source, Some(false)) => Plan::GoBackAborted,
        (Role::Source, None) if begun(Step::SourceComplete) => Plan::AskDecision,
        (Role::Source, None) => Plan::GoBack,
        // After a reboot the restored processes are gone; what was committed is an ordinary pod now.
        (Role::Target, Some(true)) => Plan::Run,
        (Role::Target, Some(false)) => Plan::Destroy,
        (Role::Target, None) if begun(Step::TargetCommit) => Plan::AskCommit,
        (Role::Target, None) => Plan::Destroy,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(role: Role) -> Record {
        Record::Start(Start {
            version: 1,
            role,
            namespace: "n".into(),
            name: "m".into(),
            uid: "u".into(),
            attempt: 1,
            pod_uid: "p".into(),
            pod_name: "web".into(),
            boot_id: "b".into(),
        })
    }

    fn decided(committed: bool) -> Record {
        Record::Decided {
            committed,
            reason: String::new(),
            message: String::new(),
        }
    }

    fn whole(role: Role, steps: &[Step]) -> Vec<Record> {
        let mut out = vec![start(role)];
        for step in steps {
            out.push(Record::Begin { step: *step });
            out.push(Record::End { step: *step });
        }
        out
    }

    const FORWARD_SOURCE: &[Step] = &[
        Step::SourceReserve,
        Step::SourceConnect,
        Step::SourceCopy,
        Step::SourceFreeze,
        Step::SourceHoldPackets,
        Step::SourceDump,
        Step::SourceCure,
        Step::SourceComplete,
    ];
    const FORWARD_TARGET: &[Step] = &[
        Step::TargetHandOff,
        Step::TargetReserve,
        Step::TargetPrepareNetwork,
        Step::TargetReceive,
        Step::TargetRestore,
        Step::TargetAdjust,
        Step::TargetCommit,
    ];

    /// Every prefix of every legal journal of a source.
    #[test]
    fn a_source_goes_back_unless_the_target_may_have_committed() {
        let forward = whole(Role::Source, FORWARD_SOURCE);
        let complete = forward
            .iter()
            .position(|r| {
                *r == Record::Begin {
                    step: Step::SourceComplete,
                }
            })
            .unwrap();
        for n in 0..=forward.len() {
            let expected = match n {
                0 => Plan::Nothing,
                n if n <= complete => Plan::GoBack,
                _ => Plan::AskDecision,
            };
            assert_eq!(plan(&forward[..n]), expected, "{n} records");
        }
        for (committed, expected, after) in [
            (true, Plan::MovedAway, &[Step::SourceMoveAway, Step::SourceCleanUp][..]),
            (
                false,
                Plan::GoBackAborted,
                &[
                    Step::SourceRepair,
                    Step::SourceReleasePackets,
                    Step::SourceThaw,
                    Step::SourceCleanUp,
                ][..],
            ),
        ] {
            // An abort may come after any forward step; a commit only after the last.
            let from = if committed { forward.len() } else { 1 };
            for n in from..=forward.len() {
                let mut journal = forward[..n].to_vec();
                journal.push(decided(committed));
                assert_eq!(plan(&journal), expected);
                for step in after {
                    for record in [Record::Begin { step: *step }, Record::End { step: *step }] {
                        journal.push(record);
                        assert_eq!(plan(&journal), expected);
                    }
                }
                journal.push(Record::Settled);
                assert_eq!(plan(&journal), Plan::Nothing);
            }
        }
    }

    /// Every prefix of every legal journal of a target.
    #[test]
    fn a_target_destroys_unless_it_may_have_committed() {
        let forward = whole(Role::Target, FORWARD_TARGET);
        let commit = forward
            .iter()
            .position(|r| {
                *r == Record::Begin {
                    step: Step::TargetCommit,
                }
            })
            .unwrap();
        for n in 0..=forward.len() {
            let expected = match n {
                0 => Plan::Nothing,
                n if n <= commit => Plan::Destroy,
                _ => Plan::AskCommit,
            };
            assert_eq!(plan(&forward[..n]), expected, "{n} records");
        }
        for n in 1..=forward.len() {
            let mut journal = forward[..n].to_vec();
            journal.push(decided(false));
            assert_eq!(plan(&journal), Plan::Destroy);
            journal.push(Record::Settled);
            assert_eq!(plan(&journal), Plan::Nothing);
        }
        let mut journal = forward;
        journal.push(decided(true));
        assert_eq!(plan(&journal), Plan::Run);
        journal.push(Record::Begin { step: Step::TargetThaw });
        assert_eq!(plan(&journal), Plan::Run);
    }

    /// I4: whatever else a journal says, a source that knows of the commit never goes back.
    #[test]
    fn nothing_behind_a_commit_leads_back() {
        for step in Step::ALL {
            let mut journal = whole(Role::Source, FORWARD_SOURCE);
            journal.push(decided(true));
            journal.push(Record::Begin { step: *step });
            journal.push(Record::Failed {
                step: *step,
                reason: "StepFailed".into(),
                message: String::new(),
            });
            assert_eq!(plan(&journal), Plan::MovedAway);
        }
    }
}
