//! The one conversion path: every change of side goes through [`Vm::convert`].
//!
//! Order, for all runs of a request that really change: switch the side that
//! is reachable (KVM zaps the translations of the side that is left, the
//! emulated agent maps over them), free the pages of the side that is left,
//! publish the bits. The request's ranges are locked throughout.
//!
//! A step that fails is undone: what was switched is switched back, and what
//! vCPUs put into the other side meanwhile is freed. Where the kernel refuses
//! even that, the state map follows the kernel and the error says how much.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use crate::error::{Error, Result};
use crate::range::Range;
use crate::region::{RangeGuard, Region};
use crate::state::Side;
use crate::vm::{Binding, Vm};

/// At most this many bytes in one call into the kernel, which holds its
/// memory-slot lock meanwhile.
const CHUNK: u64 = 64 << 20;

/// A part of a request: one region, contiguous on both sides.
#[derive(Clone, Copy)]
struct Segment<'a> {
    region: &'a Region,
    offsets: Range,
    gpa: Range,
}

impl<'a> Segment<'a> {
    fn changes(self, to: Side) -> impl Iterator<Item = Segment<'a>> {
        let runs = self.region.state.runs(self.offsets.granules());
        runs.filter(move |run| run.side != to)
            .flat_map(|run| Range::from_granules(run.granules).pieces(CHUNK))
            .map(move |offsets| Segment {
                offsets,
                gpa: offsets.rebase(self.offsets.start(), self.gpa.start()),
                ..self
            })
    }

    fn switch(&self, to: Side) -> Result<()> {
        let vm = &self.region.vm;
        vm.switch(self.region, self.offsets, self.gpa, to)
    }

    fn punch(&self, side: Side) -> Result<()> {
        self.region.store(side).punch(self.offsets)
    }

    /// Frees what an undo that itself failed may have left on `side`, so that
    /// a granule that comes there reads zero.
    fn scrub(&self, side: Side) -> Result<()> {
        match self.region.leftovers.load(Ordering::Acquire) {
            true => self.punch(side),
            false => Ok(()),
        }
    }

    /// Frees `side` within an undo; what cannot be freed now is kept in mind.
    fn punch_in_undo(&self, side: Side) {
        if self.punch(side).is_err() {
            self.region.leftovers.store(true, Ordering::Release);
        }
    }

    fn publish(&self, side: Side) {
        self.region.state.set(self.offsets.granules(), side);
    }
}

impl Vm {
    /// Makes `size` bytes at guest-physical `gpa` private or shared.
    ///
    /// All of a range that is to become private must be bound memory. What is
    /// not is shared already, so that a request for shared passes over it: TDX
    /// guests send such requests for MMIO.
    ///
    /// Callable from any thread. Requests for overlapping memory wait for each
    /// other. All or nothing: on failure the range is as it was, or the error
    /// is [`Error::Undone`] and says what is not.
    pub fn convert(&self, gpa: u64, size: u64, to: Side) -> Result<()> {
        let request = Range::new(gpa, size)?;
        let bindings = self.bindings.read().unwrap_or_else(PoisonError::into_inner);
        let segments = resolve(&bindings, request);
        let result = check_covered(&segments, request, to).and_then(|()| convert(&segments, to));
        count(&segments, result.is_ok());
        result
    }

    /// Answers `KVM_EXIT_MEMORY_FAULT`: a vCPU touched `size` bytes at `gpa`
    /// as private, or as shared, and KVM has them on the other side. `Ok`
    /// means that the vCPU may run on and touch them again.
    ///
    /// A software-protected guest does not say which side it means: KVM looks
    /// that up when the fault begins, and exits if it has changed before the
    /// fault ends. So the guest asked for nothing, and turning the memory to
    /// the side that KVM reports would undo the conversion that was in its
    /// way. Source: `kvm_mmu_faultin_pfn()` in arch/x86/kvm/mmu/mmu.c.
    ///
    /// Memory that is not bound has no private side: it is made shared, in
    /// case the end of a binding could not do so.
    pub fn memory_fault(&self, gpa: u64, size: u64) -> Result<()> {
        let fault = Range::new(gpa, size)?;
        let bindings = self.bindings.read().unwrap_or_else(PoisonError::into_inner);
        match resolve(&bindings, fault).is_empty() {
            true => self.set_attributes(fault, Side::Shared),
            false => Ok(()),
        }
    }
}

/// The parts of `request` that are bound, in order of guest-physical address.
fn resolve(bindings: &BTreeMap<u64, Binding>, request: Range) -> Vec<Segment<'_>> {
    let before = bindings.range(..request.start()).next_back();
    let within = bindings.range(request.start()..request.end());
    before
        .into_iter()
        .chain(within)
        .filter_map(|(_, binding)| {
            let gpa = binding.gpa.intersection(&request)?;
            Some(Segment {
                region: &binding.region,
                offsets: gpa.rebase(binding.gpa.start(), binding.offset),
                gpa,
            })
        })
        .collect()
}

fn check_covered(segments: &[Segment], request: Range, to: Side) -> Result<()> {
    if to == Side::Shared {
        return Ok(());
    }
    let mut covered = request.start();
    for segment in segments {
        if segment.gpa.start() != covered {
            break;
        }
        covered = segment.gpa.end();
    }
    if covered != request.end() {
        return Err(Error::NotPrivateCapable { gpa: covered });
    }
    Ok(())
}

fn convert(segments: &[Segment], to: Side) -> Result<()> {
    let _guards = lock(segments);
    changes(segments, to).try_for_each(|change| change.scrub(to))?;
    for (done, change) in changes(segments, to).enumerate() {
        if let Err(cause) = change.switch(to) {
            return Err(undo(changes(segments, to).take(done), 0, to, cause));
        }
    }
    for (done, change) in changes(segments, to).enumerate() {
        if let Err(cause) = change.punch(to.other()) {
            return Err(undo(changes(segments, to), done, to, cause));
        }
    }
    changes(segments, to).for_each(|change| change.publish(to));
    Ok(())
}

/// The pieces of a request that are not on `to` yet. They stay the same while
/// the request's ranges are locked, until it publishes; a piece that is
/// published changes none of those that follow. So nothing is kept: a request
/// may have as many pieces as a guest likes.
fn changes<'a>(segments: &[Segment<'a>], to: Side) -> impl Iterator<Item = Segment<'a>> {
    segments.iter().flat_map(move |s| s.changes(to))
}

/// Locks all segments in one order, so that two requests cannot wait for each
/// other. Bindings never share a byte of a region, so no two segments overlap.
fn lock<'a>(segments: &[Segment<'a>]) -> Vec<RangeGuard<'a>> {
    let mut ordered: Vec<_> = segments.to_vec();
    ordered.sort_by_key(|s| (s.region.serial, s.offsets.start()));
    ordered
        .iter()
        .map(|s| s.region.lock.acquire(s.offsets))
        .collect()
}

/// Switches `switched` back, of which the first `punched` have lost their
/// contents, and wraps `cause` if anything is not as it was.
fn undo<'a>(
    switched: impl Iterator<Item = Segment<'a>>,
    punched: usize,
    to: Side,
    cause: Error,
) -> Error {
    let (mut contents_lost, mut stuck) = (0, 0);
    for (index, change) in switched.enumerate() {
        if change.switch(to.other()).is_ok() {
            // What a vCPU wrote on the new side meanwhile must not come up again.
            change.punch_in_undo(to);
            contents_lost += if index < punched { change.gpa.len() } else { 0 };
        } else {
            change.punch_in_undo(to.other());
            change.publish(to);
            stuck += change.gpa.len();
        }
    }
    if contents_lost == 0 && stuck == 0 {
        return cause;
    }
    let cause = Box::new(cause);
    Error::Undone {
        cause,
        contents_lost,
        stuck,
    }
}

/// Counts the request once for each region that it touches.
fn count(segments: &[Segment], ok: bool) {
    let mut serials: Vec<u64> = Vec::new();
    for segment in segments {
        let region = segment.region;
        if serials.contains(&region.serial) {
            continue;
        }
        serials.push(region.serial);
        let counter = if ok {
            &region.conversions
        } else {
            &region.failed
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
