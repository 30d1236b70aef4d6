//! The library's conformance suite on the kernel under test: the program that `cargo test` runs
//! on the host, one process for each test.

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

const PROGRAM: &str = "/tests/conformance";

/// The agents that ask the running kernel; the model of a kernel is the same everywhere.
const AGENTS: &[&str] = &["emulated::", "kvm::"];

/// The names of all tests, such as `kvm::changed_side_reads_zero`.
pub fn all() -> Result<Vec<String>> {
    let (success, said) = ask(&["--list"], AGENTS)?;
    ensure!(success, "{PROGRAM} --list failed: {said}");
    let names = said.lines().filter_map(|line| line.strip_suffix(": test"));
    let names: Vec<_> = names.map(str::to_owned).collect();
    for agent in AGENTS {
        let tested = names.iter().any(|name| name.starts_with(agent));
        ensure!(tested, "{PROGRAM} has no tests of {agent}");
    }
    Ok(names)
}

/// Runs one test; the reason if it could not test anything here.
pub fn run(name: &str) -> Result<Option<String>> {
    let (success, said) = ask(&["--show-output", "--exact"], &[name])?;
    if !success {
        bail!("{said}");
    }
    // Without it the name has matched nothing.
    ensure!(said.contains("1 passed"), "it did not run: {said}");
    let why = said.lines().find_map(|line| line.strip_prefix("skipped: "));
    Ok(why.map(str::to_owned))
}

/// Whether the program succeeded, and all that it said.
fn ask(options: &[&str], filters: &[&str]) -> Result<(bool, String)> {
    let mut command = Command::new(PROGRAM);
    let output = command.args(options).args(filters).output();
    let output = output.context(PROGRAM)?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    Ok((output.status.success(), said))
}
