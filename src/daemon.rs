//! From a configuration to running ports: opening, serving, and the order of shutting down.
//!
//! Each port has threads of its own, one that speaks to its frontend and one for each queue pair.
//! They share nothing with another port's.

mod control;
mod opening;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use log::{error, info, warn};

use crate::api::{Server, Wanted};
use crate::config::{Config, PortConfig};
use crate::device::Device;
use crate::endpoint::Endpoint;
use crate::event::{Interest, Poller};
use crate::features::{Offer, OfferOptions};
use crate::guest::contain_sigbus;
use crate::logging::Log;
use crate::net_config::NetConfig;
use crate::policy::{Limiter, Limits, LiveFilter, Rules};
use crate::port::HostQueue;
use crate::sandbox::{Role, Sandbox};
use crate::status::{Filters, PortStatus};
use crate::sys::eventfd::Waker;
use crate::sys::process::TerminationSignals;
use crate::traffic::Tally;
use crate::worker::{Worker, WorkerOptions};

use control::Control;
use opening::{Inherited, open_host};

/// Why the daemon can't start: one line that names the thing and the way out.
#[derive(Debug)]
pub struct StartError(String);

impl StartError {
    /// With the line to show.
    pub fn new(message: impl Into<String>) -> Self {
        StartError(message.into())
    }
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StartError {}

/// Runs all ports until a signal ends them, or the last inherited connection does.
///
/// # Errors
/// What kept one of them from starting; once they run, nothing ends them but a signal.
pub fn run(config: &Config) -> Result<(), StartError> {
    // Before anything is opened, which could get the number of a descriptor that we were
    // promised and did not get.
    let inherited = config.ports.iter().map(Inherited::take).collect::<Result<Vec<_>, _>>()?;
    contain_sigbus()
        .map_err(|error| StartError::new(format!("install a signal handler: {error}")))?;
    // Before any thread is started: they inherit the mask.
    let signals = TerminationSignals::block()
        .map_err(|error| StartError::new(format!("block signals: {error}")))?;
    let mut log = Log::new(config.log_level);
    let result = serve(config, inherited, &signals, &mut log);
    log.flush();
    result
}

fn serve(
    config: &Config,
    inherited: Vec<Inherited>,
    signals: &TerminationSignals,
    log: &mut Log,
) -> Result<(), StartError> {
    let mut opened = Vec::with_capacity(config.ports.len());
    for (port, inherited) in config.ports.iter().zip(inherited) {
        let (device, queues) = open_host(port, inherited.tap_queues)?;
        let name = port.name.clone().unwrap_or(device);
        let endpoint = Endpoint::open(&port.frontend, inherited.frontend)?;
        opened.push((name, port, queues, endpoint));
    }
    let mut server = config.control.as_deref().map(Server::open).transpose()?;
    let mut names: Vec<&str> = opened.iter().map(|(name, ..)| name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        let name = pair[0];
        return Err(StartError::new(format!("two ports are called {name}: give one a name")));
    }
    let sandbox = Sandbox::enter(config)?;
    log.start(move || sandbox.confine(Role::Log)).map_err(no_thread)?;
    let running = Arc::new(Running::new().map_err(no_descriptor)?);
    let prepared = opened
        .into_iter()
        .map(|(name, port, queues, endpoint)| prepare(name, port, queues, endpoint, sandbox))
        .collect::<Result<Vec<_>, _>>()?;
    // Whoever can connect finds everything ready, and what was said until then in the log.
    log.flush();
    if let Some(server) = &mut server {
        let statuses = prepared.iter().map(|(control, _)| control.status().clone()).collect();
        server
            .start(statuses)
            .map_err(|error| StartError::new(format!("listen on the control socket: {error}")))?;
    }
    let ports = prepared
        .into_iter()
        .map(|(control, stop)| Port::start(control, stop, sandbox, &running))
        .collect::<Result<Vec<_>, _>>()?;
    sandbox.confine(Role::Main).map_err(no_thread)?;
    if let Err(error) = running.wait(signals, server) {
        error!("wait for signals: {error}");
    }
    // All at once, so that none waits for another.
    ports.iter().for_each(|port| port.stop.wake());
    Ok(())
}

fn no_thread(error: io::Error) -> StartError {
    StartError::new(format!("start a thread: {error}"))
}

fn no_descriptor(error: io::Error) -> StartError {
    StartError::new(format!("wait for descriptors: {error}"))
}

/// What the ports' threads tell the main thread.
#[derive(Debug)]
struct Running {
    ports: AtomicUsize,
    /// Woken when a port has ended.
    ended: Waker,
}

impl Running {
    fn new() -> io::Result<Self> {
        Ok(Running { ports: AtomicUsize::new(0), ended: Waker::new()? })
    }

    /// Waits for a signal, or until no port runs, and serves operators meanwhile.
    fn wait(&self, signals: &TerminationSignals, mut server: Option<Server>) -> io::Result<()> {
        let mut poller = Poller::new()?;
        poller.add(signals, Interest::Read, Source::Signal)?;
        poller.add(&self.ended, Interest::Read, Source::Ended)?;
        if let Some(fd) = server.as_ref().and_then(Server::fd) {
            poller.add(fd, Interest::Read, Source::Operators)?;
        }
        let mut happened = Vec::new();
        while self.ports.load(Ordering::Acquire) > 0 {
            poller.wait(None, |source| happened.push(source))?;
            for source in happened.drain(..) {
                match (source, &mut server) {
                    (Source::Signal, _) => return Ok(()),
                    (Source::Ended, _) => self.ended.clear(),
                    (Source::Operators, Some(server)) => take_operator(server, &mut poller),
                    (Source::Operator(number), Some(server)) => {
                        let watched = match server.serve(number) {
                            Wanted::Request => poller.modify(source, Interest::Read),
                            Wanted::Room => poller.modify(source, Interest::Write),
                            Wanted::Nothing => {
                                poller.forget(source);
                                Ok(())
                            }
                        };
                        if let Err(error) = watched {
                            warn!("control socket: wait for a client: {error}");
                            server.hang_up(number);
                            poller.forget(source);
                        }
                    }
                    (Source::Operators | Source::Operator(_), None) => {}
                }
            }
        }
        Ok(())
    }
}

/// Takes whoever has connected to the control socket.
fn take_operator(server: &mut Server, poller: &mut Poller<Source>) {
    let Some((number, stream, gone)) = server.accept() else { return };
    let watched = poller.add(stream, Interest::Read, Source::Operator(number));
    if let Some(gone) = gone {
        poller.forget(Source::Operator(gone));
    }
    if let Err(error) = watched {
        warn!("control socket: wait for a client: {error}");
        server.hang_up(number);
    }
}

/// What the main thread waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Signal,
    Ended,
    /// Somebody connects to the control socket.
    Operators,
    /// A client there, by its number.
    Operator(u32),
}

/// A port's share in [`Running`], for as long as its thread runs, however that ends.
struct Alive(Arc<Running>);

impl Alive {
    fn new(running: &Arc<Running>) -> Self {
        running.ports.fetch_add(1, Ordering::Relaxed);
        Alive(running.clone())
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.ports.fetch_sub(1, Ordering::Release);
        self.0.ended.wake();
    }
}

/// A running port. It stops when it is dropped.
#[derive(Debug)]
struct Port {
    stop: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
}

impl Port {
    fn start(
        mut control: Control,
        stop: Arc<Waker>,
        sandbox: Sandbox,
        running: &Arc<Running>,
    ) -> Result<Self, StartError> {
        let name = control.name().to_owned();
        control.start().map_err(|error| StartError::new(format!("{name}: listen: {error}")))?;
        let alive = Alive::new(running);
        let thread = thread::Builder::new().name(name).spawn(move || {
            let _alive = alive;
            match sandbox.confine(control.role()) {
                Ok(()) => control.serve(),
                Err(error) => error!("{}: filter its system calls: {error}", control.name()),
            }
            control.finish();
        });
        let thread = thread.map_err(no_thread)?;
        Ok(Port { stop, thread: Some(thread) })
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.stop.wake();
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            error!("the thread of a port has panicked");
        }
    }
}

/// Starts the workers of a port. What is returned needs a thread, and ends when the waker is woken.
fn prepare(
    name: String,
    config: &PortConfig,
    queues: Vec<HostQueue>,
    endpoint: Endpoint,
    sandbox: Sandbox,
) -> Result<(Control, Arc<Waker>), StartError> {
    let options = OfferOptions {
        guest_segmentation: config.guest_tso,
        mac: config.mac.is_some(),
        ring_reset: config.ring_reset,
    };
    let offer = Offer::new(queues[0].offloads(), options);
    let net_config = NetConfig {
        mac: config.mac.unwrap_or_default(),
        queue_pairs: config.queue_pairs,
        mtu: config.mtu,
    };
    let limits =
        Arc::new(Limits { rx: Limiter::new(&config.rx_limit), tx: Limiter::new(&config.tx_limit) });
    let rx_filter = queues[0].rx_filter();
    let tx_filter = Arc::new(LiveFilter::new(config.tx_filter.clone()));
    let filters = Filters { tx: tx_filter, rx: rx_filter };
    let tally = Arc::default();
    let traffic = queues[0].traffic(Arc::clone(&tally));
    let workers = start_workers(config, &name, queues, &limits, &filters.tx, &tally, sandbox)?;
    let status = Arc::new(PortStatus::new(
        name.clone(),
        config.host.to_string(),
        config.frontend.clone(),
        limits,
        filters,
        traffic,
        workers.iter().map(|worker| worker.status().clone()).collect(),
    ));
    info!("{name}: ready, {} queue pairs, features {:#x}", config.queue_pairs, offer.bits());
    let mut device = Device::new(name, offer, net_config, workers);
    device.set_rules(config.identity.clone().map(|identity| Arc::new(Rules::new(identity))));
    device.require_sealed_memory(config.require_sealed_memory);
    let stop = Arc::new(Waker::new().map_err(no_descriptor)?);
    let control = Control::new(device, endpoint, status, stop.clone()).map_err(no_descriptor)?;
    Ok((control, stop))
}

fn start_workers(
    config: &PortConfig,
    name: &str,
    queues: Vec<HostQueue>,
    limits: &Arc<Limits>,
    tx_filter: &Arc<LiveFilter>,
    tally: &Arc<Tally>,
    sandbox: Sandbox,
) -> Result<Vec<Worker>, StartError> {
    let cpus = &config.cpu_affinity;
    queues
        .into_iter()
        .enumerate()
        .map(|(pair, queue)| {
            let options = WorkerOptions {
                name: format!("{name}/{pair}"),
                cpu: cpus.iter().cycle().nth(pair).copied(),
                busy_poll: config.busy_poll,
                limits: limits.clone(),
                tx_filter: tx_filter.clone(),
                tally: tally.clone(),
                sandbox,
            };
            Worker::start(queue, options)
                .map_err(|error| StartError::new(format!("start a worker of {name}: {error}")))
        })
        .collect()
}
