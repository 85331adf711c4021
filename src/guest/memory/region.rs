//! One region of guest memory: the frontend's description, and the mapping.
//!
//! Invariant: a mapping covers all bytes of its part of the file for as long as it lives, and the file had
//! all of them when it was mapped. Pointers into the mapping stay valid even if the file is truncated later:
//! an access then raises SIGBUS, and the handler maps [zeros](Mapping::replace_with_zeros) at the same place.

use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use super::MemoryError;
use crate::guest::quota::{Allowance, Reservation};
use crate::sys::process::file_facts;
use crate::sys::segment::Segment;

/// The frontend's description of a region: `VhostUserMemoryRegion` of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionRequest {
    /// First guest-physical address.
    pub guest_address: u64,
    /// Size in bytes.
    pub size: u64,
    /// First address in the frontend's address space, which SET_VRING_ADDR uses.
    pub frontend_address: u64,
    /// Offset of the region's first byte in its file, in bytes.
    pub file_offset: u64,
}

impl RegionRequest {
    /// Returns true if the regions share a guest or a frontend address.
    pub(super) fn overlaps(&self, other: &RegionRequest) -> bool {
        let meet = |a: u64, b: u64| a < b + other.size && b < a + self.size;
        meet(self.guest_address, other.guest_address)
            || meet(self.frontend_address, other.frontend_address)
    }

    /// Returns true if both describe one region. Ignores the file offset, which frontends may leave out.
    pub(super) fn is(&self, other: &RegionRequest) -> bool {
        RegionRequest { file_offset: other.file_offset, ..*self } == *other
    }
}

/// A mapped part of a file of shared memory.
#[derive(Debug)]
pub(in crate::guest) struct Mapping {
    /// The mapping. It may start before the part: offsets are rounded down to (huge) pages.
    region: MmapRegion,
    /// Offset of the part's first byte in the mapping, in bytes.
    lead: usize,
    /// Size in bytes of the file's pages.
    page: u64,
    /// True if the file is sealed against shrinking.
    pub(super) sealed: bool,
    /// The mapping's bytes, which count towards the port's limit.
    reserved: Reservation,
}

impl Mapping {
    /// Maps `size` bytes of `file`, from `offset`.
    ///
    /// # Errors
    /// A [`MemoryError`] if the part is empty or beyond the file's end, the file is not writable shared memory,
    /// or a limit is reached.
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

    /// Returns where the part's first byte is mapped.
    pub(in crate::guest) fn start(&self) -> NonNull<u8> {
        let mapping = NonNull::new(self.region.as_ptr()).expect("nothing is mapped at 0");
        // SAFETY: `new` maps from `lead` bytes before the part to the part's end or beyond, so the result is in
        // the mapping. Neither field changes.
        unsafe { mapping.add(self.lead) }
    }

    /// Returns the file, and the offset in bytes at which the part starts.
    pub(in crate::guest) fn source(&self) -> (&Arc<File>, u64) {
        let file = self.region.file_offset().expect("every part is mapped from a file");
        (file.arc(), file.start() + self.lead as u64)
    }

    /// Returns the mapped bytes, including those that page alignment adds.
    pub(in crate::guest) fn bytes(&self) -> u64 {
        self.reserved.bytes()
    }

    /// Returns true if an address in this process is in the mapping.
    pub(super) fn holds(&self, address: usize) -> bool {
        address.wrapping_sub(self.region.as_ptr() as usize) < self.region.size()
    }

    /// Maps zeros in the mapping's place; returns false if the kernel refuses. Async-signal-safe.
    pub(super) fn replace_with_zeros(&self) -> bool {
        // SAFETY: the range is exactly that of `region`, which owns it until it is dropped. The range stays
        // mapped, with other memory behind it, so pointers into it stay valid.
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
    /// Maps the region. Fails as [`Mapping::new`], or if an address plus the size exceeds 64 bits.
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

    /// Returns the region as look-ups use it.
    pub(super) fn window(&self) -> Window<'_> {
        let RegionRequest { guest_address, size, .. } = self.request;
        // SAFETY: `map` mapped `size` bytes from the start, readable and writable. The mapping lives as long as
        // the region, which the window borrows. A truncated file makes an access raise SIGBUS, which the
        // handler of `guest::sigbus` resolves.
        let mapped = unsafe { Segment::new(self.mapping.start(), size as usize) };
        Window { guest_address, mapped }
    }
}

/// A region's mapping, from which the same memory can be mapped a second time. All of it lay in its file of
/// shared memory when it was mapped.
#[derive(Debug, Clone, Copy)]
pub struct Mapped<'a> {
    pub(super) mapping: &'a Mapping,
}

impl<'a> Mapped<'a> {
    /// Returns the first address of the mapping in this process.
    pub fn start(&self) -> usize {
        self.mapping.region.as_ptr() as usize
    }

    /// Returns the mapping's length in bytes, a multiple of [`page`](Self::page).
    pub fn length(&self) -> usize {
        self.mapping.region.size()
    }

    /// Returns the file, and the offset in bytes at which the mapping starts, a multiple of
    /// [`page`](Self::page).
    pub fn source(&self) -> (&'a File, u64) {
        let file = self.mapping.region.file_offset().expect("every region is mapped from a file");
        (file.file(), file.start())
    }

    /// Returns the size in bytes of the file's pages.
    pub fn page(&self) -> u64 {
        self.mapping.page
    }
}

/// A region as look-ups use it, borrowed from its table. Callers cache it, because nearly all of a guest's
/// buffers lie in one region.
#[derive(Debug, Clone, Copy)]
pub(in crate::guest) struct Window<'mem> {
    guest_address: u64,
    mapped: Segment<'mem>,
}

impl<'mem> Window<'mem> {
    /// No region.
    pub(in crate::guest) const EMPTY: Self = Window { guest_address: 0, mapped: Segment::EMPTY };

    /// Returns the memory from `address` to the end of the region, if `address` is in the region.
    #[inline]
    pub(in crate::guest) fn at(&self, address: u64) -> Option<Segment<'mem>> {
        let offset = address.wrapping_sub(self.guest_address) as usize;
        (offset < self.mapped.len()).then(|| self.mapped.skip(offset))
    }
}
