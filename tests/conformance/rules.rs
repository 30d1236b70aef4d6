//! The rules, one function each.

use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::thread;

use privmem::Side::{Private, Shared};
use privmem::kernel::{Kernel, Linux};
use privmem::{Destination, Error, GRANULE, Level, Listener, Options};

use crate::common::{convert, figures, granules};
use crate::machine::{Guest, assert_if_known, picture};

pub fn changed_side_reads_zero(guest: &mut Guest) {
    guest.ram(16);
    for (round, to) in [Private, Shared, Private].into_iter().enumerate() {
        guest.fill(0..16, round as u8);
        guest.convert(4..12, to).unwrap();
        guest.assert_zero(4..12);
    }
}

pub fn neighbours_keep_contents(guest: &mut Guest) {
    guest.ram(32);
    for side in [Shared, Private] {
        guest.convert(0..32, side).unwrap();
        guest.fill(0..32, 1);
        guest.convert(10..13, side.other()).unwrap();
        guest.assert_filled(0..10, 1);
        guest.assert_filled(13..32, 1);
    }
}

pub fn what_is_so_already_stays(guest: &mut Guest) {
    let ram = guest.ram(16);
    guest.fill(0..16, 1);
    guest.convert(0..16, Shared).unwrap();
    guest.assert_filled(0..16, 1);

    guest.convert(4..8, Private).unwrap();
    guest.fill(4..8, 2);
    guest.convert(4..8, Private).unwrap();
    guest.assert_filled(4..8, 2);

    // Of a request, only what is not so yet changes.
    guest.convert(2..10, Private).unwrap();
    assert_eq!(picture(&ram), "..########......");
    guest.assert_zero(2..4);
    guest.assert_filled(4..8, 2);
    guest.assert_zero(8..10);
}

pub fn sides_do_not_show_through(guest: &mut Guest) {
    guest.ram(8);
    for round in 0..4 {
        guest.fill(2..4, 2 * round);
        guest.convert(2..4, Private).unwrap();
        guest.assert_zero(2..4);
        guest.fill(2..4, 2 * round + 1);
        guest.assert_filled(2..4, 2 * round + 1);
        guest.convert(2..4, Shared).unwrap();
        guest.assert_zero(2..4);
    }
}

pub fn what_a_device_writes_late_does_not_come_up(guest: &mut Guest) {
    let ram = guest.ram(8);
    guest.convert(2..4, Private).unwrap();
    guest.fill(2..4, 1);
    guest.device_write(&ram, 2, 0xdd);
    assert_if_known(ram.info().held_twice, GRANULE);
    guest.assert_filled(2..4, 1);
    guest.convert(2..4, Shared).unwrap();
    assert_if_known(ram.info().shared_held, 0);
    guest.assert_zero(2..4);
}

pub fn memory_is_held_on_one_side(guest: &mut Guest) {
    let ram = guest.ram(64);
    let held = || {
        let info = ram.info();
        let pages = |bytes: u64| bytes / GRANULE;
        let sides = info.private_held.zip(info.shared_held).zip(info.held_twice);
        sides.map(|((private, shared), twice)| (pages(private), pages(shared), pages(twice)))
    };
    if held().is_none() {
        println!("skipped: this kernel has no cachestat(2)");
        return;
    }
    assert_eq!(held(), Some((0, 0, 0)), "nothing is touched yet");
    guest.fill(0..40, 1);
    assert_eq!(held(), Some((0, 40, 0)));
    guest.convert(8..48, Private).unwrap();
    assert_eq!(held(), Some((0, 8, 0)), "converting allocates nothing");
    guest.fill(8..20, 2);
    guest.assert_zero(20..24);
    assert_eq!(held(), Some((16, 8, 0)), "reading allocates, too");
    guest.convert(0..64, Shared).unwrap();
    assert_eq!(held(), Some((0, 8, 0)));
}

pub fn one_request_over_bindings_and_regions(guest: &mut Guest) {
    let (ram, more) = (guest.region(16), guest.region(8));
    // The halves of one region the other way round, then the other region.
    guest.bind(&ram, 8..16, 0);
    guest.bind(&ram, 0..8, 8);
    guest.bind(&more, 0..8, 16);
    for (to, of_ram, of_more) in [
        (Private, "########....####", "####...."),
        (Shared, "................", "........"),
    ] {
        guest.fill(0..24, 1);
        guest.convert(4..20, to).unwrap();
        assert_eq!(picture(&ram), of_ram);
        assert_eq!(picture(&more), of_more);
        guest.assert_filled(0..4, 1);
        guest.assert_zero(4..20);
        guest.assert_filled(20..24, 1);
    }
}

pub fn what_is_not_bound_is_shared_already(guest: &mut Guest) {
    let (ram, more) = (guest.ram(8), guest.region(4));
    guest.bind(&more, 0..4, 12);
    guest.fill(0..8, 1);
    guest.fill(12..16, 1);
    // Beyond, across an end, across a hole, far away, and very much.
    let requests = [8..9, 6..10, 6..14, 1 << 40..(1 << 40) + 1, 0..1 << 50];
    for request in requests.clone() {
        let result = guest.convert(request, Private);
        assert!(matches!(result, Err(Error::NotPrivateCapable { .. })));
        assert_eq!(picture(&ram), "........");
        assert_eq!(picture(&more), "....");
    }
    for request in requests {
        guest.convert(request, Shared).unwrap();
    }
    guest.assert_filled(0..8, 1);
    guest.assert_filled(12..16, 1);
    let info = ram.info();
    assert_eq!((info.conversions, info.failed_conversions), (3, 3));
}

pub fn state_and_contents_follow_the_region(guest: &mut Guest) {
    let ram = guest.ram(8);
    guest.convert(2..4, Private).unwrap();
    guest.fill(0..8, 1);
    let contents: Vec<u8> = (0..8).map(|granule| guest.read(granule)).collect();

    guest.unbind(0);
    assert!(guest.convert(2..4, Private).is_err());
    guest.bind(&ram, 0..8, 100);
    assert_eq!(picture(&ram), "..##....");
    let moved: Vec<u8> = (100..108).map(|granule| guest.read(granule)).collect();
    assert_eq!(moved, contents);

    // What comes to the old place starts shared.
    let next = guest.region(8);
    guest.bind(&next, 0..8, 0);
    guest.fill(0..8, 2);
    let info = next.info();
    assert_if_known(info.private_held, 0);
    assert_if_known(info.shared_held, info.size);
    assert_if_known(ram.info().held_twice, 0);
}

pub fn reset_makes_all_shared(guest: &mut Guest) {
    let ram = guest.ram(16);
    for granule in (0..16).step_by(2) {
        guest.convert(granule..granule + 1, Private).unwrap();
    }
    guest.fill(0..16, 1);
    // Whether the guest sees it or not.
    guest.unbind(0);
    guest.bind(&ram, 0..8, 0);
    ram.reset().unwrap();
    assert_eq!(ram.info().private, 0);
    assert_if_known(ram.info().private_held, 0);
    guest.bind(&ram, 8..16, 8);
    for granule in (0..16).step_by(2) {
        guest.assert_zero(granule..granule + 1);
        guest.assert_filled(granule + 1..granule + 2, 1);
    }
    assert_if_known(ram.info().private_held, 0);
}

pub fn what_begins_private_returns_to_that(guest: &mut Guest) {
    let ram = guest.ram_with(
        16,
        Options {
            initial: Private,
            ..Options::default()
        },
    );
    assert_eq!(picture(&ram), "################");
    guest.fill(0..16, 1);
    guest.convert(4..8, Shared).unwrap();
    guest.assert_zero(4..8);
    guest.fill(4..8, 2);
    guest.assert_filled(8..16, 1);
    assert_if_known(ram.info().shared_held, 4 * GRANULE);
    guest.expect_discards();
    ram.reset().unwrap();
    assert_eq!(picture(&ram), "################");
    assert_if_known(ram.info().private_held, 0);
    assert_if_known(ram.info().shared_held, 0);
    guest.assert_zero(0..16);
}

pub fn a_store_that_keeps_pages_shows_them_again(guest: &mut Guest) {
    guest.ram_with(
        8,
        Options {
            keep_private: true,
            keep_shared: true,
            ..Options::default()
        },
    );
    guest.fill(0..8, 1);
    guest.convert(2..4, Private).unwrap();
    guest.assert_zero(2..4);
    guest.fill(2..4, 2);
    guest.convert(2..4, Shared).unwrap();
    guest.assert_filled(0..8, 1);
    guest.convert(2..4, Private).unwrap();
    guest.assert_filled(2..4, 2);
}

pub fn preallocated_memory_is_held_where_it_is(guest: &mut Guest) {
    let ram = guest.ram(16);
    guest.convert(4..8, Private).unwrap();
    ram.preallocate(NonZeroUsize::MIN).unwrap();
    let assert_held = |private: u64| {
        let info = ram.info();
        assert_if_known(info.private_held, private * GRANULE);
        assert_if_known(info.shared_held, (16 - private) * GRANULE);
        assert_if_known(info.held_twice, 0);
    };
    assert_held(4);
    guest.convert(0..6, Private).unwrap();
    assert_held(8);
    guest.convert(0..16, Shared).unwrap();
    assert_held(0);
    guest.assert_zero(0..8);
}

pub fn what_is_discarded_reads_zero_on_either_side(guest: &mut Guest) {
    let ram = guest.ram(8);
    guest.convert(2..5, Private).unwrap();
    guest.fill(0..8, 1);
    guest.expect_discards();
    ram.discard(GRANULE, 3 * GRANULE).unwrap();
    assert_eq!(picture(&ram), "..###...");
    assert_if_known(ram.info().private_held, GRANULE);
    assert_if_known(ram.info().shared_held, 4 * GRANULE);
    guest.assert_filled(0..1, 1);
    guest.assert_zero(1..4);
    guest.assert_filled(4..8, 1);
    assert!(ram.discard(6 * GRANULE, 3 * GRANULE).is_err());
}

/// Whether the host has really lost it: to the store it is all the same.
pub fn a_failed_page_comes_back_empty(guest: &mut Guest) {
    let ram = guest.ram(8);
    guest.convert(2..5, Private).unwrap();
    guest.fill(0..8, 1);
    guest.expect_discards();
    for (granule, side) in [(3, Private), (6, Shared)] {
        let failure = guest.vm().memory_failure(granule * GRANULE + 9, side, true);
        let failure = failure.unwrap();
        assert_eq!(granules(failure.page), granule..granule + 1);
        assert_eq!((failure.side, failure.lost), (side, GRANULE));
        assert_eq!(failure.gpa, Some(granule * GRANULE));
        // Nothing there is on the other side.
        let none = ram
            .memory_failure(granule * GRANULE, side.other(), true)
            .unwrap();
        assert_eq!((none.lost, none.gpa), (0, None));
    }
    assert_eq!(ram.info().memory_failures, 2);
    assert_eq!(picture(&ram), "..###...");
    assert_if_known(ram.info().private_held, 2 * GRANULE);
    assert_if_known(ram.info().shared_held, 4 * GRANULE);
    for kept in [0..3, 4..6, 7..8] {
        guest.assert_filled(kept, 1);
    }
    for lost in [3..4, 6..7] {
        guest.assert_zero(lost.clone());
        guest.fill(lost.clone(), 2);
        guest.assert_filled(lost, 2);
    }
    guest.convert(0..8, Shared).unwrap();
    guest.assert_filled(5..6, 1);
    guest.assert_zero(2..5);
}

/// Whoever keeps contents from the VMM cannot load them; who does not, can.
pub fn a_saved_state_is_loaded_with_contents_or_not_at_all(guest: &mut Guest) {
    let saved = guest.region(20);
    guest.bind(&saved, 0..20, 100);
    guest.convert(103..112, Private).unwrap();
    guest.convert(107..108, Shared).unwrap();
    let state = saved.save_state();

    // What the stores keep must not come up in place of zeroes.
    let ram = guest.ram_with(
        20,
        Options {
            keep_private: true,
            keep_shared: true,
            ..Options::default()
        },
    );
    for side in [Private, Shared] {
        guest.convert(0..20, side).unwrap();
        guest.fill(0..20, 2);
    }
    guest.convert(0..5, Private).unwrap();
    guest.fill(0..4, 1);
    guest.write(4, 0);
    guest.fill(5..8, 1);
    (8..20).for_each(|granule| guest.write(granule, 0));
    let before = picture(&ram);
    match ram.load_state(&state) {
        Ok(()) => {
            assert_eq!(picture(&ram), picture(&saved));
            let error = ram.load_state(&state[1..]).unwrap_err();
            assert!(error.to_string().contains("20 granules"), "{error}");
        }
        Err(error) => {
            assert_eq!(error.errno(), libc::EOPNOTSUPP, "{error}");
            assert_eq!(picture(&ram), before);
        }
    }
    guest.assert_filled(0..4, 1);
    guest.assert_zero(4..5);
    guest.assert_filled(5..8, 1);
    guest.assert_zero(8..20);
}

/// What preallocates holds memory for all of a loaded machine, whatever was where before.
pub fn a_loaded_region_holds_what_it_is_to_preallocate(guest: &mut Guest) {
    let saved = guest.region(20);
    guest.bind(&saved, 0..20, 100);
    guest.convert(103..112, Private).unwrap();
    let state = saved.save_state();
    let ram = guest.ram(20);
    ram.preallocate(NonZeroUsize::MIN).unwrap();
    guest.convert(0..5, Private).unwrap();
    guest.fill(6..8, 1);
    if ram.load_state(&state).is_err() {
        // KVM gives no contents out, as the rule before has it.
        return;
    }
    let info = ram.info();
    assert_eq!(info.private, 9 * GRANULE);
    assert_if_known(info.private_held, 9 * GRANULE);
    assert_if_known(info.shared_held, 11 * GRANULE);
    assert_if_known(info.held_twice, 0);
    guest.assert_zero(0..6);
    guest.assert_filled(6..8, 1);
    guest.assert_zero(8..20);
}

/// Who can move private contents leaves the guest nothing to see of it; who
/// cannot says why, and leaves everything.
pub fn private_memory_moves_or_all_is_as_it_was(guest: &mut Guest) {
    let ram = guest.ram(16);
    guest.convert(4..12, Private).unwrap();
    guest.fill(0..16, 1);
    let before = figures(&ram);
    let fd = Linux.create_memfd(c"elsewhere", 8 * GRANULE, None).unwrap();
    let place = |granule| Destination::File {
        fd: fd.as_fd(),
        offset: (granule - 4) * GRANULE,
    };
    let vm = guest.vm().clone();
    let relocate = |granule, to| vm.relocate(granule * GRANULE, Level::Size4K, to);
    let moved = (4..10).try_for_each(|granule| relocate(granule, place(granule)));
    guest.assert_filled(0..16, 1);
    assert_eq!(picture(&ram), "....########....");
    match moved {
        Ok(()) => {}
        Err(error) if error.to_string().contains("userfaultfd") => {
            println!("skipped: {error}");
            return;
        }
        Err(error) => {
            assert_eq!(error.errno(), libc::EOPNOTSUPP, "{error}");
            assert!(error.to_string().starts_with("trust agent"), "{error}");
            assert_eq!(figures(&ram), before);
            return;
        }
    }
    let assert_held = |elsewhere: u64, private: u64| {
        let info = ram.info();
        assert_eq!((info.relocated, info.swapped), (elsewhere * GRANULE, 0));
        assert_if_known(info.private_held, private * GRANULE);
        assert_if_known(info.held_twice, 0);
        assert_eq!(Linux.blocks(fd.as_fd()).unwrap(), elsewhere * GRANULE);
    };
    assert_held(6, 8);
    guest.fill(4..8, 2);
    guest.assert_filled(4..8, 2);
    // Whatever ends private contents frees their place.
    guest.convert(5..6, Shared).unwrap();
    assert_held(5, 7);
    guest.assert_zero(5..6);
    guest.convert(5..6, Private).unwrap();
    guest.assert_zero(5..6);
    relocate(4, Destination::Home).unwrap();
    relocate(4, Destination::Home).unwrap();
    guest.assert_filled(4..5, 2);
    guest.assert_filled(6..8, 2);
    assert_held(4, 8);
    guest.expect_discards();
    ram.discard(6 * GRANULE, GRANULE).unwrap();
    assert_held(3, 7);
    guest.assert_zero(6..7);
    guest.assert_filled(7..8, 2);
    guest.assert_filled(8..12, 1);
    ram.reset().unwrap();
    assert_held(0, 0);
    guest.assert_filled(0..4, 1);
    guest.assert_zero(4..12);
}

/// A downstream mapper that keeps what it is told, in granules.
#[derive(Default)]
struct Mapper {
    told: Mutex<Vec<Told>>,
    /// How many more calls of `populate` it agrees to, if there is an end.
    patience: Mutex<Option<usize>>,
}

#[derive(Clone, Debug, PartialEq)]
enum Told {
    Discard(Range<u64>),
    Populate(Range<u64>),
}

impl Mapper {
    /// What it was told since the last time.
    fn told(&self) -> Vec<Told> {
        std::mem::take(&mut self.told.lock().unwrap())
    }
}

impl Listener for Mapper {
    fn discard(&self, offsets: privmem::Range, _: u64) -> io::Result<()> {
        let told = Told::Discard(granules(offsets));
        self.told.lock().unwrap().push(told);
        Ok(())
    }

    fn populate(&self, offsets: privmem::Range) -> io::Result<()> {
        if let Some(left) = self.patience.lock().unwrap().as_mut() {
            let refused = || io::Error::from_raw_os_error(libc::ENOSPC);
            *left = left.checked_sub(1).ok_or_else(refused)?;
        }
        let told = Told::Populate(granules(offsets));
        self.told.lock().unwrap().push(told);
        Ok(())
    }

    fn identity(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }
}

pub fn listeners_see_exactly_the_runs(guest: &mut Guest) {
    use Told::{Discard, Populate};
    let ram = guest.ram(16);
    guest.convert(6..8, Private).unwrap();
    let mapper = Arc::new(Mapper::default());
    ram.add_listener(mapper.clone()).unwrap();
    assert_eq!(mapper.told(), [Populate(0..6), Populate(8..16)]);
    guest.convert(4..12, Private).unwrap();
    assert_eq!(mapper.told(), [Discard(4..6), Discard(8..12)]);
    guest.convert(5..11, Private).unwrap();
    assert_eq!(mapper.told(), [], "nothing changes");
    guest.convert(0..8, Shared).unwrap();
    assert_eq!(mapper.told(), [Populate(4..8)]);
    ram.remove_listener(mapper.identity()).unwrap();
    assert_eq!(mapper.told(), [Discard(0..8), Discard(12..16)]);
    guest.convert(0..16, Shared).unwrap();
    assert_eq!(mapper.told(), [], "it listens no more");
}

/// Private pages are freed only once all listeners have agreed.
pub fn listener_that_refuses_changes_nothing(guest: &mut Guest) {
    use Told::{Discard, Populate};
    let ram = guest.ram(16);
    for private in [2..4, 6..8, 10..12] {
        guest.convert(private, Private).unwrap();
    }
    guest.fill(0..16, 1);
    let before = ram.info();
    let mappers = [(); 2].map(|()| Arc::new(Mapper::default()));
    for mapper in &mappers {
        ram.add_listener(mapper.clone()).unwrap();
        mapper.told();
    }
    *mappers[1].patience.lock().unwrap() = Some(2);

    let error = guest.convert(0..16, Shared).unwrap_err();
    assert_eq!(error.errno(), libc::ENOSPC);
    assert!(!matches!(error, Error::Undone { .. }), "{error}");
    assert!(error.to_string().contains("listener"), "{error}");

    assert_eq!(picture(&ram), "..##..##..##....");
    guest.assert_filled(0..16, 1);
    let after = ram.info();
    assert_eq!(after.private_held, before.private_held);
    assert_eq!(after.shared_held, before.shared_held);
    assert_eq!(after.failed_conversions, 1);
    let [one, other] = mappers.each_ref().map(|mapper| mapper.told());
    let both = [Populate(2..4), Populate(6..8)];
    let undone = [Discard(2..4), Discard(6..8)];
    assert_eq!(other, [both.clone(), undone.clone()].concat());
    let alone = vec![Populate(10..12), Discard(10..12)];
    assert_eq!(one, [both.to_vec(), alone, undone.to_vec()].concat());
}

pub fn threads_convert_disjoint_ranges(guest: &mut Guest) {
    const THREADS: u64 = 4;
    // Several threads to a word of the state map, one of them in two words.
    const OWN: u64 = 20;
    const ROUNDS: u64 = 25;
    let ram = guest.ram(THREADS * OWN);
    guest.fill(0..THREADS * OWN, 1);
    let converted = |own: u64| own * OWN + 2..(own + 1) * OWN - 2;
    thread::scope(|scope| {
        for own in 0..THREADS {
            let vm = guest.vm().clone();
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let side = [Private, Shared][round as usize % 2];
                    convert(&vm, converted(own), side).unwrap();
                }
            });
        }
        // Meanwhile the guest works on what nobody converts.
        for own in 0..THREADS {
            guest.assert_filled(own * OWN..own * OWN + 2, 1);
            guest.fill(own * OWN..own * OWN + 2, 2);
        }
    });
    assert_eq!(
        picture(&ram),
        "..################..".repeat(THREADS as usize)
    );
    for own in 0..THREADS {
        guest.assert_filled(own * OWN..own * OWN + 2, 2);
        guest.assert_zero(converted(own));
        guest.assert_filled(converted(own).end..(own + 1) * OWN, 1);
    }
    let info = ram.info();
    assert_eq!(
        (info.conversions, info.failed_conversions),
        (THREADS * ROUNDS, 0)
    );
    assert_if_known(info.held_twice, 0);
}

/// A guest that races with conversions may find any page there. Once they are
/// over, nothing that it wrote comes up again, or is held twice.
pub fn threads_convert_what_the_guest_touches(guest: &mut Guest) {
    let ram = guest.ram(12);
    thread::scope(|scope| {
        for range in [0..8, 4..12] {
            let vm = guest.vm().clone();
            scope.spawn(move || {
                for round in 0..50 {
                    let side = [Private, Shared][round % 2];
                    convert(&vm, range.clone(), side).unwrap();
                }
            });
        }
        for seed in 0..20 {
            guest.fill(0..12, seed);
        }
    });
    // Each granule changes its side, so that both sides were freed.
    guest.convert(0..12, Private).unwrap();
    guest.convert(0..12, Shared).unwrap();
    let info = ram.info();
    assert_eq!(info.failed_conversions, 0);
    assert_if_known(info.private_held, 0);
    assert_if_known(info.shared_held, 0);
    guest.assert_zero(0..12);
}
