//! The guest's memory as the frontend shares it: a table of regions, each mapped once.
//!
//! Invariant: a region in the table lies wholly inside its file as of the time it was mapped, and
//! overlaps no other region, neither in the guest's nor in the frontend's address space. A table
//! is never changed: adding or removing a region makes a new one that shares the mappings.
//!
//! Some regions are in the table and are [not mapped](super::unmapped).

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, MmapRegion};

use super::dirty::DirtyLog;
use super::inflight::Inflight;
use super::quota::{Allowance, MemoryQuota, Reservation};
use super::segment::Segment;
use super::unmapped::Unmapped;
use crate::sys::process::file_facts;

/// Regions that a table can hold: what QEMU and cloud-hypervisor can use of the protocol's
/// CONFIGURE_MEM_SLOTS.
pub const MAX_SLOTS: usize = 509;

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
    fn overlaps(&self, other: &RegionRequest) -> bool {
        let meet = |a: u64, b: u64| a < b + other.size && b < a + self.size;
        meet(self.guest_address, other.guest_address)
            || meet(self.frontend_address, other.frontend_address)
    }

    /// Whether it is the same region. The file offset does not count: frontends may leave it out.
    fn is(&self, other: &RegionRequest) -> bool {
        RegionRequest { file_offset: other.file_offset, ..*self } == *other
    }
}

/// Why a memory region was refused.
#[derive(Debug)]
pub enum MemoryError {
    /// The region has no bytes.
    Empty,
    /// An address or offset plus the size is beyond 64 bits.
    Overflow,
    /// The descriptor is no memfd, and no file on tmpfs or hugetlbfs.
    NotMemory,
    /// The descriptor is not open for reading and writing.
    ReadOnly,
    /// The region ends behind the end of its file.
    PastEndOfFile {
        /// First byte behind the region, as an offset into the file.
        end: u64,
        /// The file's size in bytes.
        file_size: u64,
    },
    /// It shares addresses with a region that is already there.
    Overlap,
    /// All [`MAX_SLOTS`] are taken.
    NoSlot,
    /// No region like this is in the table.
    Unknown,
    /// It is not aligned in its file.
    Misaligned,
    /// The dirty log has no bits for memory before this address.
    LogTooShort {
        /// First guest-physical address behind the memory.
        end: u64,
    },
    /// The port's mapped bytes would exceed its limit.
    OverLimit {
        /// Bytes to be mapped.
        bytes: u64,
        /// The port's limit in bytes.
        limit: u64,
    },
    /// The mapped bytes of all ports would exceed half of the address space.
    ProcessFull {
        /// Bytes to be mapped.
        bytes: u64,
    },
    /// The kernel refused to look at or to map the file.
    Map(std::io::Error),
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MemoryError::Empty => write!(f, "the region is empty"),
            MemoryError::Overflow => write!(f, "its address plus its size is beyond 64 bits"),
            MemoryError::NotMemory => write!(
                f,
                "its descriptor is no memory (a memfd, or a file on tmpfs or hugetlbfs); give the \
                 guest memory from memory-backend-memfd, or memory-backend-file in /dev/shm or on \
                 hugetlbfs, with share=on"
            ),
            MemoryError::ReadOnly => {
                write!(f, "its descriptor is not open for reading and writing")
            }
            MemoryError::PastEndOfFile { end, file_size } => {
                write!(f, "it ends at byte {end} of a file of {file_size} bytes")
            }
            MemoryError::Overlap => write!(f, "it overlaps another region"),
            MemoryError::NoSlot => write!(f, "all {MAX_SLOTS} memory slots are taken"),
            MemoryError::Unknown => write!(f, "there is no such region"),
            MemoryError::Misaligned => write!(f, "it is not aligned in its file"),
            MemoryError::LogTooShort { end } => {
                write!(f, "the dirty log has no bits for all memory up to {end:#x}")
            }
            MemoryError::OverLimit { bytes, limit } => write!(
                f,
                "cannot map {bytes} bytes more: the port's mapped memory would exceed max-memory, \
                 {limit} bytes; raise max-memory"
            ),
            MemoryError::ProcessFull { bytes } => write!(
                f,
                "cannot map {bytes} bytes more: all ports together would exceed half of the daemon's \
                 address space; lower max-memory of other ports, or run a daemon for each"
            ),
            MemoryError::Map(error) => write!(f, "map its file: {error}"),
        }
    }
}

impl std::error::Error for MemoryError {}

/// A part of a file of shared memory, mapped.
#[derive(Debug)]
pub(super) struct Mapping {
    /// It may start before the part: offsets are rounded down to (huge) pages.
    region: MmapRegion,
    /// Offset of the part's first byte in the mapping.
    lead: usize,
    /// Size in bytes of the pages that the file consists of.
    page: u64,
    /// The file can't be shrunk.
    sealed: bool,
    /// Its bytes, as the port's limit counts them.
    reserved: Reservation,
}

impl Mapping {
    /// Maps `size` bytes of `file` from `offset` on.
    pub(super) fn new(
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
    pub(super) fn start(&self) -> NonNull<u8> {
        let mapping = NonNull::new(self.region.as_ptr()).expect("nothing is mapped at 0");
        // SAFETY: the mapping is longer than what leads to the part (`new`).
        unsafe { mapping.add(self.lead) }
    }

    /// The file, and where in it the part starts.
    pub(super) fn source(&self) -> (&Arc<File>, u64) {
        let file = self.region.file_offset().expect("every part is mapped from a file");
        (file.arc(), file.start() + self.lead as u64)
    }

    /// Mapped bytes, with those that alignment adds.
    pub(super) fn bytes(&self) -> u64 {
        self.reserved.bytes()
    }

    fn holds(&self, address: usize) -> bool {
        address.wrapping_sub(self.region.as_ptr() as usize) < self.region.size()
    }
}

/// One mapped region.
#[derive(Debug)]
struct Region {
    request: RegionRequest,
    mapping: Mapping,
}

/// A region's mapping: to map the same memory once more elsewhere. All of it lies in its file, which
/// was memory when it was mapped.
#[derive(Debug, Clone, Copy)]
pub struct Mapped<'a> {
    mapping: &'a Mapping,
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

impl Region {
    fn map(request: RegionRequest, file: File, allowance: &Allowance) -> Result<Self, MemoryError> {
        let RegionRequest { guest_address, size, frontend_address, file_offset } = request;
        let ends = [guest_address, frontend_address].map(|from| from.checked_add(size));
        if size > 0 && ends.contains(&None) {
            return Err(MemoryError::Overflow);
        }
        Ok(Region { request, mapping: Mapping::new(file, file_offset, size, allowance)? })
    }

    fn window(&self) -> Window<'_> {
        let RegionRequest { guest_address, size, .. } = self.request;
        // SAFETY: the mapping holds `size` bytes from its start on, for as long as it lives.
        let mapped = unsafe { Segment::new(self.mapping.start(), size as usize) };
        Window { guest_address, mapped }
    }
}

/// A region as look-ups need it, to be kept at hand: nearly all of a guest's buffers lie in one.
/// It borrows the table that it is from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window<'mem> {
    guest_address: u64,
    mapped: Segment<'mem>,
}

impl<'mem> Window<'mem> {
    /// No region.
    pub(super) const EMPTY: Self = Window { guest_address: 0, mapped: Segment::EMPTY };

    /// The memory from `address` to the end of the region, if it is in it.
    #[inline]
    pub(super) fn at(&self, address: u64) -> Option<Segment<'mem>> {
        let offset = address.wrapping_sub(self.guest_address) as usize;
        (offset < self.mapped.len()).then(|| self.mapped.skip(offset))
    }
}

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

    /// Whether some of it was found to have gone (see [`lost`](super::lost)).
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Puts empty memory in the place of the region that is mapped at `address`; says whether one
    /// is. Async-signal-safe.
    pub(super) fn lose(&self, address: usize) -> bool {
        let regions = self.regions.iter().map(|region| &region.mapping);
        let others = self.log.iter().map(|log| log.mapping());
        let others = others.chain(self.inflight.iter().map(|inflight| inflight.mapping()));
        let mut mappings = regions.chain(others);
        let Some(mapping) = mappings.find(|mapping| mapping.holds(address)) else { return false };
        self.lost.store(true, Ordering::Relaxed);
        // SAFETY: the range is exactly the mapping's own, which stays mapped, only with other memory
        // behind it, until it is dropped. Pointers into it stay valid.
        let replaced = unsafe {
            libc::mmap(
                mapping.region.as_ptr().cast(),
                mapping.region.size(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        replaced != libc::MAP_FAILED
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
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, FromRawFd};

    fn memfd(size: u64) -> File {
        // SAFETY: a fresh descriptor, owned by the File.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), 0)) };
        file.set_len(size).unwrap();
        file
    }

    fn region(guest_address: u64, size: u64) -> RegionRequest {
        RegionRequest {
            guest_address,
            size,
            frontend_address: 0x7000_0000_0000 + guest_address,
            file_offset: 0,
        }
    }

    #[test]
    fn addresses_are_found_in_their_region_and_nowhere_else() {
        let memory = GuestMemory::map([
            (region(0x10_0000, 0x1000), memfd(0x1000)),
            (region(0, 0x2000), memfd(0x2000)),
        ])
        .unwrap();
        let mut last = Window::EMPTY;
        assert_eq!(memory.at(0x1fff, &mut last).unwrap().len(), 1);
        assert_eq!(memory.at(0x10_0000, &mut last).unwrap().len(), 0x1000);
        for gap in [0x2000, 0xf_ffff, 0x10_1000, u64::MAX] {
            assert!(memory.at(gap, &mut last).is_none());
        }
        assert!(memory.resolve(GuestAddress(0x1ff0), 0x10).is_some());
        assert!(memory.resolve(GuestAddress(0x1ff0), 0x11).is_none());
        assert_eq!(memory.guest_address(0x7000_0010_0004), Some(GuestAddress(0x10_0004)));
        assert_eq!(memory.guest_address(0x1000), None);
    }

    #[test]
    fn a_region_must_lie_inside_its_file() {
        let outside = [
            RegionRequest { size: 0x2000, ..region(0, 0) },
            RegionRequest { file_offset: 0x800, ..region(0, 0x1000) },
            RegionRequest { file_offset: u64::MAX - 0x10, ..region(0, 0x1000) },
            RegionRequest { guest_address: u64::MAX - 0x10, ..region(0, 0x1000) },
            RegionRequest { size: 1 << 63, ..region(0, 0) },
            region(0, 0),
        ];
        for request in outside {
            assert!(GuestMemory::map([(request, memfd(0x1000))]).is_err(), "{request:?}");
        }
    }

    #[test]
    fn a_region_at_an_odd_offset_of_its_file_is_mapped_where_it_is() {
        use std::os::unix::fs::FileExt;
        let file = memfd(0x3000);
        file.write_all_at(b"here", 0x1234).unwrap();
        let request = RegionRequest { file_offset: 0x1234, ..region(0x8000, 0x100) };
        let memory = GuestMemory::map([(request, file)]).unwrap();
        let pointer = memory.resolve(GuestAddress(0x8000), 4).unwrap();
        // SAFETY: resolve vouches for four mapped bytes.
        assert_eq!(unsafe { pointer.cast::<[u8; 4]>().read() }, *b"here");
    }

    #[test]
    fn what_cannot_be_shared_is_refused() {
        let file = memfd(0x1000);
        let read_only = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        let error = GuestMemory::map([(region(0, 0x1000), read_only)]).unwrap_err();
        assert!(matches!(error, MemoryError::ReadOnly));
        for path in ["/dev/zero", "/"] {
            let file = File::open(path).unwrap();
            let error = GuestMemory::map([(region(0, 0x1000), file)]).unwrap_err();
            assert!(matches!(error, MemoryError::NotMemory), "{path}: {error}");
        }
    }

    #[test]
    fn overlaps_are_refused_in_both_address_spaces() {
        let memory = GuestMemory::map([(region(0x1000, 0x1000), memfd(0x1000))]).unwrap();
        assert!(matches!(
            memory.with(region(0x1800, 0x1000), memfd(0x1000)),
            Err(MemoryError::Overlap)
        ));
        let elsewhere = RegionRequest { guest_address: 0x10_0000, ..region(0x1800, 0x1000) };
        assert!(matches!(memory.with(elsewhere, memfd(0x1000)), Err(MemoryError::Overlap)));
        let beside = memory.with(region(0x2000, 0x1000), memfd(0x1000)).unwrap();
        assert_eq!(beside.len(), 2);
        assert_eq!(beside.without(region(0x1000, 0x1000)).unwrap().len(), 1);
        assert!(matches!(beside.without(region(0x1000, 0x800)), Err(MemoryError::Unknown)));
    }
}
