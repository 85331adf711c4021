//! The inflight buffer: a record, in memory that the frontend keeps for the next backend, of the
//! descriptors that we have taken and not given back (vhost-user specification, "Inflight I/O
//! tracking").
//!
//! We need none of it: chains complete in order, so the used index says it all. But a frontend that
//! asks for the buffer (cloud-hypervisor) may hand it to another backend, so it is kept true.

use std::fs::File;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use super::memory::{Mapping, MemoryError};
use super::quota::Allowance;

/// Bytes before a split ring's descriptors: features, version, their number, the last head of a batch,
/// the used index.
const HEADER: usize = 16;
/// Bytes of a descriptor's state: whether it is in flight, the next of its batch, and when it was taken.
const STATE: usize = 16;
/// Rings begin at a multiple of this, as QEMU's libvhost-user and DPDK have it.
const ALIGNMENT: usize = 64;
const VERSION: u16 = 1;

/// Where things lie in a ring's part.
const AT_VERSION: usize = 8;
const AT_NUMBER: usize = 10;
const AT_LAST_BATCH_HEAD: usize = 12;
const AT_USED_INDEX: usize = 14;
const IN_STATE_NEXT: usize = 6;
const IN_STATE_COUNTER: usize = 8;

/// Length in bytes of a ring's part.
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
    /// Length in bytes of the buffer for so many rings of at most `size` descriptors.
    pub fn length(rings: u16, size: u16) -> u64 {
        (usize::from(rings) * part(size)) as u64
    }

    /// Maps the buffer from `offset` of a file on.
    ///
    /// # Errors
    /// The file is no memory, too short, or not aligned, or the port's limit is reached.
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

    /// Mapped bytes, with those that alignment adds.
    pub fn mapped_bytes(&self) -> u64 {
        self.mapping.bytes()
    }

    /// Rings that it is for, and descriptors of each at the most.
    pub fn shape(&self) -> (u16, u16) {
        (self.rings, self.size)
    }

    /// The file, and where in it the buffer starts.
    pub fn source(&self) -> (&Arc<File>, u64) {
        self.mapping.source()
    }

    pub(super) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// The part of a ring, which has at most so many descriptors; nothing if there is none for it.
    pub(super) fn ring(&self, index: u16, size: u16) -> Option<InflightRing<'_>> {
        if index >= self.rings || size > self.size {
            return None;
        }
        // SAFETY: `map` has mapped a part for each ring.
        let start = unsafe { self.mapping.start().add(usize::from(index) * part(self.size)) };
        let ring = InflightRing { start, size, batch: Vec::new(), counter: 0, buffer: PhantomData };
        ring.u16(AT_VERSION).store(VERSION, Ordering::Relaxed);
        ring.u16(AT_NUMBER).store(size, Ordering::Relaxed);
        Some(ring)
    }
}

/// The part of one ring that runs. Whatever the memory holds is written, and never believed.
#[derive(Debug)]
pub(super) struct InflightRing<'mem> {
    start: NonNull<u8>,
    size: u16,
    /// Heads that were retired, and not published yet.
    batch: Vec<u16>,
    counter: u64,
    buffer: PhantomData<&'mem Inflight>,
}

impl InflightRing<'_> {
    /// Begins anew: nothing is in flight.
    pub(super) fn clear(&mut self, used_index: u16) {
        (0..self.size).for_each(|head| self.state(head).store(0, Ordering::Relaxed));
        self.u16(AT_USED_INDEX).store(used_index, Ordering::Release);
    }

    /// A chain is taken.
    pub(super) fn popped(&mut self, head: u16) {
        self.counter += 1;
        let at = self.at_state(head) + IN_STATE_COUNTER;
        // SAFETY: the counter is in the head's state, and aligned to 8, as the part is to 64.
        let counter = unsafe { AtomicU64::from_ptr(self.start.add(at).cast().as_ptr()) };
        counter.store(self.counter, Ordering::Relaxed);
        self.state(head).store(1, Ordering::Release);
    }

    /// Its used entry is written.
    pub(super) fn retired(&mut self, head: u16) {
        let last = self.u16(AT_LAST_BATCH_HEAD);
        let next = self.u16(self.at_state(head) + IN_STATE_NEXT);
        next.store(last.load(Ordering::Relaxed), Ordering::Relaxed);
        last.store(head, Ordering::Release);
        self.batch.push(head);
    }

    /// The used index covers all that were retired.
    pub(super) fn published(&mut self, used_index: u16) {
        while let Some(head) = self.batch.pop() {
            self.state(head).store(0, Ordering::Relaxed);
        }
        self.u16(AT_USED_INDEX).store(used_index, Ordering::Release);
    }

    /// A chain goes back unused.
    pub(super) fn taken_back(&mut self, head: u16) {
        self.state(head).store(0, Ordering::Release);
    }

    /// Offset of a head's state in the part.
    ///
    /// # Panics
    /// If the ring has no such head: a chain of another ring went back to this one.
    fn at_state(&self, head: u16) -> usize {
        assert!(head < self.size, "head {head} is not below the ring's size, {}", self.size);
        HEADER + STATE * usize::from(head)
    }

    /// Whether a head is in flight.
    fn state(&self, head: u16) -> &AtomicU8 {
        // SAFETY: the part is mapped, and the head's state is in it (`at_state`).
        unsafe { AtomicU8::from_ptr(self.start.add(self.at_state(head)).as_ptr()) }
    }

    /// A field of two bytes.
    ///
    /// # Panics
    /// If it is not wholly in the part, at an even offset.
    fn u16(&self, at: usize) -> &AtomicU16 {
        assert!(at + 2 <= part(self.size) && at.is_multiple_of(2), "no field is at {at}");
        // SAFETY: the part is mapped and aligned, and the field is in it.
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
    fn heads_of_larger_rings_are_refused() {
        let file = sealed_memory(c"inflight", Inflight::length(2, 4)).unwrap();
        let other = file.try_clone().unwrap();
        let allowance = Allowance::new(&Arc::<MemoryQuota>::default(), 0);
        let inflight = Inflight::map(file, 0, (2, 4), &allowance).unwrap();
        let mut ring = inflight.ring(0, 4).unwrap();
        ring.clear(0);
        for head in [4, 8, u16::MAX] {
            for note in [InflightRing::popped, InflightRing::retired, InflightRing::taken_back] {
                let noted = catch_unwind(AssertUnwindSafe(|| note(&mut ring, head)));
                assert!(noted.is_err(), "head {head}");
            }
        }
        // Nothing was written to the next ring's part.
        let mut bytes = vec![0; part(4)];
        other.read_exact_at(&mut bytes, part(4) as u64).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
    }
}
