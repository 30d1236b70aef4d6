//! Scenarios for a device that is assigned to the guest, QEMU's edu behind an emulated IOMMU: its
//! DMA reaches what is shared, and nothing else.
//!
//! What is mapped for it is pinned. Type1 counts that in VmLck of the process, iommufd in VmPin.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nix::libc;
use serde_json::{Value, json};

use crate::host::{self, HugePages, KernelLog, Limit, Parameter};
use crate::linux::Linux;
use crate::machine::{Launch, Machine, OUR_GUEST, PAGE, Side};
use crate::qmp::DEADLINE;
use crate::scenarios::{
    ALL_RAM, BASE, PAM, PAM_RAM, Scenario, few_lines, no_errors, object_add, pam, same, same_held,
    still_converts,
};
use crate::{Lab, report};
use Side::{Private, Shared};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const RAM: u64 = 64 * MIB;
/// What is one mapping where it became shared as a whole.
const BLOCK: u64 = 2 * MIB;
/// How many mappings type 1 has by default.
const LIMIT: u64 = 65_535;
/// Mappings that QEMU leaves to other memory than the private-capable.
const OTHERS: u64 = 512;
/// What low RAM, of which a device sees no whole block, ROM and the like take at most.
const SMALL: u64 = 600;
/// Its guest makes low RAM shared, and nothing else.
const STARTS_PRIVATE: &str = "-bios /guest/guest-private.bin";
/// A kernel that does not unmap while this file is there, for LD_PRELOAD.
const MODELS: &str = "/tests/liblab_firmware.so";
const CLINGS: &str = "/tmp/kernel-clings";

/// An IOMMU that the guest could program, as wide as the lab's own.
const INTEL_IOMMU: &str = "intel-iommu,intremap=off,caching-mode=on,aw-bits=39";

/// One that a pc can have as well.
const VIRTIO_IOMMU: &str = "virtio-iommu-pci";

pub fn all() -> Vec<Scenario> {
    let assigned = Scenario::assigned;
    vec![
        assigned("dma-reaches-shared-only-type1", |lab| dma(lab, &TYPE1)),
        assigned("dma-reaches-shared-only-iommufd", |lab| dma(lab, &IOMMUFD)),
        assigned("dma-while-converting-type1", |lab| storm(lab, &TYPE1)),
        assigned("dma-while-converting-iommufd", |lab| storm(lab, &IOMMUFD)),
        assigned("dma-entry-limit", entry_limit),
        assigned("dma-entries-run-out", entries_run_out),
        assigned("dma-refusals-in-the-log", refusals_in_the_log),
        assigned("dma-slots-in-the-log", slots_in_the_log),
        assigned("dma-pin-limit-type1", |lab| pin_limit(lab, &TYPE1)),
        assigned("dma-pin-limit-iommufd", |lab| pin_limit(lab, &IOMMUFD)),
        assigned("dma-large-guest-type1", |lab| large_guest(lab, &TYPE1, GIB)),
        assigned("dma-large-guest-iommufd", |lab| {
            large_guest(lab, &IOMMUFD, 256 * MIB)
        }),
        assigned("dma-huge-pages-type1", |lab| huge_pages(lab, &TYPE1)),
        assigned("dma-huge-pages-iommufd", |lab| huge_pages(lab, &IOMMUFD)),
        assigned("dma-unmap-fails-model-type1", |lab| clings(lab, &TYPE1)),
        assigned("dma-unmap-fails-model-iommufd", |lab| clings(lab, &IOMMUFD)),
        assigned("dma-hotplug-type1", |lab| hotplug(lab, &TYPE1)),
        assigned("dma-hotplug-iommufd", |lab| hotplug(lab, &IOMMUFD)),
        assigned("dma-remap-type1", |lab| remap(lab, &TYPE1)),
        assigned("dma-remap-iommufd", |lab| remap(lab, &IOMMUFD)),
        assigned("dma-reset-and-end-type1", |lab| reset_and_end(lab, &TYPE1)),
        assigned("dma-reset-and-end-iommufd", |lab| {
            reset_and_end(lab, &IOMMUFD)
        }),
        assigned("dma-behind-iommu-type1", |lab| behind_iommu(lab, &TYPE1)),
        assigned("dma-behind-iommu-iommufd", |lab| {
            behind_iommu(lab, &IOMMUFD)
        }),
        assigned("dma-past-iommu-type1", |lab| past_iommu(lab, &TYPE1)),
        assigned("dma-past-iommu-iommufd", |lab| past_iommu(lab, &IOMMUFD)),
        assigned("dma-private-linux-type1", |lab| private_linux(lab, &TYPE1)).beside_linux(),
        assigned("dma-private-linux-iommufd", |lab| {
            private_linux(lab, &IOMMUFD)
        })
        .beside_linux(),
    ]
}

/// A way in which VFIO maps memory, and what counts the pages that it pins.
pub struct Way {
    object: &'static str,
    property: &'static str,
    pinned: &'static str,
}

pub const TYPE1: Way = Way {
    object: "",
    property: "",
    pinned: "VmLck",
};

pub const IOMMUFD: Way = Way {
    object: "-object iommufd,id=iommufd0",
    property: ",iommufd=iommufd0",
    pinned: "VmPin",
};

impl Way {
    fn is_type1(&self) -> bool {
        self.object.is_empty()
    }

    /// A machine that the device can be added to: `properties` of the backend with a comma
    /// before them.
    pub fn without_device(&self, lab: &Lab, ram: u64, properties: &str, board: &str) -> Launch {
        let mib = ram / MIB;
        Launch::kvm(lab).with(self.object).with(&format!(
            "-m {mib}M -object sw-protected-guest,id=cgs0 \
             -object memory-backend-private,id=ram0,size={mib}M{properties} \
             -machine {board},smm=off,confidential-guest-support=cgs0,memory-backend=ram0"
        ))
    }

    /// As [`Way::without_device`], emulated, which needs no KVM.
    pub fn emulated(&self, lab: &Lab, ram: u64, properties: &str) -> Launch {
        let mib = ram / MIB;
        let accelerator = "-accel tcg -cpu max";
        Launch::bare(lab).with(accelerator).with(self.object).with(&format!(
            "-m {mib}M -object memory-backend-private,id=ram0,size={mib}M,emulate=on{properties} \
             -machine q35,memory-backend=ram0"
        ))
    }

    pub fn device(&self) -> Result<String> {
        let (host, property) = (assignable()?, self.property);
        Ok(format!("-device vfio-pci,host={host},addr=5{property}"))
    }

    /// What QMP's device_add takes for it.
    fn hotplugged(&self) -> Result<Value> {
        let host = assignable()?;
        let mut device = json!({"driver": "vfio-pci", "id": "edu0", "host": host, "addr": "5"});
        if !self.is_type1() {
            device["iommufd"] = "iommufd0".into();
        }
        Ok(device)
    }

    pub fn launch(&self, lab: &Lab, ram: u64, properties: &str) -> Result<Launch> {
        let launch = self.without_device(lab, ram, properties, "q35");
        Ok(launch.with(&self.device()?))
    }

    fn start(&self, lab: &Lab) -> Result<Machine> {
        started(self.launch(lab, RAM, "")?.with(OUR_GUEST))
    }

    fn pinned(&self, machine: &Machine) -> Result<u64> {
        host::status_bytes(machine.pid(), self.pinned)
    }
}

/// Scenarios run only where there is one.
fn assignable() -> Result<String> {
    host::assignable()?.map_err(anyhow::Error::msg)
}

/// How many of `limit` mappings of type 1 are used.
fn used(machine: &Machine, limit: u64) -> Result<u64> {
    Ok(limit - host::dma_available(machine.pid())?)
}

pub fn started(launch: Launch) -> Result<Machine> {
    let mut machine = launch.start_guest()?;
    machine.ask_ok("assign")?;
    Ok(machine)
}

/// The device reads the page `from` and writes the page `to`.
pub fn copy(machine: &mut Machine, from: u64, to: u64) -> Result<()> {
    machine.ask_ok(&format!("dma read {from:#x}"))?;
    machine.ask_ok(&format!("dma write {to:#x}"))
}

/// The device copies a page that was filled with `seed`, and it arrives.
fn arrives(machine: &mut Machine, from: u64, to: u64, seed: u64) -> Result<()> {
    copy(machine, from, to)?;
    machine.check_moved(to, from, 1, seed)
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
    reaches_shared_only(way, way.start(lab)?)
}

fn reaches_shared_only(way: &Way, mut machine: Machine) -> Result<()> {
    const SOURCE: u64 = BASE;
    const TARGET: u64 = BASE + 8 * PAGE;
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
    arrives(&mut machine, SOURCE, TARGET + 2 * PAGE, 7)?;
    machine.check(TARGET + PAGE, 1, 8)?;
    machine.convert(TARGET + PAGE, 1, Shared)?;
    arrives(&mut machine, SOURCE, TARGET + PAGE, 7)?;
    same(way.pinned, way.pinned(&machine)?, all)?;
    machine.finish()
}

/// The device reads and writes pages whose neighbours on both sides are converted all the time.
fn storm(lab: &Lab, way: &Way) -> Result<()> {
    const COUNT: u64 = 10_000;
    let mut machine = way.start(lab)?;
    let all = way.pinned(&machine)?;
    let held = machine.region("ram0")?.shared_held;
    let counts = machine.ask_counts(&format!("storm {BASE:#x} {COUNT} 1"))?;
    println!("  {counts:?}");
    let count = |name: &str| counts.get(name).copied().with_context(|| name.to_string());
    ensure!(count("conversions")? >= COUNT, "too few: {counts:?}");
    no_errors(&counts, count("conversions")?)?;
    same("lost transfers", count("lost")?, 0)?;
    let private = count("private_pages")? * PAGE;
    same(way.pinned, way.pinned(&machine)?, all - private)?;
    let info = machine.region("ram0")?;
    same("private", info.private, private)?;
    same(
        "shared-held",
        info.shared_held,
        held.map(|held| held - private),
    )?;
    same_held(&info, private)?;
    machine.convert(BASE, 64, Shared)?;
    same(way.pinned, way.pinned(&machine)?, all)?;
    machine.finish()
}

/// The guest's request is refused, and the reason told.
fn refused(
    machine: &mut Machine,
    (addr, pages, to): (u64, u64, Side),
    errno: i32,
    why: &str,
) -> Result<()> {
    let ret = machine.hypercall(addr, pages, to)?;
    same("what the guest got", ret, -i64::from(errno))?;
    let told = machine.failed_conversions()?;
    let is_told = told.iter().any(|error| error.contains(why));
    ensure!(is_told, "no '{why}' in: {told:?}");
    Ok(())
}

/// A part of what is one mapping cannot be made private.
fn part_is_refused(machine: &mut Machine, addr: u64, pages: u64) -> Result<()> {
    const WHY: &str = "one mapping, which cannot be split";
    refused(machine, (addr, pages, Private), libc::EBUSY, WHY)
}

/// Where the kernel has fewer mappings than there are pages, they are of 2 MiB where all of that
/// is shared at once. A part of one cannot be taken from the device.
fn entry_limit(lab: &Lab) -> Result<()> {
    const FEW: u64 = 16_000;
    let limit = Parameter::set("vfio_iommu_type1", "dma_entry_limit", FEW)?;
    let said = TYPE1
        .launch(lab, RAM, ",dma-granularity=4K")?
        .with(OUR_GUEST)
        .refused()?;
    ensure!(said.contains("no DMA mapping is left"), "QEMU said: {said}");

    let mut machine = TYPE1.start(lab)?;
    drop(limit);
    let used = |machine: &Machine| used(machine, FEW);
    let (all, pinned) = (used(&machine)?, TYPE1.pinned(&machine)?);
    ensure!(all < RAM / BLOCK + SMALL, "{all} entries");
    ensure!(pinned >= RAM - PAGE, "only {pinned} bytes are pinned");

    machine.fill(BASE, 512, 7)?;
    part_is_refused(&mut machine, BASE + 3 * PAGE, 2)?;
    same("private", machine.region("ram0")?.private, 0)?;
    machine.check(BASE, 512, 7)?;
    arrives(&mut machine, BASE + 3 * PAGE, BASE + PAGE, 7)?;

    machine.convert(BASE, 512, Private)?;
    machine.fill(BASE, 512, 8)?;
    same("entries", used(&machine)?, all - 1)?;
    stopped(&mut machine, "write", BASE + 4 * PAGE)?;
    machine.check(BASE, 512, 8)?;
    copy(&mut machine, BASE + BLOCK, BASE - PAGE)?;
    // A part that is shared alone is pages, and goes as it came.
    machine.convert(BASE + 8 * PAGE, 4, Shared)?;
    same("entries", used(&machine)?, all - 1 + 4)?;
    machine.convert(BASE + 9 * PAGE, 1, Private)?;
    same("entries", used(&machine)?, all - 1 + 3)?;
    stopped(&mut machine, "write", BASE + 9 * PAGE)?;
    copy(&mut machine, BASE + BLOCK, BASE + 8 * PAGE)?;
    machine.convert(BASE, 512, Private)?;
    machine.convert(BASE, 512, Shared)?;
    same("entries", used(&machine)?, all)?;
    same("pinned", TYPE1.pinned(&machine)?, pinned)?;
    machine.finish()
}

/// When mappings run out while the machine runs, what the guest asked for stays private.
fn entries_run_out(lab: &Lab) -> Result<()> {
    const FEW: u64 = 2048;
    let limit = Parameter::set("vfio_iommu_type1", "dma_entry_limit", FEW)?;
    let launch = TYPE1.launch(lab, RAM, ",initial-state=private,dma-granularity=4K")?;
    let mut machine = started(launch.with(STARTS_PRIVATE))?;
    drop(limit);
    machine.convert(BASE, 1024, Shared)?;
    machine.fill(BASE, 1024, 7)?;
    let (left, pinned) = (host::dma_available(machine.pid())?, TYPE1.pinned(&machine)?);
    let private = machine.region("ram0")?.private;
    machine.fill(BASE + 1024 * PAGE, 1024, 8)?;
    let more = (BASE + 1024 * PAGE, 1024, Shared);
    refused(&mut machine, more, libc::ENOSPC, "no DMA mapping is left")?;
    machine.check(BASE + 1024 * PAGE, 1024, 8)?;
    same("private", machine.region("ram0")?.private, private)?;
    same("mappings left", host::dma_available(machine.pid())?, left)?;
    same(TYPE1.pinned, TYPE1.pinned(&machine)?, pinned)?;
    stopped(&mut machine, "read", BASE + 1024 * PAGE)?;

    // Some are kept for other memory; what is given back can be had.
    let free = left - OTHERS;
    ensure!(free < 1024, "{free} mappings are free");
    machine.convert(BASE + 1024 * PAGE, free - 16, Shared)?;
    machine.convert(BASE, 512, Private)?;
    machine.convert(BASE + 2048 * PAGE, 512, Shared)?;
    arrives(&mut machine, BASE + 1023 * PAGE, BASE + 2048 * PAGE, 7)?;
    machine.finish()
}

/// A guest is refused the same thing again and again, for a reason that the log tells.
fn refusals_in_the_log(lab: &Lab) -> Result<()> {
    const REQUESTS: u64 = 1000;
    const WHY: &str = "one mapping, which cannot be split";
    let start = Instant::now();
    let launch = TYPE1.launch(lab, RAM, ",dma-granularity=2M")?;
    let mut machine = started(launch.with(OUR_GUEST))?;
    for _ in 0..REQUESTS {
        let ret = machine.hypercall(BASE + PAGE, 1, Private)?;
        same("what the guest got", ret, -i64::from(libc::EBUSY))?;
    }
    let suppressed = machine.statistic("suppressed-messages")?;
    let lines = few_lines(&machine.finish_with_log()?, WHY, start)?;
    same("printed and suppressed", lines + suppressed, REQUESTS)
}

/// A guest has a slot come back for which there are no mappings left, again and again.
fn slots_in_the_log(lab: &Lab) -> Result<()> {
    const FEW: u64 = 2048;
    const TIMES: u64 = 100;
    /// What is hidden by a PAM register, and takes as many mappings.
    const HIDDEN: u64 = 8;
    const WHY: &str = "a device cannot map what is shared";
    let start = Instant::now();
    let limit = Parameter::set("vfio_iommu_type1", "dma_entry_limit", FEW)?;
    let launch = TYPE1.launch(lab, RAM, ",initial-state=private,dma-granularity=4K")?;
    let mut machine = started(launch.with(STARTS_PRIVATE))?;
    drop(limit);
    pam(&mut machine, PAM, ALL_RAM)?;
    machine.convert(PAM_RAM, HIDDEN, Shared)?;
    let free = host::dma_available(machine.pid())? - OTHERS;
    machine.convert(BASE, free, Shared)?;
    let elsewhere = BASE + free * PAGE;
    for _ in 0..TIMES {
        pam(&mut machine, PAM, 0)?;
        machine.convert(elsewhere, HIDDEN, Shared)?;
        pam(&mut machine, PAM, ALL_RAM)?;
        machine.convert(elsewhere, HIDDEN, Private)?;
    }
    let suppressed = machine.statistic("suppressed-messages")?;
    let lines = few_lines(&machine.finish_with_log()?, WHY, start)?;
    println!("  {suppressed} messages were suppressed");
    ensure!(
        lines + suppressed >= TIMES,
        "{lines} printed, {suppressed} suppressed"
    );
    Ok(())
}

/// Of 64 GiB the guest shares `size` bytes at once, as a Linux does for its devices, and some pages
/// now and then.
fn large_guest(lab: &Lab, way: &Way, size: u64) -> Result<()> {
    const POOL: u64 = 4 * GIB;
    let near = POOL + size + 5 * PAGE;
    let launch = way.launch(lab, 64 * GIB, ",initial-state=private")?;
    let mut machine = started(launch.with(STARTS_PRIVATE))?;
    let before = way.pinned(&machine)?;
    ensure!(before < 4 * MIB, "{before} bytes are pinned");
    machine.convert(POOL, size / PAGE, Shared)?;
    same(way.pinned, way.pinned(&machine)?, before + size)?;
    if way.is_type1() {
        let used = used(&machine, LIMIT)?;
        ensure!(used < size / BLOCK + SMALL, "{used} mappings are used");
    }
    machine.convert(near, 3, Shared)?;
    machine.fill(POOL, 1, 7)?;
    arrives(&mut machine, POOL, POOL + size - PAGE, 7)?;
    arrives(&mut machine, POOL, near + PAGE, 7)?;
    machine.convert(near + PAGE, 1, Private)?;
    stopped(&mut machine, "write", near + PAGE)?;
    copy(&mut machine, POOL, near + 2 * PAGE)?;
    if !way.is_type1() {
        // Any part can be taken out of what is shared.
        machine.convert(POOL + size / 2 + PAGE, 1, Private)?;
        stopped(&mut machine, "write", POOL + size / 2 + PAGE)?;
        copy(&mut machine, POOL, POOL + size / 2)?;
        copy(&mut machine, POOL, POOL + size / 2 + 2 * PAGE)?;
        same(way.pinned, way.pinned(&machine)?, before + size + PAGE)?;
    }
    machine.convert(POOL, 2 * size / PAGE, Private)?;
    same(way.pinned, way.pinned(&machine)?, before)?;
    stopped(&mut machine, "read", POOL)?;
    machine.finish()
}

/// A huge page that is shared is one mapping, and goes as a whole.
fn huge_pages(lab: &Lab, way: &Way) -> Result<()> {
    let pool = HugePages::reserve(RAM / BLOCK)?;
    let launch = way.launch(lab, RAM, ",hugetlb=on,hugetlbsize=2M")?;
    let mut machine = started(launch.with(OUR_GUEST))?;
    let all = way.pinned(&machine)?;
    same("free huge pages", pool.free()?, 0)?;
    let mappings = host::iommu_mappings()?;
    ensure!(mappings < RAM / PAGE / 8, "{mappings} mappings");
    if way.is_type1() {
        let used = used(&machine, LIMIT)?;
        ensure!(used < RAM / BLOCK + SMALL, "{used} entries");
    }
    part_is_refused(&mut machine, BASE, 511)?;
    machine.fill(BASE, 1, 7)?;
    machine.convert(BASE + BLOCK, 512, Private)?;
    same("mappings", host::iommu_mappings()?, mappings - 1)?;
    same("free huge pages", pool.free()?, 1)?;
    same(way.pinned, way.pinned(&machine)?, all - BLOCK)?;
    stopped(&mut machine, "write", BASE + BLOCK)?;
    arrives(&mut machine, BASE, BASE + 511 * PAGE, 7)?;
    machine.convert(BASE + BLOCK, 512, Shared)?;
    same("mappings", host::iommu_mappings()?, mappings)?;
    arrives(&mut machine, BASE, BASE + BLOCK + PAGE, 7)?;
    machine.finish()
}

/// What the kernel does not unmap stays shared, and the guest is told. (No kernel is known to
/// fail so: it is a model of one.)
fn clings(lab: &Lab, way: &Way) -> Result<()> {
    let launch = way.launch(lab, RAM, "")?.env("LD_PRELOAD", MODELS);
    let mut machine = started(launch.env("LAB_CLINGS", CLINGS).with(OUR_GUEST))?;
    let pinned = way.pinned(&machine)?;
    machine.fill(BASE, 4, 7)?;
    std::fs::write(CLINGS, "")?;
    let tried = refused(&mut machine, (BASE, 2, Private), libc::EIO, "listener");
    std::fs::remove_file(CLINGS)?;
    tried?;
    same("private", machine.region("ram0")?.private, 0)?;
    same(way.pinned, way.pinned(&machine)?, pinned)?;
    machine.check(BASE, 4, 7)?;
    arrives(&mut machine, BASE, BASE + PAGE, 7)?;
    machine.convert(BASE, 2, Private)?;
    stopped(&mut machine, "write", BASE)?;
    machine.finish()
}

/// The device comes and goes while the guest converts; the kernel keeps nothing of it.
fn hotplug(lab: &Lab, way: &Way) -> Result<()> {
    let mut machine = way
        .without_device(lab, RAM, "", "pc")
        .with(OUR_GUEST)
        .start_guest()?;
    let held = host::iommu_held()?;
    let device = way.hotplugged()?;
    for round in 0..3 {
        let command = format!("unplug {BASE:#x} 300 200 {round}");
        machine.send(&command)?;
        machine.qmp.call("device_add", device.clone())?;
        let counts = machine.counts(&command)?;
        no_errors(&counts, counts["conversions"])?;
        let private = counts["private_pages"] * PAGE;
        let pinned = way.pinned(&machine)?;
        same("private", machine.region("ram0")?.private, private)?;
        machine.convert(BASE, 300, Shared)?;
        ensure!(
            pinned >= RAM - private - PAGE,
            "only {pinned} bytes are pinned"
        );
        machine.ask_ok("assign")?;
        machine.convert(BASE, 8, Private)?;
        machine.convert(BASE, 4, Shared)?;
        machine.fill(BASE, 1, 7)?;
        arrives(&mut machine, BASE, BASE + PAGE, 7)?;
        stopped(&mut machine, "write", BASE + 5 * PAGE)?;
        machine.convert(BASE, 8, Shared)?;

        machine.send(&command)?;
        machine.qmp.call("device_del", json!({"id": "edu0"}))?;
        let counts = machine.counts(&command)?;
        no_errors(&counts, counts["conversions"])?;
        machine.qmp.event("DEVICE_DELETED")?;
        machine.convert(BASE, 300, Shared)?;
        same(way.pinned, way.pinned(&machine)?, 0)?;
        same("held by the IOMMU", host::iommu_held()?, held)?;
    }
    machine.finish()
}

/// The guest moves RAM about, whose mappings are made anew, and converts it meanwhile.
fn remap(lab: &Lab, way: &Way) -> Result<()> {
    let mut machine = way.start(lab)?;
    machine.ask_ok("shadow")?;
    machine.ask("smp")?;
    let all = way.pinned(&machine)?;
    let counts = machine.ask_counts(&format!("remap {BASE:#x} 200 100 1"))?;
    no_errors(&counts, counts["conversions"])?;
    let private = counts["private_pages"] * PAGE;
    same("private", machine.region("ram0")?.private, private)?;
    machine.convert(BASE, 200, Shared)?;
    let after = way.pinned(&machine)?;
    ensure!(
        after.abs_diff(all) <= 256 * PAGE,
        "{all} bytes were pinned, now {after}"
    );
    machine.fill(BASE, 1, 7)?;
    arrives(&mut machine, BASE, BASE + PAGE, 7)?;
    machine.finish()
}

/// After a reset the device reaches all that is shared again. When the machine ends, whichever way,
/// the kernel has nothing mapped or pinned for it.
fn reset_and_end(lab: &Lab, way: &Way) -> Result<()> {
    let held = host::iommu_held()?;
    for is_killed in [false, true] {
        let launch = way.launch(lab, RAM, "")?.with(OUR_GUEST);
        let mut machine = started(launch.with("-action reboot=reset"))?;
        let all = way.pinned(&machine)?;
        machine.convert(BASE, 64, Private)?;
        machine.fill(BASE, 64, 7)?;
        machine.reset()?;
        machine.ask_ok("assign")?;
        same(way.pinned, way.pinned(&machine)?, all)?;
        machine.fill(BASE, 1, 8)?;
        arrives(&mut machine, BASE, BASE + PAGE, 8)?;
        machine.convert(BASE + PAGE, 1, Private)?;
        ensure!(host::iommu_held()? != held, "the IOMMU holds nothing");
        match is_killed {
            true => drop(machine),
            false => machine.finish()?,
        }
        same("held by the IOMMU", host::iommu_held()?, held)?;
    }
    Ok(())
}

/// What the guest asked for cannot be pinned: it stays private, the guest is told, and the machine
/// goes on.
fn pin_limit(lab: &Lab, way: &Way) -> Result<()> {
    let launch = || Ok::<_, anyhow::Error>(way.launch(lab, RAM, "")?.with(OUR_GUEST));
    let said = launch()?.lock_limit(RAM / 2).refused()?;
    ensure!(said.contains("RLIMIT_MEMLOCK"), "QEMU said: {said}");
    let mut machine = started(launch()?.lock_limit(4 * RAM))?;
    machine.convert(BASE, 16, Private)?;
    machine.fill(BASE, 16, 7)?;
    let pinned = way.pinned(&machine)?;
    let limit = Limit::set(machine.pid(), libc::RLIMIT_MEMLOCK, pinned + 8 * PAGE)?;
    let request = (BASE, 16, Shared);
    refused(&mut machine, request, libc::ENOMEM, "RLIMIT_MEMLOCK")?;
    same("private", machine.region("ram0")?.private, 16 * PAGE)?;
    same(way.pinned, way.pinned(&machine)?, pinned)?;
    stopped(&mut machine, "write", BASE)?;
    machine.check(BASE, 16, 7)?;

    drop(limit);
    machine.convert(BASE, 16, Shared)?;
    machine.check_zero(BASE, 16)?;
    machine.fill(BASE, 1, 5)?;
    arrives(&mut machine, BASE, BASE + 15 * PAGE, 5)?;
    still_converts(&mut machine)?;
    machine.finish()
}

/// A device behind an IOMMU that the guest programs is refused, whichever comes first, as what the
/// guest maps there would stay mapped and pinned when it becomes private.
fn behind_iommu(lab: &Lab, way: &Way) -> Result<()> {
    const WHY: &str = "a VFIO device behind a virtual IOMMU cannot be used beside";
    let held = host::iommu_held()?;
    let is_told = |said: &str| {
        ensure!(said.contains(WHY), "QEMU said: {said}");
        Ok(())
    };
    for iommu in [INTEL_IOMMU, "amd-iommu", VIRTIO_IOMMU] {
        let iommu = format!("-device {iommu}");
        let launch = way.without_device(lab, RAM, "", "q35").with(&iommu);
        is_told(&launch.with(&way.device()?).with(OUR_GUEST).refused()?)?;
    }

    let iommu = format!("-device {VIRTIO_IOMMU}");
    let launch = way.without_device(lab, RAM, "", "pc").with(&iommu);
    let mut machine = launch.with(OUR_GUEST).start_guest()?;
    let device = way.hotplugged()?;
    is_told(&machine.qmp.refused("device_add", device.clone())?)?;
    same(way.pinned, way.pinned(&machine)?, 0)?;
    same("held by the IOMMU", host::iommu_held()?, held)?;
    still_converts(&mut machine)?;
    machine.finish()?;

    // The device is there first: the backend is refused for as long as it is.
    let launch = Launch::kvm(lab).with(way.object).with(&format!(
        "-m {}M -object sw-protected-guest,id=cgs0 \
         -machine pc,smm=off,confidential-guest-support=cgs0 {iommu}",
        RAM / MIB
    ));
    let mut machine = launch.with(OUR_GUEST).start_guest()?;
    machine.qmp.call("device_add", device)?;
    ensure!(way.pinned(&machine)? > 0, "nothing is pinned");
    let backend = object_add("ram1", RAM);
    let said = machine.qmp.refused("object-add", backend.clone())?;
    let why = "cannot be used beside devices that pin guest memory";
    ensure!(said.contains(why), "QEMU said: {said}");
    machine.qmp.call("device_del", json!({"id": "edu0"}))?;
    machine.ask_counts(&format!("unplug {BASE:#x} 8 8 1"))?;
    machine.qmp.event("DEVICE_DELETED")?;
    machine.qmp.call("object-add", backend)?;
    machine.finish()
}

/// On a bus that bypasses the IOMMU a device is as it is without one.
fn past_iommu(lab: &Lab, way: &Way) -> Result<()> {
    let launch = way
        .without_device(lab, RAM, "", "q35,default-bus-bypass-iommu=on")
        .with(&format!("-device {INTEL_IOMMU} {}", way.device()?));
    reaches_shared_only(way, started(launch.with(OUR_GUEST))?)
}

/// A Linux that starts with all of its RAM shared, and makes nearly all of it private, is refused
/// nothing. Its loader takes parts of 2 MiB, so that type 1 must have a mapping for each page.
fn private_linux(lab: &Lab, way: &Way) -> Result<()> {
    let _limit = Parameter::set("vfio_iommu_type1", "dma_entry_limit", 2 * LIMIT)?;
    let devices = format!("{} {}", way.object, way.device()?);
    let mut linux = Linux::private(lab, &devices)?;
    let info = linux.is_private()?;
    same("failed-conversions", info.failed_conversions, 0)?;
    let pinned = way.pinned(&linux.machine)?;
    println!("  {pinned} bytes are pinned, {} shared", info.shared);
    ensure!(
        pinned.abs_diff(info.shared) < 2 * MIB,
        "{pinned} bytes are pinned of {} that are shared",
        info.shared
    );
    linux.finish()
}

// ---- the bench: what a device's mappings are and cost, on machines that have it in turns ----

/// Machines: how they are called, their guest object, their backend, and whether pages go one by
/// one.
const VMMS: &[(&str, &str, &str, bool)] = &[
    ("ours", "", "private", true),
    (
        "ours, dma-granularity=2M",
        "",
        "private,dma-granularity=2M",
        false,
    ),
    ("qemu", ",x-require-guest-memfd=on", "memfd", true),
];
const PASSES: usize = 3;
const ROUNDS: usize = 7;
const PLACES: u64 = 3;

pub fn bench(lab: &Lab) -> Result<()> {
    report(json!({"bench": {"kernel": lab.kernel, "qemu": lab.line}}));
    for _ in 0..PASSES {
        for way in [&TYPE1, &IOMMUFD] {
            for vmm in VMMS {
                let row = measure(lab, way, vmm)?;
                report(json!({"bench": {"vfio": row}}));
            }
        }
    }
    Ok(())
}

fn measure(
    lab: &Lab,
    way: &Way,
    &(name, guest, backend, by_page): &(&str, &str, &str, bool),
) -> Result<Value> {
    let mut machine = started(Launch::kvm(lab).with(way.object).with(&format!(
        "-smp 1 -m 64M -object sw-protected-guest,id=cgs0{guest} \
         -object memory-backend-{backend},id=ram0,size=64M \
         -blockdev driver=file,node-name=rom,filename=/guest/guest.bin,read-only=on \
         -machine q35,smm=off,confidential-guest-support=cgs0,memory-backend=ram0,pflash0=rom \
         {}",
        way.device()?
    )))?;
    let figures = |machine: &Machine| -> Result<Value> {
        Ok(json!({
            "entries": way.is_type1().then(|| used(machine, LIMIT)).transpose()?,
            "mappings": host::iommu_mappings()?,
            "pinned": way.pinned(machine)?,
        }))
    };
    let start = figures(&machine)?;
    let mut cycles = [(); 2].map(|()| Vec::new());
    for _ in 0..ROUNDS {
        let command = format!("pingpong {BASE:#x} {BLOCK:#x} {PLACES} {}", BLOCK / PAGE);
        let counts = machine.ask_counts(&command)?;
        same("conversions", counts["conversions"], 2 * PLACES)?;
        for (all, figure) in cycles.iter_mut().zip(["to_private", "to_shared"]) {
            all.push(counts[figure]);
        }
    }
    let [to_private, to_shared] = cycles.map(|mut all| {
        all.sort_unstable();
        all[all.len() / 2]
    });
    let mut private = 0;
    if by_page {
        let counts = machine.ask_counts(&format!("storm {BASE:#x} 2000 1"))?;
        no_errors(&counts, 2000)?;
        same("lost transfers", counts["lost"], 0)?;
        private = counts["private_pages"] * PAGE;
    }
    let after = figures(&machine)?;
    machine.finish()?;
    Ok(json!({
        "way": if way.is_type1() { "type1" } else { "iommufd" }, "vmm": name,
        "start": start, "after": after, "private": private,
        "to_private": to_private, "to_shared": to_shared,
    }))
}
