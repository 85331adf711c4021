//! Buffers for frames to come: posted in the fill ring, until the rx ring says that a frame is in
//! one of them.
//!
//! A guest's buffer that can take the longest frame behind its header is posted itself, and the
//! frame is where the guest wants it. Other buffers are *parked*: a frame for them is received into
//! a slot of the arena, which is posted in their stead, and copied. When the guest has no buffers
//! left, a few slots are posted all the same, so that the device never runs dry: frames in them
//! wait for buffers to come.
//!
//! Invariant: chains go back in the order of the ring, and none before every older one, since the
//! kernel may still write into an older one that is posted.

use std::collections::VecDeque;
use std::mem;
use std::time::{Duration, Instant};

use super::interface::OpenSocket;
use super::umem::{GuestUmem, RX_SLOTS};
use crate::counters::{CopyReason, Drop};
use crate::features::{HEADER_LENGTH, Negotiated};
use crate::guest::{Burst, Chain, ReadSegment, Writable};
use crate::port::Finished;
use crate::sys::xsk::{ADDRESS_BITS, RingSizes, Socket};

/// Buffers that are borrowed ahead.
const BORROWED: usize = 1024;
/// With fewer buffers than this the guest is asked for more.
const FEW: usize = 32;
/// Slots that are posted when the guest has no buffers left.
const SPARE: usize = 8;
/// The kernel gives buffers back in the order in which they were posted, or soon after. One that
/// others have overtaken for this long is not coming.
const STUCK: Duration = Duration::from_millis(100);

/// Entries of a socket's rings. Every buffer posted finds room in the rx ring: the kernel never
/// takes one up and drops its frame, which would change their order.
pub(super) const RING_SIZES: RingSizes =
    RingSizes { rx: (BORROWED + RX_SLOTS).next_power_of_two() as u32, tx: 512 };

/// Where a posted address leads to.
#[derive(Debug)]
enum Target<'mem> {
    /// A buffer of the guest's.
    Guest(Chain<'mem, Writable>),
    /// A slot of the arena.
    Slot(usize),
}

/// A buffer that the kernel has.
#[derive(Debug)]
struct Posted<'mem> {
    address: u64,
    target: Target<'mem>,
    /// Length in bytes of the frame that has arrived in it, with what the program put before it.
    filled: Option<u32>,
}

/// A frame that is to be copied into the guest's buffers.
#[derive(Debug)]
enum Waiting {
    /// In a slot of the arena.
    Slot { slot: usize, length: usize },
    /// In memory of our own.
    Copy(Vec<u8>),
}

/// Buffers for frames to come.
#[derive(Debug)]
pub(super) struct Receiver<'mem> {
    pair: u16,
    /// Length in bytes of the header before each frame.
    pub(super) header_length: usize,
    mergeable: bool,
    /// In the order of the fill ring.
    posted: VecDeque<Posted<'mem>>,
    /// How many of `posted` are slots.
    slots_posted: usize,
    /// How many of `posted` have a frame, and wait for an older one that has none.
    held: usize,
    /// Buffers that have not been looked at, younger than all others.
    fresh: VecDeque<Chain<'mem, Writable>>,
    /// Buffers that are not posted, oldest first.
    parked: VecDeque<Chain<'mem, Writable>>,
    /// Bytes in the smallest that was parked since none was.
    smallest: usize,
    waiting: VecDeque<Waiting>,
    free_slots: Vec<usize>,
    /// Since when a buffer has been overtaken.
    overtaken: Option<Instant>,
    /// A buffer came back that had not been posted.
    confused: bool,
}

impl<'mem> Receiver<'mem> {
    pub(super) fn new(negotiated: &Negotiated, pair: u16) -> Self {
        Receiver {
            pair,
            header_length: negotiated.header_length(),
            mergeable: negotiated.mergeable(),
            posted: VecDeque::new(),
            slots_posted: 0,
            held: 0,
            fresh: VecDeque::new(),
            parked: VecDeque::new(),
            smallest: usize::MAX,
            waiting: VecDeque::new(),
            free_slots: (0..RX_SLOTS).collect(),
            overtaken: None,
            confused: false,
        }
    }

    /// Whether any buffer of the guest's is here.
    pub(super) fn has_buffers(&self) -> bool {
        self.borrowed() > 0
    }

    /// Whether the guest is to say when it provides more.
    pub(super) fn is_starved(&self) -> bool {
        self.borrowed() < FEW
    }

    fn borrowed(&self) -> usize {
        self.posted.len() - self.slots_posted + self.parked.len() + self.fresh.len()
    }

    /// Borrows buffers, as far as there is use for them.
    pub(super) fn take(&mut self, buffers: &mut Burst<'mem, Writable>) {
        let wanted = BORROWED.saturating_sub(self.borrowed()).min(buffers.len());
        if self.fresh.is_empty() && wanted == buffers.len() {
            mem::swap(&mut self.fresh, buffers);
        } else {
            self.fresh.extend(buffers.drain(..wanted));
        }
    }

    /// Parks a buffer, in its place in the ring's order.
    fn park(&mut self, chain: Chain<'mem, Writable>) {
        if self.parked.is_empty() {
            self.smallest = usize::MAX;
        }
        self.smallest = self.smallest.min(chain.len());
        let older = match self.parked.back() {
            Some(last) if !last.is_older_than(&chain) => {
                self.parked.partition_point(|parked| parked.is_older_than(&chain))
            }
            _ => self.parked.len(),
        };
        self.parked.insert(older, chain);
    }

    /// Posts what can be posted.
    pub(super) fn post(&mut self, open: &mut OpenSocket) {
        self.post_all(&mut open.socket, &open.umem);
        self.wake_driver(open);
    }

    /// Has a driver that ran out of buffers look at the fill ring again.
    fn wake_driver(&self, open: &OpenSocket) {
        if open.socket.fill.needs_wakeup() {
            // An error would be the device's, which sending or an event brings up.
            let _ = open.socket.receive();
        }
    }

    /// Posts a slot on a socket that is not bound yet: a driver with zero copy may never look again
    /// if it finds nothing then (igb of Linux 6.18). No more than that: frames that come before
    /// the socket is bound are dropped, and send their buffers round in another order.
    pub(super) fn post_before_bind(&mut self, socket: &mut Socket, umem: &GuestUmem) {
        if umem.layout.zero_copy {
            self.post_slots(socket, umem, 1);
            socket.fill.submit();
        }
    }

    fn post_all(&mut self, socket: &mut Socket, umem: &GuestUmem) {
        let mut fresh = mem::take(&mut self.fresh);
        let mut staged = !fresh.is_empty();
        let mut uncovered = self.is_uncovered(umem);
        for chain in fresh.drain(..) {
            let address =
                if uncovered { None } else { umem.receivable(&chain, self.header_length) };
            match address {
                Some(address) => self.stage(socket, address, Target::Guest(chain)),
                None => {
                    self.park(chain);
                    self.post_slots(socket, umem, 0);
                    uncovered = self.is_uncovered(umem);
                }
            }
        }
        self.fresh = fresh;
        staged |= self.post_slots(socket, umem, 0);
        if staged {
            socket.fill.submit();
        }
    }

    /// Whether frames in slots may need more buffers than are parked: those to come, which are
    /// older than what is posted behind the slots.
    fn is_uncovered(&self, umem: &GuestUmem) -> bool {
        self.slots_posted + self.waiting.len() > self.frames_parked(umem)
    }

    /// How many of the longest frames the parked buffers hold at the least.
    fn frames_parked(&self, umem: &GuestUmem) -> usize {
        if self.parked.is_empty() {
            return 0;
        }
        let longest = self.header_length - umem.layout.header + umem.layout.writes;
        let each = if self.mergeable { longest.div_ceil(self.smallest.max(1)) } else { 1 };
        self.parked.len() / each
    }

    /// Posts slots for the frames that the parked buffers can take, and for `spare` in any case.
    fn post_slots(&mut self, socket: &mut Socket, umem: &GuestUmem, spare: usize) -> bool {
        let wanted = self.frames_parked(umem).max(spare);
        let mut any = false;
        while self.slots_posted + self.waiting.len() < wanted {
            let Some(slot) = self.free_slots.pop() else { break };
            self.slots_posted += 1;
            self.stage(socket, umem.rx_slot(self.pair, slot), Target::Slot(slot));
            any = true;
        }
        any
    }

    #[inline(always)]
    fn stage(&mut self, socket: &mut Socket, address: u64, target: Target<'mem>) {
        socket.fill.stage(address);
        self.posted.push_back(Posted { address, target, filled: None });
    }

    /// Gives back the buffers that frames have arrived in, up to `most` of these.
    pub(super) fn reap(
        &mut self,
        open: &mut OpenSocket,
        most: usize,
        finished: &mut Finished<'mem>,
    ) {
        let (mut taken, mut delivered) = (0, false);
        while taken < most
            && let Some(descriptor) = open.socket.rx.take()
        {
            taken += 1;
            let address = descriptor.address & ((1 << ADDRESS_BITS) - 1);
            // Nearly always it is the oldest.
            match self.posted.pop_front_if(|oldest| oldest.address == address) {
                Some(oldest) => {
                    delivered = true;
                    self.deliver(oldest.target, descriptor.length, &open.umem, finished);
                }
                None => self.hold(address, descriptor.length),
            }
            if self.held > 0 {
                delivered |= self.deliver_held(&open.umem, finished);
            }
        }
        self.serve_waiting(&open.umem, finished);
        if taken == 0 {
            return;
        }
        open.socket.rx.release();
        let spare = if self.posted.len() == self.slots_posted { SPARE } else { 0 };
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

    /// Notes a frame that has arrived in a buffer which is not the oldest.
    fn hold(&mut self, address: u64, length: u32) {
        let waits = |posted: &Posted<'_>| posted.filled.is_none();
        let is_its = |posted: &Posted<'_>| posted.address == address && waits(posted);
        let Some(mut index) = self.posted.iter().position(is_its) else {
            self.confused = true;
            return;
        };
        let is_slot = |posted: &Posted<'_>| matches!(posted.target, Target::Slot(_));
        if is_slot(&self.posted[index])
            && let Some(first) = self.posted.iter().position(|it| is_slot(it) && waits(it))
        {
            // One slot is as good as another: frames stay in the order in which they came.
            self.posted.swap(first, index);
            index = first;
        }
        self.posted[index].filled = Some(length);
        self.held += 1;
    }

    /// Delivers the frames in the oldest buffers; says whether there were any.
    fn deliver_held(&mut self, umem: &GuestUmem, finished: &mut Finished<'mem>) -> bool {
        let before = self.held;
        while let Some(Posted { target, filled: Some(length), .. }) =
            self.posted.pop_front_if(|oldest| oldest.filled.is_some())
        {
            self.held -= 1;
            self.deliver(target, length, umem, finished);
        }
        self.held < before
    }

    /// What is wrong with how buffers come back, if anything is.
    pub(super) fn fault(&self) -> Option<&'static str> {
        if self.confused {
            // igb of Linux 6.18 to 7.3 takes old descriptors for new ones when it has run out of
            // buffers at the end of its ring (`igb_alloc_rx_buffers_zc`).
            return Some("the driver gives back a buffer that it does not have");
        }
        let stuck = self.overtaken.is_some_and(|since| since.elapsed() > STUCK);
        stuck.then_some("the kernel keeps a buffer that others have overtaken")
    }

    /// When to look whether the oldest buffer is not coming back.
    pub(super) fn patience(&self) -> Option<Duration> {
        self.overtaken.map(|_| STUCK)
    }

    /// Delivers the frame in the buffer that was the oldest posted.
    #[inline(always)]
    fn deliver(
        &mut self,
        target: Target<'mem>,
        length: u32,
        umem: &GuestUmem,
        finished: &mut Finished<'mem>,
    ) {
        match target {
            Target::Guest(chain) if self.is_next(&chain) => {
                // The program has put it there, if the kernel copies.
                let header = (self.header_length - umem.layout.header) as u32;
                if header > 0 {
                    write_header(&chain, self.header_length, 1);
                }
                finished.rx.push((chain, header + length));
                finished.rx_frames += 1;
                finished.rx_bytes += u64::from(header + length) - self.header_length as u64;
            }
            target => self.deliver_copied(target, length, umem, finished),
        }
    }

    /// Delivers a frame that is not where it belongs.
    #[inline(never)]
    fn deliver_copied(
        &mut self,
        target: Target<'mem>,
        length: u32,
        umem: &GuestUmem,
        finished: &mut Finished<'mem>,
    ) {
        let length = length as usize;
        match target {
            Target::Guest(chain) => {
                // Older buffers are parked: the frame is theirs, and its buffer one of them.
                let mut bytes = vec![0; length - umem.layout.header];
                if let Some(piece) = chain.first_after(self.header_length) {
                    piece.read(&mut bytes);
                }
                self.waiting.push_back(Waiting::Copy(bytes));
                self.park(chain);
            }
            Target::Slot(slot) => {
                self.slots_posted -= 1;
                self.waiting.push_back(Waiting::Slot { slot, length });
            }
        }
        self.serve_waiting(umem, finished);
    }

    /// Whether the buffer is the oldest of all, and no frame waits.
    #[inline]
    fn is_next(&self, chain: &Chain<'mem, Writable>) -> bool {
        self.waiting.is_empty()
            && self.parked.front().is_none_or(|parked| chain.is_older_than(parked))
    }

    /// Copies the frames that wait into the parked buffers.
    #[inline]
    fn serve_waiting(&mut self, umem: &GuestUmem, finished: &mut Finished<'mem>) {
        while let Some(frame) = self.waiting.pop_front() {
            let served = match &frame {
                Waiting::Slot { slot, length } => {
                    self.spread(umem.rx_frame(self.pair, *slot, *length).into(), umem, finished)
                }
                Waiting::Copy(bytes) => self.spread(ReadSegment::of_bytes(bytes), umem, finished),
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

    /// Copies a frame into the oldest parked buffers; says whether they were there.
    fn spread(
        &mut self,
        frame: ReadSegment<'_>,
        umem: &GuestUmem,
        finished: &mut Finished<'mem>,
    ) -> bool {
        let needed = self.header_length + frame.len();
        let Some(buffers) = self.buffers_for(needed) else { return false };
        let suitable = |chain| umem.receivable(chain, self.header_length).is_some();
        let reason = match self.parked.front().is_some_and(suitable) {
            true => CopyReason::Late,
            false => CopyReason::Unsuitable,
        };
        let (mut copied, first) = (0, finished.rx.len());
        for index in 0..buffers {
            let Some(chain) = self.parked.pop_front() else { break };
            let lead = if index == 0 { self.header_length } else { 0 };
            let part = chain.copy_segment(lead, frame.skip(copied));
            copied += part;
            finished.rx.push((chain, (lead + part) as u32));
        }
        if copied < frame.len() {
            // One buffer, and too small: it goes back with nothing in it, which drivers take for
            // the faulty frame that it was.
            finished.rx[first].1 = 0;
            finished.rx_dropped.push((Drop::NoRoom, 1));
            return true;
        }
        write_header(&finished.rx[first].0, self.header_length, buffers as u16);
        finished.rx_frames += 1;
        finished.rx_bytes += copied as u64;
        finished.rx_copied.push(reason);
        true
    }

    /// How many of the oldest buffers hold `bytes`, if they are parked and nothing older is
    /// posted.
    fn buffers_for(&self, bytes: usize) -> Option<usize> {
        let oldest_posted = self.posted.iter().find_map(|posted| match &posted.target {
            Target::Guest(chain) => Some(chain),
            Target::Slot(_) => None,
        });
        let mut room = 0;
        for (index, chain) in self.parked.iter().enumerate() {
            if oldest_posted.is_some_and(|posted| posted.is_older_than(chain)) {
                return None;
            }
            room += chain.len();
            if room >= bytes || !self.mergeable {
                return Some(index + 1);
            }
        }
        None
    }

    /// Takes back what the kernel had: its socket is closed. Returns how many frames are lost that
    /// had arrived in buffers.
    pub(super) fn withdraw(&mut self) -> u64 {
        let mut lost = 0;
        let mut chains: Vec<_> = self.parked.drain(..).chain(self.fresh.drain(..)).collect();
        for posted in self.posted.drain(..) {
            lost += u64::from(posted.filled.is_some());
            if let Target::Guest(chain) = posted.target {
                chains.push(chain);
            }
        }
        chains.sort_by(|a, b| b.is_older_than(a).cmp(&a.is_older_than(b)));
        self.fresh.extend(chains);
        lost += self.waiting.len() as u64;
        self.waiting.clear();
        self.slots_posted = 0;
        self.held = 0;
        self.free_slots = (0..RX_SLOTS).collect();
        self.overtaken = None;
        self.confused = false;
        lost
    }

    /// Gives back all buffers, which hold nothing, when the session ends.
    pub(super) fn recall(&mut self, finished: &mut Finished<'mem>) {
        finished.unused_rx.extend(self.fresh.drain(..));
    }
}

/// Writes the header of a frame that needs nothing done to it, in so many buffers. Not before the
/// frame has arrived: a device may have used its place for a header of its own.
fn write_header(chain: &Chain<'_, Writable>, length: usize, buffers: u16) {
    let mut header = [0; HEADER_LENGTH];
    header[10..12].copy_from_slice(&buffers.to_le_bytes());
    chain.write_at(0, &header[..length]);
}
