//! Rate limits of a session: the frames that each turn admits, and the time that the others wait.
//!
//! Invariant: the limit admits frames from the guest in the order of the ring, and charges each segment once. At
//! admission, before header validation, a frame is charged for the segments that its length suggests. Further
//! segments are charged when the port has sent the frame.

use std::time::Duration;

use crate::counters::PairCounters;
use crate::frame::LINK_OVERHEAD;
use crate::guest::{Readable, Virtqueue};
use crate::policy::Limits;
use crate::port::Completions;

/// Longest sleep until the limit is read again: an operator may change it meanwhile.
const LONGEST_WAIT: Duration = Duration::from_millis(100);

/// Both limits of a session.
pub(super) struct RateLimit<'s> {
    limits: &'s Limits,
    header_length: usize,
    mtu: usize,
    /// Position in the tx ring before which all frames are admitted.
    admitted: u16,
    /// Segments charged before header validation, beyond the first of each frame.
    precharged_segments: u64,
    /// Frames to the guest that the limit admits in this turn.
    rx_allowance: usize,
}

impl<'s> RateLimit<'s> {
    /// Creates the limits of a session that begins at position `next_used` of the tx ring. `header_length` and `mtu`
    /// are in bytes.
    pub(super) fn new(limits: &'s Limits, header_length: usize, mtu: u16, next_used: u16) -> Self {
        RateLimit {
            limits,
            header_length,
            mtu: mtu.into(),
            admitted: next_used,
            precharged_segments: 0,
            rx_allowance: usize::MAX,
        }
    }

    /// Returns the position in the tx ring before which all frames are admitted.
    pub(super) fn admitted(&self) -> u16 {
        self.admitted
    }

    /// Returns true if popped frames from the guest wait for the limit.
    pub(super) fn holds_back(&self, tx: &Virtqueue<'_, Readable>) -> bool {
        self.admitted != tx.next_avail()
    }

    /// Admits all popped frames from the guest without a charge: no limit is set, or the frames are dropped.
    pub(super) fn admit_all(&mut self, tx: &Virtqueue<'_, Readable>) {
        self.admitted = tx.next_avail();
    }

    /// Admits as many popped frames from the guest as the limit permits, and charges them.
    pub(super) fn admit(&mut self, tx: &Virtqueue<'_, Readable>, counters: &PairCounters) {
        if !self.limits.tx.is_limited() {
            return self.admit_all(tx);
        }
        if !self.holds_back(tx) {
            return;
        }
        let (mtu, header_length) = (self.mtu, self.header_length);
        let packets = |bytes: usize| {
            if bytes <= mtu + LINK_OVERHEAD { 1 } else { bytes.div_ceil(mtu) as u64 }
        };
        let first = self.admitted;
        let lengths = (0..tx.next_avail().wrapping_sub(first))
            .map(|index| tx.chain(first.wrapping_add(index)).len().saturating_sub(header_length));
        let frames = lengths.clone().map(|bytes| (packets(bytes), bytes as u64));
        let admitted = self.limits.tx.admit(frames);
        self.precharged_segments +=
            lengths.take(admitted).map(|bytes| packets(bytes) - 1).sum::<u64>();
        self.admitted = first.wrapping_add(admitted as u16);
        if admitted > 0 && self.holds_back(tx) {
            counters.tx.limited.add(1);
        }
    }

    /// Returns the number of frames to the guest that the limit admits in this turn.
    pub(super) fn rx_allowance(&mut self, counters: &PairCounters) -> usize {
        let limiter = &self.limits.rx;
        let allowance = if limiter.is_limited() { limiter.allowance() } else { usize::MAX };
        if allowance == 0 && self.rx_allowance > 0 {
            counters.rx.limited.add(1);
        }
        self.rx_allowance = allowance;
        allowance
    }

    /// Returns true if frames to the guest must stay with the host in this turn.
    pub(super) fn blocks_rx(&self) -> bool {
        self.rx_allowance == 0
    }

    /// Charges frames to the guest, and segments of frames from the guest that were not charged at admission.
    /// `all_sent` is true if no popped frame waits for the limit or for the port.
    pub(super) fn charge(&mut self, done: &Completions, all_sent: bool) {
        let Completions { rx, tx, .. } = done;
        if self.limits.rx.is_limited() && rx.frames > 0 {
            self.limits.rx.charge(rx.frames + rx.overhead.packets, rx.bytes + rx.overhead.bytes);
        }
        if !self.limits.tx.is_limited() {
            return;
        }
        let precharged = self.precharged_segments.min(tx.overhead.packets);
        if tx.overhead.packets > 0 {
            self.limits.tx.charge(tx.overhead.packets - precharged, tx.overhead.bytes);
        }
        // A rest when all frames were sent belongs to frames that were dropped.
        self.precharged_segments = if all_sent { 0 } else { self.precharged_segments - precharged };
    }

    /// Returns the time until a limit admits waiting frames, at most 100 ms. Returns `None` if none wait.
    pub(super) fn wait(&self, tx: Option<&Virtqueue<'_, Readable>>) -> Option<Duration> {
        let Limits { rx: rx_limiter, tx: tx_limiter } = self.limits;
        let holds_back = tx.is_some_and(|tx| self.holds_back(tx)) && tx_limiter.is_limited();
        let tx = holds_back.then(|| tx_limiter.wait());
        let rx = self.blocks_rx().then(|| rx_limiter.wait());
        tx.into_iter().chain(rx).min().map(|wait| wait.min(LONGEST_WAIT))
    }
}
