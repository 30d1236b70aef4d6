//! One memory backend: its stores, its state map, its range lock, its counters.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crossbeam::utils::CachePadded;

use crate::error::{Error, Result};
use crate::listener::{Listener, Listeners};
use crate::range::{GRANULE, Range};
use crate::range_lock::RangeLock;
use crate::state::{Run, Side, StateMap};
use crate::store::Store;
use crate::vm::{Agent, Vm};

/// Private-capable guest memory of fixed size. Starts all shared.
pub struct Region {
    pub(crate) vm: Arc<Vm>,
    /// Orders regions, so that a request over several locks them in one order.
    pub(crate) serial: u64,
    name: String,
    size: Range,
    pub(crate) state: StateMap,
    shared: Store,
    private: Store,
    host: OnceLock<usize>,
    pub(crate) lock: RangeLock,
    pub(crate) listeners: Listeners,
    pub(crate) conversions: CachePadded<AtomicU64>,
    pub(crate) failed: CachePadded<AtomicU64>,
}

/// What [`Region::info`] tells. All sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    pub size: u64,
    /// By the state map; `private + shared == size`.
    pub private: u64,
    pub shared: u64,
    /// Really held by each store, as the kernel counts; `None` where it cannot tell.
    pub private_held: Option<u64>,
    pub shared_held: Option<u64>,
    /// Held by a store for granules that are on the other side.
    pub held_twice: Option<u64>,
    /// Requests that touched this region and succeeded, or failed.
    pub conversions: u64,
    pub failed_conversions: u64,
}

impl Region {
    /// A region of `size` bytes for `vm`. `name` appears in messages and in
    /// /proc/PID/fd.
    pub fn new(vm: &Arc<Vm>, name: &str, size: u64) -> Result<Arc<Region>> {
        let range = Range::new(0, size).map_err(|e| match e {
            Error::Empty { .. } => Error::InvalidArgument("the size must not be 0".into()),
            other => other,
        })?;
        let kernel = &vm.kernel;
        let shared = Store::memfd(kernel, &format!("{name}-shared"), size)?;
        let private = match vm.agent {
            Agent::SwProtected(fd) => Store::guest_memfd(kernel, fd, size)?,
            Agent::Emulated => Store::memfd(kernel, &format!("{name}-private"), size)?,
        };
        Ok(Arc::new(Region {
            vm: vm.clone(),
            serial: vm.next_serial(),
            name: name.to_owned(),
            size: range,
            state: StateMap::new(range.granules().len())?,
            shared,
            private,
            host: OnceLock::new(),
            lock: RangeLock::default(),
            listeners: Listeners::default(),
            conversions: CachePadded::default(),
            failed: CachePadded::default(),
        }))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn size(&self) -> u64 {
        self.size.len()
    }

    pub fn store(&self, side: Side) -> &Store {
        match side {
            Side::Shared => &self.shared,
            Side::Private => &self.private,
        }
    }

    /// The checked range of `size` bytes at `offset`, if the region has it.
    pub(crate) fn range(&self, offset: u64, size: u64) -> Result<Range> {
        let range = Range::new(offset, size)?;
        if range.end() > self.size() {
            return Err(Error::OutsideRegion(range, self.size()));
        }
        Ok(range)
    }

    /// Tells where the VMM has mapped the shared store. The emulated agent
    /// maps the visible store there, per range; others only remember it.
    ///
    /// # Safety
    /// The mapping has the region's size, belongs to the caller and outlives
    /// every conversion of this region.
    pub unsafe fn set_host_mapping(&self, host: usize) -> Result<()> {
        let _held = self.lock.acquire(vec![self.size]);
        let late = || Error::MappingTooLate(self.name.clone());
        if self.state.count_private(self.size.granules()) != 0 {
            return Err(late());
        }
        self.host.set(host).map_err(|_| late())
    }

    pub(crate) fn host_mapping(&self) -> Option<usize> {
        self.host.get().copied()
    }

    /// The runs of `size` bytes at `offset`, in order.
    pub fn runs(&self, offset: u64, size: u64) -> Result<impl Iterator<Item = Run>> {
        Ok(self.state.runs(self.range(offset, size)?.granules()))
    }

    /// Whether the host may touch the byte at `offset` through its mapping of
    /// the shared store, and for how many of `len` bytes that holds. What is
    /// private is out of reach, and touching it would only allocate a second
    /// page; the emulated agent shows everything. Takes no lock; bytes beyond
    /// the region count as reachable, as they are not this region's.
    pub fn host_access(&self, offset: u64, len: u64) -> (bool, u64) {
        let end = offset.saturating_add(len).min(self.size());
        if matches!(self.vm.agent, Agent::Emulated) || offset >= end {
            return (true, len);
        }
        let granules = (offset / GRANULE) as usize..end.div_ceil(GRANULE) as usize;
        let Some(run) = self.state.runs(granules).next() else {
            return (true, len);
        };
        let run_end = (run.granules.end as u64 * GRANULE).min(end);
        (run.side == Side::Shared, run_end - offset)
    }

    /// Tells `listener` of everything that is shared, and from now on of what
    /// goes and comes. Waits for conversions that run.
    pub fn add_listener(&self, listener: Arc<dyn Listener>) -> Result<()> {
        let _held = self.lock.acquire(vec![self.size]);
        self.listeners.add(listener, self.shared_runs())
    }

    /// Takes everything that is shared from the listener with this identity,
    /// and forgets it.
    pub fn remove_listener(&self, identity: usize) -> Result<()> {
        let _held = self.lock.acquire(vec![self.size]);
        self.listeners.remove(identity, self.shared_runs())
    }

    /// As [`Region::remove_listener`], for all; before the region goes.
    pub fn remove_all_listeners(&self) {
        let _held = self.lock.acquire(vec![self.size]);
        self.listeners.clear(self.shared_runs());
    }

    fn shared_runs(&self) -> impl Iterator<Item = Range> {
        self.state
            .runs(self.size.granules())
            .filter(|run| run.side == Side::Shared)
            .map(|run| Range::from_granules(run.granules))
    }

    /// Back to the initial state: all shared, no private page kept. For the
    /// reset of a machine, whose vCPUs do not run meanwhile.
    pub fn reset(self: &Arc<Region>) -> Result<()> {
        self.vm.convert_region(self, Side::Shared)
    }

    /// State and memory of this region. Takes no lock: while conversions run,
    /// the figures are of slightly different moments.
    pub fn info(&self) -> Info {
        let private = self.state.count_private(self.size.granules()) as u64 * GRANULE;
        Info {
            size: self.size(),
            private,
            shared: self.size() - private,
            private_held: self.held(Side::Private),
            shared_held: self.held(Side::Shared),
            held_twice: self.held_twice(),
            conversions: self.conversions.load(Ordering::Relaxed),
            failed_conversions: self.failed.load(Ordering::Relaxed),
        }
    }

    /// What a store holds in all. `st_blocks` says it for a memfd only.
    fn held(&self, side: Side) -> Option<u64> {
        let is_memfd = side == Side::Shared || matches!(self.vm.agent, Agent::Emulated);
        let store = self.store(side);
        store
            .held(self.size)
            .or_else(|| is_memfd.then(|| store.blocks()).flatten())
    }

    /// Asks the kernel once a run: not told where a guest has made so many
    /// runs that asking would take long.
    fn held_twice(&self) -> Option<u64> {
        const MANY: usize = 1 << 16;
        self.state
            .runs(self.size.granules())
            .enumerate()
            .map(|(number, run)| {
                let left = self.store(run.side.other());
                (number < MANY).then(|| left.held(Range::from_granules(run.granules)))?
            })
            .sum()
    }

    /// One line that shows which parts are private; see [`StateMap::picture`].
    pub fn picture(&self, width: usize) -> String {
        self.state.picture(width)
    }
}
