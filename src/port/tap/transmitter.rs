//! Chains on their way out: checked, and written a burst at a time.

use std::io;
use std::mem;
use std::ops::Range;

use log::warn;

use super::TapQueue;
use crate::counters::Drop;
use crate::guest::{Burst, Chain, ReadSegment, Readable};
use crate::port::{Finished, KeptStarts, Outcome, Terms};
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
    /// What becomes of each frame of a burst.
    outcomes: Vec<Outcome>,
    /// Each frame to be written: its chain's place in the burst, and its part of the list of
    /// segments.
    bounds: Vec<(usize, Range<usize>)>,
    /// Room for the segments of a burst's frames.
    segments: Vec<ReadSegment<'static>>,
    /// What is to be given back.
    done: Vec<(Chain<'mem, Readable>, Outcome)>,
    /// What the frames sent are on the wire beyond themselves.
    surplus: Surplus,
    notes: Notes,
    kept: KeptStarts,
    /// The device had no room for the last frame.
    pub(super) blocked: bool,
}

impl<'mem> Transmitter<'mem> {
    pub(super) fn new(terms: &Terms, longest: usize) -> Self {
        Transmitter {
            // A second piece costs a write more than copying a small frame does.
            admission: Admission { copies_small: true, ..terms.admission(longest) },
            mtu: terms.mtu,
            notes: Notes::new(terms.tally.clone()),
            kept: KeptStarts::new(terms.capture.clone()),
            starts: vec![PrivateStart::default(); MAX_WRITES],
            outcomes: Vec::new(),
            bounds: Vec::new(),
            segments: Vec::new(),
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
        self.kept.refresh();
        while !burst.is_empty() && !self.blocked {
            self.admit(burst, host);
            let dealt_with = self.write(burst, host);
            self.take(burst, dealt_with);
        }
        self.notes.publish();
    }

    /// Checks the oldest frames, as many as are written at a time, and notes those that are dropped.
    fn admit(&mut self, burst: &Burst<'mem, Readable>, host: &TapQueue) {
        self.outcomes.clear();
        let mut asked = false;
        for (chain, start) in burst.iter().zip(&mut self.starts) {
            let mut admitted = admit(chain, &self.admission, start);
            if admitted == Err(Drop::TooLong) && !asked {
                // Or the device's MTU was raised: once a burst it is asked.
                asked = true;
                self.admission.max_frame = host.longest_frame(self.mtu);
                admitted = admit(chain, &self.admission, start);
            }
            self.outcomes.push(match admitted {
                Ok(()) => Outcome::Sent,
                Err(reason) => Outcome::Dropped(reason),
            });
        }
    }

    /// Takes chains that are dealt with from the burst.
    fn take(&mut self, burst: &mut Burst<'mem, Readable>, count: usize) {
        let header_length = self.admission.header_length;
        if self.kept.wanted {
            let dealt_with = burst.iter().take(count).zip(&self.outcomes).zip(&self.starts);
            for ((chain, outcome), start) in dealt_with {
                self.kept.keep(chain.head(), start, *outcome);
            }
        }
        let dealt_with = burst.drain(..count).zip(&self.outcomes).zip(&self.starts);
        for ((chain, outcome), start) in dealt_with {
            if *outcome == Outcome::Sent {
                let length = chain.len() - header_length;
                self.surplus += start.surplus(length);
                if self.admission.peeks {
                    self.notes.note(Way::Tx, &start.bytes()[header_length..], length);
                }
            }
            self.done.push((chain, *outcome));
        }
    }

    /// Gives back what has finished.
    pub(super) fn finish(&mut self, finished: &mut Finished<'mem>) {
        finished.take_tx(&mut self.done);
        self.kept.finish(finished);
        finished.tx_surplus += mem::take(&mut self.surplus);
    }

    /// Writes the frames that were admitted, and notes what became of each. Returns how many chains
    /// are dealt with; the rest wait for room.
    fn write(&mut self, burst: &Burst<'mem, Readable>, host: &mut TapQueue) -> usize {
        let mut segments = emptied(mem::take(&mut self.segments));
        let starts = mem::take(&mut self.starts);
        let dealt_with = self.write_segments(burst, host, &starts, &mut segments);
        self.segments = emptied(segments);
        self.starts = starts;
        dealt_with
    }

    fn write_segments<'a>(
        &mut self,
        burst: &'a Burst<'mem, Readable>,
        host: &mut TapQueue,
        starts: &'a [PrivateStart],
        segments: &mut Vec<ReadSegment<'a>>,
    ) -> usize {
        let Transmitter { outcomes, bounds, blocked, .. } = self;
        // The checked start of each frame, then its chain from there on.
        bounds.clear();
        for (index, chain) in burst.iter().take(outcomes.len()).enumerate() {
            if outcomes[index] != Outcome::Sent {
                continue;
            }
            let start = starts[index].bytes();
            let from = segments.len();
            segments.push(ReadSegment::of_bytes(start));
            if start.len() < chain.len() {
                segments.extend(chain.segments_after(start.len()).map(ReadSegment::from));
            }
            bounds.push((index, from..segments.len()));
        }

        let mut unwritten = &bounds[..];
        if let Some(writer) = host.writer.as_mut().filter(|_| bounds.len() >= URING_FROM) {
            let mut results = [0; MAX_WRITES];
            let frames = bounds.iter().map(|(_, part)| &segments[part.clone()]);
            let written = writer.write_all(frames, &mut results);
            let submitted =
                written.as_ref().map_or_else(|error| error.submitted, |()| bounds.len());
            for ((index, _), result) in bounds[..submitted].iter().zip(results) {
                if result < 0 {
                    outcomes[*index] = Outcome::Dropped(Drop::HostRefused);
                }
            }
            let Err(error) = written else { return outcomes.len() };
            warn!(
                "tap {}: io_uring failed after {submitted} of {} frames, writing frame by frame \
                 from now on: {}",
                host.queue.identity().name,
                bounds.len(),
                error.source
            );
            host.writer = None;
            unwritten = &bounds[submitted..];
        }
        for (index, part) in unwritten {
            match host.queue.write(&segments[part.clone()]) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    *blocked = true;
                    return *index;
                }
                Err(_) => outcomes[*index] = Outcome::Dropped(Drop::HostRefused),
            }
        }
        outcomes.len()
    }
}

/// The same memory for segments of other memory.
fn emptied<'to>(mut segments: Vec<ReadSegment<'_>>) -> Vec<ReadSegment<'to>> {
    segments.clear();
    segments.into_iter().map(|_| unreachable!("it is empty")).collect()
}
