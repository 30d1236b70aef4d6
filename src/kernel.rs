//! Every call into the kernel, behind one trait.
//!
//! [`Linux`] is the real one. Tests bring their own, which fails any call in
//! turn or keeps a model of what the kernel would hold.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use kvm_bindings::{
    KVMIO, kvm_create_guest_memfd, kvm_memory_attributes, kvm_sev_cmd, kvm_sev_snp_launch_finish,
    kvm_sev_snp_launch_start, kvm_sev_snp_launch_update, sev_cmd_id_KVM_SEV_SNP_LAUNCH_FINISH,
    sev_cmd_id_KVM_SEV_SNP_LAUNCH_START, sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE,
};

use crate::agent::{CommandError, CommandResult};
use crate::range::Range;

/// On which NUMA nodes memory is taken, as set_mempolicy(2) has it; by default
/// where the thread runs (`MPOL_DEFAULT`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NumaPolicy {
    /// `MPOL_*` of include/uapi/linux/mempolicy.h.
    pub mode: i32,
    /// One bit a node, from the lowest bit of the first word.
    pub nodes: Vec<libc::c_ulong>,
}

/// What the library asks of the kernel. Every method may be called from any
/// thread, and reports the kernel's own error.
pub trait Kernel: Send + Sync {
    /// `KVM_CHECK_EXTENSION` on a VM fd (Documentation/virt/kvm/api.rst, 4.4).
    fn check_extension(&self, vm: BorrowedFd, capability: u32) -> io::Result<u32>;

    /// `KVM_CREATE_GUEST_MEMFD` (api.rst, 4.142). The fd is closed on exec.
    fn create_guest_memfd(&self, vm: BorrowedFd, size: u64) -> io::Result<OwnedFd>;

    /// `KVM_SET_MEMORY_ATTRIBUTES` (api.rst, 4.141) for guest-physical `gpa`.
    /// The kernel changes all of the range or nothing.
    fn set_memory_attributes(&self, vm: BorrowedFd, gpa: Range, attributes: u64) -> io::Result<()>;

    /// memfd_create(2) and ftruncate(2), sealed against any other size; of huge
    /// pages (`MFD_HUGETLB`) where their size, a power of two, is given.
    fn create_memfd(&self, name: &CStr, size: u64, huge_page: Option<u64>) -> io::Result<OwnedFd>;

    /// fallocate(2) with `FALLOC_FL_PUNCH_HOLE`: unmaps and frees the pages.
    fn punch_hole(&self, fd: BorrowedFd, offsets: Range) -> io::Result<()>;

    /// fallocate(2): takes the pages that are not there yet. On failure some of
    /// them may have been taken.
    fn allocate(&self, fd: BorrowedFd, offsets: Range) -> io::Result<()>;

    /// pread(2) of `buffer.len()` bytes.
    fn read(&self, fd: BorrowedFd, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// pwrite(2) of all of `buffer`.
    fn write(&self, fd: BorrowedFd, offset: u64, buffer: &[u8]) -> io::Result<()>;

    /// set_mempolicy(2) for the calling thread; returns what it was before.
    fn swap_mempolicy(&self, policy: &NumaPolicy) -> io::Result<NumaPolicy>;

    /// Bytes that `fd` holds within `offsets`, in memory or swapped, from
    /// cachestat(2). `ENOSYS` on kernels before 6.5 or without
    /// `CONFIG_CACHESTAT_SYSCALL`.
    fn held(&self, fd: BorrowedFd, offsets: Range) -> io::Result<u64>;

    /// Bytes that `fd` holds in all, from `st_blocks` of fstat(2). Always 0
    /// for a `guest_memfd`.
    fn blocks(&self, fd: BorrowedFd) -> io::Result<u64>;

    /// `KVM_TDX_INIT_MEM_REGION` (Documentation/virt/kvm/x86/intel-tdx.rst) on
    /// a vCPU fd: private pages get their contents, and `region` is moved on to
    /// what is left. EINTR and EAGAIN mean to call again.
    ///
    /// # Safety
    /// As many pages as `region` says are readable at its `source_addr`.
    unsafe fn tdx_init_mem_region(
        &self,
        vcpu: BorrowedFd,
        region: &mut TdxInitMemRegion,
        measure: bool,
    ) -> CommandResult;

    /// `KVM_TDX_FINALIZE_VM` on a VM fd. EBUSY means to call again.
    fn tdx_finalize(&self, vm: BorrowedFd) -> CommandResult;

    /// `KVM_SEV_SNP_LAUNCH_START` (amd-memory-encryption.rst) on a VM fd, with
    /// /dev/sev.
    fn snp_launch_start(
        &self,
        vm: BorrowedFd,
        sev: BorrowedFd,
        start: &kvm_sev_snp_launch_start,
    ) -> CommandResult;

    /// `KVM_SEV_SNP_LAUNCH_UPDATE`: private pages get their contents, and
    /// `update` is moved on to what is left.
    ///
    /// # Safety
    /// As many bytes as `update` says are readable at its `uaddr`, and writable
    /// for a page of type CPUID, unless its type is ZERO.
    unsafe fn snp_launch_update(
        &self,
        vm: BorrowedFd,
        sev: BorrowedFd,
        update: &mut kvm_sev_snp_launch_update,
    ) -> CommandResult;

    /// `KVM_SEV_SNP_LAUNCH_FINISH`.
    ///
    /// # Safety
    /// The addresses in `finish` are valid where it says that they are used.
    unsafe fn snp_launch_finish(
        &self,
        vm: BorrowedFd,
        sev: BorrowedFd,
        finish: &kvm_sev_snp_launch_finish,
    ) -> CommandResult;

    /// Drops what is mapped at `host`, a shared mapping of a file: the file is
    /// asked at the next access. madvise(2), MADV_DONTNEED.
    ///
    /// # Safety
    /// `host` up to `host + len` is a mapping whose owner agrees.
    unsafe fn zap(&self, host: usize, len: usize) -> io::Result<()>;

    /// Maps `offsets` of `fd` at `host`, in place of what is mapped there.
    ///
    /// # Safety
    /// `host` up to `host + offsets.len()` must be a mapping whose owner
    /// agrees to have it replaced, and that nobody unmaps meanwhile.
    unsafe fn map_fixed(&self, host: usize, fd: BorrowedFd, offsets: Range) -> io::Result<()>;
}

/// `struct kvm_tdx_init_mem_region` of arch/x86/include/uapi/asm/kvm.h; not in
/// kvm-bindings.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TdxInitMemRegion {
    pub source_addr: u64,
    pub gpa: u64,
    pub nr_pages: u64,
}

/// `struct kvm_tdx_cmd`; not in kvm-bindings.
#[repr(C)]
#[derive(Default)]
struct TdxCommand {
    id: u32,
    flags: u32,
    data: u64,
    hw_error: u64,
}

/// `enum kvm_tdx_cmd_id`.
const KVM_TDX_INIT_MEM_REGION: u32 = 3;
const KVM_TDX_FINALIZE_VM: u32 = 4;

/// A flag of `KVM_TDX_INIT_MEM_REGION`.
const KVM_TDX_MEASURE_MEMORY_REGION: u32 = 1;

/// Of both TDX and SEV (api.rst, 4.110).
const KVM_MEMORY_ENCRYPT_OP: libc::Ioctl = libc::_IOWR::<libc::c_ulong>(KVMIO, 0xba);

/// The running kernel.
pub struct Linux;

impl Linux {
    /// # Safety
    /// `command.data` is what its `id` wants, valid for the kernel.
    unsafe fn tdx(&self, fd: BorrowedFd, mut command: TdxCommand) -> CommandResult {
        // SAFETY: `command` is the struct that this ioctl reads and writes.
        let value = unsafe { libc::ioctl(fd.as_raw_fd(), KVM_MEMORY_ENCRYPT_OP, &mut command) };
        let firmware = command.hw_error;
        result(value)
            .map(drop)
            .map_err(|error| CommandError { error, firmware })
    }

    /// # Safety
    /// `data` points to what the command wants, valid for the kernel.
    unsafe fn sev(&self, vm: BorrowedFd, sev: BorrowedFd, id: u32, data: u64) -> CommandResult {
        let mut command = kvm_sev_cmd {
            id,
            data,
            sev_fd: sev.as_raw_fd() as u32,
            pad0: 0,
            error: 0,
        };
        // SAFETY: `command` is the struct that this ioctl reads and writes.
        let value = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_MEMORY_ENCRYPT_OP, &mut command) };
        let firmware = u64::from(command.error);
        result(value)
            .map(drop)
            .map_err(|error| CommandError { error, firmware })
    }
}

const KVM_CHECK_EXTENSION: libc::Ioctl = libc::_IO(KVMIO, 0x03);
const KVM_SET_MEMORY_ATTRIBUTES: libc::Ioctl = libc::_IOW::<kvm_memory_attributes>(KVMIO, 0xd2);
const KVM_CREATE_GUEST_MEMFD: libc::Ioctl = libc::_IOWR::<kvm_create_guest_memfd>(KVMIO, 0xd4);

/// Number of cachestat(2), the same on every architecture with 64-bit Rust;
/// not in the libc crate.
const SYS_CACHESTAT: libc::c_long = 451;

/// As many NUMA nodes as any Linux has (`CONFIG_NODES_SHIFT` is 10 at most).
const MAX_NODES: usize = 1024;

/// include/uapi/linux/mman.h; not in the libc crate.
#[repr(C)]
struct CachestatRange {
    off: u64,
    len: u64,
}

/// include/uapi/linux/mman.h; not in the libc crate.
#[repr(C)]
#[derive(Default)]
struct Cachestat {
    nr_cache: u64,
    nr_dirty: u64,
    nr_writeback: u64,
    nr_evicted: u64,
    nr_recently_evicted: u64,
}

/// The result of a call that reports failure as a negative number and errno.
fn result<T: PartialOrd + Default>(value: T) -> io::Result<T> {
    if value < T::default() {
        Err(io::Error::last_os_error())
    } else {
        Ok(value)
    }
}

/// Takes over a file descriptor that a call just returned.
fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    let fd = result(fd)?;
    // SAFETY: the kernel just made `fd` for this caller, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The fd as a file, which is not closed.
fn as_file(fd: BorrowedFd) -> ManuallyDrop<File> {
    // SAFETY: open for as long as it is borrowed, and never closed by this value.
    ManuallyDrop::new(unsafe { File::from_raw_fd(fd.as_raw_fd()) })
}

impl Kernel for Linux {
    fn check_extension(&self, vm: BorrowedFd, capability: u32) -> io::Result<u32> {
        let arg = libc::c_ulong::from(capability);
        // SAFETY: the ioctl takes its argument by value and touches no memory.
        let value = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CHECK_EXTENSION, arg) };
        result(value).map(|value| value as u32)
    }

    fn create_guest_memfd(&self, vm: BorrowedFd, size: u64) -> io::Result<OwnedFd> {
        let arg = kvm_create_guest_memfd {
            size,
            flags: 0,
            reserved: [0; 6],
        };
        // SAFETY: `arg` is the struct that this ioctl reads.
        let fd = owned(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CREATE_GUEST_MEMFD, &arg) })?;
        // KVM makes it without close-on-exec; a child must not inherit guest memory.
        // SAFETY: fcntl(F_SETFD) on an fd that we own touches no memory.
        result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) })?;
        Ok(fd)
    }

    fn set_memory_attributes(&self, vm: BorrowedFd, gpa: Range, attributes: u64) -> io::Result<()> {
        let arg = kvm_memory_attributes {
            address: gpa.start(),
            size: gpa.len(),
            attributes,
            flags: 0,
        };
        // SAFETY: `arg` is the struct that this ioctl reads.
        result(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_SET_MEMORY_ATTRIBUTES, &arg) }).map(drop)
    }

    fn create_memfd(&self, name: &CStr, size: u64, huge_page: Option<u64>) -> io::Result<OwnedFd> {
        let size =
            libc::off_t::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        let huge = huge_page.map_or(0, |unit| {
            libc::MFD_HUGETLB | unit.trailing_zeros() << libc::MFD_HUGE_SHIFT
        });
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | huge;
        // SAFETY: `name` is a C string that outlives the call.
        let fd = owned(unsafe { libc::memfd_create(name.as_ptr(), flags) })?;
        let seals = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
        // SAFETY: both calls work on an fd that we own and touch no memory.
        unsafe {
            result(libc::ftruncate(fd.as_raw_fd(), size))?;
            result(libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals))?;
        }
        Ok(fd)
    }

    fn punch_hole(&self, fd: BorrowedFd, offsets: Range) -> io::Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (offset, len) = (offsets.start() as libc::off_t, offsets.len() as libc::off_t);
        // SAFETY: the call changes the file only. Who maps the file sees zeroes.
        result(unsafe { libc::fallocate(fd.as_raw_fd(), mode, offset, len) }).map(drop)
    }

    fn allocate(&self, fd: BorrowedFd, offsets: Range) -> io::Result<()> {
        let (offset, len) = (offsets.start() as libc::off_t, offsets.len() as libc::off_t);
        // SAFETY: the call changes the file only.
        let value =
            unsafe { libc::fallocate(fd.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, offset, len) };
        result(value).map(drop)
    }

    fn read(&self, fd: BorrowedFd, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        as_file(fd).read_exact_at(buffer, offset)
    }

    fn write(&self, fd: BorrowedFd, offset: u64, buffer: &[u8]) -> io::Result<()> {
        as_file(fd).write_all_at(buffer, offset)
    }

    fn swap_mempolicy(&self, policy: &NumaPolicy) -> io::Result<NumaPolicy> {
        let (mut mode, mut nodes) = (0, vec![0; MAX_NODES / libc::c_ulong::BITS as usize]);
        let no_address = std::ptr::null::<libc::c_void>();
        // SAFETY: the kernel writes `mode` and `MAX_NODES` bits of `nodes`.
        result(unsafe {
            let (mode, nodes) = (&raw mut mode, nodes.as_mut_ptr());
            libc::syscall(
                libc::SYS_get_mempolicy,
                mode,
                nodes,
                MAX_NODES,
                no_address,
                0,
            )
        })?;
        // The kernel reads one bit less than it is told, an old mistake.
        let count = policy.nodes.len() * libc::c_ulong::BITS as usize + 1;
        // SAFETY: the kernel reads `count - 1` bits of `policy.nodes`.
        result(unsafe {
            let nodes = policy.nodes.as_ptr();
            libc::syscall(libc::SYS_set_mempolicy, policy.mode, nodes, count)
        })?;
        Ok(NumaPolicy { mode, nodes })
    }

    fn held(&self, fd: BorrowedFd, offsets: Range) -> io::Result<u64> {
        let range = CachestatRange {
            off: offsets.start(),
            len: offsets.len(),
        };
        let mut stat = Cachestat::default();
        // SAFETY: the kernel reads `range` and writes `stat`, both live and of
        // the layout that include/uapi/linux/mman.h gives.
        result(unsafe {
            let (range, stat) = (&raw const range, &raw mut stat);
            libc::syscall(SYS_CACHESTAT, fd.as_raw_fd(), range, stat, 0)
        })?;
        // For shmem an evicted page is one that lies in swap.
        Ok((stat.nr_cache + stat.nr_evicted) * crate::range::GRANULE)
    }

    fn blocks(&self, fd: BorrowedFd) -> io::Result<u64> {
        let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
        // SAFETY: fstat fills `stat` where it returns 0, and only then is it read.
        let stat = unsafe {
            result(libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()))?;
            stat.assume_init()
        };
        Ok(stat.st_blocks as u64 * 512)
    }

    unsafe fn tdx_init_mem_region(
        &self,
        vcpu: BorrowedFd,
        region: &mut TdxInitMemRegion,
        measure: bool,
    ) -> CommandResult {
        let command = TdxCommand {
            id: KVM_TDX_INIT_MEM_REGION,
            flags: if measure {
                KVM_TDX_MEASURE_MEMORY_REGION
            } else {
                0
            },
            data: std::ptr::from_mut(region) as u64,
            hw_error: 0,
        };
        // SAFETY: `data` is the struct that the command reads and writes; what
        // it points to is the caller's promise.
        unsafe { self.tdx(vcpu, command) }
    }

    fn tdx_finalize(&self, vm: BorrowedFd) -> CommandResult {
        let command = TdxCommand {
            id: KVM_TDX_FINALIZE_VM,
            ..Default::default()
        };
        // SAFETY: the command takes no data.
        unsafe { self.tdx(vm, command) }
    }

    fn snp_launch_start(
        &self,
        vm: BorrowedFd,
        sev: BorrowedFd,
        start: &kvm_sev_snp_launch_start,
    ) -> CommandResult {
        let data = std::ptr::from_ref(start) as u64;
        // SAFETY: `data` is the struct that the command reads; it has no pointers.
        unsafe { self.sev(vm, sev, sev_cmd_id_KVM_SEV_SNP_LAUNCH_START, data) }
    }

    unsafe fn snp_launch_update(
        &self,
        vm: BorrowedFd,
        sev: BorrowedFd,
        update: &mut kvm_sev_snp_launch_update,
    ) -> CommandResult {
        let data = std::ptr::from_mut(update) as u64;
        // SAFETY: `data` is the struct that the command reads and writes; what
        // it points to is the caller's promise.
        unsafe { self.sev(vm, sev, sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE, data) }
    }

    unsafe fn snp_launch_finish(
        &self,
        vm: BorrowedFd,
        sev: BorrowedFd,
        finish: &kvm_sev_snp_launch_finish,
    ) -> CommandResult {
        let data = std::ptr::from_ref(finish) as u64;
        // SAFETY: `data` is the struct that the command reads; what it points
        // to is the caller's promise.
        unsafe { self.sev(vm, sev, sev_cmd_id_KVM_SEV_SNP_LAUNCH_FINISH, data) }
    }

    unsafe fn zap(&self, host: usize, len: usize) -> io::Result<()> {
        let host = host as *mut libc::c_void;
        // SAFETY: the owner of the mapping agrees, and a shared one of a file
        // loses nothing.
        result(unsafe { libc::madvise(host, len, libc::MADV_DONTNEED) }).map(drop)
    }

    unsafe fn map_fixed(&self, host: usize, fd: BorrowedFd, offsets: Range) -> io::Result<()> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: the caller owns what is mapped at `host` and lets us replace it.
        let mapped = unsafe {
            libc::mmap(
                host as *mut libc::c_void,
                offsets.len() as usize,
                protection,
                flags,
                fd.as_raw_fd(),
                offsets.start() as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}
