//! Buffers for received frames: posted in the fill ring, until the rx ring returns them with a frame.
//!
//! A guest buffer that can hold the longest frame behind its header is posted itself, so the frame arrives
//! where the guest wants it. Other buffers are *deferred*: the receiver posts a bounce buffer in place of
//! each, and copies the frame. When the guest has no buffers left, a few bounce buffers are still posted, so
//! that the device never runs dry. Their frames wait for guest buffers. This file posts; `delivery` handles
//! frames that have arrived.
//!
//! Invariant: chains complete in the order of the ring, since the kernel may still write into an older posted
//! buffer.

mod delivery;
mod posted;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use posted::{PostedRing, Target};

use super::interface::OpenSocket;
use super::umem::{GuestUmem, RX_BUFFERS};
use crate::features::Negotiated;
use crate::guest::{Virtqueue, Writable};
use crate::sys::xsk::{RingSizes, Socket};

/// Most guest buffers in flight.
pub(super) const MAX_BUFFERS: usize = 1024;
/// Number of guest buffers below which the guest is asked for more.
const LOW_WATERMARK: usize = 32;
/// Bounce buffers that stay posted when the guest has no buffers left.
const RESERVE_BUFFERS: usize = 8;
/// Time after which a buffer counts as stuck while later ones return. The kernel returns buffers in the order
/// of posting, or soon after.
const REORDER_TIMEOUT: Duration = Duration::from_millis(100);

/// Entries of a socket's rings. The rx ring has room for every posted buffer. On a full ring the kernel would
/// take a buffer and drop its frame, which would change the order of the buffers.
pub(super) const RING_SIZES: RingSizes =
    RingSizes { rx: (MAX_BUFFERS + RX_BUFFERS).next_power_of_two() as u32, tx: 512 };

/// A frame that waits to be copied into guest buffers.
#[derive(Debug)]
enum Waiting {
    /// A frame in a bounce buffer. `length` includes the header that the program has written.
    Bounce { buffer: u16, length: u16 },
    /// A copy of the frame, whose buffer was needed for an older frame.
    Copy(Vec<u8>),
}

/// Guest buffers and bounce buffers for received frames.
#[derive(Debug)]
pub(super) struct Receiver {
    pair: u16,
    /// Length in bytes of the virtio-net header before each frame.
    pub(super) header_length: usize,
    /// A frame may span several guest buffers (MRG_RXBUF).
    mergeable: bool,
    /// Posted buffers, in the order of the fill ring.
    posted: PostedRing,
    /// Number of bounce buffers in `posted`.
    bounce_posted: usize,
    /// Number of buffers in `posted` that have a frame, and wait for an older buffer without one.
    out_of_order: usize,
    /// Position of the first chain that is neither posted nor deferred.
    next_post: u16,
    /// Positions of deferred guest buffers, oldest first.
    deferred: VecDeque<u16>,
    /// Size in bytes of the smallest buffer deferred since `deferred` was last empty.
    smallest: usize,
    /// Frames for the deferred buffers, oldest first.
    waiting: VecDeque<Waiting>,
    /// Bounce buffers that neither the kernel nor a waiting frame uses.
    free_bounce: Vec<u16>,
    /// Time since which the oldest buffer is missing, while later ones have returned.
    overtaken: Option<Instant>,
    /// The kernel has returned a buffer that was not posted.
    foreign_address: bool,
}

impl Receiver {
    /// Creates the receiver of a session that begins at position `next_post`.
    pub(super) fn new(negotiated: &Negotiated, pair: u16, next_post: u16) -> Self {
        Receiver {
            pair,
            header_length: negotiated.header_length(),
            mergeable: negotiated.mergeable(),
            posted: PostedRing::new(),
            bounce_posted: 0,
            out_of_order: 0,
            next_post,
            deferred: VecDeque::new(),
            smallest: usize::MAX,
            waiting: VecDeque::new(),
            free_bounce: all_bounce_buffers(),
            overtaken: None,
            foreign_address: false,
        }
    }

    /// Returns true if `buffers` guest buffers are so few that the guest must notify of new ones.
    pub(super) fn is_starved(buffers: usize) -> bool {
        buffers < LOW_WATERMARK
    }

    /// Returns the fault in how the kernel returns buffers, if there is one.
    pub(super) fn fault(&self) -> Option<&'static str> {
        if self.foreign_address {
            // igb of Linux 6.18 to 7.3 takes old descriptors for new ones when it has run out of
            // buffers at the end of its ring (`igb_alloc_rx_buffers_zc`).
            return Some("the driver returned a buffer that was not posted");
        }
        let stuck = self.overtaken.is_some_and(|since| since.elapsed() > REORDER_TIMEOUT);
        stuck.then_some("the kernel keeps a buffer, and has returned later ones")
    }

    /// Returns the time until the check for a stuck buffer, if later buffers have returned.
    pub(super) fn reorder_timeout(&self) -> Option<Duration> {
        self.overtaken.map(|_| REORDER_TIMEOUT)
    }

    /// Resets the receiver after its socket was closed; `first` is the first chain in flight. Returns the
    /// number of frames that had arrived in buffers and are lost.
    pub(super) fn reclaim(&mut self, first: u16) -> u64 {
        let filled = self.posted.iter().filter(|posted| posted.filled().is_some()).count();
        let lost = filled + self.waiting.len();
        self.posted.clear();
        self.deferred.clear();
        self.waiting.clear();
        // All chains in flight are posted or deferred again.
        self.next_post = first;
        self.bounce_posted = 0;
        self.out_of_order = 0;
        self.free_bounce = all_bounce_buffers();
        self.overtaken = None;
        self.foreign_address = false;
        lost as u64
    }

    /// Defers a buffer, in its place in the ring's order.
    fn defer(&mut self, position: u16, rx: &Virtqueue<'_, Writable>) {
        if self.deferred.is_empty() {
            self.smallest = usize::MAX;
        }
        self.smallest = self.smallest.min(rx.chain(position).len());
        let age = |position: &u16| position.wrapping_sub(rx.next_used());
        let older = match self.deferred.back() {
            Some(last) if age(last) > age(&position) => {
                self.deferred.partition_point(|deferred| age(deferred) < age(&position))
            }
            _ => self.deferred.len(),
        };
        self.deferred.insert(older, position);
    }

    /// Posts or defers all new guest buffers.
    pub(super) fn post(&mut self, rx: &Virtqueue<'_, Writable>, open: &mut OpenSocket) {
        self.post_all(rx, &mut open.socket, &open.umem);
        self.wake_driver(open);
    }

    /// Wakes a driver that ran out of buffers, to read the fill ring again.
    fn wake_driver(&self, open: &OpenSocket) {
        if open.socket.fill.needs_wakeup() {
            // An error means that the device failed, which the next `send` or link event reports.
            let _ = open.socket.receive();
        }
    }

    /// Posts one bounce buffer on a socket that is not bound yet, in zero-copy mode. A driver that finds the
    /// fill ring empty at the bind may never read it again (igb of Linux 6.18). Only one: frames that arrive
    /// before the bind are dropped, and the driver reuses their buffers out of order.
    pub(super) fn post_before_bind(&mut self, socket: &mut Socket, umem: &GuestUmem) {
        if umem.layout.zero_copy {
            self.post_bounce(socket, umem, 1);
            socket.fill.submit();
        }
    }

    fn post_all(&mut self, rx: &Virtqueue<'_, Writable>, socket: &mut Socket, umem: &GuestUmem) {
        let mut staged = self.next_post != rx.next_avail();
        while self.next_post != rx.next_avail() {
            if !self.is_uncovered(umem) {
                self.post_suitable(rx, socket, umem);
            }
            if self.next_post != rx.next_avail() {
                self.defer(self.next_post, rx);
                self.next_post = self.next_post.wrapping_add(1);
                self.post_bounce(socket, umem, 0);
            }
        }
        staged |= self.post_bounce(socket, umem, 0);
        if staged {
            socket.fill.submit();
        }
    }

    /// Posts new guest buffers themselves, up to the first unsuitable one.
    #[inline(always)]
    fn post_suitable(
        &mut self,
        rx: &Virtqueue<'_, Writable>,
        socket: &mut Socket,
        umem: &GuestUmem,
    ) {
        let (main, layout) = (umem.main_region(), umem.layout);
        let before = self.header_length - layout.header;
        let next_post = rx.next_avail().wrapping_sub(self.next_post);
        let mut batch = socket.fill.batch(next_post.into());
        let mut posted = self.posted.batch();
        let mut position = self.next_post;
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
        self.next_post = position;
    }

    /// Returns true if frames in bounce buffers may need more guest buffers than are deferred. New guest
    /// buffers are then deferred for those frames, which are older than any frame in a buffer posted now.
    fn is_uncovered(&self, umem: &GuestUmem) -> bool {
        self.bounce_posted + self.waiting.len() > self.deferrable_frames(umem)
    }

    /// Returns the number of frames of any length that the deferred buffers can hold.
    fn deferrable_frames(&self, umem: &GuestUmem) -> usize {
        if self.deferred.is_empty() {
            return 0;
        }
        let longest = self.header_length - umem.layout.header + umem.layout.writes;
        let each = if self.mergeable { longest.div_ceil(self.smallest.max(1)) } else { 1 };
        self.deferred.len() / each
    }

    /// Posts a bounce buffer for each frame that the deferred buffers can hold, and at least `spare` ones.
    /// Returns true if it posted any.
    fn post_bounce(&mut self, socket: &mut Socket, umem: &GuestUmem, spare: usize) -> bool {
        let wanted = self.deferrable_frames(umem).max(spare);
        let mut any = false;
        while self.bounce_posted + self.waiting.len() < wanted {
            let Some(buffer) = self.free_bounce.pop() else { break };
            self.bounce_posted += 1;
            let address = umem.rx_buffer(self.pair, usize::from(buffer));
            self.stage(socket, address, Target::Bounce(buffer));
            any = true;
        }
        any
    }

    /// Stages one buffer in the fill ring.
    fn stage(&mut self, socket: &mut Socket, address: u64, target: Target) {
        socket.fill.stage(address);
        self.posted.push(address, target);
    }
}

fn all_bounce_buffers() -> Vec<u16> {
    (0..RX_BUFFERS as u16).collect()
}
