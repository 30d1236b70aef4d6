//! Where the time of a conversion goes, by the kernel's tracepoints: system calls of the vCPU's
//! thread, KVM's entries into the guest and exits from it. What QEMU logs of its own trace events
//! shows as calls of write(2), and says where the library begins and ends.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use nix::libc;
use nix::mount::{MsFlags, mount};

const TRACEFS: &str = "/sys/kernel/tracing";
const EVENTS: &[&str] = &[
    "raw_syscalls/sys_enter",
    "raw_syscalls/sys_exit",
    "kvm/kvm_entry",
    "kvm/kvm_exit",
];

// Source: include/uapi/linux/kvm.h.
const KVM_RUN: u64 = 0xae80;
const KVM_SET_MEMORY_ATTRIBUTES: u64 = 0x4020_aed2;
const KVM_PRE_FAULT_MEMORY: u64 = 0xc040_aed5;
/// Not in every libc crate; the same on every architecture.
const SYS_CACHESTAT: i64 = 451;

/// The kernel traces one thread for as long as this lives.
pub struct Tracing(());

impl Tracing {
    pub fn of(thread: u64) -> Result<Tracing> {
        if !Path::new(TRACEFS).join("trace").exists() {
            let (kind, none) = (Some("tracefs"), None::<&str>);
            mount(kind, TRACEFS, kind, MsFlags::empty(), none).context("mounting tracefs")?;
        }
        set("tracing_on", "0")?;
        set("trace", "")?;
        set("trace_clock", "x86-tsc")?;
        set("buffer_size_kb", "16384")?;
        set("set_event_pid", &thread.to_string())?;
        for event in EVENTS {
            set(&format!("events/{event}/enable"), "1")?;
        }
        set("tracing_on", "1")?;
        Ok(Tracing(()))
    }

    /// The cycles of each conversion; of those between two system calls the given ones count apart.
    pub fn end(self, between_calls: u64) -> Result<Vec<Conversion>> {
        Ok(conversions(&self.events()?, between_calls))
    }

    fn events(self) -> Result<Vec<(u64, What)>> {
        set("tracing_on", "0")?;
        let text = fs::read_to_string(Path::new(TRACEFS).join("trace"))?;
        Ok(text.lines().filter_map(event).collect())
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        for event in EVENTS {
            // Nothing is measured any more.
            let _ = set(&format!("events/{event}/enable"), "0");
        }
    }
}

/// Cycles that pass between two system calls with nothing in between, as a trace shows them: the
/// median. They are the CPU's and the trace's.
pub fn between_calls() -> Result<u64> {
    let tracing = Tracing::of(nix::unistd::gettid().as_raw() as u64)?;
    for _ in 0..1000 {
        nix::unistd::getppid();
    }
    let events = tracing.events()?;
    let pairs = events.windows(2).filter_map(|pair| match pair {
        [
            (end, What::Exit),
            (start, What::Enter(libc::SYS_getppid, _)),
        ] => Some(start - end),
        _ => None,
    });
    let mut cycles: Vec<u64> = pairs.collect();
    cycles.sort_unstable();
    let median = cycles.get(cycles.len() / 2);
    median.copied().context("the trace shows no system calls")
}

fn set(file: &str, value: &str) -> Result<()> {
    let path = Path::new(TRACEFS).join(file);
    fs::write(&path, value).with_context(|| format!("{value} to {}", path.display()))
}

enum What {
    /// A system call: its number and its second argument.
    Enter(i64, u64),
    Exit,
    GuestEntry,
    GuestExit,
}

/// `CPU 0/KVM-123 [000] ..... 4567: sys_enter: NR 16 (b, ae80, 0, ...)`
fn event(line: &str) -> Option<(u64, What)> {
    let (_, rest) = line.split_once("] ")?;
    let mut parts = rest.splitn(3, ": ");
    let time = parts.next()?.split_whitespace().last()?.parse().ok()?;
    let what = match parts.next()? {
        "sys_enter" => {
            let (number, arguments) = parts.next()?.strip_prefix("NR ")?.split_once(" (")?;
            let second = arguments.split(", ").nth(1)?;
            What::Enter(number.parse().ok()?, u64::from_str_radix(second, 16).ok()?)
        }
        "sys_exit" => What::Exit,
        "kvm_entry" => What::GuestEntry,
        "kvm_exit" => What::GuestExit,
        _ => return None,
    };
    Some((time, what))
}

/// The cycles of one conversion, by what they were spent on.
pub type Conversion = BTreeMap<&'static str, u64>;

/// From one call of KVM_RUN to the next one is one request, if an attribute was set.
fn conversions(events: &[(u64, What)], between_calls: u64) -> Vec<Conversion> {
    let mut done = Vec::new();
    let mut current = Conversion::new();
    let (mut call, mut logged) = ("", 0);
    for pair in events.windows(2) {
        let [(start, _), (end, what)] = pair else {
            continue;
        };
        let mut add = |step, cycles| *current.entry(step).or_default() += cycles;
        let cycles = end - start;
        match what {
            What::Enter(..) => {
                let between = cycles.min(between_calls);
                let whose = if logged == 1 { "library" } else { "qemu" };
                add("between calls", between);
                add(whose, cycles - between);
            }
            What::GuestExit => add("guest", cycles),
            What::Exit | What::GuestEntry => add(call, cycles),
        }
        if let What::Enter(number, second) = *what {
            call = name(number, second, current.contains_key("attributes"));
            if call == "kvm" {
                let converted = std::mem::take(&mut current);
                done.extend(Some(converted).filter(|it| it.contains_key("attributes")));
                logged = 0;
            }
            logged += u32::from(call == "log");
        }
    }
    done
}

fn name(number: i64, second: u64, switched: bool) -> &'static str {
    match (number, second) {
        (libc::SYS_ioctl, KVM_RUN) => "kvm",
        (libc::SYS_ioctl, KVM_SET_MEMORY_ATTRIBUTES) => "attributes",
        (libc::SYS_ioctl, KVM_PRE_FAULT_MEMORY) => "prefault",
        (libc::SYS_fallocate, _) if switched => "punch of the side left",
        (libc::SYS_fallocate, _) => "punch of the side entered",
        (SYS_CACHESTAT, _) => "cachestat",
        (libc::SYS_madvise, _) => "madvise",
        (libc::SYS_futex, _) => "futex",
        (libc::SYS_write, _) => "log",
        _ => "other calls",
    }
}
