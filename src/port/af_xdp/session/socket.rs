//! A session's socket. It opens when the guest first has frames or buffers, reopens after a fault, and closes
//! at the session's end.
//!
//! Invariant: no unfinished buffer is reused before its socket is closed, since the kernel may write to it
//! until then.

use std::fmt;
use std::time::{Duration, Instant};

use log::{info, warn};

use super::{Closed, State, XdpPort, reap};
use crate::counters::DropReason;
use crate::port::af_xdp::interface::Failure;
use crate::port::af_xdp::{BUSY_LIMIT, BUSY_RETRY};
use crate::port::{Completions, Virtqueues};
use crate::sys::xsk::Statistics;

/// Interval between attempts to open a socket on a device that does not work. A change of the device triggers
/// an attempt at once.
const RETRY: Duration = Duration::from_secs(1);
/// Longest wait, at a session's end, for frames that the device is still sending.
const LAST_FRAMES: Duration = Duration::from_millis(20);

impl<'mem> XdpPort<'mem> {
    /// Opens the socket, unless it is open or the next attempt is not due.
    #[inline]
    pub(super) fn ensure_open(&mut self, queues: &Virtqueues<'mem>) {
        if let State::Closed { .. } = self.state {
            self.open(queues);
        }
    }

    /// Opens the socket if the next attempt is due.
    // Not inlined: the instruction count of `cargo bench -- instructions` excludes it.
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
                // Stored first, so that `stop` or `drop` closes the socket even after a panic below.
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

    /// Makes the receiver forget all posted buffers, to post them again. Returns the number of frames that
    /// had arrived in some of them, which are lost.
    fn reclaim(&mut self, queues: &Virtqueues<'mem>) -> u64 {
        self.receiver.reclaim(queues.rx_next_used())
    }

    /// Records that the device does not work: the port drops frames until an attempt to open a socket
    /// succeeds.
    fn gone(&mut self, why: &dyn fmt::Display) {
        if !std::mem::replace(&mut self.host.reported, true) {
            let name = self.host.interface.name();
            warn!("af_xdp {name}: does not work, frames are dropped: {why}");
        }
        let now = Instant::now();
        let since = Some(Closed { at: now, gone: true });
        self.state = State::Closed { since, retry: now + RETRY };
    }

    /// Returns true while the device does not work.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self.state, State::Closed { since: Some(Closed { gone: true, .. }), .. })
    }

    /// Closes the socket. Waits at most [`LAST_FRAMES`] for frames in transmission, and completes their
    /// chains. Unsent chains and posted buffers stay in flight, without the kernel.
    pub(super) fn close(&mut self, queues: &mut Virtqueues<'mem>, done: &mut Completions) {
        let State::Open(open) = &mut self.state else { return };
        let pair = self.host.pair;
        self.host.interface.stop_receiving(pair);
        // Frames that the kernel has not sent by now are in the device, or will never be sent.
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
        // Only now: the kernel no longer writes to the buffers.
        let lost = self.reclaim(queues);
        if lost > 0 {
            done.rx_dropped.push((DropReason::NoRoom, lost));
        }
    }

    /// Opens a new socket, since the old one returned a wrong buffer or keeps one. A second fault within
    /// [`RETRY`] counts as a device that does not work.
    pub(super) fn reopen_after_fault(
        &mut self,
        why: &'static str,
        queues: &mut Virtqueues<'mem>,
        done: &mut Completions,
    ) {
        if self.reopened_at.is_some_and(|at| at.elapsed() < RETRY) {
            self.fail(&why, queues, done);
            return;
        }
        self.reopened_at = Some(Instant::now());
        self.reopen(why, queues, done);
    }

    /// Closes the socket, and opens a new one.
    pub(super) fn reopen(
        &mut self,
        why: &'static str,
        queues: &mut Virtqueues<'mem>,
        done: &mut Completions,
    ) {
        warn!("af_xdp {}: reopening the socket: {why}", self.host.interface.name());
        self.close_and_drop(queues, done);
        self.open(queues);
    }

    /// Closes the socket of a device that works no more.
    pub(super) fn fail(
        &mut self,
        why: &dyn fmt::Display,
        queues: &mut Virtqueues<'mem>,
        done: &mut Completions,
    ) {
        self.close_and_drop(queues, done);
        self.gone(why);
    }

    /// Closes the socket, and drops the frames that the kernel has not sent.
    fn close_and_drop(&mut self, queues: &mut Virtqueues<'mem>, done: &mut Completions) {
        self.close(queues, done);
        if let Some(tx) = &mut queues.tx {
            self.transmitter.drop_all(tx, None, done);
        }
    }
}

impl std::ops::Drop for XdpPort<'_> {
    /// Closes the socket of a session that panicked: else the kernel would write to guest memory after the
    /// session's end. Every other session has closed its socket in `stop`.
    fn drop(&mut self) {
        let closed = State::Closed { since: None, retry: Instant::now() };
        if let State::Open(open) = std::mem::replace(&mut self.state, closed) {
            self.host.interface.stop_receiving(self.host.pair);
            self.host.interface.close(self.host.pair, *open);
        }
    }
}
