//! Frames from the guest, on their way through the tx ring and back out of the completion ring.
//!
//! A frame in one piece is sent from where the guest put it. One that needs a checksum, lies in
//! several pieces, or was judged by rules, which its headers must not change after, is copied into
//! the bounce area: measured, that costs a tenth of what the kernel takes for a frame of two descriptors
//! (docs/af-xdp.md). So is each segment of a frame that is to be cut.
//!
//! Invariant: a chain completes when the kernel has completed its frame, and in the order of the ring.
//! The kernel completes an address as it got it, so each carries its frame's number in
//! the part that the kernel only adds to the rest.

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

/// Calls for one burst at the most: a kernel before Linux 6.17 sends 32 frames at a time.
const SENDS: usize = 16;

/// Frames from the guest on their way.
#[derive(Debug)]
pub(super) struct Transmitter {
    pair: u16,
    stages: TxStages,
    /// The start of the frame that was admitted last.
    start: HeaderCopy,
    /// How that frame is being cut, and where in its payload the next segment begins.
    cut: Option<(Segmentation, usize)>,
    frames: Frames,
    /// Position of the chain to take next: those before it are in `frames`.
    next: u16,
    /// A frame whose checksum is completed.
    scratch: Vec<u8>,
    /// The kernel has not taken everything yet.
    unfinished: bool,
}

impl Transmitter {
    /// For a session that begins at position `next`.
    pub(super) fn new(config: &SessionConfig, pair: u16, next: u16) -> Self {
        Transmitter {
            pair,
            stages: config.tx_stages(0),
            start: HeaderCopy::default(),
            cut: None,
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

    /// Whether the kernel has frames of ours.
    pub(super) fn has_frames(&self) -> bool {
        self.frames.len() > 0
    }

    /// Hands the frames before position `until` to the kernel, as far as there are places for them. Says
    /// whether it has taken all.
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
            // One that is not plain.
            let (chain, slot) = (tx.chain(self.next), self.frames.next_slot());
            match self.place_checked(&chain, slot, open, done) {
                Ok(descriptor) => {
                    open.socket.tx.stage(descriptor.tagged(slot));
                    // The last segment takes the chain with it.
                    let ends_chain = self.cut.is_none();
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

    /// Stages frames that ask for nothing, up to `room` of them, from where they lie, until one is of another
    /// kind; returns how many.
    #[inline(always)]
    fn stage_plain(
        &mut self,
        tx: &Virtqueue<'_, Readable>,
        until: u16,
        open: &mut OpenSocket,
        room: usize,
    ) -> usize {
        if self.cut.is_some() {
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

    /// Puts a frame that is not sent among the others.
    #[inline(never)]
    fn refuse(&mut self, reason: DropReason, done: &mut Completions) {
        self.stages.observe(self.next, &self.start, 0, Outcome::Dropped(reason), done);
        self.next = self.next.wrapping_add(1);
        self.frames.push(Frame::dropped(reason));
    }

    /// Has the kernel send what it was handed.
    ///
    /// # Errors
    /// If the device does not work any more.
    pub(super) fn kick(&mut self, open: &mut OpenSocket) -> io::Result<()> {
        if !self.unfinished {
            return Ok(());
        }
        if open.socket.tx.needs_wakeup() {
            for _ in 0..SENDS {
                let Err(error) = open.socket.send() else { break };
                match error.raw_os_error() {
                    Some(libc::EBUSY) => self.note_refused(open),
                    // It has sent as many as it does at a time, or there is no memory for now.
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

    /// The device dropped the frame that the kernel took last: it is completed all the same.
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
            // Nearly always it is the oldest.
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

    /// Completes the chains of so many `whole` frames that were sent, and then of those that are the oldest.
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

    /// Completes the oldest frame, and its chain if that ends with it.
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

    /// Whether the kernel is busy with frames: handed to the device, and not completed.
    pub(super) fn is_waiting(&self, open: &mut OpenSocket) -> bool {
        self.frames.pending().count() > open.socket.tx.pending() as usize
    }

    /// Takes back what the kernel has, whose socket is closed next: nothing of it is touched from then on.
    /// Chains that it has not sent stay in flight.
    pub(super) fn stop(
        &mut self,
        tx: &mut Virtqueue<'_, Readable>,
        open: &mut OpenSocket,
        done: &mut Completions,
    ) {
        // The tx ring is taken from in order: what is left there are the youngest.
        let mut unsent = open.socket.tx.pending() as usize;
        while unsent > 0
            && let Some(youngest) = self.frames.pop_youngest()
        {
            unsent -= usize::from(youngest.is_pending());
        }
        while self.frames.len() > 0 {
            self.complete_oldest(tx, done);
        }
        self.cut = None;
        self.frames = Frames::new();
        self.unfinished = false;
    }

    /// Drops what the kernel has not sent, or all frames before position `until`: the device does not work.
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
