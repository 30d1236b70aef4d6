//! A model of the kernel: which guest-physical granules have the private
//! attribute, and which pages each fd holds, with what in them. It can fail any
//! call.

#![allow(dead_code)] // every test file uses a part of it

pub mod faulty;
pub mod firmware;
pub mod mapping;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use firmware::{Added, Firmware, Refusal};
use kvm_bindings::kvm_sev_snp_launch_update;
use privmem::agent::{Agent, CommandError, CommandResult, SnpFinish, SnpStart};
use privmem::kernel::{Blocked, FileFacts, Kernel, Linux, TdxInitMemRegion};
use privmem::{GRANULE, Info, Listener, NumaPolicy, Range, Region, Side, Vm};

/// Which calls of `set_memory_attributes`, `punch_hole` and `map_fixed` fail.
#[derive(Clone, Copy)]
pub enum Fail {
    Never,
    /// Only the call with this number, counted from 0.
    Once(usize, i32),
    /// This one and the next.
    Twice(usize, i32),
    /// The call with this number and all later ones.
    From(usize, i32),
}

impl Fail {
    /// What becomes of the call with this number.
    fn of(self, number: usize) -> io::Result<()> {
        match self {
            Fail::Once(at, errno) if number == at => Err(io::Error::from_raw_os_error(errno)),
            Fail::Twice(at, errno) if number == at || number == at + 1 => {
                Err(io::Error::from_raw_os_error(errno))
            }
            Fail::From(at, errno) if number >= at => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(()),
        }
    }
}

#[derive(Default, Clone, PartialEq, Debug)]
pub struct Pages {
    /// Granules with `KVM_MEMORY_ATTRIBUTE_PRIVATE`, by guest-physical number.
    pub private: BTreeSet<u64>,
    /// Granules that each fd holds a page for, and what all bytes of it are.
    pub held: HashMap<RawFd, BTreeMap<u64, u8>>,
}

impl Pages {
    /// The page for a granule; a new one reads zero.
    fn page(&mut self, fd: RawFd, granule: u64) -> &mut u8 {
        self.held.entry(fd).or_default().entry(granule).or_default()
    }

    /// The fd that the guest reaches at a place.
    fn reachable(&self, place: &Place) -> RawFd {
        match self.private.contains(&place.gpa) {
            true => place.private,
            false => place.shared,
        }
    }
}

/// A granule of a region that the guest sees, for the model to relate pages
/// to attributes.
#[derive(Clone, Copy)]
struct Place {
    gpa: u64,
    granule: u64,
    shared: RawFd,
    private: RawFd,
}

/// Where KVM's slots find a shared store, and the granules that it cannot access there.
struct SlotMapping {
    start: usize,
    len: usize,
    shared: RawFd,
    hidden: BTreeSet<u64>,
}

pub struct Model {
    slot_mappings: Mutex<Vec<SlotMapping>>,
    /// Whether the kernel has guard regions in shared memory.
    pub guard_regions: AtomicBool,
    pages: Mutex<Pages>,
    fail: Mutex<(Fail, usize)>,
    places: Mutex<Vec<Place>>,
    /// Guest-physical granules whose attributes are being set.
    busy: Mutex<BTreeSet<u64>>,
    /// The guest touches memory as soon as it changes side.
    pub guest_touches: AtomicBool,
    /// Memory that the guest reaches may be freed: a balloon's, or at a reset.
    pub discards: AtomicBool,
    /// Pages that the host has lost: the granules of each fd whose access fails.
    poisoned: Mutex<BTreeSet<(RawFd, u64)>>,
    /// A model of what keeps private contents, if KVM alone does not.
    pub firmware: Mutex<Option<Box<dyn Firmware>>>,
    /// Rules that the library broke.
    broken: Mutex<Vec<String>>,
    pub attributes: u32,
    pub guest_memfd: u32,
    pub pre_fault: u32,
    /// The kernel has no cachestat(2).
    pub cannot_count: AtomicBool,
    /// How long it takes to count pages.
    pub counting: Mutex<Duration>,
    /// The NUMA policy of the one thread that there is.
    pub policy: Mutex<NumaPolicy>,
}

/// A downstream mapper that keeps what it maps and knows the rules: it unmaps
/// while the memory is still shared, and maps when it is shared already; what it
/// maps is not mapped yet, what it unmaps is.
pub struct Mapper {
    kernel: Arc<Model>,
    region: Weak<Region>,
    /// Calls of `populate` fail as those into the kernel do.
    pub refuses: bool,
    /// Calls of `discard` do.
    pub clings: bool,
    /// Granules of a block, if it can give up only whole entries.
    pub block: Option<u64>,
    /// What of the region it is told of, in granules.
    pub range: Option<std::ops::Range<u64>>,
    pub mapped: Mutex<BTreeSet<u64>>,
    /// What each entry maps, by its first granule.
    pub entries: Mutex<BTreeMap<u64, std::ops::Range<u64>>>,
}

impl Mapper {
    pub fn new(kernel: &Arc<Model>, region: &Arc<Region>, refuses: bool) -> Arc<Mapper> {
        Mapper::with(kernel, region, |mapper| mapper.refuses = refuses)
    }

    pub fn with(
        kernel: &Arc<Model>,
        region: &Arc<Region>,
        change: impl FnOnce(&mut Mapper),
    ) -> Arc<Mapper> {
        let mut mapper = Mapper {
            kernel: kernel.clone(),
            region: Arc::downgrade(region),
            refuses: false,
            clings: false,
            block: None,
            range: None,
            mapped: Mutex::default(),
            entries: Mutex::default(),
        };
        change(&mut mapper);
        Arc::new(mapper)
    }

    pub fn mapped(&self) -> Vec<u64> {
        self.mapped.lock().unwrap().iter().copied().collect()
    }

    pub fn entries(&self) -> Vec<std::ops::Range<u64>> {
        self.entries.lock().unwrap().values().cloned().collect()
    }

    /// Whole entries go, as many as the library counts.
    fn give_up_entries(&self, gone: std::ops::Range<u64>, count: u64) {
        let mut entries = self.entries.lock().unwrap();
        let before = entries.len();
        entries.retain(|_, entry| entry.end <= gone.start || entry.start >= gone.end);
        let whole = (before - entries.len()) as u64;
        let parts = entries
            .values()
            .any(|e| e.start < gone.end && gone.start < e.end);
        if self.block.is_some() && (parts || whole != count) {
            self.kernel.broke(format!("{count} entries of {gone:?}"));
        }
    }

    fn check_shared(&self, offsets: Range, when: &str) {
        let region = self.region.upgrade().unwrap();
        let fd = region.store(Side::Shared).fd().as_raw_fd();
        let pages = self.kernel.pages.lock().unwrap();
        for place in self.kernel.places.lock().unwrap().iter() {
            let ours = place.shared == fd && granules(offsets).contains(&place.granule);
            if ours && pages.private.contains(&place.gpa) {
                self.kernel
                    .broke(format!("{when} private granule {}", place.granule));
            }
        }
    }
}

impl Listener for Mapper {
    fn discard(&self, offsets: Range, entries: u64) -> io::Result<()> {
        if self.clings {
            self.kernel.call()?;
        }
        self.check_shared(offsets, "unmapped late:");
        let mut mapped = self.mapped.lock().unwrap();
        if !granules(offsets).all(|granule| mapped.remove(&granule)) {
            self.kernel.broke(format!("{offsets} was not mapped"));
        }
        self.give_up_entries(granules(offsets), entries);
        Ok(())
    }

    fn populate(&self, offsets: Range) -> io::Result<()> {
        if self.refuses {
            self.kernel.call()?;
        }
        self.check_shared(offsets, "mapped");
        let mut mapped = self.mapped.lock().unwrap();
        if !granules(offsets).all(|granule| mapped.insert(granule)) {
            self.kernel.broke(format!("{offsets} was mapped already"));
        }
        let entry = granules(offsets);
        self.entries.lock().unwrap().insert(entry.start, entry);
        Ok(())
    }

    fn granularity(&self) -> Option<u64> {
        self.block.map(|granules| granules * GRANULE)
    }

    fn range(&self) -> Option<Range> {
        let range = self.range.clone()?;
        let len = range.end - range.start;
        Some(Range::new(range.start * GRANULE, len * GRANULE).unwrap())
    }

    fn identity(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }
}

impl Model {
    pub fn new() -> Arc<Model> {
        Arc::new(Model {
            slot_mappings: Mutex::default(),
            guard_regions: AtomicBool::new(true),
            pages: Mutex::default(),
            fail: Mutex::new((Fail::Never, 0)),
            places: Mutex::default(),
            busy: Mutex::default(),
            guest_touches: AtomicBool::new(false),
            discards: AtomicBool::new(false),
            poisoned: Mutex::default(),
            firmware: Mutex::default(),
            broken: Mutex::default(),
            attributes: 8,
            guest_memfd: 1,
            pre_fault: 1,
            cannot_count: AtomicBool::new(false),
            counting: Mutex::default(),
            policy: Mutex::default(),
        })
    }

    /// KVM writes to guest memory by the slot's address, as it does to a guest's clock.
    /// False where it cannot.
    pub fn kvm_writes(&self, region: &Region, granule: u64) -> bool {
        let is_hidden = self.hidden(region).contains(&granule);
        if !is_hidden {
            self.touch(region, Side::Shared, granule);
        }
        !is_hidden
    }

    /// The granules that KVM does not reach by the slot's address.
    pub fn hidden(&self, region: &Region) -> BTreeSet<u64> {
        let fd = region.store(Side::Shared).fd().as_raw_fd();
        let mappings = self.slot_mappings.lock().unwrap();
        let own = mappings.iter().find(|mapping| mapping.shared == fd);
        own.map_or_else(BTreeSet::new, |mapping| mapping.hidden.clone())
    }

    /// A vCPU's access to what is shared and hidden would fail.
    fn check_hidden(&self, mapping: &SlotMapping, private: &BTreeSet<u64>) {
        for place in self.places.lock().unwrap().iter() {
            let ours = place.shared == mapping.shared && mapping.hidden.contains(&place.granule);
            if ours && !private.contains(&place.gpa) {
                self.broke(format!("shared granule {} is hidden", place.granule));
            }
        }
    }

    /// A VM on this model. Its "VM fd" is only a number to the model.
    pub fn vm(self: &Arc<Model>) -> Arc<Vm> {
        Vm::with_kernel(self.clone(), Some(stand_in_fd())).unwrap()
    }

    /// Binds `granules` of `region` from `first` at guest granule `gpa`.
    pub fn bind(&self, region: &Arc<Region>, vm: &Vm, first: u64, gpa: u64, granules: u64) {
        let (offset, at, size) = (first * GRANULE, gpa * GRANULE, granules * GRANULE);
        vm.bind(region, offset, at, size).unwrap();
        self.add_slot(region, first, gpa, granules);
    }

    /// Shows the guest `granules` of `region` from `first` at guest granule `gpa`.
    pub fn add_slot(&self, region: &Region, first: u64, gpa: u64, granules: u64) {
        let fd = |side| region.store(side).fd().as_raw_fd();
        let places = (0..granules).map(|n| Place {
            gpa: gpa + n,
            granule: first + n,
            shared: fd(Side::Shared),
            private: fd(Side::Private),
        });
        self.places.lock().unwrap().extend(places);
    }

    /// Takes `granules` from guest granule `gpa` out of the guest's sight.
    pub fn remove_slot(&self, gpa: u64, granules: u64) {
        let gone = gpa..gpa + granules;
        let mut places = self.places.lock().unwrap();
        places.retain(|place| !gone.contains(&place.gpa));
    }

    /// The guest touches the granule at `gpa`, and finds or leaves something
    /// there. A page that is not held yet is allocated.
    pub fn access<T>(&self, gpa: u64, access: impl FnOnce(&mut u8) -> T) -> T {
        let place = self.place(gpa);
        let mut pages = self.pages.lock().unwrap();
        let fd = pages.reachable(&place);
        if fd == place.private {
            self.accept(gpa);
        }
        access(pages.page(fd, place.granule))
    }

    /// What a guest does when its access to a private page is answered with #VE
    /// or #VC.
    fn accept(&self, gfn: u64) {
        if let Some(firmware) = self.firmware.lock().unwrap().as_deref_mut()
            && !firmware.is_accepted(gfn)
        {
            firmware.accept(gfn, GRANULE).unwrap();
        }
    }

    /// The host loses what the guest has in the granule at `gpa`; says where.
    pub fn poison(&self, gpa: u64) -> Side {
        let (place, pages) = (self.place(gpa), self.pages());
        let fd = pages.reachable(&place);
        self.poisoned.lock().unwrap().insert((fd, place.granule));
        match fd == place.private {
            true => Side::Private,
            false => Side::Shared,
        }
    }

    /// Whether the guest's access to the granule at `gpa` fails.
    pub fn is_poisoned(&self, gpa: u64) -> bool {
        let (place, pages) = (self.place(gpa), self.pages());
        let at = (pages.reachable(&place), place.granule);
        self.poisoned.lock().unwrap().contains(&at)
    }

    fn place(&self, gpa: u64) -> Place {
        let places = self.places.lock().unwrap();
        let place = places.iter().find(|place| place.gpa == gpa);
        *place.expect("the guest touches memory that it has")
    }

    /// Fails the test if a rule was broken.
    pub fn assert_rules(&self) {
        assert_eq!(*self.broken.lock().unwrap(), Vec::<String>::new());
    }

    fn broke(&self, rule: String) {
        self.broken.lock().unwrap().push(rule);
    }

    /// Pages are freed only when the guest cannot reach them any more, or have
    /// failed.
    fn check_punch(&self, pages: &Pages, fd: RawFd, offsets: Range) {
        if self.discards.load(Ordering::Relaxed) {
            return;
        }
        let held = pages.held.get(&fd);
        let poisoned = self.poisoned.lock().unwrap();
        let mut freed = held
            .into_iter()
            .flat_map(|held| held.range(granules(offsets)))
            .filter(|(granule, _)| !poisoned.contains(&(fd, **granule)));
        let places = self.places.lock().unwrap();
        let seen = |granule: u64| {
            let mut places = places.iter().filter(|place| place.granule == granule);
            places.any(|place| pages.reachable(place) == fd)
        };
        if let Some((granule, _)) = freed.find(|(granule, _)| seen(**granule)) {
            self.broke(format!("granule {granule} freed while mapped"));
        }
    }

    fn guest_touch(&self, pages: &mut Pages, gpa: Range, attributes: u64) {
        for place in self.places.lock().unwrap().iter() {
            if granules(gpa).contains(&place.gpa) {
                let fd = [place.shared, place.private][usize::from(attributes != 0)];
                pages.page(fd, place.granule);
            }
        }
    }

    /// A VM with a trust agent and the model of what it talks to.
    pub fn vm_with(
        self: &Arc<Model>,
        agent: Arc<dyn Agent>,
        firmware: impl Firmware + 'static,
    ) -> Arc<Vm> {
        self.install(firmware);
        Vm::with_agent(self.clone(), Some(stand_in_fd()), agent).unwrap()
    }

    /// Puts the model of a firmware behind this one.
    pub fn install(&self, firmware: impl Firmware + 'static) {
        *self.firmware.lock().unwrap() = Some(Box::new(firmware));
    }

    /// Asks the model of the firmware, if there is one.
    pub fn ask<T>(
        &self,
        what: impl FnOnce(&mut (dyn Firmware + 'static)) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let mut firmware = self.firmware.lock().unwrap();
        let firmware = firmware.as_deref_mut();
        firmware.map_or(Err((libc::ENOTTY, 0)), what)
    }

    fn remove_page(&self, gfn: u64) {
        if let Some(firmware) = self.firmware.lock().unwrap().as_deref_mut() {
            firmware.remove(gfn);
        }
    }

    /// KVM's part of adding a page: it must lie in a slot with a guest_memfd.
    fn add_page(&self, page: Added) -> Result<(), Refusal> {
        let places = self.places.lock().unwrap();
        let place = places.iter().find(|place| place.gpa == page.gfn).copied();
        let place = place.ok_or((libc::EINVAL, 0))?;
        let mut pages = self.pages.lock().unwrap();
        let (private, contents) = (pages.private.contains(&page.gfn), page.contents);
        self.ask(|firmware| firmware.add(page, private))?;
        *pages.page(place.private, place.granule) = contents;
        Ok(())
    }

    pub fn set_fail(&self, fail: Fail) {
        *self.fail.lock().unwrap() = (fail, 0);
    }

    /// Number of calls since `set_fail`.
    pub fn calls(&self) -> usize {
        self.fail.lock().unwrap().1
    }

    pub fn pages(&self) -> Pages {
        self.pages.lock().unwrap().clone()
    }

    /// The guest or the host touches a granule: its store takes a page.
    pub fn touch(&self, region: &Region, side: Side, granule: u64) {
        let fd = region.store(side).fd().as_raw_fd();
        self.pages.lock().unwrap().page(fd, granule);
    }

    /// As [`Model::touch`], and leaves something there.
    pub fn write_store(&self, region: &Region, side: Side, granule: u64, value: u8) {
        let fd = region.store(side).fd().as_raw_fd();
        *self.pages.lock().unwrap().page(fd, granule) = value;
    }

    fn call(&self) -> io::Result<()> {
        let (fail, number) = &mut *self.fail.lock().unwrap();
        *number += 1;
        fail.of(*number - 1)
    }
}

/// A region of a software-protected VM on a model, bound at 0.
pub fn vm_with_region(granules: u64) -> (Arc<Model>, Arc<Vm>, Arc<Region>) {
    let kernel = Model::new();
    let vm = kernel.vm();
    let region = Region::new(&vm, "ram0", granules * GRANULE).unwrap();
    kernel.bind(&region, &vm, 0, 0, granules);
    (kernel, vm, region)
}

/// What a region says of itself, but for how old that is.
pub fn figures(region: &Region) -> Info {
    Info {
        held_age: None,
        ..region.info()
    }
}

/// All of a request for guest granules, step by step.
pub fn convert(vm: &Vm, gpa: std::ops::Range<u64>, to: Side) -> privmem::Result<()> {
    let (mut at, end) = (gpa.start * GRANULE, gpa.end * GRANULE);
    while at < end {
        at += vm.convert(at, end - at, to)?;
    }
    Ok(())
}

fn refused((errno, firmware): Refusal) -> CommandError {
    let error = io::Error::from_raw_os_error(errno);
    CommandError { error, firmware }
}

pub fn stand_in_fd() -> BorrowedFd<'static> {
    // SAFETY: standard error is open for as long as the tests run.
    unsafe { BorrowedFd::borrow_raw(2) }
}

pub fn granules(range: Range) -> std::ops::Range<u64> {
    range.start() / GRANULE..range.end() / GRANULE
}

impl Kernel for Model {
    fn check_extension(&self, _: BorrowedFd, capability: u32) -> io::Result<u32> {
        Ok(match capability {
            kvm_bindings::KVM_CAP_MEMORY_ATTRIBUTES => self.attributes,
            kvm_bindings::KVM_CAP_GUEST_MEMFD => self.guest_memfd,
            kvm_bindings::KVM_CAP_USER_MEMORY2 => 1,
            kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY => self.pre_fault,
            kvm_bindings::KVM_CAP_VM_TYPES => 0b11,
            _ => 0,
        })
    }

    fn create_guest_memfd(&self, _: BorrowedFd, _: u64) -> io::Result<OwnedFd> {
        self.call()?;
        Linux.create_memfd(c"model", GRANULE, None)
    }

    fn set_memory_attributes(&self, _: BorrowedFd, gpa: Range, attributes: u64) -> io::Result<()> {
        {
            let mut busy = self.busy.lock().unwrap();
            for granule in granules(gpa) {
                if !busy.insert(granule) {
                    self.broke(format!("granule {granule} set by two at once"));
                }
            }
        }
        // Let others come in between, so that missing locks show.
        std::thread::yield_now();
        let result = self.call().map(|()| {
            let mut pages = self.pages.lock().unwrap();
            match attributes {
                0 => {
                    pages.private.retain(|g| !granules(gpa).contains(g));
                    granules(gpa).for_each(|gfn| self.remove_page(gfn));
                }
                _ => pages.private.extend(granules(gpa)),
            }
            if self.guest_touches.load(Ordering::Relaxed) {
                self.guest_touch(&mut pages, gpa, attributes);
            }
            for mapping in self.slot_mappings.lock().unwrap().iter() {
                self.check_hidden(mapping, &pages.private);
            }
        });
        let mut busy = self.busy.lock().unwrap();
        busy.retain(|granule| !granules(gpa).contains(granule));
        result
    }

    /// One granule a call.
    fn pre_fault(&self, _: BorrowedFd, gpa: Range) -> io::Result<Option<Range>> {
        self.call()?;
        let place = self.place(gpa.start() / GRANULE);
        let mut pages = self.pages.lock().unwrap();
        let fd = pages.reachable(&place);
        pages.page(fd, place.granule);
        Ok(Range::new(gpa.start() + GRANULE, gpa.len() - GRANULE).ok())
    }

    fn create_memfd(&self, name: &CStr, _: u64, _: Option<u64>) -> io::Result<OwnedFd> {
        self.call()?;
        Linux.create_memfd(name, GRANULE, None)
    }

    fn punch_hole(&self, fd: BorrowedFd, offsets: Range) -> io::Result<()> {
        self.call()?;
        let mut pages = self.pages.lock().unwrap();
        self.check_punch(&pages, fd.as_raw_fd(), offsets);
        let held = pages.held.entry(fd.as_raw_fd()).or_default();
        held.retain(|g, _| !granules(offsets).contains(g));
        let kept = |(of, g): &(RawFd, u64)| *of != fd.as_raw_fd() || !granules(offsets).contains(g);
        self.poisoned.lock().unwrap().retain(kept);
        for place in self.places.lock().unwrap().iter() {
            if place.private == fd.as_raw_fd() && granules(offsets).contains(&place.granule) {
                self.remove_page(place.gpa);
            }
        }
        Ok(())
    }

    fn allocate(&self, fd: BorrowedFd, offsets: Range) -> io::Result<()> {
        let mut pages = self.pages.lock().unwrap();
        // On failure the kernel may have taken a part.
        pages.page(fd.as_raw_fd(), granules(offsets).start);
        self.call()?;
        for granule in granules(offsets) {
            pages.page(fd.as_raw_fd(), granule);
        }
        Ok(())
    }

    fn read(&self, _: BorrowedFd, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::ENOSYS))
    }

    fn write(&self, _: BorrowedFd, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::ENOSYS))
    }

    fn swap_mempolicy(&self, policy: &NumaPolicy) -> io::Result<NumaPolicy> {
        self.call()?;
        let mut current = self.policy.lock().unwrap();
        Ok(std::mem::replace(&mut *current, policy.clone()))
    }

    fn held(&self, fd: BorrowedFd, offsets: Range) -> io::Result<u64> {
        if self.cannot_count.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        std::thread::sleep(*self.counting.lock().unwrap());
        let pages = self.pages.lock().unwrap();
        let held = pages.held.get(&fd.as_raw_fd());
        let count = held.map_or(0, |held| held.range(granules(offsets)).count());
        Ok(count as u64 * GRANULE)
    }

    fn blocks(&self, _: BorrowedFd) -> io::Result<u64> {
        Err(io::Error::from_raw_os_error(libc::ENOSYS))
    }

    unsafe fn tdx_init_mem_region(
        &self,
        _: BorrowedFd,
        region: &mut TdxInitMemRegion,
        measure: bool,
    ) -> CommandResult {
        // SAFETY: the same contract.
        unsafe { firmware::tdx_init_mem_region(region, measure, |page| self.add_page(page)) }
            .map_err(refused)
    }

    fn tdx_finalize(&self, _: BorrowedFd) -> CommandResult {
        self.ask(|firmware| firmware.finish()).map_err(refused)
    }

    fn snp_launch_start(&self, _: BorrowedFd, _: BorrowedFd, start: &SnpStart) -> CommandResult {
        self.ask(|firmware| firmware.start(start.policy))
            .map_err(refused)
    }

    unsafe fn snp_launch_update(
        &self,
        _: BorrowedFd,
        _: BorrowedFd,
        update: &mut kvm_sev_snp_launch_update,
    ) -> CommandResult {
        // SAFETY: the same contract.
        unsafe { firmware::snp_launch_update(update, |page| self.add_page(page)) }.map_err(refused)
    }

    unsafe fn snp_launch_finish(
        &self,
        _: BorrowedFd,
        _: BorrowedFd,
        _: &SnpFinish,
    ) -> CommandResult {
        self.ask(|firmware| firmware.finish()).map_err(refused)
    }

    unsafe fn zap(&self, _: usize, _: usize) -> io::Result<()> {
        self.call()
    }

    unsafe fn map_fixed(&self, _: usize, _: BorrowedFd, _: Range) -> io::Result<()> {
        self.call()
    }

    fn map_for_slots(&self, fd: BorrowedFd, size: u64) -> io::Result<usize> {
        self.call()?;
        // Only its address counts: nobody touches it.
        let start = Linux.map_for_slots(fd, size)?;
        let mapping = SlotMapping {
            start,
            len: size as usize,
            shared: fd.as_raw_fd(),
            hidden: BTreeSet::new(),
        };
        self.slot_mappings.lock().unwrap().push(mapping);
        Ok(start)
    }

    unsafe fn unmap(&self, host: usize, len: usize) {
        let mut mappings = self.slot_mappings.lock().unwrap();
        mappings.retain(|mapping| mapping.start != host);
        // SAFETY: the caller's promise.
        unsafe { Linux.unmap(host, len) };
    }

    unsafe fn guard(&self, host: usize, len: u64, install: bool) -> io::Result<()> {
        if !self.guard_regions.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.call()?;
        // In the order of `set_memory_attributes`.
        let pages = self.pages.lock().unwrap();
        let mut mappings = self.slot_mappings.lock().unwrap();
        let mapping = mappings
            .iter_mut()
            .find(|mapping| (mapping.start..mapping.start + mapping.len).contains(&host));
        let mapping = mapping.expect("guard regions lie in a mapping of slots");
        let offset = (host - mapping.start) as u64;
        let offsets = granules(Range::new(offset, len).unwrap());
        match install {
            true => mapping.hidden.extend(offsets),
            false => mapping.hidden.retain(|granule| !offsets.contains(granule)),
        }
        self.check_hidden(mapping, &pages.private);
        Ok(())
    }

    // KVM moves nothing: a VM of this model asks for none of it.

    unsafe fn write_protect(&self, _: usize, _: u64) -> io::Result<Blocked> {
        Err(io::Error::from_raw_os_error(libc::ENOSYS))
    }

    unsafe fn map_blocked(&self, _: usize, _: BorrowedFd, _: Range) -> io::Result<Blocked> {
        Err(io::Error::from_raw_os_error(libc::ENOSYS))
    }

    fn file(&self, _: BorrowedFd) -> io::Result<FileFacts> {
        Err(io::Error::from_raw_os_error(libc::ENOSYS))
    }

    fn sync(&self, _: BorrowedFd) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::ENOSYS))
    }

    fn evict(&self, _: BorrowedFd, _: Range) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::ENOSYS))
    }
}
