//! Memory that the host loses: this kernel is told that a page frame has gone bad, while a guest
//! uses it. Which frame that is nobody tells, least of all of private memory: it is found by what the
//! guest has written there.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::Lab;
use crate::host::HugePages;
use crate::machine::{Failure, Launch, Machine, OUR_GUEST, PAGE, PRIVATE, Side, pattern};
use crate::scenarios::{BASE, Scenario, listener, same, same_held, still_converts};
use Side::{Private, Shared};

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("memory-failure-private", |lab| told(lab, Private)),
        Scenario::new("memory-failure-shared", |lab| told(lab, Shared)),
        Scenario::new("memory-failure-private-untold", |lab| untold(lab, Private)),
        Scenario::new("memory-failure-shared-untold", |lab| untold(lab, Shared)),
        Scenario::new("memory-failure-converted", converted),
        Scenario::new("memory-failure-huge-page", huge_page),
    ]
}

/// The page that fails, the second of four.
const FAILED: u64 = BASE + PAGE;
/// The seed of what the guest has there.
const SEED: u64 = 0xbad;

/// The guest gets a machine check that names the page, and goes on; so does all else.
fn told(lab: &Lab, side: Side) -> Result<()> {
    let launch = Launch::private(lab).with("-device private-memory-testdev,id=l,memdev=ram0");
    let mut machine = prepared(launch, side)?;
    machine.ask_ok("machine-checks")?;
    let calls = listener(&mut machine, "populates")?;
    let mapped = listener(&mut machine, "mapped")?;
    // Once more, in what came in its place.
    for count in 1..=2 {
        machine.fill(FAILED, 1, SEED)?;
        fail_page(FAILED)?;
        machine.check_zero(FAILED, 1)?;
        let expected = format!("machine-check count={count} unclear=0 address={FAILED:#x}");
        same(
            "what the guest got",
            machine.ask("machine-check")?,
            expected,
        )?;
        let event = failure_event(&mut machine, "machine-check")?;
        same("the event", event, event_data(side, "machine-check"))?;
        let info = machine.region("ram0")?;
        same("memory-failures", info.memory_failures, count)?;
        same("last-failures", &info.last_failures[0], &recorded(side))?;
        if side == Private {
            same_held(&info, 4 * PAGE)?;
        }
    }
    let told = if side == Shared { 2 } else { 0 };
    let more = listener(&mut machine, "populates")? - calls;
    same("pages that the listener mapped anew", more, told)?;
    same("mapped", listener(&mut machine, "mapped")?, mapped)?;
    let info = machine.hmp("info private-memory")?;
    ensure!(info.contains("memory failures    2"), "{info}");
    others_kept(&mut machine)?;
    for to in [other(side), side] {
        machine.convert(FAILED, 1, to)?;
        machine.check_zero(FAILED, 1)?;
        machine.fill(FAILED, 1, 9)?;
        machine.check(FAILED, 1, 9)?;
    }
    others_kept(&mut machine)?;
    machine.convert(BASE, 4, Shared)?;
    still_converts(&mut machine)?;
    machine.finish()
}

/// A guest that has machine checks off does not run on with zeroes; its VM can be reset.
fn untold(lab: &Lab, side: Side) -> Result<()> {
    let launch = Launch::private(lab).with("-action reboot=reset");
    let mut machine = prepared(launch, side)?;
    machine.fill(FAILED, 1, SEED)?;
    fail_page(FAILED)?;
    stops(&mut machine)?;
    let expected = event_data(side, "stop");
    same("the event", failure_event(&mut machine, "stop")?, expected)?;
    let info = machine.region("ram0")?;
    same("last-failures", info.last_failures, vec![recorded(side)])?;
    reset(&mut machine)?;
    machine.check_zero(FAILED, 1)?;
    still_converts(&mut machine)?;
    let log = machine.finish_with_log()?;
    for reason in ["has failed; the VM stops and must be reset", "CR4.MCE"] {
        ensure!(log.contains(reason), "the log lacks '{reason}': {log}");
    }
    Ok(())
}

/// What nobody touches before it goes to the other side nobody misses. (The guest has machine checks
/// off, so that its VM would stop.)
fn converted(lab: &Lab) -> Result<()> {
    let mut machine = prepared(Launch::private(lab), Private)?;
    for side in [Private, Shared] {
        machine.convert(FAILED, 1, side)?;
        machine.fill(FAILED, 1, SEED)?;
        fail_page(FAILED)?;
        for to in [other(side), side] {
            machine.convert(FAILED, 1, to)?;
            machine.check_zero(FAILED, 1)?;
        }
    }
    others_kept(&mut machine)?;
    let info = machine.region("ram0")?;
    same("memory-failures", info.memory_failures, 0)?;
    same_held(&info, 3 * PAGE)?;
    machine.finish()
}

/// More is lost than a machine check names.
fn huge_page(lab: &Lab) -> Result<()> {
    const HUGE: u64 = 2 << 20;
    let pool = HugePages::reserve(130)?;
    let object = "id=ram0,size=256M,hugetlb=on,hugetlbsize=2M";
    let launch = Launch::kvm(lab)
        .with(&PRIVATE.replace("id=ram0,size=256M", object))
        .with(OUR_GUEST)
        .with("-action reboot=reset");
    let mut machine = prepared(launch, Shared)?;
    machine.ask_ok("machine-checks")?;
    machine.convert(BASE + 8 * PAGE, 1, Private)?;
    machine.fill(FAILED, 1, SEED)?;
    fail_page(FAILED)?;
    stops(&mut machine)?;
    let event = failure_event(&mut machine, "stop")?;
    same("what failed", &event["offset"], &json!(BASE))?;
    same("how much", &event["size"], &json!(HUGE))?;
    let info = machine.region("ram0")?;
    same("lost", info.last_failures[0].lost, HUGE - PAGE)?;
    reset(&mut machine)?;
    machine.check_zero(BASE, 16)?;
    still_converts(&mut machine)?;
    machine.finish()?;
    drop(pool);
    Ok(())
}

/// Our guest, with four pages on `side` and something in them.
fn prepared(launch: Launch, side: Side) -> Result<Machine> {
    let mut machine = launch.start_guest()?;
    machine.convert(BASE, 4, side)?;
    machine.fill(BASE, 4, 7)?;
    Ok(machine)
}

fn others_kept(machine: &mut Machine) -> Result<()> {
    machine.check(BASE, 1, 7)?;
    machine.check(BASE + 2 * PAGE, 2, 7)
}

fn other(side: Side) -> Side {
    match side {
        Private => Shared,
        Shared => Private,
    }
}

fn event_data(side: Side, action: &str) -> Value {
    json!({
        "id": "ram0", "offset": FAILED, "size": PAGE, "address": FAILED,
        "private": side == Private, "action": action,
    })
}

fn recorded(side: Side) -> Failure {
    Failure {
        offset: FAILED,
        size: PAGE,
        lost: PAGE,
        address: Some(FAILED),
        private: side == Private,
    }
}

/// The data of the event with this action. There may be others before: the kernel tells of shared
/// memory before the guest touches it, too.
fn failure_event(machine: &mut Machine, action: &str) -> Result<Value> {
    loop {
        let data = machine.qmp.event("PRIVATE_MEMORY_FAILURE")?;
        match data["action"].as_str() {
            Some(found) if found == action => return Ok(data),
            Some("ignore") => {}
            _ => bail!("a failure with action {action} is told as {data}"),
        }
    }
}

/// The guest touches what has failed, and its VM stops for good; QEMU does not.
fn stops(machine: &mut Machine) -> Result<()> {
    machine.send(&format!("check {FAILED:#x} 1 zero"))?;
    machine.qmp.event("STOP")?;
    let status = machine.qmp.call("query-status", json!({}))?;
    same(
        "the VM's state",
        &status["status"],
        &json!("internal-error"),
    )?;
    let text = machine.qmp.refused("cont", json!({}))?;
    ensure!(text.contains("Resetting"), "'cont' is refused with: {text}");
    Ok(())
}

fn reset(machine: &mut Machine) -> Result<()> {
    machine.qmp.call("system_reset", json!({}))?;
    machine.qmp.event("RESET")?;
    machine.qmp.call("cont", json!({}))?;
    machine.ready()
}

// ---- page frames ----

/// Bits of /proc/kpageflags, include/uapi/linux/kernel-page-flags.h.
const BUDDY: u64 = 1 << 10;
const ANON: u64 = 1 << 12;
const HWPOISON: u64 = 1 << 19;
const NOPAGE: u64 = 1 << 20;
const RESERVED: u64 = 1 << 32;

const INJECT: &str = "/sys/kernel/debug/hwpoison/corrupt-pfn";

/// Tells the kernel that the frame with the guest's page at `addr` has gone bad.
fn fail_page(addr: u64) -> Result<()> {
    let frame = find_frame(&pattern(addr, PAGE, SEED))?;
    // It may tell that it could not recover the page: for private memory, that is the VMM's part.
    let told = fs::write(INJECT, frame.to_string());
    let flags = page_flags(frame, 1)?;
    ensure!(
        flags[0] & HWPOISON != 0,
        "page frame {frame:#x} has not gone bad (flags {:#x}): {told:?}",
        flags[0]
    );
    Ok(())
}

/// The one frame that holds this; copies that processes such as this one have do not count.
fn find_frame(contents: &[u8]) -> Result<u64> {
    let memory = File::open("/dev/mem").context("/dev/mem")?;
    let mut found = Vec::new();
    let mut first = 0;
    loop {
        let flags = page_flags(first, 8192)?;
        if flags.is_empty() {
            break;
        }
        for (frame, flags) in (first..).zip(&flags) {
            if flags & (BUDDY | ANON | HWPOISON | NOPAGE | RESERVED) == 0
                && holds(&memory, frame, contents)
            {
                found.push(frame);
            }
        }
        first += flags.len() as u64;
    }
    match found[..] {
        [frame] => Ok(frame),
        _ => bail!("page frames with what the guest wrote: {found:x?}"),
    }
}

/// Most frames differ in the first word.
fn holds(memory: &File, frame: u64, contents: &[u8]) -> bool {
    let mut page = [0; PAGE as usize];
    [8, PAGE as usize].into_iter().all(|len| {
        let read = memory.read_exact_at(&mut page[..len], frame * PAGE);
        read.is_ok() && page[..len] == contents[..len]
    })
}

/// The flags of so many frames, or as many as there are.
fn page_flags(first: u64, count: usize) -> Result<Vec<u64>> {
    const FILE: &str = "/proc/kpageflags";
    let mut bytes = vec![0; 8 * count];
    let file = File::open(FILE).context(FILE)?;
    let len = file.read_at(&mut bytes, 8 * first).context(FILE)?;
    let words = bytes[..len].chunks_exact(8);
    Ok(words
        .map(|word| u64::from_ne_bytes(word.try_into().unwrap_or_default()))
        .collect())
}
