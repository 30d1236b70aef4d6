//! The two stores of a region: fds whose pages are the guest's memory.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::range::Range;

/// One fd that holds guest memory: a memfd or a `guest_memfd`.
pub struct Store {
    kernel: Arc<dyn Kernel>,
    fd: OwnedFd,
}

impl Store {
    /// A memfd: what the host can reach, or the emulated agent's stand-in for
    /// what it cannot.
    pub(crate) fn memfd(kernel: &Arc<dyn Kernel>, name: &str, size: u64) -> Result<Store> {
        let name = CString::new(name)
            .map_err(|_| Error::InvalidArgument("a name must not contain NUL".into()))?;
        let fd = kernel
            .create_memfd(&name, size)
            .map_err(|e| Error::kernel("memfd_create", e))?;
        let kernel = kernel.clone();
        Ok(Store { kernel, fd })
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
        let kernel = kernel.clone();
        Ok(Store { kernel, fd })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Frees the pages of `offsets`; they read zero from now on.
    pub(crate) fn punch(&self, offsets: Range) -> Result<()> {
        retry(|| self.kernel.punch_hole(self.fd(), offsets))
            .map_err(|e| Error::kernel("fallocate(PUNCH_HOLE)", e))
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
