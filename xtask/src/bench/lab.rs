//! The bench in the lab: the same guest on `memory-backend-private`, on QEMU's own private memory and
//! on the ioctls alone, in one run. The CPU may be emulated: only ratios mean anything.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Bar;
use crate::Context;
use crate::qemu::Line;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const OURS: &str = "ours";
const QEMU: &str = "qemu";
const BARE: &str = "bare";
const LISTENER: &str = "listener";
const PREFAULT: &str = "prefault";
const BARE_PREFAULT: &str = "bare, prefault";
const SIDES: [&str; 2] = ["private", "shared"];
/// The first QEMU that keeps account of what is private, in ram-block-attributes.c.
const COMPARED_WITH: &str = "10.2";

/// All that the lab has measured, in the order of time.
#[derive(Serialize)]
pub struct Figures {
    kernel: String,
    qemu: String,
    /// Cycles in a second.
    tsc_hz: f64,
    samples: Vec<Sample>,
    steps: Vec<Steps>,
}

/// One round on one machine: cycles, medians of all places.
#[derive(Deserialize, Serialize)]
struct Sample {
    vmm: String,
    ram: u64,
    work: Work,
    trace: Trace,
    cycles: Cycles,
}

#[derive(Deserialize, Serialize)]
struct Cycles {
    to_private: u64,
    to_shared: u64,
    touch_private: u64,
    touch_shared: u64,
}

/// What the conversions of one round consist of.
#[derive(Deserialize, Serialize)]
struct Steps {
    vmm: String,
    work: Work,
    trace: Trace,
    /// The side that they lead to.
    to: String,
    cycles: BTreeMap<String, u64>,
}

/// So many pages at so many places, to private and back.
#[derive(Clone, Copy, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
struct Work {
    pages: u64,
    places: u64,
    spread: bool,
    touch: bool,
}

impl Work {
    fn use_of_pages(self) -> &'static str {
        if self.touch { "written" } else { "unused" }
    }
}

/// Work in a machine with so much RAM.
#[derive(Clone, Copy, Eq, Ord, PartialEq, PartialOrd)]
struct At {
    ram: u64,
    work: Work,
}

impl Sample {
    fn at(&self) -> At {
        let (ram, work) = (self.ram, self.work);
        At { ram, work }
    }
}

impl Steps {
    /// But for what is told apart by the table.
    fn names(&self) -> impl Iterator<Item = &str> {
        let names = self.cycles.keys().map(String::as_str);
        names.filter(|name| !["library", "log", "qemu"].contains(name))
    }
}

/// Who traced: nobody, the kernel, or QEMU as well.
#[derive(Clone, Copy, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Trace {
    Off,
    Kernel,
    Qemu,
}

pub fn run(cx: &Context, line: Option<Line>, limit: Duration) -> Result<Figures> {
    Figures::new(super::told_by_lab(cx, line, limit, "lab.bench")?)
}

/// Median and quartiles.
pub struct Spread([f64; 3]);

impl Spread {
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let at = |quarters: usize| {
            let last = values.len().saturating_sub(1);
            values.get(last * quarters / 4).copied().unwrap_or(f64::NAN)
        };
        Self([at(1), at(2), at(3)])
    }

    pub fn median(&self) -> f64 {
        self.0[1]
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let [low, median, high] = self.0;
        f.pad(&format!("{median:.2} ({low:.2} to {high:.2})"))
    }
}

/// Something of a round, in cycles.
type Part = fn(&Cycles) -> f64;

impl Cycles {
    /// To private, with what the guest does there.
    fn there(&self) -> f64 {
        (self.to_private + self.touch_private) as f64
    }

    fn back(&self) -> f64 {
        (self.to_shared + self.touch_shared) as f64
    }

    fn total(&self) -> f64 {
        self.there() + self.back()
    }

    /// For the conversions alone.
    fn waited(&self) -> f64 {
        (self.to_private + self.to_shared) as f64
    }
}

impl Figures {
    fn new(said: Vec<Value>) -> Result<Self> {
        let mut about = serde_json::Map::new();
        let (mut samples, mut steps) = (Vec::new(), Vec::new());
        for value in said {
            let Value::Object(mut object) = value else {
                bail!("the lab said {value}");
            };
            if let Some(sample) = object.remove("sample") {
                samples.push(serde_json::from_value(sample)?);
            } else if let Some(of) = object.remove("steps") {
                steps.push(serde_json::from_value(of)?);
            } else {
                about.append(&mut object);
            }
        }
        let text = |key: &str| about.get(key).and_then(Value::as_str).map(str::to_owned);
        let missing = || anyhow!("the lab did not say what it measured on");
        Ok(Self {
            kernel: text("kernel").ok_or_else(missing)?,
            qemu: text("qemu").ok_or_else(missing)?,
            tsc_hz: about
                .get("tsc_hz")
                .and_then(Value::as_f64)
                .ok_or_else(missing)?,
            samples,
            steps,
        })
    }

    /// What `of` a machine's rounds took, in the order of time.
    fn rounds(&self, vmm: &str, at: At, trace: Trace, of: Part) -> Vec<f64> {
        let wanted =
            |sample: &&Sample| (&*sample.vmm, sample.at(), sample.trace) == (vmm, at, trace);
        let rounds = self.samples.iter().filter(wanted);
        rounds.map(|sample| of(&sample.cycles)).collect()
    }

    /// How many times as long as the second machine the first one takes, round by round.
    fn ratio(&self, first: &str, second: &str, at: At, of: Part) -> Spread {
        let [first, second] = [first, second].map(|vmm| self.rounds(vmm, at, Trace::Off, of));
        Spread::of(
            first
                .iter()
                .zip(second)
                .map(|(first, second)| first / second),
        )
    }

    /// Cycles to private and back.
    fn time(&self, vmm: &str, at: At) -> f64 {
        Spread::of(self.rounds(vmm, at, Trace::Off, Cycles::total)).median()
    }

    /// Conversions in a second.
    fn rate(&self, vmm: &str, at: At) -> f64 {
        2.0 * self.tsc_hz / self.time(vmm, at)
    }

    fn micros(&self, cycles: f64) -> f64 {
        cycles / self.tsc_hz * 1e6
    }

    /// Where a machine was measured.
    fn places(&self, vmm: &str) -> BTreeSet<At> {
        let of = self.samples.iter().filter(|sample| sample.vmm == vmm);
        of.map(Sample::at).collect()
    }

    /// One unused page at a time, anywhere in a region of this size.
    fn anywhere(&self, ram: u64) -> Option<At> {
        let wanted = |at: &At| {
            (at.ram, at.work.pages, at.work.spread, at.work.touch) == (ram, 1, true, false)
        };
        self.places(OURS).into_iter().find(wanted)
    }

    /// One step of a machine, with the median of all rounds.
    fn step(&self, vmm: &str, work: Work, trace: Trace, to: &str, step: &str) -> f64 {
        let of = self.steps.iter().filter(|steps| {
            (&*steps.vmm, steps.work, steps.trace, &*steps.to) == (vmm, work, trace, to)
        });
        let cycles = of.map(|steps| steps.cycles.get(step).copied().unwrap_or(0) as f64);
        Spread::of(cycles).median()
    }

    /// What of QEMU's time is the library's. QEMU's events, at both ends of it, cost about as much
    /// within as without; how much is what they add to all of it.
    fn library(&self, vmm: &str, work: Work, to: &str) -> f64 {
        let step = |trace, step| self.step(vmm, work, trace, to, step);
        let library = step(Trace::Qemu, "library");
        let events = library + step(Trace::Qemu, "qemu") - step(Trace::Kernel, "qemu");
        library - events / 2.0
    }

    /// The library's part of what the guest waits for.
    fn library_share(&self, at: At) -> f64 {
        let library = SIDES.iter().map(|to| self.library(OURS, at.work, to));
        library.sum::<f64>() / self.waited(OURS, at)
    }

    /// Cycles of both conversions alone.
    fn waited(&self, vmm: &str, at: At) -> f64 {
        Spread::of(self.rounds(vmm, at, Trace::Off, Cycles::waited)).median()
    }

    pub fn bars(&self) -> Vec<Bar> {
        let mut bars = Vec::new();
        let [small, with_1g, large, huge] = [256 * MIB, 4 * GIB, 64 * GIB, 512 * GIB];
        let mut rate = |ram, other: &str, least| {
            if let Some(at) = self.anywhere(ram) {
                let name = format!("conversions/s in {}: ours to {other}", size(ram));
                bars.push(Bar::at_least(
                    name,
                    self.ratio(other, OURS, at, Cycles::total).median(),
                    least,
                ));
            }
        };
        // Older ones keep no account of what is private, so that its cost cannot grow.
        if self.qemu == COMPARED_WITH {
            rate(small, QEMU, 1.0);
            rate(large, QEMU, 1.3);
            rate(huge, QEMU, 5.0);
        }
        rate(small, BARE, 0.9);
        // KVM itself takes longer in a large slot, whoever asks: its pages of 1 GiB are accounts, too.
        for less in [small, with_1g] {
            if let (Some(less), Some(most)) = (self.anywhere(less), self.anywhere(huge)) {
                let name = format!(
                    "time in {} to {}: ours to bare",
                    size(most.ram),
                    size(less.ram)
                );
                let growth = |vmm| self.time(vmm, most) / self.time(vmm, less);
                bars.push(Bar::at_most(name, growth(OURS) / growth(BARE), 1.1));
            }
        }
        if let Some(at) = self.traced() {
            bars.push(Bar::at_most(
                "the library's share",
                self.library_share(at),
                0.05,
            ));
        }
        bars
    }

    /// The smallest work that was traced.
    fn traced(&self) -> Option<At> {
        let works = self.steps.iter().map(|steps| steps.work);
        let ram = 256 * MIB;
        works.min().map(|work| At { ram, work })
    }

    pub fn table(&self) -> String {
        let Self { kernel, qemu, .. } = self;
        let works: BTreeSet<Work> = self.steps.iter().map(|steps| steps.work).collect();
        let steps: Vec<_> = works.iter().map(|work| self.steps_table(*work)).collect();
        let (sizes, steps, others) = (self.sizes_table(), steps.concat(), self.others());
        format!(
            "kernel {kernel}, QEMU {qemu}; where the CPU is emulated only ratios mean anything\n{sizes}{steps}{others}"
        )
    }

    fn sizes_table(&self) -> String {
        let mut out = format!(
            "\none page to private and back: conversions/s, and ours to others (quartiles)\n\
             {:>8} {:>7} {:>8} {:>6} {:>6} {:>6} {:>23} {:>23}\n",
            "region", "places", "pages", OURS, QEMU, BARE, "ours : qemu", "ours : bare"
        );
        for at in self
            .places(QEMU)
            .into_iter()
            .filter(|at| at.work.pages == 1)
        {
            let [ours, qemu, bare] = [OURS, QEMU, BARE].map(|vmm| self.rate(vmm, at));
            out += &format!(
                "{:>8} {:>7} {:>8} {ours:>6.0} {qemu:>6.0} {bare:>6.0} {:>23} {:>23}\n",
                size(at.ram),
                if at.work.spread { "all" } else { "first" },
                at.work.use_of_pages(),
                self.ratio(QEMU, OURS, at, Cycles::total),
                self.ratio(BARE, OURS, at, Cycles::total),
            );
        }
        out
    }

    fn steps_table(&self, work: Work) -> String {
        let traced = self.steps.iter().filter(|steps| steps.work == work);
        let names: BTreeSet<&str> = traced.flat_map(Steps::names).collect();
        let vmms = [OURS, QEMU, BARE];
        let columns = vmms
            .iter()
            .flat_map(|vmm| SIDES.iter().map(move |to| (*vmm, *to)));
        let line = |name: &str, cell: &dyn Fn(&str, &str) -> String| {
            let cells = columns
                .clone()
                .map(|(vmm, to)| format!(" {:>9}", cell(vmm, to)));
            format!("{name:>24}{}\n", cells.collect::<String>())
        };
        let row = |name: &str, cycles: &dyn Fn(&str, &str) -> f64| {
            line(name, &|vmm, to| {
                format!("{:.1}", self.micros(cycles(vmm, to)))
            })
        };
        let library = |vmm: &str, to: &str| match vmm {
            OURS => self.library(OURS, work, to),
            _ => 0.0,
        };
        let step = |name, vmm: &str, to: &str| self.step(vmm, work, Trace::Kernel, to, name);
        let mut out = format!(
            "\nwhere the time goes under a trace, us; {} page(s), {}\n",
            work.pages,
            work.use_of_pages()
        );
        out += &line("", &|vmm, _| vmm.to_owned());
        out += &line("", &|_, to| to.to_owned());
        out.extend(
            names
                .iter()
                .map(|name| row(name, &|vmm, to| step(name, vmm, to))),
        );
        out += &row("library", &library);
        out += &row("rest of the VMM", &|vmm, to| {
            step("qemu", vmm, to) - library(vmm, to)
        });
        out
    }

    fn others(&self) -> String {
        let mut out = String::from("\n");
        for at in self.places(LISTENER) {
            let (pages, used) = (at.work.pages, at.work.use_of_pages());
            let each = |of: &dyn Fn(&str) -> f64| SIDES.iter().map(|to| of(to)).sum::<f64>();
            let of_all = |cycles: f64| 100.0 * cycles / self.waited(OURS, at);
            let library = |vmm| each(&|to| self.library(vmm, at.work, to));
            let punch = "punch of the side left";
            let punch = each(&|to| self.step(OURS, at.work, Trace::Kernel, to, punch));
            out += &format!(
                "{pages} page(s), {used}: of a conversion without a trace the library takes {:.1} %, \
                 a listener that does nothing {:.1} % more; the punch of the side left {:.1} %\n",
                of_all(library(OURS)),
                of_all(library(LISTENER) - library(OURS)),
                of_all(punch)
            );
        }
        for at in self.places(PREFAULT) {
            let (pages, used) = (at.work.pages, at.work.use_of_pages());
            out += &format!(
                "{pages} page(s), {used}: ours is {} times as fast to private with prefault=on; bare {}, \
                 and {} to shared, with KVM_PRE_FAULT_MEMORY\n",
                self.ratio(OURS, PREFAULT, at, Cycles::there),
                self.ratio(BARE, BARE_PREFAULT, at, Cycles::there),
                self.ratio(BARE, BARE_PREFAULT, at, Cycles::back)
            );
        }
        if let Some(at) = self.traced() {
            let off = self.rounds(OURS, at, Trace::Off, Cycles::total);
            let cost = |trace| {
                let on = self.rounds(OURS, at, trace, Cycles::total);
                Spread::of(on.iter().zip(&off).map(|(on, off)| on / off))
            };
            out += &format!(
                "traced by the kernel a conversion takes {} times as long, by QEMU as well {}\n",
                cost(Trace::Kernel),
                cost(Trace::Qemu)
            );
        }
        out
    }
}

fn size(ram: u64) -> String {
    match ram < GIB {
        true => format!("{} MiB", ram / MIB),
        false => format!("{} GiB", ram / GIB),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Conversions on each VMM, in cycles; no writes.
    fn said(vmms: &[(&str, u64)]) -> Vec<Value> {
        let work = json!({"pages": 1, "places": 9, "spread": true, "touch": false});
        let sample = |vmm: &str, trace: &str, ram: u64, cycles: u64| {
            json!({"sample": {"vmm": vmm, "ram": ram, "work": work, "trace": trace, "cycles": {
                "to_private": cycles, "to_shared": cycles, "touch_private": 0, "touch_shared": 0,
            }}})
        };
        let steps = |trace: &str, to: &str, cycles: Value| json!({"steps": {"vmm": OURS, "work": work, "trace": trace, "to": to, "cycles": cycles}});
        let mut said = vec![json!({"kernel": "7.3", "qemu": COMPARED_WITH, "tsc_hz": 1000.0})];
        for ram in [256 * MIB, 64 * GIB, 512 * GIB] {
            said.extend(
                vmms.iter()
                    .map(|(vmm, cycles)| sample(vmm, "off", ram, *cycles)),
            );
        }
        for to in SIDES {
            said.push(steps("kernel", to, json!({"qemu": 10, "attributes": 5})));
            said.push(steps(
                "qemu",
                to,
                json!({"qemu": 8, "library": 6, "attributes": 5}),
            ));
        }
        said
    }

    #[test]
    fn figures_are_compared() -> Result<()> {
        let figures = Figures::new(said(&[(OURS, 100), (QEMU, 200), (BARE, 95)]))?;
        let bars = figures.bars();
        let bar = |name: &str| bars.iter().find(|bar| bar.name.contains(name));
        let value = |name| bar(name).map(|bar| (bar.value, bar.holds()));
        assert_eq!(value("256 MiB: ours to qemu"), Some((2.0, true)));
        assert_eq!(value("512 GiB: ours to qemu"), Some((2.0, false)));
        assert_eq!(value("256 MiB: ours to bare"), Some((0.95, true)));
        assert_eq!(value("512 GiB to 256 MiB: ours to bare"), Some((1.0, true)));
        // Events add 4, half of which the library does not take by itself.
        assert_eq!(value("library"), Some((0.04, true)));
        assert!(figures.table().contains("64 GiB     all   unused"));
        Ok(())
    }

    #[test]
    fn what_is_not_known_is_no_figure() {
        assert!(Figures::new(Vec::new()).is_err());
        let missed = Bar::at_least("speed", f64::NAN, 1.0);
        assert!(!missed.holds());
    }
}
