//! The inflight buffer: a record of the chains in flight, in memory that the frontend keeps for the next
//! backend (vhost-user specification, "Inflight I/O tracking").
//!
//! Invariant: this daemon writes the buffer and never relies on its contents. Chains complete in order, so
//! the used index alone says where to resume. But a frontend that asks for the buffer (cloud-hypervisor) may
//! pass it to another backend, so the record must be true.

use std::fs::File;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use super::memory::{Mapping, MemoryError};
use super::quota::Allowance;

/// Length in bytes of the header before a split ring's descriptor states: features, version, number of
/// descriptors, last head of a batch, used index.
const HEADER: usize = 16;
/// Length in bytes of a descriptor's state: in-flight flag, next head of its batch, running number of its pop.
const STATE: usize = 16;
/// Alignment of a ring's part in bytes, as in QEMU's libvhost-user and DPDK.
const ALIGNMENT: usize = 64;
const VERSION: u16 = 1;

/// Offsets in a ring's part (`AT_`) and in a descriptor's state (`IN_STATE_`), in bytes.
const AT_VERSION: usize = 8;
const AT_NUMBER: usize = 10;
const AT_LAST_BATCH_HEAD: usize = 12;
const AT_USED_INDEX: usize = 14;
const IN_STATE_NEXT: usize = 6;
const IN_STATE_COUNTER: usize = 8;

/// Returns the length in bytes of a ring's part.
fn part(size: u16) -> usize {
    (HEADER + STATE * usize::from(size)).next_multiple_of(ALIGNMENT)
}

/// A mapped inflight buffer for a number of rings.
#[derive(Debug)]
pub struct Inflight {
    mapping: Mapping,
    rings: u16,
    size: u16,
}

impl Inflight {
    /// Returns the length in bytes of a buffer for `rings` rings of at most `size` descriptors.
    pub fn length(rings: u16, size: u16) -> u64 {
        (usize::from(rings) * part(size)) as u64
    }

    /// Maps the buffer, which starts at `offset` bytes of the file.
    ///
    /// # Errors
    /// A [`MemoryError`] if the file is not shared memory or too short, `offset` is not a multiple of 64 bytes,
    /// or the port's limit is reached.
    pub fn map(
        file: File,
        offset: u64,
        (rings, size): (u16, u16),
        allowance: &Allowance,
    ) -> Result<Self, MemoryError> {
        let mapping = Mapping::new(file, offset, Self::length(rings, size), allowance)?;
        if !mapping.start().addr().get().is_multiple_of(ALIGNMENT) {
            return Err(MemoryError::Misaligned);
        }
        Ok(Inflight { mapping, rings, size })
    }

    /// Returns the mapped bytes, including those that page alignment adds.
    pub fn mapped_bytes(&self) -> u64 {
        self.mapping.bytes()
    }

    /// Returns the number of rings, and the maximum number of descriptors of each.
    pub fn shape(&self) -> (u16, u16) {
        (self.rings, self.size)
    }

    /// Returns the file, and the offset in bytes at which the buffer starts.
    pub fn source(&self) -> (&Arc<File>, u64) {
        self.mapping.source()
    }

    pub(super) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Returns the part of the ring `index`, with `size` descriptors. Returns none if the buffer has fewer rings,
    /// or rings of fewer descriptors.
    pub(super) fn ring(&self, index: u16, size: u16) -> Option<InflightRing<'_>> {
        if index >= self.rings || size > self.size {
            return None;
        }
        // SAFETY: `map` has mapped `rings` parts of this length, and `index` is below `rings`.
        let start = unsafe { self.mapping.start().add(usize::from(index) * part(self.size)) };
        let ring = InflightRing { start, size, batch: Vec::new(), counter: 0, buffer: PhantomData };
        ring.u16(AT_VERSION).store(VERSION, Ordering::Relaxed);
        ring.u16(AT_NUMBER).store(size, Ordering::Relaxed);
        Some(ring)
    }
}

/// The part of one running ring. Its contents are written only: the frontend may change them.
#[derive(Debug)]
pub(super) struct InflightRing<'mem> {
    start: NonNull<u8>,
    size: u16,
    /// Heads of completed chains that are not published yet.
    batch: Vec<u16>,
    /// Number of chains popped.
    counter: u64,
    buffer: PhantomData<&'mem Inflight>,
}

impl InflightRing<'_> {
    /// Records that no chain is in flight.
    pub(super) fn clear(&mut self, used_index: u16) {
        (0..self.size).for_each(|head| self.state(head).store(0, Ordering::Relaxed));
        self.u16(AT_USED_INDEX).store(used_index, Ordering::Release);
    }

    /// Records a popped chain.
    pub(super) fn popped(&mut self, head: u16) {
        self.counter += 1;
        let at = self.at_state(head) + IN_STATE_COUNTER;
        // SAFETY: `at_state` has checked that the head's state is in the mapped part. The counter in it is
        // aligned to 8: the part is aligned to 64 (`map`), header and states are multiples of 16 bytes.
        let counter = unsafe { AtomicU64::from_ptr(self.start.add(at).cast().as_ptr()) };
        counter.store(self.counter, Ordering::Relaxed);
        self.state(head).store(1, Ordering::Release);
    }

    /// Records a completed chain, whose used entry is written and not published.
    pub(super) fn used(&mut self, head: u16) {
        let last = self.u16(AT_LAST_BATCH_HEAD);
        let next = self.u16(self.at_state(head) + IN_STATE_NEXT);
        next.store(last.load(Ordering::Relaxed), Ordering::Relaxed);
        last.store(head, Ordering::Release);
        self.batch.push(head);
    }

    /// Records that the used index now covers all completed chains.
    pub(super) fn published(&mut self, used_index: u16) {
        while let Some(head) = self.batch.pop() {
            self.state(head).store(0, Ordering::Relaxed);
        }
        self.u16(AT_USED_INDEX).store(used_index, Ordering::Release);
    }

    /// Records a chain that returns to the available ring.
    pub(super) fn unpopped(&mut self, head: u16) {
        self.state(head).store(0, Ordering::Release);
    }

    /// Returns the offset of a head's state in the part.
    ///
    /// # Panics
    /// If `head` is not below the ring's size, which means that the chain is another ring's.
    fn at_state(&self, head: u16) -> usize {
        assert!(head < self.size, "head {head} is not below the ring's size, {}", self.size);
        HEADER + STATE * usize::from(head)
    }

    /// Returns a head's in-flight flag: 0 or 1.
    fn state(&self, head: u16) -> &AtomicU8 {
        // SAFETY: `at_state` has checked that the head's state is in the part, which `buffer` keeps mapped.
        unsafe { AtomicU8::from_ptr(self.start.add(self.at_state(head)).as_ptr()) }
    }

    /// Returns the 16-bit field at an offset.
    ///
    /// # Panics
    /// If the offset is odd, or the field not wholly in the part.
    fn u16(&self, at: usize) -> &AtomicU16 {
        assert!(at + 2 <= part(self.size) && at.is_multiple_of(2), "no field is at {at}");
        // SAFETY: the assertion has checked that the field is in the part, at an even offset. The part is
        // aligned to 64 (`map`), and `buffer` keeps it mapped.
        unsafe { AtomicU16::from_ptr(self.start.add(at).cast().as_ptr()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::MemoryQuota;
    use crate::sys::process::sealed_memory;
    use std::os::unix::fs::FileExt;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Arc;

    #[test]
    fn heads_beyond_the_ring_panic() {
        let file = sealed_memory(c"inflight", Inflight::length(2, 4)).unwrap();
        let other = file.try_clone().unwrap();
        let allowance = Allowance::new(&Arc::<MemoryQuota>::default(), 0);
        let inflight = Inflight::map(file, 0, (2, 4), &allowance).unwrap();
        let mut ring = inflight.ring(0, 4).unwrap();
        ring.clear(0);
        for head in [4, 8, u16::MAX] {
            for record in [InflightRing::popped, InflightRing::used, InflightRing::unpopped] {
                let recorded = catch_unwind(AssertUnwindSafe(|| record(&mut ring, head)));
                assert!(recorded.is_err(), "head {head}");
            }
        }
        // Nothing was written to the next ring's part.
        let mut bytes = vec![0; part(4)];
        other.read_exact_at(&mut bytes, part(4) as u64).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
    }
}
