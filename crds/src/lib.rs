//! API types and vocabulary of Peregrine: the only place with names, reasons and limits of the Kubernetes API surface.
//!
//! No client lives here. The CRDs in `charts/peregrine` are generated from these types (`cargo xtask generate`).
//!
//! | module | holds |
//! |---|---|
//! | [`process_migration`] | `ProcessMigration`: one attempt to move one pod |
//! | [`migration_node`] | `MigrationNode`: what an agent found by probing its node |
//! | [`condition`] | building and comparing conditions |
//! | [`reason`] | one vocabulary for conditions, events and metric labels |
//! | [`access`] | API rights of each process, from which the chart's roles are rendered |
//! | [`names`] | labels, annotations, finalizers, field managers, ports |

pub mod access;
pub mod condition;
pub mod migration_node;
pub mod names;
pub mod process_migration;
pub mod reason;

pub use migration_node::{MigrationNode, MigrationNodeSpec, MigrationNodeStatus};
pub use process_migration::{ProcessMigration, ProcessMigrationSpec, ProcessMigrationStatus};
pub use reason::Reason;

use kube::CustomResourceExt;

/// All CRDs of this version, in the order in which they are to be installed.
#[must_use]
pub fn all_crds() -> Vec<k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition> {
    vec![ProcessMigration::crd(), MigrationNode::crd()]
}
