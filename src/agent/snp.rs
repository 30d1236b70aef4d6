//! The SEV-SNP firmware, through KVM.
//! Source: Documentation/virt/kvm/x86/amd-memory-encryption.rst.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{
    KVM_SEV_SNP_PAGE_TYPE_CPUID, KVM_SEV_SNP_PAGE_TYPE_NORMAL, KVM_SEV_SNP_PAGE_TYPE_SECRETS,
    KVM_SEV_SNP_PAGE_TYPE_UNMEASURED, KVM_SEV_SNP_PAGE_TYPE_ZERO, kvm_sev_snp_launch_update,
};
pub use kvm_bindings::{
    kvm_sev_snp_launch_finish as SnpFinish, kvm_sev_snp_launch_start as SnpStart,
};

use super::{Agent, InitialPages, PageType, repeat};
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::range::GRANULE;

/// The policy that QEMU has by default: SMT is allowed, debugging is not; bit 17
/// is always set. (Written out: of kvm-bindings only layouts are used, no code.)
const DEFAULT_START: SnpStart = SnpStart {
    policy: 0x30000,
    gosvw: [0; 16],
    flags: 0,
    pad0: [0; 6],
    pad1: [0; 4],
};

/// Neither an ID block nor data of the host.
const DEFAULT_FINISH: SnpFinish = SnpFinish {
    id_block_uaddr: 0,
    id_auth_uaddr: 0,
    id_block_en: 0,
    auth_key_en: 0,
    vcek_disabled: 0,
    host_data: [0; 32],
    pad0: [0; 3],
    flags: 0,
    pad1: [0; 4],
};

/// The agent of a `KVM_X86_SNP_VM`.
///
/// A conversion changes the owner of pages in the RMP when the guest next
/// touches them; it must validate them again (PVALIDATE). KVM gives pages of a
/// punched private store back to the host in the RMP.
///
/// The firmware can move a page, contents included: `SNP_PAGE_MOVE` to another
/// host page; `SNP_PAGE_SWAP_OUT` and `SNP_PAGE_SWAP_IN` to ordinary memory,
/// encrypted and authenticated, and back (SEV Secure Nested Paging Firmware ABI
/// Specification). KVM lets nobody ask for that, so that
/// [`Agent::check_relocate`] refuses.
pub struct Snp {
    vm: BorrowedFd<'static>,
    sev: BorrowedFd<'static>,
    start: Mutex<SnpStart>,
    finish: Mutex<SnpFinish>,
}

impl Snp {
    /// `vm` is KVM's VM fd, initialized by `KVM_SEV_INIT2`, `sev` is /dev/sev.
    pub fn new(vm: BorrowedFd<'static>, sev: BorrowedFd<'static>) -> Snp {
        Snp {
            vm,
            sev,
            start: Mutex::new(DEFAULT_START),
            finish: Mutex::new(DEFAULT_FINISH),
        }
    }

    /// With what [`Agent::prepare`] is to begin the launch; the policy 0x30000
    /// by default.
    pub fn set_start(&self, start: SnpStart) {
        *self.start.lock().unwrap_or_else(PoisonError::into_inner) = start;
    }

    /// With what [`Agent::finalize`] is to end the launch; nothing by default.
    ///
    /// # Safety
    /// The addresses in `finish` are those of an ID block and its
    /// authentication, valid until the launch has ended, where `id_block_en`
    /// says that there are any.
    pub unsafe fn set_finish(&self, finish: SnpFinish) {
        *self.finish.lock().unwrap_or_else(PoisonError::into_inner) = finish;
    }
}

/// The kernel's number of a type: all that `snp_launch_update()` in
/// arch/x86/kvm/svm/sev.c takes.
fn number(page_type: PageType) -> Result<u32> {
    match page_type {
        PageType::Normal => Ok(KVM_SEV_SNP_PAGE_TYPE_NORMAL),
        PageType::Unmeasured => Ok(KVM_SEV_SNP_PAGE_TYPE_UNMEASURED),
        PageType::Zero => Ok(KVM_SEV_SNP_PAGE_TYPE_ZERO),
        PageType::Secrets => Ok(KVM_SEV_SNP_PAGE_TYPE_SECRETS),
        PageType::Cpuid => Ok(KVM_SEV_SNP_PAGE_TYPE_CPUID),
        PageType::Vmsa => Err(Error::Vmsa),
    }
}

impl Agent for Snp {
    fn name(&self) -> &str {
        "sev-snp"
    }

    /// `KVM_SEV_SNP_LAUNCH_START`, which makes the guest's context.
    fn prepare(&self, kernel: &dyn Kernel) -> Result<()> {
        let start = *self.start.lock().unwrap_or_else(PoisonError::into_inner);
        repeat(0, || {
            (0, kernel.snp_launch_start(self.vm, self.sev, &start))
        })
        .map_err(|error| error.of("KVM_SEV_SNP_LAUNCH_START", None))
    }

    fn check_populate(&self, page_type: PageType) -> Result<()> {
        number(page_type).map(drop)
    }

    /// `KVM_SEV_SNP_LAUNCH_UPDATE`, which may do some of the pages, and leaves
    /// the rest in its argument.
    fn populate(&self, pages: InitialPages) -> Result<()> {
        let mut update = kvm_sev_snp_launch_update {
            gfn_start: pages.gpa.start() / GRANULE,
            uaddr: pages.source.map_or(0, |source| source.as_mut_ptr() as u64),
            len: pages.gpa.len(),
            type_: number(pages.page_type)? as u8,
            pad0: 0,
            flags: 0,
            pad1: 0,
            pad2: [0; 4],
        };
        let kernel = pages.kernel;
        let mut failed_at = None;
        let done = repeat(update.len, || {
            let len = update.len;
            // SAFETY: `source` has as many bytes as `gpa`, and the kernel only
            // moves the update on within both.
            let mut result = unsafe { kernel.snp_launch_update(self.vm, self.sev, &mut update) };
            if let Err(error) = &mut result
                && error.is_eio_of_kvm()
                && failed_at.replace(len) != Some(len)
            {
                // A signal before the first page comes as EIO, too: once more
                // tells. See snp_launch_update() in arch/x86/kvm/svm/sev.c.
                error.error = io::Error::from_raw_os_error(libc::EINTR);
            }
            (update.len, result)
        });
        let at = update.gfn_start.saturating_mul(GRANULE);
        done.map_err(|error| error.of("KVM_SEV_SNP_LAUNCH_UPDATE", Some(at)))
    }

    fn check_relocate(&self) -> Result<()> {
        Err(Error::CannotRelocate {
            agent: self.name().to_owned(),
            why: "the SEV-SNP firmware can (SNP_PAGE_MOVE, SNP_PAGE_SWAP_OUT, SNP_PAGE_SWAP_IN), \
                  but no kernel has a call of KVM that asks it to",
        })
    }

    fn finalize(&self, kernel: &dyn Kernel) -> Result<()> {
        let finish = *self.finish.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: `set_finish` promised what the addresses in it are.
        repeat(0, || {
            (0, unsafe {
                kernel.snp_launch_finish(self.vm, self.sev, &finish)
            })
        })
        .map_err(|error| error.of("KVM_SEV_SNP_LAUNCH_FINISH", None))
    }

    /// By the C-bit of its page tables.
    fn chooses_side(&self) -> bool {
        true
    }
}
