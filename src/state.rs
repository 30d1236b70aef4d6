//! The state map: one bit per granule, set where the granule is not on the side
//! where all began, so that a new map costs nothing; and for every block of 4096
//! of them how many are set, so that who looks for what differs passes over a
//! block that has nothing of it without a look at its bits. Pure.
//!
//! Readers take no lock: a bit is loaded with `Acquire`, and a conversion
//! publishes with `Release` after the kernel has changed sides. Writers of
//! different granules may share a word, hence the atomic read-modify-write;
//! writers of the same granule are kept apart by the region's range lock.
//!
//! Writers add to a block's count and subtract from it what they change, so that
//! none undoes another's, and each granule's part in it is 0 or 1 at all times. So a
//! count of 0 or of all granules is true of every change that the reader knows to
//! be complete; within a change that still goes on, a reader may see either side,
//! as it may of the bits themselves.

use std::ops::Range;
use std::sync::atomic::Ordering;

use bitvec::field::BitField;
use bitvec::prelude::{BitSlice, BitVec, Lsb0};

use crate::error::{Error, Result};
use crate::sync::{AtomicU64, BLOCK_WORDS, zeroed_words};

/// Granules of a word of the map. (The map is not one of bitvec's types: their
/// atomic access is relaxed, and publication must not be.)
const WORD: usize = u64::BITS as usize;

/// Granules of a block: 16 MiB, whose bits fill eight cache lines.
const BLOCK: usize = BLOCK_WORDS * WORD;

/// Four counts of 16 bits share a word, so that one look passes over 64 MiB.
const LANES: usize = 4;
const LANE_BITS: usize = 16;
const LANE: u64 = (1 << LANE_BITS) - 1;

/// A word of counts of blocks that are full.
const FULL: u64 = 0x0001_0001_0001_0001 * BLOCK as u64;

/// Which store holds a granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Shared,
    Private,
}

impl Side {
    pub fn other(self) -> Side {
        match self {
            Side::Shared => Side::Private,
            Side::Private => Side::Shared,
        }
    }
}

/// Neighbouring granules on one side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub granules: Range<usize>,
    pub side: Side,
}

/// What [`StateMap::runs`] returns: sides take turns, even where another thread
/// converts meanwhile, as each step goes on from where and on which side the last
/// one ended.
pub struct Runs<'a> {
    map: &'a StateMap,
    /// Where the next run begins, ...
    at: usize,
    end: usize,
    /// ... and whether its bits are set.
    set: bool,
    /// The word that was looked at last, and what of it is left: the bits that
    /// differ from the one before.
    word: usize,
    flips: u64,
    /// Words that were scanned, and one bit for each of them that is left and has
    /// more than granules of which the bit is `scanned_for`.
    scanned: Range<usize>,
    others: u64,
    scanned_for: bool,
}

impl Runs<'_> {
    /// Where the run ends that begins at `at`.
    #[inline]
    fn run_end(&mut self) -> usize {
        if self.flips == 0 && !self.find_flips() {
            return self.end;
        }
        let granule = self.word * WORD + self.flips.trailing_zeros() as usize;
        self.flips &= self.flips - 1;
        granule.min(self.end)
    }

    /// Goes on to the next word that has more than the run has, if there is one
    /// before the end.
    fn find_flips(&mut self) -> bool {
        if self.set != self.scanned_for {
            self.scan(self.word + 1);
        }
        loop {
            while self.others != 0 {
                let word = self.scanned.start + self.others.trailing_zeros() as usize;
                self.others &= self.others - 1;
                let bits = self.map.words[word].load(Ordering::Acquire);
                self.flips = flips(bits, self.set);
                if self.flips != 0 {
                    self.word = word;
                    return true;
                }
            }
            if self.scanned.end * WORD >= self.end {
                return false;
            }
            self.scan(self.scanned.end);
        }
    }

    /// Notes which words from `word` on have more than the run has: those of a
    /// block at once, without a branch for each, which a CPU would guess wrong.
    fn scan(&mut self, word: usize) {
        let end = self.end.div_ceil(WORD);
        let start = match word.is_multiple_of(BLOCK_WORDS) {
            true => end.min(self.pass_over(word / BLOCK_WORDS) * BLOCK_WORDS),
            false => word,
        };
        let words = start..end.min((start / BLOCK_WORDS + 1) * BLOCK_WORDS);
        let same = if self.set { u64::MAX } else { 0 };
        let others = self.map.words[words.clone()].iter().enumerate();
        self.others = others.fold(0, |others, (index, word)| {
            others | u64::from(word.load(Ordering::Acquire) != same) << index
        });
        self.scanned = words;
        self.scanned_for = self.set;
    }

    /// The first block from `block` on that has more than the run has, or the
    /// first one after the end.
    fn pass_over(&self, mut block: usize) -> usize {
        let same = if self.set { FULL } else { 0 };
        let end = self.end.div_ceil(BLOCK);
        while block < end {
            if block.is_multiple_of(LANES) {
                let lanes = &self.map.counts[block / LANES..end / LANES];
                let is_same = |lanes: &&AtomicU64| lanes.load(Ordering::Acquire) == same;
                block += lanes.iter().take_while(is_same).count() * LANES;
            }
            if block < end && self.map.count(block) as u64 != same & LANE {
                break;
            }
            block += 1;
        }
        block
    }
}

impl Iterator for Runs<'_> {
    type Item = Run;

    #[inline]
    fn next(&mut self) -> Option<Run> {
        if self.at >= self.end {
            return None;
        }
        let granules = self.at..self.run_end();
        let side = match self.set {
            false => self.map.initial,
            true => self.map.initial.other(),
        };
        self.at = granules.end;
        self.set = !self.set;
        Some(Run { granules, side })
    }
}

/// The bits of a word that differ from the one before, of which the first one's
/// is `set`.
fn flips(bits: u64, set: bool) -> u64 {
    bits ^ (bits << 1 | u64::from(set))
}

/// One bit per granule, and one count per block.
pub struct StateMap {
    words: Box<[AtomicU64]>,
    /// How many granules of each block are not on the initial side.
    counts: Box<[AtomicU64]>,
    granules: usize,
    initial: Side,
}

impl StateMap {
    /// A map with all granules on one side. Fails where there is no memory for
    /// one bit a granule.
    pub fn new(granules: usize, initial: Side) -> Result<StateMap> {
        let words = zeroed_words(granules.div_ceil(WORD));
        let counts = zeroed_words(granules.div_ceil(BLOCK * LANES));
        let (words, counts) = words
            .zip(counts)
            .ok_or(Error::NoMemoryForState { granules })?;
        Ok(StateMap {
            words,
            counts,
            granules,
            initial,
        })
    }

    /// The map that [`StateMap::to_bytes`] told; fails where its length is not
    /// that of `granules`.
    pub fn from_bytes(granules: usize, bytes: &[u8]) -> Result<StateMap> {
        let map = StateMap::new(granules, Side::Shared)?;
        if bytes.len() != granules.div_ceil(8) {
            let text = format!(
                "a state of {} bytes is not that of {granules} granules",
                bytes.len()
            );
            return Err(Error::InvalidArgument(text));
        }
        let bits = &BitSlice::<u8, Lsb0>::from_slice(bytes)[..granules];
        for (index, word) in bits.chunks(WORD).enumerate() {
            let word = word.load_le::<u64>();
            map.add_to_count(index / BLOCK_WORDS, word.count_ones() as usize, true);
            map.words[index].store(word, Ordering::Relaxed);
        }
        Ok(map)
    }

    /// One bit a granule, from the lowest bit of the first byte, set where it
    /// is private.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bits = BitVec::<u8, Lsb0>::repeat(false, self.granules);
        for (index, chunk) in bits.chunks_mut(WORD).enumerate() {
            chunk.store_le(self.word(index, Side::Private));
        }
        bits.into_vec()
    }

    pub fn len(&self) -> usize {
        self.granules
    }

    pub fn is_empty(&self) -> bool {
        self.granules == 0
    }

    pub fn side(&self, granule: usize) -> Side {
        assert!(granule < self.granules);
        match self.word(granule / WORD, Side::Private) >> (granule % WORD) & 1 {
            0 => Side::Shared,
            _ => Side::Private,
        }
    }

    /// Puts `granules` on `side`, visible to readers word by word.
    #[inline(always)]
    pub fn set(&self, granules: Range<usize>, side: Side) {
        assert!(granules.end <= self.granules);
        let sets = side != self.initial;
        if let Some((index, mask)) = in_one_word(&granules) {
            let changed = self.set_in_word(index, mask, sets);
            return self.add_to_count(index / BLOCK_WORDS, changed, sets);
        }
        self.set_words(granules, sets);
    }

    #[inline(never)]
    fn set_words(&self, granules: Range<usize>, sets: bool) {
        for part in split(granules, BLOCK) {
            let block = part.start / BLOCK;
            let changed = words_of(part).map(|(index, mask)| self.set_in_word(index, mask, sets));
            self.add_to_count(block, changed.sum(), sets);
        }
    }

    /// Sets or clears bits of a word; returns how many were not so.
    #[inline]
    fn set_in_word(&self, index: usize, mask: u64, sets: bool) -> usize {
        let word = &self.words[index];
        let before = match (mask, sets) {
            (u64::MAX, _) => {
                // A whole word is the caller's alone.
                let before = word.load(Ordering::Relaxed);
                word.store(if sets { u64::MAX } else { 0 }, Ordering::Release);
                before
            }
            (_, true) => word.fetch_or(mask, Ordering::Release),
            (_, false) => word.fetch_and(!mask, Ordering::Release),
        };
        (if sets { !before } else { before } & mask).count_ones() as usize
    }

    /// The first of the runs of `granules` that are on `side`.
    #[inline]
    pub fn first_on(&self, side: Side, granules: Range<usize>) -> Option<Range<usize>> {
        assert!(granules.end <= self.granules);
        let Some((index, mask)) = in_one_word(&granules) else {
            return self.first_in_words(side, granules);
        };
        let bits = self.word(index, side) & mask;
        let start = index * WORD + bits.trailing_zeros() as usize;
        let len = (bits >> (start % WORD)).trailing_ones() as usize;
        (bits != 0).then_some(start..start + len)
    }

    #[inline(never)]
    fn first_in_words(&self, side: Side, granules: Range<usize>) -> Option<Range<usize>> {
        self.runs_on(side, granules).next()
    }

    /// Those of the runs of `granules` that are on `side`.
    pub fn runs_on(
        &self,
        side: Side,
        granules: Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> {
        let runs = self.runs(granules).filter(move |run| run.side == side);
        runs.map(|run| run.granules)
    }

    /// Number of private granules in `granules`.
    pub fn count_private(&self, granules: Range<usize>) -> usize {
        assert!(granules.end <= self.granules);
        split(granules, BLOCK)
            .map(|part| match (part.len(), self.initial) {
                (BLOCK, Side::Shared) => self.count(part.start / BLOCK),
                (BLOCK, Side::Private) => BLOCK - self.count(part.start / BLOCK),
                _ => self.count_in_words(part, Side::Private),
            })
            .sum()
    }

    /// The runs of `granules` in order, cut off at its ends.
    pub fn runs(&self, granules: Range<usize>) -> Runs<'_> {
        assert!(granules.end <= self.granules);
        let Range { start: at, end } = granules;
        let mut runs = Runs {
            map: self,
            at,
            end,
            set: false,
            word: at / WORD,
            flips: 0,
            scanned: 0..0,
            others: 0,
            scanned_for: false,
        };
        if at < end {
            let bits = self.words[runs.word].load(Ordering::Acquire);
            runs.set = bits >> (at % WORD) & 1 == 1;
            runs.scanned = runs.word..runs.word + 1;
            runs.scanned_for = runs.set;
            runs.flips = flips(bits, false) & (u64::MAX << (at % WORD) << 1);
        }
        runs
    }

    fn count_in_words(&self, granules: Range<usize>, side: Side) -> usize {
        words_of(granules)
            .map(|(index, mask)| (self.word(index, side) & mask).count_ones() as usize)
            .sum()
    }

    /// A word with the bits set whose granules are on `side`.
    fn word(&self, index: usize, side: Side) -> u64 {
        let word = self.words[index].load(Ordering::Acquire);
        match side == self.initial {
            true => !word,
            false => word,
        }
    }

    /// How many granules of a block are not on the initial side.
    fn count(&self, block: usize) -> usize {
        let lanes = self.counts[block / LANES].load(Ordering::Acquire);
        (lanes >> lane(block) & LANE) as usize
    }

    /// Notes that so many granules of a block were set, or cleared.
    #[inline]
    fn add_to_count(&self, block: usize, changed: usize, sets: bool) {
        let lanes = &self.counts[block / LANES];
        let changed = (changed as u64) << lane(block);
        match sets {
            _ if changed == 0 => 0,
            true => lanes.fetch_add(changed, Ordering::Release),
            false => lanes.fetch_sub(changed, Ordering::Release),
        };
    }

    /// The map as one line of at most `width` cells: `.` shared, `#` private,
    /// `+` some of both. Every cell stands for the same number of granules
    /// (the last one for what is left).
    pub fn picture(&self, width: usize) -> String {
        let cell = self.granules.div_ceil(width.max(1)).max(1);
        (0..self.granules)
            .step_by(cell)
            .map(|start| {
                let granules = start..self.granules.min(start + cell);
                match self.count_private(granules.clone()) {
                    0 => '.',
                    all if all == granules.len() => '#',
                    _ => '+',
                }
            })
            .collect()
    }
}

/// Where the count of a block stands in its word.
fn lane(block: usize) -> usize {
    block % LANES * LANE_BITS
}

/// `granules`, cut at the multiples of `unit`.
fn split(granules: Range<usize>, unit: usize) -> impl Iterator<Item = Range<usize>> {
    let Range { mut start, end } = granules;
    std::iter::from_fn(move || {
        (start < end).then(|| {
            let part = start..end.min((start / unit + 1) * unit);
            start = part.end;
            part
        })
    })
}

/// The words that hold `granules`, each with the bits concerned.
fn words_of(granules: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    split(granules, WORD).filter_map(|part| in_one_word(&part))
}

/// The word that holds all of `granules`, and the bits concerned; most requests
/// are so small. `None` if there is no such word, or nothing in the range.
#[inline]
fn in_one_word(granules: &Range<usize>) -> Option<(usize, u64)> {
    let (index, first) = (granules.start / WORD, granules.start % WORD);
    let len = granules.len();
    let fits = len != 0 && len <= WORD - first;
    fits.then(|| (index, u64::MAX >> (WORD - len) << first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn picture_tells_the_three_kinds_of_cell() {
        let map = StateMap::new(12, Side::Shared).unwrap();
        map.set(0..4, Side::Private);
        map.set(5..6, Side::Private);
        assert_eq!(map.picture(3), "#+.");
        assert_eq!(map.picture(100), "####.#......");
        assert_eq!(StateMap::new(5, Side::Shared).unwrap().picture(2), "..");
    }

    #[test]
    fn words_of_an_empty_range_are_none() {
        assert_eq!(words_of(70..70).count(), 0);
        assert_eq!(words_of(0..0).count(), 0);
    }
}
