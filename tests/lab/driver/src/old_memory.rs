//! A device finds nothing in the guest's memory that the host had there before, and the guest finds
//! what the device writes, whichever way the memory was allocated. No CPU touches that memory first:
//! a CPU's access would have it cleared.

use anyhow::{Result, ensure};
use serde_json::json;

use crate::Lab;
use crate::assigned::{IOMMUFD, TYPE1, Way, copy, started};
use crate::host;
use crate::machine::{Machine, OUR_GUEST, PAGE, Side};
use crate::scenarios::{BASE, Scenario, same};
use Side::{Private, Shared};

const MIB: u64 = 1 << 20;
const RAM: u64 = 64 * MIB;
/// Pages of one kind, which the device reads and writes in turns.
const PAGES: u64 = 8;

pub fn all() -> Vec<Scenario> {
    let assigned = Scenario::assigned;
    vec![
        assigned("dma-old-memory-type1", |lab| kvm(lab, &TYPE1)),
        assigned("dma-old-memory-iommufd", |lab| kvm(lab, &IOMMUFD)),
        assigned("dma-old-memory-node-type1", |lab| node(lab, &TYPE1)),
        assigned("dma-old-memory-node-iommufd", |lab| node(lab, &IOMMUFD)),
        assigned("dma-old-memory-emulated-type1", |lab| emulated(lab, &TYPE1)),
        assigned("dma-old-memory-emulated-iommufd", |lab| {
            emulated(lab, &IOMMUFD)
        }),
    ]
}

/// What the guest has touched: the device copies from the first page, and to the second.
const SOURCE: u64 = BASE;
const TARGET: u64 = BASE + PAGE;

/// What was found that must not be, for each way of allocating.
#[derive(Default)]
struct Findings(Vec<String>);

impl Findings {
    /// The device reads zeroes from `PAGES` pages that no CPU has touched, and what it writes there
    /// stays.
    fn look(&mut self, machine: &mut Machine, how: &str, untouched: u64) -> Result<()> {
        machine.fill(SOURCE, 1, 7)?;
        for page in 0..PAGES {
            let addr = untouched + page * PAGE;
            let (what, check) = if page % 2 == 0 {
                machine.fill(TARGET, 1, 8)?;
                copy(machine, addr, TARGET)?;
                let check = format!("check {TARGET:#x} 1 zero");
                ("old memory of the host was read at", check)
            } else {
                copy(machine, SOURCE, addr)?;
                let check = format!("check {addr:#x} 1 7 {SOURCE:#x}");
                ("what the device wrote is lost at", check)
            };
            let found = machine.ask(&check)?;
            if found != "ok" {
                self.0.push(format!("{how}: {what} {addr:#x}: {found}"));
            }
        }
        Ok(())
    }

    fn verdict(self, machine: Machine) -> Result<()> {
        ensure!(self.0.is_empty(), "{}", self.0.join("\n"));
        machine.finish()
    }
}

/// Places in RAM that nothing else uses, one for each way of allocating.
fn place(number: u64) -> u64 {
    BASE + (number + 1) * MIB
}

/// Preallocation at the start, conversions, DIMMs and resets.
fn kvm(lab: &Lab, way: &Way) -> Result<()> {
    host::mark_free_memory(0)?;
    let launch = way.without_device(lab, RAM, ",prealloc=on", "q35");
    let mut machine = started(
        launch
            .with("-m slots=1,maxmem=256M -action reboot=reset")
            .with(&way.device()?)
            .with(OUR_GUEST),
    )?;
    let mut findings = Findings::default();
    findings.look(&mut machine, "at the start", place(0))?;

    machine.convert(place(1), PAGES, Private)?;
    host::mark_free_memory(0)?;
    machine.convert(place(1), PAGES, Shared)?;
    findings.look(&mut machine, "after a conversion", place(1))?;

    const DIMM: u64 = 16 * MIB;
    host::mark_free_memory(0)?;
    let backend = json!({"qom-type": "memory-backend-private", "id": "ram1", "size": DIMM,
                         "prealloc": true});
    machine.qmp.call("object-add", backend)?;
    let dimm = json!({"driver": "pc-dimm", "id": "dimm1", "memdev": "ram1"});
    machine.qmp.call("device_add", dimm)?;
    let slots = machine.region("ram1")?.slots;
    same("slots of the DIMM", slots.len(), 1)?;
    findings.look(&mut machine, "in a DIMM", slots[0].address)?;

    machine.convert(place(2), PAGES, Private)?;
    host::mark_free_memory(0)?;
    machine.reset()?;
    machine.ask_ok("assign")?;
    findings.look(&mut machine, "after a reset", place(2))?;
    findings.verdict(machine)
}

/// As the manual's recipe for a NUMA node has it.
fn node(lab: &Lab, way: &Way) -> Result<()> {
    const NODE: u32 = 1;
    host::mark_free_memory(NODE)?;
    let properties = format!(",prealloc=on,policy=bind,host-nodes={NODE}");
    let launch = way.launch(lab, RAM, &properties)?;
    let mut machine = started(launch.with(OUR_GUEST))?;
    let mut findings = Findings::default();
    findings.look(&mut machine, "on a node", place(0))?;
    machine.convert(place(1), PAGES, Private)?;
    host::mark_free_memory(NODE)?;
    machine.convert(place(1), PAGES, Shared)?;
    findings.look(&mut machine, "after a conversion on a node", place(1))?;
    findings.verdict(machine)
}

/// The emulated agent's memory, some of which was moved.
fn emulated(lab: &Lab, way: &Way) -> Result<()> {
    host::mark_free_memory(0)?;
    let launch = way.emulated(lab, RAM, ",prealloc=on");
    let mut machine = started(launch.with(&way.device()?).with(OUR_GUEST))?;
    let mut findings = Findings::default();
    findings.look(
        &mut machine,
        "at the start of an emulated machine",
        place(0),
    )?;
    let size = PAGES * PAGE;
    machine.operator_convert(place(1), size, Private)?;
    let path = "/tmp/moved";
    std::fs::File::create(path)?.set_len(size)?;
    for page in 0..PAGES {
        let (address, offset) = (place(1) + page * PAGE, page * PAGE);
        let request = json!({"address": address, "size": PAGE, "filename": path, "offset": offset});
        machine.qmp.call("x-private-memory-relocate", request)?;
    }
    host::mark_free_memory(0)?;
    machine.operator_convert(place(1), size, Shared)?;
    findings.look(&mut machine, "after memory moved", place(1))?;
    findings.verdict(machine)
}
