//! Worker threads: one for each queue pair, which sleeps while its rings have no work.
//!
//! Invariant: rings, chains and the port's session live on the worker's stack and end with the session. After
//! [`Worker::end`] has returned, no code of the daemon touches the session's guest memory. A panic keeps the
//! invariant too: unwinding drops the session, and the thread serves the next one.

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

/// Time that workers have to end their sessions before their system calls are interrupted.
const STOP_TIMEOUT: Duration = Duration::from_millis(100);
/// Time between two interruptions of a worker that is late.
const INTERRUPT_INTERVAL: Duration = Duration::from_millis(1);
/// Fault of a queue pair whose thread has ended.
const EXITED: &str = "worker thread exited (bug)";

/// State of a started ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingState {
    /// The worker moves the ring's frames.
    Enabled,
    /// The worker drops frames of a tx ring, and gives an rx ring none.
    Disabled,
    /// The worker leaves the ring alone: the frontend has neither enabled nor disabled it yet.
    Waiting,
}

/// One ring of a session.
#[derive(Debug, Clone)]
pub struct Ring {
    /// Size of the ring and addresses of its parts.
    pub layout: RingLayout,
    /// Base from the frontend. It is only logged: the ring resumes at the used index in guest memory.
    pub base: u16,
    /// State that the frontend has set.
    pub state: RingState,
    /// Descriptor on which the driver announces available chains. The worker reads a ring without one at least
    /// every millisecond.
    pub kick: Option<Arc<NotifyFd>>,
    /// Descriptor that interrupts the driver. If the frontend has set none, signals have no effect.
    pub call: Arc<ForeignEvent>,
    /// Descriptor that announces to the frontend that a fault has stopped the ring.
    pub error: Arc<ForeignEvent>,
}

/// Work of a worker until the control thread ends it: one memory table, one feature set, running rings.
#[derive(Debug, Clone)]
pub struct Session {
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// The negotiated features.
    pub negotiated: Negotiated,
    /// Number of the port's queue pairs.
    pub pairs: u16,
    /// MTU in bytes.
    pub mtu: u16,
    /// Link state. If false, frames from the guest are dropped, and the guest gets none.
    pub link: bool,
    /// Anti-spoofing for frames from the guest, if the port has it.
    pub rules: Option<Arc<AntiSpoofing>>,
    /// The ring for frames to the guest.
    pub rx: Option<Ring>,
    /// The ring for frames from the guest.
    pub tx: Option<Ring>,
    /// The control virtqueue, if the frontend passes it on.
    pub control: Option<Ring>,
}

/// End of a session: ring positions, and the fault, if any.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ended {
    /// Used index of the first rx chain that did not complete, if the ring ran.
    pub rx: Option<u16>,
    /// Used index of the first tx chain that did not complete, if the ring ran.
    pub tx: Option<u16>,
    /// Used index of the first command that was not answered, if the control virtqueue ran.
    pub control: Option<u16>,
    /// Fault that stopped the rings before the session was ended, if any.
    pub fault: Option<String>,
}

/// Settings of a worker that do not change while the daemon runs.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Port and queue pair for messages, such as `vm1/0`.
    pub name: String,
    /// CPU to pin the thread to.
    pub cpu: Option<usize>,
    /// Time to busy-poll before each sleep. Without it, the worker polls for a guest's replies only.
    pub busy_poll: Option<Duration>,
    /// Rate limits, which all queue pairs of the port share.
    pub limits: Arc<Limits>,
    /// Index of the queue pair in its port, from 0.
    pub pair: u16,
    /// Receiver of copies of the frames, while an operator captures.
    pub capture: Arc<Capture>,
    /// The operator's packet filter for frames from the guest.
    pub tx_filter: Arc<LiveFilter>,
    /// Counts of the guest's traffic by peer.
    pub peers: Arc<PeerTable>,
    /// Restrictions that the thread puts on itself at its start.
    pub sandbox: Sandbox,
}

impl Mailbox {
    fn has_command(&self) -> bool {
        self.waiting.load(Ordering::Acquire) > 0
    }

    /// Returns true if all rings are to be called unconditionally, and clears the request.
    fn take_call(&self) -> bool {
        self.call.load(Ordering::Relaxed) && self.call.swap(false, Ordering::Acquire)
    }
}

/// Command from the control thread to a worker.
enum Command {
    Begin(Box<Session>),
    End,
}

/// Signals from the control thread, which the worker checks in each turn and which end its sleep.
#[derive(Debug)]
struct Mailbox {
    /// Commands sent and not yet taken. The sender increments this before it wakes the thread. So if a
    /// thread has cleared its waker and then reads 0, no command waits.
    waiting: AtomicUsize,
    /// Request to call all rings: the worker may have signalled a call descriptor that has since been replaced.
    call: AtomicBool,
    /// Waker of the thread.
    wake: Waker,
}

/// Handle of a queue pair's thread, which the control thread owns.
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
    /// Starts the thread, whose counters continue from `counters`.
    ///
    /// # Errors
    /// The kernel refuses a thread or an eventfd, `options.cpu` does not exist or may not be used, or the sandbox
    /// cannot be applied.
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
        let status = Arc::new(PairStatus::with_counters(counters));
        let (its_mailbox, its_status) = (mailbox.clone(), status.clone());
        let thread = thread::Builder::new().name(options.name.clone()).spawn(move || {
            let prepared = options.cpu.map_or(Ok(()), |cpu| {
                pin_this_thread(cpu).map_err(|error| {
                    io::Error::new(error.kind(), format!("cannot run on CPU {cpu}: {error}"))
                })
            });
            let prepared = prepared.and_then(|()| {
                // By default the kernel may lengthen each sleep by 50 µs; a coalescing sleep lasts 70 µs at most.
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

    /// Returns the queue pair's state and counters.
    pub fn status(&self) -> &Arc<PairStatus> {
        &self.status
    }

    /// Begins a session.
    ///
    /// # Panics
    /// If a session is running: the caller must end it first.
    pub fn begin(&mut self, session: Session) {
        assert!(!self.running, "a worker serves one session at a time");
        self.running = true;
        self.send(Command::Begin(Box::new(session)));
    }

    /// Ends the session, if one is running. Then each of its chains is used or available again, and the worker
    /// touches the session's memory no more.
    pub fn end(&mut self) -> Ended {
        end_all(std::slice::from_mut(self)).remove(0)
    }

    /// Signals the call descriptors of all rings unconditionally.
    pub fn call(&self) {
        self.mailbox.call.store(true, Ordering::Release);
        self.mailbox.wake.wake();
    }

    /// Interrupts a system call that the thread is blocked in, by a signal.
    pub fn interrupt(&self) {
        if let Some(thread) = &self.thread {
            interrupt(thread);
        }
    }

    fn send(&self, command: Command) {
        // Incremented before the thread can take the command, or its decrement would wrap.
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

/// Ends the sessions of all workers as [`Worker::end`] does, and waits for them together.
///
/// After 100 ms, late workers are interrupted every millisecond: a frontend can make each of a session's last
/// system calls block.
pub fn end_all(workers: &mut [Worker]) -> Vec<Ended> {
    for worker in workers.iter().filter(|worker| worker.running) {
        worker.send(Command::End);
    }
    let deadline = Instant::now() + STOP_TIMEOUT;
    let mut ended = Vec::with_capacity(workers.len());
    while let Some(worker) = workers.get_mut(ended.len()) {
        if !worker.running {
            ended.push(Ended::default());
            continue;
        }
        let timeout = deadline.saturating_duration_since(Instant::now());
        match worker.replies.recv_timeout(timeout.max(INTERRUPT_INTERVAL)) {
            Ok(reply) => ended.push(reply),
            Err(RecvTimeoutError::Timeout) => {
                let late = workers[ended.len()..].iter().filter(|worker| worker.running);
                late.for_each(Worker::interrupt);
                continue;
            }
            // A panic outside a session has ended the thread, which had no session to drop.
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

/// Serves one session after the other until the channel closes: the thread's main function.
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
                // If the guest's memory is truncated, SIGBUS stops this session only.
                ended = contained(&session.memory, || {
                    let serve = || {
                        session::serve(&mut host, &session, options, mailbox, status, &mut spoofing)
                    };
                    // Unwinding drops the whole session before it is caught; the host queue outlives it.
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
