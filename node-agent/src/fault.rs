//! Faults for tests only: a step is killed, fails or hangs before or after its effect. Refused unless the agent runs with
//! `--enable-fault-injection`; nothing of this is read otherwise.
//!
//! A fault is `STEP:before|after:kill|fail|hang[:MIGRATION]`, for example `source.freeze:after:kill`; one that names a migration
//! strikes nobody else. It comes from the environment (`PEREGRINE_FAULT`, once for each boot of the node) or, to arm a running
//! agent, from the file [`ARMED`] or any file in the folder [`ARMED_FOLDER`]. It strikes once: the file is removed before it does.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::decide::step::Step;

/// A scenario writes a fault into this file on the node.
pub const ARMED: &str = "/run/peregrine/fault";
/// Or into a file of this folder, where several are to strike on one node.
pub const ARMED_FOLDER: &str = "/run/peregrine/faults";
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The step.
    pub step: Step,
    /// Before or after its effect.
    pub when: When,
    /// What happens.
    pub action: Action,
    /// Name of the only migration that it is meant for.
    pub migration: Option<String>,
}

impl Fault {
    /// Reads `STEP:before|after:kill|fail|hang[:MIGRATION]`.
    ///
    /// # Errors
    /// One sentence that says what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.trim().split(':').collect();
        let (step, when, action, migration) = match parts.as_slice() {
            [step, when, action] => (*step, *when, *action, None),
            [step, when, action, migration] if !migration.is_empty() => (*step, *when, *action, Some(*migration)),
            _ => return Err(format!("{text:?} is not STEP:before|after:kill|fail|hang[:MIGRATION]")),
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
        Ok(Self {
            step,
            when,
            action,
            migration: migration.map(str::to_owned),
        })
    }

    fn is_for(&self, step: Step, when: When, migration: &str) -> bool {
        (self.step, self.when) == (step, when) && self.migration.as_deref().is_none_or(|name| name == migration)
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

    /// Whether any may ever strike.
    #[must_use]
    pub fn are_enabled(&self) -> bool {
        self.enabled
    }

    /// What strikes this step of a migration now, if something does; it will not strike again.
    #[must_use]
    pub fn strikes(&self, step: Step, when: When, migration: &str) -> Option<Action> {
        if !self.enabled {
            return None;
        }
        for path in armed(Path::new(ARMED), Path::new(ARMED_FOLDER)) {
            if let Some(action) = take(&path, step, when, migration) {
                return Some(action);
            }
        }
        let (text, fault) = self.environment.as_ref()?;
        if !fault.is_for(step, when, migration) || struck(text) {
            return None;
        }
        mark(text);
        Some(fault.action)
    }
}

/// Files that may hold a fault.
fn armed(file: &Path, folder: &Path) -> Vec<PathBuf> {
    let several = fs::read_dir(folder).into_iter().flatten().flatten();
    std::iter::once(file.to_owned())
        .chain(several.map(|entry| entry.path()))
        .collect()
}

/// What the fault in a file does to this step; of several that look at once only one gets it.
fn take(path: &Path, step: Step, when: When, migration: &str) -> Option<Action> {
    let fault = Fault::parse(&fs::read_to_string(path).ok()?).ok()?;
    (fault.is_for(step, when, migration) && fs::remove_file(path).is_ok()).then_some(fault.action)
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
                (fault.step, fault.when, fault.action, fault.migration),
                (*step, When::After, Action::Hang, None)
            );
        }
    }

    #[test]
    fn a_fault_strikes_once_and_only_whom_it_is_meant_for() {
        let folder = std::env::temp_dir().join(format!("peregrine-fault-{}", std::process::id()));
        let (file, several) = (folder.join("fault"), folder.join("faults"));
        assert_eq!(armed(&file, &several), std::slice::from_ref(&file));
        fs::create_dir_all(&several).unwrap();
        let one = several.join("one");
        fs::write(&one, "source.freeze:after:fail:web-1\n").unwrap();
        fs::write(several.join("two"), "nonsense").unwrap();
        let strikes = |step, when, migration: &str| {
            let mut files = armed(&file, &several);
            files.sort();
            files.iter().find_map(|path| take(path, step, when, migration))
        };
        for (step, when, migration) in [
            (Step::SourceThaw, When::After, "web-1"),
            (Step::SourceFreeze, When::Before, "web-1"),
            (Step::SourceFreeze, When::After, "web-2"),
        ] {
            assert_eq!(strikes(step, when, migration), None, "{step:?} {when:?} {migration}");
        }
        assert_eq!(strikes(Step::SourceFreeze, When::After, "web-1"), Some(Action::Fail));
        assert_eq!(strikes(Step::SourceFreeze, When::After, "web-1"), None);
        fs::write(&file, "source.freeze:after:kill").unwrap();
        assert_eq!(strikes(Step::SourceFreeze, When::After, "web-2"), Some(Action::Kill));
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_is_not_a_fault_is_said() {
        for bad in [
            "",
            "source.freeze",
            "source.freeze:now:kill",
            "source.freeze:before:burn",
            "x:before:kill",
            "source.freeze:before:kill:",
            "source.freeze:before:kill:web:1",
        ] {
            assert!(Fault::parse(bad).is_err(), "{bad}");
        }
        assert!(
            Faults::none()
                .strikes(Step::SourceFreeze, When::Before, "web")
                .is_none()
        );
    }
}
