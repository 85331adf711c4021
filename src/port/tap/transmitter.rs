//! Chains on their way out: checked, and written a burst at a time.

use std::io;
use std::ops::Range;

use log::warn;

use super::TapQueue;
use crate::counters::Drop;
use crate::guest::{Burst, Chain, Readable, Segment};
use crate::port::{Finished, Outcome, Terms};
use crate::sys::uring::MAX_WRITES;
use crate::traffic::{Notes, Way};
use crate::vnet_header::{Admission, PrivateStart, Surplus, admit};

/// Bursts from this many frames on go through io_uring: a submission of one costs more than a
/// `writev`.
const URING_FROM: usize = 2;

/// Chains on their way out.
#[derive(Debug)]
pub(super) struct Transmitter<'mem> {
    admission: Admission,
    /// The card's MTU, by which `admission` is renewed.
    mtu: u16,
    /// The checked start of each frame of a burst.
    starts: Vec<PrivateStart>,
    /// Chain's place in the burst, and its part of the list of segments.
    bounds: Vec<(usize, Range<usize>)>,
    /// What is to be given back.
    done: Vec<(Chain<'mem, Readable>, Outcome)>,
    /// What the frames sent are on the wire beyond themselves.
    surplus: Surplus,
    notes: Notes,
    /// The device had no room for the last frame.
    pub(super) blocked: bool,
}

impl<'mem> Transmitter<'mem> {
    pub(super) fn new(terms: &Terms, longest: usize) -> Self {
        Transmitter {
            admission: terms.admission(longest),
            mtu: terms.mtu,
            notes: Notes::new(terms.tally.clone()),
            starts: Vec::new(),
            bounds: Vec::new(),
            done: Vec::new(),
            surplus: Surplus::default(),
            blocked: false,
        }
    }

    /// Sends what is admitted, until the device has no room.
    pub(super) fn transmit(&mut self, burst: &mut Burst<'mem, Readable>, host: &mut TapQueue) {
        self.blocked = false;
        self.admission.filter.refresh();
        self.admission.peeks = self.notes.wanted();
        self.starts.resize_with(MAX_WRITES, PrivateStart::default);
        while !burst.is_empty() && !self.blocked {
            let count = burst.len().min(MAX_WRITES);
            let mut outcomes = [Outcome::Sent; MAX_WRITES];
            let mut asked = false;
            for (index, chain) in burst.iter().take(count).enumerate() {
                let mut admitted = admit(chain, &self.admission, &mut self.starts[index]);
                if admitted == Err(Drop::TooLong) && !asked {
                    // Or the device's MTU was raised: once a burst it is asked.
                    asked = true;
                    self.admission.max_frame = host.longest_frame(self.mtu);
                    admitted = admit(chain, &self.admission, &mut self.starts[index]);
                }
                if let Err(reason) = admitted {
                    outcomes[index] = Outcome::Dropped(reason);
                }
            }
            let dealt_with = self.write(burst, count, &mut outcomes, host);
            let header_length = self.admission.header_length;
            for index in (0..dealt_with).filter(|&index| outcomes[index] == Outcome::Sent) {
                let (start, length) = (&self.starts[index], burst[index].len() - header_length);
                self.surplus += start.surplus(length);
                if self.admission.peeks {
                    self.notes.note(Way::Tx, &start.bytes()[header_length..], length);
                }
            }
            self.done.extend(burst.drain(..dealt_with).zip(outcomes));
        }
        self.notes.publish();
    }

    /// Gives back what has finished.
    pub(super) fn finish(&mut self, finished: &mut Finished<'mem>) {
        finished.tx.append(&mut self.done);
        finished.tx_surplus += std::mem::take(&mut self.surplus);
    }

    /// Writes the frames that were admitted, and notes in `outcomes`, which holds the drops
    /// already, what became of each. Returns how many chains are dealt with; the rest wait for
    /// room.
    fn write(
        &mut self,
        burst: &Burst<'mem, Readable>,
        count: usize,
        outcomes: &mut [Outcome; MAX_WRITES],
        host: &mut TapQueue,
    ) -> usize {
        let Transmitter { starts, bounds, blocked, .. } = self;
        // The checked start of each frame, then its chain from there on.
        let mut segments: Vec<Segment<'_>> = Vec::with_capacity(2 * count);
        bounds.clear();
        for (index, chain) in burst.iter().take(count).enumerate() {
            if outcomes[index] != Outcome::Sent {
                continue;
            }
            let start = starts[index].bytes();
            let from = segments.len();
            segments.push(Segment::of_bytes(start));
            let mut skip = start.len();
            for segment in chain.segments() {
                if skip >= segment.len() {
                    skip -= segment.len();
                } else {
                    segments.push(segment.skip(skip));
                    skip = 0;
                }
            }
            bounds.push((index, from..segments.len()));
        }

        if let Some(writer) = host.writer.as_mut().filter(|_| bounds.len() >= URING_FROM) {
            let mut results = [0; MAX_WRITES];
            let mut frames = bounds.iter().map(|(_, part)| &segments[part.clone()]);
            match writer.write_all(&mut frames, &mut results) {
                Ok(()) => {
                    for ((index, _), result) in bounds.iter().zip(results) {
                        if result < 0 {
                            outcomes[*index] = Outcome::Dropped(Drop::HostRefused);
                        }
                    }
                    return count;
                }
                Err(error) => {
                    let name = &host.queue.identity().name;
                    warn!(
                        "tap {name}: io_uring failed, writing frame by frame from now on: {error}"
                    );
                    host.writer = None;
                }
            }
        }
        for (index, part) in bounds {
            match host.queue.write(&segments[part.clone()]) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    *blocked = true;
                    return *index;
                }
                Err(_) => outcomes[*index] = Outcome::Dropped(Drop::HostRefused),
            }
        }
        count
    }
}
