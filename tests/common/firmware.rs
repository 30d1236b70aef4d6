//! MODELS of the TDX module and of the SEV-SNP firmware, as a VMM meets them at
//! KVM's ioctls. They are models: no hardware is used, and none is vouched for.
//! Each rule names where the kernel's sources or documents have it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use kvm_bindings::kvm_sev_snp_launch_update;
use privmem::kernel::TdxInitMemRegion;

/// What was put into the measurement, or left out, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Added {
    pub gfn: u64,
    /// `KVM_SEV_SNP_PAGE_TYPE_*`; for TDX 1 if measured, 4 if not.
    pub page_type: u8,
    /// The byte that the page is full of.
    pub contents: u8,
}

/// The errno of KVM and the status of the firmware.
pub type Refusal = (i32, u64);

/// One of the two models.
pub trait Firmware: Send {
    /// KVM asks to add one page. `private` tells its memory attribute.
    fn add(&mut self, page: Added, private: bool) -> Result<(), Refusal>;

    fn start(&mut self, policy: u64) -> Result<(), Refusal>;

    fn finish(&mut self) -> Result<(), Refusal>;

    /// What both models keep.
    fn launch(&mut self) -> &mut Launch;

    /// The page is private no more, or was freed.
    fn remove(&mut self, gfn: u64) {
        self.launch().pages.remove(&gfn);
        self.launch().accepted.remove(&gfn);
    }

    /// Whether the guest may touch a private page. Of what came by conversion it
    /// gets #VE (TDX) or #VC (SEV-SNP) instead, until it has accepted it; what it
    /// was launched with it need not accept.
    fn is_accepted(&mut self, gfn: u64) -> bool {
        self.launch().accepted.contains(&gfn)
    }

    /// The guest accepts a private page, by TDG.MEM.PAGE.ACCEPT or PVALIDATE.
    fn accept(&mut self, gfn: u64, size: u64) -> Result<(), NotAccepted> {
        // Private pages are of 4 KiB. A guest asks for less then: try_accept_one()
        // in arch/x86/coco/tdx/tdx-shared.c, PVALIDATE_FAIL_SIZEMISMATCH in
        // arch/x86/coco/sev/.
        if size != 4096 {
            return Err(NotAccepted::SizeMismatch);
        }
        // Twice is a sign that somebody has replaced the page:
        // PVALIDATE_FAIL_NOUPDATE in arch/x86/coco/sev/.
        match self.launch().accepted.insert(gfn) {
            true => Ok(()),
            false => Err(NotAccepted::Already),
        }
    }

    /// What was added so far.
    fn log(&mut self) -> &[Added] {
        &self.launch().log
    }

    /// Errors to give, before anything else, from the next calls to
    /// [`Firmware::add`] and [`Firmware::finish`]: 0 for none.
    fn contention(&mut self) -> &mut VecDeque<i32> {
        &mut self.launch().contention
    }
}

/// Why a guest's page is not accepted.
#[derive(Debug, PartialEq, Eq)]
pub enum NotAccepted {
    SizeMismatch,
    Already,
}

/// How far a launch is.
#[derive(Default)]
pub struct Launch {
    /// Pages with initial contents.
    pages: BTreeMap<u64, u8>,
    /// Private pages that the guest may touch.
    accepted: BTreeSet<u64>,
    log: Vec<Added>,
    contention: VecDeque<i32>,
    started: bool,
    finished: bool,
}

impl Launch {
    fn contended(&mut self) -> Result<(), Refusal> {
        match self.contention.pop_front() {
            None | Some(0) => Ok(()),
            Some(errno) => Err((errno, 0)),
        }
    }

    fn add(&mut self, page: Added) {
        self.pages.insert(page.gfn, page.page_type);
        self.accepted.insert(page.gfn);
        self.log.push(page);
    }
}

/// Model of a TDX module behind KVM.
#[derive(Default)]
pub struct TdxModule(Launch);

impl Firmware for TdxModule {
    fn add(&mut self, page: Added, private: bool) -> Result<(), Refusal> {
        // tdx_vcpu_init_mem_region(): "Once TD is finalized, the initial guest
        // memory is fixed."
        if self.0.finished {
            return Err((libc::EINVAL, 0));
        }
        // A pending signal, or an operand that the module is busy with.
        self.0.contended()?;
        // intel-tdx.rst: "memory attribute of the range [gpa, gpa + nr_pages]
        // needs to be private".
        if !private {
            return Err((libc::EINVAL, 0));
        }
        // TDH.MEM.PAGE.ADD of a page that is there: kvm_tdp_mmu_map_private_pfn()
        // finds it mapped, and gives EIO.
        if self.0.pages.contains_key(&page.gfn) {
            return Err((libc::EIO, 0));
        }
        self.0.add(page);
        Ok(())
    }

    fn start(&mut self, _: u64) -> Result<(), Refusal> {
        Err((libc::ENOTTY, 0))
    }

    fn finish(&mut self) -> Result<(), Refusal> {
        // tdx_td_finalize(): EINVAL in state TD_STATE_RUNNABLE.
        if self.0.finished {
            return Err((libc::EINVAL, 0));
        }
        // tdx_td_finalize(): EBUSY where the module says TDX_OPERAND_BUSY.
        self.0.contended()?;
        self.0.finished = true;
        Ok(())
    }

    fn launch(&mut self) -> &mut Launch {
        &mut self.0
    }
}

/// Model of SEV-SNP firmware and RMP behind KVM.
#[derive(Default)]
pub struct SnpFirmware(Launch);

/// include/uapi/linux/psp-sev.h.
const SEV_RET_INVALID_GUEST_STATE: u64 = 2;
const SEV_RET_INVALID_PARAM: u64 = 0x16;

/// Contents of a CPUID page that this firmware does not accept.
pub const BAD_CPUID: u8 = 0xbd;
/// What it would accept in its place.
pub const GOOD_CPUID: u8 = 0x60;

impl Firmware for SnpFirmware {
    fn add(&mut self, page: Added, private: bool) -> Result<(), Refusal> {
        // snp_launch_update(): EINVAL without a context.
        if !self.0.started {
            return Err((libc::EINVAL, 0));
        }
        // kvm_gmem_populate(): a signal; snp_launch_update() makes it EIO.
        self.0.contended().map_err(|_| (libc::EIO, 0))?;
        // amd-memory-encryption.rst: "It is required that the GPA ranges
        // initialized by this command have had the
        // KVM_MEMORY_ATTRIBUTE_PRIVATE attribute set in advance."
        // sev_gmem_post_populate(): EEXIST for a page that is assigned in the
        // RMP. Both come as EIO.
        if !private || self.0.pages.contains_key(&page.gfn) {
            return Err((libc::EIO, 0));
        }
        if self.0.finished {
            return Err((libc::EIO, SEV_RET_INVALID_GUEST_STATE));
        }
        let cpuid = kvm_bindings::KVM_SEV_SNP_PAGE_TYPE_CPUID as u8;
        if page.page_type == cpuid && page.contents == BAD_CPUID {
            return Err((libc::EIO, SEV_RET_INVALID_PARAM));
        }
        self.0.add(page);
        Ok(())
    }

    fn start(&mut self, policy: u64) -> Result<(), Refusal> {
        // snp_launch_start(): one context only, and bits that a policy must have
        // (SNP_POLICY_MASK_RSVD_MBO).
        if self.0.started || policy & 1 << 17 == 0 {
            return Err((libc::EINVAL, 0));
        }
        self.0.started = true;
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Refusal> {
        // snp_launch_finish(): EINVAL without a context.
        if !self.0.started {
            return Err((libc::EINVAL, 0));
        }
        if self.0.finished {
            return Err((libc::EIO, SEV_RET_INVALID_GUEST_STATE));
        }
        self.0.finished = true;
        Ok(())
    }

    fn launch(&mut self) -> &mut Launch {
        &mut self.0
    }
}

/// What both commands check of their arguments.
struct Command {
    gfn: u64,
    pages: u64,
    page_type: u8,
}

impl Command {
    fn of_tdx(region: &TdxInitMemRegion, measure: bool) -> Option<Command> {
        // tdx_vcpu_init_mem_region().
        let bad = region.source_addr == 0
            || !region.source_addr.is_multiple_of(4096)
            || !region.gpa.is_multiple_of(4096)
            || region.nr_pages == 0;
        (!bad).then_some(Command {
            gfn: region.gpa / 4096,
            pages: region.nr_pages,
            page_type: if measure { 1 } else { 4 },
        })
    }

    fn of_snp(update: &kvm_sev_snp_launch_update) -> Option<Command> {
        // snp_launch_update().
        let zero = kvm_bindings::KVM_SEV_SNP_PAGE_TYPE_ZERO as u8;
        let no_source = update.uaddr == 0 || !update.uaddr.is_multiple_of(4096);
        let bad = update.len == 0
            || !update.len.is_multiple_of(4096)
            || update.flags != 0
            || ![1, 3, 4, 5, 6].contains(&update.type_)
            || (update.type_ != zero && no_source);
        (!bad).then_some(Command {
            gfn: update.gfn_start,
            pages: update.len / 4096,
            page_type: update.type_,
        })
    }
}

/// The byte that a page of a test's source begins with; 0 where there is none.
///
/// # Safety
/// There is a page at `address`, or it is 0.
unsafe fn contents(address: u64) -> u8 {
    match address {
        0 => 0,
        // SAFETY: by contract.
        _ => unsafe { *(address as *const u8) },
    }
}

/// KVM's part of `KVM_TDX_INIT_MEM_REGION`: `region` is moved on to what is left.
///
/// # Safety
/// As many pages as `region` says are readable at its `source_addr`.
pub unsafe fn tdx_init_mem_region(
    region: &mut TdxInitMemRegion,
    measure: bool,
    mut add: impl FnMut(Added) -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    let command = Command::of_tdx(region, measure).ok_or((libc::EINVAL, 0))?;
    for gfn in command.gfn..command.gfn + command.pages {
        add(Added {
            gfn,
            page_type: command.page_type,
            // SAFETY: a page for each that is left, by contract.
            contents: unsafe { contents(region.source_addr) },
        })?;
        region.source_addr += 4096;
        region.gpa += 4096;
        region.nr_pages -= 1;
    }
    Ok(())
}

/// KVM's part of `KVM_SEV_SNP_LAUNCH_UPDATE`: `update` is moved on to what is
/// left.
///
/// # Safety
/// As many bytes as `update` says are readable at its `uaddr`, and writable for
/// a page of type CPUID, unless its type is ZERO.
pub unsafe fn snp_launch_update(
    update: &mut kvm_sev_snp_launch_update,
    mut add: impl FnMut(Added) -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    let command = Command::of_snp(update).ok_or((libc::EINVAL, 0))?;
    for gfn in command.gfn..command.gfn + command.pages {
        // SAFETY: a page for each that is left, or none, by contract.
        let contents = unsafe { contents(update.uaddr) };
        let added = add(Added {
            gfn,
            page_type: command.page_type,
            contents,
        });
        if let Err((errno, status)) = added {
            if status != 0 && contents == BAD_CPUID {
                // SAFETY: a page of type CPUID may be written to, by contract.
                unsafe { (update.uaddr as *mut u8).write_bytes(GOOD_CPUID, 4096) };
            }
            // kvm_gmem_populate(): what was done comes before why it ended.
            return match gfn > command.gfn {
                true => Ok(()),
                false => Err((errno, status)),
            };
        }
        update.gfn_start += 1;
        update.len -= 4096;
        update.uaddr += if update.uaddr == 0 { 0 } else { 4096 };
    }
    Ok(())
}
