//! Frames from the guest, on their way through the tx ring and back out of the completion ring.
//!
//! A frame in one piece is sent from where the guest put it. One that needs a checksum, lies in
//! several pieces, or was judged by rules, which its headers must not change after, is copied into
//! the arena: measured, that costs a tenth of what the kernel takes for a frame of two descriptors (docs/af-xdp.md). So is each segment of a frame that is to be cut.
//!
//! Invariant: a chain is given back when the kernel has completed its frame, and in the order of
//! the ring. The kernel completes an address as it got it, so each carries its frame's number in
//! the part that the kernel only adds to the rest.

use std::collections::VecDeque;
use std::io;

use super::checksum;
use super::interface::OpenSocket;
use super::segmentation::Segmentation;
use super::umem::TX_SLOTS;
use crate::counters::{CopyReason, Drop};
use crate::guest::{Burst, Chain, Readable, Segment};
use crate::port::{Finished, KeptStarts, Outcome, Terms};
use crate::sys::xsk::{ADDRESS_BITS, Descriptor, checksum_request};
use crate::traffic::{Notes, Way};
use crate::vnet_header::{Admission, PrivateStart, Surplus, VnetHeader, admit};

/// Calls for one burst at the most: a kernel before Linux 6.17 sends 32 frames at a time.
const SENDS: usize = 16;

/// A frame on its way.
#[derive(Debug)]
struct InFlight<'mem> {
    /// What it came from; nothing for a segment that others of its chain follow.
    chain: Option<Chain<'mem, Readable>>,
    /// The kernel has it.
    pending: bool,
    outcome: Outcome,
}

/// Frames from the guest on their way.
#[derive(Debug)]
pub(super) struct Transmitter<'mem> {
    pair: u16,
    admission: Admission,
    notes: Notes,
    kept: KeptStarts,
    /// Whether admitted frames are noted, or their starts kept.
    watched: bool,
    /// The start of the frame that was admitted last.
    start: PrivateStart,
    /// How that frame is being cut, and where in its payload the next segment begins.
    cut: Option<(Segmentation, usize)>,
    /// Oldest first; their number is counted from `oldest`.
    in_flight: VecDeque<InFlight<'mem>>,
    /// Number of the oldest frame.
    oldest: usize,
    /// What is to be given back.
    pub(super) done: Vec<(Chain<'mem, Readable>, Outcome)>,
    copied: Vec<CopyReason>,
    /// What the frames admitted are on the wire beyond themselves.
    surplus: Surplus,
    /// Chains of frames that the kernel has not sent.
    unsent: Vec<Chain<'mem, Readable>>,
    /// A frame whose checksum is completed.
    scratch: Vec<u8>,
    /// The kernel has not taken everything yet.
    unfinished: bool,
}

impl<'mem> Transmitter<'mem> {
    pub(super) fn new(terms: &Terms, pair: u16) -> Self {
        Transmitter {
            pair,
            admission: terms.admission(0),
            notes: Notes::new(terms.tally.clone()),
            kept: KeptStarts::new(terms.capture.clone()),
            watched: false,
            start: PrivateStart::default(),
            cut: None,
            in_flight: VecDeque::with_capacity(TX_SLOTS),
            oldest: 0,
            done: Vec::new(),
            copied: Vec::new(),
            surplus: Surplus::default(),
            unsent: Vec::new(),
            scratch: Vec::new(),
            unfinished: false,
        }
    }

    /// Prepares for a new socket.
    pub(super) fn begin(&mut self, open: &OpenSocket) {
        self.admission.max_frame = open.umem.layout.longest;
        self.unfinished = false;
    }

    /// Whether the kernel has frames of ours.
    pub(super) fn has_frames(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// Hands frames to the kernel, as far as there are places for them.
    pub(super) fn transmit(&mut self, burst: &mut Burst<'mem, Readable>, open: &mut OpenSocket) {
        self.admission.filter.refresh();
        self.admission.peeks = self.notes.wanted();
        self.kept.refresh();
        self.watched = self.admission.peeks || self.kept.wanted;
        while self.in_flight.len() < TX_SLOTS && open.socket.tx.room() > 0 {
            let Some(chain) = burst.front() else { break };
            if self.cut.is_none()
                && let Err(reason) = self.begin_frame(chain)
            {
                let outcome = Outcome::Dropped(reason);
                if self.kept.wanted {
                    self.kept.keep(chain.head(), &self.start, outcome);
                }
                let chain = burst.pop_front();
                self.in_flight.push_back(InFlight { chain, pending: false, outcome });
                continue;
            }
            let slot = (self.oldest + self.in_flight.len()) % TX_SLOTS;
            let mut descriptor = match &self.cut {
                Some((how, offset)) => self.place_segment(chain, *how, *offset, slot, open),
                None => self.place(chain, slot, open),
            };
            // The kernel adds both parts, and completes them as they are: the slot comes back.
            descriptor.address -= slot as u64;
            descriptor.address |= (slot as u64) << ADDRESS_BITS;
            open.socket.tx.stage(descriptor);
            self.unfinished = true;
            // The last segment takes the chain with it.
            let chain = if self.cut.is_none() { burst.pop_front() } else { None };
            self.in_flight.push_back(InFlight { chain, pending: true, outcome: Outcome::Sent });
        }
        open.socket.tx.submit();
        self.notes.publish();
    }

    /// Checks the frame, and sees whether it is to be cut.
    #[inline]
    fn begin_frame(&mut self, chain: &Chain<'mem, Readable>) -> Result<(), Drop> {
        admit(chain, &self.admission, &mut self.start)?;
        if self.start.header().is_segmented() {
            self.begin_cut(chain)?;
        }
        if self.watched {
            self.watch(chain);
        }
        Ok(())
    }

    /// Sees how the frame that was just admitted is to be cut.
    // This and what follows by itself: most frames have no need of it.
    #[inline(never)]
    fn begin_cut(&mut self, chain: &Chain<'mem, Readable>) -> Result<(), Drop> {
        let header_length = self.admission.header_length;
        let length = chain.len() - header_length;
        let headers = &self.start.bytes()[header_length..];
        if let Some(how) = Segmentation::of(&self.start.header(), headers, length) {
            if how.longest() > self.admission.max_frame {
                return Err(Drop::TooLong);
            }
            self.cut = Some((how, 0));
            self.surplus += self.start.surplus(length);
        }
        Ok(())
    }

    /// Notes who sends the frame that was just admitted, and keeps its start for a capture.
    #[inline(never)]
    fn watch(&mut self, chain: &Chain<'mem, Readable>) {
        if self.kept.wanted {
            self.kept.keep(chain.head(), &self.start, Outcome::Sent);
        }
        if !self.admission.peeks {
            return;
        }
        let header_length = self.admission.header_length;
        let frame = &self.start.bytes()[header_length..];
        self.notes.note(Way::Tx, frame, chain.len() - header_length);
    }

    /// Where the frame is to be sent from.
    #[inline]
    fn place(
        &mut self,
        chain: &Chain<'mem, Readable>,
        slot: usize,
        open: &OpenSocket,
    ) -> Descriptor {
        let header_length = self.admission.header_length;
        let length = chain.len() - header_length;
        // Headers that were judged go out as they were then.
        let as_it_is = !self.start.header().needs_checksum() && !self.admission.judges();
        let in_place = chain
            .first_after(header_length)
            .filter(|piece| as_it_is && piece.len() == length)
            .and_then(|piece| open.umem.sendable(&piece));
        match in_place {
            Some(address) => Descriptor { address, length: length as u32, options: 0 },
            None => self.place_copy(chain, slot, open),
        }
    }

    /// Puts a copy of the frame into the arena.
    #[inline(never)]
    fn place_copy(
        &mut self,
        chain: &Chain<'mem, Readable>,
        slot: usize,
        open: &OpenSocket,
    ) -> Descriptor {
        let header_length = self.admission.header_length;
        let length = chain.len() - header_length;
        let (frame, address) = open.umem.tx_frame(self.pair, slot, length);
        chain.copy_to(header_length, &frame);
        frame.write(&self.start.bytes()[header_length..]);
        let (reason, options) = if self.start.header().needs_checksum() {
            (CopyReason::Checksum, self.complete(&frame, slot, open))
        } else if self.admission.judges() {
            (CopyReason::Rules, 0)
        } else {
            (CopyReason::Pieces, 0)
        };
        self.copied.push(reason);
        Descriptor { address, length: length as u32, options }
    }

    /// Puts the segment that begins at `offset` of the payload together, and goes on to the next.
    #[inline(never)]
    fn place_segment(
        &mut self,
        chain: &Chain<'mem, Readable>,
        how: Segmentation,
        offset: usize,
        slot: usize,
        open: &OpenSocket,
    ) -> Descriptor {
        let header_length = self.admission.header_length;
        let (headers, payload) = (how.headers(), how.payload_at(offset));
        let (frame, address) = open.umem.tx_frame(self.pair, slot, headers + payload);
        let whole = &self.start.bytes()[header_length..];
        frame.write(&how.headers_at(whole, offset)[..headers]);
        chain.copy_to(header_length + headers + offset, &frame.skip(headers));
        if how.is_last(offset) {
            self.copied.push(CopyReason::Segmentation);
            self.cut = None;
        } else {
            self.cut = Some((how, offset + payload));
        }
        let options = self.complete(&frame, slot, open);
        Descriptor { address, length: (headers + payload) as u32, options }
    }

    /// Has the checksum of a frame in the arena completed: by the kernel, or at once.
    fn complete(&mut self, frame: &Segment<'_>, slot: usize, open: &OpenSocket) -> u32 {
        let VnetHeader { csum_start, csum_offset, .. } = self.start.header();
        if open.metadata {
            let request = checksum_request(csum_start, csum_offset);
            open.umem.tx_metadata(self.pair, slot).write(&request);
            return Descriptor::HAS_METADATA;
        }
        self.scratch.resize(frame.len(), 0);
        frame.read(&mut self.scratch);
        checksum::complete(&mut self.scratch, csum_start.into(), csum_offset.into());
        frame.write(&self.scratch);
        0
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
        let mut pending = self.in_flight.iter_mut().rev().filter(|frame| frame.pending);
        if let Some(frame) = pending.nth(unsent) {
            frame.outcome = Outcome::Dropped(Drop::HostRefused);
        }
    }

    /// Notes what the kernel has completed.
    pub(super) fn reap(&mut self, open: &mut OpenSocket) {
        let mut any = false;
        while let Some(address) = open.socket.completion.take() {
            any = true;
            let slot = (address >> ADDRESS_BITS) as usize;
            match slot.wrapping_sub(self.oldest) % TX_SLOTS {
                // Nearly always it is the oldest.
                0 => self.give_back_oldest(),
                place => {
                    if let Some(frame) = self.in_flight.get_mut(place) {
                        frame.pending = false;
                    }
                }
            }
        }
        if any {
            open.socket.completion.release();
        }
        while self.in_flight.front().is_some_and(|frame| !frame.pending) {
            self.give_back_oldest();
        }
    }

    #[inline]
    fn give_back_oldest(&mut self) {
        let Some(frame) = self.in_flight.pop_front() else { return };
        self.oldest = self.oldest.wrapping_add(1);
        if let Some(chain) = frame.chain {
            self.done.push((chain, frame.outcome));
        }
    }

    /// Whether the kernel is busy with frames: handed to the device, and not completed.
    pub(super) fn is_waiting(&self, open: &mut OpenSocket) -> bool {
        let pending = self.in_flight.iter().filter(|frame| frame.pending).count();
        pending > open.socket.tx.pending() as usize
    }

    /// Takes back what the kernel has: nothing of it is touched once the socket is closed.
    pub(super) fn stop(&mut self, open: &mut OpenSocket) {
        // The tx ring is taken from in order: what is left there are the youngest.
        let mut unsent = open.socket.tx.pending() as usize;
        let mut chains = Vec::new();
        while unsent > 0
            && let Some(frame) = self.in_flight.pop_back()
        {
            unsent -= usize::from(frame.pending);
            chains.extend(frame.chain);
        }
        let sent = self.in_flight.drain(..);
        self.done.extend(sent.filter_map(|frame| Some((frame.chain?, frame.outcome))));
        self.cut = None;
        self.unsent.extend(chains.into_iter().rev());
        self.oldest = 0;
        self.unfinished = false;
    }

    /// Drops what the kernel has not sent: the device does not work.
    pub(super) fn drop_unsent(&mut self) {
        let dropped = Outcome::Dropped(Drop::HostRefused);
        self.done.extend(self.unsent.drain(..).map(|chain| (chain, dropped)));
    }

    /// Gives back what has finished.
    pub(super) fn finish(&mut self, finished: &mut Finished<'mem>) {
        finished.take_tx(&mut self.done);
        self.kept.finish(finished);
        finished.tx_copied.append(&mut self.copied);
        finished.tx_surplus += std::mem::take(&mut self.surplus);
    }

    /// Gives back what the kernel has not sent, when the session ends.
    pub(super) fn recall(&mut self, finished: &mut Finished<'mem>) {
        finished.unused_tx.append(&mut self.unsent);
    }
}
