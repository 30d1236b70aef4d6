//! Scenarios for the properties of memory-backend-private: where memory begins, what is given
//! back, taken beforehand and from which node, huge pages, and a balloon.

use anyhow::{Context, Result, ensure};
use nix::libc;
use serde_json::json;

use crate::Lab;
use crate::host::{HugePages, node_bytes};
use crate::machine::{Launch, Machine, OUR_GUEST, PAGE, PRIVATE, Side};
use crate::scenarios::{BASE, RAM, Scenario, object_add, same, same_held};
use Side::{Private, Shared};

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("initial-state-private", initial_state_private),
        Scenario::new("discard-none", discard_none),
        Scenario::new("prealloc", prealloc),
        Scenario::new("prealloc-without-memory", prealloc_without_memory),
        Scenario::new("host-nodes", host_nodes),
        Scenario::new("host-nodes-that-are-not-there", host_nodes_missing),
        Scenario::new("hugetlb", hugetlb),
        Scenario::new("balloon", balloon),
        Scenario::new("prefault", prefault),
        Scenario::new("set-while-running", set_while_running),
    ]
}

const HUGE: u64 = 2 << 20;

/// The usual private machine with more properties for `ram0`.
pub fn with_properties(lab: &Lab, properties: &str) -> Launch {
    let object = format!("id=ram0,size=256M,{properties}");
    Launch::kvm(lab).with(&PRIVATE.replace("id=ram0,size=256M", &object))
}

fn ram0(lab: &Lab, properties: &str) -> Result<Machine> {
    with_properties(lab, properties)
        .with(OUR_GUEST)
        .start_guest()
}

/// What QEMU asks of all backends does not change with the machine running: the next one is made
/// as the first was.
fn set_while_running(lab: &Lab) -> Result<()> {
    let mut machine = Launch::private(lab).start_guest()?;
    for (path, property) in [
        ("/objects/cgs0", "x-require-guest-memfd"),
        ("/objects/ram0", "prefault"),
    ] {
        let arguments = json!({"path": path, "property": property, "value": true});
        let text = machine.qmp.refused("qom-set", arguments)?;
        ensure!(
            text.contains(&format!("cannot change property '{property}'")),
            "{property}: {text}"
        );
    }
    machine.qmp.call("object-add", object_add("ram1", RAM))?;
    machine.qmp.call("object-del", json!({"id": "ram1"}))?;
    machine.finish()
}

/// The guest shares what it runs on, and finds all else private, again after a reset.
fn initial_state_private(lab: &Lab) -> Result<()> {
    const OWN: u64 = 128 * PAGE;
    let mut machine = with_properties(lab, "initial-state=private")
        .with("-bios /guest/guest-private.bin -action reboot=reset")
        .start_guest()?;
    for boot in ["the start", "the reset"] {
        let info = machine.region("ram0")?;
        same(&format!("private after {boot}"), info.private, RAM - OWN)?;
        same_held(&info, 0)?;
        machine.check_zero(BASE, 8)?;
        machine.fill(BASE, 8, 7)?;
        let info = machine.region("ram0")?;
        same_held(&info, 8 * PAGE)?;
        ensure!(
            info.shared_held <= Some(OWN),
            "the shared store holds {:?} bytes, the guest shared {OWN}",
            info.shared_held
        );
        machine.convert(BASE + PAGE, 2, Shared)?;
        machine.check_zero(BASE + PAGE, 2)?;
        machine.fill(BASE + PAGE, 2, 8)?;
        machine.check(BASE, 1, 7)?;
        machine.check(BASE + 3 * PAGE, 5, 7)?;
        if boot == "the start" {
            machine.reset()?;
        }
    }
    machine.finish()
}

/// What the guest has made private is there before it is touched; what it shares is not.
fn prefault(lab: &Lab) -> Result<()> {
    let mut machine = ram0(lab, "prefault=on")?;
    same_held(&machine.region("ram0")?, 0)?;
    machine.convert(BASE, 600, Private)?;
    same_held(&machine.region("ram0")?, 600 * PAGE)?;
    machine.check_zero(BASE, 600)?;
    machine.fill(BASE, 600, 7)?;
    machine.check(BASE, 600, 7)?;
    let shared = machine.region("ram0")?.shared_held;
    machine.convert(BASE, 600, Shared)?;
    let info = machine.region("ram0")?;
    same_held(&info, 0)?;
    same("held by the shared store", info.shared_held, shared)?;
    machine.finish()
}

/// Both stores keep what they hold, and show it when the memory comes back.
fn discard_none(lab: &Lab) -> Result<()> {
    let mut machine = ram0(lab, "discard=none")?;
    machine.fill(BASE, 4, 7)?;
    machine.convert(BASE, 4, Private)?;
    machine.check_zero(BASE, 4)?;
    machine.fill(BASE, 4, 8)?;
    same(
        "held-twice",
        machine.region("ram0")?.held_twice,
        Some(4 * PAGE),
    )?;
    machine.convert(BASE, 4, Shared)?;
    machine.check(BASE, 4, 7)?;
    machine.convert(BASE, 4, Private)?;
    machine.check(BASE, 4, 8)?;
    machine.finish()
}

/// What the guest has is taken before it touches it, on whichever side it is.
fn prealloc(lab: &Lab) -> Result<()> {
    let mut machine = ram0(lab, "prealloc=on,prealloc-threads=2")?;
    same(
        "shared-held",
        machine.region("ram0")?.shared_held,
        Some(RAM),
    )?;
    machine.fill(BASE - PAGE, 6, 7)?;
    machine.convert(BASE, 4, Private)?;
    let info = machine.region("ram0")?;
    same("shared-held", info.shared_held, Some(RAM - 4 * PAGE))?;
    same_held(&info, 4 * PAGE)?;
    machine.check(BASE - PAGE, 1, 7)?;
    machine.check_zero(BASE, 4)?;
    machine.convert(BASE + PAGE, 2, Shared)?;
    let info = machine.region("ram0")?;
    same("shared-held", info.shared_held, Some(RAM - 2 * PAGE))?;
    same_held(&info, 2 * PAGE)?;
    machine.finish()
}

/// A conversion for which no memory is left fails for the guest, which goes on with what it has.
fn prealloc_without_memory(lab: &Lab) -> Result<()> {
    let pool = HugePages::reserve(RAM / HUGE)?;
    let mut machine = ram0(lab, "prealloc=on,hugetlb=on,hugetlbsize=2M")?;
    same("free huge pages", pool.free()?, 0)?;
    machine.convert(BASE, HUGE / PAGE, Private)?;
    machine.fill(BASE, 4, 7)?;
    same("free huge pages", pool.free()?, 1)?;
    pool.resize(RAM / HUGE - 1)?;
    let refused = machine.hypercall(BASE, HUGE / PAGE, Shared)?;
    same("what the guest got", refused, -i64::from(libc::ENOSPC))?;
    same("private", machine.region("ram0")?.private, HUGE)?;
    machine.check(BASE, 4, 7)?;
    pool.resize(RAM / HUGE)?;
    machine.convert(BASE, HUGE / PAGE, Shared)?;
    machine.check_zero(BASE, 4)?;
    machine.finish()
}

/// How much more memory of files each node has after `work` than before.
fn taken(machine: &mut Machine, work: impl FnOnce(&mut Machine) -> Result<()>) -> Result<[i64; 2]> {
    let figure = |node| -> Result<i64> { Ok(node_bytes(node, "FilePages")?.try_into()?) };
    let before = [figure(0)?, figure(1)?];
    work(machine)?;
    let after = [figure(0)?, figure(1)?];
    Ok([after[0] - before[0], after[1] - before[1]])
}

/// Private pages lie on the node that was asked for, preallocated or not.
fn host_nodes(lab: &Lab) -> Result<()> {
    const SIZE: u64 = 64 << 20;
    // The kernel's counts are a little late.
    const NEAR: i64 = 1 << 20;
    let near = |what: &str, found: [i64; 2], expected: [i64; 2]| {
        let is_near = |node: usize| found[node].abs_diff(expected[node]) < NEAR as u64;
        ensure!(
            is_near(0) && is_near(1),
            "{what}: expected {expected:?} bytes more on the nodes, found {found:?}"
        );
        println!("  {what}: {found:?}");
        Ok(())
    };
    let size = SIZE as i64;
    let mut machine = ram0(lab, "policy=bind,host-nodes=1")?;
    let found = taken(&mut machine, |m| m.convert(BASE, SIZE / PAGE, Private))?;
    near("made private", found, [0, size])?;
    same_held(&machine.region("ram0")?, SIZE)?;
    let found = taken(&mut machine, |m| m.fill(BASE, SIZE / PAGE, 7))?;
    near("touched", found, [0, 0])?;
    let found = taken(&mut machine, |m| m.convert(BASE, SIZE / PAGE, Shared))?;
    near("made shared", found, [0, -size])?;
    let found = taken(&mut machine, |m| m.fill(BASE, SIZE / PAGE, 8))?;
    near("touched while shared", found, [0, size])?;

    for (node, expected) in [(0, [size, 0]), (1, [0, size])] {
        let spare = json!({
            "qom-type": "memory-backend-private", "id": "spare", "size": SIZE, "prealloc": true,
            "initial-state": "private", "policy": "bind", "host-nodes": [node],
        });
        let found = taken(&mut machine, |m| m.qmp.call("object-add", spare).map(drop))?;
        near("preallocated", found, expected)?;
        let info = machine.region("spare")?;
        same("private-held", info.private_held, Some(SIZE))?;
        same("shared-held", info.shared_held, Some(0))?;
        machine.qmp.call("object-del", json!({"id": "spare"}))?;
    }
    machine.finish()
}

fn host_nodes_missing(lab: &Lab) -> Result<()> {
    let mut machine = ram0(lab, "merge=off")?;
    let spare = json!({
        "qom-type": "memory-backend-private", "id": "spare", "size": 1 << 20,
        "policy": "bind", "host-nodes": [9],
    });
    let text = machine.qmp.refused("object-add", spare)?;
    println!("  {text}");
    ensure!(
        text.contains("NUMA") || text.contains("mempolicy"),
        "the refusal names no node: {text}"
    );
    ensure!(machine.region("spare").is_err(), "the object is there");
    machine.finish()
}

/// The shared store's huge pages: taken on touch, given back when all of one is private.
fn hugetlb(lab: &Lab) -> Result<()> {
    const PAGES: u64 = HUGE / PAGE;
    // One more than the machine has: QEMU reserves a page for each of its own.
    let pool = HugePages::reserve(RAM / HUGE)?;
    let mut machine = ram0(lab, "hugetlb=on,hugetlbsize=2M")?;
    let at_start = pool.free()?;
    machine.fill(BASE, 3 * PAGES, 7)?;
    same("free with 3 touched", pool.free()?, at_start - 3)?;
    let held = machine.region("ram0")?.shared_held;
    same("shared-held", held, Some(RAM - pool.free()? * HUGE))?;

    // The last granule of a page is what counts, in whatever order they go.
    machine.convert(BASE + PAGES / 2 * PAGE, PAGES / 2, Private)?;
    machine.convert(BASE + PAGE, PAGES / 2 - 1, Private)?;
    same("free with one granule shared", pool.free()?, at_start - 3)?;
    machine.check(BASE, 1, 7)?;
    machine.check_zero(BASE + PAGE, PAGES - 1)?;
    machine.convert(BASE, 1, Private)?;
    same("free with one page private", pool.free()?, at_start - 2)?;
    // One request over the rest of two pages.
    machine.convert(BASE + (PAGES + 7) * PAGE, 1, Private)?;
    machine.convert(BASE + PAGES * PAGE, 2 * PAGES, Private)?;
    same("free with all private", pool.free()?, at_start)?;
    machine.fill(BASE, 3 * PAGES, 8)?;
    same(
        "private-held",
        machine.region("ram0")?.private_held,
        Some(3 * HUGE),
    )?;

    machine.convert(BASE + PAGES * PAGE, 1, Shared)?;
    machine.check_zero(BASE + PAGES * PAGE, 1)?;
    machine.fill(BASE + PAGES * PAGE, 1, 9)?;
    same("free with one granule back", pool.free()?, at_start - 1)?;
    machine.check(BASE + (PAGES - 1) * PAGE, 1, 8)?;
    machine.check(BASE + (PAGES + 1) * PAGE, 1, 8)?;

    // All but what the guest runs on, which is in the first page.
    machine.convert(HUGE, (RAM - HUGE) / PAGE, Private)?;
    same(
        "free with all but 2 MiB private",
        pool.free()?,
        RAM / HUGE - 1,
    )?;
    drop(machine);
    same("free without the machine", pool.free()?, RAM / HUGE)
}

/// Pages that the guest gives away are freed on either side, and come back as zeroes.
fn balloon(lab: &Lab) -> Result<()> {
    let mut machine = Launch::private(lab)
        .with(
            "-device virtio-balloon-pci,addr=4,free-page-reporting=on,disable-modern=on,\
             disable-legacy=off,iommu_platform=off",
        )
        .start_guest()?;
    machine.fill(BASE, 32, 7)?;
    machine.convert(BASE + 8 * PAGE, 16, Private)?;
    machine.fill(BASE + 8 * PAGE, 16, 8)?;
    let before = machine.region("ram0")?;
    same_held(&before, 16 * PAGE)?;
    for (command, first) in [("inflate", 4), ("report", 20)] {
        machine
            .ask_ok(&format!("{command} {:#x} 8", BASE + first * PAGE))
            .context(command)?;
    }
    let info = machine.region("ram0")?;
    same("private", info.private, 16 * PAGE)?;
    same_held(&info, 8 * PAGE)?;
    same(
        "shared-held",
        info.shared_held,
        before.shared_held.map(|held| held - 8 * PAGE),
    )?;
    machine.check(BASE, 4, 7)?;
    machine.check_zero(BASE + 4 * PAGE, 8)?;
    machine.check(BASE + 12 * PAGE, 8, 8)?;
    machine.check_zero(BASE + 20 * PAGE, 8)?;
    machine.check(BASE + 28 * PAGE, 4, 7)?;
    machine.finish()
}
