//! The story, running: one thread per queue pair, asleep while there is nothing to do.
//!
//! Invariant: rings, chains and the port's session live on the worker's stack and end with the
//! session; when [`Worker::end`] returns, nothing of ours touches the guest's memory any more. That holds
//! for a session that panics too: unwinding drops it, and the thread serves the next one.

mod active_ring;
mod adaptive_poll;
mod coalescing;
mod control_queue;
mod ending;
mod idle_wait;
mod rate_limit;
mod recording;
mod session;
mod spoofing;
mod status;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::error;
use nix::sys::prctl;

use spoofing::SpoofingLog;
pub use status::PairStatus;

use crate::capture::Capture;
use crate::counters::PairCounters;
use crate::features::Negotiated;
use crate::guest::{GuestMemory, RingLayout, contained};
use crate::policy::{AntiSpoofing, Limits, LiveFilter};
use crate::port::HostQueue;
use crate::sandbox::Sandbox;
use crate::sys::eventfd::{ForeignEvent, NotifyFd, Waker};
use crate::sys::process::{ThreadClock, interrupt, permit_interrupts, pin_this_thread};
use crate::traffic::PeerTable;

/// How long workers may take to end their sessions before the system calls that they are in are
/// interrupted.
const STOP_TIMEOUT: Duration = Duration::from_millis(100);
/// How often they are interrupted then.
const INTERRUPTIONS: Duration = Duration::from_millis(1);
/// Fault of a queue pair that has no thread any more.
const EXITED: &str = "worker thread exited (bug)";

/// What is to be done with a ring that was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingState {
    /// Move its frames.
    Enabled,
    /// Drop what comes on a tx ring, put nothing into an rx ring.
    Disabled,
    /// Leave it alone: the frontend has not said yet.
    Waiting,
}

/// One ring of a session.
#[derive(Debug, Clone)]
pub struct Ring {
    /// Where it lies.
    pub layout: RingLayout,
    /// Where the frontend thinks it stands. The used index in guest memory counts.
    pub base: u16,
    /// Whether its frames are to be moved.
    pub state: RingState,
    /// Tells us that the driver has made something available; without one the ring is polled
    /// at each wake-up only.
    pub kick: Option<Arc<NotifyFd>>,
    /// Interrupts the driver; without one it gets no interrupts.
    pub call: Arc<ForeignEvent>,
    /// Tells the frontend that the ring has stopped for a fault.
    pub error: Arc<ForeignEvent>,
}

/// What a worker serves until it is told to end: one memory table, one feature set, running rings.
#[derive(Debug, Clone)]
pub struct Session {
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// The features agreed on.
    pub negotiated: Negotiated,
    /// Queue pairs of the port.
    pub pairs: u16,
    /// MTU in bytes.
    pub mtu: u16,
    /// Whether frames move; if not, those from the guest are dropped, and it is given none.
    pub link: bool,
    /// What the guest may send.
    pub rules: Option<Arc<AntiSpoofing>>,
    /// The ring for frames to the guest.
    pub rx: Option<Ring>,
    /// The ring for frames from the guest.
    pub tx: Option<Ring>,
    /// The ring for commands from the guest.
    pub control: Option<Ring>,
}

/// How a session ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ended {
    /// First chain of the rx ring that was not finished, if the ring ran.
    pub rx: Option<u16>,
    /// First chain of the tx ring that was not finished, if the ring ran.
    pub tx: Option<u16>,
    /// First command that was not answered, if the control ring ran.
    pub control: Option<u16>,
    /// Why the rings had stopped before, if they had.
    pub fault: Option<String>,
}

/// Settings of a worker that do not change while the daemon runs.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Port and queue pair, for messages.
    pub name: String,
    /// Processor to run on.
    pub cpu: Option<usize>,
    /// How long to look for work before going to sleep; if it is not said, for a guest's answers only.
    pub busy_poll: Option<Duration>,
    /// How much traffic the port may have, all queue pairs together.
    pub limits: Arc<Limits>,
    /// Which of the port's queue pairs it is.
    pub pair: u16,
    /// Where frames are put for an operator to look at.
    pub capture: Arc<Capture>,
    /// What is denied of what the guest sends.
    pub tx_filter: Arc<LiveFilter>,
    /// Where its traffic is counted.
    pub peers: Arc<PeerTable>,
    /// What the thread is left with.
    pub sandbox: Sandbox,
}

impl Mailbox {
    fn has_command(&self) -> bool {
        self.waiting.load(Ordering::Acquire) > 0
    }

    /// Whether both rings' drivers are to be called, once.
    fn take_call(&self) -> bool {
        self.call.load(Ordering::Relaxed) && self.call.swap(false, Ordering::Acquire)
    }
}

/// What the control thread asks of a worker.
enum Command {
    Begin(Box<Session>),
    End,
}

/// Shared with the thread: what it must notice while it is busy or asleep.
#[derive(Debug)]
struct Mailbox {
    /// Commands sent and not yet taken. The sender counts up before it wakes the thread, so a
    /// thread that has cleared its waker and then reads 0 here has missed nothing.
    waiting: AtomicUsize,
    /// A call may have gone to a descriptor that is not used any more.
    call: AtomicBool,
    /// Ends the thread's sleep.
    wake: Waker,
}

/// A queue pair's thread, as the control thread sees it.
#[derive(Debug)]
pub struct Worker {
    commands: Sender<Command>,
    replies: Receiver<Ended>,
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
    status: Arc<PairStatus>,
    running: bool,
}

impl Worker {
    /// Starts the thread, which counts on from `counters`.
    ///
    /// # Errors
    /// No thread or event descriptor to be had, or no such processor.
    pub fn start(
        host: HostQueue,
        options: WorkerOptions,
        counters: PairCounters,
    ) -> io::Result<Self> {
        let (commands, inbox) = channel();
        let (outbox, replies) = channel();
        let (started, ready) = channel();
        let (waiting, call) = Default::default();
        let mailbox = Arc::new(Mailbox { waiting, call, wake: Waker::new()? });
        let status = Arc::new(PairStatus::counting_on(counters));
        let (its_mailbox, its_status) = (mailbox.clone(), status.clone());
        let thread = thread::Builder::new().name(options.name.clone()).spawn(move || {
            let prepared = options.cpu.map_or(Ok(()), |cpu| {
                pin_this_thread(cpu).map_err(|error| {
                    io::Error::new(error.kind(), format!("run on processor {cpu}: {error}"))
                })
            });
            let prepared = prepared.and_then(|()| {
                // Coalescing sleeps last as long as they say: the kernel may add 50 µs to all sleeps, if nobody objects.
                prctl::set_timerslack(1)?;
                permit_interrupts()?;
                options.sandbox.confine(host.role())
            });
            let failed = prepared.is_err();
            if started.send(prepared).is_ok() && !failed {
                run(host, &options, &its_mailbox, &its_status, &inbox, &outbox);
            }
        })?;
        ready.recv().map_err(io::Error::other)??;
        Ok(Worker { commands, replies, mailbox, thread: Some(thread), status, running: false })
    }

    /// What the worker does, and has counted.
    pub fn status(&self) -> &Arc<PairStatus> {
        &self.status
    }

    /// Begins a session.
    ///
    /// # Panics
    /// If one is running: it must be ended first.
    pub fn begin(&mut self, session: Session) {
        assert!(!self.running, "a worker serves one session at a time");
        self.running = true;
        self.send(Command::Begin(Box::new(session)));
    }

    /// Ends the session, if one is running. When this returns, each of its chains has been retired
    /// or taken back, and its memory is touched no more.
    pub fn end(&mut self) -> Ended {
        end_all(std::slice::from_mut(self)).remove(0)
    }

    /// Has the drivers called, whether or not there is anything new for them.
    pub fn call(&self) {
        self.mailbox.call.store(true, Ordering::Release);
        self.mailbox.wake.wake();
    }

    /// Gets the thread out of a system call that it is stuck in.
    pub fn interrupt(&self) {
        if let Some(thread) = &self.thread {
            interrupt(thread);
        }
    }

    fn send(&self, command: Command) {
        // Counted before it can be taken, or the thread would count below zero.
        self.mailbox.waiting.fetch_add(1, Ordering::Release);
        if self.commands.send(command).is_err() {
            let name = self.thread.as_ref().and_then(|thread| thread.thread().name());
            error!(
                "{}: worker thread exited (bug); queue pair down until the port is added again",
                name.unwrap_or("?")
            );
            self.status.set_fault(Some(EXITED.into()));
        }
        self.mailbox.wake.wake();
    }
}

/// Ends the sessions of all workers as [`Worker::end`] does, and waits for them together. Those that take
/// longer than 100 ms are interrupted again and again: a frontend can have each of a session's last
/// calls block.
pub fn end_all(workers: &mut [Worker]) -> Vec<Ended> {
    for worker in workers.iter().filter(|worker| worker.running) {
        worker.send(Command::End);
    }
    let patient_until = Instant::now() + STOP_TIMEOUT;
    let mut ended = Vec::with_capacity(workers.len());
    while let Some(worker) = workers.get_mut(ended.len()) {
        if !worker.running {
            ended.push(Ended::default());
            continue;
        }
        let patience = patient_until.saturating_duration_since(Instant::now());
        match worker.replies.recv_timeout(patience.max(INTERRUPTIONS)) {
            Ok(reply) => ended.push(reply),
            Err(RecvTimeoutError::Timeout) => {
                let late = workers[ended.len()..].iter().filter(|worker| worker.running);
                late.for_each(Worker::interrupt);
                continue;
            }
            // The thread has ended for a panic outside a session: it holds nothing any more.
            Err(RecvTimeoutError::Disconnected) => {
                worker.status.set_serving(false);
                ended.push(Ended { fault: Some(EXITED.into()), ..Ended::default() });
            }
        }
        worker.running = false;
    }
    ended
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
        // A closed channel ends the thread.
        let (closed, _) = channel();
        self.commands = closed;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The thread: serves one session after the other until the channel closes.
fn run(
    mut host: HostQueue,
    options: &WorkerOptions,
    mailbox: &Mailbox,
    status: &PairStatus,
    inbox: &Receiver<Command>,
    outbox: &Sender<Ended>,
) {
    status.began(ThreadClock::of_this_thread());
    let mut ended = Ended::default();
    let mut spoofing = SpoofingLog::new(&options.name, &status.counters.tx);
    while let Ok(command) = inbox.recv() {
        mailbox.waiting.fetch_sub(1, Ordering::Relaxed);
        match command {
            Command::Begin(session) => {
                status.set_fault(None);
                status.set_serving(true);
                // Guest memory that goes away costs nothing but itself.
                ended = contained(&session.memory, || {
                    let serve = || {
                        session::serve(&mut host, &session, options, mailbox, status, &mut spoofing)
                    };
                    // A panic drops all of the session before it is caught; the host side outlives it.
                    catch_unwind(AssertUnwindSafe(serve)).unwrap_or_else(|_| {
                        host.recover();
                        ending::panicked(&session, options)
                    })
                });
                status.set_fault(ended.fault.clone());
                status.set_serving(false);
            }
            Command::End => {
                if outbox.send(std::mem::take(&mut ended)).is_err() {
                    return;
                }
            }
        }
    }
}
