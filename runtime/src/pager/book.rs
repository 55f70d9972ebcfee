//! What is missing in which address space, and what of the stores nobody needs any more. Pure: the pager does what is said
//! here with locks around its parts; the tests compare it with a model that knows every page by itself.

use std::ops::Range;

use super::holders::Holders;
use super::pending::{Pending, Piece};

/// What has happened to an address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Memory was dropped or unmapped.
    Drop {
        /// First byte.
        start: u64,
        /// Behind the last byte.
        end: u64,
    },
    /// Memory has moved.
    Move {
        /// From here.
        from: u64,
        /// To here.
        to: u64,
        /// So many bytes.
        len: u64,
    },
}

/// Heeds a change. Returns the pages that are not needed for this address space any more.
pub fn heed(pending: &mut Pending, change: Change) -> Vec<Piece> {
    match change {
        Change::Drop { start, end } => pending.take(&(start..end)),
        Change::Move { from, to, len } => pending.remap(from, to, len),
    }
}

/// Notes that a child needs all that its parent still misses.
pub fn fork(parent: &Pending, holders: &mut Holders) -> Pending {
    for piece in parent.pieces() {
        holders.hold(&piece.stored());
    }
    parent.clone()
}

/// Notes that these pages are in place, or not needed, for one address space. Returns what can be given back.
pub fn release(holders: &mut Holders, pieces: &[Piece]) -> Vec<Range<u64>> {
    pieces
        .iter()
        .flat_map(|piece| holders.release(&piece.stored()))
        .collect()
}

#[cfg(test)]
mod tests;
