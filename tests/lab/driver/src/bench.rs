//! What a conversion costs, on three ways to answer the same guest's request, in one run and in
//! turns: `memory-backend-private` (ours), QEMU's own private memory (qemu), and the ioctls alone
//! (bare). Says what was measured; `cargo xtask bench` judges.

use std::arch::x86_64::_rdtsc;
use std::collections::HashMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::{Value, json};

use crate::bare::Bare;
use crate::machine::{Launch, Machine, PAGE, counts_in};
use crate::scenarios::{Scenario, same};
use crate::tracing::{self, Conversion, Tracing};
use crate::{Lab, report};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const SMALL: u64 = 256 * MIB;
const SIZES: &[u64] = &[SMALL, 4 * GIB, 64 * GIB, 512 * GIB];
const ROUNDS: u32 = 15;
const TRACED_ROUNDS: u32 = 6;

/// What the guest is asked for: at so many places, so many pages to private and back.
#[derive(Clone, Copy, Serialize)]
struct Work {
    places: u64,
    pages: u64,
    /// Places are spread over all memory, or lie one after another where it begins.
    spread: bool,
    /// Pages are written on both sides, and so are there to be freed.
    touch: bool,
}

const WORKS: &[Work] = &[
    Work::new(50, 1),
    Work::new(50, 1).spread(),
    Work::new(50, 1).spread().touched(),
];

/// One page, 2 MiB.
const TRACED: &[Work] = &[
    Work::new(50, 1),
    Work::new(50, 1).touched(),
    Work::new(3, 512).touched(),
];

impl Work {
    const fn new(places: u64, pages: u64) -> Work {
        Work {
            places,
            pages,
            spread: false,
            touch: false,
        }
    }

    const fn spread(self) -> Work {
        Work {
            spread: true,
            ..self
        }
    }

    const fn touched(self) -> Work {
        Work {
            touch: true,
            ..self
        }
    }

    /// For our guest in a machine with so much RAM: memory ends beyond the hole below 4 GiB, and
    /// the guest maps 512 GiB.
    fn command(&self, ram: u64) -> String {
        let (first, end) = match ram >= 4 * GIB {
            true => (4 * GIB, (ram + 2 * GIB).min(512 * GIB)),
            false => (32 * MIB, ram),
        };
        let stride = match self.spread {
            true => (end - first) / self.places / PAGE * PAGE,
            false => self.pages * PAGE,
        };
        let touch = if self.touch { " touch" } else { "" };
        let (places, pages) = (self.places, self.pages);
        format!("pingpong {first:#x} {stride:#x} {places} {pages}{touch}")
    }
}

/// Who tells what is going on: nobody, the kernel, or QEMU as well.
#[derive(Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Trace {
    Off,
    Kernel,
    Qemu,
}

pub fn all() -> Vec<Scenario> {
    vec![Scenario::new("bench-machines", machines)]
}

pub fn run(lab: &Lab) -> Result<()> {
    let between_calls = tracing::between_calls()?;
    tell(json!({"kernel": lab.kernel, "qemu": lab.line, "tsc_hz": tsc_hz()}));
    steps(lab, between_calls)?;
    SIZES.iter().try_for_each(|&ram| size(lab, ram))
}

/// In machines of this size, what the guest sees.
fn size(lab: &Lab, ram: u64) -> Result<()> {
    let mut all = [
        Vmm::ours(lab, ram)?,
        Vmm::qemu(lab, ram)?,
        Vmm::bare(ram, false)?,
    ];
    // The first round takes what is taken once.
    for round in 0..=ROUNDS {
        for work in WORKS {
            for vmm in &mut all {
                let sample = vmm.sample(ram, work, Trace::Off)?;
                if round > 0 {
                    tell(json!({"sample": sample}));
                }
            }
        }
    }
    Ok(())
}

/// Of what a conversion consists.
fn steps(lab: &Lab, between_calls: u64) -> Result<()> {
    let mut all = [
        Vmm::ours(lab, SMALL)?,
        Vmm::with_listener(lab, SMALL)?,
        Vmm::prefaulting(lab, SMALL)?,
        Vmm::qemu(lab, SMALL)?,
        Vmm::bare(SMALL, false)?,
        Vmm::bare(SMALL, true)?,
    ];
    for round in 0..=TRACED_ROUNDS {
        for work in TRACED {
            for vmm in &mut all {
                let untraced = vmm.sample(SMALL, work, Trace::Off)?;
                let kernel = vmm.trace(work, Trace::Kernel, between_calls)?;
                let qemu = match vmm.kind {
                    Kind::Qemu(_) => vmm.trace(work, Trace::Qemu, between_calls)?,
                    Kind::Bare(_) => Vec::new(),
                };
                if round > 0 {
                    tell(json!({"sample": untraced}));
                    kernel.into_iter().chain(qemu).for_each(tell);
                }
            }
        }
    }
    Ok(())
}

/// Each machine does what it is asked, and the trace shows all of it.
fn machines(lab: &Lab) -> Result<()> {
    let work = Work::new(4, 8).touched();
    for mut vmm in [
        Vmm::with_listener(lab, SMALL)?,
        Vmm::qemu(lab, SMALL)?,
        Vmm::bare(SMALL, true)?,
    ] {
        for trace in [Trace::Kernel, Trace::Qemu] {
            let told = vmm.trace(&work, trace, 0)?;
            same("what is told of a trace", told.len(), 3)?;
        }
    }
    Ok(())
}

fn tell(bench: Value) {
    report(json!({"bench": bench}));
}

/// Cycles of the guest's clock in a second: it is the host's.
pub fn tsc_hz() -> f64 {
    // SAFETY: every x86-64 CPU has this instruction.
    let now = || (unsafe { _rdtsc() }, Instant::now());
    let start = now();
    thread::sleep(Duration::from_millis(500));
    let end = now();
    (end.0 - start.0) as f64 / (end.1 - start.1).as_secs_f64()
}

/// Of each step, in all conversions together.
fn medians<'a>(conversions: impl Iterator<Item = &'a Conversion>) -> Conversion {
    let mut steps: HashMap<_, Vec<u64>> = HashMap::new();
    for (step, cycles) in conversions.flatten() {
        steps.entry(*step).or_default().push(*cycles);
    }
    let median = |mut cycles: Vec<u64>| {
        cycles.sort_unstable();
        cycles[cycles.len() / 2]
    };
    let steps = steps.into_iter();
    steps.map(|(step, cycles)| (step, median(cycles))).collect()
}

/// A machine with our guest, which stands still but for when it is asked.
struct Vmm {
    name: &'static str,
    kind: Kind,
}

enum Kind {
    Qemu(Box<Machine>),
    Bare(Bare),
}

impl Vmm {
    fn ours(lab: &Lab, ram: u64) -> Result<Vmm> {
        Vmm::start(lab, "ours", ram, "", "private", "")
    }

    /// Whose listener does next to nothing.
    fn with_listener(lab: &Lab, ram: u64) -> Result<Vmm> {
        let listener = "-device private-memory-testdev,id=l,memdev=ram0";
        Vmm::start(lab, "listener", ram, "", "private", listener)
    }

    fn prefaulting(lab: &Lab, ram: u64) -> Result<Vmm> {
        Vmm::start(lab, "prefault", ram, "", "private,prefault=on", "")
    }

    fn qemu(lab: &Lab, ram: u64) -> Result<Vmm> {
        Vmm::start(lab, "qemu", ram, ",x-require-guest-memfd=on", "memfd", "")
    }

    fn bare(ram: u64, prefault: bool) -> Result<Vmm> {
        let kind = Kind::Bare(Bare::start(ram, prefault)?);
        let name = if prefault { "bare, prefault" } else { "bare" };
        Ok(Vmm { name, kind })
    }

    fn start(
        lab: &Lab,
        name: &'static str,
        ram: u64,
        guest: &str,
        backend: &str,
        more: &str,
    ) -> Result<Vmm> {
        let mib = ram / MIB;
        let mut machine = Launch::kvm(lab)
            .with(&format!(
                "-smp 1 -m {mib}M -object sw-protected-guest,id=cgs0{guest} \
                 -object memory-backend-{backend},id=ram0,size={mib}M \
                 -blockdev driver=file,node-name=rom,filename=/guest/guest.bin,read-only=on \
                 -machine q35,smm=off,confidential-guest-support=cgs0,memory-backend=ram0,pflash0=rom \
                 -D /tmp/bench.log {more}"
            ))
            .start_guest()?;
        machine.qmp.call("stop", json!({}))?;
        let kind = Kind::Qemu(Box::new(machine));
        Ok(Vmm { name, kind })
    }

    /// Has the guest do it; gives what it counted, and the cycles that it took.
    fn sample(&mut self, ram: u64, work: &Work, trace: Trace) -> Result<Value> {
        let command = work.command(ram);
        let counts = match &mut self.kind {
            Kind::Bare(bare) => counts_in(&bare.ask(&command)?),
            Kind::Qemu(machine) => {
                let events =
                    json!({"name": "private_memory_convert*", "enable": trace == Trace::Qemu});
                machine.qmp.call("trace-event-set-state", events)?;
                machine.qmp.call("cont", json!({}))?;
                let counts = machine.ask_counts(&command)?;
                machine.qmp.call("stop", json!({}))?;
                counts
            }
        };
        let done = counts.get("conversions").copied();
        same(&command, done, Some(2 * work.places))?;
        Ok(self.figures(ram, work, trace, &counts))
    }

    fn figures(&self, ram: u64, work: &Work, trace: Trace, cycles: impl Serialize) -> Value {
        json!({"vmm": self.name, "ram": ram, "work": work, "trace": trace, "cycles": cycles})
    }

    /// The same under a trace, in a small machine; then for each direction the cycles by what they
    /// were spent on.
    fn trace(&mut self, work: &Work, trace: Trace, between_calls: u64) -> Result<Vec<Value>> {
        let tracing = Tracing::of(self.vcpu_thread()?)?;
        let sample = self.sample(SMALL, work, trace)?;
        let conversions = tracing.end(between_calls)?;
        let seen = conversions.len() as u64;
        ensure!(
            seen == 2 * work.places,
            "the trace of {} shows {seen} conversions",
            self.name
        );
        let mut told = vec![json!({"sample": sample})];
        for (to, first) in [("private", 0), ("shared", 1)] {
            let one_way = conversions.iter().skip(first).step_by(2);
            let mut figures = self.figures(SMALL, work, trace, medians(one_way));
            figures["to"] = to.into();
            told.push(json!({"steps": figures}));
        }
        Ok(told)
    }

    fn vcpu_thread(&mut self) -> Result<u64> {
        let Kind::Qemu(machine) = &mut self.kind else {
            return Ok(nix::unistd::gettid().as_raw() as u64);
        };
        let cpus = machine.qmp.call("query-cpus-fast", json!({}))?;
        cpus[0]["thread-id"].as_u64().context("no thread of a vCPU")
    }
}
