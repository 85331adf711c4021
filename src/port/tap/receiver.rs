//! Buffers for frames to come: the kernel reads each frame straight into the oldest of them.

use std::io;

use super::read_gate::{ReadGate, Room};
use crate::counters::DropReason;
use crate::features::{HEADER_LENGTH, LEGACY_HEADER_LENGTH, Offloads};
use crate::frame::{ETHERNET_LENGTH, FrameDirection, LINK_OVERHEAD, MAX_FRAME};
use crate::guest::{Chain, MAX_SEGMENTS, Segment, Virtqueue, Writable};
use crate::port::{Completions, SessionConfig};
use crate::sys::tap::Queue;
use crate::traffic::Notes;
use crate::vnet_header::{MAX_HEADERS, SegmentationOverhead, VnetHeader};

/// Buffers that are in flight at the most, which bounds what a session holds. Eight frames of 64 KiB in
/// the 1.5 KiB buffers of a Linux driver.
pub(super) const MAX_BUFFERS: usize = 512;

/// Buffers for frames to come.
#[derive(Debug)]
pub(super) struct Receiver<'mem> {
    header_length: usize,
    accepted: Offloads,
    mergeable: bool,
    /// The card's MTU in bytes.
    mtu: u16,
    /// Longest frame in bytes that the device can deliver, header included.
    largest: usize,
    /// Bytes of buffers with which frames are read at once.
    enough: usize,
    /// What the next frame may take: the segments of the oldest `window_chains` chains, of which those
    /// that follow each other in memory, as a driver's buffers often do, are one.
    window: Vec<Segment<'mem>>,
    window_chains: usize,
    window_room: usize,
    notes: Notes,
    /// Whether frames are noted.
    peeks: bool,
    /// The buffers held the largest frame at some time in this session.
    has_held_largest: bool,
    /// The ring cannot hold the largest frame that is to be segmented: the kernel is to segment for it.
    pub(super) is_small: bool,
}

impl<'mem> Receiver<'mem> {
    /// For frames up to `longest` bytes, but for those that are to be segmented. `is_small` if the ring is
    /// known not to hold these.
    pub(super) fn new(config: &SessionConfig, longest: usize, is_small: bool) -> Self {
        let SessionConfig { negotiated, mtu, .. } = *config;
        let mut receiver = Receiver {
            header_length: negotiated.header_length(),
            accepted: negotiated.guest(),
            mergeable: negotiated.mergeable(),
            mtu,
            largest: 0,
            enough: 0,
            window: Vec::new(),
            window_chains: 0,
            window_room: 0,
            notes: Notes::new(config.peers.clone()),
            peeks: false,
            has_held_largest: false,
            is_small,
        };
        receiver.expect(longest);
        receiver
    }

    /// Prepares for frames up to `longest` bytes, but for those that are to be segmented.
    pub(super) fn expect(&mut self, longest: usize) {
        let is_small = self.is_small;
        let frame = if self.segments() && !is_small { MAX_FRAME } else { longest };
        self.largest = self.header_length + frame;
        // A small ring's buffers have the size of frames without VLAN tags.
        let tags = if is_small { LINK_OVERHEAD - ETHERNET_LENGTH } else { 0 };
        self.enough = self.largest - tags;
    }

    /// Whether frames that are to be segmented may take several buffers.
    fn segments(&self) -> bool {
        self.mergeable && self.accepted.segmentation()
    }

    /// Finds out whether the ring can hold the largest frame, from its size and the buffers in flight.
    pub(super) fn measure(&mut self, rx: &Virtqueue<'mem, Writable>) {
        let (buffers, room) = (rx.in_flight(), rx.bytes_in_flight());
        if buffers == 0 || !self.segments() {
            return;
        }
        let wanted = self.header_length + MAX_FRAME;
        if room >= wanted || buffers >= MAX_BUFFERS {
            self.has_held_largest = true;
            self.is_small = false;
        } else if !self.has_held_largest && usize::from(rx.size()) * (room / buffers) < wanted {
            self.is_small = true;
        }
    }

    /// Length in bytes of the virtio header, and what the guest has accepted.
    pub(super) fn terms(&self) -> (usize, Offloads) {
        (self.header_length, self.accepted)
    }

    /// Forgets the buffers that are in flight, when the session ends.
    pub(super) fn stop(&mut self) {
        self.window.clear();
        self.window_chains = 0;
        self.window_room = 0;
    }

    /// Whether the largest frame that may come fits the buffers in flight.
    #[inline]
    pub(super) fn room(&self, rx: &Virtqueue<'mem, Writable>) -> Room {
        match rx.in_flight() {
            0 => Room::None,
            1..MAX_BUFFERS if self.mergeable && rx.bytes_in_flight() < self.enough => Room::Short,
            _ => Room::Enough,
        }
    }

    /// Whether to read now.
    #[inline]
    pub(super) fn can_read(&mut self, gate: &mut ReadGate, rx: &Virtqueue<'mem, Writable>) -> bool {
        match self.room(rx) {
            Room::Enough => true,
            Room::None => false,
            Room::Short => self.makes_do(gate),
        }
    }

    /// Whether frames have waited in vain for more buffers, which shows that the ring is small.
    #[inline(never)]
    fn makes_do(&mut self, gate: &mut ReadGate) -> bool {
        let has_timed_out = gate.has_timed_out();
        self.is_small |= has_timed_out && self.segments() && !self.has_held_largest;
        has_timed_out
    }

    /// Reads the next frame into the oldest buffers; returns its length with header, or nothing if
    /// it is lost, being longer than what these hold.
    pub(super) fn read(
        &mut self,
        queue: &Queue,
        rx: &Virtqueue<'mem, Writable>,
    ) -> io::Result<Option<usize>> {
        // Without segmentation the oldest buffer nearly always takes any frame.
        if self.window.is_empty() {
            let oldest = rx.chain(rx.next_used());
            if oldest.len() > self.largest {
                let length = queue.read(oldest.segments())?;
                return Ok((length < oldest.len()).then_some(length));
            }
        }
        self.read_spread(queue, rx)
    }

    /// Reads the next frame into as many of the oldest buffers as the largest could take.
    #[inline(never)]
    fn read_spread(
        &mut self,
        queue: &Queue,
        rx: &Virtqueue<'mem, Writable>,
    ) -> io::Result<Option<usize>> {
        let most = if self.mergeable { rx.in_flight() } else { 1 };
        while self.window_room < self.largest && self.window_chains < most {
            let chain = rx.chain(rx.next_used().wrapping_add(self.window_chains as u16));
            if self.window.len() + chain.segments().len() > MAX_SEGMENTS {
                break;
            }
            for segment in chain.segments() {
                match self.window.last().and_then(|last| last.joined(segment)) {
                    Some(both) => *self.window.last_mut().expect("it was just joined") = both,
                    None => self.window.push(*segment),
                }
            }
            self.window_chains += 1;
            self.window_room += chain.len();
        }
        if self.window_room <= self.largest {
            let length = queue.read_watching(&mut self.window)?;
            return Ok((length <= self.window_room).then_some(length));
        }
        // No frame fills more than it may have, unless it was longer.
        let length = queue.read(&self.window)?;
        Ok((length < self.window_room).then_some(length))
    }

    /// Takes `chains` of so many `bytes` from the window's start.
    #[inline(never)]
    fn move_window(&mut self, chains: usize, mut bytes: usize) {
        self.window_chains -= chains;
        self.window_room -= bytes;
        let mut gone = 0;
        for segment in &mut self.window {
            if bytes < segment.len() {
                *segment = segment.skip(bytes);
                break;
            }
            bytes -= segment.len();
            gone += 1;
        }
        self.window.drain(..gone);
    }

    /// Completes the buffers that the frame of `length` bytes takes, or counts it as dropped.
    pub(super) fn deliver(
        &mut self,
        length: usize,
        rx: &mut Virtqueue<'mem, Writable>,
        done: &mut Completions,
    ) {
        if length < self.header_length {
            done.rx_dropped.push((DropReason::TooShort, 1));
            return;
        }
        let first = rx.chain(rx.next_used());
        let header: [u8; LEGACY_HEADER_LENGTH] = first.first_bytes();
        // Nearly always it says nothing. A guest may have made it say nothing of a frame that is cut.
        let is_long = length - self.header_length > usize::from(self.mtu) + LINK_OVERHEAD;
        if header[..2] != [0, 0] || is_long {
            match self.fit_header_to_guest(&VnetHeader::parse(&header), &first) {
                Ok(header) => done.rx.overhead += self.overhead(&header, length),
                Err(reason) => {
                    done.rx_dropped.push((reason, 1));
                    return;
                }
            }
        }
        if self.peeks {
            self.note(&first, length);
        }
        // The kernel knows the legacy header only, and leaves the rest as it was.
        let has_number = self.header_length == HEADER_LENGTH;
        if length <= first.len() {
            if has_number {
                first.write_at(VnetHeader::NUM_BUFFERS, &1u16.to_le_bytes());
            }
            let taken = rx.push_used(length as u32);
            if !self.window.is_empty() {
                self.move_window(1, taken);
            }
        } else {
            let mut room = 0;
            let needed = rx.positions(rx.next_avail()).take_while(|position| {
                let before = room;
                room += rx.chain(*position).len();
                before < length
            });
            let buffers = needed.count();
            if has_number {
                first.write_at(VnetHeader::NUM_BUFFERS, &(buffers as u16).to_le_bytes());
            }
            let (mut left, mut taken) = (length, 0);
            for _ in 0..buffers {
                let part = left.min(rx.chain(rx.next_used()).len());
                left -= part;
                taken += rx.push_used(part as u32);
            }
            debug_assert_eq!(left, 0, "the window has room for the frame");
            self.move_window(buffers, taken);
        }
        done.rx.frames += 1;
        done.rx.bytes += (length - self.header_length) as u64;
    }

    /// Prepares for a burst of frames.
    pub(super) fn look(&mut self) {
        self.peeks = self.notes.wanted();
    }

    /// Counts the burst.
    pub(super) fn count(&mut self) {
        self.notes.publish();
    }

    /// Notes the frame in the oldest buffers, as far as the first of them shows it. The guest could
    /// have changed it already, and would fool itself.
    #[inline(never)]
    fn note(&mut self, first: &Chain<'_, 'mem, Writable>, length: usize) {
        let mut start = [0; HEADER_LENGTH + MAX_HEADERS];
        let shown = first.read_start(&mut start).min(length);
        let frame = start.get(self.header_length..shown).unwrap_or_default();
        self.notes.note(FrameDirection::Rx, frame, length - self.header_length);
    }

    /// Looks at the header that the kernel wrote. The device was set to what the guest accepts,
    /// but frames may have been queued before that.
    #[inline(never)]
    fn fit_header_to_guest(
        &self,
        header: &VnetHeader,
        buffer: &Chain<'_, 'mem, Writable>,
    ) -> Result<VnetHeader, DropReason> {
        if !header.accepted_by(&self.accepted) {
            return Err(DropReason::NotAccepted);
        }
        if !self.accepted.checksum && header.flags != 0 {
            // Section 5.1.6.4.1: flags are zero without GUEST_CSUM.
            buffer.write_at(0, &[0]);
        }
        Ok(*header)
    }

    /// What the frame of `length` bytes with its header is on the wire beyond itself. The guest may
    /// have rewritten the header: however small it makes the segments, they fit the MTU.
    fn overhead(&self, header: &VnetHeader, length: usize) -> SegmentationOverhead {
        /// IPv4 and TCP without options.
        const LEAST_HEADERS: u16 = 40;
        /// TCP with its usual options. Without them there is one segment less at the most.
        const TCP: usize = 32;
        let length = length - self.header_length;
        if length <= usize::from(self.mtu) + LINK_OVERHEAD {
            return SegmentationOverhead::default();
        }
        let gso_size = header.gso_size.min(self.mtu.saturating_sub(LEAST_HEADERS)).max(1);
        // The kernel's hdr_len is not the length of headers.
        let headers = usize::from(header.csum_start).clamp(34, 74) + TCP;
        SegmentationOverhead::of(&VnetHeader { gso_type: 1, gso_size, ..*header }, headers, length)
    }
}
