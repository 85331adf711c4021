//! Frames to the guest: the kernel writes each frame straight into the oldest rx buffers.

use std::io;

use super::read_gate::{ReadGate, Room};
use crate::counters::DropReason;
use crate::features::{HEADER_LENGTH, LEGACY_HEADER_LENGTH, Offloads};
use crate::frame::{ETHERNET_LENGTH, FrameDirection, LINK_OVERHEAD, MAX_FRAME};
use crate::guest::{Chain, MAX_SEGMENTS, Segment, Virtqueue, Writable};
use crate::port::{Completions, SessionConfig};
use crate::sys::tap::Queue;
use crate::traffic::PeerNotes;
use crate::vnet_header::{MAX_HEADERS, SegmentationOverhead, VnetHeader};

/// Maximum number of rx buffers in flight: enough for eight frames of 64 KiB in a Linux driver's buffers of 1.5 KiB.
pub(super) const MAX_BUFFERS: usize = 512;

/// The rx side of a session on a TAP.
#[derive(Debug)]
pub(super) struct Receiver<'mem> {
    header_length: usize,
    accepted: Offloads,
    mergeable: bool,
    /// The virtio-net device's MTU in bytes.
    mtu: u16,
    /// Length in bytes of the longest frame that the TAP can deliver, virtio-net header included.
    largest: usize,
    /// Bytes of buffers in flight that suffice to read without a wait.
    enough: usize,
    /// Target of the next read: the segments of the oldest `window_chains` chains. Segments that are adjacent in
    /// memory, as a driver's buffers often are, are joined.
    window: Vec<Segment<'mem>>,
    window_chains: usize,
    window_bytes: usize,
    peers: PeerNotes,
    /// Whether this burst's frames are counted by peer.
    counts_peers: bool,
    /// Whether the buffers in flight could hold the largest frame at some time in this session.
    has_held_largest: bool,
    /// Whether the ring cannot hold the largest GSO frame, so that the kernel must segment.
    pub(super) is_small: bool,
}

impl<'mem> Receiver<'mem> {
    /// Creates the rx side for frames of up to `longest` bytes; GSO frames may be longer. `is_small` is true if the
    /// ring is known to be too small for GSO frames.
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
            window_bytes: 0,
            peers: PeerNotes::new(config.peers.clone()),
            counts_peers: false,
            has_held_largest: false,
            is_small,
        };
        receiver.set_longest(longest);
        receiver
    }

    /// Prepares for frames of up to `longest` bytes; GSO frames may be longer.
    pub(super) fn set_longest(&mut self, longest: usize) {
        let is_small = self.is_small;
        let frame = if self.accepts_gso() && !is_small { MAX_FRAME } else { longest };
        self.largest = self.header_length + frame;
        // A driver with a small ring sizes its buffers for frames without VLAN tags.
        let tags = if is_small { LINK_OVERHEAD - ETHERNET_LENGTH } else { 0 };
        self.enough = self.largest - tags;
    }

    /// Whether the guest accepts GSO frames, in several buffers each.
    fn accepts_gso(&self) -> bool {
        self.mergeable && self.accepted.segmentation()
    }

    /// Determines from the ring's size and the buffers in flight whether the ring can hold the largest GSO frame.
    pub(super) fn measure_ring(&mut self, rx: &Virtqueue<'mem, Writable>) {
        let (buffers, bytes) = (rx.in_flight(), rx.bytes_in_flight());
        if buffers == 0 || !self.accepts_gso() {
            return;
        }
        let wanted = self.header_length + MAX_FRAME;
        if bytes >= wanted || buffers >= MAX_BUFFERS {
            self.has_held_largest = true;
            self.is_small = false;
        } else if !self.has_held_largest && usize::from(rx.size()) * (bytes / buffers) < wanted {
            self.is_small = true;
        }
    }

    /// Settings that the device needs: length in bytes of the virtio-net header, and the accepted offloads.
    pub(super) fn device_settings(&self) -> (usize, Offloads) {
        (self.header_length, self.accepted)
    }

    /// Forgets the buffers in flight, at the end of the session.
    pub(super) fn stop(&mut self) {
        self.window.clear();
        self.window_chains = 0;
        self.window_bytes = 0;
    }

    /// Compares the buffers in flight with the largest frame that the TAP can deliver.
    #[inline]
    pub(super) fn room(&self, rx: &Virtqueue<'mem, Writable>) -> Room {
        match rx.in_flight() {
            0 => Room::None,
            1..MAX_BUFFERS if self.mergeable && rx.bytes_in_flight() < self.enough => Room::Short,
            _ => Room::Enough,
        }
    }

    /// Whether the buffers in flight permit a read now.
    #[inline]
    pub(super) fn can_read(&mut self, gate: &mut ReadGate, rx: &Virtqueue<'mem, Writable>) -> bool {
        match self.room(rx) {
            Room::Enough => true,
            Room::None => false,
            Room::Short => self.has_timed_out(gate),
        }
    }

    /// Whether the wait for more buffers has timed out. A timeout shows that the ring is small.
    #[inline(never)]
    fn has_timed_out(&mut self, gate: &mut ReadGate) -> bool {
        let has_timed_out = gate.has_timed_out();
        self.is_small |= has_timed_out && self.accepts_gso() && !self.has_held_largest;
        has_timed_out
    }

    /// Reads the next frame into the oldest buffers. Returns the length with the virtio-net header, or `None` if the
    /// frame is lost because it is longer than the buffers.
    pub(super) fn read(
        &mut self,
        queue: &Queue,
        rx: &Virtqueue<'mem, Writable>,
    ) -> io::Result<Option<usize>> {
        // Fast path: without GSO frames, the oldest buffer nearly always holds any frame.
        if self.window.is_empty() {
            let oldest = rx.chain(rx.next_used());
            if oldest.len() > self.largest {
                let length = queue.read(oldest.segments())?;
                return Ok((length < oldest.len()).then_some(length));
            }
        }
        self.read_scattered(queue, rx)
    }

    /// Reads the next frame into as many of the oldest buffers as the largest frame requires.
    #[inline(never)]
    fn read_scattered(
        &mut self,
        queue: &Queue,
        rx: &Virtqueue<'mem, Writable>,
    ) -> io::Result<Option<usize>> {
        let most = if self.mergeable { rx.in_flight() } else { 1 };
        while self.window_bytes < self.largest && self.window_chains < most {
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
            self.window_bytes += chain.len();
        }
        if self.window_bytes <= self.largest {
            let length = queue.read_watching(&mut self.window)?;
            return Ok((length <= self.window_bytes).then_some(length));
        }
        // The window is longer than any frame, so a frame that fills it was truncated.
        let length = queue.read(&self.window)?;
        Ok((length < self.window_bytes).then_some(length))
    }

    /// Removes the oldest `chains`, which have `bytes` in total, from the window.
    #[inline(never)]
    fn move_window(&mut self, chains: usize, mut bytes: usize) {
        self.window_chains -= chains;
        self.window_bytes -= bytes;
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

    /// Completes the buffers that hold the frame of `length` bytes, or counts the frame as dropped.
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
        // Most frames have an empty header. The guest can clear a GSO frame's header at any time, so length counts too.
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
        if self.counts_peers {
            self.note_peer(&first, length);
        }
        // The kernel writes the legacy header's fields only, so `num_buffers` is ours.
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
            let mut total = 0;
            let needed = rx.positions(rx.next_avail()).take_while(|position| {
                let before = total;
                total += rx.chain(*position).len();
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
            debug_assert_eq!(left, 0, "the window holds the frame");
            self.move_window(buffers, taken);
        }
        done.rx.frames += 1;
        done.rx.bytes += (length - self.header_length) as u64;
    }

    /// Prepares for a burst of frames.
    pub(super) fn begin_burst(&mut self) {
        self.counts_peers = self.peers.is_on();
    }

    /// Adds the burst's frames to the count of peers.
    pub(super) fn end_burst(&mut self) {
        self.peers.publish();
    }

    /// Notes the peer of the frame in the oldest buffers, by the bytes in the first buffer. A guest that changes the
    /// buffer meanwhile falsifies only its own counts.
    #[inline(never)]
    fn note_peer(&mut self, first: &Chain<'_, 'mem, Writable>, length: usize) {
        let mut start = [0; HEADER_LENGTH + MAX_HEADERS];
        let shown = first.read_start(&mut start).min(length);
        let frame = start.get(self.header_length..shown).unwrap_or_default();
        self.peers.note(FrameDirection::Rx, frame, length - self.header_length);
    }

    /// Checks the header that the kernel wrote. The device has the guest's offloads, but a frame may have been queued
    /// before they were set.
    ///
    /// # Errors
    /// The guest does not accept such a frame.
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
            // virtio 1.3, section 5.1.6.4.1: flags are zero without VIRTIO_NET_F_GUEST_CSUM.
            buffer.write_at(0, &[0]);
        }
        Ok(*header)
    }

    /// Packets and bytes that segmentation adds to the frame of `length` bytes, virtio-net header included. The guest may
    /// have rewritten the header, so the segment size is bounded by the MTU.
    fn overhead(&self, header: &VnetHeader, length: usize) -> SegmentationOverhead {
        /// Bytes of IPv4 and TCP headers without options.
        const MIN_HEADERS: u16 = 40;
        /// Bytes of a TCP header with the usual options. Without options the estimate is at most one segment too high.
        const TCP: usize = 32;
        let length = length - self.header_length;
        if length <= usize::from(self.mtu) + LINK_OVERHEAD {
            return SegmentationOverhead::default();
        }
        let gso_size = header.gso_size.min(self.mtu.saturating_sub(MIN_HEADERS)).max(1);
        // The kernel's `hdr_len` is not the length of the headers.
        let headers = usize::from(header.csum_start).clamp(34, 74) + TCP;
        SegmentationOverhead::of(&VnetHeader { gso_type: 1, gso_size, ..*header }, headers, length)
    }
}
