//! `cargo xtask bench`: what conversions cost, against others, in one run.

mod lab;
mod tracking;
mod vfio;

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Value, json};

use crate::Context;
use crate::lab::Lab;
use crate::protocol::Event;
use crate::qemu::Line;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    Tracking,
    Lab,
    Vfio,
}

/// The figures that the lab told, started for `lab.bench` or what else `option` says.
fn told_by_lab(
    cx: &Context,
    line: Option<Line>,
    limit: Duration,
    option: &str,
) -> Result<Vec<Value>> {
    let lab = Lab::prepare(cx, line)?;
    let (mut told, mut problems) = (Vec::new(), Vec::new());
    lab.boot(cx, "bench", option, limit, |event| match event {
        Event::Log(line) => eprintln!("{line}"),
        Event::Bench(value) => told.push(value),
        Event::Error(error) => problems.push(error),
        Event::Begin(_)
        | Event::Test(_)
        | Event::Demo(_)
        | Event::Soak(_)
        | Event::Exit(_)
        | Event::Done => {}
    })?;
    match problems.pop() {
        Some(problem) => bail!(problem),
        None => Ok(told),
    }
}

/// What a figure has to reach.
#[derive(Debug, Serialize)]
pub struct Bar {
    name: String,
    value: f64,
    limit: Limit,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Limit {
    AtLeast(f64),
    AtMost(f64),
}

impl Bar {
    fn at_least(name: impl Into<String>, value: f64, limit: f64) -> Self {
        let (name, limit) = (name.into(), Limit::AtLeast(limit));
        Self { name, value, limit }
    }

    fn at_most(name: impl Into<String>, value: f64, limit: f64) -> Self {
        let (name, limit) = (name.into(), Limit::AtMost(limit));
        Self { name, value, limit }
    }

    fn holds(&self) -> bool {
        match self.limit {
            Limit::AtLeast(limit) => self.value >= limit,
            Limit::AtMost(limit) => self.value <= limit,
        }
    }
}

impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let word = if self.holds() { "holds" } else { "MISSED" };
        let (than, limit) = match self.limit {
            Limit::AtLeast(limit) => ("at least", limit),
            Limit::AtMost(limit) => ("at most", limit),
        };
        write!(
            f,
            "{word:>6}: {}: {:.2}, {than} {limit}",
            self.name, self.value
        )
    }
}

/// Prints what was measured and which bars hold, and keeps it in target/bench.
/// With `check`, a bar that is missed is a failure.
pub fn run(
    cx: &Context,
    only: Option<Part>,
    (line, limit): (Option<Line>, Duration),
    check: bool,
    json: Option<PathBuf>,
) -> Result<ExitCode> {
    let dir = cx.root.join("target/bench");
    fs::create_dir_all(&dir)?;
    let mut kept = json!({});
    let mut bars = Vec::new();
    let wanted = |part| only.is_none_or(|only| only == part);
    if wanted(Part::Tracking) {
        let figures = tracking::run(cx)?;
        print!("{}", figures.table());
        figures.plot(&dir.join("tracking.svg"))?;
        bars.extend(figures.bars()?);
        kept["tracking"] = serde_json::to_value(&figures)?;
    }
    if wanted(Part::Lab) {
        let figures = lab::run(cx, line, limit)?;
        print!("{}", figures.table());
        bars.extend(figures.bars());
        kept["lab"] = serde_json::to_value(&figures)?;
    }
    if wanted(Part::Vfio) {
        let figures = vfio::run(cx, line, limit)?;
        print!("{}", figures.table());
        kept["vfio"] = serde_json::to_value(&figures)?;
    }
    bars.iter().for_each(|bar| println!("{bar}"));
    kept["bars"] = serde_json::to_value(&bars)?;
    for path in json.into_iter().chain([dir.join("bench.json")]) {
        fs::write(path, serde_json::to_string_pretty(&kept)? + "\n")?;
    }
    let missed = check && !bars.iter().all(Bar::holds);
    Ok(ExitCode::from(u8::from(missed)))
}
