//! Commands, events and properties of QEMU that the documents name, in tables and text as well:
//! each is used by a test that runs QEMU.
//!
//! A name is what stands in a code span. Which names are commands or events is what QEMU's own
//! sources say; `NAME=VALUE` is a property. What our patches add to QEMU's interface counts as
//! named, documented elsewhere or not. A test uses a command where the name begins a string, and a
//! property where a string sets it. That a test does more than that with it is for its reader to
//! judge.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use walkdir::WalkDir;

use crate::docs::{DOCUMENTS, joined};
use crate::suites::Tally;

/// Tests that run QEMU.
const TESTS: &[&str] = &["qemu-patches/files/tests", "tests/lab/driver/src"];

/// What our patches add: commands and events, and properties.
const OUR_COMMANDS: &str = "qapi/private-memory.json";
const OUR_OBJECTS: &[&str] = &[
    "MemoryBackendPrivateProperties",
    "SwProtectedGuestProperties",
];

/// Looks for the test of each name. `tree` is QEMU's source with our patches.
pub fn check(root: &Path, tree: &Path, tally: &mut Tally) -> Result<()> {
    let tests = test_sources(root)?;
    for (name, at) in named(root, tree)? {
        let result = match is_used(&tests, &name) {
            true => Ok(()),
            false => Err(anyhow::anyhow!("no test that runs QEMU uses it")),
        };
        tally.check(&format!("{at}: {name}"), result);
    }
    Ok(())
}

/// All names, each with the first place where it stands.
fn named(root: &Path, tree: &Path) -> Result<BTreeMap<String, String>> {
    let known = Known::of(tree)?;
    let mut all = BTreeMap::new();
    for document in DOCUMENTS {
        let text =
            fs::read_to_string(root.join(document)).with_context(|| (*document).to_owned())?;
        for (number, span) in spans(&text) {
            for name in known.names_in(span) {
                let place = || format!("{document}:{number}");
                all.entry(name).or_insert_with(place);
            }
        }
    }
    let ours = fs::read_to_string(tree.join(OUR_COMMANDS))?;
    for name in definitions(&ours) {
        all.entry(name).or_insert_with(|| OUR_COMMANDS.to_owned());
    }
    let objects = fs::read_to_string(tree.join("qapi/qom.json"))?;
    for object in OUR_OBJECTS {
        let found = members(&objects, object);
        ensure!(!found.is_empty(), "qapi/qom.json has no '{object}'");
        for name in found {
            all.entry(name + "=")
                .or_insert_with(|| (*object).to_owned());
        }
    }
    Ok(all)
}

/// The commands and events that there are; those of the human monitor with "info " where they
/// need it.
struct Known(Vec<String>);

impl Known {
    fn of(tree: &Path) -> Result<Self> {
        let mut all = Vec::new();
        for entry in fs::read_dir(tree.join("qapi"))? {
            let path = entry?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                all.extend(definitions(&fs::read_to_string(path)?));
            }
        }
        for (file, before) in [("hmp-commands.hx", ""), ("hmp-commands-info.hx", "info ")] {
            let text = fs::read_to_string(tree.join(file))?;
            let found = monitor_commands(&text).map(|name| format!("{before}{name}"));
            all.extend(found);
        }
        Ok(Self(all))
    }

    /// What of a span is to be found in a test.
    fn names_in(&self, span: &str) -> Vec<String> {
        let command = self.0.iter().any(|known| is_prefix(known, span));
        if command {
            return vec![span.to_owned()];
        }
        let words = span.split_whitespace().flat_map(|word| word.split(','));
        words.filter_map(property).collect()
    }
}

/// Whether `text` is the name, or begins with it.
fn is_prefix(name: &str, text: &str) -> bool {
    let rest = text.strip_prefix(name);
    rest.is_some_and(|rest| !rest.starts_with(is_of_name))
}

fn is_of_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-_".contains(c)
}

/// `NAME=` of a property that is set; environment variables are in capitals.
fn property(text: &str) -> Option<String> {
    let (name, _) = text.split_once('=')?;
    let is_name =
        name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(is_of_name);
    is_name.then(|| format!("{name}="))
}

/// Code spans, with the numbers of their lines, but for those in blocks.
fn spans(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut inside = false;
    let lines = text.lines().enumerate().filter(move |(_, line)| {
        let fence = line.trim_start().starts_with("```");
        inside ^= fence;
        !inside && !fence
    });
    lines.flat_map(|(index, line)| {
        let mark = if line.contains("``") { "``" } else { "`" };
        let spans = line.split(mark).skip(1).step_by(2);
        spans.map(move |span| (index + 1, span))
    })
}

/// Commands and events of a QAPI schema.
fn definitions(schema: &str) -> Vec<String> {
    let quoted = |line: &str| {
        let rest = line
            .strip_prefix("{ 'command': '")
            .or(line.strip_prefix("{ 'event': '"))?;
        Some(rest.split('\'').next()?.to_owned())
    };
    schema.lines().filter_map(quoted).collect()
}

/// Members of a struct of a QAPI schema.
fn members(schema: &str, name: &str) -> Vec<String> {
    let start = format!("{{ 'struct': '{name}'");
    let own = schema.split(&start).nth(1).unwrap_or_default();
    let own = own.split("\n\n").next().unwrap_or_default();
    let optional = own.split("'*").skip(1);
    optional
        .filter_map(|rest| Some(rest.split('\'').next()?.to_owned()))
        .collect()
}

/// Commands of a table of the human monitor.
fn monitor_commands(table: &str) -> impl Iterator<Item = &str> {
    let names = table.lines().filter_map(|line| {
        let value = line
            .trim()
            .strip_prefix(".name")?
            .trim_start()
            .strip_prefix('=')?;
        value.split('"').nth(1)
    });
    names.flat_map(|names| names.split(['|', ',']))
}

/// All tests but for their comments, with strings that go over several lines in one piece.
fn test_sources(root: &Path) -> Result<String> {
    let mut all = String::new();
    for dir in TESTS {
        for entry in WalkDir::new(root.join(dir)) {
            let entry = entry?;
            let extension = entry.path().extension().unwrap_or_default();
            if ["c", "rs", "py"].iter().any(|known| extension == *known) {
                all += &joined(&without_comments(&fs::read_to_string(entry.path())?));
            }
        }
    }
    Ok(all)
}

/// Without lines that begin as comments do.
fn without_comments(source: &str) -> String {
    let is_comment = |line: &str| {
        let line = line.trim_start();
        let starts = ["//", "/*", "* ", "*/", "# "];
        starts.iter().any(|start| line.starts_with(start)) || line == "*"
    };
    let lines = source.lines().filter(|line| !is_comment(line));
    lines.flat_map(|line| [line, "\n"]).collect()
}

/// Whether a string of a test begins with `name`, or sets it if it is a property.
fn is_used(tests: &str, name: &str) -> bool {
    if let Some(property) = name.strip_suffix('=') {
        let set = tests
            .match_indices(name)
            .any(|(at, _)| !tests[..at].ends_with(is_of_name));
        let as_json = |quote: char| tests.contains(&format!("{quote}{property}{quote}: "));
        return set || as_json('\'') || as_json('"');
    }
    ['\'', '"'].iter().any(|quote| {
        let begun = format!("{quote}{name}");
        let mut ends = tests
            .match_indices(&begun)
            .map(|(at, _)| &tests[at + begun.len()..]);
        ends.any(|end| !end.starts_with(is_of_name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_qemu_and_properties() {
        let known = Known(vec!["query-a".to_owned(), "info b".to_owned()]);
        for (span, names) in [
            ("query-a", &["query-a"][..]),
            ("query-ab", &[]),
            ("info b c", &["info b c"]),
            ("info", &[]),
            ("-object d,id=e,f-g=on|off", &["id=", "f-g="]),
            ("KERNEL_SRC=", &[]),
            ("a sentence", &[]),
        ] {
            assert_eq!(known.names_in(span), names, "{span}");
        }
    }

    #[test]
    fn spans_stand_in_text_and_tables() {
        let text = "a `b` | `c d` |\n```sh\n`e`\n```\n``f`` g\n";
        let found: Vec<_> = spans(text).collect();
        assert_eq!(found, [(1, "b"), (1, "c d"), (5, "f")]);
    }

    #[test]
    fn what_qemu_has_is_read_from_its_sources() {
        let schema = "{ 'struct': 'S',\n  'data': { '*a': 'bool',\n            '*b-c': 'str' } }\n\n\
                      { 'struct': 'T',\n  'data': { '*d': 'bool' } }\n\n\
                      { 'command': 'query-a',\n { 'event': 'NO' }\n{ 'event': 'E' }\n";
        assert_eq!(members(schema, "S"), ["a", "b-c"]);
        assert_eq!(definitions(schema), ["query-a", "E"]);
        let table = "    {\n        .name       = \"q|quit\",\n        .help = \"x\",\n";
        assert_eq!(monitor_commands(table).collect::<Vec<_>>(), ["q", "quit"]);
    }

    #[test]
    fn a_test_uses_what_it_runs_and_not_what_it_tells_of() {
        let tests = without_comments(
            "/* runs 'query-a' */\n// \"query-a\"\n * 'query-a'\nrun(\"info b 1\");\n\
             say(\"no query-a\");\nset(\"x,d=on\");\nadd(\"'e': 1\");\n",
        );
        for (name, expected) in [
            ("query-a", false),
            ("info b", true),
            ("info b 1", true),
            ("info b 2", false),
            ("info", true),
            ("inf", false),
            ("d=", true),
            ("e=", true),
            ("f=", false),
        ] {
            assert_eq!(is_used(&tests, name), expected, "{name}");
        }
    }
}
