//! What a region can be made with: where it begins, what its stores keep, and
//! memory that is taken before it is used.

mod common;

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use Side::{Private, Shared};
use common::{Fail, Model};
use privmem::{Error, GRANULE, NumaPolicy, Options, Region, Side, Vm};

const GRANULES: u64 = 16;
const HUGE: u64 = 8 * GRANULE;

struct Setup {
    kernel: Arc<Model>,
    vm: Arc<Vm>,
    region: Arc<Region>,
}

/// A region of 16 granules, bound at 0.
fn setup(options: Options) -> Setup {
    let kernel = Model::new();
    let vm = kernel.vm();
    let region = Region::with_options(&vm, "r", GRANULES * GRANULE, options).unwrap();
    kernel.bind(&region, &vm, 0, 0, GRANULES);
    Setup { kernel, vm, region }
}

impl Setup {
    fn convert(&self, granule: u64, count: u64, to: Side) -> privmem::Result<u64> {
        self.vm.convert(granule * GRANULE, count * GRANULE, to)
    }

    fn touch_all(&self) {
        for side in [Private, Shared] {
            (0..GRANULES).for_each(|granule| self.kernel.touch(&self.region, side, granule));
        }
    }

    /// Granules that the store of `side` holds.
    fn held(&self, side: Side) -> Vec<u64> {
        let fd = self.region.store(side).fd().as_raw_fd();
        let held = self.kernel.pages().held.get(&fd).cloned();
        held.unwrap_or_default().into_keys().collect()
    }
}

fn two() -> NonZeroUsize {
    NonZeroUsize::new(2).unwrap()
}

fn node_1() -> NumaPolicy {
    let nodes = vec![0b10];
    NumaPolicy {
        mode: libc::MPOL_BIND,
        nodes,
    }
}

fn initially_private() -> Options {
    Options {
        initial: Private,
        ..Options::default()
    }
}

#[test]
fn a_region_may_begin_private_and_returns_to_that() {
    let setup = setup(initially_private());
    assert_eq!(setup.region.info().private, GRANULES * GRANULE);
    assert_eq!(setup.kernel.pages().private, (0..GRANULES).collect());
    setup.convert(2, 5, Shared).unwrap();
    setup.kernel.touch(&setup.region, Private, 9);
    setup.kernel.touch(&setup.region, Shared, 3);
    setup.region.reset().unwrap();
    assert_eq!(setup.kernel.pages().private, (0..GRANULES).collect());
    assert_eq!(setup.region.info().private, GRANULES * GRANULE);
    assert!(setup.held(Private).is_empty());
    assert!(setup.held(Shared).is_empty());
}

#[test]
fn a_store_keeps_its_pages_if_it_is_to() {
    for (keep_private, keep_shared) in [(false, false), (true, false), (false, true), (true, true)]
    {
        let setup = setup(Options {
            keep_private,
            keep_shared,
            ..Options::default()
        });
        let kept = |keep: bool| if keep { GRANULES as usize } else { 0 };
        setup.touch_all();
        setup.convert(0, GRANULES, Private).unwrap();
        assert_eq!(setup.held(Shared).len(), kept(keep_shared));
        setup.touch_all();
        setup.convert(0, GRANULES, Shared).unwrap();
        assert_eq!(setup.held(Private).len(), kept(keep_private));
    }
}

#[test]
fn preallocation_follows_the_side() {
    for initial in [Private, Shared] {
        let setup = setup(Options {
            initial,
            ..Options::default()
        });
        setup.region.preallocate(two()).unwrap();
        assert_eq!(setup.held(initial).len() as u64, GRANULES);
        assert!(setup.held(initial.other()).is_empty());
        setup.convert(3, 4, initial.other()).unwrap();
        assert_eq!(setup.held(initial.other()), [3, 4, 5, 6]);
        assert_eq!(setup.held(initial).len() as u64, GRANULES - 4);
    }
}

#[test]
fn a_conversion_without_memory_for_it_changes_nothing() {
    for to in [Private, Shared] {
        let mut number = 0;
        loop {
            let setup = setup(Options {
                initial: to.other(),
                ..Options::default()
            });
            setup.region.preallocate(two()).unwrap();
            setup.region.set_numa_policy(node_1(), two()).unwrap();
            setup.convert(5, 2, to).unwrap();
            let before = setup.kernel.pages();
            setup.kernel.set_fail(Fail::Once(number, libc::ENOMEM));
            let result = setup.convert(1, 14, to);
            assert_eq!(*setup.kernel.policy.lock().unwrap(), NumaPolicy::default());
            let lost = match result {
                Ok(_) if setup.kernel.calls() <= number => break,
                // The thread's policy was restored in another way.
                Ok(_) => {
                    number += 1;
                    continue;
                }
                Err(Error::Undone { contents_lost, .. }) => contents_lost / GRANULE,
                Err(_) => 0,
            };
            let after = setup.kernel.pages();
            assert_eq!(after.private, before.private);
            assert_eq!(setup.held(to), [5, 6], "call {number} to {to:?}");
            assert_eq!(setup.held(to.other()).len() as u64, 14 - lost);
            number += 1;
        }
        assert!(number >= 8, "the request makes several calls");
    }
}

#[test]
fn what_cannot_be_preallocated_is_an_error() {
    for number in 0..3 {
        let setup = setup(Options::default());
        setup.kernel.set_fail(Fail::Once(number, libc::ENOSPC));
        let result = setup.region.preallocate(two());
        let calls = "there is one piece only, allocated and then cleared";
        assert_eq!(result.is_err(), number < 2, "{calls}");
    }
}

#[test]
fn a_policy_is_the_threads_while_private_memory_is_taken() {
    let setup = setup(initially_private());
    setup.region.set_numa_policy(node_1(), two()).unwrap();
    assert_eq!(setup.held(Private).len() as u64, GRANULES);
    assert!(setup.held(Shared).is_empty());
    let again = setup.region.set_numa_policy(node_1(), two());
    assert!(matches!(again, Err(Error::PolicySetAlready(_))));
    setup.convert(0, 4, Shared).unwrap();
    assert!(setup.held(Shared).is_empty(), "not preallocated");
    setup.convert(0, 2, Private).unwrap();
    assert_eq!(setup.held(Private).len() as u64, GRANULES - 2);
    assert_eq!(*setup.kernel.policy.lock().unwrap(), NumaPolicy::default());
}

#[test]
fn a_policy_that_the_kernel_refuses_is_not_kept() {
    let setup = setup(initially_private());
    setup.kernel.set_fail(Fail::Once(0, libc::EINVAL));
    setup.region.set_numa_policy(node_1(), two()).unwrap_err();
    setup.region.set_numa_policy(node_1(), two()).unwrap();
}

#[test]
fn a_huge_page_is_given_back_when_all_of_it_is_private() {
    let setup = setup(Options {
        huge_page: Some(HUGE),
        ..Options::default()
    });
    let huge_page = |number: u64| (number * 8..(number + 1) * 8).collect::<Vec<_>>();
    for request in [[2, 4], [6, 2], [9, 7]] {
        // The host touches what is shared: the kernel takes all of its page.
        setup.touch_all();
        setup.convert(request[0], request[1], Private).unwrap();
    }
    let left = |setup: &Setup| {
        let held = setup.held(Shared);
        [0, 1].map(|page| huge_page(page).iter().all(|granule| held.contains(granule)))
    };
    // The model frees granules of a punch; what the last request did not cover
    // is there only if its page was not given back.
    assert_eq!(setup.held(Shared), [0, 1, 2, 3, 4, 5, 6, 7, 8]);
    setup.touch_all();
    setup.convert(0, 2, Private).unwrap();
    assert_eq!(left(&setup), [false, true]);
    assert_eq!(setup.held(Shared), huge_page(1));
    setup.convert(8, 1, Private).unwrap();
    assert!(setup.held(Shared).is_empty());
}

#[test]
fn a_huge_page_has_a_size_that_fits() {
    let kernel = Model::new();
    let vm = kernel.vm();
    for (size, huge_page, word) in [
        (HUGE, 3 * GRANULE, "not the size of a huge page"),
        (HUGE, GRANULE, "not the size of a huge page"),
        (HUGE + GRANULE, HUGE, "not a multiple of the huge page"),
    ] {
        let huge_page = Some(huge_page);
        let options = Options {
            huge_page,
            ..Options::default()
        };
        let error = Region::with_options(&vm, "r", size, options).err().unwrap();
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn kvm_gives_no_private_contents_out() {
    let setup = setup(Options::default());
    let error = setup.region.load_state(&[0; 2]).unwrap_err();
    assert_eq!(error.errno(), libc::EOPNOTSUPP);
}

fn prefaulted() -> Options {
    Options {
        prefault: true,
        ..Options::default()
    }
}

#[test]
fn what_has_become_private_is_there_before_it_is_touched_where_that_is_wanted() {
    for (options, held) in [(prefaulted(), &[2, 3, 4][..]), (Options::default(), &[])] {
        let setup = setup(options);
        setup.convert(2, 3, Private).unwrap();
        // The fd is only a number to the model.
        let vcpu = std::io::stdin();
        setup
            .vm
            .prefault(vcpu.as_fd(), 2 * GRANULE, 3 * GRANULE)
            .unwrap();
        assert_eq!(setup.held(Private), held);
        assert_eq!(setup.held(Shared), []);
    }
}

#[test]
fn prefaulting_ends_where_the_kernel_does() {
    let setup = setup(prefaulted());
    setup.convert(0, 8, Private).unwrap();
    setup.kernel.set_fail(Fail::Once(5, libc::EINTR));
    let vcpu = std::io::stdin();
    let error = setup.vm.prefault(vcpu.as_fd(), 0, 8 * GRANULE).unwrap_err();
    assert_eq!(error.errno(), libc::EINTR);
    assert_eq!(setup.held(Private), [0, 1, 2, 3, 4]);
    setup
        .vm
        .prefault(vcpu.as_fd(), 1, GRANULE)
        .expect_err("granules only");
}

#[test]
fn who_cannot_prefault_says_so() {
    let mut kernel = Arc::into_inner(Model::new()).unwrap();
    kernel.pre_fault = 0;
    let kernel = Arc::new(kernel);
    let refused = |vm: &Arc<Vm>| Region::with_options(vm, "r", GRANULE, prefaulted()).err();
    let error = refused(&kernel.vm()).unwrap();
    assert_eq!(error.errno(), libc::EOPNOTSUPP);
    assert!(error.to_string().contains("Linux 6.11"), "{error}");
    assert!(matches!(
        refused(&Vm::emulated().unwrap()),
        Some(Error::InvalidArgument(_))
    ));
}

/// Taking memory takes its time, as mapping does: others get their turn in between.
#[test]
fn where_memory_is_taken_a_step_is_smaller() {
    const STEP: u64 = 64 << 20;
    let kernel = Model::new();
    let vm = kernel.vm();
    let region = Region::new(&vm, "r", 2 * STEP).unwrap();
    kernel.bind(&region, &vm, 0, 0, 2 * STEP / GRANULE);
    region.set_numa_policy(node_1(), two()).unwrap();
    assert_eq!(vm.convert(0, 2 * STEP, Private).unwrap(), STEP);
    // The policy is of private memory alone.
    assert_eq!(vm.convert(0, 2 * STEP, Shared).unwrap(), 2 * STEP);
}

/// The last of the huge pages of a request goes as the first one does.
#[test]
fn both_ends_of_a_request_give_huge_pages_back() {
    for (first, last) in [(true, false), (false, true), (true, true)] {
        let setup = setup(Options {
            huge_page: Some(HUGE),
            ..Options::default()
        });
        let private = |is_private: bool, granule, count| {
            if is_private {
                setup.convert(granule, count, Private).unwrap();
            }
        };
        private(first, 0, 6);
        private(last, 10, 6);
        (0..GRANULES).for_each(|granule| setup.kernel.touch(&setup.region, Shared, granule));
        setup.convert(6, 4, Private).unwrap();
        // Granules of 6..10 go in any case: the model counts them one by one.
        let left = setup.held(Shared);
        assert_eq!(left.iter().any(|granule| *granule < 6), !first, "{left:?}");
        assert_eq!(left.iter().any(|granule| *granule >= 10), !last, "{left:?}");
    }
}

#[test]
fn a_reset_takes_memory_where_it_was_taken_before() {
    let setup = setup(initially_private());
    setup.region.preallocate(two()).unwrap();
    setup.convert(2, 3, Shared).unwrap();
    setup.kernel.discards.store(true, Ordering::Relaxed);
    setup.region.reset().unwrap();
    assert_eq!(setup.held(Private).len() as u64, GRANULES);
    assert!(setup.held(Shared).is_empty());
}
