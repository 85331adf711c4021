//! Frames from the guest: submitted in the tx ring, completed through the completion ring.
//!
//! A frame in one piece is sent from guest memory. The transmitter copies a frame into a bounce buffer if it
//! needs a checksum, lies in several pieces, or has headers that a policy has checked, which must not change
//! afterwards. By measurement the copy costs a tenth of what the kernel takes for a frame of two descriptors
//! (docs/af-xdp.md). Each segment of a GSO frame is copied too.
//!
//! Invariant: a chain completes after the kernel has completed its frame, and in the order of the ring. The
//! kernel returns each address as it got it. So the address carries the frame's slot, in the upper part,
//! which the kernel adds to the lower part.

mod frames;
mod placement;

use std::io;

use frames::{Frame, Frames};

use super::interface::OpenSocket;
use super::segmentation::Segmentation;
use crate::counters::DropReason;
use crate::guest::{Readable, Virtqueue};
use crate::port::{Completions, Outcome, SessionConfig, TxStages};
use crate::sys::xsk::{ADDRESS_BITS, Descriptor};
use crate::vnet_header::HeaderCopy;

/// Most `send` calls for one burst: a kernel before Linux 6.17 sends 32 frames in a call.
const SENDS: usize = 16;

/// Frames from the guest in transmission.
#[derive(Debug)]
pub(super) struct Transmitter {
    pair: u16,
    stages: TxStages,
    /// Headers of the last checked frame.
    start: HeaderCopy,
    /// GSO frame that is being segmented, and the payload offset of its next segment in bytes.
    segmenting: Option<(Segmentation, usize)>,
    frames: Frames,
    /// Position of the next chain to submit. Chains in flight before it are in `frames`.
    next: u16,
    /// Copy of a frame while its checksum is computed.
    scratch: Vec<u8>,
    /// The tx ring has entries that the kernel has not taken.
    unfinished: bool,
}

impl Transmitter {
    /// Creates the transmitter of a session that begins at position `next`.
    pub(super) fn new(config: &SessionConfig, pair: u16, next: u16) -> Self {
        Transmitter {
            pair,
            stages: config.tx_stages(0),
            start: HeaderCopy::default(),
            segmenting: None,
            frames: Frames::new(),
            next,
            scratch: Vec::new(),
            unfinished: false,
        }
    }

    /// Prepares for a new socket.
    pub(super) fn begin(&mut self, open: &OpenSocket) {
        self.stages.headers.max_frame = open.umem.layout.longest;
        self.unfinished = false;
    }

    /// Returns true if frames are in transmission.
    pub(super) fn has_frames(&self) -> bool {
        self.frames.len() > 0
    }

    /// Submits the frames before position `until`, while the tx ring and `frames` have room. Returns true if
    /// it submitted all.
    pub(super) fn transmit(
        &mut self,
        tx: &mut Virtqueue<'_, Readable>,
        until: u16,
        open: &mut OpenSocket,
        done: &mut Completions,
    ) -> bool {
        self.stages.begin_burst(done);
        loop {
            let room = open.socket.tx.room(self.frames.room() as u32) as usize;
            let room = room - self.stage_plain(tx, until, open, room);
            if self.next == until || room == 0 {
                break;
            }
            // A frame that is not plain.
            let (chain, slot) = (tx.chain(self.next), self.frames.next_slot());
            match self.place_checked(&chain, slot, open, done) {
                Ok(descriptor) => {
                    open.socket.tx.stage(descriptor.tagged(slot));
                    // The chain completes with its last segment.
                    let ends_chain = self.segmenting.is_none();
                    self.next = self.next.wrapping_add(u16::from(ends_chain));
                    self.frames.push(Frame::pending(ends_chain));
                    self.unfinished = true;
                }
                Err(reason) => self.refuse(reason, done),
            }
        }
        open.socket.tx.submit();
        self.stages.end_burst();
        self.next == until
    }

    /// Stages frames without checksum or segmentation requests from guest memory, up to the first other
    /// frame. Takes at most `room` frames; returns their number.
    #[inline(always)]
    fn stage_plain(
        &mut self,
        tx: &Virtqueue<'_, Readable>,
        until: u16,
        open: &mut OpenSocket,
        room: usize,
    ) -> usize {
        if self.segmenting.is_some() {
            return 0;
        }
        let OpenSocket { socket, umem, .. } = open;
        let (main, header_length) = (umem.main_region(), self.stages.header_length());
        let mut batch = socket.tx.batch(room as u32);
        let mut next = self.next;
        let mut staged = 0;
        while next != until && staged < room {
            let piece = tx.only_piece(next).filter(|piece| self.stages.is_plain(piece));
            let Some(piece) = piece.map(|piece| piece.skip(header_length)) else { break };
            let address = main.address_of(&piece).or_else(|| umem.sendable(&piece));
            let Some(address) = address else { break };
            let descriptor = Descriptor { address, length: piece.len() as u32, options: 0 };
            batch.stage(descriptor.tagged(self.frames.next_slot()));
            self.frames.push(Frame::pending(true));
            next = next.wrapping_add(1);
            staged += 1;
        }
        self.next = next;
        self.unfinished |= staged > 0;
        staged
    }

    /// Records a dropped frame, whose chain completes in the order of the ring.
    #[inline(never)]
    fn refuse(&mut self, reason: DropReason, done: &mut Completions) {
        self.stages.observe(self.next, &self.start, 0, Outcome::Dropped(reason), done);
        self.next = self.next.wrapping_add(1);
        self.frames.push(Frame::dropped(reason));
    }

    /// Calls the kernel to send the submitted frames, if the ring asks for it.
    ///
    /// # Errors
    /// Any error but a busy device or a lack of memory: the device works no more.
    pub(super) fn kick(&mut self, open: &mut OpenSocket) -> io::Result<()> {
        if !self.unfinished {
            return Ok(());
        }
        if open.socket.tx.needs_wakeup() {
            for _ in 0..SENDS {
                let Err(error) = open.socket.send() else { break };
                match error.raw_os_error() {
                    Some(libc::EBUSY) => self.note_refused(open),
                    // The kernel has sent its maximum for one call, or lacks memory at the moment.
                    Some(libc::EAGAIN | libc::ENOBUFS | libc::EINTR) => {}
                    _ => return Err(error),
                }
                if open.socket.tx.pending() == 0 {
                    break;
                }
            }
        }
        self.unfinished = open.socket.tx.pending() > 0;
        Ok(())
    }

    /// Marks the frame that the kernel took last as dropped by the device. The kernel still completes it.
    fn note_refused(&mut self, open: &mut OpenSocket) {
        let unsent = open.socket.tx.pending() as usize;
        let age = self.frames.pending().nth(unsent);
        if let Some(frame) = age.and_then(|age| self.frames.get_mut(age)) {
            frame.refuse();
        }
    }

    /// Completes chains whose frames the kernel has completed.
    pub(super) fn reap(
        &mut self,
        tx: &mut Virtqueue<'_, Readable>,
        open: &mut OpenSocket,
        done: &mut Completions,
    ) {
        let mut whole = 0;
        let mut any = false;
        while let Some(address) = open.socket.completion.take() {
            any = true;
            let slot = (address >> ADDRESS_BITS) as usize;
            // Nearly always the frame is the oldest.
            if self.frames.pop_whole(slot) {
                whole += 1;
                continue;
            }
            let age = self.frames.age(slot);
            if let Some(frame) = self.frames.get_mut(age) {
                frame.complete();
            }
            self.complete_chains(tx, whole, done);
            whole = 0;
        }
        if any {
            open.socket.completion.release();
        }
        self.complete_chains(tx, whole, done);
    }

    /// Completes the chains of `whole` sent frames, then the oldest chains whose frames are completed or
    /// dropped.
    #[inline]
    fn complete_chains(
        &mut self,
        tx: &mut Virtqueue<'_, Readable>,
        whole: usize,
        done: &mut Completions,
    ) {
        let bytes = tx.push_used_run(whole) - whole * self.stages.header_length();
        done.tx.frames += whole as u64;
        done.tx.bytes += bytes as u64;
        while self.frames.get(0).is_some_and(|oldest| !oldest.is_pending()) {
            self.complete_oldest(tx, done);
        }
    }

    /// Completes the oldest frame, and its chain if the frame is the chain's last segment.
    #[inline(never)]
    fn complete_oldest(&mut self, tx: &mut Virtqueue<'_, Readable>, done: &mut Completions) {
        let Some(frame) = self.frames.pop_oldest().filter(Frame::ends_chain) else { return };
        match frame.drop_reason() {
            Some(reason) => done.drop_oldest(tx, reason),
            None => {
                done.tx.frames += 1;
                done.tx.bytes += (tx.push_used(0) - self.stages.header_length()) as u64;
            }
        }
    }

    /// Returns true if the kernel has taken frames from the tx ring and not completed them.
    pub(super) fn is_waiting(&self, open: &mut OpenSocket) -> bool {
        self.frames.pending().count() > open.socket.tx.pending() as usize
    }

    /// Completes the chains of frames that the kernel has taken, before the socket is closed. Chains of
    /// frames left in the tx ring stay in flight.
    pub(super) fn stop(
        &mut self,
        tx: &mut Virtqueue<'_, Readable>,
        open: &mut OpenSocket,
        done: &mut Completions,
    ) {
        // The kernel takes entries in order, so the youngest frames are left in the tx ring.
        let mut unsent = open.socket.tx.pending() as usize;
        while unsent > 0
            && let Some(youngest) = self.frames.pop_youngest()
        {
            unsent -= usize::from(youngest.is_pending());
        }
        while self.frames.len() > 0 {
            self.complete_oldest(tx, done);
        }
        self.segmenting = None;
        self.frames = Frames::new();
        self.unfinished = false;
    }

    /// Drops the frames that the kernel has not sent, or all frames before position `until`, since the device
    /// does not work.
    pub(super) fn drop_all(
        &mut self,
        tx: &mut Virtqueue<'_, Readable>,
        until: Option<u16>,
        done: &mut Completions,
    ) {
        self.next = until.unwrap_or(self.next);
        done.drop_all(tx, self.next, DropReason::HostRefused);
    }
}
