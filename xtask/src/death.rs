//! The lab's outer machine dies on purpose, and the reason must be named.

use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::Context;
use crate::lab::Lab;
use crate::run::Progress;
use crate::suites::Tally;

/// Reaching it has another reason than those that are looked for.
const LIMIT: Duration = Duration::from_secs(5 * 60);

/// Tests of the driver that end the machine, and what the reason must have. They
/// are in `tests/lab/driver/src/death.rs`.
const DEATHS: &[(&str, &[&str])] = &[
    (
        "lab-oops",
        &[
            "the lab's kernel died while lab-oops ran, for ",
            "BUG: kernel NULL pointer dereference",
            "RIP: 0010:lkdtm_EXCEPTION",
            "Call Trace:",
            "Kernel panic - not syncing",
        ],
    ),
    (
        "lab-resets",
        &[
            "the lab ended before it was done while lab-resets ran, for ",
            "reboot: Restarting system",
        ],
    ),
];

pub fn is_one(test: &str) -> bool {
    DEATHS.iter().any(|(name, _)| *name == test)
}

/// Runs those of the names, or all if there are none.
pub fn suite(cx: &Context, lab: &Lab, names: &[String]) -> Result<Tally> {
    let mut tally = Tally::default();
    for (name, reason) in DEATHS {
        if names.is_empty() || names.iter().any(|named| named == name) {
            let progress = Progress::start(name);
            tally.check(name, dies(cx, lab, name, reason));
            progress.finish();
            tally = tally.with_log(&lab.log(cx, name)?);
        }
    }
    Ok(tally)
}

fn dies(cx: &Context, lab: &Lab, name: &str, reason: &[&str]) -> Result<()> {
    let options = format!("lab.run={name}");
    let Err(error) = lab.boot(cx, name, &options, LIMIT, |_| {}) else {
        bail!("the lab came to its end");
    };
    let error = format!("{error:#}");
    for part in reason {
        ensure!(error.contains(part), "the reason lacks '{part}': {error}");
    }
    Ok(())
}
