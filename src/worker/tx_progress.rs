//! How far frames from the guest are: popped, then admitted by the rate limit, then taken by the port.
//!
//! Invariant: frames are admitted in the order of the ring, each once. Segments that were charged before the
//! header was checked are noted, so that they are not charged again.

use crate::frame::LINK_OVERHEAD;
use crate::guest::{Readable, Virtqueue};
use crate::policy::Limiter;

/// How far the frames from the guest are, of those that were popped.
pub(super) struct TxProgress {
    /// The port has taken all that it was given.
    pub(super) has_taken: bool,
    /// Up to this position the port's rate limit has let them pass.
    pub(super) admitted: u16,
    /// Segments, beyond the first of each frame, charged to the rate limit before headers are checked.
    pub(super) precharged_segments: u64,
}

impl TxProgress {
    /// Whether the port has taken all that was popped.
    pub(super) fn is_done(&self, queue: &Virtqueue<'_, Readable>) -> bool {
        self.has_taken && self.admitted == queue.next_avail()
    }

    /// Lets frames pass, as many of those that were popped as the rate limit does; says whether it holds
    /// back any behind others.
    pub(super) fn admit(
        &mut self,
        queue: &Virtqueue<'_, Readable>,
        limiter: &Limiter,
        header_length: usize,
        mtu: usize,
    ) -> bool {
        let popped = queue.next_avail();
        if !limiter.is_limited() || self.admitted == popped {
            self.admitted = popped;
            return false;
        }
        // Segments have the MTU, as a rule. How many there are is known when the header was checked.
        let packets = |bytes: usize| {
            if bytes <= mtu + LINK_OVERHEAD { 1 } else { bytes.div_ceil(mtu) as u64 }
        };
        let first = self.admitted;
        let lengths = (0..popped.wrapping_sub(first)).map(|index| {
            queue.chain(first.wrapping_add(index)).len().saturating_sub(header_length)
        });
        let admitted = limiter.admit(lengths.clone().map(|bytes| (packets(bytes), bytes as u64)));
        self.precharged_segments +=
            lengths.take(admitted).map(|bytes| packets(bytes) - 1).sum::<u64>();
        self.admitted = first.wrapping_add(admitted as u16);
        admitted > 0 && self.admitted != popped
    }
}
