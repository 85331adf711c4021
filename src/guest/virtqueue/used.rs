//! The used ring: returns finished chains to the driver, in the order in which they were popped.
//!
//! Invariant: only the oldest chain in flight completes, so each entry is written once and covers one chain.
//! The used index covers no entry before it is [published](Virtqueue::publish). By then the dirty log, if
//! any, has all writes to guest memory.

use std::ptr::NonNull;

use super::Virtqueue;
use crate::guest::chain::{Direction, Readable};
use crate::guest::chain_table::Slot;

/// Upper bound on the bytes that a port writes to one chain: twice a frame of 64 KiB with its headers. A TAP's
/// largest frame has 64 KiB (`GSO_LEGACY_MAX_SIZE` of the kernel), an AF_XDP frame at most a page.
const MAX_WRITTEN: usize = 128 << 10;

impl<D: Direction> Virtqueue<'_, D> {
    /// Completes the oldest chain in flight, to which the device has written `written` bytes. Writes its used
    /// entry, which the driver sees after [`publish`](Self::publish). Returns the chain's length in bytes.
    ///
    /// # Panics
    /// If no chain is in flight.
    #[inline(always)]
    pub fn push_used(&mut self, written: u32) -> usize {
        let position = self.next_used;
        assert!(position != self.next_avail, "only a chain in flight completes");
        let slot = self.chains.slot(position);
        let (head, length, segments) = self.chains.facts(slot);
        // SAFETY: `start` resolved the used ring for the size of this table, and `memory` keeps it mapped.
        unsafe { write_used(self.used, slot, head, written) };
        if self.is_recorded || segments != 1 {
            self.record_used(position, written, segments);
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

    /// Records a completed chain in the inflight buffer, the dirty log and the count of listed segments.
    #[inline(never)]
    fn record_used(&mut self, position: u16, written: u32, segments: u16) {
        if let Some(inflight) = &mut self.inflight {
            inflight.used(self.chains.facts(self.chains.slot(position)).0);
        }
        if self.log.is_some() {
            self.log_used(4 + 8 * usize::from(position & (self.size - 1)), 8);
            self.log_buffers(position, written);
        }
        if segments != 1 {
            self.listed += usize::from(segments);
        }
    }

    /// Marks `length` bytes of the used ring, from `offset`, in the dirty log.
    #[cold]
    pub(super) fn log_used(&self, offset: usize, length: u64) {
        if let Some((log, ring)) = self.log {
            log.mark(ring + offset as u64, length);
        }
    }

    /// Marks a chain's first bytes in the dirty log: [`MAX_WRITTEN`], or `written` if that is more.
    ///
    /// A port may have written more than `written`: a frame read from a TAP and then dropped was written too,
    /// possibly to several chains. The limit bounds the work for each chain, even with buffers of gigabytes.
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
    /// Completes the `count` oldest chains in flight; returns their total length in bytes. Equals `count` calls
    /// of [`push_used`](Self::push_used), in two thirds of the instructions.
    ///
    /// # Panics
    /// If fewer chains are in flight.
    #[inline]
    pub fn push_used_run(&mut self, count: usize) -> usize {
        assert!(count <= self.in_flight(), "only chains in flight complete");
        if self.is_recorded {
            return (0..count).map(|_| self.push_used(0)).sum();
        }
        let (used, chains) = (self.used, &self.chains);
        let is_in_flight = &mut *self.is_in_flight;
        let (mut position, mut bytes, mut listed) = (self.next_used, 0, 0);
        for _ in 0..count {
            let slot = chains.slot(position);
            let (head, length, segments) = chains.facts(slot);
            // SAFETY: `start` resolved the used ring for the size of this table, and `memory` keeps it mapped.
            unsafe { write_used(used, slot, head, 0) };
            if let Some(is_in_flight) = is_in_flight.get_mut(usize::from(head)) {
                *is_in_flight = false;
            }
            if segments != 1 {
                listed += usize::from(segments);
            }
            bytes += length as usize;
            position = position.wrapping_add(1);
        }
        self.next_used = position;
        self.bytes -= bytes;
        self.listed += listed;
        bytes
    }
}

/// Writes an entry of the used ring at `used`.
///
/// # Safety
/// `used` must be a ring that `start` resolved and that is still mapped. `slot` must be from the same
/// ring's table.
#[inline(always)]
unsafe fn write_used(used: NonNull<u8>, slot: Slot, head: u16, written: u32) {
    // SAFETY: `start` resolved 6 + 8 × size bytes at an address aligned to 4, and a slot is below the size.
    // Volatile: the driver may read the entry at any time, although the used index does not cover it yet.
    unsafe {
        let entry = used.add(4 + 8 * slot.index()).cast::<u32>();
        entry.write_volatile(u32::from(head).to_le());
        entry.add(1).write_volatile(written.to_le());
    }
}
