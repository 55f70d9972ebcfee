//! The OCI runtime of the handler `peregrine`: a call passes unchanged to the node's runtime unless it concerns a container
//! for which this node's agent has left a valid hand-off.
//!
//! ```text
//! containerd's shim ── create ──> wrapper ── hand-off? ── no ──> runc (or a refusal: a target never starts cold)
//!                                    │ yes
//!                                    └─ starts the shepherd, returns its pid
//! agent ── Restore ──> shepherd ── runc restore --detach ── criu ── hold: freezes the restored cgroup at `pre-resume`
//! agent ── thaws the cgroup itself after the commit; shepherd ends as the restored first process ends
//! ```
//!
//! If the shepherd is killed before the commit, the restored processes stay *frozen* in their cgroup, because nothing ties
//! their life to its life (CRIU restores no parent-death signal). They end with the next `kill` or `delete` of the container,
//! which containerd sends because it takes the shepherd for the first process, or with the agent's abort.
//!
//! | module | holds |
//! |---|---|
//! | [`argv`] | verb, id and options of a call; what is unknown passes untouched |
//! | [`verdict`] | pure: what to do with a call |
//! | [`spec`] | what is read from a bundle's config.json |
//! | [`settings`] | the installer's settings |
//! | [`hand_off`] | waits for it, checks it, uses it once |
//! | [`create`] | starts a shepherd, or refuses |
//! | [`folder`] | the files of a shepherd |
//! | [`answer`] | the calls that are answered for a shepherd |
//! | [`shepherd`] | stands for a container until and after its restore |
//! | [`restore`] | `runc restore` by the hand-off alone |
//! | [`hold`] | run by CRIU as action script: leaves the restored tree frozen |
//! | [`pager`] | puts a restored pod's memory in place while the pod runs |
//! | [`criu`] | stands before CRIU in PATH |
//! | [`multipath`] | switches Multipath TCP off in a sandbox |
//! | [`complain`] | errors as containerd and users read them |

#![forbid(unsafe_code)]

pub mod answer;
pub mod argv;
pub mod complain;
pub mod create;
pub mod criu;
pub mod folder;
pub mod hand_off;
pub mod hold;
pub mod multipath;
pub mod pager;
pub mod park;
pub mod restore;
pub mod run;
pub mod settings;
pub mod shepherd;
pub mod spec;
pub mod tar;
pub mod verdict;
