//! Buffers for frames to come: the kernel reads each frame straight into the oldest of them.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use crate::counters::Drop;
use crate::features::{HEADER_LENGTH, Offloads};
use crate::guest::virtqueue::MAX_SEGMENTS;
use crate::guest::{Burst, Chain, Segment, Writable};
use crate::port::{Finished, Terms};
use crate::sys::tap::Queue;
use crate::traffic::{Notes, Way};
use crate::vnet_header::{
    ETHERNET_LENGTH, LINK_OVERHEAD, MAX_FRAME, MAX_HEADERS, Surplus, VnetHeader,
};

/// Buffers that are borrowed ahead, which bounds what a session holds. Eight frames of 64 KiB in
/// the 1.5 KiB buffers of a Linux driver.
const POSTED: usize = 512;
/// How long frames wait for the guest to provide the buffers that the largest of them could need.
const PATIENCE: Duration = Duration::from_millis(10);

/// Buffers for frames to come.
#[derive(Debug)]
pub(super) struct Receiver<'mem> {
    header_length: usize,
    accepted: Offloads,
    mergeable: bool,
    /// The card's MTU in bytes.
    mtu: u16,
    /// Descriptors of the ring.
    ring_size: u16,
    /// Longest frame in bytes that the device can deliver, header included.
    largest: usize,
    /// Bytes of buffers with which frames are read at once.
    enough: usize,
    posted: VecDeque<Chain<'mem, Writable>>,
    /// Bytes in `posted`.
    room: usize,
    /// What the next frame may take: the segments of the oldest `window_chains` chains, of which those
    /// that follow each other in memory, as a driver's buffers often do, are one.
    window: Vec<Segment<'mem>>,
    window_chains: usize,
    window_room: usize,
    notes: Notes,
    /// Whether frames are noted.
    peeks: bool,
    /// Whether to read: nobody has found the device empty since frames may have come.
    pub(super) may_have_frames: bool,
    /// Since when frames have waited for more buffers.
    short_since: Option<Instant>,
    /// They waited long enough: read with the buffers that there are.
    make_do: bool,
    /// The buffers held the largest frame at some time in this session.
    has_held_largest: bool,
    /// The ring cannot hold the largest frame that is to be segmented: the kernel is to segment for it.
    pub(super) is_small: bool,
}

impl<'mem> Receiver<'mem> {
    /// For frames up to `longest` bytes, but for those that are to be segmented. `is_small` if the ring is
    /// known not to hold these.
    pub(super) fn new(terms: &Terms, longest: usize, is_small: bool) -> Self {
        let Terms { negotiated, mtu, receives, .. } = *terms;
        let mut receiver = Receiver {
            header_length: negotiated.header_length(),
            accepted: negotiated.guest(),
            mergeable: negotiated.mergeable(),
            mtu,
            ring_size: terms.rx_size,
            largest: 0,
            enough: 0,
            posted: VecDeque::new(),
            room: 0,
            window: Vec::new(),
            window_chains: 0,
            window_room: 0,
            notes: Notes::new(terms.tally.clone()),
            peeks: false,
            may_have_frames: receives,
            short_since: None,
            make_do: false,
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

    /// Finds out whether the ring can hold the largest frame, from its size and the buffers posted.
    fn measure(&mut self) {
        let buffers = self.posted.len();
        if buffers == 0 || !self.segments() {
            return;
        }
        let wanted = self.header_length + MAX_FRAME;
        if self.room >= wanted || buffers == POSTED {
            self.has_held_largest = true;
            self.is_small = false;
        } else if !self.has_held_largest
            && usize::from(self.ring_size) * (self.room / buffers) < wanted
        {
            self.is_small = true;
        }
    }

    /// Length in bytes of the virtio header, and what the guest has accepted.
    pub(super) fn terms(&self) -> (usize, Offloads) {
        (self.header_length, self.accepted)
    }

    /// Descriptors of the ring, and bytes of each buffer posted on average.
    pub(super) fn shape(&self) -> (u16, usize) {
        (self.ring_size, self.room / self.posted.len().max(1))
    }

    /// All buffers that hold nothing, when the session ends.
    pub(super) fn hand_back(&mut self) -> impl Iterator<Item = Chain<'mem, Writable>> {
        self.window.clear();
        self.posted.drain(..)
    }

    /// How long frames that are known to wait are to wait on for the guest's buffers.
    pub(super) fn patience(&self) -> Option<Duration> {
        self.short_since.map(|since| PATIENCE.saturating_sub(since.elapsed()))
    }

    /// Borrows buffers, as far as there is use for them.
    pub(super) fn take(&mut self, buffers: &mut Burst<'mem, Writable>) {
        let wanted = POSTED.saturating_sub(self.posted.len()).min(buffers.len());
        // Without buffers nobody has looked for frames.
        self.may_have_frames |= self.posted.is_empty();
        self.room += buffers.iter().take(wanted).map(Chain::len).sum::<usize>();
        if wanted == buffers.len() {
            self.posted.append(buffers);
        } else {
            self.posted.extend(buffers.drain(..wanted));
        }
        self.make_do = false;
        self.measure();
    }

    /// Whether the largest frame that may come fits the buffers posted.
    ///
    /// A frame that is read into too few is lost, and a TAP does not tell the next frame's
    /// length. So frames wait for the guest's buffers instead, but for [`PATIENCE`] only, since
    /// the guest may have no more.
    pub(super) fn has_room(&self) -> bool {
        match self.posted.len() {
            0 => false,
            POSTED => true,
            _ => !self.mergeable || self.room >= self.enough,
        }
    }

    fn may_read(&self) -> bool {
        self.has_room() || (self.make_do && !self.posted.is_empty())
    }

    /// Whether to wait for the device: not while frames are known to wait for buffers.
    pub(super) fn watches(&self) -> bool {
        !self.posted.is_empty() && (self.may_read() || !self.may_have_frames)
    }

    /// As `may_read`, and keeps the time that frames have waited.
    pub(super) fn can_read(&mut self) -> bool {
        if self.has_room() || self.posted.is_empty() {
            self.short_since = None;
        } else if !self.make_do {
            let since = *self.short_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= PATIENCE {
                self.make_do = true;
                self.short_since = None;
                self.is_small |= self.segments() && !self.has_held_largest;
            }
        }
        self.may_read()
    }

    /// Reads the next frame into the oldest buffers; returns its length with header, or nothing if
    /// it is lost, being longer than what these hold.
    pub(super) fn read(&mut self, queue: &Queue) -> io::Result<Option<usize>> {
        // Without segmentation the oldest buffer nearly always takes any frame.
        if self.window.is_empty()
            && let Some(oldest) = self.posted.front()
            && oldest.len() > self.largest
        {
            let length = queue.read(oldest.segments())?;
            return Ok((length < oldest.len()).then_some(length));
        }
        let most = if self.mergeable { self.posted.len() } else { 1 };
        while self.window_room < self.largest && self.window_chains < most {
            let chain = &self.posted[self.window_chains];
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

    /// Gives back the buffers that the frame of `length` bytes takes, or counts it as dropped.
    pub(super) fn deliver(&mut self, length: usize, finished: &mut Finished<'mem>) {
        if length < self.header_length {
            finished.rx_dropped.push((Drop::TooShort, 1));
            return;
        }
        match self.fit_header_to_guest() {
            Ok(header) => finished.rx_surplus += self.surplus(&header, length),
            Err(reason) => {
                finished.rx_dropped.push((reason, 1));
                return;
            }
        }
        if self.peeks {
            self.note(length);
        }
        let (mut left, mut taken, first) = (length, 0, finished.rx.len());
        while left > 0 {
            let chain = self.posted.pop_front().expect("the window has room for the frame");
            let part = left.min(chain.len());
            left -= part;
            taken += chain.len();
            finished.rx.push((chain, part as u32));
        }
        let buffers = finished.rx.len() - first;
        self.room -= taken;
        if !self.window.is_empty() {
            self.move_window(buffers, taken);
        }
        if self.header_length == HEADER_LENGTH {
            // The kernel knows a header of 10 bytes only, and leaves the rest as it was.
            finished.rx[first].0.write_at(10, &(buffers as u16).to_le_bytes());
        }
        finished.rx_frames += 1;
        finished.rx_bytes += (length - self.header_length) as u64;
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
    fn note(&mut self, length: usize) {
        let mut start = [0; HEADER_LENGTH + MAX_HEADERS];
        let shown = self.posted[0].read_start(&mut start).min(length);
        let frame = start.get(self.header_length..shown).unwrap_or_default();
        self.notes.note(Way::Rx, frame, length - self.header_length);
    }

    /// Looks at the header that the kernel wrote. The device was set to what the guest accepts,
    /// but frames may have been queued before that.
    fn fit_header_to_guest(&self) -> Result<VnetHeader, Drop> {
        let buffer = &self.posted[0];
        let header = VnetHeader::parse(&buffer.first_bytes::<10>());
        if !header.accepted_by(&self.accepted) {
            return Err(Drop::NotAccepted);
        }
        if !self.accepted.checksum && header.flags != 0 {
            // Section 5.1.6.4.1: flags are zero without GUEST_CSUM.
            buffer.write_at(0, &[0]);
        }
        Ok(header)
    }

    /// What the frame of `length` bytes with its header is on the wire beyond itself. The guest may
    /// have rewritten the header: however small it makes the segments, they fit the MTU.
    fn surplus(&self, header: &VnetHeader, length: usize) -> Surplus {
        /// IPv4 and TCP without options.
        const LEAST_HEADERS: u16 = 40;
        /// TCP with its usual options. Without them there is one segment less at the most.
        const TCP: usize = 32;
        let length = length - self.header_length;
        if length <= usize::from(self.mtu) + LINK_OVERHEAD {
            return Surplus::default();
        }
        let gso_size = header.gso_size.min(self.mtu.saturating_sub(LEAST_HEADERS)).max(1);
        // The kernel's hdr_len is not the length of headers.
        let headers = usize::from(header.csum_start).clamp(34, 74) + TCP;
        Surplus::of(&VnetHeader { gso_type: 1, gso_size, ..*header }, headers, length)
    }
}
