//! One memory backend: its stores, its state map, its range lock, its counters.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::convert::PIECE;
use crate::counter::Counter;
use crate::error::{Error, Result};
use crate::failure::Failures;
use crate::kernel::NumaPolicy;
use crate::listener::{Listener, Listeners};
use crate::places::{Part, Places};
use crate::range::{GRANULE, Range};
use crate::range_lock::RangeLock;
use crate::slot_mapping::SlotMapping;
use crate::state::{Run, Side, StateMap};
use crate::store::Store;
use crate::vm::{Switch, Vm};

/// What a region is made with; by default all shared, in pages of the host's
/// size, with memory held for one side only.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Where all of the region is at first, and after [`Region::reset`].
    pub initial: Side,
    /// Whether a store keeps its pages when the memory goes to the other side,
    /// contents included. Costs memory twice, and saves taking it anew.
    pub keep_private: bool,
    pub keep_shared: bool,
    /// Bytes of a huge page (hugetlbfs) of the shared store; a huge page is
    /// given back once all of it is private.
    pub huge_page: Option<u64>,
    /// Whether what has become private is mapped for the guest before it is
    /// touched, see [`Vm::prefault`].
    pub prefault: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            initial: Side::Shared,
            keep_private: false,
            keep_shared: false,
            huge_page: None,
            prefault: false,
        }
    }
}

/// Private-capable guest memory of fixed size.
pub struct Region {
    pub(crate) vm: Arc<Vm>,
    /// Orders regions, so that a request over several locks them in one order.
    pub(crate) serial: u64,
    pub(crate) name: String,
    pub(crate) size: Range,
    pub(crate) options: Options,
    pub(crate) state: StateMap,
    shared: Arc<Store>,
    private: Arc<Store>,
    /// Where private contents lie that are not at home in the private store.
    pub(crate) places: Places,
    host: OnceLock<usize>,
    /// Made by [`Region::slot_mapping`].
    slots: OnceLock<SlotMapping>,
    /// Set by [`Region::preallocate`], for good.
    pub(crate) preallocated: AtomicBool,
    /// Set by [`Region::set_numa_policy`], for good.
    pub(crate) policy: OnceLock<NumaPolicy>,
    pub(crate) lock: RangeLock,
    pub(crate) listeners: Listeners,
    /// Requests that touched this region, and of these those that failed and
    /// those that wait to be called again: one counter to raise for the others.
    pub(crate) requests: Counter,
    pub(crate) failed: AtomicU64,
    pub(crate) unfinished: AtomicU64,
    pub(crate) failures: Failures,
    counts: Mutex<Counts>,
}

/// Bytes of a region whose pages are counted at once, and about how long a caller
/// counts.
const COUNTED: u64 = 1 << 30;
const COUNTING_TIME: Duration = Duration::from_millis(50);

/// What was counted of each part of a region, and when.
#[derive(Default)]
struct Counts {
    parts: Vec<Option<(Instant, Counted)>>,
    /// The part that was counted longest ago.
    next: usize,
}

/// Bytes held of a part of a region; `None` where the kernel cannot tell.
#[derive(Clone, Copy)]
struct Counted {
    /// By a `guest_memfd`, and where private contents were moved to.
    private: Option<u64>,
    /// By a store for granules that are on the other side.
    twice: Option<u64>,
}

/// What [`Region::info`] tells. All sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    pub size: u64,
    /// By the state map; `private + shared == size`.
    pub private: u64,
    pub shared: u64,
    /// Really held by each store, as the kernel counts; `None` where it cannot tell.
    pub private_held: Option<u64>,
    pub shared_held: Option<u64>,
    /// Held by a store for granules that are on the other side.
    pub held_twice: Option<u64>,
    /// How old the oldest part of `private_held` and `held_twice` is, which are not
    /// known before all has been counted once.
    pub held_age: Option<Duration>,
    /// Private contents, kept ones included, that lie elsewhere than in the
    /// private store, and of these on a disk.
    pub relocated: u64,
    pub swapped: u64,
    /// Requests that touched this region and succeeded, or failed.
    pub conversions: u64,
    pub failed_conversions: u64,
    /// Pages that the host lost and that were retired, see
    /// [`Region::failures`].
    pub memory_failures: u64,
}

fn check_huge_page(options: Options, size: u64, vm: &Vm) -> Result<()> {
    let Some(unit) = options.huge_page else {
        return Ok(());
    };
    let refused = |text| Err(Error::InvalidArgument(text));
    if !unit.is_power_of_two() || unit <= GRANULE {
        return refused(format!("{unit:#x} bytes is not the size of a huge page"));
    }
    if !size.is_multiple_of(unit) {
        return refused(format!(
            "the size {size:#x} is not a multiple of the huge page of {unit:#x} bytes"
        ));
    }
    if vm.is_open() {
        let text =
            "the emulated agent maps pages of 4096 bytes, which cannot be done within huge pages";
        return refused(text.to_owned());
    }
    Ok(())
}

impl Region {
    /// A region of `size` bytes for `vm`. `name` appears in messages and in
    /// /proc/PID/fd.
    pub fn new(vm: &Arc<Vm>, name: &str, size: u64) -> Result<Arc<Region>> {
        Region::with_options(vm, name, size, Options::default())
    }

    /// As [`Region::new`], with options.
    pub fn with_options(
        vm: &Arc<Vm>,
        name: &str,
        size: u64,
        options: Options,
    ) -> Result<Arc<Region>> {
        let range = Range::new(0, size).map_err(|e| match e {
            Error::Empty { .. } => Error::InvalidArgument("the size must not be 0".into()),
            other => other,
        })?;
        check_huge_page(options, size, vm)?;
        vm.check_prefault(options)?;
        let kernel = &vm.kernel;
        let shared = Store::memfd(kernel, &format!("{name}-shared"), size, options.huge_page)?;
        let private = match vm.switch {
            Switch::Kvm(fd) => Store::guest_memfd(kernel, fd, size)?,
            Switch::Mapping => Store::memfd(kernel, &format!("{name}-private"), size, None)?,
        };
        Ok(Arc::new(Region {
            vm: vm.clone(),
            serial: vm.next_serial(),
            name: name.to_owned(),
            size: range,
            options,
            state: StateMap::new(range.granules().len(), options.initial)?,
            shared: Arc::new(shared),
            private: Arc::new(private),
            places: Places::default(),
            host: OnceLock::new(),
            slots: OnceLock::new(),
            preallocated: AtomicBool::new(false),
            policy: OnceLock::new(),
            lock: RangeLock::new(options.huge_page.unwrap_or(GRANULE)),
            listeners: Listeners::default(),
            requests: Counter::default(),
            failed: AtomicU64::default(),
            unfinished: AtomicU64::default(),
            failures: Failures::default(),
            counts: Mutex::default(),
        }))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn size(&self) -> u64 {
        self.size.len()
    }

    /// The store of a side. (For what was moved, private contents lie elsewhere:
    /// see [`Vm::relocate`].)
    pub fn store(&self, side: Side) -> &Store {
        self.own_store(side)
    }

    pub(crate) fn own_store(&self, side: Side) -> &Arc<Store> {
        match side {
            Side::Shared => &self.shared,
            Side::Private => &self.private,
        }
    }

    /// The checked range of `size` bytes at `offset`, if the region has it.
    pub(crate) fn range(&self, offset: u64, size: u64) -> Result<Range> {
        let range = Range::new(offset, size)?;
        if range.end() > self.size() {
            return Err(Error::OutsideRegion(range, self.size()));
        }
        Ok(range)
    }

    /// Tells where the VMM has mapped the shared store. The emulated agent
    /// maps the visible store there, per range; others only remember it.
    ///
    /// # Safety
    /// The mapping has the region's size, belongs to the caller and outlives
    /// every conversion of this region.
    pub unsafe fn set_host_mapping(&self, host: usize) -> Result<()> {
        let _held = self.lock.acquire(self.size);
        let late = || Error::MappingTooLate(self.name.clone());
        let initial = self.options.initial;
        if self.runs_on(initial.other(), self.size).next().is_some() {
            return Err(late());
        }
        self.host.set(host).map_err(|_| late())?;
        match initial {
            Side::Shared => Ok(()),
            Side::Private => self.vm.switch(self, self.size, None, initial),
        }
    }

    pub(crate) fn host_mapping(&self) -> Option<usize> {
        self.host.get().copied()
    }

    /// The address of the shared store for KVM's memory slots (`userspace_addr` of offset
    /// 0): a mapping that is not the VMM's own, without what is private, so that KVM's own
    /// accesses to private memory take no shared memory for it. It is made by the first
    /// call, and lives as long as the region; only KVM may access it.
    ///
    /// From then on a vCPU's access to shared memory that becomes private meanwhile can make
    /// KVM_RUN fail with EFAULT, see [`Vm::run_fault`].
    ///
    /// [`Error::NoGuardRegions`] where the kernel cannot do that: slots take the address of
    /// the VMM's mapping then, and KVM's accesses can make memory be held twice.
    pub fn slot_mapping(&self) -> Result<usize> {
        if self.options.huge_page.is_some() || self.vm.is_open() {
            return Err(Error::NoGuardRegions);
        }
        let _held = self.lock.acquire(self.size);
        if let Some(slots) = self.slots.get() {
            return Ok(slots.address());
        }
        let slots = SlotMapping::new(&self.vm.kernel, &self.shared, self.size())?;
        self.runs_on(Side::Private, self.size)
            .try_for_each(|run| slots.hide(run))?;
        Ok(self.slots.get_or_init(|| slots).address())
    }

    pub(crate) fn slots(&self) -> Option<&SlotMapping> {
        self.slots.get()
    }

    /// The runs of `size` bytes at `offset`, in order.
    pub fn runs(&self, offset: u64, size: u64) -> Result<impl Iterator<Item = Run>> {
        Ok(self.state.runs(self.range(offset, size)?.granules()))
    }

    /// Whether the host may touch the byte at `offset` through its mapping of
    /// the shared store, and for how many of `len` bytes that holds. What is
    /// private is out of reach, and touching it would only allocate a second
    /// page; the emulated agent shows everything. Takes no lock; bytes beyond
    /// the region count as reachable, as they are not this region's.
    pub fn host_access(&self, offset: u64, len: u64) -> (bool, u64) {
        let end = offset.saturating_add(len).min(self.size());
        if self.vm.is_open() || offset >= end {
            return (true, len);
        }
        let granules = (offset / GRANULE) as usize..end.div_ceil(GRANULE) as usize;
        let Some(run) = self.state.runs(granules).next() else {
            return (true, len);
        };
        let run_end = (run.granules.end as u64 * GRANULE).min(end);
        (run.side == Side::Shared, run_end - offset)
    }

    /// Tells `listener` of everything that is shared, and from now on of what
    /// goes and comes. Waits for conversions that run.
    pub fn add_listener(&self, listener: Arc<dyn Listener>) -> Result<()> {
        let _held = self.lock.acquire(self.size);
        let shared = self.runs_on(Side::Shared, self.size);
        self.listeners.add(listener, self.size, shared)
    }

    /// Takes everything that is shared from the listener with this identity,
    /// and forgets it, even if it fails to give that up.
    pub fn remove_listener(&self, identity: usize) -> Result<()> {
        let _held = self.lock.acquire(self.size);
        self.listeners.remove(identity, self.size)
    }

    /// As [`Region::remove_listener`], for all; before the region goes.
    pub fn remove_all_listeners(&self) {
        let _held = self.lock.acquire(self.size);
        self.listeners.clear(self.size);
    }

    pub(crate) fn runs_on(&self, side: Side, offsets: Range) -> impl Iterator<Item = Range> {
        let runs = self.state.runs_on(side, offsets.granules());
        runs.map(Range::from_granules)
    }

    /// Back to the initial state, without private contents. For the reset of a
    /// machine, whose vCPUs do not run meanwhile. Refused after a launch with
    /// initial contents, which nobody could give again; nothing has changed then.
    ///
    /// Whatever else fails, all that can be done is done: [`Error::Reset`] says
    /// what is not, and the machine must not run on.
    pub fn reset(self: &Arc<Region>) -> Result<()> {
        self.vm.check_reset()?;
        let initial = self.options.initial;
        if initial == Side::Private {
            // At once: a listener gives up whole entries only. What it refuses to
            // give up here, it is asked for again.
            let _held = self.lock.acquire(self.size);
            let _ = self.listeners.discard(self.size);
        }
        let _ = self.convert_all(initial);
        let emptied = self.free_private();
        // Once more, as there is more memory now.
        let converted = self.convert_all(initial);
        let _held = self.lock.acquire(self.size);
        let allocated = match initial {
            Side::Private => self.allocate(Side::Private, self.size),
            Side::Shared => Ok(()),
        };
        let mapped = self.listeners.remap(&self.state);
        let has_contents = emptied.is_err() && self.may_hold_private();
        let result = emptied.and(converted).and(allocated).and(mapped);
        result.map_err(|cause| self.partly_reset(cause, has_contents))
    }

    /// Puts all of the region on one side, as far as that succeeds.
    fn convert_all(&self, to: Side) -> Result<()> {
        let pieces = self.size.pieces(PIECE);
        let converted = pieces.map(|piece| self.vm.convert_offsets(self, piece, to));
        converted.fold(Ok(()), Result::and)
    }

    /// Frees all private contents, kept ones included, as far as that succeeds.
    fn free_private(self: &Arc<Region>) -> Result<()> {
        let bindings = self.vm.bindings();
        let _held = self.lock.acquire(self.size);
        self.invalidate(&bindings, self.size);
        let parts = self.parts(Side::Private, self.size);
        let freed = parts.map(|part| part.punch()).fold(Ok(()), Result::and);
        freed.and(self.send_home(self.size))
    }

    fn partly_reset(&self, cause: Error, has_contents: bool) -> Error {
        let initial = self.options.initial;
        let bytes = |runs: &mut dyn Iterator<Item = Range>| runs.map(|run| run.len()).sum();
        let unmapped = self.runs_on(Side::Shared, self.size);
        let stale = self.runs_on(Side::Private, self.size);
        Error::Reset {
            name: self.name.clone(),
            has_contents,
            left: bytes(&mut self.runs_on(initial.other(), self.size)),
            unmapped: unmapped.map(|run| self.listeners.unmapped(run)).sum(),
            stale: stale.map(|run| self.listeners.mapped(run)).sum(),
            cause: Box::new(cause),
        }
    }

    /// State and memory of this region. Takes no lock that a conversion takes: while
    /// conversions run, the figures are of slightly different moments.
    ///
    /// The kernel counts the pages of a `guest_memfd` one by one, 2 s for 1 TiB of
    /// them. So a call counts for about 50 ms, and takes over the rest of what the
    /// calls before it have counted: see [`Info::held_age`].
    pub fn info(&self) -> Info {
        let counted = self.count_pages();
        let private = self.state.count_private(self.size.granules()) as u64 * GRANULE;
        let [failed, unfinished] =
            [&self.failed, &self.unfinished].map(|count| count.load(Ordering::Relaxed));
        Info {
            size: self.size(),
            private,
            shared: self.size() - private,
            private_held: counted.and_then(|(_, counted)| {
                let own = self.memfd_held(Side::Private).unwrap_or(Some(0))?;
                Some(own + counted.private?)
            }),
            shared_held: self.memfd_held(Side::Shared).flatten(),
            held_twice: counted.and_then(|(_, counted)| counted.twice),
            held_age: counted.map(|(since, _)| since.elapsed()),
            relocated: self.lying_elsewhere(|_| true),
            swapped: self.lying_elsewhere(|store| !store.is_in_memory()),
            conversions: self.requests.get().saturating_sub(failed + unfinished),
            failed_conversions: failed,
            memory_failures: self.failures.count(),
        }
    }

    fn lying_elsewhere(&self, counts: impl Fn(&Store) -> bool) -> u64 {
        let parts = self.elsewhere(self.size).filter(|part| counts(&part.store));
        parts.map(|part| part.offsets.len()).sum()
    }

    /// What a region's own store holds in all, if it is a memfd: that is known without
    /// counting pages.
    fn memfd_held(&self, side: Side) -> Option<Option<u64>> {
        let is_memfd = side == Side::Shared || self.vm.is_open();
        let store = self.store(side);
        is_memfd.then(|| store.blocks().or_else(|| store.held(self.size)))
    }

    /// Whether private contents may be held: as far as is known.
    fn may_hold_private(&self) -> bool {
        let own = self.store(Side::Private).held(self.size);
        own != Some(0) || self.held_elsewhere(self.size) != Some(0)
    }

    /// Counts the pages of all parts, or as many as can be done in bounded time, the
    /// oldest figures first. Returns since when the figures are, and their sums;
    /// `None` before each part was counted once.
    fn count_pages(&self) -> Option<(Instant, Counted)> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let parts: usize = self.size.pieces(COUNTED).count();
        counts.parts.resize(parts, None);
        let begun = Instant::now();
        for _ in 0..parts {
            let part = counts.next;
            let offsets = self.size.pieces(COUNTED).nth(part)?;
            counts.parts[part] = Some((Instant::now(), self.count_part(offsets)));
            counts.next = (part + 1) % parts;
            if begun.elapsed() >= COUNTING_TIME {
                break;
            }
        }
        let all = counts.parts.iter().copied();
        let sum = |a: Option<u64>, b: Option<u64>| Some(a? + b?);
        all.reduce(|all, part| {
            let ((since, all), (at, part)) = (all?, part?);
            let counted = Counted {
                private: sum(all.private, part.private),
                twice: sum(all.twice, part.twice),
            };
            Some((since.min(at), counted))
        })?
    }

    fn count_part(&self, offsets: Range) -> Counted {
        let own = match self.vm.is_open() {
            true => Some(0),
            false => self.private.held(offsets),
        };
        Counted {
            private: own.and_then(|own| Some(own + self.held_elsewhere(offsets)?)),
            twice: self.held_twice(offsets),
        }
    }

    fn held_elsewhere(&self, offsets: Range) -> Option<u64> {
        let parts = self.elsewhere(offsets).filter(Part::is_in_memory);
        parts.map(|part| part.store.held(part.file)).sum()
    }

    /// Asks the kernel once a run: not told where a guest has made so many
    /// runs that asking would take long.
    fn held_twice(&self, offsets: Range) -> Option<u64> {
        const MANY: usize = 1 << 16;
        self.state
            .runs(offsets.granules())
            .enumerate()
            .map(|(number, run)| {
                let left = self.store(run.side.other());
                let offsets = Range::from_granules(run.granules);
                let elsewhere = || match run.side {
                    Side::Shared => self.held_elsewhere(offsets),
                    Side::Private => Some(0),
                };
                (number < MANY).then(|| Some(left.held(offsets)? + elsewhere()?))?
            })
            .sum()
    }

    /// One line that shows which parts are private; see [`StateMap::picture`].
    pub fn picture(&self, width: usize) -> String {
        self.state.picture(width)
    }
}
