//! Listeners that map in blocks and have a limited number of entries: what they map
//! follows from the request alone, not from how the library cuts it, and a request
//! that they would refuse is refused before anything has changed.

mod common;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::granules;
use privmem::{EntriesLeft, GRANULE, Listener, Region, Side, Vm};
use proptest::prelude::*;

const MIB: u64 = (1 << 20) / GRANULE;
const CUT: u64 = 64 * MIB;

/// A limit that devices share.
type Pool = Arc<AtomicU64>;

/// A downstream mapper as VFIO's type 1 is: it gives up whole entries only, and has
/// so many of them. All in granules.
struct Device {
    block: u64,
    range: Range<u64>,
    pool: Pool,
    /// Says beforehand how many entries are left.
    tells: bool,
    entries: Mutex<BTreeMap<u64, u64>>,
}

impl Device {
    fn entries(&self) -> Vec<(u64, u64)> {
        let entries = self.entries.lock().unwrap();
        entries.iter().map(|(start, end)| (*start, *end)).collect()
    }
}

impl Listener for Device {
    fn discard(&self, offsets: privmem::Range, count: u64) -> io::Result<()> {
        let gone = granules(offsets);
        let mut entries = self.entries.lock().unwrap();
        let mut found = entries.range(..gone.end).rev();
        let taken: Vec<_> = found
            .by_ref()
            .map(|(start, end)| (*start, *end))
            .take_while(|(_, end)| *end > gone.start)
            .collect();
        let whole = |(start, end): &(u64, u64)| *start >= gone.start && *end <= gone.end;
        assert!(taken.iter().all(whole), "a part of an entry: {gone:?}");
        let bytes: u64 = taken.iter().map(|(start, end)| end - start).sum();
        assert_eq!(bytes, gone.end - gone.start, "not all of it was mapped");
        assert_eq!(taken.len() as u64, count);
        entries.retain(|start, _| !gone.contains(start));
        self.pool.fetch_add(count, Ordering::Relaxed);
        Ok(())
    }

    fn populate(&self, offsets: privmem::Range) -> io::Result<()> {
        let come = granules(offsets);
        let less = |left: u64| left.checked_sub(1);
        self.pool
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
            .map_err(|_| io::Error::from_raw_os_error(libc::ENOSPC))?;
        let mut entries = self.entries.lock().unwrap();
        let before = entries.range(..come.end).next_back();
        assert!(before.is_none_or(|(_, end)| *end <= come.start));
        entries.insert(come.start, come.end);
        Ok(())
    }

    fn granularity(&self) -> Option<u64> {
        Some(self.block * GRANULE)
    }

    fn range(&self) -> Option<privmem::Range> {
        let size = (self.range.end - self.range.start) * GRANULE;
        Some(privmem::Range::new(self.range.start * GRANULE, size).unwrap())
    }

    fn entries_left(&self) -> Option<EntriesLeft> {
        self.tells.then(|| EntriesLeft {
            limit: Arc::as_ptr(&self.pool) as usize,
            entries: self.pool.load(Ordering::Relaxed),
        })
    }

    fn identity(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }
}

/// What the entries are of `run`, which has become shared at once.
fn entries_of(run: Range<u64>, device: &Device) -> Vec<(u64, u64)> {
    let mut at = run.start.max(device.range.start);
    let end = run.end.min(device.range.end);
    let mut entries = Vec::new();
    while at < end {
        let block = device.block;
        let is_block = at.is_multiple_of(block) && at + block <= end;
        let next = at + if is_block { block } else { 1 };
        entries.push((at, next));
        at = next;
    }
    entries
}

/// A region with a device, and what both must be.
struct Half {
    region: Arc<Region>,
    device: Arc<Device>,
    private: Vec<bool>,
    entries: BTreeMap<u64, u64>,
}

impl Half {
    fn new(region: Arc<Region>, device: Device) -> Option<Half> {
        let device = Arc::new(device);
        region.add_listener(device.clone()).ok()?;
        let size = region.size() / GRANULE;
        Some(Half {
            entries: entries_of(0..size, &device).into_iter().collect(),
            private: vec![false; size as usize],
            region,
            device,
        })
    }

    /// The entry that a request to make `part` private takes a part of.
    fn is_cut(&self, part: &Range<u64>) -> bool {
        self.entries.iter().any(|(start, end)| {
            let overlaps = *start < part.end && part.start < *end;
            overlaps && (*start < part.start || *end > part.end)
        })
    }

    /// The entries for what becomes shared of `part`.
    fn added(&self, part: Range<u64>) -> Vec<(u64, u64)> {
        let mut added = Vec::new();
        let mut at = part.start;
        while at < part.end {
            let side = self.private[at as usize];
            let run = (at..part.end).take_while(|g| self.private[*g as usize] == side);
            let end = at + run.count() as u64;
            if side {
                added.extend(entries_of(at..end, &self.device));
            }
            at = end;
        }
        added
    }

    fn assert_agrees(&self) {
        let entries: Vec<_> = self.entries.iter().map(|(s, e)| (*s, *e)).collect();
        assert!(self.device.entries() == entries, "the entries differ");
        let mut at = 0;
        for run in self.region.runs(0, self.region.size()).unwrap() {
            let is_private = run.side == Side::Private;
            let mut sides = self.private[run.granules.clone()].iter();
            assert!(sides.all(|side| *side == is_private), "the sides differ");
            at = run.granules.end;
        }
        assert_eq!(at, self.private.len());
    }
}

/// Two regions, which the guest sees one after the other, the first one in two
/// bindings.
struct Machine {
    vm: Arc<Vm>,
    halves: [Half; 2],
    pool: Pool,
}

impl Machine {
    /// `None` where there are not enough entries for all that is shared at first.
    fn new(setup: &Setup) -> Option<Machine> {
        let vm = Vm::emulated().unwrap();
        let pool = Arc::new(AtomicU64::new(setup.limit));
        let [first, second] = setup.sizes.map(|size| {
            let region = Region::new(&vm, "ram", size * GRANULE);
            region.unwrap()
        });
        let bind = |region, granules: Range<u64>, gpa: u64| {
            let size = (granules.end - granules.start) * GRANULE;
            if size > 0 {
                vm.bind(region, granules.start * GRANULE, gpa * GRANULE, size)
                    .unwrap();
            }
        };
        let [size, other] = setup.sizes;
        let cut = setup.cut % size;
        bind(&first, 0..cut, 0);
        bind(&first, cut..size, cut);
        bind(&second, 0..other, size);
        let device = |size: u64, skipped: u64| Device {
            block: setup.block,
            range: skipped % size..size,
            pool: pool.clone(),
            tells: true,
            entries: Mutex::default(),
        };
        let first = Half::new(first, device(size, setup.skipped))?;
        let second = Half::new(second, device(other, 0))?;
        let halves = [first, second];
        Some(Machine { vm, halves, pool })
    }

    /// What of guest granules `gpa` lies in each half.
    fn parts(&self, gpa: &Range<u64>) -> [Range<u64>; 2] {
        let size = self.halves[0].private.len() as u64;
        [
            gpa.start.min(size)..gpa.end.min(size),
            gpa.start.max(size) - size..gpa.end.max(size) - size,
        ]
    }

    fn expected(&self, gpa: &Range<u64>, to: Side) -> Result<(), i32> {
        let mut halves = self.halves.iter().zip(self.parts(gpa));
        match to {
            Side::Private => match halves.any(|(half, part)| half.is_cut(&part)) {
                true => Err(libc::EBUSY),
                false => Ok(()),
            },
            Side::Shared => {
                let added = halves.map(|(half, part)| half.added(part).len() as u64);
                match added.sum::<u64>() > self.pool.load(Ordering::Relaxed) {
                    true => Err(libc::ENOSPC),
                    false => Ok(()),
                }
            }
        }
    }

    fn convert(&mut self, gpa: Range<u64>, to: Side) {
        let expected = self.expected(&gpa, to);
        let result = common::convert(&self.vm, gpa.clone(), to);
        assert_eq!(result.map_err(|error| error.errno()), expected, "{gpa:?}");
        let parts = self.parts(&gpa);
        for (half, part) in self.halves.iter_mut().zip(parts) {
            if expected.is_ok() {
                match to {
                    Side::Private => half.entries.retain(|start, _| !part.contains(start)),
                    Side::Shared => half.entries.extend(half.added(part.clone())),
                }
                let part = part.start as usize..part.end as usize;
                half.private[part].fill(to == Side::Private);
            }
            half.assert_agrees();
        }
    }

    fn reset(&mut self) {
        for half in &mut self.halves {
            half.region.reset().unwrap();
            half.private.fill(false);
            let size = half.private.len() as u64;
            half.entries = entries_of(0..size, &half.device).into_iter().collect();
            half.assert_agrees();
            assert_eq!(half.region.info().private_held, Some(0));
        }
    }
}

#[derive(Clone, Debug)]
struct Setup {
    sizes: [u64; 2],
    /// Where the first region is cut into two bindings.
    cut: u64,
    /// How much of the first region its device is not told of.
    skipped: u64,
    block: u64,
    limit: u64,
}

/// At, or near, the boundaries that may matter.
fn any_place() -> impl Strategy<Value = u64> {
    let unit = prop_oneof![Just(1), Just(2 * MIB), Just(32 * MIB), Just(CUT)];
    (unit, 0u64..5, -2i64..3).prop_map(|(unit, number, near)| {
        let place = (unit * number) as i64 + near;
        place.max(0) as u64
    })
}

fn any_setup() -> impl Strategy<Value = Setup> {
    let block = prop_oneof![
        3 => (0u32..15).prop_map(|shift| 1 << shift),
        2 => Just(2 * MIB),
        1 => Just(CUT),
    ];
    let sizes = [any_place(), any_place()].prop_map(|sizes| sizes.map(|size| size + 1));
    (sizes, any_place(), any_place(), block, 1u64..70_000).prop_map(
        |(sizes, cut, skipped, block, limit)| Setup {
            sizes,
            cut,
            skipped,
            block,
            limit,
        },
    )
}

fn any_request() -> impl Strategy<Value = (u64, u64, Side)> {
    let to = prop_oneof![Just(Side::Shared), Just(Side::Private)];
    (any_place(), any_place(), to)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_a_device_maps_follows_from_the_requests(
        setup in any_setup(),
        requests in prop::collection::vec(any_request(), 1..12),
    ) {
        let Some(mut machine) = Machine::new(&setup) else {
            return Ok(());
        };
        let end: u64 = setup.sizes.iter().sum();
        for (start, len, to) in requests {
            let start = start % end;
            machine.convert(start..end.min(start + len + 1), to);
        }
        machine.reset();
    }
}

fn machine(mib: u64, cut: u64, block: u64, limit: u64) -> Machine {
    let setup = Setup {
        sizes: [mib * MIB, MIB],
        cut,
        skipped: MIB,
        block,
        limit,
    };
    Machine::new(&setup).unwrap()
}

/// As a PC has it: what lies above 1 MiB is one section, blocks begin at 2 MiB.
#[test]
fn a_request_is_cut_where_no_block_is() {
    let mut machine = machine(512, 0, 2 * MIB, 10_000);
    for (start, end) in [(1, 512), (1, 66), (2, 258)] {
        machine.convert(start * MIB..end * MIB, Side::Private);
        assert_eq!(machine.halves[0].region.info().private, (end - start) << 20);
        let before = machine.pool.load(Ordering::Relaxed);
        machine.convert(start * MIB..end * MIB, Side::Shared);
        let entries = before - machine.pool.load(Ordering::Relaxed);
        let granules = if start % 2 == 1 { MIB } else { 0 };
        assert_eq!(entries, granules + (end - start) / 2);
    }
}

/// A step ends at a multiple of 64 MiB, where no block is cut, ...
#[test]
fn a_step_ends_between_blocks() {
    let machine = machine(512, 0, 2 * MIB, 10_000);
    for to in [Side::Private, Side::Shared] {
        let step = machine.vm.convert(1 << 20, 511 << 20, to).unwrap();
        assert_eq!(step, 63 << 20);
        common::convert(&machine.vm, MIB..512 * MIB, to).unwrap();
    }
}

/// ... also where a binding ends in a block.
#[test]
fn a_step_does_not_end_where_a_binding_does() {
    let mut machine = machine(192, 65 * MIB, 2 * MIB, 10_000);
    for to in [Side::Private, Side::Shared] {
        machine.convert(32 * MIB..192 * MIB, to);
    }
}

/// A guest takes blocks apart, as far as there are entries; with those of all other
/// pages, there would not be enough of them.
#[test]
fn a_reset_puts_blocks_together_again() {
    let mut machine = machine(64, 0, 2 * MIB, 4000);
    machine.convert(2 * MIB..64 * MIB, Side::Private);
    'all: for block in 1..32 {
        for granule in 0..MIB {
            let gpa = block * 2 * MIB + 2 * granule;
            if machine.expected(&(gpa..gpa + 1), Side::Shared).is_err() {
                break 'all;
            }
            common::convert(&machine.vm, gpa..gpa + 1, Side::Shared).unwrap();
            machine.halves[0].private[gpa as usize] = false;
        }
    }
    assert_eq!(machine.pool.load(Ordering::Relaxed), 0);
    machine.reset();
}

/// What a saved machine had mapped in granules may be mapped in blocks when it is
/// loaded.
#[test]
fn a_state_is_loaded_whatever_a_device_maps() {
    let saved = machine(4, 0, 2 * MIB, 10_000);
    let halves = &saved.halves;
    common::convert(&saved.vm, 2 * MIB..4 * MIB, Side::Private).unwrap();
    common::convert(&saved.vm, 3 * MIB..4 * MIB, Side::Shared).unwrap();
    let state = halves[0].region.save_state();
    let loaded = machine(4, 0, 2 * MIB, 10_000);
    let half = &loaded.halves[0];
    half.region.load_state(&state).unwrap();
    assert_eq!(half.region.info().private, 1 << 20);
    assert_eq!(half.device.entries(), halves[0].device.entries());
    // A machine that was converted before it is loaded.
    half.region.load_state(&[0; MIB as usize / 2]).unwrap();
    let blocks = entries_of(0..4 * MIB, &half.device);
    assert_eq!(half.device.entries(), blocks);
}
