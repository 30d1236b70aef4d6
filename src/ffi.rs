//! The C interface; `include/privmem.h` is generated from this file.
//!
//! Conventions, also stated in the header: a function that can fail returns 0
//! or a negative errno and leaves a message for [`privmem_last_error`]; a
//! `const` handle may be used by many threads at once; out-parameters are
//! written on success only; no panic leaves this file.

#![allow(non_camel_case_types)]

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int, c_ulong, c_void};
use std::io;
use std::mem::{MaybeUninit, offset_of};
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use crate::agent::{Agent, InitialPages, Move, PageType, Snp, SnpFinish, Tdx};
use crate::error::{Error, Result};
use crate::failure::Failure;
use crate::kernel::{Kernel, Linux, NumaPolicy};
use crate::listener::{EntriesLeft, Listener};
use crate::range::{GRANULE, Range};
use crate::region::{Options, Region};
use crate::relocate::{Destination, Level};
use crate::request::Conversion;
use crate::state::Side;
use crate::vm::Vm;

/// A VM: its trust agent, and which region its guest sees where.
pub struct privmem_vm(Arc<Vm>, Launch);

/// The agent of a VM, where it has functions of its own.
enum Launch {
    Plain,
    Tdx(Arc<Tdx>),
    Snp(Arc<Snp>),
}

/// What a page of initial contents is to the trust agent.
#[repr(C)]
#[derive(Clone, Copy)]
pub enum privmem_page_type {
    /// Contents that are part of the measurement.
    PRIVMEM_PAGE_NORMAL = 1,
    /// Contents that are not.
    PRIVMEM_PAGE_UNMEASURED = 2,
    /// Zeroes, without a source; SEV-SNP only.
    PRIVMEM_PAGE_ZERO = 3,
    /// Where the firmware puts secrets for the guest; SEV-SNP only.
    PRIVMEM_PAGE_SECRETS = 4,
    /// The CPUID table; SEV-SNP only. One that the firmware refuses comes back
    /// in the source, with the values that it would accept.
    PRIVMEM_PAGE_CPUID = 5,
    /// Registers of a vCPU at its start. -EOPNOTSUPP for SEV-SNP, where KVM adds
    /// those of its vCPUs when the launch ends.
    PRIVMEM_PAGE_VMSA = 6,
}

/// A trust agent of the caller's: who keeps private contents from the host.
///
/// The functions are called on the thread that converts, populates, discards or
/// resets, with the range locked: nobody converts it meanwhile. They must call
/// no function of this library that waits for a lock (see struct
/// privmem_listener), nor wait for a thread that does. Addresses are
/// guest-physical; all numbers are in bytes. Functions that may fail return 0
/// or a negative errno.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct privmem_agent {
    /// `sizeof(struct privmem_agent)` as the caller was compiled.
    pub size: usize,
    /// Handed to the functions.
    pub opaque: *mut c_void,
    /// In messages; copied.
    pub name: *const c_char,
    /// Begins the time for initial contents. May be NULL, as all functions.
    pub prepare: Option<unsafe extern "C" fn(opaque: *mut c_void) -> c_int>,
    /// Gives private pages their initial contents, in order of address; what is
    /// interrupted is the agent's to repeat. `source` is NULL for
    /// PRIVMEM_PAGE_ZERO.
    pub populate: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            gpa: u64,
            size: u64,
            source: *mut c_void,
            page_type: privmem_page_type,
        ) -> c_int,
    >,
    /// Ends the time for initial contents.
    pub finalize: Option<unsafe extern "C" fn(opaque: *mut c_void) -> c_int>,
    /// The range is about to change side; if this fails, it does not.
    pub before_convert: Option<
        unsafe extern "C" fn(opaque: *mut c_void, gpa: u64, size: u64, to_private: bool) -> c_int,
    >,
    /// The range is on this side now, for good or again after a failure: once
    /// for every `before_convert` that succeeded.
    pub after_convert:
        Option<unsafe extern "C" fn(opaque: *mut c_void, gpa: u64, size: u64, is_private: bool)>,
    /// Private pages of the range go without a conversion.
    pub invalidate: Option<unsafe extern "C" fn(opaque: *mut c_void, gpa: u64, size: u64)>,
    /// Moves private contents from one file to another, as many bytes, for
    /// `privmem_vm_relocate`. Nobody writes to them meanwhile, and the new place
    /// reads zero; it is emptied again if this fails. Called once for each
    /// stretch. NULL, or absent in an older table: the agent moves nothing.
    pub relocate: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            gpa: u64,
            size: u64,
            from_fd: c_int,
            from_offset: u64,
            to_fd: c_int,
            to_offset: u64,
        ) -> c_int,
    >,
    /// The host has lost what the guest had in the range, on this side; the
    /// pages are retired, after `invalidate` for private ones. May be NULL.
    pub memory_failure:
        Option<unsafe extern "C" fn(opaque: *mut c_void, gpa: u64, size: u64, is_private: bool)>,
    /// Whether the guest says by its access which side it means (TDX's shared
    /// bit, SEV's C-bit): see `privmem_vm_memory_fault`.
    pub chooses_side: privmem_bool,
}

/// A [`privmem_agent`] whose name is ours.
struct CAgent {
    name: String,
    table: privmem_agent,
    chooses_side: bool,
}

// SAFETY: whoever brings an agent promises that its functions may be called
// with `opaque` from any thread.
unsafe impl Send for CAgent {}
// SAFETY: as above.
unsafe impl Sync for CAgent {}

impl CAgent {
    fn result(&self, errno: c_int) -> Result<()> {
        match errno {
            0 => Ok(()),
            errno => Err(Error::Agent {
                name: self.name.clone(),
                source: io::Error::from_raw_os_error(errno.checked_abs().unwrap_or(libc::EIO)),
            }),
        }
    }
}

impl Agent for CAgent {
    fn name(&self) -> &str {
        &self.name
    }

    fn prepare(&self, _: &dyn Kernel) -> Result<()> {
        // SAFETY: the agent outlives its VM.
        self.table.prepare.map_or(Ok(()), |prepare| {
            self.result(unsafe { prepare(self.table.opaque) })
        })
    }

    fn check_populate(&self, _: PageType) -> Result<()> {
        match self.table.populate {
            Some(_) => Ok(()),
            None => Err(Error::NoInitialContents(self.name.clone())),
        }
    }

    fn populate(&self, pages: InitialPages) -> Result<()> {
        let populate = self
            .table
            .populate
            .ok_or_else(|| Error::NoInitialContents(self.name.clone()))?;
        let source = pages
            .source
            .map_or(std::ptr::null_mut(), <[u8]>::as_mut_ptr);
        let (gpa, size) = (pages.gpa.start(), pages.gpa.len());
        let page_type = match pages.page_type {
            PageType::Normal => privmem_page_type::PRIVMEM_PAGE_NORMAL,
            PageType::Unmeasured => privmem_page_type::PRIVMEM_PAGE_UNMEASURED,
            PageType::Zero => privmem_page_type::PRIVMEM_PAGE_ZERO,
            PageType::Secrets => privmem_page_type::PRIVMEM_PAGE_SECRETS,
            PageType::Cpuid => privmem_page_type::PRIVMEM_PAGE_CPUID,
            PageType::Vmsa => privmem_page_type::PRIVMEM_PAGE_VMSA,
        };
        // SAFETY: the agent outlives its VM, and `source` has `size` bytes.
        self.result(unsafe { populate(self.table.opaque, gpa, size, source.cast(), page_type) })
    }

    fn finalize(&self, _: &dyn Kernel) -> Result<()> {
        // SAFETY: the agent outlives its VM.
        self.table.finalize.map_or(Ok(()), |finalize| {
            self.result(unsafe { finalize(self.table.opaque) })
        })
    }

    fn before_convert(&self, gpa: Range, to: Side) -> Result<()> {
        let Some(before) = self.table.before_convert else {
            return Ok(());
        };
        let to_private = to == Side::Private;
        // SAFETY: the agent outlives its VM.
        self.result(unsafe { before(self.table.opaque, gpa.start(), gpa.len(), to_private) })
    }

    fn after_convert(&self, gpa: Range, side: Side) {
        if let Some(after) = self.table.after_convert {
            let is_private = side == Side::Private;
            // SAFETY: the agent outlives its VM.
            unsafe { after(self.table.opaque, gpa.start(), gpa.len(), is_private) }
        }
    }

    fn invalidate(&self, gpa: Range) {
        if let Some(invalidate) = self.table.invalidate {
            // SAFETY: the agent outlives its VM.
            unsafe { invalidate(self.table.opaque, gpa.start(), gpa.len()) }
        }
    }

    fn check_relocate(&self) -> Result<()> {
        match self.table.relocate {
            Some(_) => Ok(()),
            None => Err(Error::CannotRelocate {
                agent: self.name.clone(),
                why: "it has no function for that",
            }),
        }
    }

    fn relocate(&self, contents: Move) -> Result<()> {
        let Some(relocate) = self.table.relocate else {
            return self.check_relocate();
        };
        let (opaque, gpa) = (self.table.opaque, contents.gpa);
        let (from, from_at) = (contents.from.fd(), contents.from_offsets.start());
        let (to, to_at) = (contents.to.fd(), contents.to_offsets.start());
        let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
        // SAFETY: the agent outlives its VM, and both fds this call.
        self.result(unsafe { relocate(opaque, gpa.start(), gpa.len(), from, from_at, to, to_at) })
    }

    fn memory_failure(&self, gpa: Range, side: Side) {
        if let Some(told) = self.table.memory_failure {
            let is_private = side == Side::Private;
            // SAFETY: the agent outlives its VM.
            unsafe { told(self.table.opaque, gpa.start(), gpa.len(), is_private) }
        }
    }

    fn chooses_side(&self) -> bool {
        self.chooses_side
    }
}

/// Private-capable guest memory of fixed size.
pub struct privmem_region(Arc<Region>);

/// A request to convert memory that is being done.
pub struct privmem_conversion(Conversion);

/// A figure that this kernel cannot tell, or an address that there is not.
pub const PRIVMEM_UNKNOWN: u64 = u64::MAX;

/// What a region is made with. Zeroes but for `size` are the defaults: all
/// shared at first, in pages of 4096 bytes, with memory held for one side only.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct privmem_region_options {
    /// `sizeof(struct privmem_region_options)` as the caller was compiled.
    pub size: usize,
    /// Bytes of a huge page (hugetlbfs) of the shared store, a power of two, or
    /// 0. A huge page is given back once all of it is private. Not with the
    /// emulated agent.
    pub huge_page_size: u64,
    /// Whether all of the region is private at first, and after a reset.
    pub initially_private: privmem_bool,
    /// Whether the private store keeps pages, contents included, when memory
    /// becomes shared: memory may be held twice then.
    pub keep_private: privmem_bool,
    /// Whether the shared store keeps pages when memory becomes private.
    pub keep_shared: privmem_bool,
    /// Whether `privmem_vm_prefault` maps memory of this region. Not with the
    /// emulated agent.
    pub prefault: privmem_bool,
}

/// A request to convert memory that failed.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct privmem_failed_conversion {
    /// Which one of all failed requests of the VM it is, from 1.
    pub number: u64,
    /// When, in nanoseconds since the beginning of 1970 (UTC).
    pub time: u64,
    /// Guest-physical address, as it was asked for.
    pub gpa: u64,
    /// In bytes, as it was asked for.
    pub size: u64,
    /// What the caller got: a negative errno.
    pub error: c_int,
    /// Whether the range was to become private.
    pub to_private: bool,
    /// What `privmem_last_error` said, cut to what fits, with NUL at its end.
    pub message: [c_char; PRIVMEM_MESSAGE_SIZE],
}

/// Bytes of a message in a struct, with its NUL.
pub const PRIVMEM_MESSAGE_SIZE: usize = 256;

/// State and memory of a region. All sizes in bytes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct privmem_info {
    /// Size of the region.
    pub size: u64,
    /// Unit in which memory changes side.
    pub granule: u64,
    /// Private by the state map.
    pub private_bytes: u64,
    /// Shared by the state map.
    pub shared_bytes: u64,
    /// Held by the private store, or `PRIVMEM_UNKNOWN`.
    pub private_held: u64,
    /// Held by the shared store, or `PRIVMEM_UNKNOWN`.
    pub shared_held: u64,
    /// Held by a store for granules on the other side, or `PRIVMEM_UNKNOWN`.
    pub held_twice: u64,
    /// Requests that touched the region and succeeded.
    pub conversions: u64,
    /// Requests that touched the region and failed.
    pub failed_conversions: u64,
    /// Private contents, kept ones included, that `privmem_vm_relocate` moved
    /// elsewhere than in the private store.
    pub relocated: u64,
    /// Of these, on a disk; not in `private_held`.
    pub swapped: u64,
    /// Pages that the host lost and that were retired; the last ones are told
    /// by `privmem_region_failure`.
    pub memory_failures: u64,
    /// How old the oldest part of `private_held` and `held_twice` is, in nanoseconds:
    /// pages of a large region are counted in turn. `PRIVMEM_UNKNOWN`, as these two
    /// are, before all have been counted once: call it again.
    pub held_age: u64,
}

/// A page that the host lost.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct privmem_failure {
    /// Offset of the page into the region, in bytes.
    pub offset: u64,
    /// Bytes of the page: the granule, or a huge page of the shared store.
    pub size: u64,
    /// Bytes of the guest's that are gone with it: 0 where the report came late;
    /// of a huge page only what was shared.
    pub lost: u64,
    /// Guest-physical address of the first of them, or `PRIVMEM_UNKNOWN` if the
    /// guest does not see it.
    pub gpa: u64,
    /// Bytes that a listener would not map again when the page was retired: its
    /// device does not reach them until they have changed side.
    pub unmapped: u64,
    /// Whether it was a page of the private store.
    pub is_private: bool,
}

impl From<Failure> for privmem_failure {
    fn from(failure: Failure) -> privmem_failure {
        privmem_failure {
            offset: failure.page.start(),
            size: failure.page.len(),
            lost: failure.lost,
            gpa: failure.gpa.unwrap_or(PRIVMEM_UNKNOWN),
            unmapped: failure.unmapped,
            is_private: failure.side == Side::Private,
        }
    }
}

/// Neighbouring bytes of a region that are all private or all shared.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct privmem_run {
    /// Offset into the region, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub size: u64,
    /// Whether the run is private.
    pub is_private: bool,
}

/// A stretch of a region that the guest sees.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct privmem_binding {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub size: u64,
    /// Offset into the region, in bytes.
    pub offset: u64,
}

/// A downstream mapper of a region's shared store, such as VFIO: told before
/// shared memory goes and after it has come. Offsets and sizes are in bytes of
/// the region; a conversion cuts runs at the multiples of 64 MiB of the region, and
/// nowhere else.
///
/// The library knows what the listener maps: it is asked to give up only that, and
/// to map only what it does not. A discard may cover what was populated by several
/// calls and, without a granularity, a part of what was populated by one.
///
/// The functions are called on the thread that converts, discards, loads, adds
/// or removes a listener, resets or frees the region, with locks held. They must call no
/// function of this library but `privmem_last_error`, `privmem_region_info`,
/// `privmem_region_next_run` and the like, which take no lock, and must not
/// wait for a thread that does.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct privmem_listener {
    /// `sizeof(struct privmem_listener)` as the caller was compiled.
    pub size: usize,
    /// Handed to the functions; also tells this listener from others.
    pub opaque: *mut c_void,
    /// Shared memory is about to go: on return no translation to it is left. It
    /// was populated by `entries` calls (0 without a granularity). Returns 0, or a
    /// negative errno with all of it still mapped: the conversion is undone then.
    pub discard: Option<
        unsafe extern "C" fn(opaque: *mut c_void, offset: u64, size: u64, entries: u64) -> c_int,
    >,
    /// Shared memory has come and is to be mapped, by one entry. Returns 0, or a
    /// negative errno with none of it mapped: the conversion is undone then.
    pub populate:
        Option<unsafe extern "C" fn(opaque: *mut c_void, offset: u64, size: u64) -> c_int>,
    /// Where that begins which the listener is told of: offset into the region, in
    /// bytes.
    pub offset: u64,
    /// How many bytes of the region it is told of; 0, with offset 0, for all of it.
    pub length: u64,
    /// For a listener that can give up entries only as a whole: bytes of one, a
    /// power of two, at most 64 MiB. Blocks of so many that become shared as a whole
    /// are mapped by one entry each, and are refused (-EBUSY) to a conversion that
    /// makes a part of one private; the rest is mapped page by page. A block that
    /// the guest sees in two bindings is a whole to a request only where their
    /// guest-physical addresses follow each other, too. 0 for a listener that can
    /// give up any part of an entry: it is told run by run.
    pub granularity: u64,
    /// For a listener with a limited number of entries: how many more calls of
    /// `populate` can succeed now. A request that needs more is refused (-ENOSPC)
    /// before any of it is done. NULL, or absent in an older table: no limit.
    pub entries_left: Option<unsafe extern "C" fn(opaque: *mut c_void) -> u64>,
    /// Listeners for which this is the same share one limit, of any regions of the
    /// VM. Only compared; NULL for a limit of this listener alone.
    pub limit: *const c_void,
}

/// A [`privmem_listener`] that has both functions.
struct CListener {
    opaque: *mut c_void,
    discard: unsafe extern "C" fn(*mut c_void, u64, u64, u64) -> c_int,
    populate: unsafe extern "C" fn(*mut c_void, u64, u64) -> c_int,
    range: Option<Range>,
    granularity: Option<u64>,
    entries_left: Option<unsafe extern "C" fn(*mut c_void) -> u64>,
    /// Tells the limit of `entries_left` from others.
    limit: usize,
}

// SAFETY: whoever adds a listener promises that its functions may be called
// with `opaque` from any thread.
unsafe impl Send for CListener {}
// SAFETY: as above.
unsafe impl Sync for CListener {}

/// What a C callback returned.
fn answer(errno: c_int) -> io::Result<()> {
    match errno {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(
            errno.checked_abs().unwrap_or(libc::EIO),
        )),
    }
}

impl Listener for CListener {
    fn discard(&self, offsets: Range, entries: u64) -> io::Result<()> {
        let (offset, size) = (offsets.start(), offsets.len());
        // SAFETY: the listener is registered, so that both are valid.
        answer(unsafe { (self.discard)(self.opaque, offset, size, entries) })
    }

    fn populate(&self, offsets: Range) -> io::Result<()> {
        // SAFETY: as above.
        answer(unsafe { (self.populate)(self.opaque, offsets.start(), offsets.len()) })
    }

    fn granularity(&self) -> Option<u64> {
        self.granularity
    }

    fn range(&self) -> Option<Range> {
        self.range
    }

    fn entries_left(&self) -> Option<EntriesLeft> {
        let limit = self.limit;
        self.entries_left.map(|ask| EntriesLeft {
            limit,
            // SAFETY: as above.
            entries: unsafe { ask(self.opaque) },
        })
    }

    fn identity(&self) -> usize {
        self.opaque as usize
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Runs the body of a C function: turns its error, or a panic, into an errno
/// and a message.
fn guard(body: impl FnOnce() -> Result<()>) -> c_int {
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or(panic.downcast_ref::<&str>().copied());
        Err(Error::Panic(text.unwrap_or("no message").to_owned()))
    });
    let Err(error) = result else { return 0 };
    let message = CString::new(error.to_string().replace('\0', "?")).unwrap_or_default();
    // A thread that is being torn down has no message any more.
    let _ = LAST_ERROR.try_with(|last| last.replace(message));
    -error.errno()
}

fn null(what: &str) -> Error {
    Error::InvalidArgument(format!("{what} is NULL"))
}

/// Borrows what a C caller handed over.
///
/// # Safety
/// `pointer` is NULL or points to a `T` that stays valid and unchanged, but
/// for interior mutability, while the call runs.
unsafe fn borrow<'a, T>(pointer: *const T, what: &str) -> Result<&'a T> {
    // SAFETY: the caller's contract is that of `as_ref`.
    unsafe { pointer.as_ref() }.ok_or_else(|| null(what))
}

/// Writes an out-parameter.
///
/// # Safety
/// `out` is NULL or valid for writing a `T`, initialised or not.
unsafe fn put<T>(out: *mut T, value: T, what: &str) -> Result<()> {
    if out.is_null() {
        return Err(null(what));
    }
    // SAFETY: not NULL, so valid for writing by the caller's contract.
    unsafe { out.write(value) };
    Ok(())
}

fn side(private: bool) -> Side {
    if private { Side::Private } else { Side::Shared }
}

/// Version of this library as "major.minor.patch". Static; never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn privmem_version() -> *const c_char {
    const VERSION: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => panic!("no NUL in a version"),
        };
    VERSION.as_ptr()
}

/// Message of the last function that failed on this thread; "" before any did.
///
/// The string belongs to the library and stays valid until the next failure on
/// this thread, or its end. Never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn privmem_last_error() -> *const c_char {
    // A thread that is being torn down has no message any more.
    LAST_ERROR
        .try_with(|last| last.borrow().as_ptr())
        .unwrap_or(c"".as_ptr())
}

/// Makes a VM whose private memory KVM keeps (`guest_memfd`).
///
/// `vm_fd` is the fd of a KVM VM that has private memory, such as one of type
/// KVM_X86_SW_PROTECTED_VM. It stays the caller's, and stays open until the VM
/// and all its regions are freed. `vm` receives a handle for
/// `privmem_vm_free`.
///
/// Errors: -EOPNOTSUPP where the VM has no private memory; the message says
/// which capabilities are missing and which VM types this KVM has. Source:
/// Documentation/virt/kvm/api.rst, KVM_CAP_GUEST_MEMFD and
/// KVM_CAP_MEMORY_ATTRIBUTES.
///
/// # Safety
/// `vm` is NULL or valid for writing; `vm_fd` stays open as said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_new_kvm(vm_fd: c_int, vm: *mut *mut privmem_vm) -> c_int {
    guard(|| {
        // SAFETY: stays open, by contract.
        let new = Vm::with_kvm(unsafe { static_fd(vm_fd, "the VM fd") }?)?;
        // SAFETY: `vm` is as `put` wants it, by contract.
        unsafe { put_new(vm, privmem_vm(new, Launch::Plain), "vm") }
    })
}

/// Makes a VM with the emulated trust agent: no KVM, two memfds a region, and
/// the visible one mapped in place. It protects nothing; it is for TCG and for
/// tests.
///
/// `vm` receives a handle for `privmem_vm_free`.
///
/// # Safety
/// `vm` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_new_emulated(vm: *mut *mut privmem_vm) -> c_int {
    // SAFETY: `vm` is as `put` wants it, by contract.
    guard(|| unsafe { put_new(vm, privmem_vm(Vm::emulated()?, Launch::Plain), "vm") })
}

/// Makes a VM with the TDX module as its trust agent, through KVM: for a VM fd
/// of type KVM_X86_TDX_VM; KVM_TDX_INIT_VM comes before initial contents. Like
/// `privmem_vm_new_kvm` otherwise. Source: Documentation/virt/kvm/x86/intel-tdx.rst.
///
/// # Safety
/// `vm` is NULL or valid for writing; `vm_fd` stays open until the VM and all
/// its regions are freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_new_tdx(vm_fd: c_int, vm: *mut *mut privmem_vm) -> c_int {
    guard(|| {
        // SAFETY: stays open, by contract.
        let fd = unsafe { static_fd(vm_fd, "the VM fd") }?;
        let tdx = Arc::new(Tdx::new(fd));
        let new = Vm::with_agent(Arc::new(Linux), Some(fd), tdx.clone())?;
        // SAFETY: `vm` is as `put` wants it, by contract.
        unsafe { put_new(vm, privmem_vm(new, Launch::Tdx(tdx)), "vm") }
    })
}

/// Tells the TDX agent the fd of a vCPU, after KVM_TDX_INIT_VCPU: initial
/// contents are a command of a vCPU.
///
/// Errors: -EINVAL for NULL, a negative fd, or a VM with another agent.
///
/// # Safety
/// `vm` is NULL or a live handle; `vcpu_fd` stays open until the VM and all its
/// regions are freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_set_tdx_vcpu(vm: *const privmem_vm, vcpu_fd: c_int) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let Launch::Tdx(tdx) = &unsafe { borrow(vm, "vm") }?.1 else {
            return Err(other_agent("TDX"));
        };
        // SAFETY: stays open, by contract.
        tdx.set_vcpu(unsafe { static_fd(vcpu_fd, "the vCPU fd") }?);
        Ok(())
    })
}

/// Makes a VM with the SEV-SNP firmware as its trust agent, through KVM: for a
/// VM fd of type KVM_X86_SNP_VM, after KVM_SEV_INIT2, and /dev/sev. Like
/// `privmem_vm_new_kvm` otherwise. Source:
/// Documentation/virt/kvm/x86/amd-memory-encryption.rst.
///
/// # Safety
/// `vm` is NULL or valid for writing; both fds stay open until the VM and all
/// its regions are freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_new_snp(
    vm_fd: c_int,
    sev_fd: c_int,
    vm: *mut *mut privmem_vm,
) -> c_int {
    guard(|| {
        // SAFETY: both stay open, by contract.
        let (fd, sev) = unsafe {
            (
                static_fd(vm_fd, "the VM fd")?,
                static_fd(sev_fd, "the fd of /dev/sev")?,
            )
        };
        let snp = Arc::new(Snp::new(fd, sev));
        let new = Vm::with_agent(Arc::new(Linux), Some(fd), snp.clone())?;
        // SAFETY: `vm` is as `put` wants it, by contract.
        unsafe { put_new(vm, privmem_vm(new, Launch::Snp(snp)), "vm") }
    })
}

/// With what `privmem_vm_prepare` is to begin the launch of an SEV-SNP guest: a
/// `struct kvm_sev_snp_launch_start` of <linux/kvm.h>; the policy 0x30000 by
/// default.
///
/// Errors: -EINVAL for NULL, another size, or a VM with another agent.
///
/// # Safety
/// `vm` is NULL or a live handle; `start` is NULL or valid for reading
/// `start_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_snp_set_start(
    vm: *const privmem_vm,
    start: *const c_void,
    start_size: usize,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let Launch::Snp(snp) = &unsafe { borrow(vm, "vm") }?.1 else {
            return Err(other_agent("SEV-SNP"));
        };
        // SAFETY: `start_size` bytes, by contract; any bytes are a valid one.
        snp.set_start(unsafe { read_struct(start, start_size, "start") }?);
        Ok(())
    })
}

/// With what `privmem_vm_finalize` is to end the launch of an SEV-SNP guest: a
/// `struct kvm_sev_snp_launch_finish` of <linux/kvm.h>; zeroes by default.
///
/// Errors: -EINVAL for NULL, another size, or a VM with another agent.
///
/// # Safety
/// `vm` is NULL or a live handle; `finish` is NULL or valid for reading
/// `finish_size` bytes; what the addresses in it point to stays valid until
/// `privmem_vm_finalize` has returned.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_snp_set_finish(
    vm: *const privmem_vm,
    finish: *const c_void,
    finish_size: usize,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let Launch::Snp(snp) = &unsafe { borrow(vm, "vm") }?.1 else {
            return Err(other_agent("SEV-SNP"));
        };
        // SAFETY: `finish_size` bytes, by contract; any bytes are a valid one.
        let finish = unsafe { read_struct::<SnpFinish>(finish, finish_size, "finish") }?;
        // SAFETY: what it points to stays valid, by contract.
        unsafe { snp.set_finish(finish) };
        Ok(())
    })
}

/// Makes a VM with a trust agent of the caller's. With `vm_fd`, KVM changes the
/// side of memory (see `privmem_vm_new_kvm`); with -1 the VMM's mapping does
/// (see `privmem_vm_new_emulated`). The table is copied.
///
/// Errors: -EINVAL for NULL or a table that is too small; -E2BIG for one with fields
/// that are not zero and that only a newer library has; those of the two functions.
///
/// # Safety
/// `vm` is NULL or valid for writing; `vm_fd` stays open as said there; `agent`
/// is NULL or a table with a C string as its name, whose functions may be
/// called with its `opaque`, from any thread, until the VM and all its regions
/// are freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_new_agent(
    vm_fd: c_int,
    agent: *const privmem_agent,
    vm: *mut *mut privmem_vm,
) -> c_int {
    guard(|| {
        if agent.is_null() {
            return Err(null("agent"));
        }
        // SAFETY: valid for reading, and as large as it says.
        let table = unsafe {
            let least = offset_of!(privmem_agent, relocate);
            versioned(agent, &raw const (*agent).size, least, "an agent")
        }?;
        if table.name.is_null() {
            return Err(null("the agent's name"));
        }
        // SAFETY: a C string, by contract.
        let name = unsafe { CStr::from_ptr(table.name) }
            .to_string_lossy()
            .into_owned();
        let fd = match vm_fd {
            -1 => None,
            // SAFETY: stays open, by contract.
            fd => Some(unsafe { static_fd(fd, "the VM fd") }?),
        };
        let agent = Arc::new(CAgent {
            name,
            table,
            chooses_side: table.chooses_side.get("chooses_side")?,
        });
        let new = Vm::with_agent(Arc::new(Linux), fd, agent)?;
        // SAFETY: `vm` is as `put` wants it, by contract.
        unsafe { put_new(vm, privmem_vm(new, Launch::Plain), "vm") }
    })
}

/// Begins the time for initial contents: KVM_SEV_SNP_LAUNCH_START, or nothing
/// for other agents. To be called once, before any are given, unless the VMM has
/// done so by itself.
///
/// Errors: -EPERM the second time; what the kernel returned: it may be called
/// again then.
///
/// # Safety
/// `vm` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_prepare(vm: *const privmem_vm) -> c_int {
    // SAFETY: a live handle or NULL, by contract.
    guard(|| unsafe { borrow(vm, "vm") }?.0.prepare())
}

/// Gives `size` bytes at guest-physical `gpa` their initial contents, before the
/// guest runs, from `source`: as many bytes at a multiple of the granule, NULL
/// for PRIVMEM_PAGE_ZERO. All of the range must be bound; what is not private
/// becomes so first. Interruptions are repeated. The order of calls is that of
/// the measurement. `page_type` is one of `enum privmem_page_type`.
///
/// Errors: -EINVAL for bad numbers, a source that does not fit, memory that is
/// not bound, or a type that the agent does not know; -EPERM after
/// `privmem_vm_finalize`; -EOPNOTSUPP for a software-protected VM, which has no
/// initial contents; what the kernel returned, with the page and the status of
/// the firmware in the message. The pages before it are done then.
///
/// # Safety
/// `vm` is NULL or a live handle; `source` is NULL or valid for reading and
/// writing `size` bytes, and nobody else touches it meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_populate(
    vm: *const privmem_vm,
    gpa: u64,
    size: u64,
    source: *mut c_void,
    page_type: u32,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let vm = unsafe { borrow(vm, "vm") }?;
        let page_type = match page_type {
            1 => PageType::Normal,
            2 => PageType::Unmeasured,
            3 => PageType::Zero,
            4 => PageType::Secrets,
            5 => PageType::Cpuid,
            6 => PageType::Vmsa,
            other => {
                let text = format!("{other} is no type of a page");
                return Err(Error::InvalidArgument(text));
            }
        };
        let bytes = isize::try_from(size).map_err(|_| Error::Overflow { start: gpa, size })?;
        // SAFETY: `size` bytes that nobody else touches, by contract.
        let source = (!source.is_null())
            .then(|| unsafe { std::slice::from_raw_parts_mut(source.cast(), bytes as usize) });
        vm.0.populate(gpa, size, source, page_type)
    })
}

/// Ends the time for initial contents: KVM_TDX_FINALIZE_VM,
/// KVM_SEV_SNP_LAUNCH_FINISH, or nothing for other agents. What the shared
/// stores hold where memory is private is freed then, so that sources may lie
/// there.
///
/// Errors: -EPERM the second time; what the kernel returned: it may be called
/// again then.
///
/// # Safety
/// `vm` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_finalize(vm: *const privmem_vm) -> c_int {
    // SAFETY: a live handle or NULL, by contract.
    guard(|| unsafe { borrow(vm, "vm") }?.0.finalize())
}

fn other_agent(wanted: &str) -> Error {
    Error::InvalidArgument(format!("the trust agent of this VM is not {wanted}"))
}

/// # Safety
/// A `fd` that is not negative stays open for as long as the result is used.
unsafe fn static_fd(fd: c_int, what: &str) -> Result<BorrowedFd<'static>> {
    if fd < 0 {
        return Err(Error::InvalidArgument(format!("{what} is negative")));
    }
    // SAFETY: not negative, and stays open by contract.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// Copies a struct of the kernel's.
///
/// # Safety
/// `from` is NULL or valid for reading `size` bytes, and any bytes are a valid
/// `T`.
unsafe fn read_struct<T: Copy>(from: *const c_void, size: usize, what: &str) -> Result<T> {
    if from.is_null() {
        return Err(null(what));
    }
    if size != size_of::<T>() {
        let text = format!("{what} has {} bytes, not {size}", size_of::<T>());
        return Err(Error::InvalidArgument(text));
    }
    // SAFETY: as many bytes as a `T` has, by contract.
    Ok(unsafe { from.cast::<T>().read_unaligned() })
}

/// Hands a new handle to C, as a Box that the matching free function takes back.
///
/// # Safety
/// As for [`put`].
unsafe fn put_new<T>(out: *mut *mut T, value: T, what: &str) -> Result<()> {
    if out.is_null() {
        return Err(null(what));
    }
    // SAFETY: as the caller promises.
    unsafe { put(out, Box::into_raw(Box::new(value)), what) }
}

/// Frees the handle of a VM; NULL is ignored. Regions of the VM stay usable
/// until they are freed themselves.
///
/// # Safety
/// `vm` is NULL or a handle of this library that nobody uses now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_free(vm: *mut privmem_vm) {
    guard(|| {
        if !vm.is_null() {
            // SAFETY: `put_new` made the Box, and the caller gives it up.
            drop(unsafe { Box::from_raw(vm) });
        }
        Ok(())
    });
}

/// Says that the guest sees `size` bytes of `region`, from `offset`, at
/// guest-physical address `gpa`, and gives KVM the state of that stretch.
///
/// Call it before the memory slot is made. All three numbers are in bytes and
/// multiples of the granule. Any thread; waits for conversions that run.
///
/// Errors: -EINVAL for numbers that are unaligned, empty or beyond the region;
/// -EEXIST where the guest-physical range, or that part of the region, is
/// bound already; what KVM_SET_MEMORY_ATTRIBUTES returned. Nothing is bound
/// then.
///
/// # Safety
/// `vm` and `region` are NULL or live handles; the region is one of this VM.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_bind(
    vm: *const privmem_vm,
    region: *const privmem_region,
    offset: u64,
    gpa: u64,
    size: u64,
) -> c_int {
    guard(|| {
        // SAFETY: live handles or NULL, by contract.
        let (vm, region) = unsafe { (borrow(vm, "vm")?, borrow(region, "region")?) };
        if !Arc::ptr_eq(&vm.0, &region.0.vm) {
            let text = format!("region '{}' belongs to another VM", region.0.name());
            return Err(Error::InvalidArgument(text));
        }
        vm.0.bind(&region.0, offset, gpa, size)
    })
}

/// Ends the binding of exactly `size` bytes at `gpa`. The region keeps its
/// state, and a later binding brings it back; for KVM the range is shared
/// again.
///
/// Call it after the memory slot is gone. Any thread; waits for conversions
/// that run. Errors: -ENOENT where no such binding exists; what
/// KVM_SET_MEMORY_ATTRIBUTES returned, the binding has ended then nevertheless.
///
/// # Safety
/// `vm` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_unbind(vm: *const privmem_vm, gpa: u64, size: u64) -> c_int {
    // SAFETY: a live handle or NULL, by contract.
    guard(|| unsafe { borrow(vm, "vm") }?.0.unbind(gpa, size))
}

/// Makes `size` bytes at guest-physical `gpa` private, or shared; or as many
/// from the start as can be done in bounded time. `*done` receives the number
/// of bytes done, never 0: repeat the call for the rest, if any, and let others
/// run in between. `privmem_conversion_new` is for callers that want all of a
/// request done, or nothing of it.
///
/// What is on that side already stays as it is; what changes side reads zero, or
/// what a store has kept (`keep_private`, `keep_shared`),
/// afterwards. To become private the whole range must be bound; to become
/// shared, what is not bound is passed over, as it is shared anyway (guests
/// ask so for MMIO). The numbers come from the guest and may be anything.
///
/// Any thread; may sleep. Requests for overlapping memory wait for each other,
/// about in order of arrival; none waits for ever.
///
/// Errors: -EINVAL for a range that is unaligned, empty, wraps, or is not all
/// bound; -EBUSY where it takes a part of a listener's block; -ENOSPC where a
/// listener has not enough entries left for all of it. Nothing has changed then.
/// Otherwise what the kernel, the trust agent or a listener returned: the call is
/// undone, but calls before it are not. Where memory has lost its contents or could
/// not be put back, the message says how many bytes.
///
/// # Safety
/// `vm` is NULL or a live handle; `done` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_convert(
    vm: *const privmem_vm,
    gpa: u64,
    size: u64,
    to_private: bool,
    done: *mut u64,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let vm = unsafe { borrow(vm, "vm") }?;
        if done.is_null() {
            return Err(null("done"));
        }
        let bytes = vm.0.convert(gpa, size, side(to_private))?;
        // SAFETY: `done` is not NULL here, and valid for writing by contract.
        unsafe { put(done, bytes, "done") }
    })
}

/// Begins a request to make `size` bytes at guest-physical `gpa` private, or shared,
/// which is done by calls of `privmem_conversion_step`. `conversion` receives a
/// handle for `privmem_conversion_free`. The numbers come from the guest and may be
/// anything; what they may be is said at `privmem_vm_convert`.
///
/// Errors: -EINVAL for NULL and for a range that is unaligned, empty or wraps.
///
/// # Safety
/// `vm` is NULL or a live handle; `conversion` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_conversion_new(
    vm: *const privmem_vm,
    gpa: u64,
    size: u64,
    to_private: bool,
    conversion: *mut *mut privmem_conversion,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let vm = unsafe { borrow(vm, "vm") }?;
        if conversion.is_null() {
            return Err(null("conversion"));
        }
        let new = vm.0.request(gpa, size, side(to_private))?;
        // SAFETY: `conversion` is as `put` wants it, by contract.
        unsafe { put_new(conversion, privmem_conversion(new), "conversion") }
    })
}

/// Does the next step of a request, in bounded time. `*left` receives how many bytes
/// are left, 0 at the end: call it again for these, and let others run in between.
///
/// Where a step fails, those before it are undone, by further steps, which `*left`
/// asks for as well; the last one of these returns the error. All that the request has
/// changed is on its old side again then. What does not come back are the contents
/// that the steps had freed: that memory reads zero, and the message says how many
/// bytes that is, and how many could not be put back. A request that is refused
/// beforehand, for the reasons given at `privmem_vm_convert`, has changed nothing.
///
/// Any thread, one at a time; may sleep. Requests for overlapping memory wait for
/// each other, step by step; what two requests for the same side have both asked for
/// goes back with the one that fails. Memory slots may change between steps.
///
/// Errors: those of `privmem_vm_convert`. There is nothing left to do then.
///
/// # Safety
/// `conversion` is NULL or a live handle; `left` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_conversion_step(
    conversion: *mut privmem_conversion,
    left: *mut u64,
) -> c_int {
    guard(|| {
        if left.is_null() {
            return Err(null("left"));
        }
        // SAFETY: NULL or a live handle that no other thread uses, by contract.
        let conversion = unsafe { conversion.as_mut() }.ok_or_else(|| null("conversion"))?;
        let bytes = conversion.0.step()?;
        // SAFETY: `left` is not NULL here, and valid for writing by contract.
        unsafe { put(left, bytes, "left") }
    })
}

/// Frees the handle of a request; NULL is ignored. What is done of a request that is
/// not at its end stays as it is.
///
/// # Safety
/// `conversion` is NULL or a handle of this library that nobody uses now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_conversion_free(conversion: *mut privmem_conversion) {
    guard(|| {
        if !conversion.is_null() {
            // SAFETY: `put_new` made the Box, and the caller gives it up.
            drop(unsafe { Box::from_raw(conversion) });
        }
        Ok(())
    });
}

/// Maps for the guest what it may reach of `size` bytes at guest-physical `gpa`,
/// where the region was made with `prefault`, and takes pages for it; for memory
/// that has just become private and will be used. One call for all of it costs
/// less than the guest's faults, page by page. Does nothing where no region wants it.
///
/// To be called on the thread of the vCPU whose fd is `vcpu_fd`. Ends at the first
/// page that cannot be had, or when the vCPU is kicked: the guest's access takes
/// what is left, so that the error may be ignored.
///
/// Errors: -EINVAL for a range that is unaligned, empty or wraps; what
/// KVM_PRE_FAULT_MEMORY returned, such as -EINTR or -ENOMEM.
///
/// # Safety
/// `vm` is NULL or a live handle; `vcpu_fd` stays open until the call returns.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_prefault(
    vm: *const privmem_vm,
    vcpu_fd: c_int,
    gpa: u64,
    size: u64,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let vm = unsafe { borrow(vm, "vm") }?;
        // SAFETY: stays open for as long as it is used, by contract.
        let vcpu = unsafe { static_fd(vcpu_fd, "the vCPU fd") }?;
        vm.0.prefault(vcpu, gpa, size)
    })
}

/// Answers a KVM_RUN that failed with EFAULT, but not with KVM_EXIT_MEMORY_FAULT: 0 if
/// the vCPU may run on and try again. That happens where its access to shared memory
/// meets a conversion half-way, with `privmem_region_slot_mapping`.
///
/// To be called on the vCPU's own thread, as it counts how often the fault comes back.
///
/// Errors: -EINVAL for NULL; -EFAULT where trying again does not help.
///
/// # Safety
/// `vm` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_run_fault(vm: *const privmem_vm) -> c_int {
    // SAFETY: a live handle or NULL, by contract.
    guard(|| unsafe { borrow(vm, "vm") }?.0.run_fault())
}

/// Answers KVM_EXIT_MEMORY_FAULT with EFAULT for `size` bytes at guest-physical
/// `gpa`, which the vCPU touched as private if `is_private`
/// (KVM_MEMORY_EXIT_FLAG_PRIVATE): 0 if it may run on and try again.
///
/// Where the guest chooses a side by its access, as those of TDX and SEV-SNP,
/// the memory is converted to that side, as by `privmem_vm_convert`. A
/// software-protected guest does not: the fault met a conversion, or the end of
/// a binding, half-way, and asks for none. May sleep.
///
/// To be called on the vCPU's own thread, as it counts how often the same
/// fault comes back.
///
/// Errors: -EINVAL for a range that is unaligned, empty or wraps, or that
/// cannot be private; -EFAULT where trying again does not help; those of a
/// conversion; what KVM_SET_MEMORY_ATTRIBUTES returned.
///
/// # Safety
/// `vm` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_memory_fault(
    vm: *const privmem_vm,
    gpa: u64,
    size: u64,
    is_private: bool,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let vm = unsafe { borrow(vm, "vm") }?;
        vm.0.memory_fault(gpa, size, side(is_private))
    })
}

/// The host has lost the page that the guest sees at guest-physical `gpa`, of
/// the private store if `is_private`: for KVM_EXIT_MEMORY_FAULT with EHWPOISON,
/// whose flags tell the side. `failure` says what the guest loses with it.
///
/// With `retire`, whoever maps the page unmaps it, and another comes in its
/// place at the next access, zeroed: deliver the guest a machine check that
/// names it before it runs on. Without, the page stays as it is for now: where
/// the guest cannot be told, stop it first. `lost` is 0 where the memory has
/// changed side since, or the report comes late otherwise: then the guest may
/// just run on.
///
/// A failure that two vCPUs have met is reported by both: tell both.
///
/// Any thread; waits for conversions of the page.
///
/// Errors, after which the guest must not run on: -EINVAL for NULL; -ENOENT
/// where nothing is bound at `gpa`; what fallocate or madvise returned where
/// the page could not be retired (it is not used again, listeners do not map
/// it), or where there is no memory to take in its place.
///
/// # Safety
/// `vm` is NULL or a live handle; `failure` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_memory_failure(
    vm: *const privmem_vm,
    gpa: u64,
    is_private: bool,
    retire: bool,
    failure: *mut privmem_failure,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let vm = unsafe { borrow(vm, "vm") }?;
        if failure.is_null() {
            return Err(null("failure"));
        }
        let told = vm.0.memory_failure(gpa, side(is_private), retire)?;
        // SAFETY: not NULL here, and valid for writing by contract.
        unsafe { put(failure, told.into(), "failure") }
    })
}

/// As `privmem_vm_memory_failure`, for the byte at `offset` of a region: for
/// SIGBUS (BUS_MCEERR_AR) at that offset of the mapping of the shared store.
///
/// Errors: as there; -EINVAL for an offset beyond the region.
///
/// # Safety
/// `region` is NULL or a live handle; `failure` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_memory_failure(
    region: *const privmem_region,
    offset: u64,
    is_private: bool,
    retire: bool,
    failure: *mut privmem_failure,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let region = unsafe { borrow(region, "region") }?;
        if failure.is_null() {
            return Err(null("failure"));
        }
        let told = region.0.memory_failure(offset, side(is_private), retire)?;
        // SAFETY: not NULL here, and valid for writing by contract.
        unsafe { put(failure, told.into(), "failure") }
    })
}

/// A failure of a region whose page was retired: number `index`, the latest (0)
/// first. -ENOENT after the last that is remembered: 16 are, `memory_failures`
/// of `privmem_region_info` counts all. Any thread.
///
/// # Safety
/// `region` is NULL or a live handle; `failure` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_failure(
    region: *const privmem_region,
    index: usize,
    failure: *mut privmem_failure,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let all = unsafe { borrow(region, "region") }?.0.failures();
        let found = all.get(index).ok_or(Error::NoSuchFailure { index })?;
        // SAFETY: `failure` is as `put` wants it, by contract.
        unsafe { put(failure, (*found).into(), "failure") }
    })
}

/// Moves private contents to another place while the guest runs; it sees the
/// same contents throughout, and who writes to them waits meanwhile.
///
/// `level` is KVM's: 1, 2 or 3 for 4 KiB, 2 MiB or 1 GiB at guest-physical
/// `gpa`, a multiple of that. All of it must be private, and one stretch of one
/// region. The new place is at `offset` of the file `fd`: a memfd, or one on a
/// disk, whose pages leave memory then and are read again when touched (they
/// are swapped out). It is open for reading and writing, large enough, and the
/// region's alone; what it held is lost. It is duplicated. With -1 contents
/// move home, to the region's private store; `offset` is ignored.
///
/// Once the memory is converted, discarded or reset it is at home again, and its
/// place is punched; so it is when the region is freed. A disk that fails when
/// the memory is touched is SIGBUS for the thread that touches it.
///
/// Any thread; waits for requests for the same memory. The caller must not touch
/// memory of the guest's in a thread that this one waits for.
///
/// Errors: -EINVAL for bad numbers, memory that is not bound or shared, or a bad
/// file; -EBUSY where the place, or a part, holds private memory of this VM
/// already, or another userfaultfd watches the memory; -EOPNOTSUPP for an agent
/// that cannot, such as all with KVM; what the kernel or the agent returned.
/// -EPERM means that the host keeps userfaultfd(2) from this process; the
/// message says what allows it. All is where it was then, unless the message
/// says otherwise.
///
/// # Safety
/// `vm` is NULL or a live handle; `fd` is -1 or open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_relocate(
    vm: *const privmem_vm,
    gpa: u64,
    level: u32,
    fd: c_int,
    offset: u64,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let vm = unsafe { borrow(vm, "vm") }?;
        let level = match level {
            1 => Level::Size4K,
            2 => Level::Size2M,
            3 => Level::Size1G,
            other => {
                let text = format!("{other} is no level: it is 1, 2 or 3");
                return Err(Error::InvalidArgument(text));
            }
        };
        let to = match fd {
            -1 => Destination::Home,
            // SAFETY: open for as long as this call, by contract.
            fd => Destination::File {
                fd: unsafe { static_fd(fd, "the fd") }?,
                offset,
            },
        };
        vm.0.relocate(gpa, level, to)
    })
}

/// Makes a region of `size` bytes (a multiple of the granule of 4096 bytes),
/// with its two stores. Memory is taken when it is touched.
///
/// `name` appears in messages and in /proc/PID/fd; it is copied, as are
/// `options`, which may be NULL for the defaults. `region` receives a handle
/// for `privmem_region_free`.
///
/// KVM makes the fd of a private store without close-on-exec, which the library adds
/// right after: a thread that forks and executes a program at that moment leaves
/// the fd to it.
///
/// Errors: -EINVAL for a bad size or bad options; -E2BIG for options with fields that
/// are not zero and that only a newer library has; -EMFILE, -ENFILE, -ENOMEM,
/// -EFBIG as memfd_create, ftruncate or KVM_CREATE_GUEST_MEMFD return them.
///
/// # Safety
/// `vm` is NULL or a live handle, `name` is NULL or a C string, `options` is
/// NULL or valid for reading, `region` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_new(
    vm: *const privmem_vm,
    name: *const c_char,
    size: u64,
    options: *const privmem_region_options,
    region: *mut *mut privmem_region,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let vm = unsafe { borrow(vm, "vm") }?;
        if name.is_null() {
            return Err(null("name"));
        }
        // SAFETY: a C string, by contract.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        // SAFETY: NULL or valid for reading, by contract.
        let options = unsafe { region_options(options) }?;
        let new = Region::with_options(&vm.0, &name, size, options)?;
        // SAFETY: `region` is as `put` wants it, by contract.
        unsafe { put_new(region, privmem_region(new), "region") }
    })
}

/// # Safety
/// `options` is NULL, or points to a struct of any version that is valid for
/// reading.
unsafe fn region_options(options: *const privmem_region_options) -> Result<Options> {
    if options.is_null() {
        return Ok(Options::default());
    }
    // SAFETY: valid for reading, and as large as it says.
    let options = unsafe {
        let all = size_of::<privmem_region_options>();
        versioned(options, &raw const (*options).size, all, "options")
    }?;
    Ok(Options {
        initial: side(options.initially_private.get("initially_private")?),
        keep_private: options.keep_private.get("keep_private")?,
        keep_shared: options.keep_shared.get("keep_shared")?,
        huge_page: Some(options.huge_page_size).filter(|size| *size != 0),
        prefault: options.prefault.get("prefault")?,
    })
}

/// Copies a struct that starts with its own size, as the caller knows it: of
/// its first version, of `least` bytes, or a later one. Fields that an older
/// caller does not have are zero; those that only a newer one has must be.
///
/// A new field is not put into the padding at the end of a struct, where older
/// callers may have anything.
///
/// # Safety
/// `table` is not NULL and `size` points to its first field; as many bytes as
/// that says are valid for reading. Any bytes are a valid `T`, as far as they
/// come from C.
unsafe fn versioned<T: Copy>(
    table: *const T,
    size: *const usize,
    least: usize,
    what: &'static str,
) -> Result<T> {
    // SAFETY: valid for reading, by contract.
    let size = unsafe { size.read() };
    if size < least {
        let text = format!("{what} of {size} bytes is too small for this library");
        return Err(Error::InvalidArgument(text));
    }
    let from = table.cast::<u8>();
    let mut unknown = size_of::<T>()..size;
    // SAFETY: as many bytes as `size` says.
    if unknown.any(|at| unsafe { from.add(at).read() } != 0) {
        return Err(Error::UnknownFields { what });
    }
    let mut copy = MaybeUninit::<T>::zeroed();
    // SAFETY: as many bytes as both have; the rest is zero, which is valid.
    unsafe {
        let to = copy.as_mut_ptr().cast::<u8>();
        to.copy_from_nonoverlapping(from, size.min(size_of::<T>()));
        Ok(copy.assume_init())
    }
}

/// A `bool` in a struct that C hands over. It may have any value there, by a mistake
/// or because it was never set, which would be undefined in a `bool` of Rust's.
/// (The header has `bool`: see cbindgen.toml.)
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct privmem_bool(u8);

impl privmem_bool {
    fn get(self, what: &str) -> Result<bool> {
        match self.0 {
            0 => Ok(false),
            1 => Ok(true),
            other => {
                let text = format!("{what} is {other}, and neither true nor false");
                Err(Error::InvalidArgument(text))
            }
        }
    }
}

/// Takes the memory of all that there is now, with `threads` at once, and from
/// now on that of whatever changes side before it does: a conversion for which
/// there is no memory fails, instead of the guest's access. Waits for
/// conversions that run.
///
/// Errors: -EINVAL for 0 threads; what fallocate returned, such as -ENOMEM or
/// -ENOSPC. Some of the memory may have been taken then.
///
/// # Safety
/// `region` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_preallocate(
    region: *const privmem_region,
    threads: usize,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let region = unsafe { borrow(region, "region") }?;
        region.0.preallocate(threads_of(threads)?)
    })
}

fn threads_of(threads: usize) -> Result<NonZeroUsize> {
    NonZeroUsize::new(threads).ok_or(Error::InvalidArgument("there must be a thread".into()))
}

/// Says on which NUMA nodes memory of the private store is taken, and that it
/// is taken when memory becomes private, because at the guest's access it
/// would follow the policy of the vCPU's thread. Takes what is private already,
/// with `threads` at once. (The shared store follows the policy of its mapping,
/// mbind(2).) Once for each region; waits for conversions that run.
///
/// `mode` is MPOL_BIND, MPOL_PREFERRED or another one of set_mempolicy(2);
/// `nodes` are `words` unsigned longs with one bit a node.
///
/// Errors: -EINVAL for NULL, no threads, and what set_mempolicy refuses; -EBUSY
/// for a region that has a policy; what set_mempolicy or fallocate returned.
///
/// # Safety
/// `region` is NULL or a live handle; `nodes` is NULL or valid for reading
/// `words` unsigned longs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_set_numa_policy(
    region: *const privmem_region,
    mode: c_int,
    nodes: *const c_ulong,
    words: usize,
    threads: usize,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let region = unsafe { borrow(region, "region") }?;
        if nodes.is_null() {
            return Err(null("nodes"));
        }
        // SAFETY: `words` unsigned longs, by contract.
        let nodes = unsafe { std::slice::from_raw_parts(nodes, words) }.to_vec();
        let policy = NumaPolicy { mode, nodes };
        region.0.set_numa_policy(policy, threads_of(threads)?)
    })
}

/// Frees the memory of `size` bytes at `offset`, on whichever side they are;
/// they read zero from now on. For a balloon. Any thread; waits for conversions
/// of the range.
///
/// Errors: -EINVAL for a range that is unaligned, empty or beyond the region;
/// what fallocate or a listener returned.
///
/// # Safety
/// `region` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_discard(
    region: *const privmem_region,
    offset: u64,
    size: u64,
) -> c_int {
    // SAFETY: a live handle or NULL, by contract.
    guard(|| unsafe { borrow(region, "region") }?.0.discard(offset, size))
}

/// Writes which memory is private, to be saved with a machine: one bit a
/// granule, from the lowest bit of the first byte. `buffer_size` is the number
/// of granules divided by 8, rounded up. vCPUs do not run meanwhile.
///
/// Errors: -EINVAL for NULL or another size.
///
/// # Safety
/// `region` is NULL or a live handle; `buffer` is NULL or valid for writing
/// `buffer_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_save_state(
    region: *const privmem_region,
    buffer: *mut u8,
    buffer_size: usize,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let state = unsafe { borrow(region, "region") }?.0.save_state();
        if buffer.is_null() {
            return Err(null("buffer"));
        }
        if buffer_size != state.len() {
            let text = format!("the state has {} bytes, not {buffer_size}", state.len());
            return Err(Error::InvalidArgument(text));
        }
        // SAFETY: not NULL, and as large as the state.
        unsafe { buffer.copy_from_nonoverlapping(state.as_ptr(), state.len()) };
        Ok(())
    })
}

/// Puts all memory on the side that `privmem_region_save_state` told, contents
/// included: those of the visible side, as they were loaded, go along. vCPUs do
/// not run meanwhile.
///
/// Errors: -EINVAL for NULL or a state of another size; -EOPNOTSUPP with KVM:
/// only the emulated agent gives contents out; what the kernel or a listener
/// returned. Part of the memory may have moved then.
///
/// # Safety
/// `region` is NULL or a live handle; `buffer` is NULL or valid for reading
/// `buffer_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_load_state(
    region: *const privmem_region,
    buffer: *const u8,
    buffer_size: usize,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let region = unsafe { borrow(region, "region") }?;
        if buffer.is_null() {
            return Err(null("buffer"));
        }
        // SAFETY: not NULL, and valid for reading by contract.
        let state = unsafe { std::slice::from_raw_parts(buffer, buffer_size) };
        region.0.load_state(state)
    })
}

/// Takes all that is shared from the listeners of a region, ends its bindings,
/// closes its fds and frees it; NULL is ignored.
///
/// Memory slots of the region must be gone, and no other thread may use it.
///
/// # Safety
/// `region` is NULL or a handle of this library that nobody uses now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_free(region: *mut privmem_region) {
    guard(|| {
        if !region.is_null() {
            // SAFETY: `put_new` made the Box, and the caller gives it up.
            let region = unsafe { Box::from_raw(region) };
            region.0.remove_all_listeners();
            region.0.vm.unbind_region(&region.0);
        }
        Ok(())
    });
}

/// The memfd of the shared store, to be mapped shared, whole, from offset 0.
///
/// The fd stays the region's: duplicate it to keep it. -EINVAL for NULL.
///
/// # Safety
/// `region` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_shared_fd(region: *const privmem_region) -> c_int {
    // SAFETY: as the caller promises.
    unsafe { store_fd(region, Side::Shared) }
}

/// The fd of the private store, for KVM_SET_USER_MEMORY_REGION2: a
/// `guest_memfd`, or with the emulated agent a memfd.
///
/// The fd stays the region's. The offset of a slot is the offset of its
/// binding. -EINVAL for NULL.
///
/// # Safety
/// `region` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_private_fd(region: *const privmem_region) -> c_int {
    // SAFETY: as the caller promises.
    unsafe { store_fd(region, Side::Private) }
}

/// # Safety
/// `region` is NULL or a live handle.
unsafe fn store_fd(region: *const privmem_region, side: Side) -> c_int {
    let mut fd = -1;
    let status = guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        fd = unsafe { borrow(region, "region") }?
            .0
            .store(side)
            .fd()
            .as_raw_fd();
        Ok(())
    });
    if status < 0 { status } else { fd }
}

/// Registers a downstream mapper: it is told of all that is shared now, before
/// this function returns, and of what goes and comes from then on. The table is
/// copied. Waits for conversions that run.
///
/// Errors: -EINVAL for NULL, a table that is too small, lacks a function, or has a
/// range or a granularity that cannot be; -E2BIG for one with fields that are not
/// zero and that only a newer library has; -EEXIST where one with this `opaque` is
/// registered; what the listener returned, which is not registered then.
///
/// # Safety
/// `region` is NULL or a live handle; `listener` is NULL or a table whose
/// functions may be called with its `opaque`, from any thread, until
/// `privmem_region_remove_listener` returns.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_add_listener(
    region: *const privmem_region,
    listener: *const privmem_listener,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let region = unsafe { borrow(region, "region") }?;
        if listener.is_null() {
            return Err(null("listener"));
        }
        // SAFETY: valid for reading, and as large as it says.
        let table = unsafe {
            let least = offset_of!(privmem_listener, entries_left);
            versioned(listener, &raw const (*listener).size, least, "a listener")
        }?;
        let (Some(discard), Some(populate)) = (table.discard, table.populate) else {
            return Err(null("a function of the listener"));
        };
        let range = match table.length {
            0 => None,
            length => Some(Range::new(table.offset, length)?),
        };
        region.0.add_listener(Arc::new(CListener {
            opaque: table.opaque,
            discard,
            populate,
            range,
            granularity: (table.granularity != 0).then_some(table.granularity),
            entries_left: table.entries_left,
            limit: match table.limit as usize {
                0 => table.opaque as usize,
                limit => limit,
            },
        }))
    })
}

/// Takes all that is shared from the listener with this `opaque`, and forgets
/// it, also where it fails to give that up, which is returned. Waits for
/// conversions that run. -ENOENT where there is none.
///
/// # Safety
/// `region` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_remove_listener(
    region: *const privmem_region,
    opaque: *mut c_void,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let region = unsafe { borrow(region, "region") }?;
        region.0.remove_listener(opaque as usize)
    })
}

/// Puts all of a region on the side where it began, and frees all private
/// pages, as at the reset of a machine. vCPUs do not run meanwhile. May sleep.
/// Listeners with a granularity map what is shared by as few entries as if they
/// were added now.
///
/// Errors: -EPERM after a launch with initial contents, which nobody could give
/// again; nothing has changed then. Otherwise what the kernel or a listener
/// returned: all that could be done is done, the message says what is not, and the
/// machine must not run on. Private contents are gone unless the message says that
/// some may be left; the reset may be tried again.
///
/// # Safety
/// `region` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_reset(region: *const privmem_region) -> c_int {
    // SAFETY: a live handle or NULL, by contract.
    guard(|| unsafe { borrow(region, "region") }?.0.reset())
}

/// Tells where the shared store is mapped, so that the emulated agent can map
/// the visible store in its place. To be called once, before any conversion.
///
/// Errors: -EINVAL for NULL or an address that is not a multiple of the
/// granule; -EBUSY where it comes too late.
///
/// # Safety
/// `region` is NULL or a live handle. `host` is a mapping of the region's size
/// that belongs to the caller, who lets the region replace it and keeps it
/// until the region is freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_set_host_mapping(
    region: *const privmem_region,
    host: *mut c_void,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let region = unsafe { borrow(region, "region") }?;
        let host = host as usize;
        if host == 0 || !(host as u64).is_multiple_of(GRANULE) {
            let text = format!("{host:#x} is not the address of a mapping");
            return Err(Error::InvalidArgument(text));
        }
        // SAFETY: the same contract as this function's.
        unsafe { region.0.set_host_mapping(host) }
    })
}

/// Gives, in `*address`, where the shared store is mapped for KVM's memory slots:
/// `userspace_addr` of a slot is this plus the offset of its binding.
///
/// KVM reads and writes guest memory by that address whatever the memory attributes
/// say, for example where a guest tells it to keep a clock in a private page. In the
/// caller's own mapping that takes a page of the shared store, and the guest has memory
/// held twice. In this one, which the library makes at the first call, such accesses
/// fail. Nobody but KVM may access it; SIGBUS may name an address in it. It lives until
/// the region is freed.
///
/// With it, `privmem_vm_run_fault` must answer KVM_RUN.
///
/// Errors: -EINVAL for NULL; -EOPNOTSUPP where the kernel cannot do that (before Linux
/// 6.15), for huge pages and with the emulated agent: slots take the address of the
/// caller's mapping then; what the kernel returned.
///
/// # Safety
/// `region` is NULL or a live handle; `address` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_slot_mapping(
    region: *const privmem_region,
    address: *mut *mut c_void,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let region = unsafe { borrow(region, "region") }?;
        let start = region.0.slot_mapping()?;
        // SAFETY: NULL or valid for writing, by contract.
        unsafe { put(address, start as *mut c_void, "address") }
    })
}

/// Whether the host may touch the byte at `offset` through its mapping, and,
/// in `*len`, for how many of the `*len` bytes from there that answer holds.
///
/// What is private is out of the host's reach: touching the mapping there
/// finds zeroes and takes a second page. The emulated agent protects nothing
/// and always says yes. Any thread; takes no lock. False for NULL.
///
/// # Safety
/// `region` is NULL or a live handle; `len` is NULL or valid for reading and
/// writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_host_access(
    region: *const privmem_region,
    offset: u64,
    len: *mut u64,
) -> bool {
    let mut reachable = false;
    guard(|| {
        // SAFETY: a live handle and a readable number, or NULL, by contract.
        let (region, wanted) = unsafe { (borrow(region, "region")?, *borrow(len, "len")?) };
        let (access, granted) = region.0.host_access(offset, wanted);
        reachable = access;
        // SAFETY: `len` is not NULL here, and valid for writing by contract.
        unsafe { put(len, granted, "len") }
    });
    reachable
}

/// The failed request that came `index` before the last one of a VM, from 0.
/// Some of the last are kept: those of `privmem_vm_convert`, and of
/// `privmem_conversion_step` with all that was asked for. `failed_size` is
/// `sizeof(struct privmem_failed_conversion)` as the caller was compiled. Any thread.
///
/// Errors: -ENOENT where there is none or it is not kept; -EINVAL for NULL or a
/// size that is too small.
///
/// # Safety
/// `vm` is NULL or a live handle; `failed` is NULL or valid for writing
/// `failed_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_vm_failed_conversion(
    vm: *const privmem_vm,
    index: usize,
    failed: *mut privmem_failed_conversion,
    failed_size: usize,
) -> c_int {
    guard(|| {
        if failed_size < size_of::<privmem_failed_conversion>() {
            let text = format!("failed_size {failed_size} is too small");
            return Err(Error::InvalidArgument(text));
        }
        // SAFETY: a live handle or NULL, by contract.
        let found = unsafe { borrow(vm, "vm") }?.0.failed_conversion(index);
        let found = found.ok_or(Error::NoSuchFailedConversion { index })?;
        let time = found.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let value = privmem_failed_conversion {
            number: found.number,
            time: u64::try_from(time.as_nanos()).unwrap_or(u64::MAX),
            gpa: found.gpa,
            size: found.size,
            error: -found.errno,
            to_private: found.to == Side::Private,
            message: message(&found.message),
        };
        // SAFETY: `failed` is as `put` wants it, by contract.
        unsafe { put(failed, value, "failed") }
    })
}

/// A text as C has it in a struct.
fn message(text: &str) -> [c_char; PRIVMEM_MESSAGE_SIZE] {
    let mut buffer = [0; PRIVMEM_MESSAGE_SIZE];
    let mut ends = (0..PRIVMEM_MESSAGE_SIZE).rev();
    let whole = ends.find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    for (to, from) in buffer.iter_mut().zip(&text.as_bytes()[..whole]) {
        *to = *from as c_char;
    }
    buffer
}

/// State and memory of a region, from the kernel's own counts where it has
/// them. `info_size` is `sizeof(struct privmem_info)` as the caller was
/// compiled: later versions may append fields, and fill as many as there are.
///
/// Any thread; takes no lock that a conversion takes, so that figures taken while
/// conversions run are of slightly different moments. The kernel counts the pages of
/// a `guest_memfd` one by one: a call counts for about 50 ms, a few GiB at least, and
/// takes over the rest from the calls before it, see `held_age`.
///
/// # Safety
/// `region` is NULL or a live handle; `info` is NULL or valid for writing
/// `info_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_info(
    region: *const privmem_region,
    info: *mut privmem_info,
    info_size: usize,
) -> c_int {
    guard(|| {
        // Up to where the first version of it went.
        if info_size < offset_of!(privmem_info, relocated) {
            let text = format!("info_size {info_size} is too small");
            return Err(Error::InvalidArgument(text));
        }
        if info.is_null() {
            return Err(null("info"));
        }
        // SAFETY: a live handle or NULL, by contract.
        let now = unsafe { borrow(region, "region") }?.0.info();
        let known = |figure: Option<u64>| figure.unwrap_or(PRIVMEM_UNKNOWN);
        let value = privmem_info {
            size: now.size,
            granule: GRANULE,
            private_bytes: now.private,
            shared_bytes: now.shared,
            private_held: known(now.private_held),
            shared_held: known(now.shared_held),
            held_twice: known(now.held_twice),
            conversions: now.conversions,
            failed_conversions: now.failed_conversions,
            relocated: now.relocated,
            swapped: now.swapped,
            memory_failures: now.memory_failures,
            held_age: known(now.held_age.map(|age| age.as_nanos() as u64)),
        };
        if info.is_null() {
            return Err(null("info"));
        }
        let size = info_size.min(size_of::<privmem_info>());
        // SAFETY: not NULL, and valid for writing as many bytes by contract.
        unsafe {
            let from = (&raw const value).cast::<u8>();
            info.cast::<u8>().copy_from_nonoverlapping(from, size);
        }
        Ok(())
    })
}

/// One line that shows which parts of the region are private.
///
/// It has up to `buffer_size - 1` cells, each for the same number of bytes: `.`
/// shared, `#` private, `+` some of both; then NUL.
///
/// # Safety
/// `region` is NULL or a live handle; `buffer` is NULL or valid for writing
/// `buffer_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_picture(
    region: *const privmem_region,
    buffer: *mut c_char,
    buffer_size: usize,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let region = unsafe { borrow(region, "region") }?;
        if buffer.is_null() || buffer_size < 2 {
            let text = "the buffer must hold two bytes at least".to_owned();
            return Err(Error::InvalidArgument(text));
        }
        let picture = region.0.picture(buffer_size - 1);
        // SAFETY: the picture has at most `buffer_size - 1` bytes, all ASCII;
        // the NUL comes right after.
        unsafe {
            let source = picture.as_ptr().cast();
            buffer.copy_from_nonoverlapping(source, picture.len());
            buffer.add(picture.len()).write(0);
        }
        Ok(())
    })
}

/// The run of private or shared bytes that starts at `offset`, up to where the
/// state changes or the region ends. Any thread; takes no lock.
///
/// Errors: -EINVAL for an offset that is unaligned or beyond the region; at
/// its end, so that `offset += run.size` walks over all of it.
///
/// # Safety
/// `region` is NULL or a live handle; `run` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_next_run(
    region: *const privmem_region,
    offset: u64,
    run: *mut privmem_run,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let region = &unsafe { borrow(region, "region") }?.0;
        let rest = region.size().saturating_sub(offset);
        let first = region.runs(offset, rest)?.next();
        let first = first.ok_or(Error::Empty { start: offset })?;
        let value = privmem_run {
            offset,
            size: first.granules.len() as u64 * GRANULE,
            is_private: first.side == Side::Private,
        };
        // SAFETY: `run` is as `put` wants it, by contract.
        unsafe { put(run, value, "run") }
    })
}

/// Binding number `index` (from 0) of a region, in order of guest-physical
/// address. -ENOENT after the last. Any thread.
///
/// # Safety
/// `region` is NULL or a live handle; `binding` is NULL or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn privmem_region_binding(
    region: *const privmem_region,
    index: usize,
    binding: *mut privmem_binding,
) -> c_int {
    guard(|| {
        // SAFETY: a live handle or NULL, by contract.
        let region = &unsafe { borrow(region, "region") }?.0;
        let all = region.vm.bindings_of(region);
        let Some(found) = all.get(index) else {
            return Err(Error::NoSuchBinding { index });
        };
        let value = privmem_binding {
            gpa: found.gpa.start(),
            size: found.gpa.len(),
            offset: found.offset,
        };
        // SAFETY: `binding` is as `put` wants it, by contract.
        unsafe { put(binding, value, "binding") }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last_error() -> String {
        // SAFETY: the string stays valid until this thread fails again.
        let text = unsafe { CStr::from_ptr(privmem_last_error()) };
        text.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_becomes_an_error() {
        assert_eq!(guard(|| panic!("at {}", 7)), -libc::EIO);
        assert!(last_error().contains("at 7"), "{}", last_error());
    }

    #[test]
    fn a_message_is_a_c_string_whatever_is_in_it() {
        guard(|| Err(Error::InvalidArgument("one\0two".into())));
        assert_eq!(last_error(), "one?two");
    }

    #[test]
    fn a_message_belongs_to_its_thread() {
        guard(|| Err(null("here")));
        std::thread::spawn(|| assert_eq!(last_error(), ""))
            .join()
            .unwrap();
        assert_eq!(last_error(), "here is NULL");
    }
}
