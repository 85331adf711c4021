//! The used ring: chains that the device has finished with, given back in the order of the ring.
//!
//! Invariant: only the oldest chain in flight completes, so an entry is written once and covers one chain.
//! The driver sees no entry before it is [published](Virtqueue::publish). What was written to guest memory
//! is in the dirty log by then, if there is one.

use std::ptr::NonNull;

use super::Virtqueue;
use crate::guest::chain::{Direction, Readable};
use crate::guest::chain_table::Slot;

/// Bytes of a chain that a port writes at most: a frame of 64 KiB with its headers, twice over. A TAP's
/// largest frame is 64 KiB (`GSO_LEGACY_MAX_SIZE` of the kernel), and a page of AF_XDP is less.
const MAX_WRITTEN: usize = 128 << 10;

impl<D: Direction> Virtqueue<'_, D> {
    /// Writes the used entry of the oldest chain in flight: the device has finished with it, and has
    /// written `written` bytes to it. The driver sees it when it is published. Returns the chain's bytes.
    ///
    /// # Panics
    /// If none is in flight.
    #[inline(always)]
    pub fn push_used(&mut self, written: u32) -> usize {
        let position = self.next_used;
        assert!(position != self.next_avail, "only a chain in flight completes");
        let slot = self.chains.slot(position);
        let (head, length, pieces) = self.chains.facts(slot);
        // SAFETY: the slot is of this ring's table.
        unsafe { write_used(self.used, slot, head, written) };
        if self.is_noted || pieces != 1 {
            self.note_used(position, written, pieces);
        }
        if D::WRITABLE {
            self.chains.set_written(slot, written);
        }
        if let Some(is_in_flight) = self.is_in_flight.get_mut(usize::from(head)) {
            *is_in_flight = false;
        }
        self.next_used = position.wrapping_add(1);
        self.bytes -= length as usize;
        length as usize
    }

    /// Notes what is of use later: for a VMM that copies memory, for another backend, for the list of
    /// pieces.
    #[inline(never)]
    fn note_used(&mut self, position: u16, written: u32, pieces: u16) {
        if let Some(inflight) = &mut self.inflight {
            inflight.retired(self.chains.facts(self.chains.slot(position)).0);
        }
        if self.log.is_some() {
            self.log_used(4 + 8 * usize::from(position & (self.size - 1)), 8);
            self.log_buffers(position, written);
        }
        if pieces != 1 {
            self.pieces += usize::from(pieces);
        }
    }

    /// Notes that bytes of the used ring were written.
    #[cold]
    pub(super) fn log_used(&self, offset: usize, length: u64) {
        if let Some((log, ring)) = self.log {
            log.mark(ring + offset as u64, length);
        }
    }

    /// Notes that the first bytes of a chain may have been written: as many as a port writes at most,
    /// which can be more than the guest is told. A TAP's frame that is dropped after it was read was
    /// written too, and to several chains if it needed them. So the work for a chain has a limit, and
    /// does not grow with buffers of gigabytes.
    #[cold]
    pub(super) fn log_buffers(&self, position: u16, written: u32) {
        let Some((log, _)) = self.log.filter(|_| D::WRITABLE) else { return };
        let mut left = MAX_WRITTEN.max(written as usize);
        for segment in self.chains.chain::<D>(position).segments() {
            let length = segment.len().min(left);
            self.memory.mark(log, segment.address(), length);
            left -= length;
            if left == 0 {
                return;
            }
        }
    }
}

impl Virtqueue<'_, Readable> {
    /// Completes the `count` oldest chains in flight; returns their bytes. It is what as many calls of
    /// [`push_used`](Self::push_used) do, in two thirds of the instructions.
    ///
    /// # Panics
    /// If fewer are in flight.
    #[inline]
    pub fn push_used_run(&mut self, count: usize) -> usize {
        assert!(count <= self.in_flight(), "only chains in flight complete");
        if self.is_noted {
            return (0..count).map(|_| self.push_used(0)).sum();
        }
        let (used, chains) = (self.used, &self.chains);
        let is_in_flight = &mut *self.is_in_flight;
        let (mut position, mut bytes, mut listed) = (self.next_used, 0, 0);
        for _ in 0..count {
            let slot = chains.slot(position);
            let (head, length, pieces) = chains.facts(slot);
            // SAFETY: the slot is of this ring's table.
            unsafe { write_used(used, slot, head, 0) };
            if let Some(is_in_flight) = is_in_flight.get_mut(usize::from(head)) {
                *is_in_flight = false;
            }
            if pieces != 1 {
                listed += usize::from(pieces);
            }
            bytes += length as usize;
            position = position.wrapping_add(1);
        }
        self.next_used = position;
        self.bytes -= bytes;
        self.pieces += listed;
        bytes
    }
}

/// Writes an entry of the used ring at `used`, which `start` has resolved.
///
/// # Safety
/// The slot is of the same ring's table, and the ring is mapped.
#[inline(always)]
unsafe fn write_used(used: NonNull<u8>, slot: Slot, head: u16, written: u32) {
    // SAFETY: `start` resolved 6 + 8 × size bytes of used ring at an address aligned to 4. Volatile: the
    // driver may look, and sees an entry that the index does not cover yet.
    unsafe {
        let entry = used.add(4 + 8 * slot.index()).cast::<u32>();
        entry.write_volatile(u32::from(head).to_le());
        entry.add(1).write_volatile(written.to_le());
    }
}
