//! The decision to read a TAP: frames may have arrived, and the rx buffers can take the largest frame.
//!
//! A frame that is read into too few buffers is lost, and a TAP does not report the next frame's length. So frames
//! wait for buffers, for at most [`SHORTAGE_TIMEOUT`], since the guest may have no more buffers.

use std::time::{Duration, Instant};

/// Longest wait of frames for the buffers that the largest of them could need.
const SHORTAGE_TIMEOUT: Duration = Duration::from_millis(10);

/// The size of the rx buffers in flight, compared with the largest frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// No buffers are in flight.
    None,
    /// The buffers are too small for the largest frame.
    Short,
    /// The buffers can take the largest frame.
    Enough,
}

/// A shortage of rx buffers while a frame waits.
#[derive(Debug, Clone, Copy)]
enum Shortage {
    /// No frame is known to wait for buffers.
    None,
    /// Frames have waited for more buffers since then.
    Since(Instant),
    /// The wait timed out: frames are read into the buffers in flight.
    TimedOut,
}

/// The state behind the decision to read.
#[derive(Debug)]
pub(super) struct ReadGate {
    /// True if frames may have arrived since the device was last found empty.
    may_have_frames: bool,
    shortage: Shortage,
    /// True if frames from the guest were sent since the worker's last sleep.
    has_sent: bool,
}

impl ReadGate {
    /// Creates the gate of a session; `receives` is true if the guest has an rx ring.
    pub(super) fn new(receives: bool) -> Self {
        ReadGate { may_have_frames: receives, shortage: Shortage::None, has_sent: false }
    }

    /// Notes a burst of frames from the guest. A worker does not sleep between bursts, so epoll reports no frames
    /// to it: from the second burst on, it reads without a report. After a single burst a read would mostly find
    /// nothing.
    pub(super) fn note_tx_burst(&mut self) {
        self.may_have_frames |= self.has_sent;
        self.has_sent = true;
    }

    /// Notes that the worker slept. epoll reports the device as `readable` once only (edge-triggered), so frames
    /// that were not read then still wait.
    pub(super) fn note_wake_up(&mut self, readable: bool) {
        self.has_sent = false;
        self.may_have_frames |= readable;
    }

    /// Notes that the device is empty.
    pub(super) fn note_empty(&mut self) {
        self.may_have_frames = false;
    }

    /// Notes new rx buffers, with which the buffers in flight amount to `room`.
    pub(super) fn note_buffers(&mut self, room: Room) {
        match self.shortage {
            Shortage::Since(_) if room == Room::Short => {}
            _ => self.shortage = Shortage::None,
        }
    }

    /// Returns true if frames may wait in the device.
    pub(super) fn may_have_frames(&self) -> bool {
        self.may_have_frames
    }

    /// Returns true if the wait for more buffers has timed out. The first call starts the timeout.
    pub(super) fn has_timed_out(&mut self) -> bool {
        match self.shortage {
            Shortage::None => self.shortage = Shortage::Since(Instant::now()),
            Shortage::Since(since) if since.elapsed() >= SHORTAGE_TIMEOUT => {
                self.shortage = Shortage::TimedOut;
            }
            Shortage::Since(_) | Shortage::TimedOut => {}
        }
        matches!(self.shortage, Shortage::TimedOut)
    }

    /// Returns true if new frames must wake the worker: there are buffers, and no frames wait for more.
    pub(super) fn waits_for_frames(&self, room: Room) -> bool {
        let waits_for_buffers = room == Room::Short
            && self.may_have_frames
            && !matches!(self.shortage, Shortage::TimedOut);
        room != Room::None && !waits_for_buffers
    }

    /// Returns the time until the wait for more buffers times out.
    pub(super) fn timeout(&self, room: Room) -> Option<Duration> {
        match self.shortage {
            Shortage::Since(since) if room == Room::Short => {
                Some(SHORTAGE_TIMEOUT.saturating_sub(since.elapsed()))
            }
            _ => None,
        }
    }
}
