//! QEMU's tracking, through `qemu.c`.

use crate::measure::{Convert, Extents, Tracking};

#[repr(C)]
struct Opaque([u8; 0]);

unsafe extern "C" {
    fn tracking_new(size: u64) -> *mut Opaque;
    fn tracking_free(tracking: *mut Opaque);
    fn tracking_change(tracking: *mut Opaque, offset: u64, size: u64, to_private: bool) -> i32;
    fn tracking_listen(tracking: *mut Opaque);
    fn tracking_calls(tracking: *mut Opaque) -> u64;
    fn tracking_shared_extents(tracking: *mut Opaque, bytes: *mut u64) -> u64;
}

/// One memory region as QEMU 10.2 tracks it.
pub struct Qemu(*mut Opaque);

impl Convert for Qemu {
    fn convert(&self, offset: u64, size: u64, to_private: bool) {
        // SAFETY: made by `tracking_new`, used by one thread.
        let result = unsafe { tracking_change(self.0, offset, size, to_private) };
        assert_eq!(result, 0);
    }
}

impl Tracking for Qemu {
    fn new(size: u64) -> Qemu {
        // SAFETY: takes any size.
        Qemu(unsafe { tracking_new(size) })
    }

    fn listen(&self) {
        // SAFETY: as above; called once.
        unsafe { tracking_listen(self.0) };
    }

    fn listener_calls(&self) -> u64 {
        // SAFETY: as above.
        unsafe { tracking_calls(self.0) }
    }

    fn shared_extents(&self) -> Extents {
        let mut bytes = 0;
        // SAFETY: as above; `bytes` is ours.
        let number = unsafe { tracking_shared_extents(self.0, &mut bytes) };
        Extents { number, bytes }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // SAFETY: made by `tracking_new`, and not used after this.
        unsafe { tracking_free(self.0) };
    }
}
