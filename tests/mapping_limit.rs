//! The emulated agent at the host's limit of mappings. In a program of its own,
//! because the limit is that of the whole process.

mod common;

use common::convert;
use common::mapping::HostMapping;
use privmem::{GRANULE, Region, Side, Vm};

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
    let vm = Vm::emulated().unwrap();
    let region = |granules| Region::new(&vm, "emulated", granules * GRANULE).unwrap();
    let elsewhere: Vec<_> = (0..8).map(|_| HostMapping::new(&region(1))).collect();
    let region = region(2 * limit);
    let _mapping = HostMapping::new(&region);
    vm.bind(&region, 0, 0, region.size()).unwrap();
    let refused = (0..limit).map(|pair| 2 * pair).find_map(|granule| {
        let error = convert(&vm, granule..granule + 1, Side::Private).err()?;
        Some((granule, error))
    });
    let (granule, error) = refused.expect("every other page needs a mapping of its own");
    assert!(error.to_string().contains("max_map_count"), "{error}");
    let info = region.info();
    assert_eq!(info.private, granule / 2 * GRANULE);
    assert_eq!(info.failed_conversions, 1);
    // At the limit the kernel refuses every mmap(2), even one that would end
    // with fewer mappings. Once there is room again, so is a way back.
    drop(elsewhere);
    convert(&vm, 0..2 * limit, Side::Shared).unwrap();
    assert_eq!(region.info().private, 0);
}
