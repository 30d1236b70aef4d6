//! Requests of several steps: done as a whole, or undone as a whole.

mod common;

use std::sync::Arc;

use common::{Fail, Mapper, Model};
use privmem::{Conversion, Error, GRANULE, Region, Side, Vm};

/// What one step does at most where a listener maps: granules of 64 MiB.
const STEP: u64 = (64 << 20) / GRANULE;
const GRANULES: u64 = 2 * STEP + 64;

struct Setup {
    kernel: Arc<Model>,
    vm: Arc<Vm>,
    region: Arc<Region>,
    mapper: Arc<Mapper>,
}

impl Setup {
    /// A region of which all is to become private or shared, but for some in each
    /// step that is already, with something in both.
    fn new(to: Side) -> Setup {
        let (kernel, vm, region) = common::vm_with_region(GRANULES);
        common::convert(&vm, 0..GRANULES, to.other()).unwrap();
        for at in [0, STEP, 2 * STEP] {
            common::convert(&vm, at + 10..at + 20, to).unwrap();
            kernel.touch(&region, to.other(), at + 1);
            kernel.touch(&region, to, at + 15);
        }
        let mapper = Mapper::with(&kernel, &region, |mapper| {
            (mapper.refuses, mapper.clings) = (true, true);
        });
        region.add_listener(mapper.clone()).unwrap();
        Setup {
            kernel,
            vm,
            region,
            mapper,
        }
    }

    fn request(&self, to: Side) -> Conversion {
        self.vm.request(0, GRANULES * GRANULE, to).unwrap()
    }

    /// The private runs.
    fn private(&self) -> Vec<std::ops::Range<usize>> {
        let runs = self.region.runs(0, GRANULES * GRANULE).unwrap();
        runs.filter(|run| run.side == Side::Private)
            .map(|run| run.granules)
            .collect()
    }

    fn assert_agrees(&self) {
        let private: Vec<u64> = self
            .private()
            .into_iter()
            .flatten()
            .map(|g| g as u64)
            .collect();
        assert!(self.kernel.pages().private.into_iter().eq(private.clone()));
        let shared = (0..GRANULES).filter(|granule| private.binary_search(granule).is_err());
        assert!(self.mapper.mapped().into_iter().eq(shared));
        self.kernel.assert_rules();
    }
}

/// All steps; how many it takes.
fn finish(mut request: Conversion) -> (usize, privmem::Result<()>) {
    for steps in 1.. {
        match request.step() {
            Ok(0) => return (steps, Ok(())),
            Ok(_) => {}
            Err(error) => {
                assert_eq!(request.step().unwrap(), 0, "nothing is left to do");
                return (steps, Err(error));
            }
        }
    }
    unreachable!()
}

#[test]
fn a_request_is_done_in_steps() {
    for to in [Side::Private, Side::Shared] {
        let setup = Setup::new(to);
        let (steps, result) = finish(setup.request(to));
        result.unwrap();
        assert!(steps >= 3);
        setup.assert_agrees();
        let expected = if to == Side::Private { GRANULES } else { 0 };
        assert_eq!(setup.region.info().private, expected * GRANULE);
        assert_eq!(setup.region.info().conversions, 4 + 1);
    }
}

/// One call fails, in whichever step: all is on its old side again.
#[test]
fn a_request_that_fails_is_undone_as_a_whole() {
    for to in [Side::Private, Side::Shared] {
        let (mut steps_undone, mut lost) = (0, 0);
        for number in 0.. {
            let setup = Setup::new(to);
            let before = setup.private();
            setup.kernel.set_fail(Fail::Once(number, libc::ENOMEM));
            let (steps, result) = finish(setup.request(to));
            if setup.kernel.calls() <= number {
                result.unwrap();
                break;
            }
            let error = result.unwrap_err();
            assert_eq!(error.errno(), libc::ENOMEM);
            assert_eq!(setup.private(), before, "call {number} to {to:?}");
            setup.assert_agrees();
            steps_undone = steps_undone.max(steps - 1);
            match error {
                Error::Undone {
                    contents_lost,
                    stuck: 0,
                    unmapped: 0,
                    stale: 0,
                    ..
                } => {
                    lost = lost.max(contents_lost);
                }
                Error::Undone { .. } => panic!("{error}"),
                _ => assert_eq!(steps, 1),
            }
            let failed = setup.vm.failed_conversion(0).unwrap();
            assert_eq!(
                (failed.gpa, failed.size, failed.number),
                (0, GRANULES * GRANULE, 1)
            );
        }
        assert!(steps_undone >= 4, "two steps were undone: {steps_undone}");
        assert!(lost >= 20 * GRANULE, "{lost}");
    }
}

/// What a store keeps is not lost, and so it is not said.
#[test]
fn what_is_kept_comes_back_with_its_contents() {
    let kernel = Model::new();
    let vm = kernel.vm();
    let options = privmem::Options {
        keep_private: true,
        keep_shared: true,
        ..Default::default()
    };
    let region = Region::with_options(&vm, "r", 2 * STEP * GRANULE, options).unwrap();
    kernel.bind(&region, &vm, 0, 0, 2 * STEP);
    region
        .add_listener(Mapper::new(&kernel, &region, false))
        .unwrap();
    kernel.write_store(&region, Side::Shared, 7, 9);
    kernel.set_fail(Fail::Once(1, libc::ENOMEM));
    let request = vm.request(0, 2 * STEP * GRANULE, Side::Private).unwrap();
    let (steps, result) = finish(request);
    let error = result.unwrap_err();
    assert!(!matches!(error, Error::Undone { .. }), "{error}");
    assert_eq!(steps, 2);
    assert_eq!(kernel.access(7, |page| *page), 9);
}

/// What cannot be undone is said, and the map is the kernel's.
#[test]
fn what_cannot_be_undone_is_said() {
    for to in [Side::Private, Side::Shared] {
        let mut said = 0;
        for number in 0.. {
            let setup = Setup::new(to);
            let before = setup.private();
            setup.kernel.set_fail(Fail::From(number, libc::EIO));
            let (_, result) = finish(setup.request(to));
            if setup.kernel.calls() <= number {
                result.unwrap();
                break;
            }
            let private = setup.private();
            let changed: u64 = (0..GRANULES as usize)
                .filter(|granule| {
                    let is_in = |runs: &[std::ops::Range<usize>]| {
                        runs.iter().any(|run| run.contains(granule))
                    };
                    is_in(&private) != is_in(&before)
                })
                .count() as u64;
            match result.unwrap_err() {
                Error::Undone { stuck, .. } => {
                    assert_eq!(stuck, changed * GRANULE, "call {number} to {to:?}");
                    said += u64::from(stuck > STEP * GRANULE / 2 || to == Side::Shared);
                }
                _ => assert_eq!(changed, 0),
            }
            assert!(
                setup
                    .kernel
                    .pages()
                    .private
                    .into_iter()
                    .eq(private.into_iter().flatten().map(|granule| granule as u64))
            );
        }
        assert!(said > 0);
    }
}

/// What another request has taken back meanwhile stays as that one left it.
#[test]
fn only_what_is_still_there_goes_back() {
    let setup = Setup::new(Side::Private);
    let before = setup.private();
    let mut request = setup.request(Side::Private);
    assert!(request.step().unwrap() < (STEP + 64) * GRANULE);
    common::convert(&setup.vm, 100..200, Side::Shared).unwrap();
    setup.kernel.set_fail(Fail::Once(0, libc::EIO));
    let error = loop {
        match request.step() {
            Ok(left) => assert_ne!(left, 0),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Undone { stuck: 0, .. }), "{error}");
    assert_eq!(setup.private(), before);
    setup.assert_agrees();
}

/// A guest may ask for what there is not: that is shared, and costs nothing.
#[test]
fn a_request_may_be_of_all_addresses() {
    let setup = Setup::new(Side::Shared);
    let all = u64::MAX - GRANULE + 1;
    let (steps, result) = finish(setup.vm.request(0, all, Side::Shared).unwrap());
    result.unwrap();
    assert!(steps >= 3);
    assert_eq!(setup.region.info().private, 0);
}

#[test]
fn a_request_that_is_dropped_keeps_what_it_has_done() {
    let setup = Setup::new(Side::Private);
    let mut request = setup.request(Side::Private);
    request.step().unwrap();
    drop(request);
    assert!(setup.private()[0].len() >= STEP as usize);
    setup.assert_agrees();
}

#[test]
fn a_range_that_cannot_be_is_refused_and_recorded() {
    let setup = Setup::new(Side::Private);
    assert!(setup.vm.request(1, GRANULE, Side::Private).is_err());
    let failed = setup.vm.failed_conversion(0).unwrap();
    assert_eq!((failed.gpa, failed.size), (1, GRANULE));
    let beyond = setup.vm.request(0, (GRANULES + 1) * GRANULE, Side::Private);
    let (steps, result) = finish(beyond.unwrap());
    assert!(matches!(result, Err(Error::NotPrivateCapable { gpa }) if gpa == GRANULES * GRANULE));
    assert_eq!(steps, 1);
}
