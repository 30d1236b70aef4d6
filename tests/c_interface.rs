//! Rules of the C interface that the C clients check as well, for those who run the
//! Rust tests alone.

use std::cell::Cell;
use std::ffi::{CStr, CString, c_int, c_void};
use std::mem::{MaybeUninit, offset_of};
use std::ptr::{null, null_mut};

use privmem::GRANULE;
use privmem::ffi::*;

// SAFETY of all calls: handles are live until they are freed, strings and structs are
// the test's own, and outlive the calls.

fn emulated() -> *mut privmem_vm {
    let mut vm = null_mut();
    assert_eq!(unsafe { privmem_vm_new_emulated(&mut vm) }, 0);
    vm
}

fn region(vm: *const privmem_vm, granules: u64) -> *mut privmem_region {
    let mut region = null_mut();
    let size = granules * GRANULE;
    let ret = unsafe { privmem_region_new(vm, c"ram".as_ptr(), size, null(), &mut region) };
    assert_eq!(ret, 0);
    region
}

fn last_error() -> String {
    // SAFETY: valid until this thread fails again.
    let text = unsafe { CStr::from_ptr(privmem_last_error()) };
    text.to_str().unwrap().to_owned()
}

#[test]
fn a_region_of_another_vm_is_refused() {
    let vms = [emulated(), emulated()];
    let region = region(vms[0], 4);
    let bind = |vm| unsafe { privmem_vm_bind(vm, region, 0, 0, 4 * GRANULE) };
    assert_eq!(bind(vms[1]), -libc::EINVAL);
    assert!(last_error().contains("another VM"), "{}", last_error());
    assert_eq!(bind(vms[0]), 0);
    unsafe {
        privmem_region_free(region);
        vms.into_iter().for_each(|vm| privmem_vm_free(vm));
    }
}

/// Bytes that a listener maps.
unsafe extern "C" fn unmapped(mapped: *mut c_void, _: u64, size: u64, _: u64) -> c_int {
    let mapped = unsafe { &*mapped.cast::<Cell<u64>>() };
    mapped.set(mapped.get() - size);
    0
}

unsafe extern "C" fn mapped(mapped: *mut c_void, _: u64, size: u64) -> c_int {
    let mapped = unsafe { &*mapped.cast::<Cell<u64>>() };
    mapped.set(mapped.get() + size);
    0
}

#[test]
fn a_region_that_is_freed_leaves_nothing() {
    let vm = emulated();
    let first = region(vm, 4);
    let bytes = Cell::new(0);
    let listener = privmem_listener {
        size: size_of::<privmem_listener>(),
        opaque: std::ptr::from_ref(&bytes).cast_mut().cast(),
        discard: Some(unmapped),
        populate: Some(mapped),
        offset: 0,
        length: 0,
        granularity: 0,
        entries_left: None,
        limit: null(),
    };
    unsafe {
        assert_eq!(privmem_vm_bind(vm, first, 0, 0, 4 * GRANULE), 0);
        assert_eq!(privmem_region_add_listener(first, &listener), 0);
        assert_eq!(bytes.get(), 4 * GRANULE);
        privmem_region_free(first);
        assert_eq!(bytes.get(), 0);
        let second = region(vm, 4);
        assert_eq!(privmem_vm_bind(vm, second, 0, 0, 4 * GRANULE), 0);
        privmem_region_free(second);
        privmem_vm_free(vm);
    }
}

/// As many figures as the caller has room for, and no more.
#[test]
fn figures_are_as_many_as_the_caller_knows() {
    let vm = emulated();
    let region = region(vm, 4);
    let mut info = MaybeUninit::<privmem_info>::uninit();
    let first = offset_of!(privmem_info, relocated);
    let bytes = info.as_mut_ptr().cast::<u8>();
    for size in [first, first + 8, size_of::<privmem_info>()] {
        unsafe {
            bytes.write_bytes(0xee, size_of::<privmem_info>());
            assert_eq!(privmem_region_info(region, info.as_mut_ptr(), size), 0);
            let bytes = std::slice::from_raw_parts(bytes, size_of::<privmem_info>());
            assert!(bytes[size..].iter().all(|byte| *byte == 0xee), "{size}");
            assert_eq!(bytes[..8], (4 * GRANULE).to_ne_bytes());
        }
    }
    let ret = unsafe { privmem_region_info(region, info.as_mut_ptr(), first - 1) };
    assert_eq!(ret, -libc::EINVAL);
    unsafe {
        privmem_region_free(region);
        privmem_vm_free(vm);
    }
}

unsafe extern "C" fn refused(_: *mut c_void, _: u64, _: u64, _: bool) -> c_int {
    -libc::EACCES
}

/// Whatever is cut off: what is left is UTF-8, and as much as fits.
#[test]
fn a_message_is_cut_between_characters() {
    for pad in 0..3 {
        let name = CString::new("x".repeat(pad) + &"\u{20ac}".repeat(200)).unwrap();
        // SAFETY: all of it may be zero.
        let mut table: privmem_agent = unsafe { MaybeUninit::zeroed().assume_init() };
        table.size = size_of::<privmem_agent>();
        table.name = name.as_ptr();
        table.before_convert = Some(refused);
        let mut vm = null_mut();
        let (mut done, mut failed) = (0, MaybeUninit::<privmem_failed_conversion>::uninit());
        unsafe {
            assert_eq!(privmem_vm_new_agent(-1, &table, &mut vm), 0);
            let region = region(vm, 1);
            assert_eq!(privmem_vm_bind(vm, region, 0, 0, GRANULE), 0);
            let ret = privmem_vm_convert(vm, 0, GRANULE, true, &mut done);
            assert_eq!(ret, -libc::EACCES);
            let size = size_of::<privmem_failed_conversion>();
            assert_eq!(
                privmem_vm_failed_conversion(vm, 0, failed.as_mut_ptr(), size),
                0
            );
            let message = CStr::from_ptr((*failed.as_ptr()).message.as_ptr());
            let text = message.to_str().expect("a character is cut");
            assert!(text.len() > PRIVMEM_MESSAGE_SIZE - 1 - 3, "{}", text.len());
            assert!(last_error().starts_with(text));
            privmem_region_free(region);
            privmem_vm_free(vm);
        }
    }
}
