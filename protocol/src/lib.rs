//! Every byte that two of our programs share. No I/O, no clock, no async; what is wrong is rejected before anything is
//! allocated for it.
//!
//! | module | between |
//! |---|---|
//! | [`hand_off`] | agent -> wrapper and shepherd, on one node |
//! | [`migrate`] | the agents of the two nodes of a migration |
//! | [`pages`] | the same, on connections that carry memory pages |
//! | [`frame`], [`version`], [`limits`], [`raw`] | what that is made of |
//! | [`criu_errors`] | (words only) what CRIU's log says, as one sentence for users |
//! | [`pager`] | agent -> pager, on one node |
//! | [`store_index`] | agent -> pager, on one node: what a page store holds |
//! | [`sealed`] | the form of every file of ours: magic, version, body, checksum |

pub mod criu_errors;
pub mod frame;
pub mod hand_off;
pub mod limits;
pub mod migrate;
pub mod pager;
pub mod pages;
pub mod raw;
pub mod sealed;
pub mod store_index;
pub mod version;
