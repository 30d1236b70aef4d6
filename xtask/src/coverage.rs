//! The suite `coverage`: how many lines of the library's own sources its Rust
//! tests and its C clients reach.
//!
//! rustc counts, LLVM's tools read what it counted, and both must fit each
//! other. Taken in this order: the toolchain's own tools (rustup's component
//! llvm-tools), then Debian's of the same LLVM, then Debian's newest. Where none
//! fits, the suite is skipped.
//!
//! All that is built with counters lies in the cache, apart from other builds.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::Context;
use crate::apt;
use crate::library;
use crate::run;
use crate::setup;
use crate::suites::{self, Build, Tally};

/// Percent of the lines that must be reached.
const BAR: f64 = 90.0;

/// What the unit tests of a file begin with; they come last in it.
const UNIT_TESTS: &str = "#[cfg(test)]";

/// What LLVM's tools say of counts that are newer, or older, than they are.
const DOES_NOT_FIT: &str = "format version";

const C_CLIENT: Build = Build {
    name: "coverage",
    compiler: "gcc",
    // Nothing in a C program asks for the part that writes the counts.
    flags: &["-Wl,--undefined=__llvm_profile_runtime"],
    runner: &[],
};

/// Whether each line of a file that has code was reached.
type Lines = BTreeMap<usize, bool>;

pub fn suite(cx: &Context) -> Result<Tally> {
    let _guard = cx.cache.lock()?;
    setup::packages(cx, setup::COMPILERS)?;
    let rustc = Rustc::ask()?;
    let tools = match rustc.tools(cx) {
        Ok(tools) => tools,
        Err(why) => return Ok(rustc.skip(&format!("{why:#}"))),
    };
    let counts = tempfile::tempdir_in(cx.cache.dir("coverage")?)?;
    let counted = Counted {
        cx,
        target: &rustc.host,
        counts: counts.path(),
    };
    let mut programs = counted.rust_tests()?;
    programs.extend(counted.c_clients()?);
    let records = match read(&tools, counts.path(), &programs, &cx.root.join("src")) {
        Err(why) if format!("{why:#}").contains(DOES_NOT_FIT) => {
            return Ok(rustc.skip(&format!("{} cannot", tools.display())));
        }
        records => records?,
    };
    let mut files = lcov(&records);
    for (path, lines) in &mut files {
        leave_out_unit_tests(lines, &fs::read_to_string(path)?);
    }
    let mut tally = Tally::default();
    tally.check("lines", report(&files));
    Ok(tally)
}

/// The compiler at hand, as far as LLVM's tools must fit it.
struct Rustc {
    host: String,
    sysroot: PathBuf,
    /// LLVM's major version.
    llvm: u32,
}

impl Rustc {
    fn ask() -> Result<Self> {
        let version = run::ask(library::rustc().arg("-vV"))?;
        let (host, llvm) = host_and_llvm(&version)
            .with_context(|| format!("rustc does not say which LLVM it has: {version}"))?;
        let sysroot = run::ask(library::rustc().args(["--print", "sysroot"]))?.into();
        Ok(Self {
            host,
            sysroot,
            llvm,
        })
    }

    /// The folder of LLVM's tools.
    fn tools(&self, cx: &Context) -> Result<PathBuf> {
        let own = self
            .sysroot
            .join("lib/rustlib")
            .join(&self.host)
            .join("bin");
        if own.join("llvm-cov").exists() {
            return Ok(own);
        }
        let names = run::ask(Command::new("apt-cache").args(["pkgnames", "llvm-"]))?;
        let package = package(&names, self.llvm).context("apt knows no package of LLVM")?;
        setup::packages(cx, &[&package])?;
        Ok(Path::new("/usr/lib").join(package).join("bin"))
    }

    fn skip(&self, why: &str) -> Tally {
        Tally::skip(format!(
            "no tools that read what rustc's LLVM {llvm} counts; run rustup component add \
             llvm-tools, or install llvm-{llvm}: {why}",
            llvm = self.llvm
        ))
    }
}

fn host_and_llvm(version: &str) -> Option<(String, u32)> {
    let field = |name| version.lines().find_map(|line| line.strip_prefix(name));
    let (major, _) = field("LLVM version: ")?.split_once('.')?;
    Some((field("host: ")?.to_owned(), major.parse().ok()?))
}

/// The package with the tools of this LLVM, otherwise of the newest: an LLVM
/// can often read what its neighbours wrote.
fn package(names: &str, llvm: u32) -> Option<String> {
    let names: Vec<String> = names.lines().map(str::to_owned).collect();
    let mut numbered = apt::numbered(&names, "llvm-");
    numbered
        .remove([llvm].as_slice())
        .or_else(|| numbered.pop_last().map(|(_, newest)| newest))
}

/// The library with counters in it.
struct Counted<'a> {
    cx: &'a Context,
    target: &'a str,
    /// Where programs leave their counts, each run in a file of its own.
    counts: &'a Path,
}

impl Counted<'_> {
    /// Runs the Rust tests; returns their programs.
    fn rust_tests(&self) -> Result<Vec<PathBuf>> {
        let tests = ["test", "--lib", "--tests"];
        let build = || {
            let mut command = self.cargo(&tests);
            command.arg("--no-run");
            command
        };
        let cache = &self.cx.cache;
        run::step(cache, "build the tests with coverage", build())?;
        let (label, limit) = ("cargo test with coverage", Some(suites::HANGS));
        run::step_within(cache, label, self.cargo(&tests), limit)?;
        // Nothing is left to build: cargo only says what the programs are.
        library::programs(build())
    }

    /// Runs the C clients; returns their programs.
    fn c_clients(&self) -> Result<Vec<PathBuf>> {
        let files = library::files(self.cargo(&["build", "--lib"]))?;
        let archive = library::named(files, "libprivmem.a")?;
        let dir = self.cx.cache.dir("coverage")?;
        let prefix = dir.join("prefix");
        let flags = library::compiler_flags(&library::lay_out(self.cx, &prefix, &archive)?)?;
        let mut programs = Vec::new();
        for source in suites::c_sources(self.cx)? {
            let program = dir.join(source.file_stem().context("a client has a name")?);
            suites::compile(&C_CLIENT, &source, &flags, &program)?;
            suites::run_client(self.counting(&mut Command::new(&program)))
                .with_context(|| source.display().to_string())?;
            programs.push(program);
        }
        Ok(programs)
    }

    fn cargo(&self, words: &[&str]) -> Command {
        let mut command = library::cargo(self.cx);
        // With a target named, flags are not for build scripts and macros.
        command
            .args(words)
            .args(["--package", "privmem", "--target", self.target])
            .env("CARGO_TARGET_DIR", self.cx.cache.path("coverage/target"))
            // Goes before all other ways to give flags.
            .env("CARGO_ENCODED_RUSTFLAGS", "-Cinstrument-coverage");
        self.counting(&mut command);
        command
    }

    fn counting<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command.env("LLVM_PROFILE_FILE", self.counts.join("%m-%p.profraw"))
    }
}

/// What `programs` have counted for the sources in a folder, as lcov's records.
fn read(tools: &Path, counts: &Path, programs: &[PathBuf], sources: &Path) -> Result<String> {
    let merged = counts.join("merged.profdata");
    let mut merge = Command::new(tools.join("llvm-profdata"));
    run::ask(merge.arg("merge").arg(counts).arg("-o").arg(&merged))?;
    // Program by program: of functions that C can call, llvm-cov would take the
    // first program's word for all others', unit tests' for clients'.
    let mut records = String::new();
    for program in programs {
        let mut export = Command::new(tools.join("llvm-cov"));
        export.args(["export", "--format=lcov", "--instr-profile"]);
        export.arg(&merged).arg(program);
        records += &run::ask(export.arg("--sources").arg(sources))?;
        records += "\n";
    }
    Ok(records)
}

/// Reads lcov's records: `SF` names a file, `DA` is a line and how often it ran.
/// A line is reached where one of the programs reached it.
fn lcov(records: &str) -> BTreeMap<PathBuf, Lines> {
    let mut files = BTreeMap::<PathBuf, Lines>::new();
    let mut file = PathBuf::new();
    for record in records.lines() {
        if let Some(path) = record.strip_prefix("SF:") {
            file = path.into();
        }
        let data = record
            .strip_prefix("DA:")
            .and_then(|data| data.split_once(','));
        let Some((line, times)) = data else { continue };
        if let Ok(line) = line.parse() {
            let lines = files.entry(file.clone()).or_default();
            *lines.entry(line).or_default() |= times != "0";
        }
    }
    files
}

/// Tests reach themselves, which says nothing about the library.
fn leave_out_unit_tests(lines: &mut Lines, source: &str) {
    let library = source.lines().take_while(|line| *line != UNIT_TESTS);
    lines.split_off(&(library.count() + 1));
}

/// Prints what was reached, file by file; fails below the bar.
fn report(files: &BTreeMap<PathBuf, Lines>) -> Result<()> {
    for (path, lines) in files {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let missed = match missed(lines).as_str() {
            "" => String::new(),
            missed => format!(", not {missed}"),
        };
        println!("    {name:<14} {:5.1} %{missed}", percent(lines.values()));
    }
    let reached = percent(files.values().flat_map(Lines::values));
    println!("    {:<14} {reached:5.1} %", "all lines");
    ensure!(
        reached >= BAR,
        "{reached:.1} % are reached; {BAR} % must be"
    );
    Ok(())
}

fn percent<'a>(lines: impl Iterator<Item = &'a bool>) -> f64 {
    let (mut all, mut reached) = (0_u32, 0_u32);
    for line in lines {
        all += 1;
        reached += u32::from(*line);
    }
    100.0 * f64::from(reached) / f64::from(all)
}

/// The lines that were not reached, such as `3-7 12`. Lines without code do not
/// end a stretch.
fn missed(lines: &Lines) -> String {
    let lines: Vec<_> = lines.iter().collect();
    lines
        .chunk_by(|a, b| a.1 == b.1)
        .filter(|stretch| !*stretch[0].1)
        .map(|stretch| match stretch {
            [(only, _)] => only.to_string(),
            [(first, _), .., (last, _)] => format!("{first}-{last}"),
            [] => String::new(),
        })
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDS: &str = "SF:/src/a.rs\nFN:1,f\nDA:1,2\nDA:2,0\nDA:4,0\nDA:5,1\nDA:9,0\n\
                           LF:5\nend_of_record\nSF:/src/b.rs\nDA:1,7\nend_of_record\n\
                           SF:/src/a.rs\nDA:1,0\nDA:9,3\nend_of_record\n";

    #[test]
    fn lines_are_read_and_counted() {
        let files = lcov(RECORDS);
        assert_eq!(files.len(), 2);
        let a = &files[Path::new("/src/a.rs")];
        assert_eq!(missed(a), "2-4");
        assert_eq!(percent(a.values()), 60.0);
        assert_eq!(missed(&files[Path::new("/src/b.rs")]), "");
    }

    #[test]
    fn below_the_bar_or_without_a_line_is_a_failure() {
        let lines = |reached| (1..=10).map(|line| (line, line <= reached)).collect();
        let file = |reached| BTreeMap::from([(PathBuf::from("a.rs"), lines(reached))]);
        assert!(report(&file(9)).is_ok());
        assert!(report(&file(8)).is_err());
        assert!(report(&BTreeMap::new()).is_err());
    }

    #[test]
    fn unit_tests_do_not_count() {
        let source = "fn f() {}\n\n#[cfg(test)]\nmod tests {\n}\n";
        let mut lines = Lines::from([(1, true), (4, true), (5, true)]);
        leave_out_unit_tests(&mut lines, source);
        assert_eq!(lines, Lines::from([(1, true)]));
        leave_out_unit_tests(&mut lines, "fn f() {}\n");
        assert_eq!(lines, Lines::from([(1, true)]));
    }

    #[test]
    fn the_tools_are_those_of_the_compilers_llvm_or_the_newest() {
        let names = "llvm-9\nllvm-19\nllvm-20-dev\nllvm-22\nllvm-runtime\n";
        assert_eq!(package(names, 19).as_deref(), Some("llvm-19"));
        assert_eq!(package(names, 25).as_deref(), Some("llvm-22"));
        assert_eq!(package("llvm-runtime\n", 19), None);
    }

    #[test]
    fn rustc_says_which_llvm_it_has() {
        let version = "rustc 1.95.0\nhost: x86_64-unknown-linux-gnu\nLLVM version: 22.1.2\n";
        let expected = ("x86_64-unknown-linux-gnu".to_owned(), 22);
        assert_eq!(host_and_llvm(version), Some(expected));
        assert_eq!(host_and_llvm("rustc 1.95.0\n"), None);
    }
}
