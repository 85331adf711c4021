//! Frames from the guest: validated, and written to the TAP in bursts.

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

/// Minimum number of frames in a burst for io_uring: a submission of one frame costs more than a `writev`.
const MIN_URING_BURST: usize = 2;

/// A frame of a burst that one io_uring submission writes.
#[derive(Debug, Clone, Copy)]
struct Frame {
    validated: Result<Validated, DropReason>,
    /// First of the frame's segments in the burst's list. A frame that is dropped has none.
    first: u32,
    /// End of the frame's segments in the burst's list.
    end: u32,
}

impl Frame {
    fn segments(&self) -> Range<usize> {
        self.first as usize..self.end as usize
    }
}

/// The tx side of a session on a TAP.
#[derive(Debug)]
pub(super) struct Transmitter {
    stages: TxStages,
    /// The virtio-net device's MTU in bytes.
    mtu: u16,
    /// True if the longest frame's length was updated in this burst.
    is_max_frame_current: bool,
    /// Checked starts of a burst's frames, unused for plain ones.
    starts: Vec<HeaderCopy>,
    frames: Vec<Frame>,
    /// Memory for the segments of a burst's frames, empty between bursts.
    segments: Vec<ReadSegment<'static>>,
    /// True if the TAP's send buffer was full at the last frame.
    pub(super) blocked: bool,
}

impl Transmitter {
    pub(super) fn new(config: &SessionConfig, longest: usize) -> Self {
        let mut stages = config.tx_stages(longest);
        // A second iovec costs more than a copy of a small frame.
        stages.headers.copies_small = true;
        Transmitter {
            stages,
            mtu: config.mtu,
            is_max_frame_current: false,
            starts: vec![HeaderCopy::default(); MAX_WRITES],
            frames: Vec::with_capacity(MAX_WRITES),
            segments: Vec::new(),
            blocked: false,
        }
    }

    /// Sends the frames before position `until`, and drops those that are not valid. Stops when the TAP's send
    /// buffer is full.
    pub(super) fn transmit(
        &mut self,
        tx: &mut Virtqueue<'_, Readable>,
        until: u16,
        host: &mut TapQueue,
        done: &mut Completions,
    ) {
        self.blocked = false;
        self.is_max_frame_current = false;
        self.stages.begin_burst(done);
        let mut starts = mem::take(&mut self.starts);
        while tx.next_used() != until && !self.blocked {
            let frames = usize::from(until.wrapping_sub(tx.next_used()));
            if frames >= MIN_URING_BURST && host.writer.is_some() {
                self.send_burst(tx, until, host, &mut starts, done);
            } else {
                self.send_next(tx, host, &mut starts[0], done);
            }
        }
        self.starts = starts;
        self.stages.end_burst();
    }

    /// Validates a frame.
    #[inline(always)]
    fn validate(
        &mut self,
        chain: &Chain<'_, '_, Readable>,
        start: &mut HeaderCopy,
        host: &TapQueue,
    ) -> Result<Validated, DropReason> {
        let validated = self.stages.check(chain, start);
        if validated != Err(DropReason::TooLong) || self.is_max_frame_current {
            return validated;
        }
        // The TAP's MTU may have been raised: query it, at most once in a burst.
        self.is_max_frame_current = true;
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
        let mut validated = self.validate(&chain, start, host);
        if let Ok(how) = validated {
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
                Err(_) => validated = Err(DropReason::HostRefused),
            }
        }
        self.complete(tx, validated, start, done);
    }

    /// Sends the oldest frames with one system call, up to the maximum of a submission.
    fn send_burst(
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
            let validated = self.validate(&chain, start, host);
            let first = segments.len() as u32;
            if let Ok(how) = validated {
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
            frames.push(Frame { validated, first, end: segments.len() as u32 });
        }
        let finished = write_burst(&mut frames, &segments, host);
        self.segments = emptied(segments);
        for (frame, start) in frames[..finished].iter().zip(&*starts) {
            self.complete(tx, frame.validated, start, done);
        }
        frames.clear();
        self.frames = frames;
    }

    /// Completes the oldest frame, as sent or as dropped.
    #[inline(always)]
    fn complete(
        &mut self,
        tx: &mut Virtqueue<'_, Readable>,
        validated: Result<Validated, DropReason>,
        start: &HeaderCopy,
        done: &mut Completions,
    ) {
        let position = tx.next_used();
        let how = match validated {
            Ok(how) => how,
            Err(reason) => {
                self.stages.observe(position, start, 0, Outcome::Dropped(reason), done);
                return done.drop_oldest(tx, reason);
            }
        };
        let length = tx.push_used(0) - self.stages.header_length();
        self.stages.observe(position, start, length, Outcome::Sent, done);
        done.tx.frames += 1;
        done.tx.bytes += length as u64;
        if how == Validated::Copied && start.needs_segmentation() {
            done.tx.overhead += start.overhead(length);
        }
    }
}

/// Writes the valid frames with one system call, and notes the frames that the TAP refuses. Returns the number of
/// frames that are finished. If io_uring fails for the others, the port uses `writev` from then on.
fn write_burst(frames: &mut [Frame], segments: &[ReadSegment<'_>], host: &mut TapQueue) -> usize {
    let Some(writer) = &mut host.writer else { return 0 };
    let mut results = [0; MAX_WRITES];
    let parts = frames.iter().map(Frame::segments).filter(|part| !part.is_empty());
    let written = writer.write_all(parts.map(|part| &segments[part]), &mut results);
    let submitted = written.as_ref().map_or_else(|error| error.submitted, |()| MAX_WRITES);
    if let Err(error) = written {
        let valid = frames.iter().filter(|frame| !frame.segments().is_empty()).count();
        warn!(
            "tap {}: io_uring failed after {submitted} of {valid} frames: {}; using writev from \
             now on",
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
            Some(result) if *result < 0 => frame.validated = Err(DropReason::HostRefused),
            Some(_) => {}
            None => return index,
        }
    }
    frames.len()
}

/// Empties a list, and keeps its allocation for segments of another lifetime.
fn emptied<'to>(mut segments: Vec<ReadSegment<'_>>) -> Vec<ReadSegment<'to>> {
    segments.clear();
    segments.into_iter().map(|_| unreachable!("it is empty")).collect()
}
