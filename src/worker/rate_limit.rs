//! A session's rate limits: how many frames may pass in each turn, and how long the others wait.
//!
//! Invariant: frames from the guest pass in the order of the ring, and each is charged once. Before headers are
//! validated a frame is charged for the segments that its length suggests; what it has beyond these is charged
//! when it was sent.

use std::time::Duration;

use crate::counters::PairCounters;
use crate::frame::LINK_OVERHEAD;
use crate::guest::{Readable, Virtqueue};
use crate::policy::Limits;
use crate::port::Completions;

/// Longest wait for a limit, which an operator may change meanwhile.
const LONGEST_WAIT: Duration = Duration::from_millis(100);

/// Both limits of a session.
pub(super) struct RateLimit<'s> {
    limits: &'s Limits,
    header_length: usize,
    mtu: usize,
    /// Position in the tx ring up to which frames may pass.
    admitted: u16,
    /// Segments charged before header validation, beyond the first of each frame.
    precharged_segments: u64,
    /// Frames to the guest that may pass in this turn.
    rx_allowance: usize,
}

impl<'s> RateLimit<'s> {
    /// For a session that begins at position `next_used` of the tx ring; `mtu` is in bytes.
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

    /// Position in the tx ring up to which frames may pass.
    pub(super) fn admitted(&self) -> u16 {
        self.admitted
    }

    /// Whether popped frames from the guest wait.
    pub(super) fn holds_back(&self, tx: &Virtqueue<'_, Readable>) -> bool {
        self.admitted != tx.next_avail()
    }

    /// Lets all popped frames from the guest pass without a charge: they are dropped.
    pub(super) fn admit_all(&mut self, tx: &Virtqueue<'_, Readable>) {
        self.admitted = tx.next_avail();
    }

    /// Lets as many popped frames from the guest pass as the limit does, and charges them.
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

    /// Frames to the guest that may pass in this turn.
    pub(super) fn rx_allowance(&mut self, counters: &PairCounters) -> usize {
        let limiter = &self.limits.rx;
        let allowance = if limiter.is_limited() { limiter.allowance() } else { usize::MAX };
        if allowance == 0 && self.rx_allowance > 0 {
            counters.rx.limited.add(1);
        }
        self.rx_allowance = allowance;
        allowance
    }

    /// Whether frames to the guest are to be left with the host.
    pub(super) fn blocks_rx(&self) -> bool {
        self.rx_allowance == 0
    }

    /// Charges what is known of frames only after they have moved: those to the guest, and the segments of those
    /// from it. `all_sent` says that the port has no frame left that was admitted.
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
        // What is left when all were sent was charged for frames that were dropped.
        self.precharged_segments = if all_sent { 0 } else { self.precharged_segments - precharged };
    }

    /// Time until a limit lets frames pass that wait now.
    pub(super) fn wait(&self, tx: Option<&Virtqueue<'_, Readable>>) -> Option<Duration> {
        let Limits { rx: rx_limiter, tx: tx_limiter } = self.limits;
        let holds_back = tx.is_some_and(|tx| self.holds_back(tx)) && tx_limiter.is_limited();
        let tx = holds_back.then(|| tx_limiter.wait());
        let rx = self.blocks_rx().then(|| rx_limiter.wait());
        tx.into_iter().chain(rx).min().map(|wait| wait.min(LONGEST_WAIT))
    }
}
