//! A real Linux whose RAM is all private, but for the pool through which its devices transfer: our
//! loader makes it so, our driver in it shares the pool. It is a shell on the serial line.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::Lab;
use crate::host::{self, ControlGroup};
use crate::machine::{Extent, Launch, Machine, PRIVATE, PrivateMemory};
use crate::qmp::DEADLINE;
use crate::scenarios::{RAM, Scenario, same};
use crate::secrets::{self, Found, Secrets};

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("linux-commands", |lab| commands(Linux::plain(lab, "")?)),
        Scenario::private_linux("private-linux-commands", |lab| {
            commands(Linux::private(lab, "")?)
        }),
        Scenario::private_linux("private-linux", private_linux),
        Scenario::private_linux("private-linux-two-vcpus", two_vcpus),
        Scenario::private_linux("private-linux-disk", disk),
        Scenario::private_linux("private-linux-network", network),
        Scenario::private_linux("private-linux-secrets", secrets),
    ]
}

/// Why there is no such Linux. The loader is there if the kernel has our driver.
pub fn missing() -> Option<&'static str> {
    let there = Path::new("/guest/loader.bin").exists();
    (!there).then_some("the lab's kernel was built without CONFIG_PRIVATE_GUEST")
}

/// All that KVM would write into a guest's memory by itself is off. One vCPU: Linux
/// starts sooner, and what is tested here does not depend on how many there are.
const LINUX: &str = "-smp 1 -bios /guest/loader.bin \
    -cpu host,-svm,-kvmclock,-kvm-pv-eoi,-kvm-steal-time,-kvm-asyncpf,-kvm-asyncpf-int \
    -fw_cfg name=opt/privmem/kernel,file=/guest/vmlinux \
    -fw_cfg name=opt/privmem/initrd,file=/guest/initrd -fw_cfg";
/// Any fault ends it at once, but not that the host has stopped it for a while. The pool is 8 MiB: the block layer asks for up to 4 MiB at once, and waits for ever where that
/// does not fit.
const COMMAND_LINE: &str = "name=opt/privmem/cmdline,string=console=ttyS0 quiet oops=panic panic=-1 \
    nowatchdog rdinit=/shell driven=1 private_guest swiotlb=4096,,force";

/// On an emulated CPU Linux fails to calibrate its TSC, and then asks QEMU's HPET for the time, again and
/// again, which takes half of the time. So it is told.
fn command_line() -> Result<String> {
    let khz = host::tsc_khz()?;
    Ok(format!("{COMMAND_LINE} tsc=reliable tsc_early_khz={khz}"))
}

/// The same Linux in memory that the host has, too.
const PLAIN_LINUX: &str = "-smp 1 -m 256M -object memory-backend-memfd,id=ram0,size=256M \
    -machine q35,memory-backend=ram0 \
    -bios qboot.rom -kernel /guest/vmlinux -initrd /guest/initrd -append";
const PLAIN_COMMAND_LINE: &str = "console=ttyS0 quiet oops=panic panic=-1 nowatchdog rdinit=/shell \
    driven=1";

/// What a device needs that is to use the pool.
const DEVICE: &str = "disable-legacy=on,iommu_platform=on";
const GDB: &str = "/tmp/linux-gdb.sock";

/// A machine whose Linux has come to its shell.
pub struct Linux {
    pub machine: Machine,
    commands: u32,
}

impl Linux {
    /// One with private RAM.
    pub fn private(lab: &Lab, devices: &str) -> Result<Linux> {
        let launch = Launch::kvm(lab).with(PRIVATE).with(LINUX);
        Linux::start(launch.arg(&command_line()?), devices)
    }

    /// One with half as much RAM, all of it charged to a group: for devices that transfer little.
    pub fn small(lab: &Lab, group: &ControlGroup, devices: &str) -> Result<Linux> {
        let launch = Launch::kvm(lab).with(&PRIVATE.replace("256M", "128M"));
        let command_line = command_line()?.replace("swiotlb=4096", "swiotlb=1024");
        let launch = launch.with(LINUX).arg(&command_line);
        Linux::start(launch.before(&group.join()), devices)
    }

    /// One without.
    pub fn plain(lab: &Lab, devices: &str) -> Result<Linux> {
        let launch = Launch::kvm(lab).with(PLAIN_LINUX);
        Linux::start(launch.arg(PLAIN_COMMAND_LINE), devices)
    }

    fn start(launch: Launch, devices: &str) -> Result<Linux> {
        let debugger = format!("-gdb unix:{GDB},server=on,wait=off");
        let mut machine = launch.with(&debugger).with(devices).start()?;
        machine.line("Linux's shell", |line| line == "linux ready")?;
        Ok(Linux {
            machine,
            commands: 0,
        })
    }

    /// Runs a shell command, which must succeed; gives what it prints.
    pub fn run(&mut self, command: &str) -> Result<String> {
        self.commands += 1;
        let mark = format!("@done-{}", self.commands);
        self.machine
            .send(&format!("echo; ( {command} ) 2>&1; echo {mark} $?"))?;
        let (output, status) = self.machine.output(&mark)?;
        ensure!(
            status == "0",
            "the guest's '{command}' ended with {status}: {output}"
        );
        Ok(output)
    }

    /// Starts again by its own hand.
    pub fn reboot(&mut self) -> Result<()> {
        self.machine.send("reboot -f")?;
        self.comes_back(true)
    }

    /// As the host's operator has it.
    pub fn reset(&mut self) -> Result<()> {
        self.machine.qmp.call("system_reset", json!({}))?;
        self.comes_back(false)
    }

    fn comes_back(&mut self, by_guest: bool) -> Result<()> {
        // First, so that it does not count as unexpected while the shell is awaited.
        let reset = self.machine.qmp.event("RESET")?;
        same(
            "reset by the guest",
            reset["guest"].as_bool(),
            Some(by_guest),
        )?;
        self.machine.output("linux ready").map(drop)
    }

    /// The operator's request to have this much memory, with which the guest complies.
    pub fn set_balloon(&mut self, memory: u64) -> Result<()> {
        let qmp = &mut self.machine.qmp;
        qmp.call("balloon", json!({ "value": memory }))?;
        while qmp.event("BALLOON_CHANGE")?["actual"] != memory {}
        Ok(())
    }

    pub fn memory(&mut self) -> Result<PrivateMemory> {
        self.machine.region("ram0")
    }

    /// More than 95 % of the RAM is private, and nothing is held twice.
    pub fn is_private(&mut self) -> Result<PrivateMemory> {
        let info = self.memory()?;
        let percent = private_percent(&info);
        println!("  {percent:.1} % of {} MiB are private", info.size >> 20);
        ensure!(percent > 95.0, "only {percent:.1} % are private");
        same("held-twice", info.held_twice, Some(0))?;
        Ok(info)
    }

    /// Both directions: the guest's checksum of a disk, and what the guest wrote.
    pub fn uses(&mut self, disk: &Disk) -> Result<()> {
        let read = self.run("sha256sum /dev/vda")?;
        same("the disk's checksum", checksum(&read), disk.checksum()?)?;
        self.run("dd if=/dev/urandom of=/dev/vda bs=64k seek=3 count=64 conv=fsync")?;
        let written = self.run("echo 3 > /proc/sys/vm/drop_caches; sha256sum /dev/vda")?;
        same("what the guest wrote", disk.checksum()?, checksum(&written))
    }

    /// A page that the guest made is fetched from the outer machine.
    pub fn answers_over_network(&mut self) -> Result<()> {
        host::run("ip addr add 10.9.0.1/24 dev tap0 && ip link set tap0 up")?;
        self.run("ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up; mkdir -p /www")?;
        self.run("dd if=/dev/urandom of=/www/page bs=1k count=300 && httpd -h /www")?;
        let made = self.run("sha256sum /www/page")?;
        let page = fetch("10.9.0.2:80", "/page")?;
        same("bytes of the page", page.len(), 300 << 10)?;
        fs::write("/tmp/page", page)?;
        let fetched = host::run("sha256sum /tmp/page")?;
        same("the page", checksum(&fetched), checksum(&made))
    }

    /// Has the guest make secrets, and looks for them on all of the host's ways to its memory.
    pub fn search(&mut self, count: usize) -> Result<Vec<Found>> {
        self.run(&secrets::make(count))?;
        let told = self.run(secrets::TELL)?;
        let secrets = Secrets::told(&told)?;
        same("secrets", secrets.count(), count)?;
        let extents = match self.machine.private_memory()?.is_empty() {
            true => vec![Extent::all_shared(RAM)],
            false => self.machine.extents("ram0")?,
        };
        let found = secrets::search(&secrets, &mut self.machine, GDB, &extents)?;
        same("the guest's secrets", self.run(secrets::TELL)?, told)?;
        Ok(found)
    }

    pub fn finish(self) -> Result<()> {
        self.machine.power_off()
    }
}

pub fn private_percent(info: &PrivateMemory) -> f64 {
    info.private as f64 * 100.0 / info.size as f64
}

/// A disk's image of random bytes; removed on drop.
pub struct Disk;

impl Disk {
    const IMAGE: &str = "/tmp/linux-disk.img";

    pub fn new() -> Result<Disk> {
        let image = Disk::IMAGE;
        host::run(&format!("dd if=/dev/urandom of={image} bs=1M count=16"))?;
        Ok(Disk)
    }

    pub fn device(&self) -> String {
        format!(
            "-drive if=none,id=disk0,format=raw,file={} -device virtio-blk-pci,drive=disk0,{DEVICE}",
            Disk::IMAGE
        )
    }

    fn checksum(&self) -> Result<String> {
        let line = host::run(&format!("sha256sum {}", Disk::IMAGE))?;
        Ok(checksum(&line))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The next one writes over it.
        let _ = fs::remove_file(Disk::IMAGE);
    }
}

pub fn balloon_device() -> String {
    format!("-device virtio-balloon-pci,{DEVICE}")
}

pub fn network_device() -> String {
    format!(
        "-netdev tap,id=net0,ifname=tap0,script=no,downscript=no \
         -device virtio-net-pci,netdev=net0,romfile=,{DEVICE}"
    )
}

pub fn checksum(line: &str) -> String {
    line.split_whitespace().next().unwrap_or_default().into()
}

fn fetch(server: &str, path: &str) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    Ok(answer.split_off(end.context("an answer without a header")? + 4))
}

/// Each command is answered while nothing else is sent: at once or after the guest was idle, with
/// lines shorter and longer than the FIFOs of the serial port.
fn commands(mut linux: Linux) -> Result<()> {
    for round in 0..100 {
        let text = "serial".repeat(1 + round);
        let idle = ["", "sleep 0.02; "][round % 2];
        let printed = linux.run(&format!("{idle}echo {text}"))?;
        same("what the guest printed", printed, text)?;
    }
    linux.finish()
}

/// What the guest writes is on the private side. A device that would not use the pool it leaves alone.
fn private_linux(lab: &Lab) -> Result<()> {
    const DISK: &str = "-blockdev driver=null-co,node-name=disk0 \
        -device virtio-blk-pci,drive=disk0,disable-legacy=on,iommu_platform=off";
    let mut linux = Linux::private(lab, DISK)?;
    linux.run("cd /sys/bus/virtio/devices/virtio0 && test ! -e driver && test ! -e /dev/vda")?;
    linux.run("! dmesg | grep 'Incorrect checksum'")?; // in the tables that the loader put together
    let before = linux.is_private()?;
    println!(
        "  {}",
        linux.run("uname -rm; cat /proc/cpuinfo | grep -c ^processor")?
    );
    same(
        "bytes",
        linux
            .run("dd if=/dev/urandom of=/tmp/x bs=1M count=64 2>/dev/null; wc -c < /tmp/x")?
            .trim(),
        "67108864",
    )?;
    let after = linux.is_private()?;
    let grown = after.private_held.context("private-held")? - before.private_held.unwrap_or(0);
    ensure!(
        grown >= 32 << 20,
        "Linux wrote 64 MiB, private memory grew by {grown} bytes"
    );
    same("private", after.private, before.private)?;
    same("private and shared", after.private + after.shared, RAM)?;
    linux.finish()
}

/// Both see the same memory.
fn two_vcpus(lab: &Lab) -> Result<()> {
    let mut linux = Linux::private(lab, "-smp 2")?;
    linux.run("dd if=/dev/urandom of=/tmp/x bs=1M count=16")?;
    let sums = linux.run(
        "taskset 1 sha256sum /tmp/x > /tmp/0 & taskset 2 sha256sum /tmp/x > /tmp/1; wait; cat /tmp/0 /tmp/1",
    )?;
    let sums: Vec<_> = sums.lines().map(checksum).collect();
    same("checksums", sums.len(), 2)?;
    same("what both see", &sums[0], &sums[1])?;
    linux.is_private()?;
    linux.finish()
}

fn disk(lab: &Lab) -> Result<()> {
    let disk = Disk::new()?;
    let mut linux = Linux::private(lab, &disk.device())?;
    linux.uses(&disk)?;
    linux.is_private()?;
    linux.finish()
}

fn network(lab: &Lab) -> Result<()> {
    let mut linux = Linux::private(lab, &network_device())?;
    linux.answers_over_network()?;
    linux.is_private()?;
    linux.finish()
}

/// No way leads to a secret in private memory; each does where the same Linux has the memory that all
/// guests have.
fn secrets(lab: &Lab) -> Result<()> {
    const COUNT: usize = 8;
    let mut linux = Linux::private(lab, "")?;
    for found in linux.search(COUNT)? {
        println!("  {found}");
        same(found.way, found.secrets, 0)?;
    }
    linux.is_private()?;
    linux.finish()?;
    let mut control = Linux::plain(lab, "")?;
    for found in control.search(COUNT)? {
        println!("  without private memory: {found}");
        same(found.way, found.secrets, COUNT)?;
    }
    control.finish()
}
