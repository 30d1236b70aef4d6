//! The suite `miri`: tests of the pure modules in Rust's interpreter, which
//! finds undefined behaviour and data races that a test's result does not show.
//! The rest of the library calls the kernel, which Miri does not have; that
//! every interleaving of the range lock is right is loom's part.
//!
//! Miri comes with nightly toolchains only; without it the suite is skipped.

use std::process::Command;

use anyhow::Result;

use crate::Context;
use crate::library;
use crate::run;
use crate::suites::{self, Tally};

/// The modules that ask nothing of the kernel: of the library's unit tests and
/// of tests/pure.rs, only those of modules with these names run.
const PURE: &[&str] = &["range::", "range_lock::", "state::"];

/// No pointer may be made from a number, and none may be aligned by chance.
const FLAGS: &str = "-Zmiri-strict-provenance -Zmiri-symbolic-alignment-check";

const NONE: &str = "no toolchain here has Miri; run rustup toolchain install nightly, then \
                    rustup component add --toolchain nightly miri rust-src";

pub fn suite(cx: &Context) -> Result<Tally> {
    // The toolchain at hand may be a nightly one itself.
    for cargo in [library::cargo, nightly] {
        if run::ask(cargo(cx).args(["miri", "--version"])).is_ok() {
            return suites::counted(cx, "cargo miri test", tests(cx, cargo(cx)));
        }
    }
    Ok(Tally::skip(NONE.to_owned()))
}

/// `rustup run` takes a toolchain that is there, and installs none.
fn nightly(cx: &Context) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", "cargo"]);
    command.current_dir(&cx.root);
    command
}

fn tests(cx: &Context, mut cargo: Command) -> Command {
    cargo
        .args(["miri", "test", "--package", "privmem", "--no-fail-fast"])
        .args(["--lib", "--test", "pure", "--", suites::SHOW_OUTPUT])
        .args(PURE)
        .env("CARGO_TARGET_DIR", cx.cache.path("miri"))
        .env("MIRIFLAGS", FLAGS);
    cargo
}
