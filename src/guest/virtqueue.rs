//! The device's end of one split virtqueue (virtio 1.3, section 2.7).
//!
//! Ring addresses are resolved to pointers once, when the ring starts; from then on the verbs are
//! *pop* (`avail`), *push used* (`used`), *publish* and *enable notifications* (`notification`).
//!
//! Invariant: chains complete in the order in which they were popped, so a position in the ring is a
//! chain's identity, and the chains in flight are a range of positions. At any time the used index is the
//! first chain that has not completed, and whoever starts the ring next, this daemon or its successor,
//! resumes there without asking anybody.
//!
//! ```text
//! published  ≤  next_used  ≤  next_avail  ≤  seen_avail
//!      '- completed -'- in flight -'- to be popped -'
//! ```

mod avail;
mod notification;
mod used;

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use super::chain::{Chain, Direction};
use super::chain_table::ChainTable;
use super::descriptors::Descriptors;
use super::dirty::DirtyLog;
use super::fault::Fault;
use super::inflight::InflightRing;
use super::layout::RingLayout;
use super::memory::GuestMemory;
use super::notify::{LittleEndian, Shared};
use crate::sys::segment::Segment;

pub use avail::Budget;
pub use notification::Published;

/// How driver and device tell each other about their progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notification {
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC` was negotiated.
    pub indirect: bool,
}

/// A running ring of one direction.
#[derive(Debug)]
pub struct Virtqueue<'mem, D: Direction> {
    memory: &'mem GuestMemory,
    descriptors: Descriptors<'mem>,
    avail: NonNull<u8>,
    used: NonNull<u8>,
    size: u16,
    event_idx: bool,
    /// Position of the chain to pop next.
    next_avail: u16,
    /// The driver's available index as it was last read.
    seen_avail: u16,
    /// Position of the chain to complete next.
    next_used: u16,
    /// The used index in guest memory.
    published: u16,
    /// Used index at the last decision about a call; nothing after a start, when the driver's
    /// wishes before it are unknown and a call too many does no harm.
    called_at: Option<u16>,
    /// Available index at which the driver was last told to kick.
    armed: Option<u16>,
    /// The chains by position, those that have completed and are not published among them.
    chains: ChainTable<'mem>,
    /// For each head, whether it is in flight.
    is_in_flight: Box<[bool]>,
    /// Bytes of the chains in flight.
    bytes: usize,
    /// Pieces of chains that have several, and have completed since the last publication.
    pieces: usize,
    /// Where it is noted what is written, and the guest's address of the used ring.
    log: Option<(&'mem DirtyLog, u64)>,
    /// Where it is noted for the frontend which chains are in flight.
    inflight: Option<InflightRing<'mem>>,
    /// One of the two is there.
    is_noted: bool,
    direction: PhantomData<D>,
}

impl<'mem, D: Direction> Virtqueue<'mem, D> {
    /// Starts the ring at the used index in guest memory.
    ///
    /// # Errors
    /// A [`Fault`] if the layout is not allowed, or indices in guest memory contradict each other.
    pub fn start(
        memory: &'mem GuestMemory,
        layout: RingLayout,
        notification: Notification,
    ) -> Result<Self, Fault> {
        let [descriptors, avail, used] = layout.resolve(memory)?;
        let Notification { event_idx, indirect } = notification;
        let size = layout.size;
        let mut queue = Virtqueue {
            memory,
            descriptors: Descriptors::new(memory, descriptors, size, indirect),
            avail,
            used,
            size,
            event_idx,
            next_avail: 0,
            seen_avail: 0,
            next_used: 0,
            published: 0,
            called_at: None,
            armed: None,
            chains: ChainTable::new(size),
            is_in_flight: vec![false; usize::from(size)].into_boxed_slice(),
            bytes: 0,
            pieces: 0,
            log: memory.log().map(|log| (&**log, layout.used.0)),
            inflight: None,
            is_noted: memory.log().is_some(),
            direction: PhantomData,
        };
        let used = queue.used_u16(2).load(Ordering::Relaxed);
        (queue.next_avail, queue.seen_avail) = (used, used);
        (queue.next_used, queue.published) = (used, used);
        // Nobody knows what it was told before.
        queue.armed = Some(used);
        queue.look()?;
        Ok(queue)
    }

    /// Notes in the table's inflight buffer, if it has one, which chains are in flight. `index` is the
    /// ring's among all of the card's.
    pub fn note_inflight(&mut self, index: u16) {
        self.inflight = self.memory.inflight().and_then(|buffer| buffer.ring(index, self.size));
        if let Some(inflight) = &mut self.inflight {
            inflight.clear(self.next_used);
            self.is_noted = true;
        }
    }

    /// Position of the first chain that has not completed: where the next start resumes.
    #[inline]
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Position of the chain that is popped next: the end of those in flight.
    #[inline]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The used index that the driver sees: the first chain that has completed since is there.
    pub fn published(&self) -> u16 {
        self.published
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Number of chains in flight.
    #[inline]
    pub fn in_flight(&self) -> usize {
        self.next_avail.wrapping_sub(self.next_used).into()
    }

    /// Number of chains that have completed since the last publication.
    #[inline]
    pub fn completed(&self) -> usize {
        self.next_used.wrapping_sub(self.published).into()
    }

    /// Bytes of all chains in flight.
    #[inline]
    pub fn bytes_in_flight(&self) -> usize {
        self.bytes
    }

    /// The chain at a position: one in flight, or one that has completed and is not published, of which
    /// only what was written counts. Any other position gives a chain that was in its place.
    #[inline]
    pub fn chain(&self, position: u16) -> Chain<'_, 'mem, D> {
        debug_assert!(
            position.wrapping_sub(self.published) < self.next_avail.wrapping_sub(self.published),
            "no chain is at {position}"
        );
        self.chains.chain(position)
    }

    /// The only piece of the chain at a position, as [`chain`](Self::chain) shows it, unless it has any other
    /// number of pieces.
    #[inline(always)]
    pub fn only_piece(&self, position: u16) -> Option<Segment<'mem>> {
        self.chains.only_piece(position)
    }

    /// Positions of chains in flight before `until`, oldest first; none if `until` is not among them, nor
    /// right behind them.
    pub fn positions(&self, until: u16) -> impl ExactSizeIterator<Item = u16> + use<D> {
        let first = self.next_used;
        let count = until.wrapping_sub(first);
        let count = if usize::from(count) <= self.in_flight() { count } else { 0 };
        (0..count).map(move |index| first.wrapping_add(index))
    }

    #[inline]
    fn avail_u16(&self, offset: usize) -> LittleEndian<'mem> {
        // SAFETY: callers keep to it, and `start` has resolved the ring for `'mem`.
        unsafe { avail_u16(self.avail, offset, self.size) }
    }

    /// A 16-bit field of the used ring. Callers stay within 6 + 8 × size bytes.
    #[inline]
    fn used_u16(&self, offset: usize) -> LittleEndian<'mem> {
        debug_assert!(offset < 6 + 8 * usize::from(self.size));
        // SAFETY: `start` resolved that many bytes at an even address, for `'mem`, and offsets are even.
        LittleEndian(unsafe { AtomicU16::from_ptr(self.used.add(offset).cast().as_ptr()) })
    }
}

/// A 16-bit field of the available ring at `avail`, which `start` has resolved.
///
/// # Safety
/// The offset is even, and below 6 + 2 × size bytes, which are mapped for `'mem`.
#[inline(always)]
unsafe fn avail_u16<'mem>(avail: NonNull<u8>, offset: usize, size: u16) -> LittleEndian<'mem> {
    debug_assert!(offset < 6 + 2 * usize::from(size));
    // SAFETY: the caller's; the ring is at an even address.
    LittleEndian(unsafe { AtomicU16::from_ptr(avail.add(offset).cast().as_ptr()) })
}
