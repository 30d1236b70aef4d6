//! `cargo xtask bench`: what conversions cost, against others, in one run.

mod tracking;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;

use crate::Context;

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

pub fn run(cx: &Context, check: bool, json: Option<PathBuf>) -> Result<ExitCode> {
    let figures = tracking::run(cx)?;
    print!("{}", figures.table());
    let bars = figures.bars()?;
    for bar in &bars {
        let word = if bar.holds() { "holds" } else { "MISSED" };
        println!("{word}: {}: {:.2}, {:?}", bar.name, bar.value, bar.limit);
    }
    let dir = cx.root.join("target/bench");
    fs::create_dir_all(&dir)?;
    figures.plot(&dir.join("tracking.svg"))?;
    if let Some(path) = json {
        fs::write(path, serde_json::to_string_pretty(&figures)? + "\n")?;
    }
    let missed = check && !bars.iter().all(Bar::holds);
    Ok(ExitCode::from(u8::from(missed)))
}
