//! A session on a queue: the worker's port while a socket is open, and while none is.
//!
//! Invariant: frames that the kernel or the XDP program drops are counted, from the kernel's own counters.
//! While the device does not work, the port drops frames from the guest. While the queue is still busy with
//! its last socket, frames from the guest wait.

mod socket;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::warn;

use super::interface::OpenSocket;
use super::receiver::{MAX_BUFFERS, Receiver};
use super::transmitter::Transmitter;
use super::{OpenError, XdpQueue};
use crate::counters::DropReason;
use crate::guest::GuestMemory;
use crate::port::{Completions, Mode, Port, Readiness, SessionConfig, Virtqueues};
use crate::sys::xsk::Statistics;

/// Interval at which the port checks for completed frames while the kernel has some.
const COMPLETION_INTERVAL: Duration = Duration::from_millis(1);
/// Interval at which the port reads the counters of the program and the kernel.
const COUNTING_INTERVAL: Duration = Duration::from_secs(1);

/// A session on a queue.
#[derive(Debug)]
pub struct XdpPort<'mem> {
    host: &'mem mut XdpQueue,
    memory: &'mem Arc<GuestMemory>,
    /// MTU of the virtio-net device in bytes.
    mtu: u16,
    /// The guest has an rx ring.
    receives: bool,
    state: State,
    /// The last `transmit` left frames in the tx ring.
    left_behind: bool,
    /// Error of the last device check, until `reap` closes the socket.
    failed: Option<OpenError>,
    /// Change of the device that requires a new socket, until `reap` opens it.
    changed: Option<&'static str>,
    /// Time of the last reopening because of a fault.
    reopened_at: Option<Instant>,
    filtered: Filtered,
    /// The kernel's counters for the socket, when last read.
    statistics: Statistics,
    transmitter: Transmitter,
    receiver: Receiver,
}

/// State of a session's socket.
#[derive(Debug)]
enum State {
    Open(Box<OpenSocket>),
    Closed {
        /// Failure of the last attempt to open a socket; `None` before the first attempt.
        since: Option<Closed>,
        /// Time of the next attempt.
        retry: Instant,
    },
}

/// Failure to open a socket.
#[derive(Debug, Clone, Copy)]
struct Closed {
    /// Time of the first attempt that found the queue busy, or of the last attempt on a gone device.
    at: Instant,
    /// The device does not work, and the log says so: the port drops frames.
    gone: bool,
}

/// The program's counter of frames that the filter denied.
#[derive(Debug)]
struct Filtered {
    /// Value when last read.
    counted: Option<u64>,
    /// Time of that reading.
    at: Instant,
}

impl XdpQueue {
    /// Begins a session. The socket opens later, when the guest first has frames or buffers.
    pub fn session<'mem>(
        &'mem mut self,
        memory: &'mem Arc<GuestMemory>,
        queues: &Virtqueues<'mem>,
        config: &SessionConfig,
    ) -> XdpPort<'mem> {
        let (first_tx, first_rx) = (queues.tx_next_used(), queues.rx_next_used());
        XdpPort {
            transmitter: Transmitter::new(config, self.pair, first_tx),
            receiver: Receiver::new(&config.negotiated, self.pair, first_rx),
            host: self,
            memory,
            mtu: config.mtu,
            receives: config.receives,
            left_behind: false,
            failed: None,
            changed: None,
            reopened_at: None,
            filtered: Filtered { counted: None, at: Instant::now() },
            statistics: Statistics::default(),
            state: State::Closed { since: None, retry: Instant::now() },
        }
    }
}

impl<'mem> Port<'mem> for XdpPort<'mem> {
    fn transmit(
        &mut self,
        queues: &mut Virtqueues<'mem>,
        until: u16,
        done: &mut Completions,
    ) -> bool {
        self.ensure_open(queues);
        let Some(tx) = &mut queues.tx else { return true };
        let has_taken = match &mut self.state {
            State::Open(open) => self.transmitter.transmit(tx, until, open, done),
            State::Closed { since: Some(Closed { gone: true, .. }), .. } => {
                self.transmitter.drop_all(tx, Some(until), done);
                true
            }
            // The queue is still busy with its last socket, for some 30 ms.
            State::Closed { .. } => false,
        };
        self.left_behind = !has_taken;
        has_taken
    }

    fn max_buffers(&self) -> usize {
        MAX_BUFFERS
    }

    fn post(&mut self, queues: &mut Virtqueues<'mem>) {
        self.ensure_open(queues);
        if let (State::Open(open), Some(rx)) = (&mut self.state, &queues.rx) {
            self.receiver.post(rx, open);
        }
    }

    fn reap(&mut self, queues: &mut Virtqueues<'mem>, rx_allowance: usize, done: &mut Completions) {
        if let State::Open(open) = &mut self.state {
            let kicked = self.transmitter.kick(open);
            if open.busy_poll {
                // Any error is also an error of the next `send`.
                let _ = open.socket.receive();
            }
            reap(&mut self.receiver, &mut self.transmitter, queues, open, rx_allowance, done);
            if let Some(error) = self.failed.take() {
                self.fail(&error, queues, done);
            } else if let Err(error) = kicked {
                self.fail(&error, queues, done);
            } else if let Some(why) = self.changed.take() {
                self.reopen(why, queues, done);
            } else if let Some(fault) = self.receiver.fault() {
                self.reopen_after_fault(fault, queues, done);
            }
        } else if queues.buffers() > 0 || self.is_gone() {
            self.open(queues);
        }
        if self.counts_dropped() && self.filtered.at.elapsed() >= COUNTING_INTERVAL {
            self.count_filtered(done);
            if let State::Open(open) = &self.state
                && let Ok(statistics) = open.socket.statistics()
            {
                self.count_lost(statistics, done);
            }
        }
    }

    fn mode(&self) -> Mode {
        match &self.state {
            State::Open(open) if open.is_zero_copy() => Mode::ZeroCopy,
            State::Open(_) => Mode::Copy,
            State::Closed { .. } if self.is_gone() => Mode::Gone,
            State::Closed { .. } => Mode::None,
        }
    }

    fn readiness(&self, queues: &Virtqueues<'mem>) -> Readiness<'_> {
        let (fd, timeout) = match &self.state {
            State::Open(open) => {
                let wait = if self.transmitter.has_frames() {
                    Some(COMPLETION_INTERVAL)
                } else if self.left_behind {
                    // The socket was opened for the guest's rx buffers after `transmit` had failed.
                    Some(Duration::ZERO)
                } else {
                    self.receiver.reorder_timeout()
                };
                let count = self
                    .counts_dropped()
                    .then(|| COUNTING_INTERVAL.saturating_sub(self.filtered.at.elapsed()));
                (Some(open.as_fd()), wait.into_iter().chain(count).min())
            }
            State::Closed { since: Some(_), retry } => {
                (None, Some(retry.saturating_duration_since(Instant::now())))
            }
            State::Closed { .. } => (None, None),
        };
        Readiness {
            fd,
            read: fd.is_some() && self.receives,
            write: false,
            watched: false,
            starved: Receiver::is_starved(queues.buffers()),
            timeout,
        }
    }

    fn woken(&mut self, _readable: bool) {}

    fn events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.host.watch.as_fd())
    }

    fn host_changed(&mut self) {
        let changed = self.host.watch.clear();
        if self.host.pair == 0 {
            // Once for all queues of the device.
            self.host.interface.recheck_tags(changed.as_ref());
        }
        match &mut self.state {
            State::Open(open) => match self.host.interface.check(open) {
                Ok(changed) => self.changed = changed,
                Err(error) => self.failed = Some(error),
            },
            State::Closed { retry, .. } => *retry = Instant::now(),
        }
    }

    fn stop(&mut self, queues: &mut Virtqueues<'mem>, done: &mut Completions) {
        self.close(queues, done);
    }
}

impl XdpPort<'_> {
    /// Counts the frames that the program's filter has dropped since the last call.
    fn count_filtered(&mut self, done: &mut Completions) {
        let now = self.host.interface.filtered(self.host.pair);
        let before = std::mem::replace(&mut self.filtered.counted, now);
        if let (Some(before), Some(now)) = (before, now)
            && now > before
        {
            done.rx_dropped.push((DropReason::Filtered, now - before));
        }
        self.filtered.at = Instant::now();
    }

    /// Counts the frames that the kernel has dropped since the last call. `now` has the kernel's counters.
    fn count_lost(&mut self, now: Statistics, done: &mut Completions) {
        let before = std::mem::replace(&mut self.statistics, now);
        let too_long = now.too_long().saturating_sub(before.too_long());
        let lost = now.lost().saturating_sub(before.lost()).saturating_sub(too_long);
        if too_long > 0 && before.too_long() == 0 {
            warn!(
                "af_xdp {}: frames longer than its MTU are lost; find the device that merges them with \
                 'vhost-user-net doctor'",
                self.host.interface.name()
            );
        }
        for (reason, count) in [(DropReason::TooLong, too_long), (DropReason::NoRoom, lost)] {
            if count > 0 {
                done.rx_dropped.push((reason, count));
            }
        }
    }

    /// Returns true if frames may be lost without an event: denied by the filter, or too long since lower
    /// devices merge them.
    fn counts_dropped(&self) -> bool {
        let State::Open(open) = &self.state else { return false };
        self.receives && (self.host.interface.has_filter() || open.generic)
    }
}

/// Completes chains that the kernel has finished with. Delivers at most `most` frames to the guest.
fn reap<'mem>(
    receiver: &mut Receiver,
    transmitter: &mut Transmitter,
    queues: &mut Virtqueues<'mem>,
    open: &mut OpenSocket,
    most: usize,
    done: &mut Completions,
) {
    if let Some(tx) = &mut queues.tx {
        transmitter.reap(tx, open, done);
    }
    if let Some(rx) = &mut queues.rx {
        receiver.reap(rx, open, most, done);
    }
}
