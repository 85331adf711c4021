//! The picture: a panel of bars for each of the figures that people ask for first.

use std::fmt::Write;

use super::{Report, Section, shown};

/// Panels, of which two stand beside each other.
const PANELS: [Section; 10] = [
    Section { title: "tx, 64 bytes: ns per frame", unit: "ns", cases: &["tx 64"] },
    Section { title: "tx, 1500 bytes: ns per frame", unit: "ns", cases: &["tx 1500"] },
    Section {
        title: "rx, 64 bytes: million frames a second",
        unit: "Mpps",
        cases: &["lean rx 64"],
    },
    Section {
        title: "tx at 100,000 frames a second: ns per frame",
        unit: "ns",
        cases: &["paced tx 64"],
    },
    Section { title: "TCP to the host: ns per KiB", unit: "ns/KiB", cases: &["TCP to host"] },
    Section { title: "TCP to the guest: ns per KiB", unit: "ns/KiB", cases: &["TCP to guest"] },
    Section { title: "Ping, sleeping guest: p50, µs", unit: "us", cases: &["ping p50"] },
    Section { title: "Ping, sleeping guest: p99, µs", unit: "us", cases: &["ping p99"] },
    Section { title: "Idle: processors used", unit: "cores", cases: &["idle"] },
    Section { title: "Private memory, KiB", unit: "KiB", cases: &["private memory"] },
];

/// Pixels.
const WIDTH: usize = 480;
const LABELS: usize = 215;
const BARS: usize = 190;
const ROW: usize = 18;
const MARGIN: usize = 16;

impl Report {
    pub(super) fn picture(&self) -> String {
        let mut body = String::new();
        let mut top = MARGIN;
        let drawn: Vec<&Section> =
            PANELS.iter().filter(|panel| !self.subjects(panel).is_empty()).collect();
        for pair in drawn.chunks(2) {
            let mut height = 0;
            for (column, panel) in pair.iter().enumerate() {
                height = height.max(self.panel(panel, MARGIN + column * WIDTH, top, &mut body));
            }
            top += height + MARGIN;
        }
        let width = 2 * WIDTH + MARGIN;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {top}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"{width}\" height=\"{top}\" fill=\"white\"/>\n{body}</svg>\n"
        )
    }

    /// Draws a panel; returns its height.
    fn panel(&self, panel: &Section, left: usize, top: usize, body: &mut String) -> usize {
        let case = panel.cases[0];
        let figures: Vec<(&str, f64)> = self
            .subjects(panel)
            .into_iter()
            .filter_map(|subject| Some((subject, self.median(case, subject, panel.unit)?)))
            .collect();
        let most = figures.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
        let _ = writeln!(
            body,
            "<text x=\"{left}\" y=\"{}\" font-weight=\"bold\">{}</text>",
            top + 12,
            panel.title
        );
        for (number, (subject, value)) in figures.iter().enumerate() {
            let y = top + 22 + number * ROW;
            let length = (value / most * BARS as f64).max(1.0);
            let ours = subject.starts_with("vhost-user-net");
            let bare = subject.starts_with("bare");
            let color = match (ours, bare) {
                (true, _) => "#1f6fb4",
                (_, true) => "#c9c9c9",
                _ => "#8a8a8a",
            };
            let (bar, baseline) = (left + LABELS, y + 12);
            let _ = writeln!(
                body,
                "<text x=\"{}\" y=\"{baseline}\" text-anchor=\"end\">{subject}</text>\
                 <rect x=\"{bar}\" y=\"{y}\" width=\"{length:.1}\" height=\"{}\" fill=\"{color}\"/>\
                 <text x=\"{:.1}\" y=\"{baseline}\">{}</text>",
                bar - 6,
                ROW - 4,
                bar as f64 + length + 4.0,
                shown(*value)
            );
        }
        22 + figures.len() * ROW
    }
}
