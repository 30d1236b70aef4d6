//! A hostile guest: two vCPUs send requests of all kinds, made in `tests/hostile/requests.h`, while
//! the host plugs a DIMM that the guest ejects when it likes, asks the monitor all there is to ask,
//! and resets the machine. QEMU must live, answer as it has to, and hold no more than before.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::machine::{Extent, Launch, Machine, OUR_GUEST, PAGE, PRIVATE, Side, joined};
use crate::qmp::DEADLINE;
use crate::scenarios::{
    BASE, RAM, Scenario, fds_come_back, object_add, reset, same, same_extents, same_held,
};
use crate::{Lab, host};

/// Of each run: in 10 parts, each of which must end before the machine's deadline.
const REQUESTS: u64 = 5_000;
const PARTS: u64 = 10;
/// How often the host does something in each of them.
const DISTURBANCES: u64 = 5;
/// What each vCPU asks for before and while the machine is reset.
const UNTIL_RESET: u64 = 1_000_000;
/// What both attack, and what they keep for themselves before that.
const PAGES: u64 = 1024;
const OWN: u64 = 601;
const OWN_BASE: u64 = BASE - OWN * PAGE;
const DIMM: u64 = 128 << 20;
const DIMM_BASE: u64 = 4 << 30;

pub fn all() -> Vec<Scenario> {
    vec![Scenario::new("hostile-guest", |lab| run(lab, 1, REQUESTS))]
}

#[derive(Default)]
struct Answers {
    granted: u64,
    refused: u64,
    /// How often the DIMM was plugged meanwhile.
    plugged: u64,
}

fn run(lab: &Lab, seed: u64, requests: u64) -> Result<()> {
    let mut machine = Launch::kvm(lab)
        .with(&PRIVATE.replace("-m 256M", "-m 256M,slots=2,maxmem=1G"))
        .with("-action reboot=reset")
        .with(OUR_GUEST)
        .start_guest()?;
    let fds = host::fds_of(machine.pid())?;
    let mappings = host::store_mappings_of(machine.pid())?;

    begin(&mut machine, seed)?;
    interrupt(&mut machine)?;
    reset(&mut machine)?;
    begin(&mut machine, seed)?;
    let answers = attack(&mut machine, requests).with_context(|| format!("seed {seed}"))?;
    take_dimm_away(&mut machine)?;
    calm(&mut machine)?;

    fds_come_back(&machine, &fds)?;
    same(
        "mappings of stores",
        host::store_mappings_of(machine.pid())?,
        mappings,
    )?;
    machine.finish()?;
    println!(
        "  seed {seed}: {} requests accepted, {} refused, the DIMM plugged {} times",
        answers.granted, answers.refused, answers.plugged
    );
    Ok(())
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
    let each = requests / PARTS / 2;
    for _ in 0..PARTS {
        let command = format!("attack {each}");
        machine.send(&command)?;
        for _ in 0..DISTURBANCES {
            answers.plugged += u64::from(disturb(machine)?);
        }
        let counts = machine.counts(&command)?;
        for wrong in ["failed", "errors", "wrong"] {
            same(wrong, counts[wrong], 0)?;
        }
        answers.granted = counts["conversions"] + counts["granted"];
        answers.refused = counts["refused"];
    }
    same(
        "requests",
        answers.granted + answers.refused,
        2 * each * PARTS,
    )?;
    Ok(answers)
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
