//! Random programs of events against a model in which every page is known by itself.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const PAGES: u64 = 64;
const PAGE: u64 = 4096;

#[derive(Clone, Debug)]
enum Op {
    Drop {
        space: usize,
        start: u64,
        pages: u64,
    },
    Move {
        space: usize,
        from: u64,
        to: u64,
        pages: u64,
    },
    Fork {
        space: usize,
    },
    Fill {
        space: usize,
        start: u64,
        pages: u64,
        most: u64,
    },
    GiveBack {
        space: usize,
        start: u64,
        pages: u64,
    },
    Exit {
        space: usize,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let (space, at, n) = (0usize..8, 0..PAGES, 1..20u64);
    prop_oneof![
        (space.clone(), at.clone(), n.clone()).prop_map(|(space, start, pages)| Op::Drop { space, start, pages }),
        (space.clone(), at.clone(), at.clone(), n.clone()).prop_map(|(space, from, to, pages)| Op::Move {
            space,
            from,
            to,
            pages
        }),
        space.clone().prop_map(|space| Op::Fork { space }),
        (space.clone(), at.clone(), n.clone(), 1..5u64).prop_map(|(space, start, pages, most)| Op::Fill {
            space,
            start,
            pages,
            most
        }),
        (space.clone(), at, n).prop_map(|(space, start, pages)| Op::GiveBack { space, start, pages }),
        space.prop_map(|space| Op::Exit { space }),
    ]
}

/// Page number -> page number in the store, for each address space.
type Model = Vec<BTreeMap<u64, u64>>;

fn pages_of(pieces: &[Piece]) -> BTreeMap<u64, u64> {
    let mut pages = BTreeMap::new();
    for piece in pieces {
        for i in 0..piece.len / PAGE {
            let old = pages.insert(piece.address / PAGE + i, piece.store / PAGE + i);
            assert_eq!(old, None, "a page stands there twice");
        }
    }
    pages
}

fn bytes(start: u64, pages: u64) -> Range<u64> {
    start * PAGE..(start + pages) * PAGE
}

/// Takes from the model what lies in the range.
fn cut(model: &mut BTreeMap<u64, u64>, start: u64, pages: u64) -> BTreeMap<u64, u64> {
    let mut inside = model.split_off(&start);
    let mut rest = inside.split_off(&(start + pages));
    model.append(&mut rest);
    inside
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_book_agrees_with_a_model_of_single_pages(
        runs in proptest::collection::btree_set(0..PAGES, 0..40),
        ops in proptest::collection::vec(op(), 0..60),
    ) {
        let ranges: Vec<Range<u64>> = runs.iter().map(|page| bytes(*page, 1)).collect();
        let mut holders = Holders::default();
        let mut spaces = vec![Pending::of(ranges)];
        for piece in spaces[0].pieces() {
            holders.hold(&piece.stored());
        }
        let mut model: Model = vec![runs.iter().map(|page| (*page, *page)).collect()];
        let mut given_back = BTreeSet::new();
        for op in ops {
            let mut freed = Vec::new();
            match op {
                Op::Drop { space, start, pages } => {
                    let space = space % spaces.len();
                    let range = bytes(start, pages);
                    let gone = heed(&mut spaces[space], Change::Drop { start: range.start, end: range.end });
                    prop_assert_eq!(pages_of(&gone), cut(&mut model[space], start, pages));
                    freed = release(&mut holders, &gone);
                }
                Op::Move { space, from, to, pages } => {
                    let space = space % spaces.len();
                    let gone = heed(&mut spaces[space], Change::Move { from: from * PAGE, to: to * PAGE, len: pages * PAGE });
                    let moved = cut(&mut model[space], from, pages);
                    let lost = cut(&mut model[space], to, pages);
                    model[space].extend(moved.into_iter().map(|(page, store)| (page - from + to, store)));
                    prop_assert_eq!(pages_of(&gone), lost);
                    freed = release(&mut holders, &gone);
                }
                Op::Fork { space } => {
                    if spaces.len() < 8 {
                        let space = space % spaces.len();
                        spaces.push(fork(&spaces[space], &mut holders));
                        model.push(model[space].clone());
                    }
                }
                Op::Fill { space, start, pages, most } => {
                    let space = space % spaces.len();
                    if let Some(piece) = spaces[space].take_first(&bytes(start, pages), most * PAGE) {
                        prop_assert!(piece.len <= most * PAGE);
                        let first = model[space].range(start..start + pages).next().map(|(page, _)| *page);
                        prop_assert_eq!(Some(piece.address / PAGE), first, "not the first");
                        for (page, store) in pages_of(&[piece]) {
                            prop_assert_eq!(model[space].remove(&page), Some(store));
                        }
                        freed = release(&mut holders, &[piece]);
                    } else {
                        prop_assert_eq!(model[space].range(start..start + pages).next(), None);
                    }
                }
                Op::GiveBack { space, start, pages } => {
                    // A copy that was refused: all stays as it was.
                    let space = space % spaces.len();
                    let before = spaces[space].bytes();
                    for piece in spaces[space].take(&bytes(start, pages)) {
                        spaces[space].put(piece);
                    }
                    prop_assert_eq!(before, spaces[space].bytes());
                }
                Op::Exit { space } => {
                    let space = space % spaces.len();
                    let gone = spaces[space].take(&(0..u64::MAX));
                    model[space].clear();
                    freed = release(&mut holders, &gone);
                }
            }
            for range in freed {
                for page in range.start / PAGE..range.end / PAGE {
                    prop_assert!(given_back.insert(page), "given back twice");
                }
            }
            for (pending, model) in spaces.iter().zip(&model) {
                let pieces: Vec<Piece> = pending.pieces().collect();
                prop_assert_eq!(&pages_of(&pieces), model);
                prop_assert_eq!(pending.bytes(), model.len() as u64 * PAGE);
                prop_assert_eq!(pending.is_empty(), model.is_empty());
            }
            let needed: BTreeSet<u64> = model.iter().flat_map(|m| m.values().copied()).collect();
            prop_assert!(needed.is_disjoint(&given_back), "given back what somebody needs");
            let never: BTreeSet<u64> = runs.difference(&needed).copied().collect();
            prop_assert_eq!(&never, &given_back, "kept what nobody needs");
            prop_assert_eq!(holders.bytes(), needed.len() as u64 * PAGE);
        }
    }
}
