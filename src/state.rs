//! The state map: one bit per granule, set where the granule is not on the side
//! where all began, so that a new map costs nothing. Pure.
//!
//! Readers take no lock: a bit is loaded with `Acquire`, and a conversion
//! publishes with `Release` after the kernel has changed sides. Writers of
//! different granules may share a word, hence the atomic read-modify-write;
//! writers of the same granule are kept apart by the region's range lock.

use std::ops::Range;
use std::sync::atomic::Ordering;

use bitvec::prelude::{BitArray, Lsb0};

use crate::error::{Error, Result};
use crate::sync::{AtomicU64, zeroed_words};

const BITS: usize = u64::BITS as usize;

/// One word of the map, loaded. (The map itself is not one of bitvec's types:
/// their atomic access is relaxed, and publication must not be.)
type Word = BitArray<u64, Lsb0>;

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

/// One bit per granule.
pub struct StateMap {
    words: Box<[AtomicU64]>,
    granules: usize,
    initial: Side,
}

impl StateMap {
    /// A map with all granules on one side. Fails where there is no memory for
    /// one bit a granule.
    pub fn new(granules: usize, initial: Side) -> Result<StateMap> {
        let words = zeroed_words(granules.div_ceil(BITS));
        let words = words.ok_or(Error::NoMemoryForState { granules })?;
        Ok(StateMap {
            words,
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
        let private = |granule: &usize| bytes[granule / 8] >> (granule % 8) & 1 == 1;
        for granule in (0..granules).filter(private) {
            map.set(granule..granule + 1, Side::Private);
        }
        Ok(map)
    }

    /// One bit a granule, from the lowest bit of the first byte, set where it
    /// is private.
    pub fn to_bytes(&self) -> Vec<u8> {
        let flip = match self.initial {
            Side::Shared => 0,
            Side::Private => !0,
        };
        let words = self.words.iter();
        let words = words.map(|word| word.load(Ordering::Acquire) ^ flip);
        let mut bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        bytes.truncate(self.granules.div_ceil(8));
        if let Some(last) = bytes
            .last_mut()
            .filter(|_| !self.granules.is_multiple_of(8))
        {
            *last &= (1 << (self.granules % 8)) - 1;
        }
        bytes
    }

    pub fn len(&self) -> usize {
        self.granules
    }

    pub fn is_empty(&self) -> bool {
        self.granules == 0
    }

    pub fn side(&self, granule: usize) -> Side {
        assert!(granule < self.granules);
        match self.word(granule / BITS)[granule % BITS] {
            false => self.initial,
            true => self.initial.other(),
        }
    }

    /// Puts `granules` on `side`, visible to readers word by word.
    pub fn set(&self, granules: Range<usize>, side: Side) {
        assert!(granules.end <= self.granules);
        for (index, bits) in words_of(granules) {
            let mut mask = Word::ZERO;
            mask[bits].fill(true);
            let word = &self.words[index];
            match side == self.initial {
                false => word.fetch_or(mask.data, Ordering::Release),
                true => word.fetch_and(!mask.data, Ordering::Release),
            };
        }
    }

    /// Number of private granules in `granules`.
    pub fn count_private(&self, granules: Range<usize>) -> usize {
        assert!(granules.end <= self.granules);
        let all = granules.len();
        let moved: usize = words_of(granules)
            .map(|(index, bits)| self.word(index)[bits].count_ones())
            .sum();
        match self.initial {
            Side::Shared => moved,
            Side::Private => all - moved,
        }
    }

    /// The runs of `granules` in order, cut off at its ends.
    pub fn runs(&self, granules: Range<usize>) -> impl Iterator<Item = Run> {
        assert!(granules.end <= self.granules);
        let mut at = granules.start;
        std::iter::from_fn(move || {
            (at < granules.end).then(|| {
                let side = self.side(at);
                let end = self.run_end(at, granules.end, side);
                let run = Run {
                    granules: at..end,
                    side,
                };
                at = end;
                run
            })
        })
    }

    /// End of the run on `side` that `granule` starts; always after `granule`,
    /// even where another thread converts it meanwhile.
    fn run_end(&self, granule: usize, limit: usize, side: Side) -> usize {
        words_of(granule + 1..limit)
            .find_map(|(index, bits)| {
                let start = index * BITS + bits.start;
                let word = self.word(index);
                let different = match side == self.initial {
                    true => word[bits].first_one(),
                    false => word[bits].first_zero(),
                };
                Some(start + different?)
            })
            .unwrap_or(limit)
    }

    fn word(&self, index: usize) -> Word {
        Word::new(self.words[index].load(Ordering::Acquire))
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

/// The words that hold `granules`, each with the bits concerned.
fn words_of(granules: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
    let Range { start, end } = granules;
    let last = if start < end { end.div_ceil(BITS) } else { 0 };
    (start / BITS..last).map(move |index| {
        let first = index * BITS;
        (index, start.saturating_sub(first)..BITS.min(end - first))
    })
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
