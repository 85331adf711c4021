//! Notifications and their suppression (virtio 1.3, sections 2.7.7 and 2.7.10): calls for used chains, kicks
//! for available ones.
//!
//! Invariant: each side stores its own index or event, then reads the other's, with a fence in between (see
//! [`notify`](crate::guest::notify)). So no wake-up is lost, whichever side sleeps.

use std::sync::atomic::Ordering;

use super::Virtqueue;
use crate::guest::chain::Direction;
use crate::guest::fault::Fault;
use crate::guest::notify::{Shared, publish_index, request_notify};

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// Outcome of [`Virtqueue::publish`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// No chain had completed; the used index is unchanged.
    Nothing,
    /// The used index moved; the driver suppresses the call.
    Suppressed,
    /// The used index moved; the driver must be called.
    Call,
}

impl<D: Direction> Virtqueue<'_, D> {
    /// Publishes the completed chains with one store of the used index; returns the notification due.
    pub fn publish(&mut self) -> Published {
        if self.next_used == self.published {
            return Published::Nothing;
        }
        self.published = self.next_used;
        if self.listed > 0 {
            self.chains.forget(std::mem::take(&mut self.listed));
        }
        let event_idx = self.event_idx;
        let event = self.avail_u16(if event_idx { 4 + 2 * usize::from(self.size) } else { 0 });
        let event = publish_index(&self.used_u16(2), self.next_used, &event);
        if let Some(inflight) = &mut self.inflight {
            inflight.published(self.next_used);
        }
        if self.log.is_some() {
            self.log_used(0, 4);
        }
        let call = if event_idx {
            let before = self.called_at.replace(self.next_used);
            before.is_none_or(|before| need_event(event, self.next_used, before))
        } else {
            event & AVAIL_F_NO_INTERRUPT == 0
        };
        if call { Published::Call } else { Published::Suppressed }
    }

    /// Requests a kick for the next available chain. Returns true if one is available already: then there may
    /// be no kick, and the worker must pop again before it sleeps.
    ///
    /// # Errors
    /// [`Fault::AvailIndex`] if the available index covers more chains than the ring has entries, or went back.
    pub fn enable_notify(&mut self) -> Result<bool, Fault> {
        let (offset, value) = match self.event_idx {
            true => (self.avail_event(), self.next_avail),
            false => (0, 0),
        };
        let index = request_notify(&self.used_u16(offset), value, &self.avail_u16(2));
        if self.log.is_some() {
            self.log_used(offset, 2);
        }
        self.notify_at = Some(self.next_avail);
        self.accept_avail(index)
    }

    /// Suppresses kicks. With EVENT_IDX no store is needed after the driver has passed the requested index.
    pub fn disable_notify(&mut self) {
        let Some(index) = self.notify_at.take() else { return };
        let (offset, value) = match self.event_idx {
            true if index != self.next_avail => return,
            // An index that the driver has passed already.
            true => (self.avail_event(), index.wrapping_sub(1)),
            false => (0, USED_F_NO_NOTIFY),
        };
        self.used_u16(offset).store(value, Ordering::Relaxed);
        if self.log.is_some() {
            self.log_used(offset, 2);
        }
    }

    /// Returns the offset of `avail_event` in the used ring: the available index to kick at, with EVENT_IDX.
    fn avail_event(&self) -> usize {
        4 + 8 * usize::from(self.size)
    }
}

/// Returns true if the move of an index from `before` to `now` passed `event`: `vring_need_event` of
/// virtio 1.3, section 2.7.10.
#[inline]
fn need_event(event: u16, now: u16, before: u16) -> bool {
    now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
}

#[cfg(test)]
mod tests {
    use super::need_event;

    #[test]
    fn an_event_is_passed_once_per_lap() {
        assert!(need_event(4, 5, 4));
        assert!(need_event(4, 9, 0));
        assert!(!need_event(5, 5, 4));
        assert!(!need_event(3, 5, 4));
        assert!(need_event(0xffff, 0, 0xffff));
        assert!(!need_event(0, 0, 0xffff));
    }
}
