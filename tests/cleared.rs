//! Memory that the library allocates has been cleared before anybody touches it, whichever way it
//! was allocated. A CPU cannot see the difference, a device can; see src/KERNEL.md. mincore(2)
//! tells which pages of a memfd have been cleared: it looks for pages that are up to date.

mod common;

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::Arc;

use Side::{Private, Shared};
use common::convert;
use common::mapping::HostMapping;
use privmem::kernel::{Kernel, Linux};
use privmem::{Destination, GRANULE, Level, NumaPolicy, Options, Region, Side, Vm};

const GRANULES: u64 = 64;
const SIZE: u64 = GRANULES * GRANULE;

struct Setup {
    vm: Arc<Vm>,
    region: Arc<Region>,
    _mapping: HostMapping,
}

/// A region of which nothing has been touched or allocated.
fn untouched(initial: Side) -> Setup {
    let vm = Vm::emulated().unwrap();
    let options = Options {
        initial,
        ..Options::default()
    };
    let region = Region::with_options(&vm, "ram", SIZE, options).unwrap();
    let mapping = HostMapping::new(&region);
    vm.bind(&region, 0, 0, SIZE).unwrap();
    Setup {
        vm,
        region,
        _mapping: mapping,
    }
}

fn preallocated(initial: Side) -> Setup {
    let setup = untouched(initial);
    setup.region.preallocate(one()).unwrap();
    setup
}

fn one() -> NonZeroUsize {
    NonZeroUsize::MIN
}

fn all() -> privmem::Range {
    privmem::Range::new(0, SIZE).unwrap()
}

/// How many pages a memfd of the region's size holds, and how many of them have been cleared.
fn pages(fd: BorrowedFd) -> [u64; 2] {
    let held = Linux.blocks(fd).unwrap() / GRANULE;
    let mut cleared = [0_u8; GRANULES as usize];
    // SAFETY: a new mapping that nobody touches, and a byte for each of its pages.
    unsafe {
        let size = SIZE as usize;
        let read = libc::PROT_READ;
        let start = libc::mmap(
            ptr::null_mut(),
            size,
            read,
            libc::MAP_SHARED,
            fd.as_raw_fd(),
            0,
        );
        assert_ne!(start, libc::MAP_FAILED);
        assert_eq!(libc::mincore(start, size, cleared.as_mut_ptr()), 0);
        libc::munmap(start, size);
    }
    [held, cleared.iter().map(|page| u64::from(page & 1)).sum()]
}

/// A store holds so many pages, and all of them have been cleared.
#[track_caller]
fn is_cleared(setup: &Setup, side: Side, granules: u64) {
    let [held, cleared] = pages(setup.region.store(side).fd());
    assert_eq!([held, cleared], [granules; 2], "{side:?}");
}

/// What the other tests rely on, and why there is anything to test.
#[test]
fn mincore_tells_what_the_kernel_has_not_cleared() {
    let fd = Linux.create_memfd(c"plain", SIZE, None).unwrap();
    let fd = fd.as_fd();
    assert_eq!(pages(fd), [0, 0]);
    Linux.allocate(fd, all()).unwrap();
    let [held, cleared] = pages(fd);
    assert_eq!(held, GRANULES);
    if cleared == GRANULES {
        println!("this kernel clears what fallocate(2) allocates");
    } else {
        assert_eq!(cleared, 0);
    }
}

#[test]
fn preallocated_memory_has_been_cleared() {
    for side in [Private, Shared] {
        let setup = preallocated(side);
        is_cleared(&setup, side, GRANULES);
        is_cleared(&setup, side.other(), 0);
    }
}

#[test]
fn memory_of_a_numa_node_has_been_cleared() {
    let setup = untouched(Private);
    let policy = NumaPolicy {
        mode: libc::MPOL_BIND,
        nodes: vec![1],
    };
    setup.region.set_numa_policy(policy, one()).unwrap();
    is_cleared(&setup, Private, GRANULES);
    setup.region.preallocate(one()).unwrap();
    convert(&setup.vm, 0..GRANULES, Shared).unwrap();
    is_cleared(&setup, Shared, GRANULES);
}

#[test]
fn memory_that_changed_side_has_been_cleared() {
    let setup = preallocated(Shared);
    for to in [Private, Shared] {
        convert(&setup.vm, 3..40, to).unwrap();
        is_cleared(&setup, Private, if to == Private { 37 } else { 0 });
        is_cleared(
            &setup,
            Shared,
            if to == Private {
                GRANULES - 37
            } else {
                GRANULES
            },
        );
    }
}

#[test]
fn memory_of_a_reset_machine_has_been_cleared() {
    for side in [Private, Shared] {
        let setup = preallocated(side);
        convert(&setup.vm, 3..40, side.other()).unwrap();
        setup.region.reset().unwrap();
        is_cleared(&setup, side, GRANULES);
        is_cleared(&setup, side.other(), 0);
    }
}

#[test]
fn memory_of_a_loaded_machine_has_been_cleared() {
    let setup = preallocated(Shared);
    setup
        .region
        .load_state(&[0xaa; GRANULES as usize / 8])
        .unwrap();
    for side in [Private, Shared] {
        let [held, cleared] = pages(setup.region.store(side).fd());
        assert_eq!(held, cleared, "{side:?}");
    }
}

#[test]
fn memory_that_moved_has_been_cleared() {
    let setup = preallocated(Private);
    let fd = Linux.create_memfd(c"elsewhere", SIZE, None).unwrap();
    let fd = fd.as_fd();
    for granule in 0..GRANULES {
        let offset = granule * GRANULE;
        let place = Destination::File { fd, offset };
        let moved = setup.vm.relocate(offset, Level::Size4K, place);
        if let Err(error) = moved {
            assert!(error.to_string().contains("userfaultfd"), "{error}");
            println!("skipped: {error}");
            return;
        }
    }
    assert_eq!(pages(fd), [GRANULES; 2]);
    is_cleared(&setup, Private, 0);
    for granule in 0..GRANULES {
        let home = Destination::Home;
        let back = setup.vm.relocate(granule * GRANULE, Level::Size4K, home);
        back.unwrap();
    }
    is_cleared(&setup, Private, GRANULES);
}
