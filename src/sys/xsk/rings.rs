//! A socket's rings as views: entries are staged or taken, then handed over all at once.
//!
//! Invariant: a ring's memory is mapped as long as its view lives, and indices never lead outside
//! it, whatever the other side stores there. Entries are values: what an address in one means is
//! the port's business, which finds it in a table of its own before it believes it.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};

/// A ring's memory: two indices, flags, and a power of two of entries.
#[derive(Debug)]
pub(super) struct Mapped {
    start: NonNull<u8>,
    length: usize,
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    entries: NonNull<u8>,
    mask: u32,
}

// SAFETY: the pointers are into a mapping that the value owns, and all of it that the kernel
// writes is read by atomic or volatile access.
unsafe impl Send for Mapped {}

impl Mapped {
    /// Maps the ring of a socket's at `page`, of `size` entries of `entry` bytes.
    pub(super) fn new(
        fd: &OwnedFd,
        offsets: &libc::xdp_ring_offset,
        size: u32,
        entry: usize,
        page: libc::off_t,
    ) -> io::Result<Self> {
        let length = offsets.desc as usize + size as usize * entry;
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
        let place = |offset: u64| {
            assert!(offset as usize + 4 <= length, "the kernel's ring offsets lie in its mapping");
            // SAFETY: inside the mapping, as was just checked.
            unsafe { start.add(offset as usize) }
        };
        Ok(Mapped {
            start,
            length,
            producer: place(offsets.producer).cast(),
            consumer: place(offsets.consumer).cast(),
            flags: place(offsets.flags).cast(),
            entries: place(offsets.desc),
            mask: size - 1,
        })
    }

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

    /// Where the entry of that index is, for entries of type `T`.
    fn entry<T>(&self, index: u32) -> *mut T {
        // SAFETY: `mask` keeps the index inside the ring that `new` mapped for entries of this
        // size: only Producer<T> and Consumer<T> of one T are made from it.
        unsafe { self.entries.cast::<T>().add((index & self.mask) as usize).as_ptr() }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: `new` mapped it, and nothing refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// A ring that we fill: entries are staged, then shown to the kernel all at once.
#[derive(Debug)]
pub struct Producer<T> {
    ring: Mapped,
    /// Index of the entry to stage next.
    staged: u32,
    /// The kernel's index as it was last read.
    consumed: u32,
    entries: PhantomData<T>,
}

impl<T: Copy> Producer<T> {
    pub(super) fn new(ring: Mapped) -> Self {
        Producer { ring, staged: 0, consumed: 0, entries: PhantomData }
    }

    /// Entries that can be staged now.
    #[inline]
    pub fn room(&mut self) -> u32 {
        let size = self.ring.mask + 1;
        let used = self.staged.wrapping_sub(self.consumed);
        if used < size {
            return size - used;
        }
        // Acquire: the kernel has read the entries that its index covers.
        self.consumed = self.ring.consumer().load(Ordering::Acquire);
        size.saturating_sub(self.staged.wrapping_sub(self.consumed))
    }

    /// Puts an entry behind the others.
    ///
    /// # Panics
    /// If there is no room.
    #[inline]
    pub fn stage(&mut self, entry: T) {
        assert!(self.room() > 0, "an entry is staged only where there is room");
        // SAFETY: inside the ring; the kernel does not read it before `submit`.
        unsafe { self.ring.entry::<T>(self.staged).write_volatile(entry) };
        self.staged = self.staged.wrapping_add(1);
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

/// A ring that the kernel fills: entries are taken, then given back all at once.
#[derive(Debug)]
pub struct Consumer<T> {
    ring: Mapped,
    /// Index of the entry to take next.
    taken: u32,
    /// The kernel's index as it was last read.
    produced: u32,
    entries: PhantomData<T>,
}

impl<T: Copy> Consumer<T> {
    pub(super) fn new(ring: Mapped) -> Self {
        Consumer { ring, taken: 0, produced: 0, entries: PhantomData }
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
        let entry = unsafe { self.ring.entry::<T>(self.taken).read_volatile() };
        self.taken = self.taken.wrapping_add(1);
        Some(entry)
    }

    /// Gives back to the kernel the entries that were taken.
    #[inline]
    pub fn release(&mut self) {
        // Release: they were read before (barrier D in net/xdp/xsk_queue.h).
        self.ring.consumer().store(self.taken, Ordering::Release);
    }
}
