//! MODELS of the TDX module and of the SEV-SNP firmware beneath an unmodified QEMU, for LD_PRELOAD.
//! They are models: no hardware is used, and none is vouched for.
//!
//! Answers what only confidential hardware can, by the models of `tests/common/firmware.rs`, and
//! hands everything else on to the kernel: a TDX or SEV-SNP VM becomes a software-protected one,
//! with the same guest_memfd, slots and attributes. What is said of VM types can be set. Every command for initial contents is written
//! as a line of JSON to the file that `LAB_FIRMWARE_LOG` names. Commands for more than two pages
//! are interrupted after the second, so that the caller has to go on.
//!
//! One more is a kernel that does not unmap what a device has mapped, while there is a file at the
//! path that `LAB_CLINGS` names.

#[path = "../../../common/firmware.rs"]
#[allow(dead_code)] // the library's own tests use more of it
mod firmware;

use std::collections::{BTreeSet, HashSet};
use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::hash::{DefaultHasher, Hasher};
use std::io::Write;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, PoisonError};

use firmware::{Firmware, Refusal, SnpFirmware, TdxModule};
use kvm_bindings::{
    KVM_CAP_VM_TYPES, KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_SEV_SNP_PAGE_TYPE_ZERO, KVM_X86_GRP_SEV,
    KVM_X86_SNP_VM, KVM_X86_SW_PROTECTED_VM, KVM_X86_TDX_VM, KVMIO, kvm_device_attr,
    kvm_memory_attributes, kvm_sev_cmd, kvm_sev_snp_launch_finish, kvm_sev_snp_launch_start,
    kvm_sev_snp_launch_update, sev_cmd_id_KVM_SEV_INIT2, sev_cmd_id_KVM_SEV_SNP_LAUNCH_FINISH,
    sev_cmd_id_KVM_SEV_SNP_LAUNCH_START, sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE,
};
use libc::{c_int, c_long, c_ulong};
use privmem::kernel::TdxInitMemRegion;
use serde_json::{Value, json};

const KVM_CREATE_VM: c_ulong = libc::_IO(KVMIO, 0x01);
const KVM_CHECK_EXTENSION: c_ulong = libc::_IO(KVMIO, 0x03);
const KVM_CREATE_VCPU: c_ulong = libc::_IO(KVMIO, 0x41);
const KVM_MEMORY_ENCRYPT_OP: c_ulong = libc::_IOWR::<c_ulong>(KVMIO, 0xba);
const KVM_SET_MEMORY_ATTRIBUTES: c_ulong = libc::_IOW::<kvm_memory_attributes>(KVMIO, 0xd2);
const KVM_GET_DEVICE_ATTR: c_ulong = libc::_IOW::<kvm_device_attr>(KVMIO, 0xe2);
/// include/uapi/linux/psp-sev.h: of a packed struct of 16 bytes.
const SEV_ISSUE_CMD: c_ulong = libc::_IOWR::<[u8; 16]>(b'S' as u32, 0);

/// `struct kvm_tdx_cmd` and `enum kvm_tdx_cmd_id` of arch/x86/include/uapi/asm/kvm.h.
#[repr(C)]
struct TdxCommand {
    id: u32,
    flags: u32,
    data: u64,
    hw_error: u64,
}

const KVM_TDX_CAPABILITIES: u32 = 0;
const KVM_TDX_INIT_VM: u32 = 1;
const KVM_TDX_INIT_VCPU: u32 = 2;
const KVM_TDX_INIT_MEM_REGION: u32 = 3;
const KVM_TDX_FINALIZE_VM: u32 = 4;
const KVM_TDX_GET_CPUID: u32 = 5;

/// `struct kvm_tdx_capabilities` before its list of CPUID leaves, of which there are none.
#[repr(C)]
struct TdxCapabilities {
    supported_attrs: u64,
    supported_xfam: u64,
    tdvmcallinfo: [u64; 4],
    reserved: [u64; 250],
    cpuid_leaves: u32,
}

const TDX_TD_ATTRIBUTES_SEPT_VE_DISABLE: u64 = 1 << 28;

/// The one confidential VM of this process.
struct Machine {
    is_tdx: bool,
    model: Box<dyn Firmware>,
    private: BTreeSet<u64>,
    vcpus: HashSet<c_int>,
    interrupted: usize,
}

static MACHINE: Mutex<Option<Machine>> = Mutex::new(None);

static LOG: LazyLock<Option<File>> = LazyLock::new(|| {
    let path = std::env::var_os("LAB_FIRMWARE_LOG")?;
    let mut options = OpenOptions::new();
    options.create(true).append(true).open(path).ok()
});

/// What KVM_CAP_VM_TYPES is to say, from `LAB_KVM_VM_TYPES`; otherwise the kernel's own and the two
/// types that are models here.
static VM_TYPES: LazyLock<Option<c_int>> =
    LazyLock::new(|| std::env::var("LAB_KVM_VM_TYPES").ok()?.parse().ok());

fn log(line: Value) {
    if let Some(mut log) = LOG.as_ref() {
        // Whoever reads the log finds out what is missing.
        let _ = writeln!(log, "{line}");
    }
}

/// Requests of VFIO and iommufd, from include/uapi/linux/vfio.h and iommufd.h.
const VFIO_IOMMU_UNMAP_DMA: c_ulong = 0x3b72;
const IOMMU_IOAS_UNMAP: c_ulong = 0x3b86;

static CLINGS: LazyLock<Option<PathBuf>> =
    LazyLock::new(|| std::env::var_os("LAB_CLINGS").map(PathBuf::from));

/// ioctl(2), as QEMU calls it.
///
/// # Safety
/// As for ioctl(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, arg: *mut c_void) -> c_int {
    let mut machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: `arg` is what the request wants, by contract.
    let answer = unsafe { answer(&mut machine, fd, request, arg) };
    let own = machine.is_some();
    drop(machine);
    match answer {
        Some(Ok(())) => 0,
        Some(Err((errno, _))) => {
            // SAFETY: errno is this thread's own.
            unsafe { *libc::__errno_location() = errno };
            -1
        }
        None => {
            // SAFETY: the caller's own request, or its like for another type of VM.
            let result = unsafe { forward(fd, request, arg) };
            if own && result >= 0 {
                // SAFETY: the kernel took `arg`.
                unsafe { note(request, arg, result) };
            }
            result
        }
    }
}

/// What the models say; none where the kernel is to be asked.
///
/// # Safety
/// As for ioctl(2).
unsafe fn answer(
    machine: &mut Option<Machine>,
    fd: c_int,
    request: c_ulong,
    arg: *mut c_void,
) -> Option<Result<(), Refusal>> {
    match request {
        VFIO_IOMMU_UNMAP_DMA | IOMMU_IOAS_UNMAP if CLINGS.as_ref().is_some_and(|p| p.exists()) => {
            Some(Err((libc::EIO, 0)))
        }
        KVM_CREATE_VM if model(arg as u32).is_some() => {
            *machine = model(arg as u32).map(|model| Machine {
                is_tdx: arg as u32 == KVM_X86_TDX_VM,
                model,
                private: BTreeSet::new(),
                vcpus: HashSet::new(),
                interrupted: 0,
            });
            None
        }
        // SAFETY: each of these takes a pointer to the struct.
        KVM_MEMORY_ENCRYPT_OP => unsafe {
            let machine = machine.as_mut()?;
            Some(match machine.is_tdx {
                true => machine.tdx(fd, &mut *arg.cast()),
                false => machine.sev(&mut *arg.cast()),
            })
        },
        // SAFETY: as above.
        KVM_GET_DEVICE_ATTR => unsafe {
            let attr = &*arg.cast::<kvm_device_attr>();
            (attr.group == KVM_X86_GRP_SEV && machine.is_some()).then(|| {
                // No features of a VMSA.
                (attr.addr as *mut u64).write(0);
                Ok(())
            })
        },
        // The status of the platform is left as the caller cleared it.
        SEV_ISSUE_CMD => Some(Ok(())),
        _ => None,
    }
}

fn model(vm_type: u32) -> Option<Box<dyn Firmware>> {
    match vm_type {
        KVM_X86_TDX_VM => Some(Box::new(TdxModule::default())),
        KVM_X86_SNP_VM => Some(Box::new(SnpFirmware::default())),
        _ => None,
    }
}

/// # Safety
/// As for ioctl(2).
unsafe fn forward(fd: c_int, request: c_ulong, mut arg: *mut c_void) -> c_int {
    let vm_types = request == KVM_CHECK_EXTENSION && arg as u32 == KVM_CAP_VM_TYPES;
    if request == KVM_CREATE_VM && model(arg as u32).is_some() {
        arg = KVM_X86_SW_PROTECTED_VM as usize as *mut c_void;
    }
    // SAFETY: by contract; a number in place of another.
    let result = unsafe { libc::syscall(libc::SYS_ioctl, fd as c_long, request, arg) } as c_int;
    match vm_types && result >= 0 {
        true => VM_TYPES.unwrap_or(result | 1 << KVM_X86_TDX_VM | 1 << KVM_X86_SNP_VM),
        false => result,
    }
}

/// Keeps what the models need of what the kernel has done.
///
/// # Safety
/// `arg` is what the request wants.
unsafe fn note(request: c_ulong, arg: *mut c_void, result: c_int) {
    let mut machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(machine) = machine.as_mut() else {
        return;
    };
    match request {
        KVM_CREATE_VCPU => drop(machine.vcpus.insert(result)),
        KVM_SET_MEMORY_ATTRIBUTES => {
            // SAFETY: the request takes a pointer to this struct.
            let set = unsafe { &*arg.cast::<kvm_memory_attributes>() };
            let private = set.attributes & u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE) != 0;
            for gfn in set.address / 4096..(set.address + set.size) / 4096 {
                if private {
                    machine.private.insert(gfn);
                } else if machine.private.remove(&gfn) {
                    machine.model.remove(gfn);
                }
            }
        }
        _ => {}
    }
}

impl Machine {
    /// # Safety
    /// `command.data` is what the command wants.
    unsafe fn tdx(&mut self, fd: c_int, command: &mut TdxCommand) -> Result<(), Refusal> {
        let of_a_vcpu = [
            KVM_TDX_INIT_VCPU,
            KVM_TDX_INIT_MEM_REGION,
            KVM_TDX_GET_CPUID,
        ];
        if of_a_vcpu.contains(&command.id) != self.vcpus.contains(&fd) {
            return Err((libc::EINVAL, 0));
        }
        command.hw_error = 0;
        match command.id {
            KVM_TDX_CAPABILITIES => {
                // SAFETY: the command takes a pointer to this struct.
                let caps = unsafe { &mut *(command.data as *mut TdxCapabilities) };
                caps.supported_attrs = TDX_TD_ATTRIBUTES_SEPT_VE_DISABLE;
                caps.supported_xfam = u64::MAX;
                caps.cpuid_leaves = 0;
                Ok(())
            }
            KVM_TDX_GET_CPUID => {
                // SAFETY: a `struct kvm_cpuid2`, which begins with the number of leaves.
                unsafe { (command.data as *mut u32).write(0) };
                Ok(())
            }
            KVM_TDX_INIT_VM => self.done("KVM_TDX_INIT_VM", json!({}), Ok(())),
            KVM_TDX_INIT_VCPU => self.done("KVM_TDX_INIT_VCPU", json!({}), Ok(())),
            KVM_TDX_INIT_MEM_REGION => {
                // SAFETY: the command takes a pointer to this struct.
                let region = unsafe { &mut *(command.data as *mut TdxInitMemRegion) };
                // SAFETY: as many pages at `source_addr`, by contract.
                unsafe { self.tdx_init_mem_region(region, command.flags) }
            }
            KVM_TDX_FINALIZE_VM => {
                let result = self.model.finish();
                self.done("KVM_TDX_FINALIZE_VM", json!({}), result)
            }
            _ => Err((libc::ENOTTY, 0)),
        }
    }

    /// # Safety
    /// As many pages as `region` says are readable at its `source_addr`.
    unsafe fn tdx_init_mem_region(
        &mut self,
        region: &mut TdxInitMemRegion,
        flags: u32,
    ) -> Result<(), Refusal> {
        let (gpa, pages) = (region.gpa, region.nr_pages);
        // SAFETY: by contract.
        let contents = unsafe { digest(region.source_addr, pages) };
        self.interrupt(pages, [libc::EINTR, libc::EAGAIN]);
        let add = |page: firmware::Added| {
            let private = self.private.contains(&page.gfn);
            self.model.add(page, private)
        };
        // SAFETY: by contract.
        let result = unsafe { firmware::tdx_init_mem_region(region, flags & 1 != 0, add) };
        let what = json!({"gpa": gpa, "pages": pages, "flags": flags, "contents": contents,
            "left": region.nr_pages});
        self.done("KVM_TDX_INIT_MEM_REGION", what, result)
    }

    /// # Safety
    /// `command.data` is what the command wants.
    unsafe fn sev(&mut self, command: &mut kvm_sev_cmd) -> Result<(), Refusal> {
        command.error = 0;
        #[allow(non_upper_case_globals)] // as kvm-bindings has them
        let result = match command.id {
            sev_cmd_id_KVM_SEV_INIT2 => self.done("KVM_SEV_INIT2", json!({}), Ok(())),
            sev_cmd_id_KVM_SEV_SNP_LAUNCH_START => {
                // SAFETY: the command takes a pointer to this struct.
                let start = unsafe { &*(command.data as *const kvm_sev_snp_launch_start) };
                let result = self.model.start(start.policy);
                self.done(
                    "KVM_SEV_SNP_LAUNCH_START",
                    json!({"policy": start.policy}),
                    result,
                )
            }
            sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE => {
                // SAFETY: the command takes a pointer to this struct.
                let update = unsafe { &mut *(command.data as *mut kvm_sev_snp_launch_update) };
                // SAFETY: as many bytes at `uaddr`, by contract.
                unsafe { self.snp_launch_update(update) }
            }
            sev_cmd_id_KVM_SEV_SNP_LAUNCH_FINISH => {
                // SAFETY: the command takes a pointer to this struct.
                let finish = unsafe { &*(command.data as *const kvm_sev_snp_launch_finish) };
                let what =
                    json!({"host_data": finish.host_data, "id_block_en": finish.id_block_en});
                let result = self.model.finish();
                self.done("KVM_SEV_SNP_LAUNCH_FINISH", what, result)
            }
            _ => Err((libc::EINVAL, 0)),
        };
        if let Err((_, status)) = result {
            command.error = status as u32;
        }
        result
    }

    /// # Safety
    /// As many bytes as `update` says are readable, or more as its type says, at its `uaddr`.
    unsafe fn snp_launch_update(
        &mut self,
        update: &mut kvm_sev_snp_launch_update,
    ) -> Result<(), Refusal> {
        let (gpa, pages, page_type) = (update.gfn_start * 4096, update.len / 4096, update.type_);
        if u32::from(page_type) == KVM_SEV_SNP_PAGE_TYPE_ZERO {
            // KVM does not look at it, and callers may leave it out.
            update.uaddr = 0;
        }
        // SAFETY: by contract.
        let contents = unsafe { digest(update.uaddr, pages) };
        self.interrupt(pages, [libc::EINTR; 2]);
        let add = |page: firmware::Added| {
            let private = self.private.contains(&page.gfn);
            self.model.add(page, private)
        };
        // SAFETY: by contract.
        let result = unsafe { firmware::snp_launch_update(update, add) };
        let what = json!({"gpa": gpa, "pages": pages, "type": page_type, "contents": contents,
            "left": update.len / 4096});
        self.done("KVM_SEV_SNP_LAUNCH_UPDATE", what, result)
    }

    /// Has a command for many pages end early, with each of the two errors in turn.
    fn interrupt(&mut self, pages: u64, errors: [i32; 2]) {
        let contention = self.model.contention();
        contention.clear();
        if pages > 2 {
            contention.extend([0, 0, errors[self.interrupted % 2]]);
            self.interrupted += 1;
        }
    }

    fn done(
        &self,
        command: &str,
        mut what: Value,
        result: Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        what["command"] = command.into();
        what["errno"] = result.err().map_or(0, |(errno, _)| errno).into();
        log(what);
        result
    }
}

/// Stands for the contents of pages; 0 where there are none.
///
/// # Safety
/// As many pages are readable at `address`, unless it is 0.
unsafe fn digest(address: u64, pages: u64) -> u64 {
    if address == 0 {
        return 0;
    }
    let mut hasher = DefaultHasher::new();
    // SAFETY: by contract.
    hasher
        .write(unsafe { std::slice::from_raw_parts(address as *const u8, pages as usize * 4096) });
    hasher.finish()
}
