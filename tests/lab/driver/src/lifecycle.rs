//! What comes and goes in the life of a Linux with private RAM.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::Lab;
use crate::host::{self, ControlGroup};
use crate::linux::{self, Linux};
use crate::machine::{PAGE, Slot};
use crate::qmp::DEADLINE;
use crate::scenarios::{DIMM, Scenario, fds_come_back, object_add, plug, same};

pub fn all() -> Vec<Scenario> {
    // Before, a balloon cannot be told which memory to use.
    const MAPS: (u32, u32) = (6, 18);
    vec![
        Scenario::private_linux("private-linux-balloon", balloon).since(MAPS),
        Scenario::private_linux("private-linux-free-pages", free_pages).since(MAPS),
        Scenario::private_linux("private-linux-dimm", dimm),
        Scenario::private_linux("private-linux-reboots", reboots),
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

    fn not_more_than(&self, first: &Possessions) -> Result<()> {
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

/// A Linux that has just started has not always used the same pages, but as many, or less than this more.
const ABOUT: u64 = 256 * PAGE;

/// How many mappings a process has, but the anonymous ones: threads that work for QEMU now and then,
/// and their stacks, end when there is nothing to do.
fn mappings(pid: u32) -> Result<usize> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let has_name = |line: &&str| line.split_whitespace().nth(5).is_some();
    Ok(maps.lines().filter(has_name).count())
}

/// Each boot is like the first one, whoever asked for it, and leaves nothing behind.
fn reboots(lab: &Lab) -> Result<()> {
    const COUNT: u32 = 20;
    let mut linux = Linux::private(lab, "")?;
    let reset = json!({"reboot": "reset"}); // and not the end, as other tests have it
    linux.machine.qmp.call("set-action", reset)?;
    linux.reboot()?;
    let first = Possessions::of(&mut linux)?;
    first.tell("after the first reboot");
    for i in 2..=COUNT {
        use_memory(&mut linux, "12")?;
        let used = linux.memory()?.private_held.context("private-held")?;
        ensure!(
            used > first.private_held + 4 * ABOUT,
            "it would not be seen if what the guest used stayed"
        );
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

/// What a guest's private memory takes: as the library counts it, and as the kernel charges it.
#[derive(Clone, Copy)]
struct Held {
    counted: u64,
    charged: u64,
}

impl Held {
    fn by(linux: &mut Linux, group: &ControlGroup) -> Result<Held> {
        let objects = linux.machine.private_memory()?;
        let counted = objects.iter().map(|info| info.private_held).sum();
        Ok(Held {
            counted: Option::context(counted, "private-held")?,
            charged: group.private_memory()?,
        })
    }

    fn tell(&self, when: &str) {
        println!(
            "  {when}: {} KiB private, {} KiB charged",
            self.counted >> 10,
            self.charged >> 10
        );
    }

    fn is_less(&self, by: u64, than: Held) -> bool {
        self.counted + by <= than.counted && self.charged + by <= than.charged
    }
}

/// Has the guest use this many MiB, until they are freed.
fn use_memory(linux: &mut Linux, mib: &str) -> Result<()> {
    linux.run("mkdir -p /used && mount -t tmpfs -o size=100% used /used")?;
    linux.run(&format!("dd if=/dev/zero of=/used/file bs=1M count={mib}"))?;
    Ok(())
}

/// All that it has, but for 8 MiB.
const ALL: &str = "$(awk '/MemFree/ {print int($2 / 1024) - 8}' /proc/meminfo)";

fn free_memory(linux: &mut Linux) -> Result<()> {
    linux.run("umount /used").map(drop)
}

/// A file of 4 MiB, by which it shows whether memory keeps what it should.
struct Kept {
    checksum: String,
}

impl Kept {
    const SIZE: u64 = 4 << 20;
    const SUM: &str = "sha256sum /kept/file";

    fn new(linux: &mut Linux) -> Result<Kept> {
        linux.run("mkdir -p /kept && mount -t tmpfs kept /kept")?;
        linux.run("dd if=/dev/urandom of=/kept/file bs=1M count=4")?;
        let checksum = linux::checksum(&linux.run(Kept::SUM)?);
        Ok(Kept { checksum })
    }

    /// It is as it was; then it goes.
    fn check(self, linux: &mut Linux) -> Result<()> {
        let now = linux::checksum(&linux.run(Kept::SUM)?);
        same("the kept file's checksum", now, self.checksum)?;
        linux.run("umount /kept").map(drop)
    }
}

/// Private memory that the operator asks back is the host's, until the guest gets it back and uses it.
fn balloon(lab: &Lab) -> Result<()> {
    const SIZE: u64 = 32 << 20;
    // Some of it may be what the guest had not used.
    const MOST: u64 = SIZE / 4 * 3;
    let group = ControlGroup::new("linux")?;
    let mut linux = Linux::small(lab, &group, &linux::balloon_device())?;
    let all = linux.memory()?.size;
    let kept = Kept::new(&mut linux)?;
    use_memory(&mut linux, ALL)?;
    free_memory(&mut linux)?;
    let used = Held::by(&mut linux, &group)?;
    used.tell("when the guest has used all of its memory, and freed most");

    linux.set_balloon(all - SIZE)?;
    let given = Held::by(&mut linux, &group)?;
    given.tell("when it has given back 32 MiB");
    ensure!(given.is_less(MOST, used), "the host got too little");
    linux.is_private()?;

    linux.set_balloon(all)?;
    use_memory(&mut linux, ALL)?;
    let back = Held::by(&mut linux, &group)?;
    back.tell("when it has got them back, and uses all");
    ensure!(given.is_less(MOST, back), "the guest got too little");
    linux.is_private()?;
    kept.check(&mut linux)?;
    linux.finish()
}

/// A guest that reports its free pages gives them back unasked.
fn free_pages(lab: &Lab) -> Result<()> {
    // Blocks of 2 MiB are reported, of which all must be free.
    const MOST: u64 = 16 << 20;
    let group = ControlGroup::new("linux")?;
    let device = linux::balloon_device() + ",free-page-reporting=on";
    let mut linux = Linux::small(lab, &group, &device)?;
    let kept = Kept::new(&mut linux)?;
    use_memory(&mut linux, "32")?;
    let used = Held::by(&mut linux, &group)?;
    used.tell("while the guest uses 32 MiB");

    free_memory(&mut linux)?;
    let end = Instant::now() + DEADLINE;
    let mut freed = Held::by(&mut linux, &group)?;
    while !freed.is_less(MOST, used) {
        ensure!(Instant::now() < end, "no end of waiting for {MOST} bytes");
        thread::sleep(Duration::from_millis(100));
        freed = Held::by(&mut linux, &group)?;
    }
    freed.tell("when it has freed and reported them");
    linux.is_private()?;
    kept.check(&mut linux)?;
    linux.finish()
}

/// A DIMM becomes private before the guest uses it, and is all the host's when it goes; what was on it
/// the guest has elsewhere then.
fn dimm(lab: &Lab) -> Result<()> {
    let group = ControlGroup::new("linux")?;
    let mut linux = Linux::small(lab, &group, "-m slots=2,maxmem=1G")?;
    linux.run("echo online_movable > /sys/devices/system/memory/auto_online_blocks")?;
    let fds = host::fds_of(linux.machine.pid())?;
    for _ in 0..2 {
        linux
            .machine
            .qmp
            .call("object-add", object_add("ram1", DIMM))?;
        plug(&mut linux.machine, None)?;
        takes_dimm(&mut linux)?;
        let kept = uses_dimm(&mut linux)?;
        let used = Held::by(&mut linux, &group)?;
        used.tell("with the DIMM");

        free_memory(&mut linux)?;
        linux
            .machine
            .qmp
            .call("device_del", json!({"id": "dimm1"}))?;
        linux.machine.qmp.event("DEVICE_DELETED")?;
        linux
            .machine
            .qmp
            .call("object-del", json!({"id": "ram1"}))?;
        fds_come_back(&linux.machine, &fds)?;
        let left = Held::by(&mut linux, &group)?;
        left.tell("without it");
        // The file has moved to memory that may not have been used before.
        ensure!(
            left.is_less(FILLED - Kept::SIZE, used),
            "the host got too little"
        );
        kept.check(&mut linux)?;
    }
    linux.is_private()?;
    linux.finish()
}

/// What the guest says of a DIMM that was plugged in. (Of one that is to go it says more than once how
/// far it is.)
fn takes_dimm(linux: &mut Linux) -> Result<()> {
    const DEVICE_CHECK: u64 = 1;
    loop {
        let told = linux.machine.qmp.event("ACPI_DEVICE_OST")?;
        if told["info"]["source"] == DEVICE_CHECK {
            return same(
                "the guest's status",
                told["info"]["status"].as_i64(),
                Some(0),
            );
        }
    }
}

/// What is written first to memory that is plugged in; movable memory is what a file in memory takes first.
const FILLED: u64 = 16 << 20;

fn uses_dimm(linux: &mut Linux) -> Result<Kept> {
    same("private", linux.machine.region("ram1")?.private, DIMM)?;
    let kept = Kept::new(linux)?;
    use_memory(linux, "16")?;
    let info = linux.machine.region("ram1")?;
    let held = info.private_held.context("private-held")?;
    println!("  the DIMM holds {} KiB", held >> 10);
    ensure!(held >= Kept::SIZE + FILLED, "the guest does not use it");
    same("shared-held", info.shared_held, Some(0))?;
    Ok(kept)
}
