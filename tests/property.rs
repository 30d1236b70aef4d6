//! The library against models that are too simple to be wrong.

mod common;

use common::Model;
use privmem::{GRANULE, Side, StateMap};
use proptest::prelude::*;

fn any_side() -> impl Strategy<Value = Side> {
    prop_oneof![Just(Side::Shared), Just(Side::Private)]
}

/// Where the words of a map end, and where its blocks of 4096 granules and the
/// counts of four of them do.
fn any_place() -> impl Strategy<Value = usize> {
    prop_oneof![
        0usize..400,
        (0usize..9, 0usize..3).prop_map(|(blocks, more)| (blocks * 4096 + more).saturating_sub(1)),
    ]
}

proptest! {
    /// The state map does what one `bool` a granule does.
    #[test]
    fn state_map_is_a_vec_of_bool(
        len in any_place(),
        initial in any_side(),
        steps in prop::collection::vec((any_place(), any_place(), any_side()), 0..40),
        look in (any_place(), any_place()),
    ) {
        let map = StateMap::new(len, initial).unwrap();
        let mut model = vec![initial; len];
        for (a, b, side) in steps {
            let (start, end) = ordered(a, b, len);
            map.set(start..end, side);
            model[start..end].fill(side);
        }
        prop_assert!((0..len).all(|g| map.side(g) == model[g]));
        let all = model.iter().filter(|s| **s == Side::Private).count();
        prop_assert_eq!(map.count_private(0..len), all);
        let saved = StateMap::from_bytes(len, &map.to_bytes()).unwrap();
        prop_assert!((0..len).all(|g| saved.side(g) == model[g]));
        prop_assert_eq!(saved.count_private(0..len), all);
        prop_assert!(saved.runs(0..len).eq(map.runs(0..len)));
        let (start, end) = ordered(look.0, look.1, len);
        let private = model[start..end].iter().filter(|s| **s == Side::Private).count();
        prop_assert_eq!(map.count_private(start..end), private);
        let mut at = start;
        for run in map.runs(start..end) {
            prop_assert_eq!(run.granules.start, at);
            prop_assert!(run.granules.end > at);
            prop_assert!(model[run.granules.clone()].iter().all(|s| *s == run.side));
            let next = run.granules.end;
            prop_assert!(next == end || model[next] != run.side);
            at = next;
        }
        prop_assert_eq!(at, end);
    }

    /// Whatever is asked for, the state map, the kernel's attributes, the
    /// pages held and the model agree after every request.
    #[test]
    fn conversions_agree_with_the_kernel(
        steps in prop::collection::vec((0u64..90, 0u64..40, any_side(), 0u64..80), 1..40),
    ) {
        // Guest-physical granules: 0..32 and 32..48 of two regions, a hole,
        // 64..80 the rest of the first.
        let kernel = Model::new();
        let vm = kernel.vm();
        let first = privmem::Region::new(&vm, "first", 48 * GRANULE).unwrap();
        let second = privmem::Region::new(&vm, "second", 16 * GRANULE).unwrap();
        vm.bind(&first, 0, 0, 32 * GRANULE).unwrap();
        vm.bind(&second, 0, 32 * GRANULE, 16 * GRANULE).unwrap();
        vm.bind(&first, 32 * GRANULE, 64 * GRANULE, 16 * GRANULE).unwrap();
        let place = |gpa: u64| match gpa {
            0..32 => Some((&first, gpa)),
            32..48 => Some((&second, gpa - 32)),
            64..80 => Some((&first, gpa - 32)),
            _ => None,
        };
        let mut model = [Side::Shared; 80];
        for (start, len, to, touched) in steps {
            if let Some((region, granule)) = place(touched) {
                kernel.touch(region, model[touched as usize], granule);
            }
            let range = start..start + len;
            let allowed = len != 0
                && (to == Side::Shared || range.clone().all(|g| place(g).is_some()));
            let result = vm.convert(start * GRANULE, len * GRANULE, to);
            prop_assert_eq!(result.is_ok(), allowed, "{:?}", result);
            if allowed {
                range.filter(|g| place(*g).is_some()).for_each(|g| model[g as usize] = to);
            }
            for gpa in 0..80u64 {
                let Some((region, granule)) = place(gpa) else { continue };
                let side = model[gpa as usize];
                prop_assert_eq!(region.runs(granule * GRANULE, GRANULE).unwrap().next().unwrap().side, side);
                prop_assert_eq!(kernel.pages().private.contains(&gpa), side == Side::Private);
            }
            for region in [&first, &second] {
                prop_assert_eq!(region.info().held_twice, Some(0));
            }
        }
    }
}

fn ordered(a: usize, b: usize, len: usize) -> (usize, usize) {
    (a.min(b).min(len), a.max(b).min(len))
}
