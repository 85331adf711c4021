//! Descriptor chains in flight, as their virtqueue shows them.
//!
//! Invariant: a [`Chain`] is a view. It takes nothing from its virtqueue, so a chain can be neither lost
//! nor used twice; its direction is in its type; and it cannot outlive the memory table.

use std::fmt;
use std::marker::PhantomData;
use std::slice;

use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;

use crate::sys::segment::{ReadSegment, Segment};

/// Which way the device may use a chain's memory.
pub trait Direction: fmt::Debug + 'static {
    /// Whether the device writes it (the descriptors have `VIRTQ_DESC_F_WRITE`).
    const WRITABLE: bool;
    /// Whether a chain has a part that the device only reads, and behind it one that the device writes.
    const MIXED: bool = false;
    /// Flags of a descriptor that is a whole chain.
    const FLAGS: u16 = if Self::WRITABLE { VRING_DESC_F_WRITE as u16 } else { 0 };
}

/// Device-readable: a frame from the guest, on the transmitq.
#[derive(Debug)]
pub enum Readable {}

/// Device-writable: an empty buffer for a frame to the guest, on the receiveq.
#[derive(Debug)]
pub enum Writable {}

/// Device-readable, then device-writable: a command from the guest, on the controlq. A segment without
/// bytes stands between the two parts.
#[derive(Debug)]
pub enum Command {}

impl Direction for Readable {
    const WRITABLE: bool = false;
}

impl Direction for Writable {
    const WRITABLE: bool = true;
}

impl Direction for Command {
    const WRITABLE: bool = true;
    const MIXED: bool = true;
}

/// A descriptor chain in flight.
pub struct Chain<'q, 'mem, D: Direction> {
    /// The first piece, which is the only one where `list` is empty.
    first: Segment<'mem>,
    /// All pieces, of a chain that has several.
    list: &'q [Segment<'mem>],
    length: u32,
    head: u16,
    direction: PhantomData<D>,
}

impl<'q, 'mem, D: Direction> Chain<'q, 'mem, D> {
    /// A chain of one piece.
    #[inline]
    pub(super) fn of_one(head: u16, piece: Segment<'mem>) -> Self {
        let length = piece.len() as u32;
        Chain { first: piece, list: &[], length, head, direction: PhantomData }
    }

    /// A chain of any number of pieces, `length` bytes together.
    #[inline]
    pub(super) fn of_list(head: u16, list: &'q [Segment<'mem>], length: u32) -> Self {
        let first = list.first().copied().unwrap_or(Segment::EMPTY);
        Chain { first, list, length, head, direction: PhantomData }
    }

    /// Index of the chain's first descriptor, by which the driver knows it.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes in all segments together.
    #[inline]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.length as usize
    }

    /// The chain's memory, in order.
    #[inline]
    pub fn segments(&self) -> &[Segment<'mem>] {
        match self.list {
            [] if self.first.len() == 0 => &[],
            [] => slice::from_ref(&self.first),
            list => list,
        }
    }

    /// The chain's memory without its first `bytes`, in order.
    #[inline]
    pub fn segments_after(&self, bytes: usize) -> impl Iterator<Item = Segment<'mem>> + Clone {
        let mut skip = bytes;
        self.segments().iter().filter_map(move |segment| {
            let skipped = skip.min(segment.len());
            skip -= skipped;
            (skipped < segment.len()).then(|| segment.skip(skipped))
        })
    }

    /// The first piece of [`segments_after`](Self::segments_after), if there is one.
    #[inline]
    pub fn first_after(&self, bytes: usize) -> Option<Segment<'mem>> {
        match self.list {
            [] => (bytes < self.first.len()).then(|| self.first.skip(bytes)),
            _ => self.first_of_list_after(bytes),
        }
    }

    /// All of the chain's memory, if it is in one piece.
    #[inline(always)]
    pub fn only_piece(&self) -> Option<Segment<'mem>> {
        self.list.is_empty().then_some(self.first)
    }

    /// The first piece of [`segments_after`](Self::segments_after), if nothing follows it.
    #[inline]
    pub fn only_after(&self, bytes: usize) -> Option<Segment<'mem>> {
        self.list.is_empty().then(|| self.first_after(bytes)).flatten()
    }

    #[inline(never)]
    fn first_of_list_after(&self, bytes: usize) -> Option<Segment<'mem>> {
        self.segments_after(bytes).next()
    }

    /// A copy of the chain's first bytes; zeros stand for those that it does not have.
    #[inline]
    pub fn first_bytes<const N: usize>(&self) -> [u8; N] {
        match self.first.first_bytes() {
            Some(bytes) => bytes,
            None => {
                let mut bytes = [0; N];
                self.read_pieces(&mut bytes);
                bytes
            }
        }
    }

    /// Copies the chain's first bytes to `target`; returns how many there were.
    #[inline]
    pub fn read_start(&self, target: &mut [u8]) -> usize {
        match self.list {
            [] => self.first.read(target),
            _ => self.read_pieces(target),
        }
    }

    #[inline(never)]
    fn read_pieces(&self, target: &mut [u8]) -> usize {
        let mut done = 0;
        for segment in self.segments() {
            if done == target.len() {
                break;
            }
            done += segment.read(&mut target[done..]);
        }
        done
    }
}

impl Chain<'_, '_, Writable> {
    /// Writes `bytes` at `offset`, as far as the chain reaches.
    #[inline]
    pub fn write_at(&self, offset: usize, bytes: &[u8]) {
        if self.list.is_empty() && self.first.len() >= offset + bytes.len() {
            self.first.skip(offset).write(bytes);
        } else {
            self.write_pieces(offset, bytes);
        }
    }

    #[inline(never)]
    fn write_pieces(&self, offset: usize, bytes: &[u8]) {
        let mut rest = bytes;
        for segment in self.segments_after(offset) {
            if rest.is_empty() {
                return;
            }
            rest = &rest[segment.write(rest)..];
        }
    }

    /// Copies `source`'s bytes from `offset` on to this chain's start; returns how many it took.
    #[inline]
    pub fn copy_from(&self, source: &Chain<'_, '_, Readable>, offset: usize) -> usize {
        if let ([], Some(only)) = (self.list, source.only_after(offset)) {
            return self.first.copy_from(only);
        }
        self.copy_pieces(source, offset)
    }

    #[inline(never)]
    fn copy_pieces(&self, source: &Chain<'_, '_, Readable>, offset: usize) -> usize {
        let mut done = 0;
        for piece in source.segments_after(offset) {
            let copied = self.copy_segment(done, piece);
            done += copied;
            if copied < piece.len() {
                break;
            }
        }
        done
    }

    /// Copies `source` to `offset` and behind it, as far as the chain reaches; returns how many
    /// bytes it took.
    pub fn copy_segment<'a>(&self, offset: usize, source: impl Into<ReadSegment<'a>>) -> usize {
        let source = source.into();
        let mut done = 0;
        for target in self.segments_after(offset) {
            if done == source.len() {
                break;
            }
            done += target.copy_from(source.skip(done));
        }
        done
    }
}

impl<'mem> Chain<'_, 'mem, Command> {
    /// The command's memory, and that for its answer.
    pub fn parts(&self) -> (&[Segment<'mem>], &[Segment<'mem>]) {
        let mut parts = self.segments().splitn(2, |segment| segment.len() == 0);
        (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
    }
}

impl Chain<'_, '_, Readable> {
    /// Copies the chain's bytes from `offset` on to `target`, as many as both have; returns how
    /// many those were.
    #[inline]
    pub fn copy_to(&self, offset: usize, target: &Segment<'_>) -> usize {
        let mut done = 0;
        for source in self.segments_after(offset) {
            if done == target.len() {
                break;
            }
            done += target.skip(done).copy_from(source);
        }
        done
    }
}

impl<D: Direction> fmt::Debug for Chain<'_, '_, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain")
            .field("head", &self.head)
            .field("segments", &self.segments())
            .finish()
    }
}
