//! Rules of bindings, requests and concurrency, one test each.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::{Fail, Model, stand_in_fd, vm_with_region};
use privmem::{Error, GRANULE, Region, Side, Vm};

#[test]
fn a_vm_without_private_memory_is_refused_with_what_there_is() {
    let mut kernel = Arc::into_inner(Model::new()).unwrap();
    kernel.attributes = 0;
    let error = Vm::with_kernel(Arc::new(kernel), Some(stand_in_fd()))
        .err()
        .unwrap();
    assert_eq!(error.errno(), libc::EOPNOTSUPP);
    let text = error.to_string();
    assert!(text.contains("KVM_CAP_MEMORY_ATTRIBUTES=0x0"), "{text}");
    assert!(text.contains("default (0), sw-protected (1)"), "{text}");
}

#[test]
fn a_region_has_a_size_of_whole_granules() {
    let vm = Vm::emulated().unwrap();
    for (size, word) in [
        (0, "not be 0"),
        (GRANULE + 1, "multiple"),
        (1 << 63, "larger"),
    ] {
        let error = Region::new(&vm, "r", size).err().unwrap();
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn one_place_is_bound_once() {
    let (_, vm, region) = vm_with_region(8);
    let other = Region::new(&vm, "other", 8 * GRANULE).unwrap();
    for (region, offset, gpa) in [(&other, 0, 7), (&region, 7, 100)] {
        let result = vm.bind(region, offset * GRANULE, gpa * GRANULE, GRANULE);
        assert!(matches!(result, Err(Error::AlreadyBound { .. })));
    }
    assert!(matches!(
        vm.bind(&other, 0, 64 * GRANULE, 9 * GRANULE),
        Err(Error::OutsideRegion(..))
    ));
    assert!(matches!(vm.unbind(0, GRANULE), Err(Error::NotBound(_))));
}

#[test]
fn a_memory_fault_is_no_request_to_convert() {
    let (kernel, vm, region) = vm_with_region(8);
    vm.convert(2 * GRANULE, GRANULE, Side::Private).unwrap();
    for granule in 0..8 {
        for touched in [Side::Private, Side::Shared] {
            vm.memory_fault(granule * GRANULE, GRANULE, touched)
                .unwrap();
        }
    }
    assert_eq!(kernel.pages().private, [2].into());
    assert_eq!(region.info().conversions, 1);
    // Attributes that the end of a binding could not clear.
    kernel.set_fail(Fail::From(0, libc::ENOMEM));
    vm.unbind(0, 8 * GRANULE).unwrap_err();
    vm.memory_fault(2 * GRANULE, GRANULE, Side::Private)
        .unwrap_err();
    kernel.set_fail(Fail::Never);
    vm.memory_fault(2 * GRANULE, GRANULE, Side::Private)
        .unwrap();
    assert!(kernel.pages().private.is_empty());
}

#[test]
fn the_host_may_touch_what_is_shared() {
    let (_, vm, region) = vm_with_region(8);
    vm.convert(2 * GRANULE, GRANULE, Side::Private).unwrap();
    assert_eq!(region.host_access(100, GRANULE), (true, GRANULE));
    assert_eq!(region.host_access(100, 1 << 40), (true, 2 * GRANULE - 100));
    assert_eq!(region.host_access(2 * GRANULE + 5, 10), (false, 10));
    assert_eq!(region.host_access(2 * GRANULE, 1 << 40), (false, GRANULE));
    assert_eq!(region.host_access(u64::MAX, u64::MAX), (true, u64::MAX));
}

#[test]
fn vcpus_may_convert_at_once() {
    const THREADS: u64 = 4;
    let (kernel, vm, region) = vm_with_region(64 * THREADS);
    thread::scope(|scope| {
        for own in 0..THREADS {
            let vm = &vm;
            scope.spawn(move || {
                for round in 0..200 {
                    let side = [Side::Private, Side::Shared][round % 2];
                    // One's own range, and one that all share.
                    vm.convert((own * 64 + 32) * GRANULE, 8 * GRANULE, side)
                        .unwrap();
                    vm.convert(30 * GRANULE, 64 * GRANULE, side).unwrap();
                }
                vm.convert((own * 64 + 48) * GRANULE, GRANULE, Side::Private)
                    .unwrap();
            });
        }
    });
    let private = kernel.pages().private;
    for gpa in 0..64 * THREADS {
        let run = region.runs(gpa * GRANULE, GRANULE).unwrap().next();
        assert_eq!(run.unwrap().side == Side::Private, private.contains(&gpa));
    }
    for own in 2..THREADS {
        assert!(private.contains(&(own * 64 + 48)));
    }
    assert_eq!(region.info().failed_conversions, 0);
    kernel.assert_rules();
}

#[test]
fn slots_may_change_while_vcpus_convert() {
    let (kernel, vm, region) = vm_with_region(16);
    thread::scope(|scope| {
        for start in [0, 4] {
            let vm = &vm;
            scope.spawn(move || {
                for round in 0..300 {
                    let side = [Side::Private, Side::Shared][round % 2];
                    match vm.convert(start * GRANULE, 8 * GRANULE, side) {
                        Ok(_) | Err(Error::NotPrivateCapable { .. }) => {}
                        Err(e) => panic!("{e}"),
                    }
                }
            });
        }
        for _ in 0..100 {
            vm.unbind(0, 16 * GRANULE).unwrap();
            vm.bind(&region, 0, 0, 16 * GRANULE).unwrap();
        }
    });
    let private = kernel.pages().private;
    for gpa in 0..16 {
        let run = region.runs(gpa * GRANULE, GRANULE).unwrap().next();
        assert_eq!(run.unwrap().side == Side::Private, private.contains(&gpa));
    }
    kernel.assert_rules();
}

/// Makes every other granule private.
fn fragment(vm: &Vm, granules: u64) {
    for granule in (0..granules).step_by(2) {
        vm.convert(granule * GRANULE, GRANULE, Side::Private)
            .unwrap();
    }
}

#[test]
fn a_long_request_goes_in_steps_and_counts_once() {
    const GRANULES: u64 = 20_000;
    const MOST_PIECES: u64 = 4096;
    let kernel = Model::new();
    let vm = kernel.vm();
    let region = Region::new(&vm, "ram0", GRANULES * GRANULE).unwrap();
    vm.bind(&region, 0, 0, GRANULES * GRANULE).unwrap();
    fragment(&vm, GRANULES);
    let before = region.info().conversions;
    let (mut done, mut steps) = (0, 0);
    while done < GRANULES * GRANULE {
        let step = vm.convert(done, GRANULES * GRANULE - done, Side::Shared);
        let step = step.unwrap();
        // Every other granule is a piece.
        assert!(step <= 2 * MOST_PIECES * GRANULE);
        done += step;
        steps += 1;
        assert_eq!(region.info().private, region.size() / 2 - done / 2);
    }
    assert!(steps > 1);
    assert_eq!(region.info().conversions, before + 1);
}

#[test]
fn a_large_request_goes_in_steps() {
    const STEP: u64 = 1 << 30;
    let kernel = Model::new();
    let vm = kernel.vm();
    let region = Region::new(&vm, "ram0", STEP + GRANULE).unwrap();
    vm.bind(&region, 0, 0, STEP + GRANULE).unwrap();
    let step = vm.convert(0, STEP + GRANULE, Side::Private);
    assert_eq!(step.unwrap(), STEP);
}

#[test]
fn a_fault_that_nothing_explains_is_given_up() {
    let (_, vm, _region) = vm_with_region(8);
    let fault = || vm.memory_fault(GRANULE, GRANULE, Side::Private);
    let times = (0..10_000).take_while(|_| fault().is_ok()).count();
    assert_eq!(times, 1000);
    assert!(matches!(fault(), Err(Error::HopelessFault { .. })));
    // A conversion explains it, and starts the count anew.
    vm.convert(0, GRANULE, Side::Private).unwrap();
    fault().unwrap();
}

#[test]
fn the_last_failed_requests_are_kept() {
    let (_kernel, vm, region) = vm_with_region(4);
    assert!(vm.failed_conversion(0).is_none());
    // Of any kind, and more than are kept.
    assert!(vm.convert(1, GRANULE, Side::Shared).is_err());
    for gpa in 4..24 {
        assert!(vm.convert(gpa * GRANULE, GRANULE, Side::Private).is_err());
    }
    vm.convert(0, GRANULE, Side::Private).unwrap();
    let kept: Vec<_> = (0..)
        .map_while(|index| vm.failed_conversion(index))
        .collect();
    let numbers: Vec<_> = kept.iter().map(|failure| failure.number).collect();
    assert_eq!(numbers, [21, 20, 19, 18, 17, 16, 15, 14]);
    assert_eq!((kept[0].gpa, kept[0].size), (23 * GRANULE, GRANULE));
    assert_eq!((kept[0].to, kept[0].errno), (Side::Private, libc::EINVAL));
    assert!(kept[0].message.contains("0x17000"), "{}", kept[0].message);
    assert_eq!(region.info().failed_conversions, 0, "it was not touched");
}

/// A monitor that asks for figures does not hold up the machine for as long as the
/// kernel takes to count the pages of all of a guest.
#[test]
fn pages_of_a_large_region_are_counted_in_turn() {
    const PARTS: u64 = 4;
    const PART: u64 = (1 << 30) / GRANULE;
    let (kernel, vm, region) = vm_with_region(PARTS * PART);
    for part in 0..PARTS {
        common::convert(&vm, part * PART..part * PART + 2, Side::Private).unwrap();
        kernel.touch(&region, Side::Private, part * PART);
    }
    kernel.touch(&region, Side::Shared, 2 * PART + 1);
    // Longer than all that is counted in one call may take.
    *kernel.counting.lock().unwrap() = Duration::from_millis(60);
    for _ in 1..PARTS {
        let info = region.info();
        assert_eq!((info.private_held, info.held_twice), (None, None));
        assert_eq!(info.held_age, None);
        assert_eq!(info.private, PARTS * 2 * GRANULE);
    }
    let info = region.info();
    assert_eq!(info.private_held, Some(PARTS * GRANULE));
    assert_eq!(info.held_twice, Some(GRANULE));
    let age = info.held_age.unwrap();
    assert!(
        age >= Duration::from_millis(60) * (PARTS as u32 - 1),
        "{age:?}"
    );
    // The first part is the oldest one, and the next to be counted.
    kernel.touch(&region, Side::Private, 1);
    kernel.touch(&region, Side::Private, PART + 1);
    assert_eq!(region.info().private_held, Some((PARTS + 1) * GRANULE));
    *kernel.counting.lock().unwrap() = Duration::ZERO;
    assert_eq!(region.info().private_held, Some((PARTS + 2) * GRANULE));
}
