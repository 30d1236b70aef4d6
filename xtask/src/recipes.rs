//! What the manual has for the tools that start QEMU: a service of systemd and a
//! domain of libvirt, each as it stands there.
//!
//! Neither tool can start a machine in the lab. So systemd checks its unit, and
//! the lab starts what is in it, with its limit. Libvirt starts its domain here,
//! with the emulated agent, and the command line that it makes of the domain is
//! what the lab starts, with the private memory of a real kernel.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use crate::Context;
use crate::docs::{Documented, Typed, rst_blocks};
use crate::lab::Lab;
use crate::protocol::{Event, Verdict};
use crate::qemu;
use crate::run;
use crate::setup;
use crate::suites::Tally;

pub const VIRSH: &str = "virsh ";

const LAB_LIMIT: Duration = Duration::from_secs(5 * 60);
const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";
/// What shows that the backend is where the guest has its RAM.
const CONVERTED: &str = "private            8 MiB";
const NOBODY: u32 = 65534;
const LIBVIRT: &[&str] = &["libvirt-clients", "libvirt-daemon-driver-qemu"];
const SYSTEMD: &[&str] = &["systemd"];

/// The text of the only block in a language.
fn block(page: &str, language: &str) -> Result<String> {
    let mut blocks = rst_blocks(page);
    blocks.retain(|block| block.language == language);
    let [block] = blocks.as_slice() else {
        anyhow::bail!("the page has {} blocks of {language}", blocks.len());
    };
    let lines = block.lines.iter().map(|(_, line)| *line);
    let lines = lines.map(|line| line.strip_prefix("   ").unwrap_or(line));
    Ok(lines.flat_map(|line| [line, "\n"]).collect())
}

/// What the service starts, in a group with its limit, as systemd would.
pub fn service(page: &str) -> Result<Documented> {
    let unit = block(page, "ini")?.replace("\\\n", " ");
    let value = |name: &str| {
        let mut lines = unit.lines().map(str::trim);
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        value.with_context(|| format!("the service has no {name}="))
    };
    const GROUP: &str = "/sys/fs/cgroup/service";
    Ok(Documented {
        at: "the service of systemd".to_owned(),
        before: vec![
            format!("mkdir {GROUP}"),
            format!("echo {} > {GROUP}/memory.max", value("MemoryMax")?),
            format!("echo $$ > {GROUP}/cgroup.procs"),
        ],
        command: value("ExecStart")?.to_owned(),
        ..Documented::default()
    })
}

/// Has systemd and libvirt take what is theirs; what cannot be had is skipped.
pub fn check(
    cx: &Context,
    name: &str,
    page: &str,
    virsh: &[Documented],
    tally: &mut Tally,
) -> Result<()> {
    let lab = Lab::prepare(cx, None)?;
    let service = format!("{name}: the service of systemd");
    match setup::packages(cx, SYSTEMD) {
        Ok(()) => tally.check(&service, verify(&lab, page)),
        Err(why) => tally.skipped.push(format!("{service}: {why:#}")),
    }
    let domain = format!("{name}: the domain of libvirt");
    match setup::packages(cx, LIBVIRT).and_then(|()| Libvirt::new(&lab)) {
        Ok(libvirt) => {
            let starts = libvirt.starts(page, virsh);
            tally.check(&format!("{domain}, emulated"), starts);
            let in_the_lab = libvirt
                .command_line(page)
                .and_then(|command| run::work(&domain, || start_in_the_lab(cx, lab, command)));
            tally.check(&format!("{domain}, in the lab"), in_the_lab);
        }
        Err(why) => tally.skipped.push(format!("{domain}: {why:#}")),
    }
    Ok(())
}

fn verify(lab: &Lab, page: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let unit = dir.path().join("private-guest.service");
    let program = lab.system().display().to_string();
    fs::write(&unit, block(page, "ini")?.replace(PROGRAM, &program))?;
    let output = Command::new("systemd-analyze")
        .args(["--recursive-errors=no", "verify"])
        .arg(&unit)
        .output()
        .context("systemd-analyze")?;
    // It may have something to say about the machine's own units, too.
    let said = String::from_utf8_lossy(&output.stderr);
    let ours: Vec<_> = said
        .lines()
        .filter(|line| line.contains("private-guest.service"))
        .collect();
    ensure!(ours.is_empty(), "{}", ours.join("; "));
    ensure!(output.status.success(), "{}: {said}", output.status);
    Ok(())
}

/// Libvirt within virsh, which needs no daemon, and a folder for all that it
/// keeps and starts. Root's own would want users that only the daemon's package
/// makes: it runs as nobody then.
struct Libvirt {
    dir: TempDir,
    is_root: bool,
}

impl Libvirt {
    fn new(lab: &Lab) -> Result<Self> {
        let libvirt = Self {
            dir: tempfile::tempdir()?,
            is_root: run::ask(Command::new("id").arg("-u"))? == "0",
        };
        let etc = libvirt.path("root/etc");
        fs::create_dir_all(&etc)?;
        // There is no virtlogd either.
        fs::write(etc.join("qemu.conf"), "stdio_handler = \"file\"\n")?;
        fs::copy(lab.system(), libvirt.path(qemu::SYSTEM))?;
        for name in ["kvmvapic.bin", "qboot.rom"] {
            fs::copy(lab.firmware().join(name), libvirt.path(name))?;
        }
        if libvirt.is_root {
            let owner = format!("{NOBODY}:{NOBODY}");
            let mut chown = Command::new("chown");
            run::ask(chown.args(["-R", &owner]).arg(libvirt.dir.path()))?;
        }
        libvirt.virsh("uri")?;
        Ok(libvirt)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn emulator(&self) -> String {
        self.path(qemu::SYSTEM).display().to_string()
    }

    fn virsh(&self, commands: &str) -> Result<String> {
        let root = self.path("root");
        let mut command = Command::new("virsh");
        if self.is_root {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
            .arg(format!("--connect=qemu:///embed?root={}", root.display()))
            .arg(commands)
            .current_dir(self.dir.path())
            .env("LC_ALL", "C")
            .env("HOME", self.dir.path())
            .env("XDG_RUNTIME_DIR", self.dir.path());
        for name in ["XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"] {
            command.env_remove(name);
        }
        run::ask(&mut command)
    }

    /// The domain with what there is here: no KVM, but the emulator.
    fn domain(&self, page: &str) -> Result<String> {
        let domain = block(page, "xml")?;
        ensure!(domain.contains(PROGRAM), "the domain has no {PROGRAM}");
        Ok(domain
            .replace("type='kvm'", "type='qemu'")
            .replace(PROGRAM, &self.emulator()))
    }

    /// The document's own commands, with the emulated agent and a firmware.
    fn starts(&self, page: &str, documented: &[Documented]) -> Result<()> {
        const ARGUMENTS: &str = "  </qemu:commandline>";
        let argument = |value: &str| format!("    <qemu:arg value='{value}'/>\n");
        let guest = argument("-object") + &argument("sw-protected-guest,id=cgs0");
        let firmware = self.dir.path().display().to_string();
        let firmware = ["-L", &firmware, "-bios", "qboot.rom"];
        let firmware: String = firmware.into_iter().map(argument).collect();
        let domain = self
            .domain(page)?
            .replace(&guest, "")
            .replace("confidential-guest-support=cgs0,", "")
            .replace("size=256M", "size=256M,emulate=on")
            .replace(ARGUMENTS, &(firmware + ARGUMENTS));
        fs::write(self.path("private.xml"), domain)?;
        // In one virsh, where libvirt is.
        let commands = documented.iter();
        let commands = commands.filter_map(|one| one.command.strip_prefix(VIRSH));
        let said = self.virsh(&commands.collect::<Vec<_>>().join("; "))?;
        for shown in ["ram0 (emulated, protects nothing)", CONVERTED] {
            ensure!(said.contains(shown), "'{shown}' is not in: {said}");
        }
        Ok(())
    }

    /// What libvirt makes of the domain, but for its own folders, its monitor,
    /// and the start and the end that it tells QEMU by it.
    fn command_line(&self, page: &str) -> Result<Documented> {
        fs::write(self.path("native.xml"), self.domain(page)?)?;
        let line = self.virsh("domxml-to-native qemu-argv --xml native.xml")?;
        let (_, arguments) = line
            .split_once(&format!(" {} ", self.emulator()))
            .with_context(|| format!("the emulator is not in: {line}"))?;
        let words: Vec<_> = arguments
            .split_whitespace()
            .map(|word| word.trim_matches('\''))
            .collect();
        let own_folders = self.dir.path().display().to_string();
        let mut kept = Vec::new();
        let mut words = words.into_iter().peekable();
        while let Some(word) = words.next() {
            let value = words.next_if(|next| !next.starts_with('-')).unwrap_or("");
            let told = ["-mon", "-S", "-no-shutdown"].contains(&word);
            if !told && !value.contains(&own_folders) {
                kept.extend([word, value]);
            }
        }
        let command = kept.join(" ").replace("-accel tcg", "-accel kvm");
        ensure!(command.contains("-accel kvm"), "no accelerator: {command}");
        Ok(Documented {
            at: "the domain of libvirt".to_owned(),
            command: format!("{PROGRAM} {command}"),
            monitor: vec![
                Typed {
                    text: "x_private_memory_convert 0x1000000 8M on".to_owned(),
                    printed: Vec::new(),
                },
                Typed {
                    text: "info private-memory".to_owned(),
                    printed: ["ram0 (sw-protected)", CONVERTED].map(str::to_owned).into(),
                },
            ],
            ..Documented::default()
        })
    }
}

fn start_in_the_lab(cx: &Context, lab: Lab, command: Documented) -> Result<()> {
    const SCENARIO: &str = "documented-commands";
    let commands = serde_json::to_vec(&[command])?;
    let lab = lab.with_file("/docs/commands.json", &commands)?;
    let mut verdicts = Vec::new();
    let options = format!("lab.run={SCENARIO}");
    lab.boot(cx, "libvirt", &options, LAB_LIMIT, |event| {
        if let Event::Test(test) = event {
            verdicts.push(test);
        }
    })?;
    let [test] = verdicts.as_slice() else {
        anyhow::bail!("the lab gave {} verdicts", verdicts.len());
    };
    ensure!(test.result == Verdict::Ok, "{}", test.why);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_starts_with_its_limit() -> Result<()> {
        let page = "A\n\n.. code-block:: ini\n\n   [Service]\n   ExecStart=/usr/bin/q -a \\\n\
                    \u{20}      -b\n   MemoryMax=1M\n\nB\n";
        let service = service(page)?;
        let words: Vec<_> = service.command.split_whitespace().collect();
        assert_eq!(words, ["/usr/bin/q", "-a", "-b"]);
        assert!(service.before[1].starts_with("echo 1M > "));
        Ok(())
    }
}
