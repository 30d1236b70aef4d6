//! Downstream mappers: who holds translations to shared memory and must be
//! told when it goes and comes, such as VFIO.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use smallvec::SmallVec;

use crate::convert::PIECE;
use crate::error::{Error, Result};
use crate::range::{GRANULE, Range};
use crate::state::{Side, StateMap};

/// A downstream mapper of a region's shared store.
///
/// Called with locks held, on the thread that converts or that adds or removes
/// the listener: it must do neither itself, nor wait for one that does. Ranges
/// are offsets into the region.
pub trait Listener: Send + Sync {
    /// Shared memory is about to go, all of it mapped, by `entries` calls of
    /// `populate` (0 where the listener has no [`Listener::granularity`]): on
    /// return no translation to it is left. On failure all of it is still mapped,
    /// and what was asked for is undone.
    fn discard(&self, offsets: Range, entries: u64) -> io::Result<()>;

    /// Shared memory has come, none of it mapped, and is to be mapped by one
    /// entry. On failure none of it is, and the conversion is undone.
    fn populate(&self, offsets: Range) -> io::Result<()>;

    /// For a listener that can give up entries only as a whole: bytes of one, a
    /// power of two up to 64 MiB. Blocks of so many that become shared as a whole
    /// are mapped by one entry each, and go private as a whole only; the rest is
    /// mapped granule by granule. Without, the listener is told run by run, and may
    /// have to give up any part.
    fn granularity(&self) -> Option<u64> {
        None
    }

    /// What of the region it is told of, if not of all.
    fn range(&self) -> Option<Range> {
        None
    }

    /// How many more entries there can be, if their number is limited: a request
    /// that needs more is refused before any of it is done.
    fn entries_left(&self) -> Option<EntriesLeft> {
        None
    }

    /// Tells this listener of a region from others.
    fn identity(&self) -> usize;
}

/// What is left of a limited number of entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntriesLeft {
    /// Tells this limit from others: several listeners may share one.
    pub limit: usize,
    pub entries: u64,
}

/// What a request needs of the entries of each limit.
#[derive(Default)]
pub(crate) struct Demand(SmallVec<[(EntriesLeft, u64); 2]>);

impl Demand {
    /// Adds what is needed of one limit, which is asked for what is left only once.
    fn add(&mut self, left: EntriesLeft, needed: u64) -> Result<()> {
        let at = self.0.iter().position(|(of, _)| of.limit == left.limit);
        let at = at.unwrap_or_else(|| {
            self.0.push((left, 0));
            self.0.len() - 1
        });
        let (left, sum) = &mut self.0[at];
        *sum = sum.saturating_add(needed);
        match *sum > left.entries {
            true => Err(Error::listener(io::Error::from_raw_os_error(libc::ENOSPC))),
            false => Ok(()),
        }
    }
}

/// What is mapped, in a map of its own.
const MAPPED: Side = Side::Shared;

/// A listener and what it maps. Written under the lock of what it is about.
struct Mapper {
    listener: Arc<dyn Listener>,
    /// What of the region it is told of.
    range: Range,
    mapped: StateMap,
    /// Bytes of a block, which what becomes shared at once is mapped by.
    block: Option<u64>,
    /// Which blocks are mapped by one entry each. A block changes only with all
    /// of it locked, so that who has a part of it locked may look.
    blocks: StateMap,
}

impl Mapper {
    fn new(listener: Arc<dyn Listener>, region: Range) -> Result<Mapper> {
        let block = listener.granularity();
        let is_size = |block: &u64| block.is_power_of_two() && (GRANULE..=PIECE).contains(block);
        if let Some(block) = block.filter(|block| !is_size(block)) {
            let text = format!("a listener cannot have a granularity of {block:#x} bytes");
            return Err(Error::InvalidArgument(text));
        }
        let blocks = match block {
            None | Some(GRANULE) => 0,
            Some(block) => (region.len() / block) as usize,
        };
        let range = listener.range().unwrap_or(region);
        if range.end() > region.end() {
            return Err(Error::OutsideRegion(range, region.len()));
        }
        Ok(Mapper {
            listener,
            range,
            mapped: StateMap::new(region.granules().len(), MAPPED.other())?,
            block,
            blocks: StateMap::new(blocks, MAPPED.other())?,
        })
    }

    /// The runs of `offsets` that are mapped, or that are not. (That each is
    /// changed before the next one is asked for makes no difference.)
    fn runs(&self, offsets: Range, side: Side) -> impl Iterator<Item = Range> {
        let ours = offsets.intersection(&self.range).into_iter();
        ours.flat_map(move |offsets| {
            let runs = self.mapped.runs_on(side, offsets.granules());
            runs.map(Range::from_granules)
        })
    }

    /// The numbers of the blocks that lie in `offsets` as a whole.
    fn whole_blocks(&self, offsets: Range) -> std::ops::Range<usize> {
        let block = self.block.filter(|_| !self.blocks.is_empty());
        let whole = block.and_then(|block| Some((block, offsets.narrowed(block)?)));
        whole.map_or(0..0, |(block, whole)| {
            (whole.start() / block) as usize..(whole.end() / block) as usize
        })
    }

    /// The entries that map what has become shared at once.
    fn entries(&self, offsets: Range) -> impl Iterator<Item = Range> + use<> {
        let (unit, whole) = match self.block {
            Some(block) => (block, offsets.narrowed(block)),
            None => (u64::MAX, Some(offsets)),
        };
        let [before, after] = match whole {
            Some(whole) => offsets.without(&whole),
            None => [Some(offsets), None],
        };
        let parts = [(before, GRANULE), (whole, unit), (after, GRANULE)];
        let pieces = |(part, unit): (Option<Range>, u64)| Some(part?.pieces(unit));
        parts.into_iter().filter_map(pieces).flatten()
    }

    /// How many entries map `offsets`, part of a request to become shared: as many
    /// as [`Mapper::entries`] of each part between two multiples of [`PIECE`].
    fn entries_needed(&self, offsets: Range) -> u64 {
        let Some(offsets) = offsets.intersection(&self.range) else {
            return 0;
        };
        match self.block {
            None => (offsets.end() - 1) / PIECE - offsets.start() / PIECE + 1,
            Some(block) => {
                let whole = offsets.narrowed(block).map_or(0, |whole| whole.len());
                whole / block + (offsets.len() - whole) / GRANULE
            }
        }
    }

    fn count_entries(&self, offsets: Range) -> u64 {
        let Some(block) = self.block else {
            return 0;
        };
        let blocks = self.whole_blocks(offsets);
        let whole = blocks.len() - self.blocks.count_private(blocks);
        (offsets.len() - whole as u64 * (block - GRANULE)) / GRANULE
    }

    /// Maps `offsets`, of which nothing is mapped, up to the entry that is refused.
    fn map(&self, offsets: Range) -> std::result::Result<(), (Range, io::Error)> {
        for entry in self.entries(offsets) {
            if let Err(error) = self.listener.populate(entry) {
                if let [Some(done), _] = offsets.without(&entry) {
                    self.mapped.set(done.granules(), MAPPED);
                }
                return Err((entry, error));
            }
            self.blocks.set(self.whole_blocks(entry), MAPPED);
        }
        self.mapped.set(offsets.granules(), MAPPED);
        Ok(())
    }

    /// Maps all of `offsets`, or nothing of it.
    fn populate(&self, offsets: Range) -> Result<()> {
        // What it would not give up when it became private: it would miss the
        // page that is there now.
        self.discard(offsets)?;
        let mut missing = self.runs(offsets, MAPPED.other());
        let mapped = missing.try_for_each(|run| self.map(run));
        mapped.map_err(|(_, error)| {
            let _ = self.discard(offsets);
            Error::listener(error)
        })
    }

    /// Maps as much as can be of what is not mapped; returns how many bytes are
    /// not.
    fn restore(&self, offsets: Range) -> u64 {
        let mut unmapped = 0;
        for run in self.runs(offsets, MAPPED.other()) {
            let mut rest = Some(run);
            while let Some(Err((refused, _))) = rest.map(|rest| self.map(rest)) {
                unmapped += refused.len();
                [_, rest] = run.without(&refused);
            }
        }
        unmapped
    }

    /// Gives up what of `offsets` is mapped, or as much of it as can be.
    fn discard(&self, offsets: Range) -> Result<()> {
        self.check_whole(offsets)?;
        let runs = self.runs(offsets, MAPPED);
        runs.map(|run| self.give_up(run)).fold(Ok(()), Result::and)
    }

    fn give_up(&self, run: Range) -> Result<()> {
        let entries = self.count_entries(run);
        let given_up = self.listener.discard(run, entries);
        given_up.map_err(Error::listener)?;
        self.mapped.set(run.granules(), MAPPED.other());
        self.blocks.set(self.whole_blocks(run), MAPPED.other());
        Ok(())
    }

    /// Maps all that is shared. A block that is shared as a whole, but mapped in
    /// granules, is given up first, and mapped by one entry.
    fn remap(&self, state: &StateMap) -> Result<()> {
        let shared = || {
            let runs = state.runs_on(Side::Shared, self.range.granules());
            runs.map(Range::from_granules)
        };
        for run in shared() {
            let in_granules = |number: &usize| self.blocks.side(*number) != MAPPED;
            for number in self.whole_blocks(run).filter(in_granules) {
                let block = self.block.unwrap_or(GRANULE);
                self.discard(Range::of_block(number as u64, block))?;
            }
        }
        for run in shared() {
            let mut missing = self.runs(run, MAPPED.other());
            let mapped = missing.try_for_each(|run| self.map(run));
            mapped.map_err(|(_, error)| Error::listener(error))?;
        }
        Ok(())
    }

    /// Refuses to give up a part of an entry: the rest of it may be in use.
    fn check_whole(&self, offsets: Range) -> Result<()> {
        let block = self.block.unwrap_or(GRANULE);
        for end in [offsets.start(), offsets.end()] {
            let number = (end / block) as usize;
            let cuts = !end.is_multiple_of(block) && number < self.blocks.len();
            if cuts && self.blocks.side(number) == MAPPED {
                let start = number as u64 * block;
                return Err(Error::PartOfEntry { start, size: block });
            }
        }
        Ok(())
    }
}

/// The listeners of a region, in order of registration. The list changes only
/// under the lock of the whole region, so never within a conversion.
#[derive(Default)]
pub(crate) struct Listeners {
    list: RwLock<Vec<Mapper>>,
    /// There were some: without any, conversions do not meet at `list`.
    used: AtomicBool,
}

impl Listeners {
    /// Held while listeners run: who would change the list waits for the lock
    /// of the region anyway.
    fn all(&self) -> RwLockReadGuard<'_, Vec<Mapper>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there may be any.
    pub(crate) fn any(&self) -> bool {
        self.used.load(Ordering::Relaxed)
    }

    /// Adds a listener to a region of this size and shows it the shared `runs`.
    /// Nothing is added on failure.
    pub(crate) fn add(
        &self,
        listener: Arc<dyn Listener>,
        size: Range,
        mut runs: impl Iterator<Item = Range>,
    ) -> Result<()> {
        let identity = listener.identity();
        if self.all().iter().any(|l| l.listener.identity() == identity) {
            return Err(Error::AlreadyListening);
        }
        self.used.store(true, Ordering::Relaxed);
        let mapper = Mapper::new(listener, size)?;
        runs.try_for_each(|run| mapper.populate(run))
            .inspect_err(|_| drop(mapper.discard(size)))?;
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        list.push(mapper);
        Ok(())
    }

    /// Removes a listener from a region of this size, after taking from it what
    /// it maps. It is gone even if it fails to give that up.
    pub(crate) fn remove(&self, identity: usize, size: Range) -> Result<()> {
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        let at = list.iter().position(|l| l.listener.identity() == identity);
        let mapper = list.remove(at.ok_or(Error::NoSuchListener)?);
        drop(list);
        mapper.discard(size)
    }

    /// Forgets all listeners, after taking from them what they map.
    pub(crate) fn clear(&self, size: Range) {
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        for mapper in list.drain(..) {
            let _ = mapper.discard(size);
        }
    }

    /// All listeners give up `offsets`. On failure some of it may be given up, see
    /// [`Listeners::restore`].
    #[inline(always)]
    pub(crate) fn discard(&self, offsets: Range) -> Result<()> {
        match self.any() {
            true => self.discard_for_all(offsets),
            false => Ok(()),
        }
    }

    #[inline(never)]
    fn discard_for_all(&self, offsets: Range) -> Result<()> {
        let all = self.all();
        all.iter().try_for_each(|mapper| mapper.discard(offsets))
    }

    /// All listeners map `offsets`, or none does.
    #[inline(always)]
    pub(crate) fn populate(&self, offsets: Range) -> Result<()> {
        match self.any() {
            true => self.populate_for_all(offsets),
            false => Ok(()),
        }
    }

    #[inline(never)]
    fn populate_for_all(&self, offsets: Range) -> Result<()> {
        let all = self.all();
        for (done, mapper) in all.iter().enumerate() {
            mapper.populate(offsets).inspect_err(|_| {
                for mapper in &all[..done] {
                    let _ = mapper.discard(offsets);
                }
            })?;
        }
        Ok(())
    }

    /// Has what of `offsets` was given up mapped again; returns how many bytes
    /// one of the listeners does not map.
    pub(crate) fn restore(&self, offsets: Range) -> u64 {
        if !self.any() {
            return 0;
        }
        let unmapped = self
            .all()
            .iter()
            .map(|mapper| mapper.restore(offsets))
            .max();
        unmapped.unwrap_or(0)
    }

    /// All listeners map what is shared; those with blocks by as few entries as if
    /// they were added now. Goes on with the next listener where one fails.
    pub(crate) fn remap(&self, state: &StateMap) -> Result<()> {
        if !self.any() {
            return Ok(());
        }
        let all = self.all();
        let mapped = all.iter().map(|mapper| mapper.remap(state));
        mapped.fold(Ok(()), Result::and)
    }

    /// Refuses a request to make `offsets` private that takes a part of an entry.
    pub(crate) fn check_whole(&self, offsets: Range) -> Result<()> {
        let all = self.all();
        all.iter()
            .try_for_each(|mapper| mapper.check_whole(offsets))
    }

    /// Refuses a request to share `offsets`, a run of private memory, for which not
    /// enough entries are left; `demand` is what the request needs in all.
    pub(crate) fn check_entries(&self, offsets: Range, demand: &mut Demand) -> Result<()> {
        self.all().iter().try_for_each(|mapper| {
            let left = mapper.listener.entries_left();
            left.map_or(Ok(()), |left| {
                demand.add(left, mapper.entries_needed(offsets))
            })
        })
    }

    /// How many bytes of `offsets` are not mapped by one of the listeners that is
    /// told of them.
    pub(crate) fn unmapped(&self, offsets: Range) -> u64 {
        if !self.any() {
            return 0;
        }
        let missing = |mapper: &Mapper| {
            let runs = mapper.runs(offsets, MAPPED.other());
            runs.map(|run| run.len()).sum()
        };
        self.all().iter().map(missing).max().unwrap_or(0)
    }

    /// How many bytes of `offsets` one of the listeners maps.
    pub(crate) fn mapped(&self, offsets: Range) -> u64 {
        if !self.any() {
            return 0;
        }
        let mapped = |mapper: &Mapper| mapper.runs(offsets, MAPPED).map(|run| run.len()).sum();
        self.all().iter().map(mapped).max().unwrap_or(0)
    }
}
