//! The emulated agent at the host's limit of mappings. In a program of its own,
//! because the limit is that of the whole process.

mod common;

use common::mapped::Mapped;
use privmem::{GRANULE, Side};

#[test]
fn a_host_that_runs_out_of_mappings_refuses_and_goes_on() {
    let limit: u64 = std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    if limit > 1 << 20 {
        println!("skipped: vm.max_map_count is {limit}, too many to use up");
        return;
    }
    let elsewhere: Vec<_> = (0..8).map(|_| Mapped::new(1)).collect();
    let mapped = Mapped::new(2 * limit);
    let refused = (0..limit)
        .map(|pair| 2 * pair)
        .find_map(|granule| Some((granule, mapped.convert(granule, 1, Side::Private).err()?)));
    let (granule, error) = refused.expect("every other page needs a mapping of its own");
    assert!(error.to_string().contains("max_map_count"), "{error}");
    let info = mapped.region.info();
    assert_eq!(info.private, granule / 2 * GRANULE);
    assert_eq!(info.failed_conversions, 1);
    // At the limit the kernel refuses every mmap(2), even one that would end
    // with fewer mappings. Once there is room again, so is a way back.
    drop(elsewhere);
    mapped.convert(0, 2 * limit, Side::Shared).unwrap();
    assert_eq!(mapped.region.info().private, 0);
}
