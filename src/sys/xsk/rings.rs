//! A socket's rings as views: entries are staged or taken, then handed over all at once.
//!
//! Invariant: a ring's memory is mapped as long as its view lives, and indices never lead outside
//! it, whatever the other side stores there. Entries are values: what an address in one means is
//! the port's business, which finds it in a table of its own before it believes it.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::sys::Plain;

/// A ring's memory: two indices, flags, and a power of two of entries.
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

// SAFETY: the pointers are into a mapping that the value owns, and all of it that the kernel
// writes is read by atomic or volatile access.
unsafe impl<T: Plain> Send for Mapped<T> {}

/// Length in bytes of the mapping of a ring of `size` entries; nothing if the size is no power of two,
/// or part of the ring is not aligned, or not in the mapping.
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
    /// Maps the ring of a socket's at `page`, of `size` entries.
    ///
    /// # Errors
    /// `InvalidInput` if the size is no power of two; those of mmap, which knows how long a ring is.
    pub(super) fn new(
        fd: &OwnedFd,
        offsets: &libc::xdp_ring_offset,
        size: u32,
        page: libc::off_t,
    ) -> io::Result<Self> {
        let length = mapping_length::<T>(offsets, size).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping anywhere, owned by the value made below.
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
        // SAFETY: inside the mapping, says `mapping_length`.
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
        // SAFETY: an aligned word of the mapping, which `self` keeps.
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

    /// Where the entry of that index is.
    fn entry(&self, index: u32) -> *mut T {
        // SAFETY: `mask` keeps the index inside the ring that `new` mapped.
        unsafe { self.entries.add((index & self.mask) as usize).as_ptr() }
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: `new` mapped it, and nothing refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// A ring that we fill: entries are staged, then shown to the kernel all at once.
#[derive(Debug)]
pub struct Producer<T> {
    ring: Mapped<T>,
    /// Index of the entry to stage next.
    staged: u32,
    /// The kernel's index as it was last read.
    consumed: u32,
}

impl<T: Plain> Producer<T> {
    pub(super) fn new(ring: Mapped<T>) -> Self {
        Producer { ring, staged: 0, consumed: 0 }
    }

    /// Entries that can be staged now: as many as are `wanted`, if there is room for them.
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

    /// Puts an entry behind the others.
    ///
    /// # Panics
    /// If there is no room.
    #[inline]
    pub fn stage(&mut self, entry: T) {
        self.batch(1).stage(entry);
    }

    /// Entries that are put behind the others, up to `most` of them.
    ///
    /// # Panics
    /// If there is no room for as many.
    #[inline(always)]
    pub fn batch(&mut self, most: u32) -> Batch<'_, T> {
        assert!(self.room(most) >= most, "entries are staged only where there is room");
        Batch { next: self.staged, end: self.staged.wrapping_add(most), producer: self }
    }

    /// Shows the kernel what was staged.
    #[inline]
    pub fn submit(&mut self) {
        // Release pairs with the kernel's read barrier behind its load of the index (barriers B
        // and C in net/xdp/xsk_queue.h).
        self.ring.producer().store(self.staged, Ordering::Release);
    }

    /// Entries that the kernel has not taken yet.
    #[inline]
    pub fn pending(&mut self) -> u32 {
        self.consumed = self.ring.consumer().load(Ordering::Acquire);
        self.staged.wrapping_sub(self.consumed)
    }

    /// Whether the kernel is to be told of new entries.
    #[inline]
    pub fn needs_wakeup(&self) -> bool {
        self.ring.needs_wakeup()
    }
}

/// Entries that are being staged.
#[derive(Debug)]
pub struct Batch<'r, T> {
    producer: &'r mut Producer<T>,
    next: u32,
    end: u32,
}

impl<T: Plain> Batch<'_, T> {
    /// Puts an entry behind the others.
    ///
    /// # Panics
    /// If it is one more than there was to be.
    #[inline(always)]
    pub fn stage(&mut self, entry: T) {
        assert!(self.next != self.end, "a batch has an end");
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

/// A ring that the kernel fills: entries are taken, then given back all at once.
#[derive(Debug)]
pub struct Consumer<T> {
    ring: Mapped<T>,
    /// Index of the entry to take next.
    taken: u32,
    /// The kernel's index as it was last read.
    produced: u32,
}

impl<T: Plain> Consumer<T> {
    pub(super) fn new(ring: Mapped<T>) -> Self {
        Consumer { ring, taken: 0, produced: 0 }
    }

    /// The next entry, if there is one.
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

    /// Takes entries while `wants` them, up to `most`; returns how many.
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

    /// Gives back to the kernel the entries that were taken.
    #[inline]
    pub fn release(&mut self) {
        // Release: they were read before (barrier D in net/xdp/xsk_queue.h).
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
