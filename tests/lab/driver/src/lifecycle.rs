//! What comes and goes in the life of a Linux with private RAM.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::Lab;
use crate::host;
use crate::linux::Linux;
use crate::machine::{PAGE, Slot};
use crate::scenarios::{Scenario, same};

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::private_linux("private-linux-reboots", |lab| reboots(lab, 3)),
        Scenario::private_linux("private-linux-20-reboots", |lab| reboots(lab, 20)).on_request(),
    ]
}

/// What a QEMU has of its host, and what would be more after each reboot if it leaked.
struct Possessions {
    fds: usize,
    mappings: usize,
    slots: Vec<Slot>,
    private_held: u64,
    shared_held: u64,
}

impl Possessions {
    fn of(linux: &mut Linux) -> Result<Possessions> {
        let info = linux.is_private()?;
        let pid = linux.machine.pid();
        Ok(Possessions {
            fds: host::fds_of(pid)?.len(),
            mappings: mappings(pid)?,
            slots: info.slots,
            private_held: info.private_held.context("private-held")?,
            shared_held: info.shared_held.context("shared-held")?,
        })
    }

    fn tell(&self, when: &str) {
        let Possessions {
            fds,
            mappings,
            private_held,
            shared_held,
            ..
        } = self;
        println!(
            "  {when}: {fds} fds, {mappings} mappings, {} KiB private, {} KiB shared",
            private_held >> 10,
            shared_held >> 10
        );
    }

    /// A Linux that has just started has not always used the same pages, but about as many.
    fn not_more_than(&self, first: &Possessions) -> Result<()> {
        const ABOUT: u64 = 512 * PAGE;
        same("fds", self.fds, first.fds)?;
        same("mappings", self.mappings, first.mappings)?;
        same("slots", &self.slots, &first.slots)?;
        for (what, now, then) in [
            ("private", self.private_held, first.private_held),
            ("shared", self.shared_held, first.shared_held),
        ] {
            ensure!(
                now <= then + ABOUT,
                "{what} memory grew from {then} to {now} bytes"
            );
        }
        Ok(())
    }
}

/// How many mappings a process has, but the anonymous ones: threads that work for QEMU now and then,
/// and their stacks, end when there is nothing to do.
fn mappings(pid: u32) -> Result<usize> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let has_name = |line: &&str| line.split_whitespace().nth(5).is_some();
    Ok(maps.lines().filter(has_name).count())
}

/// Each boot is like the first one, whoever asked for it, and leaves nothing behind.
fn reboots(lab: &Lab, count: u32) -> Result<()> {
    let mut linux = Linux::private(lab, "")?;
    let reset = json!({"reboot": "reset"}); // and not the end, as other tests have it
    linux.machine.qmp.call("set-action", reset)?;
    linux.reboot()?;
    let first = Possessions::of(&mut linux)?;
    first.tell("after the first reboot");
    for i in 2..=count {
        // Far more than a boot needs: it would be seen if it stayed.
        linux.run("dd if=/dev/urandom of=/tmp/x bs=1M count=24 2>/dev/null")?;
        if i % 2 == 0 {
            linux.reset()?;
        } else {
            linux.reboot()?;
        }
        let now = Possessions::of(&mut linux)?;
        now.tell(&format!("after reboot {i}"));
        now.not_more_than(&first)?;
    }
    linux.finish()
}
