//! The lock of a region: orders conversions of overlapping ranges.

use std::sync::PoisonError;

use crate::range::Range;
use crate::sync::{Condvar, Mutex, MutexGuard};

/// Keeps conversions of overlapping ranges apart and lets others run together.
/// First come, first served: many small requests cannot hold off a large one.
/// Scans its waiters, which are as many as there are vCPUs at most.
#[derive(Default)]
pub struct RangeLock {
    queue: Mutex<Queue>,
    released: Condvar,
}

/// Who holds or waits for which ranges, in order of arrival.
#[derive(Default)]
struct Queue {
    arrived: u64,
    tickets: Vec<(u64, Vec<Range>)>,
}

/// Holds ranges of a [`RangeLock`] until dropped.
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    ticket: u64,
}

impl Queue {
    fn is_blocked(&self, ticket: u64) -> bool {
        let own = self.tickets.iter().position(|(other, _)| *other == ticket);
        let (earlier, rest) = self.tickets.split_at(own.unwrap_or(0));
        let wanted = rest.first().map_or(&[][..], |(_, ranges)| ranges);
        let overlaps = |held: &Range| wanted.iter().any(|range| range.overlaps(held));
        earlier.iter().any(|(_, held)| held.iter().any(overlaps))
    }
}

impl RangeLock {
    /// Waits until nobody who came earlier holds, or waits for, any part of
    /// `ranges`. All of a request at once: one that waited with a part in hand
    /// could be waited for by whom it waits for.
    pub fn acquire(&self, ranges: Vec<Range>) -> RangeGuard<'_> {
        let mut queue = self.queue();
        let ticket = queue.arrived;
        queue.arrived += 1;
        queue.tickets.push((ticket, ranges));
        while queue.is_blocked(ticket) {
            queue = self
                .released
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        RangeGuard { lock: self, ticket }
    }

    /// Poison is no concern: the queue is whole at every point that can panic.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let tickets = &mut self.lock.queue().tickets;
        tickets.retain(|(ticket, _)| *ticket != self.ticket);
        self.lock.released.notify_all();
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
        let waiting = |count| {
            while lock.queue().tickets.len() < count {
                thread::yield_now();
            }
        };
        let first = lock.acquire(vec![range(1)]);
        thread::scope(|scope| {
            let take = |granules| {
                let _guard = lock.acquire(vec![range(granules)]);
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
}
