//! Every call into the kernel fails in turn; nothing may lose track.

mod common;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{Fail, Model, Pages};
use privmem::{Error, GRANULE, Region, Side, Vm};

/// Two regions side by side, 16 granules each, with several runs on each side
/// and a page held wherever one may be.
struct Setup {
    kernel: Arc<Model>,
    vm: Arc<Vm>,
    regions: [Arc<Region>; 2],
}

impl Setup {
    fn new() -> Setup {
        let kernel = Model::new();
        let vm = kernel.vm();
        let regions = [(); 2].map(|()| Region::new(&vm, "r", 16 * GRANULE).unwrap());
        for (index, region) in regions.iter().enumerate() {
            kernel.bind(region, &vm, 0, index as u64 * 16, 16);
        }
        for granule in [2, 3, 7, 15, 16, 20] {
            vm.convert(granule * GRANULE, GRANULE, Side::Private)
                .unwrap();
        }
        let setup = Setup {
            kernel,
            vm,
            regions,
        };
        for gpa in 0..32 {
            let (region, granule) = setup.place(gpa);
            setup.kernel.touch(region, setup.side(gpa), granule);
        }
        setup
    }

    fn place(&self, gpa: u64) -> (&Arc<Region>, u64) {
        (&self.regions[gpa as usize / 16], gpa % 16)
    }

    fn side(&self, gpa: u64) -> Side {
        let (region, granule) = self.place(gpa);
        let mut runs = region.runs(granule * GRANULE, GRANULE).unwrap();
        runs.next().unwrap().side
    }

    fn sides(&self) -> Vec<Side> {
        (0..32).map(|gpa| self.side(gpa)).collect()
    }

    fn held_twice(&self) -> u64 {
        let held = self.regions.iter().map(|r| r.info().held_twice);
        held.sum::<Option<u64>>().unwrap()
    }

    fn convert(&self, to: Side) -> privmem::Result<u64> {
        self.vm.convert(GRANULE, 24 * GRANULE, to)
    }

    fn assert_map_is_the_kernels(&self) {
        let private = self.kernel.pages().private;
        for gpa in 0..32 {
            assert_eq!(self.side(gpa) == Side::Private, private.contains(&gpa));
        }
    }
}

fn pages_held(pages: &Pages) -> usize {
    pages.held.values().map(|held| held.len()).sum()
}

#[test]
fn a_call_that_fails_once_is_undone() {
    for to in [Side::Private, Side::Shared] {
        let mut number = 0;
        loop {
            let setup = Setup::new();
            let (sides, pages) = (setup.sides(), setup.kernel.pages());
            setup.kernel.set_fail(Fail::Once(number, libc::ENOMEM));
            let result = setup.convert(to);
            if setup.kernel.calls() <= number {
                result.unwrap();
                break;
            }
            let error = result.unwrap_err();
            assert_eq!(error.errno(), libc::ENOMEM);
            assert_eq!(setup.sides(), sides, "call {number} to {to:?}");
            let after = setup.kernel.pages();
            assert_eq!(after.private, pages.private);
            let gone = (pages_held(&pages) - pages_held(&after)) as u64 * GRANULE;
            let told = match error {
                Error::Undone {
                    contents_lost,
                    stuck: 0,
                    ..
                } => contents_lost,
                _ => 0,
            };
            assert_eq!(told, gone, "call {number} to {to:?}");
            setup.kernel.assert_rules();
            // The same request succeeds once the kernel does.
            setup.convert(to).unwrap();
            number += 1;
        }
        assert!(number >= 6, "the request makes several calls");
    }
}

#[test]
fn what_the_guest_touches_before_an_undo_is_not_kept() {
    for to in [Side::Private, Side::Shared] {
        let mut number = 0;
        loop {
            let setup = Setup::new();
            let sides = setup.sides();
            setup.kernel.guest_touches.store(true, Ordering::Relaxed);
            setup.kernel.set_fail(Fail::Once(number, libc::ENOMEM));
            let result = setup.convert(to);
            assert_eq!(setup.held_twice(), 0, "call {number} to {to:?}");
            setup.kernel.assert_rules();
            if result.is_ok() {
                break;
            }
            assert_eq!(setup.sides(), sides);
            number += 1;
        }
    }
}

/// A device, or a fault that KVM dropped, may leave a page on the side where
/// the granule is not. It must not come up when the granule goes there.
#[test]
fn a_stale_page_does_not_come_up() {
    for (gpa, to) in [(5, Side::Private), (7, Side::Shared)] {
        let setup = Setup::new();
        let (region, granule) = setup.place(gpa);
        setup.kernel.touch(region, to, granule);
        setup.vm.convert(gpa * GRANULE, GRANULE, to).unwrap();
        let fd = region.store(to).fd().as_raw_fd();
        assert!(!setup.kernel.pages().held[&fd].contains_key(&granule));
    }
}

#[test]
fn when_undo_fails_too_the_map_follows_the_kernel() {
    for to in [Side::Private, Side::Shared] {
        for number in 0..40 {
            let setup = Setup::new();
            setup.kernel.set_fail(Fail::From(number, libc::EIO));
            let result = setup.convert(to);
            if setup.kernel.calls() <= number {
                result.unwrap();
                continue;
            }
            let text = result.unwrap_err().to_string();
            setup.assert_map_is_the_kernels();
            // What the failed undo left behind is freed by the next request.
            setup.kernel.set_fail(Fail::Never);
            setup
                .convert(to.other())
                .unwrap_or_else(|e| panic!("{text}: {e}"));
            setup.convert(to).unwrap();
            setup.assert_map_is_the_kernels();
            assert_eq!(setup.held_twice(), 0, "after {text}");
        }
    }
}

#[test]
fn an_interrupted_call_is_repeated() {
    let setup = Setup::new();
    setup.kernel.set_fail(Fail::Once(0, libc::EINTR));
    setup.convert(Side::Private).unwrap();
}

#[test]
fn a_binding_that_fails_leaves_nothing() {
    let kernel = Model::new();
    let vm = kernel.vm();
    let region = Region::new(&vm, "r", 8 * GRANULE).unwrap();
    vm.bind(&region, 0, 0, 8 * GRANULE).unwrap();
    for granule in [1, 4] {
        vm.convert(granule * GRANULE, GRANULE, Side::Private)
            .unwrap();
    }
    vm.unbind(0, 8 * GRANULE).unwrap();
    assert!(kernel.pages().private.is_empty());
    for number in 0..5 {
        kernel.set_fail(Fail::Once(number, libc::ENOMEM));
        vm.bind(&region, 0, 64 * GRANULE, 8 * GRANULE).unwrap_err();
        assert!(kernel.pages().private.is_empty());
        assert!(vm.bindings_of(&region).is_empty());
    }
    kernel.set_fail(Fail::Never);
    vm.bind(&region, 0, 64 * GRANULE, 8 * GRANULE).unwrap();
    assert_eq!(kernel.pages().private, [65, 68].into());
}

/// The attribute, and a hole in the side that is left; another one where a page
/// has got into the side that is entered.
#[test]
fn the_side_that_is_entered_is_freed_where_it_holds_anything() {
    for to in [Side::Private, Side::Shared] {
        let (kernel, vm, region) = common::vm_with_region(2);
        common::convert(&vm, 0..2, to.other()).unwrap();
        kernel.touch(&region, to, 1);
        for (granule, calls) in [(0, 2), (1, 3)] {
            kernel.set_fail(Fail::Never);
            common::convert(&vm, granule..granule + 1, to).unwrap();
            assert_eq!(kernel.calls(), calls, "granule {granule} to {to:?}");
        }
        assert_eq!(pages_held(&kernel.pages()), 0);
        kernel.assert_rules();
    }
}

#[test]
fn creation_passes_on_what_the_kernel_says() {
    for (number, errno, word) in [
        (0, libc::EMFILE, "RLIMIT_NOFILE"),
        (1, libc::ENOMEM, "memory"),
    ] {
        let kernel = Model::new();
        let vm = kernel.vm();
        kernel.set_fail(Fail::Once(number, errno));
        let error = Region::new(&vm, "r", GRANULE).err().unwrap();
        assert_eq!(error.errno(), errno);
        assert!(error.to_string().contains(word), "{error}");
    }
}
