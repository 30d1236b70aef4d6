//! Scenarios for a device that is assigned to the guest, QEMU's edu behind an emulated IOMMU: its
//! DMA reaches what is shared, and nothing else.
//!
//! What is mapped for it is pinned. Type1 counts that in VmLck of the process, iommufd in VmPin.

use anyhow::{Context, Result, ensure};
use nix::libc;

use crate::Lab;
use crate::host::{self, KernelLog, Limit, Parameter};
use crate::machine::{Launch, Machine, OUR_GUEST, PAGE, PRIVATE, Side};
use crate::scenarios::{BASE, Scenario, no_errors, same, same_held, still_converts};
use Side::{Private, Shared};

/// One entry for each shared page, and QEMU keeps 32,764 of the kernel's 65,535 for other memory.
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

/// The IOMMU stopped the device at this address.
fn fault(log: &mut KernelLog, direction: &str, addr: u64) -> Result<()> {
    log.wait_for(&[
        "DMAR",
        &format!("[DMA {direction}"),
        &format!("fault addr {addr:#x} "),
    ])
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
    let mut log = KernelLog::from_now()?;
    machine.convert(TARGET + PAGE, 1, Private)?;
    machine.ask_ok(&format!("dma write {:#x}", TARGET + PAGE))?;
    machine.check_zero(TARGET + PAGE, 1)?;
    fault(&mut log, "Write", TARGET + PAGE)?;
    same(way.pinned, way.pinned(&machine)?, all - PAGE)?;
    machine.fill(TARGET + PAGE, 1, 8)?;
    machine.ask_ok(&format!("dma write {:#x}", TARGET + PAGE))?;
    machine.check(TARGET + PAGE, 1, 8)?;
    machine.ask_ok(&format!("dma read {:#x}", TARGET + PAGE))?;
    fault(&mut log, "Read", TARGET + PAGE)?;
    machine.ask_ok(&format!("dma write {TARGET:#x}"))?;
    let reply = machine.ask(&format!("check {TARGET:#x} 1 8 {:#x}", TARGET + PAGE))?;
    ensure!(reply != "ok", "the device has read a private page");
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

/// What the guest asked for cannot be mapped: it stays private, and the guest is told.
fn not_shared(machine: &mut Machine, way: &Way, errno: i32) -> Result<()> {
    let pinned = way.pinned(machine)?;
    let ret = machine.hypercall(BASE, 16, Shared)?;
    same("what the guest got", ret, -i64::from(errno))?;
    same("private", machine.region("ram0")?.private, 16 * PAGE)?;
    same(way.pinned, way.pinned(machine)?, pinned)?;
    machine.check(BASE, 16, 7)?;
    let mut log = KernelLog::from_now()?;
    machine.ask_ok(&format!("dma write {BASE:#x}"))?;
    fault(&mut log, "Write", BASE)?;
    machine.check(BASE, 16, 7)
}

/// Room again: the guest converts, and the device reaches what it has shared.
fn shared_at_last(mut machine: Machine) -> Result<()> {
    machine.convert(BASE, 16, Shared)?;
    machine.fill(BASE, 1, 5)?;
    copy(&mut machine, BASE, BASE + 15 * PAGE)?;
    machine.check_moved(BASE + 15 * PAGE, BASE, 1, 5)?;
    still_converts(&mut machine)?;
    machine.finish()
}

/// Where each shared page cannot have its entry, QEMU says so before the guest runs.
fn entry_limit(lab: &Lab) -> Result<()> {
    let says = |text: String| {
        let expected = "possibly running out of DMA mappings";
        ensure!(text.contains(expected), "QEMU does not say so: {text}");
        Ok(())
    };
    says(TYPE1.launch(lab, 4 * RAM)?.refused()?)?;
    let limit = Parameter::set("vfio_iommu_type1", "dma_entry_limit", 16384)?;
    says(TYPE1.launch(lab, RAM)?.refused()?)?;
    drop(limit);
    TYPE1.start(lab)?.finish()
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
    let mut log = KernelLog::from_now()?;
    machine.ask_ok(&format!("dma write {BASE:#x}"))?;
    fault(&mut log, "Write", BASE)?;
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
