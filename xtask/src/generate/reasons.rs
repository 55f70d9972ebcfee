//! A section per [`Reason`] in `docs/operations.md`: what happened, where the workload is, what to do.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use crds::Reason;
use serde_json::Value;

use super::Generated;

const PATH: &str = "docs/operations.md";
const BEGIN: &str = "<!-- begin generated: reasons -->\n";
const END: &str = "<!-- end generated: reasons -->\n";

/// Where the workload is when this reason is shown.
struct Class {
    title: &'static str,
    workload: &'static str,
    reasons: &'static [Reason],
}

const CLASSES: &[Class] = &[
    Class {
        title: "On the way",
        workload: "Runs where `status.activeOn` says. Nothing is lost whatever happens next.",
        reasons: &[
            Reason::Accepted,
            Reason::Eligible,
            Reason::WaitingForSourceAgent,
            Reason::WaitingForSlot,
            Reason::WaitingForScheduler,
            Reason::WaitingForTarget,
            Reason::WaitingForRestore,
            Reason::WaitingForSourceEnd,
            Reason::WaitingForReady,
            Reason::WaitingForRollback,
            Reason::ShepherdsReady,
            Reason::AllContainersHeld,
            Reason::DecisionCommitted,
            Reason::SourceGone,
            Reason::NothingLeft,
        ],
    },
    Class {
        title: "The end that was asked for",
        workload: "Runs where `status.activeOn` says.",
        reasons: &[
            Reason::Migrated,
            Reason::StartedCold,
            Reason::DryRunComplete,
            Reason::CanceledByUser,
            Reason::NotAdmitted,
        ],
    },
    Class {
        title: "Refused before anything was touched",
        workload: "Untouched: it runs on its node as before. No target pod is left.",
        reasons: &[
            Reason::PodNotFound,
            Reason::PodReplaced,
            Reason::PodNotRunning,
            Reason::PodTerminating,
            Reason::OwnerNotSupported,
            Reason::StrategyNotAvailable,
            Reason::AlreadyMigrating,
            Reason::PodNotMigratable,
            Reason::NoTargetNode,
            Reason::TargetIsSource,
            Reason::NodeNotReady,
            Reason::NodesIncompatible,
            Reason::Unschedulable,
            Reason::TargetRefused,
            Reason::TargetSpecDrift,
            Reason::FreezeTooLong,
            Reason::NotEnoughMemory,
        ],
    },
    Class {
        title: "Failed before the commit",
        workload: "Runs on its source node, its memory intact. If it had been frozen already, `status.source.frozenMilliseconds` says for how long. \
                   What was built on the target is destroyed.",
        reasons: &[
            Reason::ProgressTimeout,
            Reason::DeadlineExceeded,
            Reason::CheckpointFailed,
            Reason::RestoreFailed,
            Reason::TransferFailed,
            Reason::PeerRefused,
            Reason::AgentRestarted,
            Reason::TargetLost,
            Reason::StepFailed,
            Reason::ApiUnavailable,
        ],
    },
    Class {
        title: "The pod or its node went away",
        workload: "`status.activeOn` says whether a copy lives. A pod that ended before the commit is not brought back by a migration.",
        reasons: &[Reason::PodDeleted, Reason::SourceLost, Reason::SourceNodeLost],
    },
    Class {
        title: "The moved pod could not be made complete",
        workload: "The processes were killed on the target; the kubelet starts the containers anew there. The source is released and never runs again.",
        reasons: &[Reason::MemoryLost],
    },
    Class {
        title: "The decision is not known",
        workload: "Both copies are stopped, because whoever waits cannot know whether the other side may run. No memory is lost; \
                   as soon as the decision can be read, exactly one of them goes on.",
        reasons: &[Reason::DecisionUnknown],
    },
    Class {
        title: "What a check found in the pod",
        workload: "Untouched: it runs on its node as before.",
        reasons: &[
            Reason::TtyNotSupported,
            Reason::EphemeralContainer,
            Reason::VolumeNotSupported,
            Reason::MountNotSupported,
            Reason::DeviceNotSupported,
            Reason::SocketNotSupported,
            Reason::MptcpNotSupported,
            Reason::TracedProcess,
            Reason::IoUringNotSupported,
            Reason::UserfaultfdNotSupported,
            Reason::FanotifyNotSupported,
            Reason::InotifyNotSupported,
            Reason::SharedProcessNamespace,
            Reason::UserNamespaceNotSupported,
            Reason::SharedMemoryNotSupported,
            Reason::HugetlbNotSupported,
            Reason::MessageQueueNotSupported,
            Reason::DescriptorNotSupported,
            Reason::HostNamespace,
            Reason::PrivilegedContainer,
            Reason::NestedNamespace,
            Reason::NetworkStateNotSupported,
            Reason::ConnectionNotPreservable,
            Reason::ProcessState,
            Reason::LockNotSupported,
            Reason::Unknown,
        ],
    },
    Class {
        title: "What a check warns of",
        workload: "Runs; the move is allowed and something small will differ afterwards, which the check's message names.",
        reasons: &[Reason::ExecSessionEnds, Reason::WillBeLost],
    },
    Class {
        title: "Nodes",
        workload: "Pods that were moved to the node before live on.",
        reasons: &[Reason::NodeReady, Reason::Uninstalled],
    },
];

pub(super) fn file(root: &Path) -> Result<Generated> {
    let old = std::fs::read_to_string(root.join(PATH)).with_context(|| format!("failed to read {PATH}"))?;
    let Some((before, rest)) = old.split_once(BEGIN) else {
        bail!("{PATH} lacks the line {BEGIN}")
    };
    let Some((_, after)) = rest.split_once(END) else {
        bail!("{PATH} lacks the line {END}")
    };
    Ok(Generated {
        path: PATH.to_owned(),
        text: format!("{before}{BEGIN}{}{END}{after}", sections()?),
    })
}

fn sections() -> Result<String> {
    let mut out = String::new();
    for class in CLASSES {
        section(&mut out, class.title, class.workload, class.reasons)?;
    }
    let others: Vec<Reason> = Reason::ALL
        .iter()
        .copied()
        .filter(|reason| classes_of(*reason) == 0)
        .collect();
    if !others.is_empty() {
        section(&mut out, "Others", "Runs where `status.activeOn` says.", &others)?;
    }
    out.push('\n');
    Ok(out)
}

fn section(out: &mut String, title: &str, workload: &str, reasons: &[Reason]) -> Result<()> {
    let _ = write!(out, "\n### {title}\n\nThe workload: {workload}\n");
    for reason in reasons {
        let _ = write!(out, "\n#### {reason}\n\n{}\n", meaning(*reason)?);
        if !reason.remedy().is_empty() {
            let _ = write!(out, "\nWhat to do: {}\n", reason.remedy());
        }
    }
    Ok(())
}

fn classes_of(reason: Reason) -> usize {
    CLASSES.iter().filter(|class| class.reasons.contains(&reason)).count()
}

/// The doc comment of the variant, as the JSON schema has it.
fn meaning(reason: Reason) -> Result<String> {
    let schema = schemars::schema_for!(Reason).to_value();
    let variants = schema
        .get("oneOf")
        .and_then(Value::as_array)
        .context("the schema of Reason has another shape")?;
    variants
        .iter()
        .find(|variant| variant.get("const").and_then(Value::as_str) == Some(reason.as_str()))
        .and_then(|variant| variant.get("description"))
        .and_then(Value::as_str)
        .map(str::to_owned)
        .with_context(|| format!("the reason {reason} has no description"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_says_where_the_workload_is() {
        for reason in Reason::ALL {
            assert_eq!(classes_of(*reason), 1, "{reason} must stand in one of CLASSES");
        }
    }
}
