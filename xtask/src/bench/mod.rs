//! `cargo xtask bench`: what conversions cost, against others, in one run.

pub mod lab;

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::Context;
use crate::qemu::Line;

/// What a figure has to reach.
#[derive(Debug, Serialize)]
pub struct Bar {
    pub name: String,
    pub value: f64,
    pub limit: Limit,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    AtLeast(f64),
    AtMost(f64),
}

impl Bar {
    pub fn at_least(name: impl Into<String>, value: f64, limit: f64) -> Self {
        let (name, limit) = (name.into(), Limit::AtLeast(limit));
        Self { name, value, limit }
    }

    pub fn at_most(name: impl Into<String>, value: f64, limit: f64) -> Self {
        let (name, limit) = (name.into(), Limit::AtMost(limit));
        Self { name, value, limit }
    }

    pub fn holds(&self) -> bool {
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

pub fn run(
    cx: &Context,
    line: Option<Line>,
    limit: Duration,
    check: bool,
    json: Option<PathBuf>,
) -> Result<ExitCode> {
    let figures = lab::run(cx, line, limit)?;
    print!("{}", figures.table());
    let bars = figures.bars();
    for bar in &bars {
        println!("{bar}");
    }
    if let Some(path) = json {
        fs::write(path, serde_json::to_string_pretty(&figures)? + "\n")?;
    }
    let missed = check && !bars.iter().all(Bar::holds);
    Ok(ExitCode::from(u8::from(missed)))
}
