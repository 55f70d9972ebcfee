//! Every byte that two of our programs share. No I/O, no clock, no async; what is wrong is rejected before anything is
//! allocated for it.
//!
//! | module | between |
//! |---|---|
//! | [`hand_off`] | agent -> wrapper and shepherd, on one node |
//! | [`sealed`] | the form of every file of ours: magic, version, body, checksum |

pub mod hand_off;
pub mod sealed;
