//! The TDX module, through KVM.
//! Source: Documentation/virt/kvm/x86/intel-tdx.rst.

use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};

use super::{Agent, InitialPages, PageType, repeat};
use crate::error::{Error, Result};
use crate::kernel::{Kernel, TdxInitMemRegion};
use crate::range::GRANULE;

/// The agent of a `KVM_X86_TDX_VM`.
///
/// A page that was converted to private has lost its contents, and the guest
/// must accept it again: the module answers its access with #VE until then.
///
/// The module can move a page, contents included, without the guest's help:
/// `TDH.MEM.RANGE.BLOCK` keeps the guest off it, `TDH.MEM.TRACK` with an IPI to
/// each vCPU flushes old translations, `TDH.MEM.PAGE.RELOCATE` copies it under
/// the guest's key to another host page and takes the block off (Intel TDX
/// Module ABI Reference Specification). KVM lets nobody ask for that, so that
/// [`Agent::check_relocate`] refuses.
pub struct Tdx {
    vm: BorrowedFd<'static>,
    vcpu: Mutex<Option<BorrowedFd<'static>>>,
}

impl Tdx {
    /// `vm` is KVM's VM fd; `KVM_TDX_INIT_VM` comes before initial contents.
    pub fn new(vm: BorrowedFd<'static>) -> Tdx {
        let vcpu = Mutex::new(None);
        Tdx { vm, vcpu }
    }

    /// Tells a vCPU's fd, initialized by `KVM_TDX_INIT_VCPU`: the command for
    /// initial contents is one of a vCPU.
    pub fn set_vcpu(&self, vcpu: BorrowedFd<'static>) {
        *self.vcpu.lock().unwrap_or_else(PoisonError::into_inner) = Some(vcpu);
    }

    fn vcpu(&self) -> Result<BorrowedFd<'static>> {
        let vcpu = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        vcpu.ok_or(Error::NoVcpu)
    }
}

impl Agent for Tdx {
    fn name(&self) -> &str {
        "tdx"
    }

    fn check_populate(&self, page_type: PageType) -> Result<()> {
        match page_type {
            PageType::Normal | PageType::Unmeasured => self.vcpu().map(drop),
            other => Err(Error::PageType {
                page_type: other.name(),
                agent: self.name().to_owned(),
            }),
        }
    }

    /// `KVM_TDX_INIT_MEM_REGION`, which does some of the pages and leaves the
    /// rest in its argument when a signal comes or the module is busy.
    fn populate(&self, pages: InitialPages) -> Result<()> {
        self.check_populate(pages.page_type)?;
        let vcpu = self.vcpu()?;
        let measure = pages.page_type == PageType::Normal;
        let Some(source) = pages.source else {
            return Err(Error::InvalidArgument("TDX pages need a source".into()));
        };
        let mut region = TdxInitMemRegion {
            source_addr: source.as_mut_ptr() as u64,
            gpa: pages.gpa.start(),
            nr_pages: pages.gpa.len() / GRANULE,
        };
        let kernel = pages.kernel;
        let done = repeat(region.nr_pages, || {
            // SAFETY: `source` has as many bytes as `gpa`, and the kernel only
            // moves the region on within both.
            let result = unsafe { kernel.tdx_init_mem_region(vcpu, &mut region, measure) };
            (region.nr_pages, result)
        });
        done.map_err(|error| error.of("KVM_TDX_INIT_MEM_REGION", Some(region.gpa)))
    }

    fn check_relocate(&self) -> Result<()> {
        Err(Error::CannotRelocate {
            agent: self.name().to_owned(),
            why: "the TDX module can (TDH.MEM.PAGE.RELOCATE), but no kernel has a call of KVM that \
                  asks it to",
        })
    }

    fn finalize(&self, kernel: &dyn Kernel) -> Result<()> {
        repeat(0, || (0, kernel.tdx_finalize(self.vm)))
            .map_err(|error| error.of("KVM_TDX_FINALIZE_VM", None))
    }

    /// By the shared bit of guest-physical addresses.
    fn chooses_side(&self) -> bool {
        true
    }
}
