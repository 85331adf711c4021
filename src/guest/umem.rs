//! Memory of AF_XDP sockets: a private bounce area and files such as guest memory, in one range of addresses.
//!
//! Invariant: the whole range stays mapped for reading and writing while the value lives. The kernel shares
//! all of the range, the guest the files' part. So all access is by copies, through [`Segment`]s.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

use super::memory::Mapped;
use super::quota::Reservation;
use crate::sys::segment::Segment;
use crate::sys::xsk::Registrable;

/// A range of memory for AF_XDP sockets.
#[derive(Debug)]
pub struct Umem {
    /// Outer mapping and its length in bytes: the range, and space to align its parts to huge pages.
    reserved: (NonNull<u8>, usize),
    start: NonNull<u8>,
    length: usize,
    /// Length of the bounce area in bytes.
    bounce_area: usize,
    /// Offsets of the mapped files in bytes.
    parts: Vec<Range<usize>>,
    /// Count of the mapped bytes towards the limit of the process.
    _reservation: Reservation,
}

// SAFETY: the value owns its mappings, and hands out only Segments, which are read and written by
// copies.
unsafe impl Send for Umem {}
// SAFETY: as above; concurrent copies may mix bytes, as they may with the guest or the kernel.
unsafe impl Sync for Umem {}

// SAFETY: `new` has mapped `length` bytes from `start`, and only `drop` unmaps them.
unsafe impl Registrable for Umem {
    fn start(&self) -> usize {
        self.start.addr().get()
    }

    fn length(&self) -> usize {
        self.length
    }
}

impl Umem {
    /// Maps a bounce area of at least `bounce_area` bytes, then the files of `parts` in the order given, then
    /// `pad` bytes. Parts with the largest pages should come first, which leaves the smallest gaps.
    ///
    /// # Errors
    /// Those of mmap(2); the limit of the process on mapped bytes; `InvalidInput` if the range exceeds the
    /// address space.
    pub fn new(bounce_area: usize, parts: &[Mapped<'_>], pad: usize) -> io::Result<Self> {
        let largest = parts.iter().map(|part| part.page() as usize).max().unwrap_or(PAGE);
        let Plan { bounce_area, lead, places, length, reserved } = Plan::new(
            bounce_area,
            parts.iter().map(|part| (part.length(), part.page() as usize)),
            pad,
        )
        .ok_or(io::ErrorKind::InvalidInput)?;
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
        // SAFETY: `skip` is less than `largest`, and the reservation has `largest` bytes more than the range.
        let start = unsafe { whole.add(skip + lead) };
        let umem = Umem {
            reserved: (whole, reserved),
            start,
            length,
            bounce_area,
            parts: places,
            _reservation: reservation,
        };
        for (part, place) in parts.iter().zip(&umem.parts) {
            let (file, offset) = part.source();
            // SAFETY: MAP_FIXED replaces pages of the reservation, which is ours alone and contains `place`.
            // The length is a multiple of the file's page size, so the kernel maps no more. On an error, the
            // drop of `umem` unmaps everything.
            let mapped = unsafe {
                libc::mmap(
                    umem.start.add(place.start).as_ptr().cast(),
                    part.length(),
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                    file.as_raw_fd(),
                    offset as libc::off_t,
                )
            };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(umem)
    }

    /// Returns the offsets of each part from the start, in bytes.
    pub fn parts(&self) -> &[Range<usize>] {
        &self.parts
    }

    /// Returns `length` bytes of the bounce area at `offset`.
    ///
    /// # Panics
    /// If these bytes are not in the bounce area.
    #[inline]
    pub fn bounce_area(&self, offset: usize, length: usize) -> Segment<'_> {
        let fits = offset.checked_add(length).is_some_and(|end| end <= self.bounce_area);
        assert!(fits, "the bounce area has {} bytes", self.bounce_area);
        // SAFETY: inside the mapping, which lives as long as `self`.
        unsafe { Segment::new(self.start.add(offset), length) }
    }
}

/// Page size of the bounce area in bytes.
const PAGE: usize = 4096;

/// Layout of a range, in bytes from its start.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    bounce_area: usize,
    /// Bytes between a huge-page boundary and the range, so that the bounce area ends at such a boundary.
    lead: usize,
    /// Offsets of the parts.
    places: Vec<Range<usize>>,
    length: usize,
    /// Bytes to map, so that the lead can begin at a huge-page boundary.
    reserved: usize,
}

impl Plan {
    /// Plans a range for `parts`, each a length and a page size in bytes. Returns `None` if the range exceeds
    /// the address space.
    fn new(
        bounce_area: usize,
        parts: impl Iterator<Item = (usize, usize)> + Clone,
        pad: usize,
    ) -> Option<Self> {
        let largest = parts.clone().map(|(_, page)| page).max().unwrap_or(PAGE);
        let bounce_area = bounce_area.checked_next_multiple_of(PAGE)?;
        let mut end = bounce_area.checked_next_multiple_of(largest)?;
        let lead = end - bounce_area;
        let mut places = Vec::new();
        for (length, page) in parts {
            let start = end.checked_next_multiple_of(page)?;
            end = start.checked_add(length)?;
            places.push(start - lead..end - lead);
        }
        let length = (end - lead).checked_add(pad)?.checked_next_multiple_of(PAGE)?;
        let reserved = lead.checked_add(length)?.checked_add(largest)?;
        Some(Plan { bounce_area, lead, places, length, reserved })
    }
}

impl Drop for Umem {
    fn drop(&mut self) {
        // SAFETY: `new` mapped the range, and every Segment that refers to it borrows `self`.
        unsafe { libc::munmap(self.reserved.0.as_ptr().cast(), self.reserved.1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::catch_unwind;

    #[test]
    fn segments_outside_the_bounce_area_panic() {
        let umem = Umem::new(2 * PAGE, &[], PAGE).unwrap();
        assert_eq!(umem.bounce_area(PAGE, PAGE).len(), PAGE);
        for (offset, length) in [(PAGE, PAGE + 1), (2 * PAGE, 1), (usize::MAX, 2), (1, usize::MAX)]
        {
            assert!(catch_unwind(|| umem.bounce_area(offset, length).len()).is_err());
        }
    }

    #[test]
    fn ranges_beyond_the_address_space_are_refused() {
        for (bounce_area, pad) in [(usize::MAX, 0), (usize::MAX - 4095, PAGE), (PAGE, usize::MAX)] {
            assert!(Umem::new(bounce_area, &[], pad).is_err(), "{bounce_area} and {pad}");
        }
        let large = 2 << 20;
        let parts = [(large, large), (PAGE, PAGE)].into_iter();
        let plan = Plan::new(PAGE, parts, 1).unwrap();
        assert_eq!(plan.lead, large - PAGE);
        assert_eq!(plan.places, [PAGE..PAGE + large, PAGE + large..2 * PAGE + large]);
        assert_eq!((plan.length, plan.reserved), (3 * PAGE + large, 2 * PAGE + 3 * large));
        assert_eq!(Plan::new(PAGE, [(usize::MAX, PAGE)].into_iter(), 0), None);
    }
}
