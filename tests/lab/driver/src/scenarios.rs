//! The lab's tests. A scenario is a function that starts the machines it needs and gives an error
//! that says what differs; command lines that QEMU must refuse are rows of a table in `refusals`.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::libc;
use serde_json::{Value, json};

use crate::machine::{
    Extent, Launch, Machine, OUR_GUEST, PAGE, PRIVATE, PrivateMemory, Side, convert_arguments,
    joined, pattern,
};
use crate::qmp::DEADLINE;
use crate::refusals::{REFUSALS, Refusal};
use crate::{
    Lab, access, assigned, bench, cgroup, death, demo, docs, failure, host, hostile, launch,
    lifecycle, linux, old_memory, properties,
};
use Side::{Private, Shared};

pub struct Scenario {
    pub name: &'static str,
    /// Whether there must be a KVM with software-protected VMs.
    pub needs_private: bool,
    /// A type of guest that only one QEMU line has, and that line.
    pub needs_guest: Option<(&'static str, &'static str)>,
    /// Whether the kernel must know how to be a private guest.
    pub needs_private_linux: bool,
    /// The oldest kernel that will do.
    pub needs_kernel: (u32, u32),
    /// Whether there must be a device that can be assigned.
    pub needs_assignable: bool,
    test: Test,
}

type Function = fn(&Lab) -> Result<()>;

enum Test {
    Function(Function),
    Refusal(&'static Refusal),
}

impl Scenario {
    pub const fn new(name: &'static str, function: Function) -> Scenario {
        Scenario {
            name,
            needs_private: true,
            needs_guest: None,
            needs_private_linux: false,
            needs_kernel: (0, 0),
            needs_assignable: false,
            test: Test::Function(function),
        }
    }

    /// For a type of guest that only this line has.
    pub const fn guest(
        name: &'static str,
        guest: &'static str,
        line: &'static str,
        function: Function,
    ) -> Scenario {
        Scenario {
            needs_guest: Some((guest, line)),
            ..Scenario::new(name, function)
        }
    }

    /// With a Linux whose RAM is private.
    pub const fn private_linux(name: &'static str, function: Function) -> Scenario {
        Scenario {
            needs_private_linux: true,
            ..Scenario::new(name, function)
        }
    }

    /// From this kernel on.
    pub const fn since(self, needs_kernel: (u32, u32)) -> Scenario {
        Scenario {
            needs_kernel,
            ..self
        }
    }

    /// With a device that is assigned to the guest.
    pub const fn assigned(name: &'static str, function: Function) -> Scenario {
        Scenario {
            needs_assignable: true,
            ..Scenario::new(name, function)
        }
    }

    /// In which the private Linux runs, too.
    pub fn beside_linux(self) -> Scenario {
        Scenario {
            needs_private_linux: true,
            ..self
        }
    }

    /// For any KVM.
    pub const fn plain(name: &'static str, function: Function) -> Scenario {
        Scenario {
            needs_private: false,
            ..Scenario::new(name, function)
        }
    }

    pub fn run(&self, lab: &Lab) -> Result<()> {
        match self.test {
            Test::Function(function) => function(lab),
            Test::Refusal(refusal) => refusal.check(lab),
        }
    }
}

pub fn all() -> Vec<Scenario> {
    let refusals = REFUSALS.iter().map(|refusal| Scenario {
        name: refusal.name,
        needs_private: true,
        needs_guest: None,
        needs_private_linux: false,
        needs_kernel: (0, 0),
        needs_assignable: false,
        test: Test::Refusal(refusal),
    });
    let mut list = vec![
        Scenario::plain("capabilities", capabilities),
        Scenario::plain("two-nodes", two_nodes),
        Scenario::plain("huge-pages", huge_pages),
        Scenario::plain("ordinary-machine", ordinary_machine),
        Scenario::new("smm-unspecified", smm_unspecified),
        Scenario::new("guest-converts", guest_converts),
        Scenario::new("operator-converts", operator_converts),
        Scenario::new("accounting", accounting),
        Scenario::new("pmemsave", pmemsave),
        Scenario::new("dump-leaves-private-out", dump_leaves_private_out),
        Scenario::new("listener-refuses", listener_refuses),
        Scenario::new("hmp-info", hmp_info),
        Scenario::new("code-in-private-memory", code_in_private_memory),
        Scenario::new("events-before-exits", events_before_exits),
        Scenario::new("two-objects-numa", two_objects_numa),
        Scenario::new("across-the-pci-hole", across_the_pci_hole),
        Scenario::new("two-vcpus-apart", two_vcpus_apart),
        Scenario::new("two-vcpus-same-pages", two_vcpus_same_pages),
        Scenario::new("one-converts-one-touches", one_converts_one_touches),
        Scenario::new("operator-against-guest", operator_against_guest),
        Scenario::new("random-conversions", random_conversions),
        Scenario::new("slots-keep-state", slots_keep_state),
        Scenario::new("slots-change-while-converting", slots_change),
        Scenario::new("reset-makes-shared", reset_makes_shared),
        Scenario::new("wake-up-keeps-memory", wake_up_keeps_memory),
        Scenario::new("stops-keep-memory", stops_keep_memory),
        Scenario::new("dirty-rate-does-not-abort", dirty_rate),
        Scenario::new("bad-requests-qmp", bad_requests_qmp),
        Scenario::new("bad-requests-guest", bad_requests_guest),
        Scenario::new("object-add-del", object_add_del),
        Scenario::new("object-add-dimm", object_add_dimm),
        Scenario::new("dimm-keeps-state", dimm_keeps_state),
        Scenario::new("object-in-use", object_in_use),
        Scenario::new("fd-limit", fd_limit),
        Scenario::new("no-memory", no_memory),
        Scenario::new("object-too-large", object_too_large),
        Scenario::new("linux-guest", linux_guest),
    ];
    list.extend(access::all());
    list.extend(properties::all());
    list.extend(assigned::all());
    list.extend(old_memory::all());
    list.extend(cgroup::all());
    list.extend(launch::all());
    list.extend(failure::all());
    list.extend(bench::all());
    list.extend(hostile::all());
    list.extend(linux::all());
    list.extend(lifecycle::all());
    list.extend(death::all());
    list.extend(refusals);
    list.push(Scenario::new("documented-commands", docs::run));
    list.push(Scenario::new("demo", demo::run));
    list
}

/// Where the tests convert: far from the guest's own data, inside every machine's memory.
pub const BASE: u64 = 32 << 20;
pub const RAM: u64 = 256 << 20;
const ROM: u64 = 0xffff_0000;
const ROM_ALIAS: u64 = 0xf_0000;
const LAPIC: u64 = 0xfee0_0000;
const HOLE: u64 = 1 << 30;

pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Result<()> {
    ensure!(
        found == expected,
        "{what}: expected {expected:?}, found {found:?}"
    );
    Ok(())
}

/// What a guest can have printed again and again is printed so often at once, and once a minute.
const MESSAGES_AT_ONCE: u64 = 10;

/// That many lines of `log` have `message` at most, for a machine that has run since `start`; gives
/// how many. Each but those at once may be preceded by one that tells of suppressed ones.
pub fn few_lines(log: &str, message: &str, start: Instant) -> Result<u64> {
    let has = |what: &str| log.lines().filter(|line| line.contains(what)).count() as u64;
    let minutes = start.elapsed().as_secs() / 60;
    let (lines, told) = (
        has(message),
        has("messages like the next one were suppressed"),
    );
    println!("  {lines} lines have '{message}'");
    ensure!(
        lines <= MESSAGES_AT_ONCE + minutes && told <= minutes,
        "after {minutes} minutes, {lines} lines have '{message}', {told} tell of suppressed ones"
    );
    Ok(lines)
}

/// What `region` says is what must be held: nothing twice, private pages all touched.
pub fn same_held(info: &PrivateMemory, private_held: u64) -> Result<()> {
    same("private-held", info.private_held, Some(private_held))?;
    same("held-twice", info.held_twice, Some(0))
}

fn capabilities(lab: &Lab) -> Result<()> {
    ensure!(
        lab.kvm.has_private_memory(),
        "the lab's kernel lacks what it is there for: {}",
        lab.kvm
    );
    Ok(())
}

/// What tests of memory policies need: two nodes with memory, and counts that tell them apart.
fn two_nodes(_: &Lab) -> Result<()> {
    const FILE: &str = "/tmp/on-one-node";
    const SIZE: u64 = 16 << 20;
    for (node, least) in [(0, 1024 << 20), (1, 384 << 20)] {
        let total = host::node_bytes(node, "MemTotal")?;
        ensure!(total >= least, "node {node} has {total} bytes of memory");
    }
    for node in [1, 0] {
        let before = host::node_bytes(node, "FilePages")?;
        host::on_node(node, || fs::write(FILE, vec![1; SIZE as usize]))??;
        let taken = host::node_bytes(node, "FilePages")?.saturating_sub(before);
        fs::remove_file(FILE)?;
        ensure!(
            taken.abs_diff(SIZE) < SIZE / 16,
            "a file of {SIZE} bytes on node {node} took {taken} bytes there"
        );
    }
    Ok(())
}

fn huge_pages(_: &Lab) -> Result<()> {
    let pool = host::HugePages::reserve(16)?;
    same("free huge pages", pool.free()?, 16)
}

/// The patched QEMU without any private memory, for comparison: it must work as ever.
fn ordinary_machine(lab: &Lab) -> Result<()> {
    let mut machine = Launch::kvm(lab)
        .with("-m 256M -M q35,smm=off")
        .with(OUR_GUEST)
        .start_guest()?;
    machine.fill(BASE, 4, 7)?;
    machine.check(BASE, 4, 7)?;
    machine.check_zero(BASE + 4 * PAGE, 1)?;
    let ret = machine.hypercall(BASE, 1, Private)?;
    ensure!(
        ret < 0,
        "a machine without private memory granted a conversion ({ret})"
    );
    let bytes = machine.pmemsave(BASE, PAGE)?.map_err(anyhow::Error::msg)?;
    ensure!(
        bytes == pattern(BASE, PAGE, 7),
        "pmemsave did not give the guest's pattern"
    );
    machine.finish()
}

/// Without a word on SMM, QEMU leaves it off rather than give what cannot work.
fn smm_unspecified(lab: &Lab) -> Result<()> {
    let mut machine = Launch::kvm(lab)
        .with(&PRIVATE.replace("smm=off,", ""))
        .with(OUR_GUEST)
        .start_guest()?;
    let counts = machine.ask_counts(&format!("churn {BASE:#x} 100 20 1"))?;
    no_errors(&counts, 20)?;
    machine.finish()
}

// ---- conversions ----

fn guest_converts(lab: &Lab) -> Result<()> {
    let mut machine = Launch::private(lab).start_guest()?;
    machine.fill(BASE, 3, 7)?;
    machine.convert(BASE + PAGE, 1, Private)?;
    machine.check(BASE, 1, 7)?;
    machine.check_zero(BASE + PAGE, 1)?;
    machine.check(BASE + 2 * PAGE, 1, 7)?;
    machine.fill(BASE + PAGE, 1, 8)?;
    same("private", machine.region("ram0")?.private, PAGE)?;
    // A request for what is already so changes nothing, contents included.
    machine.convert(BASE + PAGE, 1, Private)?;
    machine.check(BASE + PAGE, 1, 8)?;
    machine.convert(BASE, 3, Shared)?;
    machine.check(BASE, 1, 7)?;
    machine.check_zero(BASE + PAGE, 1)?;
    machine.check(BASE + 2 * PAGE, 1, 7)?;
    same("private", machine.region("ram0")?.private, 0)?;
    let counts = machine.ask_counts(&format!("churn {BASE:#x} 300 200 1"))?;
    no_errors(&counts, 200)?;
    machine.finish()
}

/// The machine goes on: its guest converts pages and finds what it should.
pub fn still_converts(machine: &mut Machine) -> Result<()> {
    no_errors(
        &machine.ask_counts(&format!("churn {BASE:#x} 100 20 1"))?,
        20,
    )
}

/// The guest did `conversions`, none failed, all contents were right.
pub fn no_errors(counts: &HashMap<String, u64>, conversions: u64) -> Result<()> {
    let count = |name: &str| counts.get(name).copied();
    same("contents that are wrong", count("errors"), Some(0))?;
    same("conversions refused to the guest", count("failed"), Some(0))?;
    same(
        "conversions by the guest",
        count("conversions"),
        Some(conversions),
    )
}

fn operator_converts(lab: &Lab) -> Result<()> {
    let mut machine = Launch::private(lab).start_guest()?;
    machine.fill(BASE - PAGE, 6, 7)?;
    machine.operator_convert(BASE, 4 * PAGE, Private)?;
    machine.check(BASE - PAGE, 1, 7)?;
    machine.check_zero(BASE, 4)?;
    machine.check(BASE + 4 * PAGE, 1, 7)?;
    machine.fill(BASE, 4, 8)?;
    let info = machine.region("ram0")?;
    same("private", info.private, 4 * PAGE)?;
    same("shared", info.shared, RAM - 4 * PAGE)?;
    same("conversions", info.conversions, 1)?;
    same_held(&info, 4 * PAGE)?;
    machine.operator_convert(BASE, 4 * PAGE, Shared)?;
    machine.check_zero(BASE, 4)?;
    let info = machine.region("ram0")?;
    same("private", info.private, 0)?;
    same("conversions", info.conversions, 2)?;
    same("failed-conversions", info.failed_conversions, 0)?;
    same_held(&info, 0)?;
    machine.finish()
}

/// KVM handles what it intercepts of code that it cannot read: it takes from the CPU where the next
/// instruction is, and which bytes an access to a device has.
fn code_in_private_memory(lab: &Lab) -> Result<()> {
    const PAGES: u64 = 258;
    const STEPS: &[&str] = &[
        "cpuid",
        "rdmsr",
        "wrmsr",
        "pio",
        "hypercall",
        "lapic",
        "hpet",
        "across-pages",
        "cr4",
        "dr",
    ];
    let mut machine = Launch::private(lab).start_guest()?;
    machine.convert(BASE, PAGES, Private)?;
    for step in STEPS {
        machine
            .ask_ok(&format!("run-copy {BASE:#x} {step}"))
            .with_context(|| format!("the step {step}"))?;
        same("private", machine.region("ram0")?.private, PAGES * PAGE)?;
    }
    machine.finish()
}

/// The guest handles exceptions and interrupts of all kinds by itself, some of them on a stack that
/// is not there yet; what it does next is served. The emulated CPU once took that for an access
/// while an event is delivered.
fn events_before_exits(lab: &Lab) -> Result<()> {
    const PAGES: u64 = 260;
    let mut machine = Launch::private(lab).start_guest()?;
    machine.convert(BASE, PAGES, Private)?;
    same(
        "reply",
        machine.ask(&format!("events {BASE:#x}"))?.as_str(),
        "events done=130",
    )?;
    machine.finish()
}

fn accounting(lab: &Lab) -> Result<()> {
    let mut machine = Launch::private(lab).start_guest()?;
    machine.fill(BASE, 64, 7)?;
    let before = machine.region("ram0")?;
    same("agent", before.agent.as_str(), "sw-protected")?;
    same("size", before.size, RAM)?;
    same("granule", before.granule, PAGE)?;
    same(
        "shared-held",
        before.shared_held,
        Some(shared_store_blocks(&machine, &before)?),
    )?;
    same_held(&before, 0)?;

    machine.convert(BASE, 64, Private)?;
    let empty = machine.region("ram0")?;
    same("private", empty.private, 64 * PAGE)?;
    same(
        "private and shared together",
        empty.private + empty.shared,
        RAM,
    )?;
    same_held(&empty, 0)?;
    same(
        "shared-held",
        empty.shared_held,
        Some(shared_store_blocks(&machine, &empty)?),
    )?;
    same(
        "shared-held after the conversion",
        empty.shared_held,
        before.shared_held.map(|held| held - 64 * PAGE),
    )?;

    machine.fill(BASE + 5 * PAGE, 10, 8)?;
    let touched = machine.region("ram0")?;
    same_held(&touched, 10 * PAGE)?;
    same("shared-held", touched.shared_held, empty.shared_held)?;

    machine.convert(BASE, 8, Shared)?;
    same_held(&machine.region("ram0")?, 7 * PAGE)?;
    machine.convert(BASE, 64, Shared)?;
    let after = machine.region("ram0")?;
    same("private", after.private, 0)?;
    same_held(&after, 0)?;
    machine.check_zero(BASE, 64)?;
    machine.finish()
}

/// The kernel's count for the shared store, past QEMU.
fn shared_store_blocks(machine: &Machine, info: &PrivateMemory) -> Result<u64> {
    let path = format!("/proc/{}/fd/{}", machine.pid(), info.shared_fd);
    Ok(fs::metadata(&path).context(path)?.blocks() * 512)
}

fn pmemsave(lab: &Lab) -> Result<()> {
    let mut machine = Launch::private(lab).start_guest()?;
    machine.convert(BASE + PAGE, 1, Private)?;
    machine.fill(BASE, 3, 7)?;
    let bytes = machine.pmemsave(BASE, PAGE)?.map_err(anyhow::Error::msg)?;
    ensure!(
        bytes == pattern(BASE, PAGE, 7),
        "pmemsave of a shared page did not give the guest's pattern"
    );
    for (addr, size) in [
        (BASE + PAGE, PAGE),
        (BASE, 3 * PAGE),
        (BASE + 2 * PAGE - 1, 2),
    ] {
        let Err(text) = machine.pmemsave(addr, size)? else {
            anyhow::bail!(
                "pmemsave of {size} bytes at {addr:#x} was granted though a page there is private"
            );
        };
        let page = format!("0x{:x}", (BASE + PAGE) / PAGE);
        ensure!(
            text.contains(&page) && text.contains("is private: the host cannot read it"),
            "the refusal of pmemsave names no address in the private page: {text}"
        );
    }
    machine.check(BASE, 3, 7)?;
    machine.finish()
}

/// A dump has no private page, and none is taken for it.
fn dump_leaves_private_out(lab: &Lab) -> Result<()> {
    const FILE: &str = "/tmp/guest.dump";
    let mut machine = Launch::private(lab).start_guest()?;
    machine.convert(0x100_0000, (RAM - 0x100_0000) / PAGE, Private)?;
    machine.fill(BASE, 8, 7)?;
    machine.convert(BASE + 4 * PAGE, 1, Shared)?;
    machine.fill(BASE + 4 * PAGE, 1, 8)?;
    let arguments = json!({ "paging": false, "protocol": format!("file:{FILE}") });
    machine.qmp.call("dump-guest-memory", arguments)?;
    let dump = fs::read(FILE)?;
    fs::remove_file(FILE)?;
    ensure!(
        dump.len() < 0x200_0000,
        "a dump of 16 MiB of shared memory has {} bytes",
        dump.len()
    );
    let words = || dump.windows(64).step_by(4);
    let has = |page: Vec<u8>| words().any(|bytes| bytes == &page[..64]);
    ensure!(
        has(pattern(BASE + 4 * PAGE, PAGE, 8)),
        "the dump lacks a shared page"
    );
    ensure!(!has(pattern(BASE, PAGE, 7)), "the dump has a private page");
    same_held(&machine.region("ram0")?, 7 * PAGE)?;
    machine.check(BASE, 4, 7)?;
    machine.finish()
}

/// The guest is told, and state, contents and mappings are as they were.
fn listener_refuses(lab: &Lab) -> Result<()> {
    let mut machine = Launch::private(lab)
        .with("-device private-memory-testdev,id=l,memdev=ram0")
        .start_guest()?;
    same("mapped", listener(&mut machine, "mapped")?, RAM)?;
    for run in 0..4 {
        machine.convert(BASE + 4 * run * PAGE, 2, Private)?;
        machine.fill(BASE + 4 * run * PAGE, 2, run + 1)?;
    }
    same("mapped", listener(&mut machine, "mapped")?, RAM - 8 * PAGE)?;
    let third = listener(&mut machine, "populates")? + 3;
    let property = json!({ "path": "/machine/peripheral/l", "property": "refuse", "value": third });
    machine.qmp.call("qom-set", property)?;
    let refused = machine.hypercall(BASE, 16, Shared)?;
    same("what the guest got", refused, -i64::from(libc::ENOSPC))?;
    same("private", machine.region("ram0")?.private, 8 * PAGE)?;
    same("mapped", listener(&mut machine, "mapped")?, RAM - 8 * PAGE)?;
    for run in 0..4 {
        machine.check(BASE + 4 * run * PAGE, 2, run + 1)?;
    }
    machine.convert(BASE, 16, Shared)?;
    machine.check_zero(BASE, 2)?;
    same("mapped", listener(&mut machine, "mapped")?, RAM)?;
    machine.finish()
}

/// A figure of the listener `l`.
pub fn listener(machine: &mut Machine, name: &str) -> Result<u64> {
    let property = json!({ "path": "/machine/peripheral/l", "property": name });
    let value = machine.qmp.call("qom-get", property)?;
    value.as_u64().context("it is no number")
}

fn hmp_info(lab: &Lab) -> Result<()> {
    let mut machine = Launch::private(lab).start_guest()?;
    machine.convert(BASE, 16, Private)?;
    let text = machine.hmp("info private-memory")?;
    let picture = machine.region("ram0")?.picture;
    for needle in ["ram0", "sw-protected", &picture] {
        ensure!(
            text.contains(needle),
            "'info private-memory' does not contain '{needle}': {text}"
        );
    }
    machine.convert(0x100_0000, (RAM - 0x100_0000) / PAGE, Private)?;
    ensure!(
        machine.region("ram0")?.picture != picture,
        "the picture did not change: {picture}"
    );
    machine.finish()
}

fn two_objects_numa(lab: &Lab) -> Result<()> {
    let border = 128 << 20;
    let mut machine = Launch::kvm(lab)
        .with(
            "-m 256M -object sw-protected-guest,id=cgs0 -machine q35,smm=off,confidential-guest-support=cgs0 \
             -object memory-backend-private,id=ram0,size=128M -object memory-backend-private,id=ram1,size=128M \
             -numa node,memdev=ram0 -numa node,memdev=ram1",
        )
        .with(OUR_GUEST)
        .start_guest()?;
    for base in [BASE, border + BASE] {
        no_errors(
            &machine.ask_counts(&format!("churn {base:#x} 200 60 5"))?,
            60,
        )?;
        machine.convert(base, 200, Shared)?;
    }
    machine.fill(border - 4 * PAGE, 8, 7)?;
    machine.convert(border - 3 * PAGE, 5, Private)?;
    same("private of ram0", machine.region("ram0")?.private, 3 * PAGE)?;
    same("private of ram1", machine.region("ram1")?.private, 2 * PAGE)?;
    machine.check(border - 4 * PAGE, 1, 7)?;
    machine.check_zero(border - 3 * PAGE, 5)?;
    machine.check(border + 2 * PAGE, 2, 7)?;
    machine.fill(border - 3 * PAGE, 5, 8)?;
    machine.check(border - 3 * PAGE, 5, 8)?;
    same_held(&machine.region("ram0")?, 3 * PAGE)?;
    same_held(&machine.region("ram1")?, 2 * PAGE)?;
    machine.operator_convert(border - 3 * PAGE, 5 * PAGE, Shared)?;
    machine.check_zero(border - 3 * PAGE, 5)?;
    for id in ["ram0", "ram1"] {
        let info = machine.region(id)?;
        same(id, info.private, 0)?;
        same_held(&info, 0)?;
    }
    machine.finish()
}

/// One request over the end of low RAM, the hole of 2 GiB and the start of high RAM. To become private
/// is refused as a whole, although what lies below the hole would be a step of its own.
fn across_the_pci_hole(lab: &Lab) -> Result<()> {
    const LOW_END: u64 = 2 << 30;
    const HIGH: u64 = 4 << 30;
    const HIGH_SIZE: u64 = 1 << 30;
    /// What the library makes private in one step.
    const STEP: u64 = 1 << 30;
    const PAGES: u64 = 8;
    let mut machine = Launch::kvm(lab)
        .with(&PRIVATE.replace("256M", "3G"))
        .with(OUR_GUEST)
        .start_guest()?;
    same(
        "the last two slots",
        slot_bounds(&mut machine)?.last_chunk(),
        Some(&[(1 << 20, LOW_END), (HIGH, HIGH + HIGH_SIZE)]),
    )?;
    let low = LOW_END - STEP;
    let across = (HIGH - low) / PAGE + PAGES;
    let ends = [low, LOW_END - PAGES * PAGE, HIGH];
    for base in [LOW_END - 300 * PAGE, HIGH] {
        no_errors(
            &machine.ask_counts(&format!("churn {base:#x} 300 60 5"))?,
            60,
        )?;
    }
    for base in ends {
        machine.convert(base, PAGES, Private)?;
        machine.fill(base, PAGES, 8)?;
    }
    machine.convert(low, across, Shared)?;
    for base in ends {
        machine.check_zero(base, PAGES)?;
        machine.fill(base, PAGES, 9)?;
    }
    machine.convert(HIGH, 300, Shared)?;
    let info = machine.region("ram0")?;
    same("private", info.private, 0)?;
    same_held(&info, 0)?;

    let ret = machine.hypercall(low, across, Private)?;
    ensure!(ret < 0, "the PCI hole was made private ({ret})");
    let all = Extent {
        offset: 0,
        size: info.size,
        private: false,
    };
    same("extents", machine.extents("ram0")?, vec![all])?;
    for base in ends {
        machine.check(base, PAGES, 9)?;
    }
    machine.finish()
}

fn two_vcpus(lab: &Lab) -> Result<Machine> {
    let mut machine = Launch::private(lab).start_guest()?;
    same(
        "the guest's reply to smp",
        machine.ask("smp")?.as_str(),
        "cpus 2",
    )?;
    Ok(machine)
}

/// Each vCPU has its own pages; the border between them is no multiple of 64 pages.
fn two_vcpus_apart(lab: &Lab) -> Result<()> {
    let mut machine = two_vcpus(lab)?;
    let counts = machine.ask_counts(&format!("disjoint {BASE:#x} 601 200 1"))?;
    no_errors(&counts, 400)?;
    let info = machine.region("ram0")?;
    same("conversions", info.conversions, 400)?;
    same(
        "private pages",
        Some(info.private / PAGE),
        counts.get("private_pages").copied(),
    )?;
    same_held(&info, info.private)?;
    machine.finish()
}

fn two_vcpus_same_pages(lab: &Lab) -> Result<()> {
    let mut machine = two_vcpus(lab)?;
    // The guest's two last requests turn the whole range private and back.
    let counts = machine.ask_counts(&format!("overlap {BASE:#x} 96 250 1"))?;
    no_errors(&counts, 500)?;
    let info = machine.region("ram0")?;
    same("conversions", info.conversions, 502)?;
    same("private", info.private, 0)?;
    same_held(&info, 0)?;
    machine.finish()
}

/// What the guest was told is converted stays so, whatever another vCPU does to it meanwhile.
fn one_converts_one_touches(lab: &Lab) -> Result<()> {
    let mut machine = two_vcpus(lab)?;
    let counts = machine.ask_counts(&format!("chase {BASE:#x} 8 300 1"))?;
    no_errors(&counts, 600)?;
    let info = machine.region("ram0")?;
    same("private", info.private, 0)?;
    same("conversions", info.conversions, 600)?;
    // KVM may have allocated a page for a touch that a conversion then overtook: such a page stays
    // where it is until the range changes side again.
    machine.convert(BASE, 8, Private)?;
    machine.convert(BASE, 8, Shared)?;
    same_held(&machine.region("ram0")?, 0)?;
    machine.finish()
}

/// The operator converts pages next to those that both vCPUs churn at the same time.
fn operator_against_guest(lab: &Lab) -> Result<()> {
    let mut machine = two_vcpus(lab)?;
    let (page, pages) = (BASE + 601 * PAGE, 7);
    machine.fill(page, pages, 7)?;
    machine.send(&format!("disjoint {BASE:#x} 601 150 2"))?;
    for _ in 0..25 {
        machine.operator_convert(page, pages * PAGE, Private)?;
        machine.operator_convert(page, pages * PAGE, Shared)?;
    }
    let counts = machine.counts("disjoint")?;
    no_errors(&counts, 300)?;
    machine.check_zero(page, pages)?;
    let info = machine.region("ram0")?;
    same("conversions", info.conversions, 350)?;
    same(
        "private pages",
        Some(info.private / PAGE),
        counts.get("private_pages").copied(),
    )?;
    same_held(&info, info.private)?;
    machine.finish()
}

/// However two vCPUs convert their halves of some memory: the guest, the library and the kernel agree
/// on what is private and what holds memory, and no content is wrong.
fn random_conversions(lab: &Lab) -> Result<()> {
    const PAGES: u64 = 4096;
    const CONVERSIONS: u64 = 100_000;
    const ROUNDS: u64 = 10;
    let mut machine = two_vcpus(lab)?;
    machine.ask_ok(&format!("halves {BASE:#x} {PAGES} 1"))?;
    let filled = machine.region("ram0")?.shared_held;
    let mix = format!("mix {}", CONVERSIONS / ROUNDS / 2);
    for round in 1..=ROUNDS {
        machine.send(&mix)?;
        // A list that is made meanwhile is whole and comes to an end, too.
        machine.extents("ram0")?;
        let counts = machine.counts(&mix)?;
        no_errors(&counts, round * CONVERSIONS / ROUNDS)?;
        all_agree(&mut machine, &counts, PAGES, filled)
            .with_context(|| format!("round {round}"))?;
    }
    let counts = machine.ask_counts("settle")?;
    no_errors(&counts, CONVERSIONS)?;
    all_agree(&mut machine, &counts, PAGES, filled)?;
    let info = machine.region("ram0")?;
    same("conversions", info.conversions, CONVERSIONS)?;
    same("failed-conversions", info.failed_conversions, 0)?;
    machine.finish()
}

/// `filled` is what the shared store held when all `pages` were shared and touched.
fn all_agree(
    machine: &mut Machine,
    counts: &HashMap<String, u64>,
    pages: u64,
    filled: Option<u64>,
) -> Result<()> {
    let shared = |offset, end| Extent {
        offset,
        size: end - offset,
        private: false,
    };
    let mut expected = vec![shared(0, BASE)];
    expected.extend(machine.guest_map(BASE)?);
    expected.push(shared(BASE + pages * PAGE, RAM));
    same_extents(&machine.extents("ram0")?, &joined(expected))?;
    let info = machine.region("ram0")?;
    same("private", info.private, counts["private_pages"] * PAGE)?;
    same_held(&info, counts["private_touched"] * PAGE)?;
    let gone = (pages - counts["shared_touched"]) * PAGE;
    same(
        "shared-held, with what is gone",
        info.shared_held.map(|held| held + gone),
        filled,
    )
}

/// Names the first that differs instead of all.
pub fn same_extents(found: &[Extent], expected: &[Extent]) -> Result<()> {
    let differ = found.iter().zip(expected).find(|(a, b)| a != b);
    ensure!(
        differ.is_none(),
        "an extent, and what it should be: {differ:x?}"
    );
    same("number of extents", found.len(), expected.len())
}

// ---- slots that come and go ----

/// The q35 host bridge's registers for 768 to 960 KiB, two times 16 KiB each. After a reset there is
/// ROM up to 896 KiB; with 0x33 there is RAM.
const PAMS: std::ops::RangeInclusive<u64> = 0x91..=0x96;
pub const PAM: u64 = 0x92;
pub const PAM_RAM: u64 = 0xc_8000;
pub const ALL_RAM: u64 = 0x33;
const LOW_END: u64 = 0xc_0000;

pub fn pam(machine: &mut Machine, register: u64, value: u64) -> Result<()> {
    machine.ask_ok(&format!("pam {register:#x} {value:#x}"))
}

/// From where to where the guest sees `ram0`.
fn slot_bounds(machine: &mut Machine) -> Result<Vec<(u64, u64)>> {
    let slots = machine.region("ram0")?.slots;
    Ok(slots
        .iter()
        .map(|slot| (slot.address, slot.address + slot.size))
        .collect())
}

/// Pages keep side and contents while the guest cannot see them, and in whichever slot they come back.
fn slots_keep_state(lab: &Lab) -> Result<()> {
    let mut machine = Launch::private(lab).start_guest()?;
    let hidden = vec![(0, LOW_END), (0xe_0000, ROM_ALIAS), (1 << 20, RAM)];
    same("slots", slot_bounds(&mut machine)?, hidden.clone())?;
    pam(&mut machine, PAM, ALL_RAM)?;
    let mut seen = hidden.clone();
    seen.insert(1, (PAM_RAM, PAM_RAM + 0x8000));
    same("slots", slot_bounds(&mut machine)?, seen)?;

    machine.fill(PAM_RAM, 8, 7)?;
    machine.convert(PAM_RAM + PAGE, 3, Private)?;
    machine.fill(PAM_RAM + PAGE, 2, 8)?;
    machine.convert(BASE, 4, Private)?;
    machine.fill(BASE, 4, 9)?;
    same_held(&machine.region("ram0")?, 6 * PAGE)?;

    pam(&mut machine, PAM, 0)?;
    same("slots", slot_bounds(&mut machine)?, hidden)?;
    let info = machine.region("ram0")?;
    same("private while hidden", info.private, 7 * PAGE)?;
    same_held(&info, 6 * PAGE)?;
    machine.check_zero(PAM_RAM, 8)?;
    let ret = machine.hypercall(PAM_RAM, 8, Private)?;
    ensure!(ret < 0, "what is no RAM now was made private ({ret})");
    machine.convert(PAM_RAM, 8, Shared)?;
    same(
        "private after a request for what is hidden",
        machine.region("ram0")?.private,
        7 * PAGE,
    )?;

    // With RAM instead of all ROM below 1 MiB, one slot is all there is.
    machine.ask_ok("shadow")?;
    for register in PAMS {
        pam(&mut machine, register, ALL_RAM)?;
    }
    same("slots", slot_bounds(&mut machine)?, vec![(0, RAM)])?;
    machine.check(PAM_RAM, 1, 7)?;
    machine.check(PAM_RAM + PAGE, 2, 8)?;
    machine.check_zero(PAM_RAM + 3 * PAGE, 1)?;
    machine.check(PAM_RAM + 4 * PAGE, 4, 7)?;
    machine.check(BASE, 4, 9)?;
    same_held(&machine.region("ram0")?, 7 * PAGE)?;

    pam(&mut machine, *PAMS.start(), 0)?;
    let split = vec![(0, LOW_END), (PAM_RAM, RAM)];
    same("slots", slot_bounds(&mut machine)?, split)?;
    machine.check(PAM_RAM + PAGE, 2, 8)?;
    machine.check(BASE, 4, 9)?;
    same_held(&machine.region("ram0")?, 7 * PAGE)?;
    machine.convert(PAM_RAM + PAGE, 3, Shared)?;
    machine.convert(BASE, 4, Shared)?;
    machine.check_zero(PAM_RAM + PAGE, 3)?;
    machine.check(PAM_RAM, 1, 7)?;
    let info = machine.region("ram0")?;
    same("private", info.private, 0)?;
    same_held(&info, 0)?;
    machine.finish()
}

/// A conversion takes effect, and the rest keeps what it holds, however slots come and go meanwhile.
fn slots_change(lab: &Lab) -> Result<()> {
    let mut machine = Launch::private(lab).start_guest()?;
    machine.ask_ok("shadow")?;
    same(
        "the guest's reply to smp",
        machine.ask("smp")?.as_str(),
        "cpus 2",
    )?;
    // Above and below what changes; most changes make the slots of both anew.
    for (base, pages, count) in [(1 << 20, 300, 300), (512 << 10, 32, 150)] {
        let before = machine.region("ram0")?.conversions;
        let counts = machine.ask_counts(&format!("remap {base:#x} {pages} {count} 1"))?;
        let conversions = counts["conversions"];
        ensure!(conversions >= count, "only {conversions} conversions");
        no_errors(&counts, conversions)?;
        let info = machine.region("ram0")?;
        same("conversions", info.conversions - before, conversions)?;
        same("failed-conversions", info.failed_conversions, 0)?;
        same(
            "private pages",
            Some(info.private / PAGE),
            counts.get("private_pages").copied(),
        )?;
        same_held(&info, info.private)?;
        same("slots", slot_bounds(&mut machine)?, vec![(0, RAM)])?;
        machine.convert(base, pages, Shared)?;
        same_held(&machine.region("ram0")?, 0)?;
    }
    machine.finish()
}

// ---- what the operator does to a whole machine ----

/// Resets the machine; all its memory must be shared when the guest is there again.
pub fn reset(machine: &mut Machine) -> Result<()> {
    machine.reset()?;
    let info = machine.region("ram0")?;
    same("private after the reset", info.private, 0)?;
    same("shared after the reset", info.shared, RAM)?;
    same_held(&info, 0).context("after the reset")
}

fn reset_makes_shared(lab: &Lab) -> Result<()> {
    let mut machine = Launch::private(lab)
        .with("-action reboot=reset")
        .start_guest()?;
    machine.fill(BASE - PAGE, 66, 7)?;
    machine.convert(BASE, 64, Private)?;
    machine.fill(BASE, 32, 8)?;
    // Private pages that the guest does not see when the reset comes, and sees again later.
    pam(&mut machine, PAM, ALL_RAM)?;
    machine.convert(PAM_RAM, 4, Private)?;
    machine.fill(PAM_RAM, 4, 9)?;
    pam(&mut machine, PAM, 0)?;
    let info = machine.region("ram0")?;
    same("private", info.private, 68 * PAGE)?;
    same_held(&info, 36 * PAGE)?;
    reset(&mut machine)?;
    pam(&mut machine, PAM, ALL_RAM)?;
    machine.check_zero(PAM_RAM, 4)?;
    machine.check(BASE - PAGE, 1, 7)?;
    machine.check_zero(BASE, 64)?;
    machine.check(BASE + 64 * PAGE, 1, 7)?;

    // In the midst of conversions by two vCPUs.
    same(
        "the guest's reply to smp",
        machine.ask("smp")?.as_str(),
        "cpus 2",
    )?;
    let before = machine.region("ram0")?.conversions;
    machine.send(&format!("disjoint {BASE:#x} 301 1000000 1"))?;
    let end = Instant::now() + DEADLINE;
    while machine.region("ram0")?.conversions < before + 50 {
        ensure!(Instant::now() < end, "the guest does not convert");
        thread::sleep(Duration::from_millis(10));
    }
    reset(&mut machine)?;
    churn_and_undo(&mut machine)?;
    machine.finish()
}

/// Both firmwares of our guest, and the state that memory has at first with each.
const FIRMWARES: [(&str, &str); 2] = [
    ("guest.bin", "initial-state=shared"),
    ("guest-private.bin", "initial-state=private"),
];

/// Machines of both initial states with 16 private pages among shared ones at [`BASE`], all filled.
fn both_sides(lab: &Lab, firmware: &str, state: &str, options: &str) -> Result<Machine> {
    let mut machine = properties::with_properties(lab, state)
        .with(&format!("-bios /guest/{firmware} {options}"))
        .start_guest()?;
    machine.convert(BASE, 32, Shared)?;
    machine.convert(BASE + 8 * PAGE, 16, Private)?;
    machine.fill(BASE, 32, 7)?;
    Ok(machine)
}

/// Suspends the machine to RAM; returns once it is.
fn suspend(machine: &mut Machine) -> Result<()> {
    machine.send("suspend")?;
    machine.qmp.event("SUSPEND")?;
    let status = machine.qmp.call("query-status", json!({}))?;
    same("status", status["status"].as_str(), Some("suspended"))
}

/// A guest that wakes up from suspend to RAM finds sides and contents as it left them, on both
/// vCPUs; a reset of a suspended machine is a reset like any other.
fn wake_up_keeps_memory(lab: &Lab) -> Result<()> {
    for (firmware, state) in FIRMWARES {
        let mut machine = both_sides(lab, firmware, state, "-action reboot=reset")?;
        let extents = machine.extents("ram0")?;
        for _ in 0..2 {
            let cpus = machine.ask("smp")?;
            same("the guest's reply to smp", cpus.as_str(), "cpus 2")?;
            let before = machine.region("ram0")?;
            suspend(&mut machine)?;
            machine.qmp.call("system_wakeup", json!({}))?;
            machine.ready()?;
            machine.qmp.event("WAKEUP")?;
            let after = machine.region("ram0")?;
            same("private", after.private, before.private)?;
            same_held(&after, before.private_held.unwrap_or_default())?;
            same_extents(&machine.extents("ram0")?, &extents)?;
            machine.check(BASE, 32, 7)?;
        }
        machine.convert(BASE + 8 * PAGE, 1, Shared)?;
        machine.check_zero(BASE + 8 * PAGE, 1)?;
        machine.check(BASE + 9 * PAGE, 23, 7)?;

        suspend(&mut machine)?;
        machine.qmp.call("system_reset", json!({}))?;
        machine.qmp.event("RESET")?;
        machine.qmp.call("cont", json!({}))?;
        machine.ready()?;
        check_is_new(&mut machine, state)?;
        machine.finish()?;
    }
    Ok(())
}

/// After a reset: nothing private is left of what [`both_sides`] made.
fn check_is_new(machine: &mut Machine, state: &str) -> Result<()> {
    machine.check_zero(BASE + 8 * PAGE, 16)?;
    match state {
        "initial-state=private" => machine.check_zero(BASE, 8),
        _ => {
            same("private", machine.region("ram0")?.private, 0)?;
            machine.check(BASE, 8, 7)
        }
    }
}

/// A guest that resets a machine whose resets are to stop it leaves memory to be looked at; the
/// operator's reset then begins anew.
fn stops_keep_memory(lab: &Lab) -> Result<()> {
    for (firmware, state) in FIRMWARES {
        let options = "-action reboot=shutdown,shutdown=pause";
        let mut machine = both_sides(lab, firmware, state, options)?;
        let before = machine.region("ram0")?;
        machine.send("reboot")?;
        machine.qmp.event("SHUTDOWN")?;
        machine.qmp.event("STOP")?;
        let after = machine.region("ram0")?;
        same("private", after.private, before.private)?;
        same_held(&after, before.private_held.unwrap_or_default())?;
        for (addr, pages) in [(BASE, 8), (BASE + 24 * PAGE, 8)] {
            let bytes = machine
                .pmemsave(addr, pages * PAGE)?
                .map_err(anyhow::Error::msg)?;
            ensure!(
                bytes == pattern(addr, pages * PAGE, 7),
                "shared memory at {addr:#x} is not what the guest wrote"
            );
        }
        let action = json!({"reboot": "reset", "shutdown": "poweroff"});
        machine.qmp.call("set-action", action)?;
        machine.qmp.call("system_reset", json!({}))?;
        machine.qmp.event("RESET")?;
        machine.qmp.call("cont", json!({}))?;
        machine.ready()?;
        check_is_new(&mut machine, state)?;
        // By the guest's own hand now.
        machine.fill(BASE + 8 * PAGE, 16, 9)?;
        machine.convert(BASE + 8 * PAGE, 16, Private)?;
        machine.fill(BASE + 8 * PAGE, 16, 9)?;
        machine.send("reboot")?;
        same(
            "the guest's own reset",
            machine.qmp.event("RESET")?["reason"].as_str(),
            Some("guest-reset"),
        )?;
        machine.ready()?;
        check_is_new(&mut machine, state)?;
        machine.finish()?;
    }
    Ok(())
}

/// Conversions work; leaves all pages shared.
fn churn_and_undo(machine: &mut Machine) -> Result<()> {
    let counts = machine.ask_counts(&format!("churn {BASE:#x} 300 50 1"))?;
    no_errors(&counts, 50)?;
    let private = counts["private_pages"] * PAGE;
    same("private", machine.region("ram0")?.private, private)?;
    machine.convert(BASE, 300, Shared)
}

/// Measuring what the guest writes says nothing here, as KVM logs no such slot, but does no harm.
fn dirty_rate(lab: &Lab) -> Result<()> {
    let mut machine = Launch::private(lab).start_guest()?;
    for mode in ["dirty-bitmap", "page-sampling"] {
        machine
            .qmp
            .call("calc-dirty-rate", json!({"calc-time": 1, "mode": mode}))?;
        let end = Instant::now() + DEADLINE;
        loop {
            churn_and_undo(&mut machine).with_context(|| format!("measuring by {mode}"))?;
            let rate = machine.qmp.call("query-dirty-rate", json!({}))?;
            if rate["status"] == "measured" {
                println!("  {rate}");
                break;
            }
            ensure!(Instant::now() < end, "no end of measuring: {rate}");
        }
        churn_and_undo(&mut machine).with_context(|| format!("after {mode}"))?;
    }
    machine.finish()
}

// ---- requests that must not be granted ----

/// Nothing is private, no page was lost, and the guest goes on.
fn still_untouched(machine: &mut Machine, after: &str) -> Result<()> {
    let info = machine.region("ram0").with_context(|| after.to_string())?;
    same(&format!("private after {after}"), info.private, 0)?;
    machine
        .check(BASE, 4, 7)
        .with_context(|| after.to_string())?;
    machine
        .check(RAM - 2 * PAGE, 2, 7)
        .with_context(|| after.to_string())
}

fn untouched_machine(lab: &Lab) -> Result<Machine> {
    let mut machine = Launch::private(lab).start_guest()?;
    machine.fill(BASE, 4, 7)?;
    machine.fill(RAM - 2 * PAGE, 2, 7)?;
    Ok(machine)
}

fn bad_requests_qmp(lab: &Lab) -> Result<()> {
    let mut machine = untouched_machine(lab)?;
    let both = [Private, Shared];
    let cases: &[(&str, u64, u64, &[Side])] = &[
        ("an unaligned address", BASE + 1, PAGE, &both),
        ("an unaligned size", BASE, PAGE + 512, &both),
        ("an empty range", BASE, 0, &both),
        ("a range beyond 2^64", u64::MAX - PAGE + 1, 2 * PAGE, &both),
        (
            "nearly 2^64 bytes from RAM",
            BASE,
            u64::MAX - PAGE + 1,
            &both,
        ),
        (
            "a range partly outside RAM",
            RAM - PAGE,
            2 * PAGE,
            &[Private],
        ),
        ("a range outside RAM", HOLE, PAGE, &[Private]),
        ("an address no bus reaches", 1 << 60, PAGE, &[Private]),
        ("ROM", ROM, PAGE, &[Private]),
        ("ROM below 1 MiB", ROM_ALIAS, PAGE, &[Private]),
        ("MMIO", LAPIC, PAGE, &[Private]),
    ];
    for &(what, address, size, sides) in cases {
        for &side in sides {
            let text = machine
                .qmp
                .refused(
                    "x-private-memory-convert",
                    convert_arguments(address, size, side),
                )
                .with_context(|| what.to_string())?;
            println!("  {what} to {}: {text}", side.name());
            still_untouched(&mut machine, what)?;
        }
    }
    for (what, address) in [("MMIO", LAPIC), ("ROM", ROM), ("a hole", HOLE)] {
        machine
            .operator_convert(address, PAGE, Shared)
            .with_context(|| what.to_string())?;
        still_untouched(&mut machine, what)?;
    }
    same("conversions", machine.region("ram0")?.conversions, 0)?;
    machine.finish()
}

fn bad_requests_guest(lab: &Lab) -> Result<()> {
    let mut machine = untouched_machine(lab)?;
    let both = [Private, Shared];
    let cases: &[(&str, u64, u64, &[Side])] = &[
        ("an unaligned address", BASE + 1, 1, &both),
        ("no pages", BASE, 0, &both),
        ("frame numbers that wrap", BASE, u64::MAX, &both),
        ("2^52 pages, 0 bytes in 64 bits", BASE, 1 << 52, &both),
        (
            "2^52 + 1 pages, 4096 bytes in 64 bits",
            BASE,
            (1 << 52) + 1,
            &both,
        ),
        ("the last page and one more", u64::MAX - PAGE + 1, 2, &both),
        ("2^40 pages from RAM", BASE, 1 << 40, &[Private]),
        ("a range partly outside RAM", RAM - PAGE, 2, &[Private]),
        ("a range outside RAM", HOLE, 1, &[Private]),
        ("an address no bus reaches", 1 << 60, 1, &[Private]),
        ("ROM", ROM, 1, &[Private]),
        ("ROM below 1 MiB", ROM_ALIAS, 1, &[Private]),
        ("MMIO", LAPIC, 1, &[Private]),
    ];
    for &(what, addr, pages, sides) in cases {
        for &side in sides {
            let ret = machine
                .hypercall(addr, pages, side)
                .with_context(|| what.to_string())?;
            println!("  {what} to {}: {ret}", side.name());
            ensure!(
                ret < 0,
                "{what} to {}: the guest was given {ret}",
                side.name()
            );
            still_untouched(&mut machine, what)?;
        }
    }
    for (what, addr) in [("MMIO", LAPIC), ("ROM", ROM), ("a hole", HOLE)] {
        let ret = machine.hypercall(addr, 1, Shared)?;
        same(&format!("what the guest got for {what} to shared"), ret, 0)?;
        still_untouched(&mut machine, what)?;
    }
    same("conversions", machine.region("ram0")?.conversions, 0)?;
    machine.finish()
}

// ---- the life of an object ----

pub fn object_add(id: &str, size: u64) -> Value {
    json!({"qom-type": "memory-backend-private", "id": id, "size": size})
}

/// No fd is left that was not there before. QEMU frees memory regions on another thread, so fds may
/// go a little later than the answer comes; for the same reason some of `before` may be gone.
pub fn fds_come_back(machine: &Machine, before: &[u64]) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    loop {
        let mut left = host::fds_of(machine.pid())?;
        left.retain(|fd| !before.contains(fd));
        if left.is_empty() || Instant::now() >= end {
            return same("fds that were not open before", left, vec![]);
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn object_add_del(lab: &Lab) -> Result<()> {
    let mut machine = Launch::private(lab).start_guest()?;
    let fds = host::fds_of(machine.pid())?;
    for _ in 0..3 {
        machine
            .qmp
            .call("object-add", object_add("spare", 64 << 20))?;
        ensure!(
            host::fds_of(machine.pid())?.len() > fds.len(),
            "the new object has no fds"
        );
        let info = machine.region("spare")?;
        same("size", info.size, 64 << 20)?;
        same("slots", info.slots, vec![])?;
        machine.qmp.call("object-del", json!({"id": "spare"}))?;
        ensure!(
            machine.region("spare").is_err(),
            "query-private-memory lists a deleted object"
        );
        fds_come_back(&machine, &fds)?;
    }
    let text = machine.qmp.refused("object-del", json!({"id": "ram0"}))?;
    ensure!(
        text.contains("ram0"),
        "the refusal does not name ram0: {text}"
    );
    still_converts(&mut machine)?;
    machine.finish()
}

pub const DIMM: u64 = 128 << 20;

/// A machine that has room for DIMMs.
fn machine_for_dimms(lab: &Lab) -> Result<Machine> {
    Launch::kvm(lab)
        .with(&PRIVATE.replace("-m 256M", "-m 256M,slots=2,maxmem=1G"))
        .with(OUR_GUEST)
        .start_guest()
}

/// Makes `ram1` a DIMM of the guest; gives its address.
pub fn plug(machine: &mut Machine, address: Option<u64>) -> Result<u64> {
    let mut device = json!({"driver": "pc-dimm", "id": "dimm1", "memdev": "ram1"});
    if let Some(address) = address {
        device["addr"] = address.into();
    }
    machine.qmp.call("device_add", device)?;
    let slots = machine.region("ram1")?.slots;
    let slot = slots.first().context("the plugged object has no slot")?;
    same("the slot's size", slot.size, DIMM)?;
    Ok(slot.address)
}

/// Takes the DIMM out, with the guest's consent.
fn unplug(machine: &mut Machine) -> Result<()> {
    machine.qmp.call("device_del", json!({"id": "dimm1"}))?;
    machine.ask_ok("eject 0")?;
    machine.qmp.event("DEVICE_DELETED")?;
    Ok(())
}

/// An object made at run time becomes memory of the guest by plugging it in as a DIMM.
fn object_add_dimm(lab: &Lab) -> Result<()> {
    let mut machine = machine_for_dimms(lab)?;
    machine.qmp.call("object-add", object_add("ram1", DIMM))?;
    let base = plug(&mut machine, None)?;
    let counts = machine.ask_counts(&format!("churn {base:#x} 300 100 1"))?;
    no_errors(&counts, 100)?;
    let info = machine.region("ram1")?;
    same(
        "private pages",
        Some(info.private / PAGE),
        counts.get("private_pages").copied(),
    )?;
    same_held(&info, info.private)?;
    same("private of ram0", machine.region("ram0")?.private, 0)?;
    let text = machine.qmp.refused("object-del", json!({"id": "ram1"}))?;
    ensure!(
        text.contains("ram1"),
        "the refusal does not name ram1: {text}"
    );
    machine.convert(base, 300, Shared)?;
    same_held(&machine.region("ram1")?, 0)?;
    machine.finish()
}

/// A DIMM that is unplugged keeps sides and contents, and has them when it is plugged in again,
/// wherever that is.
fn dimm_keeps_state(lab: &Lab) -> Result<()> {
    let mut machine = machine_for_dimms(lab)?;
    let fds = host::fds_of(machine.pid())?;
    machine.qmp.call("object-add", object_add("ram1", DIMM))?;
    let first = plug(&mut machine, None)?;
    let offsets = scatter(&mut machine, first)?;
    let before = machine.region("ram1")?;
    let extents = machine.extents("ram1")?;
    same("extents", extents.len(), 2 * offsets.len() + 1)?;

    let mut at = first;
    for next in [first + 2 * DIMM, first] {
        unplug(&mut machine)?;
        same_memory(&mut machine, &before, &extents, "unplugged")?;
        no_ram(&mut machine, at)?;
        at = plug(&mut machine, Some(next))?;
        same("the address", at, next)?;
        same_memory(&mut machine, &before, &extents, "plugged in again")?;
        for &offset in &offsets {
            machine.check_moved(at + offset - PAGE, first + offset - PAGE, 1, 7)?;
            machine.check_moved(at + offset, first + offset, 1, 8)?;
        }
        same_memory(&mut machine, &before, &extents, "read")?;
    }
    // What KVM takes for private reads from the private store.
    for offset in &offsets {
        machine.check_zero(at + offset + PAGE, 1)?;
    }
    let info = machine.region("ram1")?;
    same_held(&info, 2 * offsets.len() as u64 * PAGE)?;
    same("shared-held", info.shared_held, before.shared_held)?;
    machine.convert(at, DIMM / PAGE, Shared)?;
    machine.check_zero(at + offsets[0], 2)?;

    unplug(&mut machine)?;
    machine.qmp.call("object-del", json!({"id": "ram1"}))?;
    fds_come_back(&machine, &fds)?;
    still_converts(&mut machine)?;
    machine.finish()
}

/// Makes some places of a DIMM private, each at least two pages long. The first page of each is filled
/// (seed 8), as is the shared one before (seed 7); the second is not touched. Gives their offsets.
fn scatter(machine: &mut Machine, base: u64) -> Result<Vec<u64>> {
    let pages = [2, 3, 64, 512, 700];
    let offsets: Vec<u64> = (0..30).map(|i| (1 + i) * (4 << 20) - i * PAGE).collect();
    for (i, offset) in offsets.iter().enumerate() {
        machine.fill(base + offset - PAGE, 1, 7)?;
        machine.convert(base + offset, pages[i % pages.len()], Private)?;
        machine.fill(base + offset, 1, 8)?;
    }
    same_held(&machine.region("ram1")?, offsets.len() as u64 * PAGE)?;
    Ok(offsets)
}

fn same_memory(
    machine: &mut Machine,
    before: &PrivateMemory,
    extents: &[Extent],
    when: &str,
) -> Result<()> {
    let info = machine.region("ram1")?;
    same("private", info.private, before.private).context(when.to_string())?;
    same("private-held", info.private_held, before.private_held).context(when.to_string())?;
    same("shared-held", info.shared_held, before.shared_held).context(when.to_string())?;
    same("held-twice", info.held_twice, Some(0)).context(when.to_string())?;
    same_extents(&machine.extents("ram1")?, extents).context(when.to_string())
}

/// Where the DIMM was, nothing can be stored and nothing made private.
fn no_ram(machine: &mut Machine, base: u64) -> Result<()> {
    same("slots", machine.region("ram1")?.slots, vec![])?;
    machine.fill(base, 1, 9)?;
    machine.check_zero(base, 1)?;
    let ret = machine.hypercall(base, 1, Private)?;
    ensure!(ret < 0, "what is no RAM any more was made private ({ret})");
    Ok(())
}

fn object_in_use(lab: &Lab) -> Result<()> {
    let mut machine = machine_for_dimms(lab)?;
    let text = machine.qmp.refused(
        "device_add",
        json!({"driver": "pc-dimm", "id": "dimm1", "memdev": "ram0"}),
    )?;
    ensure!(
        text.contains("ram0"),
        "the refusal does not name ram0: {text}"
    );
    still_converts(&mut machine)?;
    machine.finish()
}

/// object-add with no fd, then with one fd left: a clean error each time, nothing leaks, the VM goes on.
fn fd_limit(lab: &Lab) -> Result<()> {
    let mut machine = Launch::private(lab).start_guest()?;
    let fds = host::fds_of(machine.pid())?;
    for limit in (0..).filter(|fd| !fds.contains(fd)).take(2) {
        let _held = host::Limit::set(machine.pid(), libc::RLIMIT_NOFILE, limit)?;
        refused_object(&mut machine, 64 << 20, &fds)?;
    }
    machine
        .qmp
        .call("object-add", object_add("spare", 64 << 20))?;
    machine.qmp.call("object-del", json!({"id": "spare"}))?;
    machine.finish()
}

/// object-add with no room to map the shared store: a clean error, nothing leaks, the VM goes on.
fn no_memory(lab: &Lab) -> Result<()> {
    let mut machine = Launch::private(lab).start_guest()?;
    let fds = host::fds_of(machine.pid())?;
    let room = address_space(machine.pid())? + (64 << 20);
    let held = host::Limit::set(machine.pid(), libc::RLIMIT_AS, room)?;
    refused_object(&mut machine, 1 << 30, &fds)?;
    drop(held);
    machine
        .qmp
        .call("object-add", object_add("spare", 1 << 30))?;
    machine.qmp.call("object-del", json!({"id": "spare"}))?;
    machine.finish()
}

/// Sizes beyond what a process can map, what a state map can be had for, what a file can have.
fn object_too_large(lab: &Lab) -> Result<()> {
    let mut machine = Launch::private(lab).start_guest()?;
    let fds = host::fds_of(machine.pid())?;
    for size in [1 << 47, 1 << 62, u64::MAX - PAGE + 1] {
        refused_object(&mut machine, size, &fds)?;
    }
    machine.finish()
}

fn refused_object(machine: &mut Machine, size: u64, fds: &[u64]) -> Result<()> {
    let text = machine
        .qmp
        .refused("object-add", object_add("spare", size))?;
    println!("  {size:#x} bytes: {text}");
    ensure!(
        text.contains("spare"),
        "the refusal does not name the object: {text}"
    );
    fds_come_back(machine, fds)?;
    let counts = machine.ask_counts(&format!("churn {BASE:#x} 100 10 1"))?;
    no_errors(&counts, 10)?;
    machine.convert(BASE, 100, Shared)
}

/// Bytes of address space that a process uses.
fn address_space(pid: u32) -> Result<u64> {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm"))?;
    let pages: u64 = statm
        .split_whitespace()
        .next()
        .context("empty statm")?
        .parse()?;
    Ok(pages * PAGE)
}

/// An ordinary Linux in shared memory only, from start to power off.
fn linux_guest(lab: &Lab) -> Result<()> {
    let mut machine = Launch::kvm(lab)
        .with(PRIVATE)
        .with("-no-shutdown -bios qboot.rom -kernel /guest/vmlinux -initrd /guest/initrd -append")
        .arg("console=ttyS0 lab.role=guest quiet oops=panic panic=-1 nowatchdog")
        .start()?;
    let hello = machine.line("Linux's first words", |line| {
        line.starts_with("guest-linux ")
    })?;
    println!("  {hello}");
    machine.line("Linux's memory check", |line| line == "guest-linux ok")?;
    machine.qmp.event("SHUTDOWN")?;
    // With -no-shutdown QEMU goes on, and so does the test.
    machine.qmp.event("STOP")?;
    let info = machine.region("ram0")?;
    same("private", info.private, 0)?;
    same_held(&info, 0)?;
    ensure!(
        info.shared_held > Some(64 << 20),
        "Linux wrote 64 MiB, held are {:?} bytes",
        info.shared_held
    );
    Ok(())
}
