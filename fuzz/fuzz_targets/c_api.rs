//! What a guest, a monitor and a machine ask of the C interface while a VM runs, in
//! any order, on the emulated agent, and a guest that touches its memory. What must
//! hold afterwards is checked after every call; requests of the hostile guest
//! (`tests/hostile/requests.h`) must end as they have to.

#![no_main]

use std::ptr::{null, null_mut};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use privmem::ffi::*;

const PAGE: u64 = 4096;

/// As in `tests/hostile/requests.h`.
#[repr(C)]
struct Field {
    base: u64,
    size: u64,
    ram_end: u64,
    plug_base: u64,
    plug_size: u64,
}

const FIELD: Field = Field {
    base: 16 * PAGE,
    size: 96 * PAGE,
    ram_end: 128 * PAGE,
    plug_base: 1 << 32,
    plug_size: 64 * PAGE,
};

#[repr(C)]
#[derive(Default)]
struct Request {
    gpa: u64,
    pages: u64,
    attributes: u64,
}

const PRIVATE: u64 = 0x10;

#[repr(C)]
#[derive(Debug, PartialEq)]
#[allow(dead_code)] // made by C
enum Answer {
    Refused,
    Granted,
    Either,
}

unsafe extern "C" {
    fn hostile_request(state: *mut u64, field: *const Field, request: *mut Request) -> Answer;
}

#[derive(Arbitrary, Debug)]
enum Call {
    Hostile {
        seed: u64,
    },
    Touch {
        offset: u32,
    },
    Convert {
        page: u8,
        pages: u8,
        to_private: bool,
    },
    Anywhere {
        gpa: u64,
        size: u64,
        to_private: bool,
    },
    Fault {
        gpa: u64,
        size: u64,
        is_private: bool,
    },
    Failure {
        page: u8,
        is_private: bool,
        retire: bool,
    },
    Bind {
        offset: u16,
        gpa: u64,
        pages: u16,
    },
    Unbind {
        gpa: u64,
        pages: u16,
    },
    Plug,
    Unplug,
    Discard {
        page: u8,
        pages: u8,
    },
    Access {
        offset: u64,
        len: u64,
    },
    Run {
        offset: u64,
    },
    Picture {
        size: u8,
    },
    Failed {
        index: usize,
    },
    Reset,
    SaveAndLoad {
        size: u8,
    },
}

struct Machine {
    vm: *mut privmem_vm,
    ram: *mut privmem_region,
    dimm: *mut privmem_region,
    /// Of all of `ram`.
    host: *mut u8,
}

// SAFETY of all calls: handles are live from `new` to `drop`, and pointers are to
// variables of the caller's; numbers may be anything.
impl Machine {
    fn new() -> Machine {
        let (mut vm, mut ram, mut dimm) = (null_mut(), null_mut(), null_mut());
        unsafe {
            assert_eq!(privmem_vm_new_emulated(&mut vm), 0);
            let new = |name: &std::ffi::CStr, size, region| {
                privmem_region_new(vm, name.as_ptr(), size, null(), region)
            };
            assert_eq!(new(c"ram", FIELD.ram_end, &mut ram), 0);
            assert_eq!(new(c"dimm", FIELD.plug_size, &mut dimm), 0);
            assert_eq!(privmem_vm_bind(vm, ram, 0, 0, FIELD.ram_end), 0);
            let (size, fd) = (FIELD.ram_end as usize, privmem_region_shared_fd(ram));
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let host = libc::mmap(null_mut(), size, access, libc::MAP_SHARED, fd, 0);
            assert_ne!(host, libc::MAP_FAILED);
            assert_eq!(privmem_region_set_host_mapping(ram, host), 0);
            let host = host.cast();
            Machine {
                vm,
                ram,
                dimm,
                host,
            }
        }
    }

    fn convert(&self, gpa: u64, size: u64, to_private: bool) -> bool {
        let mut done = 0;
        loop {
            let mut step = 0;
            let rest = size - done;
            let at = gpa.wrapping_add(done);
            let ret = unsafe { privmem_vm_convert(self.vm, at, rest, to_private, &mut step) };
            if ret != 0 {
                return false;
            }
            assert!(step > 0 && step <= rest);
            done += step;
            if done == size {
                return true;
            }
        }
    }

    fn request(&self, gpa: u64, size: u64, to_private: bool) -> bool {
        let (mut conversion, mut left) = (null_mut(), u64::MAX);
        unsafe {
            if privmem_conversion_new(self.vm, gpa, size, to_private, &mut conversion) != 0 {
                return false;
            }
            let mut ret = 0;
            while ret == 0 && left != 0 {
                ret = privmem_conversion_step(conversion, &mut left);
            }
            privmem_conversion_free(conversion);
            ret == 0
        }
    }

    fn hostile(&self, mut seed: u64) {
        let mut request = Request::default();
        seed |= 1;
        let expected = unsafe { hostile_request(&mut seed, &FIELD, &mut request) };
        let is_private = request.attributes & PRIVATE != 0;
        let size = request.pages.checked_mul(PAGE);
        let granted = size.is_some_and(|size| self.convert(request.gpa, size, is_private));
        // What is bound beside the RAM may make more possible than the guest knows,
        // but not what cannot be a range.
        let end = size.and_then(|size| request.gpa.checked_add(size));
        let is_range = request.pages > 0 && request.gpa % PAGE == 0 && end.is_some();
        match expected {
            Answer::Granted => assert!(granted),
            Answer::Refused | Answer::Either => assert!(is_range || !granted),
        }
    }

    fn call(&self, call: &Call) {
        let (vm, ram, dimm) = (self.vm, self.ram, self.dimm);
        unsafe {
            match *call {
                Call::Hostile { seed } => self.hostile(seed),
                Call::Touch { offset } => {
                    *self.host.add(offset as usize % FIELD.ram_end as usize) = 1;
                }
                Call::Convert {
                    page,
                    pages,
                    to_private,
                } => {
                    self.convert(u64::from(page) * PAGE, u64::from(pages) * PAGE, to_private);
                }
                Call::Anywhere {
                    gpa,
                    size,
                    to_private,
                } => drop(self.request(gpa, size, to_private)),
                Call::Fault {
                    gpa,
                    size,
                    is_private,
                } => {
                    privmem_vm_memory_fault(vm, gpa, size, is_private);
                }
                Call::Failure {
                    page,
                    is_private,
                    retire,
                } => {
                    let gpa = u64::from(page) * PAGE;
                    let mut failure = std::mem::zeroed();
                    privmem_vm_memory_failure(vm, gpa, is_private, retire, &mut failure);
                }
                Call::Bind { offset, gpa, pages } => {
                    let offset = u64::from(offset) * PAGE;
                    privmem_vm_bind(vm, dimm, offset, gpa, u64::from(pages) * PAGE);
                }
                Call::Unbind { gpa, pages } => {
                    // RAM stays where it is, so that its requests can be judged.
                    if gpa != 0 {
                        privmem_vm_unbind(vm, gpa, u64::from(pages) * PAGE);
                    }
                }
                Call::Plug => {
                    privmem_vm_bind(vm, dimm, 0, FIELD.plug_base, FIELD.plug_size);
                }
                Call::Unplug => {
                    privmem_vm_unbind(vm, FIELD.plug_base, FIELD.plug_size);
                }
                Call::Discard { page, pages } => {
                    privmem_region_discard(ram, u64::from(page) * PAGE, u64::from(pages) * PAGE);
                }
                Call::Access { offset, len } => {
                    let mut len = len;
                    privmem_region_host_access(ram, offset, &mut len);
                }
                Call::Run { offset } => {
                    let mut run = std::mem::zeroed();
                    privmem_region_next_run(ram, offset, &mut run);
                }
                Call::Picture { size } => {
                    let mut picture = [0; 256];
                    privmem_region_picture(ram, picture.as_mut_ptr(), size.into());
                }
                Call::Failed { index } => {
                    let mut failed = std::mem::zeroed();
                    let size = size_of::<privmem_failed_conversion>();
                    privmem_vm_failed_conversion(vm, index, &mut failed, size);
                }
                Call::Reset => assert_eq!(privmem_region_reset(ram), 0),
                Call::SaveAndLoad { size } => {
                    let mut state = [0u8; 256];
                    let (state, size) = (state.as_mut_ptr(), size.into());
                    if privmem_region_save_state(ram, state, size) == 0 {
                        assert_eq!(privmem_region_load_state(ram, state, size), 0);
                    }
                }
            }
        }
    }

    fn check(&self) {
        for region in [self.ram, self.dimm] {
            unsafe {
                let mut info: privmem_info = std::mem::zeroed();
                let size = size_of::<privmem_info>();
                assert_eq!(privmem_region_info(region, &mut info, size), 0);
                assert!(info.held_twice == 0 || info.held_twice == PRIVMEM_UNKNOWN);
                let (mut at, mut private) = (0, 0);
                while at < info.size {
                    let mut run: privmem_run = std::mem::zeroed();
                    assert_eq!(privmem_region_next_run(region, at, &mut run), 0);
                    assert!(run.offset == at && run.size > 0 && run.size <= info.size - at);
                    private += if run.is_private { run.size } else { 0 };
                    at += run.size;
                }
                assert_eq!(private, info.private_bytes);
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        unsafe {
            privmem_region_free(self.ram);
            privmem_region_free(self.dimm);
            privmem_vm_free(self.vm);
            libc::munmap(self.host.cast(), FIELD.ram_end as usize);
        }
    }
}

fuzz_target!(|calls: Vec<Call>| {
    let machine = Machine::new();
    for call in &calls {
        machine.call(call);
        machine.check();
    }
});
