//! From an inventory to checks: what stands against moving this pod, all of it at once, each with a sentence that names
//! the thing and a remedy. What is not known to be movable is refused.
//!
//! One [`Area`] looks at one kind of thing; an area that finds nothing reports itself as passed, so that a report also
//! says what was looked at.

mod areas;
mod descriptors;
mod freeze;
mod mappings;
mod pod;
mod processes;
mod sockets;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use crds::Reason;
use crds::process_migration::{Check, Connections, Verdict};

pub use areas::Area;
pub use freeze::predicted_milliseconds;

use crate::inventory::Inventory;

/// Most findings of a container that differ in numbers only; the rest is counted.
const MAX_ALIKE: usize = 3;
/// Most findings of a container for one reason; the rest is counted.
const MAX_PER_REASON: usize = 8;

/// What is to be judged.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// What the pod holds.
    pub inventory: &'a Inventory,
    /// What the user wants of connections.
    pub connections: Connections,
    /// The node whose agent looked.
    pub node: &'a str,
    /// Most bytes of checkpoints that may lie in this node's memory.
    pub checkpoint_limit_bytes: u64,
}

/// The judgement.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// All checks, refusals first.
    pub checks: Vec<Check>,
    /// Bytes of memory to move.
    pub memory_bytes: i64,
    /// Predicted freeze.
    pub predicted_freeze_milliseconds: u32,
    /// The same for a pod whose memory is copied while it runs.
    pub predicted_freeze_after_copy_milliseconds: u32,
}

impl Report {
    /// Reasons of all refusals.
    pub fn refusals(&self) -> impl Iterator<Item = &str> {
        self.checks
            .iter()
            .filter(|c| c.verdict == Verdict::Refused)
            .filter_map(|c| c.reason.as_deref())
    }
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Finding {
    area: Area,
    verdict: Verdict,
    container: Option<String>,
    reason: Reason,
    /// One sentence.
    message: String,
    /// Findings of the same kind are counted instead of repeated.
    alike: String,
}

/// Collects findings.
#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, area: Area, verdict: Verdict, container: Option<&str>, reason: Reason, message: String) {
        // Numbers differ between alike things.
        let alike = message.chars().filter(|c| !c.is_ascii_digit()).collect();
        self.0.push(Finding {
            area,
            verdict,
            container: container.map(str::to_owned),
            reason,
            message,
            alike,
        });
    }

    fn refuse(&mut self, area: Area, container: Option<&str>, reason: Reason, message: String) {
        self.add(area, Verdict::Refused, container, reason, message);
    }

    fn warn(&mut self, area: Area, container: Option<&str>, reason: Reason, message: String) {
        self.add(area, Verdict::Warning, container, reason, message);
    }
}

/// Judges.
#[must_use]
pub fn judge(question: Question<'_>) -> Report {
    let mut findings = Findings::default();
    let inventory = question.inventory;
    pod::judge(inventory, &mut findings);
    processes::judge(inventory, &mut findings);
    descriptors::judge(inventory, &mut findings);
    sockets::judge(inventory, question.connections, &mut findings);
    mappings::judge(inventory, question.checkpoint_limit_bytes, &mut findings);
    for sentence in &inventory.unreadable {
        findings.refuse(Area::Inventory, None, Reason::Unknown, sentence.clone());
    }
    let memory = inventory.memory_bytes();
    let predicted = |memory| predicted_milliseconds(memory, inventory.threads(), inventory.containers.len() as u64);
    Report {
        checks: checks(findings.0, question.node),
        memory_bytes: i64::try_from(memory).unwrap_or(i64::MAX),
        predicted_freeze_milliseconds: predicted(memory),
        predicted_freeze_after_copy_milliseconds: predicted(inventory.memory_in_freeze()),
    }
}

/// Findings of a container for one reason.
#[derive(Debug, Default)]
struct PerReason {
    shown: usize,
    /// Index of the last one that is shown.
    last: usize,
    left_out: usize,
}

fn checks(findings: Vec<Finding>, node: &str) -> Vec<Check> {
    let mut alike: BTreeMap<(Option<String>, Reason, String), usize> = BTreeMap::new();
    let mut per_reason: BTreeMap<(Option<String>, Reason), PerReason> = BTreeMap::new();
    let mut checks: Vec<(Verdict, Area, Check)> = Vec::new();
    for finding in findings {
        let same = alike
            .entry((finding.container.clone(), finding.reason, finding.alike))
            .or_default();
        *same += 1;
        let reason = per_reason
            .entry((finding.container.clone(), finding.reason))
            .or_default();
        if *same > MAX_ALIKE || reason.shown == MAX_PER_REASON {
            reason.left_out += 1;
            continue;
        }
        reason.shown += 1;
        reason.last = checks.len();
        checks.push((
            finding.verdict,
            finding.area,
            Check {
                name: finding.area.as_str().to_owned(),
                verdict: finding.verdict,
                container: finding.container,
                node: Some(node.to_owned()),
                reason: Some(finding.reason.as_str().to_owned()),
                message: Some(crds::condition::cut(&finding.message, crds::condition::MAX_MESSAGE).to_owned()),
                remedy: Some(finding.reason.remedy())
                    .filter(|remedy| !remedy.is_empty())
                    .map(str::to_owned),
            },
        ));
    }
    for PerReason { last, left_out, .. } in per_reason.into_values().filter(|r| r.left_out > 0) {
        if let Some((_, _, check)) = checks.get_mut(last)
            && let Some(message) = &mut check.message
        {
            message.push_str(&format!("; and {left_out} more like it"));
        }
    }
    for area in Area::ALL {
        if !checks.iter().any(|(_, a, _)| a == area) {
            checks.push((
                Verdict::Passed,
                *area,
                Check {
                    name: area.as_str().to_owned(),
                    verdict: Verdict::Passed,
                    container: None,
                    node: Some(node.to_owned()),
                    reason: None,
                    message: None,
                    remedy: None,
                },
            ));
        }
    }
    // Refusals first; within a verdict the order of the areas.
    checks.sort_by_key(|(verdict, area, _)| {
        let rank = match verdict {
            Verdict::Refused => 0,
            Verdict::Warning => 1,
            Verdict::Passed => 2,
        };
        (rank, *area)
    });
    checks.into_iter().map(|(_, _, check)| check).collect()
}
