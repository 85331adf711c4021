//! The ports of a daemon: started, changed, and stopped, each for itself.

mod control;
mod devices;
mod handover;
mod opening;
mod replacing;
mod status;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::{error, info, warn};

use crate::capture::{self, Capture};
use crate::config::{Host, PortConfig, PortOptions};
use crate::counters::PairCounters;
use crate::descriptors::{self, DescriptorQuota};
use crate::device::Device;
use crate::endpoint::Endpoint;
use crate::error::{StartError, no_descriptor, no_thread};
use crate::features::{Offer, OfferOptions, PortOffloads};
use crate::guest::MemoryQuota;
use crate::net_config::NetConfig;
use crate::policy::{Limiter, Limits, LiveFilter, Rules};
use crate::port::{HostQueue, TapState};
use crate::sandbox::{Role, Sandbox};
use crate::sys::eventfd::Waker;
use crate::sys::process::host_memory;
use crate::traffic::Row;
use crate::worker::{Worker, WorkerOptions};

use control::{Control, Order, Predecessor};
use devices::{Claim, Devices};
pub use devices::check_devices;
pub use handover::{PortHandover, TAKE_OVER_TIMEOUT, too_late};
use opening::{adopt_tap, open_host};
pub use opening::{Descriptors, open_queues};
pub use status::{Filters, FrontendStatus, PortStatus};

/// How long a port's thread may take to carry an order out.
const PATIENCE: Duration = Duration::from_secs(1);
/// Time that removed ports have to stop; one that takes longer is abandoned.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// How long whoever removes a port waits for that.
const REMOVE_TIMEOUT: Duration = Duration::from_millis(500);
/// The same for all ports together when the daemon ends: it must have ended within a second.
const EXIT_TIMEOUT: Duration = Duration::from_millis(700);
/// Interval at which a port that stops is looked at.
const STOP_POLL: Duration = Duration::from_millis(1);
/// Ports that did not stop in time, since the daemon's start.
static ABANDONED: AtomicUsize = AtomicUsize::new(0);

/// What has been opened for a port, before anything is given up.
pub struct Opened {
    name: String,
    config: PortConfig,
    from_file: bool,
    queues: Vec<HostQueue>,
    endpoint: Endpoint,
}

impl Opened {
    /// Opens what `config` names, as far as it was not brought; says whether it stands in a file.
    pub fn new(
        config: PortConfig,
        from_file: bool,
        brought: Descriptors,
    ) -> Result<Self, StartError> {
        let (device, queues) = open_host(&config, brought.tap_queues)?;
        let name = config.known_name().map_or(device, str::to_owned);
        let was_brought = brought.frontend.is_some();
        let endpoint = Endpoint::open(&config.frontend, brought.frontend)?;
        if let Some(group) = config.socket_group.as_ref().filter(|_| !was_brought) {
            endpoint.share_with(group)?;
        }
        Ok(Opened { name, config, from_file, queues, endpoint })
    }

    /// Opens the host side only, of a port that another daemon serves. `tap` is its TAP's state, which
    /// is left as it is; daemons up to version 0.1.0 do not tell it, and their TAPs are set up anew.
    pub fn of_predecessor(
        name: String,
        config: PortConfig,
        from_file: bool,
        (tap_queues, tap): (Vec<OwnedFd>, Option<TapState>),
        endpoint: Endpoint,
    ) -> Result<Self, StartError> {
        let queues = match tap {
            Some(tap) => adopt_tap(&config, tap_queues, &tap)?,
            None => open_host(&config, tap_queues)?.1,
        };
        Ok(Opened { name, config, from_file, queues, endpoint })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// What its device can do with a frame's offloads.
    pub fn offloads(&self) -> PortOffloads {
        self.queues[0].offloads()
    }

    /// The queues of a device that it takes for itself.
    pub fn claim(&self) -> Claim<'_> {
        let device = self.queues[0].device().load(Ordering::Relaxed);
        Claim::new(&self.name, device, &self.config)
    }
}

/// A port whose workers run, and which nobody can connect to yet.
pub struct Prepared {
    control: Control,
    /// What it will be, without its thread.
    port: Port,
    /// The daemon that the port is taken over from.
    predecessor: Option<Predecessor>,
}

impl Prepared {
    pub fn status(&self) -> &PortStatus {
        &self.port.status
    }

    /// Takes the port over from another daemon: started, it stands still until it is resumed.
    pub fn succeed(&mut self, predecessor: Predecessor) {
        self.predecessor = Some(predecessor);
    }
}

/// Counts the ports that run.
#[derive(Debug)]
pub struct Running {
    ports: AtomicUsize,
    /// The control thread of one has panicked.
    panicked: AtomicBool,
    /// Woken when a port has ended, or its device does not work.
    pub changed: Arc<Waker>,
}

/// A port's share in [`Running`], for as long as its thread runs, however that ends.
struct Alive(Arc<Running>, Arc<PortStatus>);

impl Alive {
    fn new(running: &Arc<Running>, status: &Arc<PortStatus>) -> Self {
        running.ports.fetch_add(1, Ordering::Relaxed);
        Alive(running.clone(), status.clone())
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.1.set_ended();
        self.0.ports.fetch_sub(1, Ordering::Release);
        self.0.changed.wake();
    }
}

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

/// Who has the ports.
#[derive(Debug, Clone, Copy)]
pub enum Handover {
    /// This daemon.
    None,
    /// Nobody yet: another daemon is taking them over, and they resume here at this time.
    Until(Instant),
    /// Another daemon, for good.
    Committed,
}

impl Ports {
    /// None yet.
    pub fn new(sandbox: Sandbox) -> Result<Self, StartError> {
        // Not later: ports that are added to a sandboxed daemon need it too.
        host_memory();
        let changed = Arc::new(Waker::new().map_err(no_descriptor)?);
        let running = Arc::new(Running {
            ports: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            changed,
        });
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

    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    pub fn devices_mut(&mut self) -> &mut Devices {
        &mut self.devices
    }

    pub fn running(&self) -> &Arc<Running> {
        &self.running
    }

    /// Whether any port's thread runs.
    pub fn any_runs(&self) -> bool {
        self.running.ports.load(Ordering::Acquire) > 0
    }

    /// Whether the control thread of a port has panicked since the daemon's start.
    pub fn any_panicked(&self) -> bool {
        self.running.panicked.load(Ordering::Relaxed)
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
        for port in self.ports.iter_mut().filter(|port| port.status.has_ended()) {
            port.status.set_listener(None);
            port.queues.clear();
        }
    }

    /// The deadline of the hand-over under way, by which it is told from others.
    pub fn handover_deadline(&self) -> Option<Instant> {
        match self.handover {
            Handover::Until(deadline) => Some(deadline),
            Handover::None | Handover::Committed => None,
        }
    }

    pub fn handover(&self) -> Handover {
        self.handover
    }

    pub fn set_handover(&mut self, handover: Handover) {
        self.handover = handover;
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
        if self.ports.iter().any(|port| port.name() == opened.name) {
            let why = format!("port {} already exists; remove it first", opened.name);
            return Err(Refusal::CannotBeDone(why));
        }
        let prepared = self.prepare(opened, Vec::new())?;
        let port = self.start(prepared)?;
        let origin = if from_file { Origin::File } else { Origin::Operator };
        info!("{}: added {origin}", port.name());
        Ok(port)
    }

    /// Checks that a port can be had beside all that run, but for `replaced`.
    pub fn check_addition(
        &self,
        config: &PortConfig,
        replaced: Option<&str>,
    ) -> Result<(), Refusal> {
        if matches!(config.host, Host::AfXdp(_)) && !self.sandbox.has_af_xdp() {
            let why = "this daemon has given up what AF_XDP needs, since it was started without such \
                       a port: put the port into its file and restart it, or start another daemon";
            return Err(Refusal::CannotBeDone(why.into()));
        }
        let others = self.ports.iter().filter(|port| Some(port.name()) != replaced);
        for other in others {
            let running = (!other.status.has_ended()).then_some(&other.config);
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
    pub fn end(&mut self, name: &str) -> Result<(), Refusal> {
        let place = self.place(name)?;
        let port = self.ports.remove(place);
        self.let_go(port);
        Ok(())
    }

    /// Ends the port that was started last.
    pub fn end_last(&mut self) {
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
        let port = self.find(name)?;
        let pairs = port.status.pairs.len();
        let Some(writer) = port.capture.begin(name, pairs, options, output) else {
            return Err(Refusal::CannotBeDone(format!("{name} is being captured already")));
        };
        let (name, sandbox) = (name.to_owned(), self.sandbox);
        info!("{name}: captured by an operator");
        let started = thread::Builder::new().name("capture".into()).spawn(move || {
            match sandbox.confine(Role::Capture).and_then(|()| writer.run()) {
                Ok(tally) => info!(
                    "{name}: capture ended: {} frames written, {} left out",
                    tally.captured, tally.left_out
                ),
                Err(error) => warn!("{name}: capture: {error}"),
            }
        });
        started.map(|_| ()).map_err(|error| {
            port.capture.stop();
            Refusal::CannotBeDone(format!("start a thread: {error}"))
        })
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
        let is_tap = |port: &&Port| matches!(port.config.host, Host::Tap(_));
        let found = self.ports.iter().filter(|port| port.from_file && port.status.is_degraded());
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
        ABANDONED.load(Ordering::Relaxed)
    }

    /// Stops all ports at once, so that none waits for another, and abandons those that have not
    /// stopped after [`EXIT_TIMEOUT`].
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

/// A port, which runs once it was started. It stops when it is dropped.
#[derive(Debug)]
pub struct Port {
    status: Arc<PortStatus>,
    config: PortConfig,
    from_file: bool,
    offered: u64,
    offloads: PortOffloads,
    capture: Arc<Capture>,
    /// Its TAP's queues and their state, for another daemon.
    queues: Vec<OwnedFd>,
    tap: Option<TapState>,
    orders: Sender<Order>,
    wake: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
}

impl Port {
    fn start(
        prepared: Prepared,
        sandbox: Sandbox,
        running: &Arc<Running>,
    ) -> Result<Self, StartError> {
        let Prepared { mut control, mut port, predecessor } = prepared;
        let name = control.name().to_owned();
        control.start().map_err(|error| StartError::new(format!("{name}: listen: {error}")))?;
        let alive = Alive::new(running, &port.status);
        port.status.pairs.iter().for_each(|pair| pair.tell_of_trouble(running.changed.clone()));
        let thread = thread::Builder::new().name(name).spawn(move || {
            let alive = alive;
            match sandbox.confine(control.role()) {
                Ok(()) => {
                    // A panic costs this port, and the rest of the thread ends it as an order would.
                    let serve = || {
                        if predecessor.is_none_or(|predecessor| control.take_over(predecessor)) {
                            control.serve();
                        }
                    };
                    if catch_unwind(AssertUnwindSafe(serve)).is_err() {
                        alive.0.panicked.store(true, Ordering::Relaxed);
                        error!(
                            "{}: control thread panicked (bug); the port has ended: remove it and add it \
                             again",
                            control.name()
                        );
                    }
                }
                Err(error) => error!("{}: filter its system calls: {error}", control.name()),
            }
            control.finish();
        });
        port.thread = Some(thread.map_err(no_thread)?);
        Ok(port)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.status.name
    }

    /// What is known of it.
    pub fn status(&self) -> &Arc<PortStatus> {
        &self.status
    }

    /// What was said about it.
    pub fn options(&self) -> &PortOptions {
        &self.config.options
    }

    /// Whether the daemon's file describes it.
    pub fn is_from_file(&self) -> bool {
        self.from_file
    }

    /// Whether its host side is a TAP.
    pub fn is_on_tap(&self) -> bool {
        self.tap.is_some()
    }

    /// The feature bits that it offers.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// What it was described as.
    pub fn config(&self) -> &PortConfig {
        &self.config
    }

    /// Its TAP's queues, by other descriptors.
    pub fn queues(&self) -> io::Result<Vec<OwnedFd>> {
        self.queues.iter().map(OwnedFd::try_clone).collect()
    }

    /// Its socket for frontends, by another descriptor.
    pub fn listener(&self) -> io::Result<Option<OwnedFd>> {
        self.status.listener()
    }

    /// Its TAP's state, for a successor.
    pub fn tap(&self) -> Option<&TapState> {
        self.tap.as_ref()
    }

    /// What its device can do with a frame's offloads.
    pub fn offloads(&self) -> PortOffloads {
        self.offloads
    }

    /// Gives its thread an order, and does not wait.
    pub fn tell(&self, order: Order) {
        // Whoever does not listen any more has ended.
        let _ = self.orders.send(order);
        self.wake.wake();
    }

    /// Ends its capture; says what it has come to.
    pub fn stop_capture(&self) -> capture::Tally {
        self.capture.stop()
    }

    /// Changes all that differs, or nothing.
    fn change(&mut self, options: PortOptions, origin: Origin) -> Result<bool, Refusal> {
        let config = options.check().map_err(Refusal::CannotBeDone)?;
        let fixed = self.config.fixed_differences(&config);
        if !fixed.is_empty() {
            return Err(Refusal::NeedsRestart(fixed));
        }
        if config.is_live_equal(&self.config) {
            return Ok(false);
        }
        match self.order_change(&config) {
            Ok(set) => set.map_err(|error| {
                Refusal::CannotBeDone(format!("set its rx filter: {error}; nothing is changed"))
            })?,
            Err(refusal) => {
                self.undo_change(&config);
                return Err(refusal);
            }
        }
        // Nothing of this can fail.
        if config.tx_filter != self.config.tx_filter {
            self.status.filters.tx.set(config.tx_filter.clone());
        }
        let limits = &self.status.limits;
        for (limiter, limit) in [(&limits.tx, config.tx_limit), (&limits.rx, config.rx_limit)] {
            if limiter.limit() != limit {
                limiter.set(&limit);
            }
        }
        let policies = self.config.policy().into_iter().zip(config.policy());
        for ((what, old), (_, new)) in policies.filter(|(old, new)| old != new) {
            info!("{}: {what} set {origin} from=\"{old}\" to=\"{new}\"", self.name());
        }
        self.config = config;
        Ok(true)
    }

    /// Has the port's thread change what it has to. The rx filter comes first: the device may refuse it,
    /// and nothing is changed then.
    fn order_change(&self, config: &PortConfig) -> Result<io::Result<()>, Refusal> {
        if config.rx_filter != self.config.rx_filter {
            let filter = config.rx_filter.clone();
            let set: io::Result<()> = self.order(|done| Order::RxFilter(filter, done))?;
            if set.is_err() {
                return Ok(set);
            }
        }
        if config.identity != self.config.identity {
            let rules = config.identity.clone().map(|identity| Arc::new(Rules::new(identity)));
            self.order(|done| Order::Rules(rules, done))?;
        }
        if config.link != self.config.link {
            self.order(|done| Order::Link(config.link, done))?;
        }
        Ok(Ok(()))
    }

    /// Takes back what the port's thread, which does not answer in time, may still change: it finds these
    /// orders behind those.
    fn undo_change(&self, config: &PortConfig) {
        let old = &self.config;
        if config.rx_filter != old.rx_filter {
            self.tell(Order::RxFilter(old.rx_filter.clone(), channel().0));
        }
        if config.identity != old.identity {
            let rules = old.identity.clone().map(|identity| Arc::new(Rules::new(identity)));
            self.tell(Order::Rules(rules, channel().0));
        }
        if config.link != old.link {
            self.tell(Order::Link(old.link, channel().0));
        }
    }

    /// Has its traffic counted by protocol and peer, or not any more.
    pub fn count_traffic(&self, enable: bool) -> Result<(), Refusal> {
        let done: io::Result<()> = self.order(|done| Order::CountTraffic(enable, done))?;
        done.map_err(|error| Refusal::CannotBeDone(format!("count its traffic: {error}")))
    }

    /// What was counted so far, by protocol and peer.
    pub fn traffic(&self) -> Result<Vec<Row>, Refusal> {
        let rows: io::Result<Vec<Row>> = self.order(Order::Traffic)?;
        rows.map_err(|error| Refusal::CannotBeDone(format!("read its traffic: {error}")))
    }

    /// Has the port's thread do something, and waits until it has.
    pub fn order<T>(&self, order: impl FnOnce(Sender<T>) -> Order) -> Result<T, Refusal> {
        let (done, finished) = channel();
        self.tell(order(done));
        finished.recv_timeout(PATIENCE).map_err(|_| {
            Refusal::CannotBeDone(format!("{}: its thread does not answer", self.name()))
        })
    }

    /// Waits until the port's thread has ended, or abandons it: what a tenant holds must not hold up
    /// whoever removes its port. The thread keeps the guest's memory mapped until it ends.
    fn finish(&mut self, deadline: Instant) {
        self.stop_capture();
        self.tell(Order::Stop("the port is removed"));
        let Some(thread) = self.thread.take() else { return };
        while !thread.is_finished() {
            if Instant::now() > deadline {
                ABANDONED.fetch_add(1, Ordering::Relaxed);
                let name = self.name();
                error!(
                    "{name}: port did not stop in time and is abandoned; its threads and memory stay \
                     until its VMM lets go or the daemon exits"
                );
                return;
            }
            thread::sleep(STOP_POLL);
        }
        if thread.join().is_err() {
            error!("{}: the port's thread has panicked", self.name());
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.finish(Instant::now() + STOP_TIMEOUT);
    }
}

/// What a port offers on a device with these offloads.
pub fn offer(config: &PortConfig, offloads: PortOffloads) -> Offer {
    let options = OfferOptions {
        guest_segmentation: config.guest_tso,
        mac: config.mac.is_some(),
        ring_reset: config.ring_reset,
    };
    Offer::new(offloads, options)
}

/// Starts the workers of a port.
fn prepare(
    opened: Opened,
    counters: Vec<PairCounters>,
    sandbox: Sandbox,
) -> Result<Prepared, StartError> {
    let Opened { name, config, from_file, queues, endpoint } = opened;
    let handles = queues.iter().map(HostQueue::handle).collect::<io::Result<Vec<_>>>();
    let handles = handles.map_err(no_descriptor)?.into_iter().flatten().collect();
    let tap = queues[0].tap_state();
    let listener = endpoint.fd().map(|fd| fd.try_clone_to_owned()).transpose();
    let listener = listener.map_err(no_descriptor)?;
    let largest_mtu = queues[0].largest_mtu();
    let offloads = queues[0].offloads();
    let offer = offer(&config, offloads);
    let net_config = NetConfig {
        mac: config.mac.unwrap_or_default(),
        queue_pairs: config.queue_pairs,
        mtu: config.mtu,
        link: config.link,
    };
    let limits =
        Arc::new(Limits { rx: Limiter::new(&config.rx_limit), tx: Limiter::new(&config.tx_limit) });
    let filters = Filters {
        tx: Arc::new(LiveFilter::new(config.tx_filter.clone())),
        rx: queues[0].rx_filter(),
    };
    let shared = WorkerOptions {
        name: name.clone(),
        cpu: None,
        busy_poll: config.busy_poll,
        limits: limits.clone(),
        pair: 0,
        capture: Arc::default(),
        tx_filter: filters.tx.clone(),
        tally: Arc::default(),
        sandbox,
    };
    let traffic = queues[0].traffic(shared.tally.clone());
    let device = queues[0].device();
    let announcer = queues[0].announcer(&limits, &filters.tx).map_err(no_descriptor)?;
    let queues = queues
        .into_iter()
        .zip(counters.into_iter().map(Some).chain(std::iter::repeat_with(|| None)));
    let workers = start_workers(&config, &shared, queues)?;
    let capture = shared.capture;
    let status = Arc::new(PortStatus::new(
        name.clone(),
        config.host.to_string(),
        device,
        config.frontend.clone(),
        limits,
        filters,
        traffic,
        Arc::new(MemoryQuota::new(config.memory_limit())),
        Arc::new(DescriptorQuota::new(
            usize::from(config.queue_pairs),
            matches!(config.host, Host::AfXdp(_)),
        )),
        workers.iter().map(|worker| worker.status().clone()).collect(),
    ));
    status.set_link(config.link);
    status.set_listener(listener);
    info!("{name}: ready, {} queue pairs, features {:#x}", config.queue_pairs, offer.bits());
    let mut device = Device::new(name, offer, net_config, workers);
    device.set_rules(config.identity.clone().map(|identity| Arc::new(Rules::new(identity))));
    device.set_link(config.link);
    device.set_announcer(announcer);
    device.set_limits(status.limits.clone());
    device.set_quota(status.memory.clone());
    device.set_descriptor_quota(status.descriptors.clone());
    device.set_largest_mtu(largest_mtu);
    device.require_sealed_memory(config.require_sealed_memory);
    let wake = Arc::new(Waker::new().map_err(no_descriptor)?);
    let (orders, inbox) = channel();
    let control = Control::new(device, endpoint, status.clone(), wake.clone(), inbox);
    let control = control.map_err(no_descriptor)?;
    let (offered, queues, thread) = (offer.bits(), handles, None);
    let port = Port {
        status,
        config,
        from_file,
        offered,
        offloads,
        capture,
        queues,
        tap,
        orders,
        wake,
        thread,
    };
    Ok(Prepared { control, port, predecessor: None })
}

/// Starts a worker for each queue, with options that differ by its place only.
fn start_workers(
    config: &PortConfig,
    shared: &WorkerOptions,
    queues: impl Iterator<Item = (HostQueue, Option<PairCounters>)>,
) -> Result<Vec<Worker>, StartError> {
    let (cpus, name) = (&config.cpu_affinity, &shared.name);
    let start = |(pair, (queue, counters)): (usize, (HostQueue, Option<PairCounters>))| {
        let options = WorkerOptions {
            name: format!("{name}/{pair}"),
            cpu: cpus.iter().cycle().nth(pair).copied(),
            pair: pair as u16,
            ..shared.clone()
        };
        Worker::start(queue, options, counters.unwrap_or_default())
            .map_err(|error| StartError::new(format!("start a worker of {name}: {error}")))
    };
    queues.enumerate().map(start).collect()
}
