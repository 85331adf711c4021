//! Buffers for frames to come: posted in the fill ring, until the rx ring says that a frame is in
//! one of them.
//!
//! A guest's buffer that can take the longest frame behind its header is posted itself, and the
//! frame is where the guest wants it. Other buffers are *parked*: a frame for them is received into
//! a slot of the bounce area, which is posted in their stead, and copied. When the guest has no buffers
//! left, a few slots are posted all the same, so that the device never runs dry: frames in them
//! wait for buffers to come. Posting is here; `delivery` is what becomes of frames that have arrived.
//!
//! Invariant: chains complete in the order of the ring, and none before every older one, since the
//! kernel may still write into an older one that is posted.

mod delivery;
mod posted;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use posted::{PostedRing, Target};

use super::interface::OpenSocket;
use super::umem::{GuestUmem, RX_SLOTS};
use crate::features::Negotiated;
use crate::guest::{Virtqueue, Writable};
use crate::sys::xsk::{RingSizes, Socket};

/// Buffers that are in flight at the most.
pub(super) const MAX_BUFFERS: usize = 1024;
/// With fewer buffers than this the guest is asked for more.
const LOW_WATERMARK: usize = 32;
/// Slots that are posted when the guest has no buffers left.
const RESERVE_SLOTS: usize = 8;
/// The kernel gives buffers back in the order in which they were posted, or soon after. One that
/// others have overtaken for this long is not coming.
const REORDER_TIMEOUT: Duration = Duration::from_millis(100);

/// Entries of a socket's rings. Every buffer posted finds room in the rx ring: the kernel never
/// takes one up and drops its frame, which would change their order.
pub(super) const RING_SIZES: RingSizes =
    RingSizes { rx: (MAX_BUFFERS + RX_SLOTS).next_power_of_two() as u32, tx: 512 };

/// A frame that is to be copied into the guest's buffers.
#[derive(Debug)]
enum Waiting {
    /// In a slot of the bounce area.
    Slot { slot: u16, length: u16 },
    /// In memory of our own.
    Copy(Vec<u8>),
}

/// Buffers for frames to come.
#[derive(Debug)]
pub(super) struct Receiver {
    pair: u16,
    /// Length in bytes of the header before each frame.
    pub(super) header_length: usize,
    mergeable: bool,
    /// In the order of the fill ring.
    posted: PostedRing,
    /// How many of `posted` are slots.
    slots_posted: usize,
    /// How many of `posted` have a frame, and wait for an older one that has none.
    held: usize,
    /// Position of the first buffer that was not looked at; all before it in flight are posted or parked.
    fresh: u16,
    /// Positions of buffers that are not posted, oldest first.
    parked: VecDeque<u16>,
    /// Bytes in the smallest that was parked since none was.
    smallest: usize,
    waiting: VecDeque<Waiting>,
    free_slots: Vec<u16>,
    /// Since when a buffer has been overtaken.
    overtaken: Option<Instant>,
    /// A buffer came back that had not been posted.
    foreign_address: bool,
}

impl Receiver {
    /// For a session that begins at position `fresh`.
    pub(super) fn new(negotiated: &Negotiated, pair: u16, fresh: u16) -> Self {
        Receiver {
            pair,
            header_length: negotiated.header_length(),
            mergeable: negotiated.mergeable(),
            posted: PostedRing::new(),
            slots_posted: 0,
            held: 0,
            fresh,
            parked: VecDeque::new(),
            smallest: usize::MAX,
            waiting: VecDeque::new(),
            free_slots: all_slots(),
            overtaken: None,
            foreign_address: false,
        }
    }

    /// Whether the guest is to say when it provides more than so many buffers.
    pub(super) fn is_starved(buffers: usize) -> bool {
        buffers < LOW_WATERMARK
    }

    /// What is wrong with how buffers come back, if anything is.
    pub(super) fn fault(&self) -> Option<&'static str> {
        if self.foreign_address {
            // igb of Linux 6.18 to 7.3 takes old descriptors for new ones when it has run out of
            // buffers at the end of its ring (`igb_alloc_rx_buffers_zc`).
            return Some("the driver gives back a buffer that it does not have");
        }
        let stuck = self.overtaken.is_some_and(|since| since.elapsed() > REORDER_TIMEOUT);
        stuck.then_some("the kernel keeps a buffer that others have overtaken")
    }

    /// When to look whether the oldest buffer is not coming back.
    pub(super) fn patience(&self) -> Option<Duration> {
        self.overtaken.map(|_| REORDER_TIMEOUT)
    }

    /// Takes back what the kernel had: its socket is closed. Returns how many frames are lost that
    /// had arrived in buffers.
    pub(super) fn reclaim(&mut self, first: u16) -> u64 {
        let filled = self.posted.iter().filter(|posted| posted.filled().is_some()).count();
        let lost = filled + self.waiting.len();
        self.posted.clear();
        self.parked.clear();
        self.waiting.clear();
        // All that are in flight are to be looked at again.
        self.fresh = first;
        self.slots_posted = 0;
        self.held = 0;
        self.free_slots = all_slots();
        self.overtaken = None;
        self.foreign_address = false;
        lost as u64
    }

    /// Parks a buffer, in its place in the ring's order.
    fn defer(&mut self, position: u16, rx: &Virtqueue<'_, Writable>) {
        if self.parked.is_empty() {
            self.smallest = usize::MAX;
        }
        self.smallest = self.smallest.min(rx.chain(position).len());
        let age = |position: &u16| position.wrapping_sub(rx.next_used());
        let older = match self.parked.back() {
            Some(last) if age(last) > age(&position) => {
                self.parked.partition_point(|parked| age(parked) < age(&position))
            }
            _ => self.parked.len(),
        };
        self.parked.insert(older, position);
    }

    /// Posts what can be posted.
    pub(super) fn post(&mut self, rx: &Virtqueue<'_, Writable>, open: &mut OpenSocket) {
        self.post_all(rx, &mut open.socket, &open.umem);
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

    fn post_all(&mut self, rx: &Virtqueue<'_, Writable>, socket: &mut Socket, umem: &GuestUmem) {
        let mut staged = self.fresh != rx.next_avail();
        while self.fresh != rx.next_avail() {
            if !self.is_uncovered(umem) {
                self.post_suitable(rx, socket, umem);
            }
            if self.fresh != rx.next_avail() {
                self.defer(self.fresh, rx);
                self.fresh = self.fresh.wrapping_add(1);
                self.post_slots(socket, umem, 0);
            }
        }
        staged |= self.post_slots(socket, umem, 0);
        if staged {
            socket.fill.submit();
        }
    }

    /// Posts buffers themselves, until one is not suitable.
    #[inline(always)]
    fn post_suitable(
        &mut self,
        rx: &Virtqueue<'_, Writable>,
        socket: &mut Socket,
        umem: &GuestUmem,
    ) {
        let (main, layout) = (umem.main_region(), umem.layout);
        let before = self.header_length - layout.header;
        let fresh = rx.next_avail().wrapping_sub(self.fresh);
        let mut batch = socket.fill.batch(fresh.into());
        let mut posted = self.posted.batch();
        let mut position = self.fresh;
        while position != rx.next_avail() {
            let only = rx.only_piece(position).filter(|only| only.len() >= before + layout.writes);
            let address = only.and_then(|only| main.address_of(&only.skip(before)));
            let address = address.map(|address| address - layout.lead());
            let address =
                address.or_else(|| umem.receivable(&rx.chain(position), self.header_length));
            let Some(address) = address else { break };
            batch.stage(address);
            posted.push(address, Target::Guest(position));
            position = position.wrapping_add(1);
        }
        drop(posted);
        self.fresh = position;
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
            let address = umem.rx_slot(self.pair, usize::from(slot));
            self.stage(socket, address, Target::Slot(slot));
            any = true;
        }
        any
    }

    fn stage(&mut self, socket: &mut Socket, address: u64, target: Target) {
        socket.fill.stage(address);
        self.posted.push(address, target);
    }
}

fn all_slots() -> Vec<u16> {
    (0..RX_SLOTS as u16).collect()
}
