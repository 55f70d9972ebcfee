//! A real Kubernetes cluster on one machine, and what the scenarios on it share.
//!
//! [`cluster`] brings it up and breaks it; [`parts`] gets what it is made from; [`oci_image`] writes images without a container engine.

pub mod api_server;
pub mod bench;
pub mod cluster;
pub mod demo;
pub mod images;
pub mod invariants;
pub mod oci_image;
pub mod parts;
pub mod progress;
pub mod scenario;
pub mod stock;
pub mod witness;
