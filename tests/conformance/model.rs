//! VMs on the model of the kernel, which also sees rules broken that no guest
//! can: a software-protected one, and those of the MODELS of a TDX module and of
//! SEV-SNP firmware. No hardware is used.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use privmem::agent::{Snp, Tdx};
use privmem::{Region, Side, Vm};

use crate::common::firmware::{SnpFirmware, TdxModule};
use crate::common::{Model, stand_in_fd};
use crate::machine::{Machine, Slot};

/// What keeps private contents on the model.
pub trait Keeper {
    /// A VM that has been launched.
    fn vm(kernel: &Arc<Model>) -> Arc<Vm>;
}

pub struct Kvm;

impl Keeper for Kvm {
    fn vm(kernel: &Arc<Model>) -> Arc<Vm> {
        kernel.vm()
    }
}

impl Keeper for TdxModule {
    fn vm(kernel: &Arc<Model>) -> Arc<Vm> {
        let agent = Arc::new(Tdx::new(stand_in_fd()));
        launched(kernel.vm_with(agent, TdxModule::default()))
    }
}

impl Keeper for SnpFirmware {
    fn vm(kernel: &Arc<Model>) -> Arc<Vm> {
        let agent = Arc::new(Snp::new(stand_in_fd(), stand_in_fd()));
        let vm = kernel.vm_with(agent, SnpFirmware::default());
        vm.prepare().unwrap();
        launched(vm)
    }
}

fn launched(vm: Arc<Vm>) -> Arc<Vm> {
    vm.finalize().unwrap();
    vm
}

pub struct OnModel<K> {
    kernel: Arc<Model>,
    vm: Arc<Vm>,
    keeper: PhantomData<K>,
}

impl<K: Keeper> Machine for OnModel<K> {
    fn missing() -> Option<String> {
        None
    }

    fn new() -> OnModel<K> {
        let kernel = Model::new();
        let vm = K::vm(&kernel);
        let keeper = PhantomData;
        OnModel { kernel, vm, keeper }
    }

    fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    fn add_slot(&mut self, slot: &Slot) {
        let granules = slot.gpa.end - slot.gpa.start;
        slot.region.slot_mapping().unwrap();
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

conformance_tests!(OnModel<Kvm>);
