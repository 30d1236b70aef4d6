//! A real Linux whose RAM is all private, but for the pool through which its devices transfer: our
//! loader makes it so, our driver in it shares the pool. It is a shell on the serial line.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::Lab;
use crate::host;
use crate::machine::{Launch, Machine, PRIVATE, PrivateMemory};
use crate::qmp::DEADLINE;
use crate::scenarios::{RAM, Scenario, same};

pub fn all() -> Vec<Scenario> {
    vec![
        Scenario::private_linux("private-linux", private_linux),
        Scenario::private_linux("private-linux-disk", disk),
        Scenario::private_linux("private-linux-network", network),
    ]
}

/// The loader is there if the kernel has our driver.
pub fn can_be_had() -> bool {
    Path::new("/guest/loader.bin").exists()
}

/// All that KVM would write into a guest's memory by itself is off. Two vCPUs work as well, in twice
/// the time, as there is one emulated CPU for both.
const LINUX: &str = "-smp 1 -bios /guest/loader.bin \
    -cpu host,-kvmclock,-kvm-pv-eoi,-kvm-steal-time,-kvm-asyncpf,-kvm-asyncpf-int \
    -fw_cfg name=opt/privmem/kernel,file=/guest/vmlinux \
    -fw_cfg name=opt/privmem/initrd,file=/guest/initrd.gz -fw_cfg";
/// The pool is 8 MiB: the block layer asks for up to 4 MiB at once, and waits for ever where that
/// does not fit.
const COMMAND_LINE: &str = "name=opt/privmem/cmdline,string=console=ttyS0 quiet panic=-1 \
    rdinit=/shell driven=1 i8042.noaux=1 private_guest swiotlb=4096,,force";

/// What a device needs that is to use the pool.
const DEVICE: &str = "disable-legacy=on,iommu_platform=on";

/// A machine whose Linux has come to its shell.
struct Linux {
    machine: Machine,
    commands: u32,
}

impl Linux {
    fn start(lab: &Lab, devices: &str) -> Result<Linux> {
        let mut machine = Launch::kvm(lab)
            .with(PRIVATE)
            .with(LINUX)
            .arg(COMMAND_LINE)
            .with(devices)
            .start()?;
        machine.line("Linux's shell", |line| line == "private-linux ready")?;
        Ok(Linux {
            machine,
            commands: 0,
        })
    }

    /// Runs a shell command, which must succeed; gives what it prints.
    fn run(&mut self, command: &str) -> Result<String> {
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

    /// More than 95 % of the RAM is private, nothing is held twice, and what the guest writes is on
    /// the private side.
    fn is_private(&mut self) -> Result<PrivateMemory> {
        let info = self.machine.region("ram0")?;
        let percent = info.private as f64 * 100.0 / info.size as f64;
        println!("  {percent:.1} % of {} MiB are private", info.size >> 20);
        ensure!(percent > 95.0, "only {percent:.1} % are private");
        same("held-twice", info.held_twice, Some(0))?;
        Ok(info)
    }

    fn finish(self) -> Result<()> {
        self.machine.power_off()
    }
}

fn private_linux(lab: &Lab) -> Result<()> {
    let mut linux = Linux::start(lab, "")?;
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

/// Both directions through the pool: the guest's checksum of a disk, and what the guest wrote.
fn disk(lab: &Lab) -> Result<()> {
    const DISK: &str = "/tmp/private-linux.img";
    host::run("dd if=/dev/urandom of=/tmp/private-linux.img bs=1M count=16 2>/dev/null")?;
    let expected = checksum(&host::run(&format!("sha256sum {DISK}"))?);
    let mut linux = Linux::start(
        lab,
        &format!(
            "-drive if=none,id=disk0,format=raw,file={DISK} \
             -device virtio-blk-pci,drive=disk0,{DEVICE}"
        ),
    )?;
    same(
        "the disk's checksum",
        checksum(&linux.run("sha256sum /dev/vda")?),
        expected,
    )?;
    linux.run("dd if=/dev/urandom of=/dev/vda bs=64k seek=3 count=64 conv=fsync")?;
    let expected = checksum(&linux.run("echo 3 > /proc/sys/vm/drop_caches; sha256sum /dev/vda")?);
    same(
        "what the guest wrote",
        checksum(&host::run(&format!("sha256sum {DISK}"))?),
        expected,
    )?;
    linux.is_private()?;
    linux.finish()?;
    fs::remove_file(DISK)?;
    Ok(())
}

fn checksum(line: &str) -> String {
    line.split_whitespace().next().unwrap_or_default().into()
}

/// A page that the guest made is fetched from the outer machine.
fn network(lab: &Lab) -> Result<()> {
    let mut linux = Linux::start(
        lab,
        &format!(
            "-netdev tap,id=net0,ifname=tap0,script=no,downscript=no \
             -device virtio-net-pci,netdev=net0,romfile=,{DEVICE}"
        ),
    )?;
    host::run("ip addr add 10.9.0.1/24 dev tap0 && ip link set tap0 up")?;
    linux.run("ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up")?;
    linux.run(
        "mkdir -p /www; dd if=/dev/urandom of=/www/page bs=1k count=300 2>/dev/null; httpd -h /www",
    )?;
    let expected = checksum(&linux.run("sha256sum /www/page")?);
    let page = fetch("10.9.0.2:80", "/page")?;
    same("bytes of the page", page.len(), 300 << 10)?;
    fs::write("/tmp/page", page)?;
    same(
        "the page",
        checksum(&host::run("sha256sum /tmp/page")?),
        expected,
    )?;
    linux.is_private()?;
    linux.finish()
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
