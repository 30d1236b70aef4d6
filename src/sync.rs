//! The parts of `std` that the checker of interleavings replaces: `tests/loom`
//! builds [`crate::range_lock`] and [`crate::state`] with a module of this name
//! of its own.

use std::alloc::Layout;
pub use std::sync::atomic::AtomicU64;
pub use std::sync::{Condvar, Mutex, MutexGuard};

/// Words of a block of the state map: 16 MiB, whose bits fill eight cache lines.
/// (The checker takes 1, as it cannot look at many.)
pub const BLOCK_WORDS: usize = 64;

/// `len` words of 0; `None` if there is no memory for them. Zeroed by the
/// kernel, so that many of them cost memory only where touched.
pub fn zeroed_words(len: usize) -> Option<Box<[AtomicU64]>> {
    let layout = Layout::array::<AtomicU64>(len).ok()?;
    if len == 0 {
        return Some(Box::default());
    }
    // SAFETY: the layout is not of size 0.
    let raw = unsafe { std::alloc::alloc_zeroed(layout) }.cast::<AtomicU64>();
    if raw.is_null() {
        return None;
    }
    // SAFETY: `raw` is a new allocation of `len` words with the layout that the
    // Box will free it with, and zero is a valid `AtomicU64`.
    Some(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(raw, len)) })
}
