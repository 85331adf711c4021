//! The guest's memory as UMEM, and which of its addresses the kernel may be given.
//!
//! ```text
//! | rx frames | tx frames | …next pair… | guest region 0 | guest region 1 | … | pad |
//! '------- bounce area: private, ours --------'---------- shared with the guest ----'
//! ```
//!
//! Invariant: every address that is posted has been checked here. The kernel drops a bad one
//! silently, and its buffer would be lost.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::guest::memory::Mapped;
use crate::guest::{Chain, GuestMemory, Pinned, Segment, Umem, Writable};
use crate::sys::xsk::{CHUNK, KERNEL_HEADROOM, Registrable, TX_METADATA};

/// Frames from the guest that a queue pair has under way at the most. Each has a place in the
/// bounce area, for when it can't be sent from where it lies.
pub(super) const TX_SLOTS: usize = 256;
/// Frames that a queue pair can receive into the bounce area.
pub(super) const RX_SLOTS: usize = 64;
/// What stands before a frame in its tx slot.
const TX_LEAD: usize = 32;
/// Headroom of a chunk at the most (`xdp_umem_reg` in net/xdp/xdp_umem.c; measured: 704).
const MAX_HEADROOM: u32 = CHUNK - 704;
/// Longest frame in bytes that any layout can take.
pub(super) const LONGEST_FRAME: usize = (CHUNK - KERNEL_HEADROOM) as usize;
/// In zero-copy mode drivers round a buffer's size down, as igb does to whole KiB.
const ZERO_COPY_UNIT: usize = 1024;

/// How long frames may be, and what that makes of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FrameLayout {
    /// Longest frame in bytes that the kernel is to deliver, or to take.
    pub(super) longest: usize,
    /// Bytes that the kernel, or the device, may write into a buffer.
    pub(super) writes: usize,
    /// Bytes of virtio header that the XDP program puts before each frame: in copy mode all of it.
    pub(super) header: usize,
    /// Whether the device itself reads and writes: a buffer must then lie in one page.
    pub(super) zero_copy: bool,
}

impl FrameLayout {
    /// For frames up to `longest` bytes, behind a header of `header_length`.
    ///
    /// # Errors
    /// `InvalidInput` if they are longer than [`LONGEST_FRAME`].
    pub(super) fn new(longest: usize, header_length: usize, zero_copy: bool) -> io::Result<Self> {
        let header = if zero_copy { 0 } else { header_length };
        if longest + header > LONGEST_FRAME {
            let most = super::MAX_MTU;
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("AF_XDP takes an MTU up to {most} bytes"),
            ));
        }
        let unit = if zero_copy { ZERO_COPY_UNIT } else { 1 };
        let smallest = (CHUNK - KERNEL_HEADROOM - MAX_HEADROOM) as usize;
        let writes = (longest + header).next_multiple_of(unit).clamp(smallest, LONGEST_FRAME);
        Ok(FrameLayout { longest, writes, header, zero_copy })
    }

    /// Bytes to be left free in each chunk before a frame, beside the kernel's own: what is left
    /// behind them is exactly what may be written.
    pub(super) fn headroom(&self) -> u32 {
        CHUNK - KERNEL_HEADROOM - self.writes as u32
    }

    /// From an address in the fill ring to where its frame will start.
    pub(super) fn lead(&self) -> u64 {
        u64::from(KERNEL_HEADROOM + self.headroom())
    }

    fn tx_slot(&self) -> usize {
        (TX_LEAD + self.longest).next_power_of_two()
    }

    /// Bytes of bounce area that a queue pair needs.
    fn bounce_area(&self) -> usize {
        RX_SLOTS * CHUNK as usize + TX_SLOTS * self.tx_slot()
    }
}

/// Where a guest region lies in the UMEM.
#[derive(Debug)]
struct Region {
    /// In the mapping that segments point into.
    mapped: Range<usize>,
    /// In the UMEM, in bytes from its start.
    offset: u64,
    /// Size of its pages in bytes.
    page: u64,
}

/// The largest region, in copy mode: nearly all of a guest's buffers lie in it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MainRegion {
    start: usize,
    length: usize,
    offset: u64,
}

impl MainRegion {
    /// The address of `segment`, if it lies in the region.
    #[inline(always)]
    pub(super) fn address_of(&self, segment: &Segment<'_>) -> Option<u64> {
        let at = segment.address().wrapping_sub(self.start);
        let fits = at < self.length && segment.len() <= self.length - at;
        fits.then(|| self.offset + at as u64)
    }
}

/// A UMEM that holds the guest's memory.
#[derive(Debug)]
pub(super) struct GuestUmem {
    memory: Arc<Umem>,
    /// In the order of their mappings.
    regions: Vec<Region>,
    main: MainRegion,
    pub(super) layout: FrameLayout,
    /// From the registration on the kernel keeps all of it in memory.
    _pinned: Pinned,
}

impl GuestUmem {
    /// Maps the regions of `guest` side by side, behind a bounce area for `pairs` queue pairs.
    ///
    /// # Errors
    /// Those of mmap.
    pub(super) fn new(guest: &GuestMemory, pairs: u16, layout: FrameLayout) -> io::Result<Self> {
        let mut mappings: Vec<_> = guest.mappings().collect();
        mappings.sort_by_key(|mapped| std::cmp::Reverse(mapped.page()));
        // The chunk of the last buffer ends behind the guest's memory.
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

    /// The memory itself.
    pub(super) fn memory(&self) -> &Arc<Umem> {
        &self.memory
    }

    /// The largest region; an empty one with zero copy, which has rules about pages.
    #[inline]
    pub(super) fn main_region(&self) -> MainRegion {
        self.main
    }

    fn region_of(&self, segment: &Segment<'_>) -> Option<&Region> {
        let address = segment.address();
        let holds = |region: &Region| {
            region.mapped.contains(&address) && segment.len() <= region.mapped.end - address
        };
        let behind = self.regions.partition_point(|region| region.mapped.start <= address);
        self.regions[..behind].last().filter(|region| holds(region))
    }

    /// Whether the `length` bytes at `offset` are in one page of the region: what a device can
    /// rely on to be contiguous.
    fn in_one_page(&self, region: &Region, offset: u64, length: u64) -> bool {
        let first = self.memory.start() as u64 + offset;
        first / region.page == (first + length - 1) / region.page
    }

    /// The address to send the guest's `segment` from; nothing if it must be copied.
    #[inline(never)]
    pub(super) fn sendable(&self, segment: &Segment<'_>) -> Option<u64> {
        let region = self.region_of(segment)?;
        let offset = region.offset + (segment.address() - region.mapped.start) as u64;
        let length = segment.len() as u64;
        (!self.layout.zero_copy || self.in_one_page(region, offset, length)).then_some(offset)
    }

    /// The address to post such that a frame lands right behind the header's place in `chain`;
    /// nothing if the longest frame would not fit there, or the device can't write there.
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
        // The bounce area is before all regions, and a pad behind them: the chunk lies in the UMEM.
        let address = offset - self.layout.lead();
        if !self.layout.zero_copy {
            return Some(address);
        }
        let in_region = address >= region.offset;
        (in_region && self.in_one_page(region, address, CHUNK.into())).then_some(address)
    }

    fn arena_of(&self, pair: u16) -> usize {
        usize::from(pair) * self.layout.bounce_area()
    }

    /// The address to post for an rx slot of a queue pair's.
    pub(super) fn rx_slot(&self, pair: u16, slot: usize) -> u64 {
        (self.arena_of(pair) + slot * CHUNK as usize) as u64
    }

    /// The frame that has arrived in an rx slot, in `length` bytes with what the program put
    /// before it.
    ///
    /// # Panics
    /// If it is longer than the slot.
    pub(super) fn rx_frame(&self, pair: u16, slot: usize, length: usize) -> Segment<'_> {
        assert!(length <= self.layout.writes, "the kernel writes no more than it was given");
        let start = self.rx_slot(pair, slot) + self.layout.lead();
        self.memory.bounce_area(start as usize, length).skip(self.layout.header)
    }

    /// Where to put a frame of `length` bytes to send it from a tx slot, and the address.
    ///
    /// # Panics
    /// If it is longer than the slot.
    #[inline]
    pub(super) fn tx_frame(&self, pair: u16, slot: usize, length: usize) -> (Segment<'_>, u64) {
        assert!(length <= self.layout.longest, "longer frames were not admitted");
        let start = self.tx_start(pair, slot) + TX_LEAD;
        (self.memory.bounce_area(start, length), start as u64)
    }

    /// Where the metadata of the frame in a tx slot goes.
    pub(super) fn tx_metadata(&self, pair: u16, slot: usize) -> Segment<'_> {
        let start = self.tx_start(pair, slot) + TX_LEAD - TX_METADATA;
        self.memory.bounce_area(start, TX_METADATA)
    }

    fn tx_start(&self, pair: u16, slot: usize) -> usize {
        self.arena_of(pair) + RX_SLOTS * CHUNK as usize + slot * self.layout.tx_slot()
    }
}
