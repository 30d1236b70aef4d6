//! A region of the emulated agent, mapped as a VMM maps it.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use privmem::{GRANULE, Region, Side, Vm};

/// A region that is mapped as a VMM maps it, and bound at 0.
pub struct Mapped {
    vm: Arc<Vm>,
    pub region: Arc<Region>,
    host: *mut u8,
}

impl Mapped {
    pub fn new(granules: u64) -> Mapped {
        let vm = Vm::emulated().unwrap();
        let size = granules * GRANULE;
        let region = Region::new(&vm, "emulated", size).unwrap();
        let fd = region.store(Side::Shared).fd().as_raw_fd();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let host = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size as usize,
                protection,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        assert_ne!(host, libc::MAP_FAILED);
        // SAFETY: the mapping has the region's size and lives until `drop`.
        unsafe { region.set_host_mapping(host as usize) }.unwrap();
        vm.bind(&region, 0, 0, size).unwrap();
        let host = host.cast();
        Mapped { vm, region, host }
    }

    pub fn granule(&mut self, number: u64) -> &mut [u8] {
        assert!(number * GRANULE < self.region.size());
        // SAFETY: within the mapping, which only this borrow reaches.
        unsafe {
            let start = self.host.add((number * GRANULE) as usize);
            std::slice::from_raw_parts_mut(start, GRANULE as usize)
        }
    }

    /// All of a request, step by step.
    pub fn convert(&self, granule: u64, count: u64, to: Side) -> privmem::Result<()> {
        let (mut at, end) = (granule * GRANULE, (granule + count) * GRANULE);
        while at < end {
            at += self.vm.convert(at, end - at, to)?;
        }
        Ok(())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made; nobody converts any more.
        unsafe { libc::munmap(self.host.cast(), self.region.size() as usize) };
    }
}
