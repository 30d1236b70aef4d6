//! The emulated trust agent on the running kernel, contents included.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use privmem::{GRANULE, Region, Side, Vm};

/// A region that is mapped as a VMM maps it, and bound at 0.
struct Mapped {
    vm: Arc<Vm>,
    region: Arc<Region>,
    host: *mut u8,
}

impl Mapped {
    fn new(granules: u64) -> Mapped {
        let vm = Vm::emulated();
        let size = granules * GRANULE;
        let region = Region::new(&vm, "emulated", size).unwrap();
        let fd = region.store(Side::Shared).fd().as_raw_fd();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let host = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size as usize,
                protection,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        assert_ne!(host, libc::MAP_FAILED);
        // SAFETY: the mapping has the region's size and lives until `drop`.
        unsafe { region.set_host_mapping(host as usize) }.unwrap();
        vm.bind(&region, 0, 0, size).unwrap();
        let host = host.cast();
        Mapped { vm, region, host }
    }

    fn granule(&mut self, number: u64) -> &mut [u8] {
        assert!(number * GRANULE < self.region.size());
        // SAFETY: within the mapping, which only this borrow reaches.
        unsafe {
            let start = self.host.add((number * GRANULE) as usize);
            std::slice::from_raw_parts_mut(start, GRANULE as usize)
        }
    }

    fn convert(&self, granule: u64, count: u64, to: Side) -> privmem::Result<()> {
        self.vm.convert(granule * GRANULE, count * GRANULE, to)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made; nobody converts any more.
        unsafe { libc::munmap(self.host.cast(), self.region.size() as usize) };
    }
}

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
        eprintln!("skipped: this kernel has no cachestat(2)");
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

#[test]
fn a_host_that_runs_out_of_mappings_refuses_and_goes_on() {
    let limit: u64 = std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    if limit > 1 << 20 {
        eprintln!("skipped: vm.max_map_count is {limit}, too many to use up");
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
