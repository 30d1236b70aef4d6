//! QEMU with our patches: fetch, patch, build, cache.
//!
//! Each line has a folder of the cache with the pristine source, the patched
//! work tree and its build folders. A stamp over everything that goes into a
//! build makes an up-to-date one cost nothing; otherwise only what changed is
//! built again.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::str::FromStr;

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;

use crate::Context;
use crate::apt::without_epoch;
use crate::cache::{self, Stamp};
use crate::lab;
use crate::library::{self, Installed};
use crate::run;
use crate::setup;
use crate::tree::{self, Overlay, Step};

pub const SYSTEM: &str = "qemu-system-x86_64";
pub const QTEST: &str = "tests/qtest/private-memory-test";
/// Everything, tests included.
pub const ALL: &str = "all";

/// Where the cache has a QEMU that is newer than all lines.
const NEWER: &str = "qemu/newer";

/// Small and quick to build.
const CONFIGURE: &[&str] = &[
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--enable-kvm",
    "--enable-tcg",
    "--enable-numa",
    "--disable-fdt",
    "--disable-docs",
    "--disable-install-blobs",
    "--disable-debug-info",
];

/// What a PC starts with, by Debian's packages: its QEMU sources hold none.
const FIRMWARE: &[(&str, &[&str])] = &[
    ("seabios", &["bios-256k.bin", "vgabios-stdvga.bin"]),
    ("ipxe-qemu", &["efi-e1000e.rom"]),
    (
        "qemu-system-data",
        &["kvmvapic.bin", "linuxboot_dma.bin", "pvh.bin"],
    ),
];

/// Where a build looks for it.
const DATA: &str = "qemu-bundle/usr/local/share/qemu";

/// What emulates the lab's outer machine: TCG and the few devices that it has.
const OUTER: &[&str] = &[
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--without-default-devices",
    "--with-devices-x86_64=privmem-lab",
    "--enable-tcg",
    "--disable-fdt",
    "--disable-docs",
    "--disable-install-blobs",
    "--disable-debug-info",
];

/// A QEMU line that there are patches for, newest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Line {
    #[value(name = "10.2")]
    V10_2,
    #[value(name = "10.0")]
    V10_0,
}

impl Line {
    pub const ALL: [Self; 2] = [Self::V10_2, Self::V10_0];

    pub fn name(self) -> &'static str {
        match self {
            Self::V10_2 => "10.2",
            Self::V10_0 => "10.0",
        }
    }

    /// Whether an upstream version such as 10.2.1 belongs to this line.
    fn covers(self, version: &str) -> bool {
        version
            .strip_prefix(self.name())
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One line, or all of them.
#[derive(Clone)]
pub struct Lines(Vec<Line>);

impl FromStr for Lines {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self(Line::ALL.to_vec()));
        }
        Line::from_str(text, false).map(|line| Self(vec![line]))
    }
}

/// Which tree of a line is built, and how.
#[derive(Clone, Copy)]
pub enum Kind<'a> {
    /// With all patches and the option on; further arguments for configure.
    Patched(&'a [String]),
    /// With all patches and the option off.
    Off,
    /// With none of them.
    Unpatched,
    /// With so many of the patches, and the option on.
    First(usize),
    /// With those of the lab's outer machine, and none of the line's.
    Outer,
}

impl Kind<'_> {
    fn of(self, series: &[Step]) -> &[Step] {
        match self {
            Self::Patched(_) | Self::Off | Self::Outer => series,
            Self::Unpatched => &[],
            Self::First(patches) => &series[..patches.min(series.len())],
        }
    }

    /// A tree that is not the everyday one has a folder of its own.
    fn tree(self) -> &'static str {
        match self {
            Self::Patched(_) | Self::Off => "",
            Self::Unpatched => "unpatched",
            Self::First(_) => "series",
            Self::Outer => "outer",
        }
    }

    fn build(self) -> String {
        match self {
            Self::Off => "build-off".to_owned(),
            Self::Patched(extra) if !extra.is_empty() => format!(
                "build-{}",
                &Stamp::default().text(extra.join("\n")).finish()[..8]
            ),
            _ => "build".to_owned(),
        }
    }

    fn series(self, cx: &Context, line: Line) -> Result<Vec<Step>> {
        match self {
            Self::Outer => lab_series(cx, line),
            _ => series(cx, line),
        }
    }

    fn configure(self) -> &'static [&'static str] {
        match self {
            Self::Outer => OUTER,
            _ => CONFIGURE,
        }
    }

    /// What configure is told beside that.
    fn options(self) -> &'static [&'static str] {
        match self {
            Self::Patched(_) => &["-Dprivate_memory=enabled"],
            Self::Off => &["-Dprivate_memory=disabled"],
            Self::Unpatched | Self::Outer => &[],
            // Nobody runs what is built of a part of the series.
            Self::First(_) => &[
                "-Dprivate_memory=enabled",
                "-Doptimization=0",
                "--enable-werror",
            ],
        }
    }

    fn users_options(&self) -> &[String] {
        match self {
            Self::Patched(extra) => extra,
            _ => &[],
        }
    }
}

/// A build that is up to date.
pub struct Build {
    pub line: Line,
    /// A digest of all that went into it.
    pub stamp: String,
    pub dir: PathBuf,
    pub source: PathBuf,
}

impl Build {
    pub fn system(&self) -> PathBuf {
        self.dir.join(SYSTEM)
    }
}

/// The sources of a line cannot be had: no fault of ours.
#[derive(Debug)]
pub struct NoSource(String);

impl NoSource {
    pub fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

impl fmt::Display for NoSource {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NoSource {}

pub fn command(cx: &Context, lines: Option<Lines>, extra: &[String]) -> Result<ExitCode> {
    let _guard = cx.cache.lock()?;
    let lines = match lines {
        Some(Lines(lines)) => lines.into_iter().map(Some).collect(),
        None => {
            if let Some(build) = newer(cx, extra) {
                show(cx, &build);
                return Ok(ExitCode::SUCCESS);
            }
            vec![None]
        }
    };
    for line in lines {
        show(cx, &build_any(cx, line, &[SYSTEM], extra)?);
    }
    Ok(ExitCode::SUCCESS)
}

/// Says where a build is that users start by themselves.
fn show(cx: &Context, build: &Build) {
    if let Err(error) = add_firmware(cx, build) {
        eprintln!("  it has no firmware of its own, and needs -L or -bios: {error:#}");
    }
    println!("{}", build.system().display());
}

/// Puts firmware where the build looks for it, so that a PC starts as it is.
fn add_firmware(cx: &Context, build: &Build) -> Result<()> {
    let place = build.dir.join(DATA);
    fs::create_dir_all(&place)?;
    for (package, names) in FIRMWARE {
        let own = build.source.join("pc-bios");
        let from = match names.iter().all(|name| own.join(name).exists()) {
            true => own,
            false => lab::from_package(cx, "firmware", package, names)?,
        };
        for name in *names {
            cache::write_if_changed(&place.join(name), fs::read(from.join(name))?)?;
        }
    }
    Ok(())
}

/// Builds the given line, or the newest of which there is a source.
pub fn build_any(
    cx: &Context,
    line: Option<Line>,
    targets: &[&str],
    extra: &[String],
) -> Result<Build> {
    match line {
        Some(line) => build(cx, line, targets, extra),
        None => newest(|line| build(cx, line, targets, extra)),
    }
}

/// Builds what emulates the lab's outer machine. Whichever line is tested in it, it is the newest.
pub fn build_outer(cx: &Context) -> Result<Build> {
    newest(|line| build_kind(cx, line, Kind::Outer, &[SYSTEM]))
}

fn newest(build: impl Fn(Line) -> Result<Build>) -> Result<Build> {
    for line in Line::ALL {
        match build(line) {
            Err(error) if error.is::<NoSource>() => eprintln!("  not QEMU {line}: {error:#}"),
            result => return result,
        }
    }
    bail!("of none of the lines 10.2 and 10.0 there is a source");
}

/// Builds `targets` of a line; whoever calls holds the cache's lock.
pub fn build(cx: &Context, line: Line, targets: &[&str], extra: &[String]) -> Result<Build> {
    build_kind(cx, line, Kind::Patched(extra), targets)
}

/// Builds `targets` of one of a line's trees; whoever calls holds the cache's lock.
pub fn build_kind(cx: &Context, line: Line, kind: Kind, targets: &[&str]) -> Result<Build> {
    setup::packages(cx, setup::BUILD)?;
    build_tree(cx, line, Tree::of(cx, line)?, kind, targets)
}

/// Builds a tree with the patches of a line.
fn build_tree(cx: &Context, line: Line, tree: Tree, kind: Kind, targets: &[&str]) -> Result<Build> {
    let work = Work::new(tree, kind);
    let privmem = library::install(cx)?;
    let overlay = Overlay::new(&work.pristine, kind.of(&kind.series(cx, line)?))
        .with_context(|| format!("patching QEMU {}", work.version))?;
    let stamp = work.make(cx, targets, &overlay, &privmem)?;
    Ok(Build {
        line,
        stamp,
        dir: work.build,
        source: work.source,
    })
}

/// The patches of a line with the new files that come with each.
pub fn series(cx: &Context, line: Line) -> Result<Vec<Step>> {
    let patches = cx.root.join("qemu-patches");
    tree::series(&patches.join(line.name()), Some(&patches.join("files")))
}

/// The patches of the lab's outer machine: those for every line, and those that a line has for
/// itself.
pub fn lab_series(cx: &Context, line: Line) -> Result<Vec<Step>> {
    let patches = cx.root.join("qemu-patches/lab");
    let mut steps = tree::series(&patches, Some(&patches.join("files")))?;
    let own = patches.join(line.name());
    if own.exists() {
        steps.append(&mut tree::series(&own, None)?);
    }
    Ok(steps)
}

/// The source of a line as it was fetched; only to be read.
pub fn pristine(cx: &Context, line: Line) -> Result<PathBuf> {
    let _guard = cx.cache.lock()?;
    setup::packages(cx, setup::BUILD)?;
    Ok(Tree::of(cx, line)?.pristine)
}

/// The kernel's headers that a QEMU of the newest line brings.
pub fn kernel_headers(cx: &Context) -> Result<PathBuf> {
    Ok(source(cx)?.join("linux-headers"))
}

/// The source of the newest line, or the user's own tree, as it is.
pub fn source(cx: &Context) -> Result<PathBuf> {
    pristine(cx, Line::ALL[0])
}

/// A source of QEMU, and its folder in the cache.
struct Tree {
    dir: PathBuf,
    version: String,
    pristine: PathBuf,
    users: bool,
}

impl Tree {
    fn of(cx: &Context, line: Line) -> Result<Self> {
        match users_source() {
            Some(tree) => users_tree(cx, line, Path::new(&tree)),
            None => fetched(cx, line),
        }
    }

    /// One of the distribution's, in its folder of the cache.
    fn fetched(dir: PathBuf, version: String) -> Self {
        Self {
            pristine: dir.join("pristine"),
            dir,
            version,
            users: false,
        }
    }
}

fn users_source() -> Option<OsString> {
    std::env::var_os("QEMU_SRC").filter(|tree| !tree.is_empty())
}

/// Where one configuration of one tree is built.
struct Work {
    version: String,
    users: bool,
    pristine: PathBuf,
    source: PathBuf,
    manifest: PathBuf,
    build: PathBuf,
    arguments: Vec<String>,
    /// Tells apart what several parts of a series have built in one folder.
    part: String,
    with_library: bool,
}

impl Work {
    fn new(tree: Tree, kind: Kind) -> Self {
        // A git tree may need to fetch subprojects, a distribution's source does not.
        let download = (!tree.users).then_some("--disable-download");
        let arguments = kind
            .configure()
            .iter()
            .chain(kind.options())
            .copied()
            .chain(download)
            .chain(kind.users_options().iter().map(String::as_str));
        let dir = tree.dir.join(kind.tree());
        Self {
            version: without_epoch(&tree.version).to_owned(),
            users: tree.users,
            pristine: tree.pristine,
            source: dir.join("src"),
            manifest: dir.join("src.json"),
            build: dir.join(kind.build()),
            arguments: arguments.map(str::to_owned).collect(),
            part: match kind {
                Kind::First(patches) => format!("-{patches}"),
                _ => String::new(),
            },
            with_library: !matches!(kind, Kind::Unpatched | Kind::Outer),
        }
    }

    fn stamp(&self, overlay: &Overlay, privmem: &Installed) -> Result<String> {
        let mut stamp = Stamp::default();
        stamp.text(&self.version);
        if self.users {
            stamp.text(tree::fingerprint(&self.pristine)?);
        }
        for argument in &self.arguments {
            stamp.text(argument);
        }
        overlay.stamp(&mut stamp)?;
        if self.with_library {
            stamp
                .file(&privmem.archive)?
                .file(&privmem.header)?
                .file(&privmem.description())?;
        }
        Ok(stamp.finish())
    }

    /// Builds those of the targets that are not up to date; returns their stamp.
    fn make(
        &self,
        cx: &Context,
        targets: &[&str],
        overlay: &Overlay,
        privmem: &Installed,
    ) -> Result<String> {
        let stamp = self.stamp(overlay, privmem)?;
        let there = |target: &str| target == ALL || self.build.join(target).exists();
        let current = |target: &str| cache::holds(&self.stamp_of(target), &stamp) && there(target);
        if targets.iter().all(|target| current(target)) {
            return Ok(stamp);
        }
        run::work(&format!("patch QEMU {}", self.version), || {
            tree::sync(&self.pristine, overlay, &self.source, &self.manifest)
        })?;
        let meson = setup::meson(cx)?;
        self.configure(cx, &meson, privmem)?;
        let mut ninja = Command::new("ninja");
        ninja.arg("-C").arg(&self.build).args(targets);
        environment(&mut ninja, &meson, privmem)?;
        run::step(&cx.cache, &format!("build QEMU {}", self.version), ninja)?;
        targets
            .iter()
            .try_for_each(|target| cache::replace(&self.stamp_of(target), &stamp))?;
        Ok(stamp)
    }

    fn stamp_of(&self, target: &str) -> PathBuf {
        self.build
            .join(format!("{}{}.stamp", target.replace('/', "-"), self.part))
    }

    /// Once for each set of arguments, of which the library's pkg-config file
    /// is one; ninja sees to what else changes later.
    fn configure(&self, cx: &Context, meson: &Path, privmem: &Installed) -> Result<()> {
        let done = self.build.join("configured");
        let library = fs::read_to_string(privmem.description())?;
        let arguments = format!("{}\n{library}", self.arguments.join("\n"));
        // Meson leaves no build.ninja where it was interrupted while it made it anew.
        if cache::holds(&done, &arguments) && self.build.join("build.ninja").exists() {
            return Ok(());
        }
        cache::remove_dir(&self.build)?;
        fs::create_dir_all(&self.build)?;
        let mut configure = Command::new(self.source.join("configure"));
        configure.args(&self.arguments).current_dir(&self.build);
        environment(&mut configure, meson, privmem)?;
        let label = format!("configure QEMU {}", self.version);
        run::step(&cx.cache, &label, configure)?;
        cache::replace(&done, arguments)
    }
}

fn environment(command: &mut Command, meson: &Path, privmem: &Installed) -> Result<()> {
    command.env("PATH", in_front(meson, "PATH")?).env(
        "PKG_CONFIG_PATH",
        in_front(&privmem.pkg_config, "PKG_CONFIG_PATH")?,
    );
    Ok(())
}

/// A list of folders such as PATH, with one more as its first.
pub fn in_front(dir: &Path, variable: &str) -> Result<OsString> {
    let rest = std::env::var_os(variable).unwrap_or_default();
    let rest = std::env::split_paths(&rest).filter(|path| !path.as_os_str().is_empty());
    Ok(std::env::join_paths(
        std::iter::once(dir.to_owned()).chain(rest),
    )?)
}

/// The user's own tree.
fn users_tree(cx: &Context, line: Line, tree: &Path) -> Result<Tree> {
    let tree = tree
        .canonicalize()
        .with_context(|| format!("QEMU_SRC={}", tree.display()))?;
    let version = fs::read_to_string(tree.join("VERSION"))
        .with_context(|| format!("QEMU_SRC={} is no QEMU tree", tree.display()))?;
    let version = version.trim().to_owned();
    let Some(found) = Line::ALL.into_iter().find(|line| line.covers(&version)) else {
        bail!(
            "QEMU_SRC={} is QEMU {version}; there are patches for the lines 10.2 and 10.0",
            tree.display()
        );
    };
    if found != line {
        bail!(NoSource::new(format!(
            "QEMU_SRC={} is of line {found}, not {line}",
            tree.display()
        )));
    }
    let key = Stamp::default()
        .text(tree.as_os_str().as_encoded_bytes())
        .finish();
    let dir = cx.cache.dir(format!("qemu/user-{}", &key[..8]))?;
    Ok(Tree {
        dir,
        version,
        pristine: tree,
        users: true,
    })
}

/// The distribution's source of a line. What the cache has is kept unless
/// --refresh asks for newer, so that a warm cache needs no network.
fn fetched(cx: &Context, line: Line) -> Result<Tree> {
    let dir = cx.cache.dir(format!("qemu/{line}"))?;
    let have = have(&dir);
    if let Some(version) = have.as_ref().filter(|_| !cx.refresh) {
        return Ok(Tree::fetched(dir, version.clone()));
    }
    match fetch(cx, line, have.as_deref(), &dir) {
        Ok(version) => Ok(Tree::fetched(dir, version)),
        Err(error) => match have {
            Some(version) => {
                eprintln!("  keeping QEMU {version}: {error:#}");
                Ok(Tree::fetched(dir, version))
            }
            None => Err(error.context(NoSource::new(format!(
                "no source of QEMU {line} can be had from the distribution"
            )))),
        },
    }
}

/// The version that a folder of the cache holds.
fn have(dir: &Path) -> Option<String> {
    fs::read_to_string(dir.join("version"))
        .ok()
        .filter(|_| dir.join("pristine").exists())
}

/// A QEMU newer than all lines, where the distribution has one and the hooks of
/// the newest line fit it as they are. Otherwise says why not: nobody has to
/// have it.
fn newer(cx: &Context, extra: &[String]) -> Option<Build> {
    if users_source().is_some() {
        return None;
    }
    let line = Line::ALL[0];
    // A warm cache needs no network.
    let cold = have(&cx.cache.path(format!("qemu/{line}"))).is_none();
    if (cx.refresh || cold)
        && let Err(why) = fetch_newer(cx, line)
    {
        eprintln!("  no QEMU newer than line {line}: {why:#}");
    }
    let dir = cx.cache.path(NEWER);
    let version = have(&dir)?;
    let tree = Tree::fetched(dir, version.clone());
    match build_tree(cx, line, tree, Kind::Patched(extra), &[SYSTEM]) {
        Ok(build) => Some(build),
        Err(why) => {
            let why = format!("{why:#}");
            let first = why.lines().next().unwrap_or_default();
            eprintln!("  not QEMU {version}: {first}");
            None
        }
    }
}

/// Fetches the newest version that is newer than a line and can be had.
fn fetch_newer(cx: &Context, line: Line) -> Result<()> {
    setup::packages(cx, setup::BUILD)?;
    let dir = cx.cache.dir(NEWER)?;
    let have = have(&dir);
    let versions = cx.apt()?.source_versions("qemu")?;
    for version in newer_than(&versions, line) {
        if have.as_deref() == Some(version) {
            return Ok(());
        }
        match cx.apt()?.source_if_any("qemu", version) {
            Ok(dsc) => return unpack(cx, version, &dsc, &dir),
            Err(why) => eprintln!("  QEMU {version} is listed, but cannot be had: {why:#}"),
        }
    }
    bail!("the distribution lists none that can be had")
}

/// The versions that are newer than a line, newest first.
fn newer_than(versions: &[String], line: Line) -> impl Iterator<Item = &str> {
    let numbers = |version: &str| -> Vec<u32> {
        version
            .split('.')
            .map_while(|number| number.parse().ok())
            .collect()
    };
    let start = numbers(line.name());
    versions.iter().map(String::as_str).filter(move |version| {
        let version = upstream(version);
        !line.covers(version) && numbers(version) > start
    })
}

/// Fetches the newest version that can be downloaded and unpacked.
fn fetch(cx: &Context, line: Line, have: Option<&str>, dir: &Path) -> Result<String> {
    let apt = cx.apt()?;
    let versions = apt.source_versions("qemu")?;
    for version in candidates(&versions, line) {
        if have == Some(version) {
            return Ok(version.to_owned());
        }
        let unpacked = apt
            .source("qemu", version)
            .and_then(|dsc| unpack(cx, version, &dsc, dir));
        match unpacked {
            Ok(()) => return Ok(version.to_owned()),
            Err(error) => eprintln!("  QEMU {version} cannot be had: {error:#}"),
        }
    }
    bail!("the distribution lists no QEMU {line} that can be downloaded")
}

/// The versions of a line in their given order, newest first.
fn candidates(versions: &[String], line: Line) -> impl Iterator<Item = &str> {
    versions
        .iter()
        .map(String::as_str)
        .filter(move |version| line.covers(upstream(version)))
}

/// Epoch and Debian's own suffixes taken off: 1:10.2.2+ds-1 is 10.2.2.
fn upstream(version: &str) -> &str {
    let version = without_epoch(version);
    version.split(['+', '-', '~']).next().unwrap_or(version)
}

/// A new version starts from nothing: work tree and builds of the old one go.
fn unpack(cx: &Context, version: &str, dsc: &Path, dir: &Path) -> Result<()> {
    let fresh = dir.join("unpacking");
    cache::remove_dir(&fresh)?;
    let mut command = Command::new("dpkg-source");
    command.arg("-x").arg(dsc).arg(&fresh);
    run::step(&cx.cache, &format!("unpack QEMU {version}"), command)?;
    ensure!(fresh.join("VERSION").exists(), "it is no QEMU source");
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path != fresh && path.is_dir() {
            cache::remove_dir(&path)?;
        }
    }
    fs::remove_file(dir.join("src.json")).ok();
    fs::rename(&fresh, dir.join("pristine"))?;
    cache::replace(&dir.join("version"), version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_belong_to_lines() {
        assert!(Line::V10_2.covers("10.2.2") && Line::V10_2.covers("10.2"));
        assert!(!Line::V10_2.covers("10.20.1") && !Line::V10_0.covers("10.2.2"));
    }

    #[test]
    fn debian_versions_are_sorted_into_lines() {
        let versions = [
            "1:11.1.3+ds-1",
            "1:10.2.2+ds-1",
            "1:10.2.2+ds-1~bpo13+1",
            "1:10.0.13+ds-0+deb13u1",
        ]
        .map(str::to_owned);
        let of = |line| candidates(&versions, line).collect::<Vec<_>>();
        assert_eq!(of(Line::V10_2), ["1:10.2.2+ds-1", "1:10.2.2+ds-1~bpo13+1"]);
        assert_eq!(of(Line::V10_0), ["1:10.0.13+ds-0+deb13u1"]);
        assert_eq!(upstream("10.0.0~rc2+ds-1"), "10.0.0");
        let newer = |line| newer_than(&versions, line).collect::<Vec<_>>();
        assert_eq!(newer(Line::V10_2), ["1:11.1.3+ds-1"]);
        assert_eq!(newer(Line::V10_0).len(), 3);
    }

    /// The table of qemu-patches/README.md says what the patches do.
    #[test]
    fn each_line_is_in_the_table() -> Result<()> {
        let patches = Path::new(env!("CARGO_MANIFEST_DIR")).join("../qemu-patches");
        let readme = fs::read_to_string(patches.join("README.md"))?;
        for line in Line::ALL {
            let row = readme
                .lines()
                .find(|row| row.starts_with(&format!("| {line} |")))
                .with_context(|| format!("there is no row for {line}"))?;
            let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
            let hooks: String =
                tree::series(&patches.join(line.name()), Some(&patches.join("files")))?
                    .iter()
                    .map(|step| fs::read_to_string(&step.patch))
                    .collect::<Result<_, _>>()?;
            for (cell, file) in [(4, "tdx.c"), (5, "sev.c")] {
                let hooked = hooks.contains(&format!("+++ b/target/i386/kvm/{file}"))
                    || hooks.contains(&format!("+++ b/target/i386/{file}"));
                let said = cells[cell] == "on a model";
                assert_eq!(said, hooked, "{line} {file}");
            }
            let made_for = cells[1].rsplit(' ').next().unwrap_or_default();
            assert!(line.covers(made_for), "{made_for} is none of {line}");
            assert_eq!(cells[6], format!("`cargo xtask test --full --line {line}`"));
        }
        Ok(())
    }

    #[test]
    fn lines_are_read_by_name() {
        assert_eq!(
            Lines::from_str("all").map(|lines| lines.0),
            Ok(Line::ALL.to_vec())
        );
        assert_eq!(
            Lines::from_str("10.0").map(|lines| lines.0),
            Ok(vec![Line::V10_0])
        );
        assert!(Lines::from_str("9.2").is_err());
    }
}
