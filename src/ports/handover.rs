//! Take-over of all ports by another daemon: the old daemon's part, and the new one's.
//!
//! The old daemon suspends its ports at the request `hand-over`, and ends them at the request `let-go`. The ports
//! resume if the new daemon fails, exits, or takes longer than 2 s. The frontend's messages are replayed as
//! vhost-user messages, so the two daemons may be of different versions.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use log::{info, warn};
use serde::{Deserialize, Serialize};

use super::control::{ControlCommand, FrontendHandover, HandoverFds};
use super::{Opened, Port, Ports, Refusal};
use crate::config::{Host, PortOptions};
use crate::counters::PairCounters;
use crate::endpoint::{Endpoint, Frontend};
use crate::error::StartError;
use crate::port::TapState;

/// Time that all ports together have to suspend.
const SUSPEND_TIMEOUT: Duration = Duration::from_millis(500);
/// Maximum time from the first port's suspension to the successor's request `let-go`.
pub const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(2);

/// The owner of the ports.
#[derive(Debug, Clone, Copy)]
pub(super) enum Handover {
    /// This daemon.
    None,
    /// None: another daemon is taking over the ports. They resume here at this deadline.
    Until(Instant),
    /// Another daemon, for good.
    Committed,
}

/// A port without its descriptors. Later versions add keys and remove none.
#[derive(Debug, Serialize, Deserialize)]
pub struct PortHandover {
    name: String,
    options: PortOptions,
    #[serde(default)]
    from_file: bool,
    /// True if the port has a listening socket.
    listens: bool,
    /// True if a frontend is connected, and its connection is passed on.
    connected: bool,
    /// Number of a TAP's queues.
    queues: usize,
    /// The TAP's state, as the old daemon has set it.
    #[serde(default)]
    tap: Option<TapState>,
    /// Number of messages of the replay.
    #[serde(default)]
    messages: Option<usize>,
    #[serde(default)]
    connections: u64,
    #[serde(default)]
    counters: Vec<PairCounters>,
}

/// Returns the refusal for a successor whose deadline has passed.
pub fn too_late() -> Refusal {
    Refusal::CannotBeDone(format!(
        "the take-over took longer than {} s; the old daemon has resumed its ports",
        TAKE_OVER_TIMEOUT.as_secs()
    ))
}

impl Ports {
    /// Suspends all ports, and returns their descriptions and descriptors for another daemon. The ports resume after
    /// 2 s, unless the hand-over is [aborted](Self::abort_handover) or [committed](Self::commit_handover) before.
    ///
    /// # Errors
    /// A port cannot be passed on; all ports resume.
    pub fn prepare_handover(&mut self) -> Result<(Vec<PortHandover>, Vec<OwnedFd>), Refusal> {
        self.check_present()?;
        let running = || self.iter().filter(|port| !port.status().has_ended());
        if let Some(port) = running().find(|port| matches!(port.config().host, Host::AfXdp(_))) {
            return Err(Refusal::CannotBeDone(format!(
                "cannot take over port {}: AF_XDP sockets cannot be passed on; restart the daemon instead",
                port.name()
            )));
        }
        let now = Instant::now();
        let suspended: Vec<_> = running()
            .map(|port| {
                let (reply, fds) = channel();
                port.send(ControlCommand::PrepareHandover(reply));
                (port, fds)
            })
            .collect();
        let mut all = (Vec::new(), Vec::new());
        let passed = suspended.into_iter().try_for_each(|(port, fds)| {
            let passed = port.pass_on(&fds, now + SUSPEND_TIMEOUT);
            if let Some((handover, files)) =
                passed.map_err(|why| format!("{}: {why}", port.name()))?
            {
                all.0.push(handover);
                all.1.extend(files);
            }
            Ok::<(), String>(())
        });
        self.handover = Handover::Until(now + TAKE_OVER_TIMEOUT);
        if let Err(why) = passed {
            self.abort_handover("a port cannot be passed on");
            return Err(Refusal::CannotBeDone(why));
        }
        info!("daemon: all ports suspended for a take-over");
        Ok(all)
    }

    /// Returns the deadline of the present hand-over, which identifies it.
    pub fn handover_deadline(&self) -> Option<Instant> {
        match self.handover {
            Handover::Until(deadline) => Some(deadline),
            Handover::None | Handover::Committed => None,
        }
    }

    /// Resumes all ports if a hand-over is in progress.
    pub fn abort_handover(&mut self, why: &str) {
        if self.handover_deadline().is_some() {
            warn!("daemon: take-over aborted: {why}; resuming all ports");
            self.resume();
        }
    }

    /// Resumes all ports.
    pub fn resume(&mut self) {
        self.handover = Handover::None;
        self.iter().for_each(|port| port.send(ControlCommand::Resume));
    }

    /// Ends all ports, which another daemon serves from now on.
    ///
    /// # Errors
    /// The deadline has passed; the ports have resumed.
    pub fn commit_handover(&mut self) -> Result<(), Refusal> {
        let deadline = self.handover_deadline();
        if deadline.is_none_or(|deadline| Instant::now() > deadline) {
            self.abort_handover("it took longer than 2 s");
            return Err(too_late());
        }
        self.handover = Handover::Committed;
        self.iter().for_each(|port| port.send(ControlCommand::CommitHandover));
        Ok(())
    }

    /// Refuses requests that need the ports' threads while another daemon takes over the ports.
    ///
    /// # Errors
    /// Another daemon is taking over the ports, or has taken them over.
    pub fn check_present(&self) -> Result<(), Refusal> {
        match self.handover {
            Handover::None => Ok(()),
            Handover::Until(_) | Handover::Committed => Err(Refusal::CannotBeDone(
                "another daemon is taking over the ports; try again in a few seconds".into(),
            )),
        }
    }

    /// Resumes the ports if the hand-over's deadline has passed; returns the time that is left.
    pub fn end_overdue_handover(&mut self) -> Option<Duration> {
        let left = self.handover_deadline()?.saturating_duration_since(Instant::now());
        if left.is_zero() {
            self.abort_handover("it takes longer than 2 s");
            return None;
        }
        Some(left)
    }

    /// Builds a port that another daemon has passed on, from the next descriptors of `files`, and starts its control
    /// thread, which waits for a command to resume. The receiver gets the result of the replay.
    ///
    /// # Errors
    /// A descriptor is missing, or an object cannot be opened.
    pub fn restore_port(
        &mut self,
        handover: PortHandover,
        files: &mut impl Iterator<Item = OwnedFd>,
    ) -> Result<(String, Receiver<Result<(), String>>), StartError> {
        let PortHandover { name, options, from_file, listens, connected, queues, .. } = handover;
        let failed = |why: String| StartError::new(format!("cannot take over port {name}: {why}"));
        let mut next = || files.next().ok_or_else(|| failed("descriptors are missing".into()));
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
        let opened = Opened::of_predecessor(
            name.clone(),
            config,
            from_file,
            (queues, handover.tap),
            endpoint,
        )?;
        let mut prepared = self.prepare(opened, handover.counters)?;
        prepared.status().set_connections(handover.connections.saturating_sub(connected.into()));
        let (done, restored) = channel();
        prepared.take_over(FrontendHandover {
            replay,
            messages: handover.messages,
            connection: connection.map(UnixStream::from),
            done,
        });
        self.start(prepared)?;
        Ok((name, restored))
    }
}

impl Port {
    /// Returns the description and the descriptors of a port that is about to suspend; `None` if the port has
    /// ended. A port that does not suspend in time is passed on without its frontend.
    ///
    /// # Errors
    /// The process has no descriptor left.
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
                warn!("{}: did not suspend within 500 ms; frontend disconnected", self.name());
                let (replay, _) = UnixStream::pair().map_err(text)?;
                let listener = self.listener().map_err(text)?;
                HandoverFds { listener, connection: None, replay, messages: 0 }
            }
        };
        let queues = self.queues().map_err(text)?;
        let counters = self.status().pairs.iter();
        let counters = counters.map(|pair| serde_json::to_value(&pair.counters));
        let counters = counters.map(|value| value.and_then(serde_json::from_value));
        let handover = PortHandover {
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
        Ok(Some((handover, files.chain([fds.replay.into()]).collect())))
    }
}
