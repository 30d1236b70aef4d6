//! The library's tracking: the state map alone, which is what QEMU's is beside,
//! and whole conversions, from the guest-physical range to the published state
//! with a kernel that does nothing.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{
    KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_sev_snp_launch_finish, kvm_sev_snp_launch_start,
    kvm_sev_snp_launch_update,
};
use privmem::agent::{CommandError, CommandResult};
use privmem::kernel::{Blocked, FileFacts, Kernel, Linux, TdxInitMemRegion};
use privmem::{GRANULE, Listener, NumaPolicy, Options, Range, Region, Side, StateMap, Vm};

use crate::measure::{Convert, Extents, Tracking};

/// The state map, changed as a conversion changes it.
pub struct StateAlone(StateMap);

impl StateAlone {
    pub fn new(size: u64) -> StateAlone {
        let granules = (size / GRANULE) as usize;
        StateAlone(StateMap::new(granules, Side::Private).expect("a state map"))
    }
}

impl Convert for StateAlone {
    fn convert(&self, offset: u64, size: u64, to_private: bool) {
        let granules = (offset / GRANULE) as usize..((offset + size) / GRANULE) as usize;
        let side = side(to_private);
        for run in self.0.runs(granules).filter(|run| run.side != side) {
            self.0.set(run.granules, side);
        }
    }
}

fn side(to_private: bool) -> Side {
    match to_private {
        true => Side::Private,
        false => Side::Shared,
    }
}

/// A region that all is seen of from guest-physical 0, all private at first.
pub struct Ours {
    vm: Arc<Vm>,
    region: Arc<Region>,
    listener: Arc<Counting>,
}

impl Convert for Ours {
    fn convert(&self, offset: u64, size: u64, to_private: bool) {
        let mut done = 0;
        while done < size {
            let converted = self
                .vm
                .convert(offset + done, size - done, side(to_private));
            done += converted.expect("a conversion");
        }
    }
}

impl Tracking for Ours {
    fn new(size: u64) -> Ours {
        let file = std::fs::File::open("/dev/null").expect("/dev/null");
        // Only passed on to the kernel that does nothing.
        let fd: &'static std::fs::File = Box::leak(Box::new(file));
        let vm = Vm::with_kernel(Arc::new(Nothing), Some(fd.as_fd())).expect("a VM");
        let options = Options {
            initial: Side::Private,
            ..Options::default()
        };
        let region = Region::with_options(&vm, "bench", size, options).expect("a region");
        vm.bind(&region, 0, 0, size).expect("a binding");
        Ours {
            vm,
            region,
            listener: Arc::default(),
        }
    }

    fn listen(&self) {
        let added = self.region.add_listener(self.listener.clone());
        added.expect("a listener");
    }

    fn listener_calls(&self) -> u64 {
        self.listener.0.load(Ordering::Relaxed)
    }

    fn shared_extents(&self) -> Extents {
        let runs = self.region.runs(0, self.region.size()).expect("all of it");
        let shared = runs.filter(|run| run.side == Side::Shared);
        shared.fold(Extents::default(), |found, run| Extents {
            number: found.number + 1,
            bytes: found.bytes + run.granules.len() as u64 * GRANULE,
        })
    }
}

#[derive(Default)]
struct Counting(AtomicU64);

impl Listener for Counting {
    fn discard(&self, _: Range, _: u64) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn populate(&self, _: Range) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn identity(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }
}

/// A kernel that changes sides in no time.
struct Nothing;

fn absent<T>() -> io::Result<T> {
    Err(io::Error::from_raw_os_error(libc::ENOSYS))
}

fn no_command() -> CommandResult {
    absent().map_err(|error| CommandError { error, firmware: 0 })
}

impl Kernel for Nothing {
    fn check_extension(&self, _: BorrowedFd, _: u32) -> io::Result<u32> {
        Ok(KVM_MEMORY_ATTRIBUTE_PRIVATE)
    }

    fn create_guest_memfd(&self, _: BorrowedFd, size: u64) -> io::Result<OwnedFd> {
        Linux.create_memfd(c"private", size, None)
    }

    fn set_memory_attributes(&self, _: BorrowedFd, _: Range, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn pre_fault(&self, _: BorrowedFd, _: Range) -> io::Result<Option<Range>> {
        absent()
    }

    fn create_memfd(&self, name: &CStr, size: u64, huge: Option<u64>) -> io::Result<OwnedFd> {
        Linux.create_memfd(name, size, huge)
    }

    fn punch_hole(&self, _: BorrowedFd, _: Range) -> io::Result<()> {
        Ok(())
    }

    fn allocate(&self, _: BorrowedFd, _: Range) -> io::Result<()> {
        absent()
    }

    fn read(&self, _: BorrowedFd, _: u64, _: &mut [u8]) -> io::Result<()> {
        absent()
    }

    fn write(&self, _: BorrowedFd, _: u64, _: &[u8]) -> io::Result<()> {
        absent()
    }

    fn swap_mempolicy(&self, _: &NumaPolicy) -> io::Result<NumaPolicy> {
        absent()
    }

    fn held(&self, _: BorrowedFd, _: Range) -> io::Result<u64> {
        Ok(0)
    }

    fn blocks(&self, _: BorrowedFd) -> io::Result<u64> {
        absent()
    }

    unsafe fn tdx_init_mem_region(
        &self,
        _: BorrowedFd,
        _: &mut TdxInitMemRegion,
        _: bool,
    ) -> CommandResult {
        no_command()
    }

    fn tdx_finalize(&self, _: BorrowedFd) -> CommandResult {
        no_command()
    }

    fn snp_launch_start(
        &self,
        _: BorrowedFd,
        _: BorrowedFd,
        _: &kvm_sev_snp_launch_start,
    ) -> CommandResult {
        no_command()
    }

    unsafe fn snp_launch_update(
        &self,
        _: BorrowedFd,
        _: BorrowedFd,
        _: &mut kvm_sev_snp_launch_update,
    ) -> CommandResult {
        no_command()
    }

    unsafe fn snp_launch_finish(
        &self,
        _: BorrowedFd,
        _: BorrowedFd,
        _: &kvm_sev_snp_launch_finish,
    ) -> CommandResult {
        no_command()
    }

    unsafe fn zap(&self, _: usize, _: usize) -> io::Result<()> {
        absent()
    }

    unsafe fn map_fixed(&self, _: usize, _: BorrowedFd, _: Range) -> io::Result<()> {
        absent()
    }

    fn map_for_slots(&self, _: BorrowedFd, _: u64) -> io::Result<usize> {
        absent()
    }

    unsafe fn unmap(&self, _: usize, _: usize) {}

    unsafe fn guard(&self, _: usize, _: u64, _: bool) -> io::Result<()> {
        absent()
    }

    unsafe fn write_protect(&self, _: usize, _: u64) -> io::Result<Blocked> {
        absent()
    }

    unsafe fn map_blocked(&self, _: usize, _: BorrowedFd, _: Range) -> io::Result<Blocked> {
        absent()
    }

    fn file(&self, _: BorrowedFd) -> io::Result<FileFacts> {
        absent()
    }

    fn sync(&self, _: BorrowedFd) -> io::Result<()> {
        absent()
    }

    fn evict(&self, _: BorrowedFd, _: Range) -> io::Result<()> {
        absent()
    }
}
