//! Views of descriptor chains in flight.
//!
//! Invariant: a [`Chain`] removes nothing from its virtqueue, so a chain can be neither lost nor completed
//! twice. Its type fixes its direction, and its lifetime ends before the memory table's.

use std::fmt;
use std::marker::PhantomData;
use std::slice;

use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;

use crate::sys::segment::{ReadSegment, Segment};

/// Access of the device to a chain's memory.
pub trait Direction: fmt::Debug + 'static {
    /// True if the device writes the memory (descriptors have `VIRTQ_DESC_F_WRITE`).
    const WRITABLE: bool;
    /// True if a chain has a device-readable part, followed by a device-writable part.
    const MIXED: bool = false;
    /// Flags of a descriptor that is a whole chain.
    const FLAGS: u16 = if Self::WRITABLE { VRING_DESC_F_WRITE as u16 } else { 0 };
}

/// Device-readable chains: frames from the guest, on the transmitq.
#[derive(Debug)]
pub enum Readable {}

/// Device-writable chains: empty buffers for frames to the guest, on the receiveq.
#[derive(Debug)]
pub enum Writable {}

/// Device-readable, then device-writable chains: commands from the guest, on the controlq. An empty segment
/// separates the two parts.
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
    /// First segment; the only one if `list` is empty.
    first: Segment<'mem>,
    /// All segments, if the chain has several.
    list: &'q [Segment<'mem>],
    length: u32,
    head: u16,
    direction: PhantomData<D>,
}

impl<'q, 'mem, D: Direction> Chain<'q, 'mem, D> {
    /// Creates a chain of one segment.
    #[inline]
    pub(super) fn of_one(head: u16, segment: Segment<'mem>) -> Self {
        let length = segment.len() as u32;
        Chain { first: segment, list: &[], length, head, direction: PhantomData }
    }

    /// Creates a chain of any number of segments, with `length` bytes in total.
    #[inline]
    pub(super) fn of_list(head: u16, list: &'q [Segment<'mem>], length: u32) -> Self {
        let first = list.first().copied().unwrap_or(Segment::EMPTY);
        Chain { first, list, length, head, direction: PhantomData }
    }

    /// Returns the index of the chain's first descriptor, which identifies the chain to the driver.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Returns the total length of all segments, in bytes.
    #[inline]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.length as usize
    }

    /// Returns the chain's memory, in order.
    #[inline]
    pub fn segments(&self) -> &[Segment<'mem>] {
        match self.list {
            [] if self.first.len() == 0 => &[],
            [] => slice::from_ref(&self.first),
            list => list,
        }
    }

    /// Returns the chain's memory without its first `bytes`, in order.
    #[inline]
    pub fn segments_after(&self, bytes: usize) -> impl Iterator<Item = Segment<'mem>> + Clone {
        let mut skip = bytes;
        self.segments().iter().filter_map(move |segment| {
            let skipped = skip.min(segment.len());
            skip -= skipped;
            (skipped < segment.len()).then(|| segment.skip(skipped))
        })
    }

    /// Returns the first segment of [`segments_after`](Self::segments_after), if any.
    #[inline]
    pub fn first_after(&self, bytes: usize) -> Option<Segment<'mem>> {
        match self.list {
            [] => (bytes < self.first.len()).then(|| self.first.skip(bytes)),
            _ => self.first_of_list_after(bytes),
        }
    }

    /// Returns all of the chain's memory, if it is one segment.
    #[inline(always)]
    pub fn only_piece(&self) -> Option<Segment<'mem>> {
        self.list.is_empty().then_some(self.first)
    }

    /// Returns the memory after the chain's first `bytes`, if the chain is one segment and longer.
    #[inline]
    pub fn only_after(&self, bytes: usize) -> Option<Segment<'mem>> {
        self.list.is_empty().then(|| self.first_after(bytes)).flatten()
    }

    #[inline(never)]
    fn first_of_list_after(&self, bytes: usize) -> Option<Segment<'mem>> {
        self.segments_after(bytes).next()
    }

    /// Copies the chain's first `N` bytes; pads a shorter chain with zeros.
    #[inline]
    pub fn first_bytes<const N: usize>(&self) -> [u8; N] {
        match self.first.first_bytes() {
            Some(bytes) => bytes,
            None => {
                let mut bytes = [0; N];
                self.read_list(&mut bytes);
                bytes
            }
        }
    }

    /// Copies the chain's first bytes to `target`; returns the number of bytes copied.
    #[inline]
    pub fn read_start(&self, target: &mut [u8]) -> usize {
        match self.list {
            [] => self.first.read(target),
            _ => self.read_list(target),
        }
    }

    #[inline(never)]
    fn read_list(&self, target: &mut [u8]) -> usize {
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
    /// Writes `bytes` at `offset`; ignores those beyond the chain's end.
    #[inline]
    pub fn write_at(&self, offset: usize, bytes: &[u8]) {
        if self.list.is_empty() && self.first.len() >= offset + bytes.len() {
            self.first.skip(offset).write(bytes);
        } else {
            self.write_list(offset, bytes);
        }
    }

    #[inline(never)]
    fn write_list(&self, offset: usize, bytes: &[u8]) {
        let mut rest = bytes;
        for segment in self.segments_after(offset) {
            if rest.is_empty() {
                return;
            }
            rest = &rest[segment.write(rest)..];
        }
    }

    /// Copies the bytes of `source` from `offset` to this chain's start; returns the number of bytes copied.
    #[inline]
    pub fn copy_from(&self, source: &Chain<'_, '_, Readable>, offset: usize) -> usize {
        if let ([], Some(only)) = (self.list, source.only_after(offset)) {
            return self.first.copy_from(only);
        }
        self.copy_list(source, offset)
    }

    #[inline(never)]
    fn copy_list(&self, source: &Chain<'_, '_, Readable>, offset: usize) -> usize {
        let mut done = 0;
        for segment in source.segments_after(offset) {
            let copied = self.copy_segment(done, segment);
            done += copied;
            if copied < segment.len() {
                break;
            }
        }
        done
    }

    /// Copies `source` to the chain's bytes from `offset`, up to the chain's end; returns the number of bytes
    /// copied.
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
    /// Returns the device-readable segments (the command) and the device-writable ones (the answer).
    pub fn parts(&self) -> (&[Segment<'mem>], &[Segment<'mem>]) {
        let mut parts = self.segments().splitn(2, |segment| segment.len() == 0);
        (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
    }
}

impl Chain<'_, '_, Readable> {
    /// Copies the chain's bytes from `offset` to `target`, up to the end of the shorter; returns the number
    /// of bytes copied.
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
