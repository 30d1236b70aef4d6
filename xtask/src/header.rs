//! include/privmem.h: generated from the library's source, checked against it.

use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::Context;
use crate::cache::{holds, write_if_changed};

const HEADER: &str = "include/privmem.h";

pub fn command(cx: &Context, check_only: bool) -> Result<ExitCode> {
    if check_only {
        check(cx)?;
    } else {
        write_if_changed(&cx.root.join(HEADER), generate(cx)?)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Fails, with the difference, if the committed header is not what the source
/// gives.
pub fn check(cx: &Context) -> Result<()> {
    let header = generate(cx)?;
    let committed = cx.root.join(HEADER);
    if holds(&committed, &header) {
        return Ok(());
    }
    let mut fresh = tempfile::NamedTempFile::new()?;
    std::io::Write::write_all(&mut fresh, header.as_bytes())?;
    let difference = Command::new("diff")
        .args(["-u", "--label", HEADER, "--label", "from the source", "-N"])
        .arg(&committed)
        .arg(fresh.path())
        .output()
        .context("cannot run diff")?;
    let difference = String::from_utf8_lossy(&difference.stdout);
    bail!("{HEADER} is stale; run cargo xtask header\n{difference}");
}

fn generate(cx: &Context) -> Result<String> {
    let file = cx.root.join("cbindgen.toml");
    let config = cbindgen::Config::from_file(&file).map_err(|error| anyhow!(error))?;
    let bindings = cbindgen::Builder::new()
        .with_crate(&cx.root)
        .with_config(config)
        .generate()
        .context("cbindgen cannot read the library's source")?;
    let mut header = Vec::new();
    bindings.write(&mut header);
    Ok(String::from_utf8(header)?)
}
