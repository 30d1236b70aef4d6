//! Checked byte ranges. Pure: no I/O, no locks.
//!
//! Everything a guest or an operator asks for becomes a [`Range`] first. A
//! `Range` is never empty, never unaligned and never wraps, so that the rest
//! of the library can add and subtract without checking again.

use std::fmt;

use crate::error::{Error, Result};

/// Bytes per granule: the host page, the unit in which memory changes side.
pub const GRANULE: u64 = 4096;

/// A non-empty, granule-aligned range of bytes whose end does not wrap.
///
/// Used for guest-physical addresses and for offsets into a region alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    start: u64,
    end: u64,
}

impl Range {
    /// `size` bytes from `start`; refuses what is unaligned, empty or wraps.
    pub fn new(start: u64, size: u64) -> Result<Range> {
        if !(start | size).is_multiple_of(GRANULE) {
            let (what, value) = match start.is_multiple_of(GRANULE) {
                false => ("address", start),
                true => ("size", size),
            };
            return Err(Error::Unaligned { what, value });
        }
        if size == 0 {
            return Err(Error::Empty { start });
        }
        let Some(end) = start.checked_add(size) else {
            return Err(Error::Overflow { start, size });
        };
        Ok(Range { start, end })
    }

    /// The range of the given granules; `granules` is not empty.
    pub(crate) fn from_granules(granules: std::ops::Range<usize>) -> Range {
        debug_assert!(granules.start < granules.end);
        Range {
            start: granules.start as u64 * GRANULE,
            end: granules.end as u64 * GRANULE,
        }
    }

    pub fn start(&self) -> u64 {
        self.start
    }

    /// First byte after the range.
    pub fn end(&self) -> u64 {
        self.end
    }

    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    pub fn overlaps(&self, other: &Range) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// The part that both ranges have.
    pub fn intersection(&self, other: &Range) -> Option<Range> {
        let start = self.start.max(other.start);
        let end = self.end.min(other.end);
        (start < end).then_some(Range { start, end })
    }

    /// From the start of the range to the end of one after it.
    pub(crate) fn through(&self, last: &Range) -> Range {
        debug_assert!(self.start < last.end);
        Range {
            end: last.end,
            ..*self
        }
    }

    /// What is left of the range before and after another one.
    pub(crate) fn without(&self, other: &Range) -> [Option<Range>; 2] {
        let part = |start, end| (start < end).then_some(Range { start, end });
        [
            part(self.start, self.end.min(other.start)),
            part(self.start.max(other.end), self.end),
        ]
    }

    /// The granule at the start.
    pub(crate) fn first(&self) -> Range {
        Range {
            end: self.start + GRANULE,
            ..*self
        }
    }

    /// The granule at the end.
    pub(crate) fn last(&self) -> Range {
        Range {
            start: self.end - GRANULE,
            ..*self
        }
    }

    /// The part up to the next multiple of `unit` bytes (a multiple of the granule).
    pub(crate) fn head(&self, unit: u64) -> Range {
        let next = (self.start - self.start % unit).saturating_add(unit);
        Range {
            end: self.end.min(next),
            ..*self
        }
    }

    /// The range with what it lacks to whole units of `unit` bytes, a power of
    /// two; for offsets into a region whose size is a multiple of it.
    pub(crate) fn widened(&self, unit: u64) -> Range {
        Range {
            start: self.start & !(unit - 1),
            end: ((self.end - 1) | (unit - 1)) + 1,
        }
    }

    /// The whole units of `unit` bytes, a power of two, that the range has.
    pub(crate) fn narrowed(&self, unit: u64) -> Option<Range> {
        let start = self.start.checked_next_multiple_of(unit)?;
        let end = self.end & !(unit - 1);
        (start < end).then_some(Range { start, end })
    }

    /// Block `number` of those of `size` bytes.
    pub(crate) fn of_block(number: u64, size: u64) -> Range {
        let start = number * size;
        Range {
            start,
            end: start + size,
        }
    }

    /// The same bytes counted from another origin: `from` becomes `to`.
    /// `from` lies at or before the start, and `to + len` was checked before.
    pub(crate) fn rebase(&self, from: u64, to: u64) -> Range {
        debug_assert!(from <= self.start);
        let start = self.start - from + to;
        Range {
            start,
            end: start + self.len(),
        }
    }

    pub(crate) fn granules(&self) -> std::ops::Range<usize> {
        (self.start / GRANULE) as usize..(self.end / GRANULE) as usize
    }

    /// The range, cut at the multiples of `unit` bytes (a multiple of the granule).
    pub(crate) fn pieces(self, unit: u64) -> impl Iterator<Item = Range> {
        let mut rest = Some(self);
        std::iter::from_fn(move || {
            let piece = rest?.head(unit);
            [_, rest] = self.without(&piece);
            Some(piece)
        })
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.start, self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_a_guest_may_send() {
        assert!(matches!(
            Range::new(1, GRANULE),
            Err(Error::Unaligned { .. })
        ));
        assert!(matches!(
            Range::new(0, GRANULE + 1),
            Err(Error::Unaligned { .. })
        ));
        assert!(matches!(Range::new(GRANULE, 0), Err(Error::Empty { .. })));
        let last = u64::MAX - GRANULE + 1;
        assert!(matches!(
            Range::new(last, GRANULE),
            Err(Error::Overflow { .. })
        ));
        assert!(matches!(
            Range::new(GRANULE, last),
            Err(Error::Overflow { .. })
        ));
        assert_eq!(Range::new(0, last).unwrap().len(), last);
    }

    #[test]
    fn pieces_cover_the_range_exactly() {
        let range = Range::new(3 * GRANULE, 10 * GRANULE).unwrap();
        let pieces: Vec<_> = range.pieces(4 * GRANULE).collect();
        assert_eq!(pieces.first().unwrap().start(), range.start());
        assert_eq!(pieces.last().unwrap().end(), range.end());
        assert!(pieces.windows(2).all(|p| p[0].end() == p[1].start()));
        let cuts = pieces[1..].iter().map(Range::start);
        assert!(cuts.eq([4, 8, 12].map(|granule| granule * GRANULE)));
        let last = Range::new(u64::MAX - GRANULE + 1 - GRANULE, GRANULE).unwrap();
        assert!(last.pieces(1 << 63).eq([last]));
    }
}
