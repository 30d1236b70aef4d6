//! A VM: its trust agent, and which region lies at which guest-physical address.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crossbeam::sync::{ShardedLock, ShardedLockReadGuard};
use kvm_bindings::{
    KVM_CAP_GUEST_MEMFD, KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_USER_MEMORY2, KVM_CAP_VM_TYPES,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
};

use crate::agent::{Agent, Emulated, SwProtected};
use crate::error::{Error, Result};
use crate::failed::{FailedConversion, FailedConversions};
use crate::kernel::{Blocked, Kernel, Linux};
use crate::places::{Part, Taken};
use crate::range::{GRANULE, Range};
use crate::region::Region;
use crate::state::Side;
use crate::store::retry;

/// Who makes one side of a range reachable, and the other not.
pub(crate) enum Switch {
    /// KVM, by memory attributes; the VM fd.
    Kvm(BorrowedFd<'static>),
    /// This library, by the VMM's mapping.
    Mapping,
}

/// A stretch of a region that the guest sees at `gpa`.
#[derive(Clone)]
pub struct Binding {
    pub region: Arc<Region>,
    pub gpa: Range,
    /// Offset into the region of the first byte.
    pub offset: u64,
}

impl Binding {
    pub(crate) fn offsets(&self) -> Range {
        self.gpa.rebase(self.gpa.start(), self.offset)
    }

    /// The runs of this stretch as the guest sees them.
    fn runs(&self) -> impl Iterator<Item = (Range, Side)> {
        let runs = self.region.state.runs(self.offsets().granules());
        runs.map(|run| {
            let offsets = Range::from_granules(run.granules);
            (offsets.rebase(self.offset, self.gpa.start()), run.side)
        })
    }
}

/// In order of guest-physical address.
pub(crate) type Bindings = Vec<Binding>;

/// Those that have any part of `gpa`.
#[inline]
pub(crate) fn overlapping(bindings: &Bindings, gpa: Range) -> &[Binding] {
    let first = bindings.partition_point(|binding| binding.gpa.end() <= gpa.start());
    let rest = &bindings[first..];
    let after = rest
        .iter()
        .position(|binding| binding.gpa.start() >= gpa.end());
    &rest[..after.unwrap_or(rest.len())]
}

/// What the guest sees of `offsets` of a region: each part, and where.
pub(crate) fn seen<'a>(
    bindings: &'a Bindings,
    region: &'a Region,
    offsets: Range,
) -> impl Iterator<Item = (Range, Range)> {
    let own = |binding: &&Binding| std::ptr::eq(&*binding.region, region);
    bindings.iter().filter(own).filter_map(move |binding| {
        let part = binding.offsets().intersection(&offsets)?;
        Some((part, part.rebase(binding.offset, binding.gpa.start())))
    })
}

/// How far the launch of a guest is, as far as it is ours.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Launch {
    New,
    Prepared,
    /// Initial contents are final.
    Finalized,
}

/// A VM. Regions belong to one VM; bindings say where its guest sees them.
pub struct Vm {
    pub(crate) kernel: Arc<dyn Kernel>,
    pub(crate) switch: Switch,
    pub(crate) agent: Arc<dyn Agent>,
    /// How far the launch is. Held while initial contents are given; goes before
    /// all other locks.
    launch: RwLock<Launch>,
    /// Initial contents were given.
    pub(crate) populated: AtomicBool,
    /// Read by every conversion, changed only when memory slots change.
    bindings: ShardedLock<Bindings>,
    serials: AtomicU64,
    pub(crate) failed: FailedConversions,
    /// Files of the caller's where private contents lie.
    pub(crate) taken: Taken,
}

impl Vm {
    /// A software-protected VM, whose private memory KVM keeps.
    ///
    /// `fd` is KVM's VM fd; fails where the VM has no private memory, with a
    /// message that says what is missing and which VM types there are.
    pub fn with_kvm(fd: BorrowedFd<'static>) -> Result<Arc<Vm>> {
        Vm::with_kernel(Arc::new(Linux), Some(fd))
    }

    /// A VM with the emulated trust agent, which protects nothing.
    pub fn emulated() -> Result<Arc<Vm>> {
        Vm::with_kernel(Arc::new(Linux), None)
    }

    /// As [`Vm::with_kvm`] (with a VM fd) or [`Vm::emulated`] (without), on a
    /// kernel of the caller's. For tests.
    pub fn with_kernel(
        kernel: Arc<dyn Kernel>,
        fd: Option<BorrowedFd<'static>>,
    ) -> Result<Arc<Vm>> {
        match fd {
            Some(_) => Vm::with_agent(kernel, fd, Arc::new(SwProtected)),
            None => Vm::with_agent(kernel, fd, Arc::new(Emulated)),
        }
    }

    /// A VM with a trust agent of the caller's, and KVM's VM fd; without one,
    /// memory changes side in the VMM's mapping only.
    pub fn with_agent(
        kernel: Arc<dyn Kernel>,
        fd: Option<BorrowedFd<'static>>,
        agent: Arc<dyn Agent>,
    ) -> Result<Arc<Vm>> {
        // SAFETY: sysconf touches no memory of ours.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
        if page != GRANULE {
            return Err(Error::HostPageSize(page));
        }
        let switch = match fd {
            None => Switch::Mapping,
            Some(fd) => {
                check_capabilities(kernel.as_ref(), fd)?;
                Switch::Kvm(fd)
            }
        };
        Ok(Arc::new(Vm {
            kernel,
            switch,
            agent,
            launch: RwLock::new(Launch::New),
            populated: AtomicBool::new(false),
            bindings: ShardedLock::default(),
            serials: AtomicU64::new(0),
            failed: FailedConversions::default(),
            taken: Taken::default(),
        }))
    }

    /// Whether the host reaches contents of both sides: nobody protects them.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self.switch, Switch::Mapping)
    }

    /// The bindings, which stay as they are for as long as this is held.
    pub(crate) fn bindings(&self) -> ShardedLockReadGuard<'_, Bindings> {
        self.bindings.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins the time for initial contents; see [`Agent::prepare`]. Refused the
    /// second time. Not to be called where the VMM has done so by itself.
    pub fn prepare(&self) -> Result<()> {
        let mut launch = self.launch.write().unwrap_or_else(PoisonError::into_inner);
        match *launch {
            Launch::New => self.agent.prepare(self.kernel.as_ref())?,
            Launch::Prepared => return Err(Error::Prepared),
            Launch::Finalized => return Err(Error::Finalized),
        }
        *launch = Launch::Prepared;
        Ok(())
    }

    /// Ends the time for initial contents; see [`Agent::finalize`]. Refused the
    /// second time. What the shared stores hold where memory is private is
    /// freed: sources of initial contents may have been put there.
    pub fn finalize(&self) -> Result<()> {
        let mut launch = self.launch.write().unwrap_or_else(PoisonError::into_inner);
        if *launch == Launch::Finalized {
            return Err(Error::Finalized);
        }
        self.agent.finalize(self.kernel.as_ref())?;
        *launch = Launch::Finalized;
        for binding in self.bindings().iter() {
            binding.region.free_sources(binding.offsets());
        }
        Ok(())
    }

    /// Keeps the time for initial contents from ending, if it has not.
    pub(crate) fn not_finalized(&self) -> Result<impl Sized> {
        let launch = self.launch.read().unwrap_or_else(PoisonError::into_inner);
        match *launch {
            Launch::Finalized => Err(Error::Finalized),
            Launch::New | Launch::Prepared => Ok(launch),
        }
    }

    /// Keeps contents that were part of a launch from going, if it has ended.
    pub(crate) fn check_reset(&self) -> Result<()> {
        let launched = self.not_finalized().is_err();
        match launched && self.populated.load(Ordering::Relaxed) {
            true => Err(Error::CannotReset),
            false => Ok(()),
        }
    }

    /// The failed request that came `index` before the last one, if it is kept:
    /// those of [`Vm::convert`], the guest's and the operator's.
    pub fn failed_conversion(&self, index: usize) -> Option<FailedConversion> {
        self.failed.get(index)
    }

    pub(crate) fn next_serial(&self) -> u64 {
        self.serials.fetch_add(1, Ordering::Relaxed)
    }

    /// Says that the guest sees `size` bytes of `region` from `offset` at
    /// guest-physical `gpa`, and gives KVM the state of that stretch. To be
    /// called before the memory slot is made, so that the guest never reaches
    /// the wrong side.
    ///
    /// One byte of a region can be bound once: KVM refuses a second slot for
    /// the same place of a `guest_memfd` (EEXIST).
    pub fn bind(&self, region: &Arc<Region>, offset: u64, gpa: u64, size: u64) -> Result<()> {
        let offsets = region.range(offset, size)?;
        let gpa = Range::new(gpa, size)?;
        let mut bindings = self
            .bindings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        for other in bindings.iter() {
            if other.gpa.overlaps(&gpa) {
                let what = format!("region '{}'", other.region.name());
                let gpa = other.gpa;
                return Err(Error::AlreadyBound { what, gpa });
            }
            if Arc::ptr_eq(&other.region, region) && other.offsets().overlaps(&offsets) {
                let what = format!("{offsets} of region '{}'", region.name());
                let gpa = other.gpa;
                return Err(Error::AlreadyBound { what, gpa });
            }
        }
        let region = region.clone();
        let binding = Binding {
            region,
            gpa,
            offset,
        };
        self.apply_state(&binding)?;
        let place = bindings.partition_point(|other| other.gpa.start() < gpa.start());
        bindings.insert(place, binding);
        Ok(())
    }

    /// Ends the binding of exactly `size` bytes at `gpa`, and makes that range
    /// shared again for KVM, so that whatever comes there next starts shared.
    /// To be called after the memory slot is gone.
    pub fn unbind(&self, gpa: u64, size: u64) -> Result<()> {
        let gpa = Range::new(gpa, size)?;
        let mut bindings = self
            .bindings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let place = bindings.iter().position(|binding| binding.gpa == gpa);
        let binding = bindings.remove(place.ok_or(Error::NotBound(gpa))?);
        self.clear_state(&binding)
    }

    /// Ends every binding of `region`.
    pub fn unbind_region(&self, region: &Arc<Region>) {
        let mut bindings = self
            .bindings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        bindings.retain(|binding| {
            let keep = !Arc::ptr_eq(&binding.region, region);
            if !keep {
                // A range that could not be cleared is cleared by the next
                // binding there, or by the first fault.
                let _ = self.clear_state(binding);
            }
            keep
        });
    }

    /// The bindings of `region`, in order of guest-physical address.
    pub fn bindings_of(&self, region: &Arc<Region>) -> Vec<Binding> {
        self.bindings()
            .iter()
            .filter(|binding| Arc::ptr_eq(&binding.region, region))
            .cloned()
            .collect()
    }

    /// Makes KVM's attributes agree with the state map; all shared on failure.
    fn apply_state(&self, binding: &Binding) -> Result<()> {
        let applied = binding
            .runs()
            .try_for_each(|(gpa, side)| self.set_attributes(gpa, side));
        if applied.is_err() {
            let _ = self.clear_state(binding);
        }
        applied
    }

    /// Makes all of a binding shared for KVM. Only what is private: KVM walks
    /// page by page through a range of which anything changes.
    fn clear_state(&self, binding: &Binding) -> Result<()> {
        binding
            .runs()
            .filter(|(_, side)| *side == Side::Private)
            .map(|(gpa, _)| self.set_attributes(gpa, Side::Shared))
            .fold(Ok(()), Result::and)
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES`; nothing to do without KVM.
    #[inline(always)]
    pub(crate) fn set_attributes(&self, gpa: Range, side: Side) -> Result<()> {
        let Switch::Kvm(vm) = self.switch else {
            return Ok(());
        };
        let attributes = match side {
            Side::Shared => 0,
            Side::Private => u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE),
        };
        retry(|| self.kernel.set_memory_attributes(vm, gpa, attributes))
            .map_err(|e| Error::kernel("KVM_SET_MEMORY_ATTRIBUTES", e))
    }

    /// Makes `side` what is reachable of `offsets`, which the guest sees at
    /// `gpa` if anywhere; every translation of the other side is gone on return.
    #[inline(always)]
    pub(crate) fn switch(
        &self,
        region: &Region,
        offsets: Range,
        gpa: Option<Range>,
        side: Side,
    ) -> Result<()> {
        if let (Side::Shared, Some(slots)) = (side, region.slots()) {
            // Before a vCPU can reach it.
            slots.show(offsets)?;
        }
        match (&self.switch, gpa, region.host_mapping()) {
            (Switch::Kvm(_), Some(gpa), _) => self.set_attributes(gpa, side),
            (Switch::Kvm(_), None, _) | (Switch::Mapping, _, None) => Ok(()),
            (Switch::Mapping, _, Some(_)) => self.switch_mapping(region, offsets, side),
        }
    }

    #[inline(never)]
    fn switch_mapping(&self, region: &Region, offsets: Range, side: Side) -> Result<()> {
        self.map(region, offsets, side)
            // Some kernels unmap the old side before they find that they
            // cannot map the new one.
            .inspect_err(|_| drop(self.map(region, offsets, side.other())))
    }

    fn map(&self, region: &Region, offsets: Range, side: Side) -> Result<()> {
        let mut parts = region.parts(side, offsets);
        parts.try_for_each(|part| self.map_part(region, &part))
    }

    /// Maps a part in its place in the VMM's mapping, if there is one.
    pub(crate) fn map_part(&self, region: &Region, part: &Part) -> Result<()> {
        let Some(host) = region.host_mapping() else {
            return Ok(());
        };
        let (at, fd) = (host + part.offsets.start() as usize, part.store.fd());
        // SAFETY: `set_host_mapping` promised a mapping of the whole region
        // that is ours to replace while conversions run, and the part lies
        // within the region.
        retry(|| unsafe { self.kernel.map_fixed(at, fd, part.file) })
            .map_err(|e| Error::kernel("mmap", e))
    }

    /// Lets the VMM's mapping and that of memory slots, if there are any, look up anew
    /// what of `offsets` is there.
    pub(crate) fn unmap(&self, region: &Region, offsets: Range) -> Result<()> {
        if let Some(slots) = region.slots() {
            slots.zap(offsets)?;
        }
        let Some(host) = region.host_mapping() else {
            return Ok(());
        };
        let at = host + offsets.start() as usize;
        // SAFETY: as in `map_part`.
        retry(|| unsafe { self.kernel.zap(at, offsets.len() as usize) })
            .map_err(|e| Error::kernel("madvise(DONTNEED)", e))
    }

    /// Has whoever writes to `offsets` of the VMM's mapping wait, if there is
    /// one; or maps a part `over` them, which whoever touches it waits for.
    pub(crate) fn block(
        &self,
        region: &Region,
        offsets: Range,
        over: Option<&Part>,
    ) -> Result<Option<Blocked>> {
        let Some(host) = region.host_mapping() else {
            return Ok(None);
        };
        let at = host + offsets.start() as usize;
        let blocked = match over {
            // SAFETY: as in `map_part`; who waits goes on when the move ends.
            None => retry(|| unsafe { self.kernel.write_protect(at, offsets.len()) }),
            // SAFETY: as above.
            Some(part) => {
                retry(|| unsafe { self.kernel.map_blocked(at, part.store.fd(), part.file) })
            }
        };
        blocked.map(Some).map_err(Error::userfaultfd)
    }
}

/// Names of KVM_X86_*_VM, by number.
const VM_TYPES: [&str; 6] = ["default", "sw-protected", "sev", "sev-es", "snp", "tdx"];

fn check_capabilities(kernel: &dyn Kernel, vm: BorrowedFd) -> Result<()> {
    let capability = |number| {
        retry(|| kernel.check_extension(vm, number))
            .map_err(|e| Error::kernel("KVM_CHECK_EXTENSION", e))
    };
    let attributes = capability(KVM_CAP_MEMORY_ATTRIBUTES)?;
    let guest_memfd = capability(KVM_CAP_GUEST_MEMFD)?;
    let user_memory2 = capability(KVM_CAP_USER_MEMORY2)?;
    if attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE != 0 && guest_memfd != 0 && user_memory2 != 0 {
        return Ok(());
    }
    let types = capability(KVM_CAP_VM_TYPES)?.max(1);
    let types: Vec<_> = VM_TYPES
        .iter()
        .enumerate()
        .filter(|(number, _)| types >> number & 1 == 1)
        .map(|(number, name)| format!("{name} ({number})"))
        .collect();
    Err(Error::NoPrivateMemory(format!(
        "it has KVM_CAP_MEMORY_ATTRIBUTES={attributes:#x} (needed: {KVM_MEMORY_ATTRIBUTE_PRIVATE:#x}), \
         KVM_CAP_GUEST_MEMFD={guest_memfd} and KVM_CAP_USER_MEMORY2={user_memory2} (needed: 1); \
         VM types of this KVM: {}",
        types.join(", ")
    )))
}
