//! What must be shown on a real cluster: each scenario asserts the invariants and then moves the same pod again.

pub mod install;
pub mod moves;
pub mod stage;
pub mod subject;

mod cancel;
mod crashes;
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

/// One thing that must be shown.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Its name, after the fact that it shows.
    pub name: String,
    /// Whether nodes are broken: only possible on our own cluster.
    pub needs_own_cluster: bool,
    /// Part of an enumeration that takes longer than the gate may: played on request only.
    pub long: bool,
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
            long: false,
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

    /// It is played on request only.
    fn long(self) -> Self {
        Self { long: true, ..self }
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
        crashes::scenarios(),
        steps::scenarios().into_iter().map(Scenario::long).collect(),
        hostile::scenarios(),
        lifecycle::scenarios(),
    ]
    .concat()
}
