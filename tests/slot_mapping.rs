//! What KVM itself writes to the guest's memory takes no memory where it is private.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{Model, convert, vm_with_region};
use privmem::Side::{Private, Shared};
use privmem::{Error, GRANULE, Options, Region, Vm};

fn region_with_slots(granules: u64) -> (Arc<Model>, Arc<Vm>, Arc<Region>) {
    let kernel = Model::new();
    let vm = kernel.vm();
    let region = Region::new(&vm, "ram0", granules * GRANULE).unwrap();
    region.slot_mapping().unwrap();
    kernel.bind(&region, &vm, 0, 0, granules);
    (kernel, vm, region)
}

#[test]
fn kvm_reaches_what_is_shared_and_nothing_else() {
    let (kernel, vm, region) = region_with_slots(8);
    convert(&vm, 2..6, Private).unwrap();
    convert(&vm, 4..5, Shared).unwrap();
    for granule in 0..8 {
        let is_private = [2, 3, 5].contains(&granule);
        assert_eq!(
            kernel.kvm_writes(&region, granule),
            !is_private,
            "{granule}"
        );
    }
    assert_eq!(region.info().held_twice, Some(0));
    kernel.assert_rules();
}

#[test]
fn without_the_mapping_kvm_takes_memory_twice() {
    let (kernel, vm, region) = vm_with_region(8);
    convert(&vm, 2..6, Private).unwrap();
    (0..8).for_each(|granule| assert!(kernel.kvm_writes(&region, granule)));
    assert_eq!(region.info().held_twice, Some(4 * GRANULE));
}

#[test]
fn what_is_private_at_first_is_hidden_at_first_and_after_a_reset() {
    let kernel = Model::new();
    let vm = kernel.vm();
    let options = Options {
        initial: Private,
        ..Options::default()
    };
    let region = Region::with_options(&vm, "ram0", 4 * GRANULE, options).unwrap();
    let address = region.slot_mapping().unwrap();
    assert_eq!(address % (2 << 20), 0, "KVM uses huge pages where it can");
    assert_eq!(region.slot_mapping().unwrap(), address);
    kernel.bind(&region, &vm, 0, 0, 4);
    assert_eq!(kernel.hidden(&region), (0..4).collect());
    convert(&vm, 0..3, Shared).unwrap();
    assert_eq!(kernel.hidden(&region), [3].into());
    region.reset().unwrap();
    assert_eq!(kernel.hidden(&region), (0..4).collect());
    kernel.assert_rules();
}

/// What is kept is only out of KVM's reach.
#[test]
fn what_is_kept_is_hidden_as_well() {
    let kernel = Model::new();
    let vm = kernel.vm();
    let options = Options {
        keep_shared: true,
        ..Options::default()
    };
    let region = Region::with_options(&vm, "ram0", 4 * GRANULE, options).unwrap();
    region.slot_mapping().unwrap();
    kernel.bind(&region, &vm, 0, 0, 4);
    convert(&vm, 1..2, Private).unwrap();
    assert!(!kernel.kvm_writes(&region, 1));
    convert(&vm, 1..2, Shared).unwrap();
    assert!(kernel.kvm_writes(&region, 1));
}

#[test]
fn a_host_without_guard_regions_says_so() {
    let kernel = Model::new();
    kernel.guard_regions.store(false, Ordering::Relaxed);
    let vm = kernel.vm();
    let region = Region::new(&vm, "ram0", GRANULE).unwrap();
    let error = region.slot_mapping().unwrap_err();
    assert!(matches!(error, Error::NoGuardRegions), "{error}");
    assert_eq!(error.errno(), libc::EOPNOTSUPP);
    let huge = Options {
        huge_page: Some(2 << 20),
        ..Options::default()
    };
    let region = Region::with_options(&kernel.vm(), "huge", 2 << 20, huge).unwrap();
    assert!(matches!(region.slot_mapping(), Err(Error::NoGuardRegions)));
}

/// A vCPU that met a conversion may run on; one that fails while nothing happens may not.
#[test]
fn a_run_that_fails_is_repeated_for_as_long_as_something_is_converted() {
    let (_kernel, vm, _region) = region_with_slots(8);
    for _ in 0..5000 {
        vm.run_fault().unwrap();
        convert(&vm, 0..1, Private).unwrap();
        convert(&vm, 0..1, Shared).unwrap();
    }
    let times = (0..5000).take_while(|_| vm.run_fault().is_ok()).count();
    assert!((1..2000).contains(&times), "{times}");
    assert_eq!(vm.run_fault().unwrap_err().errno(), libc::EFAULT);
    convert(&vm, 0..1, Private).unwrap();
    vm.run_fault().unwrap();
}
