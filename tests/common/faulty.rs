//! The running kernel, of which any call can be made to fail.

use std::ffi::CStr;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_sev_snp_launch_update;
use privmem::agent::{CommandResult, SnpFinish, SnpStart};
use privmem::kernel::{Blocked, FileFacts, Kernel, Linux, TdxInitMemRegion};
use privmem::{NumaPolicy, Range};

use super::Fail;

/// Calls that change memory or mappings, or ask what a file is, are counted and
/// may fail; all are the kernel's own otherwise.
pub struct Faulty(Mutex<(Fail, Vec<&'static str>)>, AtomicBool);

impl Faulty {
    pub fn new() -> Arc<Faulty> {
        let calls = Mutex::new((Fail::Never, Vec::new()));
        Arc::new(Faulty(calls, AtomicBool::new(false)))
    }

    /// From now on a mapping that fails leaves a hole, as some kernels do.
    pub fn leave_holes(&self) {
        self.1.store(true, Ordering::Relaxed);
    }

    pub fn set_fail(&self, fail: Fail) {
        *self.0.lock().unwrap() = (fail, Vec::new());
    }

    /// The calls since `set_fail`.
    pub fn calls(&self) -> Vec<&'static str> {
        self.0.lock().unwrap().1.clone()
    }

    fn call(&self, name: &'static str) -> io::Result<()> {
        let (fail, calls) = &mut *self.0.lock().unwrap();
        calls.push(name);
        fail.of(calls.len() - 1)
    }
}

impl Kernel for Faulty {
    fn check_extension(&self, vm: BorrowedFd, capability: u32) -> io::Result<u32> {
        Linux.check_extension(vm, capability)
    }

    fn create_guest_memfd(&self, vm: BorrowedFd, size: u64) -> io::Result<OwnedFd> {
        Linux.create_guest_memfd(vm, size)
    }

    fn set_memory_attributes(&self, vm: BorrowedFd, gpa: Range, attributes: u64) -> io::Result<()> {
        Linux.set_memory_attributes(vm, gpa, attributes)
    }

    fn pre_fault(&self, vcpu: BorrowedFd, gpa: Range) -> io::Result<Option<Range>> {
        Linux.pre_fault(vcpu, gpa)
    }

    fn create_memfd(&self, name: &CStr, size: u64, huge_page: Option<u64>) -> io::Result<OwnedFd> {
        self.call("create_memfd")?;
        Linux.create_memfd(name, size, huge_page)
    }

    fn punch_hole(&self, fd: BorrowedFd, offsets: Range) -> io::Result<()> {
        self.call("punch_hole")?;
        Linux.punch_hole(fd, offsets)
    }

    fn allocate(&self, fd: BorrowedFd, offsets: Range) -> io::Result<()> {
        self.call("allocate")?;
        Linux.allocate(fd, offsets)
    }

    fn read(&self, fd: BorrowedFd, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.call("read")?;
        Linux.read(fd, offset, buffer)
    }

    fn write(&self, fd: BorrowedFd, offset: u64, buffer: &[u8]) -> io::Result<()> {
        self.call("write")?;
        Linux.write(fd, offset, buffer)
    }

    fn swap_mempolicy(&self, policy: &NumaPolicy) -> io::Result<NumaPolicy> {
        self.call("swap_mempolicy")?;
        Linux.swap_mempolicy(policy)
    }

    fn held(&self, fd: BorrowedFd, offsets: Range) -> io::Result<u64> {
        Linux.held(fd, offsets)
    }

    fn blocks(&self, fd: BorrowedFd) -> io::Result<u64> {
        Linux.blocks(fd)
    }

    unsafe fn tdx_init_mem_region(
        &self,
        vcpu: BorrowedFd,
        region: &mut TdxInitMemRegion,
        measure: bool,
    ) -> CommandResult {
        // SAFETY: the caller's promise, here and below.
        unsafe { Linux.tdx_init_mem_region(vcpu, region, measure) }
    }

    fn tdx_finalize(&self, vm: BorrowedFd) -> CommandResult {
        Linux.tdx_finalize(vm)
    }

    fn snp_launch_start(&self, vm: BorrowedFd, sev: BorrowedFd, start: &SnpStart) -> CommandResult {
        Linux.snp_launch_start(vm, sev, start)
    }

    unsafe fn snp_launch_update(
        &self,
        vm: BorrowedFd,
        sev: BorrowedFd,
        update: &mut kvm_sev_snp_launch_update,
    ) -> CommandResult {
        // SAFETY: as above.
        unsafe { Linux.snp_launch_update(vm, sev, update) }
    }

    unsafe fn snp_launch_finish(
        &self,
        vm: BorrowedFd,
        sev: BorrowedFd,
        finish: &SnpFinish,
    ) -> CommandResult {
        // SAFETY: as above.
        unsafe { Linux.snp_launch_finish(vm, sev, finish) }
    }

    unsafe fn map_fixed(&self, host: usize, fd: BorrowedFd, offsets: Range) -> io::Result<()> {
        if let Err(error) = self.call("map_fixed") {
            if self.1.load(Ordering::Relaxed) {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                let (at, size) = (host as *mut _, offsets.len() as usize);
                // SAFETY: as above; nobody may touch it.
                unsafe { libc::mmap(at, size, libc::PROT_NONE, flags, -1, 0) };
            }
            return Err(error);
        }
        // SAFETY: as above.
        unsafe { Linux.map_fixed(host, fd, offsets) }
    }

    unsafe fn zap(&self, host: usize, len: usize) -> io::Result<()> {
        self.call("zap")?;
        // SAFETY: as above.
        unsafe { Linux.zap(host, len) }
    }

    fn map_for_slots(&self, fd: BorrowedFd, size: u64) -> io::Result<usize> {
        self.call("map_for_slots")?;
        Linux.map_for_slots(fd, size)
    }

    unsafe fn unmap(&self, host: usize, len: usize) {
        // SAFETY: as above.
        unsafe { Linux.unmap(host, len) }
    }

    unsafe fn guard(&self, host: usize, len: u64, install: bool) -> io::Result<()> {
        self.call("guard")?;
        // SAFETY: as above.
        unsafe { Linux.guard(host, len, install) }
    }

    unsafe fn write_protect(&self, host: usize, len: u64) -> io::Result<Blocked> {
        self.call("write_protect")?;
        // SAFETY: as above.
        unsafe { Linux.write_protect(host, len) }
    }

    unsafe fn map_blocked(
        &self,
        host: usize,
        fd: BorrowedFd,
        offsets: Range,
    ) -> io::Result<Blocked> {
        self.call("map_blocked")?;
        // SAFETY: as above.
        unsafe { Linux.map_blocked(host, fd, offsets) }
    }

    fn file(&self, fd: BorrowedFd) -> io::Result<FileFacts> {
        self.call("file")?;
        Linux.file(fd)
    }

    fn sync(&self, fd: BorrowedFd) -> io::Result<()> {
        self.call("sync")?;
        Linux.sync(fd)
    }

    fn evict(&self, fd: BorrowedFd, offsets: Range) -> io::Result<()> {
        self.call("evict")?;
        Linux.evict(fd, offsets)
    }
}
