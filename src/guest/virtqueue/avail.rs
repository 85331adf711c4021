//! The available ring: chains that the driver offers, popped within a [`Budget`].
//!
//! Invariant: whatever the driver writes into the ring, at most as many chains are in flight as the ring
//! has places, no two with the same head, and each has been read once and checked.

use std::sync::atomic::Ordering;

use super::{Virtqueue, avail_u16};
use crate::guest::chain::Direction;
use crate::guest::fault::Fault;
use crate::guest::notify::{Shared, look};

/// What one turn may pop, so that one ring cannot hold the thread.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// Chains.
    pub chains: usize,
    /// Bytes; the chain that passes the limit is still popped.
    pub bytes: usize,
}

impl<D: Direction> Virtqueue<'_, D> {
    /// Pops chains until the budget is spent or none is left; returns how many.
    ///
    /// # Errors
    /// A [`Fault`] of the guest's; chains popped before it are in flight.
    // By itself, or its variables would compete with all of the worker's turn for registers.
    #[inline(never)]
    pub fn pop(&mut self, budget: Budget) -> Result<usize, Fault> {
        if self.next_avail == self.seen_avail && !self.look()? {
            return Ok(0);
        }
        let first = self.next_avail;
        let waiting = usize::from(self.seen_avail.wrapping_sub(first));
        let popped = self.pop_available(waiting.min(budget.chains), budget.bytes);
        if self.inflight.is_some() {
            self.note_popped(first);
        }
        popped.map(|()| self.next_avail.wrapping_sub(first).into())
    }

    /// Pops up to `chains` chains, fewer if they have `bytes` before.
    #[inline]
    fn pop_available(&mut self, chains: usize, bytes: usize) -> Result<(), Fault> {
        let end = self.next_avail.wrapping_add(chains as u16);
        let enough = self.bytes.saturating_add(bytes);
        loop {
            let head = self.pop_simple(end, enough)?;
            // Nearly always that was all.
            let Some(head) = head else { return Ok(()) };
            self.collect(self.next_avail, head)?;
            self.next_avail = self.next_avail.wrapping_add(1);
        }
    }

    /// Pops chains of one piece before position `end`, until `enough` bytes are in flight. Returns the head
    /// of the first chain that is of another kind, which is noted as in flight and not collected: a queue
    /// that fails to is not used again.
    #[inline(always)]
    fn pop_simple(&mut self, end: u16, enough: usize) -> Result<Option<u16>, Fault> {
        // Copies of what the loop needs, which is in registers then.
        let (avail, size, descriptors) = (self.avail, self.size, self.descriptors);
        let is_in_flight = &mut *self.is_in_flight;
        let mut chains = self.chains.writer();
        let first = usize::from(self.next_avail);
        let most = usize::from(end.wrapping_sub(self.next_avail));
        let (mut popped, mut bytes) = (0, self.bytes);
        let result = loop {
            if popped == most || bytes >= enough {
                break Ok(None);
            }
            let slot = chains.slot(first + popped);
            // SAFETY: the slot is below the ring's size.
            let head = unsafe { avail_u16(avail, 4 + 2 * slot.index(), size) };
            let head = head.load(Ordering::Relaxed);
            let Some(is_in_flight) = is_in_flight.get_mut(usize::from(head)) else {
                break Err(Fault::HeadOutOfRange(head));
            };
            if std::mem::replace(is_in_flight, true) {
                break Err(Fault::HeadOfferedTwice(head));
            }
            let Some(piece) = descriptors.only_piece::<D>(head) else { break Ok(Some(head)) };
            if !D::WRITABLE {
                piece.prefetch();
            }
            chains.set_one(slot, head, piece);
            bytes += piece.len();
            popped += 1;
        };
        self.next_avail = self.next_avail.wrapping_add(popped as u16);
        self.bytes = bytes;
        result
    }

    /// Collects the pieces of a chain of any kind.
    #[inline(never)]
    fn collect(&mut self, position: u16, head: u16) -> Result<(), Fault> {
        let Self { chains, descriptors, .. } = self;
        let collect = |pieces: &mut Vec<_>| descriptors.collect::<D>(head, pieces);
        self.bytes += chains.set_list(position, head, collect)? as usize;
        Ok(())
    }

    /// Looks at the driver's available index; says whether there is anything to pop.
    ///
    /// # Errors
    /// [`Fault::AvailIndex`] if it claims more chains than the ring has room for.
    pub(super) fn look(&mut self) -> Result<bool, Fault> {
        let index = look(&self.avail_u16(2));
        self.see(index)
    }

    pub(super) fn see(&mut self, index: u16) -> Result<bool, Fault> {
        let outstanding = index.wrapping_sub(self.published);
        let popped = self.next_avail.wrapping_sub(self.published);
        if outstanding > self.size || outstanding < popped {
            return Err(Fault::AvailIndex { index, expected: self.next_avail });
        }
        self.seen_avail = index;
        Ok(index != self.next_avail)
    }

    #[cold]
    fn note_popped(&mut self, first: u16) {
        let Some(inflight) = &mut self.inflight else { return };
        for index in 0..self.next_avail.wrapping_sub(first) {
            let slot = self.chains.slot(first.wrapping_add(index));
            inflight.popped(self.chains.facts(slot).0);
        }
    }

    /// Takes back all chains in flight, when the ring stops: the next start pops them again.
    pub fn unpop_all(&mut self) {
        for position in self.positions(self.next_avail) {
            let (head, _, pieces) = self.chains.facts(self.chains.slot(position));
            if let Some(inflight) = &mut self.inflight {
                inflight.taken_back(head);
            }
            if self.log.is_some() {
                self.log_buffers(position, 0);
            }
            if pieces != 1 {
                self.pieces += usize::from(pieces);
            }
            self.is_in_flight[usize::from(head)] = false;
        }
        self.next_avail = self.next_used;
        self.bytes = 0;
    }
}
