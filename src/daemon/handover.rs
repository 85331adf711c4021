//! Taking over all ports of another daemon: connections, rings, TAP queues and counters.
//!
//! 1. The old daemon suspends all ports, and passes on their descriptions and descriptors (`hand-over`). The
//!    frontend's messages are replayed as vhost-user messages, so the daemons may be of different versions.
//! 2. The new daemon builds the ports and starts their control threads, which wait. Shared objects do not change:
//!    neither a TAP's settings nor guest memory.
//! 3. The new daemon asks the old one to let go (`let-go`), and resumes the ports. The old daemon exits.
//!
//! Until step 3 the old daemon can resume the ports. It does so if the new one fails, dies, or takes longer than
//! 2 s. No frontend can prevent a take-over: a frontend that delays its own port is disconnected.

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

/// Descriptors that the new daemon must have left for clients and connections.
const SPARE_DESCRIPTORS: usize = 32;

/// The daemon whose ports are taken over.
pub(super) struct Predecessor {
    connection: Connection,
    listeners: Vec<(String, OwnedFd)>,
    /// Time before the request that suspends the old daemon's ports.
    suspended: Instant,
}

impl Predecessor {
    /// Asks the daemon that listens on a control socket for the sockets that its clients connect to.
    ///
    /// # Errors
    /// No daemon listens there, or the daemon refuses.
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

    /// Takes the socket for one kind of clients.
    pub(super) fn listener(&mut self, name: &str) -> Option<OwnedFd> {
        let place = self.listeners.iter().position(|(it, _)| it == name)?;
        Some(self.listeners.remove(place).1)
    }

    /// Builds all ports of the old daemon and starts their control threads, which wait. The old daemon resumes the
    /// ports if the connection to it closes.
    ///
    /// # Errors
    /// A port cannot change hands, or cannot be built.
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

    /// Refuses a take-over without the descriptors to serve: one per session, and 32 for clients.
    fn check_spare_descriptors(&self, ports: &Ports) -> Result<(), StartError> {
        let pairs: usize = ports.iter().map(|port| port.status().pairs.len()).sum();
        let wanted = pairs + SPARE_DESCRIPTORS;
        let spare: io::Result<Vec<_>> =
            (0..wanted).map(|_| self.connection.as_fd().try_clone_to_owned()).collect();
        spare.map(drop).map_err(|error| {
            failed(&format!("{wanted} more descriptors are needed: {error}; raise LimitNOFILE"))
        })
    }

    /// Asks the old daemon to let go of the ports; no other process serves them then.
    ///
    /// # Errors
    /// The old daemon has resumed the ports, or does not answer. It resumes them in that case, since its deadline is
    /// over by then.
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
