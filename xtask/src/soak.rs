//! `cargo xtask soak`: a hostile guest attacks QEMU in the lab, round after round, each with a seed of
//! its own.
//!
//! What came of it is kept in target/soak/state.json after each round, so that a soak that was
//! interrupted goes on where it was. One that has come to its end is over: the next begins anew, with
//! seeds that have not been used.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::Context;
use crate::cache;
use crate::lab::{self, Lab};
use crate::protocol::{Event, Round};
use crate::qemu::Line;
use crate::run::Progress;

/// With fewer requests a guest hardly meets all that the host does.
const SHORTEST_ROUND: u64 = 5_000;
/// What the console's log of each round is called.
const LOG: &str = "soak";
/// A lab in which so many rounds fail is not worth more.
const MOST_FAILURES: usize = 3;

#[derive(clap::Args)]
pub struct Options {
    /// The QEMU line; otherwise the newest there is
    #[arg(long)]
    line: Option<Line>,
    /// How long; rounds that were run before an interruption count
    #[arg(long, default_value_t = 60, conflicts_with = "requests")]
    minutes: u64,
    /// Until so many requests have been sent, however long it takes
    #[arg(long)]
    requests: Option<u64>,
    /// Requests of a round
    #[arg(long, default_value_t = 500_000, value_parser = clap::value_parser!(u64).range(SHORTEST_ROUND..))]
    round: u64,
    /// Of the first round; each further one has the next
    #[arg(long)]
    seed: Option<u64>,
    /// Begin anew, with seed 1, whatever was kept
    #[arg(long)]
    fresh: bool,
    /// Where it is kept what came of it
    #[arg(long, value_name = "FILE", default_value = "target/soak/state.json")]
    state: PathBuf,
    /// Seconds after which a round that is still running counts as hung
    #[arg(long, default_value_t = 1200)]
    timeout: u64,
}

impl Options {
    fn goal(&self) -> Goal {
        match self.requests {
            Some(requests) => Goal::Requests(requests),
            None => Goal::Seconds(60.0 * self.minutes as f64),
        }
    }
}

/// When it is enough.
#[derive(Clone, Copy)]
enum Goal {
    Requests(u64),
    Seconds(f64),
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct State {
    line: String,
    first_seed: u64,
    rounds: u64,
    accepted: u64,
    refused: u64,
    plugged: u64,
    /// Of all rounds.
    seconds: f64,
    failures: Vec<Failure>,
    /// Whether it has come to its end.
    over: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Failure {
    seed: u64,
    why: String,
}

impl State {
    /// What goes on, or begins.
    fn begin(kept: Option<State>, line: &str, seed: Option<u64>) -> Result<State> {
        let unused = kept.as_ref().map_or(1, State::seed);
        let Some(kept) = kept.filter(|kept| !kept.over) else {
            return Ok(State {
                line: line.to_owned(),
                first_seed: seed.unwrap_or(unused),
                ..State::default()
            });
        };
        ensure!(
            kept.line == line && seed.is_none_or(|seed| seed == kept.first_seed),
            "a soak of QEMU {} from seed {} was interrupted: go on with that, or add --fresh",
            kept.line,
            kept.first_seed
        );
        Ok(kept)
    }

    /// Of the next round.
    fn seed(&self) -> u64 {
        self.first_seed + self.rounds
    }

    fn requests(&self) -> u64 {
        self.accepted + self.refused
    }

    fn goes_on(&self, goal: Goal) -> bool {
        let wants_more = match goal {
            Goal::Requests(requests) => self.requests() < requests,
            Goal::Seconds(seconds) => self.seconds < seconds,
        };
        wants_more && self.failures.len() < MOST_FAILURES
    }

    fn add(&mut self, round: Result<Round>, seconds: f64) {
        match round {
            Ok(round) => {
                self.accepted += round.accepted;
                self.refused += round.refused;
                self.plugged += round.plugged;
            }
            Err(error) => self.failures.push(Failure {
                seed: self.seed(),
                why: format!("{error:#}"),
            }),
        }
        self.rounds += 1;
        self.seconds += seconds;
    }

    fn told(&self) -> String {
        format!(
            "{} requests in {} rounds, {} accepted, {} refused, in {:.1} min",
            self.requests(),
            self.rounds,
            self.accepted,
            self.refused,
            self.seconds / 60.0
        )
    }

    fn read(path: &Path) -> Result<Option<State>> {
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(path)?;
        serde_json::from_str(&text).map(Some).with_context(|| {
            format!(
                "{} is not what a soak keeps; --fresh replaces it",
                path.display()
            )
        })
    }

    fn keep(&self, path: &Path) -> Result<()> {
        cache::replace(path, serde_json::to_string_pretty(self)? + "\n")
    }
}

pub fn run(cx: &Context, options: &Options) -> Result<ExitCode> {
    let path = cx.root.join(&options.state);
    let kept = match options.fresh {
        true => None,
        false => State::read(&path)?,
    };
    let lab = Lab::prepare(cx, options.line)?;
    let mut state = State::begin(kept, lab.line().name(), options.seed)?;
    if state.rounds > 0 {
        println!("soak: goes on after {}", state.told());
    }
    let soak = Soak {
        cx,
        lab,
        requests: options.round,
        limit: Duration::from_secs(options.timeout),
        logs: path.parent().context("a file has a folder")?.to_owned(),
    };
    while state.goes_on(options.goal()) {
        let started = Instant::now();
        let round = soak.round(state.seed());
        state.add(round, started.elapsed().as_secs_f64());
        state.keep(&path)?;
    }
    state.over = true;
    state.keep(&path)?;
    Ok(verdict(&state))
}

fn verdict(state: &State) -> ExitCode {
    match state.failures.as_slice() {
        [] => println!("soak: hostile run clean: {}", state.told()),
        failures => println!("soak: {} rounds FAILED: {}", failures.len(), state.told()),
    }
    let failed = |failure: &Failure| format!("seed {}: {}", failure.seed, failure.why);
    lab::verdict(&state.failures.iter().map(failed).collect::<Vec<_>>())
}

struct Soak<'a> {
    cx: &'a Context,
    lab: Lab,
    /// Of a round.
    requests: u64,
    limit: Duration,
    /// Where the console of a round that failed is kept.
    logs: PathBuf,
}

impl Soak<'_> {
    /// One round, told in one line.
    fn round(&self, seed: u64) -> Result<Round> {
        let started = Instant::now();
        let round = self.attack(seed);
        match &round {
            Ok(round) => println!(
                "soak: seed {seed}: {} requests accepted, {} refused, the DIMM plugged {} times, \
                 the longest request {} ms, in {:.1} s",
                round.accepted,
                round.refused,
                round.plugged,
                round.longest_ms,
                started.elapsed().as_secs_f64()
            ),
            Err(error) => {
                println!("soak: seed {seed}: FAILED: {error:#}");
                let (line, requests) = (self.lab.line(), self.requests);
                println!(
                    "soak: again: cargo xtask soak --fresh --line {line} --seed {seed} \
                     --requests {requests} --round {requests}"
                );
            }
        }
        round
    }

    fn attack(&self, seed: u64) -> Result<Round> {
        let mut told = None;
        let mut problems = Vec::new();
        let progress = Progress::start(&format!("attack with seed {seed}"));
        let options = format!("lab.soak={seed}:{}", self.requests);
        let boot = self
            .lab
            .boot(self.cx, LOG, &options, self.limit, |event| match event {
                Event::Log(line) => progress.line(&line),
                Event::Soak(round) => told = Some(round),
                Event::Error(error) => problems.push(error),
                Event::Begin(_)
                | Event::Test(_)
                | Event::Demo(_)
                | Event::Bench(_)
                | Event::Exit(_)
                | Event::Done => {}
            });
        progress.finish();
        problems.extend(boot.err().map(|error| format!("{error:#}")));
        match told {
            Some(round) if problems.is_empty() => return Ok(round),
            None if problems.is_empty() => problems.push("the lab told of no attack".to_owned()),
            _ => {}
        }
        problems.push(match self.keep_console(seed) {
            Ok(log) => format!("its console is kept in {}", log.display()),
            Err(error) => format!("its console could not be kept: {error:#}"),
        });
        bail!("{}", problems.join("; "))
    }

    /// The next round overwrites it.
    fn keep_console(&self, seed: u64) -> Result<PathBuf> {
        let log = self.logs.join(format!("seed-{seed}.log"));
        fs::create_dir_all(&self.logs)?;
        fs::copy(self.lab.log(self.cx, LOG)?, &log)?;
        Ok(log)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round() -> Result<Round> {
        Ok(Round {
            accepted: 40,
            refused: 60,
            plugged: 2,
            longest_ms: 5,
        })
    }

    fn failed() -> Result<Round> {
        Err(anyhow::anyhow!("QEMU ended"))
    }

    fn begun() -> Result<State> {
        State::begin(None, "10.2", None)
    }

    #[test]
    fn each_round_has_another_seed() -> Result<()> {
        let mut state = begun()?;
        assert_eq!(state.seed(), 1);
        state.add(round(), 1.0);
        state.add(failed(), 1.0);
        assert_eq!(state.seed(), 3);
        assert_eq!(state.failures[0].seed, 2);
        assert_eq!(
            (state.requests(), state.accepted, state.plugged),
            (100, 40, 2)
        );
        Ok(())
    }

    #[test]
    fn a_goal_has_an_end() -> Result<()> {
        let mut state = begun()?;
        assert!(state.goes_on(Goal::Requests(150)) && state.goes_on(Goal::Seconds(60.0)));
        assert!(!state.goes_on(Goal::Requests(0)) && !state.goes_on(Goal::Seconds(0.0)));
        state.add(round(), 61.0);
        assert!(state.goes_on(Goal::Requests(150)) && state.goes_on(Goal::Seconds(62.0)));
        assert!(!state.goes_on(Goal::Requests(100)) && !state.goes_on(Goal::Seconds(60.0)));
        Ok(())
    }

    #[test]
    fn one_that_only_fails_ends() -> Result<()> {
        let mut state = begun()?;
        for _ in 0..MOST_FAILURES {
            assert!(state.goes_on(Goal::Requests(100)));
            state.add(failed(), 1.0);
        }
        assert!(!state.goes_on(Goal::Requests(100)));
        assert_eq!(verdict(&state), ExitCode::FAILURE);
        Ok(())
    }

    #[test]
    fn an_interrupted_one_goes_on_and_one_that_is_over_does_not() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("soak/state.json");
        assert_eq!(State::read(&path)?, None);
        let mut state = begun()?;
        state.add(round(), 1.5);
        state.add(failed(), 1.5);
        state.keep(&path)?;
        let again = |line, seed| State::begin(State::read(&path)?, line, seed);
        assert_eq!(again("10.2", None)?, state);
        assert_eq!(again("10.2", Some(1))?, state);
        assert!(again("10.2", Some(2)).is_err());
        assert!(again("10.0", None).is_err());

        state.over = true;
        state.keep(&path)?;
        let next = again("10.0", None)?;
        assert_eq!((next.first_seed, next.rounds, next.requests()), (3, 0, 0));
        assert!(next.failures.is_empty() && !next.over);
        assert_eq!(again("10.0", Some(7))?.first_seed, 7);

        fs::write(&path, "{}")?;
        assert!(State::read(&path).is_err());
        Ok(())
    }
}
