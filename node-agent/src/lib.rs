//! The node's agent: the only program of ours with lasting host rights.
//!
//! | module | holds |
//! |---|---|
//! | [`args`] | the command line |
//! | [`admin`] | health and metrics over HTTP |
//! | [`context`] | the API client |
//! | [`metrics`] | metrics |
//! | [`node_status`] | MigrationNode and heartbeat |
//! | [`preflight`] | looks at a pod before it is touched |
//! | [`probe`] | what the node can do, by trying |
//! | [`run`] | the agent's life |
//! | [`watches`] | migrations of this node |
//! | [`host`] | the node's namespaces, joined first |
//! | [`install`] | wrapper, runtime handler, and their undo |
//! | [`identity`] | key, certificate, TLS settings |
//! | [`pod_on_node`] | sandbox and containers of a pod, as containerd and runc know them |
//! | [`cure`] | CRIU's images, cured |
//! | [`decide`] | decisions, pure |
//! | [`fault`] | faults, for tests only |
//! | [`inventory`] | what a pod's processes hold |
//! | [`journal`] | what a session is about to do, before it does it |
//! | [`files`] | file trees on their way |
//! | [`outbox`] | what a source has to send |
//! | [`page_link`] | connections for memory pages |
//! | [`pager`] | fills a restored pod's memory while it runs |
//! | [`peer`] | connections between agents |
//! | [`checkpoint`] | a dump of one container |
//! | [`holding`] | a pod held on its source |
//! | [`session`] | an attempt on this node |
//! | [`error`] | printing an error with its causes |

pub mod admin;
pub mod args;
pub mod checkpoint;
pub mod context;
pub mod cure;
pub mod decide;
pub mod error;
pub mod fault;
pub mod files;
pub mod holding;
pub mod host;
pub mod identity;
pub mod install;
pub mod inventory;
pub mod journal;
pub mod metrics;
pub mod nameless;
pub mod node_status;
pub mod outbox;
pub mod page_link;
pub mod pager;
pub mod peer;
pub mod pod_on_node;
pub mod preflight;
pub mod probe;
pub mod run;
pub mod session;
mod start;
pub mod watches;

pub use start::start;
