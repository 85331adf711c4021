//! Frames that the kernel has, by their numbers.

use super::super::umem::TX_SLOTS;
use crate::counters::DropReason;

/// The kernel has it.
const PENDING: u8 = 1;
/// Its chain ends with it: it is no segment that others of its chain follow.
const ENDS_CHAIN: u8 = 2;
/// It is a whole frame that the kernel has.
const WHOLE: u8 = PENDING | ENDS_CHAIN;

/// A frame on its way, or one that is dropped and waits for older ones.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame {
    state: u8,
    dropped: Option<DropReason>,
}

impl Frame {
    /// One that the kernel has.
    #[inline(always)]
    pub(super) fn pending(ends_chain: bool) -> Self {
        Frame { state: PENDING | if ends_chain { ENDS_CHAIN } else { 0 }, dropped: None }
    }

    /// One that is not sent.
    pub(super) fn dropped(reason: DropReason) -> Self {
        Frame { state: ENDS_CHAIN, dropped: Some(reason) }
    }

    /// Whether the kernel has it.
    pub(super) fn is_pending(&self) -> bool {
        self.state & PENDING != 0
    }

    /// Whether its chain completes with it.
    pub(super) fn ends_chain(&self) -> bool {
        self.state & ENDS_CHAIN != 0
    }

    /// Why it is dropped, if it is.
    pub(super) fn drop_reason(&self) -> Option<DropReason> {
        self.dropped
    }

    /// The kernel has it no more.
    pub(super) fn complete(&mut self) {
        self.state &= !PENDING;
    }

    /// The kernel has it, and does not send it.
    pub(super) fn refuse(&mut self) {
        self.dropped = Some(DropReason::HostRefused);
    }
}

/// Frames on their way: the oldest is number `oldest`, and the others follow. A frame's slot is its number
/// modulo [`TX_SLOTS`].
#[derive(Debug)]
pub(super) struct Frames {
    frames: [Frame; TX_SLOTS],
    oldest: usize,
    count: usize,
}

impl Frames {
    pub(super) fn new() -> Self {
        Frames { frames: [Frame { state: 0, dropped: None }; TX_SLOTS], oldest: 0, count: 0 }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// How many more there may be.
    pub(super) fn room(&self) -> usize {
        TX_SLOTS - self.count
    }

    /// The slot of the frame that is put in next.
    #[inline(always)]
    pub(super) fn next_slot(&self) -> usize {
        (self.oldest + self.count) % TX_SLOTS
    }

    /// Puts a frame in, where there is room.
    #[inline(always)]
    pub(super) fn push(&mut self, frame: Frame) {
        self.frames[self.next_slot()] = frame;
        self.count += 1;
    }

    /// How many frames are older than the one in a slot. It may be no frame.
    #[inline(always)]
    pub(super) fn age(&self, slot: usize) -> usize {
        slot.wrapping_sub(self.oldest) % TX_SLOTS
    }

    /// The frame that has so many older ones.
    #[inline(always)]
    pub(super) fn get(&self, age: usize) -> Option<&Frame> {
        (age < self.count).then(|| &self.frames[(self.oldest + age) % TX_SLOTS])
    }

    /// The same.
    pub(super) fn get_mut(&mut self, age: usize) -> Option<&mut Frame> {
        (age < self.count).then(|| &mut self.frames[(self.oldest + age) % TX_SLOTS])
    }

    /// Removes the oldest frame, if it is a whole one that is in this slot.
    #[inline(always)]
    pub(super) fn pop_whole(&mut self, slot: usize) -> bool {
        let oldest = self.oldest % TX_SLOTS;
        let Frame { state, dropped } = self.frames[oldest];
        let is_it = slot == oldest && self.count > 0 && state == WHOLE && dropped.is_none();
        self.oldest = self.oldest.wrapping_add(usize::from(is_it));
        self.count -= usize::from(is_it);
        is_it
    }

    /// Removes the oldest.
    pub(super) fn pop_oldest(&mut self) -> Option<Frame> {
        let frame = *self.get(0)?;
        self.oldest = self.oldest.wrapping_add(1);
        self.count -= 1;
        Some(frame)
    }

    /// Removes the youngest.
    pub(super) fn pop_youngest(&mut self) -> Option<Frame> {
        let frame = *self.get(self.count.checked_sub(1)?)?;
        self.count -= 1;
        Some(frame)
    }

    /// Ages of those that the kernel has, youngest first.
    pub(super) fn pending(&self) -> impl Iterator<Item = usize> {
        let is_pending = |age: &usize| self.get(*age).is_some_and(Frame::is_pending);
        (0..self.count).rev().filter(is_pending)
    }
}
