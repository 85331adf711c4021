//! What a service manager is told (sd_notify(3)): that ports listen, that the main thread is alive,
//! and that the end has begun. Nothing happens without one.
//!
//! The sandbox has the main thread make no sockets, so that ours is connected before, and each
//! message is one send on it.

use std::env;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::{Duration, Instant};

use log::warn;
use sd_notify::{NotifyState, watchdog_enabled};

use crate::ports::Ports;

/// The way to the service manager, if one has started us.
#[derive(Debug)]
pub(super) struct Supervisor {
    socket: Option<UnixDatagram>,
    /// The status that it has heard of last.
    status: String,
    watchdog: Option<Watchdog>,
}

/// A promise to speak in time.
#[derive(Debug)]
struct Watchdog {
    /// Half the time after which the service manager ends who is silent.
    interval: Duration,
    next: Instant,
}

impl Supervisor {
    /// Connects to `NOTIFY_SOCKET`. Before the sandbox is entered.
    pub(super) fn connect() -> Self {
        let Some(path) = env::var_os("NOTIFY_SOCKET") else {
            return Supervisor { socket: None, status: String::new(), watchdog: None };
        };
        let connected = connect(Path::new(&path));
        if let Err(error) = &connected {
            let shown = path.to_string_lossy();
            warn!("tell the service manager at {shown}: {error}; it will not hear from us");
        }
        let time = watchdog_enabled().filter(|time| !time.is_zero());
        let watchdog = time.map(|time| Watchdog { interval: time / 2, next: Instant::now() });
        Supervisor { socket: connected.ok(), status: String::new(), watchdog }
    }

    /// All `ports` listen that are to be there from the start and can be.
    pub(super) fn ready(&mut self, ports: &Ports) {
        self.status = serving(ports);
        self.tell(&[NotifyState::Ready, NotifyState::Status(&self.status)]);
    }

    /// Tells how many ports there are and are missing if that is news, and that the main thread is alive if it is time
    /// to; returns how long that is good for.
    pub(super) fn report(&mut self, ports: &Ports) -> Option<Duration> {
        let status = serving(ports);
        if self.status != status {
            self.tell(&[NotifyState::Status(&status)]);
            self.status = status;
        }
        let Watchdog { interval, next } = self.watchdog.as_mut()?;
        let (interval, now) = (*interval, Instant::now());
        if now >= *next {
            *next = now + interval;
            self.tell(&[NotifyState::Watchdog]);
            return Some(interval);
        }
        Some(*next - now)
    }

    /// The end has begun.
    pub(super) fn stopping(&self) {
        self.tell(&[NotifyState::Stopping]);
    }

    /// Sends one message. Whoever does not read them holds nothing up.
    fn tell(&self, states: &[NotifyState<'_>]) {
        let Some(socket) = &self.socket else { return };
        let lines: Vec<String> = states.iter().map(ToString::to_string).collect();
        if let Err(error) = socket.send(lines.join("\n").as_bytes()) {
            warn!("tell the service manager {}: {error}", lines.join(", "));
        }
    }
}

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
