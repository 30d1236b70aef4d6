//! What can go wrong, in words for an operator and as an `errno` for C.

use std::io;

use crate::range::Range;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller broke the contract of a function: NULL, bad string, bad size.
    #[error("{0}")]
    InvalidArgument(String),

    #[error(
        "{what} has fields that this library does not know, and that are not zero: it is older than \
         its caller"
    )]
    UnknownFields { what: &'static str },

    #[error("{what} {value:#x} is not a multiple of the granule of 4096 bytes")]
    Unaligned { what: &'static str, value: u64 },

    #[error("the range at {start:#x} is empty")]
    Empty { start: u64 },

    #[error("the range at {start:#x} with {size:#x} bytes ends beyond the 64-bit address space")]
    Overflow { start: u64, size: u64 },

    #[error("{0} ends beyond the region of {1:#x} bytes")]
    OutsideRegion(Range, u64),

    #[error(
        "guest-physical address {gpa:#x} cannot be private: it is MMIO, ROM, ordinary RAM or \
         nothing at all; only RAM of a memory-backend-private can be private"
    )]
    NotPrivateCapable { gpa: u64 },

    #[error("{what} is already bound at guest-physical {gpa}")]
    AlreadyBound { what: String, gpa: Range },

    #[error("nothing is bound at guest-physical {0}")]
    NotBound(Range),

    #[error("the region has no binding number {index}")]
    NoSuchBinding { index: usize },

    #[error("failed conversion number {index} before the last is not known")]
    NoSuchFailedConversion { index: usize },

    #[error("the region remembers no failure number {index}")]
    NoSuchFailure { index: usize },

    #[error("the listener is registered already")]
    AlreadyListening,

    #[error("the region has no such listener")]
    NoSuchListener,

    #[error(
        "an assigned device reaches the {size:#x} bytes at offset {start:#x} by one mapping, which \
         cannot be split while it may be in use: they become private as a whole, or with a smaller \
         'dma-granularity'"
    )]
    PartOfEntry { start: u64, size: u64 },

    #[error("region '{0}' already has a host mapping, or has private memory already")]
    MappingTooLate(String),

    #[error("region '{0}' has a NUMA policy already")]
    PolicySetAlready(String),

    #[error("region '{0}' cannot load private contents: only the emulated agent gives them out")]
    CannotLoad(String),

    #[error(
        "trust agent '{0}' has no way to give private pages initial contents: start the guest in \
         shared memory, and let it copy"
    )]
    NoInitialContents(String),

    #[error("the TDX agent has no vCPU yet; its fd must be told before initial contents")]
    NoVcpu,

    #[error("trust agent '{agent}' has no pages of type {page_type}")]
    PageType {
        page_type: &'static str,
        agent: String,
    },

    #[error(
        "KVM adds the VMSAs of an SEV-SNP guest to its measurement by itself, when the launch ends: \
         set the registers of the vCPUs instead"
    )]
    Vmsa,

    #[error("the guest's initial contents are final; nothing can be added to them")]
    Finalized,

    #[error("the launch of this guest has begun already")]
    Prepared,

    #[error(
        "a guest whose launch has ended cannot be reset, as its measured contents would be gone; \
         end it and start another"
    )]
    CannotReset,

    #[error("trust agent '{name}' refuses: {source}")]
    Agent { name: String, source: io::Error },

    /// A command to the agent's firmware or module failed.
    #[error("{command} failed{}: {source}{}", at_text(*.gpa), firmware_text(*.firmware))]
    Command {
        command: &'static str,
        /// Guest-physical address of the page that could not be done; those
        /// before it are.
        gpa: Option<u64>,
        /// Status of the TDX module or the SEV firmware, 0 for none.
        firmware: u64,
        source: io::Error,
    },

    #[error(
        "a vCPU faults again and again at guest-physical {gpa:#x}, while nothing is converted; \
         the host's kernel log may say why"
    )]
    HopelessFault { gpa: u64 },

    #[error("trust agent '{agent}' cannot move private memory: {why}")]
    CannotRelocate { agent: String, why: &'static str },

    #[error("guest-physical address {gpa:#x} is shared; only private memory is moved")]
    NotPrivate { gpa: u64 },

    #[error("{0} of the destination holds private memory of this VM already")]
    PlaceTaken(Range),

    #[error("the memory was moved, but its old place could not be freed: {0}")]
    OldPlace(Box<Error>),

    /// A move failed, and so did what shows the guest the old place again.
    #[error(
        "{cause}; the memory was not moved, but the guest may see zeroes in place of {stranded:#x} \
         bytes until it is"
    )]
    Stranded { cause: Box<Error>, stranded: u64 },

    /// A page that the host lost is still where it was.
    #[error(
        "the page at {page} of region '{name}' has failed, and cannot be retired: {cause}; it is not \
         used again, and the guest must not run on"
    )]
    NotRetired {
        page: Range,
        name: String,
        cause: Box<Error>,
    },

    /// The VM cannot have private memory; says what there is and what is missing.
    #[error("this VM has no private memory: {0}")]
    NoPrivateMemory(String),

    #[error("no memory for the state of {granules} granules; use a smaller size")]
    NoMemoryForState { granules: usize },

    #[error("{call} failed: {source}{hint}")]
    Kernel {
        call: &'static str,
        source: io::Error,
        hint: &'static str,
    },

    /// A conversion failed half-way and was undone as far as the kernel allows.
    #[error("{cause}{}", undo_text(*.contents_lost, *.stuck, *.unmapped, *.stale))]
    Undone {
        cause: Box<Error>,
        /// Bytes that are on their old side again but read zero now.
        contents_lost: u64,
        /// Bytes that the kernel would not move back; they are on the new side.
        stuck: u64,
        /// Bytes that a downstream listener would not map again.
        unmapped: u64,
        /// Bytes that are private and that a downstream listener still maps: what
        /// it reaches there is the shared store.
        stale: u64,
    },

    /// A reset that could not do all.
    #[error("{cause}; region '{name}' is not as after a reset{}", reset_text(
        *.has_contents, *.left, *.unmapped, *.stale
    ))]
    Reset {
        cause: Box<Error>,
        name: String,
        /// Private contents of before may still be there.
        has_contents: bool,
        /// Bytes that are not on their initial side.
        left: u64,
        /// Bytes that are shared, and that a downstream listener does not map.
        unmapped: u64,
        /// Bytes that are private, and that a downstream listener still maps.
        stale: u64,
    },

    #[error("this host has pages of {0} bytes; the library is made for pages of 4096 bytes")]
    HostPageSize(u64),

    #[error(
        "this kernel cannot map private memory before it is touched \
         (KVM_CAP_PRE_FAULT_MEMORY): use Linux 6.11 or newer, or do without 'prefault'"
    )]
    CannotPrefault,

    #[error(
        "KVM could not reach shared memory of the guest (EFAULT), again and again, while nothing \
         is converted; the host may have no memory left"
    )]
    HopelessRun,

    #[error(
        "this kernel has no guard regions in shared memory (MADV_GUARD_INSTALL): use Linux 6.15 or \
         newer, and no huge pages"
    )]
    NoGuardRegions,

    #[error("internal error (panic): {0}")]
    Panic(String),
}

fn undo_text(contents_lost: u64, stuck: u64, unmapped: u64, stale: u64) -> String {
    let mut text = String::from("; the conversion was undone");
    if contents_lost != 0 {
        text += &format!(", but the contents of {contents_lost:#x} bytes are lost");
    }
    if stuck != 0 {
        text += &format!(", except {stuck:#x} bytes that could not be moved back");
    }
    if unmapped != 0 {
        text += &format!("; a downstream listener did not map {unmapped:#x} bytes again");
    }
    if stale != 0 {
        text += &format!("; a downstream listener still maps {stale:#x} bytes");
    }
    text
}

fn reset_text(has_contents: bool, left: u64, unmapped: u64, stale: u64) -> String {
    let mut text = String::from(match has_contents {
        true => ": private contents may be left",
        false => ", but has no private contents",
    });
    if left != 0 {
        text += &format!("; {left:#x} bytes are not on the side where they began");
    }
    if unmapped != 0 {
        text += &format!("; a downstream listener does not map {unmapped:#x} bytes");
    }
    if stale != 0 {
        text += &format!("; a downstream listener still maps {stale:#x} bytes");
    }
    text
}

fn at_text(gpa: Option<u64>) -> String {
    gpa.map_or_else(String::new, |gpa| format!(" at guest-physical {gpa:#x}"))
}

fn firmware_text(status: u64) -> String {
    match status {
        0 => String::new(),
        _ => format!(" (status of the firmware or module {status:#x})"),
    }
}

impl Error {
    /// The positive `errno` that stands for this error at the C border.
    pub fn errno(&self) -> i32 {
        match self {
            Error::InvalidArgument(_)
            | Error::Unaligned { .. }
            | Error::Empty { .. }
            | Error::Overflow { .. }
            | Error::OutsideRegion(..)
            | Error::NotPrivateCapable { .. } => libc::EINVAL,
            Error::UnknownFields { .. } => libc::E2BIG,
            Error::AlreadyBound { .. } | Error::AlreadyListening => libc::EEXIST,
            Error::NotBound(_)
            | Error::NoSuchBinding { .. }
            | Error::NoSuchFailedConversion { .. }
            | Error::NoSuchFailure { .. }
            | Error::NoSuchListener => libc::ENOENT,
            Error::MappingTooLate(_) | Error::PolicySetAlready(_) | Error::PartOfEntry { .. } => {
                libc::EBUSY
            }
            Error::NoPrivateMemory(_)
            | Error::HostPageSize(_)
            | Error::CannotLoad(_)
            | Error::NoGuardRegions
            | Error::CannotPrefault => libc::EOPNOTSUPP,
            Error::NoMemoryForState { .. } => libc::ENOMEM,
            Error::CannotRelocate { .. } => libc::EOPNOTSUPP,
            Error::NotPrivate { .. } => libc::EINVAL,
            Error::PlaceTaken(_) => libc::EBUSY,
            Error::OldPlace(cause) | Error::Stranded { cause, .. } => cause.errno(),
            Error::NoInitialContents(_) | Error::Vmsa => libc::EOPNOTSUPP,
            Error::NoVcpu | Error::PageType { .. } => libc::EINVAL,
            Error::Finalized | Error::Prepared | Error::CannotReset => libc::EPERM,
            Error::Kernel { source, .. }
            | Error::Command { source, .. }
            | Error::Agent { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
            Error::HopelessFault { .. } | Error::HopelessRun => libc::EFAULT,
            Error::Undone { cause, .. }
            | Error::NotRetired { cause, .. }
            | Error::Reset { cause, .. } => cause.errno(),
            Error::Panic(_) => libc::EIO,
        }
    }

    /// [`Error::Undone`], or its cause where all is as it was.
    pub(crate) fn undone(
        cause: Error,
        contents_lost: u64,
        stuck: u64,
        unmapped: u64,
        stale: u64,
    ) -> Error {
        if [contents_lost, stuck, unmapped, stale] == [0; 4] {
            return cause;
        }
        let cause = Box::new(cause);
        Error::Undone {
            cause,
            contents_lost,
            stuck,
            unmapped,
            stale,
        }
    }

    /// What keeps the guest off memory that moves could not be had.
    pub(crate) fn userfaultfd(source: io::Error) -> Self {
        let hint = match source.raw_os_error() {
            Some(libc::EPERM) => {
                " (allow it: vm.unprivileged_userfaultfd=1, CAP_SYS_PTRACE, or access to \
                 /dev/userfaultfd)"
            }
            Some(libc::ENOSYS | libc::EINVAL) => " (needs Linux 5.19 with CONFIG_USERFAULTFD)",
            Some(libc::EBUSY) => " (another userfaultfd watches this memory, such as migration's)",
            _ => return Error::kernel("userfaultfd", source),
        };
        let call = "userfaultfd";
        Error::Kernel { call, source, hint }
    }

    /// A downstream listener refused.
    pub(crate) fn listener(source: io::Error) -> Self {
        let hint = match source.raw_os_error() {
            Some(libc::ENOMEM) => " (no memory, or over RLIMIT_MEMLOCK or a cgroup's limit)",
            Some(libc::ENOSPC) => {
                " (no DMA mapping is left: raise vfio_iommu_type1.dma_entry_limit, use iommufd, or \
                 a larger 'dma-granularity')"
            }
            _ => "",
        };
        let call = "a downstream listener";
        Error::Kernel { call, source, hint }
    }

    /// Names the kernel call that failed and, for the usual causes, the way out.
    pub(crate) fn kernel(call: &'static str, source: io::Error) -> Self {
        let hint = match source.raw_os_error() {
            Some(libc::EMFILE) => " (raise the limit of open files, RLIMIT_NOFILE)",
            Some(libc::ENFILE) => " (raise the system's limit of open files, fs.file-max)",
            Some(libc::ENOMEM) => " (no memory, or over vm.max_map_count or a cgroup's limit)",
            Some(libc::ENOSPC) => " (no memory, or no huge page, is left)",
            Some(libc::EFBIG) => " (larger than this host can hold in one file)",
            _ => "",
        };
        Error::Kernel { call, source, hint }
    }
}
