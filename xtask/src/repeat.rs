//! `--repeat N`: runs the same tests N times, to learn how often they fail.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};

use crate::suites::Tally;

/// One of several rounds. It is displayed as what a line of output begins with.
#[derive(Clone, Copy)]
pub struct Round {
    number: u32,
    of: u32,
}

impl Round {
    /// Whether the tests run once only.
    pub fn is_only(self) -> bool {
        self.of == 1
    }
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.of {
            1 => Ok(()),
            of => write!(f, "round {} of {of}: ", self.number),
        }
    }
}

/// Runs all rounds, also after a failure, and prints what came of them. The last
/// line has the counts.
pub fn rounds(of: u32, run: impl FnMut(Round) -> Tally) -> ExitCode {
    let rounds = Rounds::run(of, run);
    if of > 1 {
        println!("{}", rounds.summary());
    }
    println!("{}", rounds.total.counts());
    match rounds.total.failed.as_slice() {
        [] => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

struct Rounds {
    of: u32,
    /// How many of them had a failure.
    failed: u32,
    total: Tally,
    /// A copy of the output of the first failure: the next round overwrites the original.
    kept: Option<PathBuf>,
}

impl Rounds {
    fn run(of: u32, mut run: impl FnMut(Round) -> Tally) -> Self {
        let mut rounds = Self {
            of,
            failed: 0,
            total: Tally::default(),
            kept: None,
        };
        for number in 1..=of {
            let tally = run(Round { number, of });
            rounds.failed += u32::from(!tally.failed.is_empty());
            if let Some(log) = tally.log.as_deref().filter(|_| of > 1) {
                rounds.keep(log);
            }
            rounds.total.add(tally);
        }
        rounds
    }

    fn keep(&mut self, log: &Path) {
        if self.kept.is_some() {
            return;
        }
        match keep(log) {
            Ok(kept) => {
                println!("    the output is kept in {}", kept.display());
                self.kept = Some(kept);
            }
            Err(error) => eprintln!("error: {error:#}"),
        }
    }

    fn summary(&self) -> String {
        let mut summary = format!("{} rounds, {} with a failure", self.of, self.failed);
        for (name, count) in frequencies(&self.total.failed) {
            summary += &format!("; {name}: {count}");
        }
        if let Some(kept) = &self.kept {
            summary += &format!("; output of the first failure: {}", kept.display());
        }
        summary
    }
}

/// How often each test failed. A failure begins with the test's name.
fn frequencies(failed: &[String]) -> BTreeMap<&str, usize> {
    let mut frequencies = BTreeMap::new();
    for failure in failed {
        let name = failure
            .split_once(": ")
            .map_or(&**failure, |(name, _)| name);
        *frequencies.entry(name).or_default() += 1;
    }
    frequencies
}

/// Copies a log to a file of its own beside it, which no other run overwrites.
fn keep(log: &Path) -> Result<PathBuf> {
    let context = || format!("cannot keep a copy of {}", log.display());
    let stem = log.file_stem().unwrap_or_default().to_string_lossy();
    let (path, mut copy) = (1..)
        .map(|number| log.with_file_name(format!("{stem}-failed-{number}.log")))
        .map(|path| File::create_new(&path).map(|file| (path, file)))
        .find(|created| !exists(created))
        .context("there is no unused number")?
        .with_context(context)?;
    io::copy(&mut File::open(log).with_context(context)?, &mut copy).with_context(context)?;
    Ok(path)
}

fn exists<T>(created: &io::Result<T>) -> bool {
    matches!(created, Err(error) if error.kind() == io::ErrorKind::AlreadyExists)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn all_rounds_run_and_the_first_failure_is_kept() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let log = dir.path().join("lab-10.2-test.log");
        let all = || {
            Rounds::run(4, |round| {
                fs::write(&log, round.to_string()).unwrap();
                match round.number {
                    1 => Tally::pass(),
                    number => Tally::fail(format!("demo: {number}")).with_log(&log),
                }
            })
        };
        for number in 1..=2 {
            let rounds = all();
            assert_eq!((rounds.total.passed, rounds.total.failed.len()), (1, 3));
            let kept = rounds.kept.clone().context("a log is kept")?;
            assert!(kept.ends_with(format!("lab-10.2-test-failed-{number}.log")));
            assert_eq!(fs::read_to_string(&kept)?, "round 2 of 4: ");
            let summary = rounds.summary();
            assert!(
                summary.starts_with("4 rounds, 3 with a failure; demo: 3; "),
                "{summary}"
            );
            assert!(summary.contains(&kept.display().to_string()), "{summary}");
        }
        Ok(())
    }

    #[test]
    fn one_failure_fails_all_rounds() {
        assert_eq!(rounds(3, |_| Tally::pass()), ExitCode::SUCCESS);
        let second_fails = |round: Round| match round.number {
            2 => Tally::fail("demo: it ended".to_owned()),
            _ => Tally::pass(),
        };
        assert_eq!(rounds(3, second_fails), ExitCode::FAILURE);
    }

    #[test]
    fn a_single_round_keeps_no_copy() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let log = dir.path().join("log");
        fs::write(&log, "text")?;
        let rounds = Rounds::run(1, |round| {
            assert_eq!(round.to_string(), "");
            Tally::fail("demo".to_owned()).with_log(&log)
        });
        assert_eq!(rounds.kept, None);
        assert_eq!(fs::read_dir(dir.path())?.count(), 1);
        Ok(())
    }
}
