//! The memory of a running pod, copied while it is written to. Knows no Kubernetes and no network.
//!
//! | module | holds |
//! |---|---|
//! | [`ranges`] | sets of addresses |
//! | [`areas`] | which mappings of a process can be tracked, and what keeps a process from it |
//! | [`space`] | one tracked address space |
//! | [`tracker`] | all processes of a pod |
//! | [`copier`] | reads pages, gives batches |
//! | [`images`] | what a restore with pages from a store needs of CRIU's images |
//! | [`store`] | the target's store of pages |
//! | [`wire`] | pages on a connection, both ends |
//! | [`converge`] | when to stop copying and freeze |
//! | [`precopy`] | the rounds of a running pod |
//!
//! A page is *held* when it is in memory or in swap and is not the kernel's page of zeros; all else reads as zeros. A page
//! is *dirty* when it is held and was written since it was last protected. What the target's store has of a process is, in
//! the end, exactly what is held in its tracked areas and is not zero.

#![cfg_attr(
    test,
    expect(clippy::single_range_in_vec_init, reason = "a set of addresses is a list of ranges")
)]

pub mod areas;
pub mod converge;
pub mod copier;
pub mod images;
pub mod precopy;
pub mod ranges;
pub mod space;
pub mod store;
pub mod tracker;
pub mod wire;

/// Bytes of a page of this machine.
#[must_use]
pub fn page_size() -> u64 {
    use std::sync::OnceLock;
    static SIZE: OnceLock<u64> = OnceLock::new();
    *SIZE.get_or_init(|| {
        let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
        size.ok().flatten().and_then(|s| u64::try_from(s).ok()).unwrap_or(4096)
    })
}
