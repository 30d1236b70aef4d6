//! Scenarios for a device that is assigned to the guest, QEMU's edu behind an emulated IOMMU: its
//! DMA reaches what is shared, and nothing else.
//!
//! What is mapped for it is pinned. Type1 counts that in VmLck of the process, iommufd in VmPin.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nix::libc;

use crate::Lab;
use crate::host::{self, KernelLog, Limit, Parameter};
use crate::machine::{Launch, Machine, OUR_GUEST, PAGE, PRIVATE, Side};
use crate::qmp::DEADLINE;
use crate::scenarios::{BASE, Scenario, no_errors, same, same_held, still_converts};
use Side::{Private, Shared};

/// Each shared page takes one of the kernel's 65,535 entries, and QEMU keeps some for other memory.
const RAM: u64 = 64 << 20;

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::assigned("dma-reaches-shared-only-type1", |lab| dma(lab, &TYPE1)),
        Scenario::assigned("dma-reaches-shared-only-iommufd", |lab| dma(lab, &IOMMUFD)),
        Scenario::assigned("dma-while-converting-type1", |lab| storm(lab, &TYPE1)),
        Scenario::assigned("dma-while-converting-iommufd", |lab| storm(lab, &IOMMUFD)),
        Scenario::assigned("dma-entry-limit", entry_limit),
        Scenario::assigned("dma-pin-limit-type1", |lab| pin_limit(lab, &TYPE1)),
        Scenario::assigned("dma-pin-limit-iommufd", |lab| pin_limit(lab, &IOMMUFD)),
    ]
}

/// A way in which VFIO maps memory, and what counts the pages that it pins.
struct Way {
    object: &'static str,
    property: &'static str,
    pinned: &'static str,
}

const TYPE1: Way = Way {
    object: "",
    property: "",
    pinned: "VmLck",
};

const IOMMUFD: Way = Way {
    object: "-object iommufd,id=iommufd0",
    property: ",iommufd=iommufd0",
    pinned: "VmPin",
};

impl Way {
    fn launch(&self, lab: &Lab, ram: u64) -> Result<Launch> {
        let host = host::assignable()?.map_err(anyhow::Error::msg)?;
        let device = format!("-device vfio-pci,host={host},addr=5{}", self.property);
        Ok(Launch::kvm(lab)
            .with(&PRIVATE.replace("256M", &format!("{}M", ram >> 20)))
            .with(OUR_GUEST)
            .with(self.object)
            .with(&device))
    }

    fn start(&self, lab: &Lab) -> Result<Machine> {
        started(self.launch(lab, RAM)?)
    }

    fn pinned(&self, machine: &Machine) -> Result<u64> {
        host::status_bytes(machine.pid(), self.pinned)
    }
}

fn started(launch: Launch) -> Result<Machine> {
    let mut machine = launch.start_guest()?;
    machine.ask_ok("assign")?;
    Ok(machine)
}

/// The device reads the page `from` and writes the page `to`.
fn copy(machine: &mut Machine, from: u64, to: u64) -> Result<()> {
    machine.ask_ok(&format!("dma read {from:#x}"))?;
    machine.ask_ok(&format!("dma write {to:#x}"))
}

/// The device copies, `read` or `write`, until the kernel says that the IOMMU stopped it at this
/// address: it does not say so each time that faults come thick and fast.
fn stopped(machine: &mut Machine, direction: &str, addr: u64) -> Result<()> {
    let mut log = KernelLog::from_now()?;
    let end = Instant::now() + DEADLINE;
    let fault = format!("fault addr {addr:#x} ");
    loop {
        machine.ask_ok(&format!("dma {direction} {addr:#x}"))?;
        let mut news = log.news()?.into_iter();
        if news.any(|line| {
            let line = line.to_lowercase();
            line.contains(&format!("[dma {direction}")) && line.contains(&fault)
        }) {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "no fault of a {direction} at {addr:#x}"
        );
    }
}

fn dma(lab: &Lab, way: &Way) -> Result<()> {
    const SOURCE: u64 = BASE;
    const TARGET: u64 = BASE + 8 * PAGE;
    let mut machine = way.start(lab)?;
    let all = way.pinned(&machine)?;
    ensure!(all >= RAM - PAGE, "{} is only {all}", way.pinned);
    machine.fill(SOURCE, 1, 7)?;
    machine.fill(TARGET, 3, 9)?;
    copy(&mut machine, SOURCE, TARGET + PAGE)?;
    machine.check(TARGET, 1, 9)?;
    machine.check_moved(TARGET + PAGE, SOURCE, 1, 7)?;
    machine.check(TARGET + 2 * PAGE, 1, 9)?;

    // The page is the guest's alone as soon as it is told so.
    let hidden = TARGET + PAGE;
    machine.convert(hidden, 1, Private)?;
    machine.ask_ok(&format!("dma write {hidden:#x}"))?;
    machine.check_zero(hidden, 1)?;
    same(way.pinned, way.pinned(&machine)?, all - PAGE)?;
    machine.fill(hidden, 1, 8)?;
    stopped(&mut machine, "write", hidden)?;
    machine.check(hidden, 1, 8)?;
    stopped(&mut machine, "read", hidden)?;
    machine.ask_ok(&format!("dma write {TARGET:#x}"))?;
    let read = machine.ask(&format!("check {TARGET:#x} 1 8 {hidden:#x}"))?;
    ensure!(read != "ok", "the device has read a private page");
    same_held(&machine.region("ram0")?, PAGE)?;

    // Neighbours can be reached all the while, and the page itself once it is shared again.
    copy(&mut machine, SOURCE, TARGET + 2 * PAGE)?;
    machine.check_moved(TARGET + 2 * PAGE, SOURCE, 1, 7)?;
    machine.check(TARGET + PAGE, 1, 8)?;
    machine.convert(TARGET + PAGE, 1, Shared)?;
    copy(&mut machine, SOURCE, TARGET + PAGE)?;
    machine.check_moved(TARGET + PAGE, SOURCE, 1, 7)?;
    same(way.pinned, way.pinned(&machine)?, all)?;
    machine.finish()
}

/// The device reads and writes pages whose neighbours on both sides are converted all the time.
fn storm(lab: &Lab, way: &Way) -> Result<()> {
    const COUNT: u64 = 1000;
    let mut machine = way.start(lab)?;
    let all = way.pinned(&machine)?;
    let counts = machine.ask_counts(&format!("storm {BASE:#x} {COUNT} 1"))?;
    println!("  {counts:?}");
    let count = |name: &str| counts.get(name).copied().with_context(|| name.to_string());
    ensure!(count("conversions")? >= COUNT, "too few: {counts:?}");
    no_errors(&counts, count("conversions")?)?;
    same("lost transfers", count("lost")?, 0)?;
    let private = count("private_pages")? * PAGE;
    same(way.pinned, way.pinned(&machine)?, all - private)?;
    same("private", machine.region("ram0")?.private, private)?;
    machine.convert(BASE, 64, Shared)?;
    same(way.pinned, way.pinned(&machine)?, all)?;
    machine.finish()
}

/// Not every shared page can have its entry: QEMU 10.2 does not start, nor with 256 MiB at the
/// kernel's own limit; 10.0 gives the device no memory.
fn entry_limit(lab: &Lab) -> Result<()> {
    let limit = Parameter::set("vfio_iommu_type1", "dma_entry_limit", 16000)?;
    let launch = TYPE1.launch(lab, RAM)?;
    if lab.line == "10.0" {
        reaches_nothing(started(launch)?)?;
        drop(limit);
    } else {
        out_of_mappings(launch)?;
        drop(limit);
        out_of_mappings(TYPE1.launch(lab, 4 * RAM)?)?;
    }
    let mut machine = TYPE1.start(lab)?;
    machine.fill(BASE, 1, 7)?;
    copy(&mut machine, BASE, BASE + PAGE)?;
    machine.check_moved(BASE + PAGE, BASE, 1, 7)?;
    machine.finish()
}

fn out_of_mappings(launch: Launch) -> Result<()> {
    let said = launch.refused()?;
    ensure!(said.contains("out of DMA mappings"), "QEMU said: {said}");
    Ok(())
}

fn reaches_nothing(mut machine: Machine) -> Result<()> {
    machine.fill(BASE, 1, 7)?;
    stopped(&mut machine, "write", BASE)?;
    machine.check(BASE, 1, 7)?;
    // What had been mapped before the limit was reached is not: only firmware and low RAM are.
    let pinned = TYPE1.pinned(&machine)?;
    ensure!(pinned < 2 << 20, "{pinned} bytes are pinned");
    still_converts(&mut machine)?;
    let said = machine.finish_with_log()?;
    ensure!(said.contains("no guest memory"), "QEMU said: {said}");
    Ok(())
}

/// What the guest asked for cannot be pinned: it stays private, the guest is told, and the machine
/// goes on.
fn pin_limit(lab: &Lab, way: &Way) -> Result<()> {
    let mut machine = started(way.launch(lab, RAM)?.lock_limit(4 * RAM))?;
    machine.convert(BASE, 16, Private)?;
    machine.fill(BASE, 16, 7)?;
    let pinned = way.pinned(&machine)?;
    let limit = Limit::set(machine.pid(), libc::RLIMIT_MEMLOCK, pinned + 8 * PAGE)?;
    let ret = machine.hypercall(BASE, 16, Shared)?;
    same("what the guest got", ret, -i64::from(libc::ENOMEM))?;
    same("private", machine.region("ram0")?.private, 16 * PAGE)?;
    same(way.pinned, way.pinned(&machine)?, pinned)?;
    stopped(&mut machine, "write", BASE)?;
    machine.check(BASE, 16, 7)?;

    drop(limit);
    machine.convert(BASE, 16, Shared)?;
    machine.check_zero(BASE, 16)?;
    machine.fill(BASE, 1, 5)?;
    copy(&mut machine, BASE, BASE + 15 * PAGE)?;
    machine.check_moved(BASE + 15 * PAGE, BASE, 1, 5)?;
    still_converts(&mut machine)?;
    machine.finish()
}
