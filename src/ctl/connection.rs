//! `vhost-user-net ctl`: asks a daemon, and shows what it says.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::io::{self, BufRead, BufReader, Read, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use super::capture::capture;
use super::reload::{Outcome, add, conflict, reload};
use super::stats::rates;
use super::top::{Look, top};
use crate::api::requests::{Command, Wanted};
use crate::api::{Request, VERSION};
use crate::sys::socket::{MAX_DESCRIPTORS, receive, send_with_files};

/// How long a daemon may take to reply.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest reply in bytes.
const MAX_REPLY: u64 = 64 << 20;

/// What an operator may say.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum Verb {
    /// What the daemon does.
    #[command(flatten)]
    Ask(Command),
    /// Write a port's frames to a file, as pcapng, until it is interrupted.
    Capture {
        /// The port's name.
        port: String,
        /// What is to be captured.
        #[command(flatten)]
        wanted: Wanted,
        /// The file; - is standard output.
        #[arg(short, long, value_name = "FILE")]
        write: PathBuf,
    },
    /// Show whom a port's guest speaks to, by protocol and peer, and how much, as it happens.
    Top {
        /// The port's name.
        port: String,
        /// How it is shown.
        #[command(flatten)]
        look: Look,
    },
    /// Print what ports move each second.
    Stats {
        /// Ports by name [default: all].
        ports: Vec<String>,
        /// Count for this many seconds before each table.
        #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
        interval: Duration,
        /// Print this many tables.
        #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u64).range(1..))]
        count: u64,
    },
    /// Have the daemon's ports be what its file says now, without touching those that are already.
    Reload {
        /// The file [default: the one that the daemon was started with].
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
}

/// What is to be asked, and whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The daemon's control socket.
    pub socket: PathBuf,
    /// Whether the reply is to be shown as it is.
    pub json: bool,
    /// What is asked.
    pub verb: Verb,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Failure {
    /// The daemon can't be asked.
    Unreachable(String),
    /// The daemon has closed the connection instead of a reply, as when it has died.
    Gone(String),
    /// It says no.
    Refused(String),
    /// It would have to start a port anew for that.
    NeedsRestart(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Failure::Unreachable(why)
        | Failure::Gone(why)
        | Failure::Refused(why)
        | Failure::NeedsRestart(why)) = self;
        f.write_str(why)
    }
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct Connection {
    reader: BufReader<UnixStream>,
    /// Whom it leads to, for messages.
    daemon: String,
    /// What the daemon has asked for meanwhile.
    wishes: VecDeque<Wish>,
}

/// What a daemon may ask of its opener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// To read the file again.
    Reload,
    /// To start ports of the file, by name.
    Start(Vec<String>),
    /// To open a port's device again, if that is there again.
    Mend(String),
}

impl Wish {
    fn parse(line: &Value) -> Option<Self> {
        if line["reload"] == true {
            return Some(Wish::Reload);
        }
        if let Ok(names) = serde_json::from_value(line["start"].clone()) {
            return Some(Wish::Start(names));
        }
        line["mend"].as_str().map(|port| Wish::Mend(port.to_owned()))
    }
}

impl Connection {
    /// On a socket that is connected.
    pub fn new(stream: UnixStream, daemon: String) -> Self {
        Connection { reader: BufReader::new(stream), daemon, wishes: VecDeque::new() }
    }

    fn unreachable(&self, error: impl Into<io::Error>) -> Failure {
        let error = error.into();
        let why = format!("ask the daemon at {}: {error}", self.daemon);
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset => Failure::Gone(why),
            _ => Failure::Unreachable(why),
        }
    }

    /// Sends a request, with descriptors.
    fn send(&self, command: &Command, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let request = Request { version: VERSION, command: command.clone() };
        let line = serde_json::to_string(&request)? + "\n";
        let stream = self.reader.get_ref();
        stream.set_read_timeout(Some(PATIENCE))?;
        send_with_files(stream, line.as_bytes(), files, b' ')
    }

    fn line(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        (&mut self.reader).take(MAX_REPLY).read_line(&mut line)?;
        if line.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Waits until the daemon asks for something, if it has not meanwhile; nothing if it has gone.
    ///
    /// # Errors
    /// Those of reading, and what is no message.
    pub fn wish(&mut self) -> io::Result<Option<Wish>> {
        self.reader.get_ref().set_read_timeout(None)?;
        loop {
            if let Some(wish) = self.wishes.pop_front() {
                return Ok(Some(wish));
            }
            match self.line() {
                Ok(line) => self.wishes.extend(Wish::parse(&line)),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Asks, with descriptors, and waits for the reply.
    ///
    /// # Errors
    /// The daemon can't be asked, or says no.
    pub fn ask(&mut self, command: &Command, files: &[BorrowedFd<'_>]) -> Result<Value, Failure> {
        // One that turns us away says why, and hangs up.
        let sent = self.send(command, files);
        let reply = loop {
            match self.line() {
                Ok(line) => match Wish::parse(&line) {
                    Some(wish) if self.wishes.contains(&wish) => {}
                    Some(wish) => self.wishes.push_back(wish),
                    None => break line,
                },
                Err(error) => {
                    let error = sent.err().unwrap_or(error);
                    return Err(self.unreachable(error));
                }
            }
        };
        result(&reply)
    }

    /// Asks, and waits for a reply with descriptors.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn ask_for_files(&mut self, command: &Command) -> Result<(Value, Vec<OwnedFd>), Failure> {
        let stream = self.reader.get_ref();
        let exchange = || -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
            let (mut bytes, mut files) = (Vec::new(), Vec::new());
            self.send(command, &[])?;
            let mut buffer = vec![0; 64 << 10];
            while bytes.last() != Some(&b'\n') {
                let received = match receive(stream, &mut buffer, MAX_DESCRIPTORS) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    received => received?,
                };
                if received.bytes == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                bytes.extend(&buffer[..received.bytes]);
                files.extend(received.files.into_iter().map(OwnedFd::from));
            }
            Ok((bytes, files))
        };
        let (bytes, files) = exchange().map_err(|error| self.unreachable(error))?;
        let reply: Value =
            serde_json::from_slice(&bytes).map_err(|error| self.unreachable(error))?;
        result(&reply).map(|value| (value, files))
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.get_ref().as_fd()
    }
}

/// What a reply says.
fn result(reply: &Value) -> Result<Value, Failure> {
    let Some(error) = reply.get("error") else { return Ok(reply["ok"].clone()) };
    let message = error["message"].as_str().unwrap_or("it gives no reason").to_owned();
    Err(match error["kind"].as_str() {
        Some("needs-restart") => Failure::NeedsRestart(message),
        _ => Failure::Refused(message),
    })
}

impl Question {
    /// Asks, and returns what is to be shown.
    ///
    /// # Errors
    /// One line that says what is wrong.
    pub fn ask(&self) -> Result<String, Failure> {
        let shown = self.socket.display();
        let unreachable = |error: io::Error| {
            let hint = match error.kind() {
                io::ErrorKind::NotFound => "; is the daemon started with --control?",
                io::ErrorKind::PermissionDenied => "; only root and its own user may ask",
                _ => "",
            };
            Failure::Unreachable(format!("ask the daemon at {shown}: {error}{hint}"))
        };
        let stream = UnixStream::connect(&self.socket).map_err(unreachable)?;
        let mut daemon = Connection::new(stream, shown.to_string());
        match &self.verb {
            Verb::Ask(Command::Add { port, .. }) => {
                let config = port.clone().absolute().check().map_err(Failure::Refused)?;
                // Before anything is opened: a further queue of a TAP would be given frames.
                if let Some(why) = conflict(&mut daemon, &config)? {
                    return Err(Failure::Refused(why));
                }
                Ok(self.show(&add(&mut daemon, &config, false)?))
            }
            Verb::Ask(command @ Command::List {}) if !self.json => {
                let list = self.show(&daemon.ask(command, &[])?);
                let about = daemon.ask(&Command::Features {}, &[])?;
                let missing = about["missing"].as_array().map_or(&[][..], Vec::as_slice);
                let missing = missing
                    .iter()
                    .map(|name| format!("{} is not started: the log says why\n", plain(name)));
                Ok(list + &missing.collect::<String>())
            }
            Verb::Ask(command) => Ok(self.show(&daemon.ask(command, &[])?)),
            Verb::Capture { port, wanted, write } => {
                // Standard output may be the capture.
                eprint!("{}", capture(&mut daemon, port, wanted, write)?);
                Ok(String::new())
            }
            Verb::Top { port, look } => {
                top(&mut daemon, port, look, self.json)?;
                Ok(String::new())
            }
            Verb::Stats { ports, interval, count } => {
                let show = |rates: &[Value]| match self.json {
                    true => format!("{:#}\n", json!(rates)),
                    false => show_rates(rates),
                };
                rates(&mut daemon, ports, *interval, *count, |rates| print(&show(rates)))?;
                Ok(String::new())
            }
            Verb::Reload { config } => self.reload(&mut daemon, config.as_ref()),
        }
    }

    fn reload(&self, daemon: &mut Connection, file: Option<&PathBuf>) -> Result<String, Failure> {
        let own = || {
            let about = daemon.ask(&Command::Features {}, &[])?;
            about["started"]["file"].as_str().map(PathBuf::from).ok_or_else(|| {
                Failure::Refused("the daemon was started without a file: give --config".into())
            })
        };
        let file = file.cloned().map_or_else(own, Ok)?;
        let Outcome { done, failed } = reload(daemon, &file)?;
        let shown = match self.json {
            true => format!("{:#}\n", json!(done)),
            false => done.iter().map(|line| format!("{line}\n")).collect(),
        };
        if failed.is_empty() {
            return Ok(shown);
        }
        // What was done is said too: it is not undone.
        print(&shown);
        failed.iter().for_each(|line| eprintln!("vhost-user-net: {line}"));
        Err(Failure::Refused(format!("reload: done={} failed={}", done.len(), failed.len())))
    }

    fn show(&self, reply: &Value) -> String {
        match (&self.verb, reply) {
            (Verb::Ask(Command::Metrics {}), Value::String(text)) => text.clone(),
            _ if self.json => format!("{reply:#}\n"),
            (Verb::Ask(Command::Show { .. }), report) => show(report),
            (Verb::Ask(Command::Set { .. } | Command::Add { .. }), summary) => {
                table(std::slice::from_ref(summary))
            }
            (Verb::Ask(Command::Remove { port, .. }), _) => format!("{port}: removed\n"),
            (Verb::Ask(Command::Features {}), features) => show_features(features),
            (_, list) => table(list.as_array().map_or(&[], Vec::as_slice)),
        }
    }
}

/// A value without quotes.
pub(super) fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// A value in a table; a list as one word.
fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::Bool(value) => if *value { "on" } else { "off" }.into(),
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(","),
        value => plain(value),
    }
}

/// A time in seconds from the command line.
pub(super) fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.01..=86400.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "write seconds, from 0.01 on".into())
}

/// Writes to standard output; says whether anybody reads it.
pub(super) fn print(text: &str) -> bool {
    let mut output = io::stdout().lock();
    output.write_all(text.as_bytes()).and_then(|()| output.flush()).is_ok()
}

/// A number as people write it: three digits, and `k`, `M` or `G`.
pub(super) fn short(number: f64) -> String {
    let units = [(1e9, "G"), (1e6, "M"), (1e3, "k")];
    match units.iter().find(|(factor, _)| number >= *factor) {
        Some((factor, unit)) => format!("{:.3}{unit}", number / factor),
        None => format!("{number:.0}"),
    }
}

/// Lines of cells, the first their heads, in columns.
pub(super) fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.first().map_or(0, Vec::len);
    let widest = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..count).map(|column| widest(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    text
}

/// Ports, a line each.
fn table(ports: &[Value]) -> String {
    const COLUMNS: [&str; 11] = [
        "name",
        "host",
        "state",
        "link",
        "rx_frames",
        "tx_frames",
        "dropped",
        "rx_limit",
        "tx_limit",
        "mac",
        "anti_spoofing",
    ];
    let heads = COLUMNS.map(|column| column.to_uppercase().replace('_', "-")).to_vec();
    let row = |port: &Value| COLUMNS.map(|column| cell(&port[column])).to_vec();
    columns(&[vec![heads], ports.iter().map(row).collect()].concat())
}

/// What ports move each second, a line each.
fn show_rates(rates: &[Value]) -> String {
    const COLUMNS: [(&str, &str); 9] = [
        ("RX-FRAMES/s", "rx_frames_per_second"),
        ("RX-BIT/s", "rx_bits_per_second"),
        ("TX-FRAMES/s", "tx_frames_per_second"),
        ("TX-BIT/s", "tx_bits_per_second"),
        ("DROPPED/s", "dropped_per_second"),
        ("DEVICE-DROPS/s", "device_drops_per_second"),
        ("KICKS/s", "kicks_per_second"),
        ("CALLS/s", "calls_per_second"),
        ("BUSY", "busy"),
    ];
    let heads = ["NAME"].into_iter().chain(COLUMNS.map(|(head, _)| head)).map(str::to_owned);
    let mut rows: Vec<Vec<String>> = vec![heads.collect()];
    rows.extend(rates.iter().map(|port| {
        let cell = |(_, key): &(&str, &str)| {
            let number = port[*key].as_f64().unwrap_or(0.0);
            if *key == "busy" { format!("{:.1} %", number * 100.0) } else { short(number) }
        };
        [plain(&port["name"])].into_iter().chain(COLUMNS.iter().map(cell)).collect()
    }));
    columns(&rows)
}

/// One port, in words and numbers.
fn show(report: &Value) -> String {
    let mut text = format!("{}: {}\n", plain(&report["name"]), plain(&report["explanation"]));
    let _ = writeln!(text, "  host          {}", plain(&report["host"]));
    if let Some(device) = report["device"].as_object() {
        let (rx, tx) = (&device["rx_drops"], &device["tx_drops"]);
        let name = plain(&device["name"]);
        let _ = writeln!(
            text,
            "  device        {name}, in which the kernel dropped {rx} rx and {tx} tx"
        );
    }
    if let Some(seconds) = report["connected_seconds"].as_u64() {
        let features = plain(&report["features"]);
        let process = report["vmm_process"].as_i64();
        let process = process.map_or(String::new(), |process| format!(", process {process}"));
        let _ = writeln!(
            text,
            "  frontend      connected for {seconds} s{process}, features {features}"
        );
    }
    let _ = writeln!(text, "  connected     {} times so far", report["connections"]);
    if let (Some(mapped), Some(most)) =
        (report["mapped_bytes"].as_u64(), report["max_memory"].as_u64())
    {
        let _ = writeln!(text, "  mapped        {} of {} MiB", mapped >> 20, most >> 20);
    }
    for (way, what) in [("rx", "limit"), ("tx", "limit"), ("rx", "filter"), ("tx", "filter")] {
        let value = plain(&report[format!("{way}_{what}")]);
        let _ = writeln!(text, "  {:<13} {value}", format!("{way} {what}"));
    }
    for what in ["link", "mac", "anti_spoofing", "source_macs", "source_ips", "vlans"] {
        let value = match cell(&report[what]) {
            value if !value.is_empty() => value,
            // Addresses of no kind are named: any may be used.
            _ if what == "source_ips" || report["anti_spoofing"] != true => "any".into(),
            _ => "none".into(),
        };
        let _ = writeln!(text, "  {:<13} {value}", what.replace('_', " "));
    }
    let pairs = report["queue_pairs"].as_array().map_or(&[][..], Vec::as_slice);
    for (number, pair) in pairs.iter().enumerate() {
        let serving = if pair["serving"] == true { "running" } else { "not running" };
        let _ = writeln!(
            text,
            "  queue pair {number}: {serving}, mode {}, {} sessions, {} turns, {} sleeps, {} times out of \
             buffers",
            plain(&pair["mode"]),
            pair["sessions"],
            pair["turns"],
            pair["sleeps"],
            pair["starved"]
        );
        if let (Some(busy), Some(idle)) =
            (pair["busy_seconds"].as_f64(), pair["idle_seconds"].as_f64())
        {
            let _ = write!(text, "    busy {busy:.3} s, idle {idle:.3} s");
            if let Some(half) = pair["kick_to_used_p50"].as_f64() {
                let most = pair["kick_to_used_p99"].as_f64().unwrap_or(f64::INFINITY);
                let _ = write!(text, "; kick to used up to {half} us (half), {most} us (99 %)");
            }
            text.push('\n');
        }
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

/// What the daemon is, and what its ports offer.
fn show_features(reply: &Value) -> String {
    let started = &reply["started"];
    let mut text = format!(
        "vhost-user-net {}, control version {}\n",
        plain(&reply["daemon"]),
        reply["version"]
    );
    let _ = writeln!(text, "  file       {}", started["file"].as_str().unwrap_or("-"));
    for (key, value) in started["settings"].as_object().into_iter().flatten() {
        let value = plain(value);
        let value = if value.is_empty() { "-" } else { &value };
        let _ = writeln!(text, "  {key:<10} {value}");
    }
    for (port, features) in reply["ports"].as_object().into_iter().flatten() {
        let names = |what: &str| -> String {
            let names = features[what].as_array().map_or(&[][..], Vec::as_slice);
            names.iter().map(plain).collect::<Vec<_>>().join(" ")
        };
        let _ = writeln!(text, "{port}: offered {}", names("offered"));
        let _ = writeln!(text, "{port}: in use  {}", names("negotiated"));
    }
    text
}
