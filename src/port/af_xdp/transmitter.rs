//! Frames from the guest, on their way through the tx ring and back out of the completion ring.
//!
//! A frame in one piece is sent from where the guest put it. One that needs a checksum, or lies in
//! several pieces, is copied into the arena: measured, that costs a tenth of what the kernel takes
//! for a frame of two descriptors (docs/af-xdp.md).
//!
//! Invariant: a chain is given back when the kernel has completed its frame, and in the order of
//! the ring. The kernel completes an address as it got it, so each carries its frame's number in
//! the part that the kernel only adds to the rest.

use std::collections::VecDeque;
use std::io;

use super::checksum;
use super::interface::OpenSocket;
use super::umem::TX_SLOTS;
use crate::counters::{CopyReason, Drop};
use crate::features::Negotiated;
use crate::guest::{Burst, Chain, Readable};
use crate::port::{Finished, Outcome};
use crate::sys::xsk::{ADDRESS_BITS, Descriptor, checksum_request};
use crate::vnet_header::{Admission, PrivateStart, VnetHeader, admit};

/// Calls for one burst at the most: the kernel sends 32 frames at a time.
const SENDS: usize = 16;

/// A frame from the guest.
#[derive(Debug)]
struct InFlight<'mem> {
    chain: Chain<'mem, Readable>,
    /// The kernel has it.
    pending: bool,
    outcome: Outcome,
}

/// Frames from the guest on their way.
#[derive(Debug)]
pub(super) struct Transmitter<'mem> {
    pair: u16,
    admission: Admission,
    start: PrivateStart,
    /// Oldest first; their number is counted from `oldest`.
    in_flight: VecDeque<InFlight<'mem>>,
    /// Number of the oldest frame.
    oldest: usize,
    /// What is to be given back.
    pub(super) done: Vec<(Chain<'mem, Readable>, Outcome)>,
    copied: Vec<CopyReason>,
    /// Chains of frames that the kernel has not sent.
    unsent: Vec<Chain<'mem, Readable>>,
    /// A frame whose checksum is completed.
    scratch: Vec<u8>,
    /// The kernel has not taken everything yet.
    unfinished: bool,
}

impl<'mem> Transmitter<'mem> {
    pub(super) fn new(negotiated: &Negotiated, pair: u16) -> Self {
        Transmitter {
            pair,
            admission: Admission {
                header_length: negotiated.header_length(),
                offloads: negotiated.host(),
                max_frame: 0,
            },
            start: PrivateStart::default(),
            in_flight: VecDeque::with_capacity(TX_SLOTS),
            oldest: 0,
            done: Vec::new(),
            copied: Vec::new(),
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
        while self.in_flight.len() < TX_SLOTS && open.socket.tx.room() > 0 {
            let Some(chain) = burst.pop_front() else { break };
            let outcome = match admit(&chain, &self.admission, &mut self.start) {
                Err(reason) => Outcome::Dropped(reason),
                Ok(()) => {
                    let descriptor = self.place(&chain, open);
                    open.socket.tx.stage(descriptor);
                    self.unfinished = true;
                    Outcome::Sent
                }
            };
            let pending = outcome == Outcome::Sent;
            self.in_flight.push_back(InFlight { chain, pending, outcome });
        }
        open.socket.tx.submit();
    }

    /// Where the frame is to be sent from.
    fn place(&mut self, chain: &Chain<'mem, Readable>, open: &OpenSocket) -> Descriptor {
        let header_length = self.admission.header_length;
        let length = chain.len() - header_length;
        let slot = (self.oldest + self.in_flight.len()) % TX_SLOTS;
        let bytes = self.start.bytes();
        let header = VnetHeader::parse(bytes.first_chunk().expect("a header has 10 bytes"));
        let mut pieces = chain.segments_after(header_length);
        let in_place = pieces
            .next()
            .filter(|piece| piece.len() == length && !header.needs_checksum())
            .and_then(|piece| open.umem.sendable(&piece));
        let mut options = 0;
        let address = if let Some(address) = in_place {
            address
        } else {
            let (frame, address) = open.umem.tx_frame(self.pair, slot, length);
            if !header.needs_checksum() {
                self.copied.push(CopyReason::Pieces);
                chain.copy_to(header_length, &frame);
            } else {
                self.copied.push(CopyReason::Checksum);
                if open.metadata {
                    chain.copy_to(header_length, &frame);
                    let request = checksum_request(header.csum_start, header.csum_offset);
                    open.umem.tx_metadata(self.pair, slot).write(&request);
                    options = Descriptor::HAS_METADATA;
                } else {
                    self.scratch.resize(header_length + length, 0);
                    chain.read_start(&mut self.scratch);
                    let bytes = &mut self.scratch[header_length..];
                    checksum::complete(bytes, header.csum_start.into(), header.csum_offset.into());
                    frame.write(bytes);
                }
            }
            address
        };
        // The kernel adds both parts, and completes them as they are: the slot comes back.
        let address = (address - slot as u64) | (slot as u64) << ADDRESS_BITS;
        Descriptor { address, length: length as u32, options }
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
                match open.socket.send().map_err(|error| (error.raw_os_error(), error)) {
                    Ok(()) => break,
                    // It has sent as many as it does at a time, the device dropped one, or there
                    // is no memory for now.
                    Err((Some(libc::EAGAIN | libc::EBUSY | libc::ENOBUFS | libc::EINTR), _)) => {
                        if open.socket.tx.pending() == 0 {
                            break;
                        }
                    }
                    Err((_, error)) => return Err(error),
                }
            }
        }
        self.unfinished = open.socket.tx.pending() > 0;
        Ok(())
    }

    /// Notes what the kernel has completed.
    pub(super) fn reap(&mut self, open: &mut OpenSocket) {
        let mut any = false;
        while let Some(address) = open.socket.completion.take() {
            any = true;
            let slot = (address >> ADDRESS_BITS) as usize;
            let place = slot.wrapping_sub(self.oldest) % TX_SLOTS;
            if let Some(frame) = self.in_flight.get_mut(place) {
                frame.pending = false;
            }
        }
        if any {
            open.socket.completion.release();
        }
        while self.in_flight.front().is_some_and(|frame| !frame.pending) {
            if let Some(frame) = self.in_flight.pop_front() {
                self.done.push((frame.chain, frame.outcome));
                self.oldest = self.oldest.wrapping_add(1);
            }
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
            chains.push(frame.chain);
        }
        self.done.extend(self.in_flight.drain(..).map(|frame| (frame.chain, frame.outcome)));
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
        finished.tx.append(&mut self.done);
        finished.tx_copied.append(&mut self.copied);
    }

    /// Gives back what the kernel has not sent, when the session ends.
    pub(super) fn recall(&mut self, finished: &mut Finished<'mem>) {
        finished.unused_tx.append(&mut self.unsent);
    }
}
