//! What must be shown on a real cluster: each scenario asserts the invariants and then moves the same pod again.

pub mod install;
pub mod moves;
pub mod stage;
pub mod subject;

mod cancel;
mod crashes;
mod filling;
mod hostile;
mod lifecycle;
mod plain_moves;
mod policies;
mod refusals;
mod runner;
mod steps;

pub use hostile::pest;
pub use runner::{Outcome, Settings, run, sweep};

use std::time::Duration;

use anyhow::Result;
use stage::Stage;

/// Scenarios that follow each other and are of the same company are played side by side: most of their time they wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Company {
    /// Its name.
    pub name: &'static str,
    /// How many of it are played at once.
    pub lanes: usize,
}

/// One thing that must be shown.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Its name, after the fact that it shows.
    pub name: String,
    /// Whether nodes are broken: only possible on our own cluster.
    pub needs_own_cluster: bool,
    /// Whether it may be played beside others.
    pub company: Option<Company>,
    /// How long it may take.
    pub limit: Duration,
    /// What it does.
    pub play: fn(&Stage, &str) -> Result<()>,
    /// Which case of it this is, where one function plays several.
    pub case: String,
}

impl Scenario {
    /// A scenario that runs on any cluster.
    fn new(name: impl Into<String>, play: fn(&Stage, &str) -> Result<()>) -> Self {
        Self {
            name: name.into(),
            needs_own_cluster: false,
            company: None,
            limit: Duration::from_secs(180),
            play,
            case: String::new(),
        }
    }

    /// The case that is given to `play`.
    fn case(self, case: impl Into<String>) -> Self {
        Self {
            case: case.into(),
            ..self
        }
    }

    /// It is played beside others of its company.
    fn beside(self, company: Company) -> Self {
        Self {
            company: Some(company),
            ..self
        }
    }

    /// It breaks nodes.
    fn own_cluster(self) -> Self {
        Self {
            needs_own_cluster: true,
            ..self
        }
    }
}

/// All of them, in the order in which they are played.
#[must_use]
pub fn all() -> Vec<Scenario> {
    [
        plain_moves::scenarios(),
        refusals::scenarios(),
        policies::scenarios(),
        cancel::scenarios(),
        filling::scenarios(),
        crashes::scenarios(),
        steps::scenarios(),
        hostile::scenarios(),
        lifecycle::scenarios(),
    ]
    .concat()
}
