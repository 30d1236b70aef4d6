//! PID 1 of the lab's outer machine. Owns the way from the kernel command line to power off;
//! what is tested lives in `scenarios`, `demo` and `conformance`, QEMU is handled by `machine`,
//! `qmp` and `watch`.
//!
//! `lab.run=all|demo|NAME,..`  run scenarios and conformance tests (`lab.line=10.2` picks the QEMU)
//! `lab.bench`                 measure conversions; `lab.bench=vfio`: with a device assigned
//! `lab.soak=SEED:REQUESTS`    a hostile guest sends so many requests
//! `lab.cmd=BASE64`            run a shell command
//! `lab.shell`                 a shell on the console
//! `lab.role=guest`            be the plain Linux guest
//!
//! As a command, in a Linux guest that has it: `tell-secrets` prints the hashes of its secrets.
//!
//! Results go to the console as lines `@lab {json}`; all other lines are a log for people.

mod access;
mod assigned;
mod bare;
mod bench;
mod cgroup;
mod conformance;
mod death;
mod demo;
mod docs;
mod failure;
mod gdb;
mod host;
mod hostile;
mod kernel_log;
mod launch;
mod lifecycle;
mod linux;
mod machine;
mod old_memory;
mod properties;
mod qmp;
mod refusals;
mod scenarios;
mod secrets;
mod tracing;
mod watch;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// What every scenario may know about the place it runs in.
pub struct Lab {
    pub line: String,
    pub kernel: String,
    pub kvm: host::Kvm,
}

fn main() -> Result<()> {
    if std::env::args().nth(1).as_deref() == Some("tell-secrets") {
        return secrets::tell();
    }
    if std::process::id() != 1 {
        bail!("lab-driver is the init process of the lab and does nothing elsewhere");
    }
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => {}
        Ok(Err(e)) => report(json!({"error": format!("{e:#}")})),
        Err(_) => report(json!({"error": "the lab driver panicked"})),
    }
    host::power_off()
}

fn run() -> Result<()> {
    host::mount_all()?;
    let cmdline = std::fs::read_to_string("/proc/cmdline").context("/proc/cmdline")?;
    let option = |name: &str| {
        cmdline
            .split_whitespace()
            .find_map(|word| word.strip_prefix("lab.")?.strip_prefix(name))
            .map(|rest| rest.strip_prefix('=').unwrap_or(rest).to_string())
    };
    if option("role").as_deref() == Some("guest") {
        return host::be_linux_guest();
    }
    if let Some(command) = option("cmd") {
        report(json!({"exit": host::run_command(&command)?}));
    } else if option("shell").is_some() {
        host::run_shell()?;
    } else if let Some(names) = option("run") {
        run_tests(&Lab::here(option("line"))?, &names)?;
    } else if let Some(what) = option("bench") {
        let lab = Lab::here(option("line"))?;
        match &*what {
            "vfio" => assigned::bench(&lab)?,
            _ => bench::run(&lab)?,
        }
    } else if let Some(round) = option("soak") {
        hostile::soak(&Lab::here(option("line"))?, &round)?;
    } else {
        bail!(
            "no lab.run=, lab.bench, lab.soak=, lab.cmd=, lab.shell or lab.role= on the kernel command line"
        );
    }
    report(json!({"done": true}));
    Ok(())
}

impl Lab {
    fn here(line: Option<String>) -> Result<Lab> {
        let lab = Lab {
            line: line.unwrap_or_else(|| "10.2".into()),
            kernel: host::kernel(),
            kvm: host::Kvm::probe()?,
        };
        println!("kernel {}, {}", lab.kernel, lab.kvm);
        Ok(lab)
    }
}

fn run_tests(lab: &Lab, names: &str) -> Result<()> {
    let scenarios = scenarios::all();
    let deaths = death::of_the_lab();
    for name in names.split(',').filter(|name| *name != "all") {
        if name.contains("::") {
            run_conformance(lab, name);
        } else if let Some(scenario) = scenarios
            .iter()
            .chain(&deaths)
            .find(|scenario| scenario.name == name)
        {
            run_scenario(lab, scenario);
        } else {
            verdict(name, "failed", "there is no such test");
        }
    }
    if names.split(',').any(|name| name == "all") {
        scenarios
            .iter()
            .for_each(|scenario| run_scenario(lab, scenario));
        conformance::all()?
            .iter()
            .for_each(|name| run_conformance(lab, name));
    }
    Ok(())
}

fn run_conformance(lab: &Lab, name: &str) {
    begin(name);
    match conformance::run(name) {
        Ok(None) => verdict(name, "ok", ""),
        // Here is all that a test may ask for.
        Ok(Some(why)) if lab.kvm.has_private_memory() => {
            let why = format!("it skipped itself: {why}; there are {}", lab.kvm);
            verdict(name, "failed", &why);
        }
        Ok(Some(why)) => verdict(name, "skipped", &why),
        Err(e) => verdict(name, "failed", &format!("{e:#}")),
    }
}

fn run_scenario(lab: &Lab, scenario: &scenarios::Scenario) {
    if scenario.needs_private && !lab.kvm.has_private_memory() {
        let why = format!("this KVM has no software-protected VMs: {}", lab.kvm);
        return verdict(scenario.name, "skipped", &why);
    }
    if let Some((guest, _)) = scenario.needs_guest.filter(|(_, line)| *line != lab.line) {
        let why = format!("QEMU {} has no {guest}", lab.line);
        return verdict(scenario.name, "skipped", &why);
    }
    if let Some(why) = linux::missing().filter(|_| scenario.needs_private_linux) {
        return verdict(scenario.name, "skipped", why);
    }
    if scenario.needs_assignable {
        match host::assignable() {
            Ok(Ok(_)) => {}
            Ok(Err(why)) => return verdict(scenario.name, "skipped", why),
            Err(e) => return verdict(scenario.name, "failed", &format!("{e:#}")),
        }
    }
    let (major, minor) = scenario.needs_kernel;
    if host::kernel_version(&lab.kernel) < (major, minor) {
        let why = format!("it needs Linux {major}.{minor}, this is {}", lab.kernel);
        return verdict(scenario.name, "skipped", &why);
    }
    begin(scenario.name);
    match catch_unwind(AssertUnwindSafe(|| scenario.run(lab))) {
        Ok(Ok(())) => verdict(scenario.name, "ok", ""),
        Ok(Err(e)) => verdict(scenario.name, "failed", &format!("{e:#}")),
        Err(_) => verdict(
            scenario.name,
            "failed",
            "the scenario panicked; see the log",
        ),
    }
}

/// Who reads the console knows which test runs, and since when.
fn begin(name: &str) {
    report(json!({"begin": name}));
}

fn verdict(name: &str, result: &str, why: &str) {
    report(json!({"test": name, "result": result, "why": why}));
}

/// One line for the machine that reads the console.
pub fn report(value: Value) {
    println!("@lab {value}");
    // A console that cannot be written to leaves nobody to tell.
    let _ = std::io::stdout().flush();
}
