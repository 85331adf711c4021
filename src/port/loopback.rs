//! A port that returns each frame to the guest that sent it. It tests a frontend or a driver without any network,
//! and everything above [`Port`].

use super::{Completions, Mode, Outcome, Port, Readiness, SessionConfig, TxStages, Virtqueues};
use crate::counters::DropReason;
use crate::features::{HEADER_LENGTH, Offloads};
use crate::frame::LINK_OVERHEAD;
use crate::guest::{Chain, Readable, Virtqueue, Writable};
use crate::vnet_header::{HeaderCopy, Validated, VnetHeader};

/// Maximum number of rx buffers in flight.
const MAX_BUFFERS: usize = 256;

/// A session of the loopback port.
#[derive(Debug)]
pub struct Loopback {
    stages: TxStages,
    accepted: Offloads,
    mergeable: bool,
    start: HeaderCopy,
    /// Position in the tx ring up to which the worker has submitted frames.
    until: u16,
    /// True if a frame waits for more rx buffers.
    starved: bool,
}

/// The decision on a frame.
enum Delivery {
    /// The frame fits the given number of buffers.
    Fits(Validated, usize),
    /// The frame waits until the guest provides more buffers.
    Waits,
    /// The frame is dropped.
    Dropped(DropReason),
}

impl Loopback {
    /// Begins a session at position `next_used` of the tx ring.
    pub fn new(config: &SessionConfig, next_used: u16) -> Self {
        let negotiated = &config.negotiated;
        Loopback {
            stages: config.tx_stages(usize::from(config.mtu) + LINK_OVERHEAD),
            accepted: negotiated.guest(),
            mergeable: negotiated.mergeable(),
            start: HeaderCopy::default(),
            until: next_used,
            starved: false,
        }
    }

    /// Checks a frame, and finds the buffers for it.
    fn place(&mut self, frame: &Chain<'_, '_, Readable>, rx: &Virtqueue<'_, Writable>) -> Delivery {
        let validated = match self.stages.check(frame, &mut self.start) {
            Err(reason) => return Delivery::Dropped(reason),
            Ok(Validated::Copied) if !self.start.header().accepted_by(&self.accepted) => {
                return Delivery::Dropped(DropReason::NotAccepted);
            }
            Ok(validated) => validated,
        };
        match self.buffers_for(frame.len(), rx) {
            Some(buffers) => Delivery::Fits(validated, buffers),
            None if rx.in_flight() >= MAX_BUFFERS || (!self.mergeable && rx.in_flight() > 0) => {
                Delivery::Dropped(DropReason::NoRoom)
            }
            None => Delivery::Waits,
        }
    }

    /// Returns the number of oldest buffers that hold `length` bytes; `None` if all of them are too small.
    #[inline]
    fn buffers_for(&self, length: usize, rx: &Virtqueue<'_, Writable>) -> Option<usize> {
        if rx.in_flight() > 0 && rx.chain(rx.next_used()).len() >= length {
            return Some(1);
        }
        let most = if self.mergeable { rx.in_flight() } else { 0 };
        let mut room = 0;
        let mut positions = rx.positions(rx.next_avail()).take(most);
        let last = positions.position(|position| {
            room += rx.chain(position).len();
            room >= length
        });
        last.map(|last| last + 1)
    }

    /// Copies the frame into the oldest `buffers`, and replaces the frame's start by the `checked` bytes.
    fn deliver(
        &self,
        frame: &Chain<'_, '_, Readable>,
        checked: &[u8],
        buffers: usize,
        rx: &mut Virtqueue<'_, Writable>,
    ) {
        let mut copied = 0;
        for index in 0..buffers {
            let buffer = rx.chain(rx.next_used());
            let length = buffer.copy_from(frame, copied);
            if let Some(checked) = checked.get(copied..) {
                buffer.write_at(0, &checked[..checked.len().min(length)]);
            }
            if index == 0 && self.stages.header_length() == HEADER_LENGTH {
                buffer.write_at(VnetHeader::NUM_BUFFERS, &(buffers as u16).to_le_bytes());
            }
            copied += length;
            rx.push_used(length as u32);
        }
    }
}

impl<'mem> Port<'mem> for Loopback {
    fn transmit(
        &mut self,
        _queues: &mut Virtqueues<'mem>,
        until: u16,
        _done: &mut Completions,
    ) -> bool {
        self.until = until;
        true
    }

    fn max_buffers(&self) -> usize {
        MAX_BUFFERS
    }

    fn post(&mut self, _queues: &mut Virtqueues<'mem>) {}

    fn reap(&mut self, queues: &mut Virtqueues<'mem>, rx_allowance: usize, done: &mut Completions) {
        self.starved = false;
        self.stages.begin_burst(done);
        let Virtqueues { tx: Some(tx), rx: Some(rx) } = queues else { return };
        let mut delivered = 0;
        // No position is left if the worker has dropped the frames, because the ring is disabled.
        for position in tx.positions(self.until) {
            if delivered == rx_allowance {
                break;
            }
            let frame = tx.chain(position);
            let length = frame.len().saturating_sub(self.stages.header_length());
            match self.place(&frame, rx) {
                Delivery::Waits => {
                    self.starved = true;
                    break;
                }
                Delivery::Dropped(reason) => {
                    let outcome = Outcome::Dropped(reason);
                    self.stages.observe(position, &self.start, length, outcome, done);
                    done.drop_oldest(tx, reason);
                }
                Delivery::Fits(how, buffers) => {
                    self.stages.observe(position, &self.start, length, Outcome::Sent, done);
                    self.deliver(&frame, self.stages.checked(how, &self.start), buffers, rx);
                    for moved in [&mut done.rx, &mut done.tx] {
                        moved.frames += 1;
                        moved.bytes += length as u64;
                        if how == Validated::Copied {
                            moved.overhead += self.start.overhead(length);
                        }
                    }
                    delivered += 1;
                    tx.push_used(0);
                }
            }
        }
        self.stages.end_burst();
    }

    fn mode(&self) -> Mode {
        Mode::Loopback
    }

    fn readiness(&self, _queues: &Virtqueues<'mem>) -> Readiness<'_> {
        Readiness { starved: self.starved, ..Readiness::default() }
    }

    fn woken(&mut self, _readable: bool) {}

    fn stop(&mut self, _queues: &mut Virtqueues<'mem>, _done: &mut Completions) {}
}
