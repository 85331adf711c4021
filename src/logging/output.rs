//! The log's output stream.
//!
//! Invariant: the stream gets whole lines only, even if a write fails in the middle of one.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Minimum time between two lines that report lost lines.
const NOTICE_INTERVAL: Duration = Duration::from_secs(1);

/// A stream of lines, whose writes may fail for a time.
pub(super) struct Output<W> {
    stream: W,
    /// Unwritten rest of a line that was written in part.
    rest: Vec<u8>,
    /// Time of the last report of lost lines.
    noticed: Option<Instant>,
}

impl<W: Write> Output<W> {
    /// Creates an output that writes to `stream`.
    pub(super) fn new(stream: W) -> Self {
        Output { stream, rest: Vec::new(), noticed: None }
    }

    /// Writes lines, or adds them to `lost`. Reports lost lines first, and subtracts the reported ones from
    /// `lost`.
    pub(super) fn write(&mut self, lines: &[u8], lost: &AtomicU64) {
        let count = lost.load(Ordering::Relaxed);
        let due = self.noticed.is_none_or(|at| at.elapsed() >= NOTICE_INTERVAL);
        if count > 0 && due && self.take(&notice(lines, count)) {
            lost.fetch_sub(count, Ordering::Relaxed);
            self.noticed = Some(Instant::now());
        }
        if !self.take(lines) {
            let lines = lines.iter().filter(|byte| **byte == b'\n').count();
            lost.fetch_add(lines as u64, Ordering::Relaxed);
        }
    }

    /// Writes lines after the rest of earlier ones. Returns false if no byte of them was written; keeps the rest
    /// of lines written in part.
    fn take(&mut self, lines: &[u8]) -> bool {
        if !self.finish() {
            return false;
        }
        self.rest.extend(lines);
        if !self.finish() && self.rest.len() == lines.len() {
            self.rest.clear();
            return false;
        }
        true
    }

    /// Writes the rest; returns true if nothing is left.
    fn finish(&mut self) -> bool {
        while !self.rest.is_empty() {
            match self.stream.write(&self.rest) {
                Ok(0) => return false,
                Ok(written) => drop(self.rest.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }
}

/// Formats the report of `count` lost lines, with the timestamp of the next line.
fn notice(next: &[u8], count: u64) -> Vec<u8> {
    let time = next.split(|byte| *byte == b' ').next().unwrap_or_default();
    let time = String::from_utf8_lossy(time);
    format!(
        "{time} WARN ] log: {count} log lines were lost; their reader was slow or gone, or the disk full\n"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream that accepts `room` bytes, and fails after that.
    #[derive(Default)]
    struct Disk {
        text: Vec<u8>,
        room: usize,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = bytes.len().min(self.room);
            if taken == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.text.extend(&bytes[..taken]);
            self.room -= taken;
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn torn_lines_are_completed_and_lost_ones_counted() {
        // Each number of bytes after which the disk can be full.
        for room in 0..=24 {
            let mut output = Output::new(Disk { room, ..Disk::default() });
            let lost = AtomicU64::new(0);
            for line in ["[1 INFO ] a\n", "[2 INFO ] b\n", "[3 INFO ] c\n[3 INFO ] d\n"] {
                output.write(line.as_bytes(), &lost);
            }
            output.stream.room = usize::MAX;
            output.write(b"[4 INFO ] e\n", &lost);
            output.write(b"[5 INFO ] f\n", &lost);
            let text = String::from_utf8(output.stream.text).unwrap();
            let (kept, said): (Vec<&str>, Vec<&str>) =
                text.lines().partition(|line| !line.contains("log lines were lost"));
            assert!(kept.iter().all(|line| line.len() == 11 && line.starts_with('[')), "{text}");
            let lines = said.iter().map(|line| {
                assert!(line.starts_with("[4 WARN ] log: "), "{line}");
                line.split(' ').nth(4).unwrap().parse::<usize>().unwrap()
            });
            assert_eq!(kept.len() + lines.sum::<usize>(), 6, "{room}: {text}");
            assert_eq!(lost.load(Ordering::Relaxed), 0);
        }
    }
}
