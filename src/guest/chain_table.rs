//! A virtqueue's private copy of its chains, by position in the ring. Each descriptor was read once.
//!
//! Invariant: an entry's segments are mapped for `'mem`, whether or not its chain is in flight.

use std::marker::PhantomData;
use std::ptr;

use super::chain::{Chain, Direction};
use crate::sys::segment::Segment;

/// Number of finished chains' segments that may stay in the list, because a removal moves all others.
const KEPT: usize = 1024;

/// One chain. The size of 16 bytes is why `start` has two meanings.
#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Address of the only segment. With any other number of segments: the running number of the first one
    /// among all segments ever listed.
    start: *mut u8,
    /// Total length of the segments in bytes; of a completed device-writable chain, the bytes written.
    length: u32,
    head: u16,
    segments: u16,
}

impl Entry {
    const EMPTY: Self = Entry { start: ptr::dangling_mut(), length: 0, head: 0, segments: 1 };
}

/// Mutable access for adding chains of one segment.
pub(super) struct Writer<'t, 'mem> {
    entries: &'t mut [Entry],
    memory: PhantomData<&'t mut Segment<'mem>>,
}

/// Index of an entry. It is valid only for the table, or writer, that made it.
#[derive(Clone, Copy)]
pub(super) struct Slot(usize);

impl Slot {
    /// Returns the slot of a position. The number of entries must be a power of two (`ChainTable::new`).
    #[inline(always)]
    fn of(position: usize, entries: &[Entry]) -> Self {
        Slot(position & (entries.len() - 1))
    }

    /// Returns the index, which is below the ring's size.
    #[inline(always)]
    pub(super) fn index(self) -> usize {
        self.0
    }
}

impl<'mem> Writer<'_, 'mem> {
    /// Returns the slot of a position.
    #[inline(always)]
    pub(super) fn slot(&self, position: usize) -> Slot {
        Slot::of(position, self.entries)
    }

    /// Stores a chain of one segment.
    #[inline(always)]
    pub(super) fn set_one(&mut self, Slot(slot): Slot, head: u16, segment: Segment<'mem>) {
        let (start, length) = (segment.start(), segment.len() as u32);
        // SAFETY: only `slot` makes a Slot, by a mask of the length, which is a power of two
        // (`ChainTable::new`) and never changes; callers use a slot only with its own table.
        let entry = unsafe { self.entries.get_unchecked_mut(slot) };
        *entry = Entry { start, length, head, segments: 1 };
    }
}

/// A table with one entry for each place in the ring.
#[derive(Debug)]
pub(super) struct ChainTable<'mem> {
    entries: Box<[Entry]>,
    /// Listed segments: those of chains without exactly one, oldest first.
    list: Vec<Segment<'mem>>,
    /// Running number of the list's first segment among all segments ever listed.
    first_listed: usize,
    /// Number of listed segments of finished chains, at the list's start.
    gone: usize,
}

impl<'mem> ChainTable<'mem> {
    /// Creates the table of a ring of `size` entries.
    ///
    /// # Panics
    /// If `size` is no power of two.
    pub(super) fn new(size: u16) -> Self {
        assert!(size.is_power_of_two(), "a ring's size was checked");
        let entries = vec![Entry::EMPTY; usize::from(size)].into_boxed_slice();
        ChainTable { entries, list: Vec::new(), first_listed: 0, gone: 0 }
    }

    /// Returns the slot of a position.
    #[inline(always)]
    pub(super) fn slot(&self, position: u16) -> Slot {
        Slot::of(position.into(), &self.entries)
    }

    #[inline(always)]
    fn entry(&self, Slot(slot): Slot) -> &Entry {
        debug_assert!(slot < self.entries.len());
        // SAFETY: only `slot` makes a Slot, by a mask of the length, which is a power of two (`new`) and never
        // changes; callers use a slot only with its own table.
        unsafe { self.entries.get_unchecked(slot) }
    }

    #[inline(always)]
    fn entry_mut(&mut self, Slot(slot): Slot) -> &mut Entry {
        debug_assert!(slot < self.entries.len());
        // SAFETY: as in `entry`.
        unsafe { self.entries.get_unchecked_mut(slot) }
    }

    /// Returns a writer, which stores many chains of one segment.
    #[inline(always)]
    pub(super) fn writer(&mut self) -> Writer<'_, 'mem> {
        Writer { entries: &mut self.entries, memory: PhantomData }
    }

    /// Stores a chain of the segments that `collect` appends to the list. `collect` returns their total length
    /// in bytes, and so does this function.
    ///
    /// # Errors
    /// The errors of `collect`; then the table is unchanged.
    pub(super) fn set_list<E>(
        &mut self,
        position: u16,
        head: u16,
        collect: impl FnOnce(&mut Vec<Segment<'mem>>) -> Result<u32, E>,
    ) -> Result<u32, E> {
        let before = self.list.len();
        let length = collect(&mut self.list).inspect_err(|_| self.list.truncate(before))?;
        let segments = (self.list.len() - before) as u16;
        let entry = match self.list[before..] {
            [only] => {
                self.list.truncate(before);
                Entry { start: only.start(), length, head, segments }
            }
            _ => {
                let start = ptr::without_provenance_mut(self.first_listed + before);
                Entry { start, length, head, segments }
            }
        };
        *self.entry_mut(self.slot(position)) = entry;
        Ok(length)
    }

    /// Returns the chain last stored for a position.
    #[inline]
    pub(super) fn chain<D: Direction>(&self, position: u16) -> Chain<'_, 'mem, D> {
        let Entry { start, length, head, segments } = *self.entry(self.slot(position));
        if segments == 1 {
            // SAFETY: `set_one` or `set_list` took `start` from a segment that is mapped for `'mem` and at least
            // as long: `set_written` only lowers the length. An empty entry has no bytes.
            return Chain::of_one(head, unsafe { Segment::at(start, length as usize) });
        }
        let first = start.addr().wrapping_sub(self.first_listed);
        let list = self.list.get(first..first + usize::from(segments)).unwrap_or_default();
        Chain::of_list(head, list, length)
    }

    /// Returns the segment of the chain last stored for a position, if the chain has exactly one.
    #[inline(always)]
    pub(super) fn only_piece(&self, position: u16) -> Option<Segment<'mem>> {
        let Entry { start, length, segments, .. } = *self.entry(self.slot(position));
        // SAFETY: as in `chain`.
        (segments == 1).then(|| unsafe { Segment::at(start, length as usize) })
    }

    /// Returns a chain's head, its length in bytes and its number of segments.
    #[inline(always)]
    pub(super) fn facts(&self, slot: Slot) -> (u16, u32, u16) {
        let Entry { head, length, segments, .. } = *self.entry(slot);
        (head, length, segments)
    }

    /// Lowers a chain's length to the number of bytes written to it.
    #[inline(always)]
    pub(super) fn set_written(&mut self, slot: Slot, written: u32) {
        let entry = self.entry_mut(slot);
        entry.length = entry.length.min(written);
    }

    /// Removes the `count` oldest listed segments, whose chains have finished, now or with a later call.
    #[cold]
    pub(super) fn forget(&mut self, count: usize) {
        self.gone += count;
        if self.gone == self.list.len() || (self.gone > KEPT && self.gone > self.list.len() / 2) {
            self.list.drain(..self.gone);
            self.first_listed = self.first_listed.wrapping_add(self.gone);
            self.gone = 0;
        }
    }
}
