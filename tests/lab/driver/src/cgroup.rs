//! Scenarios for control groups: whom the memory of either store is charged to, and what comes of a
//! limit that is too low. QEMU's own memory, and page tables, are charged as well, and the kernel
//! batches what it charges: a few MiB more or less say nothing.

use anyhow::{Result, ensure};

use crate::Lab;
use crate::host::{ControlGroup, HugePages};
use crate::machine::{Launch, Machine, OUR_GUEST, PAGE, PRIVATE, Side};
use crate::scenarios::{BASE, Scenario, same};
use Side::{Private, Shared};

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("cgroup-charges", charges),
        Scenario::new("cgroup-huge-pages", huge_pages),
        Scenario::new("cgroup-limit-shared", limit_shared),
        Scenario::new("cgroup-limit-private", limit_private),
        Scenario::new("cgroup-limit-prealloc", limit_prealloc),
        Scenario::new("cgroup-limit-conversion", limit_conversion),
    ]
}

const SIZE: u64 = 32 << 20;
const PAGES: u64 = SIZE / PAGE;
/// As exactly as charges are compared.
const HALF: u64 = SIZE / 2;

/// What a group is charged: all of it, what it holds of memfds, what of guest_memfds.
#[derive(Clone, Copy)]
struct Charged([u64; 3]);

impl Charged {
    fn to(group: &ControlGroup) -> Result<Charged> {
        Ok(Charged([
            group.number("memory.current")?,
            group.figure("memory.stat", "shmem")?,
            group.private_memory()?,
        ]))
    }

    /// How much more it is now, in halves of what tests convert.
    fn since(self, before: Charged) -> [i64; 3] {
        let mut more = [0; 3];
        for (more, (now, before)) in more.iter_mut().zip(self.0.into_iter().zip(before.0)) {
            *more = ((now as f64 - before as f64) / HALF as f64).round() as i64;
        }
        more
    }
}

/// Either store is charged to QEMU's group while it holds a page, and only then.
fn charges(lab: &Lab) -> Result<()> {
    let group = ControlGroup::new("guest")?;
    let mut machine = Launch::private(lab).before(&group.join()).start_guest()?;
    let start = Charged::to(&group)?;
    let mut step = |what: &str, expected, work: &dyn Fn(&mut Machine) -> Result<()>| {
        work(&mut machine)?;
        let more = Charged::to(&group)?.since(start);
        println!("  {what}: {more:?} times 16 MiB more (all, memfd, guest_memfd)");
        same(what, more, expected)
    };
    step("shared", [2, 2, 0], &|m| m.fill(BASE, PAGES, 7))?;
    step("made private", [0, 0, 0], &|m| {
        m.convert(BASE, PAGES, Private)
    })?;
    step("private", [2, 0, 2], &|m| m.fill(BASE, PAGES, 8))?;
    step("half of it shared", [1, 0, 1], &|m| {
        m.convert(BASE, PAGES / 2, Shared)
    })?;
    step("and touched", [2, 1, 1], &|m| m.fill(BASE, PAGES / 2, 9))?;
    machine.finish()
}

/// Huge pages are charged to their own controller, private memory beside them as ever.
fn huge_pages(lab: &Lab) -> Result<()> {
    let _pool = HugePages::reserve(128)?;
    let group = ControlGroup::new("guest")?;
    let huge = PRIVATE.replace("size=256M", "size=256M,hugetlb=on,hugetlbsize=2M");
    let launch = Launch::kvm(lab).with(&huge).with(OUR_GUEST);
    let mut machine = launch.before(&group.join()).start_guest()?;
    let start = Charged::to(&group)?;
    let huge = || group.number("hugetlb.2MB.current");
    let at_start = huge()?;
    machine.fill(BASE, PAGES, 7)?;
    same("hugetlb.2MB.current", huge()?, at_start + SIZE)?;
    same("memory", Charged::to(&group)?.since(start), [0, 0, 0])?;
    machine.convert(BASE, PAGES, Private)?;
    same("hugetlb.2MB.current", huge()?, at_start)?;
    machine.fill(BASE, PAGES, 8)?;
    same("memory", Charged::to(&group)?.since(start), [2, 0, 2])?;
    machine.finish()
}

/// With memory of either side beyond the limit, and nothing to swap to, the kernel kills QEMU.
fn limit_shared(lab: &Lab) -> Result<()> {
    limit(lab, |_| Ok(()))
}

fn limit_private(lab: &Lab) -> Result<()> {
    limit(lab, |machine| machine.convert(BASE, PAGES, Private))
}

fn limit(lab: &Lab, prepare: impl Fn(&mut Machine) -> Result<()>) -> Result<()> {
    let group = ControlGroup::new("guest")?;
    let mut machine = Launch::private(lab).before(&group.join()).start_guest()?;
    prepare(&mut machine)?;
    machine.fill(BASE, PAGES / 4, 7)?;
    group.set("memory.max", group.number("memory.current")? + HALF)?;
    machine.check(BASE, PAGES / 4, 7)?;
    machine.killed_by(&format!("fill {BASE:#x} {PAGES} 8"))?;
    same("killed", group.figure("memory.events", "oom_kill")?, 1)
}

/// With `prealloc=on` this shows when QEMU starts.
fn limit_prealloc(lab: &Lab) -> Result<()> {
    let group = ControlGroup::new("guest")?;
    group.set("memory.max", 128 << 20)?;
    let started = preallocated(lab, &group).start();
    ensure!(started.is_err(), "QEMU started");
    same("killed", group.figure("memory.events", "oom_kill")?, 1)
}

/// And when there is room for what the guest has, but not for a conversion's step beside it.
fn limit_conversion(lab: &Lab) -> Result<()> {
    let group = ControlGroup::new("guest")?;
    let mut machine = preallocated(lab, &group).start_guest()?;
    group.set(
        "memory.max",
        group.number("memory.current")? + SIZE + SIZE / 2,
    )?;
    machine.convert(BASE, PAGES, Private)?;
    machine.killed_by(&format!(
        "convert {:#x} {:#x} private",
        BASE + SIZE,
        2 * PAGES
    ))?;
    same("killed", group.figure("memory.events", "oom_kill")?, 1)
}

fn preallocated(lab: &Lab, group: &ControlGroup) -> Launch {
    let object = PRIVATE.replace("size=256M", "size=256M,prealloc=on");
    let launch = Launch::kvm(lab).with(&object).with(OUR_GUEST);
    launch.before(&group.join())
}
