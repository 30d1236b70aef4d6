//! QEMU's command lines in the documents, as they stand there.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::machine::{Launch, OUR_GUEST};
use crate::{Lab, host};

/// Written by `xtask/src/docs.rs`.
const COMMANDS: &str = "/docs/commands.json";

#[derive(Deserialize)]
struct Documented {
    at: String,
    command: String,
    monitor: Vec<String>,
}

/// Each starts a machine in which our guest runs, and whose monitor knows what is typed there.
pub fn run(lab: &Lab) -> Result<()> {
    let commands = fs::read_to_string(COMMANDS).context(COMMANDS)?;
    let commands: Vec<Documented> = serde_json::from_str(&commands)?;
    ensure!(!commands.is_empty(), "the documents have no commands");
    // Some of them want huge pages.
    let _pool = host::HugePages::reserve(64)?;
    for documented in commands {
        println!("  {}: {}", documented.at, documented.command);
        start(lab, &documented).with_context(|| documented.at)?;
    }
    Ok(())
}

fn start(lab: &Lab, documented: &Documented) -> Result<()> {
    let words = documented.command.split_whitespace().skip(1);
    // What stands for the guest's own devices, and a monitor that is ours already.
    let words = words.filter(|word| *word != "...");
    let arguments: Vec<_> = words.collect();
    let mut machine = Launch::bare(lab)
        .with(&arguments.join(" ").replace("-monitor stdio", ""))
        .with(OUR_GUEST)
        .start_guest()?;
    for command in &documented.monitor {
        let said = machine.hmp(command)?;
        ensure!(
            !said.contains("unknown command") && !said.starts_with("Error"),
            "{command}: {said}"
        );
    }
    machine.finish()
}
