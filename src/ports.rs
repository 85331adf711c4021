//! The ports of a daemon: added, changed, replaced and removed, each without regard to the others.

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

use control::Order;
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

/// How long whoever removes a port waits until it has stopped.
const REMOVE_TIMEOUT: Duration = Duration::from_millis(500);
/// Time that all ports together have to stop when the daemon ends: it must have ended within a second.
const EXIT_TIMEOUT: Duration = Duration::from_millis(700);

/// Who has a port added, changed or removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// An operator, by `ctl`.
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

/// Why an operator's wish is not fulfilled.
#[derive(Debug)]
pub enum Refusal {
    /// There is no such port.
    NoSuchPort(String),
    /// It can't be done.
    CannotBeDone(String),
    /// These keys can't change while the port runs: it has to be removed and added again.
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
    /// Ports of the file that could not be started.
    missing: Vec<String>,
}

impl Ports {
    /// None yet.
    pub fn new(sandbox: Sandbox) -> Result<Self, StartError> {
        // Not later: ports that are added to a sandboxed daemon need it too.
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

    /// The waker that is woken when a port has ended, or its device does not work.
    pub fn changed(&self) -> &Waker {
        self.running.changed()
    }

    /// Whether any port's thread runs.
    pub fn any_runs(&self) -> bool {
        self.running.any_runs()
    }

    /// Whether the control thread of a port has panicked since the daemon's start.
    pub fn any_panicked(&self) -> bool {
        self.running.any_panicked()
    }

    /// The ports, in the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = &Port> {
        self.ports.iter()
    }

    /// Starts a port's workers, which count on from these counters, or anew.
    pub fn prepare(
        &self,
        opened: Opened,
        counters: Vec<PairCounters>,
    ) -> Result<Prepared, StartError> {
        prepare(opened, counters, self.sandbox)
    }

    /// Closes what ports that have ended kept for a successor: else VMMs could still connect, to nobody.
    pub fn close_ended(&mut self) {
        let ended = self.ports.iter_mut().filter(|port| port.status().has_ended());
        ended.for_each(Port::close_kept);
    }

    /// Lets frontends connect to a port.
    pub fn start(&mut self, prepared: Prepared) -> Result<&Port, StartError> {
        let port = Port::start(prepared, self.sandbox, &self.running)?;
        self.missing.retain(|name| *name != port.name());
        self.ports.push(port);
        Ok(&self.ports[self.ports.len() - 1])
    }

    /// Adds a port on the descriptors that an operator has brought.
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
        let port = self.start(prepared)?;
        let origin = if from_file { Origin::File } else { Origin::Operator };
        info!("{}: added {origin}", port.name());
        Ok(port)
    }

    /// Checks that a port can be had beside all that run, but for `replaced`.
    fn check_addition(&self, config: &PortConfig, replaced: Option<&str>) -> Result<(), Refusal> {
        if matches!(config.host, Host::AfXdp(_)) && !self.sandbox.has_af_xdp() {
            let why = "this daemon has given up what AF_XDP needs, since it was started without such \
                       a port: put the port into its file and restart it, or start another daemon";
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

    /// Ends a port, the oldest of that name: waits for it, but not for long.
    ///
    /// # Errors
    /// There is no such port.
    fn end(&mut self, name: &str) -> Result<(), Refusal> {
        let place = self.place(name)?;
        let port = self.ports.remove(place);
        self.let_go(port);
        Ok(())
    }

    /// Ends the port that was started last.
    fn end_last(&mut self) {
        if let Some(port) = self.ports.pop() {
            self.let_go(port);
        }
    }

    /// Ends a port on a thread of its own. Its own threads can be stuck in what its VMM holds, and so can
    /// whoever closes its socket: connections that wait there can carry descriptors that linger.
    fn let_go(&self, port: Port) {
        let sandbox = self.sandbox;
        let (done, ended) = channel();
        let end = move || {
            if sandbox.confine(Role::Log).is_ok() {
                drop(port);
                let _ = done.send(());
            }
        };
        // Without a thread to be had, the port has ended here.
        if thread::Builder::new().name("port-end".into()).spawn(end).is_ok() {
            let _ = ended.recv_timeout(REMOVE_TIMEOUT);
        }
    }

    /// Stops a port: its rings first, then its frontend's connection.
    pub fn remove(&mut self, name: &str, origin: Origin) -> Result<(), Refusal> {
        if let Some(place) = self.missing.iter().position(|missing| missing == name) {
            self.missing.remove(place);
        } else {
            self.end(name)?;
        }
        info!("{name}: removed {origin}");
        Ok(())
    }

    /// Has a port be as `options` say, if it can while it runs: says whether it was not before.
    pub fn change(
        &mut self,
        name: &str,
        options: PortOptions,
        origin: Origin,
    ) -> Result<bool, Refusal> {
        let place = self.place(name)?;
        self.ports[place].change(options, origin)
    }

    /// Has a port's frames written to `output`, until its other end is closed, or the capture is
    /// stopped.
    pub fn capture(
        &self,
        name: &str,
        options: capture::Options,
        output: File,
    ) -> Result<(), Refusal> {
        self.find(name)?.start_capture(options, output, self.sandbox)
    }

    /// A port by its name.
    pub fn find(&self, name: &str) -> Result<&Port, Refusal> {
        Ok(&self.ports[self.place(name)?])
    }

    fn place(&self, name: &str) -> Result<usize, Refusal> {
        let found = self.ports.iter().position(|port| port.name() == name);
        found.ok_or_else(|| Refusal::NoSuchPort(name.chars().take(64).collect()))
    }

    /// A port whose TAP has gone, and that the daemon's file describes: it can be opened again when it
    /// is there again.
    pub fn to_be_mended(&self) -> Option<&str> {
        let is_tap = |port: &&Port| matches!(port.config().host, Host::Tap(_));
        let found =
            self.ports.iter().filter(|port| port.is_from_file() && port.status().is_degraded());
        found.into_iter().find(is_tap).map(Port::name)
    }

    /// Names of the file's ports that could not be started, and are tried again.
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    /// These are the file's ports that could not be started.
    pub fn set_missing(&mut self, names: Vec<String>) {
        self.missing = names;
    }

    /// Ports that were abandoned since the daemon's start: they did not stop in time.
    pub fn abandoned(&self) -> usize {
        abandoned()
    }

    /// Stops all ports at once, so that none waits for another, and abandons those that have not
    /// stopped after 700 ms.
    pub fn stop(&mut self) {
        self.ports.iter().for_each(|port| port.tell(Order::Stop("the daemon stops")));
        let deadline = Instant::now() + EXIT_TIMEOUT;
        self.ports.drain(..).for_each(|mut port| {
            port.finish(deadline);
            // What it holds is closed by the exit, which nothing holds up.
            std::mem::forget(port);
        });
    }
}
