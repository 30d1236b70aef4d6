//! `cargo xtask`: fetches, patches, builds, boots and tests.
//!
//! This file owns the command line and the context that all parts share. What
//! each part owns is said at its top; none of them keeps state outside the
//! cache, and the cache may be deleted at any time.

mod apt;
mod bench;
mod cache;
mod checkpatch;
mod console;
mod coverage;
mod death;
mod demo;
mod docs;
mod full;
mod fuzz;
mod header;
mod kernel;
#[path = "../../tests/lab/driver/src/kernel_log.rs"]
mod kernel_log;
mod lab;
mod library;
mod miri;
mod named;
mod packaging;
mod protocol;
mod qemu;
mod recipes;
mod repeat;
mod run;
mod setup;
mod soak;
mod suites;
mod symbols;
mod tree;

use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};

use crate::cache::Cache;
use crate::qemu::Line;

#[derive(Parser)]
#[command(name = "cargo xtask", about, version, max_term_width = 100)]
/// Private guest memory: fetch, patch, build, boot and test.
///
/// QEMU_SRC=<tree> and KERNEL_SRC=<tree> use your own sources in place of the
/// distribution's; they are never written to. PRIVMEM_CACHE=<folder> moves the
/// cache, which may be deleted at any time.
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Look for newer sources instead of keeping those of the cache
    #[arg(long, global = true)]
    refresh: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Boot the lab and show private memory on a real kernel
    Demo {
        /// Print one JSON object on stdout, the log on stderr
        #[arg(long, conflicts_with = "repeat")]
        json: bool,
        #[command(flatten)]
        repeat: RepeatArgs,
        #[command(flatten)]
        boot: BootArgs,
    },
    /// Run the test suites and print a summary line for each
    Test {
        /// Run only this suite (may be repeated)
        #[arg(long, value_enum)]
        suite: Vec<suites::Suite>,
        /// Run checkpatch, series and full, too: QEMU's own checks and tests
        #[arg(long)]
        full: bool,
        /// Run only the suites of this QEMU line, and those of none
        #[arg(long)]
        line: Option<Line>,
        /// Run only these of the lab's tests (may be repeated)
        #[arg(long, value_name = "NAME", value_delimiter = ',')]
        lab_test: Vec<String>,
        #[command(flatten)]
        repeat: RepeatArgs,
    },
    /// Measure what conversions cost, beside QEMU's own tracking and bare ioctls
    Bench {
        /// Fail if a figure misses its bar
        #[arg(long)]
        check: bool,
        /// Write all figures to this file, too
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Only one part: book-keeping in one process, a guest in the lab, or one with a device
        #[arg(long, value_enum)]
        only: Option<bench::Part>,
        #[command(flatten)]
        boot: BootArgs,
    },
    /// Boot the lab with a shell on this terminal, or run a command in it
    Lab {
        #[command(flatten)]
        boot: BootArgs,
        /// A shell command to run in the lab; its exit status becomes ours
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Boot the lab again and again with a hostile guest, until it is enough
    Soak(soak::Options),
    /// Fuzz the C interface, with a sanitizer
    Fuzz {
        /// How long
        #[arg(long, default_value_t = 600)]
        seconds: u64,
    },
    /// Fetch, patch and build QEMU; print where the binary is
    Qemu {
        /// The QEMU line: 10.2, 10.0 or all; otherwise the newest there is
        #[arg(long)]
        line: Option<qemu::Lines>,
        /// Passed to QEMU's configure (may be repeated)
        #[arg(long, allow_hyphen_values = true)]
        configure_arg: Vec<String>,
    },
    /// Fetch and build the lab's kernel; print where it is
    Kernel,
    /// Generate include/privmem.h from the source
    Header {
        /// Fail, with a diff, if the committed header is stale
        #[arg(long)]
        check: bool,
    },
}

#[derive(clap::Args)]
struct RepeatArgs {
    /// Run it all N times, also after a failure, and keep the output of the first failure
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
}

#[derive(clap::Args)]
struct BootArgs {
    /// The QEMU line; otherwise the newest there is
    #[arg(long)]
    line: Option<Line>,
    /// Seconds after which a lab that is still running counts as hung
    #[arg(long, default_value_t = 600)]
    timeout: u64,
}

impl BootArgs {
    fn limit(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

/// What every part needs: where the project and its cache are.
struct Context {
    root: PathBuf,
    cache: Cache,
    refresh: bool,
    started: Instant,
    apt: OnceCell<apt::Apt>,
}

impl Context {
    fn new(refresh: bool) -> Result<Self> {
        Ok(Self {
            root: project_root(),
            cache: Cache::open()?,
            refresh,
            started: Instant::now(),
            apt: OnceCell::new(),
        })
    }

    /// The private apt configuration; made, and its lists fetched, at first use.
    fn apt(&self) -> Result<&apt::Apt> {
        if self.apt.get().is_none() {
            let apt = apt::Apt::open(&self.cache)?;
            let _ = self.apt.set(apt);
        }
        self.apt.get().context("apt was just set")
    }
}

/// Cargo says where the package is; without cargo, the place it was built from.
fn project_root() -> PathBuf {
    let manifest_dir = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest_dir
        .parent()
        .map_or_else(|| manifest_dir.clone(), Path::to_path_buf)
}

fn main() -> ExitCode {
    match dispatch(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: Cli) -> Result<ExitCode> {
    let cx = Context::new(cli.refresh)?;
    match cli.command {
        Command::Demo { json, repeat, boot } => demo::run(&cx, &boot, json, repeat.repeat),
        Command::Test {
            suite,
            full,
            line,
            lab_test,
            repeat,
        } => {
            let chosen = suites::Chosen { suite, full, line };
            Ok(suites::run(&cx, &chosen, &lab_test, repeat.repeat))
        }
        Command::Bench {
            check,
            json,
            only,
            boot,
        } => bench::run(&cx, only, (boot.line, boot.limit()), check, json),
        Command::Soak(options) => soak::run(&cx, &options),
        Command::Fuzz { seconds } => fuzz::command(&cx, seconds),
        Command::Lab { boot, command } if command.is_empty() => lab::shell(&cx, boot.line),
        Command::Lab { boot, command } => {
            lab::command(&cx, boot.line, boot.limit(), &command.join(" "))
        }
        Command::Qemu {
            line,
            configure_arg,
        } => qemu::command(&cx, line, &configure_arg),
        Command::Kernel => kernel::command(&cx),
        Command::Header { check } => header::command(&cx, check),
    }
}
