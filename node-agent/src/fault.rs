//! Faults for tests only: a step is killed, fails or hangs before or after its effect. Refused unless the agent runs with
//! `--enable-fault-injection`; nothing of this is read otherwise.
//!
//! A fault is `STEP:before|after:kill|fail|hang`, for example `source.freeze:after:kill`. It comes from the environment
//! (`PEREGRINE_FAULT`, once for each boot of the node) or, to arm a running agent, from the file [`ARMED`]. It strikes once:
//! the file is removed before it does.

use std::{fs, path::Path};

use crate::decide::step::Step;

/// A scenario writes a fault into this file on the node.
pub const ARMED: &str = "/run/peregrine/fault";
/// Faults of the environment that have struck since the node was booted.
const STRUCK: &str = "/run/peregrine/fault-struck";

/// Before or after the effect of a step (both after its record in the journal began).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Before.
    Before,
    /// After.
    After,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The agent is killed.
    Kill,
    /// The step fails.
    Fail,
    /// The step never ends.
    Hang,
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The step.
    pub step: Step,
    /// Before or after its effect.
    pub when: When,
    /// What happens.
    pub action: Action,
}

impl Fault {
    /// Reads `STEP:before|after:kill|fail|hang`.
    ///
    /// # Errors
    /// One sentence that says what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = text.trim().split(':');
        let (Some(step), Some(when), Some(action), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(format!("{text:?} is not STEP:before|after:kill|fail|hang"));
        };
        let step =
            Step::parse(step).ok_or_else(|| format!("{step:?} is no step: `node-agent steps` prints all of them"))?;
        let when = match when {
            "before" => When::Before,
            "after" => When::After,
            other => return Err(format!("{other:?} is neither before nor after")),
        };
        let action = match action {
            "kill" => Action::Kill,
            "fail" => Action::Fail,
            "hang" => Action::Hang,
            other => return Err(format!("{other:?} is none of kill, fail, hang")),
        };
        Ok(Self { step, when, action })
    }
}

/// The faults that may strike in this process.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    enabled: bool,
    environment: Option<(String, Fault)>,
}

impl Faults {
    /// No faults, ever.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Faults are allowed; `environment` is the value of `PEREGRINE_FAULT`.
    ///
    /// # Errors
    /// One sentence that says what is wrong with the value.
    pub fn enabled(environment: Option<&str>) -> Result<Self, String> {
        let environment = match environment.filter(|t| !t.trim().is_empty()) {
            Some(text) => Some((text.trim().to_owned(), Fault::parse(text)?)),
            None => None,
        };
        Ok(Self {
            enabled: true,
            environment,
        })
    }

    /// The fault that strikes now, if one does; it will not strike again.
    #[must_use]
    pub fn strikes(&self, step: Step, when: When) -> Option<Action> {
        if !self.enabled {
            return None;
        }
        if let Ok(text) = fs::read_to_string(ARMED)
            && let Ok(fault) = Fault::parse(&text)
            && (fault.step, fault.when) == (step, when)
            && fs::remove_file(ARMED).is_ok()
        {
            return Some(fault.action);
        }
        let (text, fault) = self.environment.as_ref()?;
        if (fault.step, fault.when) != (step, when) || struck(text) {
            return None;
        }
        mark(text);
        Some(fault.action)
    }
}

fn struck(text: &str) -> bool {
    fs::read_to_string(STRUCK).is_ok_and(|t| t.lines().any(|l| l == text))
}

fn mark(text: &str) {
    let mut all = fs::read_to_string(STRUCK).unwrap_or_default();
    all.push_str(text);
    all.push('\n');
    if let Some(folder) = Path::new(STRUCK).parent()
        && let Err(error) = fs::create_dir_all(folder).and_then(|()| fs::write(STRUCK, all))
    {
        tracing::warn!(%error, "failed to note that a fault has struck");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_can_be_named() {
        for step in Step::ALL {
            let fault = Fault::parse(&format!("{}:after:hang", step.name())).unwrap();
            assert_eq!(
                (fault.step, fault.when, fault.action),
                (*step, When::After, Action::Hang)
            );
        }
    }

    #[test]
    fn what_is_not_a_fault_is_said() {
        for bad in [
            "",
            "source.freeze",
            "source.freeze:now:kill",
            "source.freeze:before:burn",
            "x:before:kill",
        ] {
            assert!(Fault::parse(bad).is_err(), "{bad}");
        }
        assert!(Faults::none().strikes(Step::SourceFreeze, When::Before).is_none());
    }
}
