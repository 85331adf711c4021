//! One direction of a running session: its ring and counters. The session keeps the virtqueue apart, for the port.
//!
//! Invariant: a ring starts at the used index in guest memory, whatever base the frontend sent.

use log::info;

use super::{Ring, RingState, Session};
use crate::counters::DirectionCounters;
use crate::guest::{Direction, Fault, Published, Virtqueue};

/// One direction of a queue pair, without its virtqueue.
pub(super) struct ActiveRing<'s> {
    pub(super) ring: &'s Ring,
    pub(super) counters: &'s DirectionCounters,
    /// True if the ring's frames move: the ring is enabled, and the link is up.
    pub(super) is_enabled: bool,
}

impl<'s> ActiveRing<'s> {
    /// Starts one of the session's rings; `index` is its vhost-user index. Returns `None`s without `ring`.
    ///
    /// # Errors
    /// A [`Fault`] if the ring's layout is not allowed, or indices in guest memory contradict each other.
    pub(super) fn start<D: Direction>(
        name: &str,
        session: &'s Session,
        index: u16,
        ring: &'s Option<Ring>,
        counters: &'s DirectionCounters,
    ) -> Result<(Option<Self>, Option<Virtqueue<'s, D>>), Fault> {
        let Some(ring) = ring else { return Ok((None, None)) };
        let notification = session.negotiated.notification();
        let mut queue = Virtqueue::start(&session.memory, ring.layout, notification)?;
        queue.record_inflight(index);
        let used = queue.next_used();
        if used != ring.base {
            // cloud-hypervisor sends the available index, which would skip chains in flight.
            info!(
                "{name}: ring base differs from the used index base={} used_index={used}; resuming at \
                 the used index",
                ring.base
            );
        }
        let is_enabled = ring.state == RingState::Enabled && session.link;
        Ok((Some(ActiveRing { ring, counters, is_enabled }), Some(queue)))
    }

    /// Publishes completed chains to the driver, and calls it if it asked for a notification.
    pub(super) fn publish<D: Direction>(&self, queue: &mut Virtqueue<'_, D>) {
        match queue.publish() {
            Published::Nothing => {}
            Published::Call if self.ring.call.signal() => self.counters.calls.add(1),
            Published::Call | Published::Suppressed => self.counters.calls_suppressed.add(1),
        }
    }
}
