//! One daemon takes over from another: connections, rings, TAP queues and counters.
//!
//! The old one stops all ports where they stand, and passes on what they consist of. The new one builds
//! them, and says so: only then does the old one let go. Until then it can go on: whatever goes wrong,
//! one of both serves the guests. What a frontend has told is told again, as vhost-user messages, so
//! that both may be of different versions.

use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use log::{info, warn};
use serde::{Deserialize, Serialize};

use super::StartError;
use super::control::Order;
use super::opening::Descriptors;
use super::ports::{Opened, Port, Ports, Prepared, Refusal};
use crate::api::Command;
use crate::api::client::Connection;
use crate::config::{Frontend, Host, PortOptions};
use crate::counters::PairCounters;
use crate::endpoint::Endpoint;

/// How long a port may take to stop.
const PATIENCE: Duration = Duration::from_secs(2);

/// A port, but for its descriptors. Further keys may come with later versions, and none go.
#[derive(Debug, Serialize, Deserialize)]
pub struct Told {
    name: String,
    options: PortOptions,
    #[serde(default)]
    from_file: bool,
    /// Whether there is a socket that frontends connect to.
    listens: bool,
    /// Whether a frontend is connected.
    connected: bool,
    /// Queues of a TAP.
    queues: usize,
    #[serde(default)]
    connections: u64,
    #[serde(default)]
    counters: Vec<PairCounters>,
}

/// The daemon that is to be taken over from.
pub(super) struct Predecessor {
    connection: Connection,
    listeners: Vec<(String, OwnedFd)>,
}

impl Predecessor {
    /// Asks the one that listens on a control socket for the sockets that its clients connect to.
    ///
    /// # Errors
    /// Nobody listens there, or says no.
    pub(super) fn find(control: &Path) -> Result<Self, StartError> {
        let shown = control.display();
        let failed = |error: &dyn fmt::Display| {
            StartError::new(format!("take over from the daemon at {shown}: {error}"))
        };
        let stream = UnixStream::connect(control).map_err(|error| failed(&error))?;
        let mut connection = Connection::new(stream, shown.to_string());
        let answer = connection.ask_for_files(&Command::Listeners {});
        let (names, files) = answer.map_err(|error| failed(&error))?;
        let names = serde_json::from_value::<Vec<String>>(names).map_err(|error| failed(&error))?;
        Ok(Predecessor { connection, listeners: names.into_iter().zip(files).collect() })
    }

    /// The socket for a kind of clients, once.
    pub(super) fn listener(&mut self, name: &str) -> Option<OwnedFd> {
        let place = self.listeners.iter().position(|(it, _)| it == name)?;
        Some(self.listeners.remove(place).1)
    }

    /// Has all its ports, and has it end. If that fails it goes on, as soon as we have gone.
    ///
    /// # Errors
    /// A port can't change hands, or can't be built.
    pub(super) fn succeed(mut self, ports: &mut Ports) -> Result<(), StartError> {
        let started = Instant::now();
        let failed = |error: &dyn fmt::Display| StartError::new(format!("take over: {error}"));
        let answer = self.connection.ask_for_files(&Command::HandOver {});
        let (told, files) = answer.map_err(|error| failed(&error))?;
        let told: Vec<Told> = serde_json::from_value(told).map_err(|error| failed(&error))?;
        let mut files = files.into_iter();
        let prepared = told
            .into_iter()
            .map(|told| ports.adopt(told, &mut files))
            .collect::<Result<Vec<_>, _>>()?;
        let took = started.elapsed();
        self.connection.ask(&Command::LetGo {}, &[]).map_err(|error| failed(&error))?;
        let count = prepared.len();
        for mut port in prepared {
            // Only now is there nobody else who would remove it, or miss it.
            port.own_socket();
            ports.start(port)?;
        }
        info!("took {count} ports over, which stood still for {took:?} at the most");
        Ok(())
    }
}

impl Ports {
    /// Stops all ports where they stand, and passes them on: what they are, and their descriptors. They
    /// have to be [resumed](Self::resume) or [given away](Self::give_away) after that.
    ///
    /// # Errors
    /// A port can't change hands; all go on then.
    pub fn hand_over(&mut self) -> Result<(Vec<Told>, Vec<OwnedFd>), Refusal> {
        let mut all = (Vec::new(), Vec::new());
        for port in self.iter() {
            match port.hand_over() {
                Ok((told, files)) => {
                    all.0.push(told);
                    all.1.extend(files);
                }
                Err(why) => {
                    self.resume();
                    return Err(Refusal::CannotBeDone(why));
                }
            }
        }
        info!("all ports stand still for another daemon");
        Ok(all)
    }

    /// Has all ports go on that were handed over, since nobody has taken them.
    pub fn resume(&self) {
        warn!("no other daemon goes on: the ports are ours still");
        self.iter().for_each(|port| port.tell(Order::Resume));
    }

    /// Lets go of all ports: another daemon goes on.
    pub fn give_away(&mut self) {
        self.iter().for_each(|port| port.tell(Order::GiveAway));
        self.clear();
    }

    /// Builds a port that was handed over, of the next descriptors; it moves frames at once.
    ///
    /// # Errors
    /// What is missing, or can't be opened.
    pub(super) fn adopt(
        &self,
        told: Told,
        files: &mut impl Iterator<Item = OwnedFd>,
    ) -> Result<Prepared, StartError> {
        let Told { name, options, from_file, listens, connected, queues, .. } = told;
        let failed = |why: String| StartError::new(format!("take {name} over: {why}"));
        let mut next = |is_there: bool| -> Result<Option<OwnedFd>, StartError> {
            if !is_there {
                return Ok(None);
            }
            files.next().map(Some).ok_or_else(|| failed("its descriptors did not come".into()))
        };
        let (listener, connection) = (next(listens)?, next(connected)?);
        let tap_queues = (0..queues).map(|_| next(true)).collect::<Result<Vec<_>, _>>()?;
        let messages = next(true)?.map(UnixStream::from);
        let config = options.check().map_err(failed)?;
        let endpoint = match (&config.frontend, listener) {
            (Frontend::Inherited(_), None) => Endpoint::Connected(None),
            (_, Some(fd)) => Endpoint::taken(fd).map_err(|error| failed(error.to_string()))?,
            (frontend, None) => Endpoint::open(frontend, None)?,
        };
        let tap_queues = tap_queues.into_iter().flatten().collect();
        let brought = Descriptors { frontend: None, tap_queues };
        let opened = Opened::adopted(name.clone(), config, from_file, brought, endpoint)?;
        let mut prepared = self.prepare(opened, told.counters)?;
        prepared.status().set_connections(told.connections.saturating_sub(connected.into()));
        if let Some(messages) = messages {
            let connection = connection.map(UnixStream::from);
            let adopted = prepared.control().adopt(messages, connection);
            adopted.map_err(|error| failed(error.to_string()))?;
        }
        Ok(prepared)
    }
}

impl Port {
    /// Stops it where it stands, and passes it on.
    fn hand_over(&self) -> Result<(Told, Vec<OwnedFd>), String> {
        let name = self.name();
        if matches!(self.config().host, Host::AfXdp(_)) {
            return Err(format!(
                "{name} is on AF_XDP, whose sockets can't change hands: restart the daemon instead"
            ));
        }
        if self.status().has_ended() {
            return Err(format!("{name} has ended: remove it first"));
        }
        let (reply, handed) = channel();
        self.tell(Order::HandOver(reply));
        let handed = handed
            .recv_timeout(PATIENCE)
            .map_err(|_| format!("{name}: its thread does not answer"))??;
        let queues = self.queues().map_err(|error| format!("{name}: {error}"))?;
        let counters = self.status().pairs.iter();
        let counters = counters.map(|pair| serde_json::to_value(&pair.counters));
        let counters = counters.map(|value| value.and_then(serde_json::from_value));
        let told = Told {
            name: name.to_owned(),
            options: self.options().clone(),
            from_file: self.is_from_file(),
            listens: handed.listener.is_some(),
            connected: handed.connection.is_some(),
            queues: queues.len(),
            connections: self.status().connection().connections,
            counters: counters.collect::<Result<_, _>>().map_err(|error| error.to_string())?,
        };
        let files = handed.listener.into_iter().chain(handed.connection).chain(queues);
        Ok((told, files.chain([handed.told.into()]).collect()))
    }
}
