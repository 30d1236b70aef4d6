//! A hostile guest: two vCPUs send requests of all kinds, made in `tests/hostile/requests.h`, while
//! the host plugs a DIMM that the guest ejects when it likes, asks the monitor all there is to ask,
//! and resets the machine. QEMU must live, answer as it has to, and hold no more than before.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;

use crate::machine::{Extent, Launch, Machine, OUR_GUEST, PAGE, PRIVATE, Side, joined};
use crate::qmp::DEADLINE;
use crate::scenarios::{
    BASE, DIMM, RAM, Scenario, fds_come_back, few_lines, object_add, reset, same, same_extents,
    same_held,
};
use crate::{Lab, bench, host, report};

/// Of the scenario.
const REQUESTS: u64 = 20_000;
/// They come in so many parts, or more: each must end before the machine's deadline.
const PARTS: u64 = 4;
const LARGEST_PART: u64 = 25_000;
/// How often the host does something in each part.
const DISTURBANCES: u64 = 3;
const PAUSE: Duration = Duration::from_millis(100);
/// How often the machine is reset at first, and what each vCPU asks for until then.
const RESETS: u64 = 3;
const UNTIL_RESET: u64 = 1_000_000;
/// What both attack, and what they keep for themselves before that.
const PAGES: u64 = 32;
const OWN: u64 = 201;
const OWN_BASE: u64 = BASE - OWN * PAGE;
const DIMM_BASE: u64 = 4 << 30;
/// By how much QEMU's own memory may differ from one moment to another. Had each of 500,000 requests
/// lost the least that malloc() gives, 32 bytes, it would be twice that.
const HEAP: u64 = 8 << 20;
/// What a request may be refused for, as the manual has it.
const REASONS: &[&str] = &[
    "cannot be private: it is MMIO, ROM, ordinary RAM or nothing at all",
    "ends beyond the 64-bit address space",
];

pub fn all() -> Vec<Scenario> {
    vec![Scenario::new("hostile-guest", |lab| {
        run(lab, 1, REQUESTS).map(drop)
    })]
}

/// A round of `cargo xtask soak`, as the kernel command line has it: SEED:REQUESTS.
pub fn soak(lab: &Lab, round: &str) -> Result<()> {
    ensure!(
        lab.kvm.has_private_memory(),
        "this KVM has no software-protected VMs: {}",
        lab.kvm
    );
    let (seed, requests) = round.split_once(':').context("lab.soak=SEED:REQUESTS")?;
    let answers = run(lab, seed.parse()?, requests.parse()?)?;
    report(json!({"soak": answers}));
    Ok(())
}

/// What came of an attack.
#[derive(Default, Serialize)]
struct Answers {
    accepted: u64,
    refused: u64,
    /// How often the DIMM was plugged meanwhile.
    plugged: u64,
    /// How long the longest request took; where the host is busy, its other work included.
    longest_ms: u64,
}

fn run(lab: &Lab, seed: u64, requests: u64) -> Result<Answers> {
    let start = Instant::now();
    let mut machine = Launch::kvm(lab)
        .with(&PRIVATE.replace("-m 256M", "-m 256M,slots=2,maxmem=1G"))
        .with("-action reboot=reset")
        .with(OUR_GUEST)
        .start_guest()?;
    for _ in 0..RESETS {
        begin(&mut machine, seed)?;
        interrupt(&mut machine)?;
        reset(&mut machine)?;
    }
    take_dimm_away(&mut machine)?;
    begin(&mut machine, seed)?;
    calm(&mut machine)?;
    begin(&mut machine, seed)?;
    let before = Possessions::of(&mut machine)?;

    let answers = attack(&mut machine, requests).with_context(|| format!("seed {seed}"))?;
    take_dimm_away(&mut machine)?;
    calm(&mut machine)?;
    begin(&mut machine, seed)?;
    before.are_the_same(&mut machine)?;
    // No kind of request fills the log.
    few_lines(&machine.finish_with_log()?, "", start)?;
    println!(
        "  seed {seed}: {} requests accepted, {} refused, the DIMM plugged {} times, the longest \
         request {} ms",
        answers.accepted, answers.refused, answers.plugged, answers.longest_ms
    );
    Ok(answers)
}

/// What QEMU has of its host.
struct Possessions {
    fds: Vec<u64>,
    mappings: usize,
    shared_held: Option<u64>,
    heap: u64,
}

impl Possessions {
    fn of(machine: &mut Machine) -> Result<Possessions> {
        let pid = machine.pid();
        let info = machine.region("ram0")?;
        same_held(&info, 0)?;
        Ok(Possessions {
            fds: host::fds_of(pid)?,
            mappings: host::store_mappings_of(pid)?,
            shared_held: info.shared_held,
            heap: host::status_bytes(pid, "RssAnon")?,
        })
    }

    fn are_the_same(&self, machine: &mut Machine) -> Result<()> {
        fds_come_back(machine, &self.fds)?;
        let now = Possessions::of(machine)?;
        same("mappings of stores", now.mappings, self.mappings)?;
        same("shared-held", now.shared_held, self.shared_held)?;
        ensure!(
            now.heap <= self.heap + HEAP,
            "QEMU's own memory grew from {} to {} KiB",
            self.heap >> 10,
            now.heap >> 10
        );
        println!(
            "  QEMU's own memory: {} KiB before, {} KiB after",
            self.heap >> 10,
            now.heap >> 10
        );
        Ok(())
    }
}

fn begin(machine: &mut Machine, seed: u64) -> Result<()> {
    same("smp", machine.ask("smp")?.as_str(), "cpus 2")?;
    machine.ask_ok(&format!(
        "hostile {BASE:#x} {PAGES} {OWN} {seed} {RAM:#x} {DIMM_BASE:#x} {}",
        DIMM / PAGE
    ))
}

/// Comes to the midst of an attack, for which there is no reply.
fn interrupt(machine: &mut Machine) -> Result<()> {
    let before = machine.region("ram0")?.conversions;
    machine.send(&format!("attack {UNTIL_RESET}"))?;
    let end = Instant::now() + DEADLINE;
    while machine.region("ram0")?.conversions < before + 100 {
        disturb(machine)?;
        ensure!(Instant::now() < end, "the guest does not convert");
    }
    Ok(())
}

fn attack(machine: &mut Machine, requests: u64) -> Result<Answers> {
    let mut answers = Answers::default();
    let (mut sent, mut longest) = (0, 0);
    // By each of the two.
    let count = LARGEST_PART.min(requests.div_ceil(PARTS)).div_ceil(2);
    while sent < requests {
        let command = format!("attack {count}");
        machine.send(&command)?;
        for _ in 0..DISTURBANCES {
            answers.plugged += u64::from(disturb(machine)?);
            thread::sleep(PAUSE);
        }
        sent += 2 * count;
        let counts = machine.counts(&command)?;
        for wrong in ["failed", "errors", "wrong"] {
            same(wrong, counts[wrong], 0)?;
        }
        answers.accepted = counts["conversions"] + counts["granted"];
        answers.refused = counts["refused"];
        longest = counts["longest"];
        same("requests", answers.accepted + answers.refused, sent)?;
        check_reasons(machine)?;
    }
    answers.longest_ms = (longest as f64 / bench::tsc_hz() * 1e3) as u64;
    ensure!(
        answers.accepted > 0 && answers.refused > 0,
        "{} requests accepted, {} refused",
        answers.accepted,
        answers.refused
    );
    // Once more than at first: the guest has ejected it.
    ensure!(
        answers.plugged > 1,
        "the DIMM was plugged {} times",
        answers.plugged
    );
    Ok(answers)
}

/// What the monitor tells of the last refusals.
fn check_reasons(machine: &mut Machine) -> Result<()> {
    let errors = machine.failed_conversions()?;
    ensure!(!errors.is_empty(), "the monitor tells of no refusal");
    for error in errors {
        ensure!(
            REASONS.iter().any(|reason| error.contains(reason)),
            "not a documented reason to refuse: {error}"
        );
    }
    Ok(())
}

/// All that an operator does and asks in a moment; whether that was to plug the DIMM.
fn disturb(machine: &mut Machine) -> Result<bool> {
    let plugs = dimm_is_away(machine)?;
    if plugs {
        delete_object(machine)?;
        plug(machine)?;
    }
    machine.extents("ram0")?;
    machine.private_memory()?;
    machine.hmp("info private-memory")?;
    machine.hmp("info stats vm")?;
    machine.qmp.call("query-stats", json!({"target": "vm"}))?;
    // Which side it is on is the guest's affair.
    let _ = machine.pmemsave(BASE, PAGES * PAGE)?;
    // The guest ejects it when it likes; if it has, there is nothing to ask for.
    let _ = machine.qmp.execute("device_del", &json!({"id": "dimm1"}))?;
    Ok(plugs)
}

fn dimm_is_away(machine: &mut Machine) -> Result<bool> {
    let dimms = machine.qmp.call("query-memory-devices", json!({}))?;
    Ok(dimms.as_array().is_none_or(Vec::is_empty))
}

fn plug(machine: &mut Machine) -> Result<()> {
    machine.qmp.call("object-add", object_add("ram1", DIMM))?;
    let device = json!({"driver": "pc-dimm", "id": "dimm1", "memdev": "ram1", "addr": DIMM_BASE});
    machine.qmp.call("device_add", device)?;
    Ok(())
}

/// The DIMM's object, if there is one.
fn delete_object(machine: &mut Machine) -> Result<()> {
    if machine.region("ram1").is_ok() {
        machine.qmp.call("object-del", json!({"id": "ram1"}))?;
    }
    Ok(())
}

fn take_dimm_away(machine: &mut Machine) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    while !dimm_is_away(machine)? {
        machine.ask_ok("eject 0")?;
        thread::sleep(Duration::from_millis(10));
        ensure!(Instant::now() < end, "the DIMM does not go away");
    }
    delete_object(machine)
}

/// What the guest takes for private of its own pages is what QEMU says, and nothing is held twice;
/// when all is shared again, nothing private is held.
fn calm(machine: &mut Machine) -> Result<()> {
    let counts = machine.ask_counts("calm")?;
    for wrong in ["failed", "errors"] {
        same(wrong, counts[wrong], 0)?;
    }
    let mut expected = vec![Extent::all_shared(OWN_BASE)];
    expected.extend(machine.guest_map(OWN_BASE)?);
    expected.push(Extent {
        offset: BASE,
        size: RAM - BASE,
        private: false,
    });
    same_extents(&machine.extents("ram0")?, &joined(expected))?;
    let info = machine.region("ram0")?;
    same("private", info.private, counts["private_pages"] * PAGE)?;
    same_held(&info, counts["private_touched"] * PAGE)?;
    machine.convert(OWN_BASE, OWN, Side::Shared)?;
    same_held(&machine.region("ram0")?, 0)
}
