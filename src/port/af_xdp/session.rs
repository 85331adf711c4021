//! A session on a queue: what its worker has the device do, while there is a socket and while there is
//! none.
//!
//! Invariant: frames that the kernel or the program drops are counted, by what they have counted themselves
//! since the last time. While the device does not work, frames from the guest are dropped; while the queue is
//! busy with its last socket, they wait.

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
use crate::guest::{GuestMemory, Virtqueue};
use crate::port::{Completions, Mode, Port, Readiness, SessionConfig, Virtqueues};
use crate::sys::xsk::Statistics;

/// How soon to look whether the kernel has finished with frames that it was given.
const COMPLETION: Duration = Duration::from_millis(1);
/// How often frames that the program has dropped are counted.
const FILTERED: Duration = Duration::from_secs(1);

/// A session on a queue.
#[derive(Debug)]
pub struct XdpPort<'mem> {
    host: &'mem mut XdpQueue,
    memory: &'mem Arc<GuestMemory>,
    /// The card's MTU.
    mtu: u16,
    /// Whether the guest has an rx ring.
    receives: bool,
    state: State,
    /// Frames from the guest were left behind.
    left_behind: bool,
    /// The device was heard to work no more.
    failed: Option<OpenError>,
    /// The device has changed so that the socket is to be opened again.
    changed: Option<&'static str>,
    /// When the socket was opened anew for a fault.
    opened_anew: Option<Instant>,
    filtered: Filtered,
    /// What the kernel has counted for the socket, when that was looked up last.
    statistics: Statistics,
    transmitter: Transmitter,
    receiver: Receiver,
}

/// Whether a session has a socket.
#[derive(Debug)]
enum State {
    Open(Box<OpenSocket>),
    Closed {
        /// Since when there has been none though there should be.
        since: Option<Closed>,
        /// When to try again.
        retry: Instant,
    },
}

#[derive(Debug, Clone, Copy)]
struct Closed {
    at: Instant,
    /// The device does not work, and it was said so: frames are dropped.
    gone: bool,
}

/// Frames that the program has dropped for the filter.
#[derive(Debug)]
struct Filtered {
    /// How many, when that was looked up last.
    counted: Option<u64>,
    at: Instant,
}

impl XdpQueue {
    /// Begins a session. Nothing is opened yet.
    pub fn session<'mem>(
        &'mem mut self,
        memory: &'mem Arc<GuestMemory>,
        queues: &Virtqueues<'mem>,
        config: &SessionConfig,
    ) -> XdpPort<'mem> {
        let first_tx = queues.tx.as_ref().map_or(0, Virtqueue::next_used);
        let first_rx = queues.rx.as_ref().map_or(0, Virtqueue::next_used);
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
            opened_anew: None,
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
            // The queue is busy with its last socket: it takes some 30 ms.
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
                // Its errors are those of sending.
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
                self.open_anew(fault, queues, done);
            }
        } else if queues.buffers() > 0 || self.is_gone() {
            self.open(queues);
        }
        if self.counts_dropped() && self.filtered.at.elapsed() >= FILTERED {
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
                    Some(COMPLETION)
                } else if self.left_behind {
                    // It was opened for the guest's buffers, after that.
                    Some(Duration::ZERO)
                } else {
                    self.receiver.patience()
                };
                let count = self
                    .counts_dropped()
                    .then(|| FILTERED.saturating_sub(self.filtered.at.elapsed()));
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
            self.host.interface.look_for_tags_again(changed.as_ref());
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
    /// Counts the frames that the program has dropped since the last time.
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

    /// Counts frames that the kernel has dropped since the last time, by what it has counted by now.
    fn count_lost(&mut self, now: Statistics, done: &mut Completions) {
        let before = std::mem::replace(&mut self.statistics, now);
        let too_long = now.too_long().saturating_sub(before.too_long());
        let lost = now.lost().saturating_sub(before.lost()).saturating_sub(too_long);
        if too_long > 0 && before.too_long() == 0 {
            warn!(
                "af_xdp {}: frames longer than its MTU are lost; find out by 'vhost-user-net doctor' \
                 who joins them",
                self.host.interface.name()
            );
        }
        for (reason, count) in [(DropReason::TooLong, too_long), (DropReason::NoRoom, lost)] {
            if count > 0 {
                done.rx_dropped.push((reason, count));
            }
        }
    }

    /// Whether frames may be being dropped of which nobody hears otherwise: for the filter, or since
    /// devices below this one join them.
    fn counts_dropped(&self) -> bool {
        let State::Open(open) = &self.state else { return false };
        self.receives && (self.host.interface.filters() || open.generic)
    }
}

/// Completes what the kernel has finished with, up to `most` frames for the guest.
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
