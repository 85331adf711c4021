//! Frames from the guest: checked, and written a burst at a time.

use std::io;
use std::iter;
use std::mem;
use std::ops::Range;

use log::warn;

use super::TapQueue;
use crate::counters::DropReason;
use crate::guest::{Chain, ReadSegment, Readable, Virtqueue};
use crate::port::{Completions, Outcome, SessionConfig, TxStages};
use crate::sys::uring::MAX_WRITES;
use crate::vnet_header::{HeaderCopy, Validated};

/// Bursts from this many frames on go through io_uring: a submission of one costs more than a
/// `writev`.
const URING_FROM: usize = 2;

/// A frame of a burst that is written at once.
#[derive(Debug, Clone, Copy)]
struct Frame {
    admitted: Result<Validated, DropReason>,
    /// Where its segments are in the list of all; none of a frame that is dropped.
    first: u32,
    end: u32,
}

impl Frame {
    fn segments(&self) -> Range<usize> {
        self.first as usize..self.end as usize
    }
}

/// What writes frames.
#[derive(Debug)]
pub(super) struct Transmitter {
    stages: TxStages,
    /// The virtio-net device's MTU in bytes, by which the longest frame is renewed.
    mtu: u16,
    /// Whether that was renewed in this burst.
    renewed: bool,
    /// The checked start of each frame of a burst that is not plain.
    starts: Vec<HeaderCopy>,
    frames: Vec<Frame>,
    /// Room for the segments of a burst's frames.
    segments: Vec<ReadSegment<'static>>,
    /// The device had no room for the last frame.
    pub(super) blocked: bool,
}

impl Transmitter {
    pub(super) fn new(config: &SessionConfig, longest: usize) -> Self {
        let mut stages = config.tx_stages(longest);
        // A second piece costs a write more than copying a small frame does.
        stages.headers.copies_small = true;
        Transmitter {
            stages,
            mtu: config.mtu,
            renewed: false,
            starts: vec![HeaderCopy::default(); MAX_WRITES],
            frames: Vec::with_capacity(MAX_WRITES),
            segments: Vec::new(),
            blocked: false,
        }
    }

    /// Sends what is admitted of the frames before position `until`, until the device has no room.
    pub(super) fn transmit(
        &mut self,
        tx: &mut Virtqueue<'_, Readable>,
        until: u16,
        host: &mut TapQueue,
        done: &mut Completions,
    ) {
        self.blocked = false;
        self.renewed = false;
        self.stages.begin_burst(done);
        let mut starts = mem::take(&mut self.starts);
        while tx.next_used() != until && !self.blocked {
            let frames = usize::from(until.wrapping_sub(tx.next_used()));
            if frames >= URING_FROM && host.writer.is_some() {
                self.send_at_once(tx, until, host, &mut starts, done);
            } else {
                self.send_next(tx, host, &mut starts[0], done);
            }
        }
        self.starts = starts;
        self.stages.end_burst();
    }

    /// Checks a frame.
    #[inline(always)]
    fn admit(
        &mut self,
        chain: &Chain<'_, '_, Readable>,
        start: &mut HeaderCopy,
        host: &TapQueue,
    ) -> Result<Validated, DropReason> {
        let admitted = self.stages.check(chain, start);
        if admitted != Err(DropReason::TooLong) || self.renewed {
            return admitted;
        }
        // Or the device's MTU was raised: once a burst it is asked.
        self.renewed = true;
        self.stages.headers.max_frame = host.longest_frame(self.mtu);
        self.stages.check(chain, start)
    }

    /// Sends the oldest frame.
    fn send_next(
        &mut self,
        tx: &mut Virtqueue<'_, Readable>,
        host: &mut TapQueue,
        start: &mut HeaderCopy,
        done: &mut Completions,
    ) {
        let chain = tx.chain(tx.next_used());
        let mut admitted = self.admit(&chain, start, host);
        if let Ok(how) = admitted {
            let checked = self.stages.checked(how, start);
            let first = ReadSegment::of_bytes(checked);
            let written = if checked.len() >= chain.len() {
                host.queue.write(&[first])
            } else if let Some(rest) = chain.only_after(checked.len()) {
                host.queue.write(&[first, rest.into()])
            } else {
                let rest = chain.segments_after(checked.len()).map(ReadSegment::from);
                host.queue.write(&iter::once(first).chain(rest).collect::<Vec<_>>())
            };
            match written {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.blocked = true;
                    return;
                }
                Err(_) => admitted = Err(DropReason::HostRefused),
            }
        }
        self.complete(tx, admitted, start, done);
    }

    /// Sends the oldest frames with one system call, as many as go into it.
    fn send_at_once(
        &mut self,
        tx: &mut Virtqueue<'_, Readable>,
        until: u16,
        host: &mut TapQueue,
        starts: &mut [HeaderCopy],
        done: &mut Completions,
    ) {
        let mut frames = mem::take(&mut self.frames);
        let mut segments = emptied(mem::take(&mut self.segments));
        for (position, start) in tx.positions(until).zip(&mut *starts) {
            let chain = tx.chain(position);
            let admitted = self.admit(&chain, start, host);
            let first = segments.len() as u32;
            if let Ok(how) = admitted {
                let checked = self.stages.checked(how, start);
                segments.push(ReadSegment::of_bytes(checked));
                match chain.only_after(checked.len()) {
                    Some(rest) => segments.push(rest.into()),
                    None if checked.len() < chain.len() => {
                        segments.extend(chain.segments_after(checked.len()).map(ReadSegment::from));
                    }
                    None => {}
                }
            }
            frames.push(Frame { admitted, first, end: segments.len() as u32 });
        }
        let dealt_with = write_at_once(&mut frames, &segments, host);
        self.segments = emptied(segments);
        for (frame, start) in frames[..dealt_with].iter().zip(&*starts) {
            self.complete(tx, frame.admitted, start, done);
        }
        frames.clear();
        self.frames = frames;
    }

    /// Completes the oldest frame.
    #[inline(always)]
    fn complete(
        &mut self,
        tx: &mut Virtqueue<'_, Readable>,
        admitted: Result<Validated, DropReason>,
        start: &HeaderCopy,
        done: &mut Completions,
    ) {
        let position = tx.next_used();
        let length = tx.chain(position).len().saturating_sub(self.stages.header_length());
        let outcome = admitted.map_or_else(Outcome::Dropped, |_| Outcome::Sent);
        self.stages.observe(position, start, length, outcome, done);
        let how = match admitted {
            Ok(how) => how,
            Err(reason) => return done.drop_oldest(tx, reason),
        };
        tx.push_used(0);
        done.tx.frames += 1;
        done.tx.bytes += length as u64;
        if how == Validated::Copied && start.needs_segmentation() {
            done.tx.overhead += start.overhead(length);
        }
    }
}

/// Writes the frames that were admitted with one system call, and notes which the device refuses. Returns how
/// many frames are dealt with. Where the others are not, io_uring is not used any more.
fn write_at_once(frames: &mut [Frame], segments: &[ReadSegment<'_>], host: &mut TapQueue) -> usize {
    let Some(writer) = &mut host.writer else { return 0 };
    let mut results = [0; MAX_WRITES];
    let parts = frames.iter().map(Frame::segments).filter(|part| !part.is_empty());
    let written = writer.write_all(parts.map(|part| &segments[part]), &mut results);
    let submitted = written.as_ref().map_or_else(|error| error.submitted, |()| MAX_WRITES);
    if let Err(error) = written {
        let admitted = frames.iter().filter(|frame| !frame.segments().is_empty()).count();
        warn!(
            "tap {}: io_uring failed after {submitted} of {admitted} frames, writing frame by frame from \
             now on: {}",
            host.queue.identity().name,
            error.source
        );
        host.writer = None;
    }
    let mut results = results.iter().take(submitted);
    for (index, frame) in frames.iter_mut().enumerate() {
        if frame.segments().is_empty() {
            continue;
        }
        match results.next() {
            Some(result) if *result < 0 => frame.admitted = Err(DropReason::HostRefused),
            Some(_) => {}
            None => return index,
        }
    }
    frames.len()
}

/// The same memory for segments of other memory.
fn emptied<'to>(mut segments: Vec<ReadSegment<'_>>) -> Vec<ReadSegment<'to>> {
    segments.clear();
    segments.into_iter().map(|_| unreachable!("it is empty")).collect()
}
