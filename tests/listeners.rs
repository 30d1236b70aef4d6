//! Downstream mappers: what they map is what is shared, whatever fails.

mod common;

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use common::{Fail, Mapper, Model, vm_with_region};
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
    /// three listeners, of which the one in the middle may refuse, either way.
    fn new() -> Setup {
        Setup::with_block(None)
    }

    /// As [`Setup::new`], with listeners that can give up only whole entries, of
    /// so many granules for a block that is shared as a whole.
    fn with_block(block: Option<u64>) -> Setup {
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
        let mappers = [false, true, false].map(|may_refuse| {
            Mapper::with(&kernel, &region, |mapper| {
                (mapper.refuses, mapper.clings) = (may_refuse, may_refuse);
                mapper.block = block;
            })
        });
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
            assert_eq!(mapper.mapped(), self.shared(), "{why}");
        }
        self.kernel.assert_rules();
    }

    fn convert(&self, to: Side) -> privmem::Result<u64> {
        self.vm.convert(GRANULE, 23 * GRANULE, to)
    }
}

#[test]
fn any_call_that_fails_is_undone_for_listeners_too() {
    for (to, block) in [Side::Private, Side::Shared]
        .into_iter()
        .flat_map(|to| [None, Some(1), Some(4)].map(|block| (to, block)))
    {
        let mut number = 0;
        loop {
            let setup = Setup::with_block(block);
            let (shared, pages) = (setup.shared(), setup.kernel.pages());
            setup.kernel.set_fail(Fail::Once(number, libc::ENOSPC));
            let result = setup.convert(to);
            let why = format!("call {number} to {to:?}, block {block:?}");
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

/// To private, pieces are given up first: one that is not is still shared, and
/// mapped.
#[test]
fn what_a_listener_does_not_give_up_stays_shared() {
    let setup = Setup::new();
    setup.kernel.set_fail(Fail::Once(0, libc::EIO));
    let error = common::convert(&setup.vm, 0..1, Side::Private).unwrap_err();
    assert!(!matches!(error, Error::Undone { .. }), "{error}");
    assert!(error.to_string().contains("listener"), "{error}");
    assert_eq!(error.errno(), libc::EIO);
    setup.assert_mapped_is_shared("afterwards");
    common::convert(&setup.vm, 0..1, Side::Private).unwrap();
    setup.assert_mapped_is_shared("later");
}

#[test]
fn a_listener_that_fails_twice_is_said() {
    let setup = Setup::new();
    // To private: all is given up, the first switch fails, and so does everything
    // after it.
    let pieces = 4;
    setup
        .kernel
        .set_fail(Fail::From(pieces + pieces, libc::EIO));
    let error = setup.convert(Side::Private).unwrap_err();
    assert!(matches!(error, Error::Undone { unmapped, .. } if unmapped > 0));
    assert!(error.to_string().contains("did not map"), "{error}");
}

/// To shared: a granule is mapped, the next one is not, and the listener does
/// not let go of the first any more.
#[test]
fn what_stays_mapped_is_said_and_mapped_anew_when_it_is_shared() {
    let kernel = Model::new();
    let vm = kernel.vm();
    let region = Region::new(&vm, "r", 4 * GRANULE).unwrap();
    kernel.bind(&region, &vm, 0, 0, 4);
    vm.convert(0, 2 * GRANULE, Side::Private).unwrap();
    let mapper = Mapper::with(&kernel, &region, |mapper| {
        (mapper.refuses, mapper.clings) = (true, true);
        mapper.block = Some(1);
    });
    region.add_listener(mapper.clone()).unwrap();
    for number in 0.. {
        kernel.set_fail(Fail::Twice(number, libc::EIO));
        let error = vm.convert(0, 2 * GRANULE, Side::Shared).unwrap_err();
        if matches!(
            error,
            Error::Undone {
                stale: GRANULE,
                stuck: 0,
                ..
            }
        ) {
            assert!(error.to_string().contains("still maps 0x1000"), "{error}");
            break;
        }
        kernel.set_fail(Fail::Never);
        vm.convert(0, 2 * GRANULE, Side::Private).unwrap();
    }
    assert_eq!(mapper.mapped(), [0, 2, 3]);
    assert_eq!(region.info().private, 2 * GRANULE);
    kernel.set_fail(Fail::Never);
    vm.convert(0, 2 * GRANULE, Side::Shared).unwrap();
    assert_eq!(mapper.mapped(), [0, 1, 2, 3]);
}

/// What becomes shared as a whole block is one entry, everything else an entry for
/// each granule; so it stays whatever becomes of its neighbours.
#[test]
fn entries_are_blocks_where_they_became_shared_as_a_whole() {
    let setup = Setup::with_block(Some(4));
    let mapper = &setup.mappers[0];
    let entries = || mapper.entries();
    let [ones, blocks] = [0..2, 4..7].map(|own| own.map(|n| n..n + 1));
    let whole = std::iter::once(8..12);
    let first: Vec<_> = ones.chain(blocks).chain(whole).collect();
    assert_eq!(entries()[..6], first[..]);

    // Filled up, 0..4 stays as it is, in granules; 12..20 comes at once.
    common::convert(&setup.vm, 2..4, Side::Shared).unwrap();
    common::convert(&setup.vm, 12..21, Side::Private).unwrap();
    common::convert(&setup.vm, 11..21, Side::Shared).unwrap();
    let wanted = [0..1, 1..2, 2..3, 3..4, 4..5, 5..6, 6..7, 8..12];
    assert_eq!(entries()[..8], wanted);
    assert_eq!(entries()[8..11], [12..16, 16..20, 20..21]);
    setup.assert_mapped_is_shared("blocks");

    // All of a block, with some around it, or a part of one in granules.
    setup
        .vm
        .convert(11 * GRANULE, 0, Side::Private)
        .unwrap_err();
    common::convert(&setup.vm, 15..16, Side::Private).unwrap_err();
    common::convert(&setup.vm, 12..21, Side::Private).unwrap();
    common::convert(&setup.vm, 1..3, Side::Private).unwrap();
    setup.assert_mapped_is_shared("granules");
}

/// A part of an entry is not given up, as the kernel cannot split one without
/// taking all of it away for a moment; whatever else was asked for with it is
/// as it was.
#[test]
fn a_part_of_an_entry_is_not_made_private() {
    for (first, granules) in [(8, 1), (9, 2), (11, 3), (4, 5), (0, 9)] {
        let setup = Setup::with_block(Some(4));
        let before = setup.mappers[0].entries();
        let error = setup
            .vm
            .convert(first * GRANULE, granules * GRANULE, Side::Private)
            .unwrap_err();
        assert!(matches!(error, Error::PartOfEntry { start, size }
            if (start, size) == (8 * GRANULE, 4 * GRANULE)));
        assert_eq!(error.errno(), libc::EBUSY);
        assert!(error.to_string().contains("dma-granularity"), "{error}");
        assert_eq!(setup.mappers[0].entries(), before);
        setup.assert_mapped_is_shared("refused");
    }
}

/// Mapping and pinning takes its time: others get their turn in between.
#[test]
fn with_a_listener_a_step_is_smaller() {
    const STEP: u64 = 64 << 20;
    let (kernel, vm, region) = vm_with_region(2 * STEP / GRANULE);
    let converted = |to| vm.convert(0, 2 * STEP, to).unwrap();
    assert_eq!(converted(Side::Private), 2 * STEP);
    let mapper = Mapper::new(&kernel, &region, false);
    region.add_listener(mapper).unwrap();
    assert_eq!(converted(Side::Shared), STEP);
    assert_eq!(converted(Side::Shared), 2 * STEP);
    assert_eq!(converted(Side::Private), STEP);
}

/// Where a listener is told of a part of a region only, blocks at its ends are
/// mapped granule by granule.
#[test]
fn a_listener_may_be_told_of_a_part() {
    let setup = Setup::new();
    let part = Mapper::with(&setup.kernel, &setup.region, |mapper| {
        mapper.block = Some(4);
        mapper.range = Some(8..14);
    });
    setup.region.add_listener(part.clone()).unwrap();
    assert_eq!(part.entries(), [8..12, 12..13, 13..14]);
    common::convert(&setup.vm, 13..15, Side::Private).unwrap();
    assert_eq!(part.entries(), [8..12, 12..13]);
    common::convert(&setup.vm, 1..2, Side::Private).unwrap();
    setup.region.reset().unwrap();
    assert_eq!(part.mapped(), [8, 9, 10, 11, 12, 13]);
    setup.region.remove_listener(part.identity()).unwrap();
    assert_eq!(part.mapped(), []);
    for (block, range) in [(3, 0..4), (1 << 15, 0..4), (4, 30..33)] {
        let wrong = Mapper::with(&setup.kernel, &setup.region, |mapper| {
            (mapper.block, mapper.range) = (Some(block), Some(range));
        });
        let error = setup.region.add_listener(wrong).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL);
    }
}

/// The memory is as after a reset, whatever a device still reaches, or does not.
#[test]
fn a_listener_that_refuses_does_not_keep_private_contents() {
    let setup = Setup::with_block(Some(4));
    setup.kernel.discards.store(true, Ordering::Relaxed);
    // The calls before are the kernel's, for six granules.
    let mut refused = 0;
    for number in 0..60 {
        setup.kernel.set_fail(Fail::Never);
        for private in [2..4, 7..8, 15..17] {
            // Where a block has come, all of it.
            let blocks = private.start / 4 * 4..(private.end - 1) / 4 * 4 + 4;
            common::convert(&setup.vm, blocks.clone(), Side::Private).unwrap();
            for granule in blocks {
                setup.kernel.touch(&setup.region, Side::Private, granule);
            }
        }
        setup.kernel.set_fail(Fail::From(number, libc::ENOSPC));
        let result = setup.region.reset();
        let info = setup.region.info();
        if let Err(Error::Reset {
            unmapped,
            left: 0,
            has_contents: false,
            ..
        }) = &result
        {
            refused += 1;
            assert_eq!((info.private, info.private_held), (0, Some(0)));
            let mapped = setup.mappers[1].mapped().len() as u64;
            assert_eq!(*unmapped, (GRANULES - mapped) * GRANULE);
            let text = result.unwrap_err().to_string();
            assert!(text.contains("has no private contents"), "{text}");
            assert!(text.contains("does not map"), "{text}");
        }
        // The next one puts all right.
        setup.kernel.set_fail(Fail::Never);
        setup.region.reset().unwrap();
        setup.assert_mapped_is_shared("after a reset");
        let blocks: Vec<_> = (0..GRANULES / 4).map(|n| 4 * n..4 * n + 4).collect();
        assert_eq!(setup.mappers[1].entries(), blocks);
    }
    assert!(refused > 3, "{refused}");
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
        for round in 0..100 {
            let guest = Mapper::with(&setup.kernel, &setup.region, |mapper| {
                mapper.block = [None, Some(1), Some(2)][round % 3];
            });
            setup.region.add_listener(guest.clone()).unwrap();
            setup.region.remove_listener(guest.identity()).unwrap();
            assert!(guest.mapped.lock().unwrap().is_empty());
        }
    });
    setup.assert_mapped_is_shared("afterwards");
}

/// What a listener is told, in order, and which of the calls it refuses.
#[derive(Default)]
struct Log {
    told: Mutex<Vec<(bool, std::ops::Range<u64>)>>,
    refuses: Mutex<Vec<usize>>,
    block: Option<u64>,
}

impl Log {
    fn told(&self) -> Vec<(bool, std::ops::Range<u64>)> {
        std::mem::take(&mut self.told.lock().unwrap())
    }

    /// From now on, the calls with these numbers are refused.
    fn refuse(&self, numbers: &[usize]) {
        self.told();
        *self.refuses.lock().unwrap() = numbers.to_vec();
    }

    fn tell(&self, maps: bool, offsets: privmem::Range) -> io::Result<()> {
        let mut told = self.told.lock().unwrap();
        told.push((maps, common::granules(offsets)));
        match self.refuses.lock().unwrap().contains(&(told.len() - 1)) {
            true => Err(io::Error::from_raw_os_error(libc::EIO)),
            false => Ok(()),
        }
    }
}

impl Listener for Log {
    fn discard(&self, offsets: privmem::Range, _: u64) -> io::Result<()> {
        self.tell(false, offsets)
    }

    fn populate(&self, offsets: privmem::Range) -> io::Result<()> {
        self.tell(true, offsets)
    }

    fn granularity(&self) -> Option<u64> {
        self.block.map(|granules| granules * GRANULE)
    }

    fn identity(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }
}

fn logged(granules: u64, block: Option<u64>) -> (Arc<Model>, Arc<Vm>, Arc<Region>, Arc<Log>) {
    let (kernel, vm, region) = vm_with_region(granules);
    let log = Arc::new(Log {
        block,
        ..Log::default()
    });
    region.add_listener(log.clone()).unwrap();
    log.told();
    (kernel, vm, region, log)
}

#[test]
fn a_listener_is_registered_once() {
    let (_kernel, vm, region, log) = logged(4, None);
    let again = region.add_listener(log.clone());
    assert!(matches!(again, Err(Error::AlreadyListening)));
    assert!(log.told().is_empty());
    common::convert(&vm, 0..1, Side::Private).unwrap();
    assert_eq!(log.told(), [(false, 0..1)]);
}

/// A block that has gone private is no block any more, whatever comes in its place.
#[test]
fn a_block_that_was_given_up_can_be_cut() {
    let (_kernel, vm, _region, log) = logged(8, Some(4));
    common::convert(&vm, 0..8, Side::Private).unwrap();
    common::convert(&vm, 0..3, Side::Shared).unwrap();
    common::convert(&vm, 1..2, Side::Private).unwrap();
    let granules = (0..3).map(|granule| (true, granule..granule + 1));
    let told = [(false, 0..8)].into_iter().chain(granules);
    assert!(log.told().into_iter().eq(told.chain([(false, 1..2)])));
}

/// It maps the page that was there before the memory was private.
#[test]
fn a_mapping_that_stayed_is_given_up_before_it_is_made_anew() {
    let (kernel, vm, region, log) = logged(4, None);
    common::convert(&vm, 0..2, Side::Private).unwrap();
    // Mapped, then the private pages are not freed, nor is the mapping given up.
    log.refuse(&[1]);
    let stale = (0..).find_map(|number| {
        log.refuse(&[1]);
        kernel.set_fail(Fail::Once(number, libc::EIO));
        let result = vm.convert(0, 2 * GRANULE, Side::Shared);
        kernel.set_fail(Fail::Never);
        match result.unwrap_err() {
            Error::Undone { stale, .. } => Some(stale),
            _ => None,
        }
    });
    assert_eq!(stale, Some(2 * GRANULE));
    assert_eq!(region.info().private, 2 * GRANULE);
    log.refuse(&[]);
    common::convert(&vm, 0..2, Side::Shared).unwrap();
    assert_eq!(log.told(), [(false, 0..2), (true, 0..2)]);
}

#[test]
fn what_is_not_mapped_again_does_not_keep_others_from_it() {
    let (kernel, vm, region, log) = logged(8, Some(1));
    common::convert(&vm, 4..5, Side::Private).unwrap();
    // Both runs are given up, the kernel refuses, and one granule is not mapped again.
    log.refuse(&[3]);
    kernel.set_fail(Fail::Once(0, libc::EIO));
    let error = vm.convert(0, 8 * GRANULE, Side::Private).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Undone {
                unmapped: GRANULE,
                stuck: 0,
                ..
            }
        ),
        "{error}"
    );
    let again = [0, 1, 2, 3, 5, 6, 7].map(|granule| (true, granule..granule + 1));
    let told = [(false, 0..4), (false, 5..8)].into_iter().chain(again);
    assert!(log.told().into_iter().eq(told));
    assert_eq!(region.info().private, GRANULE);
}

/// A balloon's memory is mapped anew, as there is another page; so it is where one of
/// the listeners refuses to give it up.
#[test]
fn what_is_discarded_is_mapped_again() {
    let setup = Setup::new();
    setup.kernel.discards.store(true, Ordering::Relaxed);
    let log = Arc::new(Log::default());
    setup.region.add_listener(log.clone()).unwrap();
    log.told();
    let runs = [0..2, 4..7, 8..15];
    let each = |maps| runs.clone().map(|run| (maps, run));
    setup.region.discard(0, 15 * GRANULE).unwrap();
    assert_eq!(log.told(), [each(false), each(true)].concat());
    setup.assert_mapped_is_shared("afterwards");
    for (refused, run) in runs.iter().enumerate() {
        log.refuse(&[refused]);
        setup.region.discard(0, 15 * GRANULE).unwrap_err();
        setup.assert_mapped_is_shared("refused");
        let (given_up, mapped): (Vec<_>, Vec<_>) =
            log.told().into_iter().partition(|(maps, _)| !maps);
        assert_eq!(given_up, each(false));
        let mapped: Vec<_> = mapped.into_iter().map(|(_, run)| run).collect();
        assert!(!mapped.contains(run) && mapped.len() == 2, "{mapped:?}");
    }
}
