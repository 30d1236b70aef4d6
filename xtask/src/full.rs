//! The suites of `cargo xtask test --full` that need more of QEMU: `full-*`,
//! QEMU's own suites on the patched tree, with the option on and off, and
//! `series-*`, whether each part of the patches builds by itself.
//!
//! The measure is the unpatched tree: what passes there has to pass here. Each
//! test program counts, and each test that it reports. What was said of the
//! unpatched tree is kept until its source or its build changes.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use crate::Context;
use crate::cache;
use crate::lab;
use crate::protocol::Verdict;
use crate::qemu::{self, Build, Kind, Line};
use crate::run;
use crate::suites::Tally;

/// What QEMU's `make check-*` runs under these names.
const SUITES: &[&str] = &["unit", "qapi-schema", "qtest-x86_64"];

/// QEMU's limits for test programs are made for machines with nothing else to
/// do; twice as long ends one that hangs.
const PATIENCE: &str = "2";

/// The firmware that QEMU's qtests load; Debian's source does not bring it.
const FIRMWARE: &[(&str, &[&str])] = &[
    (
        "seabios",
        &[
            "bios.bin",
            "bios-256k.bin",
            "bios-microvm.bin",
            "vgabios-ati.bin",
            "vgabios-bochs-display.bin",
            "vgabios-cirrus.bin",
            "vgabios-isavga.bin",
            "vgabios-qxl.bin",
            "vgabios-ramfb.bin",
            "vgabios-stdvga.bin",
            "vgabios-virtio.bin",
            "vgabios-vmware.bin",
        ],
    ),
    (
        "ipxe-qemu",
        &[
            "efi-e1000.rom",
            "efi-e1000e.rom",
            "pxe-eepro100.rom",
            "efi-ne2k_pci.rom",
            "efi-pcnet.rom",
            "efi-rtl8139.rom",
            "efi-virtio.rom",
            "efi-vmxnet3.rom",
        ],
    ),
    (
        "qemu-system-data",
        &[
            "kvmvapic.bin",
            "linuxboot.bin",
            "linuxboot_dma.bin",
            "multiboot.bin",
            "multiboot_dma.bin",
            "pvh.bin",
            "qboot.rom",
        ],
    ),
];

/// Each test program by its name, and each of its tests as `program: test`.
type Verdicts = BTreeMap<String, Verdict>;

/// Every part of the series, from the first patch on, builds with the option on.
pub fn series(cx: &Context, line: Line) -> Result<Tally> {
    let _guard = cx.cache.lock()?;
    let mut tally = Tally::default();
    for (index, step) in qemu::series(cx, line)?.iter().enumerate() {
        let name = step.patch.file_stem().unwrap_or_default().to_string_lossy();
        eprintln!("  QEMU {line} up to {name}");
        match qemu::build_kind(cx, line, Kind::First(index + 1), &[qemu::ALL]) {
            Err(error) if error.is::<qemu::NoSource>() => return Err(error),
            result => tally.check(&name, result.map(drop)),
        }
    }
    Ok(tally)
}

/// QEMU's own suites pass as they do on the unpatched tree.
pub fn suite(cx: &Context, line: Line) -> Result<Tally> {
    let _guard = cx.cache.lock()?;
    let before = unpatched(cx, line)?;
    let mut tally = Tally::default();
    for (name, kind) in [("on", Kind::Patched(&[])), ("off", Kind::Off)] {
        let build = qemu::build_kind(cx, line, kind, &[qemu::ALL])?;
        let now = verdicts(cx, &build, &format!("suites of QEMU {line} option {name}"))?;
        tally.add(compare(name, &before, &now));
    }
    Ok(tally)
}

/// What the unpatched tree's tests say, from the cache if they said it before.
fn unpatched(cx: &Context, line: Line) -> Result<Verdicts> {
    let build = qemu::build_kind(cx, line, Kind::Unpatched, &[qemu::ALL])?;
    let (stamp, record) = (build.dir.join("verdicts.stamp"), build.dir.join("verdicts"));
    if cache::holds(&stamp, &build.stamp) {
        return Ok(serde_json::from_slice(&fs::read(record)?)?);
    }
    let found = verdicts(cx, &build, &format!("suites of QEMU {line} unpatched"))?;
    cache::replace(&record, serde_json::to_vec(&found)?)?;
    cache::replace(&stamp, &build.stamp)?;
    Ok(found)
}

/// Holds the verdicts of a patched tree against those of the unpatched one. A
/// program that breaks off there is no measure for the tests that it got to.
fn compare(name: &str, before: &Verdicts, now: &Verdicts) -> Tally {
    let breaks_off = |test: &str| {
        let program = test.split_once(": ").map_or(test, |(program, _)| program);
        before.get(program) == Some(&Verdict::Failed)
    };
    let mut tally = Tally::default();
    for (test, verdict) in now {
        let (list, why) = match (verdict, before.get(test)) {
            (Verdict::Ok, _) => {
                tally.passed += 1;
                continue;
            }
            (Verdict::Failed, Some(Verdict::Failed)) => {
                (&mut tally.skipped, "fails unpatched, too")
            }
            (Verdict::Failed, None) if breaks_off(test) => {
                (&mut tally.skipped, "is not reached unpatched")
            }
            (Verdict::Failed, Some(_)) => (&mut tally.failed, "does not fail unpatched"),
            (Verdict::Failed, None) => (&mut tally.failed, "is new and fails"),
            (Verdict::Skipped, Some(Verdict::Skipped)) => {
                (&mut tally.skipped, "skipped unpatched, too")
            }
            (Verdict::Skipped, Some(_)) => (&mut tally.failed, "is not skipped unpatched"),
            (Verdict::Skipped, None) => (&mut tally.skipped, "is new and skips itself"),
        };
        list.push(format!("{name}: {test}: {why}"));
    }
    for test in before.keys() {
        if !now.contains_key(test) && !breaks_off(test) {
            tally.failed.push(format!("{name}: {test}: is gone"));
        }
    }
    tally
}

/// Runs the suites side by side, and what fails there once more by itself, so
/// that no test fails because another took the machine's time.
fn verdicts(cx: &Context, build: &Build, label: &str) -> Result<Verdicts> {
    firmware(cx, build)?;
    let chosen: Vec<&str> = SUITES.iter().flat_map(|name| ["--suite", name]).collect();
    let mut runs = meson_test(cx, build, label, &chosen, run::jobs())?;
    let (failed, passed): (Vec<_>, Vec<_>) = runs.into_iter().partition(Run::failed);
    runs = passed;
    if !failed.is_empty() {
        let again: Vec<&str> = failed.iter().map(Run::name).collect();
        let label = format!("{label}, what failed alone");
        runs.extend(meson_test(cx, build, &label, &again, 1)?);
    }
    let found: Verdicts = runs.iter().flat_map(Run::verdicts).collect();
    ensure!(!found.is_empty(), "{label}: meson ran no tests");
    Ok(found)
}

/// Runs tests and reads meson's record of them, whether they pass or not.
fn meson_test(
    cx: &Context,
    build: &Build,
    label: &str,
    tests: &[&str],
    jobs: usize,
) -> Result<Vec<Run>> {
    let record = build.dir.join("meson-logs/testlog.json");
    fs::remove_file(&record).ok();
    let mut command = Command::new(build.dir.join("pyvenv/bin/meson"));
    command
        .args(["test", "--no-rebuild", "--timeout-multiplier", PATIENCE])
        .args(["--num-processes", &jobs.to_string()])
        .args(tests)
        .current_dir(&build.dir);
    let ended = run::attempt(&cx.cache, label, command)?;
    let complete = fs::read_to_string(&ended.log)?.contains("Full log written to");
    ensure!(
        complete,
        "{label}: meson broke off; the log is {}",
        ended.log.display()
    );
    let text = fs::read_to_string(&record).with_context(|| format!("{label}: no record"))?;
    let runs = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>();
    runs.with_context(|| format!("{label}: {}", record.display()))
}

/// One line of meson's record: a test program that ran. It is named by all of
/// its suites, its project and itself: `unit - qemu:test-aio`.
#[derive(Deserialize)]
struct Run {
    name: String,
    result: String,
    #[serde(default)]
    stdout: Option<String>,
}

impl Run {
    /// As meson takes it on its command line.
    fn name(&self) -> &str {
        self.name.rsplit(" - ").next().unwrap_or(&self.name)
    }

    fn shown(&self) -> &str {
        let name = self.name();
        name.split_once(':').map_or(name, |(_, test)| test)
    }

    fn failed(&self) -> bool {
        self.verdict() == Verdict::Failed
    }

    fn verdict(&self) -> Verdict {
        match self.result.as_str() {
            "OK" | "EXPECTEDFAIL" => Verdict::Ok,
            "SKIP" => Verdict::Skipped,
            _ => Verdict::Failed,
        }
    }

    /// That of the program, and of each test in its TAP output.
    fn verdicts(&self) -> Vec<(String, Verdict)> {
        let lines = self.stdout.as_deref().unwrap_or_default().lines();
        let tests = lines.filter_map(tap).map(|(test, verdict)| {
            let name = format!("{}: {test}", self.shown());
            (name, verdict)
        });
        std::iter::once((self.shown().to_owned(), self.verdict()))
            .chain(tests)
            .collect()
    }
}

/// `ok 3 /a/test # SKIP why`: the test and its verdict.
fn tap(line: &str) -> Option<(&str, Verdict)> {
    let line = line.trim_start();
    let (rest, passed) = match line.strip_prefix("not ok ") {
        Some(rest) => (rest, Verdict::Failed),
        None => (line.strip_prefix("ok ")?, Verdict::Ok),
    };
    let (name, verdict) = match rest.split_once("# SKIP") {
        Some((name, _)) => (name, Verdict::Skipped),
        None => (rest, passed),
    };
    let name = name.trim_start_matches(|c: char| c.is_ascii_digit()).trim();
    (!name.is_empty()).then_some((name, verdict))
}

/// Puts the firmware where a QEMU that runs in its build folder looks for it.
fn firmware(cx: &Context, build: &Build) -> Result<()> {
    let place = build.dir.join("qemu-bundle/usr/local/share/qemu");
    fs::create_dir_all(&place)?;
    let own = build.source.join("pc-bios");
    for (package, names) in FIRMWARE {
        let dir = match names.iter().all(|name| own.join(name).exists()) {
            true => own.clone(),
            false => lab::from_package(cx, "firmware", package, names)?,
        };
        for name in *names {
            link(&dir.join(name), &place.join(name))?;
        }
    }
    Ok(())
}

fn link(target: &Path, place: &Path) -> Result<()> {
    if fs::read_link(place).is_ok_and(|found| found == target) {
        return Ok(());
    }
    fs::remove_file(place).ok();
    symlink(target, place).with_context(|| format!("cannot link {}", place.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_and_their_tests_are_read() -> Result<()> {
        let line = r#"{"name": "qtest+qtest-x86_64 - qemu:qtest-x86_64/qos-test", "result": "FAIL", "duration": 1.5,
            "stdout": "TAP version 13\n1..4\nok 1 /x/a\n# ok 9 /no\nok 2 /x/b # SKIP no y\nnot ok 3 /x/c\nBail out!"}"#;
        let run: Run = serde_json::from_str(line)?;
        let found = run.verdicts();
        let found: Vec<_> = found
            .iter()
            .map(|(name, of)| (name.as_str(), *of))
            .collect();
        assert_eq!(
            found,
            [
                ("qtest-x86_64/qos-test", Verdict::Failed),
                ("qtest-x86_64/qos-test: /x/a", Verdict::Ok),
                ("qtest-x86_64/qos-test: /x/b", Verdict::Skipped),
                ("qtest-x86_64/qos-test: /x/c", Verdict::Failed),
            ]
        );
        for (result, verdict) in [("TIMEOUT", Verdict::Failed), ("SKIP", Verdict::Skipped)] {
            let run: Run =
                serde_json::from_str(&format!(r#"{{"name": "x", "result": "{result}"}}"#))?;
            assert_eq!(run.verdict(), verdict);
        }
        Ok(())
    }

    #[test]
    fn the_unpatched_tree_is_the_measure() {
        use Verdict::{Failed, Ok, Skipped};
        let of = |verdicts: &[(&str, Verdict)]| {
            let named = verdicts.iter().map(|(name, of)| ((*name).to_owned(), *of));
            named.collect::<Verdicts>()
        };
        let before = of(&[
            ("a", Ok),
            ("b", Ok),
            ("c", Failed),
            ("d", Skipped),
            ("e", Ok),
            ("f", Ok),
            ("g", Failed),
            ("g: 1", Ok),
        ]);
        let now = of(&[
            ("a", Ok),
            ("b", Failed),
            ("c", Failed),
            ("d", Skipped),
            ("e", Skipped),
            ("g", Failed),
            ("g: 2", Failed),
            ("new", Ok),
            ("worse", Failed),
        ]);
        let tally = compare("on", &before, &now);
        assert_eq!(tally.passed, 2);
        assert_eq!(
            tally.failed,
            [
                "on: b: does not fail unpatched",
                "on: e: is not skipped unpatched",
                "on: worse: is new and fails",
                "on: f: is gone",
            ]
        );
        assert_eq!(
            tally.skipped,
            [
                "on: c: fails unpatched, too",
                "on: d: skipped unpatched, too",
                "on: g: fails unpatched, too",
                "on: g: 2: is not reached unpatched",
            ]
        );
    }
}
