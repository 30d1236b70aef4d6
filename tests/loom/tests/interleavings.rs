//! Every interleaving of the range lock and of the state map's publication.

use std::sync::atomic::Ordering;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::AtomicUsize;
use loom::thread;

use loom_tests::range::{GRANULE, Range};
use loom_tests::range_lock::{RangeLock, Ranges};
use loom_tests::state::{Side, StateMap};

fn granules(start: u64, count: u64) -> Range {
    Range::new(start * GRANULE, count * GRANULE).unwrap()
}

/// Runs each of `requests` in a thread of its own. None may be inside together.
fn assert_exclusive<const N: usize>(requests: [&[Range]; N]) {
    assert_eq!(run(requests, true), 1);
}

/// As many as can be inside together.
fn inside_at_most<const N: usize>(requests: [&[Range]; N]) -> usize {
    run(requests, false)
}

fn run<const N: usize>(requests: [&[Range]; N], excludes: bool) -> usize {
    let requests = requests.map(Ranges::from_slice);
    let most = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let seen = most.clone();
    let mut model = loom::model::Builder::new();
    // All interleavings of three take too long; few need more switches.
    model.preemption_bound = (N > 2).then_some(2);
    model.check(move || {
        let lock = Arc::new(RangeLock::new(GRANULE));
        let inside = Arc::new(AtomicUsize::new(0));
        // The checker sees whether accesses are ordered by the lock alone.
        let kept = excludes.then(|| Arc::new(UnsafeCell::new(0)));
        let threads: Vec<_> = requests
            .iter()
            .cloned()
            .map(|ranges| {
                let (lock, inside, seen) = (lock.clone(), inside.clone(), seen.clone());
                let kept = kept.clone();
                thread::spawn(move || {
                    let _guard = match ranges[..] {
                        [range] => lock.acquire(range),
                        _ => lock.acquire_all(ranges),
                    };
                    if let Some(kept) = kept {
                        // SAFETY: whoever holds the lock is alone; else the
                        // checker fails.
                        kept.with_mut(|kept| unsafe { *kept += 1 });
                        seen.fetch_max(1, Ordering::Relaxed);
                        return;
                    }
                    let now = inside.fetch_add(1, Ordering::SeqCst) + 1;
                    seen.fetch_max(now, Ordering::SeqCst);
                    thread::yield_now();
                    inside.fetch_sub(1, Ordering::SeqCst);
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
    });
    most.load(Ordering::SeqCst)
}

/// No interleaving lets two in, and none leaves one waiting for ever.
#[test]
fn overlapping_ranges_exclude_each_other() {
    assert_exclusive([&[granules(0, 4)], &[granules(3, 4)]]);
    // Either has a part that the other wants, near by or in another stripe.
    for distance in [5, 5 * 512] {
        let (first, second) = (granules(0, 1), granules(distance, 1));
        assert_exclusive([&[first, second], &[second, first]]);
        // Only the second one is wanted twice.
        assert_exclusive([&[granules(2, 1), second], &[first, second]]);
    }
    let one = &[granules(3, 1)][..];
    assert_exclusive([one, one, one]);
    // One that fits into a stripe, and one that does not.
    let wide = &[granules(0, 1024)][..];
    assert_exclusive([wide, &[granules(511, 2)]]);
    assert_exclusive([wide, &[granules(600, 1)]]);
}

/// Parts of a request that lie in one huge page are locked as the same range.
#[test]
fn a_request_does_not_wait_for_itself() {
    let page = granules(0, 4);
    assert_exclusive([&[page, page], &[page]]);
    assert_exclusive([&[page, page], &[page], &[page, page]]);
}

#[test]
fn disjoint_ranges_run_together() {
    let requests = [&[granules(0, 4)][..], &[granules(4, 4)]];
    assert_eq!(inside_at_most(requests), 2);
    let requests = [&[granules(0, 4)][..], &[granules(4, 1024)]];
    assert_eq!(inside_at_most(requests), 2);
}

/// Who sees a granule private also sees what was done before it was published.
#[test]
fn publication_comes_after_what_it_tells() {
    let seen = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let was_seen = seen.clone();
    loom::model(move || {
        let map = Arc::new(StateMap::new(8, Side::Shared).unwrap());
        let switched = Arc::new(AtomicUsize::new(0));
        let reader = {
            let (map, switched, seen) = (map.clone(), switched.clone(), seen.clone());
            thread::spawn(move || {
                if map.side(3) == Side::Private {
                    assert_eq!(switched.load(Ordering::Relaxed), 1);
                    seen.store(true, Ordering::Relaxed);
                }
            })
        };
        switched.store(1, Ordering::Relaxed);
        map.set(2..4, Side::Private);
        reader.join().unwrap();
    });
    assert!(was_seen.load(Ordering::Relaxed));
}

/// Conversions of different granules of one word do not undo each other.
#[test]
fn neighbours_in_a_word_are_kept() {
    loom::model(|| {
        let map = Arc::new(StateMap::new(8, Side::Shared).unwrap());
        map.set(4..6, Side::Private);
        let other = map.clone();
        let writer = thread::spawn(move || other.set(0..2, Side::Private));
        map.set(4..6, Side::Shared);
        writer.join().unwrap();
        assert_eq!(map.count_private(0..8), 2);
        assert_eq!(map.side(1), Side::Private);
    });
}

/// A block is passed over only if it has nothing of what is looked for: whatever
/// others change in it, everybody finds what they changed themselves. (Blocks have
/// 64 granules here.)
#[test]
fn nobody_passes_over_what_they_changed() {
    loom::model(|| {
        let map = Arc::new(StateMap::new(128, Side::Shared).unwrap());
        map.set(72..80, Side::Private);
        let finds = |map: &StateMap, side, granule| {
            let mut runs = map.runs(0..128).filter(|run| run.side == side);
            runs.any(|run| run.granules.contains(&granule))
        };
        let other = map.clone();
        let writer = thread::spawn(move || {
            other.set(64..72, Side::Private);
            assert!(finds(&other, Side::Private, 71));
        });
        map.set(72..80, Side::Shared);
        assert!(finds(&map, Side::Shared, 72));
        writer.join().unwrap();
        assert_eq!(map.count_private(0..128), 8);
        map.set(64..72, Side::Shared);
        assert_eq!(map.count_private(64..128), 0);
    });
}
