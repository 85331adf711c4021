//! A session's socket: opened when the guest first has something for it, opened again after a fault, and
//! closed at the end.
//!
//! Invariant: no buffer goes back unfinished before its socket is closed, for the kernel may write to it
//! until then.

use std::fmt;
use std::time::{Duration, Instant};

use log::{info, warn};

use super::{Closed, State, XdpPort, reap};
use crate::counters::DropReason;
use crate::guest::Virtqueue;
use crate::port::af_xdp::interface::Failure;
use crate::port::af_xdp::{BUSY_LIMIT, BUSY_RETRY};
use crate::port::{Completions, Virtqueues};
use crate::sys::xsk::Statistics;

/// How long a device that does not work is left alone, unless it is heard of.
const RETRY: Duration = Duration::from_secs(1);
/// How long frames that were handed over are waited for when a session ends.
const LAST_FRAMES: Duration = Duration::from_millis(20);

impl<'mem> XdpPort<'mem> {
    /// Opens the socket, if it is not open and it is time to try.
    #[inline]
    pub(super) fn ensure_open(&mut self, queues: &Virtqueues<'mem>) {
        if let State::Closed { .. } = self.state {
            self.open(queues);
        }
    }

    // By itself: it is left out where instructions are counted (`cargo bench -- instructions`).
    #[inline(never)]
    pub(super) fn open(&mut self, queues: &Virtqueues<'mem>) {
        let State::Closed { since, retry } = self.state else { return };
        let now = Instant::now();
        if now < retry {
            return;
        }
        let interface = &self.host.interface;
        let pair = self.host.pair;
        let header_length = self.receiver.header_length;
        let mut receiver = self.receives.then_some(&mut self.receiver);
        let opened = interface.open(
            pair,
            self.memory,
            self.mtu,
            header_length,
            self.receives,
            |socket, umem| {
                if let Some(receiver) = &mut receiver {
                    receiver.post_before_bind(socket, umem);
                }
            },
        );
        if opened.is_err() {
            self.reclaim(queues);
        }
        match opened {
            Ok(socket) => {
                if std::mem::take(&mut self.host.reported) {
                    info!("af_xdp {}: works again", self.host.interface.name());
                }
                self.filtered.counted = self.host.interface.filtered(pair);
                self.statistics = Statistics::default();
                // Kept first: whatever happens from here on, the socket is closed at the end.
                self.state = State::Open(Box::new(socket));
                if let State::Open(socket) = &mut self.state {
                    self.transmitter.begin(socket);
                    if let Some(rx) = &queues.rx {
                        self.receiver.post(rx, socket);
                    }
                }
            }
            Err(Failure::Busy(error)) => {
                let since = since.unwrap_or(Closed { at: now, gone: false });
                self.state = State::Closed { since: Some(since), retry: now + BUSY_RETRY };
                if now - since.at > BUSY_LIMIT {
                    self.gone(&error);
                }
            }
            Err(Failure::Gone(error)) => self.gone(&error),
        }
    }

    /// Has the receiver begin again with all buffers; returns how many frames were in some of them.
    fn reclaim(&mut self, queues: &Virtqueues<'mem>) -> u64 {
        self.receiver.reclaim(queues.rx.as_ref().map_or(0, Virtqueue::next_used))
    }

    /// Notes that the device does not work: frames are dropped, and it is tried again later.
    fn gone(&mut self, why: &dyn fmt::Display) {
        if !std::mem::replace(&mut self.host.reported, true) {
            let name = self.host.interface.name();
            warn!("af_xdp {name}: does not work, frames are dropped: {why}");
        }
        let now = Instant::now();
        let since = Some(Closed { at: now, gone: true });
        self.state = State::Closed { since, retry: now + RETRY };
    }

    pub(super) fn is_gone(&self) -> bool {
        matches!(self.state, State::Closed { since: Some(Closed { gone: true, .. }), .. })
    }

    /// Closes the socket: what was sent is finished, what was posted is ours again.
    pub(super) fn close(&mut self, queues: &mut Virtqueues<'mem>, done: &mut Completions) {
        let State::Open(open) = &mut self.state else { return };
        let pair = self.host.pair;
        self.host.interface.stop_receiving(pair);
        // What the kernel has not sent at once is under way, or never will be.
        let deadline = Instant::now() + LAST_FRAMES;
        loop {
            reap(&mut self.receiver, &mut self.transmitter, queues, open, usize::MAX, done);
            if !self.transmitter.is_waiting(open) || Instant::now() > deadline {
                break;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        if let Some(tx) = &mut queues.tx {
            self.transmitter.stop(tx, open, done);
        }
        self.count_filtered(done);
        let closed = State::Closed { since: None, retry: Instant::now() };
        let State::Open(open) = std::mem::replace(&mut self.state, closed) else { return };
        let statistics = self.host.interface.close(pair, *open);
        self.count_lost(statistics, done);
        // Not before here: the kernel writes no more.
        let lost = self.reclaim(queues);
        if lost > 0 {
            done.rx_dropped.push((DropReason::NoRoom, lost));
        }
    }

    /// Something is wrong with the socket, of which a new one may be free.
    pub(super) fn open_anew(
        &mut self,
        why: &'static str,
        queues: &mut Virtqueues<'mem>,
        done: &mut Completions,
    ) {
        if self.opened_anew.is_some_and(|at| at.elapsed() < RETRY) {
            self.fail(&why, queues, done);
            return;
        }
        self.opened_anew = Some(Instant::now());
        self.reopen(why, queues, done);
    }

    /// Closes the socket, and opens another.
    pub(super) fn reopen(
        &mut self,
        why: &'static str,
        queues: &mut Virtqueues<'mem>,
        done: &mut Completions,
    ) {
        warn!("af_xdp {}: opens its socket anew: {why}", self.host.interface.name());
        self.close_and_drop(queues, done);
        self.open(queues);
    }

    /// The device was found not to work any more.
    pub(super) fn fail(
        &mut self,
        why: &dyn fmt::Display,
        queues: &mut Virtqueues<'mem>,
        done: &mut Completions,
    ) {
        self.close_and_drop(queues, done);
        self.gone(why);
    }

    /// Closes the socket, and drops the frames that were not sent.
    fn close_and_drop(&mut self, queues: &mut Virtqueues<'mem>, done: &mut Completions) {
        self.close(queues, done);
        if let Some(tx) = &mut queues.tx {
            self.transmitter.drop_all(tx, None, done);
        }
    }
}

impl std::ops::Drop for XdpPort<'_> {
    /// Closes the socket of a session that panicked: else the kernel would write to the guest's memory
    /// after the session's end. Every other session has closed it in `stop`.
    fn drop(&mut self) {
        let closed = State::Closed { since: None, retry: Instant::now() };
        if let State::Open(open) = std::mem::replace(&mut self.state, closed) {
            self.host.interface.stop_receiving(self.host.pair);
            self.host.interface.close(self.host.pair, *open);
        }
    }
}
