//! The documents' own commands and messages: what stands there is what runs.
//!
//! Commands of QEMU run in the lab, all others here. A command that nothing
//! here knows how to run is an error, and so is a message under
//! "Troubleshooting" that no test looks for.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;
use walkdir::WalkDir;

use crate::Context;
use crate::qemu;
use crate::run;
use crate::setup;
use crate::suites::Tally;

const README: &str = "README.md";
const PAGE: &str = "qemu-patches/files/docs/system/private-memory.rst";
const DOCUMENTS: &[&str] = &[README, "qemu-patches/README.md", PAGE];

/// Tests that look for messages.
const TESTS: &[&str] = &["qemu-patches/files/tests", "tests"];

/// A command as a document has it.
#[derive(Debug, PartialEq, Serialize)]
pub struct Documented {
    /// File and line.
    pub at: String,
    pub command: String,
    /// What is typed at the monitor of the machine that it starts.
    pub monitor: Vec<String>,
}

impl Documented {
    fn is_of_qemu(&self) -> bool {
        self.command.starts_with(qemu::SYSTEM)
    }
}

/// Commands for the lab, as JSON.
pub fn for_the_lab(root: &Path) -> Result<String> {
    let mut commands = documented(root)?;
    commands.retain(Documented::is_of_qemu);
    Ok(serde_json::to_string(&commands)?)
}

/// Runs all other commands, and looks for the test of each message.
pub fn suite(cx: &Context) -> Result<Tally> {
    let mut tally = Tally::default();
    let own_tree = qemu::source(cx)?;
    let copy = tempfile::tempdir()?;
    let patched_tree = copy.path().join("qemu");
    let mut copying = Command::new("cp");
    copying.arg("-r").arg(&own_tree).arg(&patched_tree);
    run::step(&cx.cache, "copy QEMU's source", copying)?;
    for documented in documented(&cx.root)? {
        if !documented.is_of_qemu() {
            let name = format!("{}: {}", documented.at, documented.command);
            let tree = match documented.command.starts_with("QEMU_SRC=") {
                true => &own_tree,
                false => &patched_tree,
            };
            tally.check(&name, run_here(cx, &documented.command, tree));
        }
    }
    let tests = test_sources(&cx.root)?;
    let page = fs::read_to_string(cx.root.join(PAGE))?;
    for message in messages(&page) {
        let result = match tests.contains(message) {
            true => Ok(()),
            false => Err(anyhow::anyhow!("no test looks for this message")),
        };
        tally.check(&format!("{PAGE}: {message}"), result);
    }
    Ok(tally.ended("the documents", true))
}

fn documented(root: &Path) -> Result<Vec<Documented>> {
    let mut all = Vec::new();
    for name in DOCUMENTS {
        let text = fs::read_to_string(root.join(name)).with_context(|| (*name).to_owned())?;
        let found = match name.ends_with(".rst") {
            true => commands(name, rst_blocks(&text)),
            false => {
                let blocks = commands(name, fences(&text)).into_iter();
                blocks.chain(table(name, &text)).collect()
            }
        };
        ensure!(!found.is_empty(), "{name} has no commands");
        all.extend(found);
    }
    Ok(all)
}

/// A line of a block of commands. Lines of a transcript begin with a prompt
/// where something is typed.
struct Typed<'a> {
    number: usize,
    text: &'a str,
    transcript: bool,
}

/// The lines of Markdown's blocks for a shell.
fn fences(text: &str) -> Vec<Typed<'_>> {
    let mut kind = None;
    let mut lines = Vec::new();
    for (index, line) in text.lines().enumerate() {
        match (line.trim().strip_prefix("```"), kind) {
            (Some(_), Some(_)) => kind = None,
            (Some(opened), None) => kind = Some(opened),
            (None, Some("sh" | "console")) => lines.push(Typed {
                number: index + 1,
                text: line,
                transcript: kind == Some("console"),
            }),
            _ => {}
        }
    }
    lines
}

/// The lines of reStructuredText's transcripts.
fn rst_blocks(text: &str) -> Vec<Typed<'_>> {
    let mut inside = false;
    let mut lines = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line == ".. code-block:: console" {
            inside = true;
        } else if !line.is_empty() && !line.starts_with(' ') {
            inside = false;
        } else if inside {
            lines.push(Typed {
                number: index + 1,
                text: line.trim_start(),
                transcript: true,
            });
        }
    }
    lines
}

/// Puts lines that go on together, and leaves out what is printed.
fn commands(name: &str, lines: Vec<Typed<'_>>) -> Vec<Documented> {
    let mut found: Vec<Documented> = Vec::new();
    let mut goes_on = false;
    for line in lines {
        let (text, more) = match line.text.trim_end().strip_suffix('\\') {
            Some(text) => (text.trim(), true),
            None => (line.text.trim(), false),
        };
        let typed = match line.transcript {
            true => text.strip_prefix("$ "),
            false => text.split("  #").next().filter(|text| !text.is_empty()),
        };
        if goes_on {
            if let Some(last) = found.last_mut() {
                last.command = format!("{} {text}", last.command);
            }
        } else if let Some(said) = text.strip_prefix("(qemu) ") {
            if let Some(last) = found.last_mut() {
                last.monitor.push(said.to_owned());
            }
        } else if let Some(typed) = typed {
            found.push(Documented {
                at: format!("{name}:{}", line.number),
                command: typed.trim().to_owned(),
                monitor: Vec::new(),
            });
        }
        goes_on = more && (goes_on || typed.is_some());
    }
    found
}

/// The commands that a table describes, one a row.
fn table(name: &str, text: &str) -> Vec<Documented> {
    let rows = text.lines().enumerate().filter_map(|(index, line)| {
        let cell = line.strip_prefix("| `cargo ")?.split('`').next()?;
        Some(Documented {
            at: format!("{name}:{}", index + 1),
            command: format!("cargo {cell}"),
            monitor: Vec::new(),
        })
    });
    rows.collect()
}

/// What is run for a command: itself, with something real in the place of what
/// only stands for it, and no more than needed of what may take long.
fn real(command: &str, qemu_source: &Path) -> Result<String> {
    let options = command.split(" [").next().unwrap_or(command);
    let real = match options {
        // The whole of it is what runs all this.
        "cargo xtask test" | "cargo xtask test --suite NAME" => "cargo xtask test --suite symbols",
        "cargo xtask test --full" => "cargo xtask test --suite checkpatch-10.2",
        // Tests take no times; that it works is tested by the lab's `bench-machines`.
        "cargo xtask bench" => "cargo xtask bench --help",
        // Without a command it waits for somebody at the terminal.
        "cargo xtask lab" => "cargo xtask lab -- true",
        other => other,
    };
    if let Some(words) = real.strip_prefix("meson ") {
        // Not into this machine's own folders.
        let words = words.replace(" build", " target/documented/build");
        return Ok(format!("DESTDIR=$PWD/target/documented meson {words}"));
    }
    let known = real.starts_with("cargo xtask") || real.contains("/path/to/qemu");
    ensure!(known, "there is no way yet to run it from the document");
    Ok(real.replace("/path/to/qemu", &qemu_source.display().to_string()))
}

fn run_here(cx: &Context, command: &str, qemu_source: &Path) -> Result<()> {
    let real = real(command, qemu_source)?;
    let mut shell = Command::new("sh");
    shell.args(["-euc", &real]).current_dir(&cx.root);
    shell.env("PATH", qemu::in_front(&setup::meson(cx)?, "PATH")?);
    let ended = run::attempt(&cx.cache, &format!("document: {real}"), shell)?;
    match ended.success {
        true => Ok(()),
        false => bail!("it failed; the full log is {}", ended.log.display()),
    }
}

/// What a page says that QEMU may say, under its last heading.
fn messages(page: &str) -> impl Iterator<Item = &str> {
    let section = page.split("\nTroubleshooting\n").nth(1).unwrap_or_default();
    section
        .lines()
        .filter_map(|line| line.strip_prefix("``")?.strip_suffix("``"))
}

/// All tests, with strings that go over several lines in one piece.
fn test_sources(root: &Path) -> Result<String> {
    let mut all = String::new();
    for dir in TESTS {
        for entry in WalkDir::new(root.join(dir)) {
            let entry = entry?;
            let extension = entry.path().extension().unwrap_or_default();
            if extension == "c" || extension == "rs" {
                all += &joined(&fs::read_to_string(entry.path())?);
            }
        }
    }
    Ok(all)
}

/// Takes out what stands between two parts of a string.
fn joined(source: &str) -> String {
    let mut out = String::new();
    for line in source.lines().map(str::trim) {
        let after_string = out.ends_with('"') && line.starts_with('"');
        let after_break = out.ends_with('\\');
        if after_string || after_break {
            out.pop();
        } else {
            out.push('\n');
        }
        out += if after_string { &line[1..] } else { line };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(found: &[Documented]) -> Vec<(&str, &[String])> {
        let pairs = found.iter();
        pairs
            .map(|one| (one.command.as_str(), one.monitor.as_slice()))
            .collect()
    }

    #[test]
    fn blocks_hold_commands_and_what_is_typed_at_the_monitor() {
        let text = "```sh\na b  # why\nc \\\n    d\n```\ntext\n```c\nint x;\n```\n\
                    ```console\n$ e\nprinted\n(qemu) info f\n  printed\n```\n";
        let found = commands("d", fences(text));
        assert_eq!(
            told(&found),
            [
                ("a b", &[][..]),
                ("c d", &[]),
                ("e", &["info f".to_owned()])
            ]
        );
        assert_eq!(found[2].at, "d:11");
    }

    #[test]
    fn rst_has_transcripts_and_messages() {
        let text = "Title\n=====\n\n.. code-block:: console\n\n   $ a \\\n         b\n   (qemu) c\n\n\
                    text\n\nTroubleshooting\n---------------\n\n``m n``\n    why\n";
        let found = commands("d", rst_blocks(text));
        assert_eq!(told(&found), [("a b", &["c".to_owned()][..])]);
        assert_eq!(messages(text).collect::<Vec<_>>(), ["m n"]);
    }

    #[test]
    fn strings_over_several_lines_are_found() {
        assert!(joined("f(\"one \"\n   \"two\");").contains("one two"));
        assert!(joined("\"one \\\n   two\"").contains("one two"));
    }

    #[test]
    fn what_cannot_be_run_is_said() -> Result<()> {
        let source = Path::new("/src");
        let run = |command| real(command, source);
        assert_eq!(
            run("cargo xtask qemu [--line 10.2\\|all]")?,
            "cargo xtask qemu"
        );
        assert_eq!(
            run("QEMU_SRC=/path/to/qemu cargo xtask qemu")?,
            "QEMU_SRC=/src cargo xtask qemu"
        );
        assert_eq!(
            run("meson test -C build")?,
            "DESTDIR=$PWD/target/documented meson test -C target/documented/build"
        );
        assert!(run("make coffee").is_err());
        Ok(())
    }
}
