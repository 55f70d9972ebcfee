//! What a migration asks of this node: (object, name of the node) -> duty. Whether an attempt was begun before is for the
//! journal to say, not for the object.

use crds::{
    ProcessMigration,
    condition::is_true,
    process_migration::{Check, Decision, DecisionValue, DesiredState, ProcessMigrationStatus, StrategyType, cond},
};

use super::step::Role;

/// What the preflight of the source found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PreflightReport {
    /// Every check.
    pub checks: Vec<Check>,
    /// Memory to be moved.
    pub memory_bytes: Option<i64>,
    /// Predicted freeze.
    pub predicted_freeze_milliseconds: Option<u32>,
}

/// What the API says of the decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Known {
    /// The operator has not opened it yet: nobody may act.
    Unopened,
    /// Both ways are open.
    Undecided,
    /// The target runs.
    Committed,
    /// The source runs.
    Aborted {
        /// A reason.
        reason: String,
        /// One sentence.
        message: String,
    },
}

fn status(migration: &ProcessMigration) -> Option<&ProcessMigrationStatus> {
    migration.status.as_ref()
}

/// What the object says of the decision.
#[must_use]
pub fn decision(migration: &ProcessMigration) -> Known {
    match status(migration).and_then(|s| s.decision.as_ref()) {
        None => Known::Unopened,
        Some(Decision {
            value: DecisionValue::Undecided,
            ..
        }) => Known::Undecided,
        Some(Decision {
            value: DecisionValue::Committed,
            ..
        }) => Known::Committed,
        Some(Decision {
            value: DecisionValue::Aborted,
            reason,
            message,
            ..
        }) => Known::Aborted {
            reason: reason.clone().unwrap_or_default(),
            message: message.clone().unwrap_or_default(),
        },
    }
}

/// Roles of this node in a migration: none, or one. (A pod never moves to its own node.)
#[must_use]
pub fn role(migration: &ProcessMigration, node: &str) -> Option<Role> {
    let status = status(migration)?;
    if status.source.as_ref().and_then(|s| s.node_name.as_deref()) == Some(node) {
        return Some(Role::Source);
    }
    (status.target.as_ref().and_then(|t| t.node_name.as_deref()) == Some(node)).then_some(Role::Target)
}

/// Whether nothing will change any more.
#[must_use]
pub fn is_finished(migration: &ProcessMigration) -> bool {
    status(migration).is_some_and(|s| is_true(&s.conditions, cond::FINISHED))
}

/// The strategy in force.
#[must_use]
pub fn strategy(migration: &ProcessMigration) -> StrategyType {
    let effective = status(migration).and_then(|s| s.effective.as_ref()).map(|e| e.strategy);
    effective.unwrap_or(migration.spec.strategy.type_)
}

/// Whether agents move memory in this migration, and are asked to.
fn is_live(migration: &ProcessMigration) -> bool {
    let live = match strategy(migration) {
        StrategyType::StopAndCopy | StrategyType::PreCopy => true,
        StrategyType::Cold | StrategyType::PostCopy | StrategyType::Hybrid => false,
    };
    live && migration.spec.desired_state == DesiredState::Migrated && !is_finished(migration)
}

/// Whether the source's agent is to look at the pod: nobody has for this attempt.
#[must_use]
pub fn needs_preflight(migration: &ProcessMigration, node: &str) -> bool {
    let Some(status) = status(migration) else {
        return false;
    };
    let checked = status.source.as_ref().and_then(|s| s.checked_attempt);
    is_live(migration)
        && role(migration, node) == Some(Role::Source)
        && status.attempt.is_some()
        && checked != status.attempt
}

/// Whether the operator has let agents act.
fn may_act(migration: &ProcessMigration) -> bool {
    let Some(status) = status(migration) else {
        return false;
    };
    is_live(migration)
        && !migration.spec.dry_run
        && decision(migration) == Known::Undecided
        && is_true(&status.conditions, cond::ADMITTED)
        && status.attempt.is_some()
}

/// Whether the source's agent is to begin the attempt.
#[must_use]
pub fn source_begins(migration: &ProcessMigration, node: &str) -> bool {
    let ready = status(migration).is_some_and(|s| is_true(&s.conditions, cond::TARGET_READY));
    may_act(migration) && ready && role(migration, node) == Some(Role::Source) && has_pods(migration)
}

/// Whether the target's agent is to let the wrapper start shepherds.
#[must_use]
pub fn target_begins(migration: &ProcessMigration, node: &str) -> bool {
    may_act(migration) && role(migration, node) == Some(Role::Target) && has_pods(migration)
}

fn has_pods(migration: &ProcessMigration) -> bool {
    status(migration).is_some_and(|s| {
        s.source
            .as_ref()
            .is_some_and(|s| s.pod_uid.is_some() && s.pod_name.is_some())
            && s.target
                .as_ref()
                .is_some_and(|t| t.pod_uid.is_some() && t.pod_name.is_some() && t.node_name.is_some())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crds::process_migration::{ProcessMigrationSpec, SourceStatus, TargetStatus};
    use crds::{
        Reason,
        condition::{self, Status},
    };

    fn ready() -> ProcessMigration {
        let spec: ProcessMigrationSpec =
            serde_json::from_value(serde_json::json!({"podRef": {"name": "web-0"}})).unwrap();
        let mut m = ProcessMigration::new("m", spec);
        let now = k8s_openapi::jiff::Timestamp::UNIX_EPOCH;
        let condition = |t| condition::build(&[], t, Status::True, Reason::Eligible, "", None, now);
        m.status = Some(ProcessMigrationStatus {
            attempt: Some(1),
            source: Some(SourceStatus {
                node_name: Some("a".into()),
                pod_name: Some("web-0".into()),
                pod_uid: Some("s".into()),
                checked_attempt: Some(1),
                ..SourceStatus::default()
            }),
            target: Some(TargetStatus {
                node_name: Some("b".into()),
                pod_name: Some("web-0-x".into()),
                pod_uid: Some("t".into()),
                ..TargetStatus::default()
            }),
            decision: Some(Decision {
                value: DecisionValue::Undecided,
                by: None,
                reason: None,
                message: None,
                time: None,
            }),
            conditions: vec![condition(cond::ADMITTED), condition(cond::TARGET_READY)],
            ..ProcessMigrationStatus::default()
        });
        m
    }

    #[test]
    fn both_begin_when_everything_is_there() {
        assert!(source_begins(&ready(), "a") && target_begins(&ready(), "b"));
        assert!(!source_begins(&ready(), "b") && !target_begins(&ready(), "a") && !target_begins(&ready(), "c"));
        assert!(!needs_preflight(&ready(), "a"));
    }

    #[test]
    fn nobody_begins_when_anything_is_missing() {
        type Change = fn(&mut ProcessMigration);
        let changes: &[Change] = &[
            |m| m.status = None,
            |m| m.spec.dry_run = true,
            |m| m.spec.desired_state = DesiredState::Canceled,
            |m| m.spec.strategy.type_ = StrategyType::Cold,
            |m| m.status.as_mut().unwrap().decision = None,
            |m| m.status.as_mut().unwrap().decision.as_mut().unwrap().value = DecisionValue::Aborted,
            |m| m.status.as_mut().unwrap().decision.as_mut().unwrap().value = DecisionValue::Committed,
            |m| {
                m.status
                    .as_mut()
                    .unwrap()
                    .conditions
                    .retain(|c| c.type_ != cond::ADMITTED)
            },
            |m| m.status.as_mut().unwrap().attempt = None,
            |m| m.status.as_mut().unwrap().target.as_mut().unwrap().pod_uid = None,
            |m| m.status.as_mut().unwrap().source.as_mut().unwrap().pod_uid = None,
        ];
        for (n, change) in changes.iter().enumerate() {
            let mut m = ready();
            change(&mut m);
            assert!(!source_begins(&m, "a") && !target_begins(&m, "b"), "change {n}");
        }
        let mut m = ready();
        m.status
            .as_mut()
            .unwrap()
            .conditions
            .retain(|c| c.type_ != cond::TARGET_READY);
        assert!(!source_begins(&m, "a") && target_begins(&m, "b"));
    }

    #[test]
    fn a_new_attempt_needs_a_new_preflight() {
        let mut m = ready();
        m.status.as_mut().unwrap().attempt = Some(2);
        assert!(needs_preflight(&m, "a") && !needs_preflight(&m, "b"));
        m.spec.dry_run = true;
        assert!(needs_preflight(&m, "a"));
    }
}
