//! Sets of addresses: sorted, disjoint ranges that do not touch. All operations go once through both sets; a process has
//! some thousands of ranges, and a fragmented one a million.

use std::ops::Range;

/// A set of addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(Vec<Range<u64>>);

impl Ranges {
    /// The empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a range that begins at or behind the beginning of the last one; an empty one is left out.
    pub fn push(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        match self.0.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => self.0.push(range),
        }
    }

    /// The ranges.
    #[must_use]
    pub fn as_slice(&self) -> &[Range<u64>] {
        &self.0
    }

    /// The ranges, by value.
    #[must_use]
    pub fn into_vec(self) -> Vec<Range<u64>> {
        self.0
    }

    /// How many addresses are in it.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|r| r.end - r.start).sum()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What is in either.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let (mut a, mut b) = (self.0.iter().peekable(), other.0.iter().peekable());
        let mut out = Self::new();
        loop {
            let next = match (a.peek(), b.peek()) {
                (Some(x), Some(y)) if x.start <= y.start => a.next(),
                (_, Some(_)) => b.next(),
                (Some(_), None) => a.next(),
                (None, None) => return out,
            };
            if let Some(range) = next {
                out.push(range.clone());
            }
        }
    }

    /// What is in both.
    #[must_use]
    pub fn intersect(&self, other: &Self) -> Self {
        let (mut a, mut b) = (self.0.iter().peekable(), other.0.iter().peekable());
        let mut out = Self::new();
        while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
            out.push(x.start.max(y.start)..x.end.min(y.end));
            if x.end <= y.end {
                a.next();
            } else {
                b.next();
            }
        }
        out
    }

    /// What is in this and not in the other.
    #[must_use]
    pub fn subtract(&self, other: &Self) -> Self {
        let mut b = other.0.iter().peekable();
        let mut out = Self::new();
        for range in &self.0 {
            let mut at = range.start;
            while at < range.end {
                while b.next_if(|y| y.end <= at).is_some() {}
                match b.peek() {
                    Some(y) if y.start < range.end => {
                        out.push(at..y.start);
                        at = y.end;
                    }
                    _ => {
                        out.push(at..range.end);
                        at = range.end;
                    }
                }
            }
        }
        out
    }
}

impl FromIterator<Range<u64>> for Ranges {
    /// The ranges must come in the order of their beginnings.
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut out = Self::new();
        for range in ranges {
            out.push(range);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn set(ranges: &Ranges) -> BTreeSet<u64> {
        ranges.0.iter().flat_map(Clone::clone).collect()
    }

    fn some() -> impl Strategy<Value = Ranges> {
        proptest::collection::btree_set(0u64..64, 0..40).prop_map(|s| s.into_iter().map(|n| n..n + 1).collect())
    }

    proptest! {
        #[test]
        fn operations_are_those_of_sets(a in some(), b in some()) {
            let (x, y) = (set(&a), set(&b));
            prop_assert_eq!(set(&a.union(&b)), x.union(&y).copied().collect::<BTreeSet<_>>());
            prop_assert_eq!(set(&a.intersect(&b)), x.intersection(&y).copied().collect::<BTreeSet<_>>());
            prop_assert_eq!(set(&a.subtract(&b)), x.difference(&y).copied().collect::<BTreeSet<_>>());
            for r in [a.union(&b), a.intersect(&b), a.subtract(&b)] {
                prop_assert!(r.0.windows(2).all(|w| w[0].end < w[1].start), "{:?}", r);
                prop_assert_eq!(r.bytes(), set(&r).len() as u64);
            }
        }
    }
}
