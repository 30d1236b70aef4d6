//! What is measured: both trackings in turns, round by round, so that a noisy
//! machine disturbs both alike; the ratio is that of each round.

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::Instant;

use cpu_time::ThreadTime;
use privmem::GRANULE;
use serde::Serialize;

use crate::ours::{Ours, StateAlone};
use crate::qemu::Qemu;

const GIB: u64 = 1 << 30;
const ROUNDS: usize = 11;

/// Who keeps track of which pages are private; all are at first.
pub trait Convert {
    fn convert(&self, offset: u64, size: u64, to_private: bool);
}

/// Who can tell more of it.
pub trait Tracking: Convert {
    fn new(size: u64) -> Self;
    /// Counts from now on how often a listener is called.
    fn listen(&self);
    fn listener_calls(&self) -> u64;
    fn shared_extents(&self) -> Extents;
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Extents {
    pub number: u64,
    pub bytes: u64,
}

#[derive(Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Spread {
        values.sort_by(f64::total_cmp);
        Spread {
            median: values[values.len() / 2],
            min: values[0],
            max: values[values.len() - 1],
        }
    }
}

/// Nanoseconds, or whatever else the name says; `ratio` is QEMU's part by ours.
#[derive(Serialize)]
struct Figure {
    name: String,
    /// Of the guest's memory.
    gib: u64,
    ours: Spread,
    qemu: Option<Spread>,
    ratio: Option<Spread>,
}

impl Figure {
    fn of(name: &str, gib: u64, rounds: Vec<(f64, f64)>) -> Figure {
        let column = |pick: fn(&(f64, f64)) -> f64| Spread::of(rounds.iter().map(pick).collect());
        Figure {
            name: name.to_owned(),
            gib,
            ours: column(|(ours, _)| *ours),
            qemu: Some(column(|(_, qemu)| *qemu)),
            ratio: Some(column(|(ours, qemu)| qemu / ours)),
        }
    }

    fn of_ours(name: &str, gib: u64, rounds: Vec<f64>) -> Figure {
        Figure {
            name: name.to_owned(),
            gib,
            ours: Spread::of(rounds),
            qemu: None,
            ratio: None,
        }
    }
}

pub fn all() {
    // First, as what is freed later is not given back at once.
    let mut figures = vec![metadata()];
    for gib in [1, 64, 512, 4096] {
        figures.extend(one_page(gib));
    }
    figures.push(listener_calls());
    figures.push(extents("shared extents, clustered", clusters()));
    figures.push(extents("shared extents, scattered", scattered()));
    figures.push(two_threads());
    figures.push(creation());
    println!("{}", serde_json::json!({ "figures": figures }));
}

/// Does `number` conversions of one page, and nothing else that depends on it.
pub fn count(who: &str, number: u64) {
    fn run<T: Tracking>(number: u64) {
        let tracking = T::new(GIB);
        for page in pool().cycle().take(number as usize / 2) {
            tracking.convert(page, GRANULE, false);
            tracking.convert(page, GRANULE, true);
        }
    }
    match who {
        "ours" => run::<Ours>(number),
        "qemu" => run::<Qemu>(number),
        _ => panic!("ours or qemu, not {who}"),
    }
}

/// CPU time of this thread in nanoseconds.
fn time(work: impl FnOnce()) -> f64 {
    let start = ThreadTime::now();
    work();
    start.elapsed().as_nanos() as f64
}

/// Where a guest has its bounce buffers: low in its memory.
fn pool() -> impl Iterator<Item = u64> + Clone {
    (0..1024).map(|page| (64 << 20) + page * GRANULE)
}

/// As many pages, evenly spread over the guest.
fn spread(size: u64) -> impl Iterator<Item = u64> + Clone {
    (0..1024).map(move |page| size / 1024 * page)
}

/// Nanoseconds for one page, to shared and back.
fn storm(tracking: &impl Convert, pages: impl Iterator<Item = u64> + Clone) -> [f64; 2] {
    let number = pages.clone().count() as f64;
    [false, true].map(|to_private| {
        let convert = |page| tracking.convert(page, GRANULE, to_private);
        time(|| pages.clone().for_each(convert)) / number
    })
}

fn mean([a, b]: [f64; 2]) -> f64 {
    (a + b) / 2.0
}

/// A guest turns pages of its pool shared one by one, and back.
fn one_page(gib: u64) -> [Figure; 5] {
    let size = gib * GIB;
    let (whole, state, qemu) = (Ours::new(size), StateAlone::new(size), Qemu::new(size));
    // As many as take some milliseconds.
    let few = (1024 / gib).clamp(4, 1024) as usize;
    let round = |_| {
        let qemu = storm(&qemu, pool().take(few));
        let wide = mean(storm(&whole, spread(size)));
        (often(&whole), often(&state), qemu, wide)
    };
    round(0);
    let rounds: Vec<_> = (0..ROUNDS).map(round).collect();
    let direction = |at: usize| rounds.iter().map(|(o, _, q, _)| (o[at], q[at])).collect();
    let both = rounds.iter().map(|(o, _, q, _)| (mean(*o), mean(*q)));
    let state = rounds.iter().map(|(_, s, q, _)| (mean(*s), mean(*q)));
    let wide = rounds.iter().map(|(_, _, _, wide)| *wide);
    [
        Figure::of("one page, state alone", gib, state.collect()),
        Figure::of("one page", gib, both.collect()),
        Figure::of("one page, to shared", gib, direction(0)),
        Figure::of("one page, to private", gib, direction(1)),
        Figure::of_ours("one page, anywhere", gib, wide.collect()),
    ]
}

/// As [`storm`], the mean of some.
fn often(tracking: &impl Convert) -> [f64; 2] {
    let storms = (0..8).map(|_| storm(tracking, pool()));
    storms.fold([0.0; 2], |[a, b], [c, d]| [a + c / 8.0, b + d / 8.0])
}

/// A generator of no special quality, the same in every run (xorshift).
fn random() -> impl Iterator<Item = u64> {
    std::iter::successors(Some(0x9e37_79b9_7f4a_7c15), |last: &u64| {
        let mut x = *last;
        x ^= x << 13;
        x ^= x >> 7;
        Some(x ^ (x << 17))
    })
}

/// How often a listener is called when 2 MiB become private of which each page
/// was shared or not by chance; as many runs were shared.
fn listener_calls() -> Figure {
    fn calls<T: Tracking>(pages: &[bool]) -> f64 {
        let tracking = T::new(GIB);
        for (page, _) in pages.iter().enumerate().filter(|(_, shared)| **shared) {
            tracking.convert(page as u64 * GRANULE, GRANULE, false);
        }
        tracking.listen();
        let before = tracking.listener_calls();
        tracking.convert(0, pages.len() as u64 * GRANULE, true);
        (tracking.listener_calls() - before) as f64
    }
    let rounds = (0..ROUNDS).map(|round| {
        let pages: Vec<bool> = random()
            .skip(512 * round)
            .take(512)
            .map(|x| x & 64 != 0)
            .collect();
        let runs = pages.chunk_by(|a, b| a == b).filter(|run| run[0]).count();
        let calls_by_runs = |calls: f64| calls / runs as f64;
        (
            calls_by_runs(calls::<Ours>(&pages)),
            calls_by_runs(calls::<Qemu>(&pages)),
        )
    });
    Figure::of("listener calls by runs", 1, rounds.collect())
}

/// Of 1 TiB one in a thousand bytes, as (first page, pages).
fn clusters() -> Vec<(u64, u64)> {
    let place = |(n, random): (u64, u64)| (n * (4 << 20) + random % (3 << 20), 4096);
    (0..64).zip(random()).map(place).collect()
}

fn scattered() -> Vec<(u64, u64)> {
    let pages: BTreeSet<u64> = random().map(|x| x % (1 << 28)).take(1 << 18).collect();
    pages.into_iter().map(|page| (page, 1)).collect()
}

/// Nanoseconds to find all that is shared of 1 TiB.
fn extents(name: &str, shared: Vec<(u64, u64)>) -> Figure {
    let size = 1024 * GIB;
    let (ours, qemu) = (Ours::new(size), Qemu::new(size));
    // From the end, where QEMU does not search far for what comes next.
    for (page, pages) in shared.iter().rev() {
        ours.convert(page * GRANULE, pages * GRANULE, false);
        qemu.convert(page * GRANULE, pages * GRANULE, false);
    }
    assert_eq!(ours.shared_extents(), qemu.shared_extents());
    let round = |_| {
        let of = |tracking: &dyn Fn() -> Extents| time(|| assert_ne!(tracking().number, 0));
        (of(&|| ours.shared_extents()), of(&|| qemu.shared_extents()))
    };
    Figure::of(name, 1024, (0..ROUNDS).map(round).collect())
}

/// How much more two threads get done than one, each in its half of the guest:
/// by their CPU time, as others may use the CPUs, too. None of them sleeps.
fn two_threads() -> Figure {
    let ours = Ours::new(64 * GIB);
    let work = |half: u64| {
        time(|| {
            for page in pool().cycle().take(100_000) {
                let page = page + half * 32 * GIB;
                ours.convert(page, GRANULE, false);
                ours.convert(page, GRANULE, true);
            }
        })
    };
    let both = || {
        thread::scope(|scope| {
            let halves = [0, 1].map(|half| scope.spawn(move || work(half)));
            halves.map(|half| half.join().expect("a thread that ends"))
        })
    };
    let gain = |_| 2.0 * work(0) / mean(both());
    Figure::of_ours("two threads by one", 64, (0..ROUNDS).map(gain).collect())
}

/// KiB of this process for each GiB of a guest of which every page has changed
/// side.
fn metadata() -> Figure {
    let gib = 1024;
    let before = resident();
    let ours = Ours::new(gib * GIB);
    ours.convert(0, gib * GIB, false);
    let taken = resident() - before;
    Figure::of_ours("metadata, KiB by GiB", gib, vec![taken / gib as f64])
}

fn resident() -> f64 {
    let status = fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.and_then(|kib| kib.parse().ok()).expect("VmRSS")
}

/// Milliseconds until a region of 16 TiB is there, memfd and all.
fn creation() -> Figure {
    let gib = 16384;
    let round = |_| {
        let start = Instant::now();
        drop(Ours::new(gib * GIB));
        start.elapsed().as_secs_f64() * 1e3
    };
    Figure::of_ours("creation, ms", gib, (0..ROUNDS).map(round).collect())
}
