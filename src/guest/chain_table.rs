//! A virtqueue's own record of its chains, by their position in the ring: what each descriptor said when
//! it was read, once.
//!
//! Invariant: an entry's pieces are mapped for `'mem`, whether or not its chain is in flight.

use std::marker::PhantomData;
use std::ptr;

use super::chain::{Chain, Direction};
use crate::sys::segment::Segment;

/// Pieces of finished chains that are kept until it pays to move the others.
const KEPT: usize = 1024;

/// What is known of a chain.
#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Where its only piece is mapped. Of a chain with any other number of pieces: the number of its first
    /// one among all that there have been, here so that an entry has 16 bytes.
    start: *mut u8,
    length: u32,
    head: u16,
    pieces: u16,
}

impl Entry {
    const EMPTY: Self = Entry { start: ptr::dangling_mut(), length: 0, head: 0, pieces: 1 };
}

/// Notes chains of one piece.
pub(super) struct Writer<'t, 'mem> {
    entries: &'t mut [Entry],
    memory: PhantomData<&'t mut Segment<'mem>>,
}

/// A place in the ring, of the table that it is from.
#[derive(Clone, Copy)]
pub(super) struct Slot(usize);

impl Slot {
    /// That of a position. The number of entries is a power of two (`ChainTable::new`).
    #[inline(always)]
    fn of(position: usize, entries: &[Entry]) -> Self {
        Slot(position & (entries.len() - 1))
    }

    /// Its index, below the ring's size.
    #[inline(always)]
    pub(super) fn index(self) -> usize {
        self.0
    }
}

impl<'mem> Writer<'_, 'mem> {
    /// The place of a position.
    #[inline(always)]
    pub(super) fn slot(&self, position: usize) -> Slot {
        Slot::of(position, self.entries)
    }

    /// Notes a chain.
    #[inline(always)]
    pub(super) fn set_one(&mut self, Slot(slot): Slot, head: u16, piece: Segment<'mem>) {
        let (start, length) = (piece.start(), piece.len() as u32);
        // SAFETY: `slot` made it, below the length, which is a power of two (`ChainTable::new`).
        let entry = unsafe { self.entries.get_unchecked_mut(slot) };
        *entry = Entry { start, length, head, pieces: 1 };
    }
}

/// One entry for each place in the ring.
#[derive(Debug)]
pub(super) struct ChainTable<'mem> {
    entries: Box<[Entry]>,
    /// Pieces of chains that have several, oldest first: chains come and go in order.
    pieces: Vec<Segment<'mem>>,
    /// Number of the first of them among all that there have been.
    first_piece: usize,
    /// How many of them belong to chains that are gone.
    gone: usize,
}

impl<'mem> ChainTable<'mem> {
    /// For a ring of `size` entries.
    ///
    /// # Panics
    /// If that is no power of two.
    pub(super) fn new(size: u16) -> Self {
        assert!(size.is_power_of_two(), "a ring's size was checked");
        let entries = vec![Entry::EMPTY; usize::from(size)].into_boxed_slice();
        ChainTable { entries, pieces: Vec::new(), first_piece: 0, gone: 0 }
    }

    /// The place of a position.
    #[inline(always)]
    pub(super) fn slot(&self, position: u16) -> Slot {
        Slot::of(position.into(), &self.entries)
    }

    #[inline(always)]
    fn entry(&self, Slot(slot): Slot) -> &Entry {
        debug_assert!(slot < self.entries.len());
        // SAFETY: `slot` made it, below the length, which is a power of two (`new`).
        unsafe { self.entries.get_unchecked(slot) }
    }

    #[inline(always)]
    fn entry_mut(&mut self, Slot(slot): Slot) -> &mut Entry {
        debug_assert!(slot < self.entries.len());
        // SAFETY: as above.
        unsafe { self.entries.get_unchecked_mut(slot) }
    }

    /// Notes chains of one piece, many of them.
    #[inline(always)]
    pub(super) fn writer(&mut self) -> Writer<'_, 'mem> {
        Writer { entries: &mut self.entries, memory: PhantomData }
    }

    /// Notes a chain of the pieces that `collect` adds to the list; it returns their bytes.
    ///
    /// # Errors
    /// Those of `collect`; nothing is noted then.
    pub(super) fn set_list<E>(
        &mut self,
        position: u16,
        head: u16,
        collect: impl FnOnce(&mut Vec<Segment<'mem>>) -> Result<u32, E>,
    ) -> Result<u32, E> {
        let before = self.pieces.len();
        let length = collect(&mut self.pieces).inspect_err(|_| self.pieces.truncate(before))?;
        let pieces = (self.pieces.len() - before) as u16;
        let entry = match self.pieces[before..] {
            [only] => {
                self.pieces.truncate(before);
                Entry { start: only.start(), length, head, pieces }
            }
            _ => {
                let start = ptr::without_provenance_mut(self.first_piece + before);
                Entry { start, length, head, pieces }
            }
        };
        *self.entry_mut(self.slot(position)) = entry;
        Ok(length)
    }

    /// The chain that was noted last for this place.
    #[inline]
    pub(super) fn chain<D: Direction>(&self, position: u16) -> Chain<'_, 'mem, D> {
        let Entry { start, length, head, pieces } = *self.entry(self.slot(position));
        if pieces == 1 {
            // SAFETY: `Writer::set_one` or `set_list` took it from a segment at least as long.
            return Chain::of_one(head, unsafe { Segment::at(start, length as usize) });
        }
        let first = start.addr().wrapping_sub(self.first_piece);
        let list = self.pieces.get(first..first + usize::from(pieces)).unwrap_or_default();
        Chain::of_list(head, list, length)
    }

    /// The only piece of that chain, unless it has any other number of them.
    #[inline(always)]
    pub(super) fn only_piece(&self, position: u16) -> Option<Segment<'mem>> {
        let Entry { start, length, pieces, .. } = *self.entry(self.slot(position));
        // SAFETY: as above.
        (pieces == 1).then(|| unsafe { Segment::at(start, length as usize) })
    }

    /// Head and length in bytes of a chain, and how many pieces it has.
    #[inline(always)]
    pub(super) fn facts(&self, slot: Slot) -> (u16, u32, u16) {
        let Entry { head, length, pieces, .. } = *self.entry(slot);
        (head, length, pieces)
    }

    /// Notes how many bytes of a chain have been written, in place of how many it has.
    #[inline(always)]
    pub(super) fn set_written(&mut self, slot: Slot, written: u32) {
        let entry = self.entry_mut(slot);
        entry.length = entry.length.min(written);
    }

    /// Forgets the `count` oldest pieces of chains that have several: these are gone.
    #[cold]
    pub(super) fn forget(&mut self, count: usize) {
        self.gone += count;
        if self.gone == self.pieces.len() || (self.gone > KEPT && self.gone > self.pieces.len() / 2)
        {
            self.pieces.drain(..self.gone);
            self.first_piece = self.first_piece.wrapping_add(self.gone);
            self.gone = 0;
        }
    }
}
