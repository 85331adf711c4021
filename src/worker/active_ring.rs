//! One direction of a running session: its ring and its counters. The virtqueue is beside it, for the port.
//!
//! Invariant: a ring starts at the used index in guest memory, whatever base the frontend sent.

use log::info;

use super::{Ring, RingState, Session};
use crate::counters::DirectionCounters;
use crate::guest::{Direction, Fault, Published, Virtqueue};

/// One direction of the pair, beside its virtqueue.
pub(super) struct ActiveRing<'s> {
    pub(super) ring: &'s Ring,
    pub(super) counters: &'s DirectionCounters,
    /// Whether its frames move: the ring is enabled, and the link is up.
    pub(super) is_enabled: bool,
}

impl<'s> ActiveRing<'s> {
    /// Starts a ring of the session, if it has it.
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
        queue.note_inflight(index);
        let used = queue.next_used();
        if used != ring.base {
            // cloud-hypervisor counts by the avail index, which would skip chains in flight.
            info!(
                "{name}: ring base {} differs from the used index, resuming at {used}",
                ring.base
            );
        }
        let is_enabled = ring.state == RingState::Enabled && session.link;
        Ok((Some(ActiveRing { ring, counters, is_enabled }), Some(queue)))
    }

    /// Shows the driver what has completed, and calls it if it asked for that.
    pub(super) fn publish<D: Direction>(&self, queue: &mut Virtqueue<'_, D>) {
        match queue.publish() {
            Published::Nothing => {}
            Published::Call if self.ring.call.signal() => self.counters.calls.add(1),
            Published::Call | Published::Suppressed => self.counters.calls_suppressed.add(1),
        }
    }
}
