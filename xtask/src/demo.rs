//! `cargo xtask demo`: private memory on a real kernel, and what it proved.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Map, Value};

use crate::Context;
use crate::lab::{self, Lab};
use crate::protocol::{Event, Verdict};
use crate::qemu::Line;

/// Fewer conversions by the guest would prove little.
const CONVERSIONS: u64 = 1000;

pub fn run(cx: &Context, line: Option<Line>, limit: Duration, json: bool) -> Result<ExitCode> {
    let lab = Lab::prepare(cx, line)?;
    let mut demo = None;
    let mut problems = Vec::new();
    let boot = lab.boot(cx, "demo", "lab.run=demo", limit, |event| match event {
        Event::Log(line) if json => eprintln!("{line}"),
        Event::Log(line) => println!("{line}"),
        Event::Demo(object) => demo = Some(object),
        Event::Error(error) => problems.push(error),
        Event::Test(test) if test.result == Verdict::Failed => {
            problems.push(format!("{}: {}", test.name, test.why));
        }
        Event::Test(_) | Event::Bench(_) | Event::Exit(_) | Event::Done => {}
    });
    problems.extend(boot.err().map(|error| format!("{error:#}")));
    match demo {
        None => problems.push("the lab reported no demo".to_owned()),
        Some(mut demo) => {
            demo.insert("seconds".to_owned(), seconds(cx).into());
            problems.extend(shortcomings(&demo));
            if json {
                println!("{}", serde_json::to_string(&demo)?);
            } else if problems.is_empty() {
                println!("demo: all of it as it should be, in {} s", demo["seconds"]);
            }
        }
    }
    Ok(lab::verdict(&problems))
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
    checks
        .into_iter()
        .filter(|(holds, _)| !holds)
        .map(|(_, problem)| problem.to_owned())
        .collect()
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
}
