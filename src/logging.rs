//! The log: lines on standard error, with a rate limit, written by a thread of its own.
//!
//! Invariant: no other thread waits for standard error, and no tenant can flood the log.
//!
//! The rate limit applies to each kind of line: one place in the source, about one port. The log writes
//! `BURST` lines of a kind per `WINDOW`, and counts the rest. If the reader of standard error is slow or gone,
//! or the disk is full, the log loses lines, and counts them too.

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

/// Maximum number of lines of one kind in one window.
const BURST: u32 = 20;
/// Length of a window of the rate limit.
const WINDOW: Duration = Duration::from_secs(10);
/// Number of kinds at which the rate limiter forgets all counts. Normal operation has far fewer kinds.
const KINDS: usize = 4096;
/// Maximum number of lines waiting for the log thread; further lines are lost.
const QUEUE: usize = 1024;
/// Time that a flush waits for the log thread.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(200);

/// A message to the log thread.
enum Item {
    /// One or more whole lines to write.
    Line(Vec<u8>),
    /// Request for an answer once all earlier lines are written.
    Flush(SyncSender<()>),
    /// End of the log; no further lines follow.
    End,
}

/// The sender's side of the queue to the log thread, and the number of lines lost.
#[derive(Clone)]
struct Lines {
    queue: SyncSender<Item>,
    lost: Arc<AtomicU64>,
}

/// The log of this process.
pub struct Log {
    lines: Lines,
    /// Receiver's side of the queue, until the log thread starts.
    items: Option<Receiver<Item>>,
}

impl Log {
    /// Installs the logger for lines of `level` and more severe ones, and a panic hook that logs. At most once
    /// in a process. Lines wait in the queue until [`start`](Self::start) or [`flush`](Self::flush).
    pub fn new(level: LevelFilter) -> Self {
        let (queue, items) = sync_channel(QUEUE);
        let lines = Lines { queue, lost: Arc::default() };
        let throttle = Mutex::new(Throttle::default());
        env_logger::Builder::new()
            .filter_level(level)
            .target(Target::Pipe(Box::new(lines.clone())))
            .format(move |line, record| {
                // Format before taking the lock: if the formatting panics, the panic hook logs, which takes it.
                let text = plain(&record.args().to_string());
                let mut throttle = throttle.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                let Some(suppressed) = throttle.admit(record, &text, Instant::now()) else {
                    return Ok(());
                };
                let start = format!("[{} {:<5}]", line.timestamp(), record.level());
                if suppressed > 0 {
                    writeln!(line, "{start} {suppressed} lines like the next one were left out")?;
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

    /// Starts the log thread, which first calls `confine`. Returns after that call.
    ///
    /// # Errors
    /// The errors of creating a thread, and of `confine`.
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

    /// Waits until all earlier lines are written, at most 200 ms. Without a log thread, writes them itself.
    pub fn flush(&mut self) {
        if let Some(items) = self.items.take() {
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
    /// Queues `bytes`, which are whole lines, or counts a lost line. Never waits, never fails.
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

/// Writes queued lines to standard error until [`Item::End`], or until the last sender is dropped.
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

/// Escapes control characters, so that the text stays one line and cannot control a terminal. Tenants choose
/// some of the text.
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

/// A kind of line: its source module and line, and its subject (the text before the first colon).
type Kind = (Option<&'static str>, Option<u32>, String);

/// The current window of one kind.
#[derive(Debug)]
struct Window {
    since: Instant,
    written: u32,
    suppressed: u64,
}

/// The rate limiter.
#[derive(Debug, Default)]
struct Throttle {
    windows: HashMap<Kind, Window>,
}

impl Throttle {
    /// Decides whether to write a line, and counts it. Returns the number of lines of its kind suppressed in the
    /// last window (0 except at a window's start), or none if this line is suppressed. Debug and trace lines
    /// are not limited.
    fn admit(&mut self, record: &Record<'_>, text: &str, now: Instant) -> Option<u64> {
        if record.level() > log::Level::Info {
            return Some(0);
        }
        if self.windows.len() >= KINDS {
            self.windows.clear();
        }
        let about = text.split(": ").next().unwrap_or_default().to_owned();
        let kind = (record.module_path_static(), record.line(), about);
        let new = || Window { since: now, written: 0, suppressed: 0 };
        let window = self.windows.entry(kind).or_insert_with(new);
        let mut suppressed = 0;
        if now.duration_since(window.since) >= WINDOW {
            suppressed = std::mem::replace(window, new()).suppressed;
        }
        if window.written == BURST {
            window.suppressed += 1;
            return None;
        }
        window.written += 1;
        Some(suppressed)
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
    fn excess_lines_of_one_kind_are_counted() {
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
    fn control_characters_are_escaped() {
        assert_eq!(plain("a\nb\x1b[0mc\u{85}"), "a\\nb\\u{1b}[0mc\\u{85}");
    }
}
