//! The suites `checkpatch-*`: QEMU's own scripts/checkpatch.pl on every patch of
//! a series, with the new files that come with it.
//!
//! The script is that of the line itself. It wants patches with git's context,
//! which ours do not have, so that they fit more trees: they are made here from
//! the trees before and after each patch.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::Context;
use crate::qemu::{self, Line};
use crate::suites::Tally;
use crate::tree::{Overlay, Step};

/// What checkpatch says that we do not follow, and why.
const ALLOWED: &[Allowed] = &[
    Allowed {
        file: "scripts/meson-buildoptions.sh",
        rule: "line over 80 characters",
        why: "QEMU's build generates this file",
    },
    Allowed {
        file: "target/i386/svm.h",
        rule: "code indent should never use tabs",
        why: "the file itself does",
    },
    Allowed {
        file: "",
        rule: "added, moved or deleted file(s):",
        why: "who maintains the files is said where they are merged",
    },
];

/// A rule in a file, or in none where that is empty.
struct Allowed {
    file: &'static str,
    rule: &'static str,
    why: &'static str,
}

/// One complaint of checkpatch.
#[derive(Debug, Default, PartialEq)]
struct Report {
    text: String,
    file: String,
    line: String,
}

impl Report {
    fn allowed(&self) -> Option<&'static Allowed> {
        ALLOWED
            .iter()
            .find(|allowed| self.file == allowed.file && self.text.contains(allowed.rule))
    }

    fn shown(&self) -> String {
        let text = self.text.trim_end_matches(':');
        match self.file.as_str() {
            "" => text.to_owned(),
            file => format!("{file}:{}: {text}", self.line),
        }
    }
}

pub fn suite(cx: &Context, line: Line) -> Result<Tally> {
    let pristine = qemu::pristine(cx, line)?;
    let mut tally = Tally::default();
    for series in [qemu::series(cx, line)?, qemu::lab_series(cx, line)?] {
        check_series(&mut tally, &pristine, &series)?;
    }
    Ok(tally)
}

fn check_series(tally: &mut Tally, pristine: &Path, series: &[Step]) -> Result<()> {
    let mut before = Overlay::new(pristine, &[])?;
    for (index, step) in series.iter().enumerate() {
        let after = Overlay::new(pristine, &series[..=index])?;
        let text = fs::read_to_string(&step.patch)?;
        let patch = format!("{}---\n{}", message(&text), after.since(&before, pristine)?);
        let name = step.patch.file_stem().unwrap_or_default().to_string_lossy();
        count(tally, &name, check(pristine, &patch));
        before = after;
    }
    Ok(())
}

/// What a patch says before its first change.
fn message(patch: &str) -> &str {
    patch
        .find("diff --git ")
        .map_or(patch, |start| &patch[..start])
}

/// A patch passes if nothing is said of it but what is allowed.
fn count(tally: &mut Tally, name: &str, reports: Result<Vec<Report>>) {
    let reports = match reports {
        Ok(reports) => reports,
        Err(error) => return tally.check(name, Err(error)),
    };
    let mut clean = true;
    for report in reports {
        let shown = format!("{name}: {}", report.shown());
        match report.allowed() {
            Some(allowed) => tally.skipped.push(format!("{shown}: {}", allowed.why)),
            None => {
                clean = false;
                tally.failed.push(shown);
            }
        }
    }
    tally.passed += usize::from(clean);
}

fn check(tree: &Path, patch: &str) -> Result<Vec<Report>> {
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), patch)?;
    let output = Command::new("perl")
        .arg("scripts/checkpatch.pl")
        // These patches are kept here and not sent: nobody signs them off.
        .args(["--patch", "--strict", "--no-signoff", "--color=never"])
        .arg(file.path())
        .current_dir(tree)
        .output()
        .context("cannot run perl")?;
    reports(&String::from_utf8_lossy(&output.stdout)).with_context(|| {
        let said = String::from_utf8_lossy(&output.stderr);
        format!("scripts/checkpatch.pl: {}: {said}", output.status)
    })
}

/// Reads complaints, and that there are as many as checkpatch counted.
fn reports(output: &str) -> Result<Vec<Report>> {
    let mut found: Vec<Report> = Vec::new();
    let mut counted = None;
    for line in output.lines() {
        if line.starts_with("ERROR: ") || line.starts_with("WARNING: ") {
            found.push(Report {
                text: line.to_owned(),
                ..Report::default()
            });
        } else if let (Some(place), Some(report)) = (place(line), found.last_mut()) {
            (report.file, report.line) = place;
        } else if let Some(totals) = line.strip_prefix("total: ") {
            let numbers = totals
                .split([' ', ','])
                .filter_map(|word| word.parse::<usize>().ok());
            counted = Some(numbers.take(2).sum());
        }
    }
    ensure!(
        counted == Some(found.len()),
        "of {counted:?} complaints {} can be read:\n{output}",
        found.len()
    );
    Ok(found)
}

/// `#12: FILE: path:34:`
fn place(line: &str) -> Option<(String, String)> {
    let (_, place) = line.strip_prefix('#')?.split_once(": FILE: ")?;
    let (file, number) = place.trim_end_matches(':').rsplit_once(':')?;
    Some((file.to_owned(), number.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
WARNING: line over 80 characters
#65: FILE: scripts/meson-buildoptions.sh:174:
+  printf ...

ERROR: code indent should never use tabs
#71: FILE: system/x.c:9:
+\tx();

WARNING: added, moved or deleted file(s):

  system/x.c

Does MAINTAINERS need updating?

total: 1 errors, 2 warnings, 51 lines checked
";

    #[test]
    fn what_is_allowed_is_shown_and_the_rest_fails() {
        let mut tally = Tally::default();
        count(&mut tally, "0001", reports(OUTPUT));
        assert_eq!(tally.passed, 0);
        assert_eq!(
            tally.failed,
            ["0001: system/x.c:9: ERROR: code indent should never use tabs"]
        );
        assert_eq!(tally.skipped.len(), 2);
        assert!(tally.skipped[0].ends_with(ALLOWED[0].why));

        let elsewhere = OUTPUT.replace("scripts/meson-buildoptions.sh", "system/x.c");
        count(&mut tally, "0002", reports(&elsewhere));
        assert_eq!(tally.failed.len(), 3);
    }

    #[test]
    fn a_clean_patch_passes_and_a_broken_script_does_not() {
        let mut tally = Tally::default();
        count(
            &mut tally,
            "0001",
            reports("total: 0 errors, 0 warnings, 3 lines checked\n"),
        );
        assert_eq!((tally.passed, tally.failed.len()), (1, 0));
        count(
            &mut tally,
            "0002",
            reports("Can't locate Term/ANSIColor.pm\n"),
        );
        count(
            &mut tally,
            "0003",
            reports("total: 1 errors, 0 warnings, 3 lines checked\n"),
        );
        assert_eq!((tally.passed, tally.failed.len()), (1, 2));
    }
}
