//! When a TAP is read: frames may be there, and the guest's buffers can take the largest of them.
//!
//! A frame that is read into too few buffers is lost, and a TAP does not tell the next frame's length. So frames
//! wait for buffers, for [`SHORTAGE_TIMEOUT`] only, since the guest may have no more.

use std::time::{Duration, Instant};

/// Longest wait of frames for the buffers that the largest of them could need.
const SHORTAGE_TIMEOUT: Duration = Duration::from_millis(10);

/// Whether the buffers in flight can take the largest frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// There are no buffers.
    None,
    /// There are too few.
    Short,
    /// There are enough.
    Enough,
}

/// Too few buffers for a frame that waits.
#[derive(Debug, Clone, Copy)]
enum Shortage {
    /// No frame waits for buffers.
    None,
    /// Frames wait for more buffers.
    Since(Instant),
    /// The wait timed out: frames are read into the buffers that there are.
    TimedOut,
}

/// Decides whether to read.
#[derive(Debug)]
pub(super) struct ReadGate {
    /// Whether frames may have come since the device was last found empty. Without buffers nobody looks, so it
    /// stays.
    may_have_frames: bool,
    shortage: Shortage,
    tx_bursts: usize,
}

impl ReadGate {
    /// For a session; `receives` says that its guest has an rx ring.
    pub(super) fn new(receives: bool) -> Self {
        ReadGate { may_have_frames: receives, shortage: Shortage::None, tx_bursts: 0 }
    }

    /// Notes a burst of frames from the guest. A worker that goes from burst to burst does not sleep, and so is
    /// not told of frames. After one burst it most often sleeps, and a read would find nothing.
    pub(super) fn note_tx_burst(&mut self) {
        self.may_have_frames |= self.tx_bursts > 0;
        self.tx_bursts += 1;
    }

    /// Notes that the worker slept. A device is reported as `readable` once, so what could not be read then is
    /// still there.
    pub(super) fn note_wake_up(&mut self, readable: bool) {
        self.tx_bursts = 0;
        self.may_have_frames |= readable;
    }

    /// Notes that the device has no frames.
    pub(super) fn note_empty(&mut self) {
        self.may_have_frames = false;
    }

    /// Notes new buffers, with which there is such `room`.
    pub(super) fn note_buffers(&mut self, room: Room) {
        match self.shortage {
            Shortage::Since(_) if room == Room::Short => {}
            _ => self.shortage = Shortage::None,
        }
    }

    /// Whether a frame may wait in the device.
    pub(super) fn may_have_frames(&self) -> bool {
        self.may_have_frames
    }

    /// Whether frames have waited long enough for more buffers; starts the time-out if none runs.
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

    /// Whether to wait for the device: not while frames are known to wait for buffers.
    pub(super) fn waits_for_frames(&self, room: Room) -> bool {
        let waits_for_buffers = room == Room::Short
            && self.may_have_frames
            && !matches!(self.shortage, Shortage::TimedOut);
        room != Room::None && !waits_for_buffers
    }

    /// Time until frames that wait for buffers are read without them.
    pub(super) fn timeout(&self, room: Room) -> Option<Duration> {
        match self.shortage {
            Shortage::Since(since) if room == Room::Short => {
                Some(SHORTAGE_TIMEOUT.saturating_sub(since.elapsed()))
            }
            _ => None,
        }
    }
}
