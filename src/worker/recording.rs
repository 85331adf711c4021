//! A session's frames, as a capture gets them: when they have been moved, and before their chains go
//! back to the guest.

use crate::capture::Recorder;
use crate::guest::{Chain, Direction, Segment};
use crate::port::{Finished, Outcome};
use crate::traffic::Way;

/// Puts all frames that have finished into the capture. `header` is the length of the virtio header.
pub(super) fn record(recorder: &Recorder, pair: u16, finished: &Finished<'_>, header: usize) {
    for (chain, outcome) in &finished.tx {
        let dropped = match outcome {
            Outcome::Sent => None,
            Outcome::Dropped(reason) => Some(*reason),
        };
        let length = chain.len().saturating_sub(header);
        recorder.record(Way::Tx, pair, dropped, length, chain.segments_after(header));
    }
    let mut rest = &finished.rx[..];
    while let Some((first, written)) = rest.first() {
        let buffers = buffers(first, header).min(rest.len());
        let (frame, after) = rest.split_at(buffers);
        rest = after;
        let length = frame.iter().map(|(_, written)| *written as usize).sum::<usize>();
        let first = limited(first, header, (*written as usize).saturating_sub(header));
        let others =
            frame[1..].iter().flat_map(|(chain, written)| limited(chain, 0, *written as usize));
        recorder.record(Way::Rx, pair, None, length.saturating_sub(header), first.chain(others));
    }
}

/// Buffers that a frame to the guest lies in, as its header says: there the guest can have changed it.
fn buffers<D: Direction>(first: &Chain<'_, D>, header: usize) -> usize {
    const NUM_BUFFERS: usize = 10;
    let mut bytes = [0; 2];
    if header < NUM_BUFFERS + bytes.len() {
        return 1;
    }
    if let Some(segment) = first.first_after(NUM_BUFFERS) {
        segment.read(&mut bytes);
    }
    usize::from(u16::from_le_bytes(bytes)).max(1)
}

/// `length` bytes of a chain, after the first `skip`.
fn limited<'m, D: Direction>(
    chain: &Chain<'m, D>,
    skip: usize,
    length: usize,
) -> impl Iterator<Item = Segment<'m>> + Clone {
    let mut rest = length;
    chain.segments_after(skip).map_while(move |segment| {
        let kept = segment.first(rest);
        rest -= kept.len();
        (kept.len() > 0).then_some(kept)
    })
}
