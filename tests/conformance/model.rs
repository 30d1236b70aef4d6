//! A software-protected VM on the model of the kernel, which also sees rules
//! broken that no guest can.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use privmem::{Region, Side, Vm};

use crate::common::Model;
use crate::machine::{Machine, Slot};

pub struct OnModel {
    kernel: Arc<Model>,
    vm: Arc<Vm>,
}

impl Machine for OnModel {
    fn missing() -> Option<String> {
        None
    }

    fn new() -> OnModel {
        let kernel = Model::new();
        let vm = kernel.vm();
        OnModel { kernel, vm }
    }

    fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    fn add_slot(&mut self, slot: &Slot) {
        let granules = slot.gpa.end - slot.gpa.start;
        self.kernel
            .add_slot(&slot.region, slot.first, slot.gpa.start, granules);
    }

    fn remove_slot(&mut self, slot: &Slot) {
        let granules = slot.gpa.end - slot.gpa.start;
        self.kernel.remove_slot(slot.gpa.start, granules);
    }

    fn write(&mut self, granule: u64, value: u8) {
        self.kernel.access(granule, |page| *page = value);
    }

    fn read(&mut self, granule: u64) -> u8 {
        self.kernel.access(granule, |page| *page)
    }

    fn expect_discards(&mut self) {
        self.kernel.discards.store(true, Ordering::Relaxed);
    }

    fn device_write(&mut self, region: &Region, granule: u64, value: u8) {
        self.kernel
            .write_store(region, Side::Shared, granule, value);
    }

    fn check(&self) {
        self.kernel.assert_rules();
    }
}

conformance_tests!(OnModel);
