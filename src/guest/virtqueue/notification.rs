//! Notifications (virtio 1.3, sections 2.7.7 and 2.7.10): whether the driver is called when chains were
//! used, and whether it kicks when it makes chains available.
//!
//! Invariant: each side stores its own index or wish, then reads the other's, with a fence in between (see
//! [`notify`](crate::guest::notify)). So no wake-up is lost, whichever side sleeps.

use std::sync::atomic::Ordering;

use super::Virtqueue;
use crate::guest::chain::Direction;
use crate::guest::fault::Fault;
use crate::guest::notify::{Shared, ask, show};

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// What [`Virtqueue::publish`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// There was nothing to show.
    Nothing,
    /// The used index moved; the driver wants no notification of that.
    Suppressed,
    /// The used index moved, and the driver wants to be called.
    Call,
}

impl<D: Direction> Virtqueue<'_, D> {
    /// Shows the driver which chains have completed, with one store, and tells what it wants done.
    pub fn publish(&mut self) -> Published {
        if self.next_used == self.published {
            return Published::Nothing;
        }
        self.published = self.next_used;
        if self.pieces > 0 {
            self.chains.forget(std::mem::take(&mut self.pieces));
        }
        let event_idx = self.event_idx;
        let wish = self.avail_u16(if event_idx { 4 + 2 * usize::from(self.size) } else { 0 });
        let wish = show(&self.used_u16(2), self.next_used, &wish);
        if let Some(inflight) = &mut self.inflight {
            inflight.published(self.next_used);
        }
        if self.log.is_some() {
            self.log_used(0, 4);
        }
        let call = if event_idx {
            let before = self.called_at.replace(self.next_used);
            before.is_none_or(|before| passed(wish, self.next_used, before))
        } else {
            wish & AVAIL_F_NO_INTERRUPT == 0
        };
        if call { Published::Call } else { Published::Suppressed }
    }

    /// Asks the driver to kick when it makes something available. Returns true if it already has:
    /// then there may be no kick, and the ring must be popped again before sleeping.
    ///
    /// # Errors
    /// As [`pop`](Self::pop), for the available index.
    pub fn enable_notify(&mut self) -> Result<bool, Fault> {
        let (offset, value) = match self.event_idx {
            true => (self.avail_event(), self.next_avail),
            false => (0, 0),
        };
        let index = ask(&self.used_u16(offset), value, &self.avail_u16(2));
        if self.log.is_some() {
            self.log_used(offset, 2);
        }
        self.armed = Some(self.next_avail);
        self.see(index)
    }

    /// Asks the driver not to kick. With EVENT_IDX that needs no store once the index that it was to kick
    /// at has been passed.
    pub fn disable_notify(&mut self) {
        let Some(index) = self.armed.take() else { return };
        let (offset, value) = match self.event_idx {
            true if index != self.next_avail => return,
            // As if it had been.
            true => (self.avail_event(), index.wrapping_sub(1)),
            false => (0, USED_F_NO_NOTIFY),
        };
        self.used_u16(offset).store(value, Ordering::Relaxed);
        if self.log.is_some() {
            self.log_used(offset, 2);
        }
    }

    /// Where in the used ring the driver reads at which available index to kick, with EVENT_IDX.
    fn avail_event(&self) -> usize {
        4 + 8 * usize::from(self.size)
    }
}

/// `vring_need_event` of the specification (section 2.7.10): whether moving from `before` to
/// `now` passed `event`.
#[inline]
fn passed(event: u16, now: u16, before: u16) -> bool {
    now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
}

#[cfg(test)]
mod tests {
    use super::passed;

    #[test]
    fn an_event_is_passed_once_per_lap() {
        assert!(passed(4, 5, 4));
        assert!(passed(4, 9, 0));
        assert!(!passed(5, 5, 4));
        assert!(!passed(3, 5, 4));
        assert!(passed(0xffff, 0, 0xffff));
        assert!(!passed(0, 0, 0xffff));
    }
}
