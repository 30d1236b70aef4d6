//! The pure modules by enumeration of small cases, and by two threads at once.
//! Everything here runs under Miri as well (`cargo xtask test --suite miri`),
//! which takes the tests by the names of these modules.

mod range {
    use privmem::{GRANULE, Range};

    /// Every range within six granules.
    fn small() -> impl Iterator<Item = (u64, u64)> {
        (0..6).flat_map(|start| (start + 1..=6).map(move |end| (start, end)))
    }

    fn range((start, end): (u64, u64)) -> Range {
        Range::new(start * GRANULE, (end - start) * GRANULE).unwrap()
    }

    #[test]
    fn an_intersection_is_what_both_have() {
        for a in small() {
            for b in small() {
                let common: Vec<u64> = (a.0..a.1).filter(|n| (b.0..b.1).contains(n)).collect();
                let expected = common.first().map(|first| {
                    let last = common[common.len() - 1];
                    range((*first, last + 1))
                });
                assert_eq!(range(a).intersection(&range(b)), expected);
                assert_eq!(range(a).overlaps(&range(b)), expected.is_some());
            }
        }
    }

    #[test]
    fn a_range_shows_where_it_starts_and_how_long_it_is() {
        assert_eq!(range((2, 5)).to_string(), "0x2000+0x3000");
    }
}

mod state {
    use privmem::{Side, StateMap};
    use std::thread;

    /// Next to the ends of the map's words, which have 64 bits.
    const BOUNDS: [usize; 7] = [0, 1, 63, 64, 65, 128, 130];

    fn assert_same(map: &StateMap, model: &[Side]) {
        let len = model.len();
        assert!((0..len).all(|granule| map.side(granule) == model[granule]));
        let private = model.iter().filter(|side| **side == Side::Private);
        assert_eq!(map.count_private(0..len), private.count());
        let expected = model.chunk_by(|a, b| a == b).map(|run| (run.len(), run[0]));
        let runs = map.runs(0..len).map(|run| (run.granules.len(), run.side));
        assert!(runs.eq(expected));
    }

    #[test]
    fn a_change_between_any_two_bounds_is_that_of_a_vec() {
        for len in BOUNDS {
            for start in BOUNDS {
                for end in BOUNDS
                    .into_iter()
                    .filter(|end| start <= *end && *end <= len)
                {
                    let map = StateMap::new(len, Side::Shared).unwrap();
                    let mut model = vec![Side::Shared; len];
                    map.set(start..end, Side::Private);
                    model[start..end].fill(Side::Private);
                    assert_same(&map, &model);
                    map.set(0..len, Side::Private);
                    map.set(start..end, Side::Shared);
                    model.fill(Side::Private);
                    model[start..end].fill(Side::Shared);
                    assert_same(&map, &model);
                }
            }
        }
    }

    #[test]
    fn an_empty_map_has_nothing_to_show() {
        let map = StateMap::new(0, Side::Shared).unwrap();
        assert!(map.is_empty());
        assert_eq!((map.len(), map.runs(0..0).count()), (0, 0));
        assert_eq!(map.picture(8), "");
        let map = StateMap::new(65, Side::Shared).unwrap();
        assert!(!map.is_empty());
        assert_eq!(map.len(), 65);
    }

    #[test]
    fn writers_of_one_word_do_not_undo_each_other() {
        let map = StateMap::new(64, Side::Shared).unwrap();
        map.set(32..64, Side::Private);
        let set_one_by_one = |granules, side| {
            for granule in granules {
                map.set(granule..granule + 1, side);
                thread::yield_now();
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| set_one_by_one(0..32, Side::Private));
            scope.spawn(|| set_one_by_one(32..64, Side::Shared));
        });
        assert_eq!(map.count_private(0..32), 32);
        assert_eq!(map.count_private(32..64), 0);
    }
}
