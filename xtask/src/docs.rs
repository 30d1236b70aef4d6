//! The documents' own commands and messages: what stands there is what runs,
//! and what is shown is what is printed.
//!
//! Commands of QEMU, and what a block does around them, run in the lab, those
//! that need no KVM here as well; virsh and systemd where the machine has them
//! or gets them; all others here. A command that nothing here knows how to run
//! is an error, and so is a message under "Troubleshooting" that no test looks
//! for, and a command, event or property that no test uses (`named.rs`).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use walkdir::WalkDir;

use crate::Context;
use crate::named;
use crate::qemu;
use crate::recipes;
use crate::run;
use crate::setup;
use crate::suites::Tally;

const README: &str = "README.md";
const PAGE: &str = "qemu-patches/files/docs/system/private-memory.rst";
pub const DOCUMENTS: &[&str] = &[
    README,
    "qemu-patches/README.md",
    "tests/lab/README.md",
    "benches/README.md",
    PAGE,
];

/// With what it prints, cargo finds all crates where it put them.
const VENDOR: &str = "mkdir -p target/documented/.cargo; cd target/documented; \
    cargo vendor --locked vendor > .cargo/config.toml; \
    cargo metadata --offline --locked --format-version=1 > vendor.json";

/// As many rounds as the documents show, but short ones; the user's own soak stays what it is.
const SOAK: &str = "cargo xtask soak --fresh --requests 10000 --round 5000 \
    --state target/documented/soak.json";

/// Tests that look for messages.
const TESTS: &[&str] = &["qemu-patches/files/tests", "tests"];

/// A command as a document has it.
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct Documented {
    /// File and line.
    pub at: String,
    /// What the block has a shell do before it starts QEMU.
    pub before: Vec<String>,
    pub command: String,
    pub printed: Vec<String>,
    /// What is typed at the monitor of the machine that it starts.
    pub monitor: Vec<Typed>,
    /// What the block has a shell do while QEMU runs.
    pub after: Vec<String>,
}

#[derive(Debug, Default, PartialEq, Serialize)]
pub struct Typed {
    pub text: String,
    pub printed: Vec<String>,
}

impl Documented {
    fn is_of_qemu(&self) -> bool {
        self.command.starts_with(qemu::SYSTEM)
    }

    /// Whether a host needs no KVM to see what it shows.
    fn runs_anywhere(&self) -> bool {
        self.command.contains("-accel tcg") && !self.monitor.is_empty()
    }

    fn is_of_virsh(&self) -> bool {
        self.command.starts_with(recipes::VIRSH)
    }

    fn output(&mut self) -> &mut Vec<String> {
        match self.monitor.last_mut() {
            Some(typed) => &mut typed.printed,
            None => &mut self.printed,
        }
    }
}

/// Commands for the lab, as JSON.
pub fn for_the_lab(root: &Path) -> Result<String> {
    let mut commands = documented(root)?;
    commands.retain(Documented::is_of_qemu);
    commands.push(recipes::service(&page(root)?)?);
    Ok(serde_json::to_string(&commands)?)
}

fn page(root: &Path) -> Result<String> {
    fs::read_to_string(root.join(PAGE)).context(PAGE)
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
    let commands = documented(&cx.root)?.into_iter();
    let (of_qemu, others): (Vec<_>, Vec<_>) = commands.partition(Documented::is_of_qemu);
    let transcripts = of_qemu.into_iter().filter(Documented::runs_anywhere);
    let (virsh, here): (Vec<_>, Vec<_>) = others.into_iter().partition(Documented::is_of_virsh);
    for (real, documented) in once_each(&here, &own_tree, &patched_tree, &mut tally) {
        let name = format!("{}: {}", documented.at, documented.command);
        let ran = run_here(cx, &documented.at, &real, &documented.printed);
        tally.check(&name, ran);
    }
    let system = {
        let _guard = cx.cache.lock()?;
        qemu::build_any(cx, None, &[qemu::SYSTEM], &[])?.system()
    };
    for documented in transcripts {
        let name = format!("{}: {}", documented.at, documented.command);
        tally.check(&name, run_monitor(cx, &system, &documented));
    }
    let page = page(&cx.root)?;
    recipes::check(cx, PAGE, &page, &virsh, &mut tally)?;
    let tests = test_sources(&cx.root)?;
    for message in messages(&page) {
        let result = match tests.contains(message) {
            true => Ok(()),
            false => Err(anyhow::anyhow!("no test looks for this message")),
        };
        tally.check(&format!("{PAGE}: {message}"), result);
    }
    named::check(&cx.root, &patched_tree, &mut tally)?;
    Ok(tally.ended("the documents", true))
}

/// What is really run, with the first place where it stands; the one that shows
/// what is printed, if there is one.
fn once_each<'a>(
    all: &'a [Documented],
    own_tree: &Path,
    patched_tree: &Path,
    tally: &mut Tally,
) -> Vec<(String, &'a Documented)> {
    let mut chosen: Vec<(String, &Documented)> = Vec::new();
    let mut places = BTreeMap::new();
    for documented in all {
        let tree = match documented.command.starts_with("QEMU_SRC=") {
            true => own_tree,
            false => patched_tree,
        };
        match real(&documented.command, tree) {
            Err(error) => {
                let name = format!("{}: {}", documented.at, documented.command);
                tally.check(&name, Err(error));
            }
            Ok(real) => match places.get(&real) {
                None => {
                    places.insert(real.clone(), chosen.len());
                    chosen.push((real, documented));
                }
                Some(&place) if !documented.printed.is_empty() => chosen[place].1 = documented,
                Some(_) => {}
            },
        }
    }
    chosen
}

fn documented(root: &Path) -> Result<Vec<Documented>> {
    let mut all = Vec::new();
    for name in DOCUMENTS {
        let text = fs::read_to_string(root.join(name)).with_context(|| (*name).to_owned())?;
        let (blocks, spans) = match name.ends_with(".rst") {
            true => (rst_blocks(&text), Vec::new()),
            false => (fences(&text), spans(name, &text)),
        };
        let blocks = blocks.iter().flat_map(|block| commands(name, block));
        let found: Vec<_> = blocks.chain(spans).collect();
        ensure!(!found.is_empty(), "{name} has no commands");
        all.extend(found);
    }
    Ok(all)
}

/// A block of a document in another language.
pub struct Block<'a> {
    pub language: &'a str,
    /// With their numbers in the document.
    pub lines: Vec<(usize, &'a str)>,
}

/// Markdown's blocks.
fn fences(text: &str) -> Vec<Block<'_>> {
    let mut blocks = Vec::new();
    let mut inside = false;
    for (index, line) in text.lines().enumerate() {
        match (line.trim().strip_prefix("```"), inside) {
            (Some(language), false) => {
                let lines = Vec::new();
                blocks.push(Block { language, lines });
                inside = true;
            }
            (Some(_), true) => inside = false,
            (None, true) => add_line(&mut blocks, index, line),
            (None, false) => {}
        }
    }
    blocks
}

/// reStructuredText's blocks.
pub fn rst_blocks(text: &str) -> Vec<Block<'_>> {
    let mut blocks = Vec::new();
    let mut inside = false;
    for (index, line) in text.lines().enumerate() {
        if let Some(language) = line.strip_prefix(".. code-block:: ") {
            let lines = Vec::new();
            blocks.push(Block { language, lines });
            inside = true;
        } else if !line.is_empty() && !line.starts_with(' ') {
            inside = false;
        } else if inside {
            add_line(&mut blocks, index, line);
        }
    }
    blocks
}

fn add_line<'a>(blocks: &mut [Block<'a>], index: usize, line: &'a str) {
    if let Some(block) = blocks.last_mut() {
        block.lines.push((index + 1, line));
    }
}

/// The commands of a block for a shell. Lines of a transcript begin with a
/// prompt where something is typed; the others are what is printed.
fn commands(name: &str, block: &Block<'_>) -> Vec<Documented> {
    let transcript = match block.language {
        "console" => true,
        "sh" => false,
        _ => return Vec::new(),
    };
    let mut found: Vec<Documented> = Vec::new();
    let mut goes_on = false;
    for (number, line) in &block.lines {
        let (text, more) = match line.trim_end().strip_suffix('\\') {
            Some(text) => (text.trim(), true),
            None => (line.trim(), false),
        };
        let typed = match transcript {
            true => text.strip_prefix("$ "),
            false => text.split("  #").next().filter(|text| !text.is_empty()),
        };
        match (found.last_mut(), text.strip_prefix("(qemu) "), typed) {
            (Some(last), _, _) if goes_on => last.command = format!("{} {text}", last.command),
            (Some(last), Some(said), _) => last.monitor.push(Typed {
                text: said.to_owned(),
                ..Typed::default()
            }),
            (_, _, Some(typed)) => found.push(Documented {
                at: format!("{name}:{number}"),
                command: typed.trim().to_owned(),
                ..Documented::default()
            }),
            (Some(last), _, None) if !text.is_empty() => last.output().push(text.to_owned()),
            _ => {}
        }
        goes_on = more && (goes_on || typed.is_some());
    }
    around_qemu(found)
}

/// What stands in a block before and after QEMU's command belongs to it.
fn around_qemu(mut found: Vec<Documented>) -> Vec<Documented> {
    let Some(at) = found.iter().position(Documented::is_of_qemu) else {
        return found;
    };
    let texts = |all: Vec<Documented>| all.into_iter().map(|one| one.command).collect();
    let after = found.split_off(at + 1);
    let mut qemu = found.split_off(at);
    if let [qemu] = qemu.as_mut_slice() {
        qemu.before = texts(found);
        qemu.after = texts(after);
    }
    qemu
}

/// Commands of cargo within Markdown's text and tables.
fn spans(name: &str, text: &str) -> Vec<Documented> {
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let spans = line.split('`').skip(1).step_by(2);
        for span in spans.filter(|span| span.starts_with("cargo ") || span.contains(" cargo ")) {
            found.push(Documented {
                at: format!("{name}:{}", index + 1),
                command: span.to_owned(),
                ..Documented::default()
            });
        }
    }
    found
}

/// What is run for a command: itself, with something real in the place of what
/// only stands for it, and no more than needed of what may take long.
fn real(command: &str, qemu_source: &Path) -> Result<String> {
    let options = command.split(" [").next().unwrap_or(command);
    let real = match options {
        // The whole of it, and this suite, is what runs all this.
        "cargo xtask test" | "cargo xtask test --suite NAME" | "cargo xtask test --suite docs" => {
            "cargo xtask test --suite symbols".to_owned()
        }
        "cargo xtask test --repeat N" => "cargo xtask test --suite symbols --repeat 2".to_owned(),
        "cargo xtask demo --repeat N" => "cargo xtask demo --repeat 2".to_owned(),
        full if full.starts_with("cargo xtask test --full") => {
            full.replace("--full", "--suite checkpatch-10.2 --suite checkpatch-10.0")
        }
        lab if lab.starts_with("cargo xtask test --suite lab-") && !lab.contains("--lab-test ") => {
            format!("{lab} --lab-test capabilities")
        }
        // That it works; the times themselves, and a guest in the lab, are for who asks.
        bench if bench.starts_with("cargo xtask bench") => {
            "cargo xtask bench --only tracking".to_owned()
        }
        "cargo xtask fuzz" => "cargo xtask fuzz --help".to_owned(),
        soak if soak.starts_with("cargo xtask soak") => SOAK.to_owned(),
        // Without a command it waits for somebody at the terminal.
        "cargo xtask lab" | "cargo xtask lab -- COMMAND" => "cargo xtask lab -- true".to_owned(),
        "cargo vendor" => VENDOR.to_owned(),
        other => other.to_owned(),
    };
    if let Some(words) = real.strip_prefix("meson ") {
        // Not into this machine's own folders.
        let words = words.replace(" build", " target/documented/build");
        return Ok(format!("DESTDIR=$PWD/target/documented meson {words}"));
    }
    let known = real.contains("cargo ") || real.contains("/path/to/qemu");
    ensure!(known, "there is no way yet to run it from the document");
    Ok(real.replace("/path/to/qemu", &qemu_source.display().to_string()))
}

fn run_here(cx: &Context, at: &str, real: &str, printed: &[String]) -> Result<()> {
    let mut shell = Command::new("sh");
    shell.args(["-euc", real]).current_dir(&cx.root);
    shell.env("PATH", qemu::in_front(&setup::meson(cx)?, "PATH")?);
    // It becomes the log's name, too.
    let label: String = format!("{at}: {real}").chars().take(120).collect();
    let ended = run::attempt(&cx.cache, &label, shell)?;
    ensure!(
        ended.success,
        "it failed; the full log is {}",
        ended.log.display()
    );
    same_transcript(printed, &fs::read_to_string(&ended.log)?)
        .with_context(|| format!("the full log is {}", ended.log.display()))
}

/// Types what a document has typed at the monitor of the QEMU that `cargo xtask
/// qemu` makes, without the lab's firmware and devices.
fn run_monitor(cx: &Context, system: &Path, documented: &Documented) -> Result<()> {
    let typed = documented.monitor.iter().map(|typed| typed.text.as_str());
    let typed: Vec<_> = typed.chain(["quit"]).collect();
    let command = documented.command.replace(" ...", "");
    let command = command.replacen(qemu::SYSTEM, &system.display().to_string(), 1);
    let printed = documented.monitor.iter().flat_map(|typed| &typed.printed);
    let printed: Vec<_> = printed.cloned().collect();
    run_here(
        cx,
        &documented.at,
        &format!("printf '{}\\n' | {command}", typed.join("\\n")),
        &printed,
    )
}

/// All that a document shows is printed, in its order, but for figures.
fn same_transcript(documented: &[String], said: &str) -> Result<()> {
    let mut found = said.lines().map(without_figures);
    for line in documented {
        let expected = without_figures(line);
        ensure!(
            found.any(|found| found == expected),
            "it does not print, or not in this order: {line}"
        );
    }
    Ok(())
}

/// Words with digits in them, and the units after them, are no part of what
/// must be the same.
fn without_figures(line: &str) -> String {
    const UNITS: &[&str] = &["B", "KiB", "MiB", "GiB"];
    let figure = |word: &str| word.contains(|c: char| c.is_ascii_digit());
    let words = line.split_whitespace().filter(|word| !UNITS.contains(word));
    let words = words.map(|word| if figure(word) { "N" } else { word });
    words.collect::<Vec<_>>().join(" ")
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
pub fn joined(source: &str) -> String {
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

    fn found(blocks: &[Block]) -> Vec<Documented> {
        let found = blocks.iter().flat_map(|block| commands("d", block));
        found.collect()
    }

    fn texts(found: &[Documented]) -> Vec<&str> {
        found.iter().map(|one| one.command.as_str()).collect()
    }

    #[test]
    fn blocks_hold_commands_and_what_is_typed_and_printed() {
        let text = "```sh\na b  # why\nc \\\n    d\n```\ntext\n```c\nint x;\n```\n\
                    ```console\n$ e\none\n(qemu) info f\n  two\n```\n";
        let found = found(&fences(text));
        assert_eq!(texts(&found), ["a b", "c d", "e"]);
        assert_eq!(found[2].at, "d:11");
        assert_eq!(found[2].printed, ["one"]);
        assert_eq!(found[2].monitor[0].text, "info f");
        assert_eq!(found[2].monitor[0].printed, ["two"]);
    }

    #[test]
    fn rst_has_transcripts_and_messages() {
        let text = "Title\n=====\n\n.. code-block:: console\n\n   $ a \\\n         b\n   (qemu) c\n\n\
                    text\n\nTroubleshooting\n---------------\n\n``m n``\n    why\n";
        let found = found(&rst_blocks(text));
        assert_eq!(texts(&found), ["a b"]);
        assert_eq!(found[0].monitor[0].text, "c");
        assert_eq!(messages(text).collect::<Vec<_>>(), ["m n"]);
    }

    #[test]
    fn a_block_is_one_command_of_qemu_with_what_is_around_it() {
        let text = "```console\n$ mkdir a\n$ qemu-system-x86_64 ... &\n$ cat a\n```\n";
        let found = found(&fences(text));
        assert_eq!(texts(&found), ["qemu-system-x86_64 ... &"]);
        assert_eq!(found[0].before, ["mkdir a"]);
        assert_eq!(found[0].after, ["cat a"]);
    }

    #[test]
    fn text_and_tables_name_commands_of_cargo() {
        let found = spans("d", "a `x` and `cargo b`,\n| `A=c cargo d [e\\|f]` | g |\n");
        assert_eq!(texts(&found), ["cargo b", "A=c cargo d [e\\|f]"]);
        assert_eq!(found[1].at, "d:2");
    }

    #[test]
    fn transcripts_are_the_same_but_for_figures() {
        let shown = ["a 1.5 MiB b", "[..#]"].map(str::to_owned);
        assert!(same_transcript(&shown, "z\na 16 KiB b\n\n [..#]\n").is_ok());
        assert!(same_transcript(&shown, "[..#]\na 16 KiB b\n").is_err());
        assert!(same_transcript(&shown, "a 16 KiB c\n[..#]\n").is_err());
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
        assert_eq!(
            run("cargo xtask test --suite lab-10.2")?,
            "cargo xtask test --suite lab-10.2 --lab-test capabilities"
        );
        assert_eq!(
            run("cargo xtask soak --requests 1000000")?,
            run("cargo xtask soak [--line L]")?
        );
        let one = "cargo xtask test --suite lab-10.2 --lab-test accounting";
        assert_eq!(run(one)?, one);
        assert!(run("make coffee").is_err());
        Ok(())
    }
}
