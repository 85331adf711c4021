//! Frames in transmission, by slot.

use super::super::umem::TX_BUFFERS;
use crate::counters::DropReason;

/// State bit: the kernel has not completed the frame.
const PENDING: u8 = 1;
/// State bit: no further segment of the same chain follows.
const ENDS_CHAIN: u8 = 2;
/// State of a whole, pending frame.
const WHOLE: u8 = PENDING | ENDS_CHAIN;

/// A frame or segment in transmission, or a dropped frame that waits for older ones to complete.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame {
    state: u8,
    dropped: Option<DropReason>,
}

impl Frame {
    /// Returns a frame that is submitted to the kernel.
    #[inline(always)]
    pub(super) fn pending(ends_chain: bool) -> Self {
        Frame { state: PENDING | if ends_chain { ENDS_CHAIN } else { 0 }, dropped: None }
    }

    /// Returns a frame that is not sent.
    pub(super) fn dropped(reason: DropReason) -> Self {
        Frame { state: ENDS_CHAIN, dropped: Some(reason) }
    }

    /// Returns true until the kernel has completed the frame.
    pub(super) fn is_pending(&self) -> bool {
        self.state & PENDING != 0
    }

    /// Returns true if the chain completes with this frame or segment.
    pub(super) fn ends_chain(&self) -> bool {
        self.state & ENDS_CHAIN != 0
    }

    /// Returns the reason if the frame is dropped.
    pub(super) fn drop_reason(&self) -> Option<DropReason> {
        self.dropped
    }

    /// Records that the kernel has completed the frame.
    pub(super) fn complete(&mut self) {
        self.state &= !PENDING;
    }

    /// Records that the device has refused the frame, which stays pending.
    pub(super) fn refuse(&mut self) {
        self.dropped = Some(DropReason::HostRefused);
    }
}

/// Frames in transmission, numbered in the order of submission from `oldest`. A frame's slot, and its bounce
/// buffer, is its number modulo [`TX_BUFFERS`].
#[derive(Debug)]
pub(super) struct Frames {
    frames: [Frame; TX_BUFFERS],
    oldest: usize,
    count: usize,
}

impl Frames {
    pub(super) fn new() -> Self {
        Frames { frames: [Frame { state: 0, dropped: None }; TX_BUFFERS], oldest: 0, count: 0 }
    }

    /// Returns the number of frames.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Returns the number of free slots.
    pub(super) fn room(&self) -> usize {
        TX_BUFFERS - self.count
    }

    /// Returns the slot of the next frame to be added.
    #[inline(always)]
    pub(super) fn next_slot(&self) -> usize {
        (self.oldest + self.count) % TX_BUFFERS
    }

    /// Adds the youngest frame. The caller checks `room` first.
    #[inline(always)]
    pub(super) fn push(&mut self, frame: Frame) {
        self.frames[self.next_slot()] = frame;
        self.count += 1;
    }

    /// Returns the number of frames older than the one in `slot`. A free slot gets an age of `len` or more.
    #[inline(always)]
    pub(super) fn age(&self, slot: usize) -> usize {
        slot.wrapping_sub(self.oldest) % TX_BUFFERS
    }

    /// Returns the frame that has `age` older ones.
    #[inline(always)]
    pub(super) fn get(&self, age: usize) -> Option<&Frame> {
        (age < self.count).then(|| &self.frames[(self.oldest + age) % TX_BUFFERS])
    }

    /// Returns the frame that has `age` older ones, for a change.
    pub(super) fn get_mut(&mut self, age: usize) -> Option<&mut Frame> {
        (age < self.count).then(|| &mut self.frames[(self.oldest + age) % TX_BUFFERS])
    }

    /// Removes the oldest frame if it is whole, pending and in this slot. Returns true if so.
    #[inline(always)]
    pub(super) fn pop_whole(&mut self, slot: usize) -> bool {
        let oldest = self.oldest % TX_BUFFERS;
        let Frame { state, dropped } = self.frames[oldest];
        let is_it = slot == oldest && self.count > 0 && state == WHOLE && dropped.is_none();
        self.oldest = self.oldest.wrapping_add(usize::from(is_it));
        self.count -= usize::from(is_it);
        is_it
    }

    /// Removes the oldest frame.
    pub(super) fn pop_oldest(&mut self) -> Option<Frame> {
        let frame = *self.get(0)?;
        self.oldest = self.oldest.wrapping_add(1);
        self.count -= 1;
        Some(frame)
    }

    /// Removes the youngest frame.
    pub(super) fn pop_youngest(&mut self) -> Option<Frame> {
        let frame = *self.get(self.count.checked_sub(1)?)?;
        self.count -= 1;
        Some(frame)
    }

    /// Iterates over the ages of pending frames, youngest first.
    pub(super) fn pending(&self) -> impl Iterator<Item = usize> {
        let is_pending = |age: &usize| self.get(*age).is_some_and(Frame::is_pending);
        (0..self.count).rev().filter(is_pending)
    }
}
