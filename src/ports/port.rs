//! The main thread's view of a port: its state, and the commands to its control thread.

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

use super::control::ControlCommand;
use super::{PortStatus, Prepared, Refusal};
use crate::capture::{self, Capture};
use crate::config::{PortConfig, PortOptions};
use crate::error::{StartError, no_thread};
use crate::features::PortOffloads;
use crate::port::TapState;
use crate::sandbox::{Role, Sandbox};
use crate::sys::eventfd::Waker;
use crate::traffic::Row;

/// Time that a port's control thread may take to carry out a command.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(1);
/// Time that a removed port has to stop; a port that takes longer is abandoned.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval between two checks whether a port has stopped.
const STOP_POLL: Duration = Duration::from_millis(1);
/// Number of ports that did not stop in time, since the daemon's start.
static ABANDONED: AtomicUsize = AtomicUsize::new(0);

/// Returns the number of ports that did not stop in time, since the daemon's start.
pub(super) fn abandoned() -> usize {
    ABANDONED.load(Ordering::Relaxed)
}

/// The number of control threads that run.
#[derive(Debug)]
pub(super) struct Running {
    ports: AtomicUsize,
    /// Set when a control thread has panicked.
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

/// A control thread's share in [`Running`], which ends with the thread, also by a panic.
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

/// A running port, which stops when this value is dropped.
#[derive(Debug)]
pub struct Port {
    pub(super) status: Arc<PortStatus>,
    pub(super) config: PortConfig,
    pub(super) from_file: bool,
    pub(super) offered: u64,
    pub(super) offloads: PortOffloads,
    pub(super) capture: Arc<Capture>,
    /// The TAP's queues, for another daemon.
    pub(super) queues: Vec<OwnedFd>,
    pub(super) tap: Option<TapState>,
    pub(super) commands: Sender<ControlCommand>,
    pub(super) wake: Arc<Waker>,
    pub(super) thread: Option<JoinHandle<()>>,
}

impl Port {
    /// Starts the control thread of a prepared port.
    pub(super) fn start(
        prepared: Prepared,
        sandbox: Sandbox,
        running: &Arc<Running>,
    ) -> Result<Self, StartError> {
        let Prepared { mut control, mut port, frontend } = prepared;
        let name = control.name().to_owned();
        control
            .start()
            .map_err(|error| StartError::new(format!("cannot listen for port {name}: {error}")))?;
        let alive = Alive::new(running, &port.status);
        port.status.pairs.iter().for_each(|pair| pair.wake_on_device_loss(running.changed.clone()));
        let thread = thread::Builder::new().name(name).spawn(move || {
            let alive = alive;
            match sandbox.confine(control.role()) {
                Ok(()) => {
                    // A panic ends this port only; the rest of the thread stops the port as a command would.
                    let serve = || {
                        if frontend.is_none_or(|frontend| control.take_over(frontend)) {
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
                Err(error) => error!(
                    "{}: cannot filter system calls: {error}; the port has ended",
                    control.name()
                ),
            }
            control.finish();
        });
        port.thread = Some(thread.map_err(no_thread)?);
        Ok(port)
    }

    /// Returns the port's name.
    pub fn name(&self) -> &str {
        &self.status.name
    }

    /// Returns the state that the port's threads write.
    pub fn status(&self) -> &Arc<PortStatus> {
        &self.status
    }

    /// Returns the options that describe the port.
    pub fn options(&self) -> &PortOptions {
        &self.config.options
    }

    /// Returns whether the daemon's file describes the port.
    pub fn is_from_file(&self) -> bool {
        self.from_file
    }

    /// Returns whether the port is on a TAP.
    pub fn is_on_tap(&self) -> bool {
        self.tap.is_some()
    }

    /// Returns the feature bits that the port offers.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Returns the validated options that describe the port.
    pub fn config(&self) -> &PortConfig {
        &self.config
    }

    /// Duplicates the descriptors of the TAP's queues.
    pub(super) fn queues(&self) -> io::Result<Vec<OwnedFd>> {
        self.queues.iter().map(OwnedFd::try_clone).collect()
    }

    /// Duplicates the descriptor of the socket that VMMs connect to.
    pub(super) fn listener(&self) -> io::Result<Option<OwnedFd>> {
        self.status.listener()
    }

    /// Returns the TAP's state, for another daemon.
    pub(super) fn tap(&self) -> Option<&TapState> {
        self.tap.as_ref()
    }

    /// Returns the offloads of the port's device.
    pub(super) fn offloads(&self) -> PortOffloads {
        self.offloads
    }

    /// Sends a command to the control thread, and does not wait.
    pub(super) fn send(&self, command: ControlCommand) {
        // A thread that does not receive any more has ended.
        let _ = self.commands.send(command);
        self.wake.wake();
    }

    /// Starts a thread that writes the port's frames to `output`, until the reader closes `output` or the
    /// capture is stopped.
    pub(super) fn start_capture(
        &self,
        options: capture::Options,
        output: File,
        sandbox: Sandbox,
    ) -> Result<(), Refusal> {
        let name = self.name().to_owned();
        let pairs = self.status.pairs.len();
        let Some(writer) = self.capture.begin(&name, pairs, options, output) else {
            return Err(Refusal::CannotBeDone(format!(
                "cannot capture {name}: another capture runs; end it first"
            )));
        };
        info!("{name}: capture started by an operator");
        let started = thread::Builder::new().name("capture".into()).spawn(move || {
            match sandbox.confine(Role::Capture).and_then(|()| writer.run()) {
                Ok(stats) => info!(
                    "{name}: capture ended frames={} left_out={}",
                    stats.captured, stats.left_out
                ),
                Err(error) => warn!("{name}: capture failed: {error}"),
            }
        });
        started.map(|_| ()).map_err(|error| {
            self.capture.stop();
            Refusal::CannotBeDone(format!("cannot start a thread: {error}"))
        })
    }

    /// Closes the descriptors that an ended port kept for a successor: no VMM may connect any more.
    pub(super) fn close_kept(&mut self) {
        self.status.set_listener(None);
        self.queues.clear();
    }

    /// Stops the capture, and returns its result.
    pub fn stop_capture(&self) -> capture::CaptureStats {
        self.capture.stop()
    }

    /// Enables or disables the count of the port's traffic by protocol and peer.
    ///
    /// # Errors
    /// The control thread does not answer, or the device cannot count.
    pub fn count_traffic(&self, enable: bool) -> Result<(), Refusal> {
        let done: io::Result<()> =
            self.request(|done| ControlCommand::CountTraffic(enable, done))?;
        done.map_err(|error| {
            Refusal::CannotBeDone(format!("cannot count the traffic of {}: {error}", self.name()))
        })
    }

    /// Returns the traffic counted so far, by protocol and peer.
    ///
    /// # Errors
    /// The control thread does not answer, or the device's counters cannot be read.
    pub fn traffic(&self) -> Result<Vec<Row>, Refusal> {
        let rows: io::Result<Vec<Row>> = self.request(ControlCommand::Traffic)?;
        rows.map_err(|error| {
            Refusal::CannotBeDone(format!("cannot read the traffic of {}: {error}", self.name()))
        })
    }

    /// Sends a command to the control thread, and waits up to 1 s for the reply.
    pub(super) fn request<T>(
        &self,
        command: impl FnOnce(Sender<T>) -> ControlCommand,
    ) -> Result<T, Refusal> {
        let (done, finished) = channel();
        self.send(command(done));
        finished.recv_timeout(COMMAND_TIMEOUT).map_err(|_| {
            Refusal::CannotBeDone(format!(
                "{}: control thread did not answer within 1 s",
                self.name()
            ))
        })
    }

    /// Waits until the control thread has ended, or abandons it at `deadline`: no guest may delay the removal of its
    /// port.
    /// The thread keeps the guest's memory mapped until it ends.
    pub(super) fn finish(&mut self, deadline: Instant) {
        self.stop_capture();
        self.send(ControlCommand::Stop("the port is removed"));
        let Some(thread) = self.thread.take() else { return };
        while !thread.is_finished() {
            if Instant::now() > deadline {
                ABANDONED.fetch_add(1, Ordering::Relaxed);
                let name = self.name();
                error!(
                    "{name}: port abandoned: it did not stop in time; its threads and memory stay until the \
                     system call that blocks them returns, or the daemon exits"
                );
                return;
            }
            thread::sleep(STOP_POLL);
        }
        if thread.join().is_err() {
            error!("{}: control thread panicked (bug) while it stopped", self.name());
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.finish(Instant::now() + STOP_TIMEOUT);
    }
}
