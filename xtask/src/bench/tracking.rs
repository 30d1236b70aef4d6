//! The bench of book-keeping: the library's beside QEMU's own, in one process.
//! QEMU's is that of a QEMU build, object files and all.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use plotters::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Bar;
use crate::qemu::{self, Build, Line};
use crate::{Context, library, run, setup};

/// The first line whose QEMU tracks what is private.
const LINE: Line = Line::V10_2;

/// Beside QEMU's utilities, what QEMU's tracking is made of.
const OBJECTS: &[&str] = &[
    "libsystem.a.p/system_ram-block-attributes.c.o",
    "libqom.a.p/qom_container.c.o",
    "libqom.a.p/qom_object.c.o",
    "libqom.a.p/qom_object_interfaces.c.o",
    "libqom.a.p/qom_qom-qobject.c.o",
    "libqemuutil.a",
];

#[derive(Deserialize, Serialize)]
pub struct Figures {
    figures: Vec<Figure>,
    /// Of a conversion of one page of 1 GiB, from callgrind.
    #[serde(default)]
    instructions: Option<Instructions>,
}

#[derive(Clone, Copy, Deserialize, Serialize)]
struct Instructions {
    ours: f64,
    qemu: f64,
}

/// Nanoseconds, or what the name says; `ratio` is QEMU's part by ours.
#[derive(Deserialize, Serialize)]
struct Figure {
    name: String,
    /// Of the guest's memory.
    gib: u64,
    ours: Spread,
    qemu: Option<Spread>,
    ratio: Option<Spread>,
}

/// Of all rounds.
#[derive(Clone, Copy, Deserialize, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

pub fn run(cx: &Context) -> Result<Figures> {
    let program = build(cx)?;
    let measured = run::work("measure book-keeping", || {
        run::ask(Command::new(&program).arg("measure"))
    })?;
    let mut figures: Figures = serde_json::from_str(&measured)?;
    let counted = run::work("count instructions", || {
        let of = |who| instructions(&program, who);
        Ok((of("ours")?, of("qemu")?))
    })?;
    let (ours, qemu) = counted;
    figures.instructions = Some(Instructions { ours, qemu });
    Ok(figures)
}

fn build(cx: &Context) -> Result<PathBuf> {
    setup::packages(cx, setup::COMPILERS)?;
    let _guard = cx.cache.lock()?;
    let qemu = qemu::build(cx, LINE, &[qemu::SYSTEM], &[])?;
    let ours = library::bench(cx)?;
    let dir = cx.cache.dir("bench")?;
    let glue = dir.join("qemu.o");
    let mut compile = compiler(&qemu, "system/ram-block-attributes.c")?;
    compile.arg("-c").arg("-o").arg(&glue);
    run::ask(compile.arg(cx.root.join("benches/tracking/qemu.c")))?;
    let program = dir.join("tracking");
    let mut link = Command::new("cc");
    link.current_dir(&qemu.dir).arg("-o").arg(&program);
    link.arg(&glue).arg(ours).args(OBJECTS);
    link.args(glib()?).args(["-lm", "-lpthread", "-ldl"]);
    run::ask(&mut link)?;
    Ok(program)
}

/// The compiler with the options that a file of QEMU was compiled with.
fn compiler(qemu: &Build, file: &str) -> Result<Command> {
    let commands = std::fs::read(qemu.dir.join("compile_commands.json"))?;
    let commands: Vec<Value> = serde_json::from_slice(&commands)?;
    let of_file = |entry: &&Value| entry["file"].as_str().is_some_and(|f| f.ends_with(file));
    let entry = commands.iter().find(of_file);
    let line = entry.and_then(|entry| entry["command"].as_str());
    let words = line.and_then(shlex::split);
    let words = words.with_context(|| format!("QEMU's build does not say how {file} is made"))?;
    let (program, options) = words.split_first().context("an empty command")?;
    let mut command = Command::new(program);
    command.current_dir(&qemu.dir);
    // What comes after is about the files read and written.
    command.args(options.iter().take_while(|option| *option != "-MD"));
    Ok(command)
}

fn glib() -> Result<Vec<String>> {
    let flags = run::ask(Command::new("pkg-config").args(["--libs", "glib-2.0", "gmodule-2.0"]))?;
    Ok(flags.split_whitespace().map(str::to_owned).collect())
}

/// Instructions of one conversion: what more of them cost more.
fn instructions(program: &Path, who: &str) -> Result<f64> {
    const FEW: u32 = 1_000;
    const MANY: u32 = 11_000;
    let collected = |number: u32| -> Result<f64> {
        let log = tempfile::NamedTempFile::new()?;
        let mut valgrind = Command::new("valgrind");
        valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
        valgrind.arg(format!("--log-file={}", log.path().display()));
        valgrind
            .arg(program)
            .args(["count", who, &number.to_string()]);
        run::ask(&mut valgrind)?;
        let log = std::fs::read_to_string(log.path())?;
        let number = log.lines().find_map(|line| line.split_once("Collected :"));
        let number = number.context("callgrind collected nothing")?.1;
        Ok(number.trim().parse()?)
    };
    Ok((collected(MANY)? - collected(FEW)?) / f64::from(MANY - FEW))
}

impl Figures {
    fn figure(&self, name: &str, gib: u64) -> Result<&Figure> {
        let of = |figure: &&Figure| figure.name == name && figure.gib == gib;
        let found = self.figures.iter().find(of);
        found.with_context(|| format!("'{name}' of {gib} GiB was not measured"))
    }

    pub fn bars(&self) -> Result<Vec<Bar>> {
        let ours = |name: &str, gib| Ok::<_, anyhow::Error>(self.figure(name, gib)?.ours.median);
        let ratio = |name: &str, gib| {
            let ratio = self.figure(name, gib)?.ratio;
            Ok::<_, anyhow::Error>(ratio.context("not compared")?.median)
        };
        let (page, state) = ("one page", "one page, state alone");
        let growth = ours(page, 4096)? / ours(page, 1)?;
        let clustered = ratio("shared extents, clustered", 1024)?;
        let scattered = ratio("shared extents, scattered", 1024)?;
        let calls = ours("listener calls by runs", 1)?;
        Ok(vec![
            Bar::at_least(
                "state of one page of 1 GiB: QEMU's to ours",
                ratio(state, 1)?,
                5.0,
            ),
            Bar::at_least(
                "the same of 512 GiB: QEMU's to ours",
                ratio(state, 512)?,
                1e3,
            ),
            Bar::at_least(
                "the same of 4 TiB: QEMU's to ours",
                ratio(state, 4096)?,
                5e3,
            ),
            Bar::at_most("conversion of one page of 1 GiB, ns", ours(page, 1)?, 100.0),
            Bar::at_most("the same of 4 TiB to 1 GiB", growth, 1.5),
            Bar::at_most(
                "listener calls for a random 2 MiB range by its runs",
                calls,
                1.0,
            ),
            Bar::at_least(
                "clustered shared extents of 1 TiB: QEMU's to ours",
                clustered,
                20.0,
            ),
            Bar::at_least(
                "scattered shared extents of 1 TiB: QEMU's to ours",
                scattered,
                1.0,
            ),
            Bar::at_least("two threads to one", ours("two threads by one", 64)?, 1.8),
            Bar::at_most(
                "metadata, KiB by GiB",
                ours("metadata, KiB by GiB", 1024)?,
                33.0,
            ),
            Bar::at_most("creation of 16 TiB, ms", ours("creation, ms", 16384)?, 10.0),
        ])
    }

    pub fn table(&self) -> String {
        let head = format!(
            "{:<28} {:>6}  {:>24}  {:>34}  {:>26}\n",
            "nanoseconds, median (range)", "GiB", "ours", "QEMU's", "QEMU's to ours"
        );
        let rows = self.figures.iter().map(|figure| {
            let Figure {
                name, gib, ours, ..
            } = figure;
            let [qemu, ratio] = [figure.qemu, figure.ratio].map(shown);
            let ours = shown(Some(*ours));
            format!("{name:<28} {gib:>6}  {ours:>24}  {qemu:>34}  {ratio:>26}\n")
        });
        let rows: String = rows.collect();
        let counted = self.instructions.map(|Instructions { ours, qemu }| {
            format!("instructions for one page of 1 GiB, the mean of both directions: ours {ours:.0}, QEMU's {qemu:.0}\n")
        });
        head + &rows + &counted.unwrap_or_default()
    }

    /// Draws what a conversion of one page costs against the size of the guest.
    pub fn plot(&self, path: &Path) -> Result<()> {
        let of = |name: &str, pick: fn(&Figure) -> Option<Spread>| -> Points {
            let figures = self.figures.iter().filter(|figure| figure.name == name);
            let points = figures.filter_map(|f| Some((f.gib as f64, pick(f)?.median)));
            points.collect()
        };
        let lines = [
            ("QEMU 10.2's state", RED, of("one page", |f| f.qemu)),
            (
                "ours, all of a conversion",
                BLUE,
                of("one page", |f| Some(f.ours)),
            ),
            (
                "ours, state alone",
                GREEN,
                of("one page, state alone", |f| Some(f.ours)),
            ),
        ];
        draw(path, &lines).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))
    }
}

type Points = Vec<(f64, f64)>;

fn draw(
    path: &Path,
    lines: &[(&str, RGBColor, Points)],
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::new(path, (800, 500)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(
            "Book-keeping of a conversion of one page",
            ("sans-serif", 20),
        )
        .margin(15)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d((1.0..4096.0f64).log_scale(), (10.0..1e7f64).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("guest, GiB")
        .y_desc("nanoseconds")
        .draw()?;
    for (name, colour, points) in lines {
        chart
            .draw_series(LineSeries::new(points.clone(), colour).point_size(4))?
            .label(*name)
            .legend(|(x, y)| Rectangle::new([(x, y - 4), (x + 8, y + 4)], colour.filled()));
    }
    let mut labels = chart.configure_series_labels();
    labels.border_style(BLACK).background_style(WHITE);
    labels.position(SeriesLabelPosition::UpperLeft).draw()?;
    area.present()?;
    Ok(())
}

fn shown(spread: Option<Spread>) -> String {
    spread.map_or_else(String::new, |Spread { median, min, max }| {
        let digits = usize::from(median < 1000.0);
        format!("{median:.digits$} ({min:.digits$} to {max:.digits$})")
    })
}
