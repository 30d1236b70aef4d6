//! What the driver does to and asks of the kernel it runs on: mounts, power, shells, KVM.

use std::fmt;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::num::NonZero;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use nix::sys::{reboot, termios};

const GROUPS: &str = "/sys/fs/cgroup";

pub fn mount_all() -> Result<()> {
    for (kind, at) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/tmp"),
        ("debugfs", "/sys/kernel/debug"),
        ("cgroup2", GROUPS),
    ] {
        fs::create_dir_all(at)?;
        mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting {kind} on {at}"))?;
    }
    // As systemd does.
    write_file(
        &format!("{GROUPS}/cgroup.subtree_control"),
        "+memory +hugetlb",
    )
}

/// Ends the machine, after the console has sent what was printed.
pub fn power_off() -> ! {
    let _ = termios::tcdrain(std::io::stdout());
    let _ = reboot::reboot(reboot::RebootMode::RB_POWER_OFF);
    // Without ACPI: the machine is run with -no-reboot.
    let _ = reboot::reboot(reboot::RebootMode::RB_AUTOBOOT);
    panic!("the machine can be neither powered off nor reset");
}

pub fn kernel() -> String {
    match nix::sys::utsname::uname() {
        Ok(name) => name.release().to_string_lossy().into_owned(),
        Err(e) => format!("unknown ({e})"),
    }
}

/// Major and minor number of what [`kernel`] says.
pub fn kernel_version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || {
        numbers
            .next()
            .and_then(|digits| digits.parse().ok())
            .unwrap_or(0)
    };
    (number(), number())
}

/// Puts busybox's tools where a shell finds them.
pub fn install_tools() -> Result<()> {
    let mut install = Command::new("/bin/busybox");
    let status = install.args(["--install", "-s", "/bin"]).status()?;
    ensure!(status.success(), "busybox --install: {status}");
    Ok(())
}

fn shell() -> Command {
    // Without them there is still a shell.
    let _ = install_tools();
    let mut shell = Command::new("/bin/sh");
    shell
        .env("PATH", "/bin:/sbin:/usr/bin:/usr/sbin")
        .env("HOME", "/")
        .env("TERM", "linux");
    shell
}

/// Runs a base64-coded shell command and gives its exit status (128 + signal when killed).
pub fn run_command(coded: &str) -> Result<i32> {
    use std::os::unix::process::ExitStatusExt;
    let text = base64::engine::general_purpose::STANDARD
        .decode(coded)
        .context("lab.cmd is not base64")?;
    let text = String::from_utf8(text).context("lab.cmd is not UTF-8")?;
    let status = shell().args(["-c", &text]).status().context("/bin/sh")?;
    Ok(status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

/// Runs a shell command of ours, which must succeed; gives what it prints.
pub fn run(command: &str) -> Result<String> {
    let output = shell().args(["-c", command]).output().context("/bin/sh")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "'{command}' ended with {}: {said}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(said)
}

/// A login-like shell: own session, the console as its controlling terminal.
pub fn run_shell() -> Result<()> {
    let active = fs::read_to_string("/sys/class/tty/console/active")?;
    let name = active.split_whitespace().last().context("no console")?;
    let tty = File::options()
        .read(true)
        .write(true)
        .open(Path::new("/dev").join(name))?;
    let mut shell = shell();
    shell
        .arg("-i")
        .stdin(Stdio::from(tty.try_clone()?))
        .stdout(Stdio::from(tty.try_clone()?))
        .stderr(Stdio::from(tty));
    // SAFETY: between fork and exec only async-signal-safe calls are made.
    unsafe {
        shell.pre_exec(|| {
            nix::unistd::setsid()?;
            if libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    shell.status().context("/bin/sh")?;
    Ok(())
}

/// The plain Linux guest: say who we are, use some memory, power off.
pub fn be_linux_guest() -> Result<()> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let total = meminfo.lines().next().unwrap_or("MemTotal: unknown");
    println!("guest-linux {} {total}", kernel());
    let words: Vec<usize> = (0..8 << 20)
        .map(|i: usize| i.wrapping_mul(0x9e37_79b9))
        .collect();
    let words = std::hint::black_box(words);
    let wrong = words
        .iter()
        .enumerate()
        .filter(|(i, word)| **word != i.wrapping_mul(0x9e37_79b9))
        .count();
    ensure!(
        wrong == 0,
        "{wrong} words of 64 MiB do not hold what was written"
    );
    println!("guest-linux ok");
    Ok(())
}

/// What /dev/kvm says it can do (0 where it does not know the capability).
pub struct Kvm {
    pub vm_types: i32,
    pub attributes: i32,
    pub guest_memfd: i32,
    pub user_memory2: i32,
}

nix::ioctl_write_int_bad!(kvm_check_extension, 0xae03);

impl Kvm {
    pub fn probe() -> Result<Kvm> {
        let kvm = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .context("/dev/kvm")?;
        let check = |capability| {
            // SAFETY: KVM_CHECK_EXTENSION takes a number and touches none of our memory.
            unsafe { kvm_check_extension(kvm.as_raw_fd(), capability) }
                .context("KVM_CHECK_EXTENSION")
        };
        Ok(Kvm {
            vm_types: check(235)?,
            attributes: check(233)?,
            guest_memfd: check(234)?,
            user_memory2: check(231)?,
        })
    }

    /// VM type 1, the attribute "private", guest_memfd and slots that take it.
    pub fn has_private_memory(&self) -> bool {
        self.vm_types & 2 != 0
            && self.attributes & 8 != 0
            && self.guest_memfd != 0
            && self.user_memory2 != 0
    }
}

impl fmt::Display for Kvm {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "KVM capabilities: VM_TYPES={:#x} MEMORY_ATTRIBUTES={:#x} GUEST_MEMFD={} USER_MEMORY2={}",
            self.vm_types, self.attributes, self.guest_memfd, self.user_memory2
        )
    }
}

/// How fast the time stamp counter of a guest goes.
pub fn tsc_khz() -> Result<u32> {
    let vcpu = kvm_ioctls::Kvm::new()?.create_vm()?.create_vcpu(0)?;
    vcpu.get_tsc_khz().context("KVM_GET_TSC_KHZ")
}

/// The numbers of the fds that a process has open.
pub fn fds_of(pid: u32) -> Result<Vec<u64>> {
    let mut fds = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        fds.push(entry?.file_name().to_string_lossy().parse()?);
    }
    fds.sort();
    Ok(fds)
}

/// How many mappings a process has of memfds and guest_memfds. Others come and go with threads and
/// their heaps.
pub fn store_mappings_of(pid: u32) -> Result<usize> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let of_store = |line: &&str| line.contains("memfd");
    Ok(maps.lines().filter(of_store).count())
}

/// A figure of a NUMA node in bytes, as /sys/devices/system/node/nodeN/meminfo names it. FilePages
/// counts the pages of memfds and guest_memfds alike. The kernel adds up what each CPU counted only
/// now and then: expect figures to be some 100 KiB behind.
pub fn node_bytes(node: u32, figure: &str) -> Result<u64> {
    kib_in(
        &format!("/sys/devices/system/node/node{node}/meminfo"),
        figure,
    )
}

/// A figure of a process in bytes, as /proc/PID/status names it.
pub fn status_bytes(pid: u32, figure: &str) -> Result<u64> {
    kib_in(&format!("/proc/{pid}/status"), figure)
}

/// The bytes of a line such as `FIGURE: 8 kB`, which may have words before it.
fn kib_in(path: &str, figure: &str) -> Result<u64> {
    let text = fs::read_to_string(path).context(path.to_owned())?;
    let kib = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.split(' ').next_back() == Some(figure))
        .and_then(|(_, value)| value.trim().strip_suffix(" kB"))
        .with_context(|| format!("no {figure} in {path}"))?;
    Ok(kib.trim().parse::<u64>()? << 10)
}

/// The figure of a line such as `NAME 8`.
fn figure_in(path: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path).context(path.to_owned())?;
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let line = lines.find(|(figure, _)| *figure == name);
    let (_, value) = line.with_context(|| format!("no {name} in {path}"))?;
    Ok(value.parse()?)
}

/// Does `work` with memory of one node only, as far as this thread asks for it.
pub fn on_node<T>(node: u32, work: impl FnOnce() -> T) -> Result<T> {
    set_memory_policy(libc::MPOL_BIND, 1 << node)?;
    let done = work();
    set_memory_policy(libc::MPOL_DEFAULT, 0)?;
    Ok(done)
}

/// Leaves marks in nearly all free memory of a node, one in each page, for whoever gets it uncleared.
pub fn mark_free_memory(node: u32) -> Result<()> {
    /// Not to be out of memory in between.
    const LEFT: u64 = 128 << 20;
    const MARK: u64 = 0x4b52_414d_4b52_414d;
    const PAGE: usize = 4096;
    let size = node_bytes(node, "MemFree")?.saturating_sub(LEFT) as usize;
    on_node(node, || {
        let size = NonZero::new(size).context("no memory is free")?;
        let (read_write, private) = (
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_PRIVATE,
        );
        // SAFETY: a new mapping at an address that the kernel chooses, which nobody else knows of.
        unsafe {
            let start = mmap_anonymous(None, size, read_write, private)?;
            // Faster; where there are none small pages do.
            let _ = madvise(start, size.get(), MmapAdvise::MADV_HUGEPAGE);
            for at in (0..size.get()).step_by(PAGE) {
                start.byte_add(at).cast::<u64>().write_volatile(MARK);
            }
            munmap(start, size.get())?;
        }
        Ok(())
    })?
}

fn set_memory_policy(mode: i32, nodes: u64) -> Result<()> {
    let mask = if nodes == 0 { std::ptr::null() } else { &nodes };
    // The kernel takes one bit less than it is told.
    let bits = libc::c_ulong::from(u64::BITS + 1);
    // SAFETY: the mask is null or has the bits that are announced.
    if unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, bits) } < 0 {
        bail!("set_mempolicy: {}", std::io::Error::last_os_error());
    }
    Ok(())
}

/// Huge pages of 2 MiB set aside for hugetlb; given back on drop, once nobody uses them.
pub struct HugePages;

impl HugePages {
    /// Makes the pool this large; an error where memory is too fragmented for it.
    pub fn reserve(count: u64) -> Result<HugePages> {
        let pool = HugePages;
        pool.resize(count)?;
        Ok(pool)
    }

    pub fn resize(&self, count: u64) -> Result<()> {
        write_file(&HugePages::file("nr_hugepages"), count)?;
        let got = read_number(&HugePages::file("nr_hugepages"))?;
        ensure!(got == count, "only {got} of {count} huge pages to be had");
        Ok(())
    }

    /// How many of them nobody uses.
    pub fn free(&self) -> Result<u64> {
        read_number(&HugePages::file("free_hugepages"))
    }

    fn file(name: &str) -> String {
        format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}")
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // The next one that reserves some checks what it gets.
        let _ = write_file(&HugePages::file("nr_hugepages"), 0);
    }
}

/// A control group (version 2) with the memory controllers; removed on drop.
pub struct ControlGroup {
    path: String,
}

impl ControlGroup {
    pub fn new(name: &str) -> Result<ControlGroup> {
        let path = format!("{GROUPS}/{name}");
        fs::create_dir(&path).context(path.clone())?;
        Ok(ControlGroup { path })
    }

    /// The shell's command by which a process, and what it becomes, joins.
    pub fn join(&self) -> String {
        format!("echo $$ > {}/cgroup.procs", self.path)
    }

    pub fn set(&self, file: &str, value: impl fmt::Display) -> Result<()> {
        write_file(&format!("{}/{file}", self.path), value)
    }

    pub fn number(&self, file: &str) -> Result<u64> {
        read_number(&format!("{}/{file}", self.path))
    }

    /// One of the figures of a file that has a line for each, such as memory.stat.
    pub fn figure(&self, file: &str, name: &str) -> Result<u64> {
        figure_in(&format!("{}/{file}", self.path), name)
    }

    /// What it is charged for private memory: of files in memory, all but the memfds.
    pub fn private_memory(&self) -> Result<u64> {
        let shmem = self.figure("memory.stat", "shmem")?;
        Ok(self.figure("memory.stat", "file")? - shmem)
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        // Fails while a process is in it; then it stays, and the next one of this name says so.
        let _ = fs::remove_dir(&self.path);
    }
}

/// The device that is there to be assigned: QEMU's edu, bound to vfio-pci; how it is reached, or why
/// it cannot be.
pub fn assignable() -> Result<Result<String, &'static str>> {
    for (path, why) in [
        ("/dev/vfio/vfio", "this kernel has no VFIO containers"),
        ("/dev/iommu", "this kernel has no iommufd"),
        (
            "/sys/bus/pci/drivers/vfio-pci",
            "this kernel has no vfio-pci",
        ),
    ] {
        if !Path::new(path).exists() {
            return Ok(Err(why));
        }
    }
    for entry in fs::read_dir("/sys/bus/pci/devices")? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let id = |file| fs::read_to_string(path.join(file)).unwrap_or_default();
        if (id("vendor").trim(), id("device").trim()) != ("0x1234", "0x11e8") {
            continue;
        }
        if !path.join("iommu_group").exists() {
            return Ok(Err("there is no IOMMU before the device to be assigned"));
        }
        if !path.join("driver").exists() {
            fs::write(path.join("driver_override"), "vfio-pci")?;
            write_file("/sys/bus/pci/drivers_probe", name.to_string_lossy())?;
        }
        return Ok(Ok(name.to_string_lossy().into_owned()));
    }
    Ok(Err("there is no device to be assigned"))
}

/// What the kernel says from now on, one line at a time.
pub struct KernelLog(File);

impl KernelLog {
    pub fn from_now() -> Result<KernelLog> {
        let mut log = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")?;
        log.seek(SeekFrom::End(0))?;
        Ok(KernelLog(log))
    }

    pub fn news(&mut self) -> Result<Vec<String>> {
        let mut news = Vec::new();
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(size) => news.push(String::from_utf8_lossy(&record[..size]).into_owned()),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(news),
                // What was to be read has been overwritten meanwhile.
                Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {}
                Err(e) => return Err(e).context("/dev/kmsg"),
            }
        }
    }
}

/// How many more mappings of VFIO type 1 a process may make, by its container.
pub fn dma_available(pid: u32) -> Result<u64> {
    // Source: include/uapi/linux/vfio.h.
    const VFIO_IOMMU_GET_INFO: libc::c_ulong = 0x3b70;
    const DMA_AVAILABLE: u32 = 3;
    let is_container = |fd: &u64| {
        let path = fs::read_link(format!("/proc/{pid}/fd/{fd}"));
        path.is_ok_and(|path| path == Path::new("/dev/vfio/vfio"))
    };
    let fd = fds_of(pid)?.into_iter().find(is_container);
    let container = fd_of(pid, fd.context("no container of VFIO")?)?;
    // In words of 32 bits: argsz, flags, page sizes, offset of the first capability.
    let mut info = [0_u32; 1024];
    info[0] = size_of_val(&info) as u32;
    // SAFETY: the kernel writes as much as `argsz` says at most.
    let result = unsafe { libc::ioctl(container.as_raw_fd(), VFIO_IOMMU_GET_INFO as _, &mut info) };
    ensure!(
        result == 0,
        "VFIO_IOMMU_GET_INFO: {}",
        std::io::Error::last_os_error()
    );
    let mut at = info[4] as usize / 4;
    while at != 0 && at + 2 < info.len() {
        if info[at] & 0xffff == DMA_AVAILABLE {
            return Ok(info[at + 2].into());
        }
        at = info[at + 1] as usize / 4;
    }
    bail!("the container does not tell how many mappings it has")
}

/// The fd of another process, as one of ours.
fn fd_of(pid: u32, fd: u64) -> Result<OwnedFd> {
    let owned = |result: libc::c_long| match result {
        // SAFETY: the kernel has just given us this fd.
        0.. => Ok(unsafe { OwnedFd::from_raw_fd(result as i32) }),
        _ => Err(std::io::Error::last_os_error()),
    };
    // SAFETY: these take numbers and touch none of our memory.
    let process = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: as above.
    let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) };
    Ok(owned(copy)?)
}

/// What the IOMMU maps for the device that can be assigned: how many pages, of whatever size.
pub fn iommu_mappings() -> Result<u64> {
    let device = assignable()?.map_err(anyhow::Error::msg)?;
    let path = format!("/sys/kernel/debug/iommu/intel/{device}/domain_translation_struct");
    let text = fs::read_to_string(&path).context(path)?;
    Ok(text.lines().filter(|line| line.starts_with("0x")).count() as u64)
}

/// What the kernel holds for devices: what the IOMMU maps, pages of its tables, and pages pinned.
pub fn iommu_held() -> Result<[u64; 3]> {
    // Has each CPU's part added.
    write_file("/proc/sys/vm/stat_refresh", 1)?;
    let figure = |name: &str| figure_in("/proc/vmstat", name);
    let pinned = figure("nr_foll_pin_acquired")? - figure("nr_foll_pin_released")?;
    Ok([iommu_mappings()?, figure("nr_iommu_pages")?, pinned])
}

/// A parameter of a module, put back on drop.
pub struct Parameter {
    path: String,
    before: String,
}

impl Parameter {
    pub fn set(module: &str, name: &str, value: u64) -> Result<Parameter> {
        let path = format!("/sys/module/{module}/parameters/{name}");
        let before = fs::read_to_string(&path).context(path.clone())?;
        write_file(&path, value)?;
        Ok(Parameter { path, before })
    }
}

impl Drop for Parameter {
    fn drop(&mut self) {
        // It could be written before.
        let _ = fs::write(&self.path, &self.before);
    }
}

fn read_number(path: &str) -> Result<u64> {
    let text = fs::read_to_string(path).context(path.to_string())?;
    text.trim().parse().context(path.to_string())
}

fn write_file(path: &str, value: impl fmt::Display) -> Result<()> {
    fs::write(path, value.to_string()).context(path.to_string())
}

/// A resource limit of another process, put back on drop.
pub struct Limit {
    pid: libc::pid_t,
    resource: libc::__rlimit_resource_t,
    before: libc::rlimit,
}

impl Limit {
    pub fn set(pid: u32, resource: libc::__rlimit_resource_t, soft: u64) -> Result<Limit> {
        let pid = pid as libc::pid_t;
        let mut before = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the third argument may be null, the fourth is a live rlimit of ours.
        if unsafe { libc::prlimit(pid, resource, std::ptr::null(), &mut before) } < 0 {
            bail!("prlimit: {}", std::io::Error::last_os_error());
        }
        let limit = Limit {
            pid,
            resource,
            before,
        };
        limit.apply(libc::rlimit {
            rlim_cur: soft,
            ..before
        })?;
        Ok(limit)
    }

    fn apply(&self, value: libc::rlimit) -> Result<()> {
        // SAFETY: the third argument is a live rlimit, the fourth may be null.
        if unsafe { libc::prlimit(self.pid, self.resource, &value, std::ptr::null_mut()) } < 0 {
            bail!("prlimit: {}", std::io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        // The process may be gone by now; then there is nothing to put back.
        let _ = self.apply(self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_have_two_numbers() {
        assert_eq!(kernel_version("6.12.117"), (6, 12));
        assert_eq!(kernel_version("7.3-rc1"), (7, 3));
        assert_eq!(kernel_version("unknown (?)"), (0, 0));
    }
}
