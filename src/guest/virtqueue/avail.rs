//! The available ring: pops the driver's chains within a [`Budget`].
//!
//! Invariant: whatever the driver writes to the ring, at most `size` chains are in flight, no two of them
//! have the same head, and each has been read once and checked.

use std::sync::atomic::Ordering;

use super::{Virtqueue, avail_u16};
use crate::guest::chain::Direction;
use crate::guest::fault::Fault;
use crate::guest::notify::{Shared, load_index};

/// Limits of one pop, so that one ring cannot occupy the worker thread.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// Maximum number of chains.
    pub chains: usize,
    /// Number of bytes at which popping stops; the chain that reaches it is still popped.
    pub bytes: usize,
}

impl<D: Direction> Virtqueue<'_, D> {
    /// Pops chains until the budget is spent or none is left; returns the number popped.
    ///
    /// # Errors
    /// A [`Fault`] if the guest broke a rule; chains popped before the fault are in flight.
    // Not inlined: its variables would compete for registers with the rest of the worker's turn.
    #[inline(never)]
    pub fn pop(&mut self, budget: Budget) -> Result<usize, Fault> {
        if self.next_avail == self.seen_avail && !self.load_avail()? {
            return Ok(0);
        }
        let first = self.next_avail;
        let waiting = usize::from(self.seen_avail.wrapping_sub(first));
        let popped = self.pop_available(waiting.min(budget.chains), budget.bytes);
        if self.inflight.is_some() {
            self.record_popped(first);
        }
        popped.map(|()| self.next_avail.wrapping_sub(first).into())
    }

    /// Pops up to `chains` chains, and stops early once those have `bytes` bytes in total.
    #[inline]
    fn pop_available(&mut self, chains: usize, bytes: usize) -> Result<(), Fault> {
        let end = self.next_avail.wrapping_add(chains as u16);
        let enough = self.bytes.saturating_add(bytes);
        loop {
            let head = self.pop_simple(end, enough)?;
            // Nearly all chains are simple.
            let Some(head) = head else { return Ok(()) };
            self.collect(self.next_avail, head)?;
            self.next_avail = self.next_avail.wrapping_add(1);
        }
    }

    /// Pops chains of one segment before position `end`, until `enough` bytes are in flight. Stops at any other
    /// kind of chain, marks it as in flight and returns its head, for [`collect`](Self::collect). If that
    /// fails, the caller drops the virtqueue.
    #[inline(always)]
    fn pop_simple(&mut self, end: u16, enough: usize) -> Result<Option<u16>, Fault> {
        // Copies of the fields that the loop needs, so that they stay in registers.
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
            // SAFETY: `avail` has the ring that `start` resolved, mapped for `'mem`. A slot of this ring's table
            // is below the ring's size, so the entry lies in the ring, at an even offset.
            let head = unsafe { avail_u16(avail, 4 + 2 * slot.index(), size) };
            let head = head.load(Ordering::Relaxed);
            let Some(is_in_flight) = is_in_flight.get_mut(usize::from(head)) else {
                break Err(Fault::HeadOutOfRange(head));
            };
            if std::mem::replace(is_in_flight, true) {
                break Err(Fault::HeadInFlight(head));
            }
            let Some(segment) = descriptors.only_segment::<D>(head) else { break Ok(Some(head)) };
            if !D::WRITABLE {
                segment.prefetch();
            }
            chains.set_one(slot, head, segment);
            bytes += segment.len();
            popped += 1;
        };
        self.next_avail = self.next_avail.wrapping_add(popped as u16);
        self.bytes = bytes;
        result
    }

    /// Adds a chain of any kind, whose head is marked as in flight, at `position`.
    #[inline(never)]
    fn collect(&mut self, position: u16, head: u16) -> Result<(), Fault> {
        let Self { chains, descriptors, .. } = self;
        let collect = |segments: &mut Vec<_>| descriptors.collect::<D>(head, segments);
        self.bytes += chains.set_list(position, head, collect)? as usize;
        Ok(())
    }

    /// Reads the driver's available index; returns true if there is a chain to pop.
    ///
    /// # Errors
    /// [`Fault::AvailIndex`] if the index covers more chains than the ring has entries, or went back.
    pub(super) fn load_avail(&mut self) -> Result<bool, Fault> {
        let index = load_index(&self.avail_u16(2));
        self.accept_avail(index)
    }

    /// Checks and stores an available index that was read from the ring; returns and fails as
    /// [`load_avail`](Self::load_avail).
    pub(super) fn accept_avail(&mut self, index: u16) -> Result<bool, Fault> {
        let outstanding = index.wrapping_sub(self.published);
        let popped = self.next_avail.wrapping_sub(self.published);
        if outstanding > self.size || outstanding < popped {
            return Err(Fault::AvailIndex { index, expected: self.next_avail });
        }
        self.seen_avail = index;
        Ok(index != self.next_avail)
    }

    /// Records the chains from position `first` in the inflight buffer.
    #[cold]
    fn record_popped(&mut self, first: u16) {
        let Some(inflight) = &mut self.inflight else { return };
        for index in 0..self.next_avail.wrapping_sub(first) {
            let slot = self.chains.slot(first.wrapping_add(index));
            inflight.popped(self.chains.facts(slot).0);
        }
    }

    /// Returns all chains in flight to the available ring, when the ring stops: the next start pops them again.
    pub fn unpop_all(&mut self) {
        for position in self.positions(self.next_avail) {
            let (head, _, segments) = self.chains.facts(self.chains.slot(position));
            if let Some(inflight) = &mut self.inflight {
                inflight.unpopped(head);
            }
            if self.log.is_some() {
                self.log_buffers(position, 0);
            }
            if segments != 1 {
                self.listed += usize::from(segments);
            }
            self.is_in_flight[usize::from(head)] = false;
        }
        self.next_avail = self.next_used;
        self.bytes = 0;
    }
}
