//! Every call into the kernel fails in turn; nothing may lose track.

mod common;

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use common::{Fail, Model, Pages, stand_in_fd};
use privmem::agent::{Agent, InitialPages};
use privmem::kernel::Kernel;
use privmem::{Error, GRANULE, Options, Region, Side, Vm};

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
            region.slot_mapping().unwrap();
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

    fn is_held(&self, region: &Region, side: Side, granule: u64) -> bool {
        let fd = region.store(side).fd().as_raw_fd();
        let pages = self.kernel.pages();
        pages
            .held
            .get(&fd)
            .is_some_and(|held| held.contains_key(&granule))
    }

    fn held_twice(&self) -> u64 {
        let held = self.regions.iter().map(|r| r.info().held_twice);
        held.sum::<Option<u64>>().unwrap()
    }

    fn convert(&self, to: Side) -> privmem::Result<u64> {
        self.vm.convert(GRANULE, 24 * GRANULE, to)
    }

    fn assert_only_private_is_hidden(&self) {
        for gpa in 0..32 {
            let (region, granule) = self.place(gpa);
            let is_hidden = self.kernel.hidden(region).contains(&granule);
            assert_eq!(is_hidden, self.side(gpa) == Side::Private, "{gpa}");
        }
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
            setup.assert_only_private_is_hidden();
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

/// A device may leave a page in the shared store where the granule is private. It
/// must not come up when the granule is shared.
#[test]
fn a_stale_page_does_not_come_up() {
    let setup = Setup::new();
    let (region, granule) = setup.place(7);
    setup.kernel.touch(region, Side::Shared, granule);
    common::convert(&setup.vm, 7..8, Side::Shared).unwrap();
    assert!(!setup.is_held(region, Side::Shared, granule));
}

/// A kernel without cachestat(2) cannot say that there is none.
#[test]
fn a_stale_page_does_not_come_up_where_pages_cannot_be_counted() {
    let setup = Setup::new();
    setup.kernel.cannot_count.store(true, Ordering::Relaxed);
    let (region, granule) = setup.place(7);
    setup.kernel.touch(region, Side::Shared, granule);
    common::convert(&setup.vm, 7..8, Side::Shared).unwrap();
    assert!(!setup.is_held(region, Side::Shared, granule));
}

/// The kernel does not go back: the new side is published, what the old one held is
/// freed, and the agent is told where the memory is.
#[test]
fn what_is_stuck_is_converted_after_all() {
    for to in [Side::Private, Side::Shared] {
        let mut stuck_once = false;
        for number in 0..30 {
            let kernel = Model::new();
            let agent = Arc::new(Told::default());
            let vm = Vm::with_agent(kernel.clone(), Some(stand_in_fd()), agent.clone()).unwrap();
            let region = Region::new(&vm, "r", 4 * GRANULE).unwrap();
            kernel.bind(&region, &vm, 0, 0, 4);
            common::convert(&vm, 0..4, to.other()).unwrap();
            common::convert(&vm, 1..2, to).unwrap();
            for granule in 0..4 {
                kernel.access(granule, |page| *page = 7);
            }
            agent.0.lock().unwrap().clear();
            // A call, and then the one that would undo it.
            kernel.set_fail(Fail::Twice(number, libc::EIO));
            let result = vm.convert(0, 4 * GRANULE, to);
            kernel.set_fail(Fail::Never);
            if !matches!(result, Err(Error::Undone { stuck, .. }) if stuck > 0) {
                continue;
            }
            stuck_once = true;
            assert_eq!(region.info().held_twice, Some(0), "call {number} to {to:?}");
            let mut asked = 0;
            for (is_after, gpa, side) in agent.0.lock().unwrap().iter() {
                asked += if *is_after { -1 } else { 1 };
                let mut runs = region.runs(gpa.start(), gpa.len()).unwrap();
                assert!(!is_after || runs.all(|run| run.side == *side));
            }
            assert_eq!(asked, 0, "call {number} to {to:?}");
        }
        assert!(stuck_once, "{to:?}");
    }
}

/// What an agent was asked for, or told of afterwards.
#[derive(Default)]
struct Told(Mutex<Vec<(bool, privmem::Range, Side)>>);

impl Agent for Told {
    fn name(&self) -> &str {
        "told"
    }

    fn populate(&self, _: InitialPages) -> privmem::Result<()> {
        Ok(())
    }

    fn finalize(&self, _: &dyn Kernel) -> privmem::Result<()> {
        Ok(())
    }

    fn before_convert(&self, gpa: privmem::Range, to: Side) -> privmem::Result<()> {
        self.0.lock().unwrap().push((false, gpa, to));
        Ok(())
    }

    fn after_convert(&self, gpa: privmem::Range, side: Side) {
        self.0.lock().unwrap().push((true, gpa, side));
    }
}

/// The first region keeps what the second one, whose store fails, would have lost.
#[test]
fn what_is_kept_is_not_said_to_be_lost() {
    for to in [Side::Private, Side::Shared] {
        let kernel = Model::new();
        let vm = kernel.vm();
        let kept = Options {
            keep_private: to == Side::Shared,
            keep_shared: to == Side::Private,
            ..Options::default()
        };
        let first = Region::with_options(&vm, "kept", GRANULE, kept).unwrap();
        let second = Region::new(&vm, "not kept", GRANULE).unwrap();
        kernel.bind(&first, &vm, 0, 0, 1);
        kernel.bind(&second, &vm, 0, 1, 1);
        common::convert(&vm, 0..2, to.other()).unwrap();
        kernel.access(0, |page| *page = 7);
        kernel.access(1, |page| *page = 7);
        let error = (0..).find_map(|number| {
            kernel.set_fail(Fail::Once(number, libc::EIO));
            let result = vm.convert(0, 2 * GRANULE, to);
            kernel.set_fail(Fail::Never);
            assert!(result.is_err(), "the second region frees at last");
            let kept = kernel.access(0, |page| *page) == 7;
            assert!(kept, "call {number} to {to:?}");
            let is_last =
                matches!(&result, Err(Error::Kernel { call, .. }) if call.contains("PUNCH"));
            is_last.then(|| result.unwrap_err())
        });
        assert!(!matches!(error, Some(Error::Undone { .. })));
    }
}

/// Nor must private contents that were not to be freed when the granule was shared.
#[test]
fn private_contents_that_stayed_do_not_come_up() {
    let mut stayed = 0;
    for number in 0..10 {
        let setup = Setup::new();
        let (region, granule) = setup.place(7);
        setup.kernel.set_fail(Fail::From(number, libc::EIO));
        let _ = common::convert(&setup.vm, 7..8, Side::Shared);
        setup.kernel.set_fail(Fail::Never);
        if setup.side(7) == Side::Shared && setup.is_held(region, Side::Private, granule) {
            stayed += 1;
            common::convert(&setup.vm, 7..8, Side::Private).unwrap();
            assert!(!setup.is_held(region, Side::Private, granule));
        }
    }
    assert!(stayed > 0);
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
            setup.assert_only_private_is_hidden();
            setup.kernel.assert_rules();
            assert_eq!(setup.held_twice(), 0, "after {text}");
        }
    }
}

/// Whatever fails, no private contents are left, or the error says so; what could
/// be put on its side is there, and the map is the kernel's.
#[test]
fn a_reset_that_fails_leaves_no_private_contents() {
    let fails: [fn(usize) -> Fail; 3] = [
        |number| Fail::Once(number, libc::ENOMEM),
        |number| Fail::Twice(number, libc::ENOMEM),
        |number| Fail::From(number, libc::ENOMEM),
    ];
    let (mut done, mut partly) = (0, 0);
    for (fail, number) in fails.into_iter().flat_map(|f| (0..40).map(move |n| (f, n))) {
        let setup = Setup::new();
        let region = &setup.regions[0];
        setup.kernel.discards.store(true, Ordering::Relaxed);
        setup.kernel.set_fail(fail(number));
        let result = region.reset();
        setup.assert_map_is_the_kernels();
        let info = region.info();
        match result {
            Ok(()) => done += 1,
            Err(Error::Reset {
                has_contents, left, ..
            }) => {
                partly += 1;
                assert_eq!(left, info.private);
                assert_eq!(has_contents, info.private_held != Some(0), "call {number}");
                // Whoever tries again, succeeds.
                setup.kernel.set_fail(Fail::Never);
                region.reset().unwrap();
            }
            Err(other) => panic!("{other}"),
        }
        assert_eq!(
            (region.info().private, region.info().private_held),
            (0, Some(0))
        );
    }
    assert!(done > 10 && partly > 10, "{done} {partly}");
}

/// What a conversion takes before it frees the other side, a reset has afterwards.
#[test]
fn a_reset_has_the_memory_that_it_frees() {
    let setup = Setup::new();
    let region = &setup.regions[0];
    setup.kernel.discards.store(true, Ordering::Relaxed);
    // The first call: the attribute of the first run.
    setup.kernel.set_fail(Fail::Once(0, libc::ENOMEM));
    region.reset().unwrap();
    assert_eq!(region.info().private, 0);
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
/// has got into the side that is entered. (In a `guest_memfd` it can only be one of
/// a fault that KVM dropped, which nobody wrote to.)
#[test]
fn the_side_that_is_entered_is_freed_where_it_holds_anything() {
    for (to, calls_for_second, held) in [(Side::Private, 2, 1), (Side::Shared, 3, 0)] {
        let (kernel, vm, region) = common::vm_with_region(2);
        common::convert(&vm, 0..2, to.other()).unwrap();
        kernel.touch(&region, to, 1);
        for (granule, calls) in [(0, 2), (1, calls_for_second)] {
            kernel.set_fail(Fail::Never);
            common::convert(&vm, granule..granule + 1, to).unwrap();
            assert_eq!(kernel.calls(), calls, "granule {granule} to {to:?}");
        }
        assert_eq!(pages_held(&kernel.pages()), held);
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
