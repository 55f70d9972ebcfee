//! The memory of real processes: copied while they run, compared when they stand still, left out of CRIU's images, restored.
//! Needs root, a kernel with WP_ASYNC, python3, and CRIU for some; skipped, with the reason, without them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod criu;
mod equal;
mod workload;
