//! Private memory that moves while the guest runs: threads that use the VMM's
//! mapping, as vCPUs of TCG do.

mod common;

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::faulty::Faulty;
use common::mapping::HostMapping;
use common::{Fail, Model, convert, stand_in_fd};
use privmem::agent::{Agent, InitialPages, Move};
use privmem::kernel::{Kernel, Linux};
use privmem::{Destination, Error, GRANULE, Info, Level, Options, Region, Side, Vm};

const GRANULES: u64 = 64;
const WORDS: usize = GRANULE as usize / 8;

/// A region that the guest sees from 0 up, and where it is mapped.
struct Setup {
    kernel: Arc<Faulty>,
    vm: Arc<Vm>,
    region: Arc<Region>,
    mapping: HostMapping,
}

// SAFETY: guest memory is reached through volatile accesses only, and each
// granule by one thread at a time.
unsafe impl Sync for Setup {}

fn setup(granules: u64, options: Options) -> Setup {
    let kernel = Faulty::new();
    let vm = Vm::with_kernel(kernel.clone(), None).unwrap();
    let region = Region::with_options(&vm, "ram", granules * GRANULE, options).unwrap();
    let mapping = HostMapping::new(&region);
    vm.bind(&region, 0, 0, granules * GRANULE).unwrap();
    Setup {
        kernel,
        vm,
        region,
        mapping,
    }
}

/// A region that is all private, if the host lets memory move.
fn private_setup(granules: u64) -> Option<Setup> {
    let setup = setup(granules, Options::default());
    convert(&setup.vm, 0..granules, Side::Private).unwrap();
    let probe = memfd(1);
    let moved = setup.relocate(0, place(&probe, 0));
    match moved.and_then(|()| setup.relocate(0, Destination::Home)) {
        Ok(()) => Some(setup),
        Err(error) => {
            assert!(error.to_string().contains("userfaultfd"), "{error}");
            println!("skipped: {error}");
            None
        }
    }
}

impl Setup {
    fn word(&self, granule: u64, word: usize) -> *mut u64 {
        // SAFETY: within the granule.
        unsafe { self.mapping.granule(granule).cast::<u64>().add(word) }
    }

    /// The guest writes all of a granule.
    fn write(&self, granule: u64, value: u64) {
        for word in 0..WORDS {
            // SAFETY: mapped for as long as this lives.
            unsafe { self.word(granule, word).write_volatile(value) };
        }
    }

    /// What the guest finds in all of a granule.
    fn read(&self, granule: u64) -> u64 {
        // SAFETY: mapped for as long as this lives.
        let read = |word| unsafe { self.word(granule, word).read_volatile() };
        let first = read(0);
        for word in 1..WORDS {
            assert_eq!(read(word), first, "granule {granule}, word {word}");
        }
        first
    }

    fn is_at(&self, granule: u64, spot: Spot, spots: &Spots) -> bool {
        match spot {
            Spot::Home => self.region.info().relocated == 0,
            _ => {
                let again = self.relocate(granule, spots.of(spot));
                matches!(again, Err(Error::PlaceTaken(_)))
            }
        }
    }

    fn relocate(&self, granule: u64, to: Destination) -> privmem::Result<()> {
        self.vm.relocate(granule * GRANULE, Level::Size4K, to)
    }
}

/// As large as the region, so that each granule has a place of its own.
fn memfd(granules: u64) -> OwnedFd {
    Linux
        .create_memfd(c"elsewhere", granules * GRANULE, None)
        .unwrap()
}

fn place(fd: &impl AsFd, granule: u64) -> Destination<'_> {
    let (fd, offset) = (fd.as_fd(), granule * GRANULE);
    Destination::File { fd, offset }
}

/// A file on a disk, if there is one here.
fn disk(granules: u64) -> Option<OwnedFd> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("privmem-swap-{}-{number}", std::process::id());
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    let file = options.open(&path).ok()?;
    std::fs::remove_file(path).unwrap();
    file.set_len(granules * GRANULE).unwrap();
    let facts = Linux.file(file.as_fd()).unwrap();
    (!facts.in_memory).then(|| file.into())
}

/// Bytes that a file holds for its contents; a disk has blocks for more.
fn held(fd: &impl AsFd) -> u64 {
    let fd = fd.as_fd().as_raw_fd();
    let seek = |offset, whence| unsafe {
        // SAFETY: the call touches no memory.
        libc::lseek(fd, offset, whence)
    };
    let (mut at, mut bytes) = (0, 0);
    loop {
        let data = seek(at, libc::SEEK_DATA);
        if data < 0 {
            return bytes;
        }
        at = seek(data, libc::SEEK_HOLE);
        bytes += (at - data) as u64;
    }
}

/// Tells threads to stop, also where a test fails.
struct Stop(AtomicBool);

impl Stop {
    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Sets a [`Stop`] when it goes.
struct Until<'a>(&'a Stop);

impl Drop for Until<'_> {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

const MOVES: u64 = 10_000;

/// Each thread that uses memory does so at least as often.
const ROUNDS: u64 = 100;

/// One thread's granules, and what the guest has left in each; 0 for nothing.
struct Own {
    first: u64,
    left: Vec<u64>,
}

impl Own {
    /// Writes something else to each of its granules in turn, and sometimes
    /// converts one there and back, until it is told to stop.
    fn work(&mut self, setup: &Setup, rounds: &AtomicU64, stop: &Stop) {
        while !stop.is_set() {
            let round = rounds.fetch_add(1, Ordering::Relaxed);
            let index = round as usize % self.left.len();
            let granule = self.first + index as u64;
            assert_eq!(setup.read(granule), self.left[index], "granule {granule}");
            if round.is_multiple_of(7) {
                for side in [Side::Shared, Side::Private] {
                    convert(&setup.vm, granule..granule + 1, side).unwrap();
                    assert_eq!(setup.read(granule), 0, "granule {granule}, {side:?}");
                }
            }
            self.left[index] = round << 8 | (1 + self.first);
            setup.write(granule, self.left[index]);
        }
    }
}

/// Ends the test where a thread waits in the kernel for ever: nobody could join
/// it. No other verdict depends on time.
fn patience() -> impl Fn() {
    let deadline = Instant::now() + Duration::from_secs(120);
    move || {
        if Instant::now() > deadline {
            eprintln!("a writer makes no progress");
            std::process::abort();
        }
    }
}

#[test]
fn ten_thousand_moves_while_two_threads_convert_and_write() {
    let Some(setup) = private_setup(GRANULES) else {
        return;
    };
    let elsewhere = [memfd(GRANULES), memfd(GRANULES)];
    let disk = disk(GRANULES);
    if disk.is_none() {
        println!("the tests' folder is on no disk: memory moves between memfds only");
    }
    let mut owners = [0, 1].map(|half| Own {
        first: half * GRANULES / 2,
        left: vec![0; GRANULES as usize / 2],
    });
    let (stop, rounds) = (
        Stop(AtomicBool::new(false)),
        [(); 2].map(|()| AtomicU64::new(0)),
    );
    thread::scope(|scope| {
        let workers: Vec<_> = owners.iter_mut().zip(&rounds).collect();
        let workers: Vec<_> = workers
            .into_iter()
            .map(|(own, rounds)| scope.spawn(|| own.work(&setup, rounds, &stop)))
            .collect();
        let until = Until(&stop);
        let (mut moved, check) = (0, patience());
        // In turn to one of the places, of which the last one was another; to
        // the disk more seldom, because it takes its time.
        for turn in 0.. {
            let granule = turn % GRANULES;
            let round = turn / GRANULES;
            let to = match (round % 3, &disk) {
                (0, Some(disk)) if round.is_multiple_of(30) => place(disk, granule),
                (0, _) => place(&elsewhere[0], granule),
                (1, _) => place(&elsewhere[1], granule),
                _ => Destination::Home,
            };
            match setup.relocate(granule, to) {
                Ok(()) => moved += 1,
                // Its owner has it shared just now.
                Err(Error::NotPrivate { .. }) => {}
                Err(error) => panic!("turn {turn}: {error}"),
            }
            let worked = |rounds: &AtomicU64| rounds.load(Ordering::Relaxed) >= ROUNDS;
            let failed = workers.iter().any(|worker| worker.is_finished());
            if failed || moved >= MOVES && rounds.iter().all(worked) {
                break;
            }
            check();
        }
        drop(until);
        for worker in workers {
            worker.join().unwrap();
        }
    });
    for own in &owners {
        for (granule, left) in (own.first..).zip(&own.left) {
            assert_eq!(setup.read(granule), *left, "granule {granule} in the end");
        }
    }
    // Conversions bring all home, and leave nothing elsewhere.
    convert(&setup.vm, 0..GRANULES, Side::Shared).unwrap();
    let Info {
        relocated,
        held_twice,
        ..
    } = setup.region.info();
    assert_eq!(relocated, 0);
    assert!(held_twice.is_none_or(|bytes| bytes == 0));
    for fd in elsewhere {
        assert_eq!(held(&fd), 0);
    }
    if let Some(disk) = disk {
        assert_eq!(held(&disk), 0);
    }
}

/// Where memory of one granule may lie: the file, and what of it.
struct Spots {
    memfds: [OwnedFd; 2],
    disk: Option<OwnedFd>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Spot {
    Home,
    Memfd(usize),
    Disk,
}

impl Spots {
    fn new() -> Spots {
        Spots {
            memfds: [memfd(8), memfd(8)],
            disk: disk(8),
        }
    }

    fn of(&self, spot: Spot) -> Destination<'_> {
        match (spot, &self.disk) {
            (Spot::Memfd(number), _) => place(&self.memfds[number], 3),
            (Spot::Disk, Some(disk)) => place(disk, 3),
            _ => Destination::Home,
        }
    }

    /// Bytes that files elsewhere hold.
    fn held(&self) -> u64 {
        let all = self.memfds.iter().chain(&self.disk);
        all.map(held).sum()
    }

    fn moves(&self) -> Vec<(Spot, Spot)> {
        use Spot::*;
        let mut moves = vec![(Home, Memfd(0)), (Memfd(0), Home), (Memfd(0), Memfd(1))];
        match self.disk {
            Some(_) => moves.extend([
                (Home, Disk),
                (Memfd(0), Disk),
                (Disk, Home),
                (Disk, Memfd(1)),
            ]),
            None => println!("no disk here: moves to and from one are left out"),
        }
        moves
    }
}

/// Counts in all words of a granule, until it is told to stop.
fn count(setup: &Setup, granule: u64, counted: &AtomicU64, stop: &Stop) {
    while !stop.is_set() {
        let next = setup.read(granule) + 1;
        setup.write(granule, next);
        counted.store(next, Ordering::Relaxed);
    }
}

fn wait_for_more(counted: &AtomicU64) {
    let (now, check) = (counted.load(Ordering::Relaxed), patience());
    while counted.load(Ordering::Relaxed) < now + 3 {
        thread::yield_now();
        check();
    }
}

#[test]
fn a_call_that_fails_leaves_contents_and_lets_the_writer_go_on() {
    let Some(setup) = private_setup(8) else {
        return;
    };
    let spots = Spots::new();
    let (counted, stop) = (AtomicU64::new(0), Stop(AtomicBool::new(false)));
    thread::scope(|scope| {
        let writer = scope.spawn(|| count(&setup, 5, &counted, &stop));
        let _until = Until(&stop);
        wait_for_more(&counted);
        for (from, to) in spots.moves() {
            let mut number = 0;
            loop {
                let what = format!("call {number} from {from:?} to {to:?}");
                setup.relocate(5, Destination::Home).unwrap();
                setup.relocate(5, spots.of(from)).unwrap();
                let (before, held) = (common::figures(&setup.region), spots.held());
                setup.kernel.set_fail(Fail::Once(number, libc::EIO));
                let result = setup.relocate(5, spots.of(to));
                let calls = setup.kernel.calls().len();
                setup.kernel.set_fail(Fail::Never);
                wait_for_more(&counted);
                match result {
                    Ok(()) if calls <= number => break,
                    // What was only an advice to the kernel.
                    Ok(()) => assert_eq!(to, Spot::Disk, "{what}"),
                    Err(Error::OldPlace(_)) => assert!(setup.is_at(5, to, &spots), "{what}"),
                    Err(error) => {
                        assert_eq!(error.errno(), libc::EIO, "{what}: {error}");
                        assert!(!matches!(error, Error::Stranded { .. }), "{what}: {error}");
                        assert_eq!(common::figures(&setup.region), before, "{what}");
                        assert_eq!(spots.held(), held, "{what}");
                        // The same move succeeds once the kernel does.
                        setup.relocate(5, spots.of(to)).unwrap();
                    }
                }
                assert!(!writer.is_finished(), "{what}");
                number += 1;
            }
            assert!(number >= 6, "{from:?} to {to:?} makes several calls");
        }
    });
    assert_eq!(setup.read(5), counted.load(Ordering::Relaxed));
    setup.relocate(5, Destination::Home).unwrap();
    assert_eq!(setup.read(5), counted.load(Ordering::Relaxed));
}

#[test]
fn when_all_calls_fail_from_one_on_contents_can_still_be_had() {
    let Some(setup) = private_setup(8) else {
        return;
    };
    let spots = Spots::new();
    for (from, to) in spots.moves() {
        for number in 0.. {
            let what = format!("calls from {number} on, {from:?} to {to:?}");
            setup.relocate(5, Destination::Home).unwrap();
            setup.write(5, 7);
            setup.relocate(5, spots.of(from)).unwrap();
            setup.kernel.set_fail(Fail::From(number, libc::EIO));
            let result = setup.relocate(5, spots.of(to));
            let calls = setup.kernel.calls().len();
            setup.kernel.set_fail(Fail::Never);
            match result {
                Err(Error::Stranded { stranded, .. }) => {
                    assert_eq!(stranded, GRANULE, "{what}");
                    // The guest sees what it did, or zeroes.
                    assert!([0, 7].contains(&setup.read(5)), "{what}");
                    setup.relocate(5, spots.of(to)).unwrap();
                }
                Err(_) => {}
                Ok(()) => assert!(calls <= number || to == Spot::Disk, "{what}"),
            }
            assert_eq!(setup.read(5), 7, "{what}");
            if calls <= number {
                break;
            }
        }
    }
}

/// Where a mapping that fails leaves a hole, all of it is mapped again: what was
/// moved, and what was at home already.
#[test]
fn no_hole_stays_where_a_mapping_fails() {
    const LARGE: u64 = 512;
    let Some(setup) = private_setup(LARGE) else {
        return;
    };
    let fd = memfd(LARGE);
    (0..LARGE).for_each(|granule| setup.write(granule, 1 + granule));
    setup.relocate(7, place(&fd, 7)).unwrap();
    setup.kernel.leave_holes();
    let home = || setup.vm.relocate(0, Level::Size2M, Destination::Home);
    fail_at_map_fixed(&setup, || home().map_err(|error| error.errno()));
    (0..LARGE).for_each(|granule| assert_eq!(setup.read(granule), 1 + granule));
    assert_eq!(setup.region.info().relocated, GRANULE);

    let discard = || setup.region.discard(7 * GRANULE, GRANULE);
    fail_at_map_fixed(&setup, || discard().map_err(|error| error.errno()));
    assert_eq!((setup.read(6), setup.read(7), setup.read(8)), (7, 0, 9));
    home().unwrap();
    assert_eq!(setup.region.info().relocated, 0);
}

/// Has the first mapping of what is done fail.
fn fail_at_map_fixed(setup: &Setup, work: impl Fn() -> Result<(), i32>) {
    for number in 0.. {
        setup.kernel.set_fail(Fail::Once(number, libc::ENOMEM));
        let result = work();
        let failed = setup.kernel.calls().get(number).copied();
        setup.kernel.set_fail(Fail::Never);
        if failed == Some("map_fixed") {
            assert_eq!(result, Err(libc::ENOMEM));
            return;
        }
        assert!(failed.is_some(), "nothing is mapped");
    }
}

#[test]
fn a_large_page_moves_at_once_from_wherever_it_lies() {
    const LARGE: u64 = 512;
    let Some(setup) = private_setup(2 * LARGE + 1) else {
        return;
    };
    let [scattered, one] = [memfd(2 * LARGE), memfd(2 * LARGE)];
    let disk = disk(2 * LARGE);
    let written = || (LARGE..2 * LARGE).step_by(3).chain([LARGE + 7, 2 * LARGE]);
    written().for_each(|granule| setup.write(granule, granule));
    for granule in [LARGE, LARGE + 1, LARGE + 300] {
        setup.relocate(granule, place(&scattered, granule)).unwrap();
    }
    if let Some(disk) = &disk {
        setup.relocate(LARGE + 6, place(disk, 3)).unwrap();
        assert_eq!(setup.region.info().swapped, GRANULE);
    }
    let large = |to| setup.vm.relocate(LARGE * GRANULE, Level::Size2M, to);
    large(place(&one, LARGE)).unwrap();
    written().for_each(|granule| assert_eq!(setup.read(granule), granule));
    let info = setup.region.info();
    assert_eq!((info.relocated, info.swapped), (LARGE * GRANULE, 0));
    for fd in disk.iter().chain([&scattered]) {
        assert_eq!(held(&fd), 0);
    }
    // What was never written takes no memory at the new place.
    let moved = written().filter(|granule| *granule < 2 * LARGE);
    assert_eq!(held(&one), moved.count() as u64 * GRANULE);
    if let Some(disk) = &disk {
        large(place(disk, LARGE)).unwrap();
        assert_eq!(setup.region.info().swapped, LARGE * GRANULE);
        written().for_each(|granule| assert_eq!(setup.read(granule), granule));
        setup.write(LARGE + 7, 77);
        setup.relocate(LARGE + 7, Destination::Home).unwrap();
        assert_eq!(setup.read(LARGE + 7), 77);
    }
    large(Destination::Home).unwrap();
    assert_eq!(setup.region.info().relocated, 0);
    for granule in written().filter(|granule| *granule != LARGE + 7) {
        assert_eq!(setup.read(granule), granule);
    }
}

/// Neighbours are held off together: each its own would take too many fds.
#[test]
fn a_large_page_moves_from_as_many_places_as_it_has_granules() {
    let Some(setup) = private_setup(512) else {
        return;
    };
    let [scattered, one] = [memfd(512), memfd(512)];
    for granule in 0..512 {
        setup.write(granule, granule);
        let to = place(&scattered, 511 - granule);
        setup.relocate(granule, to).unwrap();
    }
    setup.kernel.set_fail(Fail::Never);
    setup.vm.relocate(0, Level::Size2M, place(&one, 0)).unwrap();
    let calls = setup.kernel.calls();
    let holds = calls.iter().filter(|name| **name == "write_protect");
    assert_eq!(holds.count(), 1);
    (0..512).for_each(|granule| assert_eq!(setup.read(granule), granule));
}

#[test]
fn a_huge_page_of_1_gib_moves() {
    const HUGE: u64 = 1 << 18;
    let Some(setup) = private_setup(HUGE) else {
        return;
    };
    let fd = memfd(HUGE);
    for granule in [0, HUGE / 3, HUGE - 1] {
        setup.write(granule, granule + 1);
    }
    setup.vm.relocate(0, Level::Size1G, place(&fd, 0)).unwrap();
    for granule in [0, HUGE / 3, HUGE - 1] {
        assert_eq!(setup.read(granule), granule + 1);
    }
    assert_eq!(held(&fd), 3 * GRANULE);
}

#[test]
fn preallocated_memory_is_taken_where_it_goes() {
    let Some(setup) = private_setup(16) else {
        return;
    };
    setup.region.preallocate(NonZeroUsize::MIN).unwrap();
    let fd = memfd(16);
    // What was taken and not written yet counts as well.
    let taken = |fd: &OwnedFd| Linux.blocks(fd.as_fd()).unwrap();
    let private_held = || setup.region.info().private_held;
    setup.relocate(3, place(&fd, 3)).unwrap();
    assert_eq!(taken(&fd), GRANULE);
    assert!(private_held().is_none_or(|bytes| bytes == 16 * GRANULE));
    setup.kernel.set_fail(Fail::Once(2, libc::ENOSPC));
    let error = setup.relocate(3, Destination::Home).unwrap_err();
    assert_eq!(error.errno(), libc::ENOSPC, "{error}");
    setup.kernel.set_fail(Fail::Never);
    setup.relocate(3, Destination::Home).unwrap();
    assert_eq!(taken(&fd), 0);
    assert!(private_held().is_none_or(|bytes| bytes == 16 * GRANULE));
}

/// A file on a disk takes part in all that memory does.
#[test]
fn what_is_swapped_out_is_converted_discarded_reset_and_freed() {
    let Some(setup) = private_setup(16) else {
        return;
    };
    let Some(disk) = disk(16) else {
        println!("skipped: the tests' folder is on no disk");
        return;
    };
    let held = || held(&disk) / GRANULE;
    (0..16).for_each(|granule| setup.write(granule, 1 + granule));
    for granule in 0..8 {
        setup.relocate(granule, place(&disk, 15 - granule)).unwrap();
    }
    let info = setup.region.info();
    assert_eq!((info.relocated, info.swapped), (8 * GRANULE, 8 * GRANULE));
    assert!(info.private_held.is_none_or(|bytes| bytes == 8 * GRANULE));
    assert_eq!(held(), 8);
    // Touched, it comes back, and goes on.
    (0..16).for_each(|granule| assert_eq!(setup.read(granule), 1 + granule));
    setup.write(2, 50);
    convert(&setup.vm, 0..2, Side::Shared).unwrap();
    assert_eq!(held(), 6);
    convert(&setup.vm, 0..2, Side::Private).unwrap();
    assert_eq!((setup.read(0), setup.read(1)), (0, 0));
    setup.relocate(2, Destination::Home).unwrap();
    assert_eq!((setup.read(2), held()), (50, 5));
    setup.region.discard(3 * GRANULE, 2 * GRANULE).unwrap();
    assert_eq!((setup.read(3), setup.read(4), held()), (0, 0, 3));
    assert_eq!(setup.read(5), 6);
    setup.region.reset().unwrap();
    assert_eq!((held(), setup.region.info().relocated), (0, 0));
    convert(&setup.vm, 0..16, Side::Private).unwrap();
    setup.write(9, 9);
    setup.relocate(9, place(&disk, 0)).unwrap();
    assert_eq!(held(), 1);
    setup.vm.unbind_region(&setup.region);
    drop(setup);
    assert_eq!(held(), 0);
}

/// Contents that lie in several files are lost only as far as the error says.
#[test]
fn a_conversion_of_moved_memory_that_fails_is_undone() {
    for number in 0.. {
        let Some(setup) = private_setup(8) else {
            return;
        };
        let (fd, disk) = (memfd(8), disk(8));
        (0..8).for_each(|granule| setup.write(granule, 1 + granule));
        for granule in [1, 2, 5] {
            setup.relocate(granule, place(&fd, granule)).unwrap();
        }
        if let Some(disk) = &disk {
            setup.relocate(6, place(disk, 6)).unwrap();
        }
        let before = setup.region.info();
        setup.kernel.set_fail(Fail::Once(number, libc::EIO));
        let result = setup.vm.convert(0, 7 * GRANULE, Side::Shared);
        let calls = setup.kernel.calls().len();
        setup.kernel.set_fail(Fail::Never);
        let lost = match result {
            Ok(_) => 7,
            Err(Error::Undone {
                contents_lost,
                stuck: 0,
                ..
            }) => contents_lost / GRANULE,
            Err(error) => {
                assert_eq!(error.errno(), libc::EIO, "call {number}: {error}");
                0
            }
        };
        let gone = (0..7).filter(|granule| setup.read(*granule) != 1 + granule);
        assert_eq!(gone.count() as u64, lost, "call {number}");
        assert_eq!(setup.read(7), 8);
        if calls <= number {
            break;
        }
        let after = setup.region.info();
        assert_eq!(
            (after.private, after.relocated),
            (before.private, before.relocated)
        );
        convert(&setup.vm, 0..8, Side::Shared).unwrap();
        assert_eq!(held(&fd) + disk.iter().map(held).sum::<u64>(), 0);
        assert_eq!(setup.region.info().relocated, 0);
        (0..8).for_each(|granule| assert_eq!(setup.read(granule), 0));
    }
}

#[test]
fn a_machine_is_loaded_with_what_was_moved() {
    let Some(setup) = private_setup(16) else {
        return;
    };
    let fd = memfd(16);
    (0..16).for_each(|granule| setup.write(granule, 1 + granule));
    for granule in [3, 4, 5, 9] {
        setup.relocate(granule, place(&fd, granule)).unwrap();
    }
    convert(&setup.vm, 4..5, Side::Shared).unwrap();
    setup.write(4, 40);
    // All but 4, 5 and 8 on the other side than now.
    let state = [0b0010_0000, 0b0000_0001];
    setup.region.load_state(&state).unwrap();
    assert_eq!(setup.region.picture(16), ".....#..#.......");
    for granule in (0..16).filter(|granule| *granule != 4) {
        assert_eq!(setup.read(granule), 1 + granule);
    }
    assert_eq!(setup.read(4), 40);
    assert_eq!(setup.region.info().relocated, GRANULE);
    assert_eq!(held(&fd), GRANULE);
}

#[test]
fn a_region_that_keeps_private_pages_keeps_them_where_they_are() {
    if private_setup(1).is_none() {
        return;
    }
    let options = Options {
        keep_private: true,
        ..Options::default()
    };
    let setup = setup(8, options);
    let fd = memfd(8);
    convert(&setup.vm, 0..8, Side::Private).unwrap();
    (0..8).for_each(|granule| setup.write(granule, 1 + granule));
    setup.relocate(2, place(&fd, 0)).unwrap();
    setup.relocate(3, place(&fd, 1)).unwrap();
    convert(&setup.vm, 0..8, Side::Shared).unwrap();
    setup.write(2, 100);
    let info = setup.region.info();
    assert!(info.held_twice.is_none_or(|bytes| bytes == GRANULE * 8));
    assert_eq!(info.relocated, 2 * GRANULE);
    convert(&setup.vm, 0..4, Side::Private).unwrap();
    (0..4).for_each(|granule| assert_eq!(setup.read(granule), 1 + granule));
    assert_eq!(setup.region.info().relocated, 2 * GRANULE);
    setup.region.discard(2 * GRANULE, GRANULE).unwrap();
    assert_eq!((setup.read(2), setup.read(3)), (0, 4));
    setup.region.reset().unwrap();
    convert(&setup.vm, 0..8, Side::Private).unwrap();
    (0..8).for_each(|granule| assert_eq!(setup.read(granule), 0));
    assert_eq!(held(&fd), 0);
}

#[test]
fn what_cannot_be_a_place_is_refused() {
    let Some(setup) = private_setup(1024) else {
        return;
    };
    let other = Region::new(&setup.vm, "other", 8 * GRANULE).unwrap();
    setup.vm.bind(&other, 0, 1 << 30, 8 * GRANULE).unwrap();
    let fd = memfd(8);
    let (pipe, _writer) = std::io::pipe().unwrap();
    let store = |region: &Region, side| region.store(side).fd().try_clone_to_owned().unwrap();
    let refused = |to: Destination, word: &str| {
        let error = setup.relocate(1, to).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL, "{error}");
        assert!(error.to_string().contains(word), "{error}");
    };
    refused(place(&pipe, 0), "no memfd or file");
    refused(place(&fd, 8), "ends beyond the file of 0x8000 bytes");
    for side in [Side::Private, Side::Shared] {
        refused(
            place(&store(&setup.region, side), 5),
            "store of region 'ram'",
        );
        refused(place(&store(&other, side), 5), "store of region 'other'");
    }
    let (fd_, offset) = (fd.as_fd(), 1);
    refused(Destination::File { fd: fd_, offset }, "not a multiple");
    if let Ok(huge) = Linux.create_memfd(c"huge", 2 << 20, Some(2 << 20)) {
        refused(place(&huge, 0), "ordinary pages");
    }
    if let Some(disk) = disk(8) {
        setup.relocate(1, place(&disk, 0)).unwrap();
        refused(place(&disk, 1), "moved home, or to a memfd");
        setup.relocate(1, Destination::Home).unwrap();
    }
    setup.relocate(1, place(&fd, 4)).unwrap();
    setup.write(1, 1);
    for granule in [1, 2] {
        let error = setup.relocate(granule, place(&fd, 4)).unwrap_err();
        assert!(matches!(error, Error::PlaceTaken(_)), "{error}");
        assert_eq!(error.errno(), libc::EBUSY);
    }
    assert_eq!(setup.read(1), 1);
}

#[test]
fn what_is_not_private_memory_in_one_piece_is_refused() {
    let Some(setup) = private_setup(1024 + 8) else {
        return;
    };
    let fd = memfd(1024);
    let relocate = |gpa: u64, level| setup.vm.relocate(gpa, level, place(&fd, 0));
    convert(&setup.vm, 700..701, Side::Shared).unwrap();
    setup.write(700, 3);
    let error = relocate(512 * GRANULE, Level::Size2M).unwrap_err();
    assert!(
        matches!(error, Error::NotPrivate { gpa } if gpa == 700 * GRANULE),
        "{error}"
    );
    for (gpa, level, word) in [
        (GRANULE, Level::Size2M, "not a multiple of 0x200000"),
        (512 * GRANULE, Level::Size1G, "not a multiple of 0x40000000"),
        (GRANULE / 2, Level::Size4K, "not a multiple of 0x1000"),
        (1024 * GRANULE, Level::Size2M, "one stretch"),
        (0, Level::Size1G, "one stretch"),
        (1 << 30, Level::Size4K, "cannot be private"),
        (u64::MAX - (1 << 30) + 1, Level::Size1G, "ends beyond"),
    ] {
        let error = relocate(gpa, level).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL, "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
    assert_eq!(setup.region.info().relocated, 0);
    assert_eq!(setup.read(700), 3);
}

#[test]
fn a_host_that_cannot_block_writers_is_told_the_way_out() {
    let Some(setup) = private_setup(8) else {
        return;
    };
    let fd = memfd(8);
    setup.kernel.set_fail(Fail::Never);
    setup.relocate(1, place(&fd, 0)).unwrap();
    let calls = setup.kernel.calls();
    let number = calls.iter().position(|name| *name == "write_protect");
    for (errno, word) in [
        (libc::EPERM, "vm.unprivileged_userfaultfd"),
        (libc::ENOSYS, "Linux 5.19"),
        (libc::EINVAL, "Linux 5.19"),
        (libc::ENOMEM, "max_map_count"),
    ] {
        setup.relocate(1, Destination::Home).unwrap();
        setup.kernel.set_fail(Fail::Once(number.unwrap(), errno));
        let error = setup.relocate(1, place(&fd, 0)).unwrap_err();
        setup.kernel.set_fail(Fail::Never);
        assert_eq!(error.errno(), errno);
        let message = error.to_string();
        assert!(message.starts_with("userfaultfd"), "{message}");
        assert!(message.contains(word), "{message}");
    }
    // Somebody else's.
    // SAFETY: the mapping is a test's own, and nobody writes to it.
    let watched = unsafe { Linux.write_protect(setup.mapping.granule(3) as usize, GRANULE) };
    let error = setup.relocate(3, place(&fd, 3)).unwrap_err();
    assert_eq!(error.errno(), libc::EBUSY, "{error}");
    assert!(error.to_string().contains("another userfaultfd"), "{error}");
    drop(watched);
    setup.relocate(3, place(&fd, 3)).unwrap();
}

#[test]
fn memory_that_nobody_has_mapped_moves_as_well() {
    let vm = Vm::emulated().unwrap();
    let region = Region::new(&vm, "ram", 8 * GRANULE).unwrap();
    vm.bind(&region, 0, 0, 8 * GRANULE).unwrap();
    convert(&vm, 0..8, Side::Private).unwrap();
    let home = region.store(Side::Private).fd();
    Linux.write(home, 2 * GRANULE, &[6; 4096]).unwrap();
    let fd = memfd(8);
    vm.relocate(2 * GRANULE, Level::Size4K, place(&fd, 1))
        .unwrap();
    let mut page = [0; 4096];
    Linux.read(fd.as_fd(), GRANULE, &mut page).unwrap();
    assert_eq!(page, [6; 4096]);
    Linux.read(home, 2 * GRANULE, &mut page).unwrap();
    assert_eq!(page, [0; 4096]);
}

/// An agent that could, if the guest could find what it moves.
struct Willing;

impl Agent for Willing {
    fn name(&self) -> &str {
        "willing"
    }

    fn populate(&self, _: InitialPages) -> privmem::Result<()> {
        Ok(())
    }

    fn finalize(&self, _: &dyn Kernel) -> privmem::Result<()> {
        Ok(())
    }

    fn check_relocate(&self) -> privmem::Result<()> {
        Ok(())
    }

    fn relocate(&self, _: Move) -> privmem::Result<()> {
        panic!("nobody asks it with KVM")
    }
}

#[test]
fn with_kvm_no_agent_is_asked_to_move() {
    let kernel = Model::new();
    let vm = Vm::with_agent(kernel.clone(), Some(stand_in_fd()), Arc::new(Willing)).unwrap();
    let region = Region::new(&vm, "ram", 8 * GRANULE).unwrap();
    kernel.bind(&region, &vm, 0, 0, 8);
    convert(&vm, 0..8, Side::Private).unwrap();
    let before = kernel.pages();
    let error = vm.relocate(0, Level::Size4K, Destination::Home);
    let error = error.unwrap_err();
    assert_eq!(error.errno(), libc::EOPNOTSUPP);
    assert!(error.to_string().contains("'willing'"), "{error}");
    assert_eq!(kernel.pages(), before);
}

/// On a disk, pages are there although memory holds none of them.
#[test]
fn what_fails_on_a_disk_is_lost() {
    let Some(setup) = private_setup(8) else {
        return;
    };
    let Some(disk) = disk(8) else {
        println!("skipped: the tests' folder is on no disk");
        return;
    };
    setup.write(3, 1);
    setup.kernel.set_fail(Fail::Never);
    setup.relocate(3, place(&disk, 3)).unwrap();
    // Written before the guest sees it there, and out of memory then.
    let calls = setup.kernel.calls();
    let at = |name| calls.iter().position(|call| *call == name);
    assert!(at("sync").unwrap() < at("map_fixed").unwrap(), "{calls:?}");
    assert!(at("map_fixed").unwrap() < at("evict").unwrap(), "{calls:?}");
    let range = privmem::Range::new(3 * GRANULE, GRANULE).unwrap();
    if Linux.held(disk.as_fd(), range).ok() != Some(0) {
        println!("skipped: the disk's page is still in memory, or cannot be counted");
        return;
    }
    let failure = setup
        .region
        .memory_failure(3 * GRANULE, Side::Private, true);
    assert_eq!(failure.unwrap().lost, GRANULE);
    assert_eq!((setup.read(3), setup.region.info().relocated), (0, 0));
}

/// The old place could not be freed when the memory moved.
#[test]
fn a_reset_frees_a_home_that_was_left_full() {
    if private_setup(1).is_none() {
        return;
    }
    let options = Options {
        initial: Side::Private,
        ..Options::default()
    };
    let setup = setup(4, options);
    let fd = memfd(4);
    setup.write(1, 5);
    let left = (0..).any(|number| {
        setup.kernel.set_fail(Fail::Once(number, libc::EIO));
        let result = setup.relocate(1, place(&fd, 1));
        setup.kernel.set_fail(Fail::Never);
        matches!(result, Err(Error::OldPlace(_)))
    });
    assert!(left);
    assert_eq!(setup.region.info().private_held, Some(2 * GRANULE));
    setup.region.reset().unwrap();
    assert_eq!(setup.region.info().private_held, Some(0));
    assert_eq!(setup.read(1), 0);
}

#[test]
fn a_region_that_goes_gives_its_places_back() {
    let Some(setup) = private_setup(4) else {
        return;
    };
    let fd = memfd(4);
    let other = Region::new(&setup.vm, "other", GRANULE).unwrap();
    setup.vm.bind(&other, 0, 1 << 30, GRANULE).unwrap();
    setup.vm.convert(1 << 30, GRANULE, Side::Private).unwrap();
    let relocate = |gpa| setup.vm.relocate(gpa, Level::Size4K, place(&fd, 1));
    relocate(1 << 30).unwrap();
    assert!(matches!(relocate(GRANULE), Err(Error::PlaceTaken(_))));
    setup.vm.unbind_region(&other);
    drop(other);
    relocate(GRANULE).unwrap();
}

/// A granule of a large page is converted: all others stay where they are.
#[test]
fn a_part_of_what_was_moved_at_once_goes_alone() {
    const ALL: u64 = 512;
    let Some(setup) = private_setup(ALL) else {
        return;
    };
    let fd = memfd(ALL);
    (0..ALL).for_each(|granule| setup.write(granule, 1 + granule));
    setup.vm.relocate(0, Level::Size2M, place(&fd, 0)).unwrap();
    convert(&setup.vm, 100..103, Side::Shared).unwrap();
    assert_eq!(setup.region.info().relocated, (ALL - 3) * GRANULE);
    assert_eq!(held(&fd), (ALL - 3) * GRANULE);
    for granule in (0..ALL).filter(|granule| !(100..103).contains(granule)) {
        assert_eq!(setup.read(granule), 1 + granule, "granule {granule}");
    }
    convert(&setup.vm, 0..ALL, Side::Shared).unwrap();
    assert_eq!((held(&fd), setup.region.info().relocated), (0, 0));
}

/// A kernel that unmaps the old side before it finds that it cannot map the new one.
#[test]
fn no_hole_stays_where_a_conversion_fails() {
    for to in [Side::Private, Side::Shared] {
        let setup = setup(4, Options::default());
        convert(&setup.vm, 0..4, to.other()).unwrap();
        (0..4).for_each(|granule| setup.write(granule, 7));
        setup.kernel.leave_holes();
        let failed = (0..4).any(|number| {
            setup.kernel.set_fail(Fail::Once(number, libc::ENOMEM));
            let result = setup.vm.convert(GRANULE, 2 * GRANULE, to);
            let calls = setup.kernel.calls();
            setup.kernel.set_fail(Fail::Never);
            assert!(result.is_err());
            calls.get(number) == Some(&"map_fixed")
        });
        assert!(failed, "no mapping was refused");
        (0..4).for_each(|granule| assert_eq!(setup.read(granule), 7, "{to:?}"));
    }
}
