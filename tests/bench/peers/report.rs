//! Figures: kept as they were measured, and shown as tables and a picture.

mod claims;
mod picture;

use std::fmt::Write;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::measure::{Cost, median};

/// Turns of each measurement.
pub(super) const ROUNDS: usize = 9;

/// What a run has measured.
#[derive(Default)]
pub(super) struct Report {
    figures: Vec<Figure>,
    skipped: Vec<(String, String)>,
    /// Whether the machine's clock is its count of executed instructions.
    is_counted: bool,
}

/// A figure of one subject, as often as it was measured.
struct Figure {
    case: String,
    subject: String,
    unit: &'static str,
    values: Vec<f64>,
}

/// A table or a panel of the picture: what, in which unit, and its columns.
struct Section {
    title: &'static str,
    unit: &'static str,
    cases: &'static [&'static str],
}

const FRAMES: &[&str] = &[
    "tx 64",
    "tx 512",
    "tx 1500",
    "lean rx 64",
    "lean rx 512",
    "lean rx 1500",
    "rx 64",
    "rx 512",
    "rx 1500",
    "loop 64",
    "loop 1500",
    "both ways 64",
    "both ways 1500",
    "paced tx 64",
    "paced tx 64, one by one",
    "64 KiB tx",
];
/// What is counted.
const COUNTED: &[&str] = &[
    "tx 64",
    "tx 512",
    "tx 1500",
    "rx 64",
    "rx 512",
    "rx 1500",
    "loop 64",
    "64 KiB tx",
    "64 KiB rx",
    "tx 64, one by one",
    "request and answer",
];
const TCP: &[&str] = &["TCP to host", "TCP to guest"];

/// The machine's own.
const CALLS: &[&str] = &[
    "getppid",
    "eventfd, write and read",
    "copy of 1500 bytes",
    "line from the other processor",
    "write of 64 bytes to a TAP",
    "read of 64 bytes from a TAP",
    "64 bytes through AF_XDP",
];

const SECTIONS: [Section; 15] = [
    Section { title: "Calls of the machine's kernel, ns", unit: "ns of a call", cases: CALLS },
    Section { title: "Executed instructions of a frame", unit: "instructions", cases: COUNTED },
    Section { title: "Processor time of a frame", unit: "ns", cases: FRAMES },
    Section { title: "Frames in a second, millions", unit: "Mpps", cases: FRAMES },
    Section { title: "TCP, Gbit/s", unit: "Gbit/s", cases: TCP },
    Section { title: "TCP, processor time of a KiB", unit: "ns/KiB", cases: TCP },
    Section {
        title: "Round trips of pings, µs",
        unit: "us",
        cases: &[
            "ping p50",
            "ping p99",
            "ping p99.9",
            "ping under load p50",
            "ping under load p99",
            "ping under load p99.9",
            "ping, polling guest p50",
            "ping, polling guest p99",
            "ping, polling guest p99.9",
        ],
    },
    Section {
        title: "Processor time of a ping, µs",
        unit: "us of processor",
        cases: &["ping", "ping, polling guest"],
    },
    Section { title: "A Linux guest in QEMU, TCP, Mbit/s", unit: "Mbit/s", cases: TCP },
    Section {
        title: "The same, round trips of pings, µs",
        unit: "us in QEMU",
        cases: &["ping p50", "ping p99"],
    },
    Section { title: "Processors used while idle", unit: "cores", cases: &["idle"] },
    Section { title: "Memory, KiB", unit: "KiB", cases: &["private memory", "resident memory"] },
    Section { title: "Start-up, ms", unit: "ms", cases: &["start-up", "ready"] },
    Section { title: "One port of many", unit: "ns", cases: &["tx 64, one port of many"] },
    Section { title: "Time in user space", unit: "%", cases: &["64 KiB tx, in user space"] },
];

impl Report {
    /// One of a machine whose clock is its count of executed instructions.
    pub(super) fn counted() -> Self {
        Report { is_counted: true, ..Self::default() }
    }

    /// How often each is measured. Counts hardly differ.
    pub(super) fn rounds(&self) -> usize {
        if self.is_counted { 3 } else { ROUNDS }
    }

    /// Notes what a frame costs, and how many there are in a second.
    pub(super) fn add_costs(&mut self, case: &str, subject: &str, costs: &[Cost]) {
        let each = costs.iter().map(Cost::ns).collect();
        if self.is_counted {
            return self.add(case, subject, "instructions", each);
        }
        self.add(case, subject, "ns", each);
        let rates = costs.iter().map(|cost| cost.rate() / 1e6).collect();
        self.add(case, subject, "Mpps", rates);
    }

    /// Notes a figure.
    pub(super) fn add(&mut self, case: &str, subject: &str, unit: &'static str, values: Vec<f64>) {
        println!("{case:<28} {subject:<36} {:>12.3} {unit}", median(values.clone()));
        let (case, subject) = (case.to_owned(), subject.to_owned());
        self.figures.push(Figure { case, subject, unit, values });
    }

    /// Notes what was not measured, and why.
    pub(super) fn skip(&mut self, what: &str, why: &str) {
        println!("SKIPPED {what}: {why}");
        self.skipped.push((what.to_owned(), why.to_owned()));
    }

    fn values(&self, case: &str, subject: &str, unit: &str) -> Option<&[f64]> {
        let is_it = |it: &&Figure| it.case == case && it.subject == subject && it.unit == unit;
        self.figures.iter().find(is_it).map(|it| &*it.values)
    }

    fn median(&self, case: &str, subject: &str, unit: &str) -> Option<f64> {
        self.values(case, subject, unit).map(|values| median(values.to_vec()))
    }

    /// Who has a figure of a section, in the order in which they were measured.
    fn subjects(&self, section: &Section) -> Vec<&str> {
        let mut subjects = Vec::new();
        for figure in &self.figures {
            let belongs = figure.unit == section.unit && section.cases.contains(&&*figure.case);
            if belongs && !subjects.contains(&&*figure.subject) {
                subjects.push(&*figure.subject);
            }
        }
        subjects
    }

    /// Writes all of it to a directory.
    pub(super) fn write(&self, directory: &Path) {
        fs::create_dir_all(directory).unwrap();
        let claims = self.claims();
        println!("\n{claims}");
        let json = serde_json::to_string(&self.json()).unwrap();
        for (name, text) in [
            // A figure a line.
            ("compare.json", json.replace("},{", "},\n{")),
            ("compare.md", self.tables() + "\n" + &claims),
            ("compare.svg", self.picture()),
        ] {
            fs::write(directory.join(name), text).unwrap();
        }
    }

    fn json(&self) -> Value {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let processors = read("/proc/cpuinfo");
        let model = processors.lines().find_map(|line| line.strip_prefix("model name\t: "));
        let figures: Vec<Value> = self
            .figures
            .iter()
            .map(|Figure { case, subject, unit, values }| {
                let values: Vec<f64> = values.iter().map(|it| (it * 1e3).round() / 1e3).collect();
                json!({"case": case, "subject": subject, "unit": unit, "values": values})
            })
            .collect();
        json!({
            "processor": model,
            "kernel": read("/proc/sys/kernel/osrelease").trim(),
            "figures": figures,
            "skipped": self.skipped,
        })
    }

    pub(super) fn tables(&self) -> String {
        let mut text = String::new();
        for section in &SECTIONS {
            let subjects = self.subjects(section);
            let has = |case: &&&str| {
                subjects.iter().any(|subject| self.values(case, subject, section.unit).is_some())
            };
            let cases: Vec<&&str> = section.cases.iter().filter(has).collect();
            if cases.is_empty() {
                continue;
            }
            let _ = writeln!(text, "## {}\n", section.title);
            let heads: String = cases.iter().map(|case| format!(" {case} |")).collect();
            let _ = writeln!(text, "| |{heads}\n|---|{}", "---|".repeat(cases.len()));
            for subject in subjects {
                let cell = |case: &&&str| match self.median(case, subject, section.unit) {
                    Some(value) => format!(" {} |", shown(value)),
                    None => " – |".into(),
                };
                let cells: String = cases.iter().map(cell).collect();
                let _ = writeln!(text, "| {subject} |{cells}");
            }
            text.push('\n');
        }
        for (what, why) in &self.skipped {
            let _ = writeln!(text, "Not measured: {what}: {why}.");
        }
        text
    }
}

/// Three digits that count.
fn shown(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}
