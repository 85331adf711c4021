//! A port as the main thread has it: its control thread, and the orders that it is given.

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

use super::control::Order;
use super::{PortStatus, Prepared, Refusal};
use crate::capture::{self, Capture};
use crate::config::{PortConfig, PortOptions};
use crate::error::{StartError, no_thread};
use crate::features::PortOffloads;
use crate::port::TapState;
use crate::sandbox::{Role, Sandbox};
use crate::sys::eventfd::Waker;
use crate::traffic::Row;

/// How long a port's thread may take to carry an order out.
const PATIENCE: Duration = Duration::from_secs(1);
/// Time that removed ports have to stop; one that takes longer is abandoned.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval at which a port that stops is looked at.
const STOP_POLL: Duration = Duration::from_millis(1);
/// Ports that did not stop in time, since the daemon's start.
static ABANDONED: AtomicUsize = AtomicUsize::new(0);

/// Returns the number of ports that were abandoned since the daemon's start: they did not stop in time.
pub(super) fn abandoned() -> usize {
    ABANDONED.load(Ordering::Relaxed)
}

/// Counts the ports that run.
#[derive(Debug)]
pub(super) struct Running {
    ports: AtomicUsize,
    /// The control thread of one has panicked.
    panicked: AtomicBool,
    /// Woken when a port has ended, or its device does not work.
    changed: Arc<Waker>,
}

impl Running {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Running {
            ports: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            changed: Arc::new(Waker::new()?),
        })
    }

    /// Returns whether any port's thread runs.
    pub(super) fn any_runs(&self) -> bool {
        self.ports.load(Ordering::Acquire) > 0
    }

    /// Returns whether any port's control thread has panicked.
    pub(super) fn any_panicked(&self) -> bool {
        self.panicked.load(Ordering::Relaxed)
    }

    /// Returns the waker that is woken when a port has ended, or its device does not work.
    pub(super) fn changed(&self) -> &Waker {
        &self.changed
    }
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

/// A port, which runs once it was started. It stops when it is dropped.
#[derive(Debug)]
pub struct Port {
    pub(super) status: Arc<PortStatus>,
    pub(super) config: PortConfig,
    pub(super) from_file: bool,
    pub(super) offered: u64,
    pub(super) offloads: PortOffloads,
    pub(super) capture: Arc<Capture>,
    /// Its TAP's queues and their state, for another daemon.
    pub(super) queues: Vec<OwnedFd>,
    pub(super) tap: Option<TapState>,
    pub(super) orders: Sender<Order>,
    pub(super) wake: Arc<Waker>,
    pub(super) thread: Option<JoinHandle<()>>,
}

impl Port {
    pub(super) fn start(
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
    pub(super) fn queues(&self) -> io::Result<Vec<OwnedFd>> {
        self.queues.iter().map(OwnedFd::try_clone).collect()
    }

    /// Its socket for frontends, by another descriptor.
    pub(super) fn listener(&self) -> io::Result<Option<OwnedFd>> {
        self.status.listener()
    }

    /// Its TAP's state, for a successor.
    pub(super) fn tap(&self) -> Option<&TapState> {
        self.tap.as_ref()
    }

    /// What its device can do with a frame's offloads.
    pub(super) fn offloads(&self) -> PortOffloads {
        self.offloads
    }

    /// Gives its thread an order, and does not wait.
    pub(super) fn tell(&self, order: Order) {
        // Whoever does not listen any more has ended.
        let _ = self.orders.send(order);
        self.wake.wake();
    }

    /// Has its frames written to `output` by a thread of its own, until the other end of `output` is closed,
    /// or the capture is stopped.
    pub(super) fn start_capture(
        &self,
        options: capture::Options,
        output: File,
        sandbox: Sandbox,
    ) -> Result<(), Refusal> {
        let name = self.name().to_owned();
        let pairs = self.status.pairs.len();
        let Some(writer) = self.capture.begin(&name, pairs, options, output) else {
            return Err(Refusal::CannotBeDone(format!("{name} is being captured already")));
        };
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
            self.capture.stop();
            Refusal::CannotBeDone(format!("start a thread: {error}"))
        })
    }

    /// Closes what it kept for a successor: else VMMs could still connect to a port that has ended.
    pub(super) fn close_kept(&mut self) {
        self.status.set_listener(None);
        self.queues.clear();
    }

    /// Ends its capture; says what it has come to.
    pub fn stop_capture(&self) -> capture::Tally {
        self.capture.stop()
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
    pub(super) fn order<T>(&self, order: impl FnOnce(Sender<T>) -> Order) -> Result<T, Refusal> {
        let (done, finished) = channel();
        self.tell(order(done));
        finished.recv_timeout(PATIENCE).map_err(|_| {
            Refusal::CannotBeDone(format!("{}: its thread does not answer", self.name()))
        })
    }

    /// Waits until the port's thread has ended, or abandons it: what a tenant holds must not hold up
    /// whoever removes its port. The thread keeps the guest's memory mapped until it ends.
    pub(super) fn finish(&mut self, deadline: Instant) {
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
