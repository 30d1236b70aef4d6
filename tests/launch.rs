//! Initial contents and the end of a launch, on MODELS of the TDX module and of
//! the SEV-SNP firmware; no hardware is used.

mod common;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use Side::{Private, Shared};
use common::firmware::{
    Added, BAD_CPUID, Firmware, GOOD_CPUID, NotAccepted, SnpFirmware, TdxModule,
};
use common::{Fail, Model, stand_in_fd};
use privmem::agent::{Agent, InitialPages, PageType, Snp, SnpStart, Tdx};
use privmem::kernel::Kernel;
use privmem::{Error, GRANULE, Options, Range, Region, Side, Vm};
use proptest::prelude::*;

const GRANULES: u64 = 16;

struct Launch {
    kernel: Arc<Model>,
    vm: Arc<Vm>,
    region: Arc<Region>,
}

/// A page-aligned source.
#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; GRANULE as usize]);

impl Launch {
    fn new(kernel: Arc<Model>, vm: Arc<Vm>) -> Launch {
        let options = Options {
            initial: Private,
            ..Options::default()
        };
        let region = Region::with_options(&vm, "ram", GRANULES * GRANULE, options).unwrap();
        kernel.bind(&region, &vm, 0, 0, GRANULES);
        Launch { kernel, vm, region }
    }

    fn tdx() -> Launch {
        let kernel = Model::new();
        let agent = Tdx::new(stand_in_fd());
        agent.set_vcpu(stand_in_fd());
        let vm = kernel.vm_with(Arc::new(agent), TdxModule::default());
        Launch::new(kernel, vm)
    }

    fn snp() -> Launch {
        let kernel = Model::new();
        let agent = Snp::new(stand_in_fd(), stand_in_fd());
        let vm = kernel.vm_with(Arc::new(agent), SnpFirmware::default());
        vm.prepare().unwrap();
        Launch::new(kernel, vm)
    }

    fn both() -> [Launch; 2] {
        [Launch::tdx(), Launch::snp()]
    }

    fn populate(&self, first: u64, contents: &[u8], page_type: PageType) -> privmem::Result<()> {
        let mut pages: Vec<_> = contents.iter().map(|byte| Page([*byte; 4096])).collect();
        let size = contents.len() * GRANULE as usize;
        let source = pages.as_mut_ptr().cast::<u8>();
        // SAFETY: the pages are `size` bytes, one after the other.
        let source = unsafe { std::slice::from_raw_parts_mut(source, size) };
        self.vm
            .populate(first * GRANULE, size as u64, Some(source), page_type)
    }

    fn contend(&self, errors: impl IntoIterator<Item = i32>) {
        let add = |firmware: &mut (dyn Firmware + 'static)| {
            firmware.contention().extend(errors);
            Ok(())
        };
        self.kernel.ask(add).unwrap();
    }

    fn log(&self) -> Vec<Added> {
        self.kernel
            .ask(|firmware| Ok(firmware.log().to_vec()))
            .unwrap()
    }

    fn private(&self) -> Vec<u64> {
        self.kernel.pages().private.into_iter().collect()
    }
}

fn added(first: u64, contents: &[u8], page_type: u8) -> Vec<Added> {
    let pages = contents.iter().zip(first..);
    pages
        .map(|(&contents, gfn)| Added {
            gfn,
            page_type,
            contents,
        })
        .collect()
}

/// Their guests say by their access which side they mean.
#[test]
fn a_memory_fault_is_a_request_to_convert() {
    for launch in Launch::both() {
        let fault = |gpa: u64, touched| launch.vm.memory_fault(gpa * GRANULE, GRANULE, touched);
        fault(2, Shared).unwrap();
        fault(5, Shared).unwrap();
        fault(5, Private).unwrap();
        let shared = [2];
        let private: Vec<_> = (0..GRANULES).filter(|gfn| !shared.contains(gfn)).collect();
        assert_eq!(launch.private(), private);
        assert_eq!(launch.region.info().conversions, 3);
        // What cannot be had is an error, and changes nothing.
        launch.kernel.set_fail(Fail::From(0, libc::ENOMEM));
        assert_eq!(fault(2, Private).unwrap_err().errno(), libc::ENOMEM);
        launch.kernel.set_fail(Fail::Never);
        assert_eq!(launch.private(), private);
        // MMIO is shared already, and cannot be private.
        fault(GRANULES, Shared).unwrap();
        let error = fault(GRANULES, Private).unwrap_err();
        assert!(matches!(error, Error::NotPrivateCapable { .. }), "{error}");
        launch.kernel.assert_rules();
    }
}

/// Where nothing is left to convert, trying again has an end.
#[test]
fn a_fault_that_no_conversion_ends_is_given_up() {
    for launch in Launch::both() {
        let fault = |touched| launch.vm.memory_fault(GRANULE, GRANULE, touched);
        fault(Shared).unwrap();
        let times = (0..10_000).take_while(|_| fault(Shared).is_ok()).count();
        assert_eq!(times, 1000);
        assert!(matches!(fault(Shared), Err(Error::HopelessFault { .. })));
        assert_eq!(launch.region.info().conversions, 1);
        launch.vm.convert(0, GRANULE, Shared).unwrap();
        fault(Private).unwrap();
    }
}

#[test]
fn pages_are_added_in_order_with_their_type() {
    for launch in Launch::both() {
        launch.populate(2, &[1, 2, 3], PageType::Normal).unwrap();
        launch.populate(0, &[4], PageType::Unmeasured).unwrap();
        let expected = [added(2, &[1, 2, 3], 1), added(0, &[4], 4)].concat();
        assert_eq!(launch.log(), expected);
        for (gfn, contents) in [(2, 1), (4, 3), (0, 4), (1, 0)] {
            assert_eq!(launch.kernel.access(gfn, |page| *page), contents);
        }
        launch.vm.finalize().unwrap();
    }
}

#[test]
fn an_interruption_goes_on_where_it_was() {
    for launch in Launch::both() {
        launch.contend([0, libc::EINTR, 0, 0, libc::EAGAIN, libc::EAGAIN]);
        launch
            .populate(0, &[1, 2, 3, 4, 5], PageType::Normal)
            .unwrap();
        assert_eq!(launch.log(), added(0, &[1, 2, 3, 4, 5], 1));
    }
    let launch = Launch::tdx();
    launch.contend([libc::EBUSY, libc::EBUSY]);
    launch.vm.finalize().unwrap();
}

#[test]
fn contention_without_end_is_an_error() {
    let launch = Launch::tdx();
    launch.contend(
        [0].into_iter()
            .chain(std::iter::repeat_n(libc::EAGAIN, 1 << 20)),
    );
    let error = launch.populate(0, &[1, 2], PageType::Normal).unwrap_err();
    assert_eq!(error.errno(), libc::EAGAIN);
    assert!(error.to_string().contains("0x1000"), "{error}");
}

#[test]
fn after_the_end_nothing_is_added() {
    for launch in Launch::both() {
        launch.vm.finalize().unwrap();
        let error = launch.populate(0, &[1], PageType::Normal).unwrap_err();
        assert!(matches!(error, Error::Finalized));
        assert!(matches!(launch.vm.finalize(), Err(Error::Finalized)));
        assert!(launch.log().is_empty());
    }
}

#[test]
fn a_page_is_added_once_unless_it_was_shared_meanwhile() {
    for launch in Launch::both() {
        launch.populate(3, &[1, 2], PageType::Normal).unwrap();
        let error = launch
            .populate(2, &[3, 4, 5], PageType::Normal)
            .unwrap_err();
        assert_eq!(error.errno(), libc::EIO);
        assert!(error.to_string().contains("0x3000"), "{error}");
        let done = [added(3, &[1, 2], 1), added(2, &[3], 1)].concat();
        assert_eq!(launch.log(), done, "those before the page are done");
        launch.vm.convert(3 * GRANULE, GRANULE, Shared).unwrap();
        launch.populate(3, &[6], PageType::Normal).unwrap();
        assert_eq!(launch.kernel.access(3, |page| *page), 6);
    }
}

#[test]
fn what_is_shared_becomes_private_first() {
    for launch in Launch::both() {
        launch.vm.convert(0, 4 * GRANULE, Shared).unwrap();
        launch.populate(1, &[1, 2], PageType::Normal).unwrap();
        let expected: Vec<u64> = [1, 2].into_iter().chain(4..GRANULES).collect();
        assert_eq!(launch.private(), expected);
        assert_eq!(launch.log(), added(1, &[1, 2], 1));
    }
}

#[test]
fn what_is_not_bound_gets_no_contents() {
    for launch in Launch::both() {
        let error = launch.populate(15, &[1, 2], PageType::Normal).unwrap_err();
        assert!(matches!(error, Error::NotPrivateCapable { gpa: 0x10000 }));
        assert!(launch.log().is_empty());
    }
}

#[test]
fn the_source_fits_the_request() {
    let launch = Launch::snp();
    let mut page = [Page([1; 4096]), Page([2; 4096])];
    // SAFETY: two pages, one after the other.
    let bytes = unsafe { std::slice::from_raw_parts_mut(page.as_mut_ptr().cast::<u8>(), 8192) };
    let populate =
        |source: Option<&mut [u8]>, page_type| launch.vm.populate(0, GRANULE, source, page_type);
    for (source, page_type, word) in [
        (Some(&mut bytes[..8]), PageType::Normal, "0x1000 bytes"),
        (None, PageType::Normal, "0x1000 bytes"),
        (None, PageType::Secrets, "0x1000 bytes"),
    ] {
        let error = populate(source, page_type).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
    let error = populate(Some(&mut bytes[1..4097]), PageType::Normal).unwrap_err();
    assert!(matches!(error, Error::Unaligned { .. }));
    let error = populate(Some(&mut bytes[..4096]), PageType::Zero).unwrap_err();
    assert!(error.to_string().contains("no source"), "{error}");
    assert!(launch.log().is_empty());
    populate(None, PageType::Zero).unwrap();
    assert_eq!(launch.log(), added(0, &[0], 3));
}

#[test]
fn tdx_knows_two_types_of_pages() {
    let launch = Launch::tdx();
    for page_type in [PageType::Secrets, PageType::Cpuid, PageType::Vmsa] {
        let error = launch.populate(0, &[1], page_type).unwrap_err();
        assert!(
            error.to_string().contains("'tdx' has no pages of type"),
            "{error}"
        );
    }
    let zero = launch.vm.populate(0, GRANULE, None, PageType::Zero);
    assert!(matches!(zero, Err(Error::PageType { .. })));
    assert!(launch.log().is_empty());
}

/// What a guest was launched with it may touch at once; what is converted it has
/// to accept, each time anew.
#[test]
fn the_guest_accepts_what_was_converted() {
    for launch in Launch::both() {
        let ask = |what: &dyn Fn(&mut (dyn Firmware + 'static)) -> bool| {
            launch.kernel.ask(|firmware| Ok(what(firmware))).unwrap()
        };
        let is_accepted = |gfn| ask(&|firmware| firmware.is_accepted(gfn));
        let accepts = |gfn, size, expected: Result<(), NotAccepted>| {
            assert!(ask(&|firmware| firmware.accept(gfn, size) == expected));
        };
        launch.populate(0, &[1, 2], PageType::Normal).unwrap();
        launch.vm.finalize().unwrap();
        assert!(is_accepted(0) && is_accepted(1));
        accepts(1, GRANULE, Err(NotAccepted::Already));
        assert!(!is_accepted(2), "it was private, but nothing was put there");
        for _ in 0..2 {
            common::convert(&launch.vm, 1..3, Side::Shared).unwrap();
            common::convert(&launch.vm, 1..3, Side::Private).unwrap();
            assert!(is_accepted(0) && !is_accepted(1) && !is_accepted(2));
            accepts(1, 512 * GRANULE, Err(NotAccepted::SizeMismatch));
            accepts(1, GRANULE, Ok(()));
            assert!(is_accepted(1) && !is_accepted(2));
        }
        launch.kernel.discards.store(true, Ordering::Relaxed);
        launch.region.discard(GRANULE, GRANULE).unwrap();
        assert!(!is_accepted(1), "another page comes in its place");
    }
}

#[test]
fn vmsas_of_snp_are_kvms_own() {
    let launch = Launch::snp();
    let error = launch.populate(0, &[1], PageType::Vmsa).unwrap_err();
    assert_eq!(error.errno(), libc::EOPNOTSUPP);
    assert!(error.to_string().contains("registers"), "{error}");
    assert!(launch.log().is_empty());
}

#[test]
fn tdx_needs_a_vcpu_for_contents() {
    let kernel = Model::new();
    let vm = kernel.vm_with(Arc::new(Tdx::new(stand_in_fd())), TdxModule::default());
    let launch = Launch::new(kernel, vm);
    let error = launch.populate(0, &[1], PageType::Normal).unwrap_err();
    assert!(matches!(error, Error::NoVcpu));
}

#[test]
fn a_cpuid_page_that_is_refused_comes_back_with_what_would_do() {
    let launch = Launch::snp();
    let mut page = Page([BAD_CPUID; 4096]);
    let source = Some(&mut page.0[..]);
    let error = launch
        .vm
        .populate(0, GRANULE, source, PageType::Cpuid)
        .unwrap_err();
    assert!(matches!(
        error,
        Error::Command {
            firmware: 0x16,
            gpa: Some(0),
            ..
        }
    ));
    assert!(error.to_string().contains("0x16"), "{error}");
    assert!(page.0.iter().all(|byte| *byte == GOOD_CPUID));
    let source = Some(&mut page.0[..]);
    launch
        .vm
        .populate(0, GRANULE, source, PageType::Cpuid)
        .unwrap();
    assert_eq!(launch.log(), added(0, &[GOOD_CPUID], 6));
}

#[test]
fn snp_begins_and_ends_once() {
    let kernel = Model::new();
    let agent = Arc::new(Snp::new(stand_in_fd(), stand_in_fd()));
    let vm = kernel.vm_with(agent.clone(), SnpFirmware::default());
    let launch = Launch::new(kernel, vm);
    assert_eq!(launch.vm.finalize().unwrap_err().errno(), libc::EINVAL);
    let early = launch.populate(0, &[1], PageType::Normal).unwrap_err();
    assert_eq!(early.errno(), libc::EINVAL);
    let with = |policy| SnpStart {
        policy,
        ..SnpStart::default()
    };
    // Without a bit that all policies have.
    agent.set_start(with(0x10000));
    assert_eq!(launch.vm.prepare().unwrap_err().errno(), libc::EINVAL);
    agent.set_start(with(0x30000));
    launch.vm.prepare().unwrap();
    assert_eq!(launch.vm.prepare().unwrap_err().errno(), libc::EPERM);
    // A VMM that has begun by itself.
    assert_eq!(
        agent.prepare(launch.kernel.as_ref()).unwrap_err().errno(),
        libc::EINVAL
    );
    launch.populate(0, &[1], PageType::Normal).unwrap();
    launch.vm.finalize().unwrap();
    assert_eq!(launch.vm.prepare().unwrap_err().errno(), libc::EPERM);
}

#[test]
fn what_was_launched_is_not_reset() {
    for launch in Launch::both() {
        launch.region.reset().unwrap();
        launch.populate(0, &[1, 2], PageType::Normal).unwrap();
        launch.vm.finalize().unwrap();
        let error = launch.region.reset().unwrap_err();
        assert_eq!(error.errno(), libc::EPERM, "{error}");
        let held = launch.region.info().private_held;
        assert_eq!(held, Some(2 * GRANULE));
    }
}

/// A source may lie in the shared store, in the place of what it is for.
#[test]
fn sources_are_freed_when_the_launch_has_ended() {
    for launch in Launch::both() {
        for granule in 0..4 {
            let region = &launch.region;
            launch.kernel.write_store(region, Side::Shared, granule, 7);
        }
        common::convert(&launch.vm, 3..4, Side::Shared).unwrap();
        launch
            .kernel
            .write_store(&launch.region, Side::Shared, 3, 7);
        launch.populate(0, &[7, 7], PageType::Normal).unwrap();
        assert_eq!(launch.region.info().held_twice, Some(3 * GRANULE));
        launch.vm.finalize().unwrap();
        let info = launch.region.info();
        assert_eq!(info.held_twice, Some(0));
        assert_eq!(info.shared_held, Some(GRANULE));
    }
}

#[test]
fn kvm_alone_has_no_initial_contents_and_the_emulated_agent_any() {
    let kernel = Model::new();
    let launch = Launch::new(kernel.clone(), kernel.vm());
    let error = launch.populate(0, &[1], PageType::Normal).unwrap_err();
    assert_eq!(error.errno(), libc::EOPNOTSUPP);
    launch.vm.finalize().unwrap();

    let vm = Vm::emulated().unwrap();
    let region = Region::new(&vm, "ram", GRANULE).unwrap();
    let mapping = common::mapping::HostMapping::new(&region);
    vm.bind(&region, 0, 0, GRANULE).unwrap();
    let mut page = Page([7; 4096]);
    let source = Some(&mut page.0[..]);
    vm.populate(0, GRANULE, source, PageType::Normal).unwrap();
    assert_eq!(region.info().private, GRANULE);
    // SAFETY: the mapping has one granule.
    assert_eq!(unsafe { mapping.granule(0).read_volatile() }, 7);
}

/// An agent that refuses conversions of one granule, and keeps what it is told.
#[derive(Default)]
struct Witness {
    told: Mutex<Vec<(&'static str, Range, Option<Side>)>>,
    refuses: Option<u64>,
}

impl Agent for Witness {
    fn name(&self) -> &str {
        "witness"
    }

    fn populate(&self, _: InitialPages) -> privmem::Result<()> {
        Ok(())
    }

    fn finalize(&self, _: &dyn Kernel) -> privmem::Result<()> {
        Ok(())
    }

    fn before_convert(&self, gpa: Range, to: Side) -> privmem::Result<()> {
        if self.refuses == Some(gpa.start() / GRANULE) {
            return Err(Error::InvalidArgument("not this one".into()));
        }
        self.told.lock().unwrap().push(("before", gpa, Some(to)));
        Ok(())
    }

    fn after_convert(&self, gpa: Range, side: Side) {
        self.told.lock().unwrap().push(("after", gpa, Some(side)));
    }

    fn invalidate(&self, gpa: Range) {
        self.told.lock().unwrap().push(("invalidate", gpa, None));
    }
}

#[test]
fn an_agent_is_asked_before_and_told_after() {
    let kernel = Model::new();
    let agent = Arc::new(Witness {
        refuses: Some(9),
        ..Witness::default()
    });
    let vm = Vm::with_agent(kernel.clone(), Some(stand_in_fd()), agent.clone()).unwrap();
    let region = Region::new(&vm, "ram", GRANULES * GRANULE).unwrap();
    kernel.bind(&region, &vm, 0, 0, GRANULES);
    let range = |first, count| Range::new(first * GRANULE, count * GRANULE).unwrap();
    let told = || std::mem::take(&mut *agent.told.lock().unwrap());

    vm.convert(2 * GRANULE, 6 * GRANULE, Private).unwrap();
    vm.convert(4 * GRANULE, GRANULE, Shared).unwrap();
    let expected = [
        ("before", range(2, 6), Some(Private)),
        ("after", range(2, 6), Some(Private)),
        ("before", range(4, 1), Some(Shared)),
        ("after", range(4, 1), Some(Shared)),
    ];
    assert_eq!(told(), expected);

    // Of the pieces 4 and 8.., 9 is refused: the first is told that it stays.
    vm.convert(8 * GRANULE, GRANULE, Private).unwrap();
    told();
    vm.convert(4 * GRANULE, 8 * GRANULE, Private).unwrap_err();
    let expected = [
        ("before", range(4, 1), Some(Private)),
        ("after", range(4, 1), Some(Shared)),
    ];
    assert_eq!(told(), expected);
    assert_eq!(kernel.pages().private, [2, 3, 5, 6, 7, 8].into());

    kernel.discards.store(true, Ordering::Relaxed);
    region.discard(GRANULE, 3 * GRANULE).unwrap();
    assert_eq!(told(), [("invalidate", range(2, 2), None)]);
}

/// A step of a launch.
#[derive(Clone, Debug)]
enum Step {
    Populate(u64, u64, PageType),
    Share(u64),
    Finalize,
}

fn any_step() -> impl Strategy<Value = Step> {
    let page_type = prop_oneof![Just(PageType::Normal), Just(PageType::Unmeasured)];
    prop_oneof![
        8 => (0..GRANULES + 2, 1u64..4, page_type).prop_map(|(a, n, t)| Step::Populate(a, n, t)),
        3 => (0..GRANULES).prop_map(Step::Share),
        1 => Just(Step::Finalize),
    ]
}

proptest! {
    /// What the firmware accepts, the library does; what it refuses, the
    /// library reports with the page, and nothing else has changed.
    #[test]
    fn launches_go_as_far_as_the_firmware_lets_them(
        steps in prop::collection::vec(any_step(), 1..25),
        tdx in any::<bool>(),
    ) {
        let launch = if tdx { Launch::tdx() } else { Launch::snp() };
        let mut has_contents = [false; GRANULES as usize];
        let mut is_private = [true; GRANULES as usize];
        let mut finalized = false;
        for step in steps {
            match step {
                Step::Populate(first, count, page_type) => {
                    let contents: Vec<u8> = (0..count).map(|n| n as u8 + 1).collect();
                    let before = launch.log().len();
                    let result = launch.populate(first, &contents, page_type);
                    let done = launch.log().len() - before;
                    let end = first + count;
                    if finalized {
                        prop_assert!(matches!(result, Err(Error::Finalized)));
                        prop_assert_eq!(done, 0);
                    } else if end > GRANULES {
                        let refused = matches!(result, Err(Error::NotPrivateCapable { .. }));
                        prop_assert!(refused);
                        prop_assert_eq!(done, 0);
                    } else {
                        is_private[first as usize..end as usize].fill(true);
                        let taken = (first..end).find(|gfn| has_contents[*gfn as usize]);
                        let reached = taken.unwrap_or(end);
                        has_contents[first as usize..reached as usize].fill(true);
                        prop_assert_eq!(done as u64, reached - first);
                        match result {
                            Ok(()) => prop_assert_eq!(taken, None),
                            Err(Error::Command { gpa, .. }) => {
                                prop_assert_eq!(gpa, taken.map(|gfn| gfn * GRANULE));
                            }
                            Err(other) => prop_assert!(false, "{}", other),
                        }
                    }
                }
                Step::Share(granule) => {
                    launch.vm.convert(granule * GRANULE, GRANULE, Shared).unwrap();
                    is_private[granule as usize] = false;
                    has_contents[granule as usize] = false;
                }
                Step::Finalize => {
                    prop_assert_eq!(launch.vm.finalize().is_ok(), !finalized);
                    finalized = true;
                }
            }
            let private: Vec<u64> = (0..GRANULES).filter(|g| is_private[*g as usize]).collect();
            prop_assert_eq!(launch.private(), private);
            prop_assert_eq!(launch.region.info().held_twice, Some(0));
        }
    }
}
