//! The calls into the running kernel one by one, as far as any machine has them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use kvm_bindings::kvm_sev_snp_launch_update;
use privmem::agent::{SnpFinish, SnpStart};
use privmem::kernel::{Kernel, Linux, TdxInitMemRegion};
use privmem::{Error, GRANULE, Range, Vm};

const PAGE: usize = GRANULE as usize;

/// `KVM_CREATE_VM`; not in the kvm-bindings crate.
const KVM_CREATE_VM: libc::Ioctl = libc::_IO(kvm_bindings::KVMIO, 0x01);

fn granules(first: u64, count: u64) -> Range {
    Range::new(first * GRANULE, count * GRANULE).unwrap()
}

fn memfd(granules: u64) -> File {
    let fd = Linux
        .create_memfd(c"test", granules * GRANULE, None)
        .unwrap();
    File::from(fd)
}

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err()?.raw_os_error()
}

/// An fd that lives as long as the program, as that of a VM must.
fn forever(fd: OwnedFd) -> BorrowedFd<'static> {
    let fd: &OwnedFd = Box::leak(Box::new(fd));
    fd.as_fd()
}

/// A VM of KVM's ordinary type, which has no private memory.
fn ordinary_vm() -> io::Result<OwnedFd> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    // SAFETY: the ioctl takes its argument by value and touches no memory.
    let vm = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM, 0) };
    if vm < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made the fd for us, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(vm) })
}

/// Guest memory is no program: Linux 6.3 to 6.5 refuse a memfd that may be one where
/// `vm.memfd_noexec` is 2.
#[test]
fn a_store_cannot_be_executed() {
    const MFD_NOEXEC_SEAL: libc::c_uint = 8;
    const F_SEAL_EXEC: libc::c_int = 0x20;
    // SAFETY: the call reads a string that outlives it.
    let probe = unsafe { libc::memfd_create(c"probe".as_ptr(), MFD_NOEXEC_SEAL) };
    if probe < 0 {
        println!("skipped: this kernel has no MFD_NOEXEC_SEAL");
        return;
    }
    // SAFETY: a new fd that nobody else has.
    drop(unsafe { OwnedFd::from_raw_fd(probe) });
    let file = memfd(1);
    // SAFETY: the call touches no memory.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    assert!(seals > 0 && seals & F_SEAL_EXEC != 0, "{seals:#x}");
}

#[test]
fn a_store_keeps_its_size() {
    let file = memfd(4);
    for size in [0, 3 * GRANULE, 5 * GRANULE] {
        assert_eq!(errno(file.set_len(size)), Some(libc::EPERM));
    }
    assert_eq!(file.metadata().unwrap().len(), 4 * GRANULE);
    assert_eq!(
        errno(Linux.create_memfd(c"test", 1 << 63, None)),
        Some(libc::EFBIG)
    );
}

#[test]
fn a_hole_frees_its_pages_and_no_others() {
    let file = memfd(4);
    assert_eq!(Linux.blocks(file.as_fd()).unwrap(), 0);
    file.write_all_at(&[7; 4 * PAGE], 0).unwrap();
    let before = Linux.blocks(file.as_fd()).unwrap();
    Linux.punch_hole(file.as_fd(), granules(1, 2)).unwrap();
    let mut content = [1; 4 * PAGE];
    file.read_exact_at(&mut content, 0).unwrap();
    assert!(content[PAGE..3 * PAGE].iter().all(|byte| *byte == 0));
    assert!(content[..PAGE].iter().all(|byte| *byte == 7));
    assert!(content[3 * PAGE..].iter().all(|byte| *byte == 7));
    assert_eq!(before, 4 * GRANULE);
    assert_eq!(Linux.blocks(file.as_fd()).unwrap(), 2 * GRANULE);
}

#[test]
fn what_is_held_is_counted_within_the_range() {
    let file = memfd(4);
    file.write_all_at(&[7; PAGE], GRANULE).unwrap();
    match Linux.held(file.as_fd(), granules(0, 4)) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
            println!("skipped: this kernel has no cachestat(2)");
        }
        held => {
            assert_eq!(held.unwrap(), GRANULE);
            let beside = Linux.held(file.as_fd(), granules(2, 2));
            assert_eq!(beside.unwrap(), 0);
        }
    }
}

#[test]
fn what_is_no_vm_is_refused_by_every_call() {
    let fd = forever(memfd(1).into());
    let error = Vm::with_kvm(fd).err().unwrap();
    assert_eq!(error.errno(), libc::ENOTTY);
    let text = error.to_string();
    assert!(text.contains("KVM_CHECK_EXTENSION"), "{text}");
    let created = Linux.create_guest_memfd(fd, GRANULE);
    assert_eq!(errno(created), Some(libc::ENOTTY));
    let set = Linux.set_memory_attributes(fd, granules(0, 1), 8);
    assert_eq!(errno(set), Some(libc::ENOTTY));
}

#[test]
fn commands_to_a_firmware_say_what_the_kernel_says() {
    let fd = forever(memfd(1).into());
    // SAFETY: the structs are of the kernel's, and zeroes are valid ones.
    let (start, mut update, finish): (SnpStart, kvm_sev_snp_launch_update, SnpFinish) =
        unsafe { std::mem::zeroed() };
    let mut region = TdxInitMemRegion::default();
    // SAFETY: no pages are to be read.
    let results = unsafe {
        [
            Linux.tdx_init_mem_region(fd, &mut region, true),
            Linux.tdx_finalize(fd),
            Linux.snp_launch_start(fd, fd, &start),
            Linux.snp_launch_update(fd, fd, &mut update),
            Linux.snp_launch_finish(fd, fd, &finish),
        ]
    };
    for result in results {
        let error = result.unwrap_err();
        assert_eq!(error.error.raw_os_error(), Some(libc::ENOTTY));
        assert_eq!(error.firmware, 0);
    }
}

#[test]
fn an_ordinary_vm_is_refused_with_the_types_there_are() {
    let vm = match ordinary_vm() {
        Ok(vm) => forever(vm),
        Err(error) => return println!("skipped: no KVM: {error}"),
    };
    let error = Vm::with_kvm(vm).err().unwrap();
    assert!(matches!(error, Error::NoPrivateMemory(_)), "{error}");
    assert!(error.to_string().contains("default (0)"), "{error}");
    let set = Linux.set_memory_attributes(vm, granules(0, 1), 8);
    assert!(set.is_err(), "there is no such attribute to set");
}

/// Where KVM has `guest_memfd` for ordinary VMs, it is the one that private
/// memory is kept in.
#[test]
fn a_guest_memfd_is_not_passed_on_to_other_programs() {
    let vm = match ordinary_vm() {
        Ok(vm) => vm,
        Err(error) => return println!("skipped: no KVM: {error}"),
    };
    let capability = Linux.check_extension(vm.as_fd(), kvm_bindings::KVM_CAP_GUEST_MEMFD);
    if capability.unwrap() == 0 {
        return println!("skipped: an ordinary VM has no guest_memfd here");
    }
    let fd = Linux.create_guest_memfd(vm.as_fd(), GRANULE).unwrap();
    // SAFETY: fcntl(F_GETFD) on an fd that we own touches no memory.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) };
    assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    let content = File::from(fd).write_all_at(&[7; PAGE], 0);
    assert!(content.is_err(), "the host cannot write to it");
}

/// What the kernel itself writes through the mapping for memory slots, as KVM does, fails where
/// that is hidden, and takes no memory.
#[test]
fn the_kernels_own_writes_take_no_hidden_memory() {
    let (store, source) = (memfd(4), memfd(1));
    source.write_all_at(&[7; PAGE], 0).unwrap();
    let start = Linux.map_for_slots(store.as_fd(), 4 * GRANULE).unwrap();
    assert_eq!(start % (2 << 20), 0);
    let write = |granule: usize| {
        let at = (start + granule * PAGE) as *mut libc::c_void;
        // SAFETY: nobody else accesses the mapping.
        match unsafe { libc::pread(source.as_raw_fd(), at, PAGE, 0) } {
            -1 => io::Error::last_os_error().raw_os_error(),
            _ => None,
        }
    };
    let guard = |install| {
        // SAFETY: as above.
        unsafe { Linux.guard(start + PAGE, 2 * GRANULE, install) }
    };
    let zap = |granule: usize| {
        // SAFETY: as above.
        unsafe { Linux.zap(start + granule * PAGE, PAGE) }.unwrap();
    };
    assert_eq!(write(1), None);
    match guard(true) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            return println!("skipped: this kernel has no guard regions in shared memory");
        }
        hidden => hidden.unwrap(),
    }
    Linux.punch_hole(store.as_fd(), granules(0, 4)).unwrap();
    // A page that has failed may have left a mark in the mapping; guard regions stay.
    zap(1);
    let written: Vec<_> = (0..4).map(write).collect();
    assert_eq!(
        written,
        [None, Some(libc::EFAULT), Some(libc::EFAULT), None]
    );
    assert_eq!(store.metadata().unwrap().blocks() * 512, 2 * GRANULE);
    guard(false).unwrap();
    assert_eq!(write(2), None);
    // SAFETY: as above.
    unsafe { Linux.unmap(start, 4 * PAGE) };
}
