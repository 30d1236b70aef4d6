//! The mapping of a region's shared store for KVM's memory slots
//! (`userspace_addr`).
//!
//! KVM reads and writes guest memory by the slot's address whatever the memory
//! attribute says: its clocks, steal time, the emulator, nested guests; KERNEL.md
//! has the list. In the VMM's own mapping such an access to a private page takes a
//! page of the shared store, so that the guest has memory held twice. Here private
//! pages are guard regions: KVM's access fails with EFAULT and takes nothing.
//!
//! The VMM's own mapping has no guard regions, as its own accesses would end in
//! SIGSEGV.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::range::{GRANULE, Range};
use crate::store::{Store, retry};

/// Bytes of which guard regions are installed in one call.
const AT_ONCE: u64 = 64 << 20;

pub(crate) struct SlotMapping {
    kernel: Arc<dyn Kernel>,
    start: usize,
    size: u64,
}

impl SlotMapping {
    /// Maps all of `shared` and finds out whether the kernel has guard regions
    /// there.
    pub(crate) fn new(kernel: &Arc<dyn Kernel>, shared: &Store, size: u64) -> Result<SlotMapping> {
        let start = kernel
            .map_for_slots(shared.fd(), size)
            .map_err(|e| Error::kernel("mmap", e))?;
        let mapping = SlotMapping {
            kernel: kernel.clone(),
            start,
            size,
        };
        let first = Range::from_granules(0..1);
        mapping.guard(first, true).map_err(|e| match e {
            Error::Kernel { source, .. } if source.raw_os_error() == Some(libc::EINVAL) => {
                Error::NoGuardRegions
            }
            other => other,
        })?;
        mapping.show(first)?;
        Ok(mapping)
    }

    pub(crate) fn address(&self) -> usize {
        self.start
    }

    /// Makes KVM's accesses to `offsets` fail, and unmaps what is mapped there.
    pub(crate) fn hide(&self, offsets: Range) -> Result<()> {
        let mut pieces = offsets.pieces(AT_ONCE);
        pieces.try_for_each(|piece| self.guard(piece, true))
    }

    /// Lets KVM access `offsets`.
    pub(crate) fn show(&self, offsets: Range) -> Result<()> {
        self.guard(offsets, false)
    }

    fn guard(&self, offsets: Range, install: bool) -> Result<()> {
        let at = self.start + offsets.start() as usize;
        // SAFETY: the mapping is ours, only KVM accesses it, and `offsets` lies in it.
        retry(|| unsafe { self.kernel.guard(at, offsets.len(), install) }).map_err(|e| {
            let call = match install {
                true => "madvise(GUARD_INSTALL)",
                false => "madvise(GUARD_REMOVE)",
            };
            Error::kernel(call, e)
        })
    }

    /// Drops what is mapped of `offsets`, but for guard regions.
    pub(crate) fn zap(&self, offsets: Range) -> Result<()> {
        debug_assert!(offsets.end() <= self.size && offsets.start().is_multiple_of(GRANULE));
        let at = self.start + offsets.start() as usize;
        // SAFETY: as above; the file keeps its contents.
        retry(|| unsafe { self.kernel.zap(at, offsets.len() as usize) })
            .map_err(|e| Error::kernel("madvise(DONTNEED)", e))
    }
}

impl Drop for SlotMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made. The VMM's slots that named it are gone, as
        // they must be before their region is freed.
        unsafe { self.kernel.unmap(self.start, self.size as usize) };
    }
}
