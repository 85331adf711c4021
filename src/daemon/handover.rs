//! Taking over all ports of another daemon: connections, rings, TAP queues and counters.
//!
//! 1. The old daemon suspends all ports and sends their configurations and descriptors (`hand-over`). The
//!    frontend's state is replayed as vhost-user messages, so the daemons may be of different versions.
//! 2. The new daemon builds the ports and starts their control threads, which wait. It changes neither a TAP's
//!    settings nor guest memory.
//! 3. The new daemon commits (`let-go`) and resumes the ports. The old daemon exits.
//!
//! Until step 3 the old daemon can resume the ports. The old daemon does so if the new one fails, exits, or takes
//! longer than 2 s. No frontend can prevent a take-over: the daemon disconnects a frontend that delays its port.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use log::{info, warn};

use crate::api::Command;
use crate::ctl::{Connection, Failure};
use crate::error::StartError;
use crate::ports::{PortHandover, Ports, TAKE_OVER_TIMEOUT};

/// Descriptors that the new daemon keeps free for operators and frontends.
const SPARE_DESCRIPTORS: usize = 32;

/// The daemon whose ports are taken over.
pub(super) struct Predecessor {
    connection: Connection,
    listeners: Vec<(String, OwnedFd)>,
    /// Time of the request that suspends the old daemon's ports.
    suspended: Instant,
    /// Number of ports taken over.
    ports: usize,
}

impl Predecessor {
    /// Asks the daemon that listens on a control socket for its listening sockets.
    ///
    /// # Errors
    /// No daemon listens there, or the daemon refuses.
    pub(super) fn find(control: &Path) -> Result<Self, StartError> {
        let shown = control.display();
        let failed = |error: &dyn fmt::Display| {
            StartError::new(format!("cannot take over from the daemon at {shown}: {error}"))
        };
        let stream = UnixStream::connect(control).map_err(|error| failed(&error))?;
        let mut connection = Connection::new(stream, shown.to_string());
        let answer = connection.ask_for_files(&Command::Listeners {});
        let (names, files) = answer.map_err(|error| failed(&error))?;
        let names = serde_json::from_value::<Vec<String>>(names).map_err(|error| failed(&error))?;
        if names.len() != files.len() {
            return Err(failed(&format!("received {} of {} sockets", files.len(), names.len())));
        }
        let listeners = names.into_iter().zip(files).collect();
        Ok(Predecessor { connection, listeners, suspended: Instant::now(), ports: 0 })
    }

    /// Removes and returns the listening socket `name`, if the old daemon sent one.
    pub(super) fn listener(&mut self, name: &str) -> Option<OwnedFd> {
        let place = self.listeners.iter().position(|(it, _)| it == name)?;
        Some(self.listeners.remove(place).1)
    }

    /// Builds all ports of the old daemon and starts their control threads, which wait. If this fails, the
    /// connection closes and the old daemon resumes the ports.
    ///
    /// # Errors
    /// The old daemon cannot hand over a port, this daemon cannot build one, or descriptors are missing.
    pub(super) fn take_over(&mut self, ports: &mut Ports) -> Result<(), StartError> {
        self.suspended = Instant::now();
        let answer = self.connection.ask_for_files(&Command::HandOver {});
        let (handovers, files) = answer.map_err(|error| failed(&error))?;
        let handovers: Vec<PortHandover> =
            serde_json::from_value(handovers).map_err(|error| failed(&error))?;
        self.ports = handovers.len();
        let mut files = files.into_iter();
        let restored = handovers
            .into_iter()
            .map(|port| ports.restore_port(port, &mut files))
            .collect::<Result<Vec<_>, _>>()?;
        if files.next().is_some() {
            return Err(failed(&"received more descriptors than announced"));
        }
        let deadline = self.suspended + TAKE_OVER_TIMEOUT;
        for (name, restored) in restored {
            restored
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
                .map_err(|_| "its control thread does not reply".to_owned())
                .and_then(|restored| restored)
                .map_err(|error| {
                    StartError::new(format!("cannot take over port {name}: {error}"))
                })?;
        }
        self.check_spare_descriptors(ports)
    }

    /// Checks that one descriptor per queue pair, and 32 for clients, can be opened.
    fn check_spare_descriptors(&self, ports: &Ports) -> Result<(), StartError> {
        let pairs: usize = ports.iter().map(|port| port.status().pairs.len()).sum();
        let wanted = pairs + SPARE_DESCRIPTORS;
        let spare: io::Result<Vec<_>> =
            (0..wanted).map(|_| self.connection.as_fd().try_clone_to_owned()).collect();
        spare.map(drop).map_err(|error| {
            failed(&format!("{wanted} free descriptors are required: {error}; raise LimitNOFILE="))
        })
    }

    /// Commits the take-over: the old daemon gives up the ports, and no other process serves them.
    ///
    /// # Errors
    /// The old daemon has resumed the ports, or does not reply within 10 s, after which it has resumed them.
    pub(super) fn commit(mut self) -> Result<(), StartError> {
        match self.connection.ask(&Command::LetGo {}, &[]) {
            Ok(_) => {}
            Err(Failure::Gone(error)) => {
                warn!("daemon: old daemon exited early: {error}; this daemon serves all ports")
            }
            Err(error) => return Err(failed(&error)),
        }
        let pause = self.suspended.elapsed();
        info!("daemon: took over ports={} pause_max={pause:.1?}", self.ports);
        Ok(())
    }
}

fn failed(error: &dyn fmt::Display) -> StartError {
    StartError::new(format!("cannot take over: {error}"))
}
