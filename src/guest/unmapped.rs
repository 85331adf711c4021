//! Regions of the memory table that are not mapped: those in a file on a disk (nvdimm, virtio-pmem, ivshmem)
//! or in a read-only file.
//!
//! Invariant: the daemon touches none of their pages, because a page fault could wait for a disk, or for the
//! frontend itself (FUSE). No ring and no buffer can lie in such a region. Its file is closed.

use std::fs::File;

use super::memory::{MemoryError, RegionRequest};
use crate::sys::process::{file_facts, holds_data};

/// A region that is not mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unmapped {
    /// The region as the frontend describes it.
    pub request: RegionRequest,
    /// True if the file is read-only memory, false if it is on a disk.
    pub read_only: bool,
}

impl Unmapped {
    /// Returns the region, unless its file is writable memory, which can be mapped.
    ///
    /// # Errors
    /// A [`MemoryError`] if the descriptor is neither memory, a regular file nor a device, the region is empty,
    /// or an address plus the size overflows.
    pub(super) fn of(request: RegionRequest, file: &File) -> Result<Option<Self>, MemoryError> {
        let read_only = match file_facts(file).map_err(MemoryError::Map)? {
            Some(facts) if facts.writable => return Ok(None),
            Some(_) => true,
            None if holds_data(file).map_err(MemoryError::Map)? => false,
            None => return Err(MemoryError::NotMemory),
        };
        if request.size == 0 {
            return Err(MemoryError::Empty);
        }
        let ends = [request.guest_address, request.frontend_address, request.file_offset];
        if ends.map(|from| from.checked_add(request.size)).contains(&None) {
            return Err(MemoryError::Overflow);
        }
        Ok(Some(Unmapped { request, read_only }))
    }

    /// Returns true if the region contains an address in the frontend's address space.
    pub fn holds(&self, frontend_address: u64) -> bool {
        frontend_address.wrapping_sub(self.request.frontend_address) < self.request.size
    }
}
