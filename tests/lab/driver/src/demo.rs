//! The demo, told as a story and as the JSON object that `cargo xtask demo` prints: a machine whose
//! guest converts more than a thousand pages, and a real Linux whose RAM is private.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::linux::{self, Disk, Linux};
use crate::machine::{Launch, Machine, PAGE, PrivateMemory, Side, pattern};
use crate::scenarios::same;
use crate::secrets::Found;
use crate::{Lab, report};

const TRACE: &str = "/tmp/demo.trace";
const WORKING_SET: u64 = 32 << 20;
const WORKING_PAGES: u64 = 512;
const CONVERSIONS: u64 = 1200;
const SECRET: u64 = 64 << 20;
const SECRET_SEED: u64 = 0x5ec2e7;
const LINUX_SECRETS: usize = 64;

macro_rules! say {
    ($($arg:tt)*) => { println!("demo: {}", format_args!($($arg)*)) };
}

pub fn run(lab: &Lab) -> Result<()> {
    converting_guest(lab)?;
    match linux::missing() {
        None => private_linux(lab),
        Some(why) => {
            say!("a Linux with private RAM: skipped: {why}");
            report(json!({"demo": {"linux": {"skipped": why}}}));
            Ok(())
        }
    }
}

fn converting_guest(lab: &Lab) -> Result<()> {
    say!("kernel {}, QEMU {}", lab.kernel, lab.line);
    let launch = Launch::private(lab).with(&format!(
        "-smp 1 -trace kvm_ioctl -trace kvm_set_user_memory -D {TRACE}"
    ));
    let mut machine = launch.start_guest()?;
    let before = machine.region("ram0")?;
    let vm_type = vm_type()?;
    let slots = memslots()?;
    say!("VM type {vm_type}, agent {}", before.agent);
    tell_slots(&slots);

    let counts = machine.ask_counts(&format!(
        "churn {WORKING_SET:#x} {WORKING_PAGES} {CONVERSIONS} 1"
    ))?;
    let count = |name: &str| {
        counts
            .get(name)
            .copied()
            .with_context(|| format!("the guest did not count {name}"))
    };
    let (conversions, failed, errors) = (count("conversions")?, count("failed")?, count("errors")?);
    say!(
        "the guest converted {conversions} times over {WORKING_PAGES} pages, {failed} refused, {errors} with wrong contents"
    );
    let after = machine.region("ram0")?;
    tell_held("before", &before);
    tell_held("after", &after);
    say!("info private-memory:");
    machine
        .hmp("info private-memory")?
        .lines()
        .for_each(|line| say!("  {line}"));

    let host_read_shared = host_reads_shared(&mut machine)?;
    let host_read_private = host_reads_private(&mut machine)?;
    report(json!({"demo": {
        "kernel": lab.kernel, "qemu": lab.line, "vm_type": vm_type, "vm_type_name": after.agent,
        "capabilities": {"vm_types": lab.kvm.vm_types, "memory_attributes": lab.kvm.attributes,
                         "guest_memfd": lab.kvm.guest_memfd, "user_memory2": lab.kvm.user_memory2},
        "memslots": slots, "conversions": conversions, "failed": failed, "content_errors": errors,
        "private_bytes": after.private, "shared_bytes": after.shared,
        "private_held_bytes_before": before.private_held, "private_held_bytes_after": after.private_held,
        "shared_held_bytes_before": before.shared_held, "shared_held_bytes_after": after.shared_held,
        "held_twice_bytes": after.held_twice,
        "host_read_private": host_read_private, "host_read_shared": host_read_shared,
        "picture": after.picture,
    }}));

    ensure!(
        !slots.is_empty(),
        "the kernel was given no memslot with a guest_memfd"
    );
    ensure!(
        vm_type == 1,
        "the VM is of type {vm_type}, not 1 (software-protected)"
    );
    ensure!(
        after.agent == "sw-protected",
        "the agent is {}, not sw-protected",
        after.agent
    );
    ensure!(conversions >= 1000, "only {conversions} conversions");
    ensure!(
        failed == 0 && errors == 0,
        "{failed} conversions failed, {errors} contents were wrong"
    );
    ensure!(
        after.private == count("private_pages")? * PAGE,
        "QEMU and the guest disagree on what is private"
    );
    ensure!(
        after.private_held == Some(after.private),
        "the guest wrote all its private pages, not all are held"
    );
    ensure!(
        after.held_twice == Some(0),
        "held twice: {:?} bytes",
        after.held_twice
    );
    ensure!(host_read_shared, "the host could not read shared memory");
    ensure!(!host_read_private, "the host could read private memory");
    machine.finish()
}

fn tell_slots(slots: &[Value]) {
    for slot in slots {
        say!(
            "memslot {}: {} KiB at {:#x} with guest_memfd fd {} from offset {:#x}",
            slot["slot"],
            slot["size"].as_u64().unwrap_or(0) >> 10,
            slot["gpa"].as_u64().unwrap_or(0),
            slot["guest_memfd"],
            slot["offset"].as_u64().unwrap_or(0)
        );
    }
}

fn tell_held(when: &str, info: &PrivateMemory) {
    let kib =
        |bytes: Option<u64>| bytes.map_or("unknown".into(), |bytes| format!("{} KiB", bytes >> 10));
    say!(
        "held {when}: private {}, shared {}, twice {}",
        kib(info.private_held),
        kib(info.shared_held),
        kib(info.held_twice)
    );
}

/// The VM type that KVM_CREATE_VM was really asked for.
fn vm_type() -> Result<i64> {
    let trace = fs::read_to_string(TRACE).context(TRACE)?;
    let create = trace
        .lines()
        .find_map(|line| line.split_once("kvm_ioctl type 0xae01, arg "));
    match create.context("no KVM_CREATE_VM in the trace")?.1.trim() {
        "(nil)" => Ok(0),
        argument => number(argument),
    }
}

/// The slots with a guest_memfd that KVM has now, from the trace of what was really asked of it.
fn memslots() -> Result<Vec<Value>> {
    let trace = fs::read_to_string(TRACE).context(TRACE)?;
    let mut slots = BTreeMap::new();
    for line in trace
        .lines()
        .filter(|line| line.contains("kvm_set_user_memory"))
    {
        let slot = field(line, "Slot#")?;
        let key = (field(line, "AddrSpace#")?, slot);
        let size = field(line, "size=")?;
        slots.remove(&key);
        // KVM_MEM_GUEST_MEMFD
        if size != 0 && field(line, "ret=")? == 0 && field(line, "flags=")? & 4 != 0 {
            slots.insert(
                key,
                json!({"slot": slot, "gpa": field(line, "gpa=")?, "size": size,
                       "guest_memfd": field(line, "guest_memfd=")?, "offset": field(line, "guest_memfd_offset=")?}),
            );
        }
    }
    Ok(slots.into_values().collect())
}

/// The number behind `name` in a trace line, decimal or 0x hex.
fn field(line: &str, name: &str) -> Result<i64> {
    let word = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix(name));
    let word = word.with_context(|| format!("no {name} in the trace line: {line}"))?;
    number(word).with_context(|| format!("{name} in the trace line: {line}"))
}

fn number(word: &str) -> Result<i64> {
    Ok(match word.strip_prefix("0x") {
        Some(hex) => i64::from_str_radix(hex, 16)?,
        None => word.parse()?,
    })
}

fn host_reads_shared(machine: &mut Machine) -> Result<bool> {
    machine.fill(SECRET, 1, SECRET_SEED)?;
    let saved = machine.pmemsave(SECRET, PAGE)?;
    let read = saved
        .as_ref()
        .is_ok_and(|bytes| *bytes == pattern(SECRET, PAGE, SECRET_SEED));
    say!(
        "pmemsave of a shared page: {}",
        if read {
            "the host reads what the guest wrote"
        } else {
            "NOT READ"
        }
    );
    Ok(read)
}

/// Tries what a host can try: QMP, the shared store beneath the page, the private store's fd.
fn host_reads_private(machine: &mut Machine) -> Result<bool> {
    let page = SECRET + PAGE;
    machine.convert(page, 1, Side::Private)?;
    machine.fill(page, 1, SECRET_SEED)?;
    let info = machine.region("ram0")?;
    let secret = pattern(page, PAGE, SECRET_SEED);

    let saved = machine.pmemsave(page, PAGE)?;
    match &saved {
        Ok(_) => say!("pmemsave of a private page: GRANTED"),
        Err(text) => say!("pmemsave of a private page: refused: {text}"),
    }
    let file = fs::read("/tmp/pmemsave").unwrap_or_default();
    let offset = info.offset_of(page)?;
    let stores = [info.shared_fd, info.private_fd].map(|fd| read_store(machine.pid(), fd, offset));
    machine.check(page, 1, SECRET_SEED)?;
    let leaked = |bytes: &[u8]| {
        bytes
            .windows(8)
            .any(|word| secret.chunks(8).any(|part| part == word))
    };
    Ok(saved.is_ok() || leaked(&file) || stores.iter().any(|bytes| leaked(bytes)))
}

/// What the host gets from a store's fd; nothing where the kernel refuses.
fn read_store(pid: u32, fd: i32, offset: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE as usize];
    let read = fs::File::open(format!("/proc/{pid}/fd/{fd}"))
        .and_then(|file| file.read_at(&mut bytes, offset));
    bytes.truncate(read.unwrap_or(0));
    bytes
}

/// All of its RAM is private, its disk and network work, and the host looks for its secrets; then for
/// those of the same Linux without private memory.
fn private_linux(lab: &Lab) -> Result<()> {
    let disk = Disk::new()?;
    let devices = format!("{} {}", disk.device(), linux::network_device());
    let mut linux = Linux::private(lab, &devices)?;
    say!("a Linux at its shell: {}", linux.run("uname -rm")?.trim());
    let disk = tell_work("its disk, read and written", linux.uses(&disk));
    let network = tell_work("its network, a page fetched", linux.answers_over_network());
    say!("{LINUX_SECRETS} secrets are made in it; what the host finds of them:");
    let found = linux.search(LINUX_SECRETS)?;
    tell_found(&found);
    let memory = linux.memory()?;
    let percent = linux::private_percent(&memory);
    say!(
        "of its {} MiB {percent:.1} % are private",
        memory.size >> 20
    );
    tell_held("now", &memory);
    linux.finish()?;

    say!("the same Linux without private memory, and what the host finds:");
    let mut control = Linux::plain(lab, "")?;
    let control_found = control.search(LINUX_SECRETS)?;
    tell_found(&control_found);
    control.finish()?;
    let secrets = |found: &Found| found.secrets;
    // By the way that leads to most of them, and by that which leads to fewest.
    let secrets_found = found.iter().map(secrets).max();
    let control_found = control_found.iter().map(secrets).min();
    report(json!({"demo": {"linux": {
        "private_percent": percent, "held_twice_bytes": memory.held_twice,
        "disk": disk, "network": network, "secrets": LINUX_SECRETS,
        "secrets_found": secrets_found, "control_found": control_found,
    }}}));

    same("disk", disk.as_str(), "ok")?;
    same("network", network.as_str(), "ok")?;
    ensure!(percent > 95.0, "only {percent:.1} % are private");
    same("held-twice", memory.held_twice, Some(0))?;
    same("secrets found", secrets_found, Some(0))?;
    same("control", control_found, Some(LINUX_SECRETS))
}

/// `ok`, or what went wrong.
fn tell_work(what: &str, outcome: Result<()>) -> String {
    let said = outcome.map_or_else(|e| format!("{e:#}"), |()| "ok".into());
    say!("{what}: {said}");
    said
}

fn tell_found(found: &[Found]) {
    found.iter().for_each(|found| say!("  {found}"));
}
