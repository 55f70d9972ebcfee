//! The node's agent: the only program of ours with lasting host rights.
//!
//! | module | holds |
//! |---|---|
//! | [`args`] | the command line |
//! | [`host`] | the node's namespaces, joined first |
//! | [`install`] | wrapper, runtime handler, and their undo |
//! | [`identity`] | key, certificate, TLS settings |
//! | [`pod_on_node`] | sandbox and containers of a pod, as containerd and runc know them |
//! | [`error`] | printing an error with its causes |

pub mod args;
pub mod error;
pub mod host;
pub mod identity;
pub mod install;
pub mod pod_on_node;
