//! The bench with an assigned device: what QEMU's own private memory and ours have mapped and pinned
//! for it, and how long a conversion takes the guest. The CPU may be emulated: only ratios mean
//! anything.

use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::lab::Spread;
use crate::Context;
use crate::qemu::Line;

const QEMU: &str = "qemu";
const MIB: f64 = (1 << 20) as f64;

#[derive(Serialize)]
pub struct Figures {
    about: Value,
    rows: Vec<Row>,
}

/// What one machine had for its device, in one pass.
#[derive(Deserialize, Serialize)]
struct Row {
    way: String,
    vmm: String,
    start: Held,
    /// After page by page was converted, of which so many bytes are private.
    after: Held,
    private: u64,
    /// Cycles of 2 MiB.
    to_private: u64,
    to_shared: u64,
}

#[derive(Deserialize, Serialize)]
struct Held {
    /// Of type 1's limited number.
    entries: Option<u64>,
    /// Pages of the IOMMU, of whatever size.
    mappings: u64,
    pinned: u64,
}

pub fn run(cx: &Context, line: Option<Line>, limit: Duration) -> Result<Figures> {
    let (mut about, mut rows) = (Value::Null, Vec::new());
    for mut told in super::told_by_lab(cx, line, limit, "lab.bench=vfio")? {
        match told.get_mut("vfio").map(Value::take) {
            Some(row) => rows.push(serde_json::from_value(row)?),
            None => about = told,
        }
    }
    Ok(Figures { about, rows })
}

impl Figures {
    pub fn table(&self) -> String {
        let text = |key: &str| self.about[key].as_str().unwrap_or("unknown").to_owned();
        let mut out = format!(
            "kernel {}, QEMU {}; 64 MiB, a device assigned\n{:>8} {:<24} {:>21} {:>21} {:>7} {:>17} {:>19}\n{:>33} {:>7} {:>7} {:>5} {:>7} {:>7} {:>5} {:>7} {:>17} {:>19}\n",
            text("kernel"),
            text("qemu"),
            "",
            "",
            "after start",
            "after a storm",
            "",
            "",
            "2 MiB, QEMU's : ours",
            "",
            "entries",
            "IOMMU",
            "MiB",
            "entries",
            "IOMMU",
            "MiB",
            "shared",
            "to private",
            "to shared",
        );
        let last = |at: usize, row: &Row| !self.rows[at + 1..].iter().any(|later| later.is_of(row));
        let rows = self.rows.iter().enumerate();
        for (_, row) in rows.filter(|(at, row)| last(*at, row)) {
            let shared = 64.0 - row.private as f64 / MIB;
            out += &format!(
                "{:>8} {:<24} {} {} {shared:>7.1} {:>17.2} {:>19.2}\n",
                row.way,
                row.vmm,
                row.start.cells(),
                row.after.cells(),
                self.ratio(row, |row| row.to_private),
                self.ratio(row, |row| row.to_shared),
            );
        }
        out
    }

    /// How many times as long as this machine QEMU's own takes: the median of all passes.
    fn ratio(&self, row: &Row, of: fn(&Row) -> u64) -> f64 {
        let ours = self.rows.iter().filter(|other| other.is_of(row));
        let qemus = self.rows.iter();
        let qemus = qemus.filter(|other| other.vmm == QEMU && other.way == row.way);
        let ratios = qemus
            .zip(ours)
            .map(|(qemu, ours)| of(qemu) as f64 / of(ours) as f64);
        Spread::of(ratios).median()
    }
}

impl Row {
    /// Whether both are of the same machine, in whatever pass.
    fn is_of(&self, other: &Row) -> bool {
        (&self.way, &self.vmm) == (&other.way, &other.vmm)
    }
}

impl Held {
    fn cells(&self) -> String {
        let entries = self
            .entries
            .map_or("-".into(), |entries| entries.to_string());
        let pinned = self.pinned as f64 / MIB;
        format!("{entries:>7} {:>7} {pinned:>5.1}", self.mappings)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn times_are_those_of_qemu_on_the_same_way() {
        let row = |way: &str, vmm: &str, cycles: u64| {
            let held = json!({"entries": null, "mappings": 5, "pinned": 3 << 20});
            serde_json::from_value(json!({
                "way": way, "vmm": vmm, "start": held, "after": held, "private": 1 << 20,
                "to_private": cycles, "to_shared": 10 * cycles,
            }))
        };
        let rows = [
            ("a", "ours", 2),
            ("a", QEMU, 3),
            ("b", QEMU, 100),
            ("b", "ours", 50),
            ("a", "ours", 1),
            ("a", QEMU, 5),
            ("a", "ours", 2),
            ("a", QEMU, 2),
        ];
        let figures = Figures {
            about: json!({"kernel": "7.3", "qemu": "10.2"}),
            rows: rows
                .map(|(way, vmm, cycles)| row(way, vmm, cycles).unwrap())
                .into(),
        };
        let table = figures.table();
        assert!(table.starts_with("kernel 7.3, QEMU 10.2;"), "{table}");
        let ratios: Vec<_> = table
            .lines()
            .skip(3)
            .map(|line| line.split_whitespace().rev().take(3).collect::<Vec<_>>())
            .collect();
        assert_eq!(ratios.len(), 4);
        assert_eq!(ratios[1], ["2.00", "2.00", "63.0"]);
        assert_eq!(ratios[2], ["1.50", "1.50", "63.0"]);
    }
}
