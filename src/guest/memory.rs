//! The guest's memory as the frontend shares it: a table of regions, each mapped once.
//!
//! Invariant: a region in the table lies wholly inside its file as of the time it was mapped, and
//! overlaps no other region, neither in the guest's nor in the frontend's address space. A table
//! is never changed: adding or removing a region makes a new one that shares the mappings.
//!
//! Some regions are in the table and are [not mapped](super::unmapped).

mod error;
mod region;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::GuestAddress;

use super::dirty::DirtyLog;
use super::inflight::Inflight;
use super::quota::{Allowance, MemoryQuota};
use super::unmapped::Unmapped;
use crate::sys::segment::Segment;

pub use error::MemoryError;
use region::Region;
pub use region::{Mapped, RegionRequest};
pub(super) use region::{Mapping, Window};

/// Regions that a table can hold: what QEMU and cloud-hypervisor can use of the protocol's
/// CONFIGURE_MEM_SLOTS.
pub const MAX_SLOTS: usize = 509;

/// The table of regions that one session works with.
#[derive(Debug, Clone, Default)]
pub struct GuestMemory {
    /// In the order of their guest addresses.
    regions: Vec<Arc<Region>>,
    unmapped: Vec<Unmapped>,
    /// Some of it has gone. Tables that share regions share this.
    lost: Arc<AtomicBool>,
    /// Where it is noted what is written.
    log: Option<Arc<DirtyLog>>,
    /// Where it is noted which chains are in flight.
    inflight: Option<Arc<Inflight>>,
    /// The port's limit on mapped bytes.
    quota: Arc<MemoryQuota>,
}

impl GuestMemory {
    /// An empty table whose mappings count towards a port's limit.
    pub fn within(quota: Arc<MemoryQuota>) -> Self {
        GuestMemory { quota, ..GuestMemory::default() }
    }

    /// Makes a table of all `requests` at once, with no limit but the process's.
    pub fn map(
        requests: impl IntoIterator<Item = (RegionRequest, File)>,
    ) -> Result<Self, MemoryError> {
        GuestMemory::default().replaced(requests)
    }

    /// Makes a table of all `requests` in place of this one (SET_MEM_TABLE). The port's limit holds for
    /// the new table alone, so that a table can always be replaced by one of its own size.
    pub fn replaced(
        &self,
        requests: impl IntoIterator<Item = (RegionRequest, File)>,
    ) -> Result<Self, MemoryError> {
        let allowance = Allowance::new(&self.quota, self.bytes());
        let mut memory = GuestMemory::within(self.quota.clone());
        for (request, file) in requests {
            memory = memory.with_charged(request, file, &allowance)?;
        }
        match memory.unmapped[..] {
            // Nothing could ever run there.
            [Unmapped { read_only, .. }, ..] if memory.regions.is_empty() => {
                Err(if read_only { MemoryError::ReadOnly } else { MemoryError::NotMemory })
            }
            _ => Ok(memory),
        }
    }

    /// The port's limit on mapped bytes.
    pub fn quota(&self) -> &Arc<MemoryQuota> {
        &self.quota
    }

    /// Mapped bytes of all regions.
    fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.mapping.bytes()).sum()
    }

    /// This table and one more region (ADD_MEM_REG).
    pub fn with(&self, request: RegionRequest, file: File) -> Result<Self, MemoryError> {
        self.with_charged(request, file, &Allowance::new(&self.quota, 0))
    }

    fn with_charged(
        &self,
        request: RegionRequest,
        file: File,
        allowance: &Allowance,
    ) -> Result<Self, MemoryError> {
        if self.len() >= MAX_SLOTS {
            return Err(MemoryError::NoSlot);
        }
        let overlaps = || {
            let mut others = self.requests();
            others.any(|other| other.overlaps(&request)).then_some(MemoryError::Overlap)
        };
        if let Some(region) = Unmapped::of(request, &file)? {
            let unmapped = [&self.unmapped[..], &[region]].concat();
            return overlaps().map_or(Ok(GuestMemory { unmapped, ..self.clone() }), Err);
        }
        let region = Region::map(request, file, allowance)?;
        if let Some(error) = overlaps() {
            return Err(error);
        }
        let mut regions = self.regions.clone();
        let place =
            regions.partition_point(|other| other.request.guest_address < request.guest_address);
        regions.insert(place, Arc::new(region));
        Ok(GuestMemory { regions, ..self.clone() })
    }

    /// This table without one region (REM_MEM_REG).
    pub fn without(&self, request: RegionRequest) -> Result<Self, MemoryError> {
        let mut without = self.clone();
        without.regions.retain(|region| !region.request.is(&request));
        without.unmapped.retain(|region| !region.request.is(&request));
        if without.len() == self.len() {
            return Err(MemoryError::Unknown);
        }
        Ok(without)
    }

    /// This table, with a log of what is written to it, or with none.
    ///
    /// # Errors
    /// The log has no bits for some of it.
    pub fn logged(&self, log: Option<Arc<DirtyLog>>) -> Result<Self, MemoryError> {
        if let (Some(log), Some(last)) = (&log, self.regions.last()) {
            let end = last.request.guest_address + last.request.size;
            if log.end() < end {
                return Err(MemoryError::LogTooShort { end });
            }
        }
        Ok(GuestMemory { log, ..self.clone() })
    }

    /// This table, with a record of chains in flight, or with none.
    pub fn recorded(&self, inflight: Option<Arc<Inflight>>) -> Self {
        GuestMemory { inflight, ..self.clone() }
    }

    /// Where it is noted which chains are in flight, if it is.
    pub(super) fn inflight(&self) -> Option<&Inflight> {
        self.inflight.as_deref()
    }

    /// Where it is noted what is written, if it is.
    pub fn log(&self) -> Option<&Arc<DirtyLog>> {
        self.log.as_ref()
    }

    /// Notes that `length` bytes were written, from where they are mapped on.
    pub(super) fn mark(&self, log: &DirtyLog, mapped: usize, length: usize) {
        let offset = |region: &Region| mapped.wrapping_sub(region.mapping.start().addr().get());
        let found = self.regions.iter().find(|it| (offset(it) as u64) < it.request.size);
        if let Some(region) = found {
            log.mark(region.request.guest_address + offset(region) as u64, length as u64);
        }
    }

    /// Number of regions.
    pub fn len(&self) -> usize {
        self.regions.len() + self.unmapped.len()
    }

    /// Whether there is no region.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Each region as the frontend has described it.
    fn requests(&self) -> impl Iterator<Item = RegionRequest> {
        let mapped = self.regions.iter().map(|region| region.request);
        mapped.chain(self.unmapped.iter().map(|region| region.request))
    }

    /// The regions that are not mapped.
    pub fn unmapped(&self) -> &[Unmapped] {
        &self.unmapped
    }

    /// Whether nobody can shrink the files of all regions, as their seals say: then no memory can
    /// be [lost](Self::is_lost) by truncation.
    pub fn is_sealed(&self) -> bool {
        self.regions.iter().all(|region| region.mapping.sealed)
    }

    /// Whether some of it was found to have gone (see [`lost`](super::sigbus)).
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Puts empty memory in the place of the region that is mapped at `address`; says whether one
    /// is. Async-signal-safe.
    pub(super) fn replace_with_zeros(&self, address: usize) -> bool {
        let regions = self.regions.iter().map(|region| &region.mapping);
        let others = self.log.iter().map(|log| log.mapping());
        let others = others.chain(self.inflight.iter().map(|inflight| inflight.mapping()));
        let mut mappings = regions.chain(others);
        let Some(mapping) = mappings.find(|mapping| mapping.holds(address)) else { return false };
        self.lost.store(true, Ordering::Relaxed);
        mapping.replace_with_zeros()
    }

    /// Each mapped region as the frontend has described it, and its file.
    pub fn regions(&self) -> impl Iterator<Item = (RegionRequest, &Arc<File>)> {
        self.regions.iter().map(|region| (region.request, region.mapping.source().0))
    }

    /// The mapping of each mapped region.
    pub fn mappings(&self) -> impl Iterator<Item = Mapped<'_>> {
        self.regions.iter().map(|region| Mapped { mapping: &region.mapping })
    }

    /// Turns an address of the frontend's into the guest's.
    pub fn guest_address(&self, frontend_address: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|region| {
            let offset = frontend_address.wrapping_sub(region.request.frontend_address);
            (offset < region.request.size)
                .then(|| GuestAddress(region.request.guest_address + offset))
        })
    }

    /// Whether the `length` bytes from `address` are all zeros in the region's file, or missing there. They
    /// are read from the file: a touch of the mapping would make pages that are missing.
    pub fn is_blank(&self, address: GuestAddress, length: u64) -> bool {
        let behind = self.regions.partition_point(|it| it.request.guest_address <= address.0);
        let Some(region) = self.regions[..behind].last() else { return false };
        let (file, start) = region.mapping.source();
        let first = start + (address.0 - region.request.guest_address);
        let mut page = [0; 4096];
        (0..length).step_by(page.len()).all(|done| {
            let part = &mut page[..(length - done).min(4096) as usize];
            let read = file.read_at(part, first + done).unwrap_or(0);
            part[..read].iter().all(|byte| *byte == 0)
        })
    }

    /// Where the `length` bytes from `address` are mapped, if one region holds them all.
    pub(super) fn resolve(&self, address: GuestAddress, length: u64) -> Option<NonNull<u8>> {
        let found = self.at(address.0, &mut { Window::EMPTY })?;
        (length <= found.len() as u64).then(|| NonNull::new(found.start())).flatten()
    }

    /// The memory from `address` to the end of its region. `last` keeps the region of the last
    /// look-up.
    #[inline]
    pub(super) fn at<'mem>(
        &'mem self,
        address: u64,
        last: &mut Window<'mem>,
    ) -> Option<Segment<'mem>> {
        last.at(address).or_else(|| {
            let behind =
                self.regions.partition_point(|region| region.request.guest_address <= address);
            *last = self.regions[..behind].last()?.window();
            last.at(address)
        })
    }
}

#[cfg(test)]
mod tests;
