//! Guest memory as UMEM, and the check of each address before the kernel gets it.
//!
//! ```text
//! | rx frames | tx frames | …next pair… | guest region 0 | guest region 1 | … | pad |
//! '--------- bounce area: private ------------'---------- shared with the guest ----'
//! ```
//!
//! Invariant: every posted address has been checked here. The kernel drops a bad address silently, and its
//! buffer would be lost.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::guest::memory::Mapped;
use crate::guest::{Chain, GuestMemory, Pinned, Segment, Umem, Writable};
use crate::sys::xsk::{CHUNK, KERNEL_HEADROOM, Registrable, TX_METADATA};

/// Most frames of a queue pair in transmission. Each has a bounce buffer, which it uses if it cannot be sent
/// from guest memory.
pub(super) const TX_BUFFERS: usize = 256;
/// Bounce buffers of a queue pair for received frames.
pub(super) const RX_BUFFERS: usize = 64;
/// Bytes before the frame in a tx bounce buffer, for its metadata.
const TX_LEAD: usize = 32;
/// Largest headroom in bytes that the kernel accepts (`xdp_umem_reg` in net/xdp/xdp_umem.c; measured).
const MAX_HEADROOM: u32 = CHUNK - 704;
/// Longest frame in bytes of any layout, with the virtio-net header if the program writes one.
pub(super) const LONGEST_FRAME: usize = (CHUNK - KERNEL_HEADROOM) as usize;
/// Unit of a buffer's size in bytes in zero-copy mode: drivers round the size down, igb to whole KiB.
const ZERO_COPY_UNIT: usize = 1024;

/// Longest frame of a UMEM, and where in its chunk a frame begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FrameLayout {
    /// Longest frame in bytes, in both directions.
    pub(super) longest: usize,
    /// Bytes that the kernel, or the device, may write into a buffer.
    pub(super) writes: usize,
    /// Bytes of virtio-net header that the XDP program writes before each frame: the whole header in copy
    /// mode, 0 in zero-copy mode.
    pub(super) header: usize,
    /// The device itself reads and writes, so a buffer must lie in one page.
    pub(super) zero_copy: bool,
}

impl FrameLayout {
    /// Returns the layout for frames of at most `longest` bytes and a virtio-net header of `header_length`.
    ///
    /// # Errors
    /// `InvalidInput` if frame and written header exceed [`LONGEST_FRAME`].
    pub(super) fn new(longest: usize, header_length: usize, zero_copy: bool) -> io::Result<Self> {
        let header = if zero_copy { 0 } else { header_length };
        if longest + header > LONGEST_FRAME {
            let most = super::MAX_MTU;
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("AF_XDP supports an MTU up to {most} bytes"),
            ));
        }
        let unit = if zero_copy { ZERO_COPY_UNIT } else { 1 };
        let smallest = (CHUNK - KERNEL_HEADROOM - MAX_HEADROOM) as usize;
        let writes = (longest + header).next_multiple_of(unit).clamp(smallest, LONGEST_FRAME);
        Ok(FrameLayout { longest, writes, header, zero_copy })
    }

    /// Returns the bytes to leave free before each frame, beside the kernel's own headroom. The rest of the
    /// chunk has exactly `writes` bytes.
    pub(super) fn headroom(&self) -> u32 {
        CHUNK - KERNEL_HEADROOM - self.writes as u32
    }

    /// Returns the bytes between an address in the fill ring and the start of its frame.
    pub(super) fn lead(&self) -> u64 {
        u64::from(KERNEL_HEADROOM + self.headroom())
    }

    /// Returns the size of a tx bounce buffer in bytes.
    fn tx_buffer_size(&self) -> usize {
        (TX_LEAD + self.longest).next_power_of_two()
    }

    /// Returns the size of a queue pair's bounce area in bytes.
    fn bounce_area(&self) -> usize {
        RX_BUFFERS * CHUNK as usize + TX_BUFFERS * self.tx_buffer_size()
    }
}

/// Place of a guest region in the UMEM.
#[derive(Debug)]
struct Region {
    /// Addresses of the mapping that segments point into.
    mapped: Range<usize>,
    /// Offset in the UMEM in bytes.
    offset: u64,
    /// Page size in bytes.
    page: u64,
}

/// The largest region in copy mode, which holds nearly all of a guest's buffers.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MainRegion {
    start: usize,
    length: usize,
    offset: u64,
}

impl MainRegion {
    /// Returns the UMEM address of `segment`, if the segment lies in this region.
    #[inline(always)]
    pub(super) fn address_of(&self, segment: &Segment<'_>) -> Option<u64> {
        let at = segment.address().wrapping_sub(self.start);
        let fits = at < self.length && segment.len() <= self.length - at;
        fits.then(|| self.offset + at as u64)
    }
}

/// A UMEM of bounce area and guest memory.
#[derive(Debug)]
pub(super) struct GuestUmem {
    memory: Arc<Umem>,
    /// Guest regions, by address of their mappings.
    regions: Vec<Region>,
    main: MainRegion,
    pub(super) layout: FrameLayout,
    /// Count of the pinned bytes: the kernel keeps a registered UMEM in memory.
    _pinned: Pinned,
}

impl GuestUmem {
    /// Maps a bounce area for `pairs` queue pairs, and the regions of `guest` behind it.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub(super) fn new(guest: &GuestMemory, pairs: u16, layout: FrameLayout) -> io::Result<Self> {
        let mut mappings: Vec<_> = guest.mappings().collect();
        mappings.sort_by_key(|mapped| std::cmp::Reverse(mapped.page()));
        // A pad of one chunk: the chunk of a buffer at the end of guest memory reaches beyond it.
        let memory =
            Umem::new(layout.bounce_area() * usize::from(pairs), &mappings, CHUNK as usize)?;
        let place = |(mapped, part): (&Mapped<'_>, &Range<usize>)| Region {
            mapped: mapped.start()..mapped.start() + mapped.length(),
            offset: part.start as u64,
            page: mapped.page(),
        };
        let mut regions: Vec<_> = mappings.iter().zip(memory.parts()).map(place).collect();
        regions.sort_by_key(|region| region.mapped.start);
        let largest = regions.iter().max_by_key(|region| region.mapped.len());
        let main = largest.filter(|_| !layout.zero_copy).map(|region| MainRegion {
            start: region.mapped.start,
            length: region.mapped.len(),
            offset: region.offset,
        });
        let main = main.unwrap_or_default();
        let pinned = Pinned::new(guest.quota(), memory.length() as u64);
        Ok(GuestUmem { memory: Arc::new(memory), regions, main, layout, _pinned: pinned })
    }

    /// Returns the mapped memory.
    pub(super) fn memory(&self) -> &Arc<Umem> {
        &self.memory
    }

    /// Returns the largest region. In zero-copy mode it is empty, since each buffer's pages must be checked.
    #[inline]
    pub(super) fn main_region(&self) -> MainRegion {
        self.main
    }

    /// Returns the region that holds all of `segment`.
    fn region_of(&self, segment: &Segment<'_>) -> Option<&Region> {
        let address = segment.address();
        let holds = |region: &Region| {
            region.mapped.contains(&address) && segment.len() <= region.mapped.end - address
        };
        let behind = self.regions.partition_point(|region| region.mapped.start <= address);
        self.regions[..behind].last().filter(|region| holds(region))
    }

    /// Returns true if the `length` bytes at `offset` lie in one page of the region, so that they are
    /// contiguous for the device.
    fn in_one_page(&self, region: &Region, offset: u64, length: u64) -> bool {
        let first = self.memory.start() as u64 + offset;
        first / region.page == (first + length - 1) / region.page
    }

    /// Returns the UMEM address to send the guest's `segment` from; `None` if the segment must be copied.
    #[inline(never)]
    pub(super) fn sendable(&self, segment: &Segment<'_>) -> Option<u64> {
        let region = self.region_of(segment)?;
        let offset = region.offset + (segment.address() - region.mapped.start) as u64;
        let length = segment.len() as u64;
        (!self.layout.zero_copy || self.in_one_page(region, offset, length)).then_some(offset)
    }

    /// Returns the address to post so that a frame arrives directly behind the virtio-net header in `chain`.
    /// `None` if the longest frame does not fit there, or the device cannot write there.
    #[inline(never)]
    pub(super) fn receivable(
        &self,
        chain: &Chain<'_, '_, Writable>,
        header_length: usize,
    ) -> Option<u64> {
        let room = chain.first_after(header_length - self.layout.header)?;
        if room.len() < self.layout.writes {
            return None;
        }
        let region = self.region_of(&room)?;
        let offset = region.offset + (room.address() - region.mapped.start) as u64;
        // The bounce area precedes all regions and a pad follows them, so the chunk lies in the UMEM.
        let address = offset - self.layout.lead();
        if !self.layout.zero_copy {
            return Some(address);
        }
        let in_region = address >= region.offset;
        (in_region && self.in_one_page(region, address, CHUNK.into())).then_some(address)
    }

    /// Returns the offset of a queue pair's bounce area.
    fn bounce_area_of(&self, pair: u16) -> usize {
        usize::from(pair) * self.layout.bounce_area()
    }

    /// Returns the address to post for an rx bounce buffer.
    pub(super) fn rx_buffer(&self, pair: u16, buffer: usize) -> u64 {
        (self.bounce_area_of(pair) + buffer * CHUNK as usize) as u64
    }

    /// Returns the frame in an rx bounce buffer. `length` includes the header that the program has written.
    ///
    /// # Panics
    /// If `length` exceeds the buffer.
    pub(super) fn rx_frame(&self, pair: u16, buffer: usize, length: usize) -> Segment<'_> {
        assert!(length <= self.layout.writes, "the kernel writes no more than the buffer holds");
        let start = self.rx_buffer(pair, buffer) + self.layout.lead();
        self.memory.bounce_area(start as usize, length).skip(self.layout.header)
    }

    /// Returns the place of a frame of `length` bytes in a tx bounce buffer, and its UMEM address.
    ///
    /// # Panics
    /// If `length` exceeds the longest frame.
    #[inline]
    pub(super) fn tx_frame(&self, pair: u16, buffer: usize, length: usize) -> (Segment<'_>, u64) {
        assert!(length <= self.layout.longest, "longer frames were dropped before");
        let start = self.tx_start(pair, buffer) + TX_LEAD;
        (self.memory.bounce_area(start, length), start as u64)
    }

    /// Returns the place of the metadata in a tx bounce buffer.
    pub(super) fn tx_metadata(&self, pair: u16, buffer: usize) -> Segment<'_> {
        let start = self.tx_start(pair, buffer) + TX_LEAD - TX_METADATA;
        self.memory.bounce_area(start, TX_METADATA)
    }

    /// Returns the offset of a tx bounce buffer.
    fn tx_start(&self, pair: u16, buffer: usize) -> usize {
        self.bounce_area_of(pair)
            + RX_BUFFERS * CHUNK as usize
            + buffer * self.layout.tx_buffer_size()
    }
}
