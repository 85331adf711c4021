//! Frames that have arrived. Each completes the guest buffer that it is in, or is copied into the oldest
//! deferred buffers.
//!
//! Invariant: frames reach the guest in the order of posting. If the kernel returns a buffer early, its frame
//! waits there until all older buffers have returned.

use std::time::Instant;

use super::posted::{Posted, Target};
use super::{RESERVE_BUFFERS, Receiver, Waiting};
use crate::counters::{CopyReason, DropReason};
use crate::features::HEADER_LENGTH;
use crate::guest::{Chain, ReadSegment, Virtqueue, Writable};
use crate::port::Completions;
use crate::port::af_xdp::interface::OpenSocket;
use crate::port::af_xdp::umem::GuestUmem;
use crate::sys::xsk::ADDRESS_BITS;
use crate::vnet_header::VnetHeader;

impl Receiver {
    /// Completes buffers in which frames have arrived. Takes at most `most` frames.
    // Not inlined, or its variables would compete with the transmitter's for registers.
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
            // Nearly always this takes all frames.
            let in_order = self.reap_in_order(rx, open, most - taken, done);
            taken += in_order;
            delivered |= in_order > 0;
            if taken == most {
                break;
            }
            let Some(descriptor) = open.socket.rx.take() else { break };
            taken += 1;
            let address = descriptor.address & ((1 << ADDRESS_BITS) - 1);
            // A frame fits a chunk of 4096 bytes, so its length fits a u16.
            delivered |= self.take_other(address, descriptor.length as u16, rx, &open.umem, done);
        }
        if !self.waiting.is_empty() {
            self.serve_waiting(rx, &open.umem, done);
        }
        if taken == 0 {
            return;
        }
        open.socket.rx.release();
        let spare = if self.posted.len() == self.bounce_posted { RESERVE_BUFFERS } else { 0 };
        if self.post_bounce(&mut open.socket, &open.umem, spare) {
            open.socket.fill.submit();
            self.wake_driver(open);
        }
        // The timeout starts again whenever the oldest buffer returns.
        self.overtaken = match self.overtaken {
            _ if self.out_of_order == 0 => None,
            Some(since) if !delivered => Some(since),
            _ => Some(Instant::now()),
        };
    }

    /// Completes guest buffers whose frames have arrived with their headers, while each is the oldest buffer.
    /// Takes at most `most` frames; returns their number.
    // Not inlined, so that all its variables are in registers.
    #[inline(never)]
    fn reap_in_order(
        &mut self,
        rx: &mut Virtqueue<'_, Writable>,
        open: &mut OpenSocket,
        most: usize,
        done: &mut Completions,
    ) -> usize {
        // In copy mode the program has written the header.
        let is_whole = open.umem.layout.header == self.header_length;
        if !is_whole || self.out_of_order > 0 || !self.waiting.is_empty() {
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

    /// Takes a frame in a buffer of any kind. Returns true if a frame was delivered.
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
        (self.out_of_order > 0 && self.deliver_out_of_order(rx, umem, done)) || oldest.is_some()
    }

    /// Records a frame that has arrived in a buffer other than the oldest.
    fn mark_out_of_order(&mut self, address: u64, length: u16) {
        let Some(mut index) = self.posted.iter().position(|posted| posted.is_at(address)) else {
            self.foreign_address = true;
            return;
        };
        if self.posted.get_mut(index).is_bounce() {
            // Bounce buffers are interchangeable: the first free one takes the frame, which keeps the order
            // of arrival.
            let free = |posted: &Posted| posted.is_bounce() && posted.filled().is_none();
            let first = self.posted.iter().position(free).unwrap_or(index);
            self.posted.swap(first, index);
            index = first;
        }
        self.posted.get_mut(index).fill(length);
        self.out_of_order += 1;
    }

    /// Delivers the waiting frames in the oldest buffers. Returns true if there were any.
    #[inline(never)]
    fn deliver_out_of_order(
        &mut self,
        rx: &mut Virtqueue<'_, Writable>,
        umem: &GuestUmem,
        done: &mut Completions,
    ) -> bool {
        let before = self.out_of_order;
        while let Some(posted) = self.posted.pop_if(|oldest| oldest.filled().is_some()) {
            self.out_of_order -= 1;
            self.deliver(posted.target(), posted.filled().unwrap_or(0), rx, umem, done);
        }
        self.out_of_order < before
    }

    /// Delivers the frame in the buffer that was the oldest in `posted`.
    fn deliver(
        &mut self,
        target: Target,
        length: u16,
        rx: &mut Virtqueue<'_, Writable>,
        umem: &GuestUmem,
        done: &mut Completions,
    ) {
        match target {
            // The oldest guest buffer of all, and no frame waits.
            Target::Guest(position) if position == rx.next_used() && self.waiting.is_empty() => {
                // In copy mode the program has written the header.
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

    /// Delivers a frame that must be copied: it is in a bounce buffer, or older buffers are deferred.
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
                // Older buffers are deferred: the frame goes to those, and its own buffer becomes deferred.
                let mut bytes = vec![0; usize::from(length) - umem.layout.header];
                if let Some(piece) = rx.chain(position).first_after(self.header_length) {
                    piece.read(&mut bytes);
                }
                self.waiting.push_back(Waiting::Copy(bytes));
                self.defer(position, rx);
            }
            Target::Bounce(buffer) => {
                self.bounce_posted -= 1;
                self.waiting.push_back(Waiting::Bounce { buffer, length });
            }
        }
        self.serve_waiting(rx, umem, done);
    }

    /// Copies waiting frames into deferred buffers, while there are enough.
    fn serve_waiting(
        &mut self,
        rx: &mut Virtqueue<'_, Writable>,
        umem: &GuestUmem,
        done: &mut Completions,
    ) {
        while let Some(frame) = self.waiting.pop_front() {
            let served = match &frame {
                Waiting::Bounce { buffer, length } => {
                    let frame =
                        umem.rx_frame(self.pair, usize::from(*buffer), usize::from(*length));
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
            if let Waiting::Bounce { buffer, .. } = frame {
                self.free_bounce.push(buffer);
            }
        }
    }

    /// Copies a frame into the oldest buffers. Returns false if too few of these are deferred.
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
        self.deferred.drain(..buffers);
        if room < needed {
            // The only buffer is too small. It completes with length 0, which drivers count as a bad frame.
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

    /// Returns the number of the oldest deferred buffers that together hold `needed` bytes, and their size in
    /// bytes. Without mergeable buffers it is one buffer, which may hold less. `None` if there are too few,
    /// or an older buffer is posted.
    fn buffers_for(&self, needed: usize, rx: &Virtqueue<'_, Writable>) -> Option<(usize, usize)> {
        let age = |position: u16| position.wrapping_sub(rx.next_used());
        let oldest_posted = self.posted.iter().find_map(|posted| match posted.target() {
            Target::Guest(position) => Some(age(position)),
            Target::Bounce(_) => None,
        });
        let mut room = 0;
        for (index, position) in self.deferred.iter().enumerate() {
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

/// Writes the header of a frame in `buffers` buffers, without offloads. Call it only after the frame has
/// arrived: a zero-copy device may write a header of its own to the same place.
fn write_header(chain: &Chain<'_, '_, Writable>, length: usize, buffers: u16) {
    let mut header = [0; HEADER_LENGTH];
    header[VnetHeader::NUM_BUFFERS..].copy_from_slice(&buffers.to_le_bytes());
    chain.write_at(0, &header[..length]);
}
