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
use std::panic::resume_unwind;
use std::thread;

use kvm_bindings::{
    KVMIO, kvm_create_guest_memfd, kvm_memory_attributes, kvm_pre_fault_memory, kvm_sev_cmd,
    kvm_sev_snp_launch_finish, kvm_sev_snp_launch_start, kvm_sev_snp_launch_update,
    sev_cmd_id_KVM_SEV_SNP_LAUNCH_FINISH, sev_cmd_id_KVM_SEV_SNP_LAUNCH_START,
    sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE,
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

    /// `KVM_PRE_FAULT_MEMORY` (api.rst, 4.143) on a vCPU's fd: maps for the guest
    /// what it may reach of `gpa`, as far as one call goes, and takes pages for
    /// it. Returns what is left.
    fn pre_fault(&self, vcpu: BorrowedFd, gpa: Range) -> io::Result<Option<Range>>;

    /// memfd_create(2) and ftruncate(2), sealed against any other size; of huge
    /// pages (`MFD_HUGETLB`) where their size, a power of two, is given.
    fn create_memfd(&self, name: &CStr, size: u64, huge_page: Option<u64>) -> io::Result<OwnedFd>;

    /// fallocate(2) with `FALLOC_FL_PUNCH_HOLE`: unmaps and frees the pages.
    fn punch_hole(&self, fd: BorrowedFd, offsets: Range) -> io::Result<()>;

    /// fallocate(2): takes the pages that are not there yet. On failure some of
    /// them may have been taken. New pages of a memfd are not cleared; those that an
    /// earlier call has taken, and that nobody has touched since, are.
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

    /// Maps all `size` bytes of the memfd `fd`, where KVM can use huge pages for them,
    /// and not for core dumps nor child processes. mmap(2), madvise(2).
    fn map_for_slots(&self, fd: BorrowedFd, size: u64) -> io::Result<usize>;

    /// munmap(2).
    ///
    /// # Safety
    /// `host` up to `host + len` is a mapping that nobody accesses any more.
    unsafe fn unmap(&self, host: usize, len: usize);

    /// Makes accesses to `len` bytes at `host` fail, without taking memory, or no
    /// longer: madvise(2), `MADV_GUARD_INSTALL` and `MADV_GUARD_REMOVE`. What is mapped
    /// there is unmapped. EINVAL for a memfd before Linux 6.15, for huge pages, and for
    /// locked memory.
    ///
    /// # Safety
    /// `host` up to `host + len` is a mapping whose owner agrees.
    unsafe fn guard(&self, host: usize, len: u64, install: bool) -> io::Result<()>;

    /// Holds off whoever writes to `len` bytes at `host`, a mapping of a memfd,
    /// for as long as the result lives; who reads goes on. userfaultfd(2) with
    /// `UFFDIO_REGISTER_MODE_WP` (EINVAL before Linux 5.19).
    ///
    /// The kernel's own writers, such as read(2), are held off as well, which not
    /// every process may do: EPERM without `vm.unprivileged_userfaultfd`,
    /// CAP_SYS_PTRACE and access to /dev/userfaultfd.
    ///
    /// # Safety
    /// As for [`Kernel::map_fixed`]; whoever writes there waits.
    unsafe fn write_protect(&self, host: usize, len: u64) -> io::Result<Blocked>;

    /// As [`Kernel::map_fixed`], for a memfd and whatever is mapped at `host`;
    /// who reads or writes there waits for as long as the result lives.
    /// userfaultfd(2) with the modes MISSING and MINOR.
    ///
    /// # Safety
    /// As for [`Kernel::map_fixed`]; whoever touches it waits.
    unsafe fn map_blocked(
        &self,
        host: usize,
        fd: BorrowedFd,
        offsets: Range,
    ) -> io::Result<Blocked>;

    /// What file `fd` is: fstat(2) and fstatfs(2).
    fn file(&self, fd: BorrowedFd) -> io::Result<FileFacts>;

    /// fdatasync(2).
    fn sync(&self, fd: BorrowedFd) -> io::Result<()>;

    /// posix_fadvise(2) with `POSIX_FADV_DONTNEED`: a file on a disk gives its
    /// pages back, once they are written and nobody maps them.
    fn evict(&self, fd: BorrowedFd, offsets: Range) -> io::Result<()>;
}

/// Which file an fd is of, as far as guest memory can lie there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileFacts {
    pub id: FileId,
    /// In bytes; `None` for what is no regular file, or is of huge pages.
    pub size: Option<u64>,
    /// A memfd, or a file of a tmpfs, which the kernel can block.
    pub in_memory: bool,
}

/// A file among all of the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileId {
    pub device: u64,
    pub inode: u64,
}

/// Who writes to a range of addresses, or touches it, waits while this lives.
/// Closing the fd lets all go on, whatever went wrong before; they are woken all
/// the same, because a child that was just forked may have the fd as well.
pub struct Blocked {
    uffd: OwnedFd,
    range: UffdRange,
}

impl Blocked {
    /// `uffd` is a userfaultfd, and `len` bytes at `host` are registered with it.
    pub fn new(uffd: OwnedFd, host: usize, len: u64) -> Blocked {
        let range = UffdRange {
            start: host as u64,
            len,
        };
        Blocked { uffd, range }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        for request in [UFFDIO_UNREGISTER, UFFDIO_WAKE] {
            // Refused where nothing is registered any more, because something
            // else was mapped there: only waking is left to do then.
            // SAFETY: both read this struct and touch no memory of the range.
            unsafe { libc::ioctl(self.uffd.as_raw_fd(), request, &self.range) };
        }
    }
}

/// `struct uffdio_range` of include/uapi/linux/userfaultfd.h; as those below
/// not in the libc crate.
#[repr(C)]
#[derive(Clone, Copy)]
struct UffdRange {
    start: u64,
    len: u64,
}

/// `struct uffdio_api`.
#[repr(C)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct UffdRegister {
    range: UffdRange,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct UffdWriteProtect {
    range: UffdRange,
    mode: u64,
}

/// Bytes of `struct uffd_msg`, of which the first one is its kind.
const UFFD_MSG: usize = 32;

const UFFD_API: u64 = 0xaa;
const UFFD_EVENT_REMAP: u8 = 0x14;
const UFFD_FEATURE_EVENT_REMAP: u64 = 1 << 2;
const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const UFFD_FEATURE_MINOR_SHMEM: u64 = 1 << 10;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1 << 0;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_REGISTER_MODE_MINOR: u64 = 1 << 2;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const USERFAULTFD_IOC_NEW: libc::Ioctl = libc::_IO(0xaa, 0x00);
const UFFDIO_REGISTER: libc::Ioctl = libc::_IOWR::<UffdRegister>(0xaa, 0x00);
const UFFDIO_UNREGISTER: libc::Ioctl = libc::_IOR::<UffdRange>(0xaa, 0x01);
const UFFDIO_WAKE: libc::Ioctl = libc::_IOR::<UffdRange>(0xaa, 0x02);
const UFFDIO_WRITEPROTECT: libc::Ioctl = libc::_IOWR::<UffdWriteProtect>(0xaa, 0x06);
const UFFDIO_API: libc::Ioctl = libc::_IOWR::<UffdApi>(0xaa, 0x3f);

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
    /// A userfaultfd with `features`, which sees the kernel's own faults as
    /// well: by system call for whom the host trusts, otherwise by a device that
    /// has permissions of its own.
    fn userfaultfd(&self, features: u64) -> io::Result<OwnedFd> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the call takes flags and touches no memory.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let uffd = owned(fd as libc::c_int).or_else(|refused| {
            let device = File::open("/dev/userfaultfd").map_err(|_| refused)?;
            // SAFETY: as above.
            owned(unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) })
        })?;
        let mut api = UffdApi {
            api: UFFD_API,
            features,
            ioctls: 0,
        };
        // SAFETY: `api` is the struct that this ioctl reads and writes.
        result(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &mut api) })?;
        Ok(uffd)
    }

    /// # Safety
    /// The owner of `len` bytes at `host` agrees that who touches them waits.
    unsafe fn register(
        &self,
        uffd: OwnedFd,
        host: usize,
        len: u64,
        mode: u64,
    ) -> io::Result<Blocked> {
        let blocked = Blocked::new(uffd, host, len);
        let mut register = UffdRegister {
            range: blocked.range,
            mode,
            ioctls: 0,
        };
        let uffd = blocked.uffd.as_raw_fd();
        // SAFETY: `register` is the struct that this ioctl reads and writes; who
        // waits is the caller's promise.
        result(unsafe { libc::ioctl(uffd, UFFDIO_REGISTER, &mut register) })?;
        Ok(blocked)
    }

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
const KVM_PRE_FAULT_MEMORY: libc::Ioctl = libc::_IOWR::<kvm_pre_fault_memory>(KVMIO, 0xd5);
const KVM_CREATE_GUEST_MEMFD: libc::Ioctl = libc::_IOWR::<kvm_create_guest_memfd>(KVMIO, 0xd4);

/// Number of cachestat(2), the same on every architecture with 64-bit Rust;
/// not in the libc crate.
const SYS_CACHESTAT: libc::c_long = 451;

/// include/uapi/linux/memfd.h, from Linux 6.3 on; not in the libc crate. Guest memory
/// is no program: without the flag, Linux before 6.6 fails memfd_create(2) where
/// vm.memfd_noexec is 2.
const MFD_NOEXEC_SEAL: libc::c_uint = 0x0008;

/// include/uapi/asm-generic/mman-common.h, from Linux 6.13 on.
const MADV_GUARD_INSTALL: libc::c_int = 102;
const MADV_GUARD_REMOVE: libc::c_int = 103;

/// Of x86-64; also how QEMU aligns RAM.
const HUGE_PAGE: usize = 2 << 20;

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

/// A mapping that only we know of. Nobody can touch it at first: where the
/// process has locked all its memory, the kernel would fill it at once, and what
/// is filled is not waited for.
struct Aside(*mut libc::c_void, usize);

impl Aside {
    fn new(fd: BorrowedFd, offsets: Range) -> io::Result<Aside> {
        let len = offsets.len() as usize;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_NONE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                offsets.start() as libc::off_t,
            )
        };
        match start {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            start => Ok(Aside(start, len)),
        }
    }

    /// Moves the mapping, registered with `uffd`, to where another one is, at
    /// once. The kernel tells `uffd` so, and waits until that is read.
    ///
    /// # Safety
    /// `host` is a mapping of this size whose owner lets it be replaced.
    unsafe fn move_to(self, host: usize, uffd: &OwnedFd) -> io::Result<()> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the mapping is ours alone.
        result(unsafe { libc::mprotect(self.0, self.1, protection) })?;
        let (from, len) = (self.0 as usize, self.1);
        let remap = || {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let (from, to) = (from as *mut libc::c_void, host as *mut libc::c_void);
            // SAFETY: `from` is ours, and `host` may be replaced.
            match unsafe { libc::mremap(from, len, len, flags, to) } {
                libc::MAP_FAILED => Err(io::Error::last_os_error()),
                _ => Ok(()),
            }
        };
        thread::scope(|scope| {
            let mover = thread::Builder::new().spawn_scoped(scope, remap)?;
            while !mover.is_finished() && !next_is_remap(uffd) {}
            mover.join().unwrap_or_else(|panic| resume_unwind(panic))
        })?;
        // Nothing is left where it was.
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made, and that nobody else knows of.
        unsafe { libc::munmap(self.0, self.1) };
    }
}

/// Reads what a userfaultfd tells next, for a moment: whether that is a move.
/// Faults are told as well; those that wait are woken without an answer.
fn next_is_remap(uffd: &OwnedFd) -> bool {
    const MOMENT_MS: libc::c_int = 1;
    let mut poll = libc::pollfd {
        fd: uffd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let mut message = [0; UFFD_MSG];
    // SAFETY: poll(2) writes one struct, read(2) at most one message.
    unsafe {
        libc::poll(&mut poll, 1, MOMENT_MS);
        let size = libc::read(uffd.as_raw_fd(), message.as_mut_ptr().cast(), UFFD_MSG);
        size == UFFD_MSG as isize && message[0] == UFFD_EVENT_REMAP
    }
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
        // KVM makes it without close-on-exec, and has no flag for that: what another
        // thread executes between the two calls inherits guest memory.
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

    fn pre_fault(&self, vcpu: BorrowedFd, gpa: Range) -> io::Result<Option<Range>> {
        let mut arg = kvm_pre_fault_memory {
            gpa: gpa.start(),
            size: gpa.len(),
            ..Default::default()
        };
        // SAFETY: `arg` is the struct that this ioctl reads and writes.
        result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_PRE_FAULT_MEMORY, &mut arg) })?;
        Ok(Range::new(arg.gpa, arg.size).ok())
    }

    fn create_memfd(&self, name: &CStr, size: u64, huge_page: Option<u64>) -> io::Result<OwnedFd> {
        let size =
            libc::off_t::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        let huge = huge_page.map_or(0, |unit| {
            libc::MFD_HUGETLB | unit.trailing_zeros() << libc::MFD_HUGE_SHIFT
        });
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | huge;
        // SAFETY: `name` is a C string that outlives the call.
        let create = |flags| owned(unsafe { libc::memfd_create(name.as_ptr(), flags) });
        let fd = create(flags | MFD_NOEXEC_SEAL).or_else(|error| match error.raw_os_error() {
            // Linux before 6.3 does not know the flag.
            Some(libc::EINVAL) => create(flags),
            _ => Err(error),
        })?;
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

    fn map_for_slots(&self, fd: BorrowedFd, size: u64) -> io::Result<usize> {
        // KVM maps huge pages only where the address is as far from a multiple of their
        // size as the guest-physical one (`kvm_alloc_memslot_metadata()`).
        let len = size as usize;
        let whole = len
            .checked_add(HUGE_PAGE)
            .ok_or(io::Error::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let reserved = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(std::ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0)
        };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let (begin, end) = (reserved as usize, reserved as usize + whole);
        let start = begin.next_multiple_of(HUGE_PAGE);
        let after = start + len;
        let at = start as *mut libc::c_void;
        // Without access at first: after mlockall(2) the kernel would take all pages.
        let map = || {
            // SAFETY: replaces a part of the mapping above, which nobody else knows of.
            unsafe {
                let flags = libc::MAP_SHARED | libc::MAP_FIXED;
                if libc::mmap(at, len, libc::PROT_NONE, flags, fd.as_raw_fd(), 0)
                    == libc::MAP_FAILED
                {
                    return Err(io::Error::last_os_error());
                }
                result(libc::munlock(at, len))?;
                result(libc::madvise(at, len, libc::MADV_DONTDUMP))?;
                result(libc::madvise(at, len, libc::MADV_DONTFORK))?;
                // An advice that not every kernel takes.
                libc::madvise(at, len, libc::MADV_HUGEPAGE);
                result(libc::mprotect(at, len, libc::PROT_READ | libc::PROT_WRITE))
            }
        };
        if let Err(error) = map() {
            // SAFETY: nobody else knows of it.
            unsafe { libc::munmap(reserved, whole) };
            return Err(error);
        }
        // SAFETY: what is left of the reservation on either side, if anything is.
        unsafe {
            for (from, to) in [(begin, start), (after, end)] {
                if from < to {
                    libc::munmap(from as *mut libc::c_void, to - from);
                }
            }
        }
        Ok(start)
    }

    unsafe fn unmap(&self, host: usize, len: usize) {
        // SAFETY: the caller's promise.
        unsafe { libc::munmap(host as *mut libc::c_void, len) };
    }

    unsafe fn guard(&self, host: usize, len: u64, install: bool) -> io::Result<()> {
        let advice = match install {
            true => MADV_GUARD_INSTALL,
            false => MADV_GUARD_REMOVE,
        };
        // SAFETY: the owner of the mapping agrees, and the file keeps its contents.
        result(unsafe { libc::madvise(host as *mut libc::c_void, len as usize, advice) }).map(drop)
    }

    unsafe fn write_protect(&self, host: usize, len: u64) -> io::Result<Blocked> {
        let uffd = self.userfaultfd(UFFD_FEATURE_WP_HUGETLBFS_SHMEM)?;
        // SAFETY: the caller owns the range and lets writers wait.
        let blocked = unsafe { self.register(uffd, host, len, UFFDIO_REGISTER_MODE_WP) }?;
        let mut protect = UffdWriteProtect {
            range: blocked.range,
            mode: UFFDIO_WRITEPROTECT_MODE_WP,
        };
        let uffd = blocked.uffd.as_raw_fd();
        // SAFETY: `protect` is the struct that this ioctl reads.
        result(unsafe { libc::ioctl(uffd, UFFDIO_WRITEPROTECT, &mut protect) })?;
        Ok(blocked)
    }

    unsafe fn map_blocked(
        &self,
        host: usize,
        fd: BorrowedFd,
        offsets: Range,
    ) -> io::Result<Blocked> {
        let uffd = self.userfaultfd(
            UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM,
        )?;
        let len = offsets.len();
        // Registered elsewhere first: between a mapping in place and its
        // registration somebody would touch it.
        let aside = Aside::new(fd, offsets)?;
        let mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR;
        // SAFETY: nobody else knows of the mapping.
        let mut blocked = unsafe { self.register(uffd, aside.0 as usize, len, mode) }?;
        // SAFETY: the caller lets us replace what is at `host`.
        unsafe { aside.move_to(host, &blocked.uffd) }?;
        blocked.range.start = host as u64;
        Ok(blocked)
    }

    fn file(&self, fd: BorrowedFd) -> io::Result<FileFacts> {
        let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
        let mut statfs = std::mem::MaybeUninit::<libc::statfs>::uninit();
        // SAFETY: both fill their struct where they return 0, and only then is
        // it read.
        let (stat, statfs) = unsafe {
            result(libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()))?;
            result(libc::fstatfs(fd.as_raw_fd(), statfs.as_mut_ptr()))?;
            (stat.assume_init(), statfs.assume_init())
        };
        let regular = stat.st_mode & libc::S_IFMT == libc::S_IFREG;
        let usable = regular && statfs.f_type != libc::HUGETLBFS_MAGIC;
        let in_memory = statfs.f_type == libc::TMPFS_MAGIC;
        Ok(FileFacts {
            id: FileId {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
            size: usable.then_some(stat.st_size as u64),
            in_memory,
        })
    }

    fn sync(&self, fd: BorrowedFd) -> io::Result<()> {
        as_file(fd).sync_data()
    }

    fn evict(&self, fd: BorrowedFd, offsets: Range) -> io::Result<()> {
        let (offset, len) = (offsets.start() as libc::off_t, offsets.len() as libc::off_t);
        let advice = libc::POSIX_FADV_DONTNEED;
        // SAFETY: the call drops what the file keeps in memory of what it has.
        match unsafe { libc::posix_fadvise(fd.as_raw_fd(), offset, len, advice) } {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}
