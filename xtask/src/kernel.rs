//! The lab's kernel: the newest the distribution has, with our small fragment
//! on top of tinyconfig, and one driver of ours for the guest that it also is.
//!
//! Finished kernels stay in the cache by source version and fragment; sources
//! are unpacked only to build. A kernel that cannot be downloaded or built
//! gives way to the next older one, and that is said.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::Context;
use crate::apt::{self, numbered};
use crate::cache::{self, Stamp, replace};
use crate::run;
use crate::setup;

const FRAGMENT: &str = "tests/lab/kernel.config";
/// A folder of drivers/virt in the kernel's tree.
const DRIVER: &str = "private-guest";
const DRIVER_FILES: &[&str] = &["Kconfig", "Makefile", "private-guest.c"];
const PACKAGES: &str = "linux-source-";

/// Without these there is no lab; other options may be unknown to a version.
const NEEDED: &[&str] = &[
    "BLK_DEV_INITRD",
    "KVM_AMD",
    "KVM_SW_PROTECTED_VM",
    "PVH",
    "SERIAL_8250_CONSOLE",
];

pub struct Kernel {
    pub vmlinux: PathBuf,
    pub config: PathBuf,
}

impl Kernel {
    fn in_dir(dir: &Path) -> Self {
        Self {
            vmlinux: dir.join("vmlinux"),
            config: dir.join("config"),
        }
    }

    fn finished(&self) -> bool {
        self.vmlinux.exists() && self.config.exists()
    }

    /// Whether it was built with an option, named without CONFIG_.
    pub fn has(&self, option: &str) -> Result<bool> {
        Ok(enables(&fs::read_to_string(&self.config)?, option))
    }
}

/// The package that the cache's kernel comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Package {
    name: String,
    version: String,
}

pub fn command(cx: &Context) -> Result<ExitCode> {
    let _guard = cx.cache.lock()?;
    println!("{}", build(cx)?.vmlinux.display());
    Ok(ExitCode::SUCCESS)
}

/// Builds the kernel; whoever calls holds the cache's lock.
pub fn build(cx: &Context) -> Result<Kernel> {
    if let Some(tree) = std::env::var_os("KERNEL_SRC").filter(|tree| !tree.is_empty()) {
        return users_tree(cx, Path::new(&tree));
    }
    let record = cx.cache.path("kernel/package.json");
    let have: Option<Package> = fs::read(&record)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok());
    if let Some(package) = have.as_ref().filter(|_| !cx.refresh) {
        match build_package(cx, package) {
            Ok(kernel) => return Ok(kernel),
            Err(error) => eprintln!("  {} {}: {error:#}", package.name, package.version),
        }
    }
    let (package, kernel) = newest(cx)?;
    replace(&record, serde_json::to_vec(&package)?)?;
    Ok(kernel)
}

fn newest(cx: &Context) -> Result<(Package, Kernel)> {
    let apt = cx.apt()?;
    let names = numbered(&apt.names(PACKAGES)?, PACKAGES);
    for name in names.into_values().rev() {
        let built = apt.candidate(&name).and_then(|version| {
            let package = Package {
                name: name.clone(),
                version,
            };
            let kernel = build_package(cx, &package)?;
            Ok((package, kernel))
        });
        match built {
            Ok(built) => return Ok(built),
            Err(error) => eprintln!("  no kernel from {name}, trying an older one: {error:#}"),
        }
    }
    bail!("no package {PACKAGES}* of the distribution could be downloaded and built")
}

fn build_package(cx: &Context, package: &Package) -> Result<Kernel> {
    let mut stamp = Stamp::default();
    stamp.file(&cx.root.join(FRAGMENT))?;
    for name in DRIVER_FILES {
        stamp.file(&driver(cx).join(name))?;
    }
    let key = stamp.finish();
    let dir = cx
        .cache
        .path(format!("kernel/{}-{}", package.version, &key[..12]));
    let kernel = Kernel::in_dir(&dir);
    if kernel.finished() {
        return Ok(kernel);
    }
    setup::packages(cx, setup::BUILD)?;
    let deb = apt::package(cx, &package.name, &package.version)?;
    let unpacked = cx.cache.dir("kernel")?.join("unpacked");
    let source = unpack(cx, package, &deb, &unpacked)?;
    add_driver(&driver(cx), &source)?;
    let objects = unpacked.join("objects");
    make_all(cx, &package.version, &source, &objects)?;
    keep(&objects, &kernel)?;
    cache::remove_dir(&unpacked)?;
    Ok(kernel)
}

fn driver(cx: &Context) -> PathBuf {
    cx.root.join("tests/lab/linux").join(DRIVER)
}

/// Puts our driver into a tree, beside others for virtual machines.
fn add_driver(driver: &Path, source: &Path) -> Result<()> {
    let virt = source.join("drivers/virt");
    let dir = virt.join(DRIVER);
    fs::create_dir_all(&dir)?;
    for name in DRIVER_FILES {
        fs::copy(driver.join(name), dir.join(name))?;
    }
    append(&virt.join("Makefile"), &format!("obj-y += {DRIVER}/\n"))?;
    append(
        &virt.join("Kconfig"),
        &format!("source \"drivers/virt/{DRIVER}/Kconfig\"\n"),
    )
}

fn append(path: &Path, text: &str) -> Result<()> {
    let before =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(fs::write(path, before + text)?)
}

/// The user's own tree: built beside it, again and again, as make sees fit. It
/// is not written to, so it comes without our driver.
fn users_tree(cx: &Context, tree: &Path) -> Result<Kernel> {
    setup::packages(cx, setup::BUILD)?;
    let tree = tree
        .canonicalize()
        .with_context(|| format!("KERNEL_SRC={}", tree.display()))?;
    ensure!(
        tree.join("Kconfig").exists(),
        "KERNEL_SRC={} is no Linux tree",
        tree.display()
    );
    let key = Stamp::default()
        .text(tree.as_os_str().as_encoded_bytes())
        .finish();
    let dir = cx.cache.dir(format!("kernel/user-{}", &key[..8]))?;
    let objects = dir.join("objects");
    make_all(cx, "KERNEL_SRC", &tree, &objects)?;
    let kernel = Kernel::in_dir(&dir);
    keep(&objects, &kernel)?;
    Ok(kernel)
}

/// The package holds a tarball, which holds the tree.
fn unpack(cx: &Context, package: &Package, deb: &Path, to: &Path) -> Result<PathBuf> {
    cache::remove_dir(to)?;
    fs::create_dir_all(to)?;
    let contents = run::work(&format!("open {}", package.name), || apt::unpack(deb))?;
    let tarball = apt::find(contents.path(), &format!("{}.tar.xz", package.name))?;
    let mut tar = Command::new("tar");
    tar.arg("-xf").arg(tarball).arg("-C").arg(to);
    run::step(&cx.cache, &format!("unpack {}", package.name), tar)?;
    let tree = to.join(&package.name);
    ensure!(
        tree.join("Kconfig").exists(),
        "{} holds no tree",
        package.name
    );
    Ok(tree)
}

fn make_all(cx: &Context, version: &str, source: &Path, objects: &Path) -> Result<()> {
    fs::create_dir_all(objects)?;
    let make = |targets: &[&str]| {
        let mut command = Command::new("make");
        command
            .arg("-C")
            .arg(source)
            .arg(format!("O={}", objects.display()))
            .arg(format!("-j{}", run::jobs()))
            .args(targets)
            .env_remove("MAKEFLAGS");
        command
    };
    let label = |what: &str| format!("{what} the lab's kernel {version}");
    run::step(&cx.cache, &label("configure"), make(&["tinyconfig"]))?;
    let fragment = fs::read_to_string(cx.root.join(FRAGMENT))?;
    let config = objects.join(".config");
    let tiny = fs::read_to_string(&config)?;
    fs::write(&config, merged(&tiny, &fragment))?;
    run::step(&cx.cache, &label("complete"), make(&["olddefconfig"]))?;
    verify(&fragment, &fs::read_to_string(&config)?)?;
    run::step(&cx.cache, &label("build"), make(&["vmlinux"]))
}

/// The base without what the fragment sets, then the fragment.
fn merged(base: &str, fragment: &str) -> String {
    let set: Vec<&str> = settings(fragment).map(|(option, _)| option).collect();
    let named = |line: &str| {
        let line = line.trim_start_matches("# ");
        let option = line.split(['=', ' ']).next().unwrap_or_default().to_owned();
        option.strip_prefix("CONFIG_").map(str::to_owned)
    };
    let kept = base
        .lines()
        .filter(|line| named(line).is_none_or(|option| !set.contains(&option.as_str())));
    kept.chain(fragment.lines())
        .flat_map(|line| [line, "\n"])
        .collect()
}

/// Says what the kernel left out of the fragment; fails if it is needed.
fn verify(fragment: &str, config: &str) -> Result<()> {
    let lost: Vec<&str> = settings(fragment)
        .filter(|(option, value)| !sets(config, option, value))
        .map(|(option, _)| option)
        .collect();
    if !lost.is_empty() {
        eprintln!("  this kernel does not know or take: {}", lost.join(" "));
    }
    let fatal: Vec<&str> = lost
        .into_iter()
        .filter(|option| NEEDED.contains(option))
        .collect();
    ensure!(
        fatal.is_empty(),
        "the lab cannot do without {}",
        fatal.join(" ")
    );
    Ok(())
}

/// The (option, value) pairs of a configuration, without CONFIG_.
fn settings(config: &str) -> impl Iterator<Item = (&str, &str)> {
    config
        .lines()
        .filter_map(|line| line.trim().strip_prefix("CONFIG_")?.split_once('='))
}

fn sets(config: &str, option: &str, value: &str) -> bool {
    settings(config).any(|found| found == (option, value))
}

fn enables(config: &str, option: &str) -> bool {
    sets(config, option, "y")
}

fn keep(objects: &Path, kernel: &Kernel) -> Result<()> {
    cache::write_if_changed(&kernel.config, fs::read(objects.join(".config"))?)?;
    cache::write_if_changed(&kernel.vmlinux, fs::read(objects.join("vmlinux"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fragment_wins() {
        let base = "CONFIG_SMP=y\n# CONFIG_KVM is not set\nCONFIG_NR=8\n";
        let all = merged(base, "# why\nCONFIG_KVM=y\nCONFIG_NR=64\n");
        assert_eq!(all, "CONFIG_SMP=y\n# why\nCONFIG_KVM=y\nCONFIG_NR=64\n");
    }

    #[test]
    fn our_driver_comes_into_the_tree() -> Result<()> {
        let source = tempfile::tempdir()?;
        let virt = source.path().join("drivers/virt");
        fs::create_dir_all(&virt)?;
        fs::write(virt.join("Makefile"), "obj-y += coco/\n")?;
        fs::write(virt.join("Kconfig"), "endif\n")?;
        let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/lab/linux");
        add_driver(&ours.join(DRIVER), source.path())?;
        let read = |name: &str| fs::read_to_string(virt.join(name));
        assert_eq!(
            read("Makefile")?,
            "obj-y += coco/\nobj-y += private-guest/\n"
        );
        assert!(read("Kconfig")?.ends_with("virt/private-guest/Kconfig\"\n"));
        assert!(read("private-guest/Kconfig")?.contains("config PRIVATE_GUEST\n"));
        assert!(virt.join("private-guest/private-guest.c").exists());
        Ok(())
    }

    #[test]
    fn only_what_the_lab_needs_is_fatal() {
        let fragment = "CONFIG_PVH=y\nCONFIG_NEWFANGLED=y\n";
        assert!(verify(fragment, "CONFIG_PVH=y\n").is_ok());
        let error = verify(fragment, "# CONFIG_PVH is not set\n").unwrap_err();
        assert!(error.to_string().ends_with("without PVH"), "{error}");
    }
}
