//! Machines that die while a test waits for them: the wait ends at once, and its error has the text
//! of QEMU, of KVM or of the guest's kernel. One that ended by its deadline would have another.
//! Also the deaths of the outer machine, which `xtask/src/death.rs` waits for.

use std::fmt::Debug;

use anyhow::{Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::linux::Linux;
use crate::machine::{Launch, Machine, OUR_GUEST};
use crate::scenarios::Scenario;
use crate::{Lab, host};

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::plain("death-of-qemu", qemu),
        Scenario::plain("death-by-triple-fault", triple_fault),
        Scenario::plain("death-by-unexpected-reset", unexpected_reset),
        Scenario::plain("death-by-kvm-internal-error", internal_error),
        Scenario::plain("death-of-linux", linux),
        Scenario::private_linux("death-of-private-linux", private_linux),
    ]
}

/// They run by their names only, for none has a verdict.
pub fn of_the_lab() -> Vec<Scenario> {
    vec![
        // By another process: without its init any kernel panics.
        Scenario::plain("lab-oops", |_| {
            host::run(&format!("echo EXCEPTION > {PROVOKE}")).map(drop)
        }),
        Scenario::plain("lab-resets", |_| host::run("reboot -f").map(drop)),
    ]
}

/// Where there is neither memory nor a device.
const NOTHING: u64 = 1 << 30;
/// Resets by the guest that do not end QEMU.
const GOES_ON: &str = "-action reboot=reset";
/// The kernel's own faults, CONFIG_LKDTM.
const PROVOKE: &str = "/sys/kernel/debug/provoke-crash/DIRECT";

fn guest(lab: &Lab, options: &str) -> Result<Machine> {
    let launch = Launch::kvm(lab)
        .with("-m 256M -M q35,smm=off")
        .with(OUR_GUEST);
    launch.with(options).start_guest()
}

/// The wait has failed, with all of these in the reason.
fn names<T: Debug>(waited: Result<T>, reason: &[&str]) -> Result<()> {
    let text = match waited {
        Ok(found) => bail!("the wait should have failed, but found {found:?}"),
        Err(error) => format!("{error:#}"),
    };
    for part in reason {
        ensure!(text.contains(part), "the reason lacks '{part}': {text}");
    }
    Ok(())
}

fn qemu(lab: &Lab) -> Result<()> {
    const REASON: &str = "QEMU ended, signal: 11 (SIGSEGV)";
    let crash = |machine: &Machine| kill(Pid::from_raw(machine.pid() as i32), Signal::SIGSEGV);
    let mut machine = guest(lab, "")?;
    // It has no end by itself.
    machine.send(&format!("fill {NOTHING:#x} {} 7", u32::MAX))?;
    crash(&machine)?;
    names(
        machine.line("its end", |_| false),
        &[REASON, "awaited was its end"],
    )?;
    names(
        machine.qmp.call("query-status", json!({})),
        &[REASON, "query-status"],
    )?;
    names(machine.send("exit 21"), &[REASON, "exit 21"])?;
    let mut machine = guest(lab, "")?;
    crash(&machine)?;
    names(
        machine.qmp.event("DEVICE_DELETED"),
        &[REASON, "DEVICE_DELETED"],
    )
}

fn triple_fault(lab: &Lab) -> Result<()> {
    let mut machine = guest(lab, "")?;
    let reason = [
        "the guest ended the machine (\"guest-reset\")",
        "'triple-fault'",
    ];
    names(machine.ask("triple-fault"), &reason)
}

/// QEMU goes on, and the guest begins anew.
fn unexpected_reset(lab: &Lab) -> Result<()> {
    let mut machine = guest(lab, GOES_ON)?;
    let reason = [
        "the guest reset the machine (\"guest-reset\")",
        "'triple-fault'",
    ];
    names(machine.ask("triple-fault"), &reason)?;
    names(machine.qmp.event("DEVICE_DELETED"), &reason[..1])?;
    // It is no reason any more once a test has taken note of it.
    machine.qmp.event("RESET")?;
    machine.ready()?;
    machine.finish()
}

/// KVM cannot fetch an instruction from there, QEMU stops the VM, and does not end.
fn internal_error(lab: &Lab) -> Result<()> {
    let mut machine = guest(lab, "")?;
    let reason = [
        "its state is internal-error",
        "KVM internal error. Suberror: 1",
        &format!("RIP={NOTHING:016x}"),
        "EFER=",
    ];
    names(machine.ask(&format!("jump {NOTHING:#x}")), &reason)
}

fn linux(lab: &Lab) -> Result<()> {
    let mut linux = Linux::plain(lab, "")?;
    let reason = [
        "the guest ended the machine (\"guest-reset\")",
        "awaited was @done-1",
        "kernel BUG at drivers/misc/lkdtm/bugs.c",
        "RIP: 0010:lkdtm_BUG",
        "Call Trace:",
        "Kernel panic - not syncing",
    ];
    names(linux.run(&format!("echo BUG > {PROVOKE}")), &reason)
}

/// Without an end of QEMU by which the host would learn of it.
fn private_linux(lab: &Lab) -> Result<()> {
    let mut linux = Linux::private(lab, GOES_ON)?;
    let reason = [
        "the guest reset the machine (\"guest-reset\")",
        "BUG: kernel NULL pointer dereference",
        "RIP: 0010:lkdtm_EXCEPTION",
        "Kernel panic - not syncing",
    ];
    names(linux.run(&format!("echo EXCEPTION > {PROVOKE}")), &reason)
}
