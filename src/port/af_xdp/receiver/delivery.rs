//! Frames that have arrived: each completes the guest's buffer that it is in, or is copied into the oldest
//! buffers.
//!
//! Invariant: frames reach the guest in the order in which they came, but for those that the kernel brings
//! in another order: such a frame waits in its buffer until all older buffers have theirs.

use std::time::Instant;

use super::posted::{Posted, Target};
use super::{RESERVE_SLOTS, Receiver, Waiting};
use crate::counters::{CopyReason, DropReason};
use crate::features::HEADER_LENGTH;
use crate::guest::{Chain, ReadSegment, Virtqueue, Writable};
use crate::port::Completions;
use crate::port::af_xdp::interface::OpenSocket;
use crate::port::af_xdp::umem::GuestUmem;
use crate::sys::xsk::ADDRESS_BITS;
use crate::vnet_header::VnetHeader;

impl Receiver {
    /// Completes the buffers that frames have arrived in, up to `most` of these.
    // By itself, or its variables would compete with the transmitter's for registers.
    #[inline(never)]
    pub(in crate::port::af_xdp) fn reap(
        &mut self,
        rx: &mut Virtqueue<'_, Writable>,
        open: &mut OpenSocket,
        most: usize,
        done: &mut Completions,
    ) {
        let (mut taken, mut delivered) = (0, false);
        loop {
            // Nearly always that is all.
            let in_order = self.reap_in_order(rx, open, most - taken, done);
            taken += in_order;
            delivered |= in_order > 0;
            if taken == most {
                break;
            }
            let Some(descriptor) = open.socket.rx.take() else { break };
            taken += 1;
            let address = descriptor.address & ((1 << ADDRESS_BITS) - 1);
            // What is longer than a chunk was not written to one.
            delivered |= self.take_other(address, descriptor.length as u16, rx, &open.umem, done);
        }
        if !self.waiting.is_empty() {
            self.serve_waiting(rx, &open.umem, done);
        }
        if taken == 0 {
            return;
        }
        open.socket.rx.release();
        let spare = if self.posted.len() == self.slots_posted { RESERVE_SLOTS } else { 0 };
        if self.post_slots(&mut open.socket, &open.umem, spare) {
            open.socket.fill.submit();
            self.wake_driver(open);
        }
        // Counted anew from each time that the oldest came back.
        self.overtaken = match self.overtaken {
            _ if self.held == 0 => None,
            Some(since) if !delivered => Some(since),
            _ => Some(Instant::now()),
        };
    }

    /// Completes buffers of the guest's in which frames have arrived with their headers, while these are the
    /// oldest of all, up to `most`; returns how many.
    // By itself, so that all its variables are in registers.
    #[inline(never)]
    fn reap_in_order(
        &mut self,
        rx: &mut Virtqueue<'_, Writable>,
        open: &mut OpenSocket,
        most: usize,
        done: &mut Completions,
    ) -> usize {
        // The program has put the header there, if the kernel copies.
        let is_whole = open.umem.layout.header == self.header_length;
        if !is_whole || self.held > 0 || !self.waiting.is_empty() {
            return 0;
        }
        let (posted, mut bytes) = (&mut self.posted, 0);
        let frames = open.socket.rx.take_while(most, |descriptor| {
            let address = descriptor.address & ((1 << ADDRESS_BITS) - 1);
            let is_next = posted.pop_guest(rx.next_used(), address);
            if is_next {
                rx.push_used(descriptor.length);
                bytes += descriptor.length as usize;
            }
            is_next
        });
        done.rx.frames += frames as u64;
        done.rx.bytes += (bytes - frames * self.header_length) as u64;
        frames
    }

    /// Takes a frame in a buffer of any kind; says whether one was delivered.
    #[inline(never)]
    fn take_other(
        &mut self,
        address: u64,
        length: u16,
        rx: &mut Virtqueue<'_, Writable>,
        umem: &GuestUmem,
        done: &mut Completions,
    ) -> bool {
        let oldest = self.posted.pop_if(|oldest| oldest.is_at(address));
        match oldest {
            Some(oldest) => self.deliver(oldest.target(), length, rx, umem, done),
            None => self.mark_out_of_order(address, length),
        }
        (self.held > 0 && self.deliver_held(rx, umem, done)) || oldest.is_some()
    }

    /// Notes a frame that has arrived in a buffer which is not the oldest.
    fn mark_out_of_order(&mut self, address: u64, length: u16) {
        let Some(mut index) = self.posted.iter().position(|posted| posted.is_at(address)) else {
            self.foreign_address = true;
            return;
        };
        if self.posted.get_mut(index).is_slot() {
            // One slot is as good as another: frames stay in the order in which they came.
            let free = |posted: &Posted| posted.is_slot() && posted.filled().is_none();
            let first = self.posted.iter().position(free).unwrap_or(index);
            self.posted.swap(first, index);
            index = first;
        }
        self.posted.get_mut(index).fill(length);
        self.held += 1;
    }

    /// Delivers the frames in the oldest buffers that have waited for an older one; says whether there were
    /// any.
    #[inline(never)]
    fn deliver_held(
        &mut self,
        rx: &mut Virtqueue<'_, Writable>,
        umem: &GuestUmem,
        done: &mut Completions,
    ) -> bool {
        let before = self.held;
        while let Some(posted) = self.posted.pop_if(|oldest| oldest.filled().is_some()) {
            self.held -= 1;
            self.deliver(posted.target(), posted.filled().unwrap_or(0), rx, umem, done);
        }
        self.held < before
    }

    /// Delivers the frame in the buffer that was the oldest posted.
    fn deliver(
        &mut self,
        target: Target,
        length: u16,
        rx: &mut Virtqueue<'_, Writable>,
        umem: &GuestUmem,
        done: &mut Completions,
    ) {
        match target {
            // The oldest of all, and no frame waits.
            Target::Guest(position) if position == rx.next_used() && self.waiting.is_empty() => {
                // The program has put it there, if the kernel copies.
                let header = self.header_length - umem.layout.header;
                if header > 0 {
                    write_header(&rx.chain(position), self.header_length, 1);
                }
                let written = header + usize::from(length);
                rx.push_used(written as u32);
                done.rx.frames += 1;
                done.rx.bytes += (written - self.header_length) as u64;
            }
            target => self.deliver_copied(target, length, rx, umem, done),
        }
    }

    /// Delivers a frame that is not where it belongs.
    #[inline(never)]
    fn deliver_copied(
        &mut self,
        target: Target,
        length: u16,
        rx: &mut Virtqueue<'_, Writable>,
        umem: &GuestUmem,
        done: &mut Completions,
    ) {
        match target {
            Target::Guest(position) => {
                // Older buffers are parked: the frame is theirs, and its buffer one of them.
                let mut bytes = vec![0; usize::from(length) - umem.layout.header];
                if let Some(piece) = rx.chain(position).first_after(self.header_length) {
                    piece.read(&mut bytes);
                }
                self.waiting.push_back(Waiting::Copy(bytes));
                self.defer(position, rx);
            }
            Target::Slot(slot) => {
                self.slots_posted -= 1;
                self.waiting.push_back(Waiting::Slot { slot, length });
            }
        }
        self.serve_waiting(rx, umem, done);
    }

    /// Copies the frames that wait into the parked buffers.
    fn serve_waiting(
        &mut self,
        rx: &mut Virtqueue<'_, Writable>,
        umem: &GuestUmem,
        done: &mut Completions,
    ) {
        while let Some(frame) = self.waiting.pop_front() {
            let served = match &frame {
                Waiting::Slot { slot, length } => {
                    let frame = umem.rx_frame(self.pair, usize::from(*slot), usize::from(*length));
                    self.copy_scattered(frame.into(), rx, umem, done)
                }
                Waiting::Copy(bytes) => {
                    self.copy_scattered(ReadSegment::of_bytes(bytes), rx, umem, done)
                }
            };
            if !served {
                self.waiting.push_front(frame);
                return;
            }
            if let Waiting::Slot { slot, .. } = frame {
                self.free_slots.push(slot);
            }
        }
    }

    /// Copies a frame into the oldest buffers, which are parked; says whether they were there.
    fn copy_scattered(
        &mut self,
        frame: ReadSegment<'_>,
        rx: &mut Virtqueue<'_, Writable>,
        umem: &GuestUmem,
        done: &mut Completions,
    ) -> bool {
        let needed = self.header_length + frame.len();
        let Some((buffers, room)) = self.buffers_for(needed, rx) else { return false };
        let oldest = rx.chain(rx.next_used());
        let reason = match umem.receivable(&oldest, self.header_length) {
            Some(_) => CopyReason::Late,
            None => CopyReason::Unsuitable,
        };
        self.parked.drain(..buffers);
        if room < needed {
            // One buffer, and too small: it goes back with nothing in it, which drivers take for
            // the faulty frame that it was.
            rx.push_used(0);
            done.rx_dropped.push((DropReason::NoRoom, 1));
            return true;
        }
        write_header(&oldest, self.header_length, buffers as u16);
        let mut copied = 0;
        for index in 0..buffers {
            let lead = if index == 0 { self.header_length } else { 0 };
            let part = rx.chain(rx.next_used()).copy_segment(lead, frame.skip(copied));
            copied += part;
            rx.push_used((lead + part) as u32);
        }
        done.rx.frames += 1;
        done.rx.bytes += copied as u64;
        done.rx_copied.push(reason);
        true
    }

    /// How many of the oldest buffers hold `needed` bytes, and what they hold, if they are parked and
    /// nothing older is posted. It is one that holds less, where a frame takes one buffer.
    fn buffers_for(&self, needed: usize, rx: &Virtqueue<'_, Writable>) -> Option<(usize, usize)> {
        let age = |position: u16| position.wrapping_sub(rx.next_used());
        let oldest_posted = self.posted.iter().find_map(|posted| match posted.target() {
            Target::Guest(position) => Some(age(position)),
            Target::Slot(_) => None,
        });
        let mut room = 0;
        for (index, position) in self.parked.iter().enumerate() {
            if oldest_posted.is_some_and(|posted| posted < age(*position)) {
                return None;
            }
            room += rx.chain(*position).len();
            if room >= needed || !self.mergeable {
                return Some((index + 1, room));
            }
        }
        None
    }
}

/// Writes the header of a frame that needs nothing done to it, in so many buffers. Not before the
/// frame has arrived: a device may have used its place for a header of its own.
fn write_header(chain: &Chain<'_, '_, Writable>, length: usize, buffers: u16) {
    let mut header = [0; HEADER_LENGTH];
    header[VnetHeader::NUM_BUFFERS..].copy_from_slice(&buffers.to_le_bytes());
    chain.write_at(0, &header[..length]);
}
