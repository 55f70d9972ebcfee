//! The only `unsafe` code and raw system calls of Peregrine, behind safe functions. Knows no Kubernetes and no migration.
//!
//! | module | holds |
//! |---|---|
//! | [`node_namespaces`] | joining the namespaces of the node's first process |
//! | [`kernel_features`] | what the kernel can do, by trying |
//! | [`cpu`] | extended state and architecture of the processor |
//! | [`cgroup`] | freeze, thaw, kill, list, move |
//! | [`program`] | run one program, with a deadline |
//! | [`beneath`] | files below a folder, never through a link |
//! | [`namespace`] | enter namespaces; handles of processes |
//! | [`nft`] | the packet hold |
//! | [`inet_diag`] | TCP and UDP sockets; the end of one |
//! | [`addresses`] | addresses of a network namespace |
//! | [`pagemap`] | which pages of a process are there, and which were written |
//! | [`perf`] | the held perf event |
//! | [`ptrace`] | a stopped thread; a system call that begins again |
//! | [`rcu`] | short grace periods during a freeze |
//! | [`descriptor`] | what an open file is |
//! | [`missing_pages`] | missing pages of other processes |
//! | [`kin`], [`shared_words`] | processes that share descriptors and a little memory |
//! | [`own_memory`] | what programs do to their memory, for test programs |
//! | [`rights`] | descriptors sent over sockets |
//! | [`sock_diag`] | sockets of a network namespace by netlink |
//! | [`userfaultfd`] | one of another process, made by ptrace |
//! | [`warm_memory`] | free memory, ready before it is needed |

pub mod addresses;
pub mod beneath;
pub mod cgroup;
pub mod cpu;
pub mod descriptor;
pub mod inet_diag;
pub mod kernel_features;
pub mod kin;
pub mod missing_pages;
pub mod namespace;
pub mod nft;
pub mod node_namespaces;
pub mod own_memory;
pub mod pagemap;
pub mod perf;
pub mod program;
pub mod ptrace;
pub mod rcu;
pub mod rights;
pub mod shared_words;
pub mod sock_diag;
pub mod userfaultfd;
pub mod warm_memory;
