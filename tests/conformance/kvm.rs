//! A software-protected VM on the running kernel's KVM. Its guest is a vCPU in
//! protected mode without paging, whose code lies in a page of ordinary memory.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_VM_TYPES, KVM_MEM_GUEST_MEMFD, KVM_MEMORY_EXIT_FLAG_PRIVATE, KVM_X86_SW_PROTECTED_VM,
    kvm_regs, kvm_segment, kvm_userspace_memory_region2,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use privmem::{Error, GRANULE, Side, Vm};

use crate::machine::{Machine, Slot};

/// Fills the granule at edi with eax.
const WRITE: &[u8] = &[
    0xb9, 0x00, 0x04, 0x00, 0x00, // mov ecx, 1024
    0xf3, 0xab, // rep stosd
    0xf4, // hlt
];

/// Loads eax from the granule at esi, and compares the rest of it: ZF says
/// whether all of it is the same.
const READ: &[u8] = &[
    0xad, // lodsd
    0x89, 0xf7, // mov edi, esi
    0xb9, 0xff, 0x03, 0x00, 0x00, // mov ecx, 1023
    0xf3, 0xaf, // repe scasd
    0xf4, // hlt
];

/// Where the guest sees its code: far above what any rule binds.
const CODE: u64 = 0xf000_0000;
const READ_AT: usize = 64;

const RFLAGS_RESERVED: u64 = 1 << 1;
const RFLAGS_ZF: u64 = 1 << 6;
const CR0_PE: u64 = 1;

#[repr(C, align(4096))]
struct Page([u8; GRANULE as usize]);

pub struct SwProtected {
    vcpu: VcpuFd,
    vm: Arc<Vm>,
    /// Numbers of the slots, by first guest-physical granule.
    slots: HashMap<u64, u32>,
    next_slot: u32,
    fd: VmFd,
    // Goes last: the VM reaches it.
    _code: Box<Page>,
}

impl SwProtected {
    fn set_slot(&self, slot: kvm_userspace_memory_region2) {
        // SAFETY: what `userspace_addr` points to stays mapped for as long as
        // this VM: the page of code is ours, and `Guest` drops its regions and
        // mappings after its machine.
        unsafe { self.fd.set_user_memory_region2(slot) }.unwrap();
    }

    /// Runs the guest from `entry` until it halts.
    fn run(&mut self, entry: usize, granule: u64, value: u8) -> kvm_regs {
        let address = granule * GRANULE;
        self.vcpu
            .set_regs(&kvm_regs {
                rip: CODE + entry as u64,
                rflags: RFLAGS_RESERVED,
                rsi: address,
                rdi: address,
                rax: u64::from(u32::from_ne_bytes([value; 4])),
                ..Default::default()
            })
            .unwrap();
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => return self.vcpu.get_regs().unwrap(),
                Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                    let touched = match flags & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) {
                        0 => Side::Shared,
                        _ => Side::Private,
                    };
                    self.vm.memory_fault(gpa, size, touched).unwrap();
                }
                Err(e) if e.errno() == libc::EINTR => {}
                Err(e) if e.errno() == libc::EFAULT => self.vm.run_fault().unwrap(),
                other => panic!("the guest left at granule {granule} with {other:?}"),
            }
        }
    }
}

/// A segment of 4 GiB from 0.
fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

fn vcpu(fd: &VmFd) -> VcpuFd {
    let vcpu = fd.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cr0 |= CR0_PE;
    sregs.cs = flat(0x08, 0xb); // code, read, accessed
    let data = flat(0x10, 0x3); // data, write, accessed
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu
}

impl Machine for SwProtected {
    fn missing() -> Option<String> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(e) => return Some(format!("no /dev/kvm: {e}")),
        };
        let types = kvm.check_extension_raw(KVM_CAP_VM_TYPES.into());
        (types >> KVM_X86_SW_PROTECTED_VM & 1 == 0)
            .then(|| format!("this KVM has no software-protected VMs: VM_TYPES={types:#x}"))
    }

    fn new() -> SwProtected {
        let kvm = Kvm::new().unwrap();
        let fd = kvm
            .create_vm_with_type(KVM_X86_SW_PROTECTED_VM.into())
            .unwrap();
        // SAFETY: `fd` is closed with this machine, and no rule keeps the VM or
        // its regions for longer than that.
        let vm = Vm::with_kvm(unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }).unwrap();
        let mut code = Box::new(Page([0; GRANULE as usize]));
        code.0[..WRITE.len()].copy_from_slice(WRITE);
        code.0[READ_AT..READ_AT + READ.len()].copy_from_slice(READ);
        let machine = SwProtected {
            vcpu: vcpu(&fd),
            vm,
            slots: HashMap::new(),
            next_slot: 1,
            fd,
            _code: code,
        };
        machine.set_slot(kvm_userspace_memory_region2 {
            guest_phys_addr: CODE,
            memory_size: GRANULE,
            userspace_addr: machine._code.0.as_ptr() as u64,
            ..Default::default()
        });
        machine
    }

    fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    fn add_slot(&mut self, slot: &Slot) {
        let private = slot.region.store(Side::Private).fd().as_raw_fd();
        let host = match slot.region.slot_mapping() {
            Ok(start) => start as u64 + slot.first * GRANULE,
            Err(Error::NoGuardRegions) => slot.host as u64,
            Err(error) => panic!("{error}"),
        };
        self.set_slot(kvm_userspace_memory_region2 {
            slot: self.next_slot,
            flags: KVM_MEM_GUEST_MEMFD,
            guest_phys_addr: slot.gpa.start * GRANULE,
            memory_size: (slot.gpa.end - slot.gpa.start) * GRANULE,
            userspace_addr: host,
            guest_memfd_offset: slot.first * GRANULE,
            guest_memfd: private as u32,
            ..Default::default()
        });
        self.slots.insert(slot.gpa.start, self.next_slot);
        self.next_slot += 1;
    }

    fn remove_slot(&mut self, slot: &Slot) {
        let number = self.slots.remove(&slot.gpa.start).unwrap();
        self.set_slot(kvm_userspace_memory_region2 {
            slot: number,
            ..Default::default()
        });
    }

    fn write(&mut self, granule: u64, value: u8) {
        self.run(0, granule, value);
    }

    fn read(&mut self, granule: u64) -> u8 {
        let regs = self.run(READ_AT, granule, 0);
        let word = (regs.rax as u32).to_ne_bytes();
        let same = regs.rflags & RFLAGS_ZF != 0 && word == [word[0]; 4];
        assert!(same, "granule {granule} is not the same throughout");
        word[0]
    }
}

conformance_tests!(SwProtected);
