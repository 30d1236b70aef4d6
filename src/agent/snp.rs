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
use crate::error::Result;
use crate::kernel::Kernel;
use crate::range::GRANULE;

/// Neither an ID block nor data of the host. (Written out: of kvm-bindings only
/// layouts are used, no code.)
const NOTHING: SnpFinish = SnpFinish {
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
pub struct Snp {
    vm: BorrowedFd<'static>,
    sev: BorrowedFd<'static>,
    finish: Mutex<SnpFinish>,
}

impl Snp {
    /// `vm` is KVM's VM fd, initialized by `KVM_SEV_INIT2`, `sev` is /dev/sev.
    pub fn new(vm: BorrowedFd<'static>, sev: BorrowedFd<'static>) -> Snp {
        let finish = Mutex::new(NOTHING);
        Snp { vm, sev, finish }
    }

    /// `KVM_SEV_SNP_LAUNCH_START`: makes the guest's context, before any
    /// initial contents.
    pub fn start(&self, kernel: &dyn Kernel, start: &SnpStart) -> Result<()> {
        repeat(0, || (0, kernel.snp_launch_start(self.vm, self.sev, start)))
            .map_err(|error| error.of("KVM_SEV_SNP_LAUNCH_START", None))
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

impl Agent for Snp {
    fn name(&self) -> &str {
        "sev-snp"
    }

    /// `KVM_SEV_SNP_LAUNCH_UPDATE`, which may do some of the pages, and leaves
    /// the rest in its argument.
    fn populate(&self, pages: InitialPages) -> Result<()> {
        let page_type = match pages.page_type {
            PageType::Normal => KVM_SEV_SNP_PAGE_TYPE_NORMAL,
            PageType::Unmeasured => KVM_SEV_SNP_PAGE_TYPE_UNMEASURED,
            PageType::Zero => KVM_SEV_SNP_PAGE_TYPE_ZERO,
            PageType::Secrets => KVM_SEV_SNP_PAGE_TYPE_SECRETS,
            PageType::Cpuid => KVM_SEV_SNP_PAGE_TYPE_CPUID,
        };
        let mut update = kvm_sev_snp_launch_update {
            gfn_start: pages.gpa.start() / GRANULE,
            uaddr: pages.source.map_or(0, |source| source.as_mut_ptr() as u64),
            len: pages.gpa.len(),
            type_: page_type as u8,
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
