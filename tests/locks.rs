//! Who waits for whom: while a conversion goes on, whatever else would touch the same
//! memory has not begun.

mod common;

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::{Mapper, Model, stand_in_fd};
use privmem::agent::{Agent, InitialPages, PageType};
use privmem::kernel::Kernel;
use privmem::{GRANULE, Listener, Options, Range, Region, Side, Vm};

/// Long enough for a thread to do what it should wait with. A right library passes
/// however slow the machine is.
const MOMENT: Duration = Duration::from_millis(100);

/// Long enough for anything that does not wait for itself.
const LONG: Duration = Duration::from_secs(20);

type Hook = Box<dyn FnOnce() + Send>;

/// An agent that does something in the middle of the next conversion.
#[derive(Default)]
struct Hooked {
    hook: Mutex<Option<Hook>>,
    populated: Mutex<Vec<(u64, bool)>>,
    /// Whose sides initial contents are checked against.
    region: Mutex<Option<Arc<Region>>>,
}

impl Agent for Hooked {
    fn name(&self) -> &str {
        "hooked"
    }

    fn populate(&self, pages: InitialPages) -> privmem::Result<()> {
        let region = self.region.lock().unwrap().clone().unwrap();
        let mut runs = region.runs(pages.gpa.start(), pages.gpa.len())?;
        let is_private = runs.all(|run| run.side == Side::Private);
        let mut populated = self.populated.lock().unwrap();
        populated.push((pages.gpa.start() / GRANULE, is_private));
        Ok(())
    }

    fn finalize(&self, _: &dyn Kernel) -> privmem::Result<()> {
        Ok(())
    }

    fn before_convert(&self, _: Range, _: Side) -> privmem::Result<()> {
        let hook = self.hook.lock().unwrap().take();
        if let Some(hook) = hook {
            hook();
        }
        Ok(())
    }
}

struct Setup {
    kernel: Arc<Model>,
    agent: Arc<Hooked>,
    vm: Arc<Vm>,
}

impl Setup {
    fn new() -> Setup {
        let kernel = Model::new();
        let agent = Arc::new(Hooked::default());
        let vm = Vm::with_agent(kernel.clone(), Some(stand_in_fd()), agent.clone()).unwrap();
        Setup { kernel, agent, vm }
    }

    /// A region bound at guest granule `gpa`.
    fn region(&self, granules: u64, gpa: u64, huge_page: Option<u64>) -> Arc<Region> {
        let options = Options {
            huge_page: huge_page.map(|granules| granules * GRANULE),
            ..Options::default()
        };
        let size = granules * GRANULE;
        let region = Region::with_options(&self.vm, "ram", size, options).unwrap();
        self.kernel.bind(&region, &self.vm, 0, gpa, granules);
        region
    }

    /// While guest granules `gpa` become private, `other` does not get through; it
    /// does afterwards.
    fn assert_waits(&self, gpa: std::ops::Range<u64>, other: impl FnOnce() + Send + 'static) {
        let (done, is_done) = mpsc::channel();
        let (result, verdict) = mpsc::channel();
        let hook = move || {
            let other = thread::spawn(move || {
                other();
                // Nobody listens any more where it has waited.
                let _ = done.send(());
            });
            let waited = is_done.recv_timeout(MOMENT) == Err(RecvTimeoutError::Timeout);
            result.send((waited, other)).unwrap();
        };
        common::convert(&self.vm, gpa.clone(), Side::Shared).unwrap();
        *self.agent.hook.lock().unwrap() = Some(Box::new(hook));
        common::convert(&self.vm, gpa, Side::Private).unwrap();
        let (waited, other) = verdict.recv().unwrap();
        assert!(waited, "it did not wait");
        other.join().unwrap();
        self.kernel.assert_rules();
    }
}

#[test]
fn the_same_memory_waits() {
    let setup = Setup::new();
    let region = setup.region(8, 0, None);
    setup.region(8, 8, None);
    let vm = setup.vm.clone();
    setup.assert_waits(2..10, move || {
        common::convert(&vm, 3..4, Side::Shared).unwrap()
    });
    // Of the second region as well.
    let vm = setup.vm.clone();
    setup.assert_waits(2..10, move || {
        common::convert(&vm, 9..10, Side::Shared).unwrap()
    });
    let balloon = region.clone();
    setup.assert_waits(3..5, move || balloon.discard(3 * GRANULE, GRANULE).unwrap());
    let mapper = Mapper::new(&setup.kernel, &region, false);
    region.add_listener(mapper.clone()).unwrap();
    let identity = mapper.identity();
    setup.assert_waits(5..7, move || region.remove_listener(identity).unwrap());
    let vm = setup.vm.clone();
    setup.assert_waits(0..8, move || vm.finalize().unwrap());
}

/// All of a huge page is given back at once.
#[test]
fn the_same_huge_page_waits() {
    let setup = Setup::new();
    setup.region(16, 0, Some(8));
    let vm = setup.vm.clone();
    setup.assert_waits(1..3, move || {
        common::convert(&vm, 6..7, Side::Private).unwrap()
    });
    let vm = setup.vm.clone();
    setup.assert_waits(15..16, move || {
        common::convert(&vm, 8..9, Side::Private).unwrap()
    });
}

/// Two parts of one huge page, with another region between them.
#[test]
fn a_request_does_not_wait_for_itself() {
    let setup = Setup::new();
    let options = Options {
        huge_page: Some(8 * GRANULE),
        ..Options::default()
    };
    let region = Region::with_options(&setup.vm, "ram", 8 * GRANULE, options).unwrap();
    setup.kernel.bind(&region, &setup.vm, 0, 0, 4);
    setup.kernel.bind(&region, &setup.vm, 4, 8, 4);
    let other = setup.region(4, 4, None);
    let (done, is_done) = mpsc::channel();
    let vm = setup.vm.clone();
    thread::spawn(move || {
        common::convert(&vm, 0..12, Side::Private).unwrap();
        done.send(()).unwrap();
    });
    is_done.recv_timeout(LONG).expect("it waits for itself");
    assert_eq!(
        (region.info().private, other.info().private),
        (8 * GRANULE, 4 * GRANULE)
    );
    // Each region counts the request once.
    assert_eq!(
        (region.info().conversions, other.info().conversions),
        (1, 1)
    );
}

/// An operator makes memory shared between the conversion and the contents.
#[test]
fn initial_contents_are_given_to_private_memory_only() {
    let setup = Setup::new();
    let region = setup.region(4, 0, None);
    *setup.agent.region.lock().unwrap() = Some(region.clone());
    let (vm, seen) = (setup.vm.clone(), setup.agent.clone());
    let (send, receive) = mpsc::channel();
    let hook = move || {
        let operator = thread::spawn(move || common::convert(&vm, 1..2, Side::Shared).unwrap());
        // It takes its place behind this conversion.
        thread::sleep(MOMENT);
        send.send(operator).unwrap();
    };
    *setup.agent.hook.lock().unwrap() = Some(Box::new(hook));
    setup
        .vm
        .populate(0, 4 * GRANULE, None, PageType::Zero)
        .unwrap();
    receive.recv().unwrap().join().unwrap();
    let populated = seen.populated.lock().unwrap().clone();
    assert!(
        populated.iter().all(|(_, is_private)| *is_private),
        "{populated:?}"
    );
    *setup.agent.region.lock().unwrap() = None;
}
