//! Puts a restored pod's memory in place while the pod runs already: the target's side of `criu restore --lazy-pages`.

pub mod book;
pub mod holders;
pub mod pending;
