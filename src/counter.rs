//! A figure that many threads raise and hardly anybody reads.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crossbeam::utils::CachePadded;

const SHARDS: usize = 8;

/// Every thread raises a shard of its own (up to [`SHARDS`] threads), so that
/// they do not take turns for one cache line.
#[derive(Default)]
pub(crate) struct Counter([CachePadded<AtomicU64>; SHARDS]);

impl Counter {
    pub(crate) fn add_one(&self) {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static SHARD: usize = THREADS.fetch_add(1, Ordering::Relaxed) % SHARDS;
        }
        // A thread that is being torn down has none any more.
        let shard = SHARD.try_with(|shard| *shard).unwrap_or(0);
        self.0[shard].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        let shards = self.0.iter();
        shards.map(|shard| shard.load(Ordering::Relaxed)).sum()
    }
}
