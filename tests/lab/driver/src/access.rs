//! Scenarios for the host's own ways to guest memory: none gives bytes of a private page, nor
//! takes a page for it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::Lab;
use crate::machine::{Launch, PAGE, Side, pattern};
use crate::qmp::DEADLINE;
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
    let mut gdb = UnixStream::connect(SOCKET).context(SOCKET)?;
    gdb.set_read_timeout(Some(DEADLINE))?;
    let bytes = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
    let found = gdb_ask(&mut gdb, &format!("m{BASE:x},8"))?;
    ensure!(
        found == bytes(&pattern(BASE, 8, 7)),
        "the debugger does not read a shared page: {found}"
    );
    for (what, request) in [
        ("reads", format!("m{:x},8", BASE + PAGE)),
        ("writes", format!("M{:x},8:0000000000000000", BASE + PAGE)),
    ] {
        let found = gdb_ask(&mut gdb, &request)?;
        ensure!(
            found.starts_with('E'),
            "the debugger {what} a private page: {found}"
        );
    }
    // The debugger stopped the machine when it came, and lets it go when it detaches.
    gdb_ask(&mut gdb, "D")?;
    drop(gdb);
    machine.check(BASE, 2, 7)?;
    same_held(&machine.region("ram0")?, PAGE)?;
    machine.finish()
}

/// One packet of the GDB remote protocol, `$text#checksum`, and the text of the reply.
fn gdb_ask(gdb: &mut UnixStream, request: &str) -> Result<String> {
    let sum = request.bytes().fold(0u8, u8::wrapping_add);
    write!(gdb, "${request}#{sum:02x}")?;
    let mut reply = Vec::new();
    let mut byte = [0];
    while reply.iter().rev().nth(2) != Some(&b'#') {
        if gdb.read(&mut byte)? == 0 {
            bail!("the debugger's connection ended");
        }
        reply.push(byte[0]);
    }
    gdb.write_all(b"+")?;
    let text = String::from_utf8_lossy(&reply);
    let start = text.find('$').context("no packet")? + 1;
    Ok(text[start..text.len() - 3].to_owned())
}
