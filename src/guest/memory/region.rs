//! One region of the guest's memory: how the frontend describes it, and where it is mapped.
//!
//! Invariant: a mapping holds all bytes of its part of the file for as long as it lives, and the file had
//! them when it was mapped. Pointers into it stay valid even if the file is cut short afterwards: touching
//! what has gone raises SIGBUS, upon which [other memory](Mapping::replace_with_zeros) takes its place.

use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use super::MemoryError;
use crate::guest::quota::{Allowance, Reservation};
use crate::sys::process::file_facts;
use crate::sys::segment::Segment;

/// A region as the frontend describes it: `VhostUserMemoryRegion` of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionRequest {
    /// First guest-physical address.
    pub guest_address: u64,
    /// Size in bytes.
    pub size: u64,
    /// First address in the frontend's own address space, which SET_VRING_ADDR speaks of.
    pub frontend_address: u64,
    /// Where in the file the region starts, in bytes.
    pub file_offset: u64,
}

impl RegionRequest {
    pub(super) fn overlaps(&self, other: &RegionRequest) -> bool {
        let meet = |a: u64, b: u64| a < b + other.size && b < a + self.size;
        meet(self.guest_address, other.guest_address)
            || meet(self.frontend_address, other.frontend_address)
    }

    /// Whether it is the same region. The file offset does not count: frontends may leave it out.
    pub(super) fn is(&self, other: &RegionRequest) -> bool {
        RegionRequest { file_offset: other.file_offset, ..*self } == *other
    }
}

/// A part of a file of shared memory, mapped.
#[derive(Debug)]
pub(in crate::guest) struct Mapping {
    /// It may start before the part: offsets are rounded down to (huge) pages.
    region: MmapRegion,
    /// Offset of the part's first byte in the mapping.
    lead: usize,
    /// Size in bytes of the pages that the file consists of.
    page: u64,
    /// The file can't be shrunk.
    pub(super) sealed: bool,
    /// Its bytes, as the port's limit counts them.
    reserved: Reservation,
}

impl Mapping {
    /// Maps `size` bytes of `file` from `offset` on.
    pub(in crate::guest) fn new(
        file: File,
        offset: u64,
        size: u64,
        allowance: &Allowance,
    ) -> Result<Self, MemoryError> {
        if size == 0 {
            return Err(MemoryError::Empty);
        }
        let end = offset.checked_add(size).ok_or(MemoryError::Overflow)?;
        let facts = file_facts(&file).map_err(MemoryError::Map)?.ok_or(MemoryError::NotMemory)?;
        if !facts.writable {
            return Err(MemoryError::ReadOnly);
        }
        if end > facts.size {
            return Err(MemoryError::PastEndOfFile { end, file_size: facts.size });
        }
        let start = offset - offset % facts.alignment;
        let length =
            (end - start).checked_next_multiple_of(facts.alignment).ok_or(MemoryError::Overflow)?;
        let reserved = allowance.reserve(length)?;
        let region = MmapRegionBuilder::new(length as usize)
            .with_file_offset(FileOffset::new(file, start))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|error| MemoryError::Map(std::io::Error::other(error)))?;
        let lead = (offset - start) as usize;
        Ok(Mapping { region, lead, page: facts.alignment, sealed: facts.sealed, reserved })
    }

    /// Where the part's first byte is mapped.
    pub(in crate::guest) fn start(&self) -> NonNull<u8> {
        let mapping = NonNull::new(self.region.as_ptr()).expect("nothing is mapped at 0");
        // SAFETY: the mapping is longer than what leads to the part (`new`).
        unsafe { mapping.add(self.lead) }
    }

    /// The file, and where in it the part starts.
    pub(in crate::guest) fn source(&self) -> (&Arc<File>, u64) {
        let file = self.region.file_offset().expect("every part is mapped from a file");
        (file.arc(), file.start() + self.lead as u64)
    }

    /// Mapped bytes, with those that alignment adds.
    pub(in crate::guest) fn bytes(&self) -> u64 {
        self.reserved.bytes()
    }

    pub(super) fn holds(&self, address: usize) -> bool {
        address.wrapping_sub(self.region.as_ptr() as usize) < self.region.size()
    }

    /// Puts empty memory in its place; says whether that worked. Async-signal-safe.
    pub(super) fn replace_with_zeros(&self) -> bool {
        // SAFETY: the range is exactly the mapping's own, which stays mapped, only with other memory
        // behind it, until it is dropped. Pointers into it stay valid.
        let replaced = unsafe {
            libc::mmap(
                self.region.as_ptr().cast(),
                self.region.size(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        replaced != libc::MAP_FAILED
    }
}

/// One mapped region.
#[derive(Debug)]
pub(super) struct Region {
    pub(super) request: RegionRequest,
    pub(super) mapping: Mapping,
}

impl Region {
    pub(super) fn map(
        request: RegionRequest,
        file: File,
        allowance: &Allowance,
    ) -> Result<Self, MemoryError> {
        let RegionRequest { guest_address, size, frontend_address, file_offset } = request;
        let ends = [guest_address, frontend_address].map(|from| from.checked_add(size));
        if size > 0 && ends.contains(&None) {
            return Err(MemoryError::Overflow);
        }
        Ok(Region { request, mapping: Mapping::new(file, file_offset, size, allowance)? })
    }

    pub(super) fn window(&self) -> Window<'_> {
        let RegionRequest { guest_address, size, .. } = self.request;
        // SAFETY: the mapping holds `size` bytes from its start on, for as long as it lives.
        let mapped = unsafe { Segment::new(self.mapping.start(), size as usize) };
        Window { guest_address, mapped }
    }
}

/// A region's mapping: to map the same memory once more elsewhere. All of it lies in its file, which
/// was memory when it was mapped.
#[derive(Debug, Clone, Copy)]
pub struct Mapped<'a> {
    pub(super) mapping: &'a Mapping,
}

impl<'a> Mapped<'a> {
    /// First address of the mapping in this process.
    pub fn start(&self) -> usize {
        self.mapping.region.as_ptr() as usize
    }

    /// Its length in bytes, a multiple of [`page`](Self::page).
    pub fn length(&self) -> usize {
        self.mapping.region.size()
    }

    /// The file, and where in it the mapping starts, a multiple of [`page`](Self::page).
    pub fn source(&self) -> (&'a File, u64) {
        let file = self.mapping.region.file_offset().expect("every region is mapped from a file");
        (file.file(), file.start())
    }

    /// Size in bytes of the pages that the file consists of.
    pub fn page(&self) -> u64 {
        self.mapping.page
    }
}

/// A region as look-ups need it, to be kept at hand: nearly all of a guest's buffers lie in one.
/// It borrows the table that it is from.
#[derive(Debug, Clone, Copy)]
pub(in crate::guest) struct Window<'mem> {
    guest_address: u64,
    mapped: Segment<'mem>,
}

impl<'mem> Window<'mem> {
    /// No region.
    pub(in crate::guest) const EMPTY: Self = Window { guest_address: 0, mapped: Segment::EMPTY };

    /// The memory from `address` to the end of the region, if it is in it.
    #[inline]
    pub(in crate::guest) fn at(&self, address: u64) -> Option<Segment<'mem>> {
        let offset = address.wrapping_sub(self.guest_address) as usize;
        (offset < self.mapped.len()).then(|| self.mapped.skip(offset))
    }
}
