//! Which pages of an address space are still to be put in place, and where in the store they are. Pure.
//!
//! At first a page's place in the store is its address; mremap changes the address only.

use std::collections::BTreeMap;
use std::ops::Range;

/// Adjacent pages that are adjacent in the store too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where they belong.
    pub address: u64,
    /// Where they are in the store.
    pub store: u64,
    /// Bytes.
    pub len: u64,
}

impl Piece {
    /// The part from `offset` on, at most `len` bytes.
    #[must_use]
    pub fn part(self, offset: u64, len: u64) -> Self {
        let offset = offset.min(self.len);
        Self {
            address: self.address + offset,
            store: self.store + offset,
            len: len.min(self.len - offset),
        }
    }

    /// Its bytes in the store.
    #[must_use]
    pub fn stored(self) -> Range<u64> {
        self.store..self.store + self.len
    }
}

/// All of an address space that is missing. Ranges are of whole pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// By address: length and place in the store. Disjoint.
    pieces: BTreeMap<u64, (u64, u64)>,
    bytes: u64,
}

impl Pending {
    /// Pages whose place in the store is their address.
    #[must_use]
    pub fn of(ranges: impl IntoIterator<Item = Range<u64>>) -> Self {
        let mut pending = Self::default();
        for range in ranges {
            pending.put(Piece {
                address: range.start,
                store: range.start,
                len: range.end.saturating_sub(range.start),
            });
        }
        pending
    }

    /// Bytes that are missing.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether nothing is missing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// All that is missing, by address.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> {
        self.pieces
            .iter()
            .map(|(&address, &(len, store))| Piece { address, store, len })
    }

    /// Adds pages that are not there.
    pub fn put(&mut self, piece: Piece) {
        if piece.len == 0 {
            return;
        }
        self.bytes += piece.len;
        let mut new = piece;
        // Together with its neighbours where it continues them: what was given back must not stay in crumbs.
        if let Some((&address, &(len, store))) = self.pieces.range(..new.address).next_back()
            && address + len == new.address
            && store + len == new.store
        {
            self.pieces.remove(&address);
            new = Piece {
                address,
                store,
                len: len + new.len,
            };
        }
        let end = new.address + new.len;
        if let Some(&(len, store)) = self.pieces.get(&end)
            && store == new.store + new.len
        {
            self.pieces.remove(&end);
            new.len += len;
        }
        self.pieces.insert(new.address, (new.len, new.store));
    }

    /// Takes out the first pages in this range of addresses, at most `most` bytes.
    pub fn take_first(&mut self, range: &Range<u64>, most: u64) -> Option<Piece> {
        let before = self
            .pieces
            .range(..=range.start)
            .next_back()
            .filter(|(address, (len, _))| **address + len > range.start);
        let (&address, &(len, store)) = match before {
            Some(found) => Some(found),
            None => self.pieces.range(range.start..).next(),
        }?;
        let start = address.max(range.start);
        if start >= range.end {
            return None;
        }
        let whole = Piece { address, store, len };
        let taken = whole.part(start - address, most.min(range.end - start));
        self.pieces.remove(&address);
        self.bytes -= taken.len;
        for rest in [
            whole.part(0, start - address),
            whole.part(start - address + taken.len, u64::MAX),
        ] {
            if rest.len > 0 {
                self.pieces.insert(rest.address, (rest.len, rest.store));
            }
        }
        (taken.len > 0).then_some(taken)
    }

    /// Takes out all pages in this range of addresses.
    pub fn take(&mut self, range: &Range<u64>) -> Vec<Piece> {
        std::iter::from_fn(|| self.take_first(range, u64::MAX)).collect()
    }

    /// Memory has moved. Returns what was missing where it moved to: the kernel unmaps that first, and says so before.
    pub fn remap(&mut self, from: u64, to: u64, len: u64) -> Vec<Piece> {
        let moved = self.take(&(from..from.saturating_add(len)));
        let lost = self.take(&(to..to.saturating_add(len)));
        for piece in moved {
            self.put(Piece {
                address: to.saturating_add(piece.address - from),
                ..piece
            });
        }
        lost
    }
}
