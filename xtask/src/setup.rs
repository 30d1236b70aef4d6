//! What the machine must have: distribution packages, and a Python environment
//! of our own with a meson that is new enough.
//!
//! On a machine that has all of it, apt is not called at all.

use std::collections::HashSet;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::Context;
use crate::run;

/// To build QEMU, the kernel, the guest and the lab.
pub const BUILD: &[&str] = &[
    "bc",
    "bison",
    "build-essential",
    "cpio",
    "debian-archive-keyring",
    "dpkg-dev",
    "flex",
    "libelf-dev",
    "libglib2.0-dev",
    "libnuma-dev",
    "libpixman-1-dev",
    "libssl-dev",
    "ninja-build",
    "pkg-config",
    "python3-venv",
    "xz-utils",
];

/// To check the header and the C clients with both compilers and valgrind.
pub const COMPILERS: &[&str] = &["build-essential", "clang", "pkg-config", "valgrind"];

/// To install the library as a packager does, its HTML manual included.
pub const PACKAGING: &[&str] = &[
    "build-essential",
    "doxygen",
    "ninja-build",
    "pkg-config",
    "python3-venv",
];

/// To build QEMU, and to run its functional tests.
const PYTHON: &[&str] = &["meson>=1.5", "pycotap"];

/// Installs what is missing, as root or through sudo.
pub fn packages(cx: &Context, wanted: &[&str]) -> Result<()> {
    let missing = missing(wanted)?;
    if missing.is_empty() {
        return Ok(());
    }
    let Some(become_root) = way_to_root() else {
        bail!(
            "packages are missing and neither root nor sudo is at hand; run:\n  sudo apt-get install -y {}",
            missing.join(" ")
        );
    };
    eprintln!("missing packages: {}", missing.join(" "));
    let apt_get = |arguments: &[&str]| {
        let mut words = become_root
            .iter()
            .chain(&["env", "DEBIAN_FRONTEND=noninteractive"]);
        let mut command = Command::new(words.next().unwrap_or(&"env"));
        command.args(words).arg("apt-get").args(arguments);
        command
    };
    run::step(&cx.cache, "update package lists", apt_get(&["update"]))?;
    let mut install = apt_get(&["install", "-y", "--no-install-recommends"]);
    install.args(&missing);
    run::step(&cx.cache, "install packages", install)
}

fn missing<'a>(wanted: &[&'a str]) -> Result<Vec<&'a str>> {
    // It exits with 1 where a package is unknown, which is no error to us.
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status}\n"])
        .args(wanted)
        .output();
    let Ok(output) = output else {
        bail!("dpkg-query is missing: this needs Debian or one of its relatives");
    };
    let installed = installed(&String::from_utf8_lossy(&output.stdout));
    Ok(wanted
        .iter()
        .copied()
        .filter(|name| !installed.contains(*name))
        .collect())
}

fn installed(listing: &str) -> HashSet<String> {
    listing
        .lines()
        .filter_map(|line| line.strip_suffix(" installed"))
        .map(str::to_owned)
        .collect()
}

/// The words that go before a command that needs root, if there are any.
fn way_to_root() -> Option<&'static [&'static str]> {
    let id = run::ask(Command::new("id").arg("-u")).ok()?;
    if id == "0" {
        return Some(&[]);
    }
    if run::ask(Command::new("sudo").args(["-n", "true"])).is_ok() {
        return Some(&["sudo", "-n"]);
    }
    let can_be_asked =
        std::io::stdin().is_terminal() && run::ask(Command::new("sudo").arg("--version")).is_ok();
    can_be_asked.then_some(&["sudo"])
}

/// The folder with a new enough meson, and a python3 that runs QEMU's functional
/// tests; to be put first in PATH.
pub fn meson(cx: &Context) -> Result<PathBuf> {
    let venv = cx.cache.path("venv");
    let bin = venv.join("bin");
    let meson = run::ask(Command::new(bin.join("meson")).arg("--version"));
    let pycotap = run::ask(Command::new(bin.join("python3")).args(["-c", "import pycotap"]));
    if meson.is_ok() && pycotap.is_ok() {
        return Ok(bin);
    }
    let mut create = Command::new("python3");
    create.args(["-m", "venv", "--clear"]).arg(&venv);
    run::step(&cx.cache, "make a Python environment", create)?;
    let mut install = Command::new(bin.join("python3"));
    install
        .args(["-m", "pip", "install", "--disable-pip-version-check"])
        .args(PYTHON);
    run::step(&cx.cache, "install meson and pycotap", install)?;
    Ok(bin)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_installed_packages_count() {
        let found = installed("bc installed\nflex config-files\nbison not-installed\n");
        assert_eq!(found, HashSet::from(["bc".to_owned()]));
    }
}
