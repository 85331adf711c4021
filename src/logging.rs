//! The log: lines on standard error, which no thread waits for and no tenant can flood.
//!
//! Each line is of one place in the source about one port. Of such lines `BURST` are written in
//! `WINDOW`, and the rest is counted. A thread of its own writes them: if nobody reads standard
//! error, or its disk is full, lines are lost, and counted, and the ports run on.

mod output;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use env_logger::Target;
use log::{LevelFilter, Record, error};

use output::Output;

/// Lines of one kind in one window.
const BURST: u32 = 20;
/// For how long lines of one kind are counted together.
const WINDOW: Duration = Duration::from_secs(10);
/// Kinds of lines that are kept count of; there are never that many honest ones.
const KINDS: usize = 4096;
/// Lines that may wait to be written.
const QUEUE: usize = 1024;
/// How long the last lines may take to be written.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(200);

enum Item {
    Line(Vec<u8>),
    /// Answered when everything before it has been written.
    Flush(SyncSender<()>),
    /// There is nothing more.
    End,
}

/// The way to the log's thread.
#[derive(Clone)]
struct Lines {
    queue: SyncSender<Item>,
    lost: Arc<AtomicU64>,
}

/// The log of this process.
pub struct Log {
    lines: Lines,
    /// What has been logged, until there is a thread that writes it.
    items: Option<Receiver<Item>>,
}

impl Log {
    /// Has everything from `level` on logged. Once in a process.
    pub fn new(level: LevelFilter) -> Self {
        let (queue, items) = sync_channel(QUEUE);
        let lines = Lines { queue, lost: Arc::default() };
        let throttle = Mutex::new(Throttle::default());
        env_logger::Builder::new()
            .filter_level(level)
            .target(Target::Pipe(Box::new(lines.clone())))
            .format(move |line, record| {
                // Before the lock, which the panic hook takes too.
                let text = plain(&record.args().to_string());
                let mut throttle = throttle.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                let Some(left_out) = throttle.admit(record, &text, Instant::now()) else {
                    return Ok(());
                };
                let start = format!("[{} {:<5}]", line.timestamp(), record.level());
                if left_out > 0 {
                    writeln!(line, "{start} {left_out} lines like the next one were left out")?;
                }
                writeln!(line, "{start} {text}")
            })
            .init();
        std::panic::set_hook(Box::new(|info| {
            let thread = thread::current();
            error!("{}: {info}: this is a bug", thread.name().unwrap_or("a thread"));
        }));
        Log { lines, items: Some(items) }
    }

    /// Starts the thread that writes. It calls `confine` first.
    ///
    /// # Errors
    /// No thread to be had, or what `confine` returns.
    pub fn start(
        &mut self,
        confine: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let Some(items) = self.items.take() else { return Ok(()) };
        let lost = self.lines.lost.clone();
        let (started, confined) = sync_channel(1);
        thread::Builder::new().name("log".into()).spawn(move || {
            let result = confine();
            let failed = result.is_err();
            if started.send(result).is_ok() && !failed {
                write_lines(&items, &lost);
            }
        })?;
        confined.recv().map_err(io::Error::other)?
    }

    /// Waits a little until what was logged has been written.
    pub fn flush(&mut self) {
        if let Some(items) = self.items.take() {
            // There was no thread.
            let Lines { queue, lost } = self.lines.clone();
            let _ = queue.try_send(Item::End);
            write_lines(&items, &lost);
            return;
        }
        let (done, written) = sync_channel(1);
        if self.lines.queue.try_send(Item::Flush(done)).is_ok() {
            let _ = written.recv_timeout(FLUSH_TIMEOUT);
        }
    }
}

impl Write for Lines {
    /// Takes whole lines, as env_logger writes them.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !bytes.is_empty() && self.queue.try_send(Item::Line(bytes.to_vec())).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_lines(items: &Receiver<Item>, lost: &AtomicU64) {
    let mut output = Output::new(io::stderr());
    while let Ok(item) = items.recv() {
        match item {
            Item::Line(line) => output.write(&line, lost),
            Item::Flush(done) => {
                let _ = done.try_send(());
            }
            Item::End => return,
        }
    }
}

/// The text on one line, with what could pass for another line or move a terminal's cursor
/// escaped: some of it is named by tenants.
fn plain(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            let _ = write!(line, "{}", c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

/// A place in the source, and what the line is about: all that stands before its first colon.
type Kind = (Option<&'static str>, Option<u32>, String);

#[derive(Debug)]
struct Window {
    since: Instant,
    written: u32,
    left_out: u64,
}

#[derive(Debug, Default)]
struct Throttle {
    windows: HashMap<Kind, Window>,
}

impl Throttle {
    /// Whether to write the line, and how many like it were left out before it.
    fn admit(&mut self, record: &Record<'_>, text: &str, now: Instant) -> Option<u64> {
        if record.level() > log::Level::Info {
            return Some(0);
        }
        if self.windows.len() >= KINDS {
            self.windows.clear();
        }
        let about = text.split(": ").next().unwrap_or_default().to_owned();
        let kind = (record.module_path_static(), record.line(), about);
        let new = || Window { since: now, written: 0, left_out: 0 };
        let window = self.windows.entry(kind).or_insert_with(new);
        let mut left_out = 0;
        if now.duration_since(window.since) >= WINDOW {
            left_out = std::mem::replace(window, new()).left_out;
        }
        if window.written == BURST {
            window.left_out += 1;
            return None;
        }
        window.written += 1;
        Some(left_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use log::Level;

    fn admitted(throttle: &mut Throttle, level: Level, text: &str, now: Instant) -> Option<u64> {
        let record = Record::builder().level(level).line(Some(1)).build();
        throttle.admit(&record, text, now)
    }

    #[test]
    fn lines_of_one_kind_are_counted_when_there_are_too_many() {
        let (mut throttle, start) = (Throttle::default(), Instant::now());
        for _ in 0..BURST {
            assert_eq!(admitted(&mut throttle, Level::Warn, "a: x", start), Some(0));
        }
        for _ in 0..7 {
            assert_eq!(admitted(&mut throttle, Level::Warn, "a: y", start), None);
        }
        assert_eq!(admitted(&mut throttle, Level::Warn, "b: x", start), Some(0), "another port");
        assert_eq!(admitted(&mut throttle, Level::Debug, "a: x", start), Some(0));
        let later = start + WINDOW;
        assert_eq!(admitted(&mut throttle, Level::Warn, "a: x", later), Some(7));
        assert_eq!(admitted(&mut throttle, Level::Warn, "a: x", later), Some(0));
    }

    #[test]
    fn a_line_stays_one_line() {
        assert_eq!(plain("a\nb\x1b[0mc\u{85}"), "a\\nb\\u{1b}[0mc\\u{85}");
    }
}
