//! A conversion allocates nothing: a guest may ask for as many as it likes.

use std::sync::Arc;

use allocation_counter::measure;
use privmem::{GRANULE, Region, Side, Vm};

/// Regions of `granules` each, one behind the other.
fn regions<const N: usize>(vm: &Arc<Vm>, granules: u64) -> [Arc<Region>; N] {
    std::array::from_fn(|number| {
        let size = granules * GRANULE;
        let region = Region::new(vm, &format!("r{number}"), size).unwrap();
        vm.bind(&region, 0, number as u64 * size, size).unwrap();
        region
    })
}

#[test]
fn a_conversion_allocates_nothing() {
    let vm = Vm::emulated().unwrap();
    let _regions: [_; 2] = regions(&vm, 4096);
    let convert = |first: u64, granules: u64, to| {
        let done = vm.convert(first * GRANULE, granules * GRANULE, to);
        assert_eq!(done.unwrap(), granules * GRANULE);
    };
    // A thread's first read of the bindings notes the thread.
    convert(0, 1, Side::Shared);
    let counted = measure(|| {
        // One page, as many runs as there can be, and across both regions.
        convert(7, 1, Side::Private);
        (0..512).for_each(|pair| convert(2 * pair, 1, Side::Private));
        convert(0, 1024, Side::Private);
        convert(3000, 3000, Side::Private);
        convert(0, 8192, Side::Shared);
    });
    assert_eq!(counted.count_total, 0, "{counted:?}");
}
