//! `vhost-user-net ctl`: asks a daemon, and shows what it says.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use super::{Command, Request, VERSION};

/// How long a daemon may take to reply.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is to be asked, and whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The daemon's control socket.
    pub socket: PathBuf,
    /// Whether the reply is to be shown as it is.
    pub json: bool,
    /// What is asked.
    pub command: Command,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Failure {
    /// The daemon can't be asked.
    Unreachable(String),
    /// It says no.
    Refused(String),
}

impl Question {
    /// Asks, and returns what is to be shown.
    ///
    /// # Errors
    /// One line that says what is wrong.
    pub fn ask(&self) -> Result<String, Failure> {
        let shown = self.socket.display();
        let unreachable = |error: std::io::Error| {
            let hint = match error.kind() {
                std::io::ErrorKind::NotFound => "; is the daemon started with --control?",
                std::io::ErrorKind::PermissionDenied => "; only root and its own user may ask",
                _ => "",
            };
            Failure::Unreachable(format!("ask the daemon at {shown}: {error}{hint}"))
        };
        let mut stream = UnixStream::connect(&self.socket).map_err(unreachable)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(unreachable)?;
        let request = Request { version: VERSION, command: self.command.clone() };
        let bad = |error: serde_json::Error| {
            Failure::Unreachable(format!("the daemon at {shown} is not understood: {error}"))
        };
        let line = serde_json::to_string(&request).map_err(bad)? + "\n";
        // One that turns us away says why, and hangs up.
        let sent = stream.write_all(line.as_bytes());
        let mut reply = String::new();
        BufReader::new(stream).read_line(&mut reply).map_err(unreachable)?;
        if reply.is_empty() {
            sent.map_err(unreachable)?;
            return Err(unreachable(std::io::ErrorKind::UnexpectedEof.into()));
        }
        let reply: Value = serde_json::from_str(&reply).map_err(bad)?;
        match &reply["error"] {
            Value::Null => Ok(self.show(&reply["ok"])),
            error => {
                let message = error["message"].as_str().unwrap_or("it gives no reason");
                Err(Failure::Refused(message.to_owned()))
            }
        }
    }

    fn show(&self, reply: &Value) -> String {
        match (&self.command, reply) {
            (Command::Metrics {}, Value::String(text)) => text.clone(),
            _ if self.json => format!("{reply:#}\n"),
            (Command::Show { .. }, report) => show(report),
            (Command::Set { .. }, summary) => table(std::slice::from_ref(summary)),
            (_, list) => table(list.as_array().map_or(&[], Vec::as_slice)),
        }
    }
}

/// A value without quotes.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Ports, a line each, in columns.
fn table(ports: &[Value]) -> String {
    const COLUMNS: [&str; 8] =
        ["name", "host", "state", "rx_frames", "tx_frames", "dropped", "rx_limit", "tx_limit"];
    let mut rows = vec![COLUMNS.map(|column| column.to_uppercase().replace('_', "-"))];
    rows.extend(ports.iter().map(|port| COLUMNS.map(|column| plain(&port[column]))));
    let widths: Vec<usize> = (0..COLUMNS.len())
        .map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    text
}

/// One port, in words and numbers.
fn show(report: &Value) -> String {
    let mut text = format!("{}: {}\n", plain(&report["name"]), plain(&report["explanation"]));
    let _ = writeln!(text, "  host       {}", plain(&report["host"]));
    if let Some(seconds) = report["connected_seconds"].as_u64() {
        let features = plain(&report["features"]);
        let _ = writeln!(text, "  frontend   connected for {seconds} s, features {features}");
    }
    let _ = writeln!(text, "  connected  {} times so far", report["connections"]);
    for way in ["rx", "tx"] {
        let limit = plain(&report[format!("{way}_limit")]);
        let _ = writeln!(text, "  {way} limit   {limit}");
    }
    let pairs = report["queue_pairs"].as_array().map_or(&[][..], Vec::as_slice);
    for (number, pair) in pairs.iter().enumerate() {
        let serving = if pair["serving"] == true { "running" } else { "not running" };
        let _ = writeln!(
            text,
            "  queue pair {number}: {serving}, {} turns, {} sleeps, {} times out of buffers",
            pair["turns"], pair["sleeps"], pair["starved"]
        );
        for way in ["rx", "tx"] {
            let it = &pair[way];
            let _ = write!(
                text,
                "    {way}: {} frames, {} bytes, {} kicks, {} calls ({} suppressed)",
                it["frames"], it["bytes"], it["kicks"], it["calls"], it["calls_suppressed"]
            );
            for what in ["dropped", "copied"] {
                for (reason, count) in it[what].as_object().into_iter().flatten() {
                    let _ = write!(text, ", {count} {what} ({reason})");
                }
            }
            if it["limited"] != 0 {
                let _ = write!(text, ", {} bursts limited", it["limited"]);
            }
            text.push('\n');
        }
    }
    text
}
