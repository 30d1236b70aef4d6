//! Downstream mappers: who holds translations to shared memory and must be
//! told when it goes and comes, such as VFIO.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use crate::error::{Error, Result};
use crate::range::Range;

/// A downstream mapper of a region's shared store.
///
/// Called with locks held, on the thread that converts or that adds or removes
/// the listener: it must do neither itself, nor wait for one that does. Ranges
/// are offsets into the region; calls come per run, not per page.
pub trait Listener: Send + Sync {
    /// Shared memory is about to go: on return no translation to it is left.
    /// Part of it may not be mapped.
    fn discard(&self, offsets: Range);

    /// Shared memory has come, and may be mapped. On failure the listener has
    /// mapped none of it, and the conversion is undone.
    fn populate(&self, offsets: Range) -> io::Result<()>;

    /// Tells this listener of a region from others.
    fn identity(&self) -> usize;
}

/// The listeners of a region, in order of registration. The list changes only
/// under the lock of the whole region, so never within a conversion.
#[derive(Default)]
pub(crate) struct Listeners {
    list: RwLock<Vec<Arc<dyn Listener>>>,
    /// There were some: without any, conversions do not meet at `list`.
    used: AtomicBool,
}

impl Listeners {
    /// Held while listeners run: who would change the list waits for the lock
    /// of the region anyway.
    fn all(&self) -> RwLockReadGuard<'_, Vec<Arc<dyn Listener>>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a listener and shows it the shared `runs`. Nothing is added on failure.
    pub(crate) fn add(
        &self,
        listener: Arc<dyn Listener>,
        runs: impl Iterator<Item = Range>,
    ) -> Result<()> {
        if self
            .all()
            .iter()
            .any(|l| l.identity() == listener.identity())
        {
            return Err(Error::AlreadyListening);
        }
        self.used.store(true, Ordering::Relaxed);
        let mut shown = Vec::new();
        for run in runs {
            if let Err(e) = listener.populate(run) {
                shown.into_iter().for_each(|run| listener.discard(run));
                return Err(Error::kernel("a downstream listener", e));
            }
            shown.push(run);
        }
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        list.push(listener);
        Ok(())
    }

    /// Removes a listener, and takes the shared `runs` from it.
    pub(crate) fn remove(&self, identity: usize, runs: impl Iterator<Item = Range>) -> Result<()> {
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        let at = list.iter().position(|l| l.identity() == identity);
        let listener = list.remove(at.ok_or(Error::NoSuchListener)?);
        drop(list);
        runs.for_each(|run| listener.discard(run));
        Ok(())
    }

    /// Forgets all listeners, after taking the shared `runs` from them.
    pub(crate) fn clear(&self, runs: impl Iterator<Item = Range>) {
        runs.for_each(|run| self.discard(run));
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        list.clear();
    }

    #[inline(always)]
    pub(crate) fn discard(&self, offsets: Range) {
        if self.used.load(Ordering::Relaxed) {
            self.discard_for_all(offsets);
        }
    }

    #[inline(never)]
    fn discard_for_all(&self, offsets: Range) {
        for listener in self.all().iter() {
            listener.discard(offsets);
        }
    }

    /// All listeners map `offsets`, or none does.
    #[inline(always)]
    pub(crate) fn populate(&self, offsets: Range) -> Result<()> {
        match self.used.load(Ordering::Relaxed) {
            true => self.populate_for_all(offsets),
            false => Ok(()),
        }
    }

    #[inline(never)]
    fn populate_for_all(&self, offsets: Range) -> Result<()> {
        let all = self.all();
        for (done, listener) in all.iter().enumerate() {
            if let Err(e) = listener.populate(offsets) {
                all[..done].iter().for_each(|l| l.discard(offsets));
                return Err(Error::kernel("a downstream listener", e));
            }
        }
        Ok(())
    }
}
