//! `vhost-user-net ctl`: the client of the control socket.
//!
//! The client sends each request as one line and shows the reply as text or JSON. For a new port, the client also
//! opens the socket and the TAP queues and passes them to the daemon, whose sandbox forbids opening them.

mod capture;
mod connection;
mod reload;
mod stats;
mod text;
mod top;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use crate::api::requests::{CaptureOptions, Command};
pub use connection::{Connection, Failure, HelperRequest};
pub use reload::{Outcome, reload, reopen_tap, start_missing};
use reload::{add, conflict};
use text::{plain, print};
pub use top::TopOptions;

/// Default path of the daemon's control socket.
const DEFAULT_CONTROL: &str = "/run/vhost-user-net/control.sock";

/// Command line of `ctl`: the daemon to ask, and the action.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct Options {
    /// Ask the daemon at this unix socket.
    ///
    /// [default: /run/vhost-user-net/control.sock]
    #[arg(long, value_name = "PATH", global = true, default_value = DEFAULT_CONTROL, hide_default_value = true, display_order = 900)]
    control: PathBuf,
    /// Print the reply in JSON.
    #[arg(long, global = true, display_order = 901)]
    json: bool,
    #[command(subcommand)]
    action: Action,
}

/// Actions of `ctl`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum Action {
    /// One request to the daemon.
    #[command(flatten)]
    Request(Command),
    /// Write a port's frames to a pcapng file until interrupted.
    Capture {
        /// The port's name.
        port: String,
        /// Frames to capture.
        #[command(flatten)]
        wanted: CaptureOptions,
        /// Write to this file; - is standard output.
        #[arg(short, long, value_name = "FILE")]
        write: PathBuf,
    },
    /// Show a guest's traffic by protocol and peer until interrupted.
    Top {
        /// The port's name.
        port: String,
        /// Rate and length of the table.
        #[command(flatten)]
        options: TopOptions,
    },
    /// Print ports' frames, bits, drops and notifications per second.
    Stats {
        /// Names of ports [default: all].
        ports: Vec<String>,
        /// Count for this many seconds before each table, 0.01 to 86400.
        #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
        interval: Duration,
        /// Print this many tables.
        #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u64).range(1..))]
        count: u64,
    },
    /// Add, change and remove ports as the daemon's file says.
    Reload {
        /// Read this file [default: the one that the daemon was started with].
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
}

/// Parses a time in seconds.
fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.01..=86400.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "write seconds, 0.01 to 86400".into())
}

impl Options {
    /// Carries out the action and returns the text to show.
    ///
    /// # Errors
    /// The daemon cannot be reached or refuses, or a file cannot be read or written.
    pub fn run(&self) -> Result<String, Failure> {
        let shown = self.control.display();
        let unreachable = |error: io::Error| {
            let hint = match error.kind() {
                io::ErrorKind::NotFound => "; is the daemon started with --control?",
                io::ErrorKind::PermissionDenied => "; run ctl as root or as the daemon's user",
                _ => "",
            };
            Failure::Unreachable(format!("cannot reach the daemon at {shown}: {error}{hint}"))
        };
        let stream = UnixStream::connect(&self.control).map_err(unreachable)?;
        let mut daemon = Connection::new(stream, shown.to_string());
        match &self.action {
            Action::Request(Command::Add { port, .. }) => {
                let config = port.clone().absolute().check().map_err(Failure::Refused)?;
                // Before anything is opened: the kernel would steer frames to another queue of a running TAP.
                if let Some(why) = conflict(&mut daemon, &config)? {
                    return Err(Failure::Refused(why));
                }
                Ok(self.text(&add(&mut daemon, &config, false)?))
            }
            Action::Request(command @ Command::List {}) if !self.json => {
                let list = self.text(&daemon.ask(command, &[])?);
                let about = daemon.ask(&Command::Features {}, &[])?;
                let missing = about["missing"].as_array().map_or(&[][..], Vec::as_slice);
                let missing = missing
                    .iter()
                    .map(|name| format!("{} is not started: the log says why\n", plain(name)));
                Ok(list + &missing.collect::<String>())
            }
            Action::Request(command) => Ok(self.text(&daemon.ask(command, &[])?)),
            Action::Capture { port, wanted, write } => {
                // The captured frames may go to standard output.
                eprint!("{}", capture::capture(&mut daemon, port, wanted, write)?);
                Ok(String::new())
            }
            Action::Top { port, options } => {
                top::top(&mut daemon, port, options, self.json)?;
                Ok(String::new())
            }
            Action::Stats { ports, interval, count } => {
                let table = |rates: &[Value]| match self.json {
                    true => format!("{:#}\n", json!(rates)),
                    false => text::rates(rates),
                };
                stats::rates(&mut daemon, ports, *interval, *count, |rates| print(&table(rates)))?;
                Ok(String::new())
            }
            Action::Reload { config } => self.reload(&mut daemon, config.as_ref()),
        }
    }

    fn reload(&self, daemon: &mut Connection, file: Option<&PathBuf>) -> Result<String, Failure> {
        let own = || {
            let about = daemon.ask(&Command::Features {}, &[])?;
            about["started"]["file"].as_str().map(PathBuf::from).ok_or_else(|| {
                Failure::Refused(
                    "the daemon was started without a file; name one with --config".into(),
                )
            })
        };
        let file = file.cloned().map_or_else(own, Ok)?;
        let reloaded = reload(daemon, &file);
        if let Err(Failure::Refused(why)) = &reloaded {
            // For the daemon's log. An older daemon does not know the request.
            let _ = daemon.ask(&Command::ReloadRefused { why: why.clone() }, &[]);
        }
        let Outcome { done, failed } = reloaded?;
        let shown = match self.json {
            true => format!("{:#}\n", json!(done)),
            false => done.iter().map(|line| format!("{line}\n")).collect(),
        };
        if failed.is_empty() {
            return Ok(shown);
        }
        // The changes that succeeded stay, so they are printed too.
        print(&shown);
        failed.iter().for_each(|line| eprintln!("vhost-user-net: {line}"));
        Err(Failure::Refused(format!("reload: done={} failed={}", done.len(), failed.len())))
    }

    /// Returns a reply as text, or as JSON with `--json`.
    fn text(&self, reply: &Value) -> String {
        match (&self.action, reply) {
            (Action::Request(Command::Metrics {}), Value::String(text)) => text.clone(),
            _ if self.json => format!("{reply:#}\n"),
            (Action::Request(Command::Show { .. }), report) => text::report(report),
            (Action::Request(Command::Set { .. } | Command::Add { .. }), summary) => {
                text::list(std::slice::from_ref(summary))
            }
            (Action::Request(Command::Remove { port, .. }), _) => format!("{port}: removed\n"),
            (Action::Request(Command::Features {}), features) => text::features(features),
            (_, list) => text::list(list.as_array().map_or(&[], Vec::as_slice)),
        }
    }
}
