//! The shared store of a region, mapped as a VMM maps it.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use privmem::{GRANULE, Region, Side};

/// A mapping of a whole region that the region knows of.
pub struct HostMapping {
    region: Arc<Region>,
    start: *mut u8,
}

impl HostMapping {
    pub fn new(region: &Arc<Region>) -> HostMapping {
        let fd = region.store(Side::Shared).fd().as_raw_fd();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                region.size() as usize,
                protection,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        // SAFETY: the mapping has the region's size and lives until `drop`,
        // after which no test converts.
        unsafe { region.set_host_mapping(start as usize) }.unwrap();
        HostMapping {
            region: region.clone(),
            start: start.cast(),
        }
    }

    /// The first byte of a granule.
    pub fn granule(&self, number: u64) -> *mut u8 {
        assert!(number * GRANULE < self.region.size());
        // SAFETY: within the mapping.
        unsafe { self.start.add((number * GRANULE) as usize) }
    }
}

impl Drop for HostMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made; nobody converts any more.
        unsafe { libc::munmap(self.start.cast(), self.region.size() as usize) };
    }
}
