//! A socket's rings. Entries are staged or taken, then published to the kernel with one store of an index.
//!
//! Invariant: a ring's memory stays mapped while its value lives. No index leads outside it, whatever the
//! kernel stores there. Entries are plain values: the port looks up each address in a table of its own before
//! it uses the address.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::sys::Plain;

/// Mapped memory of a ring: two indices, flags, and entries, whose number is a power of two.
#[derive(Debug)]
pub(super) struct Mapped<T> {
    start: NonNull<u8>,
    length: usize,
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    entries: NonNull<T>,
    mask: u32,
}

// SAFETY: the pointers are into a mapping that the value owns. Everything that the kernel writes there is
// read by atomic or volatile access.
unsafe impl<T: Plain> Send for Mapped<T> {}

/// Returns the length in bytes of the mapping of a ring of `size` entries. Returns `None` if the size is not
/// a power of two, or a part of the ring is not aligned or not in the mapping.
fn mapping_length<T>(offsets: &libc::xdp_ring_offset, size: u32) -> Option<usize> {
    let end = (size as usize)
        .checked_mul(mem::size_of::<T>())
        .and_then(|entries| entries.checked_add(usize::try_from(offsets.desc).ok()?))?;
    let word = mem::size_of::<u32>() as u64;
    let is_inside = |offset: u64| {
        offset.is_multiple_of(word) && offset.checked_add(word).is_some_and(|it| it <= end as u64)
    };
    let are_inside = [offsets.producer, offsets.consumer, offsets.flags].into_iter().all(is_inside);
    let is_aligned = offsets.desc.is_multiple_of(mem::align_of::<T>() as u64);
    (size.is_power_of_two() && are_inside && is_aligned).then_some(end)
}

impl<T: Plain> Mapped<T> {
    /// Maps a socket's ring of `size` entries. `page` is the offset that selects the ring.
    ///
    /// # Errors
    /// `InvalidInput` if the size is not a power of two; those of mmap(2), which checks the length.
    pub(super) fn new(
        fd: &OwnedFd,
        offsets: &libc::xdp_ring_offset,
        size: u32,
        page: libc::off_t,
    ) -> io::Result<Self> {
        let length = mapping_length::<T>(offsets, size).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at any address, owned by the value created below.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                fd.as_raw_fd(),
                page,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast::<u8>()).expect("mmap does not map at address 0");
        // SAFETY: `mapping_length` has checked that the offset is inside the mapping.
        let place = |offset: u64| unsafe { start.add(offset as usize) };
        Ok(Mapped {
            start,
            length,
            producer: place(offsets.producer).cast(),
            consumer: place(offsets.consumer).cast(),
            flags: place(offsets.flags).cast(),
            entries: place(offsets.desc).cast(),
            mask: size - 1,
        })
    }
}

impl<T> Mapped<T> {
    fn producer(&self) -> &AtomicU32 {
        // SAFETY: an aligned word of the mapping, which `self` owns.
        unsafe { self.producer.as_ref() }
    }

    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { self.consumer.as_ref() }
    }

    fn needs_wakeup(&self) -> bool {
        // SAFETY: as above.
        let flags = unsafe { self.flags.as_ref() }.load(Ordering::Relaxed);
        flags & libc::XDP_RING_NEED_WAKEUP != 0
    }

    /// Returns the address of the entry at an index, modulo the ring's size.
    fn entry(&self, index: u32) -> *mut T {
        // SAFETY: `mask` keeps the index inside the ring that `new` mapped.
        unsafe { self.entries.add((index & self.mask) as usize).as_ptr() }
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: `new` mapped the memory, and nothing refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// A ring that the daemon fills. Entries are staged, then published together.
#[derive(Debug)]
pub struct Producer<T> {
    ring: Mapped<T>,
    /// Index of the next entry to stage.
    staged: u32,
    /// The kernel's index when last read.
    consumed: u32,
}

impl<T: Plain> Producer<T> {
    pub(super) fn new(ring: Mapped<T>) -> Self {
        Producer { ring, staged: 0, consumed: 0 }
    }

    /// Returns the number of entries that can be staged now, at most `wanted`.
    #[inline]
    pub fn room(&mut self, wanted: u32) -> u32 {
        let size = self.ring.mask + 1;
        let used = self.staged.wrapping_sub(self.consumed);
        if used.saturating_add(wanted) <= size {
            return wanted;
        }
        // Acquire: the kernel has read the entries that its index covers.
        self.consumed = self.ring.consumer().load(Ordering::Acquire);
        wanted.min(size.saturating_sub(self.staged.wrapping_sub(self.consumed)))
    }

    /// Stages an entry.
    ///
    /// # Panics
    /// If the ring is full.
    #[inline]
    pub fn stage(&mut self, entry: T) {
        self.batch(1).stage(entry);
    }

    /// Begins to stage at most `most` entries.
    ///
    /// # Panics
    /// If the ring has no room for `most` entries.
    #[inline(always)]
    pub fn batch(&mut self, most: u32) -> Batch<'_, T> {
        assert!(self.room(most) >= most, "entries are staged only where there is room");
        Batch { next: self.staged, end: self.staged.wrapping_add(most), producer: self }
    }

    /// Publishes the staged entries to the kernel.
    #[inline]
    pub fn submit(&mut self) {
        // Release pairs with the kernel's read barrier behind its load of the index (barriers B
        // and C in net/xdp/xsk_queue.h).
        self.ring.producer().store(self.staged, Ordering::Release);
    }

    /// Returns the number of entries that the kernel has not yet taken.
    #[inline]
    pub fn pending(&mut self) -> u32 {
        self.consumed = self.ring.consumer().load(Ordering::Acquire);
        self.staged.wrapping_sub(self.consumed)
    }

    /// Returns true if the kernel must be called to notice new entries.
    #[inline]
    pub fn needs_wakeup(&self) -> bool {
        self.ring.needs_wakeup()
    }
}

/// Staging of several entries, whose index is stored once, on drop.
#[derive(Debug)]
pub struct Batch<'r, T> {
    producer: &'r mut Producer<T>,
    next: u32,
    end: u32,
}

impl<T: Plain> Batch<'_, T> {
    /// Stages an entry.
    ///
    /// # Panics
    /// If the batch has its full number of entries.
    #[inline(always)]
    pub fn stage(&mut self, entry: T) {
        assert!(self.next != self.end, "the batch is full");
        // SAFETY: inside the ring; the kernel does not read it before `submit`.
        unsafe { self.producer.ring.entry(self.next).write_volatile(entry) };
        self.next = self.next.wrapping_add(1);
    }
}

impl<T> Drop for Batch<'_, T> {
    #[inline(always)]
    fn drop(&mut self) {
        self.producer.staged = self.next;
    }
}

/// A ring that the kernel fills. Entries are taken, then released together.
#[derive(Debug)]
pub struct Consumer<T> {
    ring: Mapped<T>,
    /// Index of the next entry to take.
    taken: u32,
    /// The kernel's index when last read.
    produced: u32,
}

impl<T: Plain> Consumer<T> {
    pub(super) fn new(ring: Mapped<T>) -> Self {
        Consumer { ring, taken: 0, produced: 0 }
    }

    /// Takes the next entry, if there is one.
    #[inline]
    pub fn take(&mut self) -> Option<T> {
        if self.taken == self.produced {
            // Acquire pairs with the kernel's write barrier between entries and index.
            self.produced = self.ring.producer().load(Ordering::Acquire);
            if self.taken == self.produced {
                return None;
            }
        }
        // SAFETY: inside the ring, whatever the index. Read once, as a value.
        let entry = unsafe { self.ring.entry(self.taken).read_volatile() };
        self.taken = self.taken.wrapping_add(1);
        Some(entry)
    }

    /// Takes entries while `wants` returns true for them, at most `most`. Returns their number.
    #[inline(always)]
    pub fn take_while(&mut self, most: usize, mut wants: impl FnMut(T) -> bool) -> usize {
        if self.taken == self.produced {
            self.produced = self.ring.producer().load(Ordering::Acquire);
        }
        let (first, waiting) = (self.taken, self.produced.wrapping_sub(self.taken));
        let most = waiting.min(u32::try_from(most).unwrap_or(u32::MAX));
        let ring = &self.ring;
        let mut count = 0;
        while count < most {
            // SAFETY: as in `take`.
            let entry = unsafe { ring.entry(first.wrapping_add(count)).read_volatile() };
            if !wants(entry) {
                break;
            }
            count += 1;
        }
        self.taken = first.wrapping_add(count);
        count as usize
    }

    /// Releases the taken entries to the kernel.
    #[inline]
    pub fn release(&mut self) {
        // Release: the entries were read before this store (barrier D in net/xdp/xsk_queue.h).
        self.ring.consumer().store(self.taken, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_parts_outside_the_mapping_are_refused() {
        let offsets = |producer, consumer, flags, desc| libc::xdp_ring_offset {
            producer,
            consumer,
            desc,
            flags,
        };
        let usual = offsets(0, 64, 68, 128);
        assert_eq!(mapping_length::<u64>(&usual, 16), Some(128 + 16 * 8));
        for size in [0, 3, u32::MAX] {
            assert_eq!(mapping_length::<u64>(&usual, size), None, "{size} entries");
        }
        for wrong in [
            offsets(u64::MAX - 1, 64, 68, 128),
            offsets(0, 256, 68, 128),
            offsets(0, 64, 66, 128),
            offsets(0, 64, 68, 132),
            offsets(0, 64, 68, u64::MAX),
        ] {
            assert_eq!(mapping_length::<u64>(&wrong, 16), None, "{wrong:?}");
        }
    }
}
