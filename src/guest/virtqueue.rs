//! The device's end of one split virtqueue (virtio 1.3, section 2.7).
//!
//! A start resolves the ring's addresses to pointers. The verbs of a running ring are *pop* (`avail`),
//! *push used* (`used`), *publish* and *enable notifications* (`notification`).
//!
//! Invariant: chains complete in the order in which they were popped. A position in the ring therefore
//! identifies a chain, and the chains in flight are a range of positions. The used index always is the
//! position of the first chain that has not completed. The next start of the ring, in this daemon or the
//! next, resumes there and needs no other state.
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

/// The negotiated features that a ring depends on.
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
    /// Used index at the last decision about a call. `None` after a start: the used events before it are
    /// unknown, and an extra call is harmless.
    called_at: Option<u16>,
    /// Available index of the last request for a kick; `None` while notifications are disabled.
    notify_at: Option<u16>,
    /// Chains by position: those in flight, and those completed and not yet published.
    chains: ChainTable<'mem>,
    /// Flags of the heads in flight, by head.
    is_in_flight: Box<[bool]>,
    /// Bytes of the chains in flight.
    bytes: usize,
    /// Number of listed segments (of chains without exactly one) that completed since the last publication.
    listed: usize,
    /// Dirty log, if the frontend set one, and the guest's address of the used ring.
    log: Option<(&'mem DirtyLog, u64)>,
    /// Part of the frontend's inflight buffer for this ring, if it has one.
    inflight: Option<InflightRing<'mem>>,
    /// True if `log` or `inflight` is set.
    is_recorded: bool,
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
            notify_at: None,
            chains: ChainTable::new(size),
            is_in_flight: vec![false; usize::from(size)].into_boxed_slice(),
            bytes: 0,
            listed: 0,
            log: memory.log().map(|log| (&**log, layout.used.0)),
            inflight: None,
            is_recorded: memory.log().is_some(),
            direction: PhantomData,
        };
        let used = queue.used_u16(2).load(Ordering::Relaxed);
        (queue.next_avail, queue.seen_avail) = (used, used);
        (queue.next_used, queue.published) = (used, used);
        // The setting in the used ring is unknown, so assume that the driver kicks.
        queue.notify_at = Some(used);
        queue.load_avail()?;
        Ok(queue)
    }

    /// Records the chains in flight in the memory table's inflight buffer from now on, if it has one. `index`
    /// is the ring's index in the device.
    pub fn record_inflight(&mut self, index: u16) {
        self.inflight = self.memory.inflight().and_then(|buffer| buffer.ring(index, self.size));
        if let Some(inflight) = &mut self.inflight {
            inflight.clear(self.next_used);
            self.is_recorded = true;
        }
    }

    /// Returns the position of the first chain that has not completed; the next start resumes there.
    #[inline]
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Returns the position of the chain to pop next, after all chains in flight.
    #[inline]
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Returns the used index in guest memory: the position of the first chain not yet published.
    pub fn published(&self) -> u16 {
        self.published
    }

    /// Returns the number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Returns the number of chains in flight.
    #[inline]
    pub fn in_flight(&self) -> usize {
        self.next_avail.wrapping_sub(self.next_used).into()
    }

    /// Returns the number of chains that have completed since the last publication.
    #[inline]
    pub fn completed(&self) -> usize {
        self.next_used.wrapping_sub(self.published).into()
    }

    /// Returns the total length of the chains in flight, in bytes.
    #[inline]
    pub fn bytes_in_flight(&self) -> usize {
        self.bytes
    }

    /// Returns the chain at a position: in flight, or completed and not yet published. Of a completed
    /// device-writable chain, only the written bytes count. Any other position returns an earlier chain.
    #[inline]
    pub fn chain(&self, position: u16) -> Chain<'_, 'mem, D> {
        debug_assert!(
            position.wrapping_sub(self.published) < self.next_avail.wrapping_sub(self.published),
            "no chain is at {position}"
        );
        self.chains.chain(position)
    }

    /// Returns the segment of the [`chain`](Self::chain) at a position, if the chain has exactly one.
    #[inline(always)]
    pub fn only_piece(&self, position: u16) -> Option<Segment<'mem>> {
        self.chains.only_piece(position)
    }

    /// Returns the positions of chains in flight before `until`, oldest first. Returns none if `until` is
    /// neither among the chains in flight nor the position after the last.
    pub fn positions(&self, until: u16) -> impl ExactSizeIterator<Item = u16> + use<D> {
        let first = self.next_used;
        let count = until.wrapping_sub(first);
        let count = if usize::from(count) <= self.in_flight() { count } else { 0 };
        (0..count).map(move |index| first.wrapping_add(index))
    }

    /// Returns a 16-bit field of the available ring. `offset` must be even and below 6 + 2 × size.
    #[inline]
    fn avail_u16(&self, offset: usize) -> LittleEndian<'mem> {
        // SAFETY: `start` resolved the ring, which `memory` keeps mapped for `'mem`. The callers, all in this
        // module, pass an even offset within the ring.
        unsafe { avail_u16(self.avail, offset, self.size) }
    }

    /// Returns a 16-bit field of the used ring. `offset` must be even and below 6 + 8 × size.
    #[inline]
    fn used_u16(&self, offset: usize) -> LittleEndian<'mem> {
        debug_assert!(offset < 6 + 8 * usize::from(self.size));
        // SAFETY: `start` resolved that many bytes at an even address, which `memory` keeps mapped for `'mem`.
        // The callers, all in this module, pass an even offset within the ring.
        LittleEndian(unsafe { AtomicU16::from_ptr(self.used.add(offset).cast().as_ptr()) })
    }
}

/// Returns a 16-bit field of the available ring at `avail`.
///
/// # Safety
/// `avail` must point to 6 + 2 × `size` bytes at an even address, mapped for `'mem`. `offset` must be even and
/// below that length.
#[inline(always)]
unsafe fn avail_u16<'mem>(avail: NonNull<u8>, offset: usize, size: u16) -> LittleEndian<'mem> {
    debug_assert!(offset < 6 + 2 * usize::from(size));
    // SAFETY: the caller promises that the field is mapped for `'mem` and at an even address.
    LittleEndian(unsafe { AtomicU16::from_ptr(avail.add(offset).cast().as_ptr()) })
}
