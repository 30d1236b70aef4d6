//! The two stores of a region: fds whose pages are the guest's memory.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::kernel::{FileFacts, Kernel, NumaPolicy};
use crate::range::Range;

/// Bytes that are taken in one call: a memfd's gives all of them back when a
/// signal comes, and begins anew.
const AT_ONCE: u64 = 2 << 20;

/// One fd that holds guest memory: a memfd, a `guest_memfd`, or a file of the
/// caller's where private contents were moved to.
pub struct Store {
    kernel: Arc<dyn Kernel>,
    fd: OwnedFd,
    /// Of a file of the caller's.
    file: Option<FileFacts>,
    /// Whether fallocate(2) leaves new pages with their old contents until somebody
    /// touches them: a memfd or a tmpfs file of ordinary pages.
    clears_late: bool,
    /// Whether contents may be in it where memory is on the other side: for good if
    /// others than the guest write there, and otherwise once some could not be freed.
    has_leftovers: AtomicBool,
}

impl Store {
    /// A memfd: what the host can reach, or the emulated agent's stand-in for
    /// what it cannot; of huge pages where their size is given.
    pub(crate) fn memfd(
        kernel: &Arc<dyn Kernel>,
        name: &str,
        size: u64,
        huge_page: Option<u64>,
    ) -> Result<Store> {
        let name = CString::new(name)
            .map_err(|_| Error::InvalidArgument("a name must not contain NUL".into()))?;
        let fd = kernel
            .create_memfd(&name, size, huge_page)
            .map_err(|e| Error::kernel("memfd_create", e))?;
        Ok(Store {
            clears_late: huge_page.is_none(),
            ..Store::own(kernel, fd)
        })
    }

    fn own(kernel: &Arc<dyn Kernel>, fd: OwnedFd) -> Store {
        Store {
            kernel: kernel.clone(),
            fd,
            file: None,
            clears_late: false,
            has_leftovers: AtomicBool::new(true),
        }
    }

    /// A file of the caller's, whose fd is duplicated.
    pub(crate) fn elsewhere(kernel: &Arc<dyn Kernel>, fd: BorrowedFd) -> Result<Store> {
        let fd = fd
            .try_clone_to_owned()
            .map_err(|e| Error::kernel("fcntl(F_DUPFD)", e))?;
        let mut store = Store::own(kernel, fd);
        let facts = store.facts()?;
        store.file = Some(facts);
        store.clears_late = facts.in_memory;
        Ok(store)
    }

    /// What it is to the host.
    pub(crate) fn facts(&self) -> Result<FileFacts> {
        let ask = || self.kernel.file(self.fd());
        match self.file {
            Some(facts) => Ok(facts),
            None => ask().map_err(|e| Error::kernel("fstat", e)),
        }
    }

    /// What file of the caller's it is, if it is one.
    pub(crate) fn file(&self) -> Option<FileFacts> {
        self.file
    }

    /// Whether it is one of a region's two.
    pub(crate) fn is_own(&self) -> bool {
        self.file.is_none()
    }

    /// Whether it is not a file on a disk.
    pub(crate) fn is_in_memory(&self) -> bool {
        self.file.is_none_or(|facts| facts.in_memory)
    }

    /// What lies on a disk is safe there on return.
    pub(crate) fn write_back(&self) -> Result<()> {
        match self.is_in_memory() {
            true => Ok(()),
            false => {
                retry(|| self.kernel.sync(self.fd())).map_err(|e| Error::kernel("fdatasync", e))
            }
        }
    }

    /// What lies on a disk leaves memory, as far as nobody touches it.
    pub(crate) fn evict(&self, offsets: Range) {
        if !self.is_in_memory() {
            // The kernel does so sooner or later, if it does not now.
            let _ = self.kernel.evict(self.fd(), offsets);
        }
    }

    /// A `guest_memfd` of `vm`: what only the guest can reach.
    pub(crate) fn guest_memfd(
        kernel: &Arc<dyn Kernel>,
        vm: BorrowedFd,
        size: u64,
    ) -> Result<Store> {
        let fd = kernel
            .create_guest_memfd(vm, size)
            .map_err(|e| Error::kernel("KVM_CREATE_GUEST_MEMFD", e))?;
        Ok(Store {
            has_leftovers: AtomicBool::new(false),
            ..Store::own(kernel, fd)
        })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Frees the pages of `offsets`; they read zero from now on.
    #[inline(always)]
    pub(crate) fn punch(&self, offsets: Range) -> Result<()> {
        retry(|| self.kernel.punch_hole(self.fd(), offsets)).map_err(|e| {
            self.has_leftovers.store(true, Ordering::Release);
            Error::kernel("fallocate(PUNCH_HOLE)", e)
        })
    }

    /// Punches where there are contents, or the kernel cannot tell: of a file on
    /// a disk it tells only what is in memory. (A fault that KVM began before memory
    /// left a `guest_memfd` may take a page there afterwards. It reads zero: KVM finds
    /// the change before it maps it; `kvm_gmem_get_pfn()` in virt/kvm/guest_memfd.c.)
    #[inline(always)]
    pub(crate) fn clear(&self, offsets: Range) -> Result<()> {
        if !self.has_leftovers.load(Ordering::Acquire)
            || self.is_in_memory() && self.held(offsets) == Some(0)
        {
            return Ok(());
        }
        self.punch(offsets)
    }

    /// Allocates the pages of `offsets` that are not there yet, on the nodes that
    /// `policy` says, and clears them.
    ///
    /// Clearing a memfd takes a second fallocate(2): the first one leaves new pages as
    /// they are, the second one clears those that nobody has touched meanwhile. No CPU
    /// sees the difference, but a device does: IOMMU_IOAS_MAP_FILE pins such pages
    /// without clearing them. See KERNEL.md.
    ///
    /// By the policy of this thread meanwhile, which a file without one of its
    /// own follows. A `guest_memfd` can have its own, set through a mapping
    /// (mbind(2)), but one that can be mapped serves KVM both sides, and there
    /// is no shared store any more: see `KVM_MEMSLOT_GMEM_ONLY` in
    /// virt/kvm/guest_memfd.c.
    pub(crate) fn allocate(&self, offsets: Range, policy: Option<&NumaPolicy>) -> Result<()> {
        let allocate = |piece| {
            retry(|| self.kernel.allocate(self.fd(), piece))
                .map_err(|e| Error::kernel("fallocate", e))
        };
        let piece = |piece| {
            allocate(piece)?;
            match self.clears_late {
                true => allocate(piece),
                false => Ok(()),
            }
        };
        self.under_policy(policy, || offsets.pieces(AT_ONCE).try_for_each(piece))
    }

    /// Does `work` with this NUMA policy of the thread.
    pub(crate) fn under_policy(
        &self,
        policy: Option<&NumaPolicy>,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some(policy) = policy else {
            return work();
        };
        let before = self.swap_mempolicy(policy)?;
        let done = work();
        // The default policy takes no memory, so that it can be set in any case.
        let restored = self
            .swap_mempolicy(&before)
            .or_else(|_| self.swap_mempolicy(&NumaPolicy::default()));
        done.and(restored.map(drop))
    }

    fn swap_mempolicy(&self, policy: &NumaPolicy) -> Result<NumaPolicy> {
        self.kernel
            .swap_mempolicy(policy)
            .map_err(|e| Error::kernel("set_mempolicy", e))
    }

    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.kernel
            .read(self.fd(), offset, buffer)
            .map_err(|e| Error::kernel("pread", e))
    }

    pub(crate) fn write(&self, offset: u64, buffer: &[u8]) -> Result<()> {
        self.kernel
            .write(self.fd(), offset, buffer)
            .map_err(|e| Error::kernel("pwrite", e))
    }

    /// Bytes held within `offsets`; `None` where this kernel cannot tell.
    pub(crate) fn held(&self, offsets: Range) -> Option<u64> {
        self.kernel.held(self.fd(), offsets).ok()
    }

    /// Bytes held in all by `st_blocks`, for a memfd where cachestat is missing.
    pub(crate) fn blocks(&self) -> Option<u64> {
        self.kernel.blocks(self.fd()).ok()
    }
}

/// Repeats a call for as long as a signal interrupts it.
pub(crate) fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            result => return result,
        }
    }
}
