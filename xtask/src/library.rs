//! Building our own crates for use outside cargo: libprivmem.a with its header
//! and pkg-config file where QEMU's build finds them, the lab's driver, and what
//! else of ours runs there.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::Context;
use crate::cache::write_if_changed;
use crate::run;

/// The library as a user of it finds it installed.
pub struct Installed {
    pub archive: PathBuf,
    pub header: PathBuf,
    pub pkg_config: PathBuf,
}

impl Installed {
    pub fn description(&self) -> PathBuf {
        self.pkg_config.join("privmem.pc")
    }
}

/// Builds the library and lays it out in the cache.
pub fn install(cx: &Context) -> Result<Installed> {
    let built = build(cx)?;
    lay_out(cx, &cx.cache.path("prefix"), &built)
}

/// Lays out a library that is built as an installation would; files that stay
/// the same keep their time, so that nothing is rebuilt for nothing.
pub fn lay_out(cx: &Context, prefix: &Path, built: &Path) -> Result<Installed> {
    let installed = Installed {
        archive: prefix.join("lib/libprivmem.a"),
        header: prefix.join("include/privmem.h"),
        pkg_config: prefix.join("lib/pkgconfig"),
    };
    write_if_changed(&installed.archive, std::fs::read(built)?)?;
    let header = cx.root.join("include/privmem.h");
    let header = std::fs::read(&header)
        .with_context(|| format!("{} is missing: cargo xtask header", header.display()))?;
    write_if_changed(&installed.header, header)?;
    let template = std::fs::read_to_string(cx.root.join("privmem.pc.in"))?;
    let description = description(&template, prefix, &version(cx)?, &native_libs()?);
    write_if_changed(&installed.description(), description)?;
    Ok(installed)
}

/// What a C compiler is told to build against the library, as pkg-config says.
pub fn compiler_flags(privmem: &Installed) -> Result<Vec<String>> {
    let flags = run::ask(
        Command::new("pkg-config")
            .args(["--cflags", "--libs", "privmem"])
            .env("PKG_CONFIG_PATH", &privmem.pkg_config),
    )?;
    Ok(flags.split_whitespace().map(str::to_owned).collect())
}

/// Builds libprivmem.a as it is released.
pub fn build(cx: &Context) -> Result<PathBuf> {
    let files = artifacts(cx, "libprivmem.a", &["-p", "privmem", "--lib"])?;
    named(files, "libprivmem.a")
}

/// Builds our half of the bench of book-keeping.
pub fn bench(cx: &Context) -> Result<PathBuf> {
    let files = artifacts(cx, "the bench", &["-p", "bench-tracking", "--lib"])?;
    named(files, "libbench_tracking.a")
}

/// Builds the program that is the lab's first process.
pub fn driver(cx: &Context) -> Result<PathBuf> {
    let files = artifacts(cx, "the lab's driver", &["-p", "lab-driver", "--bins"])?;
    named(files, "lab-driver")
}

/// Builds the models of confidential hardware that go beneath a QEMU in the lab.
pub fn firmware_models(cx: &Context) -> Result<PathBuf> {
    let what = "the lab's models of firmware";
    let files = artifacts(cx, what, &["-p", "lab-firmware", "--lib"])?;
    named(files, "liblab_firmware.so")
}

/// Builds the library's conformance suite, for the lab's kernel.
pub fn conformance(cx: &Context) -> Result<PathBuf> {
    let mut command = cargo(cx);
    command.args(["build", "--release", "-p", "privmem"]);
    command.args(["--test", "conformance"]);
    let made = run::work("build the conformance suite", || programs(command))?;
    let program = made.into_iter().next();
    program.context("cargo made no conformance suite")
}

/// A cargo command in the project.
pub fn cargo(cx: &Context) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(&cx.root);
    command
}

/// The compiler that cargo uses.
pub fn rustc() -> Command {
    Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
}

/// Builds in release and returns the files that cargo says it made.
fn artifacts(cx: &Context, what: &str, selection: &[&str]) -> Result<Vec<PathBuf>> {
    let mut command = cargo(cx);
    command.args(["build", "--release"]).args(selection);
    run::work(&format!("build {what}"), || files(command))
}

/// Runs a cargo command that builds; returns the files that it says it made.
pub fn files(command: Command) -> Result<Vec<PathBuf>> {
    Ok(messages(command)?.iter().flat_map(made).collect())
}

/// As [`files`], but only what can be run: programs and tests.
pub fn programs(command: Command) -> Result<Vec<PathBuf>> {
    Ok(messages(command)?.iter().filter_map(executable).collect())
}

fn messages(mut command: Command) -> Result<Vec<Value>> {
    command.arg("--message-format=json-render-diagnostics");
    let messages = run::ask(&mut command)?;
    let parsed = messages.lines().map(serde_json::from_str);
    Ok(parsed.map(Result::unwrap_or_default).collect())
}

fn made(message: &Value) -> Vec<PathBuf> {
    let files = message["filenames"].as_array();
    files
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(PathBuf::from)
        .chain(executable(message))
        .collect()
}

fn executable(message: &Value) -> Option<PathBuf> {
    message["executable"].as_str().map(PathBuf::from)
}

pub fn named(files: Vec<PathBuf>, name: &str) -> Result<PathBuf> {
    files
        .into_iter()
        .find(|file| file.file_name().is_some_and(|found| found == name))
        .with_context(|| format!("cargo made no {name}"))
}

/// What Rust's standard library needs of the system's, as a C compiler is told.
fn native_libs() -> Result<String> {
    let unused = tempfile::tempdir()?;
    let mut rustc = rustc();
    rustc.args([
        "--crate-type=staticlib",
        "--print=native-static-libs=/dev/stdout",
    ]);
    let libs = run::ask(rustc.arg("--out-dir").arg(unused.path()).arg("-"))?;
    // Every compiler adds -lc, last of all.
    let libs = libs.split_whitespace().filter(|lib| *lib != "-lc");
    Ok(libs.collect::<Vec<_>>().join(" "))
}

pub fn version(cx: &Context) -> Result<String> {
    let id = run::ask(cargo(cx).args(["pkgid", "-p", "privmem"]))?;
    let version = id.rsplit(['#', '@']).next().unwrap_or_default();
    Ok(version.to_owned())
}

/// The pkg-config file, filled in as meson.build does it for an installation.
fn description(template: &str, prefix: &Path, version: &str, libs: &str) -> String {
    let prefix = prefix.display().to_string();
    template
        .replace("@libdir@", "${prefix}/lib")
        .replace("@includedir@", "${prefix}/include")
        .replace("@prefix@", &prefix)
        .replace("@version@", version)
        .replace("@libs@", libs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_pkg_config_file_is_filled_in() {
        let template = "prefix=@prefix@\nlibdir=@libdir@\nVersion: @version@\nLibs: @libs@\n";
        assert_eq!(
            description(template, Path::new("/p"), "0.1.0", "-lm -ldl"),
            "prefix=/p\nlibdir=${prefix}/lib\nVersion: 0.1.0\nLibs: -lm -ldl\n"
        );
    }

    #[test]
    fn cargo_messages_name_what_was_made() -> Result<()> {
        let library = json!({"filenames": ["/t/libprivmem.a"], "executable": null});
        let script = json!({"filenames": ["/t/build-script-build"], "executable": null});
        let test = json!({"filenames": ["/t/vm-1"], "executable": "/t/vm-1"});
        let noise = json!({"reason": "build-finished", "success": true});
        let messages = [library, script, test, noise];
        let files: Vec<_> = messages.iter().flat_map(made).collect();
        assert_eq!(named(files, "libprivmem.a")?, Path::new("/t/libprivmem.a"));
        let programs: Vec<_> = messages.iter().filter_map(executable).collect();
        assert_eq!(programs, [Path::new("/t/vm-1")]);
        Ok(())
    }
}
