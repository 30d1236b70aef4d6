//! QEMU's command lines in the documents, as they stand there.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::machine::{Launch, OUR_GUEST};
use crate::{Lab, host};

/// Written by `xtask/src/docs.rs`.
const COMMANDS: &str = "/docs/commands.json";

#[derive(Deserialize)]
struct Documented {
    at: String,
    before: Vec<String>,
    command: String,
    monitor: Vec<Typed>,
    after: Vec<String>,
}

#[derive(Deserialize)]
struct Typed {
    text: String,
    printed: Vec<String>,
}

/// Each starts a machine in which our guest runs, and whose monitor says what it says there.
pub fn run(lab: &Lab) -> Result<()> {
    let commands = fs::read_to_string(COMMANDS).context(COMMANDS)?;
    let commands: Vec<Documented> = serde_json::from_str(&commands)?;
    ensure!(!commands.is_empty(), "the documents have no commands");
    // Some of them want huge pages, or tools.
    let _pool = host::HugePages::reserve(64)?;
    host::install_tools()?;
    for documented in commands {
        println!("  {}: {}", documented.at, documented.command);
        start(lab, &documented).with_context(|| documented.at)?;
    }
    Ok(())
}

fn start(lab: &Lab, documented: &Documented) -> Result<()> {
    let words = documented.command.split_whitespace().skip(1);
    // What stands for the guest's own devices, and a monitor that is ours already.
    let words = words.filter(|word| !["...", "&"].contains(word));
    let arguments: Vec<_> = words.collect();
    let mut launch = Launch::bare(lab)
        .with(&arguments.join(" ").replace("-monitor stdio", ""))
        .with(OUR_GUEST);
    for command in &documented.before {
        launch = launch.before(command);
    }
    let mut machine = launch.start_guest()?;
    for typed in &documented.monitor {
        let said = machine.hmp(&typed.text)?;
        ensure!(
            !said.contains("unknown command") && !said.starts_with("Error"),
            "{}: {said}",
            typed.text
        );
        same_transcript(&typed.printed, &said).with_context(|| typed.text.clone())?;
    }
    for command in &documented.after {
        let status = Command::new("/bin/sh").args(["-ec", command]).status()?;
        ensure!(status.success(), "{command}: {status}");
    }
    machine.finish()
}

/// All that a document shows is printed so, but for how much is held, which depends on the guest.
fn same_transcript(documented: &[String], said: &str) -> Result<()> {
    let stable = |line: &str| match line.trim().split_once(" held ") {
        Some((side, _)) => format!("{side} held"),
        None => line.trim().to_string(),
    };
    let found: Vec<_> = said.lines().map(stable).collect();
    for line in documented {
        ensure!(found.contains(&stable(line)), "no '{line}' in:\n{said}");
    }
    Ok(())
}
