//! What an agent must bring to be tested, and what rules are written with.

use std::fmt::Debug;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use privmem::{GRANULE, Options, Region, Side, Vm};

use crate::common;
use crate::common::mapping::HostMapping;

/// A VM of one trust agent with a guest that does what it is told.
///
/// Guest-physical memory is counted in granules. A granule is written and read
/// as a whole: all its bytes are the same.
pub trait Machine {
    /// Why there can be no such machine here, if so.
    fn missing() -> Option<String>
    where
        Self: Sized;

    fn new() -> Self
    where
        Self: Sized;

    fn vm(&self) -> &Arc<Vm>;

    /// Makes a memory slot of what has just been bound.
    fn add_slot(&mut self, slot: &Slot);

    /// Takes a memory slot away, whose binding ends next.
    fn remove_slot(&mut self, slot: &Slot);

    /// The guest fills a granule.
    fn write(&mut self, granule: u64, value: u8);

    /// What the guest finds in a granule.
    fn read(&mut self, granule: u64) -> u8;

    /// From here on, memory that the guest reaches is freed on purpose.
    fn expect_discards(&mut self) {}

    /// A device fills a granule of the shared store, past the VMM: vhost, or
    /// DMA that was under way when the granule changed its side.
    fn device_write(&mut self, region: &Region, granule: u64, value: u8) {
        let fd = region.store(Side::Shared).fd().try_clone_to_owned();
        let page = [value; GRANULE as usize];
        let file = File::from(fd.unwrap());
        file.write_all_at(&page, granule * GRANULE).unwrap();
    }

    /// Fails the test if a rule was broken that only this machine can see.
    fn check(&self) {}
}

/// A memory slot: a stretch of a region that the guest sees.
pub struct Slot {
    pub region: Arc<Region>,
    /// Guest-physical granules.
    pub gpa: Range<u64>,
    /// Granule of the region of the first one.
    pub first: u64,
    /// Where the shared store of the first one is mapped.
    pub host: *mut u8,
}

/// A machine with its regions and slots: what a VMM keeps.
pub struct Guest {
    // Goes first: the slots lead to the mappings.
    machine: Box<dyn Machine>,
    slots: Vec<Slot>,
    mappings: Vec<(Arc<Region>, HostMapping)>,
}

impl Guest {
    pub fn new(machine: impl Machine + 'static) -> Guest {
        Guest {
            machine: Box::new(machine),
            slots: Vec::new(),
            mappings: Vec::new(),
        }
    }

    pub fn vm(&self) -> &Arc<Vm> {
        self.machine.vm()
    }

    /// A new region that the guest does not see yet.
    pub fn region(&mut self, granules: u64) -> Arc<Region> {
        self.region_with(granules, Options::default())
    }

    pub fn region_with(&mut self, granules: u64, options: Options) -> Arc<Region> {
        let size = granules * GRANULE;
        let region = Region::with_options(self.vm(), "ram", size, options).unwrap();
        let mapping = HostMapping::new(&region);
        self.mappings.push((region.clone(), mapping));
        region
    }

    /// A new region that the guest sees from 0 up.
    pub fn ram(&mut self, granules: u64) -> Arc<Region> {
        self.ram_with(granules, Options::default())
    }

    pub fn ram_with(&mut self, granules: u64, options: Options) -> Arc<Region> {
        let region = self.region_with(granules, options);
        self.bind(&region, 0..granules, 0);
        region
    }

    /// Shows the guest `granules` of a region from guest granule `gpa` up.
    pub fn bind(&mut self, region: &Arc<Region>, granules: Range<u64>, gpa: u64) {
        let (first, count) = (granules.start, granules.end - granules.start);
        let (offset, at, size) = (first * GRANULE, gpa * GRANULE, count * GRANULE);
        self.vm().bind(region, offset, at, size).unwrap();
        let mapping = self.mappings.iter().find(|(of, _)| Arc::ptr_eq(of, region));
        let slot = Slot {
            region: region.clone(),
            gpa: gpa..gpa + count,
            first,
            host: mapping.unwrap().1.granule(first),
        };
        self.machine.add_slot(&slot);
        self.slots.push(slot);
    }

    /// Takes the slot that begins at guest granule `gpa` from the guest.
    pub fn unbind(&mut self, gpa: u64) {
        let at = self.slots.iter().position(|slot| slot.gpa.start == gpa);
        let slot = self.slots.remove(at.unwrap());
        self.machine.remove_slot(&slot);
        let size = (slot.gpa.end - slot.gpa.start) * GRANULE;
        self.vm().unbind(gpa * GRANULE, size).unwrap();
    }

    pub fn convert(&self, gpa: Range<u64>, to: Side) -> privmem::Result<()> {
        common::convert(self.vm(), gpa, to)
    }

    /// From here on, memory that the guest reaches is freed on purpose.
    pub fn expect_discards(&mut self) {
        self.machine.expect_discards();
    }

    pub fn write(&mut self, granule: u64, value: u8) {
        self.machine.write(granule, value);
    }

    pub fn read(&mut self, granule: u64) -> u8 {
        self.machine.read(granule)
    }

    pub fn device_write(&mut self, region: &Region, granule: u64, value: u8) {
        self.machine.device_write(region, granule, value);
    }

    /// The guest writes something of its own, never zero, into each granule.
    pub fn fill(&mut self, gpa: Range<u64>, seed: u8) {
        gpa.for_each(|granule| self.write(granule, pattern(granule, seed)));
    }

    /// The guest finds what [`Guest::fill`] has left.
    pub fn assert_filled(&mut self, gpa: Range<u64>, seed: u8) {
        self.assert_reads(gpa, |granule| pattern(granule, seed));
    }

    pub fn assert_zero(&mut self, gpa: Range<u64>) {
        self.assert_reads(gpa, |_| 0);
    }

    fn assert_reads(&mut self, gpa: Range<u64>, value: impl Fn(u64) -> u8) {
        for granule in gpa {
            assert_eq!(self.read(granule), value(granule), "granule {granule}");
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.machine.check();
        }
    }
}

fn pattern(granule: u64, seed: u8) -> u8 {
    1 + ((granule + 100 * u64::from(seed)) % 255) as u8
}

/// One character a granule: `.` shared, `#` private.
pub fn picture(region: &Region) -> String {
    region.picture(usize::MAX)
}

/// Compares a figure of [`privmem::Info`] where the kernel can tell it.
pub fn assert_if_known<T: PartialEq + Debug>(found: Option<T>, expected: T) {
    if let Some(found) = found {
        assert_eq!(found, expected);
    }
}
