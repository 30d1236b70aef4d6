//! Memory that the host loses, on a model: the page goes, whoever maps it is
//! told, and what the guest has lost is said.

mod common;

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread;

use Side::{Private, Shared};
use common::{Fail, Mapper, Model, granules, stand_in_fd};
use privmem::agent::{Agent, InitialPages};
use privmem::failure::{Failure, REMEMBERED};
use privmem::kernel::{Kernel, Linux};
use privmem::{Destination, Error, GRANULE, Level, Options, Range, Region, Side, Vm};

const GRANULES: u64 = 16;
const HUGE: u64 = 8;

/// What an agent is told of memory that goes, in guest granules.
#[derive(Clone, Debug, PartialEq)]
enum Told {
    Invalidate(std::ops::Range<u64>),
    Failure(std::ops::Range<u64>, Side),
}

#[derive(Default)]
struct Ears(Mutex<Vec<Told>>);

impl Agent for Ears {
    fn name(&self) -> &str {
        "ears"
    }

    fn populate(&self, _: InitialPages) -> privmem::Result<()> {
        Ok(())
    }

    fn finalize(&self, _: &dyn Kernel) -> privmem::Result<()> {
        Ok(())
    }

    fn invalidate(&self, gpa: Range) {
        self.0.lock().unwrap().push(Told::Invalidate(granules(gpa)));
    }

    fn memory_failure(&self, gpa: Range, side: Side) {
        let told = Told::Failure(granules(gpa), side);
        self.0.lock().unwrap().push(told);
    }
}

/// A region of which granules 2, 3 and 4 are private, seen from granule 100 on,
/// with a page held for each granule on its side, and a listener.
struct Setup {
    kernel: Arc<Model>,
    vm: Arc<Vm>,
    region: Arc<Region>,
    agent: Arc<Ears>,
    mapper: Arc<Mapper>,
}

const SEEN: u64 = 100;

impl Setup {
    fn new() -> Setup {
        Setup::with(Options::default())
    }

    fn with(options: Options) -> Setup {
        let kernel = Model::new();
        let agent = Arc::new(Ears::default());
        let vm = Vm::with_agent(kernel.clone(), Some(stand_in_fd()), agent.clone()).unwrap();
        let region = Region::with_options(&vm, "ram0", GRANULES * GRANULE, options).unwrap();
        // SAFETY: the model maps nothing, and is only told the address.
        unsafe { region.set_host_mapping(1 << 30) }.unwrap();
        kernel.bind(&region, &vm, 0, SEEN, GRANULES);
        common::convert(&vm, SEEN + 2..SEEN + 5, Private).unwrap();
        for granule in 0..GRANULES {
            kernel.access(SEEN + granule, |page| *page = 7);
        }
        let mapper = Mapper::new(&kernel, &region, true);
        region.add_listener(mapper.clone()).unwrap();
        let setup = Setup {
            kernel,
            vm,
            region,
            agent,
            mapper,
        };
        setup.kernel.set_fail(Fail::Never);
        setup
    }

    /// The host loses what the guest has in a granule; the vCPU that touches it
    /// reports that.
    fn fail(&self, granule: u64) -> privmem::Result<Failure> {
        let side = self.kernel.poison(SEEN + granule);
        self.vm
            .memory_failure((SEEN + granule) * GRANULE, side, true)
    }

    fn read(&self, granule: u64) -> u8 {
        self.kernel.access(SEEN + granule, |page| *page)
    }

    /// All but these hold what the guest has left there.
    fn assert_others_kept(&self, lost: impl IntoIterator<Item = u64>) {
        let lost: Vec<_> = lost.into_iter().collect();
        for granule in (0..GRANULES).filter(|granule| !lost.contains(granule)) {
            assert_eq!(self.read(granule), 7, "granule {granule}");
        }
        self.kernel.assert_rules();
    }

    fn assert_mapped(&self, but: &[u64]) {
        let mapped = self.mapper.mapped.lock().unwrap().clone();
        let shared =
            (0..GRANULES).filter(|granule| !(2..5).contains(granule) && !but.contains(granule));
        assert_eq!(mapped, shared.collect());
    }
}

fn page(first: u64, count: u64) -> Range {
    Range::new(first * GRANULE, count * GRANULE).unwrap()
}

#[test]
fn a_failed_page_is_retired_recorded_and_told() {
    for (granule, side) in [(3, Private), (6, Shared)] {
        let setup = Setup::new();
        let failure = setup.fail(granule).unwrap();
        let expected = Failure {
            side,
            page: page(granule, 1),
            lost: GRANULE,
            gpa: Some((SEEN + granule) * GRANULE),
            unmapped: 0,
        };
        assert_eq!(failure, expected);
        assert!(!setup.kernel.is_poisoned(SEEN + granule));
        assert_eq!(setup.read(granule), 0);
        setup.assert_others_kept([granule]);
        setup.assert_mapped(&[]);
        let seen = SEEN + granule..SEEN + granule + 1;
        let mut told = vec![Told::Failure(seen.clone(), side)];
        if side == Private {
            told.insert(0, Told::Invalidate(seen));
        }
        assert_eq!(*setup.agent.0.lock().unwrap(), told);
        assert_eq!(setup.region.info().memory_failures, 1);
        assert_eq!(setup.region.failures(), [expected]);
        // It is memory like any other now.
        for to in [side.other(), side] {
            common::convert(&setup.vm, SEEN..SEEN + GRANULES, to).unwrap();
        }
    }
}

/// As a vCPU may report that another one's conversion overtook.
#[test]
fn what_has_changed_side_meanwhile_is_not_lost() {
    for (granule, side) in [(3, Private), (6, Shared)] {
        let setup = Setup::new();
        let seen = SEEN + granule;
        assert_eq!(setup.kernel.poison(seen), side);
        common::convert(&setup.vm, seen..seen + 1, side.other()).unwrap();
        setup.kernel.access(seen, |page| *page = 9);
        setup.agent.0.lock().unwrap().clear();
        let failure = setup.vm.memory_failure(seen * GRANULE, side, true);
        let failure = failure.unwrap();
        assert_eq!((failure.lost, failure.gpa), (0, None));
        assert_eq!(setup.read(granule), 9);
        assert!(setup.agent.0.lock().unwrap().is_empty());
        setup.assert_others_kept([granule]);
    }
}

/// As the mapping may report whose mark of the page outlived it.
#[test]
fn what_is_not_held_any_more_is_not_lost() {
    let setup = Setup::new();
    let seen = SEEN + 6;
    setup.kernel.poison(seen);
    for to in [Private, Shared] {
        common::convert(&setup.vm, seen..seen + 1, to).unwrap();
    }
    for retire in [false, true] {
        let failure = setup.vm.memory_failure(seen * GRANULE, Shared, retire);
        assert_eq!(failure.unwrap().lost, 0);
    }
    assert_eq!(setup.region.info().memory_failures, 0);
    setup.assert_mapped(&[]);
}

/// Both have met it; neither may take the zeroes for what it had.
#[test]
fn a_failure_that_two_vcpus_meet_is_lost_for_both() {
    for (granule, side) in [(3, Private), (6, Shared)] {
        let setup = Setup::new();
        let first = setup.fail(granule).unwrap();
        let gpa = (SEEN + granule) * GRANULE;
        let second = setup.vm.memory_failure(gpa, side, true).unwrap();
        assert_eq!((second, second.lost), (first, GRANULE));
        setup.assert_others_kept([granule]);
    }
}

/// For who must stop the guest before it finds zeroes.
#[test]
fn a_page_is_not_retired_before_that_is_wanted() {
    for (granule, side) in [(3, Private), (6, Shared)] {
        let setup = Setup::new();
        setup.kernel.poison(SEEN + granule);
        let gpa = (SEEN + granule) * GRANULE;
        let failure = setup.vm.memory_failure(gpa, side, false).unwrap();
        assert_eq!((failure.lost, failure.gpa), (GRANULE, Some(gpa)));
        assert!(setup.kernel.is_poisoned(SEEN + granule));
        assert_eq!(setup.kernel.calls(), 0);
        assert_eq!(setup.region.info().memory_failures, 0);
        assert!(setup.agent.0.lock().unwrap().is_empty());
        let retired = setup.region.memory_failure(granule * GRANULE, side, true);
        assert_eq!(retired.unwrap(), failure);
        assert!(!setup.kernel.is_poisoned(SEEN + granule));
    }
}

/// Of a huge page goes what is shared; what is private lies elsewhere.
#[test]
fn a_huge_page_goes_as_a_whole() {
    let setup = Setup::with(Options {
        huge_page: Some(HUGE * GRANULE),
        ..Options::default()
    });
    setup.kernel.discards.store(true, Ordering::Relaxed);
    let failure = setup
        .region
        .memory_failure(6 * GRANULE + 5, Shared, true)
        .unwrap();
    assert_eq!(failure.page, page(0, HUGE));
    assert_eq!(failure.lost, (HUGE - 3) * GRANULE);
    assert_eq!(failure.gpa, Some(SEEN * GRANULE));
    setup.assert_others_kept([0, 1, 5, 6, 7]);
    setup.assert_mapped(&[]);
    let told = [SEEN..SEEN + 2, SEEN + 5..SEEN + 8].map(|seen| Told::Failure(seen, Shared));
    assert_eq!(*setup.agent.0.lock().unwrap(), told);
    let failure = setup.fail(3).unwrap();
    assert_eq!((failure.page, failure.lost), (page(3, 1), GRANULE));
}

/// Neither the guest nor a device finds zeroes there, and nobody is told that
/// they could.
#[test]
fn a_page_that_is_not_given_up_does_not_come_back() {
    // The call that frees it; before that, the one that lets the mapping forget.
    for (granule, call) in [(3, 0), (6, 0), (6, 1)] {
        let setup = Setup::new();
        setup.kernel.set_fail(Fail::Once(call, libc::EIO));
        let error = setup.fail(granule).unwrap_err();
        assert!(matches!(error, Error::NotRetired { .. }), "{error}");
        assert_eq!(error.errno(), libc::EIO);
        let text = error.to_string();
        assert!(
            text.contains("'ram0'") && text.contains("must not run on"),
            "{text}"
        );
        assert!(setup.kernel.is_poisoned(SEEN + granule));
        setup.assert_mapped(&[granule]);
        assert_eq!(setup.region.info().memory_failures, 0);
        let told = setup.agent.0.lock().unwrap().clone();
        assert!(!told.iter().any(|told| matches!(told, Told::Failure(..))));
        // The next report finds a kernel that can.
        setup.fail(granule).unwrap();
        assert_eq!(setup.read(granule), 0);
        setup.assert_mapped(&[]);
        setup.assert_others_kept([granule]);
    }
}

#[test]
fn a_listener_that_refuses_is_left_out() {
    let setup = Setup::new();
    setup.kernel.set_fail(Fail::Once(2, libc::ENOSPC));
    let failure = setup.fail(6).unwrap();
    assert_eq!((failure.lost, failure.unmapped), (GRANULE, GRANULE));
    setup.assert_mapped(&[6]);
    // Until it changes side.
    for to in [Private, Shared] {
        common::convert(&setup.vm, SEEN + 6..SEEN + 7, to).unwrap();
    }
    setup.assert_mapped(&[]);
}

/// Nor is it taken out of a listener's entry that has more: the rest may be in use.
#[test]
fn a_page_in_a_larger_entry_is_not_retired() {
    let setup = Setup::new();
    let whole = Mapper::with(&setup.kernel, &setup.region, |mapper| {
        mapper.block = Some(4);
    });
    setup.region.add_listener(whole.clone()).unwrap();
    let error = setup.fail(9).unwrap_err();
    assert!(matches!(error, Error::NotRetired { .. }), "{error}");
    assert_eq!(error.errno(), libc::EBUSY);
    assert!(setup.kernel.is_poisoned(SEEN + 9));
    assert!(whole.entries().contains(&(8..12)));
    setup.assert_mapped(&[9]);
    // As a granule of its own it goes.
    setup.fail(5).unwrap();
    assert!(whole.entries().contains(&(5..6)));
    setup.assert_others_kept([5, 9]);
}

#[test]
fn without_memory_in_its_place_the_guest_must_not_run_on() {
    for (granule, side) in [(3, Private), (6, Shared)] {
        let setup = Setup::new();
        setup.region.preallocate(NonZeroUsize::MIN).unwrap();
        let allocation = if side == Private { 1 } else { 2 };
        setup.kernel.set_fail(Fail::Once(allocation, libc::ENOMEM));
        let error = setup.fail(granule).unwrap_err();
        assert_eq!(error.errno(), libc::ENOMEM);
        // It is gone, and that is known.
        assert!(!setup.kernel.is_poisoned(SEEN + granule));
        assert_eq!(setup.region.failures()[0].page, page(granule, 1));
        let seen = SEEN + granule..SEEN + granule + 1;
        let told = setup.agent.0.lock().unwrap().last().cloned();
        assert_eq!(told, Some(Told::Failure(seen, side)));
    }
}

/// A host that goes on failing takes no more and more memory for that.
#[test]
fn the_last_failures_are_remembered_and_all_are_counted() {
    let setup = Setup::new();
    for round in 0..3 {
        for granule in 0..GRANULES {
            setup.fail(granule).unwrap();
            let count = round * GRANULES + granule + 1;
            assert_eq!(setup.region.info().memory_failures, count);
        }
    }
    let last = setup.region.failures();
    assert_eq!(last.len(), REMEMBERED);
    for (failure, granule) in last.iter().zip((0..GRANULES).rev()) {
        assert_eq!(failure.page, page(granule, 1));
    }
}

#[test]
fn what_is_not_there_cannot_fail() {
    let setup = Setup::new();
    for gpa in [0, SEEN * GRANULE - 1, (SEEN + GRANULES) * GRANULE] {
        let error = setup.vm.memory_failure(gpa, Shared, true).unwrap_err();
        assert!(matches!(error, Error::NotBound(_)), "{error}");
    }
    assert!(setup.vm.memory_failure(u64::MAX, Private, true).is_err());
    for offset in [GRANULES * GRANULE, u64::MAX] {
        assert!(setup.region.memory_failure(offset, Shared, true).is_err());
    }
    // Nobody sees it, but it has contents.
    setup.vm.unbind(SEEN * GRANULE, GRANULES * GRANULE).unwrap();
    let failure = setup
        .region
        .memory_failure(3 * GRANULE + 1, Private, true)
        .unwrap();
    assert_eq!((failure.lost, failure.gpa), (GRANULE, None));
    assert!(setup.agent.0.lock().unwrap().is_empty());
}

/// Contents that were moved lie elsewhere, and fail there.
#[test]
fn a_page_that_was_moved_is_retired_where_it_lies() {
    let vm = Vm::emulated().unwrap();
    let region = Region::new(&vm, "ram0", GRANULES * GRANULE).unwrap();
    vm.bind(&region, 0, 0, GRANULES * GRANULE).unwrap();
    vm.convert(2 * GRANULE, 3 * GRANULE, Private).unwrap();
    let elsewhere = Linux.create_memfd(c"elsewhere", 2 * GRANULE, None);
    let elsewhere = File::from(elsewhere.unwrap());
    let home = region.store(Private).fd().try_clone_to_owned().unwrap();
    let home = File::from(home);
    home.write_all_at(&[7; 3 * GRANULE as usize], 2 * GRANULE)
        .unwrap();
    let to = Destination::File {
        fd: elsewhere.as_fd(),
        offset: GRANULE,
    };
    vm.relocate(3 * GRANULE, Level::Size4K, to).unwrap();
    assert_eq!(region.info().relocated, GRANULE);

    let failure = vm.memory_failure(3 * GRANULE, Private, true).unwrap();
    assert_eq!((failure.page, failure.lost), (page(3, 1), GRANULE));
    assert_eq!(region.info().relocated, 0);
    let first = |file: &File, granule| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, granule * GRANULE).unwrap();
        byte[0]
    };
    assert_eq!(first(&elsewhere, 1), 0);
    assert_eq!([2, 3, 4].map(|granule| first(&home, granule)), [7, 0, 7]);
    // Its place is free for others.
    vm.relocate(4 * GRANULE, Level::Size4K, to).unwrap();
    assert_eq!(first(&elsewhere, 1), 7);
}

#[test]
fn memory_may_fail_while_vcpus_convert() {
    let setup = Setup::new();
    setup.kernel.discards.store(true, Ordering::Relaxed);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for round in 0..300 {
                    let to = [Private, Shared][round % 2];
                    common::convert(&setup.vm, SEEN + 4..SEEN + 12, to).unwrap();
                }
            });
        }
        for round in 0..300 {
            let offset = (round % GRANULES) * GRANULE;
            for side in [Private, Shared] {
                setup.region.memory_failure(offset, side, true).unwrap();
            }
        }
    });
    setup.kernel.assert_rules();
    let private = setup.kernel.pages().private;
    for granule in 0..GRANULES {
        let run = setup
            .region
            .runs(granule * GRANULE, GRANULE)
            .unwrap()
            .next();
        let is_private = run.unwrap().side == Private;
        assert_eq!(is_private, private.contains(&(SEEN + granule)));
    }
}

/// A report that comes late is of a page that is still in its store: it goes, so that
/// the guest does not meet it when the memory comes back.
#[test]
fn a_page_that_failed_does_not_stay_where_it_is_kept() {
    let setup = Setup::with(Options {
        keep_private: true,
        ..Options::default()
    });
    let seen = SEEN + 3;
    assert_eq!(setup.kernel.poison(seen), Private);
    common::convert(&setup.vm, seen..seen + 1, Shared).unwrap();
    let before = setup.region.info().private_held.unwrap();
    let failure = setup.vm.memory_failure(seen * GRANULE, Private, true);
    assert_eq!(failure.unwrap().lost, 0);
    assert_eq!(setup.region.info().private_held, Some(before - GRANULE));
    common::convert(&setup.vm, seen..seen + 1, Private).unwrap();
    assert!(!setup.kernel.is_poisoned(seen));
}

#[test]
fn an_agent_is_told_of_private_memory_that_a_reset_takes() {
    let setup = Setup::with(Options {
        initial: Private,
        ..Options::default()
    });
    setup.agent.0.lock().unwrap().clear();
    setup.kernel.discards.store(true, Ordering::Relaxed);
    setup.region.reset().unwrap();
    let told = Told::Invalidate(SEEN..SEEN + GRANULES);
    assert_eq!(*setup.agent.0.lock().unwrap(), [told]);
}
