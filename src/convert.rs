//! The one conversion path: every change of side goes through [`run`].
//!
//! Order, for the pieces of a request that really change. To private: listeners
//! unmap. Both ways: free what the side that is entered may hold; switch the
//! side that is reachable (KVM zaps the translations of the side that is left,
//! the emulated agent maps over them). To shared: listeners map; before the
//! private pages are freed, so that one that refuses costs no contents. Both
//! ways: free the pages of the side that is left, publish the bits. The ranges
//! are locked throughout.
//!
//! A step that fails is undone: what was switched is switched back, and what
//! vCPUs put into the other side meanwhile is freed. Where the kernel refuses
//! even that, the state map follows the kernel and the error says how much.

use std::cell::Cell;
use std::convert::Infallible;
use std::ops::Deref;
use std::sync::atomic::Ordering;

use smallvec::SmallVec;

use crate::agent::{InitialPages, PageType};
use crate::error::{Error, Result};
use crate::listener::Demand;
use crate::range::{GRANULE, Range};
use crate::range_lock::RangeGuard;
use crate::region::Region;
use crate::request::Changed;
use crate::state::Side;
use crate::vm::{Binding, Bindings, Vm, overlapping, seen};

/// At most this many bytes in one call into the kernel, which holds its
/// memory-slot lock meanwhile.
pub(crate) const PIECE: u64 = 64 << 20;

/// At most this many pieces, and bytes, while locks are held: changes of
/// memory slots and requests for the same memory get their turn in between.
const STEP_PIECES: usize = 4096;
const STEP_BYTES: u64 = 1 << 30;

/// A vCPU that faults this often in one place, while nothing is converted,
/// does so for a reason that trying again will not remove.
const HOPELESS_FAULTS: u32 = 1000;

/// The parts of a request: as a rule there is one; more than two cost an
/// allocation.
enum Segments<'a> {
    One([Segment<'a>; 1]),
    Any(SmallVec<[Segment<'a>; 2]>),
}

impl<'a> Deref for Segments<'a> {
    type Target = [Segment<'a>];

    #[inline]
    fn deref(&self) -> &[Segment<'a>] {
        match self {
            Segments::One(only) => only,
            Segments::Any(all) => all,
        }
    }
}

/// What keeps others away from the parts of a request, for as long as it lives.
#[expect(dead_code, reason = "kept to be dropped")]
enum Guards<'a> {
    One(RangeGuard<'a>),
    Any(SmallVec<[RangeGuard<'a>; 2]>),
}

/// A part of a request: one region, contiguous on both sides.
#[derive(Clone, Copy)]
struct Segment<'a> {
    region: &'a Region,
    offsets: Range,
    /// Where the guest sees it, if it does.
    gpa: Option<Range>,
}

impl<'a> Segment<'a> {
    #[inline(always)]
    fn is_on(&self, side: Side) -> bool {
        self.first_on(side.other()).is_none()
    }

    #[inline(always)]
    fn first_on(&self, side: Side) -> Option<Range> {
        let run = self.region.state.first_on(side, self.offsets.granules());
        run.map(Range::from_granules)
    }

    #[inline(always)]
    fn part(&self, offsets: Range) -> Segment<'a> {
        let gpa = self.gpa;
        Segment {
            offsets,
            gpa: gpa.map(|gpa| offsets.rebase(self.offsets.start(), gpa.start())),
            ..*self
        }
    }

    #[inline(always)]
    fn switch(&self, to: Side) -> Result<()> {
        let vm = &self.region.vm;
        vm.switch(self.region, self.offsets, self.gpa, to)
    }

    /// Frees what the side holds that is left. Shared memory is hidden from KVM's own
    /// accesses before, which would take it again.
    #[inline(always)]
    fn leave(&self, side: Side) -> Result<()> {
        if let (Side::Shared, Some(slots)) = (side, self.region.slots()) {
            slots.hide(self.offsets)?;
        }
        self.region.punch(side, self.offsets)
    }

    #[inline(always)]
    fn clear(&self, side: Side) -> Result<()> {
        self.region.clear(side, self.offsets)
    }

    #[inline(always)]
    fn allocate(&self, side: Side) -> Result<()> {
        self.region.allocate(side, self.offsets)
    }

    /// Asks the agent, who knows memory by where the guest sees it.
    #[inline(always)]
    fn before(&self, to: Side) -> Result<()> {
        match self.gpa {
            Some(gpa) => self.region.vm.agent.before_convert(gpa, to),
            None => Ok(()),
        }
    }

    #[inline(always)]
    fn after(&self, side: Side) {
        if let Some(gpa) = self.gpa {
            self.region.vm.agent.after_convert(gpa, side);
        }
    }

    /// Whether it begins in the region where `before` ends.
    fn continues(&self, before: &Segment) -> bool {
        std::ptr::eq(self.region, before.region) && self.offsets.start() == before.offsets.end()
    }

    #[inline(always)]
    fn discard(&self) -> Result<()> {
        self.region.listeners.discard(self.offsets)
    }

    #[inline(always)]
    fn populate(&self) -> Result<()> {
        self.region.listeners.populate(self.offsets)
    }

    #[inline(always)]
    fn publish(&self, side: Side) {
        self.region.state.set(self.offsets.granules(), side);
        match side {
            Side::Private => self.region.punch_huge_pages(self.offsets),
            Side::Shared if self.region.keeps(Side::Private) => {}
            Side::Shared => self.region.forget_places(self.offsets),
        }
    }
}

impl Vm {
    /// Makes `size` bytes at guest-physical `gpa` private or shared, or as
    /// many from the start as can be done in bounded time; returns how many
    /// bytes are done. Callers repeat it for the rest.
    ///
    /// All of a range that is to become private must be bound memory. What is
    /// not is shared already, so that a request for shared passes over it: TDX
    /// guests send such requests for MMIO.
    ///
    /// Callable from any thread. Requests for overlapping memory wait for each
    /// other, about in order of arrival. Refused, with nothing changed, where it can
    /// be known that all of the range cannot be converted. On failure the range is
    /// as it was, or the error is [`Error::Undone`] and says what is not; but what
    /// calls before this one have done stays: see [`Vm::request`].
    pub fn convert(&self, gpa: u64, size: u64, to: Side) -> Result<u64> {
        let request = Range::new(gpa, size);
        request
            .and_then(|request| self.step(request, to, None))
            .inspect_err(|error| self.failed.add(gpa, size, to, error))
    }

    /// As [`Vm::convert`]; says what has changed, if another step follows.
    pub(crate) fn step(
        &self,
        request: Range,
        to: Side,
        changed: Option<&mut Changed>,
    ) -> Result<u64> {
        let bindings = self.bindings();
        let segments = resolve(&bindings, request);
        let result = check_covered(&segments, request, to)
            .and_then(|()| run(&segments, to, Maps::Now, changed));
        let end = match &result {
            Ok(Some(Segment {
                gpa: Some(rest), ..
            })) => rest.start(),
            _ => request.end(),
        };
        count(&segments, end, result.is_ok());
        result.map(|_| end - request.start())
    }

    /// Puts memory back that a request has converted; returns as much of it as is.
    pub(crate) fn step_back(&self, gpa: Range, to: Side) -> Result<Range> {
        let bindings = self.bindings();
        let segments = resolve(&bindings, gpa);
        let rest = run(&segments, to, Maps::Now, None)?;
        let rest = rest.and_then(|rest| rest.gpa);
        Ok(rest.and_then(|rest| gpa.without(&rest)[0]).unwrap_or(gpa))
    }

    /// Of memory that was put back to side `to`: how many bytes have lost their
    /// contents, and how many are still on the other side.
    pub(crate) fn undone(&self, gpa: Range, to: Side) -> (u64, u64) {
        let bindings = self.bindings();
        let segments = resolve(&bindings, gpa);
        segments.iter().fold((0, 0), |(lost, stuck), segment| {
            let runs = segment.region.runs_on(to, segment.offsets);
            let back: u64 = runs.map(|run| run.len()).sum();
            let kept = segment.region.keeps(to);
            let emptied = if kept { 0 } else { back };
            (lost + emptied, stuck + segment.offsets.len() - back)
        })
    }

    /// Gives the bytes at guest-physical `gpa` their initial contents, before
    /// the guest runs: as many as `size`, from `source`, which has as many, at
    /// a multiple of the granule; none for [`PageType::Zero`]. All of the range
    /// must be bound; what is not private becomes so first.
    ///
    /// On failure the pages before the one that the error names are done, and
    /// part of the measurement: the guest cannot be started.
    pub fn populate(
        &self,
        gpa: u64,
        size: u64,
        source: Option<&mut [u8]>,
        page_type: PageType,
    ) -> Result<()> {
        let request = Range::new(gpa, size)?;
        check_source(source.as_deref(), request, page_type)?;
        let _not_finalized = self.not_finalized()?;
        self.agent.check_populate(page_type)?;
        self.populated.store(true, Ordering::Relaxed);
        loop {
            let mut done = 0;
            while done < size {
                done += self.convert(gpa + done, size - done, Side::Private)?;
            }
            let bindings = self.bindings();
            let segments = resolve(&bindings, request);
            check_covered(&segments, request, Side::Private)?;
            let _guards = lock(&segments);
            // An operator may have been in between.
            if segments.iter().all(|s| s.is_on(Side::Private)) {
                return self.populate_segments(&segments, source, page_type);
            }
        }
    }

    fn populate_segments(
        &self,
        segments: &[Segment],
        mut source: Option<&mut [u8]>,
        page_type: PageType,
    ) -> Result<()> {
        for segment in segments {
            let Some(gpa) = segment.gpa else { continue };
            let pieces = segment.offsets.pieces(PIECE);
            for part in pieces.flat_map(|piece| segment.region.parts(Side::Private, piece)) {
                let bytes = source.as_mut().map(|rest| {
                    let len = part.offsets.len() as usize;
                    let (bytes, after) = std::mem::take(rest).split_at_mut(len);
                    *rest = after;
                    bytes
                });
                self.agent.populate(InitialPages {
                    kernel: self.kernel.as_ref(),
                    gpa: part.offsets.rebase(segment.offsets.start(), gpa.start()),
                    store: &part.store,
                    offsets: part.file,
                    source: bytes,
                    page_type,
                })?;
            }
        }
        Ok(())
    }

    /// Puts `offsets` of a region on one side, whether the guest sees them or
    /// not. Listeners give up what becomes private, but map nothing: callers see
    /// to that, see [`Listeners::remap`].
    ///
    /// [`Listeners::remap`]: crate::listener::Listeners::remap
    pub(crate) fn convert_offsets(&self, region: &Region, offsets: Range, to: Side) -> Result<()> {
        let bindings = self.bindings();
        let bound = seen(&bindings, region, offsets).map(|(offsets, gpa)| Segment {
            region,
            offsets,
            gpa: Some(gpa),
        });
        let bound: Vec<_> = bound.collect();
        while run(&bound, to, Maps::Later, None)?.is_some() {}
        // What is bound is on its side now; the rest needs no attributes.
        let all = Segment {
            region,
            offsets,
            gpa: None,
        };
        while run(&[all], to, Maps::Later, None)?.is_some() {}
        Ok(())
    }

    /// Answers `KVM_EXIT_MEMORY_FAULT` with EFAULT: a vCPU touched `size` bytes
    /// at `gpa` on side `touched`, and KVM has them on the other one. `Ok`
    /// means that the vCPU may run on and touch them again. To be called on
    /// the vCPU's own thread. (With EHWPOISON it is no fault but
    /// [`Vm::memory_failure`].)
    ///
    /// A guest that chooses a side by its access ([`Agent::chooses_side`]) asks
    /// so for a conversion, and gets it, as far as one step goes; to become
    /// private all of it must be bound. Source: api.rst, KVM_EXIT_MEMORY_FAULT.
    ///
    /// A software-protected guest does not say which side it means: KVM looks
    /// that up when the fault begins, and exits if it has changed before the
    /// fault ends. So the guest asked for nothing, and turning the memory to
    /// the side that KVM reports would undo the conversion that was in its
    /// way. Source: `kvm_mmu_faultin_pfn()` in arch/x86/kvm/mmu/mmu.c.
    ///
    /// Memory that is not bound has no private side: it is made shared, in
    /// case the end of a binding could not do so. KVM has other reasons for
    /// such an exit, which no retry removes, so that patience has an end.
    ///
    /// [`Agent::chooses_side`]: crate::agent::Agent::chooses_side
    pub fn memory_fault(&self, gpa: u64, size: u64, touched: Side) -> Result<()> {
        thread_local! {
            static LAST: Cell<(u64, u64, u32)> = const { Cell::new((0, 0, 0)) };
        }
        let fault = Range::new(gpa, size)?;
        let generation = self.generation(fault);
        let times = match LAST.get() {
            (at, seen, times) if (at, seen) == (gpa, generation) => times + 1,
            _ => 1,
        };
        LAST.set((gpa, generation, times));
        if times > HOPELESS_FAULTS {
            return Err(Error::HopelessFault { gpa });
        }
        if self.agent.chooses_side() && self.is_request(fault, touched) {
            return self.convert(gpa, size, touched).map(drop);
        }
        let bindings = self.bindings();
        match resolve(&bindings, fault).is_empty() {
            true => self.set_attributes(fault, Side::Shared),
            false => Ok(()),
        }
    }

    /// Answers a `KVM_RUN` that failed with EFAULT, but without `KVM_EXIT_MEMORY_FAULT`.
    /// `Ok` means that the vCPU may run on. To be called on the vCPU's own thread.
    ///
    /// KVM looks up whether memory is private before it looks up the page by the slot's
    /// address. Where memory becomes private in between, that address does not lead to it
    /// any more ([`Region::slot_mapping`]), which a retry finds out: `kvm_mmu_faultin_pfn()`
    /// and `kvm_handle_error_pfn()` in arch/x86/kvm/mmu/mmu.c. KVM has other reasons for
    /// EFAULT, which no retry removes, so that patience has an end.
    pub fn run_fault(&self) -> Result<()> {
        thread_local! {
            static LAST: Cell<(u64, u32)> = const { Cell::new((0, 0)) };
        }
        let bindings = self.bindings();
        let generation = bindings.iter().map(|b| b.region.requests.get()).sum();
        let times = match LAST.get() {
            (seen, times) if seen == generation => times + 1,
            _ => 1,
        };
        LAST.set((generation, times));
        match times > HOPELESS_FAULTS {
            true => Err(Error::HopelessRun),
            false => Ok(()),
        }
    }

    /// Changes with every request for the memory of `fault`, so that a fault that
    /// comes back can tell whether one may have been in its way.
    fn generation(&self, fault: Range) -> u64 {
        let bindings = self.bindings();
        let segments = resolve(&bindings, fault);
        segments.iter().map(|s| s.region.requests.get()).sum()
    }

    /// Whether a fault asks for anything that is not so already. (Another vCPU
    /// may have got it first; and a fault that comes back although nothing is
    /// left to convert must not look like progress.)
    fn is_request(&self, fault: Range, touched: Side) -> bool {
        let bindings = self.bindings();
        let segments = resolve(&bindings, fault);
        !segments.iter().all(|s| s.is_on(touched))
            || check_covered(&segments, fault, touched).is_err()
    }
}

fn check_source(source: Option<&[u8]>, request: Range, page_type: PageType) -> Result<()> {
    let expected = if page_type == PageType::Zero {
        None
    } else {
        Some(request.len())
    };
    if source.map(|bytes| bytes.len() as u64) != expected {
        let text = match expected {
            None => "pages of type ZERO have no source".to_owned(),
            Some(size) => format!("the source must have {size:#x} bytes"),
        };
        return Err(Error::InvalidArgument(text));
    }
    let address = source.map_or(0, |bytes| bytes.as_ptr() as u64);
    if !address.is_multiple_of(GRANULE) {
        let what = "address of the source";
        return Err(Error::Unaligned {
            what,
            value: address,
        });
    }
    Ok(())
}

/// The parts of `request` that are bound, in order of guest-physical address.
#[inline(always)]
fn resolve<'b>(bindings: &'b Bindings, request: Range) -> Segments<'b> {
    // Each has some of it.
    let segment = |binding: &'b Binding| {
        let gpa = binding.gpa.intersection(&request).unwrap_or(request);
        Segment {
            region: &binding.region,
            offsets: gpa.rebase(binding.gpa.start(), binding.offset),
            gpa: Some(gpa),
        }
    };
    match overlapping(bindings, request) {
        [only] => Segments::One([segment(only)]),
        all => Segments::Any(all.iter().map(segment).collect()),
    }
}

fn check_covered(segments: &[Segment], request: Range, to: Side) -> Result<()> {
    if to == Side::Shared {
        return Ok(());
    }
    let mut covered = request.start();
    for gpa in segments.iter().filter_map(|segment| segment.gpa) {
        if gpa.start() != covered {
            break;
        }
        covered = gpa.end();
    }
    if covered != request.end() {
        return Err(Error::NotPrivateCapable { gpa: covered });
    }
    Ok(())
}

/// When listeners map what becomes shared.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Maps {
    Now,
    /// The caller has them map it afterwards, all of it at once.
    Later,
}

/// Converts `segments`, as far as one step goes; returns the first piece that
/// is left for the next one. If there is one, what has changed is added to
/// `changed`; all of it is guest-physical then.
fn run<'a>(
    segments: &[Segment<'a>],
    to: Side,
    maps: Maps,
    mut changed: Option<&mut Changed>,
) -> Result<Option<Segment<'a>>> {
    let _guards = lock(segments);
    if maps == Maps::Now {
        check_listeners(segments, to)?;
    }
    let Some((step, rest)) = Step::of(segments, to, maps) else {
        return Ok(None);
    };
    match (&mut changed, rest) {
        (Some(changed), Some(_)) => changed.prepare(span(segments))?,
        _ => changed = None,
    }
    let mut done = Done::default();
    match convert(&step, &mut done) {
        Ok(()) => {
            step.each(|_, change| {
                change.publish(to);
                change.after(to);
                if let (Some(changed), Some(gpa)) = (&changed, change.gpa) {
                    changed.add(gpa);
                }
            });
            Ok(rest)
        }
        Err(cause) => Err(undo(&step, &done, cause)),
    }
}

/// From the first to the last byte of bound memory, guest-physical.
fn span(segments: &[Segment]) -> Range {
    let seen = |segment: Option<&Segment>| segment.and_then(|segment| segment.gpa);
    match (seen(segments.first()), seen(segments.last())) {
        (Some(first), Some(last)) => first.through(&last),
        // Of no binding, and so of no guest's request.
        _ => segments[0].offsets,
    }
}

/// Refuses, before anything has changed, a request that listeners would refuse
/// when a part of it is done. Other requests may still take the entries that this
/// one needs: each step is undone where it fails.
#[inline(always)]
fn check_listeners(segments: &[Segment], to: Side) -> Result<()> {
    match segments.iter().any(|s| s.region.listeners.any()) {
        true => check_some_listeners(segments, to),
        false => Ok(()),
    }
}

#[inline(never)]
fn check_some_listeners(segments: &[Segment], to: Side) -> Result<()> {
    let mut demand = Demand::default();
    join(segments.iter().copied(), |_| true).try_for_each(|whole| {
        let (region, offsets) = (whole.region, whole.offsets);
        match to {
            Side::Private => region.listeners.check_whole(offsets),
            Side::Shared => {
                let mut runs = region.runs_on(Side::Private, offsets);
                runs.try_for_each(|run| region.listeners.check_entries(run, &mut demand))
            }
        }
    })
}

/// Puts segments together that continue each other, unless `may_join` refuses the
/// offset where they meet.
fn join<'a>(
    segments: impl Iterator<Item = Segment<'a>>,
    may_join: impl Fn(u64) -> bool,
) -> impl Iterator<Item = Segment<'a>> {
    let mut segments = segments.peekable();
    std::iter::from_fn(move || {
        let mut joined = segments.next()?;
        let continues = |joined: &Segment, next: &Segment| {
            next.continues(joined) && may_join(next.offsets.start())
        };
        while let Some(next) = segments.next_if(|next| continues(&joined, next)) {
            joined.offsets = joined.offsets.through(&next.offsets);
            joined.gpa = None;
        }
        Some(joined)
    })
}

/// The pieces of a request that are not on `to` yet, in order.
#[derive(Clone)]
struct Changes<'s, 'a> {
    segments: std::slice::Iter<'s, Segment<'a>>,
    to: Side,
    /// What is left of the segment that is looked through.
    rest: Option<Segment<'a>>,
}

impl<'s, 'a> Changes<'s, 'a> {
    fn of(segments: &'s [Segment<'a>], to: Side) -> Changes<'s, 'a> {
        Changes {
            segments: segments.iter(),
            to,
            rest: None,
        }
    }

    fn is_at_end(&self) -> bool {
        self.rest.is_none() && self.segments.as_slice().is_empty()
    }

    /// [`Changes::next`], kept out of the way of those who need no second piece.
    #[inline(never)]
    fn next_of_many(&mut self) -> Option<Segment<'a>> {
        self.next()
    }
}

impl<'a> Iterator for Changes<'_, 'a> {
    type Item = Segment<'a>;

    #[inline(always)]
    fn next(&mut self) -> Option<Segment<'a>> {
        loop {
            let rest = match self.rest.take() {
                Some(rest) => rest,
                None => *self.segments.next()?,
            };
            if let Some(run) = rest.first_on(self.to.other()) {
                // Freed by one call each, all or nothing, wherever they lie.
                let piece = rest.region.places.in_one_place(run.head(PIECE));
                let [_, after] = rest.offsets.without(&piece);
                self.rest = after.map(|after| rest.part(after));
                return Some(rest.part(piece));
            }
        }
    }
}

/// The first pieces of a request that are not on `to` yet. They stay the same
/// while the request's ranges are locked, until it publishes; a piece that is
/// published changes none of those that follow. So but for the first one, and
/// most steps have no other, they are not kept but found anew for each phase: a
/// request may have as many pieces as a guest likes.
struct Step<'s, 'a> {
    to: Side,
    maps: Maps,
    pieces: usize,
    first: Segment<'a>,
    /// Begins with the second one, and goes on after the last.
    others: Changes<'s, 'a>,
}

impl<'s, 'a> Step<'s, 'a> {
    /// What of a request makes one step, and the piece after it; `None` if nothing
    /// is to be changed.
    #[inline(always)]
    fn of(
        segments: &'s [Segment<'a>],
        to: Side,
        maps: Maps,
    ) -> Option<(Step<'s, 'a>, Option<Segment<'a>>)> {
        let mut others = Changes::of(segments, to);
        let mut step = Step {
            to,
            maps,
            pieces: 1,
            first: others.next()?,
            others,
        };
        let rest = match step.others.is_at_end() {
            true => None,
            false => step.fill(),
        };
        Some((step, rest))
    }

    /// Takes as many pieces as there may be, and returns the one after them.
    fn fill(&mut self) -> Option<Segment<'a>> {
        let mut bytes = self.first.offsets.len();
        let mut last = self.first;
        self.others.clone().find(|change| {
            bytes += change.offsets.len();
            // Taking memory takes its time, as does mapping and pinning it.
            let is_slow = change.region.allocates(self.to) || change.region.listeners.any();
            let limit = if is_slow { PIECE } else { STEP_BYTES };
            let is_full = self.pieces >= STEP_PIECES || bytes > limit;
            // A listener's block is not cut, wherever its parts lie.
            let is_full = is_full && !(change.continues(&last) && is_within_block(change));
            self.pieces += usize::from(!is_full);
            last = *change;
            is_full
        })
    }

    fn pieces(&self) -> impl Iterator<Item = Segment<'a>> {
        let others = self.others.clone().take(self.pieces - 1);
        std::iter::once(self.first).chain(others)
    }

    /// What listeners are told of: the pieces, put together between two multiples
    /// of [`PIECE`], because a piece may be a part of a listener's block.
    fn stretches(&self) -> impl Iterator<Item = Segment<'a>> {
        join(self.pieces(), |offset| !offset.is_multiple_of(PIECE))
    }

    /// Calls `phase` with what listeners are told of, until it fails.
    #[inline(always)]
    fn try_each_stretch(&self, mut phase: impl FnMut(&Segment<'a>) -> Result<()>) -> Result<()> {
        match self.pieces {
            1 => phase(&self.first),
            _ => self.try_each_of_some_stretches(phase),
        }
    }

    #[inline(never)]
    fn try_each_of_some_stretches(
        &self,
        mut phase: impl FnMut(&Segment<'a>) -> Result<()>,
    ) -> Result<()> {
        let mut told = self.stretches().filter(|s| s.region.listeners.any());
        told.try_for_each(|stretch| phase(&stretch))
    }

    /// Calls `phase` with each piece and its number, until it fails.
    #[inline(always)]
    fn try_each<E>(
        &self,
        mut phase: impl FnMut(usize, &Segment<'a>) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let mut change = self.first;
        let mut others = None;
        for number in 0..self.pieces {
            if number > 0 {
                let others = others.get_or_insert_with(|| self.others.clone());
                change = others.next_of_many().unwrap_or(change);
            }
            phase(number, &change)?;
        }
        Ok(())
    }

    #[inline(always)]
    fn each(&self, mut phase: impl FnMut(usize, &Segment<'a>)) {
        let Ok(()) = self.try_each(|number, change| {
            phase(number, change);
            Ok::<(), Infallible>(())
        });
    }
}

/// Whether a listener's block may contain the start of `change`.
fn is_within_block(change: &Segment) -> bool {
    !change.offsets.start().is_multiple_of(PIECE) && change.region.listeners.any()
}

/// How many pieces of a step each phase has done.
#[derive(Default)]
struct Done {
    asked: usize,
    switched: usize,
    /// Not pieces, but stretches.
    populated: usize,
    punched: usize,
}

fn convert(step: &Step, done: &mut Done) -> Result<()> {
    let to = step.to;
    if to == Side::Private {
        step.try_each_stretch(|stretch| stretch.discard())?;
    }
    step.try_each(|_, change| {
        change.clear(to)?;
        change.allocate(to)?;
        change.before(to)?;
        done.asked += 1;
        Ok(())
    })?;
    step.try_each(|_, change| {
        change.switch(to)?;
        done.switched += 1;
        Ok(())
    })?;
    if to == Side::Shared && step.maps == Maps::Now {
        step.try_each_stretch(|stretch| {
            stretch.populate()?;
            done.populated += 1;
            Ok(())
        })?;
    }
    step.try_each(|_, change| {
        change.leave(to.other())?;
        done.punched += 1;
        Ok(())
    })
}

/// Locks all segments, region by region in one order, so that two requests
/// cannot wait for each other.
#[inline(always)]
fn lock<'a>(segments: &[Segment<'a>]) -> Guards<'a> {
    let locked = |s: &Segment<'a>| s.region.locked(s.offsets);
    if let [only] = segments {
        return Guards::One(only.region.lock.acquire(locked(only)));
    }
    let mut ordered: SmallVec<[_; 2]> = SmallVec::from_slice(segments);
    ordered.sort_by_key(|s| s.region.serial);
    let regions = ordered.chunk_by(|a, b| a.region.serial == b.region.serial);
    let guards = regions.map(|own| {
        let ranges = own.iter().map(locked).collect();
        own[0].region.lock.acquire_all(ranges)
    });
    Guards::Any(guards.collect())
}

/// Undoes what a step has done, and wraps `cause` if anything is not as it was.
#[cold]
fn undo(step: &Step, done: &Done, cause: Error) -> Error {
    let to = step.to;
    let (mut contents_lost, mut stuck, mut unmapped, mut stale) = (0, 0, 0, 0);
    // Kept: what is published below is no piece of the step any more.
    let told: Vec<_> = step
        .stretches()
        .filter(|s| s.region.listeners.any())
        .collect();
    for stretch in &told[..done.populated.min(told.len())] {
        let _ = stretch.discard();
    }
    step.each(|number, change| {
        let bytes = change.offsets.len();
        let reached = |phase: usize| number < phase;
        if reached(done.switched) && change.switch(to.other()).is_err() {
            let _ = change.leave(to.other());
            change.publish(to);
            change.after(to);
            stuck += bytes;
            return;
        }
        // What was preallocated, or a vCPU wrote, on the new side meanwhile. If
        // it cannot be freed now, the next conversion frees it before it can
        // come up.
        let _ = change.leave(to);
        if reached(done.asked) {
            change.after(to.other());
        }
        if reached(done.punched) && !change.region.keeps(to.other()) {
            contents_lost += bytes;
        }
    });
    // By the state map: a piece that is stuck is on the new side.
    for Segment {
        region, offsets, ..
    } in told
    {
        let shared = region.runs_on(Side::Shared, offsets);
        unmapped += shared.map(|run| region.listeners.restore(run)).sum::<u64>();
        let private = region.runs_on(Side::Private, offsets);
        stale += private.map(|run| region.listeners.mapped(run)).sum::<u64>();
    }
    if to == Side::Shared {
        // Only now is it known which huge pages have nothing shared.
        step.each(|_, change| change.region.punch_huge_pages(change.offsets));
    }
    Error::undone(cause, contents_lost, stuck, unmapped, stale)
}

/// Counts the request for each region of which it is done up to `end`.
fn count(segments: &[Segment], end: u64, ok: bool) {
    for (number, segment) in segments.iter().enumerate() {
        let region = segment.region;
        let open = segment.gpa.is_some_and(|gpa| gpa.end() > end);
        let mut before = segments[..number].iter();
        if before.any(|other| other.region.serial == region.serial) {
            continue;
        }
        region.requests.add_one();
        match (open, ok) {
            (true, _) => region.unfinished.fetch_add(1, Ordering::Relaxed),
            (false, false) => region.failed.fetch_add(1, Ordering::Relaxed),
            (false, true) => 0,
        };
    }
}
