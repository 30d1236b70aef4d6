//! A private apt: sources and packages of Debian suites that the machine itself
//! need not follow, without touching the machine's own lists.
//!
//! The mirror is the machine's own, and so are proxy and authentication; only
//! lists, cache, sources, preferences and status are ours. apt and dpkg-source
//! check what they fetch against the archive's signed checksums.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use walkdir::{DirEntry, WalkDir};

use crate::Context;
use crate::cache::{Cache, write_if_changed};
use crate::run;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Suites with binary packages, then those with sources only.
const BINARY_SUITES: &[&str] = &["trixie", "trixie-backports"];
const SOURCE_SUITES: &[&str] = &["trixie", "trixie-backports", "sid"];

const SOURCE: &[&str] = &["source", "--download-only", "--only-source"];

pub struct Apt {
    config: PathBuf,
    downloads: PathBuf,
    cache: Cache,
}

impl Apt {
    /// Writes the configuration and fetches the lists, once per run.
    pub fn open(cache: &Cache) -> Result<Self> {
        let dir = cache.dir("apt")?;
        for sub in ["lists/partial", "cache/archives/partial"] {
            cache.dir(Path::new("apt").join(sub))?;
        }
        write_if_changed(&dir.join("sources.list"), sources(&mirror()?))?;
        write_if_changed(&dir.join("status"), "")?;
        let config = dir.join("apt.conf");
        write_if_changed(&config, settings(&dir))?;
        let apt = Self {
            config,
            downloads: cache.dir("downloads")?,
            cache: cache.clone(),
        };
        apt.update();
        Ok(apt)
    }

    /// A suite that cannot be had must not keep the others from use: what is
    /// then missing shows when it is asked for.
    fn update(&self) {
        let mut command = self.tool("apt-get");
        command.arg("update");
        if let Err(error) = run::step(&self.cache, "fetch Debian's package lists", command) {
            eprintln!("  going on with the lists that there are: {error:#}");
        }
    }

    fn tool(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(&self.config).env("LC_ALL", "C");
        command
    }

    /// The versions of a source package, newest first.
    pub fn source_versions(&self, package: &str) -> Result<Vec<String>> {
        let records = run::ask(
            self.tool("apt-cache")
                .args(["showsrc", "--only-source", package]),
        )?;
        let mut versions = fields(&records, "Version");
        newest_first(&mut versions)?;
        Ok(versions)
    }

    /// The version of a binary package that apt would install.
    pub fn candidate(&self, package: &str) -> Result<String> {
        let record = run::ask(
            self.tool("apt-cache")
                .args(["show", "--no-all-versions", package]),
        )?;
        fields(&record, "Version")
            .into_iter()
            .next()
            .with_context(|| format!("apt lists no package {package}"))
    }

    /// The names of binary packages that start with `prefix`.
    pub fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = run::ask(self.tool("apt-cache").args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// Downloads a source package; returns its .dsc.
    pub fn source(&self, package: &str, version: &str) -> Result<PathBuf> {
        self.download(SOURCE, package, version)?;
        self.dsc(package, version)
    }

    /// Downloads a source package that nobody will miss: an error is one line.
    pub fn source_if_any(&self, package: &str, version: &str) -> Result<PathBuf> {
        let mut apt_get = self.getter(SOURCE, package, version);
        run::work(&format!("download {package} {version}"), || {
            run::ask(&mut apt_get).map_err(|error| {
                let said = error.to_string();
                let failed = said.lines().find(|line| line.starts_with("E: "));
                anyhow!(failed.unwrap_or(&said).to_owned())
            })
        })?;
        self.dsc(package, version)
    }

    fn dsc(&self, package: &str, version: &str) -> Result<PathBuf> {
        let dsc = format!("{package}_{}.dsc", without_epoch(version));
        existing(self.downloads.join(dsc))
    }

    fn download(&self, command: &[&str], package: &str, version: &str) -> Result<()> {
        let what = format!("download {package} {version}");
        run::step(&self.cache, &what, self.getter(command, package, version))
    }

    fn getter(&self, command: &[&str], package: &str, version: &str) -> Command {
        let mut apt_get = self.tool("apt-get");
        apt_get
            .args(command)
            .arg(format!("{package}={version}"))
            .current_dir(&self.downloads);
        apt_get
    }

    /// Downloads a binary package; returns its .deb.
    fn package(&self, package: &str, version: &str) -> Result<PathBuf> {
        self.download(&["download"], package, version)?;
        downloaded(&self.downloads, package, version)
            .with_context(|| format!("apt-get left no {package} {version} behind"))
    }
}

/// A .deb of the given version: the cache's, or downloaded now.
pub fn package(cx: &Context, package: &str, version: &str) -> Result<PathBuf> {
    match downloaded(&cx.cache.dir("downloads")?, package, version) {
        Some(deb) => Ok(deb),
        None => cx.apt()?.package(package, version),
    }
}

/// apt gives a download its name only when it is complete and checked.
fn downloaded(dir: &Path, package: &str, version: &str) -> Option<PathBuf> {
    let start = format!("{package}_{}_", version.replace(':', "%3a"));
    let mut entries = fs::read_dir(dir).ok()?.flatten();
    let found = entries.find(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with(&start) && name.ends_with(".deb")
    })?;
    Some(found.path())
}

/// Finds a file by the end of its path, wherever a package keeps it.
pub fn find(dir: &Path, path: &str) -> Result<PathBuf> {
    WalkDir::new(dir)
        .into_iter()
        .flatten()
        .find(|entry| entry.path().ends_with(path) && entry.file_type().is_file())
        .map(DirEntry::into_path)
        .with_context(|| format!("the package holds no {path}"))
}

/// Unpacks a .deb into a new folder. One that is broken is not kept.
pub fn unpack(deb: &Path) -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir_in(deb.parent().context("a file has a folder")?)?;
    run::ask(Command::new("dpkg-deb").arg("-x").arg(deb).arg(dir.path()))
        .inspect_err(|_| drop(fs::remove_file(deb)))?;
    Ok(dir)
}

/// The machine's own mirror of the Debian archive.
fn mirror() -> Result<String> {
    const FORMAT: &str = "$(REPO_URI) $(ORIGIN) $(COMPONENT) $(RELEASE)";
    let ask = |extra: &[&str]| {
        run::ask(
            Command::new("apt-get")
                .args(extra)
                .args(["indextargets", "--format", FORMAT]),
        )
    };
    if let Some(uri) = debian_archive(&ask(&[])?, "Debian") {
        return Ok(uri);
    }
    // Without lists apt knows no origins; on Debian itself its own suites are it.
    let os_release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    if os_release.lines().any(|line| line == "ID=debian") {
        let targets = ask(&["-o", "APT::Get::IndexTargets::ReleaseInfo=false"])?;
        if let Some(uri) = debian_archive(&targets, "$(ORIGIN)") {
            return Ok(uri);
        }
    }
    bail!(
        "this machine's apt knows no mirror of the Debian archive; give your own sources: \
         QEMU_SRC=<QEMU tree of line 10.2 or 10.0> KERNEL_SRC=<Linux tree, 6.12 or newer>"
    )
}

/// Picks, from lines of "uri origin component release", the archive proper: its
/// security and update suites may lie elsewhere.
fn debian_archive(targets: &str, origin: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let &[uri, found, "main", release] = words.as_slice() else {
            return None;
        };
        (found == origin && !release.contains('-')).then(|| uri.to_owned())
    })
}

fn sources(mirror: &str) -> String {
    let line = |kind: &str, target: &str, suite: &str| {
        format!("{kind} [signed-by={KEYRING} target={target}] {mirror} {suite} main\n")
    };
    let binary = BINARY_SUITES
        .iter()
        .map(|suite| line("deb", "Packages", suite));
    let source = SOURCE_SUITES
        .iter()
        .map(|suite| line("deb-src", "Sources", suite));
    binary.chain(source).collect()
}

/// Read after the machine's own configuration, of which it replaces what would
/// tie us to the machine's packages.
fn settings(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        r#"Dir::Etc::sourcelist "{dir}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State::lists "{dir}/lists";
Dir::State::status "{dir}/status";
Dir::Cache "{dir}/cache";
Dir::Cache::archives "archives/";
// The folder is the user's: apt's own user may not be able to write there.
APT::Sandbox::User "root";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"#
    )
}

fn fields(records: &str, name: &str) -> Vec<String> {
    records
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
        .map(|value| value.trim().to_owned())
        .collect()
}

fn newest_first(versions: &mut Vec<String>) -> Result<()> {
    versions.sort();
    versions.dedup();
    let mut failed = None;
    versions.sort_by(|a, b| {
        newer(a, b).unwrap_or_else(|error| {
            failed = Some(error);
            Ordering::Equal
        })
    });
    failed.map_or(Ok(()), Err)
}

/// Orders the newer of two versions first; dpkg knows how.
fn newer(a: &str, b: &str) -> Result<Ordering> {
    if a == b {
        return Ok(Ordering::Equal);
    }
    let status = Command::new("dpkg")
        .args(["--compare-versions", a, "gt", b])
        .status()?;
    match status.code() {
        Some(0) => Ok(Ordering::Less),
        Some(1) => Ok(Ordering::Greater),
        _ => bail!("dpkg cannot compare the versions {a} and {b}"),
    }
}

pub fn without_epoch(version: &str) -> &str {
    version.split_once(':').map_or(version, |(_, rest)| rest)
}

fn existing(path: PathBuf) -> Result<PathBuf> {
    ensure!(path.exists(), "{} was not downloaded", path.display());
    Ok(path)
}

/// For each of a family of packages such as linux-source-6.12, its version as
/// numbers; names that carry something else are left out.
pub fn numbered(names: &[String], prefix: &str) -> BTreeMap<Vec<u32>, String> {
    names
        .iter()
        .filter_map(|name| {
            let numbers = name.strip_prefix(prefix)?.split('.').map(str::parse);
            let key = numbers.collect::<Result<Vec<u32>, _>>().ok()?;
            Some((key, name.clone()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_proper_is_chosen() {
        let targets = "\
http://a/debian-security/ Debian main bookworm-security
http://b/other/ Elsewhere main bookworm
http://c/debian/ Debian contrib bookworm
http://d/debian/ Debian main bookworm-updates
http://e/debian/ Debian main bookworm
";
        let found = debian_archive(targets, "Debian");
        assert_eq!(found.as_deref(), Some("http://e/debian/"));
        assert_eq!(
            debian_archive("http://x/ubuntu/ Ubuntu main noble", "Debian"),
            None
        );
    }

    #[test]
    fn versions_are_read_and_ordered() -> Result<()> {
        let records = "Package: qemu\nVersion: 1:10.0.9+ds-1\n\nVersion: 1:10.0.13+ds-0+deb13u1\n\
                       Version: 1:10.2.2+ds-1~bpo13+1\nVersion: 1:10.2.2+ds-1\n";
        let mut versions = fields(records, "Version");
        newest_first(&mut versions)?;
        assert_eq!(
            versions,
            [
                "1:10.2.2+ds-1",
                "1:10.2.2+ds-1~bpo13+1",
                "1:10.0.13+ds-0+deb13u1",
                "1:10.0.9+ds-1"
            ]
        );
        Ok(())
    }

    #[test]
    fn numbered_packages_sort_as_numbers() {
        let names = [
            "linux-source-6.12",
            "linux-source-7.3",
            "linux-source-7.10",
            "linux-source-rt",
        ]
        .map(str::to_owned);
        let sorted: Vec<_> = numbered(&names, "linux-source-").into_values().collect();
        assert_eq!(
            sorted,
            ["linux-source-6.12", "linux-source-7.3", "linux-source-7.10"]
        );
    }

    #[test]
    fn epochs_are_no_part_of_file_names() {
        assert_eq!(without_epoch("1:10.2.2+ds-1"), "10.2.2+ds-1");
        assert_eq!(without_epoch("7.3.4-1"), "7.3.4-1");
    }
}
