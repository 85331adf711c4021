//! What became of frames in a turn: a port notes it, and the worker counts, publishes and records it.
//!
//! Invariant: frames from the guest that are kept for a capture stand in the order of the ring, one for each
//! position.

use std::collections::VecDeque;

use crate::counters::{CopyReason, DropReason};
use crate::guest::{Readable, Virtqueue};
use crate::vnet_header::{HeaderCopy, SegmentationOverhead};

/// What became of a frame from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was handed to the host.
    Sent,
    /// It was dropped.
    Dropped(DropReason),
}

/// Frames and bytes of a burst, headers excluded.
#[derive(Debug, Clone, Copy, Default)]
pub struct Moved {
    /// Frames.
    pub frames: u64,
    /// Bytes, virtio headers excluded.
    pub bytes: u64,
    /// What the frames are on the wire beyond themselves.
    pub overhead: SegmentationOverhead,
}

/// What became of frames in a turn: the sums, and what is not in a chain's used entry.
#[derive(Debug, Default)]
pub struct Completions {
    /// Frames that the guest was given.
    pub rx: Moved,
    /// Frames from the guest that were sent.
    pub tx: Moved,
    /// Frames that never reached the guest, why, and how many.
    pub rx_dropped: Vec<(DropReason, u64)>,
    /// Frames from the guest that were not sent, why, and how many.
    pub tx_dropped: Vec<(DropReason, u64)>,
    /// For each frame to the guest that was copied in user space, why.
    pub rx_copied: Vec<CopyReason>,
    /// The same for frames from the guest.
    pub tx_copied: Vec<CopyReason>,
    /// Whether somebody captures frames.
    pub captures: bool,
    /// While somebody does: frames from the guest that have completed, or will, oldest first.
    pub captured: VecDeque<Captured>,
}

/// A frame from the guest, as a capture shows it.
#[derive(Debug)]
pub struct Captured {
    /// Position of its chain.
    pub position: u16,
    /// What was checked of it, and sent; nothing of a frame that was not looked at.
    pub start: Option<HeaderCopy>,
    /// What became of it.
    pub outcome: Outcome,
}

impl Completions {
    /// Keeps what [`admit`](super::admit) copied of a frame for the capture.
    #[inline(never)]
    pub(super) fn capture(&mut self, position: u16, start: &HeaderCopy, outcome: Outcome) {
        // Of these nothing was copied.
        let unread =
            [DropReason::TooShort, DropReason::TooLong].map(Outcome::Dropped).contains(&outcome);
        let start = (!unread).then(|| start.clone());
        // A frame that was to be segmented can be begun twice.
        self.captured.pop_back_if(|last| last.position == position);
        self.captured.push_back(Captured { position, start, outcome });
    }

    /// Completes the oldest frame from the guest, which is not sent.
    #[inline(never)]
    pub(super) fn drop_oldest(&mut self, tx: &mut Virtqueue<'_, Readable>, reason: DropReason) {
        let position = tx.next_used();
        let outcome = Outcome::Dropped(reason);
        // Younger frames may be there already.
        let age = |position: u16| position.wrapping_sub(tx.published());
        let place = self.captured.partition_point(|it| age(it.position) < age(position));
        match self.captured.get_mut(place).filter(|it| it.position == position) {
            Some(captured) => captured.outcome = outcome,
            None if self.captures => {
                self.captured.insert(place, Captured { position, start: None, outcome });
            }
            None => {}
        }
        match self.tx_dropped.last_mut() {
            Some((last, count)) if *last == reason => *count += 1,
            _ => self.tx_dropped.push((reason, 1)),
        }
        tx.push_used(0);
    }

    /// Completes all frames from the guest before position `until` as dropped.
    pub fn drop_all(&mut self, tx: &mut Virtqueue<'_, Readable>, until: u16, reason: DropReason) {
        for _ in tx.positions(until) {
            self.drop_oldest(tx, reason);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::guest::{Budget, GuestMemory, Notification, RegionRequest, RingLayout};
    use crate::sys::process::sealed_memory;

    /// A tx ring on memory of a page, in which the driver has made four chains of a byte available.
    fn memory() -> GuestMemory {
        let file = sealed_memory(c"port", 0x1000).unwrap();
        for head in 0..4_u16 {
            let place = u64::from(head);
            file.write_all_at(&0x800_u64.to_le_bytes(), 16 * place).unwrap();
            file.write_all_at(&1_u32.to_le_bytes(), 16 * place + 8).unwrap();
            file.write_all_at(&head.to_le_bytes(), 0x100 + 4 + 2 * place).unwrap();
        }
        file.write_all_at(&4_u16.to_le_bytes(), 0x100 + 2).unwrap();
        let request =
            RegionRequest { guest_address: 0, size: 0x1000, frontend_address: 0, file_offset: 0 };
        GuestMemory::map([(request, file)]).unwrap()
    }

    fn ring(memory: &GuestMemory) -> Virtqueue<'_, Readable> {
        let [descriptors, avail, used] = [0, 0x100, 0x200].map(GuestAddress);
        let layout = RingLayout { size: 4, descriptors, avail, used };
        let notification = Notification { event_idx: false, indirect: false };
        let mut tx = Virtqueue::start(memory, layout, notification).unwrap();
        assert_eq!(tx.pop(Budget { chains: 4, bytes: usize::MAX }), Ok(4));
        tx
    }

    #[test]
    fn captured_frames_stay_in_the_order_of_the_ring() {
        let memory = memory();
        let mut tx = ring(&memory);
        let mut done = Completions { captures: true, ..Completions::default() };
        // A younger frame was kept first, when a capture began.
        done.capture(2, &HeaderCopy::default(), Outcome::Sent);
        done.drop_oldest(&mut tx, DropReason::TooShort);
        done.drop_oldest(&mut tx, DropReason::TooLong);
        done.drop_oldest(&mut tx, DropReason::HostRefused);
        let kept: Vec<_> = done.captured.iter().map(|it| (it.position, it.outcome)).collect();
        let dropped = [DropReason::TooShort, DropReason::TooLong, DropReason::HostRefused]
            .map(Outcome::Dropped);
        assert_eq!(kept, [(0, dropped[0]), (1, dropped[1]), (2, dropped[2])]);
    }

    #[test]
    fn positions_beyond_the_chains_in_flight_complete_nothing() {
        let memory = memory();
        let mut tx = ring(&memory);
        let mut done = Completions::default();
        done.drop_all(&mut tx, 3, DropReason::Disabled);
        assert_eq!((tx.completed(), tx.in_flight()), (3, 1));
        // A port that was told of nothing since stands behind.
        for until in [0, 2, 5, 0xffff] {
            done.drop_all(&mut tx, until, DropReason::HostRefused);
            assert_eq!((tx.completed(), tx.in_flight()), (3, 1), "{until}");
        }
    }
}
