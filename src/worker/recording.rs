//! A session's frames, as a capture gets them: when they have been moved, and before their chains go
//! back to the guest.

use crate::capture::Recorder;
use crate::guest::{Chain, Direction, ReadSegment};
use crate::port::{Finished, Outcome};
use crate::traffic::Way;

/// Puts all frames that have finished into the capture. `header` is the length of the virtio header.
///
/// A frame from the guest begins with the private start that was judged and sent. One that was sent
/// before there was a capture has none, and is left out: its memory may say anything by now.
pub(super) fn record(recorder: &Recorder, pair: u16, finished: &mut Finished<'_>, header: usize) {
    let Finished { tx, tx_starts, .. } = finished;
    for (chain, outcome) in &*tx {
        // Nearly always it is the first.
        let place = tx_starts.iter().position(|(head, _)| *head == chain.head());
        let start = place.and_then(|place| tx_starts.remove(place)).map(|(_, start)| start);
        let dropped = match (outcome, &start) {
            (Outcome::Sent, None) => continue,
            (Outcome::Sent, Some(_)) => None,
            (Outcome::Dropped(reason), _) => Some(*reason),
        };
        let private = start.as_ref().and_then(|start| start.bytes().get(header..));
        let private = private.unwrap_or_default();
        let length = chain.len().saturating_sub(header);
        let rest = (private.len() < length)
            .then(|| chain.segments_after(header + private.len()))
            .into_iter()
            .flatten()
            .map(ReadSegment::from);
        let segments = std::iter::once(ReadSegment::of_bytes(private)).chain(rest);
        recorder.record(Way::Tx, pair, dropped, length, segments);
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
) -> impl Iterator<Item = ReadSegment<'m>> + Clone {
    let mut rest = length;
    chain.segments_after(skip).map_while(move |segment| {
        let kept = segment.first(rest);
        rest -= kept.len();
        (kept.len() > 0).then_some(kept.into())
    })
}
