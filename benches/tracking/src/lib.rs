//! What the library's book-keeping costs beside QEMU's own, in one process and
//! one run: `cargo xtask bench` links this with the objects of a QEMU build.
//!
//! `bench measure` prints one JSON object; `bench count ours|qemu N` only does N
//! conversions, for who counts instructions.

mod measure;
mod ours;
mod qemu;

use std::ffi::{CStr, c_char, c_int};

/// # Safety
/// Called by the C runtime.
#[unsafe(no_mangle)]
unsafe extern "C" fn main(argc: c_int, argv: *const *const c_char) -> c_int {
    let arguments = (1..argc as usize).map(|index| {
        // SAFETY: the C runtime hands over `argc` strings.
        unsafe { CStr::from_ptr(*argv.add(index)) }.to_string_lossy()
    });
    let arguments: Vec<_> = arguments.collect();
    let words: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
    match words[..] {
        ["measure"] => measure::all(),
        ["count", who, number] => measure::count(who, number.parse().expect("a number")),
        _ => {
            eprintln!("bench measure, or bench count ours|qemu N");
            return 2;
        }
    }
    0
}
