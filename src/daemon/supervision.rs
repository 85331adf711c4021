//! Notifications to the service manager (sd_notify(3)): ready, status, watchdog and stopping. Without
//! `NOTIFY_SOCKET` nothing is sent.
//!
//! The daemon connects the socket before it enters the sandbox, which may forbid connect(2) to the main thread. Each
//! message is one send(2).

use std::env;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::{Duration, Instant};

use log::warn;
use sd_notify::{NotifyState, watchdog_enabled};

use crate::ports::Ports;

/// Connection to the service manager, if one started the daemon.
#[derive(Debug)]
pub(super) struct Supervisor {
    socket: Option<UnixDatagram>,
    /// Status sent last.
    status: String,
    watchdog: Option<Watchdog>,
}

/// Schedule of watchdog messages.
#[derive(Debug)]
struct Watchdog {
    /// Time between two messages: half of the unit's `WatchdogSec=`.
    interval: Duration,
    /// Time of the next message.
    next: Instant,
}

impl Supervisor {
    /// Connects to `NOTIFY_SOCKET`. The sandbox must not be in force yet.
    pub(super) fn connect() -> Self {
        let Some(path) = env::var_os("NOTIFY_SOCKET") else {
            return Supervisor { socket: None, status: String::new(), watchdog: None };
        };
        let connected = connect(Path::new(&path));
        if let Err(error) = &connected {
            let shown = path.to_string_lossy();
            warn!(
                "service manager: cannot connect to {shown}: {error}; it gets neither readiness nor watchdog \
                 messages"
            );
        }
        let time = watchdog_enabled().filter(|time| !time.is_zero());
        let watchdog = time.map(|time| Watchdog { interval: time / 2, next: Instant::now() });
        Supervisor { socket: connected.ok(), status: String::new(), watchdog }
    }

    /// Reports that the daemon is ready: all ports that could be started listen.
    pub(super) fn ready(&mut self, ports: &Ports) {
        self.status = serving(ports);
        self.send(&[NotifyState::Ready, NotifyState::Status(&self.status)]);
    }

    /// Sends a changed number of running or missing ports, and a watchdog message if one is due. Returns the time
    /// until the next watchdog message.
    pub(super) fn report(&mut self, ports: &Ports) -> Option<Duration> {
        let status = serving(ports);
        if self.status != status {
            self.send(&[NotifyState::Status(&status)]);
            self.status = status;
        }
        let Watchdog { interval, next } = self.watchdog.as_mut()?;
        let (interval, now) = (*interval, Instant::now());
        if now >= *next {
            *next = now + interval;
            self.send(&[NotifyState::Watchdog]);
            return Some(interval);
        }
        Some(*next - now)
    }

    /// Reports that the daemon is stopping.
    pub(super) fn stopping(&self) {
        self.send(&[NotifyState::Stopping]);
    }

    /// Sends one message, without waiting for the service manager to read it.
    fn send(&self, states: &[NotifyState<'_>]) {
        let Some(socket) = &self.socket else { return };
        let lines: Vec<String> = states.iter().map(ToString::to_string).collect();
        if let Err(error) = socket.send(lines.join("\n").as_bytes()) {
            warn!("service manager: cannot send {}: {error}", lines.join(", "));
        }
    }
}

/// Returns the status: the numbers of running and of missing ports.
fn serving(ports: &Ports) -> String {
    let (count, missing) = (ports.iter().count(), ports.missing().len());
    let served = format!("serving {count} port{}", if count == 1 { "" } else { "s" });
    if missing == 0 { served } else { format!("{served}, {missing} could not be started yet") }
}

fn connect(path: &Path) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.connect(path)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
