//! What libprivmem.a puts into a program that links it: names of ours and of
//! Rust's own, nothing else; and all that the header promises.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use object::read::archive::ArchiveFile;
use object::{Object as _, ObjectSymbol as _};

use crate::Context;
use crate::library;
use crate::run;
use crate::suites::Tally;

/// How Rust names its symbols: mangled (two schemes), and the runtime's own.
const RUSTS_OWN: &[&str] = &["_R", "_ZN", "rust_", "__rust", "_rust_", "DW.ref.rust_"];

pub fn suite(cx: &Context) -> Result<Tally> {
    let symbols = globals(&library::build(cx)?, &standard_library()?)?;
    let header = fs::read_to_string(cx.root.join("include/privmem.h"))?;
    let mut tally = Tally::default();
    let strays = symbols.iter().filter(|name| !expected(name));
    tally.check("no global symbol but ours", none("defined", strays));
    let promised = declared(&header);
    let missing = promised.iter().filter(|name| !symbols.contains(*name));
    tally.check("all that the header declares", none("not defined", missing));
    let unknown = symbols
        .iter()
        .filter(|name| name.starts_with("privmem_") && !promised.contains(*name));
    tally.check("nothing that it does not", none("not declared", unknown));
    Ok(tally)
}

/// Fails if a program that links the library has code of that crate in it: of
/// kvm-bindings only the layouts may be used, because of its licence.
pub fn without(program: &Path, krate: &str) -> Result<()> {
    let data = fs::read(program)?;
    let object = object::File::parse(data.as_slice())?;
    let mut names = Vec::new();
    for symbol in object.symbols() {
        names.push(symbol.name()?.to_owned());
    }
    if !names.iter().any(|name| name.contains("privmem")) {
        bail!("{} has no symbols to look at", program.display());
    }
    none("linked", names.iter().filter(|name| name.contains(krate)))
}

fn none<'a>(what: &str, names: impl Iterator<Item = &'a String>) -> Result<()> {
    let names: Vec<&str> = names.map(String::as_str).collect();
    if names.is_empty() {
        return Ok(());
    }
    bail!("{what}: {}", names.join(" "))
}

fn expected(name: &str) -> bool {
    // Constants without a name that LLVM shares between objects; a digest of
    // their crate is in the name.
    let shared_constant = name.starts_with("anon.") && name.contains(".llvm.");
    let rusts_own = RUSTS_OWN.iter().any(|start| name.starts_with(start));
    name.starts_with("privmem_") || rusts_own || shared_constant
}

/// The global symbols that an archive defines, but for the objects that the
/// toolchain brings, such as compiler-builtins.
fn globals(archive: &Path, toolchain: &BTreeSet<Vec<u8>>) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    let data = fs::read(archive)?;
    for member in ArchiveFile::parse(data.as_slice())?.members() {
        let member = member?;
        if toolchain.contains(member.name()) {
            continue;
        }
        let object = object::File::parse(member.data(data.as_slice())?)
            .with_context(|| String::from_utf8_lossy(member.name()).into_owned())?;
        let global = object
            .symbols()
            .filter(|symbol| symbol.is_global() && symbol.is_definition());
        for symbol in global {
            names.insert(symbol.name()?.to_owned());
        }
    }
    Ok(names)
}

/// The names of the objects that the toolchain's own libraries consist of.
fn standard_library() -> Result<BTreeSet<Vec<u8>>> {
    let libraries = run::ask(library::rustc().args(["--print", "target-libdir"]))?;
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(libraries)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "rlib")
        {
            let data = fs::read(&path)?;
            for member in ArchiveFile::parse(data.as_slice())?.members() {
                names.insert(member?.name().to_owned());
            }
        }
    }
    Ok(names)
}

/// The functions that a header declares: `privmem_` names before a bracket,
/// outside comments.
pub fn declared(header: &str) -> BTreeSet<String> {
    let code: String = header
        .split("/*")
        .map(|part| part.split_once("*/").map_or(part, |(_, code)| code))
        .collect();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    code.split('(')
        .filter_map(|before| before.trim_end().rsplit(|c| !is_name(c)).next())
        .filter(|name| name.starts_with("privmem_"))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declarations_are_found_outside_comments() {
        let header = "/* privmem_old(x) */\nint privmem_a(struct privmem_region *r);\n\
                      void *privmem_b (void);\ntypedef int (*callback)(void);\n";
        let expected = ["privmem_a", "privmem_b"].map(str::to_owned);
        assert_eq!(declared(header), BTreeSet::from(expected));
    }

    #[test]
    fn names_of_others_are_strays() {
        assert!(expected("privmem_region_new") && expected("_RNvCs1_3std"));
        assert!(!expected("memcpy") && !expected("Privmem"));
    }
}
