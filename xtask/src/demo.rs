//! `cargo xtask demo`: private memory on a real kernel, and what it proved.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Map, Value};

use crate::lab::{self, Lab};
use crate::protocol::{Event, Verdict};
use crate::repeat::{self, Round};
use crate::run::Progress;
use crate::suites::{self, Tally};
use crate::{BootArgs, Context};

/// Fewer conversions by the guest would prove little.
const CONVERSIONS: u64 = 1000;
/// How many secrets the private Linux has.
const SECRETS: u64 = 64;

/// What the log of a boot is called.
const LOG: &str = "demo";

pub fn run(cx: &Context, boot: &BootArgs, json: bool, repeat: u32) -> Result<ExitCode> {
    let lab = Lab::prepare(cx, boot.line)?;
    if repeat > 1 {
        let log = lab.log(cx, LOG)?;
        return Ok(repeat::rounds(repeat, |round| {
            run_round(cx, &lab, boot.limit(), round).with_log(&log)
        }));
    }
    let (mut demo, problems) = show(cx, &lab, boot.limit(), |line| match json {
        true => eprintln!("{line}"),
        false => println!("{line}"),
    });
    if !demo.is_empty() {
        demo.insert("seconds".to_owned(), seconds(cx).into());
        if json {
            println!("{}", serde_json::to_string(&demo)?);
        } else if problems.is_empty() {
            println!("demo: all of it as it should be, in {} s", demo["seconds"]);
        }
    }
    Ok(lab::verdict(&problems))
}

/// One of several demos, as one test.
fn run_round(cx: &Context, lab: &Lab, limit: Duration, round: Round) -> Tally {
    let started = Instant::now();
    let progress = Progress::start("demo");
    let (_, problems) = show(cx, lab, limit, |line| progress.line(line));
    progress.finish();
    let tally = match problems.as_slice() {
        [] => Tally::pass(),
        _ => Tally::fail(format!("demo: {}", problems.join("; "))),
    };
    suites::report(round, "demo", &tally, started.elapsed());
    tally
}

/// Boots the lab for a demo. Returns what the demo measured, and every problem.
fn show(
    cx: &Context,
    lab: &Lab,
    limit: Duration,
    mut on_log: impl FnMut(&str),
) -> (Map<String, Value>, Vec<String>) {
    let mut demo = Map::new();
    let mut problems = Vec::new();
    let boot = lab.boot(cx, LOG, "lab.run=demo", limit, |event| match event {
        Event::Log(line) => on_log(&line),
        Event::Demo(part) => demo.extend(part),
        Event::Error(error) => problems.push(error),
        Event::Test(test) if test.result == Verdict::Failed => {
            problems.push(format!("{}: {}", test.name, test.why));
        }
        Event::Begin(_)
        | Event::Test(_)
        | Event::Bench(_)
        | Event::Soak(_)
        | Event::Exit(_)
        | Event::Done => {}
    });
    problems.extend(boot.err().map(|error| format!("{error:#}")));
    match demo.is_empty() {
        true => problems.push("the lab reported no demo".to_owned()),
        false => problems.extend(shortcomings(&demo)),
    }
    (demo, problems)
}

fn seconds(cx: &Context) -> f64 {
    (cx.started.elapsed().as_secs_f64() * 10.0).round() / 10.0
}

/// Every way in which a demo falls short of what it is to show.
fn shortcomings(demo: &Map<String, Value>) -> Vec<String> {
    let number = |key: &str| demo.get(key).and_then(Value::as_u64);
    let flag = |key: &str| demo.get(key).and_then(Value::as_bool);
    let slots = demo.get("memslots").and_then(Value::as_array);
    let checks = [
        (
            number("conversions") >= Some(CONVERSIONS),
            "fewer than 1000 conversions",
        ),
        (number("failed") == Some(0), "conversions failed"),
        (
            number("content_errors") == Some(0),
            "a page had wrong contents",
        ),
        (
            number("held_twice_bytes") == Some(0),
            "memory is held on both sides",
        ),
        (
            flag("host_read_private") == Some(false),
            "the host could read private memory",
        ),
        (
            flag("host_read_shared") == Some(true),
            "the host could not read shared memory",
        ),
        (
            slots.is_some_and(|slots| !slots.is_empty()),
            "no private memslot was seen",
        ),
        (demo.contains_key("kernel"), "the kernel is not named"),
        (demo.contains_key("vm_type"), "the VM type is not named"),
    ];
    failing(checks)
        .chain(shortcomings_of_linux(demo.get("linux")))
        .collect()
}

/// Those of the private Linux, which a kernel of the user's own need not have.
fn shortcomings_of_linux(linux: Option<&Value>) -> Vec<String> {
    let Some(Value::Object(linux)) = linux else {
        return vec!["nothing is told of a Linux with private RAM".to_owned()];
    };
    if linux.contains_key("skipped") {
        return Vec::new();
    }
    let number = |key: &str| linux.get(key).and_then(Value::as_u64);
    let works = |key: &str| linux.get(key).and_then(Value::as_str) == Some("ok");
    let percent = linux.get("private_percent").and_then(Value::as_f64);
    failing([
        (
            percent > Some(95.0),
            "95 % of Linux's RAM or less are private",
        ),
        (
            number("held_twice_bytes") == Some(0),
            "memory of Linux is held on both sides",
        ),
        (works("disk"), "Linux's disk does not work"),
        (works("network"), "Linux's network does not work"),
        (
            number("secrets_found") == Some(0),
            "the host found secrets of Linux",
        ),
        (
            number("control_found") == Some(SECRETS),
            "the search does not find all secrets where there is no private memory",
        ),
    ])
    .collect()
}

fn failing<const N: usize>(checks: [(bool, &str); N]) -> impl Iterator<Item = String> {
    let failing = checks.into_iter().filter(|(holds, _)| !holds);
    failing.map(|(_, problem)| problem.to_owned())
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    fn sample() -> Result<Map<String, Value>> {
        let demo = serde_json::json!({
            "kernel": "7.3.4", "vm_type": 1, "conversions": 1200, "failed": 0, "content_errors": 0,
            "held_twice_bytes": 0, "host_read_private": false, "host_read_shared": true,
            "memslots": [{"slot": 0, "guest_memfd": 9}],
            "linux": {
                "private_percent": 96.7, "held_twice_bytes": 0, "disk": "ok", "network": "ok",
                "secrets_found": 0, "control_found": 64,
            },
        });
        demo.as_object().cloned().context("it is an object")
    }

    #[test]
    fn a_demo_must_show_everything() -> Result<()> {
        assert_eq!(shortcomings(&sample()?), Vec::<String>::new());
        for key in sample()?.keys() {
            let mut demo = sample()?;
            demo.remove(key);
            assert_eq!(shortcomings(&demo).len(), 1, "without {key}");
        }
        let mut demo = sample()?;
        demo.insert("host_read_private".into(), true.into());
        assert_eq!(shortcomings(&demo), ["the host could read private memory"]);
        Ok(())
    }

    #[test]
    fn so_must_its_linux_unless_there_is_none() -> Result<()> {
        let sample = sample()?;
        let linux = sample["linux"].as_object().context("it is an object")?;
        for key in linux.keys() {
            let mut linux = linux.clone();
            linux.remove(key);
            let linux = linux.into();
            assert_eq!(
                shortcomings_of_linux(Some(&linux)).len(),
                1,
                "without {key}"
            );
        }
        let skipped = serde_json::json!({"skipped": "no driver"});
        assert_eq!(shortcomings_of_linux(Some(&skipped)), Vec::<String>::new());
        Ok(())
    }
}
