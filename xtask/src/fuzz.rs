//! The fuzzer of the C interface: `cargo xtask fuzz`, and a minute of it in the
//! suite `fuzz`. What it has learnt is kept in the cache.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result};

use crate::Context;
use crate::library;
use crate::qemu::in_front;
use crate::run;
use crate::setup;
use crate::suites::Tally;

const TARGET: &str = "c_api";
const SUITE_SECONDS: u64 = 60;

/// More than the target ever needs: what grows is a leak.
const MEMORY: &str = "-rss_limit_mb=2048";

pub fn command(cx: &Context, seconds: u64) -> Result<ExitCode> {
    let _guard = cx.cache.lock()?;
    let fuzzer = Fuzzer::prepare(cx)?;
    println!("{}", fuzzer.run(cx, seconds)?);
    fuzzer.minimize(cx)?;
    Ok(ExitCode::SUCCESS)
}

pub fn suite(cx: &Context) -> Result<Tally> {
    let _guard = cx.cache.lock()?;
    let mut tally = Tally::default();
    match Fuzzer::prepare(cx) {
        Ok(fuzzer) => tally.check(TARGET, fuzzer.run(cx, SUITE_SECONDS).map(drop)),
        Err(error) if error.is::<NoTool>() => return Ok(Tally::skip(format!("{error:#}"))),
        Err(error) => return Err(error),
    }
    Ok(tally)
}

#[derive(Debug, thiserror::Error)]
#[error("cargo-fuzz is not here and could not be installed; cargo install cargo-fuzz shows why")]
struct NoTool;

struct Fuzzer {
    bin: PathBuf,
    build: PathBuf,
    corpus: PathBuf,
}

impl Fuzzer {
    /// Installs cargo-fuzz, and builds the target.
    fn prepare(cx: &Context) -> Result<Self> {
        setup::packages(cx, setup::COMPILERS)?;
        let root = cx.cache.dir("cargo-fuzz")?;
        let bin = root.join("bin");
        if !bin.join("cargo-fuzz").exists() {
            let mut install = library::cargo(cx);
            install.args(["install", "--locked", "cargo-fuzz", "--root"]);
            run::step(&cx.cache, "install cargo-fuzz", {
                install.arg(&root);
                install
            })
            .map_err(|_| NoTool)?;
        }
        let fuzzer = Self {
            bin,
            build: cx.cache.dir("fuzz")?,
            corpus: cx.cache.dir("fuzz-corpus")?,
        };
        let build = fuzzer.cargo_fuzz(cx, "build")?;
        run::step(&cx.cache, "build the fuzzer", build)?;
        Ok(fuzzer)
    }

    /// Any toolchain does: what the sanitizer takes is in the stable ones, too.
    fn cargo_fuzz(&self, cx: &Context, verb: &str) -> Result<Command> {
        let mut command = library::cargo(cx);
        command.args(["fuzz", verb, TARGET, "--target-dir"]);
        command.arg(&self.build);
        command.env("PATH", in_front(&self.bin, "PATH")?);
        command.env("RUSTC_BOOTSTRAP", "1");
        Ok(command)
    }

    /// Fuzzes for a while; says how often. An input that fails is in fuzz/artifacts.
    fn run(&self, cx: &Context, seconds: u64) -> Result<String> {
        let mut command = self.cargo_fuzz(cx, "run")?;
        command.arg(&self.corpus).arg("--").arg(MEMORY);
        // No call may hang, either.
        command.args([
            "-timeout=10".to_owned(),
            format!("-max_total_time={seconds}"),
        ]);
        let label = format!("fuzz the C interface for {seconds} s");
        let ended = run::attempt(&cx.cache, &label, command)?;
        let log = std::fs::read_to_string(&ended.log)?;
        anyhow::ensure!(
            ended.success,
            "the fuzzer found something; its log is {}",
            ended.log.display()
        );
        let done = log.lines().rfind(|line| line.starts_with("Done "));
        Ok(done.context("the fuzzer broke off")?.to_owned())
    }

    /// Keeps of all inputs a few that reach as much.
    fn minimize(&self, cx: &Context) -> Result<()> {
        let mut command = self.cargo_fuzz(cx, "cmin")?;
        command.arg(&self.corpus);
        run::step(&cx.cache, "minimize what it has learnt", command)
    }
}
