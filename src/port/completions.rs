//! The outcome of the frames of a turn: a port notes it, and the worker counts, publishes and records it.
//!
//! Invariant: the tx frames kept for a capture are in the order of the ring, at most one for each position.

use std::collections::VecDeque;

use crate::counters::{CopyReason, DropReason};
use crate::guest::{Readable, Virtqueue};
use crate::vnet_header::{HeaderCopy, SegmentationOverhead};

/// The outcome of a frame from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The host has accepted the frame.
    Sent,
    /// The frame was dropped.
    Dropped(DropReason),
}

/// Frames and bytes of a burst.
#[derive(Debug, Clone, Copy, Default)]
pub struct Moved {
    /// Frames. A GSO frame counts as one.
    pub frames: u64,
    /// Bytes, virtio-net headers excluded.
    pub bytes: u64,
    /// Packets and bytes that segmentation adds on the wire.
    pub overhead: SegmentationOverhead,
}

/// The outcome of the frames of a turn: sums, and facts that a chain's used entry does not show.
#[derive(Debug, Default)]
pub struct Completions {
    /// Frames delivered to the guest.
    pub rx: Moved,
    /// Frames from the guest that the host has accepted.
    pub tx: Moved,
    /// Numbers of frames to the guest that were dropped, each with the reason.
    pub rx_dropped: Vec<(DropReason, u64)>,
    /// Numbers of frames from the guest that were dropped, each with the reason.
    pub tx_dropped: Vec<(DropReason, u64)>,
    /// Reasons of copies in user space, one for each copied frame to the guest.
    pub rx_copied: Vec<CopyReason>,
    /// Reasons of copies in user space, one for each copied frame from the guest.
    pub tx_copied: Vec<CopyReason>,
    /// Whether an operator captures frames.
    pub captures: bool,
    /// During a capture, frames from the guest that have completed or will complete, oldest first.
    pub captured: VecDeque<Captured>,
}

/// A frame from the guest, kept for a capture.
#[derive(Debug)]
pub struct Captured {
    /// Position of its chain.
    pub position: u16,
    /// The checked start that was sent; `None` if no byte of the frame was copied.
    pub start: Option<HeaderCopy>,
    /// The frame's outcome.
    pub outcome: Outcome,
}

impl Completions {
    /// Keeps for the capture what [`TxStages::check`](super::TxStages::check) has copied of a frame.
    #[inline(never)]
    pub(super) fn capture(&mut self, position: u16, start: &HeaderCopy, outcome: Outcome) {
        // No byte of these was copied.
        let unread =
            [DropReason::TooShort, DropReason::TooLong].map(Outcome::Dropped).contains(&outcome);
        let start = (!unread).then(|| start.clone());
        // The port may begin a GSO frame twice.
        self.captured.pop_back_if(|last| last.position == position);
        self.captured.push_back(Captured { position, start, outcome });
    }

    /// Completes the oldest frame from the guest as dropped.
    #[inline(never)]
    pub(super) fn drop_oldest(&mut self, tx: &mut Virtqueue<'_, Readable>, reason: DropReason) {
        let position = tx.next_used();
        let outcome = Outcome::Dropped(reason);
        // Younger frames may be kept already.
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

    /// Creates memory of one page with a tx ring, in which the driver has made four chains of one byte available.
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
        // The capture began after a younger frame was kept.
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
        // A port that has not been called since may pass an old position.
        for until in [0, 2, 5, 0xffff] {
            done.drop_all(&mut tx, until, DropReason::HostRefused);
            assert_eq!((tx.completed(), tx.in_flight()), (3, 1), "{until}");
        }
    }
}
