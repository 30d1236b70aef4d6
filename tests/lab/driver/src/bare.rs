//! The least that a VMM can do: our guest on KVM's ioctls, to compare with. A request to convert is
//! the attribute and a hole in the store that is left: no state, no check, no listener, no undo.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::fs;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_GUEST_MEMFD, KVM_MEM_READONLY, KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_X86_SW_PROTECTED_VM, kvm_create_guest_memfd, kvm_enable_cap, kvm_memory_attributes,
    kvm_pre_fault_memory, kvm_userspace_memory_region2,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use nix::unistd::ftruncate;

use crate::machine::PAGE;

const HC_MAP_GPA_RANGE: u64 = 12;
const MAP_PRIVATE: u64 = 0x10;
const COM1: u16 = 0x3f8;
const COM1_STATUS: u16 = COM1 + 5;
const DEBUG_EXIT: u16 = 0xf4;

/// As on q35: RAM but for what lies below the BIOS and below 4 GiB.
const RAM_BELOW_4G: u64 = 2 << 30;
const END_OF_LOW_RAM: u64 = 0xc_0000;
const FROM_1M: u64 = 1 << 20;
const FROM_4G: u64 = 4 << 30;
const ROM: [u64; 2] = [0xf_0000, 0xffff_0000];

pub struct Bare {
    vcpu: VcpuFd,
    machine: Bound,
    /// What the guest has not read of its serial line yet.
    input: VecDeque<u8>,
}

/// All of the machine but its CPU.
struct Bound {
    vm: VmFd,
    shared: OwnedFd,
    private: OwnedFd,
    slots: u32,
    prefault: bool,
    // Go last: the VM reaches them.
    mappings: Vec<Mapping>,
}

struct Mapping {
    host: NonNull<c_void>,
    size: NonZeroUsize,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it is nobody else's; the VM, whose guest reached it, is gone.
        let _ = unsafe { munmap(self.host, self.size.get()) };
    }
}

impl Bare {
    /// Our guest in a machine with so much RAM; `prefault`: with KVM_PRE_FAULT_MEMORY after each
    /// conversion.
    pub fn start(ram: u64, prefault: bool) -> Result<Bare> {
        let kvm = Kvm::new().context("/dev/kvm")?;
        let vm = kvm
            .create_vm_with_type(KVM_X86_SW_PROTECTED_VM.into())
            .context("KVM_CREATE_VM")?;
        vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
        vm.enable_cap(&kvm_enable_cap {
            cap: Cap::ExitHypercall as u32,
            args: [1 << HC_MAP_GPA_RANGE, 0, 0, 0],
            ..Default::default()
        })
        .context("KVM_CAP_EXIT_HYPERCALL")?;
        let mut machine = Bound::new(vm, ram, prefault)?;
        machine.map_ram(ram)?;
        machine.map_rom()?;
        let vcpu = machine.vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
        let input = VecDeque::new();
        let mut bare = Bare {
            vcpu,
            machine,
            input,
        };
        let first = bare.reply()?;
        ensure!(
            first.starts_with("guest ready"),
            "the guest's first line is: {first}"
        );
        Ok(bare)
    }

    /// One command to the guest, which runs for as long as it takes to reply.
    pub fn ask(&mut self, command: &str) -> Result<String> {
        self.input.extend(command.bytes());
        self.input.push_back(b'\n');
        self.reply()
    }

    fn reply(&mut self) -> Result<String> {
        let mut line = String::new();
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::Hypercall(call)) => {
                    let [gpa, pages, flags, ..] = call.args;
                    let done = self.machine.convert(gpa, pages, flags & MAP_PRIVATE != 0);
                    *call.ret = done.map_or_else(|errno| -(errno as i64) as u64, |()| 0);
                    self.machine.prefault(&self.vcpu, gpa, pages);
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    data[0] = match port {
                        COM1_STATUS => 0x60 | u8::from(!self.input.is_empty()),
                        COM1 => self.input.pop_front().unwrap_or(0),
                        _ => u8::MAX,
                    }
                }
                Ok(VcpuExit::IoOut(COM1, b"\n")) if !line.is_empty() => return Ok(line),
                Ok(VcpuExit::IoOut(COM1, data)) => line.extend(data.iter().map(|c| *c as char)),
                Ok(VcpuExit::IoOut(DEBUG_EXIT, _)) => bail!("the guest ended: {line}"),
                Ok(VcpuExit::IoOut(..)) => {}
                Err(e) if e.errno() == Errno::EINTR as i32 => {}
                other => bail!("the guest left with {other:?}"),
            }
        }
    }
}

impl Bound {
    fn new(vm: VmFd, ram: u64, prefault: bool) -> Result<Bound> {
        let shared = memfd_create(c"bare", MFdFlags::MFD_CLOEXEC)?;
        ftruncate(&shared, ram as i64)?;
        let private = vm
            .create_guest_memfd(kvm_create_guest_memfd {
                size: ram,
                ..Default::default()
            })
            .context("KVM_CREATE_GUEST_MEMFD")?;
        // SAFETY: the fd was just made and is nobody else's.
        let private = unsafe { OwnedFd::from_raw_fd(private) };
        Ok(Bound {
            vm,
            shared,
            private,
            slots: 0,
            prefault,
            mappings: Vec::new(),
        })
    }

    fn map_ram(&mut self, ram: u64) -> Result<()> {
        let size = NonZeroUsize::new(ram as usize).context("no RAM")?;
        let (prot, flags) = (
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE,
        );
        // SAFETY: a new mapping, which nobody but the guest reaches.
        let host = unsafe { mmap(None, size, prot, flags, &self.shared, 0) }.context("mmap")?;
        self.mappings.push(Mapping { host, size });
        let host = host.as_ptr() as u64;
        let below = ram.min(RAM_BELOW_4G);
        for (start, end) in [
            (0, END_OF_LOW_RAM),
            (FROM_1M, below),
            (FROM_4G, FROM_4G + ram - below),
        ] {
            if start < end {
                let offset = offset_of(start);
                self.add_slot(kvm_userspace_memory_region2 {
                    flags: KVM_MEM_GUEST_MEMFD,
                    guest_phys_addr: start,
                    memory_size: end - start,
                    userspace_addr: host + offset,
                    guest_memfd: self.private.as_raw_fd() as u32,
                    guest_memfd_offset: offset,
                    ..Default::default()
                })?;
            }
        }
        Ok(())
    }

    fn map_rom(&mut self) -> Result<()> {
        let rom = fs::read("/guest/guest.bin")?;
        let size = NonZeroUsize::new(rom.len()).context("no ROM")?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, which nobody but the guest reaches.
        let host = unsafe { mmap_anonymous(None, size, prot, MapFlags::MAP_PRIVATE) }?;
        self.mappings.push(Mapping { host, size });
        // SAFETY: the mapping is as large as the ROM.
        unsafe { ptr::copy_nonoverlapping(rom.as_ptr(), host.as_ptr().cast(), rom.len()) };
        for guest_phys_addr in ROM {
            self.add_slot(kvm_userspace_memory_region2 {
                flags: KVM_MEM_READONLY,
                guest_phys_addr,
                memory_size: rom.len() as u64,
                userspace_addr: host.as_ptr() as u64,
                ..Default::default()
            })?;
        }
        Ok(())
    }

    fn add_slot(&mut self, slot: kvm_userspace_memory_region2) -> Result<()> {
        let slot = kvm_userspace_memory_region2 {
            slot: self.slots,
            ..slot
        };
        self.slots += 1;
        // SAFETY: mappings go after the VM.
        unsafe { self.vm.set_user_memory_region2(slot) }.context("KVM_SET_USER_MEMORY_REGION2")
    }

    /// For ranges that do not cross the hole below 4 GiB.
    fn convert(&self, gpa: u64, pages: u64, private: bool) -> nix::Result<()> {
        let size = pages * PAGE;
        let (attributes, left) = match private {
            true => (KVM_MEMORY_ATTRIBUTE_PRIVATE, &self.shared),
            false => (0, &self.private),
        };
        self.vm
            .set_memory_attributes(kvm_memory_attributes {
                address: gpa,
                size,
                attributes: attributes.into(),
                flags: 0,
            })
            .map_err(|e| Errno::from_raw(e.errno()))?;
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(left.as_fd(), hole, offset_of(gpa) as i64, size as i64)
    }

    /// Best effort, as QEMU does it: a page that cannot be had now is taken at the guest's access.
    fn prefault(&self, vcpu: &VcpuFd, gpa: u64, pages: u64) {
        let mut range = kvm_pre_fault_memory {
            gpa,
            size: pages * PAGE,
            ..Default::default()
        };
        while self.prefault && range.size > 0 {
            // SAFETY: the struct is the ioctl's, and lives until it is done.
            if unsafe { pre_fault_memory(vcpu.as_raw_fd(), &mut range) }.is_err() {
                break;
            }
        }
    }
}

nix::ioctl_readwrite!(pre_fault_memory, 0xae, 0xd5, kvm_pre_fault_memory);

fn offset_of(gpa: u64) -> u64 {
    match gpa < FROM_4G {
        true => gpa,
        false => gpa - FROM_4G + RAM_BELOW_4G,
    }
}
