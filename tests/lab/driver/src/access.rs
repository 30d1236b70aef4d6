//! Scenarios for the host's own ways to guest memory: none gives bytes of a private page, nor
//! takes a page for it.

use anyhow::{Result, ensure};
use serde_json::json;

use crate::Lab;
use crate::gdb::Gdb;
use crate::machine::{Launch, PAGE, Side, pattern};
use crate::scenarios::{BASE, Scenario, same_held};
use Side::Private;

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("monitor-reads-shared-only", monitor),
        Scenario::new("gdbstub-reads-shared-only", gdbstub),
        Scenario::new("neither-migrated-nor-saved", neither_migrated_nor_saved),
    ]
}

/// `memsave`, which takes a virtual address (our guest's are the same), `x` and `xp`.
fn monitor(lab: &Lab) -> Result<()> {
    const FILE: &str = "/tmp/memsave";
    let mut machine = Launch::private(lab).start_guest()?;
    machine.convert(BASE + PAGE, 1, Private)?;
    machine.fill(BASE, 2, 7)?;
    let memsave = |addr: u64| json!({ "val": addr, "size": PAGE, "filename": FILE });
    machine.qmp.call("memsave", memsave(BASE))?;
    ensure!(
        std::fs::read(FILE)? == pattern(BASE, PAGE, 7),
        "memsave of a shared page did not give the guest's pattern"
    );
    let text = machine.qmp.refused("memsave", memsave(BASE + PAGE))?;
    println!("  memsave: {text}");
    let first = u64::from_le_bytes(pattern(BASE, 8, 7).try_into().unwrap_or_default());
    for command in ["x", "xp"] {
        let shown = machine.hmp(&format!("{command} /1gx {BASE:#x}"))?;
        ensure!(
            shown.contains(&format!("{first:#018x}")),
            "'{command}' does not show a shared page: {shown}"
        );
        let shown = machine.hmp(&format!("{command} /1gx {:#x}", BASE + PAGE))?;
        println!("  {command}: {}", shown.trim());
        ensure!(
            shown.contains("annot access"),
            "'{command}' shows a private page: {shown}"
        );
    }
    same_held(&machine.region("ram0")?, PAGE)?;
    machine.finish()
}

/// With KVM nobody gives private contents out: every way to take a machine along says so.
fn neither_migrated_nor_saved(lab: &Lab) -> Result<()> {
    let mut machine = Launch::private(lab).start_guest()?;
    machine.convert(BASE, 2, Private)?;
    machine.fill(BASE, 2, 7)?;
    for mode in ["normal", "cpr-reboot"] {
        machine
            .qmp
            .call("migrate-set-parameters", json!({ "mode": mode }))?;
        let to_file = json!({ "uri": "file:/tmp/migration" });
        let text = machine.qmp.refused("migrate", to_file)?;
        println!("  {mode}: {text}");
        ensure!(
            text.contains("ram0") && text.contains("cannot be migrated or saved"),
            "the refusal of mode {mode} does not say why: {text}"
        );
    }
    let text = machine.hmp("savevm tag")?;
    ensure!(
        text.contains("cannot be migrated or saved"),
        "savevm does not say why it cannot: {text}"
    );
    machine.check(BASE, 2, 7)?;
    same_held(&machine.region("ram0")?, 2 * PAGE)?;
    machine.finish()
}

fn gdbstub(lab: &Lab) -> Result<()> {
    const SOCKET: &str = "/tmp/gdb.sock";
    let mut machine = Launch::private(lab)
        .with(&format!("-gdb unix:{SOCKET},server=on,wait=off"))
        .start_guest()?;
    machine.convert(BASE + PAGE, 1, Private)?;
    machine.fill(BASE, 2, 7)?;
    let mut gdb = Gdb::connect(SOCKET)?;
    let bytes = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
    let found = gdb.ask(&format!("m{BASE:x},8"))?;
    ensure!(
        found == bytes(&pattern(BASE, 8, 7)),
        "the debugger does not read a shared page: {found}"
    );
    for physical in [0, 1] {
        let reply = gdb.ask(&format!("Qqemu.PhyMemMode:{physical}"))?;
        ensure!(reply == "OK", "the debugger's reply to PhyMemMode: {reply}");
        for (what, request) in [
            ("reads", format!("m{:x},8", BASE + PAGE)),
            ("writes", format!("M{:x},8:0000000000000000", BASE + PAGE)),
        ] {
            let found = gdb.ask(&request)?;
            ensure!(
                found.starts_with('E'),
                "the debugger {what} a private page (PhyMemMode {physical}): {found}"
            );
        }
    }
    // The debugger stopped the machine when it came, and lets it go when it detaches.
    gdb.detach()?;
    machine.check(BASE, 2, 7)?;
    same_held(&machine.region("ram0")?, PAGE)?;
    machine.finish()
}
