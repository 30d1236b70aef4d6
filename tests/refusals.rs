//! What is refused, or cannot be undone, and what is said of it.

mod common;

use common::{Fail, Mapper, Model, vm_with_region};
use privmem::{Error, GRANULE, Region, Side, StateMap, Vm};

#[test]
fn a_state_that_no_memory_can_hold_is_refused() {
    let error = StateMap::new(usize::MAX, Side::Shared).err().unwrap();
    assert_eq!(error.errno(), libc::ENOMEM);
    assert!(error.to_string().contains("smaller size"), "{error}");
}

#[test]
fn a_name_is_a_c_string() {
    let vm = Vm::emulated().unwrap();
    let error = Region::new(&vm, "ram\0", GRANULE).err().unwrap();
    assert_eq!(error.errno(), libc::EINVAL);
    assert!(error.to_string().contains("NUL"), "{error}");
}

#[test]
fn the_systems_limit_of_files_is_named() {
    let kernel = Model::new();
    let vm = kernel.vm();
    kernel.set_fail(Fail::Once(0, libc::ENFILE));
    let error = Region::new(&vm, "r", GRANULE).err().unwrap();
    assert_eq!(error.errno(), libc::ENFILE);
    assert!(error.to_string().contains("fs.file-max"), "{error}");
}

#[test]
fn a_host_mapping_comes_once_and_before_private_memory() {
    let late = |region: &Region| {
        // SAFETY: KVM's agent only remembers the address.
        let error = unsafe { region.set_host_mapping(0x1000) }.unwrap_err();
        assert_eq!(error.errno(), libc::EBUSY);
    };
    let (_, vm, region) = vm_with_region(4);
    vm.convert(0, GRANULE, Side::Private).unwrap();
    late(&region);
    vm.convert(0, GRANULE, Side::Shared).unwrap();
    // SAFETY: as above.
    unsafe { region.set_host_mapping(0x1000) }.unwrap();
    late(&region);
}

#[test]
fn a_fault_that_is_given_up_is_a_bad_address() {
    let (_, vm, _region) = vm_with_region(4);
    let error = (0..10_000).find_map(|_| vm.memory_fault(0, GRANULE, Side::Shared).err());
    assert_eq!(error.unwrap().errno(), libc::EFAULT);
}

#[test]
fn a_region_that_goes_takes_only_its_own_bindings_along() {
    for refused in [false, true] {
        let (kernel, vm, region) = vm_with_region(8);
        let other = Region::new(&vm, "ram1", 8 * GRANULE).unwrap();
        kernel.bind(&other, &vm, 0, 8, 8);
        vm.convert(6 * GRANULE, 4 * GRANULE, Side::Private).unwrap();
        if refused {
            kernel.set_fail(Fail::From(0, libc::ENOMEM));
        }
        vm.unbind_region(&region);
        assert!(vm.bindings_of(&region).is_empty());
        assert_eq!(vm.bindings_of(&other).len(), 1);
        let left = kernel.pages().private;
        assert!(left.contains(&8) && left.contains(&9));
        assert_eq!(left.contains(&6), refused);
        // What could not be made shared is so after the first fault.
        kernel.set_fail(Fail::Never);
        vm.memory_fault(6 * GRANULE, 2 * GRANULE, Side::Private)
            .unwrap();
        assert_eq!(kernel.pages().private, [8, 9].into());
    }
}

#[test]
fn contents_that_an_undo_does_not_bring_back_are_told() {
    // Two pieces, of which the first is freed before the second is refused.
    let lost = (0..).find_map(|number| {
        let (kernel, vm, _region) = vm_with_region(4);
        vm.convert(GRANULE, GRANULE, Side::Private).unwrap();
        kernel.set_fail(Fail::Once(number, libc::EIO));
        match vm.convert(0, 4 * GRANULE, Side::Private) {
            Err(error @ Error::Undone { .. }) => Some(error),
            Err(_) => None,
            Ok(_) => panic!("no call is refused late enough"),
        }
    });
    let error = lost.unwrap();
    assert_eq!(error.errno(), libc::EIO);
    let text = error.to_string();
    assert!(text.contains("contents of 0x1000 bytes are lost"), "{text}");
}

/// Neither the kernel nor the listener goes back: the memory stays shared, and
/// not mapped by the listener.
#[test]
fn what_is_stuck_and_not_mapped_is_told_as_both() {
    for number in 0.. {
        let (kernel, vm, region) = vm_with_region(4);
        vm.convert(GRANULE, GRANULE, Side::Private).unwrap();
        let mapper = Mapper::new(&kernel, &region, true);
        region.add_listener(mapper.clone()).unwrap();
        kernel.set_fail(Fail::From(number, libc::EIO));
        let error = vm.convert(GRANULE, GRANULE, Side::Shared).unwrap_err();
        let Error::Undone {
            stuck: GRANULE,
            unmapped: GRANULE,
            ..
        } = error
        else {
            continue;
        };
        let text = error.to_string();
        assert!(
            text.contains("0x1000 bytes that could not be moved"),
            "{text}"
        );
        assert!(text.contains("did not map 0x1000 bytes"), "{text}");
        assert_eq!(region.info().private, 0);
        assert!(kernel.pages().private.is_empty());
        assert_eq!(*mapper.mapped.lock().unwrap(), [0, 2, 3].into());
        return;
    }
}
