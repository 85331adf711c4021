//! Descriptor tables: walks from a chain's head through its descriptors to the segments of mapped memory
//! (virtio 1.3, section 2.7.5).

use std::ptr::NonNull;

use virtio_queue::desc::split::Descriptor;

use super::chain::Direction;
use super::fault::Fault;
use super::memory::{GuestMemory, Window};
use crate::sys::segment::{Segment, Unaligned};

/// Maximum number of segments of one chain, so that one `writev` (`IOV_MAX`, 1024) has space for the daemon's
/// own header too. A frame of 64 KiB in pages has 18 segments.
pub const MAX_SEGMENTS: usize = 1022;

/// A ring's descriptor table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptors<'mem> {
    memory: &'mem GuestMemory,
    table: NonNull<u8>,
    size: u16,
    /// `VIRTIO_F_INDIRECT_DESC` was negotiated.
    indirect: bool,
    /// Region of the last buffer.
    region: Window<'mem>,
}

impl<'mem> Descriptors<'mem> {
    /// Creates a view of the table of `size` entries that [`RingLayout::resolve`](super::RingLayout::resolve) returned.
    pub(super) fn new(
        memory: &'mem GuestMemory,
        table: NonNull<u8>,
        size: u16,
        indirect: bool,
    ) -> Self {
        Descriptors { memory, table, size, indirect, region: Window::EMPTY }
    }

    /// Returns the segment of the chain at `head`, if the chain is one descriptor in the region of the last
    /// buffer. Any other chain requires [`collect`](Self::collect). `head` must be below the ring's size.
    #[inline(always)]
    pub(super) fn only_segment<D: Direction>(&self, head: u16) -> Option<Segment<'mem>> {
        let first = self.entry(self.table, head);
        let length = first.len() as usize;
        if D::MIXED || first.flags() != D::FLAGS || length == 0 {
            return None;
        }
        self.region
            .at(first.addr().0)
            .filter(|found| length <= found.len())
            .map(|it| it.first(length))
    }

    /// Appends the segments of the chain at `head` to `segments`; returns their total length in bytes. `head`
    /// must be below the ring's size.
    ///
    /// # Errors
    /// A [`Fault`] if the guest broke a rule of descriptor chains.
    #[inline(never)]
    pub(super) fn collect<D: Direction>(
        &mut self,
        head: u16,
        segments: &mut Vec<Segment<'mem>>,
    ) -> Result<u32, Fault> {
        let first = self.entry(self.table, head);
        if !first.refers_to_indirect_table() {
            return self.walk::<D>(head, first, self.table, self.size, segments);
        }
        if !self.indirect || first.has_next() {
            return Err(Fault::IndirectNotAllowed { head });
        }
        // No chain may have more descriptors than the ring, direct or indirect (section 2.7.5.3.1).
        let length = first.len();
        if length == 0 || !length.is_multiple_of(16) || length / 16 > u32::from(self.size) {
            return Err(Fault::IndirectLength(length));
        }
        let table = self
            .memory
            .resolve(first.addr(), length.into())
            .ok_or(Fault::BufferUnmapped { address: first.addr().0, length })?;
        let entries = (length / 16) as u16;
        let first = self.entry(table, 0);
        self.walk::<D>(head, first, table, entries, segments)
    }

    #[inline]
    fn walk<D: Direction>(
        &mut self,
        head: u16,
        first: Descriptor,
        table: NonNull<u8>,
        entries: u16,
        segments: &mut Vec<Segment<'mem>>,
    ) -> Result<u32, Fault> {
        let most = segments.len() + MAX_SEGMENTS;
        let mut descriptor = first;
        let mut total = 0u32;
        let mut in_answer = !D::MIXED;
        // A chain without a loop has each descriptor at most once.
        for _ in 0..entries {
            if descriptor.refers_to_indirect_table() {
                return Err(Fault::IndirectNotAllowed { head });
            }
            if D::MIXED && !in_answer && descriptor.is_write_only() {
                segments.push(Segment::EMPTY);
                in_answer = true;
            }
            if descriptor.is_write_only() != (D::WRITABLE && in_answer) {
                return Err(Fault::WrongDirection { head });
            }
            total = total.checked_add(descriptor.len()).ok_or(Fault::ChainTooLarge { head })?;
            self.map(descriptor, segments)?;
            if segments.len() > most {
                return Err(Fault::ChainTooLong { head });
            }
            if !descriptor.has_next() {
                return Ok(total);
            }
            let next = descriptor.next();
            if next >= entries {
                return Err(Fault::NextOutOfRange(next));
            }
            descriptor = self.entry(table, next);
        }
        Err(Fault::ChainTooLong { head })
    }

    /// Appends the descriptor's memory to `segments`: one segment for each region that it spans.
    #[inline]
    fn map(
        &mut self,
        descriptor: Descriptor,
        segments: &mut Vec<Segment<'mem>>,
    ) -> Result<(), Fault> {
        let (mut address, mut left) = (descriptor.addr().0, descriptor.len() as usize);
        let unmapped =
            Fault::BufferUnmapped { address: descriptor.addr().0, length: descriptor.len() };
        while left > 0 {
            let Some(found) = self.memory.at(address, &mut self.region) else {
                return Err(unmapped);
            };
            let segment = found.first(left);
            segments.push(segment);
            left -= segment.len();
            address = address.wrapping_add(segment.len() as u64);
        }
        Ok(())
    }

    /// Copies an entry of a table. `index` must be below the table's number of entries.
    #[inline]
    fn entry(&self, table: NonNull<u8>, index: u16) -> Descriptor {
        // SAFETY: the callers have checked `index` against the table's number of entries. `resolve` found 16
        // mapped bytes for each entry, at any alignment (virtio has no rule for that of indirect tables), and
        // `memory` keeps them mapped. Volatile: the guest may write meanwhile, and all checks must see the one
        // value that was copied.
        let [address, rest] = unsafe {
            let words = table.cast::<Unaligned<u64>>().add(2 * usize::from(index));
            [words.read_volatile().0, words.add(1).read_volatile().0].map(u64::from_le)
        };
        let (length, flags, next) = (rest as u32, (rest >> 32) as u16, (rest >> 48) as u16);
        Descriptor::new(address, length, flags, next)
    }
}
