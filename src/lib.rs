//! Private guest memory behind an fd.
//!
//! A confidential guest keeps its RAM in an fd that the host cannot map. This
//! library owns that memory for a VMM: which fd and offset belong to which
//! guest-physical address, which granules are private, and the one path that
//! turns a range private or shared.
//!
//! | module | owns |
//! |---|---|
//! | [`range`] | checked byte ranges; the only place that does arithmetic on what a guest sent |
//! | [`state`] | the state map: one bit per granule, one count per block, lock-free to read |
//! | `range_lock` | orders conversions of overlapping ranges, first come, first served |
//! | [`kernel`] | every call into the kernel, behind a trait so that tests can fail each of them |
//! | `slot_mapping` | the shared store as KVM's memory slots map it, without what is private |
//! | [`store`] | the two fds of a region: `guest_memfd` (private) and memfd (shared) |
//! | [`agent`] | trust agents: who keeps private contents, asked and told along the way |
//! | [`listener`] | downstream mappers, told before shared memory goes and after it has come |
//! | [`region`] | one memory backend: stores, state map, range lock, counters |
//! | `memory` | what a region's stores hold: taken beforehand, kept, given back, moved |
//! | [`vm`] | bindings of regions to guest-physical addresses, and the trust agent |
//! | `failed` | the last requests that failed |
//! | `counter` | figures that many threads raise |
//! | `convert` | the conversion path, its order and its undo |
//! | `request` | a guest's request, done and undone in steps of that path |
//! | `places` | where private contents lie that were moved |
//! | [`relocate`] | moving private contents while the guest runs |
//! | [`failure`] | pages that the host has lost: retired, recorded, told |
//! | [`ffi`] | the C interface, `include/privmem.h` |
//!
//! Lock order, outermost first: bindings of the VM ([`vm`]), range lock of a
//! region ([`region`], regions in order of their serial number, then by
//! stripe), where contents lie (`places`; held for no call). Listeners and
//! agents are called under these locks: that is what orders what they do with
//! the conversion. No other call goes back into C.

pub mod agent;
mod convert;
mod counter;
pub mod error;
mod failed;
pub mod failure;
pub mod ffi;
pub mod kernel;
pub mod listener;
mod memory;
mod places;
pub mod range;
mod range_lock;
pub mod region;
pub mod relocate;
mod request;
mod slot_mapping;
pub mod state;
pub mod store;
mod sync;
pub mod vm;

pub use error::{Error, Result};
pub use failed::FailedConversion;
pub use kernel::NumaPolicy;
pub use listener::{EntriesLeft, Listener};
pub use range::{GRANULE, Range};
pub use region::{Info, Options, Region};
pub use relocate::{Destination, Level};
pub use request::Conversion;
pub use state::{Side, StateMap};
pub use vm::Vm;
