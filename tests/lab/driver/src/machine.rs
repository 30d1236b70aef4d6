//! The inner machine: a QEMU process with a QMP connection and our guest (or Linux) on its serial
//! line. Owns the process: it is killed when the value goes away.

use std::collections::HashMap;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::libc;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Lab;
use crate::qmp::{DEADLINE, Qmp};
use crate::watch::{Told, Watch};

pub const PAGE: u64 = 4096;
/// How many extents are asked for at a time: few, so that lists have many pages.
const EXTENTS_LIMIT: usize = 64;
pub const OUR_GUEST: &str = "-bios /guest/guest.bin";
/// The usual private machine, all its memory in one object `ram0`.
pub const PRIVATE: &str = "-m 256M -object sw-protected-guest,id=cgs0 \
    -object memory-backend-private,id=ram0,size=256M \
    -machine q35,smm=off,confidential-guest-support=cgs0,memory-backend=ram0";

/// A QEMU command line in the making.
pub struct Launch {
    qemu: PathBuf,
    args: Vec<String>,
    environment: Vec<(&'static str, String)>,
    before: Vec<String>,
    locks_memory: bool,
}

impl Launch {
    /// Everything but the machine, its memory, its accelerator and its guest.
    pub fn bare(lab: &Lab) -> Launch {
        let qemu = format!("/qemu/{}/qemu-system-x86_64", lab.line).into();
        let launch = Launch {
            qemu,
            args: Vec::new(),
            environment: Vec::new(),
            before: Vec::new(),
            locks_memory: true,
        };
        launch.with(
            "-L /firmware -nodefaults -display none -no-reboot -smp 2 \
             -device isa-debug-exit,iobase=0xf4,iosize=0x04 \
             -chardev stdio,id=serial0,signal=off -serial chardev:serial0",
        )
    }

    pub fn kvm(lab: &Lab) -> Launch {
        Launch::bare(lab).with("-accel kvm -cpu host")
    }

    /// Our guest in a machine whose memory is `ram0`.
    pub fn private(lab: &Lab) -> Launch {
        Launch::kvm(lab).with(PRIVATE).with(OUR_GUEST)
    }

    /// Adds arguments, separated by blanks.
    pub fn with(mut self, args: &str) -> Launch {
        self.args.extend(args.split_whitespace().map(String::from));
        self
    }

    pub fn arg(mut self, arg: &str) -> Launch {
        self.args.push(arg.into());
        self
    }

    pub fn env(mut self, name: &'static str, value: &str) -> Launch {
        self.environment.push((name, value.into()));
        self
    }

    /// A shell command that the process runs before it becomes QEMU.
    pub fn before(mut self, command: &str) -> Launch {
        self.before.push(command.into());
        self
    }

    /// Takes CAP_IPC_LOCK from the process, as from one that is not root's: the limit of what it may
    /// lock, `bytes` at most, counts.
    pub fn lock_limit(mut self, bytes: u64) -> Launch {
        self.locks_memory = false;
        self.before(&format!("ulimit -l {}", bytes >> 10))
    }

    pub fn start(self) -> Result<Machine> {
        match self.launch()? {
            Launched::Running(machine) => Ok(machine),
            Launched::Ended(status, stderr) => bail!("QEMU did not start ({status}): {stderr}"),
        }
    }

    /// Starts our guest and waits until it takes commands.
    pub fn start_guest(self) -> Result<Machine> {
        let mut machine = self.start()?;
        machine.ready()?;
        Ok(machine)
    }

    /// QEMU must end by itself with an error; gives what it wrote to stderr.
    pub fn refused(self) -> Result<String> {
        match self.launch()? {
            Launched::Running(_) => bail!("QEMU started although it should have refused"),
            Launched::Ended(status, stderr) => {
                ensure!(
                    status.code() == Some(1),
                    "QEMU should have ended with status 1, not {status}: {stderr}"
                );
                Ok(stderr)
            }
        }
    }

    fn launch(self) -> Result<Launched> {
        let process = Process::spawn(&self)?;
        match Qmp::new(process.watch.clone()) {
            Ok(qmp) => Ok(Launched::Running(Machine { process, qmp })),
            Err(error) => match process.ended() {
                Some(status) => Ok(Launched::Ended(status, process.stderr())),
                None => Err(error),
            },
        }
    }
}

enum Launched {
    Running(Machine),
    Ended(ExitStatus, String),
}

/// Whatever this process becomes does not have the capability any more.
fn drop_ipc_lock() -> std::io::Result<()> {
    const CAP_IPC_LOCK: libc::c_ulong = 14;
    // SAFETY: PR_CAPBSET_DROP takes a number and touches none of our memory.
    match unsafe { libc::prctl(libc::PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// The child process, watched by a thread.
struct Process {
    child: Child,
    stdin: ChildStdin,
    watch: Arc<Watch>,
}

impl Process {
    fn spawn(launch: &Launch) -> Result<Process> {
        let script = [&launch.before[..], &["exec \"$@\"".into()]].concat();
        let mut shell = Command::new("/bin/sh");
        if !launch.locks_memory {
            // SAFETY: between fork and exec only async-signal-safe calls are made.
            unsafe { shell.pre_exec(drop_ipc_lock) };
        }
        let (qmp, theirs) = UnixStream::pair()?;
        let fd = theirs.as_raw_fd();
        // SAFETY: as above.
        unsafe { shell.pre_exec(move || keep_open(fd)) };
        let mut child = shell
            .args(["-ec", &script.join("\n"), "sh"])
            .arg(&launch.qemu)
            .args(&launch.args)
            .args(["-chardev", &format!("socket,id=qmp,fd={fd}")])
            .args(["-mon", "chardev=qmp,mode=control"])
            .envs(launch.environment.iter().cloned())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{}", launch.qemu.display()))?;
        // Otherwise the connection would not end with QEMU.
        drop(theirs);
        let stdin = child.stdin.take().context("no stdin")?;
        let stdout = child.stdout.take().context("no stdout")?;
        let stderr = child.stderr.take().context("no stderr")?;
        Ok(Process {
            watch: Watch::start(child.id(), stdout.into(), stderr.into(), qmp)?,
            child,
            stdin,
        })
    }

    fn wait(&self) -> Result<ExitStatus> {
        self.watch.wait("QEMU's end", |told| told.ended)
    }

    fn ended(&self) -> Option<ExitStatus> {
        self.watch.until(Duration::ZERO, |told| told.ended)
    }

    /// All of stderr; only once the process has ended.
    fn stderr(&self) -> String {
        let errors = |told: &mut Told| Some(told.errors.clone());
        self.watch.until(Duration::ZERO, errors).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        if self.watch.until(DEADLINE, |told| told.ended).is_some() {
            // It does not wait, but reaps.
            let _ = self.child.wait();
        }
    }
}

/// The program that this process becomes has the file, too.
fn keep_open(fd: RawFd) -> std::io::Result<()> {
    // SAFETY: F_SETFD takes a number and touches none of our memory.
    match unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

pub struct Machine {
    process: Process,
    pub qmp: Qmp,
}

impl Machine {
    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// Waits until our guest takes commands.
    pub fn ready(&mut self) -> Result<()> {
        let is_first = |line: &str| line.starts_with("guest ready");
        self.line("the guest's first line", is_first).map(drop)
    }

    /// The operator's reset, after which our guest has begun anew.
    pub fn reset(&mut self) -> Result<()> {
        self.qmp.call("system_reset", json!({}))?;
        self.ready()
    }

    /// Waits for a line on the serial console.
    pub fn line(&mut self, awaited: &str, wanted: impl Fn(&str) -> bool) -> Result<String> {
        self.process.watch.wait(awaited, |told| {
            loop {
                let line = told.lines.pop_front()?;
                if wanted(&line) {
                    return Some(line);
                }
            }
        })
    }

    /// The lines before one that begins with `mark`, and what stands after that.
    pub fn output(&mut self, mark: &str) -> Result<(String, String)> {
        let mut lines: Vec<String> = Vec::new();
        let rest = self.process.watch.wait(mark, |told| {
            loop {
                let line = told.lines.pop_front()?;
                match line.strip_prefix(mark) {
                    Some(rest) => return Some(rest.trim().to_owned()),
                    None => lines.push(line),
                }
            }
        })?;
        Ok((lines.join("\n").trim().into(), rest))
    }

    /// One command to our guest; gives its reply.
    pub fn ask(&mut self, command: &str) -> Result<String> {
        self.send(command)?;
        self.reply(command)
    }

    pub fn send(&mut self, command: &str) -> Result<()> {
        let sent = writeln!(self.process.stdin, "{command}");
        let what = format!("the guest '{command}'");
        sent.map_err(|error| self.process.watch.not_sent(&what, error))
    }

    fn reply(&mut self, command: &str) -> Result<String> {
        let awaited = format!("the guest's reply to '{command}'");
        loop {
            let line = self.line(&awaited, |line| {
                !line.is_empty() && !line.starts_with("trap ")
            })?;
            match line.strip_prefix('#') {
                Some(remark) => println!("  guest:{remark}"),
                None => return Ok(line),
            }
        }
    }

    pub fn ask_ok(&mut self, command: &str) -> Result<()> {
        let reply = self.ask(command)?;
        ensure!(
            reply == "ok",
            "the guest's reply to '{command}' is: {reply}"
        );
        Ok(())
    }

    pub fn fill(&mut self, addr: u64, pages: u64, seed: u64) -> Result<()> {
        self.ask_ok(&format!("fill {addr:#x} {pages} {seed}"))
    }

    pub fn check(&mut self, addr: u64, pages: u64, seed: u64) -> Result<()> {
        self.ask_ok(&format!("check {addr:#x} {pages} {seed}"))
    }

    /// Compares with what was written when the memory was at another address.
    pub fn check_moved(&mut self, addr: u64, at: u64, pages: u64, seed: u64) -> Result<()> {
        self.ask_ok(&format!("check {addr:#x} {pages} {seed} {at:#x}"))
    }

    pub fn check_zero(&mut self, addr: u64, pages: u64) -> Result<()> {
        self.ask_ok(&format!("check {addr:#x} {pages} zero"))
    }

    /// The guest's own request; gives what the hypercall returned.
    pub fn hypercall(&mut self, addr: u64, pages: u64, to: Side) -> Result<i64> {
        let reply = self.ask(&format!("convert {addr:#x} {pages:#x} {}", to.name()))?;
        let value = reply
            .strip_prefix("ret ")
            .with_context(|| format!("odd reply: {reply}"))?;
        Ok(value.parse()?)
    }

    /// The guest's own request, which must be granted.
    pub fn convert(&mut self, addr: u64, pages: u64, to: Side) -> Result<()> {
        let ret = self.hypercall(addr, pages, to)?;
        ensure!(
            ret == 0,
            "the guest's request to make {pages} pages at {addr:#x} {} returned {ret}",
            to.name()
        );
        Ok(())
    }

    /// A command whose reply is `NAME key=value ...`.
    pub fn ask_counts(&mut self, command: &str) -> Result<HashMap<String, u64>> {
        self.send(command)?;
        self.counts(command)
    }

    /// The reply to such a command that was sent before.
    pub fn counts(&mut self, command: &str) -> Result<HashMap<String, u64>> {
        let reply = self.reply(command)?;
        let counts = counts_in(&reply);
        ensure!(
            counts.contains_key("conversions"),
            "the guest's reply to '{command}' is: {reply}"
        );
        Ok(counts)
    }

    /// What the guest itself takes for private in its two halves, which begin at `offset`.
    pub fn guest_map(&mut self, offset: u64) -> Result<Vec<Extent>> {
        let reply = self.ask("map")?;
        guest_map(&reply, offset).with_context(|| format!("odd reply: {reply}"))
    }

    /// Ends the guest by its own hand and checks that QEMU ends with its status.
    pub fn finish(self) -> Result<()> {
        self.finish_with_log().map(drop)
    }

    /// As [`Machine::finish`]; gives what QEMU wrote to stderr.
    pub fn finish_with_log(mut self) -> Result<String> {
        self.send("exit 21")?;
        let status = self.process.wait()?;
        ensure!(
            status.code() == Some(21 << 1 | 1),
            "QEMU ended with {status} (signal {:?})",
            status.signal()
        );
        Ok(self.process.stderr())
    }

    /// Sends the guest a command at which the host kills QEMU.
    pub fn killed_by(mut self, command: &str) -> Result<()> {
        self.send(command)?;
        let status = self.process.wait()?;
        ensure!(
            status.signal() == Some(libc::SIGKILL),
            "QEMU ended with {status}"
        );
        Ok(())
    }

    /// A Linux turns itself off, and QEMU ends.
    pub fn power_off(mut self) -> Result<()> {
        self.send("poweroff -f")?;
        let status = self.process.wait()?;
        let said = self.process.stderr();
        ensure!(status.success(), "QEMU ended with {status}: {said}");
        Ok(())
    }

    /// QEMU ends by itself with an error; gives what it wrote to stderr.
    pub fn ended(self) -> Result<String> {
        let status = self.process.wait()?;
        let said = self.process.stderr();
        ensure!(status.code() == Some(1), "QEMU ended with {status}: {said}");
        Ok(said)
    }

    pub fn private_memory(&mut self) -> Result<Vec<PrivateMemory>> {
        let answer = self.qmp.call("query-private-memory", json!({}))?;
        serde_json::from_value(answer.clone())
            .with_context(|| format!("query-private-memory: {answer}"))
    }

    /// Why the last requests to convert memory failed.
    pub fn failed_conversions(&mut self) -> Result<Vec<String>> {
        let command = "query-private-memory-failed-conversions";
        let failed = self.qmp.call(command, json!({}))?;
        let errors = failed.as_array().into_iter().flatten();
        let errors = errors.map(|failed| Some(failed["error"].as_str()?.to_owned()));
        let errors: Option<_> = errors.collect();
        errors.with_context(|| format!("{command}: {failed}"))
    }

    pub fn region(&mut self, id: &str) -> Result<PrivateMemory> {
        let mut all = self.private_memory()?;
        let at = all.iter().position(|info| info.id == id);
        Ok(
            all.swap_remove(
                at.with_context(|| format!("query-private-memory does not list {id}"))?,
            ),
        )
    }

    /// All extents of an object, as QEMU lists them, page by page.
    pub fn extents(&mut self, id: &str) -> Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut start = 0;
        loop {
            let page = self.extents_page(id, start)?;
            for extent in page.extents {
                ensure!(
                    extent.offset == start && extent.size > 0,
                    "an extent should begin at {start:#x}: {extent:?}"
                );
                start += extent.size;
                extents.push(extent);
            }
            match page.next {
                Some(next) if next == start => {}
                None if start == page.size => return Ok(extents),
                next => bail!("extents end at {start:#x} but the next page is at {next:x?}"),
            }
        }
    }

    fn extents_page(&mut self, id: &str, start: u64) -> Result<ExtentsPage> {
        let arguments = json!({"id": id, "start": start, "limit": EXTENTS_LIMIT});
        let mut answer = self.qmp.call("query-private-memory", arguments)?;
        let page: ExtentsPage = serde_json::from_value(answer[0].take())?;
        let count = page.extents.len();
        ensure!(
            (1..=EXTENTS_LIMIT).contains(&count),
            "a page from {start:#x} on has {count} extents"
        );
        Ok(page)
    }

    /// The operator's request.
    pub fn operator_convert(&mut self, addr: u64, size: u64, to: Side) -> Result<()> {
        self.qmp.call(
            "x-private-memory-convert",
            convert_arguments(addr, size, to),
        )?;
        Ok(())
    }

    /// One of our figures in query-stats.
    pub fn statistic(&mut self, name: &str) -> Result<u64> {
        let figures = json!([{"provider": "private-memory", "names": [name]}]);
        let filter = json!({"target": "vm", "providers": figures});
        let answer = self.qmp.call("query-stats", filter)?;
        let value = &answer[0]["stats"][0]["value"];
        value.as_u64().with_context(|| format!("{name}: {answer}"))
    }

    pub fn hmp(&mut self, command: &str) -> Result<String> {
        let answer = self
            .qmp
            .call("human-monitor-command", json!({"command-line": command}))?;
        Ok(answer.as_str().unwrap_or_default().to_string())
    }

    /// What the host gets when it saves guest-physical memory: the bytes, or QMP's refusal.
    pub fn pmemsave(&mut self, addr: u64, size: u64) -> Result<Result<Vec<u8>, String>> {
        let path = "/tmp/pmemsave";
        let _ = std::fs::remove_file(path);
        let answer = self.qmp.execute(
            "pmemsave",
            &json!({"val": addr, "size": size, "filename": path}),
        )?;
        Ok(match answer {
            Ok(_) => Ok(std::fs::read(path)?),
            Err(text) => Err(text),
        })
    }
}

/// The extents that a reply `map PAGES DIGITS` tells of; a hex digit has four pages.
fn guest_map(reply: &str, offset: u64) -> Option<Vec<Extent>> {
    let (pages, digits) = reply.strip_prefix("map ")?.split_once(' ')?;
    let pages: usize = pages.parse().ok()?;
    let digits: Option<Vec<u32>> = digits.chars().map(|digit| digit.to_digit(16)).collect();
    let digits = digits.filter(|digits| digits.len() == pages.div_ceil(4))?;
    let page = |i: usize| Extent {
        offset: offset + i as u64 * PAGE,
        size: PAGE,
        private: digits[i / 4] >> (i % 4) & 1 == 1,
    };
    Some(joined((0..pages).map(page)))
}

/// What a reply `NAME key=value ...` says.
pub fn counts_in(reply: &str) -> HashMap<String, u64> {
    reply
        .split_whitespace()
        .filter_map(|word| word.split_once('='))
        .filter_map(|(key, value)| Some((key.to_string(), value.parse().ok()?)))
        .collect()
}

pub fn convert_arguments(addr: u64, size: u64, to: Side) -> Value {
    json!({"address": addr, "size": size, "private": to == Side::Private})
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Side {
    Private,
    Shared,
}

impl Side {
    pub fn name(self) -> &'static str {
        match self {
            Side::Private => "private",
            Side::Shared => "shared",
        }
    }
}

/// An element of what query-private-memory returns.
#[derive(Deserialize, Debug, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub struct PrivateMemory {
    pub id: String,
    pub backend: bool,
    pub agent: String,
    pub size: u64,
    pub granule: u64,
    pub private: u64,
    pub shared: u64,
    pub private_held: Option<u64>,
    pub shared_held: Option<u64>,
    pub held_twice: Option<u64>,
    pub conversions: u64,
    pub failed_conversions: u64,
    pub memory_failures: u64,
    pub last_failures: Vec<Failure>,
    pub private_fd: i32,
    pub shared_fd: i32,
    pub slots: Vec<Slot>,
    pub picture: String,
}

/// A page that the host has lost.
#[derive(Deserialize, Debug, PartialEq)]
pub struct Failure {
    pub offset: u64,
    pub size: u64,
    pub lost: u64,
    pub address: Option<u64>,
    pub private: bool,
}

#[derive(Deserialize, Debug, PartialEq)]
pub struct Slot {
    pub address: u64,
    pub size: u64,
    pub offset: u64,
}

/// Neighbouring memory of an object that is all on one side.
#[derive(Deserialize, Clone, Copy, Debug, PartialEq)]
pub struct Extent {
    pub offset: u64,
    pub size: u64,
    pub private: bool,
}

impl Extent {
    /// Memory of which nobody can make a part private.
    pub fn all_shared(size: u64) -> Extent {
        Extent {
            offset: 0,
            size,
            private: false,
        }
    }
}

/// The part of what query-private-memory returns that lists extents.
#[derive(Deserialize)]
struct ExtentsPage {
    size: u64,
    extents: Vec<Extent>,
    next: Option<u64>,
}

/// The same extents without empty ones, and with neighbours of one side in one.
pub fn joined(extents: impl IntoIterator<Item = Extent>) -> Vec<Extent> {
    let mut joined: Vec<Extent> = Vec::new();
    for extent in extents.into_iter().filter(|extent| extent.size > 0) {
        match joined.last_mut() {
            Some(last) if last.private == extent.private => last.size += extent.size,
            _ => joined.push(extent),
        }
    }
    joined
}

impl PrivateMemory {
    /// Where in the stores a guest-physical address lies.
    pub fn offset_of(&self, addr: u64) -> Result<u64> {
        let slot = self
            .slots
            .iter()
            .find(|s| (s.address..s.address + s.size).contains(&addr));
        let slot = slot.with_context(|| format!("no slot of {} holds {addr:#x}", self.id))?;
        Ok(slot.offset + (addr - slot.address))
    }
}

/// The bytes that the guest's `fill ADDR .. SEED` leaves in memory.
pub fn pattern(addr: u64, size: u64, seed: u64) -> Vec<u8> {
    let word = |at: u64| {
        let mut x = (at >> 3) ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x ^= x >> 29;
        x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x ^= x >> 32;
        x | 1
    };
    (addr..addr + size)
        .step_by(8)
        .flat_map(|at| word(at).to_le_bytes())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_tells_its_map() {
        let extent = |offset, pages: u64, private| Extent {
            offset,
            size: pages * PAGE,
            private,
        };
        let map = [
            extent(PAGE, 1, false),
            extent(2 * PAGE, 4, true),
            extent(6 * PAGE, 1, false),
        ];
        assert_eq!(guest_map("map 6 e1", PAGE), Some(map.to_vec()));
        assert_eq!(guest_map("map 6 e", PAGE), None);
    }
}
