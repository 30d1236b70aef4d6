//! Downstream mappers: what they map is what is shared, whatever fails.

mod common;

use std::sync::Arc;

use common::{Fail, Mapper, Model};
use privmem::{Error, GRANULE, Listener, Region, Side, Vm};

const GRANULES: u64 = 32;

struct Setup {
    kernel: Arc<Model>,
    vm: Arc<Vm>,
    region: Arc<Region>,
    mappers: [Arc<Mapper>; 3],
}

impl Setup {
    /// A region with several runs on each side, something in both stores, and
    /// three listeners, of which the one in the middle may refuse.
    fn new() -> Setup {
        let kernel = Model::new();
        let vm = kernel.vm();
        let region = Region::new(&vm, "r", GRANULES * GRANULE).unwrap();
        kernel.bind(&region, &vm, 0, 0, GRANULES);
        for granule in [2, 3, 7, 15, 16, 20] {
            vm.convert(granule * GRANULE, GRANULE, Side::Private)
                .unwrap();
        }
        for granule in 0..GRANULES {
            kernel.touch(&region, Side::Private, granule);
            kernel.touch(&region, Side::Shared, granule);
        }
        let mappers = [false, true, false].map(|refuses| Mapper::new(&kernel, &region, refuses));
        for mapper in &mappers {
            region.add_listener(mapper.clone()).unwrap();
        }
        Setup {
            kernel,
            vm,
            region,
            mappers,
        }
    }

    fn shared(&self) -> Vec<u64> {
        let runs = self.region.runs(0, GRANULES * GRANULE).unwrap();
        runs.filter(|run| run.side == Side::Shared)
            .flat_map(|run| run.granules)
            .map(|granule| granule as u64)
            .collect()
    }

    fn assert_mapped_is_shared(&self, why: &str) {
        for mapper in &self.mappers {
            let mapped: Vec<_> = mapper.mapped.lock().unwrap().iter().copied().collect();
            assert_eq!(mapped, self.shared(), "{why}");
        }
        self.kernel.assert_rules();
    }

    fn convert(&self, to: Side) -> privmem::Result<u64> {
        self.vm.convert(GRANULE, 24 * GRANULE, to)
    }
}

#[test]
fn any_call_that_fails_is_undone_for_listeners_too() {
    for to in [Side::Private, Side::Shared] {
        let mut number = 0;
        loop {
            let setup = Setup::new();
            let (shared, pages) = (setup.shared(), setup.kernel.pages());
            setup.kernel.set_fail(Fail::Once(number, libc::ENOSPC));
            let result = setup.convert(to);
            let why = format!("call {number} to {to:?}");
            if setup.kernel.calls() <= number {
                result.unwrap();
                setup.assert_mapped_is_shared(&why);
                break;
            }
            assert_eq!(setup.shared(), shared, "{why}");
            assert_eq!(setup.kernel.pages().private, pages.private, "{why}");
            setup.assert_mapped_is_shared(&why);
            assert_eq!(result.unwrap_err().errno(), libc::ENOSPC);
            number += 1;
        }
        assert!(number >= 10, "every kind of call was failed");
    }
}

#[test]
fn a_listener_that_fails_twice_is_said() {
    let setup = Setup::new();
    // To private: the first switch fails, and so does everything after it.
    let pieces = 4;
    setup.kernel.set_fail(Fail::From(pieces, libc::EIO));
    let error = setup.convert(Side::Private).unwrap_err();
    assert!(matches!(error, Error::Undone { unmapped, .. } if unmapped > 0));
    assert!(error.to_string().contains("did not map"), "{error}");
}

#[test]
fn registration_that_fails_leaves_nothing() {
    let setup = Setup::new();
    let late = Mapper::new(&setup.kernel, &setup.region, true);
    setup.kernel.set_fail(Fail::Once(2, libc::ENOMEM));
    setup.region.add_listener(late.clone()).unwrap_err();
    assert!(late.mapped.lock().unwrap().is_empty());
    let identity = late.identity();
    assert!(matches!(
        setup.region.remove_listener(identity),
        Err(Error::NoSuchListener)
    ));
    setup.region.add_listener(late.clone()).unwrap();
    setup.region.remove_listener(identity).unwrap();
    assert!(late.mapped.lock().unwrap().is_empty());
}

#[test]
fn listeners_may_come_and_go_while_vcpus_convert() {
    let setup = Setup::new();
    std::thread::scope(|scope| {
        for start in [0, 10, 20] {
            let vm = &setup.vm;
            scope.spawn(move || {
                for round in 0..200 {
                    let side = [Side::Private, Side::Shared][round % 2];
                    vm.convert(start * GRANULE, 12 * GRANULE, side).unwrap();
                }
            });
        }
        for _ in 0..100 {
            let guest = Mapper::new(&setup.kernel, &setup.region, false);
            setup.region.add_listener(guest.clone()).unwrap();
            setup.region.remove_listener(guest.identity()).unwrap();
            assert!(guest.mapped.lock().unwrap().is_empty());
        }
    });
    setup.assert_mapped_is_shared("afterwards");
}
