//! A port that returns each frame to the guest that sent it: for tests of a frontend or a driver
//! without any network, and of everything above the seam.

use std::collections::VecDeque;

use super::{Finished, KeptStarts, Mode, Outcome, Port, Readiness, Terms};
use crate::counters::Drop;
use crate::features::{HEADER_LENGTH, Offloads};
use crate::guest::{Burst, Chain, Readable, Writable};
use crate::vnet_header::{Admission, LINK_OVERHEAD, PrivateStart, VnetHeader, admit};

/// Buffers that are borrowed ahead.
const POSTED: usize = 256;

/// A session of the loopback port.
#[derive(Debug)]
pub struct Loopback<'mem> {
    admission: Admission,
    accepted: Offloads,
    mergeable: bool,
    start: PrivateStart,
    posted: VecDeque<Chain<'mem, Writable>>,
    done: Finished<'mem>,
    kept: KeptStarts,
    /// A frame waits for buffers.
    starved: bool,
    /// Frames that it delivers each time at the most.
    rx_limit: usize,
}

impl Loopback<'_> {
    /// Begins a session.
    pub fn new(terms: &Terms) -> Self {
        let negotiated = &terms.negotiated;
        Loopback {
            admission: terms.admission(usize::from(terms.mtu) + LINK_OVERHEAD),
            accepted: negotiated.guest(),
            mergeable: negotiated.mergeable(),
            start: PrivateStart::default(),
            posted: VecDeque::new(),
            done: Finished::default(),
            kept: KeptStarts::new(terms.capture.clone()),
            starved: false,
            rx_limit: usize::MAX,
        }
    }
}

impl<'mem> Loopback<'mem> {
    /// Number of posted buffers that hold `length` bytes; nothing if they do not.
    fn buffers_for(&self, length: usize) -> Option<usize> {
        let most = if self.mergeable { self.posted.len() } else { self.posted.len().min(1) };
        let mut room = 0;
        (0..most)
            .find(|&i| {
                room += self.posted[i].len();
                room >= length
            })
            .map(|last| last + 1)
    }

    /// Copies the frame into the oldest `buffers` posted.
    fn deliver(&mut self, frame: &Chain<'mem, Readable>, buffers: usize) {
        let mut copied = 0;
        for index in 0..buffers {
            let buffer = self.posted.pop_front().expect("buffers_for has counted them");
            let length = buffer.copy_from(frame, copied);
            // What was checked stands for what it was copied from.
            if let Some(checked) = self.start.bytes().get(copied..) {
                buffer.write_at(0, &checked[..checked.len().min(length)]);
            }
            if index == 0 && self.admission.header_length == HEADER_LENGTH {
                buffer.write_at(10, &(buffers as u16).to_le_bytes());
            }
            copied += length;
            self.done.rx.push((buffer, length as u32));
        }
        self.done.rx_frames += 1;
        self.done.rx_bytes += (copied - self.admission.header_length) as u64;
    }
}

impl<'mem> Port<'mem> for Loopback<'mem> {
    fn transmit(&mut self, burst: &mut Burst<'mem, Readable>) {
        self.starved = false;
        self.admission.filter.refresh();
        self.kept.refresh();
        let before = self.done.rx_frames;
        while ((self.done.rx_frames - before) as usize) < self.rx_limit
            && let Some(frame) = burst.pop_front()
        {
            let outcome = match admit(&frame, &self.admission, &mut self.start) {
                Err(reason) => Outcome::Dropped(reason),
                Ok(()) => {
                    let header = VnetHeader::parse(
                        self.start.bytes().first_chunk().expect("a header has at least 10 bytes"),
                    );
                    if !header.accepted_by(&self.accepted) {
                        Outcome::Dropped(Drop::NotAccepted)
                    } else if let Some(buffers) = self.buffers_for(frame.len()) {
                        let surplus =
                            self.start.surplus(frame.len() - self.admission.header_length);
                        self.done.rx_surplus += surplus;
                        self.done.tx_surplus += surplus;
                        self.deliver(&frame, buffers);
                        Outcome::Sent
                    } else if self.posted.len() >= POSTED
                        || (!self.mergeable && !self.posted.is_empty())
                    {
                        Outcome::Dropped(Drop::NoRoom)
                    } else {
                        self.starved = true;
                        burst.push_front(frame);
                        return;
                    }
                }
            };
            if self.kept.wanted {
                self.kept.keep(frame.head(), &self.start, outcome);
            }
            self.done.tx.push((frame, outcome));
        }
    }

    fn post(&mut self, buffers: &mut Burst<'mem, Writable>) {
        let wanted = POSTED.saturating_sub(self.posted.len()).min(buffers.len());
        self.posted.extend(buffers.drain(..wanted));
    }

    fn reap(&mut self, finished: &mut Finished<'mem>) {
        finished.tx.append(&mut self.done.tx);
        self.kept.finish(finished);
        finished.rx.append(&mut self.done.rx);
        finished.rx_frames += std::mem::take(&mut self.done.rx_frames);
        finished.rx_bytes += std::mem::take(&mut self.done.rx_bytes);
        finished.rx_surplus += std::mem::take(&mut self.done.rx_surplus);
        finished.tx_surplus += std::mem::take(&mut self.done.tx_surplus);
    }

    fn limit_rx(&mut self, frames: usize) {
        self.rx_limit = frames;
    }

    fn mode(&self) -> Mode {
        Mode::Loopback
    }

    fn readiness(&self) -> Readiness<'_> {
        Readiness { starved: self.starved, ..Readiness::default() }
    }

    fn woken(&mut self, _readable: bool) {}

    fn recall(&mut self, finished: &mut Finished<'mem>) {
        finished.tx.append(&mut self.done.tx);
        finished.rx.append(&mut self.done.rx);
        finished.unused_rx.extend(self.posted.drain(..));
    }
}
