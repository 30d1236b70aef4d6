//! Memory that moves in a process whose memory is all locked, as QEMU's is with
//! `-overcommit mem-lock=on`: the kernel fills each new mapping at once. In a
//! program of its own, because mlockall(2) is for the whole process.

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::convert;
use common::mapping::HostMapping;
use privmem::kernel::{Kernel, Linux};
use privmem::{Destination, GRANULE, Level, Region, Side, Vm};

const MOVES: u64 = 100;

/// Where a granule is mapped, for the thread that counts in it.
struct Counter(*mut u64);

// SAFETY: one thread uses it at a time.
unsafe impl Send for Counter {}

impl Counter {
    /// Counts in the first and the last word, until it is told to stop.
    fn count(&self, stop: &AtomicBool) -> u64 {
        let mut counted = 0;
        while !stop.load(Ordering::Relaxed) {
            counted += 1;
            for word in [0, GRANULE as usize / 8 - 1] {
                // SAFETY: within the granule, which is mapped.
                unsafe {
                    let word = self.0.add(word);
                    assert_eq!(word.read_volatile(), counted - 1);
                    word.write_volatile(counted);
                }
            }
        }
        counted
    }
}

#[test]
fn who_touches_memory_waits_although_all_is_locked() {
    let path = format!(
        "{}/locked-{}",
        env!("CARGO_TARGET_TMPDIR"),
        std::process::id()
    );
    let mut options = File::options();
    let options = options.read(true).write(true).create_new(true);
    let disk = options.open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    disk.set_len(GRANULE).unwrap();
    if Linux.file(disk.as_fd()).unwrap().in_memory {
        println!("skipped: the tests' folder is on no disk");
        return;
    }
    // SAFETY: the call changes how memory is mapped, not what is in it.
    if unsafe { libc::mlockall(libc::MCL_FUTURE) } != 0 {
        println!("skipped: mlockall: {}", std::io::Error::last_os_error());
        return;
    }
    let vm = Vm::emulated().unwrap();
    let region = Region::new(&vm, "ram", 4 * GRANULE).unwrap();
    let mapping = HostMapping::new(&region);
    vm.bind(&region, 0, 0, 4 * GRANULE).unwrap();
    convert(&vm, 0..4, Side::Private).unwrap();
    let places = [
        Destination::File {
            fd: disk.as_fd(),
            offset: 0,
        },
        Destination::Home,
    ];
    let relocate = |to| vm.relocate(2 * GRANULE, Level::Size4K, to);
    if let Err(error) = relocate(places[0]) {
        assert!(error.to_string().contains("userfaultfd"), "{error}");
        println!("skipped: {error}");
        return;
    }
    let (counter, stop) = (Counter(mapping.granule(2).cast()), AtomicBool::new(false));
    thread::scope(|scope| {
        let stop = &stop;
        let counter = scope.spawn(move || counter.count(stop));
        let moved = (1..MOVES).try_for_each(|turn| {
            let to = places[turn as usize % 2];
            relocate(to)
        });
        stop.store(true, Ordering::Relaxed);
        assert!(counter.join().unwrap() > 0);
        moved.unwrap();
    });
}

/// The mapping for memory slots takes no page, and is not locked: the kernel refuses guard regions
/// in locked memory.
#[test]
fn the_mapping_for_slots_is_not_locked() {
    // SAFETY: as above.
    if unsafe { libc::mlockall(libc::MCL_FUTURE) } != 0 {
        println!("skipped: mlockall: {}", std::io::Error::last_os_error());
        return;
    }
    let store = Linux.create_memfd(c"slots", 4 * GRANULE, None).unwrap();
    let start = Linux.map_for_slots(store.as_fd(), 4 * GRANULE).unwrap();
    assert_eq!(Linux.blocks(store.as_fd()).unwrap(), 0);
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let (_, own) = smaps.split_once(&format!("\n{start:x}-")).unwrap();
    let flags = own.lines().find_map(|line| line.strip_prefix("VmFlags:"));
    assert!(!flags.unwrap().split_whitespace().any(|flag| flag == "lo"));
    // SAFETY: as above.
    unsafe { Linux.unmap(start, 4 * GRANULE as usize) };
}
