//! The memory of AF_XDP sockets: a private arena, and files such as guest memory beside it, in
//! one range of addresses.
//!
//! Invariant: all of the range is mapped for reading and writing as long as the value lives. What
//! is in it is shared with the kernel, and the files' part with the guest: it is reached as
//! [`Segment`]s, by copying.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

use crate::guest::{Reservation, Segment};

/// A part of a file that is mapped into the range.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// The file, open for reading and writing.
    pub file: &'a File,
    /// Where its part starts in bytes, a multiple of `alignment`.
    pub offset: u64,
    /// Length of the part in bytes, a multiple of `alignment`.
    pub length: usize,
    /// Size of the file's pages in bytes.
    pub alignment: u64,
}

/// A range of memory for AF_XDP sockets.
#[derive(Debug)]
pub struct Umem {
    /// The mapping that all others lie in, and its length: the range, with what is left over of
    /// the first huge page.
    reserved: (NonNull<u8>, usize),
    start: NonNull<u8>,
    length: usize,
    arena: usize,
    parts: Vec<Range<usize>>,
    /// Its share of the address space of the process.
    _reservation: Reservation,
}

// SAFETY: the value owns its mappings, and hands out only Segments, which are read and written by
// copies.
unsafe impl Send for Umem {}
// SAFETY: as above; concurrent copies may mix bytes, as they may with the guest or the kernel.
unsafe impl Sync for Umem {}

impl Umem {
    /// Maps an arena of at least `arena` bytes, `parts` behind it in the order given, and `pad`
    /// bytes behind them. The parts should come with the largest pages first, so that little is
    /// lost between them.
    ///
    /// # Errors
    /// Those of mmap, and the limit of the process on mapped bytes.
    pub fn new(arena: usize, parts: &[Part<'_>], pad: usize) -> io::Result<Self> {
        let largest = parts.iter().map(|part| part.alignment as usize).max().unwrap_or(PAGE);
        let arena = arena.next_multiple_of(PAGE);
        let mut end = arena.next_multiple_of(largest);
        // What the arena leaves of the first large page is not part of the range.
        let lead = end - arena;
        let mut places = Vec::new();
        for part in parts {
            let start = end.next_multiple_of(part.alignment as usize);
            end = start + part.length;
            places.push(start - lead..end - lead);
        }
        let length = (end - lead + pad).next_multiple_of(PAGE);
        let reserved = lead + length + largest;
        let reservation = Reservation::of_process(reserved as u64).map_err(io::Error::other)?;
        // SAFETY: a new mapping anywhere; nothing else refers to it.
        let whole = unsafe {
            libc::mmap(
                ptr::null_mut(),
                reserved,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if whole == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let whole = NonNull::new(whole.cast::<u8>()).expect("mmap does not map at address 0");
        let skip = whole.addr().get().next_multiple_of(largest) - whole.addr().get();
        // SAFETY: skip is less than `largest`, and the reservation has that much to spare.
        let start = unsafe { whole.add(skip + lead) };
        let umem = Umem {
            reserved: (whole, reserved),
            start,
            length,
            arena,
            parts: places,
            _reservation: reservation,
        };
        for (part, place) in parts.iter().zip(&umem.parts) {
            // SAFETY: MAP_FIXED replaces pages of the reservation, which is ours alone, and of
            // which `place` is a part. Whoever fails drops `umem`, which unmaps all of it.
            let mapped = unsafe {
                libc::mmap(
                    umem.start.add(place.start).as_ptr().cast(),
                    part.length,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    part.file.as_raw_fd(),
                    part.offset as libc::off_t,
                )
            };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(umem)
    }

    /// Its first address in this process.
    pub fn start(&self) -> usize {
        self.start.addr().get()
    }

    /// Length in bytes.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Where each part lies, as offsets from the start.
    pub fn parts(&self) -> &[Range<usize>] {
        &self.parts
    }

    /// `length` bytes of the arena at `offset`.
    ///
    /// # Panics
    /// If they are not in the arena.
    #[inline]
    pub fn arena(&self, offset: usize, length: usize) -> Segment<'_> {
        assert!(offset + length <= self.arena, "the arena has {} bytes", self.arena);
        // SAFETY: inside the mapping, which lives as long as `self`.
        unsafe { Segment::new(self.start.add(offset), length) }
    }
}

/// Size of a page that an arena consists of, in bytes.
const PAGE: usize = 4096;

impl Drop for Umem {
    fn drop(&mut self) {
        // SAFETY: `new` mapped it, and every Segment that refers to it borrowed `self`.
        unsafe { libc::munmap(self.reserved.0.as_ptr().cast(), self.reserved.1) };
    }
}
