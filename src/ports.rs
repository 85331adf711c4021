//! The ports of a daemon. An operator or the file adds, changes, replaces and removes each port alone.

mod changing;
mod control;
mod devices;
mod handover;
mod opening;
mod port;
mod preparing;
mod replacing;
mod status;

use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use log::info;

use crate::capture;
use crate::config::{Host, PortConfig, PortOptions};
use crate::counters::PairCounters;
use crate::descriptors;
use crate::error::{StartError, no_descriptor};
use crate::sandbox::{Role, Sandbox};
use crate::sys::eventfd::Waker;
use crate::sys::process::host_memory;

use control::ControlCommand;
use devices::Devices;
pub use devices::{Claim, check_devices};
use handover::Handover;
pub use handover::{PortHandover, TAKE_OVER_TIMEOUT, too_late};
pub use opening::{Descriptors, Opened, open_queues};
pub use port::Port;
use port::{Running, abandoned};
pub use preparing::Prepared;
use preparing::prepare;
pub use status::{Filters, FrontendStatus, PortStatus};

/// Time that a request to remove a port waits until the port has stopped.
const REMOVE_TIMEOUT: Duration = Duration::from_millis(500);
/// Time that all ports together have to stop when the daemon exits, which may take 1 s.
const EXIT_TIMEOUT: Duration = Duration::from_millis(700);

/// The originator of a request to add, change or remove a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// An operator, who uses `ctl`.
    Operator,
    /// The daemon's file, which was read again.
    File,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Origin::Operator => "by an operator",
            Origin::File => "by the file",
        })
    }
}

/// The reason why a request is refused.
#[derive(Debug)]
pub enum Refusal {
    /// No port has this name.
    NoSuchPort(String),
    /// The request cannot be carried out, for this reason.
    CannotBeDone(String),
    /// These keys cannot change while the port runs: remove the port and add it again.
    NeedsRestart(Vec<&'static str>),
}

impl From<StartError> for Refusal {
    fn from(error: StartError) -> Self {
        Refusal::CannotBeDone(error.to_string())
    }
}

/// All ports of this daemon.
#[derive(Debug)]
pub struct Ports {
    sandbox: Sandbox,
    running: Arc<Running>,
    ports: Vec<Port>,
    handover: Handover,
    devices: Devices,
    /// Names of the file's ports that could not be started.
    missing: Vec<String>,
}

impl Ports {
    /// Creates an empty collection.
    pub fn new(sandbox: Sandbox) -> Result<Self, StartError> {
        // Read here, since a port that is added later needs it, and the sandbox then forbids the read.
        host_memory();
        let running = Arc::new(Running::new().map_err(no_descriptor)?);
        let devices = Devices::new();
        Ok(Ports {
            sandbox,
            running,
            ports: Vec::new(),
            handover: Handover::None,
            devices,
            missing: Vec::new(),
        })
    }

    /// Returns the waker that is woken when a port has ended, or its device does not work.
    pub fn changed(&self) -> &Waker {
        self.running.changed()
    }

    /// Returns whether any port's control thread runs.
    pub fn any_runs(&self) -> bool {
        self.running.any_runs()
    }

    /// Returns whether a port's control thread has panicked since the daemon's start.
    pub fn any_panicked(&self) -> bool {
        self.running.any_panicked()
    }

    /// Returns the ports in the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = &Port> {
        self.ports.iter()
    }

    /// Starts a port's workers. Their counters continue from `counters`, or start at zero.
    pub fn prepare(
        &self,
        opened: Opened,
        counters: Vec<PairCounters>,
    ) -> Result<Prepared, StartError> {
        prepare(opened, counters, self.sandbox)
    }

    /// Closes the descriptors that ended ports kept for a successor: no VMM may connect to an ended port.
    pub fn close_ended(&mut self) {
        let ended = self.ports.iter_mut().filter(|port| port.status().has_ended());
        ended.for_each(Port::close_kept);
    }

    /// Starts a port's control thread; VMMs can connect from now on.
    pub fn start(&mut self, prepared: Prepared) -> Result<&Port, StartError> {
        let port = Port::start(prepared, self.sandbox, &self.running)?;
        self.missing.retain(|name| *name != port.name());
        self.ports.push(port);
        Ok(&self.ports[self.ports.len() - 1])
    }

    /// Adds a port on the descriptors that the request has brought.
    ///
    /// # Errors
    /// The port cannot be opened, or conflicts with a port that runs.
    pub fn add(
        &mut self,
        options: PortOptions,
        files: Vec<OwnedFd>,
        from_file: bool,
    ) -> Result<&Port, Refusal> {
        let config = options.check().map_err(Refusal::CannotBeDone)?;
        self.check_addition(&config, None)?;
        let brought = Descriptors::brought(&config, files)?;
        let pairs = usize::from(config.queue_pairs);
        descriptors::check_room(pairs, matches!(config.host, Host::AfXdp(_)))
            .map_err(|why| Refusal::CannotBeDone(why.to_string()))?;
        self.check_device(&config, &brought.tap_queues, None)?;
        let opened = Opened::new(config, from_file, brought)?;
        if self.ports.iter().any(|port| port.name() == opened.name()) {
            let why = format!("port {} already exists; remove it first", opened.name());
            return Err(Refusal::CannotBeDone(why));
        }
        let prepared = self.prepare(opened, Vec::new())?;
        let name = self.start(prepared)?.name().to_owned();
        let origin = if from_file { Origin::File } else { Origin::Operator };
        info!("{name}: added {origin}");
        self.log_created_tap(&name);
        self.find(&name)
    }

    /// Checks that a port conflicts with no port that runs, except `replaced`.
    fn check_addition(&self, config: &PortConfig, replaced: Option<&str>) -> Result<(), Refusal> {
        if matches!(config.host, Host::AfXdp(_)) && !self.sandbox.has_af_xdp() {
            let why = "cannot use AF_XDP: the daemon's sandbox forbids AF_XDP, because the daemon started without \
                       such a port; put the port into the file and restart the daemon";
            return Err(Refusal::CannotBeDone(why.into()));
        }
        let others = self.ports.iter().filter(|port| Some(port.name()) != replaced);
        for other in others {
            let running = (!other.status().has_ended()).then_some(other.config());
            if let Some(why) = config.conflict(other.name(), running) {
                return Err(Refusal::CannotBeDone(why));
            }
        }
        Ok(())
    }

    /// Ends the oldest port of this name; waits up to 500 ms for its end.
    ///
    /// # Errors
    /// No port has this name.
    fn end(&mut self, name: &str) -> Result<(), Refusal> {
        let place = self.place(name)?;
        let port = self.ports.remove(place);
        self.drop_on_thread(port);
        Ok(())
    }

    /// Ends the port that was started last.
    fn end_last(&mut self) {
        if let Some(port) = self.ports.pop() {
            self.drop_on_thread(port);
        }
    }

    /// Ends a port on a thread of its own. The port's threads can block in a descriptor of its VMM. The close of
    /// the port's socket can block too: pending connections can carry descriptors that linger.
    fn drop_on_thread(&self, port: Port) {
        let sandbox = self.sandbox;
        let (done, ended) = channel();
        let end = move || {
            if sandbox.confine(Role::Log).is_ok() {
                drop(port);
                let _ = done.send(());
            }
        };
        // If no thread can be started, the port has ended on this thread.
        if thread::Builder::new().name("port-end".into()).spawn(end).is_ok() {
            let _ = ended.recv_timeout(REMOVE_TIMEOUT);
        }
    }

    /// Removes a port: first its rings stop, then its frontend is disconnected.
    ///
    /// # Errors
    /// No port has this name.
    pub fn remove(&mut self, name: &str, origin: Origin) -> Result<(), Refusal> {
        if let Some(place) = self.missing.iter().position(|missing| missing == name) {
            self.missing.remove(place);
        } else {
            self.end(name)?;
        }
        info!("{name}: removed {origin}");
        Ok(())
    }

    /// Changes a running port to `options`; returns whether they differ from the present ones.
    ///
    /// # Errors
    /// No port has this name, or the port cannot change while it runs.
    pub fn change(
        &mut self,
        name: &str,
        options: PortOptions,
        origin: Origin,
    ) -> Result<bool, Refusal> {
        let place = self.place(name)?;
        self.ports[place].change(options, origin)
    }

    /// Starts a capture of a port's frames into `output`. The capture ends when the reader closes `output`, or
    /// by [`Port::stop_capture`].
    ///
    /// # Errors
    /// No port has this name, or its frames are being captured already.
    pub fn capture(
        &self,
        name: &str,
        options: capture::Options,
        output: File,
    ) -> Result<(), Refusal> {
        self.find(name)?.start_capture(options, output, self.sandbox)
    }

    /// Returns the port of this name.
    ///
    /// # Errors
    /// No port has this name.
    pub fn find(&self, name: &str) -> Result<&Port, Refusal> {
        Ok(&self.ports[self.place(name)?])
    }

    fn place(&self, name: &str) -> Result<usize, Refusal> {
        let found = self.ports.iter().position(|port| port.name() == name);
        found.ok_or_else(|| Refusal::NoSuchPort(name.chars().take(64).collect()))
    }

    /// Returns the name of a port of the file whose TAP is gone: the helper process can open the TAP again.
    pub fn tap_to_reopen(&self) -> Option<&str> {
        let is_tap = |port: &&Port| matches!(port.config().host, Host::Tap(_));
        let found =
            self.ports.iter().filter(|port| port.is_from_file() && port.status().is_degraded());
        found.into_iter().find(is_tap).map(Port::name)
    }

    /// Returns the names of the file's ports that could not be started; the daemon tries them every second.
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    /// Sets the names of the file's ports that could not be started.
    pub fn set_missing(&mut self, names: Vec<String>) {
        self.missing = names;
    }

    /// Returns the number of ports that did not stop in time and were abandoned since the daemon's start.
    pub fn abandoned(&self) -> usize {
        abandoned()
    }

    /// Stops all ports at the same time, and abandons those that have not stopped after 700 ms.
    pub fn stop(&mut self) {
        self.ports.iter().for_each(|port| port.send(ControlCommand::Stop("the daemon stops")));
        let deadline = Instant::now() + EXIT_TIMEOUT;
        self.ports.drain(..).for_each(|mut port| {
            port.finish(deadline);
            // The exit closes what the port holds, and nothing delays the exit.
            std::mem::forget(port);
        });
    }
}
