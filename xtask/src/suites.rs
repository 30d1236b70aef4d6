//! `cargo xtask test`: the suites, what they count and how that is printed.
//!
//! A suite runs other programs and reads what they say about each test. What
//! cannot run is skipped by name and with the reason; what breaks off without
//! a verdict has failed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use crate::Context;
use crate::checkpatch;
use crate::coverage;
use crate::death;
use crate::docs;
use crate::full;
use crate::fuzz;
use crate::header;
use crate::lab::Lab;
use crate::library;
use crate::miri;
use crate::packaging;
use crate::protocol::{Event, Verdict};
use crate::qemu::{self, Line, NoSource};
use crate::repeat::{self, Round};
use crate::run;
use crate::setup;
use crate::symbols;

const LAB_LIMIT: Duration = Duration::from_secs(40 * 60);

/// After so long a program of tests counts as hung: a build and all tests take a few
/// minutes.
pub const HANGS: Duration = Duration::from_secs(30 * 60);

/// How the lab's tests begin a line about what they found.
const REMARK: &str = "  ";

/// What a C program's exit status says when it could not test anything.
const SKIPPED: i32 = 77;

/// Has libtest show what tests that passed have printed, such as why they did
/// nothing.
pub const SHOW_OUTPUT: &str = "--show-output";

const WARNINGS: &[&str] = &["-Wall", "-Wextra", "-Werror", "-pedantic"];

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    Header,
    Symbols,
    Rust,
    Miri,
    CClient,
    Fuzz,
    Packaging,
    Coverage,
    Xtask,
    Docs,
    #[value(name = "qtest-10.2")]
    Qtest10_2,
    #[value(name = "qtest-10.0")]
    Qtest10_0,
    #[value(name = "lab-10.2")]
    Lab10_2,
    #[value(name = "lab-10.0")]
    Lab10_0,
    #[value(name = "checkpatch-10.2")]
    Checkpatch10_2,
    #[value(name = "checkpatch-10.0")]
    Checkpatch10_0,
    #[value(name = "series-10.2")]
    Series10_2,
    #[value(name = "series-10.0")]
    Series10_0,
    #[value(name = "full-10.2")]
    Full10_2,
    #[value(name = "full-10.0")]
    Full10_0,
}

impl Suite {
    fn line(self) -> Option<Line> {
        match self {
            Self::Qtest10_2 | Self::Lab10_2 => Some(Line::V10_2),
            Self::Qtest10_0 | Self::Lab10_0 => Some(Line::V10_0),
            Self::Checkpatch10_2 | Self::Series10_2 | Self::Full10_2 => Some(Line::V10_2),
            Self::Checkpatch10_0 | Self::Series10_0 | Self::Full10_0 => Some(Line::V10_0),
            _ => None,
        }
    }

    /// Whether it takes too long for every day.
    fn only_in_full(self) -> bool {
        matches!(
            self,
            Self::Checkpatch10_2
                | Self::Checkpatch10_0
                | Self::Series10_2
                | Self::Series10_0
                | Self::Full10_2
                | Self::Full10_0
        )
    }

    fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }

    fn run(self, cx: &Context, lab_tests: &[String], round: Round) -> Result<Tally> {
        match self {
            Self::Header => header_suite(cx),
            Self::Symbols => symbols::suite(cx),
            Self::Rust => cargo_test(cx, "cargo test", &["--workspace", "--exclude", "xtask"]),
            Self::Miri => miri::suite(cx),
            Self::CClient => c_clients(cx),
            Self::Fuzz => fuzz::suite(cx),
            Self::Packaging => packaging::suite(cx),
            Self::Coverage => coverage::suite(cx),
            Self::Xtask => cargo_test(cx, "cargo test xtask", &["--package", "xtask"]),
            Self::Docs => docs::suite(cx),
            Self::Qtest10_2 => qtests(cx, Line::V10_2),
            Self::Qtest10_0 => qtests(cx, Line::V10_0),
            Self::Lab10_2 => lab(cx, Line::V10_2, lab_tests, round),
            Self::Lab10_0 => lab(cx, Line::V10_0, lab_tests, round),
            Self::Checkpatch10_2 => checkpatch::suite(cx, Line::V10_2),
            Self::Checkpatch10_0 => checkpatch::suite(cx, Line::V10_0),
            Self::Series10_2 => full::series(cx, Line::V10_2),
            Self::Series10_0 => full::series(cx, Line::V10_0),
            Self::Full10_2 => full::suite(cx, Line::V10_2),
            Self::Full10_0 => full::suite(cx, Line::V10_0),
        }
    }
}

/// What came of a suite's tests; failures and skips with name and reason.
#[derive(Debug, Default, PartialEq)]
pub struct Tally {
    pub passed: usize,
    pub failed: Vec<String>,
    pub skipped: Vec<String>,
    /// The output of what failed first, if it is in a file.
    pub log: Option<PathBuf>,
}

impl Tally {
    pub fn pass() -> Self {
        Self {
            passed: 1,
            ..Self::default()
        }
    }

    pub fn skip(why: String) -> Self {
        Self {
            skipped: vec![why],
            ..Self::default()
        }
    }

    pub fn fail(why: String) -> Self {
        Self {
            failed: vec![why],
            ..Self::default()
        }
    }

    /// Counts one check by its result.
    pub fn check(&mut self, name: &str, result: Result<()>) {
        match result {
            Ok(()) => self.passed += 1,
            Err(error) => self.failed.push(format!("{name}: {error:#}")),
        }
    }

    /// A program that failed, or tested nothing, must not look like success.
    pub fn ended(mut self, name: &str, success: bool) -> Self {
        let counted = self.passed + self.failed.len() + self.skipped.len();
        if self.failed.is_empty() && (!success || counted == 0) {
            self.failed.push(format!("{name}: it broke off"));
        }
        self
    }

    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.skipped.extend(other.skipped);
        self.log = self.log.take().or(other.log);
    }

    /// Names the file with the output, which matters if something failed.
    pub fn with_log(mut self, log: &Path) -> Self {
        if !self.failed.is_empty() {
            self.log.get_or_insert_with(|| log.to_owned());
        }
        self
    }

    pub fn counts(&self) -> String {
        format!(
            "{} passed, {} failed, {} skipped",
            self.passed,
            self.failed.len(),
            self.skipped.len()
        )
    }
}

/// Which suites run.
pub struct Chosen {
    /// By name; all of the everyday ones if there are none.
    pub suite: Vec<Suite>,
    /// Those that are not for every day, too.
    pub full: bool,
    /// Those of this line, and of none.
    pub line: Option<Line>,
}

impl Chosen {
    fn has(&self, suite: Suite) -> bool {
        let named = match self.suite.as_slice() {
            [] => self.full || !suite.only_in_full(),
            some => some.contains(&suite) || (self.full && suite.only_in_full()),
        };
        let of_line = |of| self.line.is_none_or(|line| line == of);
        named && suite.line().is_none_or(of_line)
    }
}

/// Runs the suites, several times if `repeat` says so.
pub fn run(cx: &Context, chosen: &Chosen, lab_tests: &[String], repeat: u32) -> ExitCode {
    repeat::rounds(repeat, |round| run_once(cx, chosen, lab_tests, round))
}

fn run_once(cx: &Context, chosen: &Chosen, lab_tests: &[String], round: Round) -> Tally {
    let mut total = Tally::default();
    let mut sources = Sources::default();
    for suite in Suite::value_variants() {
        if !chosen.has(*suite) {
            continue;
        }
        let started = Instant::now();
        let result = suite.run(cx, lab_tests, round);
        sources.note(*suite, &result);
        let tally = settled(result);
        report(round, &suite.name(), &tally, started.elapsed());
        total.add(tally);
    }
    if sources.none_to_be_had() {
        total.failed.push("no QEMU line could be tested".to_owned());
        println!("    failed: no QEMU line could be tested");
    }
    total
}

/// Which lines were asked for, and of which there are sources.
#[derive(Default)]
struct Sources {
    wanted: usize,
    missing: usize,
}

impl Sources {
    fn note(&mut self, suite: Suite, result: &Result<Tally>) {
        if suite.line().is_some() {
            self.wanted += 1;
            self.missing += usize::from(no_source(result).is_some());
        }
    }

    fn none_to_be_had(&self) -> bool {
        self.wanted > 0 && self.missing == self.wanted
    }
}

fn no_source(result: &Result<Tally>) -> Option<&NoSource> {
    result.as_ref().err()?.downcast_ref()
}

fn settled(result: Result<Tally>) -> Tally {
    if no_source(&result).is_some() {
        return Tally::skip(
            result
                .err()
                .map_or_else(String::new, |why| format!("{why:#}")),
        );
    }
    result.unwrap_or_else(|error| Tally::fail(format!("{error:#}")))
}

/// Prints the counts, and why tests failed or were skipped.
pub fn report(round: Round, name: &str, tally: &Tally, time: Duration) {
    let seconds = time.as_secs_f32();
    println!("{round}{name:<15} {} ({seconds:.1} s)", tally.counts());
    for (what, names) in [("failed", &tally.failed), ("skipped", &tally.skipped)] {
        for name in names {
            println!("    {what}: {}", name.replace('\n', "\n        "));
        }
    }
}

/// The header is what the source gives, and stands alone in C and C++.
fn header_suite(cx: &Context) -> Result<Tally> {
    setup::packages(cx, setup::COMPILERS)?;
    let mut tally = Tally::default();
    tally.check("fresh", header::check(cx));
    let header = cx.root.join("include/privmem.h");
    for compiler in ["gcc", "clang"] {
        for (language, standard) in [("c", "c11"), ("c++", "c++11")] {
            let mut command = Command::new(compiler);
            command
                .args(WARNINGS)
                .args(["-fsyntax-only", &format!("-std={standard}"), "-x", language])
                .arg("-include")
                .arg(&header)
                .arg("/dev/null");
            let result = run::ask(&mut command).map(drop);
            tally.check(&format!("{compiler} {standard}"), result);
        }
    }
    match qemu::kernel_headers(cx) {
        Ok(headers) => tally.check("layouts", layouts(cx, &headers)),
        Err(why) => tally.skipped.push(format!("layouts: {why:#}")),
    }
    Ok(tally)
}

/// The kernel's structs that the library defines are as the kernel's header
/// has them.
fn layouts(cx: &Context, headers: &Path) -> Result<()> {
    let mut command = Command::new("gcc");
    command
        .args(WARNINGS)
        .args(["-fsyntax-only", "-std=c11", "-isystem"])
        .arg(headers)
        .arg(cx.root.join("tests/layouts.c"));
    run::ask(&mut command).map(drop)
}

fn cargo_test(cx: &Context, label: &str, selection: &[&str]) -> Result<Tally> {
    let mut command = library::cargo(cx);
    command.args(["test", "--no-fail-fast"]).args(selection);
    command.args(["--", SHOW_OUTPUT]);
    counted(cx, label, command)
}

/// Runs Rust's test programs and counts what they say.
pub fn counted(cx: &Context, label: &str, command: Command) -> Result<Tally> {
    let ended = run::attempt_within(&cx.cache, label, command, Some(HANGS))?;
    let log = fs::read_to_string(&ended.log)?;
    let mut tally = libtest(&log);
    tally.failed.extend(hung(label, &ended, &log));
    Ok(tally.ended(label, ended.success).with_log(&ended.log))
}

/// What is said of a program that had to be ended. (Libtest says which tests have
/// been running for a minute.)
fn hung(label: &str, ended: &run::Ended, log: &str) -> Option<String> {
    let last = log.lines().last().unwrap_or_default();
    let minutes = HANGS.as_secs() / 60;
    ended
        .hung
        .then(|| format!("{label}: it hung, and was ended after {minutes} minutes; last: {last}"))
}

/// Counts what Rust's test programs say, one after another. Libtest knows no
/// test that finds out by itself that it cannot run: ours print
/// `skipped: reason` and pass.
fn libtest(log: &str) -> Tally {
    let mut tally = Tally::default();
    let mut shown = "";
    for line in log.lines() {
        let heading = line.strip_prefix("---- ");
        if let Some(name) = heading.and_then(|line| line.strip_suffix(" stdout ----")) {
            shown = name;
        }
        if let Some(why) = line.strip_prefix("skipped: ") {
            tally.passed = tally.passed.saturating_sub(1);
            tally.skipped.push(format!("{shown}: {why}"));
        }
        let Some((name, verdict)) = line
            .strip_prefix("test ")
            .and_then(|line| line.rsplit_once(" ... "))
        else {
            continue;
        };
        match verdict
            .split_once(", ")
            .unwrap_or((verdict, "no reason given"))
        {
            ("ok", _) => tally.passed += 1,
            ("FAILED", _) => tally.failed.push(name.to_owned()),
            ("ignored", why) => tally.skipped.push(format!("{name}: {why}")),
            _ => {}
        }
    }
    tally
}

/// A way to build and run a C client.
pub struct Build {
    pub name: &'static str,
    pub compiler: &'static str,
    pub flags: &'static [&'static str],
    /// The words before the program.
    pub runner: &'static [&'static str],
}

const BUILDS: &[Build] = &[
    Build {
        name: "gcc",
        compiler: "gcc",
        flags: &[],
        runner: &[],
    },
    Build {
        name: "clang",
        compiler: "clang",
        flags: &[],
        runner: &[],
    },
    Build {
        name: "sanitizers",
        compiler: "gcc",
        flags: &["-fsanitize=address,undefined", "-fno-sanitize-recover"],
        runner: &[],
    },
    Build {
        name: "valgrind",
        compiler: "gcc",
        flags: &[],
        runner: &[
            "valgrind",
            "--quiet",
            "--error-exitcode=1",
            // Otherwise a thread that looks again and again keeps others from running.
            "--fair-sched=yes",
            "--leak-check=full",
            // Rust's pointers often point into a block, not at its start.
            "--errors-for-leak-kinds=definite,possible",
            "--suppressions=tests/c/valgrind.supp",
        ],
    },
];

/// Each C client in every build, against the library as it is installed.
fn c_clients(cx: &Context) -> Result<Tally> {
    let _guard = cx.cache.lock()?;
    setup::packages(cx, setup::COMPILERS)?;
    let flags = library::compiler_flags(&library::install(cx)?)?;
    let dir = tempfile::tempdir()?;
    let mut tally = Tally::default();
    for source in c_sources(cx)? {
        for build in BUILDS {
            let stem = source.file_stem().unwrap_or_default().to_string_lossy();
            let name = format!("{stem} ({})", build.name);
            let program = dir.path().join(&name);
            match c_client(&cx.root, build, &source, &flags, &program) {
                Ok(Some(why)) => tally.skipped.push(format!("{name}: {why}")),
                result => tally.check(&name, result.map(drop)),
            }
            let free = symbols::without(&program, "kvm_bindings");
            tally.check(&format!("{name} has no code of kvm-bindings"), free);
        }
    }
    Ok(tally.ended("tests/c", true))
}

/// The C clients, each a program of one file.
pub fn c_sources(cx: &Context) -> Result<Vec<PathBuf>> {
    let dir = cx.root.join("tests/c");
    let entries = fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "c"))
        .collect();
    files.sort();
    Ok(files)
}

/// Builds and runs one client; a reason if it had to skip.
fn c_client(
    root: &Path,
    build: &Build,
    source: &Path,
    flags: &[String],
    program: &Path,
) -> Result<Option<String>> {
    compile(build, source, flags, program)?;
    let mut words = build.runner.iter().map(Path::new).chain([program]);
    let mut command = Command::new(words.next().unwrap_or(program));
    run_client(command.args(words).current_dir(root))
}

/// Builds one client.
pub fn compile(build: &Build, source: &Path, flags: &[String], program: &Path) -> Result<()> {
    let mut command = Command::new(build.compiler);
    command
        .args(["-std=c11", "-g", "-pthread"])
        .args(WARNINGS)
        .args(build.flags)
        .arg("-o")
        .arg(program)
        .arg(source)
        .args(flags);
    run::ask(&mut command).map(drop)
}

/// Runs one client; a reason if it had to skip.
pub fn run_client(command: &mut Command) -> Result<Option<String>> {
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    match output.status.code() {
        Some(0) => Ok(None),
        Some(SKIPPED) => Ok(Some(said)),
        _ => anyhow::bail!("{}: {said}", output.status),
    }
}

fn qtests(cx: &Context, line: Line) -> Result<Tally> {
    let _guard = cx.cache.lock()?;
    let build = qemu::build(cx, line, &[qemu::SYSTEM, qemu::QTEST], &[])?;
    let mut command = Command::new(build.dir.join(qemu::QTEST));
    command
        .args(["--tap", "-k"])
        .current_dir(&build.dir)
        .env("QTEST_QEMU_BINARY", build.system());
    let mut tally = tap_program(cx, &format!("qtest {line}"), command)?;
    tally.add(functional(cx, &build)?);
    Ok(tally)
}

/// Our test in QEMU's own framework, with the private memory of this host if it
/// has any.
fn functional(cx: &Context, build: &qemu::Build) -> Result<Tally> {
    let tests = build.source.join("tests/functional");
    let modules = [build.source.join("python"), tests.clone()];
    let mut command = Command::new(setup::meson(cx)?.join("python3"));
    command
        .arg(tests.join("x86_64/test_private_memory.py"))
        .current_dir(&build.dir)
        .env("PYTHONPATH", std::env::join_paths(modules)?)
        .env("QEMU_TEST_QEMU_BINARY", build.system())
        .env("QEMU_BUILD_ROOT", &build.dir);
    tap_program(cx, &format!("functional test {}", build.line), command)
}

fn tap_program(cx: &Context, label: &str, command: Command) -> Result<Tally> {
    let ended = run::attempt_within(&cx.cache, label, command, Some(HANGS))?;
    let log = fs::read_to_string(&ended.log)?;
    let mut tally = tap(&log);
    tally.failed.extend(hung(label, &ended, &log));
    Ok(tally.ended(label, ended.success).with_log(&ended.log))
}

/// Counts the lines of the Test Anything Protocol, as GLib writes it.
fn tap(log: &str) -> Tally {
    let mut tally = Tally::default();
    for line in log.lines().map(str::trim_start) {
        if line.starts_with("Bail out!") {
            tally.failed.push(line.to_owned());
        } else if let Some(name) = line.strip_prefix("not ok ") {
            tally.failed.push(unnumbered(name).to_owned());
        } else if let Some(name) = line.strip_prefix("ok ") {
            match name.split_once("# SKIP") {
                Some((name, why)) => {
                    let name = unnumbered(name.trim());
                    tally.skipped.push(format!("{name}: {}", why.trim()));
                }
                None => tally.passed += 1,
            }
        }
    }
    tally
}

fn unnumbered(name: &str) -> &str {
    name.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ')
}

fn lab(cx: &Context, line: Line, tests: &[String], round: Round) -> Result<Tally> {
    let lab = Lab::prepare(cx, Some(line))?;
    let (deaths, tests): (Vec<_>, Vec<_>) =
        tests.iter().cloned().partition(|test| death::is_one(test));
    let mut tally = Tally::default();
    if !tests.is_empty() || deaths.is_empty() {
        tally = lab_tests(cx, &lab, &tests, round)?;
    }
    if !deaths.is_empty() || tests.is_empty() {
        tally.add(death::suite(cx, &lab, &deaths)?);
    }
    Ok(tally)
}

/// The tests of these names, or all, in one boot of the lab.
fn lab_tests(cx: &Context, lab: &Lab, tests: &[String], round: Round) -> Result<Tally> {
    const BOOT: &str = "test";
    let label = format!("lab {}", lab.line());
    let mut tally = Tally::default();
    let mut running = None;
    let progress = run::Progress::start(&label);
    let run = match tests {
        [] => "lab.run=all".to_owned(),
        some => format!("lab.run={}", some.join(",")),
    };
    let named = !tests.is_empty();
    let boot = lab.boot(cx, BOOT, &run, LAB_LIMIT, |event| match event {
        // Who names a test may want to see what it found.
        Event::Log(line) if named && round.is_only() && line.starts_with(REMARK) => {
            progress.print(&line);
        }
        Event::Log(line) => progress.line(&line),
        Event::Error(error) => tally.failed.push(error),
        Event::Begin(name) => {
            progress.part(Some(&name));
            running = Some(name);
        }
        Event::Test(test) => {
            progress.part(None);
            running = None;
            if named && !round.is_only() {
                progress.print(&format!("{round}{}: {}", test.name, test.result));
            }
            let why = format!("{}: {}", test.name, test.why);
            match test.result {
                Verdict::Ok => tally.passed += 1,
                Verdict::Failed => tally.failed.push(why),
                Verdict::Skipped => tally.skipped.push(why),
            }
        }
        Event::Demo(_) | Event::Bench(_) | Event::Soak(_) | Event::Exit(_) | Event::Done => {}
    });
    progress.finish();
    if let Err(error) = boot {
        // The test that ran meanwhile has failed.
        let test = running.map_or_else(String::new, |name| format!("{name}: "));
        tally.failed.push(format!("{test}{label}: {error:#}"));
    }
    Ok(tally.ended(&label, true).with_log(&lab.log(cx, BOOT)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtest_is_counted() {
        let log = "running 3 tests\ntest state::holes ... ok\ntest a ... FAILED\n\
                   test c ... ignored, needs KVM\ntest result: FAILED. 1 passed; 1 failed\n\
                   test src/lib.rs - f (line 3) - compile ... ok\n";
        let tally = libtest(log);
        assert_eq!(tally.passed, 2);
        assert_eq!(tally.failed, ["a"]);
        assert_eq!(tally.skipped, ["c: needs KVM"]);
    }

    #[test]
    fn a_test_that_says_so_is_skipped() {
        let log = "test held ... ok\ntest other ... ok\nsuccesses:\n\n\
                   ---- held stdout ----\nskipped: no cachestat(2)\n";
        let tally = libtest(log);
        assert_eq!(tally.passed, 1);
        assert_eq!(tally.skipped, ["held: no cachestat(2)"]);
    }

    #[test]
    fn tap_is_counted() {
        let log = "TAP version 13\n# random seed: x\n1..4\n# Start of x86_64 tests\n\
                   ok 1 /x86_64/private/convert\nok 2 /x86_64/private/hole # SKIP no memfd\n\
                   not ok 3 /x86_64/private/alias\nBail out! ERROR\n";
        let tally = tap(log);
        assert_eq!(tally.passed, 1);
        assert_eq!(tally.skipped, ["/x86_64/private/hole: no memfd"]);
        assert_eq!(tally.failed, ["/x86_64/private/alias", "Bail out! ERROR"]);
    }

    #[test]
    fn the_everyday_run_stays_short() {
        let chosen = |suite: &[Suite], full, line| {
            let suite = suite.to_vec();
            let chosen = Chosen { suite, full, line };
            let all = Suite::value_variants().iter().copied();
            all.filter(|suite| chosen.has(*suite)).collect::<Vec<_>>()
        };
        let everyday = chosen(&[], false, None);
        assert!(everyday.contains(&Suite::Lab10_0) && !everyday.contains(&Suite::Series10_0));
        assert_eq!(chosen(&[], true, None), Suite::value_variants());
        let of_line = chosen(&[], true, Some(Line::V10_2));
        assert!(of_line.contains(&Suite::Full10_2) && !of_line.contains(&Suite::Full10_0));
        assert_eq!(chosen(&[Suite::Full10_0], false, None), [Suite::Full10_0]);
    }

    #[test]
    fn breaking_off_is_a_failure() {
        assert_eq!(Tally::pass().ended("x", true), Tally::pass());
        assert_eq!(Tally::pass().ended("x", false).failed, ["x: it broke off"]);
        assert_eq!(
            Tally::default().ended("x", true).failed,
            ["x: it broke off"]
        );
    }

    #[test]
    fn a_missing_line_is_skipped_and_all_missing_is_a_failure() {
        let missing = || Err(anyhow::anyhow!("404").context(NoSource::new("gone")));
        let mut sources = Sources::default();
        sources.note(Suite::Rust, &Ok(Tally::default()));
        assert!(!sources.none_to_be_had());
        sources.note(Suite::Qtest10_2, &missing());
        assert!(sources.none_to_be_had());
        sources.note(Suite::Qtest10_0, &Ok(Tally::default()));
        assert!(!sources.none_to_be_had());
        assert_eq!(settled(missing()).skipped, ["gone: 404"]);
        assert_eq!(settled(Err(anyhow::anyhow!("404"))).failed, ["404"]);
    }
}
