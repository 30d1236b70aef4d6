//! The emulated trust agent on the running kernel, contents included.

mod common;

use common::mapped::Mapped;
use privmem::{GRANULE, Side};

#[test]
fn a_page_that_changed_side_reads_zero_and_neighbours_are_untouched() {
    let mut mapped = Mapped::new(64);
    for granule in 0..64 {
        mapped.granule(granule).fill(granule as u8 + 1);
    }
    for to in [Side::Private, Side::Shared] {
        mapped.convert(10, 3, to).unwrap();
        for granule in 0..64 {
            let expected = if (10..13).contains(&granule) {
                0
            } else {
                granule as u8 + 1
            };
            assert!(mapped.granule(granule).iter().all(|b| *b == expected));
        }
    }
}

#[test]
fn memory_is_held_on_one_side_only() {
    let mut mapped = Mapped::new(64);
    let total = |info: privmem::Info| info.private_held.zip(info.shared_held);
    if total(mapped.region.info()).is_none() || mapped.region.info().held_twice.is_none() {
        println!("skipped: this kernel has no cachestat(2)");
        return;
    }
    (0..64).for_each(|granule| mapped.granule(granule).fill(1));
    mapped.convert(0, 32, Side::Private).unwrap();
    assert_eq!(total(mapped.region.info()), Some((0, 32 * GRANULE)));
    (0..64).for_each(|granule| mapped.granule(granule).fill(2));
    assert_eq!(
        total(mapped.region.info()),
        Some((32 * GRANULE, 32 * GRANULE))
    );
    mapped.convert(0, 64, Side::Shared).unwrap();
    assert_eq!(total(mapped.region.info()), Some((0, 32 * GRANULE)));
    assert_eq!(mapped.region.info().held_twice, Some(0));
}
