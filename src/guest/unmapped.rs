//! Regions of the table that are not mapped: those in a file on a disk (nvdimm, virtio-pmem, ivshmem), or in
//! one that can't be written to. A touched page could wait for a disk, or for the frontend itself (FUSE).
//! No ring and no buffer can lie there. Their files are not kept.

use std::fs::File;

use super::memory::{MemoryError, RegionRequest};
use crate::sys::process::{file_facts, holds_data};

/// A region that is not mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unmapped {
    /// The region.
    pub request: RegionRequest,
    /// Whether its file is memory, which can't be written to; else it is on a disk.
    pub read_only: bool,
}

impl Unmapped {
    /// The region as one that is not mapped, if its file asks for that.
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

    /// Whether an address of the frontend's lies there.
    pub fn holds(&self, frontend_address: u64) -> bool {
        frontend_address.wrapping_sub(self.request.frontend_address) < self.request.size
    }
}
