//! Memory that the host has lost: an uncorrected error in a page of one of the
//! stores, as `KVM_RUN` tells it (EHWPOISON) for the private one and SIGBUS for
//! the shared one.
//!
//! The page is retired: who maps it unmaps it, its store gives it up (the
//! kernel never hands such a page out again), and a new one comes in its place
//! at the next access, zeroed. So the guest must be told before it runs on, or
//! must not run on: this module says what of it is lost, the VMM delivers the
//! machine check.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::range::{GRANULE, Range};
use crate::region::Region;
use crate::state::Side;
use crate::vm::{Bindings, Vm, overlapping, seen};

/// How many failures of a region are remembered; older ones are only counted.
pub const REMEMBERED: usize = 16;

/// A page that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    pub side: Side,
    /// The page, in offsets into the region: a granule, or a huge page of the
    /// shared store.
    pub page: Range,
    /// Bytes of the guest's that are gone: none where the report came late; of a
    /// huge page only what was shared.
    pub lost: u64,
    /// Guest-physical address of the first of them, if the guest sees them.
    pub gpa: Option<u64>,
    /// Bytes that a downstream listener would not map again when the page was
    /// retired: devices do not reach them until they have changed side.
    pub unmapped: u64,
}

/// The last failures of a region, the latest first, and how many there were.
#[derive(Default)]
pub(crate) struct Failures {
    count: AtomicU64,
    last: Mutex<VecDeque<Failure>>,
}

impl Failures {
    fn last(&self) -> MutexGuard<'_, VecDeque<Failure>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, failure: Failure) {
        self.count.fetch_add(1, Ordering::Relaxed);
        let mut last = self.last();
        last.truncate(REMEMBERED - 1);
        last.push_front(failure);
    }

    fn has(&self, side: Side, page: Range) -> bool {
        let is_it = |failure: &Failure| (failure.side, failure.page) == (side, page);
        self.last().iter().any(is_it)
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

impl Region {
    /// The host has lost the page of `side` that holds the byte at `offset`:
    /// says what the guest loses with it, and retires the page if `retire`.
    /// Without, the page stays as it is for now: for who must stop the guest
    /// first, as it cannot be told. Any thread; waits for conversions of the
    /// page.
    ///
    /// Nothing is lost where the memory has changed side since, or where the
    /// store holds no page: that report comes late. But a failure that two
    /// vCPUs have met is reported by both, and lost for both, so that neither
    /// takes the zeroes for what it had: the page is retired twice then, and
    /// what came in its place meanwhile is lost, too.
    ///
    /// On failure the guest must not run on. Either the store would not give
    /// the page up: it stays where it is, so that who touches it fails again,
    /// and listeners do not map it ([`Error::NotRetired`]). Or there is no
    /// memory to take in its place, where that is to be taken beforehand.
    pub fn memory_failure(&self, offset: u64, side: Side, retire: bool) -> Result<Failure> {
        let bindings = self.vm.bindings();
        self.fail(&bindings, offset, side, retire)
    }

    /// The last failures, at most [`REMEMBERED`], the latest first.
    pub fn failures(&self) -> Vec<Failure> {
        self.failures.last().iter().copied().collect()
    }

    fn fail(&self, bindings: &Bindings, offset: u64, side: Side, retire: bool) -> Result<Failure> {
        let unit = match side {
            Side::Shared => self.options.huge_page.unwrap_or(GRANULE),
            Side::Private => GRANULE,
        };
        let page = self.range(offset & !(unit - 1), unit)?;
        let _held = self.lock.acquire(self.locked(page));
        let mut failure = self.lost(bindings, side, page);
        if failure.lost == 0 {
            self.give_up(side, page)?;
        } else if retire {
            self.retire(bindings, &mut failure)?;
        }
        Ok(failure)
    }

    /// What goes with the page.
    fn lost(&self, bindings: &Bindings, side: Side, page: Range) -> Failure {
        // What lies on a disk may not be in memory at the moment.
        let is_there = self
            .parts(side, page)
            .any(|part| !part.is_in_memory() || part.store.held(part.file) != Some(0));
        let mut failure = Failure {
            side,
            page,
            lost: 0,
            gpa: None,
            unmapped: 0,
        };
        if is_there || self.failures.has(side, page) {
            failure.lost = self.runs_on(side, page).map(|run| run.len()).sum();
            let mut seen = self.seen_on(bindings, side, page);
            failure.gpa = seen.next().map(|gpa| gpa.start());
        }
        failure
    }

    fn retire(&self, bindings: &Bindings, failure: &mut Failure) -> Result<()> {
        let Failure { side, page, .. } = *failure;
        let lost = || self.runs_on(side, page);
        let not_retired = |cause| self.not_retired(page, cause);
        self.announce(bindings, side, page).map_err(not_retired)?;
        self.give_up(side, page)?;
        let replaced = lost().try_for_each(|run| self.allocate(side, run));
        if side == Side::Shared {
            let refused = lost().filter(|run| self.listeners.populate(*run).is_err());
            failure.unmapped = refused.map(|run| run.len()).sum();
        }
        self.failures.record(*failure);
        for gpa in self.seen_on(bindings, side, page) {
            self.vm.agent.memory_failure(gpa, side);
        }
        replaced
    }

    /// Lets the VMM's mapping forget that `page` failed, and frees it, wherever it
    /// lies. (The kernel leaves a mark in mappings, which outlives the page:
    /// `HWPOISON` entries in `zap_nonpresent_ptes()`, mm/memory.c. Whoever touches
    /// the page in between still finds it failed, without such a mark.)
    fn give_up(&self, side: Side, page: Range) -> Result<()> {
        let freed = || {
            if side == Side::Shared || self.vm.is_open() {
                self.vm.unmap(self, page)?;
            }
            if side == Side::Private {
                self.send_home(page)?;
            }
            self.free(side, page)
        };
        freed().map_err(|cause| self.not_retired(page, cause))
    }

    fn not_retired(&self, page: Range, cause: Error) -> Error {
        Error::NotRetired {
            page,
            name: self.name.clone(),
            cause: Box::new(cause),
        }
    }

    /// Where the guest sees what of `offsets` is on `side`.
    pub(crate) fn seen_on<'a>(
        &'a self,
        bindings: &'a Bindings,
        side: Side,
        offsets: Range,
    ) -> impl Iterator<Item = Range> {
        seen(bindings, self, offsets).flat_map(move |(part, gpa)| {
            self.runs_on(side, part)
                .map(move |run| run.rebase(part.start(), gpa.start()))
        })
    }
}

impl Vm {
    /// As [`Region::memory_failure`], for the page that the guest sees at
    /// `gpa`. `side` is that of the access that failed: for
    /// `KVM_EXIT_MEMORY_FAULT` with EHWPOISON what its flags say.
    pub fn memory_failure(&self, gpa: u64, side: Side, retire: bool) -> Result<Failure> {
        let at = Range::new(gpa & !(GRANULE - 1), GRANULE)?;
        let bindings = self.bindings();
        let binding = overlapping(&bindings, at).first();
        let binding = binding.ok_or(Error::NotBound(at))?;
        let offset = at.rebase(binding.gpa.start(), binding.offset).start();
        binding.region.fail(&bindings, offset, side, retire)
    }
}
