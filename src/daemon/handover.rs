//! A daemon takes over all ports of another: connections, rings, TAP queues and counters.
//!
//! 1. The predecessor suspends all ports and passes on what they consist of (`hand-over`). What a
//!    frontend has told is replayed as vhost-user messages, so both may be of different versions.
//! 2. The successor builds the ports and starts their threads, which stand still. Nothing that both share
//!    is changed: neither a TAP's settings nor guest memory.
//! 3. The successor asks the predecessor to let go (`let-go`), and resumes the ports. The predecessor
//!    exits.
//!
//! Until step 3 the predecessor can resume, and does so when the successor fails, dies, or takes longer
//! than 2 s. No frontend can prevent a take-over: one that holds up its own port is
//! disconnected.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use log::{info, warn};
use serde::{Deserialize, Serialize};

use super::control::{self, HandoverFds, Order};
use super::ports::{Handover, Opened, Port, Ports, Refusal};
use crate::api::Command;
use crate::config::{Host, PortOptions};
use crate::counters::PairCounters;
use crate::ctl::{Connection, Failure};
use crate::endpoint::{Endpoint, Frontend};
use crate::error::StartError;
use crate::port::TapState;

/// Descriptors that a successor must have left for clients and connections.
const SPARE_DESCRIPTORS: usize = 32;
/// Time that all ports together have to suspend.
const SUSPEND_TIMEOUT: Duration = Duration::from_millis(500);
/// Time from the first port's suspension to the successor's request to let go.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(2);

/// A port, but for its descriptors. Later versions add keys and remove none.
#[derive(Debug, Serialize, Deserialize)]
pub struct PortHandover {
    name: String,
    options: PortOptions,
    #[serde(default)]
    from_file: bool,
    /// Whether there is a socket that frontends connect to.
    listens: bool,
    /// Whether a frontend is connected, and its connection is passed on.
    connected: bool,
    /// Queues of a TAP.
    queues: usize,
    /// The TAP as the predecessor has opened it.
    #[serde(default)]
    tap: Option<TapState>,
    /// Messages of the replay.
    #[serde(default)]
    messages: Option<usize>,
    #[serde(default)]
    connections: u64,
    #[serde(default)]
    counters: Vec<PairCounters>,
}

/// The daemon that is to be taken over from.
pub(super) struct Predecessor {
    connection: Connection,
    listeners: Vec<(String, OwnedFd)>,
    /// When its ports were suspended, at the earliest.
    suspended: Instant,
}

impl Predecessor {
    /// Asks the one that listens on a control socket for the sockets that its clients connect to.
    ///
    /// # Errors
    /// Nobody listens there, or the daemon refuses.
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
        if names.len() != files.len() {
            return Err(failed(&format!("{} of {} sockets came", files.len(), names.len())));
        }
        let listeners = names.into_iter().zip(files).collect();
        Ok(Predecessor { connection, listeners, suspended: Instant::now() })
    }

    /// The socket for a kind of clients, once.
    pub(super) fn listener(&mut self, name: &str) -> Option<OwnedFd> {
        let place = self.listeners.iter().position(|(it, _)| it == name)?;
        Some(self.listeners.remove(place).1)
    }

    /// Builds and starts all its ports, which stand still. It resumes them itself as soon as the
    /// connection to it is closed.
    ///
    /// # Errors
    /// A port can't change hands, or can't be built.
    pub(super) fn take_over(&mut self, ports: &mut Ports) -> Result<(), StartError> {
        self.suspended = Instant::now();
        let answer = self.connection.ask_for_files(&Command::HandOver {});
        let (told, files) = answer.map_err(|error| failed(&error))?;
        let told: Vec<PortHandover> =
            serde_json::from_value(told).map_err(|error| failed(&error))?;
        let mut files = files.into_iter();
        let restored = told
            .into_iter()
            .map(|port| ports.restore_port(port, &mut files))
            .collect::<Result<Vec<_>, _>>()?;
        if files.next().is_some() {
            return Err(failed(&"more descriptors came than were announced"));
        }
        let deadline = self.suspended + TAKE_OVER_TIMEOUT;
        for (name, restored) in restored {
            restored
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
                .map_err(|_| "its thread does not answer".to_owned())
                .and_then(|restored| restored)
                .map_err(|error| StartError::new(format!("take {name} over: {error}")))?;
        }
        self.check_spare_descriptors(ports)
    }

    /// Refuses to take over without the descriptors that are needed to serve: one for each session, and
    /// some for clients.
    fn check_spare_descriptors(&self, ports: &Ports) -> Result<(), StartError> {
        let pairs: usize = ports.iter().map(|port| port.status().pairs.len()).sum();
        let wanted = pairs + SPARE_DESCRIPTORS;
        let spare: io::Result<Vec<_>> =
            (0..wanted).map(|_| self.connection.as_fd().try_clone_to_owned()).collect();
        spare.map(drop).map_err(|error| {
            failed(&format!("{wanted} more descriptors are needed: {error}; raise LimitNOFILE"))
        })
    }

    /// Has it let go of the ports. Nobody else serves them then.
    ///
    /// # Errors
    /// It serves the ports again, or does not answer: it will, since the time that it waits is over by
    /// then.
    pub(super) fn let_go(mut self) -> Result<(), StartError> {
        match self.connection.ask(&Command::LetGo {}, &[]) {
            Ok(_) => {}
            Err(Failure::Gone(error)) => {
                warn!("daemon: predecessor died during the take-over: {error}")
            }
            Err(error) => return Err(failed(&error)),
        }
        let paused = self.suspended.elapsed();
        info!("daemon: took over; ports stood still for {paused:?} at the most");
        Ok(())
    }
}

fn failed(error: &dyn fmt::Display) -> StartError {
    StartError::new(format!("take over: {error}"))
}

/// Why a successor does not get ports that are resumed.
pub fn too_late() -> Refusal {
    Refusal::CannotBeDone(format!(
        "the ports are resumed already: a take-over may take {} s",
        TAKE_OVER_TIMEOUT.as_secs()
    ))
}

impl Ports {
    /// Suspends all ports that run, and passes them on: what they are, and their descriptors. They
    /// resume after 2 s, unless they are [aborted](Self::abort_handover) or
    /// [committed](Self::commit_handover) before.
    ///
    /// # Errors
    /// A port can't change hands; all resume then.
    pub fn prepare_handover(&mut self) -> Result<(Vec<PortHandover>, Vec<OwnedFd>), Refusal> {
        self.check_present()?;
        let running = || self.iter().filter(|port| !port.status().has_ended());
        if let Some(port) = running().find(|port| matches!(port.config().host, Host::AfXdp(_))) {
            return Err(Refusal::CannotBeDone(format!(
                "{} is on AF_XDP, whose sockets can't change hands: restart the daemon instead",
                port.name()
            )));
        }
        let now = Instant::now();
        let suspended: Vec<_> = running()
            .map(|port| {
                let (reply, fds) = channel();
                port.tell(Order::PrepareHandover(reply));
                (port, fds)
            })
            .collect();
        let mut all = (Vec::new(), Vec::new());
        let passed = suspended.into_iter().try_for_each(|(port, fds)| {
            let passed = port.pass_on(&fds, now + SUSPEND_TIMEOUT);
            if let Some((told, files)) = passed.map_err(|why| format!("{}: {why}", port.name()))? {
                all.0.push(told);
                all.1.extend(files);
            }
            Ok::<(), String>(())
        });
        self.set_handover(Handover::Until(now + TAKE_OVER_TIMEOUT));
        if let Err(why) = passed {
            self.abort_handover("a port can't be passed on");
            return Err(Refusal::CannotBeDone(why));
        }
        info!("daemon: all ports suspended for a take-over");
        Ok(all)
    }

    /// Resumes all ports, if another daemon has them.
    pub fn abort_handover(&mut self, why: &str) {
        if self.handover_deadline().is_some() {
            warn!("daemon: take-over aborted: {why}; resuming all ports");
            self.resume();
        }
    }

    /// Resumes all ports.
    pub(super) fn resume(&mut self) {
        self.set_handover(Handover::None);
        self.iter().for_each(|port| port.tell(Order::Resume));
    }

    /// Lets go of all ports: another daemon serves them. They stay handed over.
    ///
    /// # Errors
    /// It is too late: they are resumed.
    pub fn commit_handover(&mut self) -> Result<(), Refusal> {
        let deadline = self.handover_deadline();
        if deadline.is_none_or(|deadline| Instant::now() > deadline) {
            self.abort_handover("it took too long");
            return Err(too_late());
        }
        self.set_handover(Handover::Committed);
        self.iter().for_each(|port| port.tell(Order::CommitHandover));
        Ok(())
    }

    /// Refuses what can't be done while another daemon has the ports.
    pub fn check_present(&self) -> Result<(), Refusal> {
        match self.handover() {
            Handover::None => Ok(()),
            Handover::Until(_) | Handover::Committed => Err(Refusal::CannotBeDone(
                "another daemon is taking the ports over: try again in a few seconds".into(),
            )),
        }
    }

    /// Resumes the ports if their successor has not taken them in time; returns how long it has left.
    pub(super) fn end_overdue_handover(&mut self) -> Option<Duration> {
        let left = self.handover_deadline()?.saturating_duration_since(Instant::now());
        if left.is_zero() {
            self.abort_handover("it takes too long");
            return None;
        }
        Some(left)
    }

    /// Builds a port that was passed on, of the next descriptors, and starts its thread, which stands
    /// still. The receiver hears whether it can be resumed.
    ///
    /// # Errors
    /// What is missing, or can't be opened.
    fn restore_port(
        &mut self,
        told: PortHandover,
        files: &mut impl Iterator<Item = OwnedFd>,
    ) -> Result<(String, Receiver<Result<(), String>>), StartError> {
        let PortHandover { name, options, from_file, listens, connected, queues, .. } = told;
        let failed = |why: String| StartError::new(format!("take {name} over: {why}"));
        let mut next = || files.next().ok_or_else(|| failed("its descriptors did not come".into()));
        let listener = listens.then(&mut next).transpose()?;
        let connection = connected.then(&mut next).transpose()?;
        let queues = (0..queues).map(|_| next()).collect::<Result<Vec<_>, _>>()?;
        let replay = UnixStream::from(next()?);
        let config = options.check().map_err(failed)?;
        let endpoint = match (&config.frontend, listener) {
            (Frontend::Inherited(_), None) => Endpoint::Connected(None),
            (_, Some(fd)) => Endpoint::taken(fd).map_err(|error| failed(error.to_string()))?,
            (frontend, None) => Endpoint::open(frontend, None)?,
        };
        let opened =
            Opened::of_predecessor(name.clone(), config, from_file, (queues, told.tap), endpoint)?;
        let mut prepared = self.prepare(opened, told.counters)?;
        prepared.status().set_connections(told.connections.saturating_sub(connected.into()));
        let (done, restored) = channel();
        prepared.succeed(control::Predecessor {
            replay,
            messages: told.messages,
            connection: connection.map(UnixStream::from),
            done,
        });
        self.start(prepared)?;
        Ok((name, restored))
    }
}

impl Port {
    /// What a successor needs of a port that was told to suspend. A port that does not do so in time is
    /// passed on without its frontend. `None` if the port has ended.
    ///
    /// # Errors
    /// No descriptor is to be had.
    fn pass_on(
        &self,
        fds: &Receiver<Result<HandoverFds, String>>,
        deadline: Instant,
    ) -> Result<Option<(PortHandover, Vec<OwnedFd>)>, String> {
        let text = |error: io::Error| error.to_string();
        let left = deadline.saturating_duration_since(Instant::now());
        let fds = match fds.recv_timeout(left) {
            Ok(fds) => fds?,
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                warn!("{}: does not suspend in time; frontend disconnected", self.name());
                let (replay, _) = UnixStream::pair().map_err(text)?;
                let listener = self.listener().map_err(text)?;
                HandoverFds { listener, connection: None, replay, messages: 0 }
            }
        };
        let queues = self.queues().map_err(text)?;
        let counters = self.status().pairs.iter();
        let counters = counters.map(|pair| serde_json::to_value(&pair.counters));
        let counters = counters.map(|value| value.and_then(serde_json::from_value));
        let told = PortHandover {
            name: self.name().to_owned(),
            options: self.options().clone(),
            from_file: self.is_from_file(),
            listens: fds.listener.is_some(),
            connected: fds.connection.is_some(),
            queues: queues.len(),
            tap: self.tap().cloned(),
            messages: Some(fds.messages),
            connections: self.status().connection().connections,
            counters: counters.collect::<Result<_, _>>().map_err(|error| error.to_string())?,
        };
        let files = fds.listener.into_iter().chain(fds.connection).chain(queues);
        Ok(Some((told, files.chain([fds.replay.into()]).collect())))
    }
}
