//! Trust agents: who keeps private contents from the host, and what of a
//! guest's life they must be asked or told.
//!
//! | agent | keeps contents | initial contents | moves contents |
//! |---|---|---|---|
//! | [`Tdx`] | the TDX module | `KVM_TDX_INIT_MEM_REGION` | no: KVM has no call for that |
//! | [`Snp`] | the SEV-SNP firmware and the RMP | `KVM_SEV_SNP_LAUNCH_UPDATE` | no: as above |
//! | [`SwProtected`] | KVM, by software alone | none: the guest starts in shared memory | no: as above |
//! | [`Emulated`] | nobody | written into the private store | from file to file |
//!
//! A VMM may bring one of its own.

mod snp;
mod tdx;

use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::range::{GRANULE, Range};
use crate::relocate::Level;
use crate::state::Side;
use crate::store::Store;

pub use snp::{Snp, SnpFinish, SnpStart};
pub use tdx::Tdx;

/// What a page of initial contents is to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageType {
    /// Contents that are part of the measurement.
    Normal,
    /// Contents that are not; TDX without `KVM_TDX_MEASURE_MEMORY_REGION`.
    Unmeasured,
    /// Zeroes; no source. SEV-SNP only.
    Zero,
    /// Where the firmware puts secrets for the guest. SEV-SNP only.
    Secrets,
    /// CPUID table, which the firmware checks. SEV-SNP only. One that it
    /// refuses comes back in the source, with the values it would accept.
    Cpuid,
    /// Registers of a vCPU at its start. Refused for SEV-SNP, where KVM adds
    /// those of its vCPUs when the launch ends.
    Vmsa,
}

impl PageType {
    fn name(self) -> &'static str {
        match self {
            PageType::Normal => "NORMAL",
            PageType::Unmeasured => "UNMEASURED",
            PageType::Zero => "ZERO",
            PageType::Secrets => "SECRETS",
            PageType::Cpuid => "CPUID",
            PageType::Vmsa => "VMSA",
        }
    }
}

/// A part of a request for initial contents: one region, contiguous on both
/// sides, all private.
pub struct InitialPages<'a> {
    pub kernel: &'a dyn Kernel,
    /// Guest-physical.
    pub gpa: Range,
    pub store: &'a Store,
    /// Offsets into that store.
    pub offsets: Range,
    /// As many bytes as `gpa`, at a multiple of the granule; none for
    /// [`PageType::Zero`].
    pub source: Option<&'a mut [u8]>,
    pub page_type: PageType,
}

/// Private contents that are to move, one stretch on both sides, as the guest
/// sees it. Nobody writes to them meanwhile, and nobody sees the new place, which
/// reads zero.
pub struct Move<'a> {
    /// Guest-physical.
    pub gpa: Range,
    /// What was asked for; `gpa` may be a part of that.
    pub level: Level,
    pub from: &'a Store,
    pub from_offsets: Range,
    pub to: &'a Store,
    pub to_offsets: Range,
}

/// A trust agent.
///
/// | function | when | locked | if it fails |
/// |---|---|---|---|
/// | `prepare` | once, before `populate` | the launch | it may be asked again |
/// | `check_populate` | before each request of `populate` | the launch | nothing has changed |
/// | `populate` | private memory, in order of the measurement | the launch, the range | earlier pages of the request are done, and measured; the rest has no contents |
/// | `finalize` | once, after `populate` | the launch | it may be asked again |
/// | `before_convert` | the other side holds nothing; this one is still reachable | the range | the whole step is undone; `after_convert` for those asked before |
/// | `after_convert` | the new side is reachable, and published | the range | |
/// | `invalidate` | before private pages are freed | the range | |
/// | `check_relocate` | before writers are held off | none | nothing has changed |
/// | `relocate` | writers are held off; nobody sees the new place | the range | the new place is emptied, the old one stays |
/// | `memory_failure` | the pages are retired | the range | |
/// | `chooses_side` | at a memory fault | none | |
///
/// Calls come from any thread, and may come at once for ranges that do not
/// overlap. A range that is locked is not converted, moved, discarded or reset
/// meanwhile, and its memory slots stay. An agent must not call back into the
/// [`crate::Vm`] or its regions. What the kernel or a firmware does in part, or
/// interrupts, is the agent's to go on with: to the caller a request is done or
/// has failed.
pub trait Agent: Send + Sync {
    /// What it is called in messages and reports.
    fn name(&self) -> &str;

    /// Begins the time for initial contents, once, before any are given.
    fn prepare(&self, _kernel: &dyn Kernel) -> Result<()> {
        Ok(())
    }

    /// Whether there can be initial contents of this type, before anything is
    /// made private for them.
    fn check_populate(&self, _page_type: PageType) -> Result<()> {
        Ok(())
    }

    /// Gives private pages their initial contents, in order of address, before
    /// the guest runs. What is interrupted or done in part is the agent's to
    /// repeat; a failure names the page at which it ended.
    fn populate(&self, pages: InitialPages) -> Result<()>;

    /// Ends the time for initial contents: the measurement is complete.
    fn finalize(&self, kernel: &dyn Kernel) -> Result<()>;

    /// A guest-physical range is about to change to side `to`; contents go.
    /// On failure the conversion does not take place.
    fn before_convert(&self, _gpa: Range, _to: Side) -> Result<()> {
        Ok(())
    }

    /// The range is on `side` now: for good, or again after a failure. Once for
    /// every call of [`Agent::before_convert`] that succeeded.
    fn after_convert(&self, _gpa: Range, _side: Side) {}

    /// Private pages of the range go without a conversion, such as a balloon's.
    fn invalidate(&self, _gpa: Range) {}

    /// Whether private contents can be moved, before anybody is held off for
    /// that; an error says why not.
    fn check_relocate(&self) -> Result<()> {
        Err(Error::CannotRelocate {
            agent: self.name().to_owned(),
            why: "it has no function for that",
        })
    }

    /// Moves contents. On failure they are still where they were, and the new
    /// place, which may have got a part of them, is emptied.
    fn relocate(&self, _contents: Move) -> Result<()> {
        self.check_relocate()
    }

    /// The host has lost what the guest had in the range, on `side`. The pages
    /// are retired by now; of private ones [`Agent::invalidate`] came first.
    /// Others come in their place, which the guest must accept (TDX) or
    /// validate (SEV-SNP) as after a conversion.
    fn memory_failure(&self, _gpa: Range, _side: Side) {}

    /// Whether the guest says by its access which side it means, as by TDX's
    /// shared bit or SEV's C-bit: KVM then exits where the memory is on the
    /// other side, which is a request to convert it. By default not: KVM looks
    /// the side up. Must always be the same.
    fn chooses_side(&self) -> bool {
        false
    }
}

/// KVM as the agent of a `KVM_X86_SW_PROTECTED_VM`.
pub struct SwProtected;

impl Agent for SwProtected {
    fn name(&self) -> &str {
        "sw-protected"
    }

    fn check_populate(&self, _: PageType) -> Result<()> {
        Err(Error::NoInitialContents(self.name().to_owned()))
    }

    fn populate(&self, pages: InitialPages) -> Result<()> {
        self.check_populate(pages.page_type)
    }

    fn finalize(&self, _: &dyn Kernel) -> Result<()> {
        Ok(())
    }

    fn check_relocate(&self) -> Result<()> {
        Err(Error::CannotRelocate {
            agent: self.name().to_owned(),
            why: "pages of a guest_memfd are unmovable, and nobody but the guest reaches them; it \
                  would take a call of KVM that no kernel has yet",
        })
    }
}

/// This library as the agent: two memfds a region, and no protection at all.
pub struct Emulated;

impl Agent for Emulated {
    fn name(&self) -> &str {
        "emulated"
    }

    fn populate(&self, pages: InitialPages) -> Result<()> {
        match pages.source {
            Some(source) => pages.store.write(pages.offsets.start(), source),
            None => pages.store.punch(pages.offsets),
        }
    }

    fn finalize(&self, _: &dyn Kernel) -> Result<()> {
        Ok(())
    }

    fn check_relocate(&self) -> Result<()> {
        Ok(())
    }

    /// Copies what is not zero: the new place takes memory for nothing else.
    fn relocate(&self, contents: Move) -> Result<()> {
        let mut buffer = Vec::new();
        for from in contents.from_offsets.pieces(MOVED) {
            buffer.resize(from.len() as usize, 0);
            contents.from.read(from.start(), &mut buffer)?;
            let to = from.rebase(contents.from_offsets.start(), contents.to_offsets.start());
            let mut at = to.start();
            let granules: Vec<_> = buffer.chunks(GRANULE as usize).collect();
            for run in granules.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
                let bytes = run.len() * GRANULE as usize;
                if !is_zero(run[0]) {
                    let start = (at - to.start()) as usize;
                    contents.to.write(at, &buffer[start..start + bytes])?;
                }
                at += bytes as u64;
            }
        }
        Ok(())
    }
}

/// Bytes that are moved at a time.
const MOVED: u64 = 1 << 20;

fn is_zero(granule: &[u8]) -> bool {
    *granule == [0; GRANULE as usize]
}

/// A request that may be done in part goes on for as long as it is told to try
/// again, which has an end where nothing gets done.
const FRUITLESS_TRIES: u32 = 100_000;

/// Repeats `step`, which returns what is left, until nothing is. EINTR, EAGAIN
/// and EBUSY mean to try again, with what `step` says is left by then.
fn repeat(mut left: u64, mut step: impl FnMut() -> (u64, CommandResult)) -> CommandResult {
    let mut fruitless = 0;
    loop {
        let (now, result) = step();
        fruitless = if now < left { 0 } else { fruitless + 1 };
        left = now;
        match result {
            Ok(()) if left == 0 => return Ok(()),
            Err(error) if !error.is_temporary() => return Err(error),
            Err(error) if fruitless > FRUITLESS_TRIES => return Err(error),
            Ok(()) if fruitless > FRUITLESS_TRIES => return Err(CommandError::stuck()),
            _ => std::thread::yield_now(),
        }
    }
}

/// What came of a command to the agent's firmware or module.
pub type CommandResult = std::result::Result<(), CommandError>;

/// What the kernel says of a command to the agent's firmware or module.
#[derive(Debug)]
pub struct CommandError {
    pub error: std::io::Error,
    /// Status of the TDX module or of the SEV firmware; 0 where it has none.
    pub firmware: u64,
}

impl CommandError {
    fn is_temporary(&self) -> bool {
        let errno = self.error.raw_os_error().unwrap_or(0);
        [libc::EINTR, libc::EAGAIN, libc::EBUSY].contains(&errno)
    }

    /// EIO that no firmware is the reason of.
    fn is_eio_of_kvm(&self) -> bool {
        self.error.raw_os_error() == Some(libc::EIO) && self.firmware == 0
    }

    fn stuck() -> CommandError {
        let error = std::io::Error::from_raw_os_error(libc::EAGAIN);
        CommandError { error, firmware: 0 }
    }

    fn of(self, command: &'static str, gpa: Option<u64>) -> Error {
        Error::Command {
            command,
            gpa,
            firmware: self.firmware,
            source: self.error,
        }
    }
}
