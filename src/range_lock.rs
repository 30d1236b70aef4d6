//! The lock of a region: orders conversions of overlapping ranges.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use crossbeam::utils::CachePadded;
use smallvec::{SmallVec, smallvec};

use crate::range::{GRANULE, Range};
use crate::sync::{AtomicU64, Condvar, Mutex, MutexGuard};

/// Ranges of one request: more of them cost an allocation.
pub type Ranges = SmallVec<[Range; 2]>;

/// Memory is dealt out to the stripes in units of at least so many bytes.
const UNIT: u64 = 2 << 20;
const STRIPES: usize = 16;

/// Keeps conversions of overlapping ranges apart and lets others run together.
/// First come, first served in each stripe: many small requests cannot hold off a
/// large one, which they overtake only where it has not arrived yet.
///
/// Requests for different memory would still meet where the lock keeps its
/// books, and so it keeps them in stripes, each for a part of the memory. A
/// request passes through its stripes in their order, and whoever waits in one
/// waits for somebody who waits in a later one if at all: so none waits in a
/// circle.
pub struct RangeLock {
    /// Bits of an address within a unit.
    unit_bits: u32,
    stripes: [CachePadded<Stripe>; STRIPES],
}

/// Most requests are small and meet nobody: such a one is `alone` in its stripe
/// without a look at the queue. Whoever finds somebody there queues up, and from
/// then on until the queue is empty everybody does.
#[derive(Default)]
struct Stripe {
    /// 0 if there is nobody; otherwise [`Alone`], with `QUEUE` if anybody is
    /// in the queue. `QUEUE` changes only with the queue locked.
    alone: AtomicU64,
    queue: Mutex<Queue>,
    released: Condvar,
}

const QUEUE: u64 = 1 << 63;

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
    held: Held,
}

enum Held {
    /// One range, alone in this stripe.
    Alone(usize, Alone),
    /// Ranges, and the stripes that keep them, one bit each.
    Queued(Ranges, u16),
}

/// A range in one word: the granules in the upper half but the first bit, and
/// the first granule, plus 1 so that it is never 0, in the lower.
#[derive(Clone, Copy)]
struct Alone(u64);

impl Alone {
    /// None for a range that does not fit.
    fn new(range: &Range) -> Option<Alone> {
        let first = u32::try_from(range.start() / GRANULE + 1).ok()?;
        let granules = u32::try_from(range.len() / GRANULE).ok()?;
        let is_small = granules < 1 << 31;
        is_small.then_some(Alone(u64::from(granules) << 32 | u64::from(first)))
    }

    /// What a stripe's word says, if there is somebody.
    fn of(word: u64) -> Option<Range> {
        let (granules, first) = ((word & !QUEUE) >> 32, word & u64::from(u32::MAX));
        Range::new(first.checked_sub(1)? * GRANULE, granules * GRANULE).ok()
    }
}

impl Queue {
    fn is_blocked(&self, number: u64, alone: Option<Range>) -> bool {
        let own = self.tickets.iter().filter(|own| own.number == number);
        let earlier = self.tickets.iter().take_while(|t| t.number < number);
        let mut others = earlier.map(|t| t.range).chain(alone);
        others.any(|other| own.clone().any(|own| own.range.overlaps(&other)))
    }

    /// Of equal ranges the first one holds the lock, and so it is the one that
    /// goes.
    fn remove(&mut self, range: &Range) {
        let holder = self.tickets.iter().position(|t| t.range == *range);
        holder.map(|at| self.tickets.remove(at));
    }
}

impl RangeLock {
    /// For requests of about `huge_page` bytes or less, a power of two.
    pub fn new(huge_page: u64) -> RangeLock {
        RangeLock {
            unit_bits: huge_page.max(UNIT).ilog2(),
            stripes: Default::default(),
        }
    }

    /// As [`RangeLock::acquire_all`], for one range.
    #[inline(always)]
    pub fn acquire(&self, range: Range) -> RangeGuard<'_> {
        let stripes = self.stripes_of(&range);
        if let (true, Some(alone)) = (stripes.is_power_of_two(), Alone::new(&range)) {
            let stripe = stripes.trailing_zeros() as usize;
            if self.stripes[stripe].enter_alone(alone) {
                let held = Held::Alone(stripe, alone);
                return RangeGuard { lock: self, held };
            }
        }
        self.queue_up(smallvec![range], stripes)
    }

    /// Waits until nobody who came earlier holds, or waits for, any part of
    /// `ranges`. All of a request at once: one that waited with a part in hand
    /// could be waited for by whom it waits for.
    pub fn acquire_all(&self, ranges: Ranges) -> RangeGuard<'_> {
        let stripes = ranges.iter().map(|range| self.stripes_of(range));
        let stripes = stripes.fold(0, |all, bits| all | bits);
        self.queue_up(ranges, stripes)
    }

    /// One bit for each stripe that keeps any part of `range`.
    fn stripes_of(&self, range: &Range) -> u16 {
        // Neighbours, and the same places in the halves of a guest, are kept apart
        // as a rule: threads that walk through their halves seldom meet.
        let stripe = |unit: u64| unit.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - STRIPES.ilog2());
        let (first, last) = (
            range.start() >> self.unit_bits,
            (range.end() - 1) >> self.unit_bits,
        );
        match last - first {
            0..64 => (first..=last).fold(0, |bits, unit| bits | 1 << stripe(unit)),
            _ => u16::MAX,
        }
    }

    #[cold]
    fn queue_up(&self, ranges: Ranges, stripes: u16) -> RangeGuard<'_> {
        for stripe in self.stripes(stripes) {
            stripe.enter(&ranges);
        }
        let held = Held::Queued(ranges, stripes);
        RangeGuard { lock: self, held }
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

impl Stripe {
    fn enter_alone(&self, alone: Alone) -> bool {
        let entered = self
            .alone
            .compare_exchange(0, alone.0, Ordering::Acquire, Ordering::Relaxed);
        entered.is_ok()
    }

    fn leave_alone(&self, alone: Alone) {
        let left = self
            .alone
            .compare_exchange(alone.0, 0, Ordering::Release, Ordering::Relaxed);
        if left.is_err() {
            // There is a queue.
            let queue = self.queue();
            self.alone.fetch_and(QUEUE, Ordering::Release);
            self.wake(&queue);
        }
    }

    /// Takes its place in the queue, and waits there for its turn.
    fn enter(&self, ranges: &[Range]) {
        let mut queue = self.queue();
        self.alone.fetch_or(QUEUE, Ordering::Relaxed);
        let number = queue.arrived;
        queue.arrived += 1;
        let tickets = ranges.iter().map(|range| Ticket {
            number,
            range: *range,
        });
        queue.tickets.extend(tickets);
        let alone = || Alone::of(self.alone.load(Ordering::Acquire));
        while queue.is_blocked(number, alone()) {
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
        if queue.tickets.is_empty() {
            self.alone.fetch_and(!QUEUE, Ordering::Release);
        }
        self.wake(&queue);
    }

    fn wake(&self, queue: &Queue) {
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
    #[inline(always)]
    fn drop(&mut self) {
        match &self.held {
            Held::Alone(stripe, alone) => self.lock.stripes[*stripe].leave_alone(*alone),
            Held::Queued(ranges, stripes) => {
                let stripes = self.lock.stripes(*stripes);
                stripes.for_each(|stripe| stripe.leave(ranges));
            }
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
        let lock = RangeLock::new(GRANULE);
        let range = |granules| Range::new(0, granules * GRANULE).unwrap();
        let order = Mutex::new(Vec::new());
        let stripe = lock.stripes(lock.stripes_of(&range(1))).next().unwrap();
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
            waiting(1);
            scope.spawn(move || take(1));
            waiting(2);
            drop(first);
        });
        assert_eq!(*order.lock().unwrap(), [8, 1]);
    }

    #[test]
    fn a_range_in_a_word_is_the_same_range() {
        let (most, last) = ((1 << 31) - 1, u32::MAX as u64 - 1);
        for (first, granules) in [(0, 1), (5, 7), (0, most), (last, 1), (last, most)] {
            let range = Range::new(first * GRANULE, granules * GRANULE).unwrap();
            let word = Alone::new(&range).unwrap().0;
            assert_eq!(word & QUEUE, 0);
            assert_eq!(Alone::of(word | QUEUE), Some(range));
        }
        for (first, granules) in [(0, most + 1), (last + 1, 1)] {
            let range = Range::new(first * GRANULE, granules * GRANULE).unwrap();
            assert!(Alone::new(&range).is_none());
        }
        assert_eq!(Alone::of(0), None);
        assert_eq!(Alone::of(QUEUE), None);
    }

    #[test]
    fn a_range_is_kept_by_the_stripes_of_all_its_units() {
        for huge_page in [GRANULE, 1 << 30] {
            let lock = RangeLock::new(huge_page);
            let unit = huge_page.max(UNIT);
            let range = |start, units| Range::new(start * unit, units * unit).unwrap();
            for start in 0..100 {
                let parts = (start..start + 70).map(|at| lock.stripes_of(&range(at, 1)));
                assert!(parts.clone().all(|bits| bits.is_power_of_two()));
                let all = parts.fold(0, |all, bits| all | bits);
                assert_eq!(lock.stripes_of(&range(start, 70)), all);
            }
            let across = Range::new(unit - GRANULE, 2 * GRANULE).unwrap();
            assert_eq!(lock.stripes_of(&across), lock.stripes_of(&range(0, 2)));
        }
    }
}
