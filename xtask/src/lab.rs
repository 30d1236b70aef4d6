//! The lab: a machine with real private memory, emulated where the host has
//! none. What goes into it, how it is started, and what it says.
//!
//! The outer machine is QEMU, the system in it an initramfs with the driver as
//! first process. Files that make it up are kept by content.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, PipeReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use cpio::newc::{Builder, ModeFileType, trailer};
use tempfile::NamedTempFile;

use crate::Context;
use crate::apt;
use crate::cache::{self, Stamp};
use crate::console::Console;
use crate::docs;
use crate::kernel::{self, Kernel};
use crate::library;
use crate::protocol::Event;
use crate::qemu::{self, Build, Line};
use crate::run;

const FIRMWARE: &[&str] = &["kvmvapic.bin", "linuxboot_dma.bin", "pvh.bin", "qboot.rom"];

/// Two NUMA nodes, so that a test can ask for memory of one of them. Whichever CPUs
/// there are belong to the first.
const MEMORY: &[&str] = &[
    "-m",
    "2G",
    "-object",
    "memory-backend-ram,id=node0,size=1536M",
    "-object",
    "memory-backend-ram,id=node1,size=512M",
    "-numa",
    "node,memdev=node0",
    "-numa",
    "node,memdev=node1",
    "-numa",
    "cpu,node-id=0,socket-id=0",
];

/// A device with a DMA engine, to be assigned to an inner machine, and the IOMMU before it.
const ASSIGNABLE: &[&str] = &[
    "-device",
    "intel-iommu,intremap=off,caching-mode=off",
    "-device",
    "edu,dma_mask=0xffffffffffffffff",
];

/// Without interrupt remapping, which the emulated IOMMU could only do with more of the
/// machine in QEMU, VFIO asks for the word of who trusts the guest.
const ASSIGNABLE_OPTIONS: &str = "intel_iommu=on vfio_iommu_type1.allow_unsafe_interrupts=1 \
    iommufd.allow_unsafe_interrupts=1";

/// Any fault of the kernel ends the machine at once, with its text on the console: an oops is a
/// panic, and a panic resets. A hang is one after two minutes, which is how long the driver waits.
const PANIC: &str = "oops=panic panic=-1 softlockup_panic=1 watchdog_thresh=60 hung_task_panic=1 \
    sysctl.kernel.panic_on_rcu_stall=1 rcupdate.rcu_cpu_stall_timeout=120";

/// ROMs of our own, and how they are built: our guest, also for RAM that is private
/// at first ...
const ROMS: &[(&str, &[&str])] = &[
    ("guest.bin", &["main.c"]),
    ("guest-private.bin", &["main.c", "-DSTART_PRIVATE"]),
];

/// ... and what makes the RAM of a Linux private that knows how to live with that.
const LOADER: (&str, &[&str]) = ("loader.bin", &["loader.c", "-DLOADER"]);

/// One CPU until the cause of a hang is known that was seen once with two, see
/// tests/lab/README.md.
const CPUS: &[&str] = &["-smp", "1"];

/// Where the host's KVM can nest.
const NESTED: &[&str] = &["-accel", "kvm", "-cpu", "host"];

/// Elsewhere an AMD CPU is emulated. String instructions are emulated element by
/// element, so that kernels should not use those of bytes; and each level of page
/// tables takes its time.
const EMULATED: &[&str] = &[
    "-accel",
    "tcg,thread=multi",
    "-cpu",
    "max,+svm,-la57,-erms,-fsrm,-fzrm,-fsrs,-fsrc",
];

/// Images of a line that were not used for so long are removed.
const KEEP_IMAGES: Duration = Duration::from_secs(24 * 60 * 60);

/// All that is needed to boot.
pub struct Lab {
    line: Line,
    /// What the machine inside runs on, ...
    system: PathBuf,
    /// ... and what the outer one does.
    qemu: PathBuf,
    initramfs: PathBuf,
    vmlinux: PathBuf,
    firmware: PathBuf,
    accelerator: &'static [&'static str],
    /// The initramfs, if it is not the cache's.
    _changed: Option<NamedTempFile>,
}

/// An interactive shell in the lab, on this terminal.
pub fn shell(cx: &Context, line: Option<Line>) -> Result<ExitCode> {
    let lab = Lab::prepare(cx, line)?;
    eprintln!("a shell in the lab; exit ends it");
    let status = lab
        .machine("lab.shell")
        .args([
            "-chardev",
            "stdio,id=console,signal=off",
            "-serial",
            "chardev:console",
        ])
        .status()?;
    ensure!(status.success(), "the lab's QEMU ended with {status}");
    Ok(ExitCode::SUCCESS)
}

/// Runs a shell command in the lab; its output and status become ours.
pub fn command(
    cx: &Context,
    line: Option<Line>,
    limit: Duration,
    command: &str,
) -> Result<ExitCode> {
    let lab = Lab::prepare(cx, line)?;
    let mut exit = None;
    let mut problems = Vec::new();
    let options = format!("lab.cmd={}", BASE64.encode(command));
    let boot = lab.boot(cx, "command", &options, limit, |event| match event {
        Event::Log(line) => println!("{line}"),
        Event::Exit(status) => exit = Some(status),
        Event::Error(error) => problems.push(error),
        Event::Begin(_)
        | Event::Test(_)
        | Event::Demo(_)
        | Event::Bench(_)
        | Event::Soak(_)
        | Event::Done => {}
    });
    problems.extend(boot.err().map(|error| format!("{error:#}")));
    match exit {
        Some(status) if problems.is_empty() => Ok(ExitCode::from(status)),
        _ => {
            problems.push("the command's exit status is not known".to_owned());
            Ok(verdict(&problems))
        }
    }
}

/// Success if there are no problems; says them otherwise.
pub fn verdict(problems: &[String]) -> ExitCode {
    for problem in problems {
        eprintln!("error: {problem}");
    }
    match problems {
        [] => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

impl Lab {
    /// Builds what is missing.
    pub fn prepare(cx: &Context, line: Option<Line>) -> Result<Self> {
        let _guard = cx.cache.lock()?;
        let build = qemu::build_any(cx, line, &[qemu::SYSTEM], &[])?;
        let kernel = kernel::build(cx)?;
        let firmware = firmware(cx, &build)?;
        let (accelerator, outer) = match nests(&kernel)? {
            true => (NESTED, build.system()),
            false => (EMULATED, qemu::build_outer(cx)?.system()),
        };
        let image = image(cx, &build, &outer, &kernel, &firmware)?;
        Ok(Self {
            line: build.line,
            system: build.system(),
            qemu: image.join(qemu::SYSTEM),
            initramfs: image.join("initramfs"),
            vmlinux: image.join("vmlinux"),
            firmware,
            accelerator,
            _changed: None,
        })
    }

    pub fn line(&self) -> Line {
        self.line
    }

    /// Where the console of a boot of this name is written to.
    pub fn log(&self, cx: &Context, name: &str) -> Result<PathBuf> {
        let logs = cx.cache.dir("logs")?;
        Ok(logs.join(format!("lab-{}-{name}.log", self.line)))
    }

    /// The patched QEMU, and the firmware for it.
    pub fn system(&self) -> &Path {
        &self.system
    }

    pub fn firmware(&self) -> &Path {
        &self.firmware
    }

    /// Puts another content in a file's place: of two archives in an initramfs
    /// the later one wins.
    pub fn with_file(mut self, place: &str, content: &[u8]) -> Result<Self> {
        let file = NamedTempFile::new()?;
        fs::write(&file, content)?;
        let mut files = Files::new();
        add(&mut files, place, file.path());
        let mut initramfs = NamedTempFile::new()?;
        io::copy(&mut File::open(&self.initramfs)?, &mut initramfs)?;
        initramfs.write_all(&archive(&files)?)?;
        self.initramfs = initramfs.path().to_owned();
        self._changed = Some(initramfs);
        Ok(self)
    }

    /// Boots, hands on every event, and returns when the machine has ended. It
    /// is an error if it hangs, breaks off or ends without having said so.
    pub fn boot(
        &self,
        cx: &Context,
        name: &str,
        options: &str,
        limit: Duration,
        mut on_event: impl FnMut(Event),
    ) -> Result<()> {
        let log = self.log(cx, name)?;
        let mut console = Console::default();
        let mut machine = self.machine(options);
        machine.args(["-serial", "stdio"]);
        let ended = watch(machine, &log, limit, |line| {
            if let Some(event) = console.hear(line) {
                on_event(event);
            }
        });
        console.verdict(ended, &log)
    }

    fn machine(&self, options: &str) -> Command {
        let mut command = Command::new(&self.qemu);
        command
            .args(["-M", "q35", "-nodefaults", "-no-reboot", "-display", "none"])
            .args(self.accelerator)
            .args(CPUS)
            .args(MEMORY)
            .args(ASSIGNABLE)
            .args(["-bios", "qboot.rom"])
            .arg("-L")
            .arg(&self.firmware)
            .arg("-kernel")
            .arg(&self.vmlinux)
            .arg("-initrd")
            .arg(&self.initramfs)
            .arg("-append")
            .arg(format!(
                "console=ttyS0 quiet {PANIC} {ASSIGNABLE_OPTIONS} lab.line={} {options}",
                self.line
            ));
        command
    }
}

/// Runs the machine and hands on each line of its console, which also goes to
/// the log. Kills it when the time is up.
fn watch(
    mut machine: Command,
    log: &Path,
    limit: Duration,
    mut console: impl FnMut(&str),
) -> Result<()> {
    let mut log = File::create(log)?;
    writeln!(log, "$ {}", run::shown(&machine))?;
    let (reader, writer) = io::pipe()?;
    machine
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    let mut child = Killed(machine.spawn().context("cannot start the lab's QEMU")?);
    drop(machine);
    let lines = lines_of(reader);
    let deadline = Instant::now() + limit;
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                writeln!(log, "{line}")?;
                console(&line);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                bail!("the lab did not end within {} s", limit.as_secs());
            }
        }
    }
    let status = child.0.wait()?;
    ensure!(status.success(), "the lab's QEMU ended with {status}");
    Ok(())
}

/// A child that does not outlive us.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Either fails where the child has ended, as it should have.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn lines_of(reader: PipeReader) -> Receiver<String> {
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line);
            if send.send(line.trim_end_matches('\r').to_owned()).is_err() {
                break;
            }
        }
    });
    receive
}

/// Whether the host can nest what the lab's kernel can use.
fn nests(kernel: &Kernel) -> Result<bool> {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let nests = match virtualization(&cpu) {
        Some("svm") => kernel.has("KVM_AMD")?,
        Some("vmx") => kernel.has("KVM_INTEL")?,
        _ => false,
    };
    Ok(nests && kvm_ioctls::Kvm::new().is_ok_and(|kvm| kvm.create_vm().is_ok()))
}

fn virtualization(cpuinfo: &str) -> Option<&str> {
    let flags = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags"))?;
    flags
        .split_whitespace()
        .find(|flag| ["svm", "vmx"].contains(flag))
}

/// The user's own QEMU tree brings firmware; otherwise the distribution's does.
fn firmware(cx: &Context, build: &Build) -> Result<PathBuf> {
    let own = build.source.join("pc-bios");
    if FIRMWARE.iter().all(|name| own.join(name).exists()) {
        return Ok(own);
    }
    from_package(cx, "firmware", "qemu-system-data", FIRMWARE)
}

fn busybox(cx: &Context) -> Result<PathBuf> {
    const PATH: &str = "bin/busybox";
    match from_package(cx, "busybox", "busybox-static", &[PATH]) {
        Ok(dir) => Ok(dir.join(PATH)),
        Err(error) => run::ask(Command::new("sh").args(["-c", "command -v busybox"]))
            .map(PathBuf::from)
            .map_err(|_| error.context("the machine has no busybox of its own either")),
    }
}

/// Files of a distribution package, in a folder of the cache.
pub fn from_package(cx: &Context, dir: &str, package: &str, files: &[&str]) -> Result<PathBuf> {
    let dir = cx.cache.dir(dir)?;
    if !cx.refresh && files.iter().all(|name| dir.join(name).exists()) {
        return Ok(dir);
    }
    let version = cx.apt()?.candidate(package)?;
    let contents = apt::unpack(&apt::package(cx, package, &version)?)?;
    for name in files {
        let content = fs::read(apt::find(contents.path(), name)?)?;
        cache::write_if_changed(&dir.join(name), content)?;
    }
    Ok(dir)
}

/// What an initramfs holds, by its place in it.
type Files = BTreeMap<PathBuf, Content>;

#[derive(Clone)]
enum Content {
    File(PathBuf),
    Link(&'static str),
}

/// Packs all that a lab is made of; the folder is named after what went in.
fn image(
    cx: &Context,
    build: &Build,
    outer: &Path,
    kernel: &Kernel,
    firmware: &Path,
) -> Result<PathBuf> {
    let driver = library::driver(cx)?;
    let mut guest = Files::new();
    add_program(&mut guest, "/init", &driver)?;
    add_program(&mut guest, "/bin/busybox", &busybox(cx)?)?;
    let mut host = guest.clone();
    add(&mut guest, "/shell", &cx.root.join("tests/lab/linux/shell"));
    host.insert("/bin/sh".into(), Content::Link("busybox"));
    add_program(
        &mut host,
        format!("/qemu/{}/{}", build.line, qemu::SYSTEM),
        &build.system(),
    )?;
    for name in FIRMWARE {
        add(&mut host, format!("/firmware/{name}"), &firmware.join(name));
    }
    for (name, how) in ROMS {
        add(&mut host, format!("/guest/{name}"), &rom(cx, name, how)?);
    }
    if kernel.has("PRIVATE_GUEST")? {
        add(
            &mut host,
            "/guest/loader.bin",
            &rom(cx, LOADER.0, LOADER.1)?,
        );
    }
    add_program(&mut host, "/tests/conformance", &library::conformance(cx)?)?;
    let models = library::firmware_models(cx)?;
    add_program(&mut host, "/tests/liblab_firmware.so", &models)?;
    add(&mut host, "/guest/vmlinux", &kernel.vmlinux);
    let documented = cx.cache.path("docs/commands.json");
    cache::write_if_changed(&documented, docs::for_the_lab(&cx.root)?)?;
    add(&mut host, "/docs/commands.json", &documented);

    let key = key(&[&host, &guest], outer)?;
    let dir = cx.cache.path(format!("lab/{}-{}", build.line, &key[..16]));
    if !dir.exists() {
        run::work("pack the lab", || pack(&dir, host, &guest, outer, kernel))?;
        remove_unused(&dir)?;
    }
    Ok(dir)
}

fn pack(dir: &Path, mut host: Files, guest: &Files, outer: &Path, kernel: &Kernel) -> Result<()> {
    let parent = dir.parent().context("an image lies in a folder")?;
    fs::create_dir_all(parent)?;
    let aside = tempfile::tempdir_in(parent)?;
    let file = |name: &str| aside.path().join(name);
    strip(outer, &file(qemu::SYSTEM))?;
    strip(&kernel.vmlinux, &file("vmlinux"))?;
    // Not compressed: an emulated CPU is slower to unpack than the host to copy.
    fs::write(file("initrd"), archive(guest)?)?;
    add(&mut host, "/guest/initrd", &file("initrd"));
    fs::write(file("initramfs"), archive(&host)?)?;
    fs::rename(aside.keep(), dir)?;
    Ok(())
}

/// Images are small enough to keep while one goes back and forth.
fn remove_unused(current: &Path) -> Result<()> {
    for entry in fs::read_dir(current.parent().context("an image lies in a folder")?)? {
        let entry = entry?;
        let age = SystemTime::now().duration_since(entry.metadata()?.modified()?);
        if entry.path() != current && age.is_ok_and(|age| age > KEEP_IMAGES) {
            cache::remove_dir(&entry.path())?;
        }
    }
    Ok(())
}

fn add(files: &mut Files, place: impl Into<PathBuf>, file: &Path) {
    files.insert(place.into(), Content::File(file.to_owned()));
}

/// Adds a program with the libraries that the dynamic linker will look for.
fn add_program(files: &mut Files, place: impl Into<PathBuf>, program: &Path) -> Result<()> {
    // For a static program ldd fails, or says so in a line without a path.
    let listing = run::ask(Command::new("ldd").arg(program)).unwrap_or_default();
    let lost = listing.lines().find(|line| line.ends_with("not found"));
    ensure!(
        lost.is_none(),
        "{} needs {}",
        program.display(),
        lost.unwrap_or_default().trim()
    );
    for library in libraries(&listing) {
        add(files, library, Path::new(library));
    }
    add(files, place, program);
    Ok(())
}

/// The paths in what ldd says: "name => path (address)" or "path (address)".
fn libraries(listing: &str) -> impl Iterator<Item = &str> {
    listing
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
}

/// A ROM of our own, built where the sources say how.
fn rom(cx: &Context, name: &str, how: &[&str]) -> Result<PathBuf> {
    let source = cx.root.join("tests/lab/guest");
    let rom = cx.cache.dir("guest")?.join(name);
    let mut build = Command::new("sh");
    build.arg(source.join("build.sh")).arg(&rom).args(how);
    run::ask(&mut build).with_context(|| format!("the lab's {name} does not build"))?;
    Ok(rom)
}

fn key(images: &[&Files], outer: &Path) -> Result<String> {
    let mut stamp = Stamp::default();
    stamp.file(outer)?;
    for (place, content) in images.iter().copied().flatten() {
        stamp.text(place.as_os_str().as_encoded_bytes());
        match content {
            Content::File(path) => stamp.file(path)?,
            Content::Link(target) => stamp.text(target),
        };
    }
    Ok(stamp.finish())
}

/// Builds a cpio archive, with the folders that the places need.
fn archive(files: &Files) -> Result<Vec<u8>> {
    let folders: BTreeSet<&Path> = files
        .keys()
        .flat_map(|place| place.ancestors().skip(1))
        .filter(|folder| *folder != Path::new("/"))
        .collect();
    let mut archive = Vec::new();
    for folder in folders {
        append(&mut archive, folder, ModeFileType::Directory, &[])?;
    }
    for (place, content) in files {
        match content {
            Content::File(path) => {
                append(&mut archive, place, ModeFileType::Regular, &stripped(path)?)?;
            }
            Content::Link(target) => {
                append(
                    &mut archive,
                    place,
                    ModeFileType::Symlink,
                    target.as_bytes(),
                )?;
            }
        }
    }
    Ok(trailer(archive)?)
}

fn append(to: &mut Vec<u8>, place: &Path, kind: ModeFileType, content: &[u8]) -> Result<()> {
    let name = place.strip_prefix("/").unwrap_or(place);
    let name = name.to_str().context("names in the lab are plain")?;
    let size = u32::try_from(content.len())?;
    let mut entry = Builder::new(name)
        .mode(0o755)
        .set_mode_file_type(kind)
        .write(to, size);
    entry.write_all(content)?;
    entry.finish()?;
    Ok(())
}

/// A file as it goes into the lab: programs without what only debuggers read.
fn stripped(path: &Path) -> Result<Vec<u8>> {
    let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    if !content.starts_with(b"\x7fELF") {
        return Ok(content);
    }
    let dir = tempfile::tempdir()?;
    let copy = dir.path().join("stripped");
    strip(path, &copy)?;
    Ok(fs::read(copy)?)
}

fn strip(from: &Path, to: &Path) -> Result<()> {
    run::ask(Command::new("strip").arg("-o").arg(to).arg(from))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_names_libraries() {
        let listing = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                       \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                       \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            libraries(listing).collect::<Vec<_>>(),
            [
                "/lib/x86_64-linux-gnu/libc.so.6",
                "/lib64/ld-linux-x86-64.so.2"
            ]
        );
        assert_eq!(libraries("\tstatically linked\n").count(), 0);
    }

    #[test]
    fn archives_hold_folders_files_and_links() -> Result<()> {
        let dir = tempfile::tempdir()?;
        fs::write(dir.path().join("text"), "hello")?;
        let mut files = Files::new();
        add(&mut files, "/a/b/text", &dir.path().join("text"));
        files.insert("/a/link".into(), Content::Link("b/text"));
        let mut names = Vec::new();
        let packed = archive(&files)?;
        let mut rest = packed.as_slice();
        loop {
            let entry = cpio::newc::Reader::new(rest)?;
            if entry.entry().is_trailer() {
                break;
            }
            names.push((entry.entry().name().to_owned(), entry.entry().mode() >> 12));
            rest = entry.finish()?;
        }
        let expected = [
            ("a", 0o4),
            ("a/b", 0o4),
            ("a/b/text", 0o10),
            ("a/link", 0o12),
        ];
        assert_eq!(names, expected.map(|(name, kind)| (name.to_owned(), kind)));
        Ok(())
    }

    #[test]
    fn virtualization_is_a_whole_flag() {
        assert_eq!(
            virtualization("model\t: 1\nflags\t\t: fpu svm_lock sse\n"),
            None
        );
        assert_eq!(virtualization("flags\t\t: fpu svm sse\n"), Some("svm"));
    }

    #[test]
    fn a_console_is_heard_to_its_end_and_a_hung_one_is_ended() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let log = dir.path().join("log");
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        let mut heard = Vec::new();
        let limit = Duration::from_secs(60);
        watch(shell("printf 'one\\r\\ntwo'"), &log, limit, |line| {
            heard.push(line.to_owned())
        })?;
        assert_eq!(heard, ["one", "two"]);
        assert!(watch(shell("exit 1"), &log, limit, drop_line).is_err());
        let error = watch(
            shell("exec sleep 600"),
            &log,
            Duration::from_millis(50),
            drop_line,
        );
        assert!(error.is_err_and(|error| error.to_string().contains("did not end")));
        Ok(())
    }

    fn drop_line(_: &str) {}
}
