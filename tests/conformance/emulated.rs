//! The emulated agent on the running kernel: the guest reaches its memory
//! through the VMM's mapping.

use std::sync::Arc;

use privmem::{GRANULE, Vm};

use crate::machine::{Machine, Slot};

pub struct Emulated {
    vm: Arc<Vm>,
    /// Guest-physical granules, and where they are mapped.
    slots: Vec<(std::ops::Range<u64>, *mut u8)>,
}

impl Emulated {
    fn bytes(&self, granule: u64) -> impl Iterator<Item = *mut u8> {
        let slot = self.slots.iter().find(|(gpa, _)| gpa.contains(&granule));
        let (gpa, host) = slot.expect("the guest touches memory that it has");
        let start = ((granule - gpa.start) * GRANULE) as usize;
        // SAFETY: within the slot, which lies within one mapping.
        (start..start + GRANULE as usize).map(|byte| unsafe { host.add(byte) })
    }
}

impl Machine for Emulated {
    fn missing() -> Option<String> {
        None
    }

    fn new() -> Emulated {
        Emulated {
            vm: Vm::emulated().unwrap(),
            slots: Vec::new(),
        }
    }

    fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    fn add_slot(&mut self, slot: &Slot) {
        self.slots.push((slot.gpa.clone(), slot.host));
    }

    fn remove_slot(&mut self, slot: &Slot) {
        self.slots.retain(|(gpa, _)| *gpa != slot.gpa);
    }

    // Volatile, as for any memory that changes under one's hands: a conversion
    // on another thread may put other pages there.

    fn write(&mut self, granule: u64, value: u8) {
        for byte in self.bytes(granule) {
            // SAFETY: mapped, and reached through nothing but these pointers.
            unsafe { byte.write_volatile(value) };
        }
    }

    fn read(&mut self, granule: u64) -> u8 {
        // SAFETY: mapped, and reached through nothing but these pointers.
        let mut values = self
            .bytes(granule)
            .map(|byte| unsafe { byte.read_volatile() });
        let value = values.next().unwrap();
        assert!(values.all(|other| other == value), "granule {granule}");
        value
    }
}

conformance_tests!(Emulated);
