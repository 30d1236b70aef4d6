//! The library's range lock and state map with loom's locks and atomics in the
//! place of `std`'s, so that `tests/interleavings.rs` checks what is used.

// The rest of these two files is for the rest of the library.
#[allow(dead_code)]
#[path = "../../../src/error.rs"]
mod error;
#[allow(dead_code)]
#[path = "../../../src/range.rs"]
pub mod range;
#[path = "../../../src/range_lock.rs"]
pub mod range_lock;
#[path = "../../../src/state.rs"]
pub mod state;

mod sync {
    pub use loom::sync::atomic::AtomicU64;
    pub use loom::sync::{Condvar, Mutex, MutexGuard};

    pub const BLOCK_WORDS: usize = 1;

    pub fn zeroed_words(len: usize) -> Option<Box<[AtomicU64]>> {
        Some((0..len).map(|_| AtomicU64::new(0)).collect())
    }
}
