//! The memory table: the regions of guest memory that the frontend shares, each mapped once.
//!
//! Invariant: when a region is mapped, it lies wholly inside its file. It overlaps no other region of the
//! table, neither in the guest's nor in the frontend's address space. A table never changes: adding or
//! removing a region makes a new table, which shares the mappings.
//!
//! A table also has the regions that are [not mapped](super::unmapped).

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

/// Maximum number of regions in a table: as many as QEMU and cloud-hypervisor use with the protocol feature
/// CONFIGURE_MEM_SLOTS.
pub const MAX_SLOTS: usize = 509;

/// The memory table of a session.
#[derive(Debug, Clone, Default)]
pub struct GuestMemory {
    /// Mapped regions, in the order of their guest addresses.
    regions: Vec<Arc<Region>>,
    unmapped: Vec<Unmapped>,
    /// True once the SIGBUS handler has replaced a mapping. Tables that share regions share this flag.
    lost: Arc<AtomicBool>,
    /// Dirty log, while the guest migrates.
    log: Option<Arc<DirtyLog>>,
    /// Inflight buffer, if the frontend set one.
    inflight: Option<Arc<Inflight>>,
    /// The port's limit on mapped bytes.
    quota: Arc<MemoryQuota>,
}

impl GuestMemory {
    /// Creates an empty table, whose mappings count towards a port's limit.
    pub fn within(quota: Arc<MemoryQuota>) -> Self {
        GuestMemory { quota, ..GuestMemory::default() }
    }

    /// Creates a table of all `requests`, within the process limit only.
    ///
    /// # Errors
    /// As [`replaced`](Self::replaced).
    pub fn map(
        requests: impl IntoIterator<Item = (RegionRequest, File)>,
    ) -> Result<Self, MemoryError> {
        GuestMemory::default().replaced(requests)
    }

    /// Creates a table of all `requests`, to replace this one (SET_MEM_TABLE). The port's limit applies to the
    /// new table alone, so a table can always be replaced by one of its own size.
    ///
    /// # Errors
    /// A [`MemoryError`] if a region is refused, or no region can be mapped.
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
            // No ring can lie in such a table.
            [Unmapped { read_only, .. }, ..] if memory.regions.is_empty() => {
                Err(if read_only { MemoryError::ReadOnly } else { MemoryError::NotMemory })
            }
            _ => Ok(memory),
        }
    }

    /// Returns the port's limit on mapped bytes.
    pub fn quota(&self) -> &Arc<MemoryQuota> {
        &self.quota
    }

    /// Returns the mapped bytes of all regions.
    fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.mapping.bytes()).sum()
    }

    /// Returns this table with one more region (ADD_MEM_REG).
    ///
    /// # Errors
    /// A [`MemoryError`] if the region is refused.
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

    /// Returns this table without one region (REM_MEM_REG).
    ///
    /// # Errors
    /// [`MemoryError::Unknown`] if the table has no such region.
    pub fn without(&self, request: RegionRequest) -> Result<Self, MemoryError> {
        let mut without = self.clone();
        without.regions.retain(|region| !region.request.is(&request));
        without.unmapped.retain(|region| !region.request.is(&request));
        if without.len() == self.len() {
            return Err(MemoryError::Unknown);
        }
        Ok(without)
    }

    /// Returns this table with the dirty log `log`, or without one.
    ///
    /// # Errors
    /// [`MemoryError::LogTooShort`] if the log has no bits for some of the memory.
    pub fn logged(&self, log: Option<Arc<DirtyLog>>) -> Result<Self, MemoryError> {
        if let (Some(log), Some(last)) = (&log, self.regions.last()) {
            let end = last.request.guest_address + last.request.size;
            if log.end() < end {
                return Err(MemoryError::LogTooShort { end });
            }
        }
        Ok(GuestMemory { log, ..self.clone() })
    }

    /// Returns this table with the inflight buffer `inflight`, or without one.
    pub fn recorded(&self, inflight: Option<Arc<Inflight>>) -> Self {
        GuestMemory { inflight, ..self.clone() }
    }

    /// Returns the inflight buffer, if the frontend set one.
    pub(super) fn inflight(&self) -> Option<&Inflight> {
        self.inflight.as_deref()
    }

    /// Returns the dirty log, if the frontend set one.
    pub fn log(&self) -> Option<&Arc<DirtyLog>> {
        self.log.as_ref()
    }

    /// Marks `length` written bytes in `log`, from the address `mapped` in this process.
    pub(super) fn mark(&self, log: &DirtyLog, mapped: usize, length: usize) {
        let offset = |region: &Region| mapped.wrapping_sub(region.mapping.start().addr().get());
        let found = self.regions.iter().find(|it| (offset(it) as u64) < it.request.size);
        if let Some(region) = found {
            log.mark(region.request.guest_address + offset(region) as u64, length as u64);
        }
    }

    /// Returns the number of regions, mapped or not.
    pub fn len(&self) -> usize {
        self.regions.len() + self.unmapped.len()
    }

    /// Returns true if there is no region.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns each region as the frontend describes it.
    fn requests(&self) -> impl Iterator<Item = RegionRequest> {
        let mapped = self.regions.iter().map(|region| region.request);
        mapped.chain(self.unmapped.iter().map(|region| region.request))
    }

    /// Returns the regions that are not mapped.
    pub fn unmapped(&self) -> &[Unmapped] {
        &self.unmapped
    }

    /// Returns true if the files of all mapped regions are sealed against shrinking. Then no truncation can
    /// cause [loss](Self::is_lost) of memory.
    pub fn is_sealed(&self) -> bool {
        self.regions.iter().all(|region| region.mapping.sealed)
    }

    /// Returns true if an access has found some of the memory lost (see [`sigbus`](super::sigbus)).
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Maps zeros over the region, dirty log or inflight buffer that is mapped at `address` in this process.
    /// Returns false if none is, or if that fails. Async-signal-safe.
    pub(super) fn replace_with_zeros(&self, address: usize) -> bool {
        let regions = self.regions.iter().map(|region| &region.mapping);
        let others = self.log.iter().map(|log| log.mapping());
        let others = others.chain(self.inflight.iter().map(|inflight| inflight.mapping()));
        let mut mappings = regions.chain(others);
        let Some(mapping) = mappings.find(|mapping| mapping.holds(address)) else { return false };
        self.lost.store(true, Ordering::Relaxed);
        mapping.replace_with_zeros()
    }

    /// Returns each mapped region as the frontend describes it, and its file.
    pub fn regions(&self) -> impl Iterator<Item = (RegionRequest, &Arc<File>)> {
        self.regions.iter().map(|region| (region.request, region.mapping.source().0))
    }

    /// Returns the mapping of each mapped region.
    pub fn mappings(&self) -> impl Iterator<Item = Mapped<'_>> {
        self.regions.iter().map(|region| Mapped { mapping: &region.mapping })
    }

    /// Translates an address in the frontend's address space into a guest-physical one.
    pub fn guest_address(&self, frontend_address: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|region| {
            let offset = frontend_address.wrapping_sub(region.request.frontend_address);
            (offset < region.request.size)
                .then(|| GuestAddress(region.request.guest_address + offset))
        })
    }

    /// Returns true if the `length` bytes from `address` are all zero, or missing from the region's file. Reads
    /// the file, because an access to the mapping would allocate the missing pages.
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

    /// Returns where the `length` bytes from `address` are mapped, if one region contains them all. The bytes
    /// stay mapped as long as the table lives.
    pub(super) fn resolve(&self, address: GuestAddress, length: u64) -> Option<NonNull<u8>> {
        let found = self.at(address.0, &mut { Window::EMPTY })?;
        (length <= found.len() as u64).then(|| NonNull::new(found.start())).flatten()
    }

    /// Returns the memory from `address` to the end of its region. `last` caches the region of the last
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
