//! What the stores of a region hold: taken beforehand, kept, given back, and
//! moved from side to side when a machine is loaded.

use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::panic::resume_unwind;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY;

use crate::error::{Error, Result};
use crate::kernel::NumaPolicy;
use crate::places::Part;
use crate::range::{GRANULE, Range};
use crate::region::{Options, Region};
use crate::state::{Side, StateMap};
use crate::store::Store;
use crate::vm::{Bindings, Switch, Vm, overlapping};

/// include/uapi/linux/mempolicy.h, from Linux 5.15 on; not in the libc crate.
const MPOL_PREFERRED_MANY: i32 = 5;

/// Bytes that are moved from side to side at a time.
const MOVED: u64 = 1 << 20;

/// Bytes that one thread takes at a time when preallocating.
const PREALLOCATED: u64 = 16 << 20;

/// All runs of a map, in pieces of at most `limit` bytes.
fn pieces(state: &StateMap, limit: u64) -> impl Iterator<Item = (Side, Range)> {
    state.runs(0..state.len()).flat_map(move |run| {
        let pieces = Range::from_granules(run.granules).pieces(limit);
        pieces.map(move |piece| (run.side, piece))
    })
}

impl Vm {
    pub(crate) fn check_prefault(&self, options: Options) -> Result<()> {
        let can = |vm| self.kernel.check_extension(vm, KVM_CAP_PRE_FAULT_MEMORY);
        match self.switch {
            _ if !options.prefault => Ok(()),
            Switch::Kvm(vm) if can(vm).is_ok_and(|can| can > 0) => Ok(()),
            Switch::Kvm(_) => Err(Error::CannotPrefault),
            Switch::Mapping => Err(Error::InvalidArgument(
                "with the emulated agent nothing is mapped beforehand: do without 'prefault'"
                    .into(),
            )),
        }
    }

    /// Maps for the guest what it may reach of `size` bytes at `gpa`, where the
    /// region is made so ([`Options::prefault`]), and takes pages for it. For
    /// memory that has just become private and will be used: one call for all
    /// of it costs less than the guest's faults, page by page.
    ///
    /// To be called on the thread of the vCPU whose fd is given. Ends at the
    /// first page that cannot be had, or when the vCPU is kicked: the guest's
    /// access takes what is left, so that the error may be ignored.
    pub fn prefault(&self, vcpu: BorrowedFd, gpa: u64, size: u64) -> Result<()> {
        let request = Range::new(gpa, size)?;
        // Not locked meanwhile: memory slots may change.
        let wanted: Vec<Range> = overlapping(&self.bindings(), request)
            .iter()
            .filter(|binding| binding.region.options.prefault)
            .filter_map(|binding| binding.gpa.intersection(&request))
            .collect();
        for mut left in wanted.into_iter().map(Some) {
            while let Some(gpa) = left {
                left = self
                    .kernel
                    .pre_fault(vcpu, gpa)
                    .map_err(|e| Error::kernel("KVM_PRE_FAULT_MEMORY", e))?;
            }
        }
        Ok(())
    }
}

impl Region {
    /// Takes the memory of all that there is now, with `threads` at once, and
    /// from now on that of whatever changes side, before it does: a conversion
    /// for which there is no memory fails, instead of the guest's access.
    pub fn preallocate(&self, threads: NonZeroUsize) -> Result<()> {
        self.preallocated.store(true, Ordering::Relaxed);
        self.allocate_all(threads)
    }

    fn allocate_all(&self, threads: NonZeroUsize) -> Result<()> {
        let _held = self.lock.acquire(self.size);
        let pieces = Mutex::new(pieces(&self.state, PREALLOCATED));
        let next = || pieces.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || {
            while let Some((side, piece)) = next() {
                self.allocate(side, piece)?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let others: Vec<_> = (1..threads.get())
                .map_while(|_| thread::Builder::new().spawn_scoped(scope, work).ok())
                .collect();
            others.into_iter().fold(work(), |result, other| {
                result.and(other.join().unwrap_or_else(|panic| resume_unwind(panic)))
            })
        })
    }

    /// Says on which NUMA nodes memory of the private store is taken, and that
    /// it is taken when memory becomes private: at the guest's access it would
    /// follow the policy of the vCPU's thread. Takes what is private already,
    /// with `threads` at once. (The policy of the shared store is that of its
    /// mapping, mbind(2), and not set here.)
    pub fn set_numa_policy(&self, mut policy: NumaPolicy, threads: NonZeroUsize) -> Result<()> {
        let nodes: u32 = policy.nodes.iter().map(|word| word.count_ones()).sum();
        if policy.mode == libc::MPOL_PREFERRED && nodes > 1 {
            // The older mode takes the first of the nodes only.
            policy.mode = MPOL_PREFERRED_MANY;
        }
        self.store(Side::Private)
            .under_policy(Some(&policy), || Ok(()))?;
        let late = |_| Error::PolicySetAlready(self.name.clone());
        self.policy.set(policy).map_err(late)?;
        self.allocate_all(threads)
    }

    /// Takes the memory of `offsets` on `side`, if that is wanted.
    #[inline(always)]
    pub(crate) fn allocate(&self, side: Side, offsets: Range) -> Result<()> {
        match self.allocates(side) {
            true => self.take_all(side, offsets),
            false => Ok(()),
        }
    }

    #[cold]
    fn take_all(&self, side: Side, offsets: Range) -> Result<()> {
        let mut parts = self.parts(side, offsets);
        parts.try_for_each(|part| self.take(&part))
    }

    /// Takes the memory of a part; a file of the caller's has its own policy.
    pub(crate) fn take(&self, part: &Part) -> Result<()> {
        let policy = self.policy.get().filter(|_| part.store.is_own());
        part.store.allocate(part.file, policy)
    }

    /// Whether memory that comes to `side` is taken at once.
    pub(crate) fn allocates(&self, side: Side) -> bool {
        let placed = side == Side::Private && self.policy.get().is_some();
        self.preallocated.load(Ordering::Relaxed) || placed
    }

    pub(crate) fn keeps(&self, side: Side) -> bool {
        match side {
            Side::Private => self.options.keep_private,
            Side::Shared => self.options.keep_shared,
        }
    }

    /// Frees what `side` holds of `offsets`, unless it is to be kept.
    #[inline(always)]
    pub(crate) fn punch(&self, side: Side, offsets: Range) -> Result<()> {
        match self.keeps(side) {
            true => Ok(()),
            false => self.free(side, offsets),
        }
    }

    /// As [`Region::punch`], for the side that is entered: as a rule it holds
    /// nothing, which the kernel says in a fraction of the time that it takes to
    /// free nothing.
    #[inline(always)]
    pub(crate) fn clear(&self, side: Side, offsets: Range) -> Result<()> {
        match self.keeps(side) {
            true => Ok(()),
            false => self.try_each_place(side, offsets, |store, offsets| store.clear(offsets)),
        }
    }

    /// Frees what `side` holds of `offsets`, wherever it lies.
    #[inline(always)]
    pub(crate) fn free(&self, side: Side, offsets: Range) -> Result<()> {
        self.try_each_place(side, offsets, |store, offsets| store.punch(offsets))
    }

    /// Calls `work` for each place where `side` has any of `offsets`.
    #[inline(always)]
    fn try_each_place(
        &self,
        side: Side,
        offsets: Range,
        work: impl Fn(&Store, Range) -> Result<()>,
    ) -> Result<()> {
        if side == Side::Shared || !self.places.are_used() {
            return work(self.own_store(side), offsets);
        }
        self.try_each_of_some_places(side, offsets, work)
    }

    #[cold]
    fn try_each_of_some_places(
        &self,
        side: Side,
        offsets: Range,
        work: impl Fn(&Store, Range) -> Result<()>,
    ) -> Result<()> {
        let mut placed = self.placed(side, offsets);
        placed.try_for_each(|(offsets, place)| match place {
            None => work(self.own_store(side), offsets),
            Some(part) => work(&part.store, part.file),
        })
    }

    /// Frees the memory of `size` bytes at `offset`, on whichever side they
    /// are; they read zero from now on. For a balloon.
    pub fn discard(self: &Arc<Region>, offset: u64, size: u64) -> Result<()> {
        let offsets = self.range(offset, size)?;
        let bindings = self.vm.bindings();
        let _held = self.lock.acquire(self.locked(offsets));
        for side in [Side::Shared, Side::Private] {
            self.announce(&bindings, side, offsets).inspect_err(|_| {
                for run in self.runs_on(Side::Shared, offsets) {
                    self.listeners.restore(run);
                }
            })?;
        }
        let free = |side| self.free(side, offsets);
        let freed = self.send_home(offsets);
        let freed = freed
            .and_then(|()| free(Side::Private))
            .and(free(Side::Shared));
        let mapped = self
            .runs_on(Side::Shared, offsets)
            .map(|run| self.listeners.populate(run))
            .fold(Ok(()), Result::and);
        freed.and(mapped)
    }

    /// Frees what the shared store holds of `offsets` where they are private.
    /// What cannot be freed is only held twice.
    pub(crate) fn free_sources(&self, offsets: Range) {
        let _held = self.lock.acquire(self.locked(offsets));
        for run in self.runs_on(Side::Private, offsets) {
            let _ = self.punch(Side::Shared, run);
            self.punch_huge_pages(run);
        }
    }

    /// What a conversion of `offsets` must lock: huge pages are given back
    /// whole.
    pub(crate) fn locked(&self, offsets: Range) -> Range {
        offsets.widened(self.options.huge_page.unwrap_or(GRANULE))
    }

    /// Gives back the huge pages at the ends of `offsets` of which nothing is
    /// shared any more. (Those in between went when `offsets` was punched.)
    #[inline(always)]
    pub(crate) fn punch_huge_pages(&self, offsets: Range) {
        if let Some(unit) = self.options.huge_page {
            self.punch_ends(offsets, unit);
        }
    }

    #[cold]
    fn punch_ends(&self, offsets: Range, unit: u64) {
        let [first, last] = [offsets.first(), offsets.last()].map(|end| end.widened(unit));
        for page in [Some(first), (last != first).then_some(last)]
            .into_iter()
            .flatten()
        {
            let private = self.state.count_private(page.granules());
            if private == page.granules().len() {
                // One that is not freed now is in use again when any of it is
                // shared.
                let _ = self.punch(Side::Shared, page);
            }
        }
    }

    /// Tells whoever maps what is on `side` of `offsets` that it goes.
    pub(crate) fn announce(&self, bindings: &Bindings, side: Side, offsets: Range) -> Result<()> {
        match side {
            Side::Shared => self.listeners.discard(offsets),
            Side::Private => {
                self.invalidate(bindings, offsets);
                Ok(())
            }
        }
    }

    /// Tells the agent of what goes of `offsets` that is private, where the
    /// guest sees it.
    pub(crate) fn invalidate(&self, bindings: &Bindings, offsets: Range) {
        self.seen_on(bindings, Side::Private, offsets)
            .for_each(|gpa| self.vm.agent.invalidate(gpa));
    }

    /// The state map as bytes: one bit a granule, from the lowest bit of the
    /// first byte, set where it is private. For a saved machine, whose vCPUs do
    /// not run.
    pub fn save_state(&self) -> Vec<u8> {
        self.state.to_bytes()
    }

    /// Puts all memory on the side that [`Region::save_state`] told, contents
    /// included. For a machine that was loaded, whose vCPUs do not run. Only
    /// the emulated agent can: nobody else gives contents out.
    pub fn load_state(&self, bytes: &[u8]) -> Result<()> {
        if !self.vm.is_open() {
            return Err(Error::CannotLoad(self.name.clone()));
        }
        let wanted = StateMap::from_bytes(self.state.len(), bytes)?;
        // Listeners give up everything, and map anew what is shared in the end: by
        // the entries that they had may be neither the old state nor the new one.
        {
            let _held = self.lock.acquire(self.size);
            self.listeners
                .discard(self.size)
                .inspect_err(|_| drop(self.listeners.remap(&self.state)))?;
        }
        let loaded = self.load_contents(&wanted);
        let _held = self.lock.acquire(self.size);
        loaded.and(self.listeners.remap(&self.state))
    }

    fn load_contents(&self, wanted: &StateMap) -> Result<()> {
        let mut contents = Vec::new();
        for (to, piece) in pieces(wanted, MOVED) {
            let changes: Vec<_> = self.runs_on(to.other(), piece).collect();
            for offsets in changes {
                contents.resize(offsets.len() as usize, 0);
                self.read(to.other(), offsets, &mut contents)?;
                self.vm.convert_offsets(self, offsets, to)?;
                match contents.iter().any(|byte| *byte != 0) {
                    true => self.write(to, offsets, &contents)?,
                    // The store may have kept other contents, which must not come up. A region
                    // that preallocates holds memory for zeroes, too.
                    false => {
                        self.free(to, offsets)?;
                        self.allocate(to, offsets)?;
                    }
                }
            }
        }
        Ok(())
    }
}
