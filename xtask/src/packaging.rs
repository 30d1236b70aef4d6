//! The suite `packaging`: the library by itself, as a packager builds and
//! installs it and as others then build against it.
//!
//! Each check is a real run of meson in a folder of its own. Only cargo's work
//! is kept in the cache, behind a link where meson.build puts it. Nothing is
//! downloaded meanwhile: a packager's machine has no network.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use object::read::archive::ArchiveFile;
use object::{Object as _, ObjectSection as _};
use walkdir::WalkDir;

use crate::Context;
use crate::cache;
use crate::library;
use crate::qemu::in_front;
use crate::run;
use crate::setup;
use crate::suites::Tally;
use crate::symbols;

const LIBDIR: &str = "lib/x86_64-linux-gnu";

/// A target that Rust knows but ships no standard library for.
const TARGET_WITHOUT_STD: &str = "x86_64-unikraft-linux-musl";

pub fn suite(cx: &Context) -> Result<Tally> {
    let _guard = cx.cache.lock()?;
    setup::packages(cx, setup::PACKAGING)?;
    let mut fetch = library::cargo(cx);
    fetch.args(["fetch", "--locked", "--target=x86_64-unknown-linux-gnu"]);
    run::step(&cx.cache, "fetch crates", fetch)?;
    let scratch = tempfile::tempdir()?;
    let bench = Bench {
        cx,
        meson: setup::meson(cx)?,
        scratch: scratch.path(),
    };
    let mut tally = Tally::default();
    tally.check("release, with DESTDIR", bench.release());
    tally.check("debug, relocatable", bench.debug());
    tally.check("plain", bench.plain());
    tally.check("subproject", bench.subproject());
    tally.check("cross file", bench.cross());
    let refused = "runs on x86-64 Linux only, not on aarch64 linux";
    tally.check(
        "another host is refused",
        bench.refuses("aarch64", "", refused),
    );
    let target = format!("[properties]\nrust_target = '{TARGET_WITHOUT_STD}'\n");
    let way_out = format!("rustup target add {TARGET_WITHOUT_STD}");
    let missing = bench.refuses("x86_64", &target, &way_out);
    tally.check("a missing standard library is named", missing);
    Ok(tally)
}

/// Where the runs take place, and with which meson.
struct Bench<'a> {
    cx: &'a Context,
    meson: PathBuf,
    scratch: &'a Path,
}

impl Bench<'_> {
    /// As a distribution does it; with warnings as errors, those of the manual
    /// included.
    fn release(&self) -> Result<()> {
        let options = ["--prefix=/usr", "-Dlibdir=lib/x86_64-linux-gnu"];
        let more = ["--buildtype=release", "--werror", "-Ddocs=enabled"];
        let stage = self.install("release", &[&options[..], &more].concat())?;
        let prefix = stage.join("usr");
        let expected = [
            "include/privmem.h".to_owned(),
            format!("{LIBDIR}/libprivmem.a"),
            format!("{LIBDIR}/pkgconfig/privmem.pc"),
        ];
        ensure_eq(&files(&stage)?, &expected.map(|name| format!("usr/{name}")))?;
        let archive = prefix.join(LIBDIR).join("libprivmem.a");
        ensure!(!has_types(&archive)?, "release has all debug information");
        manual(
            &fs::read_to_string(prefix.join("include/privmem.h"))?,
            &prefix.join("share/doc/privmem/html"),
        )?;
        let pkgconfig = prefix.join(LIBDIR).join("pkgconfig");
        let version = library::version(self.cx)?;
        ensure_eq(
            &pkg_config(&pkgconfig, Some(&stage), &["--modversion"])?,
            &[version],
        )?;
        self.links_what_rust_needs(&pkg_config(&pkgconfig, Some(&stage), &["--libs"])?)?;
        self.example(&pkgconfig, Some(&stage))
    }

    /// What is installed works wherever it is moved.
    fn debug(&self) -> Result<()> {
        let options = ["--buildtype=debug", "--prefix=/opt/privmem"];
        let more = ["-Dpkgconfig.relocatable=true", "-Ddocs=disabled"];
        let stage = self.install("debug", &[&options[..], &more].concat())?;
        let moved = self.scratch.join("moved");
        fs::rename(stage.join("opt/privmem"), &moved)?;
        let library = find(&moved, "libprivmem.a")?;
        ensure!(has_types(&library)?, "debug lacks debug information");
        ensure!(!moved.join("share").exists(), "-Ddocs=disabled made docs");
        self.example(&find(&moved, "privmem.pc")?.with_file_name(""), None)
    }

    /// Cargo.toml and the environment decide.
    fn plain(&self) -> Result<()> {
        let build = self.setup("plain", &["--buildtype=plain", "-Ddocs=disabled"])?;
        let mut compile = self.meson("compile", &build);
        compile.env("CARGO_PROFILE_RELEASE_DEBUG", "full");
        self.log("compile", &mut compile)?;
        let asked = has_types(&build.join("libprivmem.a"))?;
        ensure!(asked, "the environment was not asked");
        Ok(())
    }

    /// A VMM with the library in its tree; it has no installed one to find.
    fn subproject(&self) -> Result<()> {
        let source = self.consumer("vmm")?;
        fs::create_dir(source.join("subprojects"))?;
        symlink(&self.cx.root, source.join("subprojects/privmem"))?;
        let build = self.scratch.join("build-vmm");
        self.keep_cargo(&build.join("subprojects/privmem"))?;
        let mut setup = Command::new("meson");
        setup.arg("setup").arg(&build).arg(&source);
        setup.args(["--force-fallback-for=privmem", "--buildtype=debug"]);
        self.log("set up vmm", &mut setup)?;
        let tested = self.log("test vmm", &mut self.meson("test", &build))?;
        ensure!(
            has_types(&build.join("subprojects/privmem/libprivmem.a"))?,
            "the VMM's build type was not used"
        );
        ensure_ok(&tested, 1)
    }

    /// The compiler of another prefix, which this machine can run as well. Its
    /// programs do, and a doxygen that is too old is said to be missing.
    fn cross(&self) -> Result<()> {
        let cross = self.cross_file("x86_64", "")?;
        let (native, doxygen) = (self.scratch.join("native"), self.scratch.join("doxygen"));
        fs::write(&doxygen, "#!/bin/sh\necho 0.1\n")?;
        fs::set_permissions(&doxygen, Permissions::from_mode(0o755))?;
        let text = format!("[binaries]\ndoxygen = '{}'\n", doxygen.display());
        fs::write(&native, text)?;
        let files = [
            option("--cross-file", &cross),
            option("--native-file", &native),
            "--buildtype=release".to_owned(),
        ];
        let build = self.setup("cross", &files.each_ref().map(String::as_str))?;
        let said = fs::read_to_string(build.join("meson-logs/meson-log.txt"))?;
        ensure!(said.contains("no HTML manual is made"), "{said}");
        let tested = self.log("test cross", &mut self.meson("test", &build))?;
        let of_target = build.join("cargo/x86_64-unknown-linux-gnu/release/libprivmem.a");
        ensure!(
            cache::holds(&build.join("libprivmem.a"), fs::read(of_target)?),
            "the library is not the target's"
        );
        ensure_ok(&tested, 2)
    }

    /// Setting up fails, and says what to do.
    fn refuses(&self, cpu: &str, more: &str, why: &str) -> Result<()> {
        let cross = option("--cross-file", &self.cross_file(cpu, more)?);
        let Err(said) = self.setup(cpu, &[&cross, "-Ddocs=disabled"]) else {
            bail!("it is not refused");
        };
        let said = format!("{said:#}");
        ensure!(said.contains(why), "it says: {said}");
        Ok(())
    }

    fn install(&self, name: &str, options: &[&str]) -> Result<PathBuf> {
        let build = self.setup(name, options)?;
        self.log("compile", &mut self.meson("compile", &build))?;
        let tested = self.log("test", &mut self.meson("test", &build))?;
        ensure_ok(&tested, 2)?;
        let stage = self.scratch.join(format!("stage-{name}"));
        let mut install = self.meson("install", &build);
        self.log("install", install.arg("--destdir").arg(&stage))?;
        Ok(stage)
    }

    /// A build folder that is new but for what cargo has kept.
    fn setup(&self, name: &str, options: &[&str]) -> Result<PathBuf> {
        let build = self.scratch.join(format!("build-{name}"));
        self.keep_cargo(&build)?;
        let mut setup = Command::new("meson");
        setup
            .arg("setup")
            .args(options)
            .arg(&build)
            .arg(&self.cx.root);
        self.log(&format!("set up {name}"), &mut setup)?;
        Ok(build)
    }

    fn keep_cargo(&self, build: &Path) -> Result<()> {
        fs::create_dir_all(build)?;
        let kept = self.cx.cache.dir("packaging/cargo")?;
        Ok(symlink(kept, build.join("cargo"))?)
    }

    fn meson(&self, what: &str, build: &Path) -> Command {
        let mut command = Command::new("meson");
        command.arg(what).arg("-C").arg(build);
        command
    }

    /// Runs a command without the network; what it said, also if it failed.
    fn log(&self, label: &str, command: &mut Command) -> Result<String> {
        command
            .env("PATH", in_front(&self.meson, "PATH")?)
            .env("CARGO_NET_OFFLINE", "true");
        let output = run::work(&format!("packaging: {label}"), || Ok(command.output()?))?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        ensure!(output.status.success(), "{}: {said}", run::shown(command));
        Ok(said)
    }

    fn cross_file(&self, cpu: &str, more: &str) -> Result<PathBuf> {
        let file = self.scratch.join(format!("cross-{cpu}"));
        let text = format!(
            "[binaries]\nc = 'x86_64-linux-gnu-gcc'\nar = 'x86_64-linux-gnu-ar'\n\
             [host_machine]\nsystem = 'linux'\ncpu_family = '{cpu}'\ncpu = '{cpu}'\n\
             endian = 'little'\n{more}"
        );
        fs::write(&file, text)?;
        Ok(file)
    }

    /// The sources of a VMM that uses the library.
    fn consumer(&self, name: &str) -> Result<PathBuf> {
        let dir = self.scratch.join(name);
        fs::create_dir(&dir)?;
        let root = &self.cx.root;
        fs::copy(
            root.join("tests/packaging/meson.build"),
            dir.join("meson.build"),
        )?;
        fs::copy(root.join("docs/example.c"), dir.join("example.c"))?;
        Ok(dir)
    }

    /// Builds the example as its first lines say, with nothing but pkg-config.
    fn example(&self, pkgconfig: &Path, sysroot: Option<&Path>) -> Result<()> {
        let flags = pkg_config(pkgconfig, sysroot, &["--cflags", "--libs"])?;
        let program = self.scratch.join("example");
        let mut compile = Command::new("cc");
        compile.arg("-o").arg(&program);
        run::ask(compile.arg(self.cx.root.join("docs/example.c")).args(flags))?;
        let said = run::ask(&mut Command::new(&program))?;
        let expected = format!("[{}{}{}]", ".".repeat(16), "#".repeat(16), ".".repeat(32));
        ensure_eq(&[said], &[expected])
    }

    /// meson.build asks rustc about a crate without dependencies; this asks it
    /// about ours. Cargo repeats what rustc said where nothing is to be built.
    fn links_what_rust_needs(&self, libs: &[String]) -> Result<()> {
        let mut rustc = library::cargo(self.cx);
        rustc
            .args(["rustc", "--locked", "--lib", "--crate-type=staticlib"])
            .arg("--target-dir")
            .arg(self.cx.cache.dir("packaging/libs")?)
            .args(["--", "--print=native-static-libs"]);
        let said = self.log("ask what the library needs", &mut rustc)?;
        let needed = said.split_once("native-static-libs: ");
        let (_, needed) = needed.with_context(|| format!("rustc does not say: {said}"))?;
        for lib in needed.lines().next().unwrap_or_default().split(' ') {
            let there = lib == "-lc" || libs.iter().any(|found| found == lib);
            ensure!(there, "privmem.pc lacks {lib}: {}", libs.join(" "));
        }
        Ok(())
    }
}

fn option(name: &str, value: &Path) -> String {
    format!("{name}={}", value.display())
}

fn ensure_eq(found: &[String], expected: &[String]) -> Result<()> {
    ensure!(found == expected, "found {found:?}, expected {expected:?}");
    Ok(())
}

/// As many of meson's tests have passed, and none was skipped.
fn ensure_ok(said: &str, count: usize) -> Result<()> {
    let passed = said
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Ok:"));
    let passed: Vec<_> = passed.map(|rest| rest.trim().to_owned()).collect();
    ensure!(
        passed == [count.to_string()],
        "not {count} tests passed: {said}"
    );
    Ok(())
}

fn pkg_config(dir: &Path, sysroot: Option<&Path>, ask: &[&str]) -> Result<Vec<String>> {
    let mut command = Command::new("pkg-config");
    command
        .args(ask)
        .arg("privmem")
        .env("PKG_CONFIG_LIBDIR", dir);
    command.env("PKG_CONFIG_SYSROOT_DIR", sysroot.unwrap_or(Path::new("")));
    let said = run::ask(&mut command)?;
    Ok(said.split_whitespace().map(str::to_owned).collect())
}

/// What is installed, in order, but for the pages of the manual.
fn files(stage: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in WalkDir::new(stage).sort_by_file_name() {
        let entry = entry?;
        let name = entry
            .path()
            .strip_prefix(stage)?
            .to_string_lossy()
            .into_owned();
        if !entry.file_type().is_dir() && !name.starts_with("usr/share/doc/privmem/html/") {
            names.push(name);
        }
    }
    Ok(names)
}

fn find(dir: &Path, name: &str) -> Result<PathBuf> {
    let mut entries = WalkDir::new(dir).into_iter().flatten();
    let found = entries.find(|entry| entry.file_name() == name);
    Ok(found
        .with_context(|| format!("{name} is not installed"))?
        .into_path())
}

/// Whether our objects have all debug information, of which the name of a
/// struct's field is a part, or only which line is where.
fn has_types(archive: &Path) -> Result<bool> {
    let data = fs::read(archive)?;
    for member in ArchiveFile::parse(data.as_slice())?.members() {
        let member = member?;
        if !member.name().starts_with(b"privmem") {
            continue;
        }
        let object = object::File::parse(member.data(data.as_slice())?)?;
        let names = object.section_by_name(".debug_str");
        let names = names.map_or(Ok(&[][..]), |section| section.data())?;
        if names
            .split(|byte| *byte == 0)
            .any(|name| name == b"keep_shared")
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Every function of the header is explained in one of the manual's topics.
fn manual(header: &str, pages: &Path) -> Result<()> {
    ensure!(pages.join("index.html").exists(), "there is no manual");
    let mut topics = String::new();
    for entry in fs::read_dir(pages)? {
        let path = entry?.path();
        if path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("group__"))
        {
            topics += &fs::read_to_string(path).unwrap_or_default();
        }
    }
    for name in symbols::declared(header) {
        let heading = [format!("{name} </td>"), format!("{name}</td>")];
        let explained = heading.iter().any(|heading| topics.contains(heading));
        ensure!(explained, "{name} is not in the manual");
    }
    Ok(())
}
