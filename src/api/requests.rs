//! The requests of the control socket, and their execution.

use std::os::fd::OwnedFd;

use log::error;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{DaemonInfo, VERSION, metrics, report};
use crate::capture::{MAX_SNAPLEN, Options, parse_filter};
use crate::config::{PortChanges, PortOptions};
use crate::policy::Filter;
use crate::ports::{Origin, Ports, Refusal};

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, clap::Subcommand)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Command {
    /// List the ports, a line each.
    List {},
    /// Show a port's state, settings and counters.
    Show {
        /// The port's name.
        port: String,
    },
    /// Print all counters in Prometheus' text format.
    ///
    /// node_exporter's textfile collector reads it.
    Metrics {},
    /// Change a port until the daemon exits or reads its file again.
    #[command(override_usage = "vhost-user-net ctl set [OPTIONS] <PORT> <CHANGES>")]
    Set {
        /// The port's name.
        port: String,
        /// The changes.
        #[command(flatten)]
        changes: Box<PortChanges>,
    },
    /// Add a port until the daemon exits.
    ///
    /// The options are those of the daemon's command line.
    #[command(
        override_usage = "vhost-user-net ctl add [OPTIONS] <FRONTEND OPTION> <HOST SIDE OPTION>"
    )]
    Add {
        /// The options that describe the port.
        #[command(flatten)]
        port: Box<PortOptions>,
        /// True if the daemon's file describes the port.
        #[arg(skip)]
        #[serde(default)]
        from_file: bool,
    },
    /// Change a running port to these options, if it can change while it runs.
    #[command(skip)]
    Change {
        /// The port's name.
        name: String,
        /// The options that describe the port.
        port: Box<PortOptions>,
    },
    /// Set the ports of the daemon's file that could not be started; the daemon tries them every second.
    #[command(skip)]
    Missing {
        /// The names of these ports.
        ports: Vec<String>,
    },
    /// Log that the client could not read the file of a reload.
    #[command(skip)]
    ReloadRefused {
        /// The reason, with the place in the file.
        why: String,
    },
    /// Replace a port by one that the daemon's file describes; the old port resumes if the new one cannot start. The
    /// request brings the descriptors that the new port needs and the old one does not have.
    #[command(skip)]
    Replace {
        /// The old port's name.
        name: String,
        /// The options that describe the new port.
        port: Box<PortOptions>,
    },
    /// Remove a port: stop its rings and disconnect its frontend.
    Remove {
        /// The port's name.
        port: String,
        /// True if the port is removed because the daemon's file no longer describes it.
        #[arg(skip)]
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        from_file: bool,
    },
    /// Write a port's frames to the pipe that comes with the request.
    #[command(skip)]
    Capture {
        /// The port's name.
        port: String,
        /// The frames to capture.
        #[serde(flatten)]
        wanted: CaptureOptions,
    },
    /// End the capture, and return its statistics.
    #[command(skip)]
    CaptureStop {
        /// The port's name.
        port: String,
    },
    /// Count a port's traffic by protocol and peer until the client disconnects, and return the counts so far.
    #[command(skip)]
    Traffic {
        /// The port's name.
        port: String,
    },
    /// Return the daemon's listening sockets.
    #[command(skip)]
    Listeners {},
    /// Suspend all ports, and return them. They resume if the client disconnects.
    #[command(skip)]
    HandOver {},
    /// Commit the hand-over: the daemon exits, and the client serves the ports.
    #[command(skip)]
    LetGo {},
    /// Print the daemon's version and settings, and the ports' feature bits.
    Features {},
}

impl Command {
    /// Returns whether the request needs no thread of a port, so that it is possible during a hand-over.
    pub(super) fn only_asks(&self) -> bool {
        match self {
            Command::List {}
            | Command::Show { .. }
            | Command::Metrics {}
            | Command::Features {}
            | Command::Missing { .. }
            | Command::ReloadRefused { .. }
            | Command::Listeners {}
            | Command::LetGo {} => true,
            Command::Set { .. }
            | Command::Add { .. }
            | Command::Change { .. }
            | Command::Replace { .. }
            | Command::Remove { .. }
            | Command::Capture { .. }
            | Command::CaptureStop { .. }
            | Command::Traffic { .. }
            | Command::HandOver {} => false,
        }
    }
}

/// The frames to capture.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
pub struct CaptureOptions {
    /// Keep at most this many bytes of each frame, 14 or more [default: all].
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(14..=MAX_SNAPLEN as i64))]
    pub(super) snaplen: Option<u32>,
    /// Capture only frames that match one of these, as "tcp dport 80; udp from 192.0.2.0/24", or that a
    /// whole list of rules allows [default: all].
    #[arg(long, value_name = "RULES", value_parser = parse_filter)]
    pub(super) filter: Option<Filter>,
    /// Stop after this many frames [default: no limit].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) count: Option<u64>,
}

/// The reason why a request is refused.
pub(super) struct Refused {
    /// The kind of reason, for programs.
    pub(super) kind: &'static str,
    /// The line for an operator.
    pub(super) message: String,
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        let (kind, message) = match refusal {
            Refusal::NoSuchPort(name) => ("no-such-port", format!("there is no port {name:?}")),
            Refusal::CannotBeDone(why) => ("cannot-be-done", why),
            Refusal::NeedsRestart(keys) => {
                ("needs-restart", format!("{}: can't change while the port runs", keys.join(", ")))
            }
        };
        Refused { kind, message }
    }
}

/// A reply, and the descriptors that go with it.
pub(super) struct Answer {
    pub(super) value: Value,
    pub(super) files: Vec<OwnedFd>,
}

/// Carries out a request. `files` are the descriptors that came with it.
pub(super) fn carry_out(
    command: Command,
    files: Vec<OwnedFd>,
    ports: &mut Ports,
    info: &DaemonInfo,
) -> Result<Answer, Refused> {
    let value = match command {
        Command::Listeners {} => {
            let (names, files) = info.listeners().map_err(|error| Refused {
                kind: "cannot-be-done",
                message: format!("cannot pass on the daemon's sockets: {error}"),
            })?;
            return Ok(Answer { value: json!(names), files });
        }
        Command::HandOver {} => {
            let (told, files) = ports.prepare_handover()?;
            return Ok(Answer { value: json!(told), files });
        }
        command => answer(command, files, ports, &info.about)?,
    };
    Ok(Answer { value, files: Vec::new() })
}

fn answer(
    command: Command,
    files: Vec<OwnedFd>,
    ports: &mut Ports,
    about: &Value,
) -> Result<Value, Refused> {
    match command {
        Command::Traffic { port } => {
            Ok(ports.find(&port)?.traffic()?.iter().map(report::traffic).collect())
        }
        Command::LetGo {} => {
            ports.commit_handover()?;
            Ok(json!({"gone": true}))
        }
        Command::Listeners {} | Command::HandOver {} => unreachable!("carried out before"),
        Command::List {} => Ok(ports.iter().map(|port| json!(report::summary(port))).collect()),
        Command::Show { port } => Ok(json!(report::full(ports, ports.find(&port)?))),
        Command::Metrics {} => Ok(json!(metrics::text(ports))),
        Command::Set { port, changes } => {
            let options = ports.find(&port)?.options().clone().with(*changes);
            ports.change(&port, options, Origin::Operator)?;
            Ok(json!(report::summary(ports.find(&port)?)))
        }
        Command::Add { port, from_file } => {
            Ok(json!(report::summary(ports.add(*port, files, from_file)?)))
        }
        Command::Change { name, port } => {
            Ok(json!({"changed": ports.change(&name, *port, Origin::File)?}))
        }
        Command::Replace { name, port } => {
            Ok(json!(report::summary(ports.replace(&name, *port, files)?)))
        }
        Command::Missing { ports: names } => {
            ports.set_missing(names);
            Ok(json!({}))
        }
        Command::ReloadRefused { why } => {
            error!("daemon: reload refused: {why}; no port changed");
            Ok(json!({}))
        }
        Command::Remove { port, from_file } => {
            let origin = if from_file { Origin::File } else { Origin::Operator };
            ports.remove(&port, origin)?;
            Ok(json!({"removed": port}))
        }
        Command::Capture { port, wanted } => {
            let Ok([pipe]) = <[OwnedFd; 1]>::try_from(files) else {
                let message =
                    "cannot capture: the request brings no pipe; use 'vhost-user-net ctl capture'"
                        .to_owned();
                return Err(Refused { kind: "cannot-be-done", message });
            };
            let snaplen = wanted.snaplen.unwrap_or(MAX_SNAPLEN).min(MAX_SNAPLEN);
            let (count, filter) = (wanted.count, wanted.filter.unwrap_or_default());
            ports.capture(&port, Options { snaplen, count, filter }, pipe.into())?;
            Ok(json!({"capturing": port}))
        }
        Command::CaptureStop { port } => Ok(json!(ports.find(&port)?.stop_capture())),
        Command::Features {} => {
            let mut reply = json!({
                "daemon": env!("CARGO_PKG_VERSION"),
                "version": VERSION,
                "started": about,
                "missing": ports.missing(),
            });
            let features =
                ports.iter().map(|port| (port.name().to_owned(), report::features(port)));
            reply["ports"] = features.collect::<serde_json::Map<_, _>>().into();
            Ok(reply)
        }
    }
}
