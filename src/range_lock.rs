//! The lock of a region: orders conversions of overlapping ranges.

use std::sync::PoisonError;

use crossbeam::utils::CachePadded;
use smallvec::{SmallVec, smallvec};

use crate::range::Range;
use crate::sync::{Condvar, Mutex, MutexGuard};

/// Ranges of one request: more of them cost an allocation.
pub type Ranges = SmallVec<[Range; 2]>;

/// Memory is dealt out to the stripes in units of so many bytes.
const UNIT: u64 = 2 << 20;
const STRIPES: usize = 16;

/// Keeps conversions of overlapping ranges apart and lets others run together.
/// First come, first served: many small requests cannot hold off a large one.
///
/// Requests for different memory would still meet where the lock keeps its
/// books, and so it keeps them in stripes, each for a part of the memory. A
/// request passes through its stripes in their order, and whoever waits in one
/// waits for somebody who waits in a later one if at all: so none waits in a
/// circle.
#[derive(Default)]
pub struct RangeLock {
    stripes: [CachePadded<Stripe>; STRIPES],
}

#[derive(Default)]
struct Stripe {
    queue: Mutex<Queue>,
    released: Condvar,
}

/// Who holds or waits for which ranges, in order of arrival: as many requests as
/// there are vCPUs at most, and so it is scanned.
#[derive(Default)]
struct Queue {
    arrived: u64,
    tickets: SmallVec<[Ticket; 4]>,
    /// How many of them wait: without any, nobody has to be woken.
    waiting: usize,
}

struct Ticket {
    /// Of the request; all its ranges have the same.
    number: u64,
    range: Range,
}

/// Holds ranges of a [`RangeLock`] until dropped.
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    ranges: Ranges,
    /// Where they are kept, one bit a stripe.
    stripes: u16,
}

impl Queue {
    fn is_blocked(&self, number: u64) -> bool {
        if self.tickets[0].number == number {
            return false;
        }
        let own = self.tickets.iter().filter(|own| own.number == number);
        let mut earlier = self.tickets.iter().take_while(|t| t.number < number);
        earlier.any(|other| own.clone().any(|own| own.range.overlaps(&other.range)))
    }

    /// Of equal ranges the first one holds the lock, and so it is the one that
    /// goes.
    fn remove(&mut self, range: &Range) {
        let holder = self.tickets.iter().position(|t| t.range == *range);
        holder.map(|at| self.tickets.remove(at));
    }
}

impl RangeLock {
    /// As [`RangeLock::acquire_all`], for one range.
    pub fn acquire(&self, range: Range) -> RangeGuard<'_> {
        self.acquire_all(smallvec![range])
    }

    /// Waits until nobody who came earlier holds, or waits for, any part of
    /// `ranges`. All of a request at once: one that waited with a part in hand
    /// could be waited for by whom it waits for.
    pub fn acquire_all(&self, ranges: Ranges) -> RangeGuard<'_> {
        let stripes = ranges.iter().fold(0, |bits, range| bits | bits_of(range));
        for stripe in self.stripes(stripes) {
            stripe.enter(&ranges);
        }
        RangeGuard {
            lock: self,
            ranges,
            stripes,
        }
    }

    /// Changes whenever somebody asks for any part of the region.
    pub fn arrivals(&self) -> u64 {
        self.stripes.iter().map(|s| s.queue().arrived).sum()
    }

    /// The stripes whose bits are set, in their order.
    fn stripes(&self, mut bits: u16) -> impl Iterator<Item = &Stripe> {
        std::iter::from_fn(move || {
            let stripe = self.stripes.get(bits.trailing_zeros() as usize)?;
            bits &= bits - 1;
            Some(&**stripe)
        })
    }
}

/// One bit for each stripe that keeps any part of `range`.
fn bits_of(range: &Range) -> u16 {
    // Memory that lies side by side, or at a distance of a power of two, is not
    // kept in one stripe: threads that walk through their halves do not meet.
    let stripe = |unit: u64| unit.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - STRIPES.ilog2());
    let (first, last) = (range.start() / UNIT, (range.end() - 1) / UNIT);
    match last - first {
        0..64 => (first..=last).fold(0, |bits, unit| bits | 1 << stripe(unit)),
        _ => u16::MAX,
    }
}

impl Stripe {
    /// Takes its place in the queue, and waits there for its turn.
    fn enter(&self, ranges: &[Range]) {
        let mut queue = self.queue();
        let number = queue.arrived;
        queue.arrived += 1;
        let tickets = ranges.iter().map(|range| Ticket {
            number,
            range: *range,
        });
        queue.tickets.extend(tickets);
        while queue.is_blocked(number) {
            queue.waiting += 1;
            queue = self
                .released
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
            queue.waiting -= 1;
        }
    }

    fn leave(&self, ranges: &[Range]) {
        let mut queue = self.queue();
        ranges.iter().for_each(|range| queue.remove(range));
        if queue.waiting > 0 {
            self.released.notify_all();
        }
    }

    /// Poison is no concern: the queue is whole at every point that can panic.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        for stripe in self.lock.stripes(self.stripes) {
            stripe.leave(&self.ranges);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::range::GRANULE;
    use std::thread;

    #[test]
    fn who_waits_for_much_is_not_overtaken_by_who_wants_little() {
        let lock = RangeLock::default();
        let range = |granules| Range::new(0, granules * GRANULE).unwrap();
        let order = Mutex::new(Vec::new());
        let stripe = lock.stripes(bits_of(&range(1))).next().unwrap();
        let waiting = |count| {
            while stripe.queue().tickets.len() < count {
                thread::yield_now();
            }
        };
        let first = lock.acquire(range(1));
        thread::scope(|scope| {
            let take = |granules| {
                let _guard = lock.acquire(range(granules));
                order.lock().unwrap().push(granules);
            };
            scope.spawn(move || take(8));
            waiting(2);
            scope.spawn(move || take(1));
            waiting(3);
            drop(first);
        });
        assert_eq!(*order.lock().unwrap(), [8, 1]);
    }

    #[test]
    fn a_range_is_kept_by_the_stripes_of_all_its_units() {
        let range = |start, units| Range::new(start * UNIT, units * UNIT).unwrap();
        for start in 0..100 {
            let parts = (start..start + 70).map(|unit| bits_of(&range(unit, 1)));
            assert!(parts.clone().all(|bits| bits.is_power_of_two()));
            let all = parts.fold(0, |all, bits| all | bits);
            assert_eq!(bits_of(&range(start, 70)), all);
        }
        let across = Range::new(UNIT - GRANULE, 2 * GRANULE).unwrap();
        assert_eq!(bits_of(&across), bits_of(&range(0, 2)));
    }
}
